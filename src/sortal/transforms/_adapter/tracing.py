"""What happens inside a trace: copies are built, the call made, changes described."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu

from sortal._engine.graphdef import Entry, GraphDef
from sortal._engine.jax_compat import register_pytree
from sortal._engine.leaves import Slot, held
from sortal._engine.nodes import LEAF, NODE, STATIC, handler_of, is_root
from sortal._engine.paths import Path, PathKey
from sortal._engine.state import State
from sortal._engine.variable import is_variable, value_of
from sortal._engine.walk import Walk

PASS, ROOT, SCAN = "pass", "root", "scan"
_ATOMS = (jax.Array, int, float, complex, str, bytes, State, GraphDef, type(None))
modes: dict[type, str] = {}


class FlatModuleDef:
    """Says of a FlatModule which root it is, of how many, of which joint GraphDef.

    Made by ``flat_module_def``, one for each root of each GraphDef, so that JAX, which
    compares them at every call, compares them by identity. ``some`` are the numbers of
    the leaves whose values are carried, None for all leaves of the root.
    """

    __slots__ = ("graphdef", "number", "of", "some")

    def __init__(
        self,
        graphdef: GraphDef,
        number: int,
        of: int,
        some: tuple[int, ...] | None = None,
    ):
        self.graphdef, self.number, self.of, self.some = graphdef, number, of, some

    @property
    def leaves(self) -> Sequence[int]:
        """The numbers of the values among the leaves of the joint GraphDef."""
        if self.some is not None:
            return self.some
        paths = self.graphdef.schema.paths
        every = range(len(paths))
        if self.of == 1:
            return every
        return [k for k in every if paths[k][0] == self.number]

    @property
    def paths(self) -> list[Path]:
        """The paths of the values, below their root."""
        paths = self.graphdef.schema.paths
        above = 0 if self.of == 1 else 1
        return [paths[k][above:] for k in self.leaves]


def flat_module_def(
    graphdef: GraphDef, number: int, of: int, some: tuple[int, ...] | None = None
) -> FlatModuleDef:
    """The FlatModuleDef of root ``number`` of ``of`` roots of a GraphDef, or a part."""
    return graphdef.memo(
        ("definition", number, of, some),
        lambda: FlatModuleDef(graphdef, number, of, some),
    )


class FlatModule:
    """A root on its way into a trace: the list of its values, and its FlatModuleDef."""

    __slots__ = ("definition", "values")

    def __init__(self, values: list[Any], definition: FlatModuleDef):
        self.values, self.definition = values, definition


def is_flat_module(x: Any) -> bool:
    """Whether ``x`` is a FlatModule; where JAX is to stop, as ``is_leaf``."""
    return isinstance(x, FlatModule)


# The list is one child, for JAX takes a list apart faster than another type's
# children. It asks for key paths only to name arguments in its messages.
register_pytree(
    FlatModule,
    lambda c: ((c.values,), c.definition),
    lambda c: (
        list(zip(map(PathKey, c.definition.paths), c.values, strict=True)),
        c.definition,
    ),
    lambda definition, children: FlatModule(children[0], definition),
)


def mode_of(x: Any) -> str:
    """``ROOT`` for an object or Variable, ``SCAN`` for what may hold one, or PASS."""
    cls = type(x)
    found = modes.get(cls)
    if found is None:
        if is_root(x):
            found = ROOT
        elif isinstance(x, _ATOMS) or jtu.all_leaves([x]):
            found = PASS
        else:
            found = SCAN
        modes[cls] = found
    return found


def replace_roots(tree: Any, replace: Callable[[Any], Any]) -> Any:
    """``tree`` with each object and Variable in it replaced; itself if it has none.

    Args:
      tree: any pytree.
      replace: takes a root, returns what stands for it.

    Returns:
      The tree.
    """
    mode = mode_of(tree)
    if mode is PASS:
        return tree
    if mode is ROOT:
        return replace(tree)
    # Not by JAX's own flattening alone, which a container that holds itself would
    # leave with a stack that Python takes to be full for ever after.
    kind = type(tree)
    if kind is tuple or kind is list:
        new = [replace_roots(x, replace) for x in tree]
        return tree if all(map(is_, new, tree)) else kind(new)
    children, treedef = jtu.tree_flatten(tree, is_leaf=lambda x: x is not tree)
    new = [replace_roots(x, replace) for x in children]
    return tree if all(map(is_, new, children)) else treedef.unflatten(new)


def has_roots(tree: Any) -> bool:
    """Whether there is an object or Variable anywhere in ``tree``."""
    found: list[Any] = []
    replace_roots(tree, found.append)
    return bool(found)


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


class Effects:
    """What a call did, apart from values: which leaves it wrote, edits, outputs."""

    __slots__ = ("_routes", "closes_over", "edits", "outputs", "written")

    def __init__(
        self, written: tuple[int, ...], outputs: tuple[Entry, ...], edits: Edits | None
    ):
        self.written, self.outputs, self.edits = written, outputs, edits
        # Whether the trace closed over arrays; None until somebody has looked.
        self.closes_over: bool | None = None
        self._routes: list[tuple[int, Callable[[Any], Any]]] | None = None

    def routes(
        self, leaf_at: Sequence[tuple[int, int]]
    ) -> list[tuple[int, Callable[[Any], Any]]]:
        """Written leaves as (root, what picks its leaves), given where each is."""
        if self._routes is None:
            per_root: dict[int, list[int]] = {}
            order = [leaf_at[k] for k in self.written]
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

    __slots__ = ("effects", "fresh", "out", "values")

    def __init__(self, out: Any, values: Any, fresh: Any, effects: Effects):
        self.out, self.values, self.fresh, self.effects = out, values, fresh, effects


jtu.register_pytree_node(
    Result,
    lambda r: ((r.out, r.values, r.fresh), r.effects),
    lambda effects, parts: Result(parts[0], parts[1], parts[2], effects),
)


class Copies:
    """The copies that live in one trace, with the values that they began with."""

    def __init__(self, flat_modules: list[FlatModule]):
        flat_modules = sorted(flat_modules, key=lambda c: c.definition.number)
        self.graphdef = flat_modules[0].definition.graphdef
        self.values = [v for c in flat_modules for v in c.values]
        self.leaves = self.graphdef.build_leaves(self.values)
        root, self.nodes = self.graphdef.build(self.leaves)
        self.roots: Sequence[Any] = root if len(flat_modules) > 1 else (root,)
        starts = [0]
        for c in flat_modules:
            starts.append(starts[-1] + len(c.values))
        self.spans = {
            c.definition.number: range(a, b)
            for c, a, b in zip(flat_modules, starts, starts[1:], strict=False)
        }

    @property
    def root(self) -> Any:
        """What the GraphDef's root is: a tuple where there are several roots."""
        return self.roots if len(self.roots) > 1 else self.roots[0]


