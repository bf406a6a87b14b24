"""List and Dict: NNX's containers, which are modules themselves."""

from __future__ import annotations

from collections.abc import (
    Iterable,
    Iterator,
    MutableMapping,
    MutableSequence,
)
from typing import Any

from sortal._engine import paths
from sortal._engine.marks import Marked
from sortal._engine.nodes import ObjectHandler, get_dict, register_node
from sortal.errors import ArgumentError, PathAttributeError
from sortal.module import RECORDS, Module, Pytree


class List(Module, MutableSequence):
    """A list that is a Module; in plain attributes a plain list works as well.

    Items may be marked ``data`` or ``static``, as attributes may.

    Args:
      items: the elements; none if absent.

    Example:
      >>> from sortal import nnx
      >>> layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.relu])
      >>> len(layers)
      2
    """

    def __init__(self, items: Iterable[Any] | None = None, /):
        for x in items or ():
            self.append(x)

    def __len__(self) -> int:
        attributes = get_dict(self)
        n = len(attributes)  # what calls record apart is an attribute too
        while n and str(n - 1) not in attributes:
            n -= 1
        return n

    def __getitem__(self, index: Any) -> Any:
        found = range(len(self))[index]
        attributes = get_dict(self)
        if isinstance(found, int):
            return attributes[str(found)]
        return [attributes[str(i)] for i in found]

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            rows = self._rows()
            rows[index] = value
            self._refill(rows)
        else:
            setattr(self, str(range(len(self))[index]), value)

    def __delitem__(self, index: Any) -> None:
        rows = self._rows()
        del rows[index]
        self._refill(rows)

    def append(self, value: Any) -> None:
        """Adds an element at the end.

        Args:
          value: the element.
        """
        setattr(self, str(len(self)), value)

    def insert(self, index: int, value: Any) -> None:
        """Adds an element before another.

        Args:
          index: that of the other.
          value: the element.
        """
        rows = self._rows()
        rows.insert(index, value)
        self._refill(rows)

    def reverse(self) -> None:
        """Turns the order of the elements round."""
        self._refill(self._rows()[::-1])

    def _rows(self) -> list[Any]:
        """The elements, with their marks."""
        roles = self._roles or {}
        return [
            Marked(roles[str(i)], x) if str(i) in roles else x
            for i, x in enumerate(self)
        ]

    def _refill(self, rows: list[Any]) -> None:
        List(rows)  # refuses what cannot be, before anything is changed
        for i in range(len(self)):
            delattr(self, str(i))
        for i, x in enumerate(rows):
            setattr(self, str(i), x)


class Items(Pytree, MutableMapping):
    """A mapping from names to values, which are its attributes."""

    def __init__(self, *args: Any, **items: Any):
        self.update(dict(*args, **items))

    def __getitem__(self, key: str) -> Any:
        return get_dict(self)[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str):
            raise ArgumentError(
                f"the keys of a {type(self).__name__} are names of attributes; found "
                f"{key!r}. A plain dict takes any key."
            )
        setattr(self, key, value)

    def __delitem__(self, key: str) -> None:
        if key not in get_dict(self):
            raise KeyError(key)
        delattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (name for name in get_dict(self) if name != RECORDS)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __hash__(self) -> int:
        return id(self)

    def __getattr__(self, name: str) -> Any:
        raise PathAttributeError(_no_item(self, name))

    def __delattr__(self, name: str) -> None:
        if name not in get_dict(self):
            raise PathAttributeError(_no_item(self, name))
        super().__delattr__(name)


class Dict(Items, Module):
    """A dict that is a Module, and whose items are its attributes.

    Built as ``dict`` is: from a mapping, pairs, or keywords. Keys are strings.

    Example:
      >>> from sortal import nnx
      >>> heads = nnx.Dict(policy=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> heads.policy is heads["policy"]
      True
    """


def _no_item(items: Items, name: str) -> str:
    return f"{type(items).__name__} has no item {name!r}; it has {sorted(items)}."


class _ListHandler(ObjectHandler):
    """Children at their indices, which attributes of a List spell in digits."""

    def items(self, obj: Any) -> dict[Any, Any]:
        found = {_index(name): x for name, x in get_dict(obj).items()}
        return {key: found[key] for key in sorted(found, key=paths.order)}

    def order(self, obj: Any) -> tuple[Any, ...]:
        return tuple(map(_index, get_dict(obj)))

    def roles(self, obj: Any) -> dict[Any, str] | None:
        return obj._roles and {_index(name): x for name, x in obj._roles.items()}

    def place(self, obj: Any, key: Any) -> tuple[Any, Any]:
        return get_dict(obj), str(key)

    def remove(self, obj: Any, key: Any) -> None:
        delattr(obj, str(key))

    def can_remove(self, key: Any) -> bool:
        return isinstance(key, str)

    def fill(self, obj: Any, spec: Any, items: dict[Any, Any]) -> None:
        super().fill(obj, spec, {str(key): x for key, x in items.items()})


def _index(name: str) -> int | str:
    return int(name) if name.isdecimal() else name


register_node(List, _ListHandler())
