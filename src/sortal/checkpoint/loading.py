"""Reads arrays from storage directly into devices, shards or host memory."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sortal._engine.host import host_memory
from sortal._engine.jax_compat import put_pieces
from sortal._engine.paths import show
from sortal.checkpoint.manifest import storage_dtype
from sortal.checkpoint.store import Reader
from sortal.checkpoint.values import Array, numpy_dtype
from sortal.errors import DamagedError, RestoreError, listing

_WINDOW = 16 << 20
_AHEAD = 64 << 20
"""Bytes that may be in flight at a time."""


class Want(NamedTuple):
    """An array of a checkpoint, and what it is to become.

    ``form`` is ``jax``, ``numpy`` or ``scalar``. A ``sharding`` of None means the
    default device, uncommitted.
    """

    path: Any
    array: Array
    form: str
    dtype: str
    weak: bool = False
    sharding: Any = None
    committed: bool = False


def wanted(path: Any, array: Array, like: Any, live: Array, sharding: Any) -> Want:
    """The Want of a live array: its own form, dtype and sharding.

    Whether its type is weak is a part of a value, on which promotion depends, and so
    that of the array stored, where this is one of JAX's and keeps its dtype.

    ``like`` is the live array (for PRNG keys that are not abstract, their words),
    ``live`` its record. A ``sharding`` overrides the live one.
    """
    if live.form != "jax":
        return Want(path, array, live.form, live.dtype)
    committed = sharding is not None
    if sharding is None:
        sharding = getattr(like, "sharding", None)
        committed = sharding is not None and getattr(like, "committed", True)
        if array.key is not None:
            sharding = _of_keys(sharding, len(array.shape))
    if not committed and sharding is not None and len(sharding.device_set) == 1:
        sharding = None
    known = array.form == "jax" and array.dtype == live.dtype
    weak = array.weak if known else live.weak
    return Want(path, array, "jax", live.dtype, weak, sharding, committed)


def _of_keys(sharding: Any, rank: int) -> Any:
    """The sharding of keys, from that of their words, which have one axis more."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    spec = jax.sharding.PartitionSpec(*sharding.spec[:rank])
    kind = sharding.memory_kind
    return jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=kind)


def check_shardings(wants: Iterable[Want]) -> None:
    """Refuses shardings that their arrays cannot have; all are listed."""
    odd = [f"{show(w.path)}: {why}" for w in wants if (why := _unfit(w))]
    if odd:
        raise RestoreError(
            "sharding= does not fit these arrays; the model was left as it was:\n"
            f"{listing(odd)}\nGive a Sharding, a PartitionSpec, a StateSharding or a "
            "Policy; for one device jax.sharding.SingleDeviceSharding(device)."
        )


def _unfit(want: Want) -> str:
    """Why an array cannot have its sharding; empty where it can."""
    if want.sharding is None or want.form != "jax":
        return ""
    if not isinstance(want.sharding, jax.sharding.Sharding):
        return f"{want.sharding!r:.60}, of the type {type(want.sharding).__name__}"
    return _unsplit(want.sharding, want.array.shape)


@functools.lru_cache(maxsize=4096)
def _unsplit(sharding: Any, shape: tuple[int, ...]) -> str:
    spec = getattr(sharding, "spec", ())
    if len(spec) > len(shape):
        return f"{spec} is for {len(spec)} axes, and the shape is {shape}"
    try:
        sharding.shard_shape(shape)
    except Exception as e:  # noqa: BLE001 - whatever JAX raises
        return f"{shape} cannot be split so: {e}"
    return ""


def host_value(want: Want, host: np.ndarray) -> Any:
    """An array already in host memory (for PRNG keys, their words), as it is wanted."""
    memory = host_memory(want.array.stored_shape, numpy_dtype(want.array.dtype))
    memory[...] = host
    return _Putter().whole(want, memory)


class _Job(NamedTuple):
    """One read, and a callback for the memory read."""

    name: str
    at: tuple[slice, ...]
    dtype: str
    then: Callable[[np.ndarray], None]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.at)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * numpy_dtype(self.dtype).itemsize


