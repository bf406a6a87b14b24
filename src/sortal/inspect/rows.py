"""A model as rows of plain data: leaves, kinds, filters, changes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sortal._engine import variable
from sortal._engine.foreign import is_kind, same_kind
from sortal._engine.graphdef import GraphDef
from sortal._engine.nodes import LEAF
from sortal._engine.paths import Path, show
from sortal._engine.plan import bind
from sortal._engine.state import State
from sortal._engine.tables import nbytes
from sortal._engine.variable import Param, Variable, describe
from sortal.errors import FilterError
from sortal.filters import (
    At,
    Filter,
    Nothing,
    OfType,
    WithTag,
    leaf_filter,
    parts,
    to_filter,
)
from sortal.functional import state as state_of
from sortal.inspect.naming import full_name, labels
from sortal.module import Module, iter_modules

Kind = type | None

# Words in a kind's name that suggest a value which is recorded, not learned.
_RECORDED = re.compile(
    r"stat(istic)?s?$|stats?[A-Z_]|running|moving|average|ema$|cache|buffer|count|"
    r"step$|rng",
    re.IGNORECASE,
)


class LeafRow(NamedTuple):
    """One leaf of a model: where it is, what it is, and how large."""

    path: Path
    kind: Kind
    label: str
    """The kind's name, qualified where another kind here has the same one."""
    value: str
    """Dtype and shape, such as ``float32[3,4]``."""
    elements: int
    bytes: int
    dtypes: tuple[str, ...]
    aliases: tuple[Path, ...]
    """Other paths that lead to the same Variable."""


class KindRow(NamedTuple):
    """All leaves of one kind together."""

    kind: Kind
    label: str
    leaves: int
    elements: int
    bytes: int
    dtypes: tuple[str, ...]
    largest: Path


class Match(NamedTuple):
    """Which filter takes a leaf, by number from 1."""

    leaf: LeafRow
    by: int | None
    """The first filter that matches; None where none does."""
    also: tuple[int, ...]
    """Later filters that would match too."""


class FilterRow(NamedTuple):
    """How many leaves one filter takes."""

    number: int
    label: str
    takes: int
    elements: int
    matches: int
    """How many leaves it would take if it were the first."""


class Facts(NamedTuple):
    """What ``explain`` found."""

    taken: tuple[Match, ...]
    filters: tuple[FilterRow, ...]
    notes: tuple[str, ...]


class KindChange(NamedTuple):
    """How many leaves of a kind differ, bit for bit, between two states."""

    kind: Kind
    label: str
    leaves: int
    changed: int
    paths: tuple[Path, ...]
    """The paths that were changed, added or removed."""
    added: int
    removed: int


# ------------------------------------------------------------------- leaves
def leaves(model: Any) -> tuple[LeafRow, ...]:
    """Every leaf of a model once, in order, with the other paths to it.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> leaves({"w": nnx.Param(jnp.ones((2, 3)))})[0].value
      'float32[2,3]'
    """
    plan = bind(model)
    schema = plan.graphdef.schema
    names = labels(schema.kinds)
    aliases = _other_paths(plan.graphdef)
    rows = zip(schema.paths, schema.kinds, plan.values(), strict=True)
    return tuple(
        _leaf(path, kind, names[kind], value, aliases.get(path, ()))
        for path, kind, value in rows
    )


def _leaf(
    path: Path, kind: Kind, label: str, value: Any, aliases: tuple[Path, ...]
) -> LeafRow:
    sizes = [_size(x) for x in jax.tree.leaves(value, is_leaf=_is_abstract)]
    elements, size = sum(n for n, _, _ in sizes), sum(b for _, b, _ in sizes)
    dtypes = tuple(sorted({d for _, _, d in sizes}))
    return LeafRow(
        path, kind, label, show_value(value), elements, size, dtypes, aliases
    )


def show_value(value: Any) -> str:
    """A short text for any value that a Variable may hold.

    Example:
      >>> import jax
      >>> show_value(jax.ShapeDtypeStruct((2,), "float32"))
      'float32[2], abstract'
      >>> show_value({"k": jax.numpy.zeros(2), "n": 3})
      'dict of float32[2], int'
    """
    if _is_abstract(value):
        return f"{describe(value)}, abstract"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return describe(value)
    if value is None:
        return "None"
    parts = jax.tree.leaves(value, is_leaf=_is_abstract)
    if len(parts) == 1 and parts[0] is value:
        return type(value).__name__
    shown = [show_value(x) for x in parts[:3]]
    if len(parts) > 3:
        shown.append(f"and {len(parts) - 3} more")
    return f"{type(value).__name__} of {', '.join(shown) or 'nothing'}"


