"""The numbers that Sortal sets itself, checked against what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import workload as w
from benchmarks.report import Table
from benchmarks.transforms import ROWS as TRANSFORMS

AT_LEAST = (
    (w.PARAMS, "flax/sortal", 700.0),
    (w.AGAIN, "equinox/sortal", 1.0),
    (w.STATE_MAP, "flax/sortal", 1.0),
    (w.NOOP, "flax/sortal", 30.0),
)
"""Row, column and the least allowed."""

AT_MOST = (
    (w.NOOP, "sortal/raw", 1.12),
    (w.STEP, "sortal/raw", 1.05),
    (w.TRAINING, "sortal/raw", 1.3),
    (w.SMALL_NOOP, "sortal/raw", 1.8),
    (w.SMALL_TRAINING, "sortal/raw", 1.4),
    (w.NOOP, "sortal on flax/raw", 2.0),
    ("50 blocks", "sortal/raw", 1.1),
    ("200 blocks", "sortal/raw", 1.1),
    *((f"{name}, under jit", "sortal/raw", 1.1) for name in TRANSFORMS),
    ("remat, eager", "sortal/raw", 1.5),
    *(
        (f"{name}, eager", "sortal/raw", 1.3)
        for name in ("scan", "while_loop", "fori_loop", "cond", "switch")
    ),
    ("sortal", "CPU", 45.0),
    ("sortal.nnx", "CPU", 45.0),
)
"""Row, column and the most allowed."""


def check(tables: Sequence[Table]) -> list[str]:
    """One line for each target that was measured."""
    least = [(*target, "at least") for target in AT_LEAST]
    most = [(*target, "at most") for target in AT_MOST]
    lines = []
    for row, column, bound, wanted in (*least, *most):
        for table in tables:
            held = table.row(row)
            found = held.values.get(column) if held else None
            if held is None or found is None:
                continue
            other = held.details.get("least", {}).get(column)
            by_least = "" if other is None else f" ({other:.2f} by minimums)"
            met = found >= bound if wanted == "at least" else found <= bound
            verdict = "met" if met else "MISSED"
            lines.append(
                f"{verdict}: {row}, {column}: {found:.2f}{by_least}, {wanted} {bound:g}"
            )
    return lines
