"""Matches leaves of a checkpoint with leaves of a model; lists all that do not fit."""

from __future__ import annotations

import ast
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sortal._engine.leaves import Slot
from sortal._engine.paths import part, show
from sortal._engine.schema import Schema, kind_name, select
from sortal._engine.state import as_state
from sortal._engine.statics import EMPTY
from sortal._engine.variable import make
from sortal.checkpoint.layout import aliases_of
from sortal.checkpoint.manifest import Path, encoded_paths
from sortal.checkpoint.taking import namesakes
from sortal.checkpoint.values import (
    DTYPES,
    Array,
    Plain,
    Tree,
    UnsavableError,
    arrays,
    describe,
    difference,
)
from sortal.errors import ArgumentError, RestoreError, listing
from sortal.filters import to_filter
from sortal.policy.policy import Policy, answers

ANY_KIND: Any = object()
"""The kind of leaves from formats without kinds: it fits every kind."""


class Candidate(NamedTuple):
    """A leaf of a checkpoint or of another file."""

    path: Path
    kind: Any
    value: Tree


class Options(NamedTuple):
    """What ``restore`` is allowed to do."""

    only: Any = None
    policy: Policy | None = None
    partial: bool = False
    rename: Mapping[str, str] | None = None
    cast: bool = False
    fill: Any = None


class Pair(NamedTuple):
    """A leaf of the model by number, its form now, and the value stored for it."""

    at: int
    live: Tree
    like: list[Any]
    """The live arrays."""
    stored: Tree


class Fit(NamedTuple):
    """What a restore will do."""

    pairs: list[Pair]
    filled: dict[int, Any]
    kept: list[int]
    """Leaves that stay as they are, because the checkpoint has none for them."""


def fit(
    plan: Any,
    given: Sequence[Candidate],
    tied: Iterable[tuple[Path, Path]] | None,
    options: Options,
    where: str,
) -> Fit:
    """Matches a checkpoint with a model; a RestoreError lists all that does not fit.

    ``tied`` has pairs of a path and the first path to the same object; it is None where
    the format does not store them. ``where`` names the checkpoint in messages.
    """
    matching = _Matching(plan, options)
    try:
        given, tied = matching.renamed(given, tied)
        found = matching.match(given, tied)
    except _NothingError as e:
        raise RestoreError(f"{where}: {e}") from None
    if matching.faults:
        raise RestoreError(
            f"{where} does not fit the model, which was left as it was; "
            "it differs in:\n"
            + "\n".join([listing(matching.faults), *matching.advice()])
        )
    return found


class _NothingError(Exception):
    """A filter or pattern has no effect."""


