"""The check of "Update"."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import sortal
from sortal.learn.answer import Answer, Wrong, expect, values


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` unless the Params of the target, and no more, have moved."""
    nnx, follow = answer.nnx, answer.get("follow")
    size = int(rng.integers(2, 5))
    target, source = (_model(nnx, size, rng) for _ in range(2))
    decay = round(float(rng.uniform(0.7, 0.95)), 2)
    mine, other, params = values(target), values(source), values(target, nnx.Param)
    case = f"two models of {', '.join(mine)}; decay={decay}"
    answer.run(case, follow, target, source, decay)
    shared = set(map(id, _boxes(target))) & set(map(id, _boxes(source)))
    if shared:
        raise Wrong(
            f"{len(shared)} Variables are in both models.",
            case=case,
            pitfall="the two models now share Variables",
        )
    expect(values(source), other, case, what="`source` has changed.")

    def mean(weight: float, only: Any) -> dict[str, Any]:
        new = jax.tree.map(lambda a, b: weight * a + (1 - weight) * b, mine, other)
        return {path: new[path] if path in only else mine[path] for path in mine}

    mistakes = [
        ("only the snapshot changed" if answer.called() else "", mine),
        ("the weights are the wrong way round", mean(1 - decay, params)),
        ("the weights are the wrong way round", mean(1 - decay, mine)),
        ("statistics averaged too", mean(decay, mine)),
    ]
    expect(
        values(target),
        mean(decay, params),
        case,
        mistakes,
        "`target` holds other arrays.",
    )


def _model(nnx: Any, size: int, rng: np.random.Generator) -> Any:
    model = nnx.BatchNorm(size, rngs=nnx.Rngs(0))
    for held in (model.mean, model.var, model.scale, model.bias):
        held[...] = rng.uniform(1, 2, size).astype(np.float32)
    return model


def _boxes(model: Any) -> list[Any]:
    return sortal.variables(model).leaves()
