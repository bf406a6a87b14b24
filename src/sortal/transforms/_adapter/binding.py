"""The one adapter that carries live objects into and out of JAX tracing.

``BoundArguments`` replaces every Module and Variable among the arguments by a
FlatModule of bare values; ``tracing.run`` builds fresh copies around those values
inside the trace, calls the function, and describes what it changed; ``write_back``
brings that to the live objects.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sortal._engine.graphdef import Entry, GraphDef
from sortal._engine.leaves import held, identity, store_all
from sortal._engine.nodes import NODE, handler_of
from sortal._engine.plan import Plan, bind
from sortal._engine.variable import check_writable, make
from sortal._engine.walk import Walk
from sortal.transforms._adapter.effects import Edits, Result, resolve
from sortal.transforms._adapter.tracing import (
    PASS,
    ROOT,
    FlatModule,
    FlatModuleDef,
    flat_module_def,
    mode_of,
    modes,
    replace_roots,
)


class AliasMap(NamedTuple):
    """How several roots share Variables and nodes; numbers only, no live objects.

    Each leaf of the joint GraphDef belongs to the first root that reaches it.
    ``leaf_at`` and ``node_at`` say which leaf or node of which root's own plan it is;
    ``picks`` say which leaves each root sends, None for all of them.
    """

    graphdef: GraphDef
    definitions: tuple[FlatModuleDef, ...]
    picks: tuple[Any, ...]
    leaf_at: tuple[tuple[int, int], ...]
    node_at: dict[int, tuple[int, int]]


_UNKNOWN: Any = None


def _alias_map(roots: Sequence[Any], plans: Sequence[Any]) -> AliasMap:
    if len(plans) == 1:
        return plans[0].graphdef.memo("alias_map", lambda: _single(plans[0].graphdef))
    kept, key = plans[0].alias_maps, tuple([plan.uid for plan in plans])
    found = kept.get(key)
    if found is None:
        found = _several(roots, plans)
        if None not in key:  # all are kept, and so can be known again
            kept.put(key, found)
    return found


def _single(graphdef: GraphDef) -> AliasMap:
    leaves = tuple((0, i) for i in range(len(graphdef.schema)))
    nodes = {i: (0, i) for i in range(len(graphdef.records))}
    mine = flat_module_def(graphdef, 0, 1)
    return AliasMap(graphdef, (mine,), (None,), leaves, nodes)


def _several(roots: Sequence[Any], plans: Sequence[Any]) -> AliasMap:
    walk = Walk(tuple(roots))
    where: dict[Any, tuple[int, int]] = {}
    for i, (root, plan) in enumerate(zip(roots, plans, strict=True)):
        for j, leaf in enumerate(plan.leaves):
            where.setdefault(identity(leaf), (i, j))
        for k, node in enumerate(plan.nodes_of(root)):
            where.setdefault(id(node), (i, k))
    leaf_at = tuple(where[identity(leaf)] for leaf in walk.leaves)
    picks: list[Any] = []
    for i, plan in enumerate(plans):
        mine = tuple(j for owner, j in leaf_at if owner == i)
        picks.append(None if len(mine) == len(plan.leaves) else mine)
    known = enumerate(where.get(id(node)) for node in walk.nodes)
    node_at = {n: place for n, place in known if place is not None}
    numbers, of = range(len(roots)), len(roots)
    definitions = tuple(flat_module_def(walk.graphdef, i, of) for i in numbers)
    return AliasMap(walk.graphdef, definitions, tuple(picks), leaf_at, node_at)


class BoundArguments:
    """Arguments on their way into a trace, and the live objects they came from."""

    __slots__ = ("alias_map", "args", "flat_modules", "kwargs", "plans", "roots")

    def __init__(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        skip: Collection[Any] = (),
    ):
        self.roots: list[Any] = []
        self.plans: list[Plan] = []
        self.flat_modules: list[FlatModule] = []
        given, carry = list(args), self._carry
        for i, x in enumerate(args):
            mode = modes.get(type(x)) or mode_of(x)
            if mode is not PASS and i not in skip:
                given[i] = carry(x) if mode is ROOT else replace_roots(x, carry)
        self.args = tuple(given)
        self.kwargs = kwargs and {
            k: x if k in skip else replace_roots(x, carry) for k, x in kwargs.items()
        }
        if self.plans:
            self.alias_map = found = _alias_map(self.roots, self.plans)
            # What each root is among all, without what others bring.
            definitions, picks = found.definitions, found.picks
            for k, flat_module in enumerate(self.flat_modules):
                flat_module.definition, pick = definitions[k], picks[k]
                if pick is not None:
                    flat_module.values = [flat_module.values[j] for j in pick]

    def _carry(self, root: Any) -> FlatModule:
        plan = bind(root)
        flat_module = FlatModule(plan.leaves.values(), _UNKNOWN)
        self.roots.append(root)
        self.plans.append(plan)
        self.flat_modules.append(flat_module)
        return flat_module

    def live_leaf(self, k: int) -> Any:
        """The live leaf that number ``k`` of the joint GraphDef stands for."""
        i, j = self.alias_map.leaf_at[k]
        return self.plans[i].leaves[j]

    def live_node(self, n: int) -> Any:
        """The live node that number ``n`` of the joint GraphDef stands for."""
        i, k = self.alias_map.node_at[n]
        return self.roots[i] if k == 0 else self.plans[i].nodes[k]


def write_back(bound: BoundArguments, result: Result) -> Any:
    """Brings what a call did back to the live objects.

    Args:
      bound: the arguments of the call.
      result: what ``run`` returned, with concrete values.

    Returns:
      The function's output, in which objects that were passed in are those very
      objects.

    Raises:
      TraceError: a live Variable to be written belongs to another trace; nothing is
        written.
    """
    effects = result.effects
    if effects.edits is not None:
        check_writable(_edited(bound, effects.edits))
    if effects.written:
        routes = effects.routes(bound.alias_map.leaf_at)
        parts = [bound.plans[i].part(pick) for i, pick in routes]
        store_all(parts, result.values)
    if effects.edits is not None:
        objects = _carry_out(bound, effects.edits, effects.outputs, result.fresh)
    elif effects.outputs:
        objects = [
            bound.live_node(e.ref) if e.what == NODE else held(bound.live_leaf(e.ref))
            for e in effects.outputs
        ]
    else:
        return result.out
    return resolve(result.out, objects)


def _edited(bound: BoundArguments, edits: Edits) -> list[Any]:
    """What edits will write to: objects, those that hold containers, Variables."""
    found = []
    for n, changed in edits.nodes:
        if changed and n is not None:
            node, root = bound.live_node(n), bound.roots[bound.alias_map.node_at[n][0]]
            found.append(handler_of(node).owner(node) or handler_of(root).owner(root))
    for k, changed in edits.leaves:
        if changed and k is not None:
            found.append(bound.live_leaf(k))
    return [x for x in found if x is not None]


def _carry_out(
    bound: BoundArguments, edits: Edits, outputs: Sequence[Entry], fresh: Sequence[Any]
) -> list[Any]:
    graphdef, schema = edits.graphdef, edits.graphdef.schema
    new = iter(fresh)
    leaves: list[Any] = []
    for i, (k, changed) in enumerate(edits.leaves):
        kind = schema.kinds[i]
        if k is None:
            value = next(new)
            leaf = value if kind is None else make(kind, value, schema.metadata[i])
        else:
            live = bound.live_leaf(k)
            if changed:
                live.set_metadata(dict(schema.metadata[i]))
            leaf = held(live)
        leaves.append(leaf)
    nodes = graphdef.shells()
    for n, (origin, _) in enumerate(edits.nodes):
        if origin is not None:
            nodes[n] = live = bound.live_node(origin)
            if type(live) is not graphdef.records[n].cls:
                live.__class__ = graphdef.records[n].cls
    changed = [n for n, edit in enumerate(edits.nodes) if edit.changed]
    graphdef.fill(nodes, leaves, changed)
    return [(nodes if e.what == NODE else leaves)[e.ref] for e in outputs]
