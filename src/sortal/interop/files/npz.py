"""NumPy's archives of arrays, without pickled objects."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from sortal.checkpoint.disk import replacing
from sortal.checkpoint.values import DTYPES, dtype_name
from sortal.errors import DamagedError, SaveError, listing
from sortal.interop.files.entries import (
    Entry,
    Opened,
    dotted,
    encodable,
    named,
    parts,
)

# The dtypes that NumPy's format has names for.
_OWN = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 "
    "complex64 complex128".split()
)
_HEADERS: dict[Any, Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_DENSEST = 1032
"""The most bytes that one byte of deflate can stand for."""


def read(path: Path) -> Opened:
    """Opens an archive; refuses pickled objects, and sizes that it cannot hold."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            entries = [_entry(path, archive, info, size) for info in infos]
    # NumPy evaluates headers as Python, so that noise raises what Python raises.
    except Exception as e:
        raise DamagedError(f"{path} is no archive of arrays, or damaged: {e}") from e
    by_entry = dict(zip((e.name for e in entries), infos, strict=True))
    if len(by_entry) < len(entries):
        raise DamagedError(f"{path} is damaged: two of its arrays have one name")

    def together(chosen: Sequence[Entry]) -> list[np.ndarray]:
        return _read(path, [by_entry[e.name] for e in chosen])

    return Opened(path, "npz", {}, entries, together=together)


def _read(path: Path, infos: Sequence[zipfile.ZipInfo]) -> list[np.ndarray]:
    found, name = [], ""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in infos:
                name = info.filename
                with archive.open(info) as file:
                    found.append(np.lib.format.read_array(file, allow_pickle=False))
    except Exception as e:
        raise DamagedError(f"{path}: {name} is damaged: {e}") from e
    return found


def _entry(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int
) -> Entry:
    name = info.filename.removesuffix(".npy")
    if info.flag_bits & 1:
        raise ValueError(f"{name} is encrypted")
    most = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _DENSEST}
    packed = min(info.compress_size, size)
    if info.file_size > packed * most[info.compress_type]:
        raise ValueError(f"{packed:,} bytes cannot hold {info.file_size:,} of {name}")
    with archive.open(info) as file:
        shape, _, dtype = _header(file)
        nbytes = info.file_size - file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not read")
    elements = int(np.prod(shape, dtype=object))
    if min(shape, default=0) < 0 or elements * dtype.itemsize != nbytes:
        raise ValueError(f"{name} has {nbytes:,} bytes, which is not {dtype}{shape}")
    if dtype.names is not None or dtype_name(dtype) not in DTYPES:
        raise ValueError(f"{name} has the dtype {dtype}, which is not read")

    def get() -> np.ndarray:
        return _read(path, [info])[0]

    return Entry(parts(name), dtype_name(dtype), shape, nbytes, get)


def _header(file: IO[bytes]) -> Any:
    return _HEADERS[np.lib.format.read_magic(file)](file)


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Writes an archive; it replaces an old one only once it is complete."""
    entries = list(entries)
    odd = [f"{dotted(e.name)}: {e.dtype}" for e in entries if e.dtype not in _OWN]
    if odd:
        raise SaveError(f"NumPy's format has no name for these dtypes:\n{listing(odd)}")
    found = named(entries, dotted, _holds, "NumPy's archives")
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", allowZip64=True) as archive,
    ):
        # Not by np.savez, whose own arguments are names that leaves may have.
        for name, e in found.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(e.read()))


def _holds(name: str) -> bool:
    return encodable(name) and "\0" not in name
