"""The check of "Finding a recompilation"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from jax.core import Tracer

from sortal.learn.answer import Answer, Wrong, expect, values


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` if the step is traced twice, or computes something else."""
    nnx, make, step = answer.nnx, answer.get("Model"), answer.get("step")
    features, seed = int(rng.integers(2, 5)), int(rng.integers(1000))
    x = rng.normal(size=(4, features)).astype(np.float32)
    y = rng.normal(size=(4, 1)).astype(np.float32)
    case = f"Model({features}, rngs=nnx.Rngs({seed})), three calls"
    model = answer.run(case, lambda: make(features, rngs=nnx.Rngs(seed)))
    rates = [round(float(rate), 3) for rate in rng.uniform(0.05, 0.2, 2)]
    kernel, bias = (values(model)[f"linear.{name}"] for name in ("kernel", "bias"))
    with _watched(make) as traced:
        for i, rate in enumerate((rates[0], *rates)):
            before = len(traced)
            loss = answer.run(
                f"{case}, call {i + 1}, rate={rate}", step, model, x, y, rate
            )
            if not all(traced):
                raise Wrong(
                    "The step ran without being compiled.",
                    case=case,
                    pitfall="not compiled at all",
                )
            if i and len(traced) > before:
                raise Wrong(
                    f"Call {i + 1} was compiled again.",
                    case=case,
                    pitfall=_why(answer, model, i),
                )
            error = x @ kernel + bias - y
            expect(loss, (error**2).mean(), case, what="The loss differs.")
            kernel = kernel - rate * 2 * x.T @ error / len(x)
            bias = bias - rate * 2 * error.mean(0)
    expect(values(model)["linear.kernel"], kernel, case, what="The kernel differs.")
    _counted(model, case)


@contextmanager
def _watched(model: type) -> Iterator[list[bool]]:
    """A list that grows with each call of a model: whether its input was traced."""
    call, traced = model.__call__, []

    def watched(self: Any, x: Any) -> Any:
        traced.append(isinstance(x, Tracer))
        return call(self, x)

    model.__call__ = watched
    try:
        yield traced
    finally:
        model.__call__ = call


def _why(answer: Answer, model: Any, call: int) -> str:
    calls = getattr(model, "calls", None)
    if isinstance(calls, int | float):
        return "a Python number in the model"
    return (
        "a static argument that changes" if call == 2 else "compiled anew at each call"
    )


def _counted(model: Any, case: str) -> None:
    calls: Any = getattr(model, "calls", None)
    try:
        found = int(
            np.asarray(calls if not hasattr(calls, "get_value") else calls.get_value())
        )
    except (TypeError, ValueError):
        found = None
    if found != 3:
        raise Wrong(
            "`model.calls` is not the number of calls.",
            case=case,
            expected="3",
            found=repr(calls),
            pitfall="the count is lost",
        )
