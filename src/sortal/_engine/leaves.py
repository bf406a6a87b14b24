"""Live leaves: where values hang in a model, read and written many at once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from sortal._engine.foreign import VariableHandler
from sortal._engine.handlers import Handler
from sortal._engine.jax_compat import current_trace
from sortal._engine.paths import Path
from sortal._engine.variable import Variable, cell_of, check_writable, write


class Slot:
    """A raw array where it hangs, as the engine reads and writes it."""

    __slots__ = ("_indexed", "_trace", "handler", "holder", "key", "writable")

    def __init__(self, node: Any, handler: Handler, key: Any, trace: Any):
        self._trace, self.handler = trace, handler
        # Tuples and other values cannot be written to.
        self.writable = handler.tracked
        self.holder, self.key = handler.place(node, key)
        self._indexed = isinstance(self.holder, (dict, list)) or type(node) is tuple

    @property
    def held(self) -> Any:
        """The array."""
        holder = self.holder if self._indexed else self.handler.items(self.holder)
        return holder[self.key]

    _value = held

    def write(self, value: Any) -> None:
        """Puts ``value`` there; the holder must be writable."""
        holder, handler = self.holder, self.handler
        if self._indexed:
            holder[self.key] = value
            return
        items = {**handler.items(holder), self.key: value}
        handler.fill(holder, handler.spec(holder), handler.arranged(holder, items))

    @property
    def _place(self) -> tuple[Any, Path, str]:
        return self.holder, (self.key,), "unlabelled array"


class Foreign:
    """A Variable of another library, with the face of one of ours for the engine."""

    __slots__ = ("handler", "held")

    def __init__(self, variable: Any, handler: VariableHandler):
        self.held, self.handler = variable, handler

    @property
    def _value(self) -> Any:
        return self.handler.values([self.held])[0]

    def write(self, value: Any) -> None:
        """Sets the value; hooks do not run."""
        self.handler.write(self.held, value)

    def set_metadata(self, metadata: dict[str, Any]) -> None:
        """Replaces the metadata."""
        self.handler.set_metadata(self.held, metadata)

    @property
    def _trace(self) -> Any:
        return current_trace() if self.handler.is_ours(self.held) else None

    @property
    def _place(self) -> tuple[Any, Path, str]:
        return self.held, (), type(self.held).__name__


def held(leaf: Any) -> Any:
    """What a live leaf is to the user: a Variable of any library, or a raw array."""
    return leaf.held if isinstance(leaf, (Slot, Foreign)) else leaf


def identity(leaf: Any) -> Any:
    """What is equal for one and the same live leaf, seen from two plans."""
    if isinstance(leaf, Slot):
        return id(leaf.holder), leaf.key
    return id(held(leaf))


class Leaves(list[Any]):
    """Live leaves, Variables and Slots, that are read and written all at once."""

    __slots__ = ("_cells", "_theirs", "_trace", "slotted")

    def __init__(self, leaves: Iterable[Any]):
        super().__init__(leaves)
        types = set(map(type, self))
        self.slotted = Slot in types
        ours = not types & {Slot, Foreign}
        self._cells = [x._cell for x in self] if ours else None
        # Those of one other library can be read at once as well.
        one_library = types == {Foreign} and len({x.handler for x in self}) == 1
        self._theirs = [x.held for x in self] if one_library else None
        first = self[0]._trace if self else None
        self._trace = first if all(x._trace is first for x in self) else None

    def values(self) -> list[Any]:
        """The values of all, in order."""
        if self._cells is not None:
            try:
                return [value for (value,) in self._cells]
            except ValueError:  # there is a longer one
                return [cell[0] for cell in self._cells]
        if self._theirs is not None:
            return self[0].handler.values(self._theirs)
        return [x._value for x in self]

    def objects(self) -> list[Any]:
        """What the user has in their places: Variables, and raw arrays by value."""
        return list(self) if self._cells is not None else list(map(held, self))

    def snapshot(self) -> list[Any]:
        """The values, with copies of NumPy arrays, which others could write to."""
        if self._cells is not None:
            try:
                return [value for (value,) in self._cells]
            except ValueError:  # there is a longer one: an array of NumPy, or was
                pass
        return own(self.values())

    def ours(self) -> bool:
        """Whether all are known to belong to the current trace."""
        return not self or self._trace is current_trace()

    def put(self, values: Iterator[Any]) -> None:
        """Writes one value into each, without asking which trace owns it."""
        if self._cells is not None:
            numpy = np.ndarray
            for cell, value in zip(self._cells, values, strict=False):
                if value.__class__ is numpy:
                    cell[:] = cell_of(value)
                else:
                    cell[0] = value
            return
        for leaf, value in zip(self, values, strict=False):
            write(leaf, value) if isinstance(leaf, Variable) else leaf.write(value)


def picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that takes the items at some indices out of a sequence."""
    if len(indices) < 2:
        return lambda items: [items[i] for i in indices]
    return operator.itemgetter(*indices)


def store_all(parts: Sequence[Leaves], values: Iterable[Any]) -> None:
    """Writes values into live leaves: all of them, or none.

    Args:
      parts: Variables, and Slots that are writable.
      values: a value for each leaf of all parts.

    Raises:
      TraceError: some leaves belong to another trace; nothing is written.
    """
    foreign = [part for part in parts if not part.ours()]
    if foreign:
        check_writable(leaf for part in foreign for leaf in part)
    values = iter(values)
    for part in parts:
        part.put(values)


def own(values: list[Any]) -> list[Any]:
    """Copies the NumPy arrays among ``values``, which others could write to."""
    if np.ndarray in map(type, values):
        return [v.copy() if type(v) is np.ndarray else v for v in values]
    return values
