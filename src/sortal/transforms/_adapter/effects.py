"""What a call did: values written, what became of the structure, what is returned."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu

from sortal._engine.graphdef import Entry, GraphDef
from sortal._engine.leaves import held, picker
from sortal._engine.nodes import LEAF, NODE, STATIC, handler_of
from sortal._engine.state import State
from sortal._engine.variable import is_variable, value_of
from sortal._engine.walk import Walk


class Ref:
    """Stands in an output for the object numbered ``k`` among the output's objects."""

    __slots__ = ("k",)

    def __init__(self, k: int):
        self.k = k


jtu.register_pytree_node(Ref, lambda r: ((), r.k), lambda k, _: Ref(k))


def resolve(tree: Any, objects: Sequence[Any]) -> Any:
    """``tree`` with each Ref in it replaced by the object that it stands for."""
    if type(tree) is Ref:
        return objects[tree.k]
    return jax.tree.map(
        lambda x: objects[x.k] if type(x) is Ref else x,
        tree,
        is_leaf=lambda x: isinstance(x, (Ref, State)),
    )


class Edit(NamedTuple):
    """What became of one node or leaf.

    ``origin`` is the number it had on entry, None for a new one; ``changed`` whether
    the content of a node, or the metadata of a leaf that was there, must be set anew.
    """

    origin: int | None
    changed: bool


class Edits(NamedTuple):
    """A structure that came into being inside a trace, in terms of the one before.

    ``nodes`` and ``leaves`` are those of ``graphdef``, in its order. ``roots`` is what
    the GraphDef on entry has become, for comparison with it.
    """

    graphdef: GraphDef
    roots: GraphDef | None
    nodes: tuple[Edit, ...]
    leaves: tuple[Edit, ...]


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class Effects:
    """What a call did, apart from values: which leaves it wrote, edits, outputs.

    Two are equal that say the same, for JAX compares those of a function and its rules.
    """

    written: tuple[int, ...]
    outputs: tuple[Entry, ...]
    edits: Edits | None
    # Whether the trace closed over arrays; None until somebody has looked.
    closes_over: bool | None = dataclasses.field(default=None, compare=False)
    _routes: Any = dataclasses.field(default=None, compare=False)

    def routes(
        self, leaf_at: Sequence[tuple[int, int]]
    ) -> list[tuple[int, Callable[[Any], Any]]]:
        """Written leaves as (root, what picks its leaves), given where each is."""
        if self._routes is None:
            places = [leaf_at[k] for k in self.written]
            runs = itertools.groupby(places, key=operator.itemgetter(0))
            self._routes = [(i, picker([j for _, j in run])) for i, run in runs]
        return self._routes


class Result:
    """What leaves a trace: the output, written values, and values of new leaves."""

    __slots__ = ("effects", "fresh", "out", "values")

    def __init__(self, effects: Effects, parts: tuple[Any, Any, Any]):
        self.effects = effects
        self.out, self.values, self.fresh = parts


# The class itself builds one from what JAX hands back: a call less at each call.
jtu.register_pytree_node(
    Result, lambda r: ((r.out, r.values, r.fresh), r.effects), Result
)


def is_unedited(walk: Walk, copies: Any) -> bool:
    """Whether the copies still have the structure, and the very objects, of entry."""
    if walk.graphdef is not copies.graphdef:
        return False
    now = [*walk.nodes, *map(held, walk.leaves)]
    before = [*copies.nodes, *copies.leaves]
    return all(a is b for a, b in zip(now, before, strict=True) if has_identity(a))


def has_identity(x: Any) -> bool:
    """Whether a node or leaf is one object, wherever it is met."""
    return is_variable(x) or getattr(handler_of(x), "tracked", False)


def same_value(old: Any, new: Any) -> bool:
    """Whether a value, or every leaf of it, is the same object as before."""
    if old is new:
        return True
    if isinstance(old, jax.Array) or isinstance(new, jax.Array):
        return False
    olds, before = jax.tree.flatten(old)
    news, after = jax.tree.flatten(new)
    if before != after or jtu.treedef_is_leaf(before):
        return False
    return all(a is b for a, b in zip(olds, news, strict=True))


