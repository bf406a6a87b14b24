"""custom_vjp, whose backward function is given what NNX's is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sortal._engine.state import State
from sortal.filters import Any_
from sortal.nnx.gradients import variables_for_states
from sortal.nnx.modes import set_graph_mode, set_graph_updates
from sortal.transforms import custom
from sortal.transforms._adapter.decorator import NO_FUNCTION, as_decorator
from sortal.transforms.autodiff import DiffState, FlatCall


class CustomVJP(custom.CustomVJP):
    """A function whose pull-back is given gradients of inputs and of the output."""

    def cotangent(self, call: Any, out: Any) -> Any:
        """A pair: for each input the State of its gradient so far, and the output's.

        Args:
          call: the call of the function.
          out: the cotangent of the output.

        Returns:
          The pair.
        """
        # Also what a DiffState leaves out, which `bwd` deletes.
        filters, _ = self.roles(len(call.bound.args))
        whole = {i: Any_(custom.INEXACT, x) for i, x in filters.items()}
        by = [DiffState(i, whole.get(i, custom.INEXACT)) for i in call.moving]
        chosen = FlatCall(call.bound, by).chosen
        zeros = [jnp.zeros(x.shape, x.dtype) for x in chosen.types.values()]
        trees = chosen.trees(zeros)

        def only_states(x: Any) -> Any:
            return x if isinstance(x, State) else None

        inputs = jax.tree.map(
            only_states, trees, is_leaf=lambda x: isinstance(x, State)
        )
        return tuple(variables_for_states(inputs)), out


@as_decorator
def custom_vjp(
    fun: Callable[..., Any] = NO_FUNCTION,
    nondiff_argnums: Any = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """A function of modules whose pull-back is written by hand.

    As NNX has it, ``bwd(*fixed, residuals, (inputs_g, out_g))`` is given a pair: for
    each argument differentiated by a State with zeros for its Params, or None for an
    array, and the cotangent of the output. With ``graph=False`` or
    ``graph_updates=False`` it is given that of the output alone, as by
    ``sortal.custom_vjp``, which says everything else.

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
    graph = set_graph_mode.current_value() if graph is None else graph
    updates = graph_updates
    updates = set_graph_updates.current_value() if updates is None else updates
    kind = CustomVJP if graph and updates else custom.CustomVJP
    return kind(fun, nondiff_argnums)
