"""The check of "Split and merge"."""

from __future__ import annotations

from typing import Any

import numpy as np

from sortal.learn.answer import Answer, Wrong, expect, of_type, values

REST = "nothing takes the rest"
SIGNS = {
    r"leaves? over|[Nn]on-exhaustive|missing: |[Mm]issing|[Ii]ncorrect number": REST
}


def network(nnx: Any, rng: np.random.Generator) -> Any:
    """A Linear and a BatchNorm of a random size, whose statistics are not 0 and 1."""
    size, seed = int(rng.integers(2, 5)), int(rng.integers(1000))
    rngs = nnx.Rngs(seed)
    model = nnx.Sequential(
        nnx.Linear(size, size, rngs=rngs), nnx.BatchNorm(size, rngs=rngs)
    )
    norm = model.layers[1]
    for held in (norm.mean, norm.var):
        held[...] = rng.uniform(1, 2, size).astype(np.float32)
    return model


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` unless a new model with scaled Params comes back."""
    nnx, scaled = answer.nnx, answer.get("scaled")
    model, factor = network(nnx, rng), round(float(rng.uniform(2, 3)), 2)
    before, params = values(model), set(values(model, nnx.Param))
    case = f"a model of {', '.join(before)}; factor={factor}"
    found = answer.run(case, scaled, model, factor, pitfalls=SIGNS)
    changed = [
        path
        for path, value in values(model).items()
        if not np.array_equal(value, before[path])
    ]
    if changed or found is model:
        raise Wrong(
            "The model that was given has changed.",
            case=case,
            found=", ".join(changed),
            pitfall="the model itself was changed",
        )
    of_type(found, type(model), "a model", case)
    after = values(found)
    everything = {path: value * factor for path, value in before.items()}
    right = {p: everything[p] if p in params else before[p] for p in before}
    mistakes = [("all state was scaled", everything), ("nothing was scaled", before)]
    expect(after, right, case, mistakes, "The new model has other arrays.")
