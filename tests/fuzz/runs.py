"""Many programs: drawn, checked, some side by side in threads, and counted."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import gc
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from . import compiled, edits, live, reference
from .trial import Counter, Failure, Program, check, run_live, shrink

KINDS = {"edits": edits.Drawn, "compiled": compiled.Drawn}
_SIDE_BY_SIDE = 8
"""How many programs are run in threads at once, of every fifth batch of so many."""


class Said:
    """What the reference did while a program was drawn."""

    def __init__(self, drawn: edits.Drawn):
        self.outcomes = drawn.outcomes
        self.portrait = drawn.world.portrait()


def draw(label: str, counts: Counter) -> tuple[Program, Said] | None:
    """The program of a label such as ``edits:12``; None where it is left out.

    Args:
      label: the kind and number of the program.
      counts: what is drawn is counted here.

    Returns:
      The program and what is expected of it.
    """
    kind = label.partition(":")[0]
    chance = random.Random(f"flax {label}").random()  # noqa: S311 - as in edits
    flax = live.flax_nnx is not None and chance < 0.25
    drawn = KINDS[kind](label, flax=flax, counts=counts)
    try:
        drawn.program()
        said = Said(drawn)
    except reference.Left:
        counts["left out, numbers too large"] += 1
        return None
    counts[f"programs: {kind}"] += 1
    if flax:
        counts["programs with objects of Flax"] += 1
    return Program(label, drawn.lines, drawn.codes, kind == "compiled"), said


@dataclasses.dataclass
class Outcome:
    """What a run found."""

    counts: Counter
    failures: list[Failure]


def run(labels: Iterable[str], *, most: int = 5, shrunk: bool = True) -> Outcome:
    """Draws and checks programs, a part of them in threads besides.

    Args:
      labels: the programs.
      most: failures after which to stop.
      shrunk: whether to shorten the programs that differ.

    Returns:
      The Outcome.
    """
    outcome = Outcome(collections.Counter(), [])
    batch: list[tuple[Program, Said]] = []
    with _frozen():
        for n, label in enumerate(labels):
            found = draw(label, outcome.counts)
            if found is None:
                continue
            failure = check(*found)
            if failure is not None:
                outcome.failures.append(shrink(failure) if shrunk else failure)
            elif n // _SIDE_BY_SIDE % 5 == 0:
                batch.append(found)
            if len(batch) == _SIDE_BY_SIDE:
                outcome.failures += side_by_side(batch)
                outcome.counts["programs in threads"] += len(batch)
                batch = []
            if len(outcome.failures) >= most:
                break
    return outcome


def side_by_side(batch: list[tuple[Program, Said]]) -> list[Failure]:
    """Runs programs that agree when they are alone at the same time.

    Args:
      batch: programs and what is expected.

    Returns:
      Those that differ now.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(_in_thread, batch))
    finally:
        sys.setswitchinterval(before)
    return [
        Failure(program, f"in threads: {text}", "")
        for (program, _), text in zip(batch, found, strict=True)
        if text
    ]


def _in_thread(pair: tuple[Program, Any]) -> str:
    return run_live(*pair, leaks=False)


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """The collector looks only at what programs make, which is thousandfold faster."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
