"""What becomes of checkpoints when things go wrong, counted.

``python -m benchmarks.faults`` damages, truncates, kills, starves and attacks at full
size and prints one table; ``--quick`` does a little of each. A fault is *silent* if a
restore went through and gave other numbers than were saved: there must be none. It is a
*crash* or *raw* if anything but an error of Sortal came out: none of these either.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sortal
from benchmarks import attacks, histories, stores
from benchmarks.attacks import BAD
from benchmarks.histories import leftovers
from benchmarks.report import Row, Table
from sortal.checkpoint.files import located
from sortal.checkpoint.verifying import verify

Model = dict[str, Any]


def model(seed: int, megabytes: float = 0.2) -> Model:
    """Leaves of several kinds: many small, one larger, keys, counts, odd dtypes."""
    rng = np.random.default_rng(seed)
    rows = max(1, round(megabytes * 1e6 / 4096))

    def floats(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    return {
        "layers": [sortal.Param(floats(8, 16)) for _ in range(6)],
        "large": sortal.Param(floats(rows, 1024)),
        "mean": sortal.BatchStat(floats(16).astype(jnp.bfloat16)),
        "key": sortal.RngKey(jax.random.key(seed)),
        "count": sortal.RngCount(jnp.uint32(seed)),
        "nested": sortal.Cache({"a": floats(3), "b": (seed, 0.5)}),
        "raw": rng.integers(0, 99, 5),
    }


def bits(root: Any) -> list[bytes]:
    """All that a model, or a State, holds, as bytes."""
    leaves = jax.tree.leaves(sortal.state(root) if isinstance(root, dict) else root)
    return [_bits(x) for x in leaves]


def _bits(x: Any) -> bytes:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


# --------------------------------------------------------------------- damaged files
def flip(file: Path, rng: random.Random) -> None:
    """Turns one bit of a file over."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, rng: random.Random) -> None:
    """Cuts a file off somewhere."""
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def remove(file: Path, rng: random.Random) -> None:
    """Deletes a file."""
    file.unlink()


def foreign(file: Path, rng: random.Random) -> None:
    """Puts something else in the place of a file."""
    file.write_bytes(rng.randbytes(rng.randrange(1, 2000)))


def damage(
    where: Path, how: Callable[[Path, random.Random], None], times: int, seed: int = 0
) -> Counter[str]:
    """Damages one file after the other, and counts what a restore makes of it.

    Args:
      where: a folder to work in.
      how: what happens to a file.
      times: how often.
      seed: of the choice of files and bytes.

    Returns:
      How many faults were ``noticed``, ``silent`` and ``crash``; and ``unverified``,
      those that ``verify`` did not find.
    """
    rng = random.Random(seed)  # noqa: S311 - no secrets here
    saved = model(1)
    path = sortal.save(where, saved, step=1).path
    # Files are drawn first, so that small ones have their share of faults.
    files = sorted(f for f in path.rglob("*") if f.is_file())
    due = bits(saved)
    found: Counter[str] = Counter()
    for _ in range(times):
        file = rng.choice(files)
        intact = file.read_bytes()
        how(file, rng)
        found[_outcome(where, due)] += 1
        found["unverified"] += not _faults(where)
        file.unlink(missing_ok=True)
        file.write_bytes(intact)
    assert _outcome(where, due) == "equal"
    return found


def _outcome(where: Path, due: list[bytes]) -> str:
    into = model(2)
    before = bits(into)
    try:
        sortal.restore(where, into)
    except sortal.errors.CheckpointError:
        return "noticed" if bits(into) == before else "half restored"
    except Exception:  # noqa: BLE001 - that there is none is the claim
        return "crash"
    return "equal" if bits(into) == due else "silent"


def _faults(where: Path) -> bool:
    try:
        return bool(verify(where / "1").faults)
    except sortal.errors.CheckpointError:
        return True


# ------------------------------------------------------------------------------ kills
def _saver(where: Path, same_step: bool, wait: bool) -> None:
    """Saves without end, and says of each save when it is committed."""
    step = max(_steps(where), default=0)
    generation = int(os.environ["GENERATION"])
    pending = None
    # What only a first save does is over before the clock runs.
    with tempfile.TemporaryDirectory() as folder:
        sortal.save(folder, model(0, 6.0), step=0)
    print("ready", flush=True)
    while True:
        step += not same_step
        generation += 1
        root, about = model(1000 * generation + step, 6.0), {"generation": generation}
        saving = sortal.save(where, root, step=step, metadata=about, wait=wait)
        if pending is not None:
            print("done", *pending, flush=True)
        pending = (step, generation)
        if wait:
            print("done", *pending, flush=True)
            pending = None
        else:
            # Changed straight away, as a training step would.
            root["layers"][0][...] = 0.0
        del saving


