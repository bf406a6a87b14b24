"""The check of "The state filter"."""

from __future__ import annotations

import ast

import jax
import jax.numpy as jnp
import numpy as np

from sortal.learn.answer import Answer, Wrong, expect, shown

RIGHT = [4, 2, 1]
DERIVED = "`BatchStat` derived from `Param`"
BUILT_IN = "the built-in `BatchStat` instead of your own"
BY_VARIABLE = "filtering by `Variable`"
COUNTERS = set(
    "state split variables iter_graph graph flatten to_tree view pure".split()
)


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` unless 4, 2 and 1 were counted, and returned as floats."""
    count = answer.get("state_filter_count")
    seed, size, hidden = (int(n) for n in rng.integers(1, 9, 3))
    x = jnp.array(rng.normal(size=size), jnp.float32)
    case = f"seed={seed}.0, x={shown(x)}, hidden={hidden}.0"
    try:
        found = answer.run(case, count, float(seed), x, float(hidden))
    except Wrong as wrong:
        if _runs_with_ints(answer, seed, x, hidden):
            wrong.pitfall = "`hidden` left a float"
        elif _derived(answer):
            wrong.pitfall = DERIVED  # `split` refuses filters of which one takes all
        raise
    expected = np.array(RIGHT, np.float32)
    if not isinstance(found, jax.Array | np.ndarray):
        raise Wrong(
            "The result is not an array.",
            case=case,
            expected=shown(expected),
            found=shown(found),
        )
    expect(found, expected, case, _mistakes(answer))
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise Wrong(
            "The array does not hold floats.",
            case=case,
            found=shown(found),
            expected=shown(expected),
            pitfall="ints in place of floats",
        )
    if _hard_coded(answer):
        raise Wrong("The code counts nothing.", pitfall="a hard-coded answer")
    if not _own_kinds(answer):
        raise Wrong("The file defines no kind of its own.", pitfall=BUILT_IN)


def _mistakes(answer: Answer) -> list[tuple[str, np.ndarray]]:
    """What each mistake counts."""
    by_variable = ([4, 4, 1], [4, 2, 4], [4, 4, 4], [4, 4, 0])
    named = [
        *([(DERIVED, [4, 3, 1])] if _derived(answer) else []),
        (BUILT_IN, [4, 2, 0]),
        *((BY_VARIABLE, counts) for counts in by_variable),
    ]
    return [(name, np.array(counts)) for name, counts in named]


def _own_kinds(answer: Answer) -> list[type]:
    found = vars(answer.module).values()
    kinds = [
        k for k in found if isinstance(k, type) and issubclass(k, answer.nnx.Variable)
    ]
    return [kind for kind in kinds if kind.__module__ == answer.module.__name__]


def _derived(answer: Answer) -> bool:
    return any(issubclass(kind, answer.nnx.Param) for kind in _own_kinds(answer))


def _runs_with_ints(answer: Answer, seed: int, x: jax.Array, hidden: int) -> bool:
    try:
        answer.get("state_filter_count")(seed, x, hidden)
    except Exception:  # noqa: BLE001 - whatever it is, it is no matter of ints
        return False
    return True


def _hard_coded(answer: Answer) -> bool:
    """Whether the source reads no state, or has the three numbers in a row."""
    rows = (
        n.elts for n in ast.walk(answer.tree) if isinstance(n, ast.List | ast.Tuple)
    )
    written = any(
        [e.value for e in row if isinstance(e, ast.Constant)] == RIGHT for row in rows
    )
    return written or not answer.called() & COUNTERS
