"""Peak memory of a compiled call, each measurement in a process of its own.

Run as a module it is that process: ``python -m benchmarks.memory flax train 1 200``
measures one contender and prints JSON.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.report import Row, Table
from benchmarks.sections import progress
from benchmarks.stacks import modules_stack, raw_stack

CONTENDERS = ("sortal", "flax", "raw")
TASKS = (("train", False), ("train", True), ("forward", False))
WIDTH = 2048
MB = 1_000_000


def memory(megabytes: int) -> Table:
    """Peak memory of a training step and of a forward pass."""
    table = Table(
        f"Memory of a compiled call on {megabytes} MB of Params",
        "MB",
        notes=[
            (
                "live: what JAX's live arrays hold between calls. Resting and peak: "
                "resident memory between calls, and at its highest during three more "
                "calls (VmHWM, after a reset), over what it was before the model was "
                "made; memory that XLA keeps for reuse counts."
            ),
            (
                "output, temp, alias: what XLA's memory_analysis says of the compiled "
                "program (alias: outputs in donated buffers); a dash where the library "
                "gives no way to it."
            ),
            (
                "training keeps Params and two moments of Adam; forward only reads "
                "the Params and returns one number."
            ),
        ],
    )
    for task, donate in TASKS:
        for name in CONTENDERS:
            label = f"{name}, {task}{', donated' if donate else ''}"
            progress(f"memory: {label}")
            found = _child(name, task, donate, megabytes)
            if found is None:
                table.notes.append(f"{label} left out: it does not run here.")
            else:
                table.rows.append(Row(label, found))
    return table


def _child(
    name: str, task: str, donate: bool, megabytes: int
) -> dict[str, float | None] | None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", name, task, str(int(donate)),
         str(megabytes)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )  # fmt: skip
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, task: str, donate: bool, megabytes: int) -> dict[str, Any]:
    """Measures in this process; to be called once in a new one.

    Args:
      name: a contender.
      task: ``train`` or ``forward``.
      donate: whether the model and optimizer state are donated.
      megabytes: the size of all Params together.

    Returns:
      Megabytes by column name.
    """
    depth = max(1, round(megabytes * MB / (4 * WIDTH * WIDTH)))
    prepare = _contender(name)
    empty = resident("VmRSS")
    call, lowered = prepare(task, depth, WIDTH, donate)
    call()
    call()
    resting = resident("VmRSS")
    reset_peak()
    for _ in range(3):
        call()
    peak = resident("VmHWM")
    live = sum(x.nbytes for x in jax.live_arrays())
    return {
        "live": live / MB,
        "resting": resting - empty,
        "peak": peak - empty,
        **_analysed(lowered),
    }


def _contender(name: str) -> Callable[..., Any]:
    """What prepares one; only its own library is imported, which takes memory too."""
    if name == "raw":
        return raw_stack.prepare
    library = importlib.import_module({"sortal": "sortal", "flax": "flax.nnx"}[name])
    return functools.partial(modules_stack.prepare, library)


def _analysed(lowered: Any) -> dict[str, float | None]:
    try:
        found = lowered.compile().memory_analysis()
    except Exception:  # noqa: BLE001 - not every library and version offers it
        found = None
    names = {
        "output": "output_size_in_bytes",
        "temp": "temp_size_in_bytes",
        "alias": "alias_size_in_bytes",
    }
    return {
        short: None if found is None else getattr(found, long) / MB
        for short, long in names.items()
    }


def resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / MB
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    _name, _task, _donate, _size = sys.argv[1:]
    print(json.dumps(measure(_name, _task, bool(int(_donate)), int(_size))))
