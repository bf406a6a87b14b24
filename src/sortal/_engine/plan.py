"""Plan: a walk kept on its root, with what is needed to see that it still holds.

The rule: a plan is valid while every node has the class and roles, and in their order
identically the keys and children, it was made from, raw arrays exchanged for raw arrays
apart, and every Variable its class and metadata.
"""

from __future__ import annotations

import functools
import gc
import itertools
import operator
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sortal._engine.bounded import Bounded
from sortal._engine.graphdef import GraphDef
from sortal._engine.jax_compat import current_trace
from sortal._engine.leaves import Foreign, Leaves, Slot, held
from sortal._engine.nodes import (
    LEAF,
    STATIC,
    Node,
    get_dict,
    handler_of,
    is_object,
    leaf_types,
    set_plans,
)
from sortal._engine.schema import Schema, Selection, select
from sortal._engine.statics import edits
from sortal._engine.variable import Variable, is_variable, metadata_of
from sortal._engine.walk import Walk
from sortal.errors import ArgumentError
from sortal.filters import to_filter

Part = tuple[Schema, Leaves]

_KEPT = 4
_uids = itertools.count()
_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), type})


_ROOT, _ARRAY = object(), object()
"""Stand in a Record for what a plan must not keep alive, or may find exchanged."""


def _marked(x: Any, root: Any) -> Any:
    return _ROOT if x is root else _ARRAY if type(x) in leaf_types else x


class Record:
    """What the nodes of one handler held when they were planned; root not kept.

    The Variables of another library, which note no edit, are compared likewise.
    """

    __slots__ = ("_equal", "_has_root", "_marks", "_nodes", "_types", "handler", "held")

    def __init__(self, handler: Any, nodes: list[Any], root: Any):
        self.handler = handler
        self._has_root = nodes[0] is root
        self._nodes = nodes[1:] if self._has_root else nodes
        self._types = list(map(type, nodes))
        equal, now = handler.contents(nodes)
        self._equal = [dict(x) if type(x) is dict else x for x in equal]
        self.held = [_marked(x, root) for x in now]
        self._marks = [i for i, x in enumerate(self.held) if x is _ROOT or x is _ARRAY]

    def nodes(self, root: Any) -> list[Any]:
        """The nodes, of which the root may be one."""
        return [root, *self._nodes] if self._has_root else self._nodes

    def same(self, root: Any) -> bool:
        """Whether the nodes still have the same class, keys, roles and children."""
        nodes = self.nodes(root)
        if list(map(type, nodes)) != self._types:
            return False
        equal, now = self.handler.contents(nodes)
        if equal != self._equal:
            return False
        if self._marks:
            now = list(now)
            for i in self._marks:
                now[i] = _marked(now[i], root)
        return all(map(operator.is_, now, self.held))


