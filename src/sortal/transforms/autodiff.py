"""grad and value_and_grad over modules, by kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Never

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from sortal._engine.foreign import to_native
from sortal._engine.paths import PathKey
from sortal._engine.plan import Plan
from sortal._engine.schema import Schema, path_hints, select
from sortal._engine.state import snapshot
from sortal._engine.variable import Param, describe, is_variable
from sortal._nnx_names import refuse_unknown
from sortal.errors import ArgumentError, FilterError, GradientError, listing
from sortal.filters import to_filter
from sortal.transforms._adapter.binding import BoundArguments, identity, write_back
from sortal.transforms._adapter.decorator import NO_FUNCTION, as_decorator
from sortal.transforms._adapter.effects import Result
from sortal.transforms._adapter.functions import unbind
from sortal.transforms._adapter.tracing import find_flat_modules, is_flat_module, run


class DiffState(NamedTuple):
    """An argument to differentiate by, with a filter of its own.

    Args:
      argnum: the argument's position.
      filter: which of its leaves.

    Example:
      >>> import sortal as nnx
      >>> nnx.DiffState(0, nnx.Param).argnum
      0
    """

    argnum: int
    filter: Any


@as_decorator
def grad(f: Any = NO_FUNCTION, argnums: Any = 0, **options: Any) -> Any:
    """The gradient of a scalar function of modules, as a State of the same paths.

    Args:
      f: the function; without it a decorator is returned.
      argnums: the position to differentiate by, a ``DiffState``, or a tuple of these.
      **options: ``has_aux``, ``wrt`` and the others of ``value_and_grad``.

    Returns:
      A function that returns the gradient; or ``(gradient, aux)``.

    Raises:
      FilterError: at a call: ``wrt`` takes no leaf of a module.
      GradientError: at a call: a leaf chosen, or an array to differentiate by, is not
        of a floating or complex dtype; or the loss is no such number.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> grads = nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model)
      >>> grads["kernel"].value.tolist()
      [[1.0], [1.0]]
    """
    both = value_and_grad(f, argnums, **options)

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if options.get("has_aux") else grads

    return wrapper


@as_decorator
def value_and_grad(
    f: Any = NO_FUNCTION,
    argnums: Any = 0,
    *,
    has_aux: bool = False,
    wrt: Any = Param,
    holomorphic: bool = False,
    allow_int: bool = False,
    allow_empty: bool = False,
    **_unknown: Never,
) -> Any:
    """The value and gradient of a scalar function of modules.

    The gradient by a module is a State with the paths and kinds of the leaves that
    ``wrt`` takes; by anything else, what ``jax.grad`` gives. A Variable that several
    of them share has its gradient in the first one's State. Leaves that the function
    changes, such as batch statistics, are changed in the live modules afterwards.

    Args:
      f: the function; it returns a scalar, or a pair of a scalar and anything else.
        Without it a decorator is returned.
      argnums: the position to differentiate by, a ``DiffState``, or a tuple of these.
      has_aux: whether ``f`` returns a pair.
      wrt: a filter that says which leaves of modules to differentiate by.
      holomorphic: see ``jax.grad``.
      allow_int: see ``jax.grad``; leaves of integer dtype are then allowed.
      allow_empty: whether the gradient by a module of which ``wrt`` takes no leaf is an
        empty State; it is an error otherwise.

    Returns:
      A function that returns ``(value, gradient)``, or ``((value, aux), gradient)``.

    Raises:
      ArgumentError: ``argnums`` is malformed; or, at a call, out of range.
      FilterError: at a call: ``wrt`` takes no leaf of a module.
      GradientError: at a call: a leaf chosen, or an array to differentiate by, is not
        of a floating or complex dtype; or the loss is no such number.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> loss = lambda m: (m(jnp.zeros((1, 2))) ** 2).sum()
      >>> value, grads = nnx.value_and_grad(loss)(model)
      >>> float(value)
      0.0
    """
    refuse_unknown("value_and_grad", _unknown)
    wanted = [_read(a, wrt) for a in (argnums if _several(argnums) else (argnums,))]
    fn, first = unbind(f)

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = BoundArguments((*first, *args), kwargs)
        chosen = [_resolve(d, len(bound.args), f) for d in wanted]
        call = FlatCall(bound, chosen, allow_int=allow_int)
        if not allow_empty:
            call.refuse_untaken(each=True)
        if not allow_int:
            _refuse_integers(call, chosen)
        with_loss = with_aux(fn, has_aux, "loss")

        def paired(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            value, aux = with_loss(*args, **kwargs)
            _check_loss(value)
            return value, aux

        def pure(inputs: list[Any]) -> tuple[Any, Any]:
            result = call.run(paired, inputs)
            value, result.out = result.out
            return value, result

        (value, rest), grads = jax.value_and_grad(
            pure, has_aux=True, holomorphic=holomorphic, allow_int=allow_int
        )(call.inputs)
        aux = write_back(bound, rest)
        found = call.chosen.gradients(grads)
        value = (value, aux) if has_aux else value
        return value, tuple(found) if _several(argnums) else found[0]

    return wrapper


def _refuse_integers(call: FlatCall, chosen: list[DiffState]) -> None:
    bad = [
        f"argument {diff.argnum}{jtu.keystr(path)}: {describe(call.leaves[k])}"
        for diff, layout in zip(chosen, call.chosen.layouts, strict=True)
        for path, k in jtu.tree_leaves_with_path(layout, is_leaf=_is_taken)
        if not _is_taken(k) and not differentiable(call.leaves[k])
    ]
    if bad:
        raise GradientError(
            "only models and floating-point arrays can be differentiated by; found:\n"
            f"{listing(bad)}\nPut the model first, or say with argnums= where it is."
        )


def _several(argnums: Any) -> bool:
    return isinstance(argnums, (tuple, list)) and not isinstance(argnums, DiffState)


def _read(argnum: Any, wrt: Any) -> DiffState:
    if not isinstance(argnum, DiffState):
        argnum = to_native(argnum)
    if isinstance(argnum, DiffState):
        return DiffState(argnum.argnum, to_filter(argnum.filter))
    if isinstance(argnum, int) and not isinstance(argnum, bool):
        return DiffState(argnum, to_filter(wrt))
    raise ArgumentError(
        "argnums must be an int, a DiffState(int, filter), or a tuple of these; found "
        f"{argnum!r}."
    )


def _resolve(diff: DiffState, n: int, f: Any) -> DiffState:
    at = diff.argnum + n if diff.argnum < 0 else diff.argnum
    if not 0 <= at < n:
        raise ArgumentError(
            f"argnums={diff.argnum}, but {getattr(f, '__name__', f)} was called with "
            f"{n} positional arguments. Pass what to differentiate by position."
        )
    return DiffState(at, diff.filter)


class Taken:
    """Stands in an argument for a module: the leaves taken, by their numbers."""

    __slots__ = ("at", "schema")

    def __init__(self, schema: Any, at: list[Any]):
        self.schema, self.at = schema, at


def _is_taken(x: Any) -> bool:
    return isinstance(x, Taken)


class Chosen:
    """What is differentiated by, as a flat list and as one tree for each argument.

    Args:
      layouts: for each argument a tree of numbers, with a Taken for each module.
      leaves: the call's leaves, which the numbers are about.
    """

    __slots__ = ("layouts", "order", "types")

    def __init__(self, layouts: list[Any], leaves: list[Any]):
        self.layouts = layouts
        every = jtu.tree_map(
            lambda x: x.at if _is_taken(x) else x, layouts, is_leaf=_is_taken
        )
        self.order: list[int] = sorted(set(jtu.tree_leaves(every)))
        self.types = {k: tangent_type(leaves[k]) for k in self.order}

    def trees(self, flat: Sequence[Any]) -> list[Any]:
        """One tree for each argument, with a State for each module in it."""
        return self._filled(flat, lambda taken: range(len(taken.at)))

    def gradients(self, flat: Sequence[Any]) -> list[Any]:
        """As ``trees``, with what several modules share in the first one's State.

        Given to an optimizer for each of them, it would be stepped along twice.
        """
        seen: set[int] = set()

        def first(taken: Taken) -> list[int]:
            numbers = [jtu.tree_leaves(tree) for tree in taken.at]
            mine = [i for i, own in enumerate(numbers) if seen.isdisjoint(own)]
            seen.update(*numbers)
            return mine

        return self._filled(flat, first)

    def _filled(self, flat: Sequence[Any], places: Callable[..., Any]) -> list[Any]:
        given = dict(zip(self.order, flat, strict=True))

        def fill(x: Any) -> Any:
            if not _is_taken(x):
                return given[x]
            mine = places(x)
            whole = len(mine) == len(x.at)
            values = [jtu.tree_map(given.__getitem__, x.at[i]) for i in mine]
            return snapshot(x.schema if whole else x.schema.pick(mine), values)

        return [jtu.tree_map(fill, t, is_leaf=_is_taken) for t in self.layouts]


class FlatCall:
    """The arguments of one call as a flat list of leaves, some of them chosen.

    It makes a function of live objects a pure function of the chosen leaves: ``run``
    puts other values in their place. Variables that arguments share have one number.

    Args:
      bound: the arguments.
      chosen: positions of arguments, and which leaves of modules in them.
      allow_int: whether leaves that are not floating or complex may be chosen.

    Raises:
      FilterError: a filter is malformed.
      GradientError: a filter takes leaves that cannot be differentiated.
    """

    def __init__(
        self,
        bound: BoundArguments,
        chosen: Sequence[DiffState],
        *,
        allow_int: bool = False,
    ):
        self.allow_int = allow_int
        self.leaves, self.treedef = jtu.tree_flatten((bound.args, bound.kwargs))
        numbers = self.treedef.unflatten(range(len(self.leaves)))
        self.numbers: tuple[Any, ...] = numbers[0]
        at = {
            identity(bound.live_leaf(k)): at
            for c in find_flat_modules(numbers)
            for k, at in zip(c.definition.leaves, c.values, strict=True)
        }
        self.taken: list[tuple[DiffState, Schema, bool]] = []
        layouts = [self._layout(diff, bound.plans, at) for diff in chosen]
        self._refuse_others(layouts, [diff.argnum for diff in chosen])
        self.chosen = Chosen(layouts, self.leaves)

    @property
    def inputs(self) -> list[Any]:
        """The chosen leaves."""
        return [self.leaves[k] for k in self.chosen.order]

    def _layout(
        self, diff: DiffState, plans: Sequence[Plan], numbers: dict[Any, int]
    ) -> Any:
        def take(keys: tuple[Any, ...], x: Any) -> Any:
            if not is_flat_module(x):
                return x
            return self._take(plans[x.definition.number], numbers, diff, keys)

        return jtu.tree_map_with_path(
            take, self.numbers[diff.argnum], is_leaf=is_flat_module
        )

    def _take(
        self,
        plan: Plan,
        numbers: dict[Any, int],
        diff: DiffState,
        keys: tuple[Any, ...],
    ) -> Taken:
        whole = plan.graphdef.schema
        if keys:
            # A container of modules is a model: filters see paths from it.
            whole = whole.memo(("at", keys), lambda: _moved(whole, keys))
            found = select(whole, (diff.filter,), plan.view)
        else:
            found, _ = plan.pick((diff.filter,))
        schema, mine = found.parts[0]
        self.taken.append((diff, whole, bool(mine)))
        values = plan.values()
        bad = [
            f"{schema.describe(i)}: {describe(values[j])}"
            for i, j in enumerate(mine)
            if not self.allow_int and not differentiable(values[j])
        ]
        if bad:
            raise GradientError(
                f"wrt={diff.filter!r} takes leaves that cannot be differentiated:\n"
                f"{listing(bad)}\nGive them another kind than Param, or narrow wrt."
            )
        own = plan.graphdef.schema.pick(mine) if keys else schema
        return Taken(own, [numbers[identity(plan.leaves[j])] for j in mine])

    def _refuse_others(self, layouts: list[Any], argnums: list[int]) -> None:
        bad = [
            f"argument {argnum}{jtu.keystr(path)}: {describe(self.leaves[k])}"
            for argnum, layout in zip(argnums, layouts, strict=True)
            for path, k in jtu.tree_leaves_with_path(layout, is_leaf=_is_taken)
            if not _is_taken(k) and not _is_number(self.leaves[k])
        ]
        if bad:
            raise GradientError(
                "only arrays and numbers can be differentiated by; found:\n"
                f"{listing(bad)}\nLet the function close over the rest."
            )

    def refuse_untaken(self, *, each: bool) -> None:
        """Refuses filters that take nothing: of any argument, or of all together.

        Args:
          each: whether every argument with modules must have a leaf that is taken, or
            just one.

        Raises:
          FilterError: the leaves that there are instead are listed.
        """
        taking = {diff.argnum for diff, _, some in self.taken if some}
        without = [(d, s) for d, s, _ in self.taken if d.argnum not in taking]
        if not without or (taking and not each):
            return
        diff, _ = without[0]
        those = [(d, s) for d, s in without if not each or d.argnum == diff.argnum]
        rows = {
            f"{d.argnum}: {schema.describe(i)}": schema.describe(i)
            for d, schema in those
            for i in range(len(schema))
        }
        hints = dict.fromkeys(path_hints(schema, (d.filter,)) for d, schema in those)
        of = f"argument {diff.argnum}" if each else "the modules among the primals"
        raise FilterError(
            f"wrt={diff.filter!r} takes none of the {len(rows)} leaves of {of}, so "
            f"there is no {'gradient' if each else 'derivative'}; it has:\n"
            + listing(rows.values() if each else rows)
            + "".join(hints)
        )

    def run(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Any],
        rest: Mapping[int, Any] = MappingProxyType({}),
    ) -> Result:
        """Calls ``fn`` with other values for some leaves; see ``tracing.run``.

        Args:
          fn: a function of the arguments.
          inputs: the chosen leaves.
          rest: others, by their numbers.

        Returns:
          The Result.
        """
        leaves = list(self.leaves)
        for k, x in [*zip(self.chosen.order, inputs, strict=True), *rest.items()]:
            leaves[k] = x
        args, kwargs = self.treedef.unflatten(leaves)
        return run(fn, args, kwargs)


def _moved(schema: Schema, keys: tuple[Any, ...]) -> Schema:
    """The schema of a module as it is seen from the container that holds it."""
    at: list[Any] = []
    for key in keys:
        if isinstance(key, PathKey):
            at += key.path
        else:
            at.append(next(getattr(key, n) for n in _ENTRIES if hasattr(key, n)))
    paths = [(*at, *path) for path in schema.paths]
    return Schema.of(paths, schema.kinds, schema.metadata)


_ENTRIES = ("idx", "key", "name")


def with_aux(fn: Callable[..., Any], has_aux: bool, first: str) -> Callable[..., Any]:
    """``fn`` as a function that returns a pair whatever ``has_aux`` says.

    Args:
      fn: the function.
      has_aux: whether it returns a pair already.
      first: how to call the pair's first part in messages.

    Returns:
      A function that returns a pair; its second part is None without ``has_aux``.

    Raises:
      ArgumentError: at a call: no pair is returned where one is due.
    """

    def paired(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        out = fn(*args, **kwargs)
        if not has_aux:
            return out, None
        if not (isinstance(out, (tuple, list)) and len(out) == 2):
            raise ArgumentError(
                f"with has_aux=True the function must return ({first}, aux); found "
                f"{_named(out)}."
            )
        return out[0], out[1]

    return paired


def _check_loss(loss: Any) -> None:
    if is_variable(loss):
        raise GradientError(
            f"the loss is a {type(loss).__name__}, which is a Variable, and must be a "
            "number. Write variable[...] for its value, and .sum() or .mean() of many."
        )
    if loss is None:
        raise GradientError(
            "the function returned None, and must return the loss. Is there a `return`?"
        )
    if not _is_number(loss):
        raise GradientError(
            f"the loss must be a number; the function returned {_named(loss)}. Return "
            "the number, or (loss, anything else) with has_aux=True."
        )
    if jnp.shape(loss):
        raise GradientError(
            f"the loss must be one number; the function returned {describe(loss)}. "
            "Write loss.mean() or loss.sum()."
        )
    if not differentiable(loss):
        raise GradientError(
            f"the loss must be a floating-point number; the function returned "
            f"{describe(loss)}, which has no gradient."
        )


def _named(x: Any) -> str:
    if isinstance(x, (tuple, list)):
        return f"a {type(x).__name__} of {len(x)}"
    return describe(x) if hasattr(x, "dtype") else f"a {type(x).__name__}"


def _is_number(x: Any) -> bool:
    return hasattr(x, "dtype") or isinstance(x, (int, float, complex))


def tangent_type(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype that a derivative by ``x`` has: float0 for integers."""
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.inexact):
        dtype = jax.dtypes.float0
    return jax.ShapeDtypeStruct(jnp.shape(x), dtype)


def differentiable(value: Any) -> bool:
    """Whether all arrays in ``value`` are of floating or complex dtypes."""
    return all(
        jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        if not hasattr(x, "dtype")
        else jnp.issubdtype(x.dtype, jnp.inexact)
        for x in jax.tree.leaves(value)
    )
