"""Faults of use that no single process makes, counted.

Rows of ``python -m benchmarks.faults``: readers beside a writer, histories of saves
under rules of retention, clocks that jump, forks, kills of managers and converts.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np

import sortal
from benchmarks.attacks import Model, bits, small, tried
from sortal.checkpoint import files, saving
from sortal.checkpoint.files import Location
from sortal.inspect.stored import convert
from sortal.interop.files.exchange import load_arrays


# -------------------------------------------------------------- readers beside a writer
def beside(where: Location, times: int, same_step: bool) -> Counter[str]:
    """Restores while another process replaces a step, or deletes all but the newest."""
    words = ["--writer", str(where), str(int(same_step))]
    found: Counter[str] = Counter()
    with _child(words) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        seen = -1
        for n in range(times):
            into = small(99)
            about: Any = None

            def read(into: Model = into, n: int = n) -> None:
                nonlocal about
                how = {} if n % 2 or not same_step else {"step": 1}
                about = sortal.restore(where, into, **how).metadata

            outcome = tried(read)
            if outcome:
                found["lost" if outcome == "noticed" else outcome] += 1
                continue
            generation = about["generation"]
            whole = bits(into) == bits(small(generation)) and generation >= seen
            found["new" if generation > seen else "again"] += whole
            found["silent"] += not whole
            seen = max(seen, generation)
    return found


@contextlib.contextmanager
def _child(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.faults", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def write_on(where: Location, same_step: bool) -> None:
    """Saves without end, of which the readers above are beside."""
    with sortal.Checkpoints(where, keep=1) as kept:
        generation = 0
        while True:
            about = {"generation": generation}
            step = 1 if same_step else generation
            kept.save(small(generation), step=step, metadata=about)
            if generation == 0:
                print("ready", flush=True)
            generation += 1


# --------------------------------------------------------------------------- histories
class _Told:
    """What should be there, by the rules as the documents have them."""

    def __init__(self, keep: int | None, every: int | None, best: bool):
        self.keep, self.every, self.best = keep, every, best
        self.saved: dict[int, tuple[float | None, bool]] = {}
        """By age, each step's score, None where no manager saved it; and if whole."""

    def save(self, step: int, score: float | None) -> None:
        self.saved.pop(step, None)
        self.saved[step] = score, True

    def due(self) -> set[int]:
        """The whole steps that must be there."""
        whole = [step for step, (_, fine) in self.saved.items() if fine]
        mine = [step for step in whole if self.saved[step][0] is not None]
        stays = {step for step in whole if self.saved[step][0] is None}
        if self.keep is None:
            return set(whole)
        stays.update(mine[-self.keep :])
        stays.update(s for s in mine if self.every and s % self.every == 0)
        if self.best and mine:
            stays.add(max(mine, key=lambda s: (self.saved[s][0], s)))
        return stays


def histories(where: Location, times: int, jump: bool = False) -> Counter[str]:
    """Saves, damage, deletions and restarts drawn at random, under rules so drawn.

    No whole step that the rule keeps may be gone, and the step just saved never. With
    ``jump`` the clock is another at each step, and so are the times of all files.
    """
    rng = random.Random(13 + jump)  # noqa: S311 - no secrets here
    found: Counter[str] = Counter()
    for n in range(times):
        run = where / str(n)
        told = _Told(rng.choice((None, 1, 1, 2, 3)), rng.choice((None, None, 4)),
                     rng.random() < 0.4)  # fmt: skip
        outcome = tried(lambda run=run, told=told: _history(run, told, rng, jump))
        if outcome:
            sys.stderr.write(f"history {n}: {outcome}\n")
        found[outcome or "kept"] += 1
        with contextlib.suppress(OSError):
            files.on(run).remove(run)
    found["lost"] = found.pop("noticed", 0) + found.pop("raw", 0)
    return found


