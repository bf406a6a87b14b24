"""The measured sections that run in this process, but for transforms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks import workload as w
from benchmarks.report import Table, timed_row
from benchmarks.timing import Effort, compare

SCALED = (w.STATE, w.PARAMS, w.SPLIT, w.MERGE, w.UPDATE, w.NOOP, w.STEP)
SIZES = (10, 100, 1_000, 10_000, 100_000)
SCALED_PEERS = ("sortal", "sortal_on_flax", "flax", "equinox", "raw")
PEERS_UP_TO = 10_000
STEP_UP_TO = 10_000
PEERS_COMPILED_UP_TO = 1_000

ON_FLAX = (
    "`sortal on flax` calls Sortal on the very models, optimizers and functions of "
    "`flax`. `flax` is the plain call, `nnx.jit`."
)

Peers = Mapping[str, ModuleType]
Calls = dict[str, Callable[[], Any]]


def progress(text: str) -> None:
    """Says on stderr what is being measured."""
    print(f"  {text}", file=sys.stderr, flush=True)


def collect(peers: Mapping[str, Any], calls_of: Callable[[Any], Calls | None]) -> Calls:
    """The calls of all contenders that have some."""
    calls: Calls = {}
    for peer in peers.values():
        calls.update(calls_of(peer) or {})
    return calls


def agree(row: str, calls: Calls) -> None:
    """Refuses to time contenders that compute different numbers."""
    found = {label: float(np.sum(call())) for label, call in calls.items()}
    for label, value in found.items():
        for other, reference in found.items():
            if abs(value - reference) > 1e-3 * (1 + abs(reference)):
                raise AssertionError(f"{row}: {label} and {other} differ: {found}")


def verbs(peers: Peers, effort: Effort, shape: w.Blocks) -> Table:
    """Every operation on one model that compiles nothing."""
    table = Table(
        f"Operations on a model of {3 * shape.depth + 2} modules and "
        f"{6 * shape.depth} Variables",
        "microseconds per call, medians",
        notes=[
            (
                "`state` is a snapshot everywhere; `eqx.filter`, `eqx.partition` and "
                "`eqx.combine` stand in for it, `split` and `merge`, with the filter "
                "tree made beforehand. Equinox has no counterpart to `update`."
            ),
            ON_FLAX,
        ],
    )
    # Each model is built once, before any row: one that is built after other rows lies
    # scattered over the heap that they left, and what is last built lies best.
    built = {name: peer.operations(shape, w.VERBS) for name, peer in peers.items()}
    for row in w.VERBS:
        progress(row)
        calls = collect(built, lambda found, row=row: found.get(row))
        table.rows.append(timed_row(row, compare(calls, effort)))
    return table


def compiled(peers: Peers, effort: Effort, shape: w.Blocks, deep: w.Blocks) -> Table:
    """Calls of compiled functions, with a large model and with a small one.

    Args:
      peers: the contenders.
      effort: how long to measure.
      shape: the model of the no-op and of the step that changes all leaves.
      deep: the model of the training step.

    Returns:
      The Table.
    """
    table = Table(
        f"Compiled calls with a model and its Adam state, {shape.leaves} leaves; "
        f"training steps of {deep.depth} blocks of width {deep.width}, batch 32; and "
        "the same of two Linears, 14 leaves",
        "microseconds per call, medians",
        notes=[
            (
                "raw JAX takes flat lists of the same arrays, the least there can be; "
                "nested, it takes them in lists of dicts and Optax's own state, as "
                "programs hold them. All training steps start from the same values, "
                "run the same arithmetic, donate nothing, and were checked to have the "
                "same first losses."
            ),
            "a call ends when one of its outputs is ready, which is when all are.",
            ON_FLAX,
        ],
    )
    plain = (w.NOOP, w.STEP)
    small = w.Pair()
    large = {name: peer.operations(shape, plain) for name, peer in peers.items()}
    pairs = {name: peer.operations(small, plain) for name, peer in peers.items()}
    rows: dict[str, Calls] = {
        w.NOOP: collect(large, lambda found: found[w.NOOP]),
        w.STEP: collect(large, lambda found: found[w.STEP]),
        w.TRAINING: collect(peers, lambda peer: peer.training(deep)),
        w.SMALL_NOOP: collect(pairs, lambda found: found[w.NOOP]),
        w.SMALL_TRAINING: collect(peers, lambda peer: peer.training(small)),
    }
    for row, calls in rows.items():
        progress(row)
        if row in (w.TRAINING, w.SMALL_TRAINING):
            for _ in range(3):
                agree(row, calls)
        table.rows.append(timed_row(row, compare(calls, effort)))
    return table


def lowering(peers: Peers, effort: Effort, depths: tuple[int, ...]) -> Table:
    """How long a training step takes before XLA compiles it."""
    table = Table(
        "Tracing and lowering a training step",
        "milliseconds, medians",
        notes=[
            (
                "from the call of `lower` until it returns: what a first call takes "
                "before XLA compiles. Each time the function is a new one."
            )
        ],
    )
    for depth in depths:
        progress(f"tracing {depth} blocks")
        shape = w.Blocks(depth)
        calls = collect(peers, lambda peer, shape=shape: peer.lowering(shape))
        table.rows.append(timed_row(f"{depth} blocks", compare(calls, effort), 1e3))
    return table


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
    for name in (name for name in SCALED_PEERS if name in peers):
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
        for row, calls in peers[name].operations(w.Cells(leaves), wanted).items():
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
