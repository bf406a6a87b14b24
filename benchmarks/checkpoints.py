"""Saving and restoring beside raw files, safetensors and Orbax, on one disk.

``python -m benchmarks.checkpoints [--quick] [--directory DIR]`` prints a table for each
of ``STATES``, one of directories that have 30 steps already, and the memory of a save.
Contenders take turns; a row has the least time of each. Each save goes to a new place,
and is on disk when the clock stops; a restore ends with JAX arrays in memory. In the
column ``blocked`` is how long the program waits for a save that goes on beside it.
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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sortal
from benchmarks.report import Row, Table, facts, facts_text

State = dict[str, Any]


class Contender(NamedTuple):
    """Ways to save and restore; ``begin`` returns at once, with what waits for it."""

    save: Callable[[Path, State], Any]
    restore: Callable[[Path, State], Any]
    begin: Callable[[Path, State], Callable[[], Any]] | None = None


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

    def begin(at: Path, state: State) -> Callable[[], Any]:
        with context():
            return ocp.save_pytree_async(at, state).result

    def restore(at: Path, state: State) -> Any:
        like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in state.items()}
        with context():
            return ocp.load_pytree(at, like)

    return Contender(save, restore, begin)


class _Model(sortal.Module):
    """The leaves as Params of a Module, which in training is there at every save."""

    def __init__(self, leaves: State):
        for name, value in leaves.items():
            setattr(self, name, sortal.Param(value))


_models: dict[int, _Model] = {}


def _sortal_save(at: Path, state: State) -> None:
    sortal.save(at, _models[id(state)], step=0)


def _sortal_begin(at: Path, state: State) -> Callable[[], Any]:
    return sortal.save(at, _models[id(state)], step=0, wait=False).wait


def _sortal_restore(at: Path, state: State) -> Any:
    root = _Model({k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in state.items()})
    sortal.restore(at, root)
    return [v.value for v in vars(root).values()]


def contenders() -> Iterator[tuple[str, Contender]]:
    """Those that are installed, by name."""
    yield "sortal", Contender(_sortal_save, _sortal_restore, _sortal_begin)
    yield "raw file + fsync", Contender(_raw_save, _raw_restore)
    try:
        import safetensors  # noqa: F401

        found = Contender(_safetensors_save, _safetensors_restore)
        yield "safetensors + fsync", found
    except ImportError:
        pass
    try:
        yield "orbax v1", _orbax(compressed=True)
        yield "orbax v1, uncompressed", _orbax(compressed=False)
    except ImportError:
        pass


# ----------------------------------------------------------------------------- states
def _leaves(shapes: Mapping[str, tuple[int, ...]]) -> State:
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.standard_normal(shape, np.float32))
        for name, shape in shapes.items()
    }


def large(quick: bool) -> State:
    """524 MB in 400 leaves; a hundredth of it if ``quick``."""
    count, size = (4, 1 << 18) if quick else (400, 327_680)
    return _leaves({f"leaf{i}": (size,) for i in range(count)})


def small(quick: bool) -> State:
    """5,000 leaves of 256 bytes; 50 if ``quick``."""
    return _leaves({f"leaf{i}": (64,) for i in range(50 if quick else 5000)})


def many(quick: bool) -> State:
    """100,000 leaves of 256 bytes; 1,000 if ``quick``."""
    return _leaves({f"leaf{i}": (64,) for i in range(1000 if quick else 100_000)})


def gpt2(quick: bool) -> State:
    """The shapes of GPT-2 small; narrower if ``quick``."""
    d, words = (32, 503) if quick else (768, 50_257)
    block = {
        "ln_1.weight": (d,), "ln_1.bias": (d,), "attn.c_attn.weight": (d, 3 * d),
        "attn.c_attn.bias": (3 * d,), "attn.c_proj.weight": (d, d),
        "attn.c_proj.bias": (d,), "ln_2.weight": (d,), "ln_2.bias": (d,),
        "mlp.c_fc.weight": (d, 4 * d), "mlp.c_fc.bias": (4 * d,),
        "mlp.c_proj.weight": (4 * d, d), "mlp.c_proj.bias": (d,),
    }  # fmt: skip
    ends = {"wte.weight": (words, d), "wpe.weight": (1024, d)}
    ends |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
    blocks = {f"h.{i}.{k}": shape for i in range(12) for k, shape in block.items()}
    return _leaves(ends | blocks)


STATES = {"large": large, "small": small, "gpt2": gpt2, "many": many}


# ------------------------------------------------------------------------- measurement
_SLOW = 5.0
"""Seconds; contenders that take longer need not be run often to be seen to be slow."""


def measure(
    title: str, state: State, where: Path, rounds: int, names: str | None = None
) -> Table:
    """Times all contenders in turns on one state."""
    _models[id(state)] = _Model(state)
    megabytes = sum(v.nbytes for v in state.values()) / 1e6
    table = Table(f"{title}: {megabytes:.0f} MB in {len(state)} leaves", "seconds")
    least: dict[str, dict[str, float]] = {}
    found = dict(contenders())
    if names:
        found = {name: found[name] for name in names.split(";")}
    # As in the other benchmarks: what exists before is no concern of the collector.
    gc.collect()
    gc.freeze()
    for turn in range(rounds):
        for name, contender in found.items():
            best = least.setdefault(name, {})
            if best.get("save", 0) > _SLOW or (turn % 3 and name.startswith("orbax")):
                continue
            for column, x in _once(contender, state, where / f"{name}-{turn}").items():
                best[column] = min(x, best.get(column, x))
            shown = " ".join(f"{column} {x:.3f}" for column, x in best.items())
            print(f"{name}: {shown}", file=sys.stderr)
    gc.unfreeze()
    del _models[id(state)]
    ours = least["sortal"]
    for name, times in least.items():
        ratios = {f"{k}/sortal": times[k] / ours[k] for k in ("save", "restore")}
        table.rows.append(Row(name, {**times, **ratios}))
    return table


def _timed(do: Callable[[], Any]) -> tuple[float, Any]:
    os.sync()
    start = time.perf_counter()
    found = do()
    return time.perf_counter() - start, found


def _once(contender: Contender, state: State, at: Path) -> dict[str, float]:
    times = {}
    if contender.begin is not None:
        begin = contender.begin
        times["blocked"], wait = _timed(lambda: begin(at, state))
        times["save"] = times["blocked"] + _timed(wait)[0]
    if times.get("save", 0) < _SLOW:
        shutil.rmtree(at, ignore_errors=True)
        times["save"], _ = _timed(lambda: contender.save(at, state))
    files = (path for path in at.rglob("*") if path.is_file())
    times["MB on disk"] = sum(path.stat().st_size for path in files) / 1e6
    times["restore"], _ = _timed(
        lambda: jax.block_until_ready(contender.restore(at, state))
    )
    shutil.rmtree(at)
    return times


def older(quick: bool, where: Path, rounds: int) -> Table:
    """Saves of 5,000 leaves into directories that have 30 steps already."""
    model, steps = _Model(small(quick)), 30
    title = f"Directories with {steps} steps: {len(vars(model))} leaves"
    table = Table(title, "seconds")
    managed = sortal.Checkpoints(where / "managed", keep=None)
    for step in range(steps):
        sortal.save(where / "plain", model, step=step)
        managed.save(model, step=step)
    ways = {
        "save, no older step": lambda n: sortal.save(where / f"new{n}", model, step=n),
        "save": lambda n: sortal.save(where / "plain", model, step=n),
        "Checkpoints.save": lambda n: managed.save(model, step=n),
        "Checkpoints.restore": lambda n: managed.restore(model, step=n),
    }
    for name, do in ways.items():
        times = [_timed(lambda: do(steps + n))[0] for n in range(rounds)]  # noqa: B023
        table.rows.append(Row(name, {"seconds": min(times)}))
    managed.close()
    return table


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
    parser.add_argument("--only", default=",".join([*STATES, "older", "memory"]))
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
        for name in filter(wanted.__contains__, STATES):
            state = STATES[name](quick)
            title, names = name.capitalize(), options.contenders
            print(measure(title, state, where, rounds, names).markdown())
        if "older" in wanted:
            print(older(quick, where, rounds).markdown())
        if "memory" in wanted:
            print(peak_memory(quick, where).markdown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
