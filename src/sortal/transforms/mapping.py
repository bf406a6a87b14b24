"""vmap and shard_map over modules, by kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, Never

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import PartitionSpec

from sortal._engine.foreign import to_native
from sortal._engine.jax_compat import differs_in_vmap, varying_axes
from sortal._engine.leaves import held
from sortal._engine.schema import Schema
from sortal._engine.variable import describe
from sortal._nnx_names import refuse_unknown
from sortal.errors import ArgumentError, AxisError, listing
from sortal.policy.policy import Policy, answers
from sortal.policy.rule import format_answer
from sortal.sharding.mesh_axes import mapped_over, varying_along
from sortal.transforms._adapter.binding import BoundArguments, write_back
from sortal.transforms._adapter.decorator import NO_FUNCTION, as_decorator
from sortal.transforms._adapter.effects import Result
from sortal.transforms._adapter.functions import unbind
from sortal.transforms._adapter.lanes import Lanes, Sent, unsorted
from sortal.transforms._adapter.prefixes import (
    Spread,
    all_answers,
    alone,
    by_kind,
    given_for_objects,
    is_answer,
    per_argument,
)
from sortal.transforms._adapter.tracing import is_flat_module, run
from sortal.transforms.axes import (
    check_ranks,
    divided_alike,
    refuse_moved,
    without,
)
from sortal.transforms.axis_names import (
    NOTHING,
    Parts,
    as_parts,
    from_front,
    named,
    states_as_parts,
    states_as_wholes,
)
from sortal.transforms.dividing import refuse_specs, spec_on
from sortal.transforms.shardings import as_declared, declares
from sortal.transforms.sizes import refuse_sizes

_OF_JAX = ("axis_names", "check_vma")
_REDUCE = (
    "or declare how replicas are reduced to one: class Kind(Variable, reduce='mean'), "
    "Rule(reduce='mean') in the Policy, or metadata reduce='mean' on the Variable."
)


@as_decorator
def vmap(
    f: Any = NO_FUNCTION,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_name: Hashable | None = None,
    axis_size: int | None = None,
    spmd_axis_name: Any = None,
    transform_metadata: Mapping[str, Any] = NOTHING,
    **_unknown: Never,
) -> Any:
    """``jax.vmap`` for functions of modules, with an axis for each kind.

    Reading a leaf of axis None is free: all replicas share it. Writing one is refused
    where the values written differ between replicas, unless its kind, its Variable or
    the Policy declares how to ``reduce`` them. Modules that the function makes and
    returns come out stacked; what it adds to a module comes out with the axis of its
    kind.

    Args:
      f: the function; without it a decorator is returned.
      in_axes: an int, None, ``StateAxes``, ``Policy``, or a tuple with one of these, or
        a tree of these, for each positional argument. Keyword arguments and the modules
        in them are mapped over axis 0, as in JAX.
      out_axes: likewise for what is returned. A module that was passed in comes back
        as itself, and cannot be given another axis.
      axis_name: see ``jax.vmap``.
      axis_size: see ``jax.vmap``; needed where no argument has an axis.
      spmd_axis_name: see ``jax.vmap``.
      transform_metadata: ``{nnx.PARTITION_NAME: name}`` names the axis that ``f`` does
        not see: the names of axes in a Variable's metadata lack it inside, and those of
        new Variables get it.

    Returns:
      The function, or the decorator.

    Raises:
      ArgumentError: an unknown keyword; or, at a call, ``in_axes`` or ``out_axes`` are
        built differently from the arguments or the output.
      AxisError: at a call: a shared leaf is written with values that differ, a leaf has
        no such axis, a mean of integers is declared, or arguments that share a Variable
        give it two axes. All are listed and nothing is changed.
      PolicyError: at a call: a leaf has no answer.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> @nnx.vmap
      ... def ensemble(key):
      ...     return nnx.Linear(2, 3, rngs=nnx.Rngs(key))
      >>> import jax
      >>> models = ensemble(jax.random.split(jax.random.key(0), 5))
      >>> models.kernel.shape
      (5, 2, 3)
      >>> nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(models, jnp.ones(2)).shape
      (5, 3)
    """
    refuse_unknown("vmap", _unknown)
    in_axes, out_axes = to_native((in_axes, out_axes))
    fn, first = unbind(f)

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = BoundArguments((*first, *args), kwargs)
        prefixes = (*(None for _ in first), *per_argument("in_axes", in_axes, args))
        spread = Spread(bound, prefixes, dict.fromkeys(kwargs, 0), "axis")
        check_ranks(spread)
        call = _Vmapped(fn, spread, out_axes)
        call.names, call.entry = transform_metadata, spmd_axis_name
        mapped = jax.vmap(
            call,
            in_axes=(spread.args, spread.kwargs),
            out_axes=call.out_prefix,
            axis_name=axis_name,
            axis_size=axis_size,
            spmd_axis_name=spmd_axis_name,
        )
        given = bound.args, bound.kwargs
        try:
            sorted_out = mapped(*given)
        except ValueError as error:
            refuse_sizes(spread, error)
            given = divided_alike(given, spread.of_leaf)
            if given is None:
                raise
            sorted_out = mapped(*given)
        return write_back(bound, as_declared(unsorted(*sorted_out), given))

    return wrapper


@as_decorator
def shard_map(
    f: Any = NO_FUNCTION,
    *,
    mesh: Any = None,
    in_specs: Any,
    out_specs: Any,
    **options: Any,
) -> Any:
    """``jax.shard_map`` for functions of modules, with a spec for each kind.

    A leaf of spec ``P()`` is shared by all devices. Where the function writes values to
    it that differ between them, they are reduced as its kind, its Variable or the
    Policy declares, with a collective; without such a declaration the write is refused.
    As in JAX, the gradient by a shared leaf is inside the sum over the devices.

    Args:
      f: the function of one shard; without it a decorator is returned.
      mesh: the mesh; the one of the context if absent.
      in_specs: a ``PartitionSpec``, ``StateSharding``, ``Policy``, or a tuple with one
        of these, or a tree of these, for each positional argument. Specs by kind may be
        functions of a leaf's shape and the mesh; leaves that nothing speaks of lie
        where ``shard`` put them.
      out_specs: likewise for what is returned. A module that was passed in comes back
        as itself, whatever stands here.
      **options: ``axis_names`` and ``check_vma`` of ``jax.shard_map``. With
        ``check_vma=False`` JAX does not know which values differ: a declared reduction
        is then always done, and an undeclared one is not noticed.

    Returns:
      The function, or the decorator.

    Raises:
      ArgumentError: an unknown keyword, keyword arguments at a call, or specs that are
        built differently from the arguments or the output.
      AxisError: at a call: a shared leaf is written with values that differ, a mean of
        integers is declared, or arguments that share a Variable give it two specs. All
        are listed and nothing is changed.
      PolicyError: at a call: a leaf has no answer.
      ShardingError: at a call: there is no mesh, specs do not fit their arrays or the
        mesh, arrays are bound to other devices, or on a mesh of Explicit axes they lie
        otherwise. All are listed.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> import sortal as nnx
      >>> auto = (jax.sharding.AxisType.Auto,)
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=auto)
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> @nnx.jit
      ... @nnx.shard_map(mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
      ... def forward(model, x):
      ...     return model(x)
      >>> forward(model, jnp.ones((4, 2))).shape
      (4, 3)
    """
    refuse_unknown("shard_map", options, _OF_JAX)
    in_specs, out_specs = to_native((in_specs, out_specs))
    fn, first = unbind(f)

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        refuse_keywords("shard_map", kwargs)
        bound = BoundArguments((*first, *args), {})
        given = per_argument("in_specs", in_specs, args)
        prefixes = (*(PartitionSpec() for _ in first), *given)
        spread = Spread(bound, prefixes, {}, "spec", spec_on(mesh))
        call = _Sharded(fn, spread, out_specs)
        call.checked = options.get("check_vma", True)
        mapped = jax.shard_map(
            call,
            mesh=mesh,
            in_specs=(spread.args, {}),
            out_specs=call.out_prefix,
            **options,
        )
        try:
            sorted_out = mapped(bound.args, {})
        except ValueError as error:
            refuse_specs(spread, mesh, options.get("axis_names"), error)
            raise
        return write_back(bound, as_declared(unsorted(*sorted_out), bound.args))

    return wrapper


def refuse_keywords(name: str, kwargs: Mapping[str, Any]) -> None:
    """Refuses keyword arguments of a call.

    Args:
      name: the transform, for the message.
      kwargs: what was given by keyword.

    Raises:
      ArgumentError: something was.
    """
    if kwargs:
        raise ArgumentError(
            f"{name} takes arguments by position; found {', '.join(kwargs)}."
        )


class _Leaf(NamedTuple):
    """A leaf that a function wrote or made, with a Schema of it alone."""

    value: Any
    answer: Any
    one: Schema
    seen: Callable[[], Any]
    given: Any

    @property
    def name(self) -> str:
        """Path and kind."""
        return self.one.describe(0)

    @property
    def how(self) -> Any:
        """The reduction declared, or None."""
        policy = self.given if isinstance(self.given, Policy) else None
        return answers("reduce", self.one, policy, self.seen, None)[0]


class _Fault(NamedTuple):
    """What leaves are refused for, and what to write instead."""

    found: str
    remedy: str


class _Refused:
    """The leaves that one call refuses."""

    def __init__(self, title: str):
        self._rows: dict[_Fault, list[str]] = {}
        self._rounded = _Fault(
            f"{title}: replicas wrote integers that differ and are to be reduced "
            "by reduce='mean'; a mean of integers would be rounded:",
            "Declare reduce='sum', 'max', 'min' or a function.",
        )

    def note(self, what: _Fault, row: str) -> None:
        """Adds a leaf."""
        rows = self._rows.setdefault(what, [])
        # A raw array that was written while the structure changed comes twice.
        if row not in rows:
            rows.append(row)

    def has_mean(self, leaf: _Leaf) -> bool:
        """Adds a leaf of integers, which have no mean; whether it has one."""
        bad = [
            x
            for x in jax.tree.leaves(leaf.value)
            if not jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        ]
        for x in bad:
            self.note(self._rounded, f"{leaf.name}: {describe(x)}")
        return not bad

    def check(self) -> None:
        """Raises an AxisError that lists all leaves, if there are any."""
        if self._rows:
            raise AxisError(
                "\n".join(
                    f"{found}\n{listing(rows)}\n{remedy}"
                    for (found, remedy), rows in self._rows.items()
                )
            )


class _Call:
    """A function on its way through a map: what leaves it is sorted by answer."""

    name = title = expected = ""
    always: tuple[Any, ...] = ()
    names: Mapping[str, Any] = NOTHING
    entry: Any = None

    def __init__(self, fn: Callable[..., Any], spread: Spread, out_given: Any):
        self.fn, self.spread, self.out_given = fn, spread, out_given
        # JAX's messages call this what the user calls the function.
        self.__name__ = self.__qualname__ = getattr(fn, "__qualname__", repr(fn))
        self._check_answers()
        found = [*self.always, *(a for root in spread.roots for a in root)]
        found += self._declared(out_given)
        for given in spread.given:
            found += self._declared(given)
        # A Policy may have rows for leaves that are not here, meant for a loop.
        self.lanes = Lanes(filter(self.fits, found))
        plain = jtu.tree_map(
            lambda x: self.always[0] if by_kind(x) else spread.read(x),
            out_given,
            is_leaf=is_answer,
        )
        self.out_prefix = (plain, list(self.lanes.answers), self.always[0])

    def fits(self, answer: Any) -> bool:
        """Whether JAX would take the answer."""
        raise NotImplementedError

    def inside(self, given: Any) -> tuple[Any, Parts, bool]:
        """The arguments as they are inside, and whether specs in them are of wholes."""
        raise NotImplementedError

    def _check_answers(self) -> None:
        spread = self.spread
        plain = jtu.tree_leaves((spread.args, spread.kwargs), is_leaf=is_flat_module)
        bad = [
            f"{plan.graphdef.schema.describe(j)}: {format_answer(self.name, answer)}"
            for plan, root in zip(spread.bound.plans, spread.roots, strict=True)
            for j, answer in enumerate(root)
            if not self.fits(answer)
        ]
        bad += [
            f"an array or State: {format_answer(self.name, x)}"
            for x in plain
            if not is_flat_module(x) and not self.fits(x)
        ]
        if bad:
            raise AxisError(f"{self.title}: {self.expected}; found:\n{listing(bad)}")

    def _declared(self, given: Any) -> list[Any]:
        return list(map(self.spread.read, all_answers(given, self.name)))

    def __call__(self, args: Any, kwargs: Any) -> Any:
        (args, kwargs), parts, declared = self.inside((args, kwargs))
        with mapped_over(declared):
            result = run(self.fn, args, kwargs)
        result.effects = parts.restored(result.effects, self.names)
        self.check_returned(result)
        refused = _Refused(self.title)
        fresh = list(self._fresh(result))
        leaves = [*self._written(result), *fresh]
        sent = [self.send(leaf, refused) for leaf in leaves]
        refused.check()
        new = [
            from_front(x.answer, x.value) if isinstance(x.answer, int) else None
            for x in fresh
        ]
        result.effects = named(result.effects, new, self.names, self.entry)
        result.out = self.outside(result.out)
        return self.lanes.sort(result, sent)

    def check_returned(self, result: Result) -> None:
        """Refuses answers for objects that were passed in, where they would move."""

    def outside(self, out: Any) -> Any:
        """What is returned, as it is outside."""
        return out

    def _written(self, result: Result) -> Iterator[_Leaf]:
        spread = self.spread
        for k, value in zip(result.effects.written, result.values, strict=True):
            live = spread.bound.live_leaf(k)
            seen = held(live)
            one = spread.bound.alias_map.graphdef.schema.pick([k])
            given = spread.given[spread.bound.alias_map.leaf_at[k][0]]
            view = functools.partial(list, (seen,))
            yield _Leaf(value, spread.of_leaf(k), one, view, given)

    def _fresh(self, result: Result) -> Iterator[_Leaf]:
        outs = given_for_objects(self.out_given, result.out)
        new = self.spread.new_leaves(result.effects, outs, result.fresh)
        for (one, given, answer), value in zip(new, result.fresh, strict=True):
            yield _Leaf(value, answer, one, alone(one, value), given)

    def send(self, leaf: _Leaf, refused: _Refused) -> Sent:
        """How a value leaves; what cannot is noted."""
        raise NotImplementedError


_ALIKE = (None, "mean", "max", "min")
"""The reductions that leave what all replicas agree on as it is."""


class _Vmapped(_Call):
    name, title = "axis", "vmap"
    expected = "an axis is an int or None"
    always = (None, 0)

    def fits(self, answer: Any) -> bool:
        return answer is None or type(answer) is int

    def inside(self, given: Any) -> tuple[Any, Parts, bool]:
        axes = self.spread.args, self.spread.kwargs
        given, of_wholes = states_as_parts(given, axes, self.names)
        given, parts = as_parts(given, self.spread.of_leaf, self.names)
        return given, parts, parts.of_wholes or of_wholes

    def check_returned(self, result: Result) -> None:
        refuse_moved(self.spread, self.out_given, result)

    def outside(self, out: Any) -> Any:
        return states_as_wholes(out, self.out_given, self.names, self.entry)

    def send(self, leaf: _Leaf, refused: _Refused) -> Sent:
        value, axis = leaf.value, leaf.answer
        if not self.fits(axis):
            refused.note(_NO_AXIS, f"{leaf.name}: {axis!r}")
            return Sent(0, value)
        if axis is not None:
            for x in without(axis, value, 1):
                row = f"{leaf.name}: {describe(x)} has no axis {axis} once stacked"
                refused.note(_CANNOT_STACK, row)
            if axis in self.lanes.answers:
                return Sent(axis, value)
            return Sent(0, value, functools.partial(_move, axis))
        how = leaf.how
        differs = any(map(differs_in_vmap, jax.tree.leaves(value)))
        if not differs and how in _ALIKE:
            return Sent(None, value)
        if how is None:
            refused.note(_NOT_SHARED, f"{leaf.name}: {describe(value)}")
        elif how != "mean" or refused.has_mean(leaf):
            return Sent(0, value, functools.partial(_reduced, how))
        return Sent(0, value)


_NOT_SHARED = _Fault(
    "vmap: all replicas share leaves of axis None, but these were written with values "
    "that differ between replicas:",
    f"Give the kind an axis, as in StateAxes({{Kind: 0, ...: None}}), {_REDUCE}",
)
_NO_AXIS = _Fault(
    "vmap: leaves that came into being inside have no axis to be stacked along, which "
    "is an int or None:",
    "Give the kind an axis, as in StateAxes({Kind: 0, ...: None}).",
)
_CANNOT_STACK = _Fault(
    "vmap: values of replicas cannot be stacked along the axis given:",
    "Give these leaves an axis that they have, as in StateAxes({Kind: 0, ...: 1}).",
)


def _move(axis: int, value: Any) -> Any:
    return jnp.moveaxis(value, 0, axis)


def _reduced(how: Any, stacked: Any) -> Any:
    if callable(how):
        return how(stacked)
    by = {"mean": jnp.mean, "sum": jnp.sum, "max": jnp.max, "min": jnp.min}
    return by[how](stacked, axis=0).astype(stacked.dtype)


class _Sharded(_Call):
    name, title = "spec", "shard_map"
    expected = "a spec is a PartitionSpec, a Sharding or None"
    checked = True
    always = (PartitionSpec(),)

    def __init__(self, fn: Callable[..., Any], spread: Spread, out_given: Any):
        super().__init__(fn, spread, out_given)
        # Axes of a shard_map round this one are its own matter.
        self.outer = _manual_axes()

    def fits(self, answer: Any) -> bool:
        return isinstance(answer, PartitionSpec)

    def inside(self, given: Any) -> tuple[Any, Parts, bool]:
        return given, Parts(), declares(given)

    def send(self, leaf: _Leaf, refused: _Refused) -> Sent:
        value, spec = leaf.value, leaf.answer
        if spec not in self.lanes.answers:
            refused.note(_NO_LANE, f"{leaf.name}: {format_answer('spec', spec)}")
            return Sent(self.lanes.answers[0], value)
        if any(np.ndim(x) < len(spec) for x in jax.tree.leaves(value)):
            row = (
                f"{leaf.name} of spec {format_answer('spec', spec)}: {describe(value)}"
            )
            refused.note(_TOO_SHORT, row)
        how = leaf.how
        differing = {a for x in jax.tree.leaves(value) for a in varying_axes(x)}
        hidden = _manual_axes() - self.outer - _mentioned(spec)
        axes = ", ".join(sorted(differing & hidden))
        if self.checked and how in _ALIKE:
            hidden = hidden & differing
        if how is None and axes:
            refused.note(
                _NOT_SHARED_BY_DEVICES,
                f"{leaf.name} of spec {format_answer('spec', spec)}: {describe(value)} "
                f"differs along {axes}",
            )
        elif how is not None and hidden and (how != "mean" or refused.has_mean(leaf)):
            collect = functools.partial(_collect, how, tuple(sorted(hidden)))
            value = jax.tree.map(collect, value)
        return Sent(spec, value)


_NOT_SHARED_BY_DEVICES = _Fault(
    "shard_map: these leaves were written with values that differ between devices "
    "that are to share them:",
    "Give the kind a spec, as in StateSharding({Kind: P('data'), ...: P()}), "
    + _REDUCE,
)
_TOO_SHORT = _Fault(
    "shard_map: these leaves were written with values of fewer axes than their spec "
    "has entries:",
    "Write values that have an axis for each entry, or give the kind a shorter spec.",
)
_NO_LANE = _Fault(
    "shard_map must know all specs before the function runs, but these leaves came "
    "into being inside, and neither in_specs nor out_specs mention the spec that they "
    "declare:",
    "Give their kind a row, as in StateSharding({Kind: P('data'), ...: P()}).",
)


def _manual_axes() -> frozenset[Any]:
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def _mentioned(spec: Any) -> frozenset[Any]:
    return frozenset(
        axis
        for entry in spec
        for axis in (entry if isinstance(entry, tuple) else (entry,))
    )


def _collect(how: Any, axes: tuple[str, ...], value: Any) -> Any:
    value = varying_along(frozenset(axes), value)
    if callable(how):
        # All devices compute the same; the maximum, which complex numbers do not have
        # on every platform, only tells JAX so.
        one: Any = how(jax.lax.all_gather(value, axes))
        if not jnp.iscomplexobj(one):
            return jax.lax.pmax(one, axes)
        return jax.lax.complex(*jax.lax.pmax((one.real, one.imag), axes))
    collectives = {
        "mean": jax.lax.pmean,
        "sum": jax.lax.psum,
        "max": jax.lax.pmax,
        "min": jax.lax.pmin,
    }
    return collectives[how](value, axes)