def load(reader: Reader, wants: Sequence[Want]) -> list[Any]:
    """Reads arrays, in order, with a bounded number of bytes in flight.

    First it checks all files that this process is to read.
    """
    put = _Putter()
    found: list[Any] = [None] * len(wants)
    jobs = list(_jobs(wants, put, found))
    if faults := reader.check((job.name, job.at) for job in jobs):
        raise DamagedError(
            f"the checkpoint is damaged; nothing was restored:\n{listing(faults)}"
        )
    in_flight: deque[tuple[_Job, Any, np.ndarray]] = deque()
    ahead = 0

    def finish_oldest() -> None:
        nonlocal ahead
        job, reading, memory = in_flight.popleft()
        reader.wait(reading)
        ahead -= job.nbytes
        job.then(memory)

    for job in jobs:
        while in_flight and ahead + job.nbytes > _AHEAD:
            finish_oldest()
        memory = host_memory(job.shape, numpy_dtype(job.dtype))
        in_flight.append((job, reader.read(job.name, job.at, memory), memory))
        ahead += job.nbytes
    while in_flight:
        finish_oldest()
    return found


_Span = tuple[int, int, int]
"""Where an array begins and ends in its pack, and its number."""


def _jobs(wants: Sequence[Want], put: _Putter, found: list[Any]) -> Iterator[_Job]:
    packs: dict[str, list[_Span]] = {}
    for i, want in enumerate(wants):
        place = want.array.place
        if place is None:
            empty = np.empty(want.array.stored_shape, numpy_dtype(want.array.dtype))
            found[i] = put.whole(want, empty)
        elif place.offset is None:
            yield from _own(want, place.array, i, put, found)
        else:
            span = place.offset, place.offset + want.array.nbytes, i
            packs.setdefault(place.array, []).append(span)
    for name, spans in packs.items():
        for window in _windows(sorted(spans)):
            yield _packed(name, wants, window, put, found)


