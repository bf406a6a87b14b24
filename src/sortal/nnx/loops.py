"""Loops and branches whose functions hand back new objects, as in NNX.

``sortal``'s loops carry the live objects, and refuse a step that returns others. NNX
code may be written as for JAX: each step returns modules that it has made, or puts new
objects into those that it was given, of the structure of those that were there. Where a
loop is refused, it is tried here once more, with what is carried as values.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.tree_util as jtu

from sortal._engine.leaves import Leaves, held
from sortal._engine.nodes import LEAF, STATIC, handler_of
from sortal._engine.plan import bind
from sortal._engine.statics import static_key
from sortal._engine.variable import check_writable, is_variable, value_of
from sortal.errors import LoopError
from sortal.functional import merge, split
from sortal.transforms._adapter.effects import has_identity
from sortal.transforms._adapter.prefixes import Carry
from sortal.transforms._adapter.tracing import replace_roots


class _Packed:
    """A module or Variable by its values."""

    __slots__ = ("graphdef", "state")

    def __init__(self, graphdef: Any, state: Any):
        self.graphdef, self.state = graphdef, state


jtu.register_pytree_node(
    _Packed,
    lambda p: ((p.state,), p.graphdef),
    lambda graphdef, x: _Packed(graphdef, *x),
)


def _is_packed(x: Any) -> bool:
    return isinstance(x, _Packed)


def _pack(root: Any) -> _Packed:
    return _Packed(*split(root))


def _unpacked(tree: Any, unpack: Callable[[_Packed], Any]) -> Any:
    return jtu.tree_map(
        lambda x: unpack(x) if _is_packed(x) else x, tree, is_leaf=_is_packed
    )


def _objects(tree: Any) -> set[int]:
    """The ids of all nodes and Variables in a tree."""
    found: set[int] = set()

    def note(root: Any) -> Any:
        found.update(id(x) for x in _parts(root) if has_identity(x))
        return root

    replace_roots(tree, note)
    return found


class _Carried:
    """What a loop carries, as values, and which live objects the steps hand back."""

    def __init__(self, init: Any):
        self.roots: list[Any] = []

        def pack(root: Any) -> Any:
            self.roots.append(root)
            return _pack(root)

        self.start = replace_roots(init, pack)
        objects = list(map(_objects, self.roots))
        if not objects or len(set().union(*objects)) < sum(map(len, objects)):
            raise LoopError("there are no objects, or they share some")
        self.returned: list[tuple[int | None, list[bool]]] = []
        self.written: list[list[bool]] = []

    def load(self, tree: Any) -> Any:
        """The value with objects in it."""
        return _unpacked(tree, lambda p: merge(p.graphdef, p.state))

    def step(self, body: Callable[[Any], Any], tree: Any) -> Any:
        """One step; what it is given it must hand back in its place, or leave alone."""
        given: list[Any] = []
        value = replace_roots(self.load(tree), lambda x: given.append(x) or x)
        parts = list(map(_parts, given))
        before = {
            id(x): (x, _content(x)) for x in itertools.chain(*parts) if has_identity(x)
        }
        out = body(value)
        seen: set[int] = set()
        self.returned = []

        def pack(root: Any) -> Any:
            i = next((i for i, x in enumerate(given) if x is root), None)
            places, now = parts[i] if i is not None else [], _parts(root)
            kept = [x is was for x, was in itertools.zip_longest(now, places)]
            if any(id(x) in before and not k for x, k in zip(now, kept, strict=False)):
                raise LoopError("a step moves an object that was given")
            seen.update(map(id, now))
            self.returned.append((i, kept))
            return _pack(root)

        packed = replace_roots(out, pack)
        written = {k for k, (x, old) in before.items() if not _same(old, x)}
        if not written <= seen:
            raise LoopError("a step writes to an object that it does not hand back")
        self.written = [[id(x) in written for x in places] for places in parts]
        return packed

    def finish(self, tree: Any) -> Any:
        """The last value: live objects that were handed back, and new ones."""
        returned, replaced = iter(self.returned), list[_Replaced]()

        def unpack(p: _Packed) -> Any:
            new = merge(p.graphdef, p.state)
            i, kept = next(returned, (None, []))
            if i is None:
                return new
            replaced.append(_Replaced(self.roots[i], new, kept, self.written[i]))
            return self.roots[i]

        out = _unpacked(tree, unpack)
        check_writable(x for r in replaced for x in r.owners())
        for r in replaced:
            r.carry_out()
        return out


class _Replaced:
    """What becomes of a live root: some values, and some objects in it, are new.

    Args:
      root: the live root.
      new: one of the same structure, with the values and objects to take.
      kept: for each of the parts, whether it stays.
      written: for each of the parts that stay, whether it has a new value.
    """

    def __init__(self, root: Any, new: Any, kept: list[bool], written: list[bool]):
        live, made = bind(root), bind(new)
        self.graphdef = made.graphdef
        n = len(self.graphdef.records)
        of_leaves = [a and b for a, b in zip(kept[n:], written[n:], strict=True)]
        self.variables = Leaves(itertools.compress(live.leaves, of_leaves))
        self.values = list(itertools.compress(made.values(), of_leaves))
        kept, self.changed = list(kept), list[int]()
        for k in reversed(range(n)):  # what a value holds comes after it
            _, handler, _, _, entries = self.graphdef.records[k]
            below = [e.ref + n * (e.what is LEAF) for e in entries if e.what != STATIC]
            if not kept[k] or not all(kept[i] for i in below):
                self.changed.insert(0, k)
                kept[k] &= handler.tracked  # a value is built anew
        pairs = zip(_parts(root), _parts(new), kept, strict=True)
        parts = [old if keep else x for old, x, keep in pairs]
        self.nodes, self.leaves = parts[:n], parts[n:]

    def owners(self) -> list[Any]:
        """What is asked for its trace before anything is written."""
        nodes = [self.nodes[k] for k in self.changed]
        found = [handler_of(x).owner(x) for x in nodes]
        return [x for x in (*found, *self.variables) if x is not None]

    def carry_out(self) -> None:
        """Writes the values, and puts the new objects in the place of the old."""
        self.variables.put(iter(self.values))
        self.graphdef.fill(self.nodes, self.leaves, self.changed)


def _parts(root: Any) -> list[Any]:
    """All nodes of a root, then all its Variables and raw arrays, in order."""
    plan = bind(root)
    nodes = plan.nodes_of(root)[: len(plan.graphdef.records)]
    return [*nodes, *map(held, plan.leaves)]


def _content(x: Any) -> tuple[list[Any], list[Any]]:
    """The keys and children of a node, or the structure and arrays of a Variable."""
    if is_variable(x):
        arrays, treedef = jax.tree.flatten(value_of(x))
        return [treedef], arrays
    items = handler_of(x).items(x)
    return list(map(static_key, items)), list(items.values())


def _same(before: tuple[list[Any], list[Any]], x: Any) -> bool:
    keys, values = _content(x)
    return keys == before[0] and all(map(operator.is_, values, before[1]))


def _or_as_values(transform: Any, again: Callable[..., Any]) -> Any:
    """A loop that is tried again with values where its objects are refused."""

    @functools.wraps(transform)
    def taking(*args: Any, **options: Any) -> Any:
        try:
            return transform(*args, **options)
        except LoopError as error:
            return _retried(error, again, args, options)

    return taking


def _retried(error: LoopError, again: Any, args: Any, options: Any) -> Any:
    try:
        return again(*args, **options)
    except LoopError:
        _raise(error)


def _raise(error: LoopError) -> NoReturn:
    raise error from None


def while_loop_of(transform: Any) -> Any:
    """``while_loop`` whose body may return new objects.

    Args:
      transform: that of Sortal.

    Returns:
      The transform.
    """

    def again(cond_fun: Any, body_fun: Any, init_val: Any, **options: Any) -> Any:
        carried = _Carried(init_val)
        last = transform(
            lambda x: cond_fun(carried.load(x)),
            lambda x: carried.step(body_fun, x),
            carried.start,
            **options,
        )
        return carried.finish(last)

    return _or_as_values(transform, again)


def fori_loop_of(transform: Any) -> Any:
    """``fori_loop`` whose body may return new objects.

    Args:
      transform: that of Sortal.

    Returns:
      The transform.
    """

    def again(lower: Any, upper: Any, body_fun: Any, init_val: Any, **opts: Any) -> Any:
        carried = _Carried(init_val)

        def body(i: Any, x: Any) -> Any:
            return carried.step(functools.partial(body_fun, i), x)

        return carried.finish(transform(lower, upper, body, carried.start, **opts))

    return _or_as_values(transform, again)


def branches_of(transform: Any) -> Any:
    """``cond`` or ``switch`` whose branches may return new objects.

    Args:
      transform: that of Sortal.

    Returns:
      The transform.
    """

    def again(which: Any, *rest: Any, **options: Any) -> Any:
        several = isinstance(rest[0], Sequence)  # those of switch
        branches = rest[0] if several else rest[:2]
        operands = rest[1:] if several else rest[2:]
        made = [_packing(f) for f in branches]
        out = transform(which, *([made] if several else made), *operands, **options)
        return _unpacked(out, lambda p: merge(p.graphdef, p.state))

    return _or_as_values(transform, again)


def _packing(f: Any) -> Callable[..., Any]:
    @functools.wraps(f)
    def branch(*args: Any) -> Any:
        known = _objects(args)

        def pack(root: Any) -> Any:
            return _pack(root) if known.isdisjoint(_objects(root)) else root

        return replace_roots(f(*args), pack)

    return branch


def scan_of(transform: Any) -> Any:
    """``scan`` whose step may return a new carry.

    Args:
      transform: that of Sortal.

    Returns:
      The transform.
    """

    @functools.wraps(transform)
    def taking(*args: Any, **options: Any) -> Any:
        f = args[0] if args else options.pop("f", None)
        if f is None:
            return functools.partial(taking, **options)
        made = transform(f, **options)
        in_axes = options.get("in_axes", (Carry, 0))
        at = 0 if in_axes is Carry else _carry_at(in_axes)
        out_at = _carry_at(options.get("out_axes", (Carry, 0)))

        def again(*args: Any) -> Any:
            if not isinstance(at, int):
                raise LoopError("no argument is carried")
            place = at
            carried = _Carried(args[place])

            def step(*now: Any) -> Any:
                rest: list[Any] = []

                def body(value: Any) -> Any:
                    out = f(*now[:place], value, *now[place + 1 :])
                    if out_at is None:
                        return out
                    rest.extend(out)
                    return out[out_at]

                new = carried.step(body, now[place])
                if out_at is None:
                    return new
                return (*rest[:out_at], new, *rest[out_at + 1 :])

            out = transform(step, **options)(
                *args[:place], carried.start, *args[place + 1 :]
            )
            if out_at is None:
                return carried.finish(out)
            return (*out[:out_at], carried.finish(out[out_at]), *out[out_at + 1 :])

        @functools.wraps(f)
        def call(*args: Any) -> Any:
            try:
                return made(*args)
            except LoopError as error:
                return _retried(error, again, args, {})

        return call

    return taking


def _carry_at(axes: Any) -> int | None:
    if not isinstance(axes, tuple | list):
        return None
    return next((i for i, axis in enumerate(axes) if axis is Carry), None)
