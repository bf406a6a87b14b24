"""A table of the latest entries, which several threads may use at once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Bounded(Generic[T]):
    """The latest entries, up to a number.

    There is no lock: each step is one operation of a dict, which Python does not
    interrupt. Two threads at once can drop an entry too many, never one that is new.

    Args:
      size: how many entries are kept.

    Example:
      >>> table = Bounded(2)
      >>> for k in range(3):
      ...     table.put(k, str(k))
      >>> table.get(0), table.get(2)
      (None, '2')
    """

    __slots__ = ("_entries", "_size")

    def __init__(self, size: int):
        self._size = size
        self._entries: dict[Hashable, T] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, default: Any = None) -> T | Any:
        """The entry, or ``default``."""
        return self._entries.get(key, default)

    def put(self, key: Hashable, entry: T) -> None:
        """Adds or replaces an entry; drops the oldest where there are too many."""
        self._entries[key] = entry
        extra = len(self._entries) - self._size
        if extra > 0:
            for old in list(self._entries)[:extra]:
                self._entries.pop(old, None)

    def drop(self, key: Hashable) -> None:
        """Drops an entry, if it is there."""
        self._entries.pop(key, None)
