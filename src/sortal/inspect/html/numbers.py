"""Facts about the numbers of an array: range, NaNs, zeros, histogram, differences.

Arrays are read by blocks, so that beside an array itself little memory is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sortal._engine.host import to_host

BINS = 32
# Fits the cache of a core; beyond 128 kB each temporary is new memory of the system.
_BLOCK = 1 << 15


class Numbers(NamedTuple):
    """What is known of the numbers of one array.

    ``low``, ``high``, ``mean`` and ``std`` are of the finite numbers, and None where
    there is none or they are beyond float64. ``bins`` counts the finite numbers between
    ``low`` and ``high``, each bin without its upper end but for the last; an array of
    few different integers has a bin for each.
    """

    count: int
    low: float | int | None
    high: float | int | None
    mean: float | None
    std: float | None
    zeros: int
    nans: int
    infinities: int
    bins: tuple[int, ...]


class Gap(NamedTuple):
    """How the numbers of two arrays of one shape differ.

    ``largest`` is the largest absolute difference, infinite where only one of the two
    is NaN, NaN where they are no numbers; ``share`` is the fraction with other bits.
    """

    largest: float
    share: float


def host(x: Any) -> np.ndarray:
    """Any part of a value as an array in host memory, to be counted or compared.

    Random keys become their words, and objects that are no arrays their repr. JAX keeps
    a host copy of what ``numpy.asarray`` reads from an accelerator or from several
    devices, for as long as the array lives. So such an array is read by shards.

    Example:
      >>> import jax.numpy as jnp
      >>> host(jnp.arange(3)), host("text")
      (array([0, 1, 2], dtype=int32), array('text', dtype='<U4'))
    """
    if not isinstance(x, jax.Array):
        found = np.asarray(x)
        return np.asarray(repr(x)) if found.dtype.hasobject else found
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    pieces = [shard for shard in x.addressable_shards if shard.replica_id == 0]
    parts = to_host([shard.data for shard in pieces])
    if len(parts) == 1:
        return np.asarray(parts[0])
    whole = np.empty(x.shape, x.dtype)
    for shard, part in zip(pieces, parts, strict=True):
        whole[shard.index] = np.asarray(part)
    return whole


def is_numeric(x: np.ndarray) -> bool:
    """Whether an array is of numbers or booleans."""
    return x.dtype.kind in "biufc" or bool(jnp.issubdtype(x.dtype, np.number))


def numbers(arrays: Sequence[np.ndarray]) -> Numbers | None:
    """The facts of the numbers of all arrays together; None where there are none.

    Of complex numbers the absolute values are taken.

    Example:
      >>> found = numbers([np.array([0.0, 1.0, np.nan, 3.0])])
      >>> found.low, found.high, found.zeros, found.nans, sum(found.bins)
      (0.0, 3.0, 1, 1, 3)
    """
    arrays = [x for x in arrays if x.size and is_numeric(x)]
    if not arrays:
        return None
    only = next(_blocks(arrays)) if _in_one(arrays) else None

    def blocks() -> Iterator[np.ndarray]:
        return _blocks(arrays) if only is None else iter((only,))

    whole = all(_is_whole(x.dtype) for x in arrays)
    with np.errstate(all="ignore"):
        found = _numbers(blocks, whole)
    if whole:  # float64 does not hold every integer of 64 bits
        low, high = min(int(x.min()) for x in arrays), max(int(x.max()) for x in arrays)
        return found._replace(low=low, high=high)
    return found


def _is_whole(dtype: np.dtype) -> bool:
    return dtype.kind in "biu" or jnp.issubdtype(dtype, np.integer)


def _in_one(arrays: Sequence[np.ndarray]) -> bool:
    return len(arrays) == 1 and arrays[0].size <= _BLOCK


def _numbers(blocks: Callable[[], Iterator[np.ndarray]], whole: bool) -> Numbers:
    count = zeros = nans = infinities = finite = 0
    low, high, total = math.inf, -math.inf, 0.0
    for x in blocks():
        count += x.size
        zeros += x.size - int(np.count_nonzero(x))
        small, large = float(x.min()), float(x.max())
        if not (math.isfinite(small) and math.isfinite(large)):
            nans += int(np.count_nonzero(np.isnan(x)))
            infinities += int(np.count_nonzero(np.isinf(x)))
            x = x[np.isfinite(x)]  # noqa: PLW2901
            if not x.size:
                continue
            small, large = float(x.min()), float(x.max())
        finite += x.size
        low, high, total = min(low, small), max(high, large), total + float(x.sum())
    if not finite:
        return Numbers(count, None, None, None, None, zeros, nans, infinities, ())
    mean = total / finite
    width = int(high - low) + 1 if whole and high - low < BINS else BINS
    bins, squares = np.zeros(1 if low == high else width, np.int64), 0.0
    for x in blocks():
        if nans or infinities:
            x = x[np.isfinite(x)]  # noqa: PLW2901
        off = x - mean
        squares += float(np.square(off, out=off).sum())
        bins += _counts(x, low, high, len(bins))
    std = math.sqrt(squares / finite)
    return Numbers(
        count,
        low,
        high,
        mean if math.isfinite(mean) else None,
        std if math.isfinite(std) else None,
        zeros,
        nans,
        infinities,
        tuple(bins.tolist()),
    )


def _counts(x: np.ndarray, low: float, high: float, n: int) -> np.ndarray:
    if n == 1:
        return np.array([x.size])
    if math.isfinite(high - low):
        at = (x - low) / (high - low) * n
    else:
        at = (x / 2 - low / 2) / (high / 2 - low / 2) * n
    return np.bincount(np.minimum(at.astype(np.intp), n - 1), minlength=n)


def _blocks(arrays: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """The numbers of arrays in any order, as float64."""
    for array in arrays:
        # An array whose first axis is the fastest needs no copy so.
        flat = array.reshape(-1, order="F" if array.flags.fnc else "C")
        for i in range(0, flat.size, _BLOCK):
            block = flat[i : i + _BLOCK]
            yield np.abs(_real(block)) if block.dtype.kind == "c" else _real(block)


def _real(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def gap(a: np.ndarray, b: np.ndarray) -> Gap | None:
    """How two arrays of one shape and dtype differ; None where every bit is equal.

    Example:
      >>> gap(np.array([1.0, 2.0]), np.array([1.0, 2.5]))
      Gap(largest=0.5, share=0.5)
      >>> gap(np.array([0.0]), np.array([-0.0]))
      Gap(largest=0.0, share=1.0)
    """
    a, b = (np.ascontiguousarray(x).reshape(-1) for x in (a, b))
    largest, differ = 0.0, 0
    for i in range(0, a.size, _BLOCK):
        x, y = a[i : i + _BLOCK], b[i : i + _BLOCK]
        bits = (_bytes(x) != _bytes(y)).any(-1)
        if not bits.any():
            continue
        differ += int(np.count_nonzero(bits))
        if not is_numeric(x):
            largest = math.nan
            continue
        with np.errstate(all="ignore"):
            u, v = _real(x[bits]), _real(y[bits])
            apart = np.abs(u - v)
        apart[np.isnan(u) & np.isnan(v) | (u == v)] = 0
        apart[np.isnan(apart)] = math.inf
        largest = max(largest, float(apart.max()))
    return Gap(largest, differ / a.size) if differ else None


def _bytes(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint8).reshape(x.size, x.itemsize)
