"""The check of "Scan over layers"."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sortal.learn.answer import Answer, Wrong, expect

BLOCKS = 8
"""More than any way of scanning traces a step."""


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` if the output differs, or each block was traced."""
    size = int(rng.integers(2, 5))
    case = f"{BLOCKS} blocks of {size} features, x of shape {(3, size)}"
    blocks, traced = _blocks(answer, size, case)
    kernels = rng.normal(size=(BLOCKS, size, size)).astype(np.float32)
    blocks.kernel[...] = kernels
    x = rng.normal(size=(3, size)).astype(np.float32)
    found = answer.run(case, answer.get("through"), blocks, x)
    passed = [x]
    for kernel in kernels:
        passed.append(np.tanh(passed[-1] @ kernel))
    back = x
    for kernel in kernels[::-1]:
        back = np.tanh(back @ kernel)
    same_input, every = np.tanh(x @ kernels), np.stack(passed[1:])
    mistakes = [
        ("each block got the same input", same_input),
        ("each block got the same input", same_input[-1]),
        ("the outputs of all blocks", every),
        ("the outputs of all blocks", (passed[-1], every)),
        ("from the last to the first", back),
    ]
    expect(found, passed[-1], case, mistakes)
    if len(traced) >= BLOCKS:
        raise Wrong(
            f"A block was traced or run {len(traced)} times.",
            case=case,
            pitfall="a Python loop",
        )


def _blocks(answer: Answer, size: int, case: str) -> tuple[Any, list[int]]:
    """Stacked blocks, and a list that grows by one with each call of a block."""
    nnx, traced = answer.nnx, []

    class Block(nnx.Module):
        def __init__(self, key: jax.Array):
            self.kernel = nnx.Param(jnp.zeros((size, size)))

        def __call__(self, x: Any) -> Any:
            traced.append(1)
            if self.kernel[...].ndim != 2:
                raise Wrong(
                    "The block in the call holds the arrays of all blocks.",
                    case=case,
                    expected=f"kernel {(size, size)}",
                    found=f"kernel {self.kernel.shape}",
                    pitfall="the blocks were not divided",
                )
            return jnp.tanh(x @ self.kernel[...])

    keys = jax.random.split(jax.random.key(0), BLOCKS)
    return nnx.vmap(Block)(keys), traced
