"""How two models or files differ: by leaf, and counted by kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sortal._engine.paths import Path
from sortal.inspect.html.numbers import gap
from sortal.inspect.html.source import Item, Kind, Source, read_arrays

Read = tuple[list[np.ndarray], str]


class Change(NamedTuple):
    """How one leaf differs.

    ``what`` is ``added``, ``removed``, ``kind``, ``shape``, ``dtype``, ``values`` or
    ``unknown``, of leaves whose values are not both at hand. ``largest`` is the largest
    absolute difference where ``what`` is ``values``, and both are numbers.
    """

    path: Path
    kind: Kind
    what: str
    detail: str
    largest: float | None = None


class KindCount(NamedTuple):
    """How many leaves of one kind are in both, and how many differ in what."""

    label: str
    both: int
    counts: dict[str, int]
    largest: float | None


def changed(
    item: Item, other: Item, read: Read, kinds: bool, values: bool
) -> Iterator[Change]:
    """How a leaf differs from its counterpart.

    ``read`` is what ``read_arrays`` gave for ``item``; ``kinds`` says whether both
    sides have kinds, and ``values`` whether values are to be compared.
    """
    if kinds and not _same_kind(item.kind, other.kind):
        what = f"{item.kind.label} -> {other.kind.label}"
        yield Change(item.path, item.kind, "kind", what)
    detail = f"{item.text} -> {other.text}"
    if item.shape != other.shape:
        yield Change(item.path, item.kind, "shape", detail)
    elif str(item.dtype) != str(other.dtype):
        yield Change(item.path, item.kind, "dtype", detail)
    elif values:
        yield from _values(item, other, *read)


def _same_kind(a: Kind, b: Kind) -> bool:
    if a.full is None or b.full is None:
        return a.full is b.full
    # Paired kinds of two libraries have each other among their classes.
    return a.full in {c.full for c in b.classes} and b.full in {
        c.full for c in a.classes
    }


def _values(
    item: Item, other: Item, mine: list[np.ndarray], mine_unread: str
) -> Iterator[Change]:
    theirs, unread = read_arrays(other)
    if item.arrays is None and other.arrays is None:
        return  # neither has values that could differ: both are abstract
    why = mine_unread or unread
    if why or [x.shape for x in mine] != [x.shape for x in theirs]:
        why = why or "the values are other containers"
        yield Change(item.path, item.kind, "unknown", f"not compared: {why}")
        return
    if [x.dtype for x in mine] != [x.dtype for x in theirs]:
        yield Change(item.path, item.kind, "dtype", f"{item.text} -> {other.text}")
        return
    gaps = [found for x, y in zip(mine, theirs, strict=True) if (found := gap(x, y))]
    if gaps:
        largest = max(g.largest for g in gaps)
        share = f"{max(g.share for g in gaps):.2%} of its numbers"
        numeric = not item.unread and largest == largest  # noqa: PLR0124 - not NaN
        yield Change(
            item.path, item.kind, "values", share, largest if numeric else None
        )


def one_sided(source: Source, other: Source, what: str) -> list[Change]:
    """The leaves of a source that the other has not."""
    there = {item.path for item in other.items}
    return [
        Change(item.path, item.kind, what, item.text)
        for item in source.items
        if item.path not in there
    ]


def counted(changes: list[Change], both: list[Item]) -> list[KindCount]:
    """Changes counted by the label of the kind; those of most leaves first."""
    labels = dict.fromkeys([x.kind.label for x in both])
    labels |= dict.fromkeys([c.kind.label for c in changes])
    found = []
    for label in labels:
        mine = [c for c in changes if c.kind.label == label]
        counts: dict[str, int] = {}
        for c in mine:
            counts[c.what] = counts.get(c.what, 0) + 1
        gaps = [c.largest for c in mine if c.largest is not None]
        n = sum(item.kind.label == label for item in both)
        found.append(KindCount(label, n, counts, max(gaps) if gaps else None))
    return sorted(found, key=lambda row: -row.both)
