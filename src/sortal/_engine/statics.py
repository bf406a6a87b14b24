"""Static values: what may be compared by ``==`` and hashed, without false equals."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np


def static_key(value: Any) -> Hashable:
    """A hashable stand-in, equal only where two statics mean the same to a trace.

    Python takes ``1 == 1.0 == True`` and ``0.0 == -0.0``, and NaN as unequal to
    itself; a compiled function would be reused or rebuilt wrongly. Types and bits are
    part of the key.

    Args:
      value: any object.

    Returns:
      The key.

    Raises:
      TypeError: the value, or something inside it, cannot be hashed.

    Example:
      >>> static_key(1) == static_key(1.0)
      False
      >>> static_key((1, float("nan"))) == static_key((1, float("nan")))
      True
    """
    kind = type(value)
    if kind is str or kind is bool or value is None or kind is int:
        return (kind, value)
    if kind is float:
        return (kind, value.hex())
    if isinstance(value, tuple):
        return (kind, tuple(static_key(v) for v in value))
    if isinstance(value, frozenset):
        return (kind, frozenset(static_key(v) for v in value))
    if isinstance(value, (np.generic, complex)):
        return (kind, repr(value))
    hash(value)
    if dataclasses.is_dataclass(kind):
        return (kind, _field_keys(value))
    return (kind, value)


def _field_keys(value: Any) -> Hashable:
    """Keys of the compared fields; the value where one of them cannot be hashed."""
    fields = [f for f in dataclasses.fields(value) if f.compare]
    if not fields or not value.__dataclass_params__.eq:
        return value
    try:
        return tuple(static_key(getattr(value, f.name)) for f in fields)
    except TypeError:  # the class has a hash of its own that leaves some out
        return value


def is_hashable(value: Any) -> bool:
    """Whether ``static_key`` has a key for ``value``."""
    try:
        static_key(value)
    except TypeError:
        return False
    return True


class Edits:
    """Notes that some structure, anywhere, was edited.

    While ``last`` is the number that a plan was checked at, no attribute, metadata or
    State of any object has been edited since, and the plan need not look at each.
    Numbers never repeat, so that threads cannot restore one that was seen before.
    """

    __slots__ = ("_numbers", "last")

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.last = 0

    def note(self) -> None:
        """Call after an edit."""
        self.last = next(self._numbers)


edits = Edits()


class Metadata(Mapping[str, Any]):
    """The immutable metadata of a Variable; equal metadata is one object.

    Build it with ``Metadata.of``. Being interned, it is compared by identity, and a
    change of a Variable's metadata shows as a different object.
    """

    __slots__ = ("__weakref__", "_items")

    _interned: ClassVar[weakref.WeakValueDictionary[Any, Metadata]] = (
        weakref.WeakValueDictionary()
    )

    @classmethod
    def of(cls, items: Mapping[str, Any]) -> Metadata:
        """The one Metadata that holds ``items``.

        Args:
          items: names and hashable values.

        Returns:
          The interned object.

        Raises:
          TypeError: a value cannot be hashed.
        """
        if not items:
            return EMPTY
        key = frozenset((name, static_key(value)) for name, value in items.items())
        found = cls._interned.get(key)
        if found is None:
            found = object.__new__(cls)
            found._items = dict(items)
            found = cls._interned.setdefault(key, found)
        return found

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"Metadata({self._items!r})"

    def __copy__(self) -> Metadata:
        return self

    def __deepcopy__(self, memo: Any) -> Metadata:
        return self

    def __reduce__(self) -> Any:
        return (Metadata.of, (self._items,))


EMPTY = object.__new__(Metadata)
EMPTY._items = {}
