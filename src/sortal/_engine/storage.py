"""What a State stores: its leaves, flat, and the nested dicts that JAX sees."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.tree_util import DictKey

from sortal._engine.jax_compat import current_trace
from sortal._engine.nested import nest, ordered
from sortal._engine.paths import Path, PathKey
from sortal._engine.schema import Schema
from sortal._engine.statics import EMPTY, Metadata, edits
from sortal._engine.variable import (
    Variable,
    foreign_write,
    is_variable,
    make_all,
    metadata_of,
    value_of,
)


class Stored:
    """The leaves of a State, flat: bare values until one is read, then Variables."""

    __slots__ = ("_cells", "_checked", "_schema", "_trace")

    def __init__(self, schema: Schema, cells: list[Any], boxed: bool):
        # The list and what it holds change together, seen from any thread.
        self._cells = (cells, boxed)
        self._schema, self._checked, self._trace = schema, -1, current_trace()

    @property
    def schema(self) -> Schema:
        """Paths, kinds and metadata, as they are now."""
        cells, boxed = self._cells
        if boxed and self._checked != edits.last:
            now, old = edits.last, self._schema
            kinds, metadata = _kinds(cells)
            if kinds != old.kinds or metadata != old.metadata:
                self._schema = Schema.of(old.paths, kinds, metadata)
            self._checked = now
        return self._schema

    def values(self) -> list[Any]:
        """The bare values, in a new list."""
        cells, boxed = self._cells
        if not boxed:
            return list(cells)
        return [x._value if isinstance(x, Variable) else value_of(x) for x in cells]

    def leaves(self) -> list[Any]:
        """The Variables and raw arrays themselves: the list that is kept."""
        cells, boxed = self._cells
        if not boxed:
            kinds, metadata = self._schema.kinds, self._schema.metadata
            cells = make_all(kinds, cells, metadata, self._trace)
            self._cells = (cells, True)
        return cells

    def write(self, owner: Any, new: dict[Path, Any], gone: set[Path]) -> None:
        """Sets leaves of a State and removes others; bare values keep Variables."""
        if self._trace is not current_trace():
            raise foreign_write((owner, p, "in a State") for p in [*new, *gone])
        schema, leaves = self.schema, self.leaves()
        added = {p: x for p, x in new.items() if p not in schema.index}
        if added or gone:
            items = zip(schema.paths, leaves, strict=True)
            kept = [(p, x) for p, x in items if p not in gone]
            fresh = stored_by_path([*kept, *added.items()])
            schema, leaves = fresh._schema, fresh.leaves()
            self._schema, self._cells = schema, (leaves, True)
        for path in new.keys() - added.keys():
            at, leaf = schema.index[path], new[path]
            if is_variable(leaf) or not is_variable(leaves[at]):
                leaves[at] = leaf
            else:  # a bare value keeps the Variable
                leaves[at].set_value(leaf)
        edits.note()


def _kinds(
    leaves: Sequence[Any],
) -> tuple[tuple[type | None, ...], tuple[Metadata, ...]]:
    kinds = [
        type(x) if isinstance(x, Variable) or is_variable(x) else None for x in leaves
    ]
    metadata = [
        EMPTY if kind is None else metadata_of(x)
        for x, kind in zip(leaves, kinds, strict=True)
    ]
    return tuple(kinds), tuple(metadata)


def stored(paths: Sequence[Path], leaves: list[Any]) -> Stored:
    """Leaves with their paths, in order: Variables and raw arrays, kept as they are."""
    kinds, metadata = _kinds(leaves)
    return Stored(Schema.of(paths, kinds, metadata), leaves, any(kinds))


def stored_by_path(items: Iterable[tuple[Path, Any]]) -> Stored:
    """Pairs of path and leaf, in any order.

    Raises:
      PathError: a path is there twice, or runs through a leaf; all are listed.
    """
    found = ordered(items)
    return stored([path for path, _ in found], [leaf for _, leaf in found])


class Layout:
    """How the leaves of a State lie in the nested dicts that JAX sees.

    Equal for equal outermost keys, since JAX compares the dicts and the Variables in
    them itself: a State of bare values, such as a mask or labels, is thus a prefix of
    the State of Variables that it is about.
    """

    __slots__ = ("entries", "keys", "schema", "tree")

    def __init__(self, schema: Schema):
        lone = schema.paths == ((),)  # of a lone Variable
        parts = {None: 0} if lone else nest((path, 0) for path in schema.paths)
        self.schema, self.keys = schema, tuple(parts)
        self.entries = [PathKey(()) if lone else DictKey(key) for key in parts]
        self.tree = jax.tree.structure(tuple(map(_pytree, parts.values())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.keys == other.keys

    def __hash__(self) -> int:
        return hash(self.keys)

    def __repr__(self) -> str:
        return ", ".join(map(repr, self.keys))


def _pytree(part: Any) -> Any:
    """Dicts, which JAX sorts by key, where that is the order of paths too."""
    if not isinstance(part, dict):
        return part
    inner = {key: _pytree(x) for key, x in part.items()}
    try:
        return inner if sorted(inner) == list(inner) else OrderedDict(inner)
    except TypeError:  # such as integers among strings
        return OrderedDict(inner)
