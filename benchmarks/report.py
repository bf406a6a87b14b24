"""Tables of results: printed, as Markdown, and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.timing import Timing

PACKAGES = (
    "jax", "jaxlib", "numpy", "optax", "flax", "equinox", "spectrax-lib", "brainstate",
)  # fmt: skip
RATIOS = (
    ("flax/sortal", "flax", "sortal"),
    ("equinox/sortal", "equinox", "sortal"),
    ("sortal/raw", "sortal", "raw jax"),
    ("sortal/nested", "sortal", "raw jax, nested"),
    ("sortal on flax/raw", "sortal on flax", "raw jax"),
)
"""Columns that every row has whose two contenders were timed."""


@dataclass
class Row:
    """One measurement: a number for each column, and what it was computed from."""

    name: str
    values: dict[str, float | None]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Table:
    """Rows under one heading, all in one unit."""

    title: str
    unit: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """The columns that any row has, in order of first appearance."""
        return list(dict.fromkeys(c for row in self.rows for c in row.values))

    def row(self, name: str) -> Row | None:
        """The row of a name, or None."""
        return next((row for row in self.rows if row.name == name), None)

    def markdown(self) -> str:
        """The table as Markdown, with its notes below it."""
        head = ["", *self.columns]
        body = [
            [row.name, *(number(row.values.get(c)) for c in self.columns)]
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
        lines = [f"## {self.title}", "", f"In {self.unit}.", ""]
        for line in [head, rule, *body]:
            cells = [line[0].ljust(widths[0])]
            cells += [x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True)]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"


def number(x: float | None) -> str:
    """Three significant digits, with thousands separated; a dash for None."""
    if x is None:
        return "-"
    if abs(x) >= 100:
        return f"{x:,.0f}"
    return f"{x:.3g}"


def timed_row(name: str, timings: dict[str, Timing], scale: float = 1.0) -> Row:
    """A row of medians, divided by ``scale``, with the ratios of ``RATIOS`` added.

    Args:
      name: the row's name.
      timings: by contender.
      scale: what to divide by, such as a number of leaves.

    Returns:
      The Row. Ratios are of medians; those of the minimums, less shaken by other
      processes, are in the details.
    """
    medians = {k: t.median for k, t in timings.items()}
    values: dict[str, float | None] = {k: m / scale for k, m in medians.items()}
    values.update(_ratios(medians))
    details: dict[str, Any] = {k: asdict(t) for k, t in timings.items()}
    details["least"] = _ratios({k: t.best for k, t in timings.items()})
    return Row(name, values, details)


def _ratios(times: Mapping[str, float]) -> dict[str, float | None]:
    return {
        column: times[above] / times[below]
        for column, above, below in RATIOS
        if above in times and times.get(below)
    }


def facts() -> dict[str, Any]:
    """The machine and the versions that the results belong to."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "cores usable": len(os.sched_getaffinity(0)),
        "load": [round(x, 2) for x in os.getloadavg()],
        **versions,
    }


def facts_text(found: dict[str, Any]) -> str:
    """The facts as one Markdown list."""
    return "\n".join(f"- {name}: {value}" for name, value in found.items())


def write(
    out: Path, found: dict[str, Any], tables: Iterable[Table], targets: list[str]
) -> None:
    """Writes ``out`` with the endings ``.md`` and ``.json``.

    Args:
      out: path without ending; folders are made.
      found: the machine facts.
      tables: all tables.
      targets: one line for each target checked.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    tables = list(tables)
    parts = ["# Benchmarks", facts_text(found)]
    parts += [table.markdown() for table in tables]
    if targets:
        parts.append("## Targets\n\n" + "\n".join(f"- {t}" for t in targets))
    out.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    data = {
        "facts": found,
        "tables": [asdict(table) for table in tables],
        "targets": targets,
    }
    out.with_suffix(".json").write_text(json.dumps(data, indent=1), encoding="utf-8")
