"""What the commands inspect, diff, verify and convert do with files of arrays."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sortal._engine.paths import show
from sortal._engine.state import State
from sortal._engine.statics import static_key
from sortal._engine.tables import Report, Table, size
from sortal.checkpoint import files
from sortal.checkpoint.copying import copy_step, refuse_existing
from sortal.checkpoint.saving import save
from sortal.checkpoint.verifying import Verified, verify
from sortal.errors import DamagedError, SaveError, listing
from sortal.interop.files.entries import Entry, Opened, as_array, dotted, in_batches
from sortal.interop.files.exchange import is_file, open_arrays, write_arrays
from sortal.interop.files.gguf import is_quantised

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
    """``added``, ``removed``, ``structure``, ``kind``, ``shape``, ``dtype`` or
    ``values``."""
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
    same = old.format == new.format
    mine, theirs = ({e.name: _form(e, same) for e in x.entries} for x in (old, new))
    rows: list[Change] = []
    leaves: Counter[Any] = Counter()
    both = [name for name in mine if name in theirs]
    if same:
        rows += _structures(old, new)
    rows += [
        Change(e.name, e.kind, what, _what(e), None)
        for what, has, lacks in (("removed", mine, theirs), ("added", theirs, mine))
        for name, e in has.items()
        if name not in lacks
    ]
    alike = []
    for name in both:
        e, other = mine[name], theirs[name]
        leaves[e.kind] += 1
        if same and e.kind != other.kind:
            kinds = f"{short(e.kind)} -> {short(other.kind)}"
            rows.append(Change(name, e.kind, "kind", kinds, None))
        for what in ("shape", "dtype"):
            if getattr(e, what) != getattr(other, what):
                detail = f"{_what(e)} -> {_what(other)}"
                rows.append(Change(name, e.kind, what, detail, None))
                break
        else:
            alike.append(name)
    pairs = (_in_order(x, alike) for x in (old, new))
    for x, y in zip(*pairs, strict=True):
        rows += _values(_form(x, same), _form(y, same))
    return Compared(old, new, rows, leaves)


def _in_order(opened: Opened, names: Iterable[Any]) -> list[Entry]:
    found = {e.name: e for e in opened.entries}
    return in_batches(opened, [found[name] for name in names])


def _form(e: Entry, same: bool) -> Entry:
    """An entry; where the formats differ, in the form that all formats have."""
    return e if same else as_array(e) or e


def _structures(old: Opened, new: Opened) -> Iterable[Change]:
    """The leaves of both whose values have other containers."""
    for path in dict.fromkeys([*old.structures, *new.structures]):
        a, b = old.structures.get(path), new.structures.get(path)
        if a is not None and b is not None and a != b:
            yield Change(path, None, "structure", f"{a} -> {b}", None)


def _what(e: Entry) -> str:
    return e.dtype if e.plain else f"{e.dtype}[{','.join(map(str, e.shape))}]"


def _values(a: Entry, b: Entry) -> Iterable[Change]:
    x, y = a.read(), b.read()
    if a.plain or b.plain:
        if static_key(x) != static_key(y):
            detail = f"{_text(x)} -> {_text(y)}"
            yield Change(a.name, a.kind, "values", detail, None)
        return
    if x.tobytes() == y.tobytes() and x.dtype == y.dtype:
        return
    largest, share = _distance(x, y)
    detail = f"max |difference| {largest:.3g}, {share:.0%} of elements"
    yield Change(a.name, a.kind, "values", detail, largest)


def _text(x: Any) -> str:
    # Python refuses to print integers of very many digits.
    return f"{hex(x) if type(x) is int and x.bit_length() > 64 else repr(x):.40}"


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
        where = files.located(path)
        return Checked(Verified(where, 0, 0, (f"manifest.json: {e}",), ()))


# ---------------------------------------------------------------------------- convert
def convert(
    source: str,
    target: str,
    step: int | str = "latest",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes the arrays of one format in another; refuses what would be lost.

    Args:
      source: as for ``inspect``.
      target: a file ``.safetensors`` or ``.npz``; ``orbax:FOLDER``; else a folder of
        steps of Sortal, where it becomes a step of the same number, or 0. From Sortal
        to Sortal everything is kept, kinds, sharing and metadata too.
      step: which step of the source.
      progress: is called with the bytes read so far, and all there are.
    """
    opened = open_arrays(source, step)
    if opened.format == "gguf" and (odd := list(filter(is_quantised, opened.entries))):
        raise SaveError(
            f"{len(odd)} arrays are quantised, such as {dotted(odd[0].name)} "
            f"({odd[0].dtype}), and no other format holds these."
        )
    entries = in_batches(opened, opened.entries)
    to_orbax = target.startswith("orbax:")
    if to_orbax or is_file(target):
        entries = list(_reporting(_arrays(entries, target, to_orbax), progress))
        write_arrays(files.local(target.removeprefix("orbax:")), entries, to_orbax)
    elif opened.format == "sortal":
        copy_step(opened.path, target, progress)
    else:
        refuse_existing(files.located(target), 0)
        pairs = [(e.name, e.read()) for e in _reporting(entries, progress)]
        save(target, State.from_flat_path(pairs), step=0)
    return len(entries)


def _arrays(entries: list[Entry], target: str, keys: bool) -> list[Entry]:
    """Entries as arrays; refuses all plain values that no array holds.

    ``keys`` says whether the target has PRNG keys, which elsewhere are their words.
    """
    found = [
        (e, e if keys and e.dtype.startswith("key<") else as_array(e)) for e in entries
    ]
    if odd := [f"{show(e.name)}: {e.dtype}" for e, new in found if new is None]:
        raise SaveError(
            f"{target} holds arrays only, and these values would be lost:\n"
            f"{listing(odd)}\nConvert to a folder of Sortal, or save without them."
        )
    return [new for _, new in found if new is not None]


def _reporting(
    entries: Sequence[Entry], progress: Callable[[int, int], None]
) -> Iterable[Entry]:
    """The entries, which report when they are read."""
    total, done = sum(e.nbytes for e in entries), 0

    def get(e: Entry) -> Any:
        nonlocal done
        found = e.read()
        done += e.nbytes
        progress(done, total)
        return found

    for e in entries:
        yield e._replace(read=lambda e=e: get(e))
