"""Attention as functions: weights, weighted sums, masks and rotary positions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sortal._engine.promotion import mixing
from sortal._engine.variable import Intermediate, Variable, describe
from sortal.errors import ArgumentError
from sortal.module import Module
from sortal.nn import dtypes


def dot_product_attention_weights(
    query: Any,
    key: Any,
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: Module | None = None,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    is_causal: bool = False,
) -> jax.Array:
    """Attention weights: ``softmax(query @ key / sqrt(depth))``.

    Args:
      query: array (*batch, queries, heads, depth).
      key: array (*batch, keys, kv_heads, depth); ``kv_heads`` divides ``heads``;
        each head of the key is used by consecutive heads of the query.
      bias: added to the logits; broadcasts to (*batch, heads, queries, keys).
      mask: True or nonzero where a query may attend to a key; broadcasts likewise.
      broadcast_dropout: whether all batch indices and heads share one dropout mask.
      dropout_rng: key for dropout.
      dropout_rate: the probability that a weight is dropped; 1 drops all.
      deterministic: True disables dropout.
      dtype: dtype of the computation; by default, the one that query and key promote
        to.
      precision: as for ``jax.numpy.einsum``.
      module: where to sow the weights, as Intermediate ``attention_weights``.
      promote_dtype: casts (query, key) to one dtype.
      is_causal: whether query i attends to keys 0 to i only.

    Returns:
      Array (*batch, heads, queries, keys).

    Raises:
      ArgumentError: shapes do not fit one another, the rate is out of range, or there
        is no key for dropout.

    References:
      Vaswani et al., "Attention is all you need", arXiv:1706.03762, equation 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> x = jnp.ones((2, 1, 4))
      >>> nnx.dot_product_attention_weights(x, x, is_causal=True)[0].tolist()
      [[1.0, 0.0], [0.5, 0.5]]
    """
    drops = not deterministic and dropout_rate > 0
    _check_dropout(dropout_rate, dropout_rng if drops else "not needed")
    query, key = promote_dtype((query, key), dtype=dtype)
    dtype = query.dtype
    _check_operands(query, key)
    mask, bias = (_check_weights(x, query, key) for x in (mask, bias))
    query = query / jnp.sqrt(query.shape[-1]).astype(dtype)
    weights = _logits(query, key, precision)
    if bias is not None:
        weights = weights + bias
    if is_causal:
        causal = dtypes.lifted(jnp.tril(jnp.ones(weights.shape[-2:], bool)), weights)
        mask = causal if mask is None else jnp.logical_and(mask, causal)
    if mask is not None:
        weights = jnp.where(mask.astype(bool), weights, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(weights).astype(dtype)
    if module is not None:
        module.sow(Intermediate, "attention_weights", weights)
    if drops:
        shape = weights.shape
        if broadcast_dropout:
            shape = (*(1 for _ in shape[:-2]), *shape[-2:])
        if dropout_rate == 1.0:
            return jnp.zeros_like(weights)
        keep = 1.0 - dropout_rate
        kept = jax.random.bernoulli(dropout_rng, keep, shape)
        weights = weights * (kept.astype(dtype) / jnp.asarray(keep, dtype=dtype))
    return weights


def _logits(query: Any, key: Any, precision: Any) -> Any:
    """Products of queries and keys; a head of the key serves a group of the query's."""
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if heads == kv_heads:
        return jnp.einsum("...qhd,...khd->...hqk", query, key, precision=precision)
    grouped = (*query.shape[:-2], kv_heads, heads // kv_heads, query.shape[-1])
    weights = jnp.einsum(
        "...qhgd,...kh1d->...hgqk",
        query.reshape(grouped),
        jnp.expand_dims(key, -2),
        precision=precision,
    )
    return weights.reshape((*weights.shape[:-4], heads, *weights.shape[-2:]))


def _mixed(weights: Any, value: Any, precision: Any) -> Any:
    """The sum of values by weights; a head of the value serves a group of weights."""
    heads, kv_heads = weights.shape[-3], value.shape[-2]
    if heads == kv_heads:
        return jnp.einsum("...hqk,...khd->...qhd", weights, value, precision=precision)
    grouped = (*weights.shape[:-3], kv_heads, heads // kv_heads, *weights.shape[-2:])
    out = jnp.einsum(
        "...hgqk,...kh1d->...qhgd",
        weights.reshape(grouped),
        jnp.expand_dims(value, -2),
        precision=precision,
    )
    return out.reshape((*out.shape[:-3], heads, out.shape[-1]))


def _check_dropout(rate: float, key: Any) -> None:
    if not 0.0 <= rate <= 1.0:
        raise ArgumentError(
            "attention: dropout_rate is the probability that a weight is dropped, from "
            f"0 to 1; found {rate!r}."
        )
    if key is None:
        raise ArgumentError(
            f"attention has nothing to draw from: dropout_rate={rate} and "
            "deterministic=False need a key. Pass dropout_rng=key, or "
            "deterministic=True."
        )


def _check_operands(query: Any, key: Any, value: Any = None) -> None:
    """Refuses queries, keys and values that do not fit one another."""
    others = {"key": key} if value is None else {"key": key, "value": value}
    found = ", ".join(
        f"{n}={describe(x)}" for n, x in {"query": query, **others}.items()
    )
    batch = query.shape[:-3]
    if query.ndim < 3 or any(
        x.ndim != query.ndim or x.shape[:-3] != batch for x in others.values()
    ):
        raise ArgumentError(
            "attention needs arrays (*batch, length, heads, depth) of one batch shape; "
            f"found {found}."
        )
    if query.shape[-1] != key.shape[-1]:
        raise ArgumentError(
            f"attention: query and key must have one depth, the last axis; found "
            f"{found}."
        )
    if value is not None and key.shape[-3] != value.shape[-3]:
        raise ArgumentError(
            f"attention: there must be as many values as keys, on axis -3; found "
            f"{found}."
        )
    if any(not x.shape[-2] or query.shape[-2] % x.shape[-2] for x in others.values()):
        raise ArgumentError(
            "attention: the heads of key and value, on axis -2, must divide those of "
            f"the query; found {found}."
        )


def _check_weights(x: Any, query: Any, key: Any) -> Any:
    """A mask or bias that broadcasts to the weights, of their rank."""
    if x is None:
        return None
    x = dtypes.as_array("attention", x)
    heads, length = query.shape[-2], query.shape[-3]
    shape = (*query.shape[:-3], heads, length, key.shape[-3])
    if not _broadcasts(x.shape, shape):
        raise ArgumentError(
            "attention: masks and biases must broadcast to (*batch, heads, queries, "
            f"keys), here {shape}; found {describe(x)}."
        )
    return dtypes.lifted(x, query)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(n in (1, m) for n, m in pairs)


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: Module | None = None,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    is_causal: bool = False,
) -> jax.Array:
    """Values summed with the weights of ``dot_product_attention_weights``.

    Without dropout and ``module``, and with values of the keys' shape, this is
    ``jax.nn.dot_product_attention``.

    Args:
      query: array (*batch, queries, heads, depth).
      key: array (*batch, keys, kv_heads, depth); ``kv_heads`` divides ``heads``;
        each head of the key is used by consecutive heads of the query.
      value: array (*batch, keys, kv_heads, value_depth).
      bias: added to the logits; broadcasts to (*batch, heads, queries, keys).
      mask: True or nonzero where a query may attend to a key; broadcasts likewise.
      broadcast_dropout: whether all batch indices and heads share one dropout mask.
      dropout_rng: key for dropout.
      dropout_rate: the probability that a weight is dropped; 1 drops all.
      deterministic: True disables dropout.
      dtype: dtype of the computation; by default, the one that the three promote to.
      precision: as for ``jax.numpy.einsum``.
      module: where to sow the weights, as Intermediate ``attention_weights``.
      promote_dtype: casts (query, key, value) to one dtype.
      is_causal: whether query i attends to keys 0 to i only.

    Returns:
      Array (*batch, queries, heads, value_depth).

    Raises:
      ArgumentError: shapes do not fit one another, the rate is out of range, or there
        is no key for dropout.

    References:
      Vaswani et al., "Attention is all you need", arXiv:1706.03762, equation 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> q, kv = jnp.ones((5, 7, 4, 8)), jnp.ones((5, 9, 2, 8))
      >>> nnx.dot_product_attention(q, kv, kv).shape
      (5, 7, 4, 8)
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    _check_operands(query, key, value)
    named = _named_precision(precision)
    # JAX's attention has no values of another depth, or another number of heads.
    alike = key.shape == value.shape
    if dropout_rate == 0.0 and module is None and named is not None and alike:
        mask, bias = (_check_weights(x, query, key) for x in (mask, bias))
        with named:
            return _fused(query, key, value, bias, mask, is_causal)
    weights = dot_product_attention_weights(
        query, key, bias, mask, broadcast_dropout, dropout_rng, dropout_rate,
        deterministic, query.dtype, precision, module, promote_dtype, is_causal,
    )  # fmt: skip
    return _mixed(weights, value, precision)


def _named_precision(precision: Any) -> Any:
    """A context with the precision, for JAX's attention, which has no such argument.

    None if the precision has no name to set as JAX's default.
    """
    if precision is None:
        return contextlib.nullcontext()
    if isinstance(precision, (str, lax.Precision)):
        name = lax.Precision(precision).name.lower()
        return jax.default_matmul_precision(name)
    return None


def _fused(
    query: Any, key: Any, value: Any, bias: Any, mask: Any, is_causal: bool
) -> jax.Array:
    """JAX's attention, which has one batch axis at most, over any number."""
    batch = query.shape[:-3]

    def flat(x: Any, tail: int = 3) -> Any:
        return jnp.reshape(x, (math.prod(batch), *x.shape[-tail:]))

    def spread(x: Any) -> Any:
        if x is not None and len(batch) > 1:
            x = flat(jnp.broadcast_to(x, (*batch, *x.shape[-3:])))
        return x

    bias, mask = spread(bias), spread(mask)
    if mask is not None:
        mask = mask.astype(bool)
    if len(batch) > 1:
        query, key, value = flat(query), flat(key), flat(value)
    out = mixing(jax.nn.dot_product_attention)(
        query, key, value, bias, mask, is_causal=is_causal
    )
    return jnp.reshape(out, (*batch, *out.shape[-3:])) if len(batch) > 1 else out


def make_attention_mask(
    query_input: Any,
    key_input: Any,
    pairwise_fn: Callable[..., Any] = jnp.multiply,
    extra_batch_dims: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """An attention mask from a property of each query and of each key.

    Args:
      query_input: array (*batch, queries), such as 1 for words and 0 for padding.
      key_input: array (*batch, keys).
      pairwise_fn: joins an entry of each; broadcasts.
      extra_batch_dims: how many axes of size 1 to put in front.
      dtype: dtype of the mask.

    Returns:
      Array (*ones, *batch, 1, queries, keys).

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> words = jnp.array([1, 1, 0])
      >>> nnx.make_attention_mask(words, words, dtype=int)[0].tolist()
      [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    """
    mask = pairwise_fn(
        jnp.expand_dims(query_input, axis=-1), jnp.expand_dims(key_input, axis=-2)
    )
    mask = jnp.expand_dims(mask, axis=-3)
    mask = jnp.expand_dims(mask, axis=tuple(range(extra_batch_dims)))
    return mask.astype(dtype)


def make_causal_mask(
    x: Any, extra_batch_dims: int = 0, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """A mask by which each position attends to itself and those before.

    Args:
      x: array (*batch, length); only its shape is used.
      extra_batch_dims: how many axes of size 1 to put in front.
      dtype: dtype of the mask.

    Returns:
      Array (*ones, *batch, 1, length, length).

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> nnx.make_causal_mask(jnp.zeros(3), dtype=int)[0].tolist()
      [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    places = jnp.broadcast_to(jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape)
    return make_attention_mask(
        places, places, jnp.greater_equal, extra_batch_dims, dtype
    )


def combine_masks(*masks: Any, dtype: DTypeLike = jnp.float32) -> jax.Array | None:
    """The logical AND of several masks.

    Args:
      *masks: arrays that broadcast to one another, of one rank; None is ignored.
      dtype: dtype of the mask.

    Returns:
      The mask; None if there is none.

    Raises:
      ArgumentError: the masks differ in rank, or do not broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> nnx.combine_masks(jnp.array([1, 1, 0]), None, jnp.array([0, 1, 1]), dtype=int)
      Array([0, 1, 0], dtype=int32)
    """
    given = [jnp.asarray(m) for m in masks if m is not None]
    if not given:
        return None
    sizes = [set(n) - {1} for n in zip(*(m.shape for m in given), strict=False)]
    if len({m.ndim for m in given}) > 1 or any(len(n) > 1 for n in sizes):
        raise ArgumentError(
            "combine_masks needs masks of one rank that broadcast, such as (*batch, "
            "heads, queries, keys) with ones for axes that are shared; found "
            f"{', '.join(map(describe, given))}."
        )
    mask = given[0].astype(bool)
    for other in given[1:]:
        mask = jnp.logical_and(mask, other)
    return mask.astype(dtype)


class RoPE(Module):
    """Rotary position embedding: turns pairs of features by angles of the position.

    Feature i is paired with feature i + depth / 2, and turned at position p by the
    angle ``p * theta ** (-2 i / depth)``.

    Args:
      theta: the base of the angles.
      embedding_size: depth of the heads, even; given together with ``max_seq_len`` to
        keep tables of sine and cosine, as Variables.
      max_seq_len: how many positions the tables are for.

    Raises:
      ArgumentError: one of the two sizes without the other, or an odd depth; at a
        call, the input has another depth, or more positions than the tables.

    References:
      Su et al., "RoFormer: enhanced transformer with rotary position embedding",
      arXiv:2104.09864, equation 34.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> rope = nnx.RoPE()
      >>> query, key = jnp.ones((2, 1, 5, 4))
      >>> product = rope(query) @ rope(key).mT  # depends on distances alone
      >>> bool(jnp.allclose(product[0, 0, 1], product[0, 3, 4]))
      True
    """

    def __init__(
        self,
        theta: float = 10000.0,
        embedding_size: int | None = None,
        max_seq_len: int | None = None,
    ):
        if (embedding_size is None) != (max_seq_len is None):
            raise ArgumentError(
                "RoPE keeps tables where embedding_size and max_seq_len are both "
                f"given; found embedding_size={embedding_size} and max_seq_len="
                f"{max_seq_len}. Give both, or neither."
            )
        self.theta = theta
        self.cached_sin: Variable[jax.Array] | None = None
        self.cached_cos: Variable[jax.Array] | None = None
        if embedding_size is not None and max_seq_len is not None:
            sin, cos = self._angles(embedding_size, jnp.arange(float(max_seq_len)))
            self.cached_sin, self.cached_cos = Variable(sin), Variable(cos)

    @mixing
    def _angles(self, depth: int, positions: Any) -> tuple[jax.Array, jax.Array]:
        if depth <= 0 or depth % 2:
            raise ArgumentError(
                f"RoPE turns pairs of features, so their number must be even; found "
                f"{depth}."
            )
        frequencies = 1.0 / (self.theta ** (jnp.arange(0.0, depth, 2) / depth))
        angles = jnp.expand_dims(positions, -1)
        angles *= dtypes.lifted(frequencies, angles)
        return jnp.sin(angles), jnp.cos(angles)

    def __call__(self, x: Any, input_positions: Any = None) -> jax.Array:
        """Turns the features of each position.

        Args:
          x: array (..., length, depth).
          input_positions: positions (..., length), which broadcast to the leading axes
            of ``x``; 0, 1, ... if absent.

        Returns:
          Array of the shape of ``x``, in float32 at least.

        Raises:
          ArgumentError: the depth is odd or not that of the tables; there are more
            tokens than the tables are for, and no ``input_positions``; or not one
            position for each token.
        """
        x = dtypes.as_array(self, x)
        if x.ndim < 2:
            raise ArgumentError(
                f"RoPE takes arrays (..., length, depth); found {describe(x)}."
            )
        return _rotated(x, *self._at(x, input_positions))

    def _at(self, x: Any, positions: Any) -> tuple[jax.Array, jax.Array]:
        """Sine and cosine for the positions of ``x``, each (..., length, depth / 2)."""
        length, depth = x.shape[-2:]
        if positions is not None:
            positions = dtypes.as_array(self, positions)
            of_each = positions.ndim and positions.shape[-1] == length
            if not of_each or not _broadcasts(positions.shape, x.shape[:-1]):
                raise ArgumentError(
                    f"RoPE needs one position for each of {length} places; found "
                    f"input_positions {describe(positions)} for an input {describe(x)}."
                )
        if self.cached_sin is None or self.cached_cos is None:
            given = jnp.arange(float(length)) if positions is None else positions
            return self._angles(depth, given)
        sin, cos = self.cached_sin[...], self.cached_cos[...]
        beyond = positions is None and length > sin.shape[0]
        if beyond or depth != 2 * sin.shape[1]:
            raise ArgumentError(
                f"RoPE has tables for {sin.shape[0]} places of {2 * sin.shape[1]} "
                f"features; found an input {describe(x)}. Build it for that, or "
                "without embedding_size and max_seq_len."
            )
        if positions is not None:
            return self._angles(depth, positions)  # they may be beyond the tables
        return sin[:length], cos[:length]


@mixing
def _rotated(x: Any, sin: Any, cos: Any) -> jax.Array:
    sin, cos = (dtypes.lifted(jnp.concatenate([t, t], axis=-1), x) for t in (sin, cos))
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos + turned * sin


def dot_product_attention_with_rope(
    query: Any,
    key: Any,
    value: Any,
    *,
    rope: RoPE,
    input_positions: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """``dot_product_attention`` of a query and key turned by their positions.

    For ``MultiHeadAttention(attention_fn=)``, with ``rope`` given by
    ``functools.partial``.

    Args:
      query: array (*batch, queries, heads, depth).
      key: array (*batch, keys, kv_heads, depth).
      value: array (*batch, keys, kv_heads, value_depth).
      rope: the rotary embedding.
      input_positions: the positions of the queries, (queries,) or (*batch, queries);
        0, 1, ... if absent. They are those of the keys too where there are as many
        keys as queries; else, as with a cache, the keys are at 0, 1, ...
      **kwargs: further arguments of ``dot_product_attention``.

    Returns:
      Array (*batch, queries, heads, value_depth).

    Raises:
      ArgumentError: as for ``RoPE`` and ``dot_product_attention``.

    Example:
      >>> import functools
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.MultiHeadAttention(
      ...     num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0),
      ...     attention_fn=functools.partial(
      ...         nnx.dot_product_attention_with_rope, rope=nnx.RoPE()
      ...     ),
      ... )
      >>> layer(jnp.ones((5, 3, 8))).shape
      (5, 3, 8)
    """
    together = query.shape[-3] == key.shape[-3]
    query = _turned(rope, query, input_positions)
    key = _turned(rope, key, input_positions if together else None)
    return dot_product_attention(query, key, value, **kwargs)


def _turned(rope: RoPE, x: Any, positions: Any) -> jax.Array:
    """Turns (*batch, length, heads, depth), all heads alike."""
    turn = jax.vmap(rope, in_axes=(-2, None), out_axes=-2)
    return turn(x, None if positions is None else jnp.asarray(positions))
