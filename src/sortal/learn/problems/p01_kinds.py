"""The check of "Variables and kinds"."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from sortal.learn.answer import Answer, Wrong, expect, kind_of, shown

NAMES = ("weight", "mean", "visits")


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` if the boxes are of other kinds or hold something else."""
    nnx = answer.nnx
    visits = answer.kind("Visits", {"Param": "a kind derived from `Param`"})
    if visits is nnx.Variable:
        raise Wrong("`Visits` is `Variable` itself.", pitfall="a plain `Variable`")
    size, count = int(rng.integers(1, 6)), int(rng.integers(0, 100))
    arrays = (jnp.array(rng.normal(size=size)), jnp.zeros(size), jnp.array(count))
    case = f"weight={shown(arrays[0])}, mean={shown(arrays[1])}, visits={count}"
    found = answer.run(case, answer.get("label"), *arrays)
    if not isinstance(found, dict) or set(found) != set(NAMES):
        raise Wrong(
            "The result is not a dict with these three keys.",
            case=case,
            expected=repr(NAMES),
            found=shown(found),
        )
    kinds = (nnx.Param, nnx.BatchStat, visits)
    wanted = (*arrays[:2], arrays[2] + 1)
    for name, kind, value in zip(NAMES, kinds, wanted, strict=True):
        box = found[name]
        if type(box) is not kind:
            raise Wrong(
                f"{name!r} is not of the kind `{kind.__name__}`.",
                case=case,
                expected=kind.__name__,
                found=kind_of(box),
                pitfall=_pitfall(answer, name, box),
            )
        expect(box[...], value, case, what=f"{name!r} holds another array.")


def _pitfall(answer: Answer, name: str, box: object) -> str:
    if type(box) is answer.nnx.Variable:
        return "a plain `Variable`"
    if isinstance(box, answer.nnx.Variable):
        return ""
    boxed = name == "visits" and "Visits" in answer.called()
    return "arithmetic took the array out of the box" if boxed else "a bare array"
