"""DecoderAttention: causal self-attention with a key-value cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sortal._engine.paths import show
from sortal._engine.promotion import mixing
from sortal._engine.variable import describe
from sortal.errors import ArgumentError, CacheError, listing
from sortal.module import Module, iter_modules
from sortal.nn import dtypes
from sortal.nn.cache import KVCache
from sortal.nn.initializers import (
    NO_RNGS,
    Initializer,
    check_sizes,
    default_kernel_init,
)
from sortal.nn.linear import Linear
from sortal.nn.rope import rotary
from sortal.random import Rngs


class DecoderAttention(Module):
    """Causal self-attention with grouped-query heads, rotary positions and a cache.

    Without a cache, each token of a call attends to itself and those before it. With
    one, made by ``init_cache``, the tokens of a call follow those in the cache: first a
    whole prompt, then one token at a time, each sequence at its own position.

    Args:
      in_features: features of the input and of the output.
      num_heads: heads of the queries.
      num_key_value_heads: heads of keys and values, each used by ``num_heads //
        num_key_value_heads`` heads of the queries; ``num_heads`` if absent.
      head_dim: features of a head; ``in_features // num_heads`` if absent.
      rotary_base: the base of ``rotary``; None leaves positions out.
      window: how many tokens a query attends to, itself included; all if absent.
      use_bias: whether the four projections have biases.
      dtype: dtype of the computation; by default, the one that input and parameters
        promote to.
      param_dtype: dtype of the parameters.
      precision: as for ``jax.lax.dot_general``, of the projections.
      kernel_init: initialiser of the projections' kernels.
      rngs: gives the keys of stream ``params``.

    Attributes:
      query, key, value, out: the projections, Linear.
      cache: a KVCache or None.

    Raises:
      ArgumentError: a size is not a whole number, or does not divide as above.

    References:
      Ainslie et al., "GQA: training generalized multi-query transformer models from
      multi-head checkpoints", arXiv:2305.13245, section 2.2.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.DecoderAttention(8, 2, num_key_value_heads=1, rngs=nnx.Rngs(0))
      >>> x = jnp.arange(24.0).reshape(1, 3, 8)
      >>> whole = layer(x)
      >>> nnx.init_cache(layer, batch=1, length=4)
      >>> parts = jnp.concatenate([layer(x[:, :2]), layer(x[:, 2:])], axis=1)
      >>> bool(jnp.allclose(whole, parts, atol=1e-5)), layer.cache.position.value
      (True, Array([3], dtype=int32))
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        rotary_base: float | None = 10_000.0,
        window: int | None = None,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        rngs: Rngs = NO_RNGS,
    ):
        check_sizes(self, in_features=in_features, num_heads=num_heads)
        for name, size in (
            ("num_key_value_heads", num_key_value_heads),
            ("head_dim", head_dim),
            ("window", window),
        ):
            if size is not None:
                check_sizes(self, **{name: size})
        kv_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        _check_heads(in_features, num_heads, kv_heads, head_dim, window)
        self.in_features = in_features
        self.num_heads = num_heads
        self.num_key_value_heads = kv_heads
        self.head_dim = in_features // num_heads if head_dim is None else head_dim
        self.rotary_base = rotary_base
        self.window = window
        self.dtype = dtype
        self.param_dtype = param_dtype

        def projection(inputs: int, outputs: int) -> Linear:
            return Linear(
                inputs, outputs, use_bias=use_bias, dtype=dtype, precision=precision,
                param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs,
            )  # fmt: skip

        width, narrow = num_heads * self.head_dim, kv_heads * self.head_dim
        self.query = projection(in_features, width)
        self.key = projection(in_features, narrow)
        self.value = projection(in_features, narrow)
        self.out = projection(width, in_features)
        self.cache: KVCache | None = None

    def __call__(self, inputs: Any, lengths: Any = None) -> jax.Array:
        """Attends, and with a cache appends the tokens to it.

        Args:
          inputs: array (batch, tokens, in_features).
          lengths: integers (batch,): how many tokens of each sequence are not padding;
            all if absent.

        Returns:
          Array (batch, tokens, in_features); undefined at padding. NaN
          for a sequence that a cache inside a transform had no room for.

        Raises:
          ArgumentError: the input has another form, or another batch than the cache; or
            lengths do not fit the tokens, see ``KVCache``.
          CacheError: the cache has no room for the tokens; see ``KVCache``.
        """
        inputs = dtypes.as_array(self, inputs)
        if inputs.ndim != 3:
            raise ArgumentError(
                "DecoderAttention takes (batch, tokens, features); found "
                f"{describe(inputs)}. Write inputs[None] for a batch of one."
            )
        if self.cache is not None and self.cache.position.shape != inputs.shape[:1]:
            raise ArgumentError(
                f"this DecoderAttention has a cache for {self.cache.position.size} "
                f"sequences; found {describe(inputs)}. Make caches for another batch "
                "with init_cache(model, batch, length)."
            )
        if self.cache is None and lengths is not None:
            batch, tokens, _ = inputs.shape
            dtypes.checked_lengths("lengths", lengths, (batch,), tokens)
        query = self._heads(self.query(inputs), self.num_heads)
        key = self._heads(self.key(inputs), self.num_key_value_heads)
        value = self._heads(self.value(inputs), self.num_key_value_heads)
        positions = jnp.arange(inputs.shape[1], dtype=jnp.int32)
        if self.cache is not None:
            positions = self.cache.position[...][:, None] + positions[None]
        if self.rotary_base is not None:
            query = rotary(query, positions, base=self.rotary_base)
            key = rotary(key, positions, base=self.rotary_base)
        if self.cache is None:
            mixed = mixing(jax.nn.dot_product_attention)(
                query, key, value, is_causal=True, local_window_size=self._before()
            )
        else:
            mixed = self._from_cache(self.cache, query, key, value, positions, lengths)
        width = self.num_heads * self.head_dim
        return self.out(mixed.reshape(*inputs.shape[:2], width))

    def _heads(self, x: jax.Array, heads: int) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, self.head_dim)

    def _before(self) -> tuple[int, int] | None:
        return None if self.window is None else (self.window - 1, 0)

    def _from_cache(
        self,
        cache: KVCache,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        positions: jax.Array,
        lengths: Any,
    ) -> jax.Array:
        held = cache.append(key.swapaxes(1, 2), value.swapaxes(1, 2), lengths)
        there, here = held.positions[:, None, :], positions[:, :, None]
        seen = (there >= 0) & (there <= here)
        # In a ring, tokens that enter one by one attend to this many; several at once
        # must attend to no more.
        window = min(self.window or cache.length, cache.length)
        if cache.ring or self.window is not None:
            seen &= there > here - window
        # With this function, XLA writes the new tokens into the donated cache without a
        # copy; with plain products it copies.
        mixed = mixing(jax.nn.dot_product_attention)(
            query,
            held.keys.swapaxes(1, 2).astype(query.dtype),
            held.values.swapaxes(1, 2).astype(query.dtype),
            mask=seen[:, None],
        )
        lost = cache.overflowed[:, None, None, None]
        return jnp.where(lost, jnp.nan, mixed)


