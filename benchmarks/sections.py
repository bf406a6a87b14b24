"""The measured sections that run in this process: verbs, scaling, training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from benchmarks import workload as w
from benchmarks.report import Table, timed_row
from benchmarks.timing import Effort, compare

SCALED = (w.STATE, w.PARAMS, w.SPLIT, w.MERGE, w.UPDATE, w.NOOP, w.STEP)
SIZES = (10, 100, 1_000, 10_000, 100_000)
PEERS_UP_TO = 10_000
STEP_UP_TO = 10_000
PEERS_COMPILED_UP_TO = 1_000

ON_FLAX = (
    "`sortal on flax` calls Sortal on the very models, optimizers and functions of "
    "`flax`. flax/sortal on flax overhead is what `nnx.jit` adds to raw JAX's time "
    "over what `sortal.jit` adds."
)

Peers = Mapping[str, ModuleType]


def progress(text: str) -> None:
    """Says on stderr what is being measured."""
    print(f"  {text}", file=sys.stderr, flush=True)


def verbs(peers: Peers, effort: Effort, shape: w.Blocks) -> Table:
    """Every operation on one model with Adam state."""
    table = Table(
        f"Operations on a model of {3 * shape.depth + 2} modules and "
        f"{6 * shape.depth} Variables, {shape.leaves} leaves with Adam state",
        "microseconds per call, medians",
        notes=[
            (
                "`state` is a snapshot everywhere; `eqx.filter`, `eqx.partition` and "
                "`eqx.combine` stand in for it, `split` and `merge`, with the filter "
                "tree made beforehand. Equinox has no counterpart to `update`."
            ),
            (
                "The compiled rows take the model and its optimizer state; raw JAX "
                "takes one flat list of the same arrays. The step adds 1 to every leaf."
            ),
            (
                "Compiled calls end when one of their outputs is ready, which is when "
                "all are. flax/sortal compares with the plain call, `nnx.jit`."
            ),
            ON_FLAX,
        ],
    )
    # Each model is built once, before any row: one that is built after other rows lies
    # scattered over the heap that they left, and what is last built lies best.
    built = {name: peer.operations(shape, w.ROWS) for name, peer in peers.items()}
    for row in w.ROWS:
        progress(row)
        calls = collect(built, lambda found, row=row: found.get(row))
        table.rows.append(timed_row(row, compare(calls, effort)))
    return table


def collect(
    peers: Mapping[str, Any],
    calls_of: Callable[[Any], dict[str, Callable[[], Any]] | None],
) -> dict[str, Callable[[], Any]]:
    """The calls of all contenders that have some."""
    calls: dict[str, Callable[[], Any]] = {}
    for peer in peers.values():
        calls.update(calls_of(peer) or {})
    return calls


def scaling(
    peers: Peers, effort: Effort, sizes: tuple[int, ...] = SIZES
) -> list[Table]:
    """The cost per leaf at growing numbers of leaves: one table for each operation."""
    tables = {
        row: Table(f"Scaling of {row}", "nanoseconds per leaf, medians")
        for row in SCALED
    }
    for leaves in sizes:
        large = leaves >= 10_000
        limited = replace(effort, repeats=min(effort.repeats, 3), warmup=2)
        for row, calls in _scaled_calls(peers, leaves).items():
            progress(f"{row}, {leaves:,} leaves")
            timings = compare(calls, limited if large else effort)
            table = tables[row]
            table.rows.append(timed_row(f"{leaves:,}", timings, leaves / 1000))
    for table in tables.values():
        table.notes.append(flatness(table))
    tables[w.STEP].notes.append(
        f"at most {STEP_UP_TO:,} leaves: XLA's own compile time grows faster than "
        "their number, in raw JAX as well."
    )
    return list(tables.values())


def _scaled_calls(peers: Peers, leaves: int) -> w.Operations:
    """The calls at one size, with each contender's model built once for all rows."""
    found: w.Operations = {}
    for name, peer in peers.items():
        limited = name not in ("sortal", "raw")
        verbs_too = leaves <= PEERS_UP_TO or not limited
        compiled = leaves <= PEERS_COMPILED_UP_TO or not limited
        wanted = tuple(
            row
            for row in SCALED
            if (compiled if row in (w.NOOP, w.STEP) else verbs_too)
            and (row != w.STEP or leaves <= STEP_UP_TO)
        )
        if not wanted:
            continue
        for row, calls in peer.operations(w.Cells(leaves), wanted).items():
            found.setdefault(row, {}).update(calls)
    return found


def flatness(table: Table) -> str:
    """Whether Sortal's cost per leaf stays within twice its minimum from 1,000 on."""
    ratio = _growth(table, "sortal")
    if ratio is None:
        return "too few sizes of 1,000 leaves and more to judge scaling."
    verdict = "within" if ratio <= 2 else "NOT within"
    raw = _growth(table, "raw jax")
    beside = "" if raw is None else f" Raw JAX: {raw:.2f}."
    return (
        f"largest over smallest cost per leaf from 1,000 leaves on: {ratio:.2f}, "
        f"{verdict} 2.{beside}"
    )


def _growth(table: Table, contender: str) -> float | None:
    costs = [
        cost
        for row in table.rows
        if int(row.name.replace(",", "")) >= 1_000
        and (cost := row.values.get(contender)) is not None
    ]
    return max(costs) / min(costs) if len(costs) >= 2 else None


def training(peers: Peers, effort: Effort, shape: w.Blocks) -> Table:
    """A whole training step; the contenders must agree on the losses."""
    table = Table(
        f"Training step: {shape.depth} blocks of width {shape.width} with running "
        "statistics, batch 32, Adam",
        "microseconds per step, medians",
        notes=[ON_FLAX],
    )
    progress("training step")
    calls = collect(peers, lambda p: p.training(shape))
    losses = {name: [float(call()) for _ in range(3)] for name, call in calls.items()}
    first = next(iter(losses.values()))
    for name, found in losses.items():
        if any(abs(a - b) > 1e-3 * abs(b) for a, b in zip(found, first, strict=True)):
            raise AssertionError(f"{name} computes something else: {losses}")
    table.rows.append(timed_row("training step", compare(calls, effort)))
    table.notes.append(
        "all contenders start from the same values, run the same arithmetic, and were "
        f"checked to have the same first losses: {[round(x, 3) for x in first]}."
    )
    return table