class _Matching:
    """One comparison of a checkpoint with a model, and the faults found so far."""

    def __init__(self, plan: Any, options: Options):
        self.plan, self.options = plan, options
        self.schema: Schema = plan.graphdef.schema
        self.faults: list[str] = []
        self.values = plan.values()
        self.chosen = self._chosen()

    def _chosen(self) -> dict[Path, int]:
        schema, view = self.schema, self.plan.view
        actions = answers(
            "checkpoint", schema, self.options.policy, view, default="keep"
        )
        at = range(len(schema))
        if self.options.only is not None:
            at = select(schema, (self.options.only,), view).parts[0][1]
        at = [i for i in at if actions[i] != "drop"]
        encoded = encoded_paths(schema)
        paths = [encoded[i] for i in at]
        self.faults += [f"one text for several paths: {p}" for p in namesakes(paths)]
        return dict(zip(paths, at, strict=True))

    # ---------------------------------------------------------------- what is given
    def renamed(
        self, given: Sequence[Candidate], tied: Any
    ) -> tuple[list[Candidate], Any]:
        """The leaves of the checkpoint, with their paths renamed to the model's."""
        table = {} if self.options.rename is None else self.options.rename
        if odd := odd_items(table, lambda *pair: all(type(x) is str for x in pair)):
            raise ArgumentError(
                "rename= is a mapping from globs of paths to globs of paths, as in "
                "rename={'old.**': 'new.**'}; found:\n" + listing_of(odd)
            )
        used: set[str] = set()

        def new(path: Path) -> Path:
            for old, pattern in table.items():
                if (found := translate(old, pattern, path)) is not None:
                    used.add(old)
                    return found
            return path

        moved = [c._replace(path=new(c.path)) for c in given]
        if idle := [f"{old!r}: {table[old]!r}" for old in table if old not in used]:
            raise _NothingError(
                f"rename= has patterns that fit no path in the checkpoint:\n"
                f"{listing(idle)}\nIts paths are:\n"
                + listing(show(c.path) for c in given)
            )
        if tied is not None:
            tied = {new(a): new(b) for a, b in tied}
        return moved, tied

    def _takes(self, candidate: Candidate) -> bool:
        if self.options.only is None or candidate.kind is ANY_KIND:
            return True
        chosen = to_filter(self.options.only)
        leaf = None
        if not chosen.structural:
            leaf = _abstract(candidate.value)
            if candidate.kind is not None:
                leaf = make(candidate.kind, leaf, EMPTY)
        return chosen.test(candidate.path, candidate.kind, {}, leaf)

    # ---------------------------------------------------------------------- matching
    def match(self, given: Sequence[Candidate], tied: Any) -> Fit:
        """Finds the pairs, and records all faults."""
        known = set(encoded_paths(self.schema))
        by_path: dict[Path, Candidate] = {}
        for c in given:
            if c.path in by_path:
                self.faults.append(f"given twice, after renaming: {show(c.path)}")
            by_path[c.path] = c
        extra = [c for c in given if c.path not in self.chosen and self._takes(c)]
        # A leaf that the model's policy or filter leaves out is no fault.
        extra = [c for c in extra if c.path not in known]
        if self.options.only is not None and not self.chosen and not extra:
            raise _NothingError(
                f"only={to_filter(self.options.only)!r} takes no leaf, neither of the "
                "model nor of the checkpoint."
            )
        alias = self._aliases(by_path, tied)
        pairs, filled, kept = [], {}, []
        if self.options.partial and not self.chosen.keys() <= by_path.keys():
            by_path = self._met_elsewhere(by_path, dict(tied or {}))
        for path, i in self.chosen.items():
            c = by_path.get(path)
            if c is not None:
                pairs += self._pair(i, c)
            elif not _below(path, alias):
                self._missing(i, filled, kept)
        if not self.options.partial:
            self.faults += [
                f"unknown: {_describe(c)}" for c in extra if not _below(c.path, alias)
            ]
        self._writable([p.at for p in pairs] + list(filled))
        if (self.chosen or given) and not (pairs or filled or self.faults):
            raise _NothingError(
                "it has no leaf in common with the model, so that nothing would be "
                "restored. Its paths are:\n" + listing(show(c.path) for c in given)
            )
        return Fit(pairs, filled, kept)

    def _pair(self, i: int, c: Candidate) -> list[Pair]:
        kind, like = self.schema.kinds[i], []
        try:
            live = describe(self.values[i], like)
        except UnsavableError as e:
            name = self.schema.describe(i)
            self.faults.append(f"type: {name} holds {e} in the model")
            return []
        if c.kind is not ANY_KIND and c.kind is not kind:
            self.faults.append(
                f"kind: {show(self.schema.paths[i])} is {_article(kind, c.kind)} "
                f"in the model, {_article(c.kind, kind)} in the checkpoint"
            )
            return []
        if what := difference(c.value, live, self._may_cast):
            self.faults.append(
                f"{what}: {self.schema.describe(i)} is {live.shown} in the model, "
                f"{c.value.shown} in the checkpoint"
            )
            return []
        return [Pair(i, live, like, c.value)]

    def _may_cast(self, stored: str, live: str) -> bool:
        if not self.options.cast or not {stored, live} <= DTYPES:
            return False
        kinds = (jnp.floating, jnp.integer, jnp.complexfloating)
        both = (jnp.dtype(stored), jnp.dtype(live))
        return any(all(jnp.issubdtype(d, k) for d in both) for k in kinds)

    def _missing(self, i: int, filled: dict[int, Any], kept: list[int]) -> None:
        name = self.schema.describe(i)
        if self.options.fill is not None:
            found = self._filling(i)
            if found is not _ABSENT:
                filled[i] = found
                return
        live: list[Any] = []
        shown = self._shown(i, live)
        abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in live)
        if self.options.partial and not abstract:
            kept.append(i)
            return
        why = ", and the model holds no value to keep" if self.options.partial else ""
        self.faults.append(f"missing: {name}, {shown}{why}")

    def _shown(self, i: int, live: list[Any]) -> str:
        try:
            return describe(self.values[i], live).shown
        except UnsavableError:
            return type(self.values[i]).__name__

    def _filling(self, i: int) -> Any:
        path, kind, fill = self.schema.paths[i], self.schema.kinds[i], self.options.fill
        if callable(fill) and not isinstance(fill, Mapping):
            found = fill(path, kind)
        else:
            state = as_state(fill)
            at = state.schema.index.get(path)
            if at is None:
                return _ABSENT
            found = state.values_list()[at]
        new: list[Any] = []
        try:
            # Given values are used as they are, without a cast.
            wrong = difference(
                describe(found, new), describe(self.values[i], []), lambda *_: False
            )
            wrong = wrong and f"something of another {wrong}"
        except UnsavableError as e:
            wrong = str(e)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in new):
            wrong = "a shape without values"
        if wrong:
            self.faults.append(
                f"fill: {self.schema.describe(i)} is {self._shown(i, [])} in the "
                f"model, and fill= gives {wrong}"
            )
        return found

    # ----------------------------------------------------------------------- aliases
    def _met_elsewhere(
        self, by_path: dict[Path, Candidate], tied: dict[Path, Path]
    ) -> dict[Path, Candidate]:
        """The leaves by the model's first paths, where they have any path in common."""
        ours = dict(aliases_of(self.plan.graphdef))
        theirs, mine = _children([*by_path, *tied]), _children([*self.chosen, *ours])
        found = dict(by_path)
        for path in self.chosen:
            first: Path = ()
            for key in path:
                first = (*first, key)
                first = tied.get(first, first)
            if first in by_path:
                found[path] = by_path[first]
        # What both sides have at one path, each by its first path.
        todo: list[tuple[Path, Path]] = [((), ())]
        seen = set(todo)
        for there, here in todo:
            if there in by_path and here in self.chosen:
                found.setdefault(here, by_path[there])
            for key in theirs.get(there, ()):
                if key in mine.get(here, ()):
                    a, b = (*there, key), (*here, key)
                    pair = tied.get(a, a), ours.get(b, b)
                    if pair not in seen:
                        seen.add(pair)
                        todo.append(pair)
        return found

    def _aliases(self, by_path: dict[Path, Candidate], tied: Any) -> set[Path]:
        """Records what is shared on one side only, and returns its paths."""
        if tied is None or self.options.partial:
            return set()
        ours = dict(aliases_of(self.plan.graphdef))
        considered = {p[:n] for p in self.chosen for n in range(len(p) + 1)}
        considered &= {p[:n] for p in by_path for n in range(len(p) + 1)}
        odd = set()
        for path in dict.fromkeys([*ours, *tied]):
            mine, theirs = ours.get(path), tied.get(path)
            if mine == theirs or not ({mine, theirs} & considered):
                continue
            odd.add(path)
            self.faults.append(
                f"alias: {show(path)} is {_tie(mine)} in the model, {_tie(theirs)} in "
                "the checkpoint"
            )
        return odd

    def _writable(self, at: list[int]) -> None:
        for i in at:
            leaf = self.plan.leaves[i]
            if type(leaf) is Slot and not leaf.writable:
                self.faults.append(
                    f"cannot be written: {self.schema.describe(i)} is in a tuple or "
                    "other value"
                )

    # ------------------------------------------------------------------------ advice
    def advice(self) -> list[str]:
        """Advice for each type of fault that was found."""
        words = {fault.partition(":")[0] for fault in self.faults}
        return [text for keys, text in _ADVICE if words & keys]


