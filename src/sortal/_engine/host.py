"""Memory of the host: arrays that are copied to it, and memory that JAX copies from."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np


def to_host(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Arrays in memory of the host; those of a CPU as they are.

    Those of an accelerator are copied together, to pinned memory. ``numpy.asarray``
    copies one after the other, by way of memory that the system may move, at a
    thirtieth of the speed where arrays are large; and JAX keeps what it returns for as
    long as the array lives.
    """
    far = [i for i, x in enumerate(arrays) if not is_near(x.sharding)]
    found = list(arrays)
    if far:
        there = [found[i].sharding.with_memory_kind("pinned_host") for i in far]
        copies = jax.device_put([found[i] for i in far], there)
        for i, copy in zip(far, copies, strict=True):
            found[i] = copy
    return found


@functools.lru_cache(maxsize=256)
def is_near(sharding: jax.sharding.Sharding) -> bool:
    """Whether arrays of a sharding lie in memory of the host."""
    return (
        next(iter(sharding.device_set)).platform == "cpu"
        or sharding.memory_kind == "pinned_host"
    )


def host_memory(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX copies from: it begins 16 bytes past a multiple of 64.

    JAX would keep well-aligned memory without a copy, and could then neither donate
    such an array nor free one of many that share the memory.
    """
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 128, np.uint8)
    start = -raw.ctypes.data % 64 + 16
    return raw[start : start + size].view(dtype).reshape(shape)
