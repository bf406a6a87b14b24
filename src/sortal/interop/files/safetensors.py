"""safetensors files: a JSON header, then bytes; checked when opened, read lazily."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sortal.checkpoint.files import replacing
from sortal.checkpoint.values import dtype_name, numpy_dtype
from sortal.errors import DamagedError, SaveError, listing
from sortal.interop.files.entries import Entry, Opened, dotted, parts

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip
_NAMES = {ours: theirs for theirs, ours in _DTYPES.items()}
# The limit of the safetensors library.
_LONGEST_HEADER = 100_000_000


def read(path: Path) -> Opened:
    """Opens a file, and checks that the header fits the bytes; no array is read."""
    try:
        return _read(path)
    except (KeyError, TypeError, ValueError, RecursionError, struct.error) as e:
        raise DamagedError(
            f"{path} is not a safetensors file, or damaged ({type(e).__name__}: {e})"
        ) from None
    except OSError as e:
        raise DamagedError(f"{path} cannot be read: {e}") from e


def _read(path: Path) -> Opened:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(_LONGEST_HEADER, size - 8):
            raise ValueError(f"a header of {length:,} bytes in {size:,}")
        header = json.loads(file.read(length))
    about = header.pop("__metadata__", {})
    start, entries, end = 8 + length, [], 0
    for name, x in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, (first, last) = _DTYPES[x["dtype"]], x["data_offsets"]
        shape = tuple(int(n) for n in x["shape"])
        nbytes = math.prod(shape) * numpy_dtype(dtype).itemsize
        if first != end or last - first != nbytes or min(shape, default=0) < 0:
            raise ValueError(f"the offsets of {name!r} are wrong")
        end = last
        entries.append(_entry(path, name, dtype, shape, start + first, nbytes))
    if start + end != size:
        raise ValueError(f"{size:,} bytes where {start + end:,} are expected")
    return Opened(path, "safetensors", {"metadata": about}, entries)


def _entry(
    path: Path, name: str, dtype: str, shape: Any, at: int, nbytes: int
) -> Entry:
    def get() -> np.ndarray:
        found = np.empty(nbytes, np.uint8)
        with path.open("rb") as file:
            file.seek(at)
            if file.readinto(found.data) != nbytes:
                raise DamagedError(f"{path} was cut off while it was read")
        return found.view(numpy_dtype(dtype)).reshape(shape)

    return Entry(parts(name), dtype, shape, nbytes, get)


def write(
    path: Path, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file; it replaces an old one only once it is complete.

    ``metadata`` is kept in the header.
    """
    entries = list(entries)
    odd = [f"{dotted(e.name)}: {e.dtype}" for e in entries if e.dtype not in _NAMES]
    if odd:
        raise SaveError(f"safetensors has no dtype for:\n{listing(odd)}")
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for e in entries:
        nbytes = e.elements * numpy_dtype(e.dtype).itemsize
        if dotted(e.name) in header:
            raise SaveError(f"two leaves have the name {dotted(e.name)}.")
        header[dotted(e.name)] = {
            "dtype": _NAMES[e.dtype],
            "shape": list(e.shape),
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for e in entries:
            host = np.ascontiguousarray(e.read())
            if dtype_name(host.dtype) != e.dtype:  # the other byte order
                host = host.astype(numpy_dtype(e.dtype))
            file.write(host.reshape(-1).view(np.uint8).data)
