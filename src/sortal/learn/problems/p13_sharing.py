"""The check of "Sharing and tied weights"."""

from __future__ import annotations

from typing import Any

import numpy as np

from sortal.learn.answer import Answer, Wrong, expect, values


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` unless embedding and head hold one Param."""
    nnx = answer.nnx
    words, features = (int(n) for n in rng.integers(3, 7, 2))
    seed = int(rng.integers(1000))
    case = f"Language({words}, {features}, rngs=nnx.Rngs({seed}))"
    model = answer.run(
        case, lambda: answer.get("Language")(words, features, rngs=nnx.Rngs(seed))
    )
    try:
        table, other = model.embed.embedding, model.head.table
    except AttributeError as e:
        raise Wrong(f"Something is missing: {e}.", case=case) from e
    if other is not table:
        raise Wrong(
            "`head.table` is not the Variable `embed.embedding`.",
            case=case,
            expected="1 leaf",
            found=f"{len(values(model))} leaves",
            pitfall=_pitfall(answer, table, other),
        )
    new = rng.normal(size=(words, features)).astype(np.float32)
    table[...] = new
    indices = rng.integers(words, size=4)
    found = answer.run(f"{case}; words={indices.tolist()}", model, indices)
    expect(found, new[indices] @ new.T, case)


def _pitfall(answer: Answer, table: Any, other: Any) -> str:
    if not isinstance(other, answer.nnx.Variable):
        return "the array in place of the Variable"
    equal = table.shape == other.shape and np.array_equal(table[...], other[...])
    return "a copy" if equal else "two tables"
