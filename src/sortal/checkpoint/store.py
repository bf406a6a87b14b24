"""Arrays on disk: zarr 3 with a checksum in each chunk, through TensorStore."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from sortal.checkpoint.files import Syncs, open_file, read_file
from sortal.checkpoint.manifest import (
    File,
    Manifest,
    Stored,
    chunk_file,
    chunk_files,
    storage_dtype,
)
from sortal.checkpoint.values import Array, numpy_dtype
from sortal.errors import CheckpointError, DamagedError, RestoreError

CHUNK = 4 << 20
"""Bytes of a chunk, unless the array is very large; see decision 0021."""
_LARGEST_CHUNK = 64 << 20
_IN_FLIGHT = 5
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


def _open(root: Path, name: str, stored: Stored, context: Any) -> Any:
    import tensorstore as ts

    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{root / name}/"},
        "metadata": zarr_json(stored),
        # By default zarr reads a missing chunk as zeros.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
    # The manifest holds the metadata, so it is not read again from a file.
    opened = ts.open(spec, open=True, assume_metadata=True, context=context)
    return opened.result()


_users: set[int] = set()
"""The processes that used TensorStore: this one, or one that it was forked from."""


def refuse_fork(error: type[CheckpointError]) -> None:
    """Refuses a process forked from one that used TensorStore, which would abort."""
    if _users and os.getpid() not in _users:
        raise error(
            "this process was forked from one that had used TensorStore, whose threads "
            "do not live on in it. Start processes with the method 'spawn', as in "
            "multiprocessing.get_context('spawn')."
        )


def _context(**more: Any) -> Any:
    import tensorstore as ts

    _users.add(os.getpid())
    return ts.Context({"file_io_concurrency": {"limit": _IN_FLIGHT}, **more})


# -------------------------------------------------------------------------- writing
class Writer:
    """Writes arrays into an existing folder, with a few chunks in flight at a time.

    A context manager: at its end, all chunks are on disk.
    """

    def __init__(self, root: Path):
        self._root = root
        # The name of the folder is unique, so its files need no locks. TensorStore
        # would also sync the folder after each chunk.
        self._context = _context(file_io_sync=False, file_io_locking={"mode": "none"})
        self._in_flight: deque[Any] = deque()
        self._buffers: list[np.ndarray] = []
        self._syncs = Syncs()

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
            new = as_bytes(on_host(data))
            if (end := offset + new.size) < done + chunk:  # nearly always
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
        while not self._buffers and len(self._in_flight) >= _IN_FLIGHT:
            self._finish_oldest()
        if self._buffers and self._buffers[-1].size >= size:
            return self._buffers.pop()[:size]
        return np.empty(size, np.uint8)

    def _start(self, to: Any, file: str, data: np.ndarray, reuse: bool = False) -> None:
        while len(self._in_flight) >= _IN_FLIGHT:
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


def prepare(root: Path, arrays: dict[str, Stored], groups: Iterable[str]) -> None:
    """Makes the folders and metadata files of all arrays and groups."""
    (root / "zarr.json").write_bytes(GROUP_JSON)
    for group in groups:
        (root / group).mkdir()
        (root / group / "zarr.json").write_bytes(GROUP_JSON)
    for name, stored in arrays.items():
        (root / name).mkdir()
        data = json.dumps(zarr_json(stored)).encode()
        (root / name / "zarr.json").write_bytes(data)


def sync_tree(root: Path, arrays: Iterable[str], groups: Iterable[str]) -> None:
    """Syncs the folders and files of ``prepare``, and the names of the chunks."""
    folders = [root, *(root / name for name in (*groups, *arrays))]
    above = [root.parent, root.parent.parent]
    syncs = Syncs()
    for path in (*folders, *(f / "zarr.json" for f in folders), *above):
        syncs.add(path)
    if faults := syncs.finish():
        raise faults[0]


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


def as_bytes(host: np.ndarray) -> np.ndarray:
    """The elements of an array as bytes, in order."""
    return np.ascontiguousarray(host).reshape(-1).view(np.uint8)


def fingerprints(
    root: Path, arrays: dict[str, Stored], groups: Iterable[str]
) -> dict[str, File]:
    """Size and checksum of every file below ``root``, once written.

    A chunk ends with the crc32c of its other bytes.
    """
    found = {}
    for name in ("zarr.json", *(f"{n}/zarr.json" for n in (*groups, *arrays))):
        data = (root / name).read_bytes()
        found[name] = File(len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")
    for name, stored in arrays.items():
        for file in chunk_files(name, stored):
            found[file] = _chunk(root / file)
    return found


def _chunk(file: Path) -> File:
    at = open_file(file)
    try:
        size = os.fstat(at).st_size
        tail = os.pread(at, 4, max(size - 4, 0))
    finally:
        os.close(at)
    return File(size, f"crc32c:{int.from_bytes(tail, 'little'):08x}")


# -------------------------------------------------------------------------- reading
class Reader:
    """Reads arrays of one step, and refuses files that differ from the manifest."""

    def __init__(self, root: Path, manifest: Manifest):
        refuse_fork(RestoreError)
        self._root, self._manifest = root, manifest
        self._context = _context()
        self._opened: dict[str, Any] = {}

    def check(self, names: Iterable[str]) -> list[str]:
        """Checks files of arrays without reading their chunks; one line for each fault.

        Finds missing files, other sizes, damaged metadata, and chunks of another save.
        """
        names = list(names)
        groups = dict.fromkeys(name.partition("/")[0] for name in names)
        files = ["zarr.json", *(f"{name}/zarr.json" for name in (*groups, *names))]
        files += [
            file
            for name in names
            for file in chunk_files(name, self._manifest.arrays[name])
        ]
        return [f"{file}: {fault}" for file in files if (fault := self.fault(file))]

    def fault(self, name: str) -> str:
        """What is wrong with one file by its size and checksum; empty if nothing."""
        expected, file = self._manifest.files[name], self._root / name
        try:
            if expected.checksum.startswith("crc32c:"):
                found = _chunk(file)
            else:
                size = file.stat().st_size
                if size != expected.size:
                    return f"{size:,} bytes, not {expected.size:,}"
                digest = hashlib.sha256(read_file(file)).hexdigest()
                found = File(size, f"sha256:{digest}")
        except FileNotFoundError:
            return "missing"
        except OSError as e:
            return f"cannot be read ({e.strerror or e})"
        if found.size != expected.size:
            return f"{found.size:,} bytes, not {expected.size:,}"
        return "" if found == expected else "not what was written: another checksum"

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


def host_memory(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX copies from: it begins 16 bytes past a multiple of 64.

    JAX would keep well-aligned memory without a copy, and could then neither donate
    such an array nor free one of many that share the memory.
    """
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 128, np.uint8)
    start = -raw.ctypes.data % ALIGN + 16
    return raw[start : start + size].view(dtype).reshape(shape)
