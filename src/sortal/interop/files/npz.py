"""NumPy's archives of arrays, without pickled objects."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sortal.checkpoint.files import replacing
from sortal.checkpoint.values import dtype_name
from sortal.errors import DamagedError, SaveError, listing
from sortal.interop.files.entries import Entry, Opened, dotted, parts

# The dtypes that NumPy's format has names for.
_OWN = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 "
    "complex64 complex128".split()
)

_FAULTS = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    AttributeError,
    TypeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy and zipfile raise for other and damaged files."""


def read(path: Path) -> Opened:
    """Opens an archive; refuses pickled objects."""
    try:
        # Opened here, because NumPy leaves a file that it cannot read open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            entries = [_entry(path, archive.zip, name) for name in archive.files]
    except _FAULTS as e:
        raise DamagedError(f"{path} is no archive of arrays, or damaged: {e}") from e
    return Opened(path, "npz", {}, entries)


def _entry(path: Path, archive: Any, name: str) -> Entry:
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = header(file)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not read")

    def get() -> np.ndarray:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
                return found[name]
        except _FAULTS as e:
            raise DamagedError(f"{path}: {name} is damaged: {e}") from e

    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    return Entry(parts(name), dtype_name(dtype), shape, size, get)


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Writes an archive; it replaces an old one only once it is complete."""
    entries = list(entries)
    odd = [f"{dotted(e.name)}: {e.dtype}" for e in entries if e.dtype not in _OWN]
    if odd:
        raise SaveError(f"NumPy's format has no name for these dtypes:\n{listing(odd)}")
    arrays: dict[str, Any] = {dotted(e.name): e.read() for e in entries}
    with replacing(path, ".npz") as temporary:  # NumPy adds a missing suffix
        np.savez(temporary, **arrays)
