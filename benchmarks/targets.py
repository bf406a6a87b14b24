"""The numbers that Sortal sets itself, checked against what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import workload as w
from benchmarks.report import Table
from benchmarks.transforms import ROWS as TRANSFORMS

RATIOS = (
    (w.PARAMS, "flax/sortal", 100.0, True),
    (w.NOOP, "flax/sortal", 30.0, True),
    (w.NOOP, "sortal/raw", 1.3, False),
    (w.STEP, "sortal/raw", 1.3, False),
    ("training step", "sortal/raw", 1.3, False),
    (w.NOOP, "flax/sortal on flax overhead", 10.0, True),
    ("training step", "flax/sortal on flax overhead", 10.0, True),
    *((f"{name}, under jit", "sortal/raw", 1.3, False) for name in TRANSFORMS),
    ("grad, eager", "flax/sortal overhead", 5.0, True),
    ("vmap, eager", "flax/sortal overhead", 5.0, True),
    ("sortal", "CPU", 60.0, False),
)
"""Row, column, bound, and whether the bound is the least or the most allowed."""


def check(tables: Sequence[Table]) -> list[str]:
    """One line for each target that was measured."""
    lines = []
    for row, column, bound, least in RATIOS:
        for table in tables:
            held = table.row(row)
            found = held.values.get(column) if held else None
            if held is None or found is None:
                continue
            other = held.details.get("least", {}).get(column)
            by_least = "" if other is None else f" ({other:.2f} by minimums)"
            met = found >= bound if least else found <= bound
            verdict = "met" if met else "MISSED"
            wanted = f"{'at least' if least else 'at most'} {bound:g}"
            lines.append(f"{verdict}: {row}, {column}: {found:.2f}{by_least}, {wanted}")
    return lines
