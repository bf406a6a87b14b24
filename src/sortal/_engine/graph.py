"""The engine: walks live objects, and keeps plans that stay valid cheaply."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sortal._engine import nodes as _nodes
from sortal._engine.foreign import VariableHandler, handler_of_kind
from sortal._engine.graphdef import (
    LEAF,
    NODE,
    STATIC,
    Entry,
    GraphDef,
    Record,
    Schema,
    Selection,
    Static,
    select,
)
from sortal._engine.jax_compat import current_trace
from sortal._engine.leaves import Foreign, Leaves, Slot, held, identity
from sortal._engine.nodes import (
    Handler,
    Node,
    get_dict,
    handler_of,
    is_root,
    leaf_types,
)
from sortal._engine.paths import Path, show
from sortal._engine.statics import EMPTY, edits, is_hashable
from sortal._engine.variable import Variable, metadata_of
from sortal.errors import StructureError, UnsupportedError, listing

_uids = itertools.count()
_KEPT = 4


class Walk:
    """One traversal: the GraphDef, and the live nodes and leaves in its order."""

    def __init__(self, root: Any):
        self.leaves: list[Any] = []
        self.nodes: list[Any] = []
        self.records: list[Any] = []
        self.paths: list[Path] = []
        self.aliases: list[tuple[Path, int]] = []
        self._numbers: dict[int, int] = {}
        self._bad: list[str] = []
        self._refused: list[str] = []
        # Taken apart with a stack of its own, so that no depth is too deep.
        self._open: list[tuple[Any, ...]] = []
        root_entry = self._visit(root, (), None, None, "<root>")
        while self._open:
            self._take_apart(*self._open[-1])
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
                + "\nUse a tuple or frozenset, "
                "hold arrays in Variables, or give the class __eq__ and __hash__."
            )
        variables = [None if type(x) is Slot else held(x) for x in self.leaves]
        schema = Schema.of(
            self.paths,
            [None if v is None else type(v) for v in variables],
            [EMPTY if v is None else metadata_of(v) for v in variables],
        )
        self.graphdef = GraphDef.of(root_entry, self.records, schema, self.aliases)

    def _visit(
        self, obj: Any, path: Path, holder: Any, handler: Handler | None, key: Any
    ) -> Entry:
        found = handler_of(obj)
        if found is _nodes.LEAF:
            return Entry(key, LEAF, self._leaf(obj, path, holder, handler, key))
        if found is _nodes.STATIC or _nodes.is_static_value(obj, found):
            return Entry(key, STATIC, self._static(obj, path))
        return Entry(key, NODE, self._node(obj, path, found))

    def _leaf(
        self, obj: Any, path: Path, holder: Any, handler: Handler | None, key: Any
    ) -> int:
        theirs = None if isinstance(obj, Variable) else handler_of_kind(type(obj))
        boxed = theirs is not None or isinstance(obj, Variable)
        if boxed and id(obj) in self._numbers:
            number = self._numbers[id(obj)]
            self.aliases.append((path, number))
            return number
        number = len(self.leaves)
        self.paths.append(path)
        if boxed:
            self._numbers[id(obj)] = number
        if theirs is not None:
            self._check_foreign(obj, path, theirs)
            self.leaves.append(Foreign(obj, theirs))
        elif boxed:
            self.leaves.append(obj)
        else:
            # Raw arrays are values: one met twice is two leaves, else the structure
            # would depend on which equal arrays happen to be one object.
            owners = (frame[3].owner(frame[1]) for frame in reversed(self._open))
            owner = next((x for x in owners if x is not None), None)
            trace = current_trace() if owner is None else owner._trace
            at = (holder, handler, key) if handler else ([obj], None, 0)
            slot = Slot(*at, trace)
            self.leaves.append(slot)
        return number

    def _check_foreign(self, obj: Any, path: Path, handler: VariableHandler) -> None:
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

    def _static(self, obj: Any, path: Path) -> Static | None:
        if isinstance(obj, _nodes.Marked):
            self._bad.append(
                f"{show(path)}: a value marked {obj.role} inside a container, where "
                "the mark says nothing; mark the attribute that holds the container"
            )
            return None
        hidden = _hidden_state(obj)
        if hidden:
            self._bad.append(
                f"{show(path)}: a {type(obj).__name__} that is no Module but holds "
                f"{hidden}; derive it from sortal.Module"
            )
            return None
        try:
            return Static(obj)
        except TypeError:
            self._bad.append(f"{show(path)}: a {type(obj).__name__}, {obj!r:.60}")
            return None

    def _node(self, obj: Any, path: Path, handler: Handler) -> int:
        if handler.tracked and id(obj) in self._numbers:
            return self._numbers[id(obj)]
        number = len(self.nodes)
        if isinstance(obj, (list, dict)) and getattr(obj, "__dict__", None):
            self._bad.append(
                f"{show(path)}: a {type(obj).__name__} with the attributes "
                f"{', '.join(obj.__dict__)}, which copies of a {type(obj).__base__} "
                "do not keep; derive it from sortal.Module"
            )
        if handler.tracked:
            self._numbers[id(obj)] = number
        self.nodes.append(obj)
        self.records.append(None)
        keys = handler.keys(obj)
        children = zip(keys, handler.children(obj, keys), strict=True)
        self._open.append((number, obj, path, handler, children, []))
        return number

    def _take_apart(
        self,
        number: int,
        obj: Any,
        path: Path,
        handler: Handler,
        children: Any,
        entries: list[Entry],
    ) -> None:
        """Visits the children left of the innermost open node, up to a new node."""
        depth = len(self._open)
        roles = handler.roles(obj)
        for key, child in children:
            below = path + key if handler.flat else (*path, key)
            role = roles.get(key) if roles else None
            if role == "static":
                entries.append(Entry(key, STATIC, self._static(child, below)))
            elif role == "data" and handler_of(child) is _nodes.STATIC:
                leaf = self._leaf(child, below, obj, handler, key)
                entries.append(Entry(key, LEAF, leaf))
            else:
                entries.append(self._visit(child, below, obj, handler, key))
                if len(self._open) > depth:
                    return
        self._open.pop()
        spec = Static(handler.spec(obj))
        self.records[number] = Record(type(obj), handler, spec, tuple(entries))


def _hidden_state(obj: Any) -> str:
    """Names Variables and nodes directly inside a static object, where JAX is blind."""
    if isinstance(obj, type) or callable(obj):
        return ""
    attributes = getattr(obj, "__dict__", None)
    if type(attributes) is not dict:
        return ""
    found = [
        f"{name} ({type(value).__name__})"
        for name, value in attributes.items()
        if is_root(value)
    ]
    return ", ".join(found)


class Plan:
    """A GraphDef bound to the live objects of one root, with a cheap staleness check.

    It never refers to the root itself, so that a root that is dropped is freed at
    once, arrays and all, and not only when cycles are collected.
    """

    __slots__ = (
        "_checked",
        "_containers",
        "_contents",
        "_dicts",
        "_lengths",
        "_metadata",
        "_objects",
        "_open",
        "_parts",
        "_picked",
        "_states",
        "_versions",
        "graphdef",
        "leaves",
        "nodes",
        "uid",
    )

    def __init__(self, root: Any, walk: Walk):
        self.uid = next(_uids)
        self._checked = edits.last
        self.graphdef: GraphDef = walk.graphdef
        self.leaves = Leaves(walk.leaves)
        self.nodes: list[Any] = [None, *walk.nodes[1:]]
        self._metadata = [x._metadata for x in self._variables()]
        self._objects = [x for x in self.nodes if isinstance(x, Node)]
        every = self._every(root)
        self._versions = [x._version for x in every]
        self._dicts = [get_dict(x) for x in every]
        self._lengths = list(map(len, self._dicts))
        self._contents = [_attributes(x, root) for x in every]
        handled = [(x, handler_of(x)) for x in walk.nodes]
        others = [(x, h) for x, h in handled if not isinstance(x, (Node, tuple))]
        noting = [(x, h) for x, h in others if h.notes_edits]
        self._states = list(itertools.starmap(Content, noting))
        silent = [(x, h) for x, h in others if not h.notes_edits]
        dicts = [h.attributes(x) for x, h in silent]
        closed = [x for x, d in zip(silent, dicts, strict=True) if d is None]
        self._containers = list(itertools.starmap(Content, closed))
        opened = Open(root, [d for d in dicts if d is not None], self.leaves)
        self._open = opened if opened.is_any() else None
        self._parts: dict[Any, Leaves] = {}
        self._picked: dict[Any, Any] = {}

    def _every(self, root: Any) -> list[Any]:
        return [root, *self._objects] if isinstance(root, Node) else self._objects

    def _variables(self) -> list[Any]:
        if self.leaves.ours_only:
            return self.leaves
        return [x for x in self.leaves if isinstance(x, Variable)]

    def valid(self, root: Any) -> bool:
        """Whether the live objects still have the structure planned.

        Where no edit was noted anywhere since the last check, only what can change
        without a note is compared: plain containers, and the number of attributes.
        """
        if [*map(len, self._dicts)] != self._lengths:
            return False
        if self._checked != edits.last:
            now = edits.last
            if not self._same_objects(root) or not _all_same(self._states):
                return False
            self._checked = now
        if self._containers and not _all_same(self._containers):
            return False
        return self._open is None or self._open.same(root)

    def _same_objects(self, root: Any) -> bool:
        if [x._metadata for x in self._variables()] != self._metadata:
            return False
        every = self._every(root)
        versions = [x._version for x in every]
        if versions == self._versions:
            return True
        for i, obj in enumerate(every):
            if versions[i] != self._versions[i]:
                # The counter moved, but perhaps only there and back: train and eval.
                if get_dict(obj) is not self._dicts[i]:
                    return False
                if not _same(_attributes(obj, root), self._contents[i]):
                    return False
        self._versions = versions
        return True

    def values(self) -> list[Any]:
        """The values of all leaves, in order."""
        return self.leaves.values()

    def part(self, pick: Callable[[Any], Any]) -> Leaves:
        """Some of the leaves, as ``pick`` takes them from a sequence; kept."""
        found = self._parts.get(pick)
        if found is None:
            if len(self._parts) > 64:
                self._parts.clear()
            found = self._parts[pick] = Leaves(pick(self.leaves))
        return found

    def select(self, literals: tuple[Any, ...]) -> Selection:
        """Divides the leaves among filters; see ``graphdef.select``."""
        return select(self.graphdef.schema, literals, self.view)

    def view(self) -> list[Any]:
        """The leaves as filters see them: Variables, and raw arrays by value."""
        return list(map(held, self.leaves))

    def pick(self, literals: tuple[Any, ...]) -> tuple[Selection, list[Leaves]]:
        """The selection, and for each filter the live leaves that it takes."""
        try:
            return self._picked[literals]
        except (KeyError, TypeError):
            pass
        found = self.select(literals)
        leaves = [Leaves(self.leaves[i] for i in part[1]) for part in found.parts]
        # Only kinds and `...` are sure to be decided by structure and to be few.
        if all(x is Ellipsis or _is_kind(x) for x in literals):
            self._picked[literals] = (found, leaves)
        return found, leaves


def _is_kind(x: Any) -> bool:
    return isinstance(x, type) and (
        issubclass(x, Variable) or handler_of_kind(x) is not None
    )


def _attributes(obj: Node, root: Any) -> list[Any]:
    attributes = get_dict(obj)
    values = [None if v is root else v for v in attributes.values()]
    return [*attributes, *values, obj._roles]


class Open:
    """Dicts that anyone may write to without a note, and what they held.

    They are plain dicts and the attributes of other libraries' objects. All are
    compared at once, by identity, and never by ``==``, which arrays answer by value.
    Arrays and the root are not held on to.
    """

    __slots__ = (
        "_dicts",
        "_keys",
        "_lengths",
        "_metadata",
        "_seen",
        "_theirs",
        "_words",
    )

    def __init__(self, root: Any, dicts: list[dict[Any, Any]], leaves: Leaves):
        self._dicts, self._lengths = dicts, list(map(len, dicts))
        self._seen = [
            _ROOT if x is root else _ARRAY if type(x) in leaf_types else x
            for x in self._values()
        ]
        self._keys = self._every_key()
        self._words = set(map(type, self._keys)) <= {str}
        theirs: dict[VariableHandler, list[Any]] = {}
        for leaf in leaves:
            if type(leaf) is Foreign:
                theirs.setdefault(leaf.handler, []).append(leaf.held)
        self._theirs = list(theirs.items())
        self._metadata = [list(map(dict, h.entries(v))) for h, v in self._theirs]

    def _values(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(dict.values, self._dicts))

    def _every_key(self) -> list[Any]:
        return list(itertools.chain.from_iterable(self._dicts))

    def _same_keys(self) -> bool:
        now = self._every_key()
        # Equal words are one key, and are compared fastest; but 1 == 1.0 == True.
        return now == self._keys if self._words else all(map(_is, now, self._keys))

    def is_any(self) -> bool:
        """Whether there is anything to compare."""
        return bool(self._dicts or self._theirs)

    def same(self, root: Any) -> bool:
        """Whether they still hold the same, raw arrays in the same places apart."""
        if self._dicts:
            if list(map(len, self._dicts)) != self._lengths:
                return False
            if not self._same_keys():
                return False
            if not all(map(_is, self._values(), self._seen)) and not all(
                x is old
                or (old is _ROOT and x is root)
                or (old is _ARRAY and type(x) in leaf_types)
                for x, old in zip(self._values(), self._seen, strict=True)
            ):
                return False
        return not self._theirs or self._metadata == [
            h.entries(v) for h, v in self._theirs
        ]


_ROOT, _ARRAY = object(), object()
_is = operator.is_


class Content:
    """What a container held when it was planned."""

    __slots__ = ("by_identity", "handler", "obj", "old")

    def __init__(self, obj: Any, handler: Handler):
        self.obj, self.handler = obj, handler
        self.old = list(handler.contents(obj))
        # Lists of such objects may be compared by list's own `==`, several times
        # faster. Variables and arrays in them would compare by value.
        self.by_identity = isinstance(obj, list) and all(
            type(x).__eq__ is object.__eq__ for x in self.old
        )

    def same(self) -> bool:
        """Whether it still holds the same, raw arrays in the same places apart."""
        if self.by_identity:
            try:
                if self.obj == self.old:
                    return True
            except Exception:  # noqa: BLE001 - an array or Variable came in
                return False
        new = self.handler.contents(self.obj)
        if len(new) != len(self.old) or not all(map(operator.is_, new, self.old)):
            if not _same(new, self.old):
                return False
            self.old = list(new)
        return True


def _all_same(contents: list[Content]) -> bool:
    return all(content.same() for content in contents)


def _same(new: Sequence[Any], old: Sequence[Any]) -> bool:
    return len(new) == len(old) and all(
        a is b or (type(a) in leaf_types and type(b) in leaf_types)
        for a, b in zip(new, old, strict=True)
    )


_sides: dict[int, tuple[Any, tuple[Plan, ...]]] = {}
"""Plans of other libraries' objects, by id, with a weak reference that clears them."""


