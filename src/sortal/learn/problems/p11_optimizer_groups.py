"""The check of "Optimizer groups"."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sortal.learn.answer import Answer, expect, of_type, values

TWICE = {"exactly one of the groups": "a Param in two groups"}


def body_and_head(nnx: Any, rng: np.random.Generator) -> Any:
    """A model of two Linears, ``body`` and ``head``, with biases that are not 0."""
    rngs = nnx.Rngs(int(rng.integers(1000)))
    inside, size, out = (int(n) for n in rng.integers(2, 5, 3))

    class Model(nnx.Module):
        def __init__(self):
            self.body = nnx.Linear(inside, size, rngs=rngs)
            self.head = nnx.Linear(size, out, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.head(jnp.tanh(self.body(x)))

    model = Model()
    for layer in (model.body, model.head):
        layer.bias[...] = rng.normal(size=layer.out_features).astype(np.float32)
    return model


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` unless head and body move by their own rates."""
    nnx = answer.nnx
    model = body_and_head(nnx, rng)
    fast, slow = (
        round(float(rng.uniform(0.5, 1)), 2),
        round(float(rng.uniform(0.01, 0.2)), 2),
    )
    case = f"a model of {', '.join(values(model))}; fast={fast}, slow={slow}"
    make = answer.get("make_optimizer")
    optimizer = answer.run(case, make, model, fast, slow, pitfalls=TWICE)
    of_type(optimizer, nnx.Optimizer, "an Optimizer", case)
    before = values(model)
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, optimizer.wrt))
    answer.run(case, optimizer.update, model, ones)
    found = {
        path: float((before[path] - new).mean()) for path, new in values(model).items()
    }

    def moved(head: float, body: float) -> dict[str, float]:
        return {path: head if path.startswith("head") else body for path in before}

    mistakes = [
        ("one rate for all", moved(fast, fast)),
        ("one rate for all", moved(slow, slow)),
        ("the rates are swapped", moved(slow, fast)),
        ("the rest stands still", moved(fast, 0.0)),
    ]
    what = "The Params moved by other amounts, for gradients of 1."
    expect(found, moved(fast, slow), case, mistakes, what)
