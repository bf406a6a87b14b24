"""Plain JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks.stacks import RATE, apply, example, matrices


def prepare(
    task: str, depth: int, width: int, donate: bool
) -> tuple[Callable[[], Any], Any]:
    """See the package."""
    x, tx = example(width), optax.adam(RATE)
    if task == "forward":
        params = matrices(depth, width)
        forward = jax.jit(apply)
        lowered = forward.lower(params, x)
        return lambda: forward(params, x).block_until_ready(), lowered

    def step(params: Any, moments: Any, x: Any) -> Any:
        loss, grads = jax.value_and_grad(apply)(params, x)
        updates, moments = tx.update(grads, moments, params)
        return loss, optax.apply_updates(params, updates), moments

    jitted = jax.jit(step, donate_argnums=(0, 1) if donate else ())
    live = [_start(tx, depth, width)]
    lowered = jitted.lower(*live[0], x)

    def call() -> Any:
        loss, *new = jitted(*live[0], x)
        live[0] = tuple(new)
        return jax.block_until_ready((loss, live))

    return call, lowered


def _start(tx: Any, depth: int, width: int) -> tuple[Any, ...]:
    params = matrices(depth, width)
    return params, tx.init(params)
