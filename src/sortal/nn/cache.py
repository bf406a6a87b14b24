"""KVCache: keys and values of the tokens so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from sortal._engine import paths
from sortal._engine.variable import Cache, describe
from sortal.errors import ArgumentError, CacheError, listing
from sortal.module import Module, iter_modules
from sortal.nn import dtypes
from sortal.nn.initializers import check_sizes


class Held(NamedTuple):
    """What queries may attend to after ``KVCache.append``.

    Attributes:
      keys: (batch, num_heads, slots, head_dim).
      values: the same.
      positions: int32 (batch, slots): the position of the token in a slot; -1 if empty.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array


class KVCache(Module):
    """Keys and values of the tokens of several sequences, each at its own position.

    A cache of fixed length refuses more tokens than it has slots for. Called eagerly,
    ``append`` raises before anything is changed. Inside a transform positions are not
    known: tokens without a slot are then not written, and ``overflowed`` is True for
    that sequence until it is reset; ``DecoderAttention`` returns NaN for it. In a ring,
    each new token replaces the oldest one.

    Args:
      batch: how many sequences.
      length: how many slots each has.
      num_heads: how many heads keys and values have.
      head_dim: features of each head.
      dtype: dtype of keys and values.
      ring: whether a new token replaces the oldest one in a full cache.

    Attributes:
      keys: Cache (batch, num_heads, length, head_dim).
      values: the same.
      position: Cache int32 (batch,): the number of tokens appended to each sequence.

    Raises:
      ArgumentError: a size is not a whole number, the length is 0, or the dtype is not
        a floating-point one.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> cache = nnx.KVCache(batch=2, length=4, num_heads=1, head_dim=8)
      >>> new = jnp.ones((2, 1, 3, 8))                     # three tokens, and room for
      >>> held = cache.append(new, new, jnp.array([3, 1]))  # one after the first only
      >>> held.positions
      Array([[ 0,  1,  2, -1],
             [ 0, -1, -1, -1]], dtype=int32)
      >>> len(nnx.state(cache, nnx.Cache))
      3
    """

    def __init__(
        self,
        batch: int,
        length: int,
        num_heads: int,
        head_dim: int,
        *,
        dtype: DTypeLike = jnp.float32,
        ring: bool = False,
    ):
        check_sizes(
            self, batch=batch, length=length, num_heads=num_heads, head_dim=head_dim
        )
        if length == 0:
            raise ArgumentError("KVCache(length=0): a cache has at least one slot.")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ArgumentError(
                "a KVCache holds floating-point numbers; found dtype="
                f"{jnp.dtype(dtype).name}. Write dtype=jnp.bfloat16."
            )
        shape = (batch, num_heads, length, head_dim)
        self.keys = Cache(jnp.zeros(shape, dtype))
        self.values = Cache(jnp.zeros(shape, dtype))
        self.position = Cache(jnp.zeros((batch,), jnp.int32))
        self.ring = ring

    @property
    def length(self) -> int:
        """How many slots each sequence has."""
        return self.keys.shape[2]

    @property
    def overflowed(self) -> jax.Array:
        """Which sequences were given more tokens than fit: booleans (batch,)."""
        if self.ring:
            return jnp.zeros(self.position.shape, bool)
        return self.position[...] > self.length

    def append(self, keys: Any, values: Any, lengths: Any = None) -> Held:
        """Writes the next tokens of each sequence.

        Args:
          keys: array (batch, num_heads, new, head_dim), cast to the cache's dtype.
          values: the same.
          lengths: integers (batch,): how many of the new tokens are not padding, which
            is not written; all if absent. Inside a transform, numbers below 0 or above
            that of the new tokens count as these.

        Returns:
          What queries at the new positions may attend to: all slots. Where several
          tokens enter a ring, its old tokens and the new ones side by side, because the
          earlier of the new ones may attend to tokens that the later ones replace.

        Raises:
          ArgumentError: shapes do not fit the cache, or lengths the new tokens.
          CacheError: there are fewer slots than tokens; nothing is changed. Inside a
            transform, raised only if the tokens do not fit into an empty cache.
        """
        self._check_shapes(keys, values)
        new = keys.shape[2]
        start = self.position[...]
        counts = jnp.full_like(start, new)
        if lengths is not None:
            counts = dtypes.checked_lengths("lengths", lengths, start.shape, new)
        check_room(self, new if lengths is None else counts)
        end = start + counts
        slots = self._slots(start, counts, new)
        before = Held(self.keys[...], self.values[...], self._holds(start))
        keys, values = keys.astype(self.keys.dtype), values.astype(self.values.dtype)
        self.keys[...] = _write(before.keys, keys, slots)
        self.values[...] = _write(before.values, values, slots)
        self.position[...] = end
        if self.ring and new > 1:
            steps = jnp.arange(new, dtype=jnp.int32)[None]
            entering = jnp.where(
                steps < counts[:, None], start[:, None] + steps, jnp.int32(-1)
            )
            return Held(
                jnp.concatenate([before.keys, keys], axis=2),
                jnp.concatenate([before.values, values], axis=2),
                jnp.concatenate([before.positions, entering], axis=1),
            )
        return Held(self.keys[...], self.values[...], self._holds(end))

    def reset(self, where: Any = None) -> None:
        """Empties the cache; shapes stay, so that nothing is compiled again.

        Keys and values become zeros, because a NaN in a slot reaches the result even at
        a weight of zero.

        Args:
          where: booleans (batch,): the sequences to empty; all if absent.

        Raises:
          ArgumentError: ``where`` has another shape or dtype.
        """
        chosen = jnp.ones((), bool) if where is None else jnp.asarray(where)
        of_each = chosen.shape == self.position.shape and chosen.dtype == bool
        if where is not None and not of_each:
            raise ArgumentError(
                f"where must be bool[{self.position.size}], one for each sequence, "
                f"True to empty it; found {describe(chosen)}."
            )
        for held in (self.keys, self.values, self.position):
            rows = chosen.reshape(-1, *(1,) * (held.ndim - 1))
            held[...] = jnp.where(rows, jnp.zeros((), held.dtype), held[...])

    def _slots(self, start: jax.Array, counts: jax.Array, new: int) -> jax.Array:
        """The slot of each new token, (batch, new); ``length`` if it is not written."""
        steps = jnp.arange(new, dtype=jnp.int32)[None]
        slots = start[:, None] + steps
        kept = steps < counts[:, None]
        if self.ring:
            slots = slots % self.length
            kept &= steps >= counts[:, None] - self.length
        return jnp.where(kept, slots, self.length)

    def _holds(self, count: jax.Array) -> jax.Array:
        """The position in each slot after ``count`` tokens; -1 where it is empty."""
        slots = jnp.arange(self.length, dtype=jnp.int32)[None]
        last = count[:, None] - 1
        if self.ring:
            return jnp.maximum(last - (last - slots) % self.length, -1)
        return jnp.where(slots <= last, slots, -1)

    def _check_shapes(self, keys: Any, values: Any) -> None:
        batch, heads, _, features = self.keys.shape
        fits = keys.ndim == 4 and keys.shape == values.shape
        if not fits or (*keys.shape[:2], keys.shape[3]) != (batch, heads, features):
            raise ArgumentError(
                f"this KVCache holds keys and values ({batch}, {heads}, tokens, "
                f"{features}) of (batch, heads, tokens, features); found keys "
                f"{describe(keys)} and values {describe(values)}. Bring heads before "
                "tokens, as keys.swapaxes(1, 2); or make caches for another batch with "
                "init_cache(model, batch, length)."
            )


