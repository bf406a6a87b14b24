"""Faults that somebody made on purpose, counted.

Rows of ``python -m benchmarks.faults``: manifests that lie, and links and pipes in the
place of files. Each function counts outcomes; those in ``BAD`` must not occur.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import sortal
from sortal.checkpoint import disk, files
from sortal.checkpoint.verifying import verify

BAD = (
    "silent", "crash", "half restored", "unverified", "lost", "other", "left behind",
    "hang", "outside", "raw",
)  # fmt: skip
"""Outcomes of which there must be none."""

Model = dict[str, Any]


def small(seed: int) -> Model:
    """A model of which a save takes milliseconds: arrays, nested and plain values."""
    rng = random.Random(seed)  # noqa: S311 - no secrets here

    def floats(n: int) -> Any:
        return jnp.asarray([rng.random() for _ in range(n)])

    return {
        "a": sortal.Param(floats(8)),
        "b": [sortal.Param(floats(4).reshape(2, 2)) for _ in range(2)],
        "mean": sortal.BatchStat(floats(3).astype(jnp.bfloat16)),
        "count": sortal.RngCount(jnp.uint32(seed)),
        "nested": sortal.Cache({"x": floats(3), "y": (seed, 0.5, "text", b"\0")}),
        "last": sortal.Param(floats(3), checkpoint="keep-last"),
    }


def bits(root: Model) -> list[bytes]:
    """All that a model holds, as bytes."""
    found = []
    for _, leaf in sortal.state(root).flat_state():
        x = leaf.value
        for part in (x["x"], *x["y"]) if isinstance(x, dict) else (x,):
            array = hasattr(part, "dtype")
            found.append(jnp.asarray(part).tobytes() if array else repr(part).encode())
    return found


class _HangError(BaseException):
    """Something took five minutes, more than any busy machine makes of it."""


@contextlib.contextmanager
def _limited(seconds: int = 300) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise _HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tried(do: Callable[[], Any]) -> str:
    """The name of what came out: nothing, an error of ours, another one, or a hang."""
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            warnings.simplefilter("ignore", UserWarning)
            do()
    except sortal.errors.SortalError:
        return "noticed"
    except _HangError:
        return "hang"
    except Exception as e:  # noqa: BLE001 - that there is none is the claim
        sys.stderr.write(f"raw: {type(e).__name__}: {e!s:.300}\n")
        return "raw"
    return ""


def _restored(where: Path, due: list[bytes]) -> str:
    into = small(99)
    before = bits(into)
    outcome = tried(lambda: sortal.restore(where, into))
    if outcome:
        return outcome if bits(into) == before else "half restored"
    return "equal" if bits(into) == due else "silent"


def _picture(folder: Path) -> dict[str, Any]:
    """Everything below a folder: files, links and folders."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)  # noqa: PTH115 - as text
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def _outside(where: Path) -> Path:
    """A folder beside the directory of steps, which nothing may touch."""
    for name in ("Documents", "arrays-00000000000000aa", "data"):
        (where / "outside" / name).mkdir(parents=True)
        (where / "outside" / name / "letter").write_text("dear")
    (where / "outside" / "file").write_text("whole")
    return where / "outside"


# ------------------------------------------------------------------- hostile manifests
_Place = tuple[Any, Any]


def _places(x: Any, below: bool = False) -> Iterator[_Place]:
    """Each container and key of some JSON, but for what users put there.

    That is metadata, and the plain values of leaves: another one is as good.
    """
    pairs = x.items() if type(x) is dict else enumerate(x) if type(x) is list else ()
    for key, value in pairs:
        if below or key not in ("metadata", "versions", "created"):
            yield x, key
            if key != "plain":
                yield from _places(value, below=True)


class _Twice(dict[Any, Any]):
    """A dict that is written with one of its keys twice."""

    again: _Place = ("", None)

    def items(self) -> Any:
        return [*super().items(), self.again]


TYPES = (None, True, False, 1.5, -1, "", "x", [], {}, [[]], [None], {"": 0}, "\ud800",
         "\0", "0x1p0", [0, 0], "float32", "nan")  # fmt: skip
