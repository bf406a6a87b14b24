"""The check of "Nested paths and globs"."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from sortal.learn.answer import Answer, Wrong, kind_of, values


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` unless the State holds the kernels below the decoder."""
    nnx = answer.nnx
    model, case = _model(nnx, rng), "a model as the task describes it"
    found = answer.run(case, answer.get("decoder_kernels"), model)
    try:
        paths = set(values(found))
    except Exception as e:  # not only ours: JAX and Flax raise others
        raise Wrong(
            "The result is not a State.",
            case=case,
            expected="State",
            found=kind_of(found),
        ) from e
    kinds = values(model, nnx.Param)
    below = {path for path in values(model) if path.startswith("decoder.")}
    right = {path for path in below if path.endswith(".kernel") and path in kinds}
    if paths == right:
        return
    raise Wrong(
        "The State holds other paths.",
        case=f"a model of {', '.join(values(model))}",
        expected="\n".join(sorted(right)),
        found="\n".join(sorted(paths)) or "(none)",
        pitfall=_pitfall(paths, right, below, set(kinds)),
    )


def _pitfall(
    paths: set[str], right: set[str], below: set[str], params: set[str]
) -> str:
    more, less = paths - right, right - paths
    if not paths:
        return ""
    if any(path not in below for path in more):
        return "found anywhere in the path"
    if any(not path.endswith(".kernel") for path in more):
        return "biases too"
    if more - params and not less:
        return "a path says nothing of the kind"
    return "`*` is one step only" if less else ""


def _model(nnx: Any, rng: np.random.Generator) -> Any:
    rngs = nnx.Rngs(int(rng.integers(1000)))

    class Node(nnx.Module):
        def __init__(self, **parts: Any):
            for name, part in parts.items():
                setattr(self, name, part)

    def blocks() -> Any:
        count = int(rng.integers(1, 4))
        parts = [Node(out=nnx.Linear(2, 2, rngs=rngs)) for _ in range(count)]
        # Flax takes a list of modules in a List of its own only.
        return nnx.List(parts) if hasattr(nnx, "List") else parts

    decoder = Node(
        kernel=nnx.Param(jnp.ones(2)),
        first=nnx.Linear(2, 3, rngs=rngs),
        blocks=blocks(),
        memory=Node(kernel=nnx.Cache(jnp.zeros(2))),
    )
    bridge = Node(decoder=nnx.Linear(2, 2, rngs=rngs))
    return Node(encoder=Node(blocks=blocks()), decoder=decoder, bridge=bridge)
