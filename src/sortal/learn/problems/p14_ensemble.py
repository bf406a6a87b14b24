"""The check of "vmap over an ensemble"."""

from __future__ import annotations

import numpy as np

from sortal.learn.answer import Answer, Wrong, expect, kind_of


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` unless the members differ and all see the whole batch."""
    nnx = answer.nnx
    members, rows, columns = (int(n) for n in rng.integers(2, 5, 3))
    seed = int(rng.integers(1000))
    case = f"ensemble({seed}, {members}, {rows}, {columns})"
    models = answer.run(case, answer.get("ensemble"), seed, members, rows, columns)
    if not isinstance(models, nnx.Linear):
        raise Wrong(
            "The result is not one Linear.",
            case=case,
            expected="Linear",
            found=kind_of(models),
            pitfall="a list of models" if isinstance(models, list | tuple) else "",
        )
    shape = (members, rows, columns)
    if models.kernel.shape != shape:
        raise Wrong(
            "The kernel has another shape.",
            case=case,
            expected=str(shape),
            found=str(models.kernel.shape),
        )
    kernel = np.array(models.kernel[...])
    if np.array_equal(kernel[0], kernel[1]):
        raise Wrong(
            "Two members have the same kernel.",
            case=case,
            pitfall="the same weights for all members",
        )
    # As many rows as members, so that a division of x among them raises nothing.
    x = rng.normal(size=(members, rows)).astype(np.float32)
    bias = rng.normal(size=(members, columns)).astype(np.float32)
    models.bias[...] = bias
    case = f"{case}, x of shape {x.shape}"
    right = np.einsum("bi,mio->mbo", x, kernel) + bias[:, None]
    mistakes = [
        ("x was divided among the members", np.einsum("mi,mio->mo", x, kernel) + bias),
        ("the members were averaged", right.mean(0)),
    ]
    expect(answer.run(case, answer.get("predict"), models, x), right, case, mistakes)
