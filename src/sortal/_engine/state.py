"""State: a flat mapping path -> value with kinds and metadata, read as if nested."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import jax

from sortal._engine.foreign import deep_copy, note_class
from sortal._engine.handlers import Handler
from sortal._engine.jax_compat import current_trace, register_pytree
from sortal._engine.leaves import own
from sortal._engine.nested import Layout, empty_node, equal, flatten, nest, ordered
from sortal._engine.nodes import register_node
from sortal._engine.paths import Path, show
from sortal._engine.printing import STATISTICS, text
from sortal._engine.schema import (
    Kind,
    Schema,
    check_exhaustive,
    kind_name,
    select,
)
from sortal._engine.statics import EMPTY, Metadata, edits
from sortal._engine.variable import (
    describe,
    foreign_write,
    is_variable,
    make_all,
    metadata_of,
    value_of,
)
from sortal.errors import ArgumentError, PathAttributeError, PathError, listing


class _Stored:
    """The leaves of a State, flat: bare values until one is read, then Variables."""

    __slots__ = ("_cells", "_checked", "_schema", "_trace")

    def __init__(self, schema: Schema, cells: list[Any], boxed: bool):
        # The list and what it holds change together, seen from any thread.
        self._cells = (cells, boxed)
        self._schema, self._checked, self._trace = schema, None, current_trace()

    @property
    def boxed(self) -> bool:
        """Whether Variables were read or given, which others may hold too."""
        return self._cells[1]

    @property
    def layout(self) -> Schema:
        """The schema for its paths alone, which edits of a leaf leave as they are."""
        return self._schema

    @property
    def schema(self) -> Schema:
        """Paths, kinds and metadata, as they are now."""
        cells, boxed = self._cells
        old = self._schema
        # Variables of other libraries note no edit, and so are looked at each time.
        if boxed and (self._checked is not edits.last or old.has_foreign):
            now = edits.last
            kinds, metadata = _kinds(cells)
            if kinds != old.kinds or metadata != old.metadata:
                self._schema = Schema.of(old.paths, kinds, metadata)
            self._checked = now
        return self._schema

    def values(self) -> list[Any]:
        """The bare values, in a new list."""
        cells, boxed = self._cells
        return list(map(value_of, cells)) if boxed else list(cells)

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
            fresh = _from_items([*kept, *added.items()])
            schema, leaves = fresh._schema, fresh.leaves()
            self._schema, self._cells = schema, (leaves, True)
        for path in new.keys() - added.keys():
            at, leaf = schema.index[path], new[path]
            if is_variable(leaf) or not is_variable(leaves[at]):
                leaves[at] = leaf
            else:  # a bare value keeps the Variable
                leaves[at].set_value(leaf)
        edits.note()


def _kinds(leaves: list[Any]) -> tuple[tuple[Kind, ...], tuple[Metadata, ...]]:
    kinds = tuple(type(x) if is_variable(x) else None for x in leaves)
    pairs = zip(kinds, leaves, strict=True)
    return kinds, tuple(EMPTY if k is None else metadata_of(x) for k, x in pairs)


def _from_items(items: Iterable[tuple[Path, Any]]) -> _Stored:
    """Pairs of path and leaf, in any order: Variables and raw arrays, kept as they are.

    Raises:
      PathError: a path is there twice, or runs through a leaf; all are listed.
    """
    found = dict(ordered(items))
    leaves = list(found.values())
    kinds, metadata = _kinds(leaves)
    return _Stored(Schema.of(tuple(found), kinds, metadata), leaves, any(kinds))


class State(MutableMapping[Any, Any]):
    """The leaves of a model, apart from it: a snapshot that is safe to edit.

    Stored flat, read nested: ``s["layers"][0]["kernel"]`` and
    ``s.layers[0].kernel`` are a Variable of the leaf's kind that belongs to this
    State alone; ``s["layers"]`` is a view, so that writing through it edits ``s``.
    Variables given one by one are kept; another State given is copied. To JAX a
    State is nested dicts of Variables, with a ``DictKey`` for each level.

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

    # A view has the same leaves stored as its State, and a prefix into them.
    __slots__ = ("__weakref__", "_prefix", "_stored")

    def __init__(self, mapping: Any = (), /):
        pairs = mapping if isinstance(mapping, Mapping) else dict(mapping)
        _set_stored(self, _from_items(_walk(pairs)))
        _set_prefix(self, ())

    @classmethod
    def from_flat_path(cls, flat: Any, /) -> State:
        """Builds a State from paths and leaves.

        Args:
          flat: a mapping, or pairs, of path (tuple) and leaf: a Variable or a value.

        Returns:
          The State.
        """
        items = flat.items() if isinstance(flat, Mapping) else flat
        return _state(_from_items((tuple(path), leaf) for path, leaf in items))

    @property
    def schema(self) -> Schema:
        """Paths, kinds and metadata of the leaves, in order."""
        schema = self._stored.schema
        return schema.below(self._prefix)[0] if self._prefix else schema

    def values_list(self) -> list[Any]:
        """The bare values, in order."""
        return self._mine(self._stored.values())

    def leaves(self) -> list[Any]:
        """All leaves in order: Variables of this State, and raw arrays."""
        return self._mine(self._stored.leaves())

    def _mine(self, items: list[Any]) -> list[Any]:
        if not self._prefix:
            return list(items)
        return [items[i] for i in self._stored.layout.below(self._prefix)[1]]

    def _write(self, new: dict[Path, Any], gone: Iterable[Path] = ()) -> None:
        """Sets some leaves and removes others; a bare value keeps the leaf's kind."""
        prefix = self._prefix
        whole = {(*prefix, *path): leaf for path, leaf in new.items()}
        self._stored.write(self, whole, {(*prefix, *path) for path in gone})

    # ------------------------------------------------- nested mapping
    def __getitem__(self, key: Any) -> Any:
        schema, path = self._stored.layout, (*self._prefix, key)
        if path in schema.index:
            return self._stored.leaves()[schema.index[path]]
        if schema.children(path):
            return _state(self._stored, path)
        raise PathError(
            f"no {key!r} in this State; it has "
            f"{', '.join(map(repr, self)) or 'nothing'}."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        try:
            return self[name]
        except PathError as e:
            raise PathAttributeError(str(e)) from None

    def __setitem__(self, key: Any, leaf: Any) -> None:
        new = dict(_walk({key: leaf}))
        self._write(new, self._below(key) - new.keys())

    def _below(self, key: Any) -> set[Path]:
        return {p for p in self.schema.paths if p[:1] == (key,)}

    def __setattr__(self, name: str, leaf: Any) -> None:
        self[name] = leaf

    def __delitem__(self, key: Any) -> None:
        gone = self._below(key)
        if not gone:
            self[key]  # says what there is
        self._write({}, gone)

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
            found = State.from_flat_path(found.flat_state())
        del self[key]
        return found

    def popitem(self) -> tuple[Any, Any]:
        """Removes the first key and returns it with what was there."""
        key = next(iter(self), None)
        return key, self.pop(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stored.layout.children(self._prefix))

    def __len__(self) -> int:
        return len(self._stored.layout.children(self._prefix))

    def __contains__(self, key: Any) -> bool:
        return key in self._stored.layout.children(self._prefix)

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
        gone = as_state(other).schema.index
        kept = tuple(i for i, path in enumerate(self.paths()) if path not in gone)
        return self._parts([(self.schema.pick(kept), kept)])

    def __repr__(self) -> str:
        rows = self._rows(lambda x, _: describe(x))
        return f"State(\n{listing(rows)}\n)" if rows else "State()"

    def __str__(self) -> str:
        return format(self, "")

    def __format__(self, spec: str) -> str:
        """``stats`` for the mean and extremes of each array."""
        if spec not in ("", STATISTICS):
            raise ArgumentError(
                f"a State is formatted as '' or 'stats'; found {spec!r}."
            )
        rows = self._rows(lambda x, start: text(x, describe(x), f"  {start}", spec))
        return "\n  ".join(["State(", *rows]) + "\n)" if rows else "State()"

    def _rows(self, shown: Callable[[Any, str], str]) -> list[str]:
        """A row for each leaf, given how a value is shown after some text."""
        schema, rows = self.schema, []
        for i, x in enumerate(self.values_list()):
            kind = schema.kinds[i]
            opened, closed = (f"{kind_name(kind)}(", ")") if kind else ("", "")
            start = f"{show(schema.paths[i])}: {opened}"
            rows.append(start + shown(x, start) + closed)
        return rows

    def __reduce__(self) -> Any:
        if self._stored.boxed:  # another object may hold one of the Variables
            return (_of_leaves, (self.schema, self.leaves()))
        return (snapshot, (self.schema, own(self.values_list())))

    def __copy__(self) -> State:
        return snapshot(self.schema, own(self.values_list()))

    def __deepcopy__(self, memo: Any) -> State:
        if self._stored.boxed:
            return _of_leaves(self.schema, [deep_copy(x, memo) for x in self.leaves()])
        values = [jax.tree.map(lambda x: own([x])[0], v) for v in self.values_list()]
        return snapshot(self.schema, values)

    # ------------------------------------------------------------ flat
    def paths(self) -> tuple[Path, ...]:
        """The paths of all leaves, in order."""
        return self.schema.paths

    def flat_state(self) -> FlatState:
        """The pairs of path and leaf, in order."""
        return FlatState(zip(self.paths(), self.leaves(), strict=True))

    def map(self, f: Callable[[Path, Any], Any]) -> State:
        """A State of what ``f`` makes of each path and leaf.

        Args:
          f: takes a path and a Variable or array; returns the new leaf.

        Returns:
          The new State, with Variables of its own.
        """
        leaves = list(map(f, self.paths(), self.leaves()))
        schema = Schema.of(self.paths(), *_kinds(leaves))
        return snapshot(schema, own(list(map(value_of, leaves))))

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
        return self._parts(select(self.schema, filters, self.leaves).parts)

    def split(self, *filters: Any) -> Any:
        """Divides all leaves among filters.

        Args:
          *filters: one or more filters.

        Returns:
          A State, or a tuple with one State for each filter.

        Raises:
          FilterError: as ``filter``; or leaves are left over.
        """
        found = select(self.schema, filters, self.leaves)
        check_exhaustive(self.schema, filters, found.rest)
        return self._parts(found.parts)

    def _parts(self, parts: Iterable[tuple[Schema, tuple[int, ...]]]) -> Any:
        values = own(self.values_list())
        return one_or_all(snapshot(s, [values[i] for i in at]) for s, at in parts)

    @staticmethod
    def merge(state: Any, /, *states: Any) -> State:
        """One State of all leaves; where two have the same path the later wins.

        Args:
          state: a State or nested mapping.
          *states: more of them.

        Returns:
          The new State, with Variables of its own.
        """
        merged: dict[Path, Any] = {}
        for x in (state, *states):
            merged.update(copy.copy(as_state(x)).flat_state())
        return _state(_from_items(merged.items()))

    # --------------------------------------------------- nested dicts
    def to_pure_dict(self, extract_fn: Callable[[Any], Any] | None = None) -> dict:
        """Nested dicts of bare values.

        Args:
          extract_fn: takes a leaf, returns what to put; its value if absent.

        Returns:
          The dict, with integer keys where the paths have them.
        """
        mapped = extract_fn is not None
        leaves = map(extract_fn, self.leaves()) if mapped else self.values_list()
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
        leaves = dict(self.flat_state())
        by_text = {tuple(map(str, path)): path for path in leaves}
        found, unknown = {}, []
        dicts = {p for p, x in leaves.items() if isinstance(value_of(x), Mapping)}
        for path, value in _walk(pure, dicts):
            known = path if path in leaves else by_text.get(tuple(map(str, path)))
            if known is None:
                unknown.append(show(path))
            else:
                found[known] = value
        if unknown:
            raise PathError(
                "replace_by_pure_dict was given paths that this State does not have:\n"
                f"{listing(unknown)}\nIt has:\n{listing(map(show, leaves))}"
            )
        if replace_fn is not None:
            found = {path: replace_fn(leaves[path], x) for path, x in found.items()}
        self._write(found)


class FlatState(tuple):
    """Pairs of path and leaf, in order; ``dict(flat)`` gives a mapping by path.

    Args:
      pairs: pairs of path (tuple) and leaf.
      sort: whether to put them into the order of a State.

    Example:
      >>> import sortal as nnx
      >>> dict(nnx.State({"a": {"b": 1}}).flat_state())
      {('a', 'b'): 1}
    """

    __slots__ = ()

    def __new__(cls, pairs: Iterable[tuple[Path, Any]] = (), /, *, sort: bool = False):
        pairs = State.from_flat_path(pairs).flat_state() if sort else pairs
        return super().__new__(cls, pairs)

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


_set_stored = State.__dict__["_stored"].__set__
_set_prefix = State.__dict__["_prefix"].__set__


def _state(leaves: _Stored, prefix: Path = ()) -> State:
    state = object.__new__(State)
    _set_stored(state, leaves)
    _set_prefix(state, prefix)
    return state


def _of_leaves(schema: Schema, leaves: list[Any]) -> State:
    return _state(_Stored(schema, leaves, boxed=True))


def snapshot(schema: Schema, values: list[Any]) -> State:
    """A State over ``values``, which it keeps as they are; for the engine.

    Args:
      schema: paths, kinds and metadata.
      values: the bare values in the same order.

    Returns:
      The State.
    """
    return _state(_Stored(schema, values, False))


def one_or_all(states: Iterable[State]) -> Any:
    """The State where there is one, as for one filter; else a tuple of them."""
    states = tuple(states)
    return states[0] if len(states) == 1 else states


def as_state(x: Any) -> State:
    """Reads a State, a FlatState, a Variable or a nested mapping of leaves, as a State.

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
    if is_variable(x):
        return State.from_flat_path({(): x})
    raise ArgumentError(
        f"expected a State or a nested dict of leaves, found {_shown(x)}."
    )


def _shown(x: Any) -> str:
    if hasattr(x, "dtype"):
        return describe(x)
    return repr(x) if x is None else f"a {type(x).__name__}"


def _walk(mapping: Mapping, whole: Any = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves, copies of those of a State; a dict at a path in ``whole`` is one."""
    for path, leaf in flatten(mapping, lambda p, x: isinstance(x, State) or p in whole):
        if isinstance(leaf, State):
            copied = copy.copy(leaf).flat_state()
            yield from (((*path, *p), x) for p, x in copied)
        elif leaf is not empty_node:
            yield path, leaf


def _flatten(state: State) -> tuple[tuple[Any, ...], Layout]:
    schema = state.schema
    layout = schema.memo("layout", lambda: Layout(schema))
    return layout.tree.unflatten(state.leaves()), layout


def _flatten_with_keys(state: State) -> tuple[Any, Layout]:
    children, layout = _flatten(state)
    return tuple(zip(layout.entries, children, strict=True)), layout


def _unflatten(layout: Layout, children: Iterable[Any]) -> State:
    children = tuple(children)
    try:
        cells = layout.tree.flatten_up_to(children)
    except ValueError:  # a map gave one leaf in the place of a whole part
        return State(zip(layout.keys, children, strict=True))
    return _state(_Stored(layout.schema, cells, boxed=True))


class _StateHandler(Handler):
    """A State held by an object is one node whose children lie at whole paths."""

    flat = notes_edits = exact = True

    def items(self, obj: State) -> dict[Any, Any]:
        return dict(obj.flat_state())

    def contents(self, nodes: Any) -> tuple[list[Any], Iterable[Any]]:
        return [x.schema for x in nodes], (leaf for x in nodes for leaf in x.leaves())

    def shell(self, cls: type, spec: Any) -> State:
        return State()

    def remove(self, obj: State, key: Any) -> None:
        obj._write({}, {key})

    def fill(self, obj: State, spec: Any, items: dict[Any, Any]) -> None:
        obj._write(items, set(obj.schema.paths) - items.keys())


register_node(State, _StateHandler())
register_pytree(State, _flatten, _flatten_with_keys, _unflatten)
jax.tree_util.register_pytree_node(
    FlatState,
    lambda flat: (flat.leaves, flat.paths),
    lambda paths, leaves: FlatState(zip(paths, leaves, strict=True)),
)
for _class in (State, FlatState):
    note_class(_class)
