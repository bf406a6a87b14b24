"""Arrays on disk: zarr 3 with a checksum in each chunk, through TensorStore."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from sortal._engine.host import is_near, to_host
from sortal.checkpoint import forks
from sortal.checkpoint.files import Location, on
from sortal.checkpoint.manifest import (
    File,
    Manifest,
    Stored,
    chunk_file,
    chunk_files,
    chunk_size,
    storage_dtype,
)
from sortal.checkpoint.values import Array, numpy_dtype
from sortal.errors import DamagedError, RestoreError

CHUNK = 4 << 20
"""Bytes of a chunk, unless the array is very large; see decision 0021."""
_LARGEST_CHUNK = 64 << 20
SMALL = CHUNK
"""Arrays of fewer bytes are packed together into one array of bytes."""
ALIGN = 64
"""Arrays in a pack begin at multiples of this."""
_ZEROS = np.zeros(ALIGN, np.uint8)


class Piece(NamedTuple):
    """A part of an array in the memory of one device, and its first index."""

    start: tuple[int, ...]
    data: Any


# --------------------------------------------------------------------------- layout
def stored_array(array: Array, shard: Sequence[int] | None = None) -> Stored:
    """How an array of at least one axis and one element is stored by itself.

    ``shard`` is the shape that each device holds, where several do. Chunks then divide
    it, so that no two processes write to one file.
    """
    shape = array.stored_shape
    whole = tuple(shard) if shard is not None else shape
    itemsize = numpy_dtype(array.dtype).itemsize
    most = min(max(CHUNK, math.prod(whole) * itemsize // 32), _LARGEST_CHUNK)
    chunks = list(whole)
    for axis, n in enumerate(whole):
        rest = math.prod(chunks[axis + 1 :]) * itemsize
        chunks[axis] = _part(n, most // rest, divide=shard is not None)
        if rest <= most:
            break
    return Stored(storage_dtype(array.dtype), shape, tuple(chunks))


def _part(n: int, most: int, divide: bool) -> int:
    """A length of about ``most`` for the parts of an axis, of which few are padded.

    With ``divide`` they have exactly this length. Else the last is written in full like
    the others, and may take two per cent of the axis for nothing.
    """
    most = max(1, min(n, most))
    if divide:
        found = next(d for d in range(most, 0, -1) if n % d == 0)
        return found if found * 8 >= most else n
    lengths = (-(-n // count) for count in range(max(1, n // (2 * most)), n + 1))
    fitting = (x for x in lengths if x <= 2 * most and -(-n // x) * x <= 1.02 * n)
    return _nearest(fitting, most)


def _nearest(lengths: Iterable[int], to: int) -> int:
    """The one nearest to a number by ratio, of falling lengths down to 1."""
    above = 0
    for x in lengths:
        if x <= to:
            return above if 0 < above * x < to * to else x
        above = x
    raise AssertionError  # parts of length 1 always fit


def packed(size: int) -> Stored:
    """How a pack of ``size`` bytes is stored: in chunks of nearly equal sizes."""
    chunk = -(-size // -(-size // CHUNK))
    return Stored("uint8", (size,), (min(-(-chunk // ALIGN) * ALIGN, size),))


def zarr_json(stored: Stored) -> dict[str, Any]:
    """The zarr 3 metadata of an array."""
    dtype = np.dtype(numpy_dtype(stored.dtype))
    fill: Any = False if stored.dtype == "bool" else 0
    order = {"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(stored.shape),
        "data_type": stored.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": list(stored.chunks)},
        },
        # A dot, so that chunks need no folders.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": [0.0, 0.0] if stored.dtype.startswith("complex") else fill,
        "codecs": [{"name": "bytes", **order}, {"name": "crc32c"}],
    }


GROUP_JSON = b'{"zarr_format":3,"node_type":"group","attributes":{}}\n'


def _open(root: Location, name: str, stored: Stored, context: Any) -> Any:
    import tensorstore as ts

    spec = {
        "driver": "zarr3",
        "kvstore": on(root).spec(root / name),
        "metadata": zarr_json(stored),
        # By default zarr reads a missing chunk as zeros.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
    # The manifest holds the metadata, so it is not read again from a file.
    opened = ts.open(spec, open=True, assume_metadata=True, context=context)
    return opened.result()


# -------------------------------------------------------------------------- writing
class Writer:
    """Writes arrays into an existing folder, with a few chunks in flight at a time.

    A context manager: at its end, all chunks are on disk.
    """

    def __init__(self, root: Location):
        self._root, self._most = root, on(root).IN_FLIGHT
        self._context = on(root).context()
        self._in_flight: deque[Any] = deque()
        self._buffers: list[np.ndarray] = []
        self._syncs = on(root).Syncs()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if exception[1] is None:
                while self._in_flight:
                    self._finish_oldest()
        finally:
            # After a failure, a write still in flight could recreate a deleted file.
            for writing, *_ in self._in_flight:
                writing.exception()
            faults = self._syncs.finish()
        if faults and exception[1] is None:
            raise faults[0]

    def write(self, name: str, stored: Stored, pieces: Iterable[Piece]) -> None:
        """Writes this process's pieces of one array."""
        opened = _open(self._root, name, stored, self._context)
        for start, data in pieces:
            host = on_host(data)
            for at in _tiles(host.shape, stored.chunks):
                to = tuple(
                    slice(s.start + o, s.stop + o)
                    for s, o in zip(at, start, strict=True)
                )
                self._start(opened[to], _file_of(name, stored, to), host[at])

    def pack(self, name: str, stored: Stored, parts: Iterable[tuple[int, Any]]) -> None:
        """Writes arrays one after the other, each at its offset."""
        opened = _open(self._root, name, stored, self._context)
        chunk, at, done = stored.chunks[0], 0, 0

        def start(data: np.ndarray, reuse: bool) -> None:
            span = slice(done, done + data.size)
            file = _file_of(name, stored, (span,))
            self._start(opened[span], file, data, reuse)

        buffer = self._buffer(chunk)
        for offset, data in parts:
            new = as_bytes(data)
            if (end := offset + new.size) < done + chunk:  # nearly always
                if at < offset:
                    buffer[at - done : offset - done] = 0
                buffer[offset - done : end - done] = new
                at = end
                continue
            for part in (_ZEROS[: offset - at], new):
                left = part
                while left.size:
                    taken = min(left.size, done + chunk - at)
                    buffer[at - done : at - done + taken] = left[:taken]
                    at, left = at + taken, left[taken:]
                    if at == done + chunk:
                        start(buffer, reuse=True)
                        buffer, done = self._buffer(chunk), at
        if at > done:
            start(buffer[: at - done], reuse=False)

    def _buffer(self, size: int) -> np.ndarray:
        while not self._buffers and len(self._in_flight) >= self._most:
            self._finish_oldest()
        if self._buffers and self._buffers[-1].size >= size:
            return self._buffers.pop()[:size]
        return np.empty(size, np.uint8)

    def _start(self, to: Any, file: str, data: np.ndarray, reuse: bool = False) -> None:
        while len(self._in_flight) >= self._most:
            self._finish_oldest()
        # The data is not changed before the write ends, so that no copy is needed.
        writing = to.write(data, can_reference_source_data_indefinitely=True)
        self._in_flight.append((writing, file, data if reuse else None, data))

    def _finish_oldest(self) -> None:
        writing, file, buffer, _ = self._in_flight.popleft()
        writing.result()
        self._syncs.add(self._root / file)
        if buffer is not None:
            self._buffers.append(buffer)


