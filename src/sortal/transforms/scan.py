"""scan over modules: over layers and over time, with a role for each kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Never

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from sortal._engine.foreign import is_kind, to_native
from sortal._engine.nodes import is_root
from sortal._engine.schema import Schema
from sortal._engine.variable import RngCount, describe
from sortal._nnx_names import refuse_unknown
from sortal.errors import ArgumentError, AxisError, LoopError, listing
from sortal.sharding.mesh_axes import mapped_over
from sortal.transforms._adapter.binding import write_back
from sortal.transforms._adapter.decorator import NO_FUNCTION, as_decorator
from sortal.transforms._adapter.effects import Effects, Result, resolve
from sortal.transforms._adapter.functions import unbind
from sortal.transforms._adapter.operands import (
    Operands,
    check_types,
    edited,
    only_added,
)
from sortal.transforms._adapter.prefixes import (
    Carry,
    Spread,
    given_for_objects,
    is_answer,
    of_each,
    per_argument,
)
from sortal.transforms._adapter.tracing import is_flat_module, run
from sortal.transforms.axes import came_in, check_ranks, without
from sortal.transforms.axis_names import (
    NOTHING,
    as_parts,
    from_front,
    named,
    states_as_parts,
    states_as_wholes,
)
from sortal.transforms.eager import kept
from sortal.transforms.mapping import refuse_keywords
from sortal.transforms.shardings import as_declared

_RAW = (
    " A raw array that is written beside what a step adds counts as added; hold it in "
    "a Variable."
)


@as_decorator
def scan(
    f: Any = NO_FUNCTION,
    *,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    _split_transpose: bool = False,
    in_axes: Any = (Carry, 0),
    out_axes: Any = (Carry, 0),
    transform_metadata: Mapping[str, Any] = NOTHING,
    **_unknown: Never,
) -> Any:
    """``jax.lax.scan`` for functions of modules, with a role for each kind.

    A leaf with an int axis is sliced: each step sees its own part and what it writes is
    stacked again. One with ``Carry`` goes from step to step. One with None is the same
    at each step, and cannot be written: a stream of keys gives the same keys at each
    step. Leaves that are only read are no outputs. What
    a step adds to a module, such as an Intermediate, comes out stacked where its kind
    has an int axis.

    Called eagerly, it stays compiled for the same function object, as in JAX: what
    is read besides the arguments, such as a global number, is read when it is traced.
    What closes over arrays, also those of live Variables, is traced at each call. A
    setting of an object that is closed over, and a Python or NumPy number in a Variable
    of it, are read as a global number is: pass the object as an argument.

    Args:
      f: the function of one step; without it a decorator is returned.
      length: the number of steps; needed where nothing is sliced.
      reverse: see ``jax.lax.scan``.
      unroll: see ``jax.lax.scan``.
      in_axes: for each positional argument ``Carry``, an int, None, ``StateAxes``,
        ``Policy``, or a tree of the last four. At most one argument is ``Carry``.
      out_axes: ``Carry`` for the next carry, and ints for what is stacked: one of
        these, or a tuple.
      transform_metadata: ``{nnx.PARTITION_NAME: name}`` names the axis that a step does
        not see: the names of axes in a Variable's metadata lack it inside, and those of
        new Variables get it.

    Returns:
      The function, or the decorator. The function returns what ``f`` does, with the
      last carry, and everything else stacked. A module or Variable that was passed in
      comes back as itself.

    Raises:
      ArgumentError: an unknown keyword; or, at a call, keyword arguments, axes that do
        not fit the arguments or the output, or no length.
      AxisError: at a call: a leaf of axis None is written, a leaf or an output has no
        such axis, or a step returns a Variable that is carried besides the carry.
      LoopError: at a call: a step changes structure, or the shape or dtype of what is
        carried. In all these cases the live objects are left as they were.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layers = nnx.vmap(lambda key: nnx.Linear(2, 2, rngs=nnx.Rngs(key)))(
      ...     jax.random.split(jax.random.key(0), 3)
      ... )
      >>> @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
      ... def forward(layer, x):
      ...     return layer(x)
      >>> forward(layers, jnp.ones((1, 2))).shape
      (1, 2)
    """
    refuse_unknown("scan", _unknown)
    in_axes, out_axes = to_native((in_axes, out_axes))
    options = {
        "length": length,
        "reverse": reverse,
        "unroll": unroll,
        "_split_transpose": _split_transpose,
    }
    _, first = unbind(f)
    settings = (in_axes, out_axes, dict(transform_metadata), options)

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        refuse_keywords("scan", kwargs)
        given = per_argument("in_axes", in_axes, args)
        traceable = all(map(_traceable, given, args)) and all(map(is_root, first))
        call = kept(_steps, (f,), settings) if traceable else _steps((f,), settings)
        return call(*first, *args)

    return wrapper


def _steps(functions: Sequence[Any], settings: Any) -> Callable[..., Any]:
    fn, first = unbind(functions[0])
    held = len(first)
    in_axes, out_axes, metadata, options = settings

    def steps(*args: Any) -> Any:
        given = (*[None] * held, *per_argument("in_axes", in_axes, args[held:]))
        call = _Scan(fn, Operands(args), given, out_axes, metadata)
        call.check_carried(held)
        call.check_lengths(options["length"], held)
        carry, ys = jax.lax.scan(call.step, call.start(), call.slices(), **options)
        return call.finish(carry, ys)

    return steps


def _traceable(axis: Any, arg: Any) -> bool:
    """Whether an argument may be traced: numbers that all steps share may not."""
    arrays = (jax.Array, np.ndarray)
    return axis is Carry or all(isinstance(x, arrays) for x in jax.tree.leaves(arg))


class _Scan:
    """One call of scan: what is carried, sliced and shared, by number of leaf."""

    def __init__(
        self,
        fn: Callable[..., Any],
        operands: Operands,
        given: Any,
        out_axes: Any,
        names: Mapping[str, Any],
    ):
        self.fn, self.operands, self.names = fn, operands, names
        bound = operands.bound
        self.at = _carry_place(given)
        self.out_at = _out_place(out_axes, self.at is not None)
        self.out_axes = out_axes
        self.spread = Spread(bound, given, {}, "axis")
        self.roles = [self.spread.of_leaf(k) for k in range(len(operands.values))]
        check_ranks(self.spread)
        self.plain = _plain_roles(self.spread)
        tree = None if self.at is None else bound.args[self.at]
        self.skeleton = operands.skeleton(tree)
        self.carried = [k for k, role in enumerate(self.roles) if role is Carry]
        self.mapped = [k for k, role in enumerate(self.roles) if isinstance(role, int)]
        self.effects: Effects = Effects((), (), None)
        self.written: set[int] = set()

    def _plain_rows(self, held: int) -> list[tuple[int, str, Any, Any]]:
        """For each plain leaf its argument, path, value and role."""
        each = zip(
            self.operands.plain_paths(), self.operands.plain, self.plain, strict=True
        )
        return [
            (path[0].idx, f"argument {path[0].idx - held}{jtu.keystr(path[1:])}", *rest)
            for path, *rest in each
        ]

    def check_carried(self, held: int) -> None:
        """Refuses to carry leaves of a State that is no carry: no step returns them.

        Args:
          held: how many arguments come before those that the user wrote.
        """
        bad = [
            f"{where}: {describe(x)}"
            for i, where, x, role in self._plain_rows(held)
            if role is Carry and i != self.at
        ]
        if bad:
            raise ArgumentError(
                "scan carries leaves of a model by kind, but a State only as a whole, "
                "for it is a value that a step returns; found Carry for leaves of a "
                f"State:\n{listing(bad)}\nGive the whole argument Carry, or these None "
                "or an axis; or pass the model, such as merge(graphdef, state)."
            )

    def check_lengths(self, length: int | None, held: int) -> None:
        """Refuses what is sliced into different numbers of steps, or into none.

        Args:
          length: the number of steps, where the user gave it.
          held: how many arguments come before those that the user wrote.
        """
        rows = [
            (self.operands.describe(k), x, self.roles[k])
            for k in self.mapped
            for x in jax.tree.leaves(self.operands.values[k])
        ]
        rows += [
            (where, x, role)
            for _, where, x, role in self._plain_rows(held)
            if isinstance(role, int)
        ]
        rows = [(where, np.shape(x), describe(x), axis) for where, x, axis in rows]
        bad = [
            f"{where}: {shown} has no axis {axis}"
            for where, shape, shown, axis in rows
            if not -len(shape) <= axis < len(shape)
        ]
        if bad:
            raise AxisError(
                "these do not have the axis they are to be sliced along:\n"
                f"{listing(bad)}\nGive them axis None, or Carry."
            )
        given = [] if length is None else [("length", "", length)]
        given += [
            (where, f"{shown} along axis {axis}: ", shape[axis])
            for where, shape, shown, axis in rows
        ]
        if not given:
            raise ArgumentError(
                "scan does not know how many steps to take: nothing has an int axis. "
                "Give length=."
            )
        if len({n for _, _, n in given}) > 1:
            steps = [f"{where}: {how}{n} steps" for where, how, n in given]
            raise ArgumentError(
                "scan slices everything into one number of steps; found several:\n"
                + listing(steps)
            )

    def start(self) -> Any:
        """What the first step is given to carry."""
        return self.skeleton, [self.operands.values[k] for k in self.carried]

    def slices(self) -> Any:
        """What is sliced, with the axis to slice along in front."""
        pairs = zip(self.operands.plain, self.plain, strict=True)
        plain = [_to_front(x, role) for x, role in pairs if isinstance(role, int)]
        values = self.operands.values
        return plain, [_to_front(values[k], self.roles[k]) for k in self.mapped]

    def step(self, carry: Any, xs: Any) -> Any:
        """One step, as ``jax.lax.scan`` calls it."""
        tree, carried = carry
        mine, now = iter(jax.tree.leaves(tree)), iter(xs[0])
        plain = [
            next(mine) if role is Carry else x if role is None else next(now)
            for x, role in zip(self.operands.plain, self.plain, strict=True)
        ]
        values = list(self.operands.values)
        given = [*carried, *xs[1]]
        for k, value in zip([*self.carried, *self.mapped], given, strict=True):
            values[k] = value
        args = self.operands.rebuild(plain, values)
        args, of_wholes = states_as_parts(args, self.spread.args, self.names)
        args, self.parts = as_parts(args, self.roles.__getitem__, self.names)
        with mapped_over(self.parts.of_wholes or of_wholes):
            result = run(self.fn, args, {})
        result.effects = self.parts.restored(result.effects, self.names)
        out, stacked = self._divide(result.out, result.effects)
        out = states_as_wholes(out, None, self.names)
        self._check(result, out, tree, values)
        self._refuse_unstacked(stacked, result.effects)
        stacked = states_as_wholes(stacked, self._stacked_axes(), self.names)
        self.effects = result.effects
        # Under jax.disable_jit each step is run, and they may write different leaves.
        self.written.update(result.effects.written)
        new = self.operands.written(result.effects, values, result.values)
        self.kept = [k for k in result.effects.written if self.roles[k] is not Carry]
        ys = (stacked, [new[k] for k in self.kept], result.fresh)
        carry = self.operands.same_objects(out, result.effects)
        return (carry, [new[k] for k in self.carried]), ys

    def _found(self, out: Any, effects: Effects) -> str:
        array = hasattr(out, "dtype")
        return describe(out) if array else self.operands.outline(out, effects)

    def _divide(self, out: Any, effects: Effects) -> tuple[Any, Any]:
        """The carry, and what is stacked."""
        if self.out_at is None:
            return None, out
        if self.out_at == ():
            return out, None
        if not isinstance(out, tuple) or len(out) != len(self.out_axes):
            raise ArgumentError(
                f"out_axes={self.out_axes!r} asks for a tuple of {len(self.out_axes)}; "
                f"the step of scan returned {self._found(out, effects)}."
            )
        i = self.out_at[0]
        return out[i], (*out[:i], None, *out[i + 1 :])

    def _stacked_axes(self) -> Any:
        if self.out_at is None:
            return self.out_axes
        if self.out_at == ():
            return None
        i = self.out_at[0]
        return (*self.out_axes[:i], None, *self.out_axes[i + 1 :])

    def _check(self, result: Result, out: Any, tree: Any, values: Any) -> None:
        effects, describe_leaf = result.effects, self.operands.describe
        if not only_added(self.operands, effects):
            raise LoopError(edited("the step of scan", self.operands, effects))
        shared = [
            k for k in effects.written if self.roles[k] is None and not self._counts(k)
        ]
        if shared:
            raise AxisError(
                "scan: leaves of axis None are the same at each step, but were written:"
                f"\n{listing(map(describe_leaf, shared))}\nGive them Carry, to go from "
                "step to step, or an axis, to have a part for each step, as in "
                "StateAxes({Kind: Carry, ...: None})."
            )
        outline = self.operands.outline
        found = self.operands.same_objects(out, effects)
        if jax.tree.structure(found) != jax.tree.structure(tree):
            raise LoopError(
                "the step of scan must return a carry of the same structure, with the "
                f"same objects in the same places; it was given {outline(tree)}, and "
                f"returned {outline(out, effects)}."
            )
        self.new = self._new_axes(result)
        rows = [
            (describe_leaf(k), values[k], new)
            for k, new in zip(effects.written, result.values, strict=True)
            if self.roles[k] is Carry
        ]
        olds, news = jtu.tree_leaves_with_path(tree), jax.tree.leaves(found)
        rows += [
            (f"carry{jtu.keystr(path)}", old, new)
            for (path, old), new in zip(olds, news, strict=True)
        ]
        check_types("the step of scan", rows)

    def _refuse_unstacked(self, stacked: Any, effects: Effects) -> None:
        """Refuses what is carried where the user wrote what is to be stacked."""
        rows = [
            self.operands.describe(k)
            for n in given_for_objects(self._stacked_axes(), stacked)
            for k in came_in(self.operands.bound, effects, n)
            if self.roles[k] is Carry
        ]
        if rows:
            raise AxisError(
                "scan: what goes from step to step comes back once, as it is after the "
                "last step, and is not stacked; besides the carry the step returned:\n"
                f"{listing(dict.fromkeys(rows))}\nReturn there its value at each step, "
                "variable[...], or a copy, clone(model)."
            )

    def _counts(self, k: int) -> bool:
        """Whether a leaf says how many keys a stream has given out."""
        kind = self.operands.bound.alias_map.graphdef.schema.kinds[k]
        return kind is not None and is_kind(kind, RngCount)

    def _replaced(self, one: Schema) -> bool:
        """Whether a new leaf is a raw array where there was one before."""
        schemas = [plan.graphdef.schema for plan in self.operands.bound.plans]
        at = [(s.index.get(one.paths[0]), s) for s in schemas]
        return any(k is not None and s.kinds[k] is one.kinds[0] is None for k, s in at)

    def _new_axes(self, result: Result) -> list[int]:
        """The axis of each leaf that a step makes; all must have one."""
        axes = self.out_axes if self.out_at != () else None
        self._check_out_axes(axes, result)
        outs = given_for_objects(axes, result.out)
        new = self.spread.new_leaves(result.effects, outs, result.fresh)
        bad = [
            f"{one.describe(0)} has {answer!r}"
            for one, _, answer in new
            if not isinstance(answer, int)
        ]
        if bad:
            raise LoopError(
                "a step of scan can add only what is stacked, along an int axis; it "
                f"added:\n{listing(bad)}\nGive the kind an axis, as in "
                "StateAxes({Intermediate: 0, ...: None}), or make it before."
                + _RAW
                * any(self._replaced(one) for one, _, _ in new)
            )
        pairs = list(zip(new, result.fresh, strict=True))
        rows = [(one.describe(0), answer, x) for (one, _, answer), x in pairs]
        written = zip(result.effects.written, result.values, strict=True)
        rows += [(self.operands.describe(k), self.roles[k], x) for k, x in written]
        _refuse_ranks(rows)
        return [from_front(answer, x) for (_, _, answer), x in pairs]

    def _check_out_axes(self, axes: Any, result: Result) -> None:
        """Each part of the output that is stacked must have an int axis."""
        unstacked, rows = [], []

        def note(path: Any, axis: Any, x: Any) -> None:
            rows.append((f"output{jtu.keystr(path)}", axis, x))
            if axis is None and self.out_at != () and jax.tree.leaves(x):
                unstacked.append(f"output{jtu.keystr(path)}")

        try:
            jtu.tree_map_with_path(note, axes, result.out, is_leaf=is_answer)
        except ValueError:
            raise ArgumentError(
                f"out_axes={axes!r} does not fit the output of the step of scan: "
                f"{self.operands.outline(result.out, result.effects)}."
            ) from None
        if unstacked:
            raise ArgumentError(
                f"out_axes={axes!r} gives axis None to what comes out of each step:\n"
                f"{listing(unstacked)}\nGive an int, or return it in the carry."
            )
        _refuse_ranks(rows)

    def finish(self, carry: Any, ys: Any) -> Any:
        """Brings what all steps did to the live objects; returns the output."""
        tree, carried = carry
        stacked, written, fresh = ys
        last = dict(zip(self.carried, carried, strict=True))
        for k, value in zip(self.kept, written, strict=True):
            if self.roles[k] is None:  # a count, which all steps began with
                old = self.operands.values[k]
                last[k] = jnp.maximum(old, jnp.max(value, axis=0, initial=0))
            else:
                last[k] = _from_front(value, self.roles[k])
        written = tuple(sorted(self.written))
        effects = Effects(written, self.effects.outputs, self.effects.edits)
        values = [last[k] for k in written]
        fresh = [_from_front(x, a) for x, a in zip(fresh, self.new, strict=True)]
        effects = named(effects, self.new, self.names)
        stacked = jax.tree.map(
            _from_front, stacked, of_each(self._stacked_axes(), stacked)
        )
        bound = self.operands.bound
        result = Result(effects, (stacked, values, fresh))
        out = write_back(bound, as_declared(result, bound.args))
        if self.out_at is None:
            return out
        carry = resolve(tree, bound.roots)
        if self.out_at == ():
            return carry
        i = self.out_at[0]
        return (*out[:i], carry, *out[i + 1 :])


def _carry_place(given: Any) -> int | None:
    places = [i for i, axis in enumerate(given) if axis is Carry]
    nested = [
        i
        for i, axis in enumerate(given)
        if axis is not Carry
        and any(x is Carry for x in jtu.tree_leaves(axis, is_leaf=is_answer))
    ]
    if len(places) > 1 or nested:
        raise ArgumentError(
            f"in_axes={given!r}: one whole argument at most can be Carry. Put what is "
            "carried into one tuple, or say Carry by kind: StateAxes({...: Carry})."
        )
    return places[0] if places else None


def _out_place(out_axes: Any, carries: bool) -> tuple[int, ...] | None:
    """Where the carry is in the output: () for all of it, None for nowhere."""
    leaves = jtu.tree_leaves(out_axes, is_leaf=is_answer)
    found: tuple[int, ...] | None = None
    if out_axes is Carry:
        found = ()
    elif isinstance(out_axes, tuple):
        places = tuple(i for i, axis in enumerate(out_axes) if axis is Carry)
        found = places or None
    if sum(x is Carry for x in leaves) != carries or carries != (found is not None):
        raise ArgumentError(
            f"out_axes={out_axes!r} must say Carry at one place if an argument is "
            "Carry, and only then."
        )
    return found


def _plain_roles(spread: Spread) -> list[Any]:
    """The role of each leaf that is in no Module or Variable, in order."""
    found: list[Any] = []

    def note(role: Any, subtree: Any) -> None:
        if not is_flat_module(role):
            leaves = jtu.tree_leaves(subtree, is_leaf=is_flat_module)
            found.extend([role] * sum(not is_flat_module(x) for x in leaves))

    for roles, arg in zip(spread.args, spread.bound.args, strict=True):
        jtu.tree_map(
            note,
            roles,
            arg,
            is_leaf=lambda x: is_answer(x) or is_flat_module(x),
        )
    return found


def _refuse_ranks(rows: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuses int axes that parts do not have once they are stacked."""
    bad = [
        f"{name}: {describe(x)} has no axis {axis} once stacked"
        for name, axis, part in rows
        if isinstance(axis, int)
        for x in without(axis, part, 1)
    ]
    if bad:
        raise AxisError(
            "scan: what comes out of each step cannot be stacked along the axis given:"
            f"\n{listing(bad)}\nGive these an axis that they have, as in "
            "StateAxes({Kind: 0, ...: 1})."
        )


def _to_front(value: Any, axis: int) -> Any:
    return (
        value if axis == 0 else jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), value)
    )


def _from_front(value: Any, axis: int) -> Any:
    return (
        value if axis == 0 else jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), value)
    )
