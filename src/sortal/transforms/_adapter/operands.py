"""Arguments of loops and branches: the values in them, and what must not change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.tree_util as jtu

from sortal._engine.difference import ABSENT, Fact
from sortal._engine.graphdef import Entry
from sortal._engine.jax_compat import varying_axes
from sortal._engine.nodes import LEAF, NODE
from sortal._engine.paths import show
from sortal._engine.variable import describe
from sortal.errors import LoopError, listing
from sortal.transforms._adapter.binding import BoundArguments, write_back
from sortal.transforms._adapter.effects import (
    Effects,
    Ref,
    Result,
    resolve,
    rigid_leaves,
)
from sortal.transforms._adapter.tracing import FlatModule, is_flat_module, run
from sortal.transforms.shardings import as_declared


class Operands:
    """The arguments of a call, taken apart into plain leaves and leaves of roots.

    The values of the roots are numbered as in the joint GraphDef, whichever root they
    came with.

    Args:
      args: the arguments, with live objects in them.
    """

    def __init__(self, args: Sequence[Any]):
        self.bound = BoundArguments(args, {})
        self.parts, self.treedef = jtu.tree_flatten(
            self.bound.args, is_leaf=is_flat_module
        )
        flat_modules = self.bound.flat_modules
        self.plain = [x for x in self.parts if not is_flat_module(x)]
        self.values = [v for c in flat_modules for v in c.values]

    def rebuild(self, plain: Iterable[Any], values: Iterable[Any]) -> tuple[Any, ...]:
        """The arguments with other values in them, as ``run`` takes them."""
        at, mine = iter(values), {}
        for c in self.bound.flat_modules:
            mine[id(c)] = FlatModule([next(at) for _ in c.values], c.definition)
        rest = iter(plain)
        return self.treedef.unflatten(
            [mine[id(x)] if is_flat_module(x) else next(rest) for x in self.parts]
        )

    def plain_paths(self) -> list[Any]:
        """For each plain leaf its path from the tuple of arguments, as JAX has it."""
        rows, _ = jtu.tree_flatten_with_path(self.bound.args, is_leaf=is_flat_module)
        return [path for path, x in rows if not is_flat_module(x)]

    def describe(self, k: int) -> str:
        """Path and kind of a leaf of the roots."""
        return self.bound.alias_map.graphdef.schema.describe(k)

    def same_objects(self, out: Any, effects: Effects) -> Any:
        """``out`` with each Ref numbered by the root that it stands for, -1 if none."""

        def number(x: Any) -> Any:
            return (
                Ref(self._root_of(_origin(effects, x.k))) if isinstance(x, Ref) else x
            )

        return jtu.tree_map(number, out, is_leaf=_is_ref)

    def _root_of(self, entry: Entry | None) -> int:
        bound = self.bound
        if entry is None or not bound.roots:
            return -1
        if entry.what == NODE:
            if entry.ref not in bound.alias_map.node_at:
                return -1
            found = bound.live_node(entry.ref)
        else:
            found = bound.live_leaf(entry.ref)
        same = [i for i, root in enumerate(bound.roots) if root is found]
        return same[0] if same else -1

    def outline(self, tree: Any, effects: Effects | None = None) -> str:
        """The structure of ``tree`` with the objects in it named by class and path.

        Args:
          tree: with Refs, numbered by root or, where there are Effects, by output.
          effects: what the call did that returned ``tree``.

        Returns:
          The text, with ``*`` for each plain leaf.
        """

        def shown(x: Any) -> Any:
            if not isinstance(x, Ref):
                return _Named("*")
            return _Named(
                self._root(x.k) if effects is None else self._name(effects, x.k)
            )

        return repr(jtu.tree_map(shown, tree, is_leaf=_is_ref))

    def _root(self, i: int) -> str:
        return f"{type(self.bound.roots[i]).__name__} {i}"

    def _name(self, effects: Effects, k: int) -> str:
        entry = _origin(effects, k)
        if entry is None:
            return "a new object"
        number = self._root_of(entry)
        if number >= 0:
            return self._root(number)
        graphdef = self.bound.alias_map.graphdef
        if entry.what == LEAF:
            return graphdef.schema.describe(entry.ref)
        path = next(p for p, e, _ in graphdef.places() if e[1:] == entry[1:])
        return f"{show(path)} ({graphdef.records[entry.ref].cls.__name__})"

    def skeleton(self, tree: Any) -> Any:
        """A tree of bound arguments with each FlatModule replaced by a numbered Ref."""
        at = {id(c): i for i, c in enumerate(self.bound.flat_modules)}
        first = {id(r): i for i, r in reversed(list(enumerate(self.bound.roots)))}

        def number(x: Any) -> Any:
            if not is_flat_module(x):
                return x
            return Ref(first[id(self.bound.roots[at[id(x)]])])

        return jtu.tree_map(number, tree, is_leaf=is_flat_module)

    def written(self, effects: Effects, values: Sequence[Any], new: Any) -> list[Any]:
        """All values of the roots after a step that wrote ``new`` to some."""
        changed = list(values)
        for k, value in zip(effects.written, new, strict=True):
            changed[k] = value
        return changed

    def write_back(self, effects: Effects, values: Sequence[Any], tree: Any) -> Any:
        """Writes the values of the leaves that were written to the live objects."""
        mine = [values[k] for k in effects.written]
        result = Result(effects, (None, mine, []))
        write_back(self.bound, as_declared(result, self.bound.args))
        return resolve(tree, self.bound.roots)


def steady(where: str, operands: Operands, fn: Callable[..., Any], args: Any) -> Result:
    """Runs one step or branch, which must leave all structure as it was.

    Args:
      where: which step or branch, for messages.
      operands: the arguments of the whole call.
      fn: the user's function.
      args: all arguments of this step, from ``operands.rebuild``.

    Returns:
      The Result, without edits.

    Raises:
      LoopError: the function adds, removes or replaces something, returns an object
        that is new, or writes a value of another shape or dtype; all are listed.
    """
    result = run(fn, args, {})
    if result.effects.edits is not None:
        raise LoopError(edited(where, operands, result.effects))
    return result


def edited(where: str, operands: Operands, effects: Effects) -> str:
    """The message about structure that a step changed."""
    rows = []
    edits = effects.edits
    if edits is not None and edits.roots is not None:
        before = operands.bound.alias_map.graphdef
        found = before.diff(edits.roots)
        whole = {d.path for d in found if not (_is_there(d.old) and _is_there(d.new))}
        # Of what came, went or moved as a whole, its parts say nothing more.
        rows = [str(d) for d in found if not d.path or d.path[:-1] not in whole]
    rows = rows or moved(operands, effects)
    rows = rows or ["an object that is returned was made inside"]
    return (
        f"{where} must leave the structure as it is, for it is compiled once for all "
        f"steps; it changed:\n{listing(rows)}\nMake attributes, modules and Variables "
        "before, and write only values inside."
    )


def _is_there(x: Any) -> bool:
    """Whether something is at a path by itself, and not absent or elsewhere."""
    return not isinstance(x, Fact) or x.cls is not None


def only_added(operands: Operands, effects: Effects) -> bool:
    """Whether a step changed structure only by adding to it."""
    edits = effects.edits
    if edits is None or edits.roots is None:
        return True
    before = operands.bound.alias_map.graphdef
    added = all(d.old is ABSENT for d in before.diff(edits.roots))
    # Two Variables that change places would do so once, not at each step.
    renamed = any(leaf.changed for leaf in edits.leaves)
    return added and not renamed and not moved(operands, effects, new=False)


def moved(operands: Operands, effects: Effects, *, new: bool = True) -> list[str]:
    """Leaves in whose place another one is now, though the structure is equal.

    Args:
      operands: the arguments of the whole call.
      effects: what the step did.
      new: whether Variables that were made inside count.

    Returns:
      A row for each.
    """
    edits = effects.edits
    if edits is None or edits.roots is None:
        return []
    graphdef, after = operands.bound.alias_map.graphdef, edits.graphdef.schema
    before, rigid = graphdef.schema, rigid_leaves(graphdef)
    above = 2 if len(operands.bound.roots) == 1 else 1
    rows = []
    for i, (origin, _) in enumerate(edits.leaves):
        k = before.index.get(after.paths[i][above:]) if after.paths[i][0] == 0 else None
        if k is None or k == origin:
            continue
        # Another array in the place of one is a value, but not in a tuple.
        is_value = not before.kinds[k] and k not in rigid
        if is_value if new else origin is None:
            continue
        what = "Variable" if before.kinds[k] else "array"
        in_tuple = ", in another tuple; hold it in a list"
        rows.append(
            f"{before.describe(k)} is another {what} now{in_tuple * (k in rigid)}"
        )
    return rows


def check_types(
    where: str, rows: Sequence[tuple[str, Any, Any]], *, stays: bool = True
) -> None:
    """Refuses values of another structure, shape or dtype than before.

    Args:
      where: which step or branch, for the message.
      rows: for each value what it is called, the old and the new one.
      stays: whether on an explicit mesh each must lie where it lay, and differ between
        devices where it differed, as in loops.

    Raises:
      LoopError: some differ; all are listed.
    """
    bad = [
        f"{name}: {_shown(old)} -> {_shown(new)}"
        for name, old, new in rows
        if not _alike(old, new)
    ]
    if bad:
        raise LoopError(
            f"{where} must keep the shape and dtype of what it hands on; it changed:\n"
            f"{listing(bad)}\nCast or reshape what is written, as in "
            "variable[...] = x.astype(variable.dtype)."
        )
    moved = [
        f"{name}: {describe(a)}, {a.sharding.spec} -> {b.sharding.spec}"
        for name, old, new in rows
        for a, b in _types(old, new)
        if a.sharding.spec != b.sharding.spec and a.sharding.mesh == b.sharding.mesh
    ]
    if moved and stays:
        raise LoopError(
            f"{where} must keep where on the mesh lies what it hands on; it changed:\n"
            f"{listing(moved)}\nPut it there before the loop, or write "
            "jax.sharding.reshard(x, spec) with the spec that it has."
        )
    if stays:
        _check_varying(where, rows)


def _check_varying(where: str, rows: Sequence[tuple[str, Any, Any]]) -> None:
    """Inside of shard_map, what a step hands on differs where it differed before."""
    found = {
        f"{name}: {describe(a)}": tuple(sorted(varying_axes(b) - varying_axes(a)))
        for name, old, new in rows
        for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True)
    }
    bad = [f"{row} differs along {', '.join(x)}" for row, x in found.items() if x]
    if bad:
        axes = tuple(sorted({axis for x in found.values() for axis in x}))
        raise LoopError(
            f"{where} hands on what differs between devices and is the same on all "
            f"before the loop:\n{listing(bad)}\nWrite before it x = jax.lax.pcast(x, "
            f"{axes!r}, to='varying'), of a Variable variable[...] = jax.lax.pcast("
            f"variable[...], {axes!r}, to='varying')."
        )


def _types(old: Any, new: Any) -> Iterator[tuple[Any, Any]]:
    leaves = (map(jax.typeof, jax.tree.leaves(x)) for x in (old, new))
    return zip(*leaves, strict=True)


def _alike(old: Any, new: Any) -> bool:
    if jax.tree.structure(old) != jax.tree.structure(new):
        return False
    return all(a.shape == b.shape and a.dtype == b.dtype for a, b in _types(old, new))


def _shown(value: Any) -> str:
    if jtu.all_leaves([value]):
        return describe(value)
    leaves = ", ".join(map(describe, jax.tree.leaves(value)))
    return f"{type(value).__name__} of {leaves}"


def _is_ref(x: Any) -> bool:
    return isinstance(x, Ref)


def _origin(effects: Effects, k: int) -> Entry | None:
    """Output ``k`` as it is numbered on entry, or None for one that was made inside."""
    entry, edits = effects.outputs[k], effects.edits
    if edits is None:
        return entry
    at = (edits.nodes if entry.what == NODE else edits.leaves)[entry.ref].origin
    return None if at is None else Entry(None, entry.what, at)


class _Named(str):
    """Text that prints without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
