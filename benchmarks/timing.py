"""Timing contenders in turns, so that a noisy moment hits all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Call = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Args:
      repeats: rounds; in each, every contender is timed once.
      seconds: how long one contender runs in one round, at least.
      warmup: untimed calls before the first round; the first one compiles.
      patience: seconds of one call from which on that call alone is the measurement.
    """

    repeats: int = 7
    seconds: float = 0.02
    warmup: int = 3
    patience: float = float("inf")


@dataclass(frozen=True)
class Timing:
    """What one call takes, in microseconds: median and minimum over the rounds."""

    median: float
    best: float
    calls: int


def compare(calls: Mapping[str, Call], effort: Effort) -> dict[str, Timing]:
    """Times several calls in turns.

    The order rotates from round to round. Garbage collection stays on, as it is for
    users; what exists before the measurement is moved out of its sight, and nobody
    collects what another has left.

    Args:
      calls: contenders by name; each call blocks until its result is ready.
      effort: how long to measure.

    Returns:
      The Timing of each contender.
    """
    once = {name: _first(call, effort) for name, call in calls.items()}
    samples = {name: [found] for name, found in once.items()}
    names = [name for name, found in once.items() if found < effort.patience]
    loops = dict.fromkeys(calls, 1)
    for name in names:
        samples[name] = []
        loops[name] = max(1, min(20_000, round(effort.seconds / max(once[name], 1e-9))))
    gc.collect()
    gc.freeze()
    try:
        for turn in range(effort.repeats):
            start = turn % len(names) if names else 0
            for name in names[start:] + names[:start]:
                gc.collect()
                samples[name].append(_mean(calls[name], loops[name]))
    finally:
        gc.unfreeze()
    return {
        name: Timing(
            statistics.median(found) * 1e6, min(found) * 1e6, loops[name] * len(found)
        )
        for name, found in samples.items()
    }


def _first(call: Call, effort: Effort) -> float:
    """Seconds of one call after the untimed ones."""
    for _ in range(effort.warmup):
        call()
    return _mean(call, 1)


def _mean(call: Call, loops: int) -> float:
    clock = time.perf_counter
    start = clock()
    for _ in range(loops):
        call()
    return (clock() - start) / loops
