"""The check of "BatchNorm statistics"."""

from __future__ import annotations

from typing import Any

import numpy as np

from sortal.learn.answer import Answer, expect, values
from sortal.learn.problems.p06_split_merge import network


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` if the output or the statistics are others."""
    nnx = answer.nnx
    model = network(nnx, rng)
    size = model.layers[0].in_features
    model.train() if rng.integers(2) else model.eval()
    shape = (int(rng.integers(1, 4)), 4, size)
    batches = list(rng.normal(1.0, size=shape).astype(np.float32))
    x = rng.normal(-1.0, size=(3, size)).astype(np.float32)
    case = f"{len(batches)} batches of shape {shape[1:]}, x of shape {x.shape}"

    run = nnx.jit(lambda model, x: model(x))

    def tried(seen: list[Any], training: bool) -> tuple[Any, dict[str, Any]]:
        copy = nnx.clone(model)
        copy.train()
        for batch in seen:
            run(copy, batch)
        if not training:
            copy.eval()
        return run(copy, x), values(copy, nnx.BatchStat)

    right, statistics = tried(batches, training=False)
    untouched = values(model, nnx.BatchStat)
    mistakes = [
        ("left in training mode", tried(batches, training=True)[0]),
        ("the statistics never moved", tried([], training=False)[0]),
        ("x was counted too", tried([*batches, x], training=False)[0]),
        ("x was counted too", tried([x, *batches], training=False)[0]),
    ]
    found = answer.run(case, answer.get("calibrate"), model, batches, x)
    expect(found, right, case, mistakes)
    mistakes = [
        ("a copy was calibrated", untouched),
        ("x was counted too", tried([*batches, x], training=False)[1]),
    ]
    expect(
        values(model, nnx.BatchStat),
        statistics,
        case,
        mistakes,
        "The statistics differ.",
    )
