"""The check of "A training step"."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from sortal.learn.answer import Answer, expect, values
from sortal.learn.problems.p06_split_merge import network


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` if loss, Params or statistics are not those of one step."""
    import optax

    nnx, step = answer.nnx, answer.get("train_step")
    model, rate = network(nnx, rng), round(float(rng.uniform(0.05, 0.2)), 2)
    model.train()
    size = model.layers[0].in_features
    x, y = rng.normal(size=(2, int(rng.integers(4, 8)), size)).astype(np.float32)
    case = f"optax.sgd({rate}), x and y of shape {x.shape}"

    before, copy = values(model), nnx.clone(model)
    sgd = nnx.Optimizer(copy, optax.sgd(rate), wrt=nnx.Param)

    @nnx.jit
    def one_step(copy: Any, sgd: Any) -> tuple[Any, Any]:
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(copy)
        sgd.update(copy, grads)
        return loss, jnp.mean((nnx.clone(copy)(x) - y) ** 2)

    loss, later = one_step(copy, sgd)
    right, statistics = values(copy), set(values(copy, nnx.BatchStat))
    optimizer = nnx.Optimizer(model, optax.sgd(rate), wrt=nnx.Param)
    found = answer.run(case, step, model, optimizer, x, y)
    mistakes = [
        ("the sum in place of the mean", loss * y.size),
        ("the loss after the step", later),
    ]
    expect(found, loss, case, mistakes, "The loss differs.")

    def left(kept: set[str]) -> dict[str, Any]:
        return {path: before[path] if path in kept else right[path] for path in right}

    mistakes = [
        ("no update", left(set(right) - statistics)),
        ("no update", before),
        ("the statistics were lost", left(statistics)),
    ]
    expect(values(model), right, case, mistakes, "The model differs after the step.")