def rigid_leaves(graphdef: GraphDef) -> frozenset[int]:
    """Raw arrays in tuples and other values, which change only with their holder."""
    return graphdef.memo(
        "rigid",
        lambda: frozenset(
            e.ref
            for record in graphdef.records
            if not record.handler.tracked
            for e in record.entries
            if e.what == LEAF and graphdef.schema.kinds[e.ref] is None
        ),
    )


def edits_of(
    copies: Any,
    outputs: list[Any],
    unedited: bool,
    lost: Collection[int],
    entered: Walk,
) -> tuple[Edits, list[Any], tuple[Entry, ...]]:
    """What became of the structure, the values of new leaves, and the outputs.

    ``lost`` are the raw arrays whose value on entry is in no live object any more when
    edits are carried out, so that it must leave the trace as a new one. ``entered`` is
    a walk of what came in, made after the call. The third part of the structure is what
    no longer hangs in the roots: whoever holds it outside must see what was done to it
    before it was taken out.
    """
    roots, returned = copies.roots, tuple(outputs)
    walk = Walk((roots, returned))
    left = () if unedited else _left(walk, copies)
    if any(left):
        walk = Walk((roots, returned, left))
    before, after = copies.graphdef, walk.graphdef
    currently = list(map(held, walk.leaves))
    node_from = list(map(copies.number, walk.nodes))
    leaf_from = [None if k in lost else k for k in map(copies.number, currently)]
    if unedited:  # raw arrays with new values are where they were
        leaf_from[: len(copies.leaves)] = range(len(copies.leaves))
    numbers = range(len(before.records)), range(len(before.schema))

    def differs(n: int, origin: int) -> bool:
        old = _content(before, origin, *numbers)
        return old != _content(after, n, node_from, leaf_from)

    nodes = tuple(
        Edit(origin, origin is None or (not unedited and differs(n, origin)))
        for n, origin in enumerate(node_from)
    )
    leaves = tuple(
        Edit(k, k is not None and before.schema.metadata[k] is not metadata)
        for k, metadata in zip(leaf_from, after.schema.metadata, strict=True)
    )
    fresh = [
        value_of(x) for x, k in zip(currently, leaf_from, strict=True) if k is None
    ]
    at = after.records[0].entries[1].ref
    entries = after.records[at].entries if isinstance(at, int) else ()
    became = entered.graphdef if roots else None
    return Edits(after, became, nodes, leaves), fresh, entries


def _left(walk: Walk, copies: Any) -> tuple[tuple[Any, ...], ...]:
    """For each root what came in with it, and hangs nowhere in a walk any more."""
    reached = {*map(id, walk.nodes), *(id(held(x)) for x in walk.leaves)}
    left: list[list[Any]] = [[] for _ in copies.roots]
    for path, (_, what, ref), first in copies.graphdef.places():
        if what is STATIC or first != path:
            continue
        x = (copies.nodes if what is NODE else copies.leaves)[ref]
        if has_identity(x) and id(x) not in reached:
            left[path[0] if len(left) > 1 else 0].append(x)
    return tuple(map(tuple, left))


def _content(
    graphdef: GraphDef, n: int, nodes: Sequence[Any], leaves: Sequence[Any]
) -> tuple[Any, ...]:
    """A node's record by the given numbers of its children; values in it in full."""

    def number(entry: Entry) -> Any:
        _, what, ref = entry
        if what == STATIC:
            return ref
        if what == LEAF:
            return leaves[ref]
        tracked = graphdef.records[ref].handler.tracked
        return nodes[ref] if tracked else _content(graphdef, ref, nodes, leaves)

    *about, entries = graphdef.records[n]
    return *about, [(e.key, e.what, number(e)) for e in entries]
