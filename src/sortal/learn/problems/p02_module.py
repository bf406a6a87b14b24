"""The check of "A module"."""

from __future__ import annotations

from typing import Any

import numpy as np

from sortal.learn.answer import Answer, Wrong, expect, kind_of, values


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` if the model has other state, shapes or settings."""
    nnx, make = answer.nnx, answer.get("Affine")
    if not (isinstance(make, type) and issubclass(make, nnx.Module)):
        raise Wrong(
            "`Affine` is not derived from `nnx.Module`.", pitfall="not a Module"
        )
    rows, columns = (int(n) for n in rng.integers(2, 7, 2))
    scale, seed = round(float(rng.uniform(1, 2)), 2), int(rng.integers(1000))
    case = f"Affine({rows}, {columns}, {scale}, rngs=nnx.Rngs({seed}))"

    def build(seed: int) -> Any:
        return answer.run(case, lambda: make(rows, columns, scale, rngs=nnx.Rngs(seed)))

    model = build(seed)
    shapes = {"kernel": (rows, columns), "bias": (columns,)}
    for name, shape in shapes.items():
        held = _attribute(model, name)
        if not isinstance(held, nnx.Param):
            boxed = isinstance(held, nnx.Variable)
            raise Wrong(
                f"`{name}` is not a Param.",
                case=case,
                expected="Param",
                found=kind_of(held),
                pitfall="" if boxed else "a bare array",
            )
        expect(
            np.array(held.shape),
            np.array(shape),
            case,
            what=f"The shape of `{name}` differs.",
        )
    held = _attribute(model, "scale")
    if not isinstance(held, float):
        raise Wrong(
            "`scale` is not a Python float.",
            case=case,
            expected=repr(scale),
            found=repr(held),
            pitfall="a setting in a box",
        )
    expect(held, scale, case, what="`scale` is another number.")
    expect(model.bias[...], np.zeros(columns), case, what="`bias` is not zero.")
    if len(values(model)) != 2:
        raise Wrong(
            "The model has other state besides.",
            case=case,
            expected="bias, kernel",
            found=", ".join(values(model)),
        )
    kernel, again, other = (
        np.array(build(s).kernel[...]) for s in (seed, seed, seed + 1)
    )
    expect(again, kernel, case, what="The same seed gives another kernel.")
    if np.array_equal(kernel, other):
        raise Wrong(
            f"The seeds {seed} and {seed + 1} give the same kernel.",
            case=case,
            pitfall="the seed is ignored",
        )


def _attribute(model: Any, name: str) -> Any:
    if not hasattr(model, name):
        raise Wrong(f"The model has no attribute `{name}`.")
    return getattr(model, name)
