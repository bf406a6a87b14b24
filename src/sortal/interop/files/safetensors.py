"""safetensors files: a JSON header, then bytes; checked when opened, read lazily."""

from __future__ import annotations

import functools
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sortal.checkpoint.disk import replacing
from sortal.checkpoint.values import numpy_dtype
from sortal.errors import DamagedError, RestoreError, SaveError, listing
from sortal.interop.files.entries import (
    Entry,
    Opened,
    dotted,
    encodable,
    named,
    parts,
)

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
# Later versions of the format have more; their arrays are listed, and not read.
_DTYPE = re.compile(r"[A-Z]{1,4}[0-9]{1,3}(_[A-Z0-9]{1,12})?")
_NAMES = {ours: theirs for theirs, ours in _DTYPES.items()}
# The limit of the safetensors library.
_LONGEST_HEADER = 100_000_000
# The limit of JAX and zarr.
_MOST_AXES = 32


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
        header = json.loads(file.read(length), object_pairs_hook=_once)
    about = _a(dict, header).pop("__metadata__", {})
    if not all(type(x) is str for x in _a(dict, about).values()):
        raise ValueError("metadata that are not texts")
    start, entries, end = 8 + length, [], 0
    found = [(_span(x), name, x) for name, x in header.items()]
    for (first, last), name, x in sorted(found, key=lambda item: item[0]):
        shape, dtype = tuple(map(_size, _a(list, x["shape"]))), _a(str, x["dtype"])
        ours = _DTYPES.get(dtype)
        if ours is None and not _DTYPE.fullmatch(dtype):
            raise ValueError(f"{name!r} has the dtype {dtype!r:.60}")
        width = 0 if ours is None else numpy_dtype(ours).itemsize
        nonzero = math.prod(n for n in shape if n) * max(width, 1)
        wrong = ours is not None and last - first != math.prod(shape) * width
        if first != end or last < first or wrong or nonzero >= 1 << 63:
            raise ValueError(f"the offsets of {name!r} are wrong")
        if len(shape) > _MOST_AXES:
            raise ValueError(f"{name!r} has {len(shape)} axes")
        end = last
        get = _reader(path, name, dtype, shape, start + first, last - first)
        view = None
        if ours is not None and last > first:
            view = functools.partial(_mapped, path, ours, shape, start + first)
        entry = Entry(parts(name), ours or dtype, shape, last - first, get, mapped=view)
        entries.append(entry)
    if start + end != size:
        raise ValueError(f"{size:,} bytes where {start + end:,} are expected")
    return Opened(path, "safetensors", {"metadata": about}, entries)


def _mapped(path: Path, dtype: str, shape: tuple[int, ...], at: int) -> np.ndarray:
    try:
        # As bytes: a file of others need not align its numbers.
        nbytes = math.prod(shape) * numpy_dtype(dtype).itemsize
        found = np.memmap(path, np.uint8, "r", offset=at, shape=(nbytes,))
        return found.view(np.ndarray).view(numpy_dtype(dtype)).reshape(shape)
    except (OSError, ValueError) as e:
        raise DamagedError(f"{path} cannot be read: {e}") from e


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _a(kind: type, x: Any) -> Any:
    if type(x) is not kind:
        raise ValueError(f"{x!r:.60} where a {kind.__name__} is expected")
    return x


def _size(x: Any) -> int:
    if type(x) is not int or not 0 <= x < 1 << 63:
        raise ValueError(f"{x!r:.60} where a size is expected")
    return x


def _span(x: Any) -> tuple[int, int]:
    first, last = map(_size, _a(list, _a(dict, x)["data_offsets"]))
    return first, last


def _reader(
    path: Path, name: str, dtype: str, shape: Any, at: int, nbytes: int
) -> Callable[[], np.ndarray]:
    def get() -> np.ndarray:
        if dtype not in _DTYPES:
            raise RestoreError(
                f"{path}: {name} has the dtype {dtype}, which neither NumPy nor JAX "
                "has; leave it out."
            )
        found = np.empty(nbytes, np.uint8)
        try:
            with path.open("rb") as file:
                file.seek(at)
                whole = file.readinto(found.data) == nbytes
        except OSError as e:
            raise DamagedError(f"{path} cannot be read: {e}") from e
        if not whole:
            raise DamagedError(f"{path} was cut off while it was read")
        return found.view(numpy_dtype(_DTYPES[dtype])).reshape(shape)

    return get


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
    found = named(entries, dotted, _holds, "safetensors")
    end = 0
    for name, e in found.items():
        nbytes = e.elements * numpy_dtype(e.dtype).itemsize
        header[name] = {
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
            # NumPy's arrays may have the other byte order.
            host = np.ascontiguousarray(e.read(), numpy_dtype(e.dtype))
            file.write(host.reshape(-1).view(np.uint8).data)


def _holds(name: str) -> bool:
    return encodable(name) and name != "__metadata__"
