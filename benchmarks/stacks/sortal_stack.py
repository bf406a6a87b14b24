"""Sortal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

import sortal
from benchmarks.stacks import RATE, apply, example, matrices


class Stack(sortal.Module):
    """The model."""

    def __init__(self, depth: int, width: int):
        kernels = [sortal.Param(x) for x in matrices(depth, width)]
        self.kernels = kernels

    def __call__(self, x: Any) -> Any:
        return apply([k.value for k in self.kernels], x)


def prepare(
    task: str, depth: int, width: int, donate: bool
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """See the package."""
    model, x = Stack(depth, width), example(width)
    if task == "forward":
        forward = sortal.jit(lambda model, x: model(x))
        lowered = forward.lower(model, x)
        return lambda: forward(model, x).block_until_ready(), _analysis(lowered)

    def step(model: Any, adam: Any, x: Any) -> Any:
        loss, grads = sortal.value_and_grad(lambda model: model(x))(model)
        adam.update(model, grads)
        return loss

    adam = sortal.Optimizer(model, optax.adam(RATE), wrt=sortal.Param)
    jitted = sortal.jit(step, donate_argnums=(0, 1) if donate else None)
    lowered = jitted.lower(model, adam, x)

    def call() -> Any:
        loss = jitted(model, adam, x)
        return jax.block_until_ready((loss, jax.tree.leaves((model, adam))))

    return call, _analysis(lowered)


def _analysis(lowered: Any) -> Callable[[], Any]:
    return lambda: lowered.compile().memory_analysis()
