"""The check of "Counters and buffers"."""

from __future__ import annotations

from typing import Any

import numpy as np

from sortal.learn.answer import Answer, Wrong, expect, kind_of

TRAINED = {"Param": "a counter that is trained"}


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` if the means differ, or the state is of other kinds."""
    kinds = {
        "count": answer.kind("Count", TRAINED),
        "total": answer.kind("Buffer", TRAINED),
    }
    size = int(rng.integers(1, 5))
    case = f"RunningMean({size}), called in nnx.jit"
    model = answer.run(case, answer.get("RunningMean"), size)
    _boxes(model, kinds, case, "a Python number")
    step = answer.nnx.jit(lambda model, x: model(x))
    xs = rng.normal(size=(3, size)).astype(np.float32)
    for n in range(1, 4):
        now = f"{case}, call {n}"
        try:
            found = answer.run(now, step, model, xs[n - 1])
        finally:
            _boxes(model, kinds, now, "the box was replaced")
        total = xs[:n].sum(0)
        before = xs[: n - 1].sum(0)
        late = ((before / k) for k in (n, n - 1) if k)
        mistakes = [("the mean of the calls before", value) for value in late]
        expect(found, total / n, now, mistakes)
        for name, value in (("total", total), ("count", np.array(n))):
            held = getattr(model, name)[...]
            expect(held, value, now, what=f"`{name}` holds something else.")


def _boxes(model: Any, kinds: dict[str, type], case: str, pitfall: str) -> None:
    for name, kind in kinds.items():
        held = getattr(model, name, None)
        if not isinstance(held, kind):
            # Under the trace of a function that failed, nothing was written back.
            raise Wrong(
                f"`{name}` is not a {kind.__name__}.",
                case=case,
                expected=kind.__name__,
                found=kind_of(held),
                pitfall="" if held is None else pitfall,
            )
