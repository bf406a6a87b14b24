"""The check of "Call and init"."""

from __future__ import annotations

from typing import Any

import numpy as np

from sortal.learn.answer import Answer, Wrong, expect, values

PATHS = {"first.bias", "first.kernel", "second.bias", "second.kernel"}


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` if the layers are elsewhere or the output differs."""
    nnx, make = answer.nnx, answer.get("Mlp")
    sizes = tuple(int(n) for n in rng.integers(2, 5, 3))
    seed = int(rng.integers(1000))
    case = f"Mlp{sizes}, a batch of 8, seed {seed}"

    def build(seed: int) -> Any:
        return answer.run(case, lambda: make(*sizes, rngs=nnx.Rngs(seed)))

    model = build(seed)
    arrays = values(model)
    x = rng.normal(size=(8, sizes[0])).astype(np.float32)
    missing = PATHS - set(arrays)
    if missing:
        # Called, so that a model which cannot be called says so first.
        found = answer.run(case, model, x)
        made = found is not None and not arrays
        raise Wrong(
            "The model does not hold the Params of the two layers.",
            case=case,
            expected=", ".join(sorted(PATHS)),
            found=", ".join(arrays) or "no state",
            pitfall="layers made in the call" if made else "",
        )
    # Biases begin at 0, which would hide a mistake; outputs are to have both signs.
    bias = rng.normal(size=sizes[1]).astype(np.float32)
    hidden = x @ arrays["first.kernel"] + bias
    other_bias = -(np.maximum(hidden, 0) @ arrays["second.kernel"]).mean(0)
    model.first.bias[...], model.second.bias[...] = bias, other_bias

    def second(h: np.ndarray) -> np.ndarray:
        return h @ arrays["second.kernel"] + other_bias

    right = second(np.maximum(hidden, 0))
    linear, end = second(hidden), "an activation at the end"
    mistakes = [
        ("no activation", linear),
        (end, np.maximum(right, 0)),
        (end, np.maximum(linear, 0)),
    ]
    expect(answer.run(case, model, x), right, case, mistakes)
    kernel, other = (values(build(s))["first.kernel"] for s in (seed, seed + 1))
    if np.array_equal(kernel, other):
        raise Wrong(
            f"The seeds {seed} and {seed + 1} give the same weights.",
            case=case,
            pitfall="the seed is ignored",
        )