def descriptions(
    arrays: Mapping[str, Stored], groups: Iterable[str]
) -> dict[str, bytes]:
    """The metadata files of all arrays and groups of a step, by name."""
    found = {"zarr.json": GROUP_JSON}
    found |= {f"{group}/zarr.json": GROUP_JSON for group in groups}
    for name, stored in arrays.items():
        found[f"{name}/zarr.json"] = json.dumps(zarr_json(stored)).encode()
    return found


def _file_of(name: str, stored: Stored, at: Sequence[slice]) -> str:
    """The file of the chunk that begins at a part of an array."""
    numbers = (s.start // c for s, c in zip(at, stored.chunks, strict=True))
    return chunk_file(name, numbers)


def chunk_slices(name: str, stored: Stored) -> Iterator[tuple[str, tuple[slice, ...]]]:
    """The file of each chunk of an array, with its part of the array."""
    tiles = _tiles(stored.shape, stored.chunks)
    return zip(chunk_files(name, stored), tiles, strict=True)


def _tiles(shape: Sequence[int], chunks: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    ranges = [
        [slice(i, min(i + c, n)) for i in range(0, n, c)]
        for n, c in zip(shape, chunks, strict=True)
    ]
    return itertools.product(*ranges)


def on_host(data: Any) -> np.ndarray:
    """The array in host memory, in native byte order, with the dtype stored."""
    if isinstance(data, jax.Array) and not is_near(data.sharding):
        (data,) = to_host([data])
    host = np.asarray(data)
    native, stored = _forms(host.dtype)
    if native is not host.dtype:
        host = host.astype(native)
    return host if stored is native else host.view(stored)


@functools.lru_cache(maxsize=256)
def _forms(dtype: np.dtype) -> tuple[np.dtype, np.dtype]:
    """A dtype in native byte order, and the one that it is stored as."""
    native = dtype if dtype.isnative else dtype.newbyteorder("=")
    name = storage_dtype(native.name)
    return native, native if name == native.name else np.dtype(name)


def as_bytes(data: Any) -> np.ndarray:
    """The elements of an array as bytes, in order, in the form stored."""
    if type(data) is memoryview and data.c_contiguous:  # of JAX's, in that form
        return np.frombuffer(data, np.uint8)
    return np.ascontiguousarray(on_host(data)).reshape(-1).view(np.uint8)


def fingerprints(
    root: Location, arrays: Mapping[str, Stored], described: Mapping[str, bytes]
) -> dict[str, File]:
    """Size and checksum of every file below ``root``, once written."""
    sizes = {name: len(data) for name, data in described.items()}
    for name, stored in arrays.items():
        sizes |= dict.fromkeys(chunk_files(name, stored), chunk_size(stored))
    found = dict(on(root).fingerprints(root, sizes))
    for file in found.values():
        if isinstance(file, OSError):
            raise file
    return found


# -------------------------------------------------------------------------- reading
class Reader:
    """Reads arrays of one step, and refuses files that differ from the manifest."""

    def __init__(self, root: Location, manifest: Manifest):
        forks.refuse_fork(RestoreError)
        self._root, self._manifest = root, manifest
        self._context = on(root).context()
        self._opened: dict[str, Any] = {}

    def check(self, parts: Iterable[tuple[str, Sequence[slice]]]) -> list[str]:
        """Checks the files of parts of arrays, without reading chunks; lists faults.

        Finds missing files, other sizes, damaged metadata, and chunks of another save.
        Chunks of other parts, which other processes may read, are not looked at.
        """
        parts = list(parts)
        names = dict.fromkeys(name for name, _ in parts)
        groups = dict.fromkeys(name.partition("/")[0] for name in names)
        files = ["zarr.json", *(f"{name}/zarr.json" for name in (*groups, *names))]
        for name, at in parts:
            chunks = self._manifest.arrays[name].chunks
            ranges = (
                range(s.start // c, -(-s.stop // c))
                for s, c in zip(at, chunks, strict=True)
            )
            files += [chunk_file(name, index) for index in itertools.product(*ranges)]
        return [f"{file}: {fault}" for file, fault in self.faults(files).items()]

    def faults(self, files: Iterable[str]) -> dict[str, str]:
        """What is wrong with files by size and checksum; sound ones are left out."""
        expected = {name: self._manifest.files[name] for name in files}
        sizes = {name: file.size for name, file in expected.items()}
        found = on(self._root).fingerprints(self._root, sizes)
        faults = ((name, _fault(file, expected[name])) for name, file in found)
        return {name: fault for name, fault in faults if fault}

    def read(self, name: str, at: Sequence[slice], into: np.ndarray) -> Any:
        """Starts to read a part of an array into memory; ``wait`` takes the result."""
        import tensorstore as ts

        if name not in self._opened:
            stored = self._manifest.arrays[name]
            self._opened[name] = _open(self._root, name, stored, self._context)
        to = ts.array(into, dtype=self._opened[name].dtype, copy=False)
        return name, to.write(self._opened[name][tuple(at)])

    def wait(self, reading: Any) -> None:
        """Waits for the end of a ``read``."""
        name, future = reading
        try:
            future.result()
        except (ValueError, OSError, RuntimeError) as e:
            raise DamagedError(
                f"{self._root / name} is damaged; nothing was restored: {e}"
            ) from e


def _fault(found: File | OSError, expected: File) -> str:
    if isinstance(found, FileNotFoundError):
        return "missing"
    if isinstance(found, OSError):
        return f"cannot be read ({found.strerror or found})"
    if found.size != expected.size:
        return f"{found.size:,} bytes, not {expected.size:,}"
    return "" if found == expected else "not what was written: another checksum"
