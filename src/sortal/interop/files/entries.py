"""What a file of arrays holds, whatever its format: one entry for each array."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sortal.checkpoint.values import dtype_name


class Entry(NamedTuple):
    """One array of a file: its name there, what it is, and how it is read.

    ``kind`` is a full name, where the format knows kinds; ``dtype`` is as the format
    says, ``nbytes`` what it takes there; ``read`` gives the whole array.
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
        """How many numbers it has."""
        return math.prod(self.shape)


class Opened(NamedTuple):
    """A file or folder of arrays: its format, what it says of itself, its entries."""

    path: Path
    format: str
    about: dict[str, Any]
    entries: list[Entry]


def of_arrays(named: Iterable[tuple[tuple[Any, ...], np.ndarray]]) -> list[Entry]:
    """Entries of arrays that are in memory.

    Args:
      named: pairs of name and array.

    Returns:
      The entries.
    """
    return [
        Entry(name, dtype_name(x.dtype), x.shape, x.nbytes, lambda x=x: x)
        for name, x in named
    ]


def parts(text: str) -> tuple[Any, ...]:
    """A name with dots as a path: entries made of digits are numbers.

    Args:
      text: such as ``model.layers.0.weight``.

    Returns:
      The path.

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
