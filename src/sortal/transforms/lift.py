"""The one adapter that carries live objects into and out of JAX tracing.

``enter`` replaces every Module and Variable among the arguments by a Carrier of bare
values; ``run`` builds fresh copies around those values inside the trace, calls the
function, and describes what it changed; ``leave`` brings that back to the live objects.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import deque
from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from sortal._jax import register_pytree
from sortal.graph import Slot, Walk, bind, plan_of, store
from sortal.graphdef import LEAF, NODE, STATIC, Entry, GraphDef, fill
from sortal.nodes import Node, handler_of
from sortal.paths import PathKey
from sortal.state import State
from sortal.variable import Variable, check_writable, make, write

PASS, ROOT, SCAN = "pass", "root", "scan"
_ATOMS = (jax.Array, int, float, complex, str, bytes, State, GraphDef, type(None))
_modes: dict[type, str] = {}


class Carrier:
    """A root on its way into a trace: its values, and a ticket that says which."""

    __slots__ = ("ticket", "values")

    values: Sequence[Any]
    ticket: tuple[GraphDef, int]

    @property
    def paths(self) -> list[PathKey]:
        """Key paths of the values, for JAX's own messages."""
        return [PathKey((i,)) for i in range(len(self.values))]


def carrier(values: Sequence[Any], ticket: tuple[GraphDef, int]) -> Carrier:
    """Makes a Carrier."""
    made = Carrier()
    made.values, made.ticket = values, ticket
    return made


register_pytree(
    Carrier,
    lambda c: (c.values, c.ticket),
    lambda c: (list(zip(c.paths, c.values, strict=True)), c.ticket),
    lambda ticket, values: carrier(values, ticket),
)


def _is_root(x: Any) -> bool:
    return isinstance(x, (Node, Variable, State))


def _mode(x: Any) -> str:
    cls = type(x)
    found = _modes.get(cls)
    if found is None:
        if isinstance(x, (Node, Variable)):
            found = ROOT
        elif isinstance(x, _ATOMS) or callable(x):
            found = PASS
        else:
            found = SCAN
        _modes[cls] = found
    return found


def replace_roots(tree: Any, replace: Callable[[Any], Any]) -> Any:
    """``tree`` with each Node and Variable in it replaced; itself if it has none.

    Args:
      tree: any pytree.
      replace: takes a root, returns what stands for it.

    Returns:
      The tree.
    """
    mode = _mode(tree)
    if mode is PASS:
        return tree
    if mode is ROOT:
        return replace(tree)
    leaves, treedef = jtu.tree_flatten(tree, is_leaf=_is_root)
    if not any(isinstance(x, (Node, Variable)) for x in leaves):
        return tree
    return treedef.unflatten(
        [replace(x) if isinstance(x, (Node, Variable)) else x for x in leaves]
    )


class Joint(NamedTuple):
    """How several roots share Variables and nodes; numbers only, no live objects.

    Each leaf of the joint GraphDef belongs to the first root that reaches it.
    ``leaf_at`` and ``node_at`` say which leaf or node of which root's own plan it is;
    ``picks`` say which leaves each root sends, None for all of them.
    """

    graphdef: GraphDef
    tickets: tuple[tuple[GraphDef, int], ...]
    picks: tuple[Any, ...]
    leaf_at: tuple[tuple[int, int], ...]
    node_at: dict[int, tuple[int, int]]


_joints: dict[tuple[int, ...], Joint] = {}


def _joint(roots: Sequence[Any], plans: Sequence[Any]) -> Joint:
    if len(plans) == 1:
        return plans[0].graphdef.memo("joint", lambda: _single(plans[0].graphdef))
    if not all(isinstance(root, Node) for root in roots):
        return _several(roots, plans)
    key = tuple(plan.uid for plan in plans)
    found = _joints.get(key)
    if found is None:
        if len(_joints) >= 256:
            _joints.pop(next(iter(_joints)))
        found = _joints[key] = _several(roots, plans)
    return found


def _single(graphdef: GraphDef) -> Joint:
    leaves = tuple((0, i) for i in range(len(graphdef.schema)))
    nodes = {i: (0, i) for i in range(len(graphdef.records))}
    return Joint(graphdef, ((graphdef, 0),), (None,), leaves, nodes)