def _is_abstract(value: Any) -> bool:
    return isinstance(value, jax.ShapeDtypeStruct)


def _size(x: Any) -> tuple[int, int, str]:
    """Elements, bytes and dtype; an object that is no array counts as one element."""
    dtype, shape = getattr(x, "dtype", None), getattr(x, "shape", None)
    if dtype is not None and shape is not None:
        return math.prod(shape), nbytes(x), str(dtype)
    return 1, nbytes(x), type(x).__name__


def _other_paths(graphdef: GraphDef) -> dict[Path, tuple[Path, ...]]:
    """First path of each leaf to the later ones, by shared Variables and modules."""
    schema = graphdef.schema
    found: dict[Path, list[Path]] = {}
    shared: list[tuple[Path, Path]] = []
    for path, entry, first in graphdef.places():
        if entry.what == LEAF and first != path:
            found.setdefault(first, []).append(path)
        elif first != path:
            shared.append((first, path))
    for old, new in shared:
        n = len(old)
        if new[:n] == old:
            continue  # a reference to an ancestor, not a second path
        for path in schema.paths:
            if path[:n] == old:
                found.setdefault(path, []).append((*new, *path[n:]))
    return {path: tuple(others) for path, others in found.items()}


# -------------------------------------------------------------------- kinds
def kinds(model: Any) -> tuple[KindRow, ...]:
    """The leaves of a model, or the rows of ``leaves``, counted by kind.

    Parameters come first, unlabelled arrays last.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> row, = kinds([nnx.Param(jnp.ones((2, 3))), nnx.Param(jnp.ones(3))])
      >>> row.label, row.leaves, row.elements, row.bytes
      ('Param', 2, 9, 36)
    """
    given = isinstance(model, tuple) and all(isinstance(x, LeafRow) for x in model)
    rows: Sequence[LeafRow] = model if given else leaves(model)
    return tuple(_kind_row(group) for group in _by_kind(rows).values())


def _by_kind(rows: Sequence[LeafRow]) -> dict[Kind, list[LeafRow]]:
    groups: dict[Kind, list[LeafRow]] = {}
    for row in sorted(rows, key=lambda r: _rank(r.kind, r.label)):
        groups.setdefault(row.kind, []).append(row)
    return groups


def _rank(kind: Kind, label: str) -> tuple[int, str]:
    if kind is None:
        return (2, label)
    return (0 if is_kind(kind, Param) else 1, label)


def _kind_row(group: Sequence[LeafRow]) -> KindRow:
    return KindRow(
        group[0].kind,
        group[0].label,
        len(group),
        sum(row.elements for row in group),
        sum(row.bytes for row in group),
        tuple(sorted({d for row in group for d in row.dtypes})),
        max(group, key=lambda row: row.bytes).path,
    )


# ------------------------------------------------------------------ filters
def facts(model: Any, *filters: Any) -> Facts:
    """Which filter takes which leaf, without refusing anything.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> model = {"w": nnx.Param(jnp.ones(2)), "n": nnx.Variable(jnp.array(0))}
      >>> [(row.leaf.label, row.by) for row in facts(model, nnx.Param).taken]
      [('Variable', None), ('Param', 1)]
    """
    read = tuple(map(to_filter, filters))
    plan = bind(model)
    schema = plan.graphdef.schema
    named = [f.type for f in parts(read) if isinstance(f, OfType)]
    names = labels([*schema.kinds, *named])
    rows = [leaf._replace(label=names[leaf.kind]) for leaf in leaves(model)]
    taken = []
    for leaf, row in zip(rows, schema.rows(plan.view()), strict=True):
        hits = [n for n, f in enumerate(read, 1) if f.test(*row)]
        taken.append(Match(leaf, hits[0] if hits else None, tuple(hits[1:])))
    table = tuple(
        _filter_row(n, names.get(f.type, "") if isinstance(f, OfType) else "", f, taken)
        for n, f in enumerate(read, 1)
    )
    tags = [m["tag"] for m in schema.metadata if "tag" in m]
    notes = [
        *_idle_filters(table, read, taken),
        *_idle_parts(table, read, list(schema.rows(plan.view()))),
        *_classes_of_objects(read),
        *_tag_hints(read, schema.paths, tags, rows),
        *_wide_filters(read, taken),
        *_namesakes(rows, named),
        *_trained_statistics(rows),
        *_split_modes(model),
    ]
    return Facts(tuple(taken), table, tuple(dict.fromkeys(notes)))


