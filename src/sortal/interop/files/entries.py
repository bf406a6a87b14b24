"""The arrays of a file, whatever its format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sortal.checkpoint.values import dtype_name


class Entry(NamedTuple):
    """One array of a file.

    ``kind`` is the full name, where the format has kinds. ``dtype`` is named as in the
    format, ``nbytes`` is the size there, and ``read`` returns the whole array.
    """

    name: tuple[Any, ...]
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], np.ndarray]
    kind: str | None = None
    spec: Any = None

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


class Opened(NamedTuple):
    """A file or folder of arrays: its format, its own metadata, its entries."""

    path: Path
    format: str
    about: dict[str, Any]
    entries: list[Entry]


def of_arrays(named: Iterable[tuple[tuple[Any, ...], np.ndarray]]) -> list[Entry]:
    """Entries of arrays in memory, from pairs of name and array."""
    return [
        Entry(name, dtype_name(x.dtype), x.shape, x.nbytes, lambda x=x: x)
        for name, x in named
    ]


def parts(text: str) -> tuple[Any, ...]:
    """A dotted name as a path, in which digits are integers.

    Example:
      >>> parts("layers.0.weight")
      ('layers', 0, 'weight')
    """
    return tuple(
        int(x) if x.isascii() and x.isdigit() and str(int(x)) == x else x
        for x in text.split(".")
    )


def dotted(name: tuple[Any, ...]) -> str:
    """A path as a name with dots."""
    return ".".join(map(str, name))