def init_cache(
    model: Any,
    batch: int,
    length: int,
    *,
    dtype: DTypeLike | None = None,
    ring: bool = False,
) -> None:
    """Gives every DecoderAttention in a model an empty cache.

    ``model.set_attributes(DecoderAttention, cache=None)`` removes the caches.

    Args:
      model: a Module.
      batch: how many sequences are decoded at once.
      length: slots for each; an attention with a smaller ``window`` gets a ring of the
        window's size.
      dtype: dtype of keys and values; of the attention's computation if absent.
      ring: whether a new token replaces the oldest one in a full cache.

    Raises:
      ArgumentError: a size is not a positive whole number.
      CacheError: there is no DecoderAttention in the model.

    Example:
      >>> import sortal as nnx
      >>> layer = nnx.DecoderAttention(8, 2, rngs=nnx.Rngs(0))
      >>> nnx.init_cache(layer, batch=3, length=16)
      >>> layer.cache.keys.shape
      (3, 2, 16, 4)
    """
    found = [m for _, m in iter_modules(model) if isinstance(m, DecoderAttention)]
    if not found:
        raise CacheError(
            f"init_cache found no DecoderAttention in {type(model).__name__}, and so "
            f"nothing that could use a cache.{_caches_of_their_own(model)}"
        )
    made = [
        KVCache(
            batch,
            min(length, m.window or length),
            m.num_key_value_heads,
            m.head_dim,
            dtype=dtype or m.dtype or m.param_dtype,
            ring=ring or (m.window is not None and m.window < length),
        )
        for m in found
    ]
    for attention, cache in zip(found, made, strict=True):
        attention.cache = cache


def reset_cache(model: Any, where: Any = None) -> None:
    """Empties all KVCaches of a model, which keep their shapes.

    Args:
      model: a Module.
      where: booleans (batch,): the sequences to empty; all if absent.

    Raises:
      ArgumentError: ``where`` has another shape or dtype.
      CacheError: there is no KVCache in the model.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.DecoderAttention(8, 2, rngs=nnx.Rngs(0))
      >>> nnx.init_cache(layer, batch=2, length=16)
      >>> _ = layer(jnp.ones((2, 3, 8)))
      >>> nnx.reset_cache(layer, jnp.array([True, False]))
      >>> layer.cache.position.value
      Array([0, 3], dtype=int32)
    """
    found = [m for _, m in iter_modules(model) if isinstance(m, KVCache)]
    if not found:
        raise CacheError(
            f"reset_cache found no KVCache in {type(model).__name__}. Make them with "
            f"init_cache(model, batch, length).{_caches_of_their_own(model)}"
        )
    for cache in found:
        cache.reset(where)


def _caches_of_their_own(model: Any) -> str:
    """A sentence about attention that is called with its own cache, Flax's too."""
    found = [
        f"{show(p)} ({type(m).__name__})"
        for p, m in iter_modules(model)
        if hasattr(m, "init_cache")
    ]
    if not found:
        return ""
    return (
        "\nThese have a cache of their own, which attention.init_cache((batch, length, "
        f"features)) makes and empties:\n{listing(found)}"
    )


def _check_heads(
    features: int, heads: int, kv_heads: int, head_dim: int | None, window: int | None
) -> None:
    if head_dim is None and (heads == 0 or features % heads):
        raise ArgumentError(
            f"DecoderAttention: {features} features do not divide into {heads} heads. "
            "Choose num_heads to divide in_features, or pass head_dim."
        )
    if not 0 < kv_heads <= heads or heads % kv_heads:
        raise ArgumentError(
            f"DecoderAttention: {heads} query heads do not divide among {kv_heads} "
            "key-value heads. Choose num_key_value_heads to divide num_heads."
        )
    if window is not None and window < 1:
        raise ArgumentError(
            f"DecoderAttention(window={window}): a query sees itself at least, so that "
            "a window is 1 or more. None is for no window."
        )
