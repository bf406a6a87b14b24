"""The check of "A KV cache that generation mutates"."""

from __future__ import annotations

from typing import Any

import numpy as np

from sortal.learn.answer import Answer, Wrong, expect, kind_of

NAMES = ("keys", "values", "position")
GROWS = "the cache grows"


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` unless each token attends to all tokens so far."""
    features, tokens = int(rng.integers(2, 4)), int(rng.integers(3, 5))
    length = tokens + int(rng.integers(1, 3))
    case = f"Memory({length}, {features})"
    memory = answer.run(case, answer.get("Memory"), length, features)
    _caches(answer, memory, (length, features), case)
    step = answer.nnx.jit(lambda memory, *token: memory(*token))
    stream = rng.normal(size=(tokens, 3, features)).astype(np.float32)
    for n in range(1, tokens + 1):
        now = f"{case}, token {n}, called in nnx.jit"
        signs = {"keeps the shape|Incompatible types for broadcasting": GROWS}
        found = answer.run(now, step, memory, *stream[n - 1], pitfalls=signs)
        _caches(answer, memory, (length, features), now)
        query, keys, values = stream[n - 1, 0], stream[:n, 1], stream[:n, 2]
        rest = np.zeros((length - n, features), np.float32)
        padded = [np.concatenate([a, rest]) for a in (keys, values)]
        mistakes = [
            ("empty slots were attended to", _attend(query, *padded)),
            ("the position stands still", _attend(query, keys[-1:], values[-1:])),
            ("the new token is not seen", _attend(query, keys[:-1], values[:-1])),
        ]
        expect(found, _attend(query, keys, values), now, mistakes)


def _attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The attention of one query; NaN over no token at all."""
    if not len(keys):
        return np.full_like(query, np.nan)
    scores = np.exp(keys @ query / np.sqrt(query.size))
    return (scores / scores.sum()) @ values


def _caches(answer: Answer, memory: Any, shape: tuple[int, int], case: str) -> None:
    """Refuses other kinds, and another shape than that of the beginning."""
    nnx = answer.nnx
    for name in NAMES:
        held: Any = getattr(memory, name, None)
        if not isinstance(held, nnx.Cache):
            pitfall = ""
            if isinstance(held, nnx.Param):
                pitfall = "a cache that is trained"
            elif isinstance(held, int):
                pitfall = "a Python number for the position"
            raise Wrong(
                f"`{name}` is not a Cache.",
                case=case,
                expected="Cache",
                found=kind_of(held),
                pitfall=pitfall,
            )
        if name != "position" and held.shape != shape:
            raise Wrong(
                f"`{name}` has another shape.",
                case=case,
                expected=str(shape),
                found=str(held.shape),
                pitfall=GROWS,
            )
