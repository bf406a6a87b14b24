"""What the commands inspect, diff, verify and convert do with files of arrays."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sortal._engine.paths import show
from sortal._engine.state import State
from sortal._engine.tables import Report, Table
from sortal.checkpoint import files
from sortal.checkpoint.saving import save
from sortal.checkpoint.verifying import Verified, verify
from sortal.errors import DamagedError, SaveError
from sortal.inspect.text import size
from sortal.interop.files.entries import Entry, Opened, dotted
from sortal.interop.files.exchange import open_arrays, write_arrays

_LARGEST = 10


def short(kind: str | None) -> str:
    """The name of a kind without its module."""
    return "unlabelled array" if kind is None else kind.rpartition(".")[2]


# ---------------------------------------------------------------------------- inspect
class Contents(Report):
    """What is in a file or folder of arrays."""

    def __init__(self, opened: Opened):
        self.opened = opened
        self.rows: tuple[Entry, ...] = tuple(opened.entries)

    def data(self) -> dict[str, Any]:
        """The whole report as plain data for JSON."""
        return {
            "path": str(self.opened.path),
            "format": self.opened.format,
            **self.opened.about,
            "leaves": [
                {
                    "path": show(e.name), "kind": e.kind, "dtype": e.dtype,
                    "shape": list(e.shape), "bytes": e.nbytes, "sharding": e.spec,
                }
                for e in self.rows
            ],
        }  # fmt: skip

    def tables(self) -> tuple[Table, ...]:
        about = self.opened.about
        step = f", step {about['step']}" if "step" in about else ""
        notes = []
        if about.get("metadata"):
            notes.append(f"metadata: {about['metadata']}")
        if about.get("metrics"):
            notes.append(f"metrics: {about['metrics']}")
        if about.get("aliases"):
            notes.append(f"{len(about['aliases'])} paths lead to what others lead to")
        title = f"{self.opened.path} ({self.opened.format}{step})"
        return (
            Table(
                title,
                ("kind", "leaves>", "elements>", "bytes>", "dtypes"),
                tuple(self._kinds()),
                tuple(notes),
            ),
            Table(
                "Largest leaves",
                ("path", "kind", "dtype", "shape", "bytes>", "sharding"),
                tuple(map(_row, self._largest())),
            ),
        )

    def _kinds(self) -> Iterable[tuple[str, ...]]:
        groups: dict[str | None, list[Entry]] = {}
        for e in self.rows:
            groups.setdefault(e.kind, []).append(e)
        for kind, found in [*groups.items(), ("all", list(self.rows))]:
            dtypes = Counter(e.dtype for e in found)
            yield (
                short(kind),
                f"{len(found):,}",
                f"{sum(e.elements for e in found):,}",
                size(sum(e.nbytes for e in found)),
                ", ".join(dtypes),
            )

    def _largest(self) -> list[Entry]:
        return sorted(self.rows, key=lambda e: -e.nbytes)[:_LARGEST]


def _row(e: Entry) -> tuple[str, ...]:
    spec = "" if e.spec is None else str(e.spec.get("spec", e.spec.get("text")))
    shape = "x".join(map(str, e.shape)) or "-"
    return show(e.name), short(e.kind), e.dtype, shape, size(e.nbytes), spec


def inspect(path: str, step: int | str = "latest") -> Contents:
    """Looks at what is in a file or folder, without reading its arrays.

    Args:
      path: a checkpoint of Sortal or Orbax, or a file of safetensors, NumPy or GGUF.
      step: which step, in a folder of steps.
    """
    return Contents(open_arrays(path, step))


# ------------------------------------------------------------------------------- diff
class Change(NamedTuple):
    """How one leaf differs between two checkpoints."""

    path: tuple[Any, ...]
    kind: str | None
    what: str
    """``added``, ``removed``, ``kind``, ``shape``, ``dtype`` or ``values``."""
    detail: str
    largest: float | None
    """The largest absolute difference."""


class Compared(Report):
    """How two files of arrays differ."""

    def __init__(
        self, old: Opened, new: Opened, rows: list[Change], leaves: Counter[Any]
    ):
        self.old, self.new, self.leaves = old, new, leaves
        self.rows: tuple[Change, ...] = tuple(rows)

    def data(self) -> dict[str, Any]:
        """The whole report as plain data for JSON."""
        return {
            "old": str(self.old.path),
            "new": str(self.new.path),
            "same": not self.rows,
            "changes": [c._asdict() | {"path": show(c.path)} for c in self.rows],
            "kinds": [
                {"kind": kind, "leaves": n, "changed": self._changed(kind)}
                for kind, n in self.leaves.items()
            ],
        }

    def _changed(self, kind: str | None) -> int:
        return sum(c.kind == kind and c.what == "values" for c in self.rows)

    def tables(self) -> tuple[Table, ...]:
        title = f"{self.old.path} and {self.new.path}"
        kinds = tuple(
            (short(kind), f"{n:,}", f"{self._changed(kind):,}", self._most(kind))
            for kind, n in self.leaves.items()
        )
        rows = tuple(
            (show(c.path), short(c.kind), c.what, c.detail) for c in self.rows[:200]
        )
        heads = ("kind", "in both>", "other values>", "max |difference|>")
        tables = [Table(f"{title}: by kind", heads, kinds)]
        if rows:
            tables.append(Table("Leaves", ("path", "kind", "differs in", ""), rows))
        return tuple(tables)

    def _most(self, kind: str | None) -> str:
        found = [
            c.largest for c in self.rows if c.kind == kind and c.largest is not None
        ]
        return f"{max(found):.3g}" if found else "-"


def diff(
    a: str, b: str, steps: tuple[int | str, int | str] = ("latest", "latest")
) -> Compared:
    """Compares structure and values of two files or folders."""
    old, new = open_arrays(a, steps[0]), open_arrays(b, steps[1])
    mine = {e.name: e for e in old.entries}
    theirs = {e.name: e for e in new.entries}
    rows: list[Change] = []
    leaves: Counter[Any] = Counter()
    for name, e in mine.items():
        other = theirs.get(name)
        if other is None:
            rows.append(Change(name, e.kind, "removed", _what(e), None))
            continue
        leaves[e.kind] += 1
        rows += _compare(e, other, old.format == new.format)
    for name, e in theirs.items():
        if name not in mine:
            rows.append(Change(name, e.kind, "added", _what(e), None))
    return Compared(old, new, rows, leaves)


def _what(e: Entry) -> str:
    return f"{e.dtype}[{','.join(map(str, e.shape))}]"


def _compare(a: Entry, b: Entry, kinds: bool) -> Iterable[Change]:
    if kinds and a.kind != b.kind:
        yield Change(
            a.name, a.kind, "kind", f"{short(a.kind)} -> {short(b.kind)}", None
        )
    for what in ("shape", "dtype"):
        if getattr(a, what) != getattr(b, what):
            yield Change(a.name, a.kind, what, f"{_what(a)} -> {_what(b)}", None)
            return
    x, y = a.read(), b.read()
    if x.tobytes() == y.tobytes() and x.dtype == y.dtype:
        return
    largest, share = _distance(x, y)
    detail = f"max |difference| {largest:.3g}, {share:.0%} of elements"
    yield Change(a.name, a.kind, "values", detail, largest)


def _distance(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The largest absolute difference, and the fraction of numbers that differ."""
    if x.dtype.kind in "SU" or x.shape != y.shape:
        return math.nan, 1.0
    wide = np.complex128 if x.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        apart = np.abs(x.astype(wide) - y.astype(wide))
    # NaN in only one of the two counts as the largest difference.
    odd = np.isnan(apart) & ~(np.isnan(x.astype(wide)) & np.isnan(y.astype(wide)))
    apart = np.where(odd, np.inf, np.nan_to_num(apart, nan=0.0, posinf=np.inf))
    differs = np.ascontiguousarray(x).reshape(-1).view(np.uint8) != (
        np.ascontiguousarray(y).reshape(-1).view(np.uint8)
    )
    share = differs.reshape(max(x.size, 1), -1).any(-1).mean() if x.size else 0.0
    return float(apart.max(initial=0.0)), float(share)


