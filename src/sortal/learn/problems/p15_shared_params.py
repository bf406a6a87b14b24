"""The check of "Params shared, statistics mapped"."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from sortal.learn.answer import Answer, Wrong, expect

SHARED = "statistics shared"
SIGNS = {r"can only be used as the last": SHARED}


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` by what the model sees in a call, and by what comes back."""
    # As many features as replicas, so that a mapped kernel comes into the call.
    count, batch = int(rng.integers(2, 5)), int(rng.integers(5, 8))
    case = f"{count} replicas, x of shape {(count, batch, count)}"
    model = _model(answer, count, batch, case)
    kernel = rng.normal(size=(count, count)).astype(np.float32)
    mean = rng.normal(size=(count, count)).astype(np.float32)
    model.kernel[...], model.mean[...] = kernel, mean
    x = rng.normal(size=(count, batch, count)).astype(np.float32)
    found = answer.run(case, answer.get("forward"), model, x, pitfalls=SIGNS)
    new = (mean + x.mean(1)) / 2
    expect(found, (x - new[:, None]) @ kernel, case)
    lost = [("the statistics were lost", mean)]
    expect(model.mean[...], new, case, lost, "The statistics differ.")


def _model(answer: Answer, count: int, batch: int, case: str) -> Any:
    nnx = answer.nnx

    class Layer(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.zeros((count, count)))
            self.mean = nnx.BatchStat(jnp.zeros((count, count)))

        def __call__(self, x: Any) -> Any:
            kernel, mean = self.kernel[...], self.mean[...]
            right = {"kernel": (count, count), "mean": (count,), "x": (batch, count)}
            shapes = {"kernel": kernel.shape, "mean": mean.shape, "x": x.shape}
            signs = {
                "kernel": "Params mapped too",
                "mean": SHARED,
                "x": "x was not divided",
            }
            for name, pitfall in signs.items():
                if shapes[name] != right[name]:
                    raise Wrong(
                        f"In the call of one replica, {name} has another shape.",
                        case=case,
                        expected=str(right),
                        found=str(shapes),
                        pitfall=pitfall,
                    )
            new = (mean + x.mean(0)) / 2
            self.mean[...] = new
            return (x - new) @ kernel

    return Layer()