_ADVICE: tuple[tuple[set[str], str], ...] = (
    (
        {"missing", "unknown"},
        (
            "If leaves have other names, say rename={'old.**': 'new.**'}; if they are "
            "to be left as they are, partial=True; if they come from elsewhere, fill=. "
            "Only the step saved last has keep-last leaves; for others, partial=True."
        ),
    ),
    ({"dtype"}, "cast=True converts floats to floats and integers to integers."),
    ({"kind"}, "A kind that moved or was renamed: kinds={'old.module.Name': Name}."),
    ({"alias"}, "partial=True lets what is shared differ."),
    (
        {"cannot be written"},
        (
            "Save and restore a Variable that holds the whole value, as in "
            "box = Variable(value)."
        ),
    ),
    (
        {"shape", "structure", "type"},
        "only=, with a filter, leaves out what must not be restored.",
    ),
)
_ABSENT: Any = object()


def _below(path: Path, prefixes: set[Path]) -> bool:
    return (
        any(path[:n] in prefixes for n in range(len(path) + 1)) if prefixes else False
    )


def _children(paths: Iterable[Path]) -> dict[Path, dict[Any, None]]:
    """The keys that go on from each beginning of the paths."""
    found: dict[Path, dict[Any, None]] = {}
    for path in paths:
        for n, key in enumerate(path):
            found.setdefault(path[:n], {})[key] = None
    return found


def _tie(owner: Path | None) -> str:
    return "shared with nothing" if owner is None else f"the same as {show(owner)}"


def _describe(c: Candidate) -> str:
    kind = "" if c.kind is ANY_KIND else f" ({kind_name(c.kind)})"
    return f"{show(c.path)}{kind}, {c.value.shown}"


