"""State: a flat mapping path -> value with kinds and metadata, read as if nested."""

from __future__ import annotations

from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any

import jax

from sortal._engine.jax_compat import current_trace, register_pytree
from sortal._engine.leaves import own
from sortal._engine.nested import equal, locate_all, nest, ordered, walk
from sortal._engine.nodes import Handler, register_node
from sortal._engine.paths import Path, PathKey, entries, show
from sortal._engine.schema import Schema, check_exhaustive, kind_name, select
from sortal._engine.statics import EMPTY, edits
from sortal._engine.variable import (
    Variable,
    describe,
    foreign_write,
    is_variable,
    make,
    make_all,
    metadata_of,
    value_of,
)
from sortal.errors import ArgumentError, PathAttributeError, PathError, listing

_SLOTS = ("_schema", "_cells", "_boxed", "_checked", "_trace", "_parent", "_prefix")
# How many of a State's cells hold the Variable that was read from there, not its value.
NONE, SOME, ALL = 0, 1, 2


class State(MutableMapping[Any, Any]):
    """The leaves of a model, apart from it: a snapshot that is safe to edit.

    Stored flat, read nested: ``s["layers"][0]["kernel"]`` and
    ``s.layers[0].kernel`` are a Variable of the leaf's kind that belongs to this
    State alone; ``s["layers"]`` is a view, so that writing through it edits ``s``. A
    State is a JAX pytree one hop deep whose children are Variables.

    Args:
      mapping: a nested mapping, or pairs of a key and a leaf or mapping.

    Example:
      >>> import sortal as nnx
      >>> s = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> s.paths()
      (('bias',), ('kernel',))
      >>> s["kernel"]
      Param(float32[2,3])
    """

    __slots__ = ("__weakref__", *_SLOTS)

    def __new__(cls, mapping: Any = (), /) -> Any:
        state = object.__new__(cls)
        _set_trace(state, current_trace())
        _set_parent(state, None)
        return state

    def __init__(self, mapping: Any = (), /):
        pairs = dict(mapping) if not isinstance(mapping, Mapping) else mapping
        _fill_from(self, walk(pairs))

    @classmethod
    def from_flat_path(cls, flat: Any, /) -> State:
        """Builds a State from paths and leaves.

        Args:
          flat: a mapping, or pairs, of path (tuple) and leaf: a Variable or a value.

        Returns:
          The State.
        """
        state = State.__new__(State)
        items = flat.items() if isinstance(flat, Mapping) else flat
        _fill_from(state, ((tuple(path), leaf) for path, leaf in items))
        return state

    # A view has a parent and a prefix in the place of leaves. It is of this very class
    # because JAX takes trees of two classes as two structures.
    @property
    def _at(self) -> tuple[int, ...]:
        return self._parent.schema.below(self._prefix)[1]

    @property
    def schema(self) -> Schema:
        """Paths, kinds and metadata of the leaves, in order."""
        if self._parent is not None:
            return self._parent.schema.below(self._prefix)[0]
        if self._boxed and self._checked != edits.last:
            _refresh(self)
        return self._schema

    def values_list(self) -> list[Any]:
        """The bare values, in order."""
        if self._parent is not None:
            values = self._parent.values_list()
            return [values[i] for i in self._at]
        if not self._boxed:
            return list(self._cells)
        return [
            c._value if isinstance(c, Variable) else value_of(c) for c in self._cells
        ]

    def _leaf(self, i: int) -> Any:
        if self._parent is not None:
            return self._parent._leaf(self._at[i])
        cell, kind = self._cells[i], self._schema.kinds[i]
        if kind is None or is_variable(cell):
            return cell
        metadata = self._schema.metadata[i]
        box = self._cells[i] = make(kind, cell, metadata, self._trace)
        _set_boxed(self, self._boxed or SOME)
        return box

    def _write(self, new: dict[Path, Any], gone: set[Path]) -> None:
        """Sets some leaves and removes others; a bare value keeps the leaf's kind."""
        if self._parent is not None:
            whole = {(*self._prefix, *p): x for p, x in new.items()}
            self._parent._write(whole, {(*self._prefix, *p) for p in gone})
            return
        if self._trace is not current_trace():
            raise foreign_write((self, p, "in a State") for p in [*new, *gone])
        old = dict(zip(self._schema.paths, self._schema.kinds, strict=True))
        other = {
            p: x
            for p, x in new.items()
            if p not in old or (is_variable(x) and type(x) is not old[p])
        }
        if other or gone:
            kept = {p: x for p, x in _items(self) if p not in gone}
            _fill_from(self, {**kept, **other}.items())
        for path in new.keys() - other.keys():
            at, leaf = self._schema.index[path], new[path]
            if is_variable(leaf):
                self._cells[at] = leaf
                _set_boxed(self, self._boxed or SOME)
                edits.note()
            elif self._schema.kinds[at] is None:
                self._cells[at] = leaf
            else:
                self._leaf(at).set_value(leaf)

    def _remove(self, gone: set[Path]) -> None:
        self._write({}, gone)

    # ------------------------------------------------- nested mapping
    def __getitem__(self, key: Any) -> Any:
        path = (key,)
        at = self.schema.index.get(path)
        if at is not None:
            return self._leaf(at)
        if key in self.schema.children(()):
            view = State.__new__(State)
            view._parent, view._prefix = self, path
            return view
        raise PathError(
            f"no {key!r} in this State; it has "
            f"{', '.join(map(repr, self.schema.children(()))) or 'nothing'}."
        )

    def __getattr__(self, name: str) -> Any:
        # A slot not set yet must not be looked for in the schema, itself a slot.
        if name in _SLOTS or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        try:
            return self[name]
        except PathError as e:
            raise PathAttributeError(str(e)) from None

    def __setitem__(self, key: Any, leaf: Any) -> None:
        new = dict(walk({key: leaf}))
        self._write(new, self._below(key) - new.keys())

    def _below(self, key: Any) -> set[Path]:
        return {p for p in self.schema.paths if p[:1] == (key,)}

    def __setattr__(self, name: str, leaf: Any) -> None:
        if name in _SLOTS:
            object.__setattr__(self, name, leaf)
        else:
            self[name] = leaf

    def __delitem__(self, key: Any) -> None:
        gone = self._below(key)
        if not gone:
            self[key]
        self._remove(gone)

    def pop(self, key: Any, *default: Any) -> Any:
        """Removes what is at a key and returns it, a part as a State of its own.

        Args:
          key: a key of the outermost level.
          *default: what to return where there is no such key.

        Returns:
          The leaf or the State.

        Raises:
          PathError: there is no such key, and no default.
        """
        if default and key not in self:
            return default[0]
        found = self[key]
        if isinstance(found, State):  # a view, which would follow the removal
            found = State.from_flat_path(_items(found))
        del self[key]
        return found

    def popitem(self) -> tuple[Any, Any]:
        """Removes the first key and returns it with what was there."""
        key = next(iter(self), None)
        return key, self.pop(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.schema.children(()))

    def __len__(self) -> int:
        return len(self.schema.children(()))

    def __contains__(self, key: Any) -> bool:
        return key in self.schema.children(())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return NotImplemented
        if self.schema is not other.schema:
            return False
        pairs = zip(self.values_list(), other.values_list(), strict=True)
        return all(a is b or equal(a, b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]

    def __or__(self, other: Any) -> State:
        return State.merge(self, other)

    def __sub__(self, other: Any) -> State:
        gone = set(as_state(other).schema.paths)
        return State.from_flat_path([(p, x) for p, x in _items(self) if p not in gone])

    def __repr__(self) -> str:
        rows = [
            f"{show(path)}: "
            + (describe(v) if kind is None else f"{kind_name(kind)}({describe(v)})")
            for path, kind, v in zip(
                self.schema.paths, self.schema.kinds, self.values_list(), strict=True
            )
        ]
        return f"State(\n{listing(rows)}\n)" if rows else "State()"

    def __getstate__(self) -> Any:
        return (self.schema, self.values_list())

    def __setstate__(self, saved: Any) -> None:
        _set_schema(self, saved[0])
        _set_cells(self, list(saved[1]))
        _set_boxed(self, NONE)
        _set_checked(self, -1)

    def __copy__(self) -> State:
        return snapshot(self.schema, self.values_list())

    def __deepcopy__(self, memo: Any) -> State:
        values = [jax.tree.map(lambda x: own([x])[0], v) for v in self.values_list()]
        return snapshot(self.schema, values)

    # ------------------------------------------------------------ flat
    def paths(self) -> tuple[Path, ...]:
        """The paths of all leaves, in order."""
        return self.schema.paths

    def leaves(self) -> list[Any]:
        """All leaves in order: Variables of this State, and raw arrays."""
        if self._parent is not None:
            return [self._parent._leaf(i) for i in self._at]
        if self._boxed != ALL:
            schema = self.schema
            kinds = [
                None if is_variable(c) else kind
                for c, kind in zip(self._cells, schema.kinds, strict=True)
            ]
            made = make_all(kinds, self._cells, schema.metadata, self._trace)
            _set_cells(self, made)
            _set_boxed(self, ALL)
        return list(self._cells)

    def flat_state(self) -> FlatState:
        """The pairs of path and leaf, in order."""
        return FlatState(zip(self.paths(), self.leaves(), strict=True))

    def map(self, f: Callable[[Path, Any], Any]) -> State:
        """A State of what ``f`` makes of each path and leaf.

        Args:
          f: takes a path and a Variable or array; returns the new leaf.

        Returns:
          The new State.
        """
        return State.from_flat_path([(p, f(p, x)) for p, x in _items(self)])

    # --------------------------------------------------- by filter
    def filter(self, *filters: Any) -> Any:
        """The leaves that filters take, as ``sortal.state`` does for a model.

        Args:
          *filters: one or more filters.

        Returns:
          A State, or a tuple with one State for each filter.

        Raises:
          FilterError: a filter is malformed, or swallowed by an earlier one.
        """
        parts, _ = self._divide(filters)
        return parts[0] if len(filters) == 1 else tuple(parts)

    def split(self, *filters: Any) -> Any:
        """Divides all leaves among filters.

        Args:
          *filters: one or more filters.

        Returns:
          A State, or a tuple with one State for each filter.

        Raises:
          FilterError: as ``filter``; or leaves are left over.
        """
        parts, rest = self._divide(filters)
        check_exhaustive(self.schema, filters, rest)
        return parts[0] if len(filters) == 1 else tuple(parts)

    def _divide(self, filters: tuple[Any, ...]) -> tuple[list[State], Sequence[int]]:
        found = select(self.schema, filters, self.leaves)
        values = self.values_list()
        parts = [snapshot(s, [values[i] for i in at]) for s, at in found.parts]
        return parts, found.rest

    @staticmethod
    def merge(state: Any, /, *states: Any) -> State:
        """One State of all leaves; where two have the same path the later wins.

        Args:
          state: a State or nested mapping.
          *states: more of them.

        Returns:
          The new State.
        """
        merged: dict[Path, Any] = {}
        for s in (state, *states):
            merged.update(_items(as_state(s)))
        return State.from_flat_path(merged)

    # --------------------------------------------------- nested dicts
    def to_pure_dict(self, extract_fn: Callable[[Any], Any] | None = None) -> dict:
        """Nested dicts of bare values.

        Args:
          extract_fn: takes a leaf, returns what to put; its value if absent.

        Returns:
          The dict, with integer keys where the paths have them.
        """
        leaves = self.values_list() if extract_fn is None else self.leaves()
        if extract_fn is not None:
            leaves = map(extract_fn, leaves)
        return nest(zip(self.paths(), leaves, strict=True))

    def replace_by_pure_dict(
        self, pure: Mapping, replace_fn: Callable[[Any, Any], Any] | None = None
    ) -> None:
        """Replaces values in place from nested dicts; keys ``"0"`` may stand for 0.

        Args:
          pure: nested dicts of values.
          replace_fn: takes the old leaf and the new value, returns the new leaf.

        Raises:
          PathError: paths that this State does not have; all listed, none replaced.
        """
        schema = self.schema
        found = locate_all(schema.paths, walk(pure), schema.index.get)
        if replace_fn is not None:
            found = [(at, replace_fn(self._leaf(at), value)) for at, value in found]
        self._write({schema.paths[at]: value for at, value in found}, set())


class FlatState(tuple):
    """Pairs of path and leaf, in order; ``dict(flat)`` gives a mapping by path.

    Args:
      iterable: pairs of path (tuple) and leaf.

    Example:
      >>> import sortal as nnx
      >>> dict(nnx.State({"a": {"b": 1}}).flat_state())
      {('a', 'b'): 1}
    """

    __slots__ = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths."""
        return tuple(path for path, _ in self)

    @property
    def leaves(self) -> list[Any]:
        """The leaves."""
        return [leaf for _, leaf in self]

    def to_nested_state(self) -> State:
        """The State of these pairs."""
        return State.from_flat_path(self)


def snapshot(schema: Schema, values: list[Any]) -> State:
    """A State over ``values``, which it keeps as they are; for the engine.

    Args:
      schema: paths, kinds and metadata.
      values: the bare values in the same order.

    Returns:
      The State.
    """
    state = State.__new__(State)
    _set_schema(state, schema)
    _set_cells(state, values)
    _set_boxed(state, NONE)
    _set_checked(state, -1)
    return state


_set_schema = State.__dict__["_schema"].__set__
_set_cells = State.__dict__["_cells"].__set__
_set_boxed = State.__dict__["_boxed"].__set__
_set_checked = State.__dict__["_checked"].__set__
_set_trace = State.__dict__["_trace"].__set__
_set_parent = State.__dict__["_parent"].__set__


def as_state(x: Any) -> State:
    """Reads a State, a FlatState, or a nested mapping of leaves, as a State.

    Args:
      x: one of these.

    Returns:
      The State.

    Raises:
      ArgumentError: it is none of them.
    """
    if isinstance(x, State):
        return x
    if isinstance(x, FlatState):
        return x.to_nested_state()
    if isinstance(x, Mapping):
        return State(x)
    raise ArgumentError(
        f"expected a State or a nested dict of leaves, found a {type(x).__name__}."
    )


def _items(state: State) -> list[tuple[Path, Any]]:
    return list(zip(state.paths(), state.leaves(), strict=True))


def _fill_from(state: State, items: Iterable[tuple[Path, Any]]) -> None:
    found = ordered(items)
    _set_leaves(state, [path for path, _ in found], [leaf for _, leaf in found])


def _set_leaves(state: State, at: Sequence[Path], leaves: list[Any]) -> None:
    boxes = [x if is_variable(x) else None for x in leaves]
    kinds = [None if box is None else type(box) for box in boxes]
    metadata = [EMPTY if box is None else metadata_of(box) for box in boxes]
    _set_parent(state, None)
    _set_schema(state, Schema.of(at, kinds, metadata))
    _set_cells(state, leaves)
    _set_boxed(state, ALL if any(kinds) else NONE)
    _set_checked(state, -1)
    edits.note()


def _refresh(state: State) -> None:
    """Takes over metadata that was edited on a Variable read from the State."""
    schema, now = state._schema, edits.last
    metadata = [
        metadata_of(c) if is_variable(c) else m
        for c, m in zip(state._cells, schema.metadata, strict=True)
    ]
    if any(a is not b for a, b in zip(metadata, schema.metadata, strict=True)):
        _set_schema(state, Schema.of(schema.paths, schema.kinds, metadata))
    _set_checked(state, now)


class _Layout:
    """What a State's treedef says beside its children, which say kinds and metadata.

    Equal for equal paths: a State of bare values, such as a mask or labels, is thus a
    prefix of the State of Variables that it is about.
    """

    def __init__(self, schema: Schema):
        self.schema, self.paths = schema, schema.paths

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Layout) and self.paths == other.paths

    def __hash__(self) -> int:
        return hash(self.paths)

    def __repr__(self) -> str:
        return ", ".join(map(show, self.paths))


def _flatten(state: State) -> tuple[list[Any], _Layout]:
    schema = state.schema
    return state.leaves(), schema.memo("layout", lambda: _Layout(schema))


def _flatten_with_keys(state: State) -> tuple[list[Any], _Layout]:
    leaves, layout = _flatten(state)
    keys = layout.schema.memo("entries", lambda: entries(layout.paths))
    return list(zip(keys, leaves, strict=True)), layout


def _unflatten(layout: _Layout, children: Any) -> State:
    schema = layout.schema
    cells = list(children)
    kinds, metadata = schema.kinds, schema.metadata
    for cell, kind, meta in zip(cells, kinds, metadata, strict=True):
        if isinstance(cell, Variable):
            if type(cell) is kind and cell._metadata is meta:
                continue
        elif not is_variable(cell):
            if kind is None:
                continue
        elif type(cell) is kind and metadata_of(cell) is meta:
            continue
        # A map over whole Variables gave other kinds, or no Variables at all.
        state = State.__new__(State)
        _set_leaves(state, schema.paths, cells)
        return state
    state = snapshot(schema, cells)
    _set_boxed(state, ALL)
    return state


class _StateHandler(Handler):
    """A State held by an object is one node whose children lie at whole paths."""

    flat = True
    notes_edits = True

    def keys(self, obj: State) -> Sequence[Hashable]:
        return obj.schema.paths

    def children(self, obj: State, keys: Any) -> list[Any]:
        return obj.leaves()

    def contents(self, nodes: Sequence[State]) -> tuple[list[Any], Iterable[Any]]:
        return [x.schema for x in nodes], (leaf for x in nodes for leaf in x.leaves())

    def shell(self, cls: type, spec: Any) -> State:
        return State()

    def remove(self, obj: State, key: Any) -> None:
        obj._remove({key})

    def can_remove(self, key: Any) -> bool:
        return True

    def fill(self, obj: State, spec: Any, items: dict[Any, Any]) -> None:
        _set_leaves(obj, tuple(items), list(items.values()))


register_node(State, _StateHandler())
register_pytree(State, _flatten, _flatten_with_keys, _unflatten)
register_pytree(
    FlatState,
    lambda flat: (flat.leaves, flat.paths),
    lambda flat: ([(PathKey(path), x) for path, x in flat], flat.paths),
    lambda at, leaves: FlatState(zip(at, leaves, strict=True)),
)