class Plan:
    """A GraphDef bound to the live objects of one root, kept there or for one call.

    It never refers to the root itself, so that a root that is dropped is freed at
    once, arrays and all, and not only when cycles are collected. Only a kept plan has
    a ``uid``, and can say whether it is valid.
    """

    def __init__(self, graphdef: GraphDef, nodes: Sequence[Any], leaves: Iterable[Any]):
        self.uid: int | None = None
        self.graphdef = graphdef
        self.leaves = Leaves(leaves)
        self.nodes: list[Any] = [None, *nodes[1:]]
        # What calls with several roots, this one first, know of their sharing. Kept
        # here, so that it goes with the root: statics in it may lead to the root.
        self.alias_maps: Bounded[Any] = Bounded(16)
        self._parts: Bounded[Leaves] = Bounded(64)
        self._picked: dict[Any, Any] = {}

    def watch(self, root: Any) -> None:
        """Records what must stay the same for this plan to be valid."""
        self.uid = next(_uids)
        self._checked = edits.last
        self._variables = [x for x in self.leaves if isinstance(x, Variable)]
        self._metadata = [x._metadata for x in self._variables]
        by_handler: dict[Any, list[Any]] = {}
        nodes = [(handler_of(x), x) for x in self.nodes_of(root)]
        theirs = [(x.handler, x.held) for x in self.leaves if type(x) is Foreign]
        for handler, x in nodes + theirs:
            if not handler.fixed:
                by_handler.setdefault(handler, []).append(x)
        records = [Record(h, nodes, root) for h, nodes in by_handler.items()]
        self._noting = [r for r in records if r.handler.notes_edits]
        self._silent = [r for r in records if not r.handler.notes_edits]
        self._versions = self._versions_now(root)
        objects = (x for x in self.nodes_of(root) if isinstance(x, Node))
        self._dicts = list(map(get_dict, objects))
        self._lengths = list(map(len, self._dicts))

    def _versions_now(self, root: Any) -> list[int]:
        counting = [r.nodes(root) for r in self._noting if r.handler.counts_edits]
        return [x._version for nodes in counting for x in nodes]

    def valid(self, root: Any) -> bool:
        """Whether the live objects still have the structure planned.

        Where no edit was noted anywhere since the last check, only what can change
        without a note is compared: plain containers, objects of other libraries, and
        the number of attributes.
        """
        if [*map(len, self._dicts)] != self._lengths:
            return False
        now = edits.last  # read first: an edit in the meantime must show next time
        if self._checked is not now:
            if not self._unedited(root):
                return False
            self._checked = now
        for record in self._silent:  # noqa: SIM110 - a third faster than all()
            if not record.same(root):
                return False
        return True

    def same(self, root: Any) -> bool:
        """As ``valid``, without trust in notes: everything is compared."""
        records = (*self._noting, *self._silent)
        metadata = [x._metadata for x in self._variables]
        return metadata == self._metadata and all(r.same(root) for r in records)

    def _unedited(self, root: Any) -> bool:
        if [x._metadata for x in self._variables] != self._metadata:
            return False
        versions = self._versions_now(root)
        for record in self._noting:
            # A counter that moved may have done so only there and back: train and eval.
            counted = record.handler.counts_edits and versions == self._versions
            if not counted and not record.same(root):
                return False
        self._versions = versions
        return True

    def nodes_of(self, root: Any) -> list[Any]:
        """All live nodes in order, for the root that the plan is of."""
        return [root, *self.nodes[1:]]

    def _held(self) -> Iterator[Any]:
        leaves = (held(x) for x in self.leaves if type(x) is not Slot)
        records = (r.held for r in (*self._noting, *self._silent))
        return itertools.chain(self.nodes, leaves, *records)

    @functools.cached_property
    def holds(self) -> set[int]:
        """The ids of all that it keeps alive, numbers, strings and classes apart."""
        return {id(x) for x in self._held() if type(x) not in _ATOMS}

    def before(self, plans: Sequence[Plan]) -> tuple[Plan, ...]:
        """This plan and the older ones that may be kept beside it.

        They may come back (train and eval). One that alone holds something may not, or
        that would be kept alive after it has left the model.
        """
        kept = [p for p in plans if p is not self and p.holds <= self.holds]
        return (self, *kept[: _KEPT - 1])

    def leads_to(self, root: Any) -> bool:
        """Whether anything that this plan keeps alive keeps its root alive.

        Such a plan must not be kept in a table: the root would never be freed. Arrays,
        classes, modules and the globals of functions lead to no model.
        """
        seen: set[int] = set()
        stack: list[Any] = [*self._held(), self.graphdef, self.alias_maps]
        while stack:
            x = stack.pop()
            if x is root:
                return True
            if id(x) in seen or type(x) in leaf_types or not gc.is_tracked(x):
                continue
            if isinstance(x, (type, types.ModuleType)):
                continue
            seen.add(id(x))
            if isinstance(x, GraphDef):
                # By the memos a filter that was used may lead there.
                stack += [*x.memo("held", lambda x=x: _held_by(x)), x.schema, x._memo]
            elif isinstance(x, types.FunctionType):
                stack += [x.__closure__, x.__defaults__, x.__kwdefaults__, x.__dict__]
            else:
                stack += gc.get_referents(x)
        return False

    def values(self) -> list[Any]:
        """The values of all leaves, in order."""
        return self.leaves.values()

    def part(self, pick: Callable[[Any], Any]) -> Leaves:
        """Some of the leaves, as ``pick`` takes them from a sequence; kept."""
        found = self._parts.get(pick)
        if found is None:
            found = Leaves(pick(self.leaves))
            self._parts.put(pick, found)
        return found

    def view(self) -> list[Any]:
        """The leaves as filters see them: Variables, and raw arrays by value."""
        return self.leaves.objects()

    def pick(self, literals: tuple[Any, ...]) -> tuple[Selection, list[Part]]:
        """The selection, and for each filter schema and live leaves that it takes."""
        try:
            return self._picked[literals]
        except (KeyError, TypeError):
            pass
        found = select(self.graphdef.schema, literals, self.view)
        parts = [(s, Leaves(self.leaves[i] for i in at)) for s, at in found.parts]
        # Only kinds and `...` are sure to be decided by structure and to be few.
        few = all(x is Ellipsis or isinstance(x, type) for x in literals)
        if few and all(to_filter(x).structural for x in literals):
            self._picked[literals] = (found, parts)
        return found, parts


def _held_by(graphdef: GraphDef) -> list[Any]:
    """What its records lead to: keys and statics."""
    records = graphdef.records
    entries = [graphdef.root, *(e for r in records for e in r.entries)]
    found = [r.spec.value for r in records] + [e.key for e in entries]
    found += [e.ref.value for e in entries if e.what is STATIC]
    return [x for x in found if gc.is_tracked(x)]


_sides: dict[int, tuple[Any, tuple[Plan, ...]]] = {}
"""Plans of other libraries' objects, by id, with a weak reference that clears them.

An edit made later may lead from what a plan keeps alive back to its root, which would
then never be freed. So each full garbage collection asks that again.
"""