def _write(held: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    def one(held: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
        return held.at[:, slots].set(new, mode="drop")

    return jax.vmap(one)(held, new, slots)


def check_room(model: Any, tokens: Any) -> None:
    """Refuses tokens that caches of fixed length have no slots for; writes nothing.

    Args:
      model: a Module; all KVCaches in it are checked.
      tokens: how many more there will be: an integer, or integers (batch,).

    Raises:
      ArgumentError: ``tokens`` is no such integer.
      CacheError: some do not fit; every such cache is named. Inside a transform, where
        positions are not known, only tokens that no cache could take are refused.

    Example:
      >>> import sortal as nnx
      >>> cache = nnx.KVCache(batch=1, length=4, num_heads=1, head_dim=8)
      >>> nnx.check_room(cache, 4)
      >>> try:
      ...     nnx.check_room(cache, 5)
      ... except nnx.errors.CacheError as e:
      ...     print(str(e).splitlines()[1])
        position (Cache): sequence 0 holds 0 of 4 tokens, and 5 more are to come
    """
    rows = []
    for path, cache in iter_modules(model):
        if not isinstance(cache, KVCache) or cache.ring:
            continue
        for sequence, held, more in _beyond(cache, tokens):
            where = path
            if cache is model:
                where = (paths.locate(cache.position)[0] or ("position",))[:-1]
            rows.append(
                f"{paths.show((*where, 'position'))} (Cache): sequence {sequence} "
                f"holds {held} of {cache.length} tokens, and {more} more are to come"
            )
    if rows:
        raise CacheError(
            "a cache of fixed length has no room for all tokens; nothing was "
            f"written:\n{listing(rows)}\nMake longer ones with init_cache(model, "
            "batch, length), let them forget the oldest token with init_cache(..., "
            "ring=True), or begin anew with reset_cache(model)."
        )


def _beyond(cache: KVCache, tokens: Any) -> list[tuple[int, int, int]]:
    """Index, tokens held and tokens to come of each sequence that would overflow."""
    position, length = cache.position[...], cache.length
    if isinstance(tokens, Tracer):
        return []
    if isinstance(position, Tracer) or not isinstance(position, jax.Array | np.ndarray):
        # Not known. Tokens that do not fit an empty cache fit none.
        position = np.zeros(position.shape, np.int32)
    held, more = np.asarray(position), np.asarray(tokens)
    if more.dtype.kind not in "iu" or more.shape not in {(), held.shape}:
        raise ArgumentError(
            f"check_room takes an integer, or an integer for each of {len(held)} "
            f"sequences; found {describe(tokens)}."
        )
    more = np.broadcast_to(more, held.shape)
    over = np.flatnonzero((held + more > length) & (more > 0))
    return [(int(i), int(held[i]), int(more[i])) for i in over]