def _windows(spans: list[_Span]) -> Iterator[list[_Span]]:
    """Groups neighbours in a pack, up to a number of bytes, into one read each."""
    window: list[_Span] = []
    first = last = 0
    for span in spans:
        start, end, _ = span
        if window and (end - first > _WINDOW or start - last > _WINDOW // 16):
            yield window
            window = []
        if not window:
            first, last = start, end
        window.append(span)
        last = max(last, end)
    if window:
        yield window


def _packed(
    name: str, wants: Sequence[Want], window: list[_Span], put: _Putter, found: list
) -> _Job:
    first, last = window[0][0], max(end for _, end, _ in window)

    def then(memory: np.ndarray) -> None:
        for start, end, i in window:
            array = wants[i].array
            part = memory[start - first : end - first].view(numpy_dtype(array.dtype))
            found[i] = put.whole(wants[i], part.reshape(array.stored_shape))

    return _Job(name, (slice(first, last),), "uint8", then)


def _own(
    want: Want, name: str, i: int, put: _Putter, found: list[Any]
) -> Iterator[_Job]:
    """Reads each part that a device of this process needs, once."""
    array = want.array
    shape, dtype = array.stored_shape, storage_dtype(array.dtype)
    places = put.places(want)
    parts = list(dict.fromkeys(places.values()))
    pieces: dict[Any, np.ndarray] = {}

    def keep(part: Any) -> Callable[[np.ndarray], None]:
        def then(memory: np.ndarray) -> None:
            pieces[part] = memory.view(numpy_dtype(array.dtype))
            if len(pieces) == len(parts):
                found[i] = put.pieces(want, places, pieces)

        return then

    for part in parts:
        at = tuple(
            slice(a or 0, n if b is None else b)
            for (a, b), n in zip(part, shape, strict=True)
        )
        yield _Job(name, at, dtype, keep(part))


_Part = tuple[tuple[int | None, int | None], ...]


class _Putter:
    """Moves host memory to where it is wanted."""

    def __init__(self) -> None:
        default = jax.device_put(np.zeros((), np.float32))
        self._default = default.sharding

    def places(self, want: Want) -> dict[Any, _Part]:
        """The part of the array that each device holds; None stands for host memory."""
        shape = want.array.stored_shape
        if want.form != "jax":
            return {None: ((None, None),) * len(shape)}
        sharding = self._sharding(want)
        found = sharding.addressable_devices_indices_map(shape)
        return {
            device: tuple((s.start, s.stop) for s in at) for device, at in found.items()
        }

    def _sharding(self, want: Want) -> Any:
        sharding = self._default if want.sharding is None else want.sharding
        ranked = (jax.sharding.NamedSharding, jax.sharding.SingleDeviceSharding)
        # The words of keys have one axis more than the keys' sharding.
        if want.array.key is not None and not isinstance(sharding, ranked):
            return self._default
        return sharding

    def whole(self, want: Want, host: np.ndarray) -> Any:
        """The wanted array, from all of it in host memory."""
        if want.form == "jax" and want.sharding is not None:
            places = self.places(want)
            pieces = {
                part: host[tuple(slice(*ends) for ends in part)]
                for part in places.values()
            }
            return self.pieces(want, places, pieces)
        if want.form == "jax":
            devices = list(self._default.device_set)
            return self._array(want, self._default, [cast(want, host)], devices)
        return self.pieces(want, {None: ()}, {(): host})

    def pieces(self, want: Want, places: Any, pieces: dict[Any, np.ndarray]) -> Any:
        """The wanted array, from the parts of its devices."""
        new = {part: cast(want, host) for part, host in pieces.items()}
        if want.form != "jax":
            (host,) = new.values()
            own = np.array(host, order="C", copy=True)
            return own if want.form == "numpy" else own[()]
        made = [np.ascontiguousarray(new[p]).reshape(new[p].shape)
                for p in places.values()]  # fmt: skip
        return self._array(want, self._sharding(want), made, list(places))

    def _array(self, want: Want, sharding: Any, made: Any, devices: Any) -> Any:
        like = _Like(want.array.stored_shape, numpy_dtype(want.dtype), want.weak)
        array = put_pieces(like, sharding, made, devices, want.committed)
        if want.array.key is None:
            return array
        keys = _keys(want, array)
        if want.sharding is not None and sharding is not want.sharding:
            return jax.device_put(keys, want.sharding)
        return keys


def _keys(want: Want, words: Any) -> Any:
    impl = want.array.key.impl if want.array.key else ""
    try:
        return jax.random.wrap_key_data(words, impl=impl)
    except (TypeError, ValueError) as e:
        raise RestoreError(
            f"{show(want.path)}: PRNG keys of {impl!r:.60}, which this program does "
            f"not have in that form: {e}"
        ) from None


class _Like(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any
    weak_type: bool


def cast(want: Want, host: np.ndarray) -> np.ndarray:
    """The values in the wanted dtype; refuses a cast that would change them."""
    if want.dtype == want.array.dtype:
        return host
    dtype = numpy_dtype(want.dtype)
    if host.dtype.isbuiltin != 1:
        # Not all of ml_dtypes' types can be cast to one another.
        whole = jnp.issubdtype(host.dtype, jnp.integer)
        host = host.astype(np.int16 if whole else np.float32)
    with np.errstate(all="ignore"):
        new = host.astype(dtype)
        if jnp.issubdtype(dtype, jnp.integer):
            bad = new.astype(host.dtype) != host
            bad |= (new < 0) != (host < 0)
        else:
            finite = np.isfinite(host)
            bad = finite != np.isfinite(new)
            if not finite.all():
                bad |= np.isnan(host) != np.isnan(new)
            if np.isfinite(np.float32(np.inf).astype(dtype)):
                # A dtype without infinity turns too large values into its largest one.
                bad |= np.abs(host) > host.dtype.type(jnp.finfo(dtype).max)
    if bad.any():
        raise RestoreError(
            f"cast: {show(want.path)} has {int(bad.sum())} numbers that {want.dtype} "
            f"cannot hold, such as {host[bad].flat[0]}; the model was left as it was."
        )
    return new