def _kept_plans(root: Any) -> tuple[Plan, ...]:
    if isinstance(root, Node):
        return root._plans
    found = _sides.get(id(root))
    return found[1] if found is not None and found[0]() is root else ()


def _keep(root: Any, plans: tuple[Plan, ...]) -> None:
    if isinstance(root, Node):
        _nodes.set_plans(root, plans)
        return
    at = id(root)
    _sides[at] = (weakref.ref(root, lambda _: _sides.pop(at, None)), plans)


def plan_of(root: Any) -> Plan:
    """The plan of an object, kept from earlier calls while it is valid.

    Args:
      root: a Node, or another library's object that is a root of its own.

    Returns:
      A valid Plan.

    Raises:
      StructureError: a static value cannot be hashed.
    """
    plans = _kept_plans(root)
    for plan in plans:
        if plan.valid(root):
            if plan is not plans[0]:
                _keep(root, (plan, *(p for p in plans if p is not plan)))
            return plan
    plan = Plan(root, Walk(root))
    present = set(map(identity, plan.leaves))
    # An older plan may come back (train and eval); one that alone holds a removed
    # Variable may not, or its memory would never be freed.
    kept = [
        p
        for p in plans
        if all(type(x) is Slot or identity(x) in present for x in p.leaves)
    ]
    _keep(root, (plan, *kept[: _KEPT - 1]))
    return plan


