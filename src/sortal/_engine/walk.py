"""Walk: one traversal of live objects, and what it refuses."""

from __future__ import annotations

import functools
import numbers
from typing import Any

import numpy as np

from sortal._engine import nodes as _nodes
from sortal._engine.foreign import handler_of_kind
from sortal._engine.graphdef import Entry, GraphDef, Record
from sortal._engine.handlers import Handler, ListHandler
from sortal._engine.jax_compat import current_trace
from sortal._engine.leaves import Foreign, Slot
from sortal._engine.marks import Marked
from sortal._engine.nodes import LEAF, NODE, STATIC, handler_of
from sortal._engine.paths import Path, show
from sortal._engine.schema import Schema
from sortal._engine.statics import EMPTY, Metadata, Static, is_hashable
from sortal._engine.variable import Variable, is_variable
from sortal.errors import StructureError, UnsupportedError, listing

_LIST = ListHandler()
_NUMBERS = (numbers.Number, np.generic)
_BARE = (list, dict, functools.partial)
_NO_HASH = (
    "\nFor what has no hash use a tuple or frozenset, hold arrays in Variables, or "
    "give the class __eq__ and __hash__."
)


class Walk:
    """One traversal: the GraphDef, and the live nodes and leaves in its order."""

    def __init__(self, root: Any):
        self.nodes: list[Any] = []
        self.leaves: list[Any] = []
        self._paths: list[Path] = []
        self._kinds: list[Any] = []
        self._metadata: list[Metadata] = []
        self._records: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._bad: list[str] = []
        self._advice = ""
        self._refused: list[str] = []
        # Taken apart with a stack of its own, so that no depth is too deep.
        self._open: list[tuple[Any, ...]] = []
        entry = self._visit(root, None, (), False, None)
        if self._kinds == [None]:
            self.leaves[0] = Slot([root], _LIST, 0, current_trace())
        while self._open:
            self._take_apart()
        self._refuse()
        schema = Schema.of(self._paths, self._kinds, self._metadata)
        self.graphdef = GraphDef.of(entry, self._records, schema)

    def _visit(self, obj: Any, key: Any, path: Path, data: bool, role: Any) -> Entry:
        """The Entry of one object; in what is marked data, numbers are leaves."""
        if role == "static":
            return Entry(key, STATIC, self._static(obj, path, marked=True))
        found = handler_of(obj)
        number = found is STATIC and data and isinstance(obj, _NUMBERS)
        if found is LEAF or number or (found is STATIC and role == "data"):
            return Entry(key, LEAF, self._leaf(obj, path))
        data = (data or role == "data") and isinstance(obj, (list, dict, tuple))
        if found is STATIC or (
            not (data or found.root) and _nodes.is_static_value(obj)
        ):
            return Entry(key, STATIC, self._static(obj, path))
        return Entry(key, NODE, self._node(obj, path, found, data))

    def _leaf(self, obj: Any, path: Path) -> int:
        number = len(self.leaves)
        kind, metadata = type(obj), EMPTY
        # Raw arrays are values: one met twice is two leaves, else the structure would
        # depend on which equal arrays happen to be one object.
        if not is_variable(obj):
            kind = None
        elif (first := self._numbers.setdefault(id(obj), number)) != number:
            return first
        elif isinstance(obj, Variable):
            metadata = obj._metadata
        else:
            handler: Any = handler_of_kind(kind)
            obj = Foreign(obj, handler)
            metadata = self._foreign(obj, path)
        self.leaves.append(obj)
        self._paths.append(path)
        self._kinds.append(kind)
        self._metadata.append(metadata)
        return number

    def _foreign(self, leaf: Foreign, path: Path) -> Metadata:
        obj, handler = leaf.held, leaf.handler
        refusal = handler.refusal(obj)
        (entries,) = handler.entries([obj])
        bad = [k for k, v in entries.items() if not is_hashable(v)]
        if bad:
            refusal = (
                f"its metadata {', '.join(map(repr, bad))} cannot be hashed; use "
                "tuples for lists, and set it anew by set_metadata"
            )
        if refusal:
            self._refused.append(f"{show(path)} ({type(obj).__name__}): {refusal}")
            return EMPTY
        return Metadata.of(entries)

    def _static(self, obj: Any, path: Path, *, marked: bool = False) -> Static | None:
        name = type(obj).__name__
        if isinstance(obj, Marked):
            why = (
                f"a value marked {obj.role} inside a container, where the mark says "
                "nothing; mark the attribute that holds the container"
            )
        elif marked and _nodes.holds_leaves(obj):
            why = (
                f"a {name} in an attribute that is marked static, where it would be "
                "no leaf; take the mark off, or mark it data"
            )
        elif hidden := _nodes.hidden_state(obj):
            why = (
                f"a {name} that holds {hidden}, which have no path in it; write a tuple"
                if isinstance(obj, (set, frozenset))
                else f"a {name} that is no Module but holds {hidden}; derive it from "
                "sortal.Module"
            )
        else:
            try:
                return Static(obj)
            except TypeError:
                why, self._advice = f"a {name}, {_shown(obj)}", _NO_HASH
            except RecursionError:
                why = f"a {name}, nested too deeply"
        self._bad.append(f"{show(path)}: {why}")
        return None

    def _node(self, obj: Any, path: Path, handler: Handler, data: bool) -> int:
        number = len(self.nodes)
        if handler.tracked:
            first = self._numbers.setdefault(id(obj), number)
            if first != number:
                return first
        if isinstance(obj, _BARE) and getattr(obj, "__dict__", None):
            self._bad.append(
                f"{show(path)}: a {type(obj).__name__} with the attributes "
                f"{', '.join(obj.__dict__)}, which its copies would not keep; derive "
                "it from sortal.Module"
            )
        for name, kind in _nodes.class_state(type(obj)).items():
            if name not in handler.items(obj):
                self._bad.append(
                    f"{show((*path, name))}: a {kind} in the class "
                    f"{type(obj).__name__}, where it is part of no model; set it in "
                    f"__init__, as self.{name} = ..."
                )
        self.nodes.append(obj)
        self._records.append(None)
        owner, children = handler.owner(obj), iter(handler.items(obj).items())
        if owner is None and self._open:  # the innermost object around it says who may
            owner = self._open[-1][5]
        self._open.append((number, obj, path, handler, data, owner, children, []))
        return number

    def _take_apart(self) -> None:
        """Visits the children left of the innermost open node, up to a new node."""
        number, obj, path, handler, data, owner, children, entries = self._open[-1]
        depth = len(self._open)
        roles = handler.roles(obj) or {}
        for key, child in children:
            below = path + key if handler.flat else (*path, key)
            entry = self._visit(child, key, below, data, roles.get(key))
            if entry.what is LEAF and self._kinds[entry.ref] is None:
                trace = current_trace() if owner is None else owner._trace
                self.leaves[entry.ref] = Slot(obj, handler, key, trace)
            entries.append(entry)
            if len(self._open) > depth:
                return
        self._open.pop()
        spec, order = Static(handler.spec(obj)), Static(handler.order(obj))
        self._records[number] = Record(type(obj), handler, spec, order, tuple(entries))

    def _refuse(self) -> None:
        if self._refused:
            raise UnsupportedError(
                "these Variables of another library cannot be carried:\n"
                + listing(self._refused)
            )
        if self._bad:
            raise StructureError(
                "static values must be hashable, because compiled functions are kept "
                "by them, and must hold no state; found:\n"
                + listing(self._bad)
                + self._advice
            )


def _shown(obj: Any) -> str:
    try:
        return f"{obj!r:.60}"
    except RecursionError:
        return "nested too deeply to be shown"
