"""The numbers that Sortal sets itself, checked against what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import workload as w
from benchmarks.report import Table

RATIOS = (
    (w.PARAMS, "flax/sortal", 100.0, True),
    (w.NOOP, "flax/sortal", 30.0, True),
    (w.NOOP, "sortal/raw", 1.3, False),
    (w.STEP, "sortal/raw", 1.3, False),
    ("training step", "sortal/raw", 1.3, False),
    ("sortal", "CPU", 60.0, False),
)
"""Row, column, bound, and whether the bound is the least or the most allowed."""


def check(tables: Sequence[Table]) -> list[str]:
    """One line for each target that was measured."""
    lines = []
    for row, column, bound, least in RATIOS:
        for table in tables:
            found = table.value(row, column)
            if found is None:
                continue
            met = found >= bound if least else found <= bound
            words = "at least" if least else "at most"
            lines.append(
                f"{'met' if met else 'MISSED'}: {row}, {column}: {found:.2f}, "
                f"{words} {bound:g}"
            )
    return lines