# ----------------------------------------------------------------------------- verify
class Checked(Report):
    """What ``verify`` found."""

    def __init__(self, found: Verified):
        self.found = found
        self.rows: tuple[str, ...] = found.faults

    def data(self) -> dict[str, Any]:
        """The whole report as plain data for JSON."""
        found = self.found
        return {
            "path": str(found.path), "files": found.files, "bytes": found.bytes,
            "intact": not found.faults, "faults": list(found.faults),
            "extra": list(found.extra),
        }  # fmt: skip

    def tables(self) -> tuple[Table, ...]:
        found = self.found
        verdict = f"{len(found.faults)} damaged" if found.faults else "intact"
        title = f"{found.path}: {found.files} files, {size(found.bytes)}, {verdict}"
        rows = tuple(tuple(fault.split(": ", 1)) for fault in found.faults)
        notes = tuple(f"{name} is not of this checkpoint" for name in found.extra)
        return (Table(title, ("file", "fault") if rows else (), rows, notes),)


def check(path: str, step: int | str, progress: Callable[[int, int], None]) -> Checked:
    """Reads every byte of a step; a damaged manifest is a fault in the report too."""
    try:
        return Checked(verify(path, step, progress))
    except DamagedError as e:
        where = files.local(path)
        return Checked(Verified(where, 0, 0, (f"manifest.json: {e}",), ()))


# ---------------------------------------------------------------------------- convert
def convert(source: str, target: str, step: int | str = "latest") -> int:
    """Writes the arrays of one format in another.

    Args:
      source: as for ``inspect``.
      target: a file ``.safetensors`` or ``.npz``; ``orbax:FOLDER``; else a folder of
        steps of Sortal, where it becomes a step of the same number, or 0.
      step: which step of the source.
    """
    opened = open_arrays(source, step)
    if opened.format == "gguf" and (odd := [e for e in opened.entries if _packed(e)]):
        raise SaveError(
            f"{len(odd)} arrays are quantised, such as {dotted(odd[0].name)} "
            f"({odd[0].dtype}), and no other format holds these."
        )
    entries = [_plain(e) for e in opened.entries]
    if target.startswith("orbax:"):
        write_arrays(files.local(target.removeprefix("orbax:")), entries)
    elif Path(target).suffix:
        write_arrays(files.local(target), entries)
    else:
        number = files.step_number(opened.about.get("step", 0))
        state = State.from_flat_path([(e.name, _value(e)) for e in opened.entries])
        save(target, state, step=number)
    return len(entries)


def _packed(e: Entry) -> bool:
    return e.dtype not in ("f32", "f16", "f64", "i8", "i16", "i32", "i64")


def _plain(e: Entry) -> Entry:
    host = e.read()
    return e._replace(dtype=host.dtype.name, shape=host.shape, read=lambda: host)


def _value(e: Entry) -> Any:
    if e.dtype.startswith("key<"):
        impl = e.dtype.removeprefix("key<").removesuffix(">")
        return jax.random.wrap_key_data(jnp.asarray(e.read()), impl=impl)
    return e.read()