def _steps(where: Path) -> list[int]:
    from sortal.checkpoint.files import steps

    return steps(where)


def kills(where: Path, times: int, same_step: bool, wait: bool) -> Counter[str]:
    """Kills a process that saves, at random moments, and looks at what is left.

    Args:
      where: a folder to work in.
      times: how often.
      same_step: whether it replaces one step, or goes on to new ones.
      wait: whether it saves synchronously.

    Returns:
      How many kills left all committed steps ``intact``; and ``lost`` or ``other``
      for steps that are gone or hold something else, ``unfinished`` for kills in the
      middle of a save.
    """
    rng = random.Random(same_step + 2 * wait)  # noqa: S311 - no secrets here
    found: Counter[str] = Counter()
    committed: dict[int, int] = {}
    where.mkdir(exist_ok=True)
    if same_step:
        first = model(1000 * 0 + 1, 6.0)
        sortal.save(where, first, step=1, metadata={"generation": 0})
        committed[1] = 0
    generation = 0
    for _ in range(times):
        generation += 1000
        _kill(where, same_step, wait, rng.uniform(0.05, 1.2), generation, committed)
        found.update(_aftermath(where, committed))
        for step in sorted(committed)[:-2]:
            shutil.rmtree(where / str(step))
            del committed[step]
    last = max(committed, default=0) + 1
    sortal.save(where, model(last), step=last)
    found["left behind"] = len(leftovers(where))
    return found


def _kill(
    where: Path, same_step: bool, wait: bool, after: float, generation: int,
    committed: dict[int, int],
) -> None:  # fmt: skip
    words = ["--saver", str(where), str(int(same_step)), str(int(wait))]
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.faults", *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "GENERATION": str(generation)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(after)
    child.kill()
    told, _ = child.communicate()
    for line in told.splitlines():
        if line.startswith("done ") and len(line.split()) == 3:
            _, step, number = line.split()
            committed[int(step)] = int(number)


def _aftermath(where: Path, committed: dict[int, int]) -> Iterator[str]:
    if leftovers(where):
        yield "unfinished"
    there = _steps(where)
    for step in committed:
        if step not in there:
            yield "lost"
            return
    for step in there:
        root = model(0, 6.0)
        try:
            about = sortal.restore(where, root, step=step).metadata
        except sortal.errors.CheckpointError:
            yield "lost"
            return
        generation = about["generation"]
        if bits(root) != bits(model(1000 * generation + step, 6.0)):
            yield "other"
            return
        # One that was committed as the kill came was not told of any more.
        if generation < committed.get(step, 0):
            yield "lost"
            return
        committed[step] = generation
    yield "intact"


# ------------------------------------------------------------------------- starvation
@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow past ``limit`` bytes: as on a full disk, a write fails."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody may write to a folder, not even the superuser's processes."""
    superuser = os.geteuid() == 0
    folder.chmod(0o555)
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)
        folder.chmod(0o755)


def starved(where: Path, times: int) -> Counter[str]:
    """Saves that run out of room, at every point on their way."""
    rng = random.Random(5)  # noqa: S311 - no secrets here
    saved = model(1, 1.0)
    sortal.save(where, saved, step=1)
    found: Counter[str] = Counter()
    for i in range(times):
        step = 1 + i % 2
        limit = rng.randrange(1, 900_000)
        try:
            with small_files(limit):
                sortal.save(where, model(7, 1.0), step=step, wait=bool(i % 4)).wait()
            found["saved"] += 1
        except sortal.errors.SaveError:
            found["refused"] += 1
        except Exception:  # noqa: BLE001 - that there is none is the claim
            found["crash"] += 1
        found[_still(where, saved)] += 1
    found["left behind"] = len(leftovers(where))
    return found


def resumed(where: Path, times: int) -> Counter[str]:
    """Training killed at random moments and resumed ends as if it had run through."""
    rng = random.Random(9)  # noqa: S311 - no secrets here
    script = Path(__file__).parents[1] / "examples" / "resume.py"
    words = [sys.executable, str(script), "--epochs", "8", "--every", "7"]

    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*words, str(where / name)], stdout=subprocess.PIPE, text=True
        )

    due = start("undisturbed").communicate()[0].splitlines()[-1]
    found: Counter[str] = Counter()
    for i in range(times):
        child = start(str(i))
        assert child.stdout is not None
        # Killed at a random step once there is one to go on from, in the middle of
        # whatever comes next.
        for line in child.stdout:
            saved = line.startswith("step ") and _steps(where / str(i))
            if saved and rng.random() < 1 / 30:
                break
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        child.communicate()
        second = start(str(i))
        again = second.communicate()[0].splitlines()
        found["resumed"] += any(x.startswith("resumed at step") for x in again)
        if second.returncode:
            outcome = "crash"
        else:
            outcome = "equal" if again[-1] == due else "other"
        found[outcome] += 1
        if outcome != "equal":
            print(f"{outcome} ({second.returncode}):", *again[:1], *again[-2:])
    return found


