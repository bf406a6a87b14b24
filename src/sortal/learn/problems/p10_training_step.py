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

    def stepped(reduce: Any, *, moved: bool = True) -> tuple[Any, Any, dict[str, Any]]:
        copy = nnx.clone(model)
        loss, grads = nnx.value_and_grad(lambda m: reduce((m(x) - y) ** 2))(copy)
        sgd = nnx.Optimizer(copy, optax.sgd(rate), wrt=nnx.Param)
        if moved:
            sgd.update(copy, grads)
        return loss, reduce((nnx.clone(copy)(x) - y) ** 2), values(copy)

    before = values(model)
    loss, later, right = stepped(jnp.mean)
    sums, sums_later, after_sum = stepped(jnp.sum)
    optimizer = nnx.Optimizer(model, optax.sgd(rate), wrt=nnx.Param)
    found = answer.run(case, step, model, optimizer, x, y)
    mistakes = [
        ("the sum in place of the mean", sums),
        ("the sum in place of the mean", sums_later),
        ("the loss after the step", later),
    ]
    expect(found, loss, case, mistakes, "The loss differs.")
    statistics = set(values(model, nnx.BatchStat))
    lost = {p: before[p] if p in statistics else right[p] for p in right}
    mistakes = [
        ("no update", stepped(jnp.mean, moved=False)[2]),
        ("no update", before),
        ("the statistics were lost", lost),
        ("the sum in place of the mean", after_sum),
    ]
    expect(values(model), right, case, mistakes, "The model differs after the step.")
