"""The command ``python -m benchmarks.processes``: what several processes must keep.

Each part starts real processes with ``sortal launch``, does to them what its name says,
and counts. ``--count`` says how often; the figures in docs/distributed.md are those of
the numbers given there.

    equal       losses and bytes of 2 and 4 processes, and of one with eight devices
    kills       kill -9 of one in training, twice; each time on with 4, or with 2 and 4
    interrupts  Ctrl-C once while a step is being saved
    starts      starts and stops; no process, port or file may be left
    bytes       what each of four processes writes and reads, and how long it takes
    saves       kill -9 of one of four while they save; every committed step is whole
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import process_worker

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).parent / "process_worker.py"
LIMIT = 300


@contextmanager
def launched(
    count: int, devices: int, *arguments: object, wide: bool = False
) -> Iterator[Any]:
    """A running ``sortal launch`` of the worker; at the end of the block it is gone.

    With ``wide`` it computes in float64.
    """
    command = [sys.executable, "-m", "sortal.inspect.cli", "launch", "-n", count]
    command += ["--devices", devices, WORKER, *arguments]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    environment["JAX_ENABLE_X64"] = str(int(wide))
    process = subprocess.Popen(
        list(map(str, command)), env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        process.stdout.close()


def ran(count: int, devices: int, *arguments: object, wide: bool = False) -> str:
    """The output of a run that must go well."""
    with launched(count, devices, *arguments, wide=wide) as process:
        out, _ = process.communicate(timeout=LIMIT)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}:\n{out[-4000:]}")
    return out


def losses(path: Path) -> dict[int, float]:
    """The loss of each step; of a step done twice, the later."""
    return dict(map(json.loads, path.read_text().splitlines()))


# ------------------------------------------------------------------------------- equal
def equal(count: int, place: Path) -> None:
    """Losses of 2 and 4 processes of two devices against one of eight."""
    for model in ("digits", "lm"):
        for parallel in ("data", "fsdp"):
            found = {}
            for n, devices in ((1, 8), (2, 2), (4, 2)):
                name = f"{model}-{parallel}-{n}x{devices}"
                out = ran(
                    n, devices, "train", place / name, "--model", model, "--parallel",
                    parallel, "--steps", count, "--every", count, "--losses",
                    place / f"{name}.jsonl",
                )  # fmt: skip
                found[n] = losses(place / f"{name}.jsonl")
                held = set(re.findall(r"holds (\d+) bytes, (\d+) by the report", out))
                say(f"{name}: {len(found[n])} steps; bytes of each process {held}")
                if any(mine != due for mine, due in held):
                    raise AssertionError(held)
            for n in (2, 4):
                gaps = [abs(found[n][s] - found[1][s]) / found[1][s] for s in found[1]]
                say(f"{model} {parallel}: {n} x 2 and 1 x 8: largest {max(gaps):.1e}")


# ------------------------------------------------------------------------------- kills
STEPS = 30
FREE = (("model", "layers", 0, "bias"), ("model", "layers", 1, "mean"))
"""What float32 leaves open on another number of devices, and what follows from it.

