"""Arrays put onto devices from files, of which the host never holds a large one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sortal._engine.host import host_memory
from sortal._engine.jax_compat import put_pieces
from sortal.checkpoint.loading import Want, cast
from sortal.checkpoint.values import numpy_dtype

_LARGE = 32 << 20
_PART = 2 << 20

Read = Callable[[tuple[slice, ...]], np.ndarray]


def land(want: Want, axis: int, read: Read) -> jax.Array:
    """The wanted array on its devices.

    Args:
      want: its shape, dtypes and sharding.
      axis: the one along which parts are near one another in the file.
      read: gives a part of the array as it is stored, which may be a view of the file.

    Returns:
      The array. It shares no memory with the file.
    """
    shape, dtype = want.array.shape, numpy_dtype(want.dtype)
    sharding: Any = want.sharding
    if sharding is None:
        sharding = jnp.zeros(()).sharding
    places = {
        device: tuple(slice(*s.indices(n)) for s, n in zip(at, shape, strict=True))
        for device, at in sharding.addressable_devices_indices_map(shape).items()
    }
    sharing: dict[Any, list[Any]] = {}
    for device, at in places.items():
        sharing.setdefault(tuple((s.start, s.stop) for s in at), []).append(device)
    made: dict[Any, Any] = {}
    for devices in sharing.values():
        at = places[devices[0]]
        # Other kinds of memory, such as the host's, take whole pieces only.
        usual = all(x.default_memory().kind == sharding.memory_kind for x in devices)
        size = math.prod(s.stop - s.start for s in at) * dtype.itemsize
        if size > _LARGE and usual:
            made.update(_by_parts(want, at, axis, devices, read))
        else:
            host = _whole(want, at, axis, read)
            for device in devices:
                kind = sharding.memory_kind
                here = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
                made[device] = jax.block_until_ready(jax.device_put(host, here))
    like = jax.ShapeDtypeStruct(shape, dtype, weak_type=want.weak)
    pieces = [made[device] for device in places]
    array = put_pieces(like, sharding, pieces, list(places), want.committed)
    # Until it is on its devices, the host holds it too.
    return jax.block_until_ready(array)


def _whole(want: Want, at: tuple[slice, ...], axis: int, read: Read) -> np.ndarray:
    """One piece in the host's memory."""
    # A copy, for JAX would keep well-aligned memory of a mapped file as it is, and the
    # array would change with the file.
    host = host_memory([s.stop - s.start for s in at], numpy_dtype(want.dtype))
    for first, part in _parts(want, at, axis, read):
        rows = slice(first, first + part.shape[axis]) if part.ndim else ...
        host[(slice(None),) * axis + (rows,)] = part
    return host


def _by_parts(
    want: Want, at: tuple[slice, ...], axis: int, devices: Sequence[Any], read: Read
) -> dict[Any, jax.Array]:
    """One piece on several devices, filled a few MiB at a time."""
    shape, dtype = [s.stop - s.start for s in at], numpy_dtype(want.dtype)
    found = [jnp.zeros(shape, dtype, device=device) for device in devices]
    for first, part in _parts(want, at, axis, read):
        found = [_filled(x, part, np.int32(first), axis) for x in found]
        jax.block_until_ready(found)
    return dict(zip(devices, found, strict=True))


def _parts(
    want: Want, at: tuple[slice, ...], axis: int, read: Read
) -> Iterator[tuple[int, np.ndarray]]:
    """The parts of a piece, each of which lies in a few MiB of the file; and its start.

    They have one shape, so that one program serves all: the last may overlap.
    """
    if not at:
        yield 0, cast(want, read(at))
        return
    row = max(1, want.array.nbytes // max(1, want.array.shape[axis]))
    here = at[axis]
    n = here.stop - here.start
    rows = min(n, max(1, _PART // row))
    for first in range(0, n, max(1, rows)):
        start = min(first, n - rows)
        span = slice(here.start + start, here.start + start + rows)
        yield start, cast(want, read((*at[:axis], span, *at[axis + 1 :])))


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _filled(x: jax.Array, part: Any, start: Any, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis)