HUGE = (2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), -1, 1e308,
        float("nan"), float("inf"))  # fmt: skip
NAMES = ("..", "../..", "../../outside", "../../../outside/Documents", "/etc/passwd",
         "a/../../../outside", ".", "", "outside", "con", "a\0b", "x" * 300, "~",
         "arrays-00000000000000aa", "manifest.json", "*", "a\\b", "link", "link/data",
         "Param/link", "Param/../../../outside")  # fmt: skip


def _typed(body: Any, rng: random.Random) -> None:
    at, key = rng.choice(list(_places(body)))
    at[key] = copy.deepcopy(rng.choice(TYPES))


def _huge(body: Any, rng: random.Random) -> None:
    numbers = [(x, k) for x, k in _places(body) if type(x[k]) is int]
    at, key = rng.choice(numbers)
    at[key] = rng.choice(HUGE)


def _missing(body: Any, rng: random.Random) -> None:
    at, key = rng.choice(list(_places(body)))
    del at[key]


def _more(body: Any, rng: random.Random) -> None:
    inside = [x[k] for x, k in _places(body) if type(x[k]) in (dict, list)]
    at = rng.choice(inside)
    if type(at) is dict:
        at[rng.choice(NAMES)] = copy.deepcopy(rng.choice(TYPES))
    else:
        at.insert(rng.randrange(len(at) + 1), copy.deepcopy(rng.choice(TYPES)))


def _named(body: Any, rng: random.Random) -> None:
    """A name that leads elsewhere, in the place of a text or of a key."""
    texts = [(x, k) for x, k in _places(body) if type(x[k]) is str]
    keys = [(x, k) for x, k in _places(body) if type(k) is str]
    at, key = rng.choice(texts + keys)
    if type(at[key]) is str and rng.random() < 0.5:
        at[key] = rng.choice(NAMES)
    elif type(key) is str:
        at[rng.choice(NAMES)] = at.pop(key)


def _renamed(body: Any, rng: random.Random) -> None:
    """One name everywhere that it stands, so that the manifest agrees with itself."""
    old = rng.choice([body["folder"], *body["arrays"], *(k["group"] for k in
                      body["kinds"])])  # fmt: skip
    new = rng.choice(NAMES)
    text = json.dumps(body)
    body.clear()
    body.update(json.loads(text.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])))


def _doubled(body: Any, rng: random.Random) -> None:
    """Something twice: an entry of a list, or a key with another value."""
    inside = [(x, k) for x, k in _places(body) if type(x[k]) in (dict, list) and x[k]]
    at, key = rng.choice(inside)
    found = at[key]
    if type(found) is list:
        found.append(copy.deepcopy(rng.choice(found)))
    else:
        twice = at[key] = _Twice(found)
        twice.again = rng.choice(list(found)), copy.deepcopy(rng.choice(TYPES))


def _odd_plain(body: Any, rng: random.Random) -> None:
    """A plain value of a leaf that is written in no form of its type."""
    plain = [x[k] for x, k in _places(body) if k == "plain"]
    odd = [x for x in TYPES if type(x) is not str]
    rng.choice(plain)[1] = copy.deepcopy(rng.choice(odd))


def _deep(body: Any, rng: random.Random) -> None:
    at, key = rng.choice(list(_places(body)))
    for _ in range(rng.choice((50, 200, 400))):
        at[key] = rng.choice(([at[key]], {"nest": "list", "children": [at[key]]}))


RULES: tuple[Callable[[Any, random.Random], None], ...] = (
    _typed, _huge, _missing, _more, _named, _renamed, _doubled, _odd_plain, _deep
)  # fmt: skip


def _written(body: Any) -> bytes:
    text = json.dumps(body, separators=(",", ":")).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    return b'{"sha256":"' + digest + b'","manifest":' + text + b"}\n"


