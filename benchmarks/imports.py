"""What importing a library costs once JAX is imported, in processes of their own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.report import Row, Table
from benchmarks.sections import progress

MODULES = (
    "sortal", "sortal.nnx", "flax.nnx", "equinox", "spectrax", "brainstate", "optax",
)  # fmt: skip
_SCRIPT = """
import json, sys, time
import jax, jax.numpy
cpu, wall = time.process_time(), time.perf_counter()
__import__(sys.argv[1])
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
print(json.dumps([cpu * 1e3, wall * 1e3]))
"""


def imports(repeats: int = 7) -> Table:
    """Import times over ``jax`` and ``jax.numpy``; the first round is thrown away."""
    note = (
        "each in a new process that has imported jax and jax.numpy; bytecode and file "
        "caches warm."
    )
    table = Table(
        "Import time over jax", "milliseconds, medians over processes", notes=[note]
    )
    with tempfile.TemporaryDirectory() as folder:
        # Bytecode of our own, so that no setting or read-only folder keeps one
        # library from having it while another has it.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        samples = _samples(repeats, environment, table)
    for name, found in samples.items():
        cpu, wall = zip(*found, strict=True)
        values = {
            "CPU": statistics.median(cpu),
            "CPU, least": min(cpu),
            "wall": statistics.median(wall),
            "wall, least": min(wall),
        }
        table.rows.append(Row(name, values, {"samples": found}))
    return table


def _samples(
    repeats: int, environment: dict[str, str], table: Table
) -> dict[str, list[Any]]:
    """CPU and wall times by library; the first round only fills the caches."""
    samples: dict[str, list[Any]] = {name: [] for name in MODULES}
    for turn in range(repeats + 1):
        progress(f"imports, round {turn}")
        for name in list(samples):
            found = _import(name, environment)
            if found is None:
                del samples[name]
                table.notes.append(f"{name} left out: it cannot be imported.")
            elif turn:
                samples[name].append(found)
    return samples


def _import(name: str, environment: dict[str, str]) -> list[float] | None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, name],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        return None
    return json.loads(done.stdout.splitlines()[-1])
