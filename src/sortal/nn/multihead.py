"""MultiHeadAttention: projections around attention, and a key-value cache."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike

from sortal._engine.variable import Cache, describe
from sortal.errors import ArgumentError
from sortal.module import Module
from sortal.nn import dtypes
from sortal.nn.attention import combine_masks, dot_product_attention
from sortal.nn.initializers import (
    NO_METADATA,
    NO_RNGS,
    Initializer,
    Metadata,
    check_sizes,
    default_bias_init,
    default_kernel_init,
)
from sortal.nn.linear import LinearGeneral
from sortal.nn.normalization import LayerNorm
from sortal.random import Rngs, RngStream, is_rngs


class _Init(NamedTuple):
    """How a projection is initialised; what is None or empty is another's."""

    kernel_init: Initializer | None
    bias_init: Initializer | None
    kernel_metadata: Metadata
    bias_metadata: Metadata

    def over(self, other: _Init) -> dict[str, Any]:
        """Arguments of a projection, with missing ones taken from ``other``."""
        pairs = zip(self._fields, self, other, strict=True)
        return {name: mine or others for name, mine, others in pairs}


class MultiHeadAttention(Module):
    """Attention between sequences, by several heads with projections of their own.

    With ``decode=True`` a call takes one token, and the keys and values of those before
    are in Variables of kind ``Cache``, made by ``init_cache``. A full cache is never
    overwritten: one more token is an error; inside a trace, where the index is not
    known, the output is NaN and the cache does not change.

    Args:
      num_heads: number of heads.
      in_features: size of the last axis of the queries' input.
      qkv_features: size of all heads together; ``in_features`` if absent.
      out_features: size of the output's last axis; ``in_features`` if absent.
      num_kv_heads: number of heads of keys and values, a divisor of ``num_heads``;
        each serves as many heads of the queries. ``num_heads`` if absent.
      in_kv_features: size of the last axis of the keys' and values' input;
        ``in_features`` if absent.
      dtype: dtype of the computation; by default, the one that inputs and parameters
        promote to.
      param_dtype: dtype of the parameters.
      broadcast_dropout: whether all batch indices and heads share one dropout mask.
      dropout_rate: the probability that a weight is dropped; 1 drops all.
      deterministic: True disables dropout; None leaves it to the call.
        ``model.train()`` and ``model.eval()`` set it.
      precision: as for ``jax.lax.dot_general``.
      kernel_init: initialiser of the kernels; it sees (in, heads * depth).
      out_kernel_init: initialiser of the output's kernel; ``kernel_init`` if absent.
      bias_init: initialiser of the biases.
      out_bias_init: initialiser of the output's bias; ``bias_init`` if absent.
      use_bias: whether projections have a bias.
      attention_fn: called as ``dot_product_attention`` is.
      decode: whether to use the cache; None leaves it to the call.
      normalize_qk: whether queries and keys go through a LayerNorm, head by head.
      qkv_promote_dtype: casts (inputs, kernel, bias) of the first projections.
      out_promote_dtype: the same of the output's projection.
      ln_promote_dtype: the same of the LayerNorms.
      qkv_dot_general: as for ``LinearGeneral``, of the first projections.
      out_dot_general: the same of the output's projection.
      qkv_dot_general_cls: called to make the former.
      out_dot_general_cls: called to make the latter.
      rngs: gives the keys of stream ``params``.
      keep_rngs: whether to fork the stream ``dropout`` for dropout; else each call
        needs ``rngs``.
      kernel_metadata: metadata of the kernels.
      out_kernel_metadata: metadata of the output's kernel; ``kernel_metadata`` if
        empty.
      bias_metadata: metadata of the biases.
      out_bias_metadata: metadata of the output's bias; ``bias_metadata`` if empty.
      query_ln_scale_metadata: metadata of the scale that normalises queries.
      key_ln_scale_metadata: metadata of the scale that normalises keys.

    Raises:
      ArgumentError: heads do not divide features or one another; at a call, inputs do
        not fit, ``decode`` or ``deterministic`` is not set, or the cache is full.

    References:
      Vaswani et al., "Attention is all you need", arXiv:1706.03762, section 3.2.2;
      Dehghani et al., arXiv:2302.05442, section 2, for ``normalize_qk``.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((3, 5, 8)), is_causal=True).shape
      (3, 5, 8)
      >>> layer.init_cache((3, 16, 8))
      >>> layer(jnp.ones((3, 1, 8)), decode=True).shape, int(layer.cache_index[...])
      ((3, 1, 8), 1)
    """

    num_heads: int
    in_features: int
    qkv_features: int
    out_features: int
    num_kv_heads: int
    in_kv_features: int
    cached_key: Cache[jax.Array] | None = None
    cached_value: Cache[jax.Array] | None = None
    cache_index: Cache[jax.Array] | None = None

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        broadcast_dropout: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = default_bias_init,
        out_bias_init: Initializer | None = None,
        use_bias: bool = True,
        attention_fn: Callable[..., Any] = dot_product_attention,
        decode: bool | None = None,
        normalize_qk: bool = False,
        qkv_promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        out_promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        ln_promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        qkv_dot_general: Callable[..., Any] | None = None,
        out_dot_general: Callable[..., Any] | None = None,
        qkv_dot_general_cls: Any = None,
        out_dot_general_cls: Any = None,
        rngs: Rngs = NO_RNGS,
        keep_rngs: bool = True,
        kernel_metadata: Metadata = NO_METADATA,
        out_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
        out_bias_metadata: Metadata = NO_METADATA,
        query_ln_scale_metadata: Metadata = NO_METADATA,
        key_ln_scale_metadata: Metadata = NO_METADATA,
    ):
        self._init_sizes(
            num_heads, in_features, qkv_features, out_features, num_kv_heads,
            in_kv_features,
        )  # fmt: skip
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision
        self.broadcast_dropout, self.dropout_rate = broadcast_dropout, dropout_rate
        self.deterministic, self.decode = deterministic, decode
        self.use_bias, self.normalize_qk = use_bias, normalize_qk
        self.attention_fn, self.ln_promote_dtype = attention_fn, ln_promote_dtype
        self.qkv_promote_dtype = qkv_promote_dtype
        self.out_promote_dtype = out_promote_dtype
        self.qkv_dot_general, self.out_dot_general = qkv_dot_general, out_dot_general
        self.qkv_dot_general_cls = qkv_dot_general_cls
        self.out_dot_general_cls = out_dot_general_cls
        self._init_layers(
            _Init(kernel_init, bias_init, kernel_metadata, bias_metadata),
            _Init(out_kernel_init, out_bias_init, out_kernel_metadata,
                   out_bias_metadata),
            (query_ln_scale_metadata, key_ln_scale_metadata), rngs,
        )  # fmt: skip
        self.rngs = rngs.dropout.fork() if keep_rngs and dropout_rate > 0 else None

    def _init_sizes(self, num_heads: int, in_features: int, *others: Any) -> None:
        """Sets the sizes, with defaults, and checks that heads divide them."""
        qkv, out, kv_heads, in_kv = others
        self.num_heads = num_heads
        self.in_features = in_features
        self.qkv_features = in_features if qkv is None else qkv
        self.out_features = in_features if out is None else out
        self.num_kv_heads = num_heads if kv_heads is None else kv_heads
        self.in_kv_features = in_features if in_kv is None else in_kv
        sizes = {
            name: getattr(self, name)
            for name in MultiHeadAttention.__annotations__
            if not name.startswith("cache")
        }
        check_sizes(self, **sizes)
        for divisor, name in (
            ("num_heads", "qkv_features"),
            ("num_kv_heads", "num_heads"),
        ):
            if not sizes[divisor] or sizes[name] % sizes[divisor]:
                raise ArgumentError(
                    f"MultiHeadAttention: {divisor}={sizes[divisor]} must divide "
                    f"{name}={sizes[name]}."
                )
        self.head_dim = self.qkv_features // num_heads

    def _init_layers(
        self, first: _Init, last: _Init, scales: tuple[Metadata, Metadata], rngs: Rngs
    ) -> None:
        """Makes projections and norms, in the order in which Flax draws their keys."""
        project = functools.partial(
            LinearGeneral,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            rngs=rngs,
        )
        into = functools.partial(
            project,
            promote_dtype=self.qkv_promote_dtype,
            dot_general=self.qkv_dot_general,
            dot_general_cls=self.qkv_dot_general_cls,
            **first._asdict(),
        )
        self.query = into(self.in_features, (self.num_heads, self.head_dim))
        self.key = into(self.in_kv_features, (self.num_kv_heads, self.head_dim))
        self.value = into(self.in_kv_features, (self.num_kv_heads, self.head_dim))
        self.query_ln, self.key_ln = (
            self._norm(metadata, rngs) if self.normalize_qk else None
            for metadata in scales
        )
        self.out = project(
            (self.num_heads, self.head_dim),
            self.out_features,
            axis=(-2, -1),
            promote_dtype=self.out_promote_dtype,
            dot_general=self.out_dot_general,
            dot_general_cls=self.out_dot_general_cls,
            **last.over(first),
        )

    def _norm(self, metadata: Metadata, rngs: Rngs) -> LayerNorm:
        return LayerNorm(
            self.head_dim,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            promote_dtype=self.ln_promote_dtype,
            rngs=rngs,
            scale_metadata=metadata,
        )

    def __call__(
        self,
        inputs_q: Any,
        inputs_k: Any = None,
        inputs_v: Any = None,
        *,
        mask: Any = None,
        deterministic: bool | None = None,
        rngs: Rngs | RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
        input_positions: Any = None,
    ) -> jax.Array:
        """Applies the layer.

        Args:
          inputs_q: array (*batch, queries, in_features).
          inputs_k: array (*batch, keys, in_kv_features); ``inputs_q`` if absent.
          inputs_v: array (*batch, keys, in_kv_features); ``inputs_k`` if absent.
          mask: True or nonzero where a query may attend to a key; broadcasts to
            (*batch, num_heads, queries, keys), and when decoding has as many axes.
          deterministic: True disables dropout; the layer's own if absent.
          rngs: streams, of which ``dropout`` is taken, or a stream; the layer's own if
            absent.
          sow_weights: whether to record the weights in this layer, as
            ``attention_weights``, an Intermediate.
          decode: whether to use the cache; the layer's own if absent. If so, queries
            and keys have length 1, and attend to all tokens so far.
          is_causal: whether query i attends to keys 0 to i only. Ignored
            when decoding, which is always causal.
          out_sharding: sharding of the output, on an explicit or automatic mesh.
          qkv_sharding: sharding of queries, keys and values, likewise.
          input_positions: the positions of the queries, (*batch, queries), for an
            ``attention_fn`` that takes them. When decoding, the position in the cache
            if absent.

        Returns:
          Array (*batch, queries, out_features).

        Raises:
          ArgumentError: inputs do not fit; ``decode``, ``deterministic`` or ``rngs`` is
            not set; there is no cache, one of another shape, or a full one.
        """
        if inputs_k is None and inputs_v is not None:
            raise ArgumentError(
                "MultiHeadAttention was given inputs_v and no inputs_k. For one array "
                "as both, pass it as inputs_k."
            )
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        query = self.query(inputs_q, out_sharding=qkv_sharding)
        key = self.key(inputs_k, out_sharding=qkv_sharding)
        value = self.value(inputs_v, out_sharding=qkv_sharding)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        decode = dtypes.resolve_flag(self, "decode", decode)
        options: dict[str, Any] = dtypes.given(input_positions=input_positions)
        full: Any = False
        if decode:
            key, value, place, full = self._appended(key, value)
            there = jnp.arange(key.shape[-3], dtype=place.dtype) <= place
            shape = (*key.shape[:-3], 1, 1, key.shape[-3])
            mask = combine_masks(mask, jnp.broadcast_to(there, shape))
            if not options and _takes_positions(self.attention_fn):
                options = {"input_positions": place[None]}
        out = self.attention_fn(
            query,
            key,
            value,
            mask=mask,
            broadcast_dropout=self.broadcast_dropout,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            precision=self.precision,
            module=self if sow_weights else None,
            is_causal=is_causal and not decode,
            **self._dropout(deterministic, rngs),
            **options,
        )
        out = self.out(out, out_sharding=out_sharding)
        if decode:  # last, so that what is refused before has changed nothing
            self.cached_key[...] = key  # type: ignore[index]
            self.cached_value[...] = value  # type: ignore[index]
            self.cache_index[...] = place + 1  # type: ignore[index]
        return out if full is False else jnp.where(full, jnp.nan, out)

    def _dropout(self, deterministic: bool | None, rngs: Any) -> dict[str, Any]:
        """Whether to drop weights, and the key to draw with."""
        if self.dropout_rate == 0 or dtypes.resolve_flag(
            self, "deterministic", deterministic
        ):
            return {"deterministic": True, "dropout_rng": None}
        rngs = self.rngs if rngs is None else rngs
        if not isinstance(rngs, (Rngs, RngStream)):
            raise ArgumentError(
                f"MultiHeadAttention has nothing to draw from: found rngs="
                f"{describe(rngs)}. Build it with keep_rngs=True, or pass an Rngs or a "
                "stream to the call as rngs=; or write model.eval()."
            )
        stream = rngs.dropout if is_rngs(rngs) else rngs
        return {"deterministic": False, "dropout_rng": stream()}

    def _appended(self, key: Any, value: Any) -> tuple[Any, Any, Any, Any]:
        """The cache with keys and values (*batch, 1, kv_heads, depth) appended.

        Returns all keys and values, the index of the new one, and whether the cache was
        full: False where that is known.
        """
        keys, values, index = self.cached_key, self.cached_value, self.cache_index
        if keys is None or values is None or index is None:
            raise ArgumentError(
                "MultiHeadAttention has no cache to decode with. Call "
                "layer.init_cache((*batch, length, in_features)) before."
            )
        *batch, length, heads, depth = keys.shape
        one = (*batch, 1, heads, depth)
        if not key.shape == value.shape == one or key.dtype != keys.dtype:
            raise ArgumentError(
                f"MultiHeadAttention decodes one place at a call, with a cache "
                f"{describe(keys.value)} of keys (*batch, length, kv_heads, depth); "
                f"found keys {describe(key)} and values {describe(value)}. Call "
                "init_cache for this batch and with dtype=jnp."
                f"{jnp.dtype(key.dtype).name}, and pass inputs of length 1."
            )
        place = index[...]
        if isinstance(place, Tracer):
            full = place >= length
        elif full := int(place) >= length:
            raise ArgumentError(
                f"MultiHeadAttention: the cache is full: it has room for {length} "
                f"places, and {int(place)} are taken. Call init_cache for a longer "
                "one, or to begin again."
            )
        zero = jnp.zeros_like(place)  # of its dtype, whatever numbers are by default
        start = (*(zero for _ in batch), place, zero, zero)
        appended = []
        for cache, new in ((keys[...], key), (values[...], value)):
            if full is not False:
                # JAX moves slices beyond the end back onto the last entries.
                old = lax.dynamic_slice(cache, start, new.shape)
                new = jnp.where(full, old, new)  # noqa: PLW2901 - the same value
            appended.append(lax.dynamic_update_slice(cache, new, start))
        return *appended, place, full

    def init_cache(
        self, input_shape: Sequence[int], dtype: DTypeLike = jnp.float32
    ) -> None:
        """Makes an empty cache for decoding, and drops an old one.

        Args:
          input_shape: (*batch, length, features) of all tokens; the last entry is not
            used.
          dtype: dtype of keys and values, that of the computation.

        Raises:
          ArgumentError: the shape has no length.
        """
        if len(input_shape) < 2:
            raise ArgumentError(
                "MultiHeadAttention.init_cache needs a shape (*batch, length, "
                f"features); found {tuple(input_shape)}."
            )
        shape = (*input_shape[:-1], self.num_kv_heads, self.head_dim)
        self.cached_key = Cache(jnp.zeros(shape, dtype))
        self.cached_value = Cache(jnp.zeros(shape, dtype))
        self.cache_index = Cache(jnp.array(0, dtype=jnp.int32))

    def set_view(
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: int | Sequence[int] | None = None,
        max_length: int | None = None,
    ) -> None:
        """Sets the attributes given; ``view`` calls it on copies of modules.

        Args:
          deterministic: whether to disable dropout.
          decode: whether to use the cache.
          batch_size: shape of the batch of a cache to be made, where there is none.
          max_length: its length.
        """
        self.deterministic = _or(deterministic, self.deterministic)
        self.decode = _or(decode, self.decode)
        if not self.decode or self.cached_key is not None:
            return
        if batch_size is not None and max_length is not None:
            batch = (batch_size,) if isinstance(batch_size, int) else batch_size
            shape = (*batch, max_length, self.in_features)
            self.init_cache(shape, _or(self.dtype, self.param_dtype))


def _or(given: Any, otherwise: Any) -> Any:
    return otherwise if given is None else given


def _takes_positions(attention_fn: Callable[..., Any]) -> bool:
    return "input_positions" in inspect.signature(attention_fn).parameters
