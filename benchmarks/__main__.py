"""The command: ``python -m benchmarks [--quick] [--only verbs,...] [--out PATH]``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import peers as _peers
from benchmarks import report, sections
from benchmarks.imports import imports
from benchmarks.memory import memory
from benchmarks.report import Table
from benchmarks.targets import check
from benchmarks.timing import Effort
from benchmarks.transforms import transforms
from benchmarks.workload import Blocks

SECTIONS = (
    "verbs", "compiled", "tracing", "transforms", "imports", "memory", "scaling",
)  # fmt: skip
PATIENCE = 20.0
"""Seconds from which on a trace is not repeated: Flax's of 200 blocks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes what was asked for.

    Args:
      arguments: the command line; the process's own if absent.

    Returns:
      The exit status: 0, whether or not targets were met.
    """
    options = _parse(arguments)
    peers, notes = _peers.load(tuple(options.peers.split(",")))
    facts = report.facts()
    print(report.facts_text(facts), *(f"- {n}" for n in notes), "", sep="\n")
    tables: list[Table] = []
    for table in _measure(options, peers):
        print(table.markdown(), flush=True)
        tables.append(table)
    # Sizes so small say nothing about the targets.
    targets = [] if options.quick else check(tables)
    print("\n".join(targets))
    if options.out:
        report.write(Path(options.out), {**facts, "notes": notes}, tables, targets)
    return 0


def _measure(options: argparse.Namespace, peers: sections.Peers) -> Iterator[Table]:
    wanted = options.only.split(",")
    quick = options.quick
    effort = Effort(2, 0.001, 1) if quick else Effort(options.repeats)
    if "verbs" in wanted:
        yield sections.verbs(peers, effort, Blocks(2 if quick else 50))
    if "compiled" in wanted:
        shape, deep = Blocks(2 if quick else 50), Blocks(2 if quick else 40, 64)
        yield sections.compiled(peers, effort, shape, deep)
    if "tracing" in wanted:
        once = Effort(1 if quick else 3, seconds=0, warmup=0, patience=PATIENCE)
        yield sections.lowering(peers, once, (10, 20) if quick else (50, 200))
    if "transforms" in wanted:
        yield transforms(peers, effort, 2 if quick else 100)
    if "imports" in wanted:
        yield imports(1 if quick else 7)
    if "memory" in wanted:
        yield memory(20 if quick else 200)
    if "scaling" in wanted:
        sizes = (10, 100) if quick else sections.SIZES
        yield from sections.scaling(peers, effort, sizes)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default 7)")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by comma")
    parser.add_argument("--peers", default=",".join(_peers.NAMES), help="by comma")
    parser.add_argument("--out", help="writes PATH.md and PATH.json")
    options = parser.parse_args(arguments)
    unknown = set(options.only.split(",")) - set(SECTIONS)
    unknown |= set(options.peers.split(",")) - set(_peers.NAMES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