def _still(where: Path, saved: Model) -> str:
    into = model(0, 1.0)
    sortal.restore(where, into, step=1)
    there = bits(into) == bits(saved) and _steps(where) == [1]
    return "intact" if there else "lost"


# ------------------------------------------------------------------------ the command
CHILDREN: dict[str, tuple[int, Callable[..., None]]] = {
    "saver": (3, lambda p, same, wait: _saver(Path(p), same == "1", wait == "1")),
    "writer": (2, lambda p, same: histories.write_on(located(p), same == "1")),
    "manager": (2, lambda p, wait: histories.manage_on(located(p), wait == "1")),
    "converter": (2, lambda a, b: histories.convert_on(Path(a), Path(b))),
    "forker": (2, lambda p, n: histories.fork_once(Path(p), int(n))),
}
"""What processes that the rows start do, and with how many words."""


def _on_s3(row: Callable[..., Counter[str]], *how: Any) -> Callable[..., Counter[str]]:
    """The row in a bucket on a server of its own, in the place of the folder."""

    def run(_: Path, times: int) -> Counter[str]:
        with stores.s3_directory() as where:
            return row(located(where), times, *how)

    return run


ATTACKS: list[tuple[str, int, Callable[[Path, int], Counter[str]]]] = [
    ("hostile manifests", 2000, attacks.lying),
    ("links, pipes and folders", 1000, attacks.links),
    ("readers beside deletions", 1000, lambda p, n: histories.beside(p, n, False)),
    ("readers beside a replacement", 1000, lambda p, n: histories.beside(p, n, True)),
    ("histories of retention", 2000, histories.histories),
    ("histories with clock jumps", 500, lambda p, n: histories.histories(p, n, True)),
    ("kill -9 of a manager", 50, histories.killed_managers),
    ("kill -9 of convert", 50, histories.killed_converts),
    ("forks", 50, histories.forks),
    ("S3: readers beside deletions", 200, _on_s3(histories.beside, False)),
    ("S3: readers beside a replacement", 200, _on_s3(histories.beside, True)),
    ("S3: histories of retention", 100, _on_s3(histories.histories)),
    ("S3: kill -9 of a manager", 20, _on_s3(histories.killed_managers)),
]


def main(arguments: list[str] | None = None) -> int:
    """Runs all faults and prints a table."""
    parser = argparse.ArgumentParser("benchmarks.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    for name, (count, _) in CHILDREN.items():
        parser.add_argument(f"--{name}", nargs=count, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, (_, work) in CHILDREN.items():
        if words := getattr(options, name):
            work(*words)
            return 0
    share = 50 if options.quick else 1
    table = Table("Faults", "occurrences")
    damages = (flip, 2000), (truncate, 500), (remove, 100), (foreign, 100)
    with tempfile.TemporaryDirectory() as folder:
        rows: list[tuple[str, Callable[[Path], Counter[str]]]] = [
            (
                f"{how.__name__}, {n // share}",
                lambda p, h=how, n=n: damage(p, h, n // share),
            )
            for how, n in damages
        ]
        rows += [
            (
                (
                    f"kill -9, {max(1, 50 // share)}, "
                    f"{'same step' if same else 'fresh step'}, "
                    f"{'synchronous' if wait else 'asynchronous'}"
                ),
                lambda p, s=same, w=wait: kills(p, max(1, 50 // share), s, w),
            )
            for same in (False, True)
            for wait in (True, False)
        ]
        rows.append(("disk full", lambda p: starved(p, max(4, 100 // share))))
        times = max(1, 20 // share)
        rows.append((f"resumed training, {times}", lambda p: resumed(p, times)))
        rows += [(f"{name}, {n // share}", lambda p, do=do, n=n: do(p, n // share))
                 for name, n, do in ATTACKS]  # fmt: skip
        rows = [row for row in rows if options.only in row[0]]
        for i, (name, run) in enumerate(rows):
            where = Path(folder) / str(i)
            where.mkdir()
            found = run(where)
            table.rows.append(Row(name, dict(found)))
            print(name, dict(found), file=sys.stderr, flush=True)
    print(table.markdown())
    return int(any(row.values.get(what) for row in table.rows for what in BAD))


if __name__ == "__main__":
    raise SystemExit(main())