def _history(run: Location, told: _Told, rng: random.Random, jump: bool) -> None:
    how = {"keep": told.keep, "keep_every": told.every,
           "best": "score" if told.best else None}  # fmt: skip
    kept = sortal.Checkpoints(run, **how)
    for _ in range(rng.randrange(2, 9)):
        action = rng.choice(("save", "save", "save", "lower", "plain", "damage",
                             "restart", "delete", "again"))  # fmt: skip
        known = list(told.saved)
        step = rng.randrange(12) if not known else max(known) + 1
        if known and action in ("lower", "again"):
            step = rng.choice(known) if action == "again" else rng.randrange(12)
        if action in ("save", "lower", "again", "plain"):
            score = rng.random()
            with _clock(rng if jump else None):
                if action == "plain":
                    kept.close()
                    sortal.save(run, {"w": sortal.Param(jnp.ones(2))}, step=step)
                else:
                    kept.save({"w": sortal.Param(jnp.ones(2))}, step=step,
                              metrics={"score": score})  # fmt: skip
            told.save(step, None if action == "plain" else score)
            _check(run, told, step)
            assert kept.latest() == step, "the newest is not the one saved last"
        elif action == "damage" and known:
            bad = rng.choice(known)
            _spoil(run / str(bad), rng)
            told.saved[bad] = told.saved[bad][0], False
        elif action == "restart":
            kept.close()
            kept = sortal.Checkpoints(run, **how)
        elif action == "delete" and told.due():
            gone = rng.choice(sorted(told.due()))
            kept.delete(gone)
            del told.saved[gone]
        if jump and isinstance(run, Path):
            for path in run.rglob("*"):
                os.utime(path, (moment := rng.uniform(0, 4e9), moment))
        for gone in set(told.saved) - set(files.steps(run)):
            if gone not in told.due():
                del told.saved[gone]
        _check(run, told, None)
    kept.close()


def _check(run: Location, told: _Told, saved: int | None) -> None:
    there = set(files.steps(run))
    due = told.due() | ({saved} if saved is not None else set())
    assert due <= there, f"{sorted(due - there)} are gone"


def _spoil(step: Location, rng: random.Random) -> None:
    """Makes a step one that is not whole: a part is gone, or of another size."""
    inside = sorted(files.on(step).names(step))
    with contextlib.suppress(IndexError, OSError):
        file = step / rng.choice([x for x in inside if not x.startswith(".last")])
        if file.name == "manifest.json" or rng.random() < 0.5:
            data = files.on(file).read(file)
            files.on(file).remove(file)
            files.on(file).write_file(file, data[:-1])
        else:
            files.on(file).remove(file)


@contextlib.contextmanager
def _clock(rng: random.Random | None) -> Iterator[None]:
    if rng is None:
        yield
        return
    year, second = rng.randrange(1970, 2100), rng.randrange(60)
    told = f"{year}-01-01T00:00:{second:02d}+00:00"
    with mock.patch.object(saving, "now", return_value=told):
        yield


# -------------------------------------------------------------------------------- forks
def forks(where: Path, times: int) -> Counter[str]:
    """Children forked from a process that saves: they save, restore, or live on."""
    found: Counter[str] = Counter()
    for n in range(times):
        with _child(["--forker", str(where / str(n)), str(n)]) as child:
            try:
                told, _ = child.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                found["hang"] += 1
                continue
        found.update(told.split() if not child.returncode else ["crash"])
    return found


