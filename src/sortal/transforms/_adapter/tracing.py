"""What happens inside a trace: copies are built, the call made, changes described."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import is_
from typing import Any

import jax
import jax.tree_util as jtu

from sortal._engine.graphdef import Entry, GraphDef
from sortal._engine.jax_compat import register_pytree
from sortal._engine.nodes import LEAF, NODE, handler_of, is_root
from sortal._engine.paths import Path, PathKey
from sortal._engine.plan import plan_of_built
from sortal._engine.state import State
from sortal._engine.variable import value_of
from sortal._engine.walk import Walk
from sortal.transforms._adapter.effects import (
    Effects,
    Ref,
    Result,
    edits_of,
    is_unedited,
    rigid_leaves,
    same_value,
)

PASS, ROOT, SCAN = "pass", "root", "scan"
_ATOMS = (jax.Array, int, float, complex, str, bytes, State, GraphDef, type(None))
modes: dict[type, str] = {}


@dataclasses.dataclass(eq=False, slots=True)
class FlatModuleDef:
    """Says of a FlatModule which root it is, of how many, of which joint GraphDef.

    Made by ``flat_module_def``, one for each root of each GraphDef, so that JAX, which
    compares them at every call, compares them by identity. ``some`` are the numbers of
    the leaves whose values are carried, None for all leaves of the root.
    """

    graphdef: GraphDef
    number: int
    of: int
    some: tuple[int, ...] | None = None

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


class Copies:
    """The copies that live in one trace, with the values that they began with."""

    def __init__(self, flat_modules: list[FlatModule]):
        flat_modules = sorted(flat_modules, key=lambda c: c.definition.number)
        found = flat_modules[0].definition.graphdef if flat_modules else _NO_ROOTS
        self.graphdef = found
        self.values = [v for c in flat_modules for v in c.values]
        self.leaves = found.build_leaves(self.values)
        self.root, self.nodes = found.build(self.leaves)
        one = len(flat_modules) == 1
        self.roots: tuple[Any, ...] = (self.root,) if one else self.root
        self.plan: Any = plan_of_built(found, self.root, self.nodes, self.leaves)

    def are_unchanged(self) -> bool:
        """Whether they surely have the structure of entry; if not, a walk must tell."""
        return self.plan is not None and self.plan.same(self.root)

    @functools.cached_property
    def origins(self) -> dict[int, Entry]:
        """What each copy, and each raw array, was on entry, by its id."""
        nodes = enumerate(self.nodes)
        tracked = {id(x): (NODE, n) for n, x in nodes if handler_of(x).tracked}
        leaves = {id(x): (LEAF, k) for k, x in enumerate(self.leaves)}
        return {at: Entry(None, *found) for at, found in (tracked | leaves).items()}

    def number(self, x: Any) -> int | None:
        """The number of a node or leaf on entry, None for one that is new."""
        origin = self.origins.get(id(x))
        return None if origin is None else origin.ref


_NO_ROOTS = Walk(()).graphdef


def find_flat_modules(tree: Any) -> list[FlatModule]:
    """All FlatModules in ``tree``."""
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
    copies = Copies(find_flat_modules((args, kwargs)))

    def unwrap(tree: Any) -> Any:
        return replace_flat_modules(tree, lambda c: copies.roots[c.definition.number])

    out = fn(*map(unwrap, args), **{k: unwrap(v) for k, v in kwargs.items()})
    return _leave_trace(out, copies, keep)


def _changed(
    copies: Copies, now: Iterable[Any], kept: Collection[int]
) -> dict[int, Any]:
    """New values by the number of their leaf, of those kept and those that differ."""
    pairs = enumerate(zip(copies.values, now, strict=True))
    return {k: new for k, (old, new) in pairs if k in kept or not same_value(old, new)}


def _leave_trace(out: Any, copies: Copies, kept: Collection[int]) -> Result:
    outputs: list[Any] = []

    def refer(root: Any) -> Ref:
        outputs.append(root)
        return Ref(len(outputs) - 1)

    out = replace_roots(out, refer)
    entries: Any = tuple(copies.origins.get(id(x)) for x in outputs)
    walk = None if copies.are_unchanged() else Walk(copies.root)
    unedited = walk is None or is_unedited(walk, copies)
    kinds, rigid = copies.graphdef.schema.kinds, rigid_leaves(copies.graphdef)
    changed: dict[int, Any] = {}
    if unedited:
        live: Any = (walk or copies.plan).leaves
        changed = _changed(copies, [x._value for x in live], kept)
        unedited = rigid.isdisjoint(changed)
    if not unedited:
        # What became of raw arrays is among the edits, which say where each has gone.
        changed = _changed(copies, map(value_of, copies.leaves), kept)
    written = {k: new for k, new in changed.items() if k not in rigid}
    edits, fresh = None, []
    if not unedited or None in entries:
        lost = {k for k in changed if k in rigid or (unedited and kinds[k] is None)}
        edits, fresh, entries = edits_of(
            copies, outputs, unedited, lost, walk or Walk(copies.root)
        )
    effects = Effects(tuple(written), entries, edits)
    return Result(effects, (out, list(written.values()), fresh))
