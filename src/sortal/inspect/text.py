"""Reports as tables: what ``explain``, ``tabulate`` and ``changes`` return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sortal._engine.paths import show
from sortal._engine.tables import Report, Table, size
from sortal.inspect import rows as _rows
from sortal.inspect.rows import FilterRow, KindChange, KindRow, LeafRow, Match


class Explanation(Report):
    """Which leaves of a model each filter takes; made by ``explain``.

    Attributes:
      rows: one Match for each leaf.
      filters: one FilterRow for each filter.
      left_over: the leaves that no filter takes.
      notes: sentences about what may not be meant.
    """

    def __init__(self, facts: _rows.Facts):
        self.rows: tuple[Match, ...] = facts.taken
        self.filters: tuple[FilterRow, ...] = facts.filters
        self.notes = facts.notes
        self.left_over: tuple[LeafRow, ...] = tuple(
            row.leaf for row in facts.taken if row.by is None and facts.filters
        )

    def tables(self) -> tuple[Table, ...]:
        if not self.filters:
            return (_leaf_table([row.leaf for row in self.rows], self.notes),)
        every = sum(row.leaf.elements for row in self.rows)
        summary = [
            (str(f.number), f.label, _share(f.takes, f.matches), f"{f.elements:,}")
            for f in self.filters
        ]
        rest = sum(leaf.elements for leaf in self.left_over)
        summary.append(("", "left over", str(len(self.left_over)), f"{rest:,}"))
        summary.append(("", "all leaves", str(len(self.rows)), f"{every:,}"))
        cells = [
            (
                _where(row.leaf),
                row.leaf.label,
                row.leaf.value,
                "left over" if row.by is None else str(row.by),
                ", ".join(map(str, row.also)),
            )
            for row in self.rows
        ]
        heads = ("path", "kind", "value", "filter", "also")
        return (
            Table("Filters", ("#>", "filter", "takes>", "elements>"), tuple(summary)),
            Table("Leaves", heads, tuple(cells), self.notes),
        )


class Summary(Report):
    """A model counted by kind and by leaf; made by ``tabulate``.

    Attributes:
      rows: one KindRow for each kind.
      leaves: one LeafRow for each leaf.
    """

    def __init__(self, leaves: tuple[LeafRow, ...]):
        self.leaves = leaves
        self.rows: tuple[KindRow, ...] = _rows.kinds(leaves)

    def tables(self) -> tuple[Table, ...]:
        cells = [
            (
                row.label,
                str(row.leaves),
                f"{row.elements:,}",
                size(row.bytes),
                ", ".join(row.dtypes),
                show(row.largest),
            )
            for row in self.rows
        ]
        total = (
            "all",
            str(len(self.leaves)),
            f"{sum(row.elements for row in self.rows):,}",
            size(sum(row.bytes for row in self.rows)),
            "",
            "",
        )
        heads = ("kind", "leaves>", "elements>", "bytes>", "dtypes", "largest")
        return (
            Table("Kinds", heads, (*cells, total)),
            _leaf_table(self.leaves),
        )


class Changes(Report):
    """What differs between two states; made by ``changes``.

    Attributes:
      rows: one KindChange for each kind.
    """

    def __init__(self, rows: tuple[KindChange, ...]):
        self.rows = rows

    def tables(self) -> tuple[Table, ...]:
        cells = [
            (
                row.label,
                str(row.leaves),
                str(row.changed),
                str(row.added),
                str(row.removed),
                _some([show(p) for p in row.paths]),
            )
            for row in self.rows
        ]
        heads = ("kind", "leaves>", "changed>", "added>", "removed>", "where")
        return (Table("Changes", heads, tuple(cells)),)


def explain(model: Any, /, *filters: Any) -> Explanation:
    """Reports which filter takes which leaf, and what may be a mistake.

    Nothing is refused: a filter that matches nothing or is swallowed by an earlier
    one, leaves left over, two kinds of one name, a statistic that is a Param, a string
    that was meant as a path: all of these are listed. Print the result, or read its
    ``rows``.

    Args:
      model: a Module, a State, or a container of Modules, Variables and arrays.
      *filters: kinds, tags, ``...``, Filter objects, in the order of ``split``.

    Returns:
      An Explanation.

    Raises:
      FilterError: a literal is no filter at all.
      StructureError: a static value in the model cannot be hashed.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> class BatchStat(nnx.Variable): pass
      >>> model = {"w": nnx.Param(jnp.ones(2)), "mean": BatchStat(jnp.zeros(2))}
      >>> found = nnx.explain(model, nnx.Param, nnx.BatchStat)
      >>> [leaf.path for leaf in found.left_over]
      [('mean',)]
      >>> found.notes[0]
      'Filter 2, sortal.BatchStat, matches no leaf.'
    """
    return Explanation(_rows.facts(model, *filters))


def tabulate(model: Any, /) -> Summary:
    """Counts a model by kind and by leaf: elements, bytes, dtypes, shared Variables.

    Args:
      model: a Module, a State, or a container of Modules, Variables and arrays.

    Returns:
      A Summary; print it, or read its ``rows`` and ``leaves``.

    Raises:
      StructureError: a static value in the model cannot be hashed.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> shared = nnx.Param(jnp.ones((2, 3)))
      >>> table = nnx.tabulate({"a": shared, "b": shared})
      >>> table.rows[0].elements, table.leaves[0].aliases
      (6, (('b',),))
    """
    return Summary(_rows.leaves(model))


def changes(before: Any, after: Any, /) -> Changes:
    """Counts the leaves of each kind that differ, bit for bit, between two states.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> model = {"w": nnx.Param(jnp.zeros(2))}
      >>> before = nnx.state(model)
      >>> model["w"][...] += 1
      >>> changes(before, nnx.state(model)).rows[0].changed
      1
    """
    return Changes(_rows.differences(before, after))


# -------------------------------------------------------------------- cells
def _leaf_table(leaves: Sequence[LeafRow], notes: tuple[str, ...] = ()) -> Table:
    cells = [(_where(x), x.label, x.value, size(x.bytes)) for x in leaves]
    return Table("Leaves", ("path", "kind", "value", "bytes>"), tuple(cells), notes)


def _where(leaf: LeafRow) -> str:
    return "\n= ".join(map(show, (leaf.path, *leaf.aliases)))


def _share(takes: int, matches: int) -> str:
    return str(takes) if takes == matches else f"{takes} of {matches}"


def _some(names: Sequence[str]) -> str:
    more = f", {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