def _several(roots: Sequence[Any], plans: Sequence[Any]) -> Joint:
    walk = Walk(tuple(roots))
    where: dict[Any, tuple[int, int]] = {}
    for i, (root, plan) in enumerate(zip(roots, plans, strict=True)):
        for j, leaf in enumerate(plan.leaves):
            where.setdefault(identity(leaf), (i, j))
        nodes = plan.nodes if isinstance(root, Node) else []
        for k, node in enumerate(nodes):
            where.setdefault(id(root if k == 0 else node), (i, k))
    leaf_at = tuple(where[identity(leaf)] for leaf in walk.leaves)
    picks: list[Any] = []
    for i, plan in enumerate(plans):
        mine = tuple(j for owner, j in leaf_at if owner == i)
        picks.append(None if len(mine) == len(plan.leaves) else mine)
    graphdef = walk.graphdef
    node_at = {
        n: where[id(node)] for n, node in enumerate(walk.nodes) if id(node) in where
    }
    tickets = tuple((graphdef, i) for i in range(len(roots)))
    return Joint(graphdef, tickets, tuple(picks), leaf_at, node_at)


def identity(leaf: Any) -> Any:
    """What is equal for one and the same live leaf, seen from two plans."""
    return leaf._id if isinstance(leaf, Slot) else id(leaf)


class Entered:
    """Arguments on their way into a trace, and the live objects they came from."""

    __slots__ = ("args", "carriers", "joint", "kwargs", "plans", "roots")

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __init__(
        self, args: Sequence[Any], kwargs: dict[str, Any], skip: Collection[Any] = ()
    ):
        self.roots: list[Any] = []
        self.carriers: list[Carrier] = []
        self.args = tuple(
            x if i in skip else replace_roots(x, self._carry)
            for i, x in enumerate(args)
        )
        self.kwargs = {
            k: x if k in skip else replace_roots(x, self._carry)
            for k, x in kwargs.items()
        }
        self.plans: list[Any] = []
        if not self.roots:
            return
        self.plans = [plan_of(r) if isinstance(r, Node) else bind(r) for r in self.roots]
        self.joint = joint = _joint(self.roots, self.plans)
        for made, plan, pick, ticket in zip(
            self.carriers, self.plans, joint.picks, joint.tickets, strict=True
        ):
            made.ticket = ticket
            values = plan.values()
            made.values = values if pick is None else [values[j] for j in pick]

    def _carry(self, root: Any) -> Carrier:
        made = Carrier()
        self.roots.append(root)
        self.carriers.append(made)
        return made

    def live_leaf(self, k: int) -> Any:
        """The live leaf that number ``k`` of the joint GraphDef stands for."""
        i, j = self.joint.leaf_at[k]
        return self.plans[i].leaves[j]

    def live_node(self, n: int) -> Any:
        """The live node that number ``n`` of the joint GraphDef stands for."""
        i, k = self.joint.node_at[n]
        return self.roots[i] if k == 0 else self.plans[i].nodes[k]


# -------------------------------------------------------------- inside the trace
class Ref:
    """Stands in an output for the object numbered ``k`` among the output's objects."""

    __slots__ = ("k",)

    def __init__(self, k: int):
        self.k = k


jtu.register_pytree_node(Ref, lambda r: ((), r.k), lambda k, _: Ref(k))


class Edits(NamedTuple):
    """A structure that came into being inside a trace, in terms of the one before.

    ``node_from`` and ``leaf_from`` give for each node and leaf the number it had on
    entry, or None for new ones; ``dirty`` the nodes that need their content set anew.
    """

    graphdef: GraphDef
    node_from: tuple[int | None, ...]
    leaf_from: tuple[int | None, ...]
    dirty: tuple[int, ...]
    metadata: tuple[tuple[int, Any], ...]


class Exit:
    """What a call did, apart from values: which leaves it wrote, edits, outputs."""

    __slots__ = ("_routes", "edits", "outputs", "written")

    def __init__(
        self, written: tuple[int, ...], outputs: tuple[Entry, ...], edits: Edits | None
    ):
        self.written, self.outputs, self.edits = written, outputs, edits
        self._routes: list[tuple[int, Callable[[Any], Any]]] | None = None

    def routes(self, joint: Joint) -> list[tuple[int, Callable[[Any], Any]]]:
        """For each root with written leaves, what picks them from its plan's leaves."""
        if self._routes is None:
            per_root: dict[int, list[int]] = {}
            order = [joint.leaf_at[k] for k in self.written]
            for i, j in order:
                per_root.setdefault(i, []).append(j)
            flat = [(i, j) for i, js in per_root.items() for j in js]
            if flat != order:
                self._routes = [(i, _getter([j])) for i, j in order]
            else:
                self._routes = [(i, _getter(js)) for i, js in per_root.items()]
        return self._routes