def _article(kind: Any, other: Any) -> str:
    name = kind_name(kind)
    if kind is not None and name == kind_name(other):
        name = f"{kind.__module__}.{kind.__qualname__}"
    return f"an {name}" if name[:1] in "aeiouAEIOU" else f"a {name}"


def _abstract(tree: Tree) -> Any:
    """A stand-in with the shape and dtype of a stored value, for filters to test."""
    if isinstance(tree, Array):
        dtype = jnp.dtype(tree.dtype)
        if tree.key is not None:
            dtype = jax.random.key(0, impl=tree.key.impl).dtype
        return jax.ShapeDtypeStruct(tree.shape, dtype)
    if isinstance(tree, Plain):
        return tree.value
    return [_abstract(a) for a in arrays(tree)]


def odd_items(given: Any, fits: Callable[[Any, Any], bool]) -> list[Any]:
    """The items of a mapping that do not fit; what is no mapping does not either."""
    if not isinstance(given, Mapping):
        return [given]
    return [item for item in given.items() if not fits(*item)]


def listing_of(items: Iterable[Any]) -> str:
    """Items of a mapping as ``key: value``, and what is none as it is, for messages."""
    pairs = (": ".join(map(repr, x)) if type(x) is tuple else repr(x) for x in items)
    return listing(f"{text:.100}" for text in pairs)


# --------------------------------------------------------------------------- renaming
class _Literal(NamedTuple):
    """An entry of a pattern that stands for one key, and no glob: ``['a.b']``."""

    key: str


_PART = re.compile(
    r"""(?:^|\.)(?P<glob>(?:(?!\[['"])[^.])+)"""
    r"""|(?:\[(?P<literal>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\])"""
)


@functools.lru_cache(maxsize=4096)
def _entries(pattern: str) -> tuple[str | _Literal, ...]:
    """A pattern's entries, written as paths are shown: ``table['a.b'].*``."""
    found: list[str | _Literal] = []
    at = 0
    while at < len(pattern):
        part = _PART.match(pattern, at) if pattern[0] != "." else None
        literal = None if part is None else part["literal"]
        key = ""
        try:
            key = "" if literal is None else ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            part = None
        if part is None:
            raise RestoreError(
                f"{pattern!r} is no pattern of a path: entries are joined by single "
                "dots, and one with odd characters is written ['a.b']."
            )
        found.append(part["glob"] if literal is None else _Literal(key))
        at = part.end()
    return tuple(found)


def translate(old: str, new: str, path: Path) -> Path | None:
    """The new path of a leaf, by a pair of globs such as ``enc.**`` and ``encoder.**``.

    Both have the same wild cards in the same order; one in ``new`` becomes what that in
    ``old`` matched. Digits are an index, but for ``007``, and ``['0']`` or ``['a.b']``
    is a key as it stands. None where ``old`` does not fit ``path``.

    Example:
      >>> translate("enc.*.w", "layers.*.kernel", ("enc", 3, "w"))
      ('layers', 3, 'kernel')
      >>> translate("x", "table['a.b']", ("x",))
      ('table', 'a.b')
    """
    from_, to = _entries(old), _entries(new)
    wild = [part for part in from_ if isinstance(part, str) and "*" in part]
    other = [part for part in to if isinstance(part, str) and "*" in part]
    if other != wild or set(wild) - {"*", "**"}:
        raise RestoreError(
            f"rename= {{{old!r}: {new!r}}}: both patterns must have the same wild "
            "cards, * or **, in the same order, each a whole entry."
        )
    taken = _matched(from_, path)
    if taken is None:
        return None
    parts: list[Any] = []
    for entry in to:
        if isinstance(entry, _Literal):
            parts.append(entry.key)
        elif entry in ("*", "**"):
            parts += taken.pop(0)
        else:
            parts.append(part(entry))
    return tuple(parts)


def _matched(pattern: tuple[str | _Literal, ...], path: Path) -> list[Path] | None:
    """What each wild card of a pattern takes of a path; None where it does not fit."""
    if not pattern:
        return [] if not path else None
    head, rest = pattern[0], pattern[1:]
    if head == "**":
        for n in range(len(path) + 1):
            if (found := _matched(rest, path[n:])) is not None:
                return [path[:n], *found]
        return None
    if not path or not _fits(head, path[0]):
        return None
    found = _matched(rest, path[1:])
    if found is None or head != "*":
        return found
    return [path[:1], *found]


def _fits(part: str | _Literal, key: Any) -> bool:
    if isinstance(part, _Literal):
        return key == part.key
    return fnmatch.fnmatchcase(str(key), part)
