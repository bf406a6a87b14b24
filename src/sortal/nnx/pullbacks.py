"""custom_vjp, whose backward function is given what NNX's is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sortal._engine.state import State
from sortal._engine.statics import EMPTY
from sortal._engine.variable import Variable, make
from sortal.filters import Any_
from sortal.nnx.gradients import variables_for_states
from sortal.nnx.modes import edits_in_place
from sortal.transforms import custom
from sortal.transforms._adapter.decorator import NO_FUNCTION, as_decorator
from sortal.transforms._adapter.tracing import is_flat_module
from sortal.transforms.autodiff import DiffState, FlatCall
from sortal.transforms.derivatives import bare


class CustomVJP(custom.CustomVJP):
    """A function whose pull-back is given gradients of inputs and of the output."""

    def pull_back(self, call: Any, bound: Any, bwd: Any) -> Callable[[Any, Any], Any]:
        """Calls ``bwd`` with a pair: the gradients so far of inputs, and the output's.

        Of what ``bwd`` returns, it gives back all that is differentiated by.
        """
        # Also what a DiffState leaves out, which `bwd` deletes.
        filters, _ = self.roles(len(bound.args))
        whole = {i: Any_(custom.INEXACT, x) for i, x in filters.items()}
        by = [DiffState(i, whole.get(i, custom.INEXACT)) for i in call.moving]
        chosen = FlatCall(bound, by).chosen
        args = [call.call.numbers[i] for i in call.moving]

        def pull(before: Any, result: Any) -> Any:
            changed = _changed(call, result)
            zeros = [jnp.zeros(x.shape, x.dtype) for x in chosen.types.values()]
            trees = chosen.trees(zeros)
            inputs = [
                _each(arg, lambda n, x: _with(x, changed.get(n, {})), tree)
                for arg, tree in zip(args, trees, strict=True)
            ]
            pair = tuple(variables_for_states(inputs)), bare(result.out)
            given = bwd(*before, pair)
            if not isinstance(given, tuple | list) or len(given) != len(trees):
                return given  # which is refused by whoever asked

            def without(n: int, x: Any, own: Any) -> Any:
                return _without(x, changed.get(n, {}), own)

            return [
                _each(arg, without, x, tree)
                for arg, x, tree in zip(args, given, trees, strict=True)
            ]

        return pull


class TreeCustomVJP(custom.CustomVJP):
    """A function whose pull-back may take what the function changed by keyword."""

    def pull_back(self, call: Any, bound: Any, bwd: Any) -> Callable[[Any, Any], Any]:
        """Calls ``bwd``, with ``updates_g`` where it takes that."""
        if "updates_g" not in inspect.signature(bwd).parameters:
            return super().pull_back(call, bound, bwd)

        def pull(before: Any, result: Any) -> Any:
            changed = _changed(call, result)
            states = {n: State.from_flat_path(found) for n, found in changed.items()}
            updates = tuple(_each(x, states.get) for x in call.call.numbers)
            return bwd(*before, bare(result.out), updates_g=updates)

        return pull


def _changed(call: Any, result: Any) -> dict[int, dict[Any, Any]]:
    """By root and path, cotangents of what the call wrote, as Variables."""
    found: dict[int, dict[Any, Any]] = {}
    for k, value in zip(result.effects.written, result.values, strict=True):
        root, j = call.alias_map.leaf_at[k]
        schema = call.schemas[root]
        if jnp.issubdtype(getattr(value, "dtype", int), jnp.inexact):
            leaf = make(schema.kinds[j] or Variable, value, EMPTY)
            found.setdefault(root, {})[schema.paths[j]] = leaf
    return found


def _each(arg: Any, f: Callable[..., Any], *trees: Any) -> Any:
    """Calls ``f`` with the number of each module in an argument, and what trees have.

    In the place of arrays it has None, or what the first of several trees has.
    """

    def one(x: Any, *parts: Any) -> Any:
        if is_flat_module(x):
            return f(x.definition.number, *parts)
        return parts[0] if len(parts) > 1 else None

    try:
        return jax.tree.map(one, arg, *trees, is_leaf=is_flat_module)
    except (ValueError, TypeError):  # given in another form, which is refused later
        return trees[0]


def _with(tree: Any, changed: dict[Any, Any]) -> Any:
    return State.from_flat_path({**dict(tree.flat_state()), **changed})


def _without(given: Any, changed: dict[Any, Any], own: Any) -> Any:
    extra = changed.keys() - set(own.paths())
    if not extra or not isinstance(given, State):
        return given
    pairs = {p: x for p, x in given.flat_state() if p not in extra}
    return State.from_flat_path(pairs)


@as_decorator
def custom_vjp(
    fun: Callable[..., Any] = NO_FUNCTION,
    nondiff_argnums: Any = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """A function of modules whose pull-back is written by hand.

    As NNX has it, ``bwd(*fixed, residuals, (inputs_g, out_g))`` is given a pair: for
    each argument differentiated by a State, or None for an array, and the cotangent of
    the output. The State has the cotangent of what the function wrote to the argument,
    and zeros for other Params. With ``graph=False`` or ``graph_updates=False`` it is
    given that of the output alone, as by ``sortal.custom_vjp``, which says everything
    else; and by the keyword ``updates_g``, if it has one, for each argument a State of
    the cotangents of what was written to it, or None.

    Args:
      fun: the function; without it a decorator is returned.
      nondiff_argnums: positions not differentiated by, or ``DiffState``.
      graph: False for the cotangent of the output alone.
      graph_updates: likewise.

    Returns:
      A function with a method ``defvjp(fwd, bwd)``.

    Raises:
      ArgumentError: ``fun`` is a bound method or module.

    Example:
      >>> import jax.numpy as jnp
      >>> from sortal import nnx
      >>> @nnx.custom_vjp
      ... def scaled(m, x):
      ...     return m.w * x
      >>> def bwd(residuals, g):
      ...     (m_g, _), out_g = g
      ...     m, x = residuals
      ...     m_g["w"][...] = 10 * out_g * x
      ...     return m_g, out_g * m.w
      >>> scaled.defvjp(lambda m, x: (scaled(m, x), (m, x)), bwd)
      >>> class Scale(nnx.Module):
      ...     def __init__(self):
      ...         self.w = nnx.Param(jnp.array(2.0))
      >>> float(nnx.grad(scaled)(Scale(), 3.0)["w"].value)
      30.0
    """
    kind = CustomVJP if edits_in_place(graph, graph_updates) else TreeCustomVJP
    return kind(fun, nondiff_argnums)