def lying(where: Path, times: int) -> Counter[str]:
    """Manifests with right checksums and wrong contents, changed by rule.

    Each is restored, read without a model and verified, and then a manager saves with
    ``keep=1``, for what a manifest names is also what is deleted.
    """
    rng = random.Random(11)  # noqa: S311 - no secrets here
    outside = _outside(where)
    intact, saved = where / "intact", small(1)
    with sortal.Checkpoints(intact) as kept:
        folder = kept.save(saved, step=1, metadata={"note": [1, "x"]}).path
    manifest = json.loads((folder / "manifest.json").read_bytes())["manifest"]
    due, before = bits(saved), _picture(outside)
    found: Counter[str] = Counter()
    for n in range(times):
        run = where / "run"
        shutil.copytree(intact, run)
        _links(run / "1" / manifest["folder"], outside)
        body = copy.deepcopy(manifest)
        rule = RULES[n % len(RULES)]
        rule(body, rng)
        try:
            (run / "1" / "manifest.json").write_bytes(_written(body))
        except (ValueError, RecursionError):
            found["not written"] += 1
            shutil.rmtree(run)
            continue
        outcome = _restored(run, due)
        others = [
            tried(lambda run=run: sortal.load_state(run)),
            tried(lambda run=run: verify(run / "1")),
            tried(lambda run=run: _next(run)),
        ]
        found.update(x for x in others if x in BAD)
        found[outcome] += 1
        if outcome in BAD or set(others) & set(BAD):
            sys.stderr.write(f"{n} {rule.__name__}: {outcome} {others}\n")
        if _picture(outside) != before:
            found["outside"] += 1
            shutil.rmtree(outside)
            _outside(where)
        shutil.rmtree(run)
    return found


def _links(folder: Path, outside: Path) -> None:
    """Links to the folder beside it, under names that a manifest may give."""
    for name in ("link", "data", "Param/link"):
        (folder / name).symlink_to(outside)


def _next(run: Path) -> None:
    with sortal.Checkpoints(run, keep=1) as kept:
        kept.save(small(2), step=2)
        into = small(3)
        kept.restore(into)
        if bits(into) != bits(small(2)):
            raise AssertionError("the step just saved is not there")


# --------------------------------------------------------------------- links and pipes
def links(where: Path, times: int) -> Counter[str]:
    """A link, a pipe, a socket or a folder in the place of something in a directory."""
    rng = random.Random(12)  # noqa: S311 - no secrets here
    outside = _outside(where)
    intact, saved = where / "intact", small(1)
    with sortal.Checkpoints(intact) as kept:
        kept.save(small(5), step=0)
        kept.save(saved, step=1)
    due = bits(saved)
    twin = outside / "twin"
    shutil.copytree(intact, twin)
    before = _picture(outside)
    found: Counter[str] = Counter()
    for _ in range(times):
        run = where / "run"
        shutil.copytree(intact, run)
        path = rng.choice(sorted(run.rglob("*")))
        what = rng.choice(("twin", "elsewhere", "dangling", "loop", "pipe", "folder",
                           "endless", "nothing"))  # fmt: skip
        _replace(path, what, twin / path.relative_to(run), outside)
        outcome = _restored(run, due)
        if outcome == "silent" and not _committed(run, 1):
            outcome = "older step"  # the newest is no step any more
        others = [
            tried(lambda run=run: verify(run / "1")),
            tried(lambda run=run: _next(run)),
        ]
        found.update(x for x in others if x in BAD)
        found[outcome] += 1
        if outcome in BAD or set(others) & set(BAD):
            name = path.relative_to(run)
            sys.stderr.write(f"{what} at {name}: {outcome} {others}\n")
        if _picture(outside) != before:
            found["outside"] += 1
            sys.stderr.write(f"outside: {what} at {path.relative_to(run)}\n")
            before = _picture(outside)
        shutil.rmtree(run)
    return found


def _committed(run: Path, step: int) -> bool:
    return step in files.steps(run)


def _replace(path: Path, what: str, twin: Path, outside: Path) -> None:
    disk.remove(path)
    if what in ("twin", "elsewhere", "dangling", "loop", "endless"):
        path.symlink_to(
            {"twin": twin, "elsewhere": outside / "file", "loop": path,
             "dangling": path.parent / "nothing", "endless": Path("/dev/zero")}[what]
        )  # fmt: skip
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