def _filter_row(
    number: int, label: str, read: Filter, taken: Sequence[Match]
) -> FilterRow:
    mine = [t.leaf for t in taken if t.by == number]
    return FilterRow(
        number,
        label or repr(read),
        len(mine),
        sum(leaf.elements for leaf in mine),
        sum(number in (t.by, *t.also) for t in taken),
    )


def _idle_filters(
    table: Sequence[FilterRow], read: Sequence[Filter], taken: Sequence[Match]
) -> Iterator[str]:
    for row in table:
        if row.takes or (isinstance(read[row.number - 1], WithTag) and not row.matches):
            continue  # _tag_hints reports strings in more detail
        if not row.matches:
            yield f"Filter {row.number}, {row.label}, matches no leaf."
            continue
        by = sorted({t.by for t in taken if t.by and row.number in t.also})
        first = " and ".join(f"filter {n}, {table[n - 1].label}," for n in by)
        yield (
            f"Filter {row.number}, {row.label}, takes nothing: all {row.matches} of "
            f"its leaves go to {first} which comes first. Write the narrower filter "
            "first."
        )


def _idle_parts(
    table: Sequence[FilterRow], read: Sequence[Filter], rows: Sequence[Any]
) -> Iterator[str]:
    for row, whole in zip(table, read, strict=True):
        inner = [f for f in parts((whole,)) if f is not whole]
        for f in inner if row.matches else ():
            named = isinstance(f, (Nothing, WithTag)) or hasattr(f, "filters")
            if not named and not any(f.test(*leaf) for leaf in rows):
                yield (
                    f"Filter {row.number}, {row.label}: its part {f!r} matches no leaf."
                )


def _classes_of_objects(read: Sequence[Filter]) -> Iterator[str]:
    for f in read:
        try:
            leaf_filter(f)
        except FilterError as error:
            yield str(error)


def _tag_hints(
    read: Sequence[Filter],
    paths: Sequence[Path],
    tags: Sequence[str],
    rows: Sequence[LeafRow],
) -> Iterator[str]:
    texts = [f.tag for f in parts(read) if isinstance(f, WithTag)]
    for text in texts:
        if text in tags:
            continue
        start = f"The string {text!r} is read as a tag, and no leaf has it"
        prefix = tuple(text.split("."))
        at = [tuple(map(str, p)) for p in paths]
        below = [p for p in at if p[: len(prefix)] == prefix and len(p) > len(prefix)]
        if prefix in at:
            yield f"{start}. For the path write {At(text)!r}."
        elif below:
            glob = At(f"{text}.**")
            yield f"{start}. For the {len(below)} leaves below write {glob!r}."
        elif text in {row.label for row in rows}:
            yield f"{start}. For the kind write the class {text}, without quotes."
        elif tags:
            yield f"{start}. The tags here are {_and(sorted(map(repr, set(tags))))}."
        else:
            yield f"{start}."


def _wide_filters(read: Sequence[Filter], taken: Sequence[Match]) -> Iterator[str]:
    for number, f in enumerate(read, 1):
        if not isinstance(f, OfType):
            continue
        found = {t.leaf.label for t in taken if t.by == number} - {f.type.__name__}
        if f.type is Variable and found:
            yield (
                f"Filter {number}, Variable, is the base of every kind, so that it "
                f"also takes {_and(sorted(found))}."
            )


def _namesakes(rows: Sequence[LeafRow], named: Sequence[type]) -> Iterator[str]:
    """Kinds of one name that are different classes, built-in ones included."""
    present = [row.kind for row in rows if row.kind is not None]
    seen = list(dict.fromkeys([*present, *named]))
    groups: dict[str, list[type]] = {}
    for kind in seen:
        group = groups.setdefault(kind.__name__, [])
        if not any(same_kind(kind, other) for other in group):
            group.append(kind)
    for name, group in groups.items():
        built_in = _built_in(name)
        if built_in and not any(same_kind(built_in, other) for other in group):
            group.insert(0, built_in)
        if len(group) > 1:
            yield _namesake_note(name, group, rows)


def _built_in(name: str) -> Kind:
    found = getattr(variable, name, None)
    return found if getattr(found, "__module__", "") == "sortal" else None


def _namesake_note(name: str, group: Sequence[type], rows: Sequence[LeafRow]) -> str:
    places = []
    for kind in group:
        at = [show(row.path) for row in rows if row.kind is kind]
        places.append(f"{full_name(kind)} ({_some(at)})")
    text = f"{len(group)} different kinds are called {name}: {_and(places)}."
    below = [(a, b) for a in group for b in group if a is not b and issubclass(a, b)]
    for child, parent in below:
        text += (
            f" {full_name(child)} is a subclass of {full_name(parent)}, so that a "
            f"filter by {full_name(parent)} takes both."
        )
    return text if below else f"{text} A filter by one does not take the other."