def _getter(js: list[int]) -> Callable[[Any], Any]:
    if len(js) == 1:
        return lambda leaves: (leaves[js[0]],)
    return itemgetter(*js)


class Result:
    """What leaves a trace: the output, written values, and values of new leaves."""

    __slots__ = ("exit", "fresh", "out", "values")

    def __init__(self, out: Any, values: Any, fresh: Any, exit: Exit):
        self.out, self.values, self.fresh, self.exit = out, values, fresh, exit


jtu.register_pytree_node(
    Result,
    lambda r: ((r.out, r.values, r.fresh), r.exit),
    lambda exit, parts: Result(*parts, exit),
)


class Copies:
    """The copies that live in one trace, with the values that they began with."""

    def __init__(self, carriers: list[Carrier]):
        carriers = sorted(carriers, key=lambda c: c.ticket[1])
        self.graphdef = carriers[0].ticket[0]
        self.values = [v for c in carriers for v in c.values]
        self.leaves = self.graphdef.build_leaves(self.values)
        root, self.nodes = self.graphdef.build(self.leaves)
        self.roots: tuple[Any, ...] = root if len(carriers) > 1 else (root,)
        starts = [0]
        for c in carriers:
            starts.append(starts[-1] + len(c.values))
        self.spans = {
            c.ticket[1]: range(a, b)
            for c, a, b in zip(carriers, starts, starts[1:], strict=False)
        }

    @property
    def root(self) -> Any:
        """What the GraphDef's root is: a tuple where there are several roots."""
        return self.roots if len(self.roots) > 1 else self.roots[0]


def find_carriers(tree: Any) -> list[Carrier]:
    """All Carriers in ``tree``."""
    leaves = jtu.tree_leaves(tree, is_leaf=lambda x: isinstance(x, (Carrier, State)))
    return [x for x in leaves if isinstance(x, Carrier)]


def run(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    keep: Collection[Any] = (),
) -> Result:
    """Calls ``fn`` on copies built from Carriers; for use inside a trace.

    Args:
      fn: the user's function.
      args: positional arguments, with Carriers in the place of roots.
      kwargs: keyword arguments, likewise.
      keep: positions and names of arguments whose leaves are returned even where they
        were only read, because their buffers were donated.

    Returns:
      The Result.
    """
    carriers = find_carriers((args, kwargs))
    if not carriers:
        return _leave_trace(fn(*args, **kwargs), None, ())
    copies = Copies(carriers)

    def unwrap(tree: Any) -> Any:
        if not find_carriers(tree):
            return tree
        return jax.tree.map(
            lambda x: copies.roots[x.ticket[1]] if isinstance(x, Carrier) else x,
            tree,
            is_leaf=lambda x: isinstance(x, (Carrier, State)),
        )

    kept = [
        k
        for name, tree in [*enumerate(args), *kwargs.items()]
        if name in keep
        for c in find_carriers(tree)
        for k in copies.spans[c.ticket[1]]
    ]
    out = fn(*map(unwrap, args), **{k: unwrap(v) for k, v in kwargs.items()})
    return _leave_trace(out, copies, kept)


def _leave_trace(out: Any, copies: Copies | None, kept: Collection[int]) -> Result:
    outputs: list[Any] = []

    def refer(root: Any) -> Ref:
        outputs.append(root)
        return Ref(len(outputs) - 1)

    out = replace_roots(out, refer)
    written: dict[int, Any] = {}
    entries: tuple[Entry, ...] | None = ()
    unedited = True
    if copies is not None:
        walk = Walk(copies.root)
        unedited = _unedited(walk, copies)
        current = _current_values(walk if unedited else None, copies)
        written = {
            k: new
            for k, (old, new) in enumerate(zip(copies.values, current, strict=True))
            if k in kept or not _same_value(old, new)
        }
        unedited = unedited and not _stuck(walk, written)
        entries = _known(outputs, copies)
    elif outputs:
        entries = None
    values = list(written.values())
    if unedited and entries is not None:
        return Result(out, values, [], Exit(tuple(written), entries, None))
    edits, fresh, entries = _edits(copies, outputs, unedited)
    return Result(out, values, fresh, Exit(tuple(written), entries, edits))