BatchNorm takes the bias before it away, so that its gradient is 0 and what is computed
is the rounding of a sum, which Adam makes steps of its full size of.
"""


def kills(count: int, place: Path) -> None:
    """Kills in training; the end is that of a training that nobody disturbed."""
    words = ["--model", "tiny", "--steps", STEPS, "--every", 5, "--seed", 3]
    due = {}
    for wide in (False, True):
        whole = place / f"whole{wide}"
        ran(4, 2, "train", whole, *words, "--losses", f"{whole}.jsonl", wide=wide)
        due[wide] = outcome(whole)
    for round in range(count):
        for way in ("async", "sync"):
            sizes = (4, 4, 4) if (round + (way == "sync")) % 2 else (4, 2, 4)
            wide = round // 2 % 2 == 1
            where = place / f"{way}{round}"
            more = [*words, "--losses", f"{where}.jsonl"]
            more += ["--sync"] if way == "sync" else []
            ends = [killed(n, where, more, wide) for n in sizes[:-1]]
            ran(sizes[-1], 2, "train", where, *more, wide=wide)
            found = outcome(where)
            gaps = {k: difference(found[k], due[wide][k]) for k in found}
            told = ", ".join(f"{k} {gap:.1e}" for k, gap in gaps.items())
            say(f"{way} {sizes} float{64 if wide else 32}: {ends}; apart: {told}")
            if sizes[1] != 4 and not wide:
                gaps.pop("free")
            if max(gaps.values()) > (0 if sizes[1] == 4 else 1e-5):
                raise AssertionError(gaps)


def killed(n: int, where: Path, words: list[Any], wide: bool) -> str:
    """Trains until a random moment, and kills one process; what was seen of it."""
    at = random.randint(1, 20)  # noqa: S311 - no secret
    with launched(n, 2, "train", where, *words, wide=wide) as process:
        pids, steps, last, out = {}, 0, 0, []
        for line in process.stdout:
            out.append(line)
            if found := re.match(r"\[(\d)\] pid (\d+)", line):
                pids[int(found[1])] = int(found[2])
            if found := re.search(r" did (\d+)", line):
                steps, last = steps + 1, int(found[1])
            # A training that goes on has fewer steps left.
            if len(pids) == n and steps and (steps >= at or last >= STEPS - 5):
                break
        else:
            raise RuntimeError("".join(out[-30:]))
        victim = random.choice(sorted(pids))  # noqa: S311 - no secret
        os.kill(pids[victim], signal.SIGKILL)
        began = time.monotonic()
        out, _ = process.communicate(timeout=60)
        seconds = time.monotonic() - began
    told = f"process {victim} was ended by SIGKILL" in out
    if not told or process.returncode != 137 or seconds > 30:
        raise AssertionError((seconds, process.returncode, out[-3000:]))
    return f"{victim} of {n} at step {last}, all ended after {seconds:.1f} s"


def outcome(where: Path) -> dict[str, dict[Any, Any]]:
    """What a training leaves: arrays, losses, and its place in the data."""
    import sortal
    from sortal.checkpoint.verifying import open_step, read_step

    state = sortal.load_state(where)
    leaves = {
        p: np.asarray(process_worker.words(v.value)) for p, v in state.flat_state()
    }
    free = {path: leaves.pop(path) for path in FREE}
    place = read_step(open_step(where)).metadata
    told = {i: np.float64(x) for i, x in losses(Path(f"{where}.jsonl")).items()}
    data = {"data": np.array(list(json.dumps(place).encode()))}
    return {"arrays": leaves, "free": free, "losses": told, "data": data}


def difference(one: dict[Any, Any], two: dict[Any, Any]) -> float:
    """The largest difference of two sets of arrays; 0 only where all bits are equal.

    Of numbers above 1 it is relative to them.
    """
    if one.keys() != two.keys():
        raise AssertionError(one.keys() ^ two.keys())
    largest = 0.0
    for path, x in one.items():
        y = two[path]
        if x.tobytes() != y.tobytes():
            x, y = x.astype(np.float64), y.astype(np.float64)  # noqa: PLW2901
            apart = np.abs(x - y) / np.maximum(1, np.abs(y))
            largest = max(largest, float(apart.max()), 1e-300)
    return largest


# -------------------------------------------------------------------------- interrupts
def interrupts(count: int, place: Path) -> None:
    """Ctrl-C once; all end, and the newest step is whole."""
    import sortal
    from sortal.checkpoint.verifying import verify

    for round in range(count):
        where = place / str(round)
        words = ["--model", "tiny", "--steps", 10_000, "--every", 3]
        with launched(4, 2, "train", where, *words) as process:
            until = random.randint(5, 40)  # noqa: S311 - no secret
            for line in process.stdout:
                until -= " did " in line
                if not until:
                    break
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        seconds = time.monotonic() - began
        steps = sortal.Checkpoints(where).steps()
        bad = [s for s in steps if verify(where, s).faults]
        say(f"interrupted: exit code {process.returncode}, {seconds:.1f} s, {steps}")
        if process.returncode != 130 or "are killed" in out or bad:
            raise AssertionError((bad, out[-3000:]))


# ------------------------------------------------------------------------------ starts
def starts(count: int, place: Path) -> None:
    """Starts and stops in a row."""
    before, began, used = _world(place), time.monotonic(), set()
    for _ in range(count):
        out = ran(2, 1, "start", place)
        rows = re.findall(r"listens (\[.*\])", out)
        if len(rows) != 2:
            raise AssertionError(out)
        used.update(port for row in rows for port in json.loads(row))
    left, seconds = _world(place) - before, time.monotonic() - began
    say(f"{count} starts and stops, {seconds:.0f} s, {len(used)} ports; left: {left}")
    if left:
        raise AssertionError(left)


def _world(place: Path) -> set[str]:
    """Processes of ours, ports that somebody listens to, files in likely places.

    Others may open a port or make a file meanwhile. In namespaces of its own nobody is
    there: ``unshare -mnpf --mount-proc`` with an empty ``/tmp`` and ``ip link set lo
    up``.
    """
    lines = subprocess.run(
        ["ps", "-eo", "pid,ppid,args"],  # noqa: S607 - whichever ps there is
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    found = {x for x in lines if str(place) in x}
    # The leader of a group whose launcher is gone.
    found |= {x for x in lines if x.split()[1] == "1" and "read _; kill -TERM" in x}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":  # it listens
                found.add(f"port {int(words[1].rpartition(':')[2], 16)}")
    temporary = Path(tempfile.gettempdir())
    folders = (Path.cwd(), place, temporary, Path("/dev/shm"))  # noqa: S108 - only read
    return found | {str(p) for f in folders for p in f.iterdir()}


# ------------------------------------------------------------------------------- bytes
def counted(count: int, place: Path) -> None:
    """What four processes write and read, against one that writes the same."""
    alone = ran(1, 8, "bytes", place / "one", count)
    four = ran(4, 2, "bytes", place / "four", count)
    found: dict[int, list[dict[str, Any]]] = {}
    for n, out in ((1, alone), (4, four)):
        rows = re.findall(r"counted (\{.*\})", out)
        found[n] = list(map(json.loads, rows))
        for row in found[n]:
            say(f"{n} processes: {row}")
    for verb in ("save", "restore"):
        one, many = (max(r[verb] for r in found[n]) for n in (1, 4))
        say(f"{verb}: {one:.2f} s by one, {many:.2f} s by four: {many / one:.2f}")


# ------------------------------------------------------------------------------- saves
def saves(count: int, place: Path) -> None:
    """Kills one of four during saves, one directory for all; every step stays whole."""
    import sortal
    from sortal.checkpoint.verifying import verify

    where = place / "steps"
    for round in range(count):
        with launched(4, 1, "save", where, round * 1000) as process:
            pids, wanted = {}, random.randint(1, 4)  # noqa: S311 - no secret
            for line in process.stdout:
                if found := re.match(r"\[(\d)\] pid (\d+)", line):
                    pids[int(found[1])] = int(found[2])
                wanted -= line.startswith("[0] saving")
                if len(pids) == 4 and wanted <= 0:
                    break
            time.sleep(random.uniform(0, 0.5))  # noqa: S311 - no secret
            os.kill(random.choice(sorted(pids.values())), signal.SIGKILL)  # noqa: S311
            process.communicate(timeout=60)
        steps = sortal.Checkpoints(where).steps()
        bad = [s for s in steps if verify(where, s).faults]
        if bad:
            raise AssertionError(bad)
        say(f"{round + 1} kills; steps {steps} are whole")
    out = ran(4, 1, "read", where)
    say(
        f"{count} kills during saves, all steps whole; {out.count('restored')} restored"
    )


PARTS: dict[str, tuple[Callable[[int, Path], None], int]] = {
    "equal": (equal, 100),
    "kills": (kills, 10),  # 40 of them, in 20 trainings
    "interrupts": (interrupts, 10),
    "starts": (starts, 100),
    "bytes": (counted, 64),
    "saves": (saves, 100),
}


def say(text: str) -> None:
    """Prints at once."""
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts asked for.

    Args:
      arguments: the command line; the process's own if absent.

    Returns:
      The exit status: 0; a part that fails raises.
    """
    parser = argparse.ArgumentParser("benchmarks.processes", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by comma")
    parser.add_argument("--count", type=int, help="how often, or MB for bytes")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    options = parser.parse_args(arguments)
    random.seed(options.seed)
    jax.config.update("jax_enable_x64", True)  # checkpoints with float64 are read
    for part in options.only.split(","):
        do, usual = PARTS[part]
        with tempfile.TemporaryDirectory() as folder:
            do(options.count or usual, Path(folder))
        say(f"{part}: done")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
