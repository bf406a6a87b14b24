"""Static values: what may be compared by ``==`` and hashed, without false equals."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

_NAMES = {str}


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
        if set(map(type, value)) == _NAMES:  # such as names of attributes: common
            return (kind, tuple(value))
        return (kind, tuple(static_key(v) for v in value))
    if isinstance(value, frozenset):
        return (kind, frozenset(static_key(v) for v in value))
    if isinstance(value, (np.generic, complex)):
        return (kind, repr(value))
    hash(value)
    return (kind, _field_keys(value) if _compares_fields(kind) else value)


def _compares_fields(kind: type) -> bool:
    """Whether ``==`` of a class asks for nothing but its dataclass fields.

    Then comparing the fields by their keys is at least as strict. Any other ``__eq__``
    is the user's own, may know more than the fields, and is left to decide.
    """
    if not dataclasses.is_dataclass(kind):
        return False
    code = getattr(kind.__eq__, "__code__", None)
    names = {"__class__", "NotImplemented", *(f.name for f in _compared(kind))}
    return code is not None and names.issuperset(code.co_names)


def _compared(kind: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(kind) if f.compare]


def _field_keys(value: Any) -> Hashable:
    """Keys of the compared fields; the value where one of them cannot be hashed."""
    try:
        return tuple(static_key(getattr(value, f.name)) for f in _compared(value))
    except TypeError:  # the class has a hash of its own that leaves some out
        return value


def is_hashable(value: Any) -> bool:
    """Whether ``static_key`` has a key for ``value``."""
    try:
        static_key(value)
    except TypeError:
        return False
    return True


class Static:
    """A static value together with the key that it is compared and hashed by."""

    __slots__ = ("_hash", "key", "value")

    def __init__(self, value: Any):
        self.key = static_key(value)
        self.value = value
        self._hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> Any:
        # The hash of a string differs from process to process.
        return (Static, (self.value,))

    def __repr__(self) -> str:
        return repr(self.value)


class Edits:
    """Notes that some structure, anywhere, was edited.

    While ``last`` is the very object that a plan was checked at, no attribute, metadata
    or State of any object has been edited since, and the plan need not look at each.
    Each edit makes an object, so that threads cannot restore one that was seen before.
    """

    last = object()

    def note(self) -> None:
        """Call after an edit."""
        self.last = object()


edits = Edits()


class _Key:
    """Finds an interned object without keeping alive what it was made from.

    A pool that held the parts themselves would keep a model for ever that one of its
    own statics, such as a lambda over ``self``, leads back to.
    """

    __slots__ = ("_hash", "_made", "_parts")

    def __init__(self, parts: Hashable):
        self._parts, self._hash, self._made = parts, hash(parts), None

    def of(self, made: Any) -> None:
        """Takes the parts from ``made``, while it lives."""
        self._made, self._parts = weakref.ref(made), None

    def parts(self) -> Any:
        """What was interned; None once it is gone."""
        made = None if self._made is None else self._made()
        return self._parts if made is None else made._key

    def __eq__(self, other: object) -> bool:
        parts = self.parts()
        return isinstance(other, _Key) and parts is not None and parts == other.parts()

    def __hash__(self) -> int:
        return self._hash


class Interned:
    """Equal objects are one object; equality and hashing are those of identity."""

    __slots__ = ("__weakref__", "_key", "_memo")

    _pool: ClassVar[weakref.WeakValueDictionary[_Key, Any]]
    of: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls) -> None:
        cls._pool = weakref.WeakValueDictionary()

    @classmethod
    def _intern(cls, parts: Hashable, *given: Any) -> Any:
        """The one object of ``parts``; ``_setup`` makes it from what is ``given``."""
        key = _Key(parts)
        found = cls._pool.get(key)
        if found is None:
            made = object.__new__(cls)
            made._key, made._memo = parts, {}
            made._setup(*given)
            found = cls._pool.setdefault(key, made)
            if found is made:
                key.of(made)
        return found

    def _setup(self, *given: Any) -> None:
        raise NotImplementedError

    def memo(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns, computed once for this object and ``key``."""
        try:
            return self._memo[key]
        except KeyError:
            if len(self._memo) > 256:
                self._memo.clear()
            found = self._memo[key] = compute()
            return found

    def __reduce__(self) -> Any:
        return (_interned, (type(self), *self._key))

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def _interned(cls: type[Interned], *parts: Any) -> Any:
    """``cls.of(*parts)``: cloudpickle would take the method itself to pieces."""
    return cls.of(*parts)


PLACEMENT = "placement"
"""The metadata under which ``shard`` keeps the NamedSharding that it put a leaf in."""


class Metadata(Interned, Mapping[str, Any]):
    """The immutable metadata of a Variable; equal metadata is one object.

    Build it with ``Metadata.of``. Being interned, it is compared by identity, and a
    change of a Variable's metadata shows as a different object.
    """

    __slots__ = ("_items",)
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]

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
        keys = ((name, static_key(value)) for name, value in items.items())
        return cls._intern(frozenset(keys), items)

    def _setup(self, items: Mapping[str, Any]) -> None:
        # Equal metadata is one object, whose order must not depend on who came first.
        self._items = dict(sorted(items.items()))

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"Metadata({self._items!r})"

    def __reduce__(self) -> Any:
        # Devices cannot be pickled, and arrays come back on the first one.
        items = {k: x for k, x in self._items.items() if k != PLACEMENT}
        return (_interned, (Metadata, items))


EMPTY: Metadata = Metadata._intern(frozenset(), {})