def _unedited(walk: Walk, copies: Copies) -> bool:
    if walk.graphdef is not copies.graphdef:
        return False
    nodes = zip(walk.nodes, copies.nodes, strict=True)
    return all(a is b for a, b in nodes if handler_of(a).tracked) and all(
        a is b
        for a, b in zip(walk.leaves, copies.leaves, strict=True)
        if isinstance(a, Variable)
    )


def _current_values(walk: Walk | None, copies: Copies) -> list[Any]:
    leaves = walk.leaves if walk is not None else copies.leaves
    return [x._value if isinstance(x, (Variable, Slot)) else x for x in leaves]


def _same_value(old: Any, new: Any) -> bool:
    if old is new:
        return True
    olds, before = jax.tree.flatten(old)
    news, after = jax.tree.flatten(new)
    if before != after or jtu.treedef_is_leaf(before):
        return False
    return all(a is b for a, b in zip(olds, news, strict=True))


def _stuck(walk: Walk, written: dict[int, Any]) -> bool:
    """Whether a written raw array hangs in a tuple, which must be built anew."""
    slots = [walk.leaves[k] for k in written if isinstance(walk.leaves[k], Slot)]
    return any(
        not isinstance(s.holder, dict) and not handler_of(s.holder).tracked
        for s in slots
    )


def _known(outputs: list[Any], copies: Copies) -> tuple[Entry, ...] | None:
    """The outputs as numbers of entry, or None where one of them is new."""
    numbers = {id(x): Entry(None, NODE, n) for n, x in enumerate(copies.nodes)}
    for k, leaf in enumerate(copies.leaves):
        if isinstance(leaf, Variable):
            numbers[id(leaf)] = Entry(None, LEAF, k)
    if any(id(x) not in numbers for x in outputs):
        return None
    return tuple(numbers[id(x)] for x in outputs)


def _edits(
    copies: Copies | None, outputs: list[Any], unedited: bool
) -> tuple[Edits, list[Any], tuple[Entry, ...]]:
    roots = copies.roots if copies is not None else ()
    walk = Walk((roots, tuple(outputs)))
    before = copies.graphdef if copies is not None else None
    entry_nodes = copies.nodes if copies is not None else []
    numbers = {id(x): n for n, x in enumerate(entry_nodes) if handler_of(x).tracked}
    node_from = tuple(
        numbers.get(id(x)) if handler_of(x).tracked else None for x in walk.nodes
    )
    known: dict[int, int] = {}
    if copies is not None:
        for k, (leaf, value) in enumerate(
            zip(copies.leaves, copies.values, strict=True)
        ):
            known[id(leaf if isinstance(leaf, Variable) else value)] = k
    currently = [x._value if isinstance(x, Slot) else x for x in walk.leaves]
    leaf_from = tuple(known.get(id(x)) for x in currently)
    after = walk.graphdef
    dirty = tuple(
        n
        for n, origin in enumerate(node_from)
        if origin is None
        or not unedited
        and not _same_record(after, n, before, origin, node_from, leaf_from)
    )
    metadata = tuple(
        (k, after.schema.metadata[i])
        for i, k in enumerate(leaf_from)
        if k is not None
        and before is not None
        and after.schema.metadata[i] is not before.schema.metadata[k]
    )
    fresh = [
        x._value if isinstance(x, Variable) else x
        for x, k in zip(currently, leaf_from, strict=True)
        if k is None
    ]
    output_node = after.records[0].entries[1].ref
    if isinstance(output_node, int):
        entries = after.records[output_node].entries
    else:
        entries = ()
    return Edits(after, node_from, leaf_from, dirty, metadata), fresh, entries


def _same_record(
    after: GraphDef, n: int, before: Any, k: int, node_from: Any, leaf_from: Any
) -> bool:
    new, old = after.records[n], before.records[k]
    if new[:3] != old[:3] or len(new.entries) != len(old.entries):
        return False
    for a, b in zip(new.entries, old.entries, strict=True):
        if a[:2] != b[:2]:
            return False
        if a.what == STATIC:
            same = a.ref == b.ref
        elif a.what == LEAF:
            same = leaf_from[a.ref] == b.ref
        elif after.records[a.ref].handler.tracked:
            same = node_from[a.ref] == b.ref
        else:
            same = _same_record(after, a.ref, before, b.ref, node_from, leaf_from)
        if not same:
            return False
    return True


