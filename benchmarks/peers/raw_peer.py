"""Plain JAX on a flat list of the same arrays: the floor for compiled calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import workload as w

LABEL = "raw jax"


def parts(shape: w.Blocks | w.Pair) -> tuple[list[Any], list[Any]]:
    """Flat lists of the model's Params and of its statistics, layer by layer."""
    width, params, statistics = shape.width, [], []
    if isinstance(shape, w.Pair):
        for i in range(2):
            params += [w.kernel(i, width), w.full(width, 0.0)]
        return params, statistics
    for i in range(shape.depth):
        params += [w.kernel(i, width), w.full(width, 0.0)]
        params += [w.full(width, 1.0), w.full(width, 0.0)]
        statistics += [w.full(width, 0.0), w.full(width, 1.0)]
    return params, statistics


def build(shape: w.Shape) -> tuple[Any, ...]:
    """One flat list of all arrays."""
    if isinstance(shape, w.Cells):
        return ([w.full(2, 0.0) for _ in range(shape.leaves)],)
    params, statistics = parts(shape)
    moments = jax.tree.leaves(optax.adam(1e-3).init(params))
    return ([*params, *statistics, jnp.array(0, jnp.uint32), *moments],)


def operations(shape: w.Shape, wanted: tuple[str, ...]) -> w.Operations:
    """Calls for the compiled rows, and for scaling the least that a snapshot can be."""
    live = list(build(shape))
    noop = jax.jit(lambda leaves: None)
    plus = jax.jit(lambda leaves: [x + 1 for x in leaves])

    def step() -> Any:
        live[0] = plus(live[0])
        return live[0][-1].block_until_ready()

    calls: dict[str, Callable[[], Any]] = {
        w.NOOP: lambda: noop(live[0]),
        w.STEP: step,
    }
    if isinstance(shape, w.Cells):
        # One new reference to each array: what no snapshot of them can do without.
        calls[w.STATE] = live[0].copy
    return {row: {LABEL: calls[row]} for row in wanted if row in calls}


def _stack(params: list[Any], statistics: list[Any], x: Any) -> tuple[Any, list[Any]]:
    """The output of ``Blocks`` and its new statistics."""
    new = []
    for i in range(len(statistics) // 2):
        kernel, bias, scale, shift = params[4 * i : 4 * i + 4]
        mean, var = statistics[2 * i : 2 * i + 2]
        y, mean, var = w.normalize(w.linear(x, kernel, bias), scale, shift, mean, var)
        new += [mean, var]
        x = w.residual(x, y)
    return x, new


def _pair(params: list[Any], statistics: list[Any], x: Any) -> tuple[Any, list[Any]]:
    """The output of ``Pair``, which has no statistics."""
    first, second = params[:2], params[2:]
    return w.linear(w.between(w.linear(x, *first)), *second), statistics


Forward = Callable[[Any, Any, Any], tuple[Any, Any]]
"""Takes params, statistics and inputs; gives the output and new statistics."""


def _step_of(forward: Forward, tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(params: Any, statistics: Any, count: Any, moments: Any, x: Any, y: Any):
        def loss_of(params: Any) -> Any:
            out, new = forward(params, statistics, x)
            return ((out - y) ** 2).mean(), new

        (loss, new), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, moments = tx.update(grads, moments, params)
        return loss, optax.apply_updates(params, updates), new, count + 1, moments

    return step


def with_adam(params: Any, statistics: Any) -> tuple[Any, ...]:
    """Params, statistics, a count of steps and Optax's state of Adam."""
    count = jnp.array(0, jnp.uint32)
    return params, statistics, count, optax.adam(1e-3).init(params)


def train(forward: Forward, roots: tuple[Any, ...], width: int) -> Callable[[], Any]:
    """A call of a whole training step, from where the last ended; it gives the loss.

    Args:
      forward: what is trained.
      roots: as of ``with_adam``, of any pytrees of Params and statistics.
      width: of the model.

    Returns:
      The call.
    """
    step, live = jax.jit(_step_of(forward, optax.adam(1e-3))), [roots]
    x, y = w.batch(width)

    def call() -> Any:
        loss, *new = step(*live[0], x, y)
        live[0] = tuple(new)
        return loss.block_until_ready()

    return call


def lower(forward: Forward, roots: tuple[Any, ...], width: int) -> Callable[[], Any]:
    """A call that traces and lowers the same step, written anew."""
    tx, batch = optax.adam(1e-3), w.batch(width)
    return lambda: jax.jit(_step_of(forward, tx)).lower(*roots, *batch)


def _trained(shape: w.Blocks | w.Pair) -> tuple[Any, ...]:
    forward = _pair if isinstance(shape, w.Pair) else _stack
    return forward, with_adam(*parts(shape)), shape.width


def training(shape: w.Blocks | w.Pair) -> dict[str, Callable[[], Any]]:
    """A whole training step; the call returns the loss."""
    return {LABEL: train(*_trained(shape))}


def lowering(shape: w.Blocks | w.Pair) -> dict[str, Callable[[], Any]]:
    """The same step, written anew, traced and lowered."""
    return {LABEL: lower(*_trained(shape))}
