"""GGUF files, read through the package ``gguf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sortal.checkpoint.values import numpy_dtype
from sortal.errors import DamagedError, UnsupportedError
from sortal.interop.files.entries import Entry, Opened, parts

_DTYPES = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16",
    "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8",
}  # fmt: skip


def is_quantised(e: Entry) -> bool:
    """Whether an entry of such a file is read as bytes that stand for numbers."""
    return e.dtype not in _DTYPES.values()


def read(path: Path) -> Opened:
    """Opens a GGUF file; quantised arrays are read as their bytes."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UnsupportedError(
            f"{path.name} is read through the package gguf, which is not installed. "
            "Install it with: pip install gguf"
        ) from None
    try:
        reader = GGUFReader(path)
        entries = [_entry(t, reader.byte_order == "S") for t in reader.tensors]
    except Exception as e:
        raise DamagedError(f"{path} is not a GGUF file, or damaged: {e}") from e
    return Opened(path, "gguf", {"fields": len(reader.fields)}, entries)


def _entry(tensor: Any, swapped: bool) -> Entry:
    stored: str = tensor.tensor_type.name.lower()
    dtype = _DTYPES.get(stored, stored)

    def get() -> np.ndarray:
        found = np.asarray(tensor.data)
        if dtype == stored:
            return found
        # The package has no bfloat16, and gives bytes.
        found = found.view(numpy_dtype(dtype))
        return found.byteswap() if swapped else found

    # The format counts axes from the last one.
    shape = tuple(map(int, reversed(tensor.shape)))
    return Entry(parts(tensor.name), dtype, shape, int(tensor.n_bytes), get)