# ------------------------------------------------------------ outside the trace
def leave(entered: Entered, result: Result) -> Any:
    """Brings what a call did back to the live objects.

    Args:
      entered: the arguments of the call.
      result: what ``run`` returned, with concrete values.

    Returns:
      The function's output, in which objects that were passed in are those very
      objects.

    Raises:
      TraceError: a live Variable to be written belongs to another trace; nothing is
        written.
    """
    exit = result.exit
    if exit.written:
        _write_back(entered, exit, result.values)
    if exit.edits is not None:
        objects = _carry_out(entered, exit, result.fresh)
    elif exit.outputs:
        objects = [
            entered.live_node(e.ref) if e.what == NODE else entered.live_leaf(e.ref)
            for e in exit.outputs
        ]
    else:
        return result.out
    if type(result.out) is Ref:
        return objects[result.out.k]
    return jax.tree.map(
        lambda x: objects[x.k] if type(x) is Ref else x,
        result.out,
        is_leaf=lambda x: isinstance(x, (Ref, State)),
    )


def _write_back(entered: Entered, exit: Exit, values: Sequence[Any]) -> None:
    leaves: list[Any] = []
    for i, pick in exit.routes(entered.joint):
        leaves += pick(entered.plans[i].leaves)
    try:
        check_writable(leaves)
    except AttributeError:  # raw arrays have no trace of their own
        check_writable([x for x in leaves if isinstance(x, Variable)])
        for leaf, value in zip(leaves, values, strict=True):
            store(leaf, value)
    else:
        deque(map(write, leaves, values), maxlen=0)


def _carry_out(entered: Entered, exit: Exit, fresh: Sequence[Any]) -> list[Any]:
    edits = exit.edits
    assert edits is not None
    schema = edits.graphdef.schema
    new = iter(fresh)
    leaves: list[Any] = []
    for i, k in enumerate(edits.leaf_from):
        kind = schema.kinds[i]
        if k is None:
            value = next(new)
            leaf = value if kind is None else make(kind, value, schema.metadata[i])
        else:
            leaf = entered.live_leaf(k)
            leaf = leaf._value if isinstance(leaf, Slot) else leaf
        leaves.append(leaf)
    for k, metadata in edits.metadata:
        live = entered.live_leaf(k)
        live.set_metadata(dict(metadata))
    nodes: list[Any] = []
    for record, origin in zip(edits.graphdef.records, edits.node_from, strict=True):
        if origin is not None:
            nodes.append(entered.live_node(origin))
        elif record.handler.tracked:
            nodes.append(record.handler.shell(record.cls, record.spec.value))
        else:
            nodes.append(None)
    fill(edits.graphdef.records, nodes, leaves, edits.dirty)
    return [(nodes if e.what == NODE else leaves)[e.ref] for e in exit.outputs]


# ----------------------------------------------------------------- the function
def unbind(fn: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Takes the object out of a bound method or callable Module.

    Left inside, the object would be a closed-over constant whose changes are lost.

    Args:
      fn: any callable.

    Returns:
      A plain function, and the arguments to put before those of each call.
    """
    if isinstance(fn, types.MethodType) and isinstance(fn.__self__, Node):
        return fn.__func__, (fn.__self__,)
    if isinstance(fn, Node):
        return type(fn).__call__, (fn,)  # type: ignore[operator]
    if isinstance(fn, functools.partial) and not fn.keywords:
        inner, first = unbind(fn.func)
        if first or any(isinstance(x, (Node, Variable)) for x in fn.args):
            return inner, (*first, *fn.args)
    return fn, ()


def named_positions(fn: Any, nums: Any, names: Any) -> tuple[set[Any], int]:
    """Positions and names that ``argnums`` and ``argnames`` together mean.

    Args:
      fn: the function they are about.
      nums: an int, or several, or None.
      names: a string, or several, or None.

    Returns:
      A set of non-negative positions and of names, and the number of positional
      parameters (0 where unknown).
    """
    nums = (nums,) if isinstance(nums, int) else tuple(nums or ())
    names = (names,) if isinstance(names, str) else tuple(names or ())
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    n = len(positional)
    found: set[Any] = {i + n if i < 0 else i for i in nums} | set(names)
    found |= {i for i, name in enumerate(positional) if name in found}
    found |= {positional[i] for i in list(found) if isinstance(i, int) and i < n}
    return found, n


def distinct_buffers(carriers: Sequence[Carrier]) -> None:
    """Copies arrays that occur twice, because one buffer cannot be donated twice."""
    seen: set[int] = set()
    for c in carriers:
        values = list(c.values)
        for i, value in enumerate(values):
            if isinstance(value, jax.Array):
                if id(value) in seen:
                    values[i] = jnp.copy(value)
                seen.add(id(value))
        c.values = values
