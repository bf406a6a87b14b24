"""The check of "Freezing and LoRA"."""

from __future__ import annotations

from typing import Any

import numpy as np

from sortal.learn.answer import Answer, Wrong, expect, of_type, values
from sortal.learn.problems.p11_optimizer_groups import body_and_head

EARLY = "the optimizer came before the adapter"


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` unless a step moves the factors, and nothing else."""
    nnx = answer.nnx
    model, rank = body_and_head(nnx, rng), int(rng.integers(1, 4))
    x = rng.normal(size=(3, model.body.in_features)).astype(np.float32)
    before, y = values(model), model(x)
    case = f"a model of {', '.join(before)}; rank={rank}"
    adapt, rngs = answer.get("adapt"), nnx.Rngs(int(rng.integers(1000)))
    signs = {r"(?s)OptimizerError.*LoRAParam": EARLY}
    optimizer = answer.run(case, adapt, model, rank, rngs, pitfalls=signs)
    factors = values(model, nnx.LoRAParam)
    if not factors:
        made = "LoRA" in answer.called()
        raise Wrong(
            "The model has no LoRAParam.",
            case=case,
            found=", ".join(values(model)),
            pitfall="the adapter is not in the model" if made else "",
        )
    frozen = {path: a for path, a in values(model).items() if path not in factors}
    if len(frozen) < len(before):
        raise Wrong(
            "Weights of the model are gone.",
            case=case,
            found=", ".join(frozen),
            expected=", ".join(before),
            pitfall="the base is missing",
        )
    _of_rank(rank, factors, case)
    expect(model(x), y, case, what="The output has changed before any training.")
    of_type(optimizer, nnx.Optimizer, "an Optimizer", case)
    _step(answer, model, optimizer, x, case)
    moved = [p for p, a in frozen.items() if not np.array_equal(a, values(model)[p])]
    if moved:
        raise Wrong(
            "Frozen weights have moved in a step.",
            case=case,
            expected=", ".join(factors),
            found=", ".join(moved),
            pitfall="the base is trained",
        )
    if all(np.array_equal(a, values(model)[p]) for p, a in factors.items()):
        raise Wrong("The step has moved nothing.", case=case, pitfall=EARLY)


def _of_rank(rank: int, factors: dict[str, np.ndarray], case: str) -> None:
    inner = {a.shape[-1 if p.endswith("_a") else 0] for p, a in factors.items()}
    if inner != {rank}:
        raise Wrong(
            "The factors have another rank.",
            case=case,
            expected=str(rank),
            found=", ".join(f"{p} {a.shape}" for p, a in factors.items()),
        )


def _step(answer: Answer, model: Any, optimizer: Any, x: np.ndarray, case: str) -> None:
    nnx = answer.nnx
    wrt = nnx.DiffState(0, optimizer.wrt)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        grads = nnx.grad(lambda m: (m(x) ** 2).mean(), argnums=wrt)(model)
        optimizer.update(model, grads)

    answer.run(case, step, model, optimizer)