def _forget_rooted(phase: str, info: dict[str, int]) -> None:
    if phase == "start" and info["generation"] == 2:
        for at, (reference, plans) in list(_sides.items()):
            root = reference()
            if root is None or any(plan.leads_to(root) for plan in plans):
                _sides.pop(at, None)


gc.callbacks.append(_forget_rooted)


def _kept_plans(root: Any) -> tuple[Plan, ...]:
    found = _sides.get(id(root))
    return found[1] if found is not None and found[0]() is root else ()


def _keep(root: Any, plans: tuple[Plan, ...]) -> None:
    if isinstance(root, Node):
        set_plans(root, plans)
        return
    at, pop = id(root), _sides.pop  # the table's name may be gone at exit
    _sides[at] = (weakref.ref(root, lambda _: pop(at, None)), plans)


def bind(root: Any) -> Plan:
    """The plan of any root: that of an object is kept, and used while it is valid.

    Args:
      root: an object, a container of objects and Variables, a Variable, or an array.

    Returns:
      A valid Plan.

    Raises:
      ArgumentError: the root is a class or a function.
      StructureError: a static value cannot be hashed.
    """
    ours = isinstance(root, Node)
    if not ours and not is_object(root):
        return _planned(root)
    plans = root._plans if ours else _kept_plans(root)
    for plan in plans:
        if plan.valid(root):
            if plan is not plans[0]:
                _keep(root, plan.before(plans))
            return plan
    plan = _planned(root)
    plan.watch(root)
    if ours or not plan.leads_to(root):
        _keep(root, plan.before(plans))
    else:
        _sides.pop(id(root), None)
    return plan


def build(graphdef: GraphDef, values: Sequence[Any], metadata: Any = None) -> Any:
    """Builds live objects around new Variables, with a plan where a walk can be saved.

    Args:
      graphdef: the structure.
      values: a bare value for each leaf, in order.
      metadata: interned metadata for each leaf; the structure's own if absent.

    Returns:
      The root.
    """
    leaves = graphdef.build_leaves(values, metadata)
    as_described = not metadata or tuple(metadata) == graphdef.schema.metadata
    return _built(graphdef, leaves, as_described)


def build_around(graphdef: GraphDef, leaves: Sequence[Any]) -> Any:
    """Builds live objects around what a map over a pytree has made of their leaves.

    Args:
      graphdef: the structure.
      leaves: Variables and raw arrays in order, or anything in their places.

    Returns:
      The root.
    """
    schema = graphdef.schema
    variables = [x for x in leaves if is_variable(x)]
    as_described = (
        tuple(type(x) if is_variable(x) else None for x in leaves) == schema.kinds
        and len(set(map(id, variables))) == len(variables)
        and tuple(map(metadata_of, variables))
        == tuple(itertools.compress(schema.metadata, schema.kinds))
    )
    return _built(graphdef, leaves, as_described)


def _built(graphdef: GraphDef, leaves: Sequence[Any], as_described: bool) -> Any:
    root, nodes = graphdef.build(leaves)
    if as_described and isinstance(root, Node):
        plan = plan_of_built(graphdef, root, nodes, leaves)
        if plan is not None:
            _keep(root, (plan,))
    return root


def plan_of_built(
    graphdef: GraphDef, root: Any, nodes: Sequence[Any], leaves: Sequence[Any]
) -> Plan | None:
    """The plan of what ``graphdef.build`` returned; None where only a walk can tell."""
    slots = graphdef.memo("slots", lambda: _slots(graphdef))
    if slots is None or any(handler_of(leaves[i]) is not LEAF for i, _, _ in slots):
        return None
    live, now = list(leaves), current_trace()
    for i, key, n in slots:
        live[i] = Slot(nodes[n], graphdef.records[n].handler, key, now)
    plan = Plan(graphdef, nodes, live)
    plan.watch(root)
    return plan


def _slots(graphdef: GraphDef) -> list[tuple[int, Any, int]] | None:
    """Raw arrays with key and node, where objects are surely built as they were walked.

    That holds for our own objects and Python's own containers. What another type does
    when it is filled or built only a walk can tell.
    """
    records, kinds = graphdef.records, graphdef.schema.kinds
    others = {record.cls for record in records if not record.handler.exact}
    if not records or graphdef.schema.has_foreign or others - _BUILT_AS_WALKED:
        return None
    return [
        (ref, key, n)
        for n, record in enumerate(records)
        for key, what, ref in record.entries
        if what is LEAF and kinds[ref] is None
    ]


_BUILT_AS_WALKED = {list, dict, tuple, types.MethodType}


def _planned(root: Any) -> Plan:
    if isinstance(root, (type, types.FunctionType)):
        what = "class" if isinstance(root, type) else "function"
        raise ArgumentError(
            f"a model is an object; found the {what} {root.__name__}. Write "
            f"{root.__name__}(...)."
        )
    walk = Walk(root)
    return Plan(walk.graphdef, walk.nodes, walk.leaves)
