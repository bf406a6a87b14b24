"""Saving and restoring beside raw files, safetensors and Orbax, on one disk.

``python -m benchmarks.checkpoints [--quick] [--directory DIR]`` prints two tables: a
large state, 524 MB in 400 leaves, and 5,000 leaves of 256 bytes. Contenders take turns;
a row has the least time of each. Each save goes to a new place, and is on disk when the
clock stops; a restore ends with JAX arrays in memory.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sortal
from benchmarks.report import Row, Table, facts, facts_text

State = dict[str, Any]
Contender = tuple[Callable[[Path, State], None], Callable[[Path, State], Any]]


# ------------------------------------------------------------------------- contenders
def _sync(folder: Path) -> None:
    """Puts the folder's own entries on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _raw_save(at: Path, state: State) -> None:
    at.mkdir()
    with (at / "data").open("wb") as file:
        for value in state.values():
            file.write(np.asarray(value))
        file.flush()
        os.fsync(file.fileno())
    _sync(at)


def _raw_restore(at: Path, state: State) -> Any:
    with (at / "data").open("rb") as file:
        found = [
            np.fromfile(file, v.dtype, v.size).reshape(v.shape) for v in state.values()
        ]
    return [jnp.array(x) for x in found]


def _safetensors_save(at: Path, state: State) -> None:
    from safetensors.numpy import save_file

    at.mkdir()
    save_file({k: np.asarray(v) for k, v in state.items()}, at / "data")
    _sync(at)
    with (at / "data").open("rb") as file:
        os.fsync(file.fileno())


def _safetensors_restore(at: Path, state: State) -> Any:
    from safetensors.numpy import load_file

    return [jnp.array(x) for x in load_file(at / "data").values()]


def _orbax(compressed: bool) -> Contender:
    from orbax.checkpoint import v1 as ocp

    def context() -> Any:
        chosen = ocp.Context()
        chosen.array.saving.use_compression = compressed
        return chosen

    def save(at: Path, state: State) -> None:
        with context():
            ocp.save_pytree(at, state)

    def restore(at: Path, state: State) -> Any:
        like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in state.items()}
        with context():
            return ocp.load_pytree(at, like)

    return save, restore


class _Model(sortal.Module):
    """The leaves as Params of a Module, which in training is there at every save."""

    def __init__(self, leaves: State):
        for name, value in leaves.items():
            setattr(self, name, sortal.Param(value))


_models: dict[int, _Model] = {}


def _sortal_save(at: Path, state: State) -> None:
    sortal.save(at, _models[id(state)], step=0)


def _sortal_restore(at: Path, state: State) -> Any:
    root = _Model({k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in state.items()})
    sortal.restore(at, root)
    return [v.value for v in vars(root).values()]


def contenders() -> Iterator[tuple[str, Contender]]:
    """Those that are installed, by name."""
    yield "sortal", (_sortal_save, _sortal_restore)
    yield "raw file + fsync", (_raw_save, _raw_restore)
    try:
        import safetensors  # noqa: F401

        yield "safetensors + fsync", (_safetensors_save, _safetensors_restore)
    except ImportError:
        pass
    try:
        yield "orbax v1", _orbax(compressed=True)
        yield "orbax v1, uncompressed", _orbax(compressed=False)
    except ImportError:
        pass


# ------------------------------------------------------------------------- measurement
def large(quick: bool) -> State:
    """524 MB in 400 leaves; a hundredth of it if ``quick``."""
    count, size = (4, 1 << 18) if quick else (400, 327_680)
    rng = np.random.default_rng(0)
    return {
        f"leaf{i}": jnp.asarray(rng.standard_normal(size, np.float32))
        for i in range(count)
    }


def small(quick: bool) -> State:
    """5,000 leaves of 256 bytes; 50 if ``quick``."""
    rng = np.random.default_rng(0)
    return {
        f"leaf{i}": jnp.asarray(rng.standard_normal(64, np.float32))
        for i in range(50 if quick else 5000)
    }


def measure(
    title: str, state: State, where: Path, rounds: int, names: str | None = None
) -> Table:
    """Times all contenders in turns on one state."""
    _models[id(state)] = _Model(state)
    megabytes = sum(v.nbytes for v in state.values()) / 1e6
    table = Table(f"{title}: {megabytes:.0f} MB in {len(state)} leaves", "seconds")
    least: dict[str, list[float]] = {}
    found = dict(contenders())
    if names:
        found = {name: found[name] for name in names.split(";")}
    # As in the other benchmarks: what exists before is no concern of the collector.
    gc.collect()
    gc.freeze()
    for turn in range(rounds):
        for name, (save, restore) in found.items():
            # Slow contenders need not be run often to be seen to be slow.
            if turn and name.startswith("orbax") and turn % 3:
                continue
            times = _once(save, restore, state, where / f"{name}-{turn}")
            best = least.setdefault(name, list(times))
            least[name] = [min(a, b) for a, b in zip(best, times, strict=True)]
            print(f"{name}: {times[0]:.3f} {times[1]:.3f}", file=sys.stderr)
    gc.unfreeze()
    ours = least["sortal"]
    for name, (saved, restored) in least.items():
        row: dict[str, float | None] = {"save": saved, "restore": restored}
        row |= {"save/sortal": saved / ours[0], "restore/sortal": restored / ours[1]}
        table.rows.append(Row(name, row))
    return table


def _once(save: Any, restore: Any, state: State, at: Path) -> tuple[float, float]:
    os.sync()
    start = time.perf_counter()
    save(at, state)
    saved = time.perf_counter() - start
    start = time.perf_counter()
    found = restore(at, state)
    jax.block_until_ready(found)
    restored = time.perf_counter() - start
    shutil.rmtree(at)
    return saved, restored


def peak_memory(quick: bool, where: Path) -> Table:
    """How far resident memory rises during a synchronous save."""
    words = [sys.executable, "-m", "benchmarks.checkpoints", "--memory", str(where)]
    done = subprocess.run(
        [*words, *(["--quick"] if quick else [])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    extra, size = map(float, done.stdout.split()[-2:])
    table = Table("Memory of a synchronous save", "MB")
    table.rows.append(
        Row("sortal", {"state": size, "extra": extra, "extra/state": extra / size})
    )
    return table


def _memory_child(quick: bool, where: Path) -> None:
    from benchmarks.memory import reset_peak, resident

    # What any first save brings into memory, code and threads, is no part of it.
    warm, state = small(quick=True), large(quick)
    _models.update({id(x): _Model(x) for x in (warm, state)})
    _sortal_save(where / "first", warm)
    before = resident("VmRSS")
    reset_peak()
    _sortal_save(where / "second", state)
    size = sum(v.nbytes for v in state.values()) / 1e6
    print(resident("VmHWM") - before, size)


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser("benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    parser.add_argument("--only", default="large,small,memory")
    parser.add_argument("--contenders", help="by semicolon; all if absent")
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory:
        _memory_child(options.quick, options.memory)
        return 0
    wanted = options.only.split(",")
    print(facts_text(facts()), "")
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        where, quick = Path(folder), options.quick
        rounds = 1 if quick else options.rounds
        if "large" in wanted:
            print(
                measure(
                    "Large", large(quick), where, rounds, options.contenders
                ).markdown()
            )
        if "small" in wanted:
            print(
                measure(
                    "Small", small(quick), where, rounds, options.contenders
                ).markdown()
            )
        if "memory" in wanted:
            print(peak_memory(quick, where).markdown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