def fork_once(where: Path, n: int) -> None:
    """Forks in the middle of a training, and says what became of parent and child."""
    warnings.simplefilter("ignore")
    kept = sortal.Checkpoints(where, keep=2)
    kept.save(small(0), step=0)
    saving = kept.save(small(1), step=1, wait=False) if n % 2 else None
    child = os.fork()
    if child == 0:
        doing = (
            lambda: kept.save(small(7), step=7),
            lambda: sortal.save(where / "other", small(7), step=7),
            lambda: sortal.restore(where, small(7)),
            lambda: os.kill(os.getpid(), signal.SIGSTOP),  # it lives on
        )[n // 2 % 4]
        os._exit({"noticed": 3, "": 4}.get(tried(doing), 5))
    if n // 2 % 4 == 3:
        os.waitpid(child, os.WUNTRACED)
        if saving is not None:
            saving.wait()
        kept.close()
        # The child has the lock's file open, and the lock is free all the same.
        outcome = tried(lambda: sortal.save(where, small(2), step=2))
        print({"": "free"}.get(outcome, "lost"))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    else:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print({3: "refused"}.get(code, "crash"))
        kept.save(small(2), step=2)
        kept.close()
    into = small(9)
    sortal.restore(where, into)
    print("intact" if bits(into) == bits(small(2)) else "lost")


# -------------------------------------------------------------------------------- kills
def leftovers(where: Location) -> list[str]:
    """What interrupted saves left in a directory of steps."""
    left = []
    for inside in files.on(where).tree(where, str.isdigit).values():
        folders = sorted(x for x in inside if x.startswith("arrays-"))
        left += folders["manifest.json" in inside :]
        left += [x for x in inside if x.startswith(".manifest-")]
    return left


def _killed(words: list[str], after: float) -> list[list[str]]:
    """What a process said that it has done before it was killed."""
    with _child(words) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(after)
        child.kill()
        told, _ = child.communicate()
    lines = told.split("\n")[:-1]  # the last may be cut off
    return [line.split()[1:] for line in lines if line.startswith("done ")]


def killed_managers(where: Location, times: int) -> Counter[str]:
    """Kills a manager that saves, deletes and keeps the best, at random moments."""
    rng = random.Random(15)  # noqa: S311 - no secrets here
    found: Counter[str] = Counter()
    told = _Told(2, 5, True)
    for n in range(times):
        words = ["--manager", str(where), str(n % 2)]
        for (step,) in _killed(words, rng.uniform(0.01, 0.6)):
            told.save(int(step), _score(int(step)))
        there = files.steps(where)
        newest = max(told.saved, default=-1) + 1
        if newest in there:  # it was committed as the kill came
            told.save(newest, _score(newest))
        found["unfinished"] += bool(leftovers(where))
        outcome = "intact" if told.due() <= set(there) else "lost"
        for step in there:
            into = lasting(99)
            if tried(lambda i=into, s=step: sortal.restore(where, i, step=s)):
                outcome = "lost"
            elif bits(into) != bits(lasting(step)):
                outcome = "silent"
        found[outcome] += 1
    with _manager(where) as kept:
        kept.save(small(0), step=10**6, metrics={"score": 0.0})
    found["left behind"] = len(leftovers(where))
    return found


def lasting(seed: int) -> Model:
    """The small model without the leaf that goes at the next save."""
    return {name: x for name, x in small(seed).items() if name != "last"}


def _score(step: int) -> float:
    return random.Random(step).random()  # noqa: S311 - no secrets here


def _manager(where: Location) -> sortal.Checkpoints:
    return sortal.Checkpoints(where, keep=2, keep_every=5, best="score")


def manage_on(where: Location, wait: bool) -> None:
    """Saves under a manager without end, and says of each save when it is committed."""
    # What only a first save does is over before the clock runs.
    with tempfile.TemporaryDirectory() as folder:
        sortal.save(folder, small(0), step=0)
    with _manager(where) as kept:
        step = max(files.steps(where), default=-1) + 1
        print("ready", flush=True)
        while True:
            metrics = {"score": _score(step)}
            kept.save(lasting(step), step=step, metrics=metrics, wait=wait).wait()
            print("done", step, flush=True)
            step += 1


def killed_converts(where: Path, times: int) -> Counter[str]:
    """Kills conversions between all formats: what is there must be whole."""
    rng = random.Random(16)  # noqa: S311 - no secrets here
    source = where / "source"
    saved = {"w": sortal.Param(jnp.arange(3e5)), "b": [sortal.Param(jnp.ones(9))] * 2}
    sortal.save(source, saved, step=1)
    before = _arrays(source)
    found: Counter[str] = Counter()
    for n in range(times):
        to = where / str(n)
        to.mkdir()
        words = ["--converter", str(source), str(to)]
        told = [path for (path,) in _killed(words, rng.uniform(0.05, 1.0))]
        found["conversions"] += len(told)
        outcome = "intact" if _arrays(source) == before else "silent"
        for path in sorted(to.iterdir()):
            if path.name.startswith(".") or ".orbax-checkpoint-tmp" in path.name:
                found["unfinished"] += 1
            elif path.name.endswith("-sortal") and not files.steps(path):
                found["unfinished"] += 1
                again = tried(lambda p=path: convert(str(source), str(p)))
                outcome = "lost" if again or str(path) in told else outcome
                found["left behind"] += len(leftovers(path))
            elif _arrays(path) != before:
                outcome = "silent"
        if any(not Path(path).exists() for path in told):
            outcome = "lost"
        found[outcome] += 1
        shutil.rmtree(to)
    return found


def _arrays(path: Path) -> dict[Any, bytes]:
    try:
        return {at: np.asarray(x).tobytes() for at, x in load_arrays(path).flat_state()}
    except sortal.errors.CheckpointError as e:
        return {(): str(e).encode()}


def convert_on(source: Path, to: Path) -> None:
    """Converts without end, and says of each target when it is written."""
    with tempfile.TemporaryDirectory() as folder:
        convert(str(source), f"orbax:{folder}/x")
        convert(str(source), f"{folder}/y")
    print("ready", flush=True)
    for n in range(10**6):
        for ending in (".safetensors", ".npz", "-sortal", "-orbax"):
            target = to / f"{n}{ending}"
            other = to / f"{n - 1}.safetensors"  # now and then from a foreign file
            prefix = "orbax:" if ending == "-orbax" else ""
            convert(str(other if n % 2 else source), prefix + str(target))
            print("done", target, flush=True)
