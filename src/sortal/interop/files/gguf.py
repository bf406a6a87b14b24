"""GGUF files, read through the package ``gguf``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sortal.errors import DamagedError, UnsupportedError
from sortal.interop.files.entries import Entry, Opened, parts


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
        entries = [
            Entry(
                parts(t.name),
                t.tensor_type.name.lower(),
                # The format counts axes from the last one.
                tuple(map(int, reversed(t.shape))),
                int(t.n_bytes),
                lambda t=t: np.asarray(t.data),
            )
            for t in reader.tensors
        ]
    except Exception as e:
        raise DamagedError(f"{path} is not a GGUF file, or damaged: {e}") from e
    return Opened(path, "gguf", {"fields": len(reader.fields)}, entries)