class Bound:
    """The plan of any root for one call: a node's kept plan, or a walk made now."""

    __slots__ = ("graphdef", "leaves", "part", "pick", "values", "view")

    nodes = ()
    uid = None

    def __init__(self, root: Any):
        walk = Walk(root)
        self.graphdef = walk.graphdef
        self.leaves = leaves = Leaves(walk.leaves)

        def view() -> list[Any]:
            return list(map(held, leaves))

        def pick(literals: tuple[Any, ...]) -> tuple[Selection, list[Leaves]]:
            found = select(walk.graphdef.schema, literals, view)
            return found, [Leaves(leaves[i] for i in part[1]) for part in found.parts]

        self.view, self.pick, self.values = view, pick, leaves.values
        self.part = lambda pick: Leaves(pick(leaves))


def has_plan(root: Any) -> bool:
    """Whether plans of ``root`` are kept: it is an object, and no mere container."""
    return isinstance(root, Node) or (
        type(handler_of(root)) is not str and handler_of(root).root
    )


def bind(root: Any) -> Any:
    """The plan for any root object: kept for nodes, made anew for containers.

    Args:
      root: a Node, a container of nodes and Variables, a Variable, or an array.

    Returns:
      A Plan, or an object with the same ``graphdef``, ``leaves``, ``values``, ``part``,
      ``view`` and ``pick``.
    """
    return plan_of(root) if has_plan(root) else Bound(root)