def _trained_statistics(rows: Sequence[LeafRow]) -> Iterator[str]:
    for kind, group in _by_kind(rows).items():
        if not is_kind(kind, Param):
            continue
        built_in = _built_in(kind.__name__)
        if (built_in or _RECORDED.search(kind.__name__)) and not same_kind(
            kind, built_in
        ):
            at = [show(row.path) for row in group]
            yield (
                f"{group[0].label} is a subclass of Param, so that wrt=Param trains "
                f"it: {_some(at)}. Derive it from Variable if it is recorded rather "
                "than learned."
            )


def _split_modes(model: Any) -> Iterator[str]:
    """Where one library's modules are all in training, the other's in evaluation."""
    modules = list(iter_modules(model))
    for name in ("deterministic", "use_running_average"):
        having = [(p, m) for p, m in modules if isinstance(getattr(m, name, 0), bool)]
        ours = {show(p): getattr(m, name) for p, m in having if isinstance(m, Module)}
        theirs = {
            show(p): getattr(m, name) for p, m in having if not isinstance(m, Module)
        }
        modes = {*theirs.values()}, {*ours.values()}
        if [*map(len, modes)] == [1, 1] and modes[0] != modes[1]:
            (there,), (here,) = modes
            yield (
                f"{name} is {there} in Flax's modules ({_some([*theirs])}) and {here} "
                f"in Sortal's ({_some([*ours])}). Flax's own eval() and train() reach "
                f"Flax's modules alone: write sortal.set_attributes(model, {name}="
                f"{there})."
            )


def _some(names: Sequence[str]) -> str:
    """Up to four names."""
    if not names:
        return "none here"
    more = [f"{len(names) - 3} more"] if len(names) > 4 else []
    return _and([*names[: 3 if more else 4], *more])


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


# ------------------------------------------------------------------ changes
def differences(before: Any, after: Any) -> tuple[KindChange, ...]:
    """How many leaves of each kind differ, bit for bit, between two states.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> model = {"a": nnx.Param(jnp.zeros(2)), "b": nnx.Param(jnp.zeros(2))}
      >>> before = nnx.state(model)
      >>> model["b"][...] += 1
      >>> row, = differences(before, model)
      >>> row.changed, row.leaves, row.paths
      (1, 2, (('b',),))
    """
    old, new = _by_path(before), _by_path(after)
    names = labels([kind for kind, _ in [*old.values(), *new.values()]])
    groups: dict[Kind, list[Path]] = {}
    for path in dict.fromkeys([*old, *new]):
        kind = (new if path in new else old)[path][0]
        groups.setdefault(kind, []).append(path)
    order = sorted(groups.items(), key=lambda item: _rank(item[0], names[item[0]]))
    return tuple(_kind_change(k, names[k], at, old, new) for k, at in order)


def _by_path(x: Any) -> dict[Path, tuple[Kind, Any]]:
    state = x if isinstance(x, State) else state_of(x)
    schema = state.schema
    pairs = zip(schema.kinds, state.values_list(), strict=True)
    return dict(zip(schema.paths, pairs, strict=True))


def _kind_change(
    kind: Kind, label: str, at: Sequence[Path], old: Any, new: Any
) -> KindChange:
    both = [p for p in at if p in old and p in new]
    changed = [p for p in both if not _identical(old[p], new[p])]
    added = [p for p in at if p not in old]
    removed = [p for p in at if p not in new]
    return KindChange(
        kind,
        label,
        len(at),
        len(changed),
        tuple(p for p in at if p in {*changed, *added, *removed}),
        len(added),
        len(removed),
    )


def _identical(old: tuple[Kind, Any], new: tuple[Kind, Any]) -> bool:
    if old[0] is not new[0]:
        return False
    if old[1] is new[1]:
        return True
    a, b = (jax.tree.flatten(x, is_leaf=_is_abstract) for x in (old[1], new[1]))
    pairs = zip(a[0], b[0], strict=False)
    return a[1] == b[1] and all(_same_bits(x, y) for x, y in pairs)


def _same_bits(x: Any, y: Any) -> bool:
    if x is y or _is_abstract(x) or _is_abstract(y):
        return x is y or bool(x == y)
    if type(x) is not type(y) and not (_is_array(x) and _is_array(y)):
        return False
    if not _is_array(x):
        return x == y or repr(x) == repr(y)
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    return _bits(x) == _bits(y)


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def _bits(x: Any) -> bytes:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()
