"""Sortal and Flax NNX; the code is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks.stacks import RATE, apply, example, matrices


def prepare(
    nnx: Any, task: str, depth: int, width: int, donate: bool
) -> tuple[Callable[[], Any], Any]:
    """See the package; ``nnx`` is the library."""

    class Stack(nnx.Module):
        def __init__(self) -> None:
            for i, kernel in enumerate(matrices(depth, width)):
                setattr(self, f"kernel{i}", nnx.Param(kernel))

        def __call__(self, x: Any) -> Any:
            return apply([getattr(self, f"kernel{i}")[...] for i in range(depth)], x)

    model, x = Stack(), example(width)
    if task == "forward":
        forward = nnx.jit(lambda model, x: model(x))
        lowered = forward.lower(model, x)
        return lambda: forward(model, x).block_until_ready(), lowered

    def step(model: Any, adam: Any, x: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda model: model(x))(model)
        adam.update(model, grads)
        return loss

    adam = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)
    jitted = nnx.jit(step, donate_argnums=(0, 1) if donate else None)
    lowered = jitted.lower(model, adam, x)

    def call() -> Any:
        loss = jitted(model, adam, x)
        return jax.block_until_ready((loss, jax.tree.leaves((model, adam))))

    return call, lowered
