"""Many random programs: ``python -m tests.fuzz --edits 100000 --compiled 3000``."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

_CHUNK = {"edits": 4000, "compiled": 100}  # of one process, so that memory stays low
_SHOWN = 20


def main() -> int:
    """Returns 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--edits", type=int, default=0, help="programs of verbs, edits")
    parser.add_argument("--compiled", type=int, default=0, help="those with transforms")
    parser.add_argument("--seed", type=int, default=0, help="number of the first one")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument(
        "--most", type=int, default=5, help="failures a process stops at"
    )
    parser.add_argument(
        "--replay", metavar="edits:12", help="run and print one program"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return _part(options.part, options.most)
    if options.replay:
        return _replay(options.replay)
    return _all(options)


def _replay(label: str) -> int:
    from . import runs

    found = runs.draw(label, collections.Counter())
    if found is None:
        print("left out: its numbers are too large to be exact")
        return 0
    print(found[0].text())
    failure = runs.check(*found)
    if failure is None:
        print("\nagrees three ways")
        return 0
    print(f"\n{failure}\n\nshortened:\n{runs.shrink(failure)}")
    return 1


def _part(part: str, most: int) -> int:
    """The work of one process: says on one line what it found."""
    from . import runs

    kind, first, last = part.split(":")
    labels = [f"{kind}:{n}" for n in range(int(first), int(last))]
    outcome = runs.run(labels, most=most)
    failures = [(f.program.label, str(f)) for f in outcome.failures]
    print(json.dumps({"counts": outcome.counts, "failures": failures}))
    return 0


def _parts(options: Any) -> Iterator[str]:
    for kind in ("compiled", "edits"):
        last = options.seed + getattr(options, kind)
        for first in range(options.seed, last, _CHUNK[kind]):
            yield f"{kind}:{first}:{min(first + _CHUNK[kind], last)}"


def _work(part: str, most: int) -> tuple[str, float, dict[str, Any]]:
    begun = time.monotonic()
    command = [sys.executable, "-m", "tests.fuzz", "--part", part, "--most", str(most)]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False
    )
    took = time.monotonic() - begun
    try:
        return part, took, json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        text = f"the process ended with {done.returncode}:\n{done.stderr[-2000:]}"
        return part, took, {"counts": {}, "failures": [(part, text)]}


def _all(options: Any) -> int:
    counts: collections.Counter[str] = collections.Counter()
    failures: list[Any] = []
    seconds: collections.Counter[str] = collections.Counter()
    begun = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(_work, part, options.most) for part in _parts(options)]
        for job in concurrent.futures.as_completed(jobs):
            part, took, found = job.result()
            counts.update(found["counts"])
            seconds[part.partition(":")[0]] += took
            failures += found["failures"]
            rate = f"{part}: {took:.0f} s, {len(found['failures'])} differ"
            print(rate, file=sys.stderr, flush=True)
    _table(counts)
    for kind, took in sorted(seconds.items()):
        n = counts[f"programs: {kind}"]
        print(f"{n} programs of {kind}: {took:.0f} s of processes")
    print(f"{time.monotonic() - begun:.0f} s with {options.jobs} processes at a time")
    for label, text in sorted(map(tuple, failures))[:_SHOWN]:
        print(f"\n--- {label} differs; python -m tests.fuzz --replay {label}\n{text}")
    print(f"\n{len(failures)} differ" if failures else "\nno difference")
    return bool(failures)


def _table(counts: collections.Counter[str]) -> None:
    """What was drawn, one row for each kind of thing."""
    rows: dict[str, list[str]] = {}
    for name, n in sorted(counts.items()):
        kind, _, what = name.partition(" ")
        rows.setdefault(kind, []).append(f"{what} {n:,}")
    for kind, cells in rows.items():
        print(f"{kind:9} {', '.join(cells)}")


if __name__ == "__main__":
    sys.exit(main())