def find_flat_modules(tree: Any) -> list[FlatModule]:
    """All FlatModules in ``tree``."""
    if type(tree) is FlatModule:
        return [tree]
    leaves = jtu.tree_leaves(tree, is_leaf=_ends_search)
    return [x for x in leaves if is_flat_module(x)]


def replace_flat_modules(tree: Any, replace: Callable[[FlatModule], Any]) -> Any:
    """``tree`` with each FlatModule in it replaced; itself if it has none.

    Args:
      tree: any pytree.
      replace: takes a FlatModule, returns what stands for it.

    Returns:
      The tree.
    """
    if type(tree) is FlatModule:
        return replace(tree)
    if not find_flat_modules(tree):
        return tree
    return jax.tree.map(
        lambda x: replace(x) if is_flat_module(x) else x, tree, is_leaf=_ends_search
    )


def _ends_search(x: Any) -> bool:
    return isinstance(x, (FlatModule, State))


def run(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    keep: Collection[int] = (),
) -> Result:
    """Calls ``fn`` on copies built from FlatModules; for use inside a trace.

    Args:
      fn: the user's function.
      args: positional arguments, with FlatModules in the place of roots.
      kwargs: keyword arguments, likewise.
      keep: numbers of leaves, in the joint GraphDef, that are returned even where they
        were only read, because their buffers were donated.

    Returns:
      The Result.
    """
    flat_modules = find_flat_modules((args, kwargs))
    if not flat_modules:
        return _leave_trace(fn(*args, **kwargs), None, ())
    copies = Copies(flat_modules)

    def unwrap(tree: Any) -> Any:
        return replace_flat_modules(tree, lambda c: copies.roots[c.definition.number])

    out = fn(*map(unwrap, args), **{k: unwrap(v) for k, v in kwargs.items()})
    return _leave_trace(out, copies, keep)


