"""grad and value_and_grad over modules, by kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from sortal.errors import ArgumentError, FilterError, GradientError, listing
from sortal.filters import to_filter
from sortal.state import snapshot
from sortal.transforms.lift import Entered, identity, leave, unbind
from sortal.transforms.traced import Carrier, run
from sortal.variable import Param, describe

_NO_FUNCTION: Any = object()


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


class _Target(NamedTuple):
    """One root to differentiate by: the leaves chosen, and who owns their values."""

    schema: Any
    places: tuple[tuple[int, int], ...]


def grad(f: Any = _NO_FUNCTION, /, argnums: Any = 0, **options: Any) -> Any:
    """The gradient of a scalar function of modules, as a State of the same paths.

    Args:
      f: the function; without it a decorator is returned.
      argnums: the position to differentiate by, a ``DiffState``, or a tuple of these.
      **options: ``has_aux``, ``wrt`` and the others of ``value_and_grad``.

    Returns:
      A function that returns the gradient; or ``(gradient, aux)``.

    Raises:
      FilterError: at a call: ``wrt`` takes no leaf of a module.
      GradientError: at a call: a leaf chosen is not of a floating or complex dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> grads = nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model)
      >>> grads["kernel"].value.tolist()
      [[1.0], [1.0]]
    """
    if f is _NO_FUNCTION:
        return functools.partial(grad, argnums=argnums, **options)
    both = value_and_grad(f, argnums, **options)

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if options.get("has_aux") else grads

    return wrapper


def value_and_grad(
    f: Any = _NO_FUNCTION,
    /,
    argnums: Any = 0,
    *,
    has_aux: bool = False,
    wrt: Any = Param,
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: Sequence[Any] = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """The value and gradient of a scalar function of modules.

    The gradient by a module is a State with the paths and kinds of the leaves that
    ``wrt`` takes; by anything else, what ``jax.grad`` gives. Leaves that the function
    changes, such as batch statistics, are changed in the live modules afterwards.

    Args:
      f: the function; it returns a scalar, or a pair of a scalar and anything else.
        Without it a decorator is returned.
      argnums: the position to differentiate by, a ``DiffState``, or a tuple of these.
      has_aux: whether ``f`` returns a pair.
      wrt: a filter that says which leaves of modules to differentiate by.
      holomorphic: see ``jax.grad``.
      allow_int: see ``jax.grad``; leaves of integer dtype are then allowed.
      reduce_axes: taken for NNX code; must be empty.
      graph: taken for NNX code, of no effect.
      graph_updates: taken for NNX code, of no effect.

    Returns:
      A function that returns ``(value, gradient)``, or ``((value, aux), gradient)``.

    Raises:
      ArgumentError: ``argnums`` is malformed; or, at a call, out of range.
      FilterError: at a call: ``wrt`` takes no leaf of a module.
      GradientError: at a call: a leaf chosen is not of a floating or complex dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> loss = lambda m: (m(jnp.zeros((1, 2))) ** 2).sum()
      >>> value, grads = nnx.value_and_grad(loss)(model)
      >>> float(value)
      0.0
    """
    if f is _NO_FUNCTION:
        return functools.partial(
            value_and_grad,
            argnums=argnums,
            has_aux=has_aux,
            wrt=wrt,
            holomorphic=holomorphic,
            allow_int=allow_int,
        )
    if reduce_axes:
        raise ArgumentError("reduce_axes is no longer supported by JAX; leave it out.")
    wanted = [_read(a, wrt) for a in (argnums if _several(argnums) else (argnums,))]
    fn, first = unbind(f)

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        entered = Entered((*first, *args), kwargs)
        chosen = [_resolve(d, len(entered.args), f) for d in wanted]
        call = _Call(fn, entered, chosen, has_aux, allow_int)
        (value, rest), grads = jax.value_and_grad(
            call, has_aux=True, holomorphic=holomorphic, allow_int=allow_int
        )(call.inputs())
        aux = leave(entered, rest)
        found = call.states(grads)
        value = (value, aux) if has_aux else value
        return value, tuple(found) if _several(argnums) else found[0]

    return wrapper


def _several(argnums: Any) -> bool:
    return isinstance(argnums, (tuple, list)) and not isinstance(argnums, DiffState)


def _read(argnum: Any, wrt: Any) -> DiffState:
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


class _Call:
    """One call as a pure function of what is differentiated by."""

    def __init__(
        self,
        fn: Callable[..., Any],
        entered: Entered,
        chosen: list[DiffState],
        has_aux: bool,
        allow_int: bool,
    ):
        self.fn, self.entered, self.has_aux = fn, entered, has_aux
        self.chosen = chosen
        self.allow_int = allow_int
        self.targets: dict[int, _Target] = {}
        at = {id(c): i for i, c in enumerate(entered.carriers)}
        for diff in chosen:
            for c in self._carriers(diff.argnum):
                self.targets[id(c)] = self._target(at[id(c)], diff)

    def _carriers(self, argnum: int) -> list[Carrier]:
        leaves = jtu.tree_leaves(self.entered.args[argnum], is_leaf=_is_carrier)
        return [x for x in leaves if isinstance(x, Carrier)]

    def _target(self, number: int, diff: DiffState) -> _Target:
        plan = self.entered.plans[number]
        selection, _ = plan.pick((diff.filter,))
        schema, mine = selection.parts[0]
        if not mine:
            every = plan.graphdef.schema
            raise FilterError(
                f"wrt={diff.filter!r} takes none of the {len(every)} leaves "
                f"of argument {diff.argnum}, so there is no gradient; it has:\n"
                + listing(every.describe(i) for i in range(len(every)))
            )
        values = plan.values()
        bad = [
            f"{schema.describe(i)}: {describe(values[j])}"
            for i, j in enumerate(mine)
            if not self.allow_int and not _differentiable(values[j])
        ]
        if bad:
            raise GradientError(
                f"wrt={diff.filter!r} takes leaves that cannot be differentiated:\n"
                f"{listing(bad)}\nGive them another kind than Param, or narrow wrt."
            )
        owner = {
            identity(self.entered.live_leaf(k)): place
            for k, place in enumerate(self.entered.joint.leaf_at)
        }
        return _Target(schema, tuple(owner[identity(plan.leaves[j])] for j in mine))

    def inputs(self) -> Any:
        """What to differentiate by: chosen leaves by place, and other arguments."""
        leaves: dict[tuple[int, int], Any] = {}
        for target in self.targets.values():
            for i, j in target.places:
                leaves[(i, j)] = self.entered.plans[i].leaves[j]._value
        self.order = sorted(leaves)
        others = [self._others(diff.argnum) for diff in self.chosen]
        return [leaves[place] for place in self.order], others

    def _others(self, argnum: int) -> Any:
        arg = self.entered.args[argnum]
        leaves = jtu.tree_leaves(arg, is_leaf=_is_carrier)
        return [x for x in leaves if not isinstance(x, Carrier)]

    def __call__(self, inputs: Any) -> Any:
        leaves, others = inputs
        given = dict(zip(self.order, leaves, strict=True))
        made: dict[int, Carrier] = {}
        for i, c in enumerate(self.entered.carriers):
            pick = self.entered.joint.picks[i]
            numbers = range(len(c.values)) if pick is None else pick
            values = [
                given.get((i, j), value)
                for j, value in zip(numbers, c.values, strict=True)
            ]
            made[id(c)] = Carrier(values, c.ticket)
        args = list(self.entered.args)
        for diff, rest in zip(self.chosen, others, strict=True):
            at = iter(rest)
            args[diff.argnum] = jtu.tree_map(
                lambda x, at=at: x if isinstance(x, Carrier) else next(at),
                self.entered.args[diff.argnum],
                is_leaf=_is_carrier,
            )
        args, kwargs = jtu.tree_map(
            lambda x: made[id(x)] if isinstance(x, Carrier) else x,
            (args, self.entered.kwargs),
            is_leaf=_is_carrier,
        )
        result = run(self._scalar_first, args, kwargs)
        value, result.out = result.out
        return value, result

    def _scalar_first(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        out = self.fn(*args, **kwargs)
        if not self.has_aux:
            return out, None
        if not (isinstance(out, (tuple, list)) and len(out) == 2):
            raise ArgumentError(
                "with has_aux=True the function must return (loss, aux); found a "
                f"{type(out).__name__}."
            )
        return out[0], out[1]

    def states(self, grads: Any) -> list[Any]:
        """The gradients in the shape of the arguments: a State for each module."""
        leaves, others = grads
        given = dict(zip(self.order, leaves, strict=True))

        def state(c: Carrier) -> Any:
            target = self.targets[id(c)]
            return snapshot(target.schema, [given[p] for p in target.places])

        found = []
        for diff, rest in zip(self.chosen, others, strict=True):
            at = iter(rest)
            found.append(
                jtu.tree_map(
                    lambda x, at=at: state(x) if isinstance(x, Carrier) else next(at),
                    self.entered.args[diff.argnum],
                    is_leaf=_is_carrier,
                )
            )
        return found


def _is_carrier(x: Any) -> bool:
    return isinstance(x, Carrier)


def _differentiable(value: Any) -> bool:
    return all(
        jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        if not hasattr(x, "dtype")
        else jnp.issubdtype(x.dtype, jnp.inexact)
        for x in jax.tree.leaves(value)
    )
