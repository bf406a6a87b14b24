"""Loops and branches whose functions hand back new objects, as in NNX.

``sortal``'s loops carry the live objects, and refuse a step that returns others. NNX
code may be written as for JAX: each step returns modules that it has made, of the
structure of those that it was given. Where a loop is refused, it is tried here once
more, with what is carried as values.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.tree_util as jtu

from sortal._engine.nodes import is_root
from sortal.errors import LoopError
from sortal.functional import iter_graph, merge, split, update
from sortal.transforms._adapter.effects import has_identity, rigid_leaves
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
        found.update(id(x) for _, x in iter_graph(root) if is_root(x))
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
        objects = [_objects(root) for root in self.roots]
        if not objects or len(set().union(*objects)) < sum(map(len, objects)):
            raise LoopError("there are no objects, or they share some")
        self.same: list[int | None] = []

    def load(self, tree: Any) -> Any:
        """The value with objects in it."""
        return _unpacked(tree, lambda p: merge(p.graphdef, p.state))

    def step(self, body: Callable[[Any], Any], tree: Any) -> Any:
        """One step; objects that it is given it must hand back, or leave alone."""
        given: list[Any] = []
        value = replace_roots(self.load(tree), lambda x: given.append(x) or x)
        before, parts = list(map(_held, given)), list(map(_parts, given))
        out = body(value)
        self.same = []
        known = _objects(given)

        def pack(root: Any) -> Any:
            at = [i for i, x in enumerate(given) if x is root]
            if not at and not known.isdisjoint(_objects(root)):
                raise LoopError("a new object holds some that were given")
            self.same.append(at[0] if at else None)
            return _pack(root)

        packed = replace_roots(out, pack)
        for i, (x, (old, fixed)) in enumerate(zip(given, before, strict=True)):
            now, in_tuples = _held(x)
            if i not in self.same and not _same(old, now):
                raise LoopError("a step writes to an object that it does not hand back")
            if not _same(fixed, in_tuples):
                raise LoopError("a step changes an array in a tuple")
            if i in self.same and not _same(parts[i], _parts(x)):
                raise LoopError("a step replaces part of an object")
        return packed

    def finish(self, tree: Any) -> Any:
        """The last value: live objects that were handed back, and new ones."""
        same = iter(self.same)

        def unpack(p: _Packed) -> Any:
            i = next(same, None)
            if i is None:
                return merge(p.graphdef, p.state)
            update(self.roots[i], p.state)
            return self.roots[i]

        return _unpacked(tree, unpack)


def _parts(root: Any) -> list[Any]:
    """All that has an identity in an object, in order."""
    return [x for _, x in iter_graph(root) if has_identity(x)]


def _same(old: list[Any], new: list[Any]) -> bool:
    return len(old) == len(new) and all(map(operator.is_, old, new))


def _held(x: Any) -> tuple[list[Any], list[Any]]:
    """All arrays, and the raw ones in tuples, which ``update`` cannot write."""
    graphdef, state = split(x)
    values = state.values_list()
    fixed = [values[k] for k in sorted(rigid_leaves(graphdef))]
    return jax.tree.leaves(values), fixed


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