def _leave_trace(out: Any, copies: Copies | None, kept: Collection[int]) -> Result:
    outputs: list[Any] = []

    def refer(root: Any) -> Ref:
        outputs.append(root)
        return Ref(len(outputs) - 1)

    out = replace_roots(out, refer)
    written: dict[int, Any] = {}
    rigid: Collection[int] = ()
    entries: tuple[Entry, ...] | None = ()
    unedited = True
    walk = None
    if copies is not None:
        walk = Walk(copies.root)
        unedited = _unedited(walk, copies)
        current = _current_values(walk if unedited else None, copies)
        written = {
            k: new
            for k, (old, new) in enumerate(zip(copies.values, current, strict=True))
            if k in kept or not _same_value(old, new)
        }
        rigid = written.keys() & _rigid(copies.graphdef)
        written = {k: v for k, v in written.items() if k not in rigid}
        unedited = unedited and not rigid
        entries = _known(outputs, copies)
    elif outputs:
        entries = None
    values = list(written.values())
    if unedited and entries is not None:
        return Result(out, values, [], Effects(tuple(written), entries, None))
    became = None if walk is None else walk.graphdef
    edits, fresh, entries = _edits(copies, outputs, unedited, rigid, became)
    return Result(out, values, fresh, Effects(tuple(written), entries, edits))


def _unedited(walk: Walk, copies: Copies) -> bool:
    if walk.graphdef is not copies.graphdef:
        return False
    nodes = zip(walk.nodes, copies.nodes, strict=True)
    return all(a is b for a, b in nodes if handler_of(a).tracked) and all(
        held(a) is b
        for a, b in zip(walk.leaves, copies.leaves, strict=True)
        if type(a) is not Slot
    )


def _current_values(walk: Walk | None, copies: Copies) -> list[Any]:
    if walk is not None:
        return [x._value for x in walk.leaves]
    return list(map(value_of, copies.leaves))


def _same_value(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if isinstance(old, jax.Array) or isinstance(new, jax.Array):
        return False
    olds, before = jax.tree.flatten(old)
    news, after = jax.tree.flatten(new)
    if before != after or jtu.treedef_is_leaf(before):
        return False
    return all(a is b for a, b in zip(olds, news, strict=True))


def _rigid(graphdef: GraphDef) -> frozenset[int]:
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


def _known(outputs: list[Any], copies: Copies) -> tuple[Entry, ...] | None:
    """The outputs as numbers of entry, or None where one of them is new."""
    if not outputs:
        return ()
    numbers = {id(x): Entry(None, NODE, n) for n, x in enumerate(copies.nodes)}
    for k, leaf in enumerate(copies.leaves):
        if is_variable(leaf):
            numbers[id(leaf)] = Entry(None, LEAF, k)
    if any(id(x) not in numbers for x in outputs):
        return None
    return tuple(numbers[id(x)] for x in outputs)


def _edits(
    copies: Copies | None,
    outputs: list[Any],
    unedited: bool,
    rigid: Collection[int],
    became: GraphDef | None,
) -> tuple[Edits, list[Any], tuple[Entry, ...]]:
    roots = copies.roots if copies is not None else ()
    walk = Walk((roots, tuple(outputs)))
    before: Any = copies.graphdef if copies is not None else None
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
            if k not in rigid:
                known[id(leaf if is_variable(leaf) else value)] = k
    currently = list(map(held, walk.leaves))
    leaf_from = tuple(known.get(id(x)) for x in currently)
    after = walk.graphdef
    nodes = tuple(
        Edit(
            origin,
            origin is None
            or not (
                unedited or _same_record(after, n, before, origin, node_from, leaf_from)
            ),
        )
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
    return Edits(after, became, nodes, leaves), fresh, entries


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
