"""PolicyTable: what a Policy does with each leaf of a model, as data and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sortal._engine.foreign import is_kind
from sortal._engine.graphdef import GraphDef
from sortal._engine.paths import Path, show
from sortal._engine.schema import Kind, Schema, kind_name
from sortal._engine.tables import Report, Table
from sortal._engine.variable import Param
from sortal.filters import Filter
from sortal.policy.rule import UNSET, Rule, format_answer

Rows = Sequence[tuple[Filter, Rule]]


class Found(NamedTuple):
    """One column of some leaves: the answers, and what gives each.

    ``by`` holds the number of a row, ``"metadata"``, ``"kind"``, or None.
    """

    answers: tuple[Any, ...]
    by: tuple[Any, ...]


# In the order of a training program: trained, mapped, placed, saved.
SHOWN = ("optimizer", "trainable", "axis", "reduce", "spec", "donate", "checkpoint")
# Pipelines refuse a leaf without an answer in these; the others have a default, such as
# to keep it and not to donate it.
_NEEDED = frozenset({"axis", "optimizer", "spec"})
_MANY = 12


class PolicyRow(NamedTuple):
    """Leaves of one kind with the same answer in every column."""

    kind: Kind
    label: str
    """The kind's name, qualified where another kind here has the same one."""
    paths: tuple[Path, ...]
    answers: dict[str, Any]
    """From column to answer; columns without an answer are left out."""


class PolicyTable(Report):
    """What a Policy does with each leaf of a model; made by ``Policy.table``.

    Attributes:
      rows: one PolicyRow for leaves of one kind with equal answers.
      columns: the columns that have an answer for some leaf.
      unanswered: from column to the paths that need an answer there and have none.
      idle: from the number of a row (1 is the first) to its columns without effect.
      notes: sentences about what is unanswered or idle.
      optimizers: from the name of each optax transformation in the table to the
        filters whose rows give it; ``"metadata"`` or ``"kind"`` where no row does.
    """

    def __init__(
        self,
        rules: Rows,
        graphdef: GraphDef,
        leaves: Sequence[Any],
        every: Mapping[str, Found],
    ):
        schema = graphdef.schema
        self.columns = tuple(n for n in every if set(every[n].by) - {None})
        used = {name: every[name] for name in self.columns}
        self.rows: tuple[PolicyRow, ...] = _grouped(schema, used)
        left = {name: _left(name, schema, every) for name in self.columns}
        self.unanswered = {
            name: tuple(schema.paths[i] for i in at) for name, at in left.items() if at
        }
        self.idle = _idle(rules, every)
        self._names, self.optimizers = _named(rules, every["optimizer"])
        self.notes = (
            *(_left_note(name, schema, at) for name, at in left.items() if at),
            *(
                _idle_note(rules, n, unused, graphdef, leaves)
                for n, unused in self.idle.items()
            ),
        )
        self._aliases: dict[Path, list[Path]] = {}
        for path, i in graphdef.aliases:
            self._aliases.setdefault(schema.paths[i], []).append(path)

    def tables(self) -> tuple[Table, ...]:
        cells = [
            (
                str(number),
                row.label,
                str(len(row.paths)),
                *(_cell(name, row.answers, self._names) for name in self.columns),
            )
            for number, row in enumerate(self.rows, 1)
        ]
        heads = ("#>", "kind", "leaves>", *self.columns)
        where = [
            (str(number), _some(list(map(self._where, row.paths))))
            for number, row in enumerate(self.rows, 1)
        ]
        made = [
            Table("Policy", heads, tuple(cells), self.notes),
            Table("Leaves", ("#>", "paths"), tuple(where)),
        ]
        if self.optimizers:
            legend = tuple(
                (name, ", ".join(by)) for name, by in self.optimizers.items()
            )
            made.append(Table("Optimizers", ("name", "given by"), legend))
        return tuple(made)

    def _where(self, path: Path) -> str:
        return " = ".join(map(show, (path, *self._aliases.get(path, ()))))


def _some(texts: Sequence[str]) -> str:
    more = f", and {len(texts) - _MANY} more" if len(texts) > _MANY else ""
    return ", ".join(texts[:_MANY]) + more


def _grouped(schema: Schema, used: Mapping[str, Found]) -> tuple[PolicyRow, ...]:
    groups: dict[Any, list[int]] = {}
    for i, kind in enumerate(schema.kinds):
        key = (kind, *(found.answers[i] for found in used.values()))
        groups.setdefault(key, []).append(i)
    order = list(dict.fromkeys(schema.kinds))
    return tuple(
        PolicyRow(
            kind,
            _label(kind, order),
            tuple(schema.paths[i] for i in at),
            {n: x for n, x in zip(used, given, strict=True) if x is not UNSET},
        )
        for (kind, *given), at in sorted(
            groups.items(), key=lambda item: order.index(item[0][0])
        )
    )


def _label(kind: Kind, kinds: Sequence[Kind]) -> str:
    name = kind_name(kind)
    if kind is None or [kind_name(k) for k in kinds].count(name) == 1:
        return name
    return f"{kind.__module__}.{kind.__qualname__}"


def _left(name: str, schema: Schema, every: Mapping[str, Found]) -> list[int]:
    """The leaves that need an answer in a column and have none."""
    if name not in _NEEDED:
        return []
    left = [i for i, by in enumerate(every[name].by) if by is None]
    if name != "optimizer":
        return left
    frozen = every["trainable"].answers
    kinds = schema.kinds
    return [i for i in left if is_kind(kinds[i], Param) and frozen[i] is not False]


def _left_note(name: str, schema: Schema, at: Sequence[int]) -> str:
    some = _some(list(map(schema.describe, at)))
    return f"Nothing says what {name!r} is of {some}."


def _idle(rules: Rows, every: Mapping[str, Found]) -> dict[int, tuple[str, ...]]:
    """The rows without effect in some column, or without a column, and the columns."""
    found = {}
    for number, (_, rule) in enumerate(rules, 1):
        given = [name for name, _ in rule.given()]
        unused = tuple(name for name in given if number not in every[name].by)
        if unused or not given:
            found[number] = unused
    return found


def _idle_note(
    rules: Rows,
    number: int,
    unused: Sequence[str],
    graphdef: GraphDef,
    leaves: Sequence[Any],
) -> str:
    f, _ = rules[number - 1]
    schema = graphdef.schema
    taken = sum(f.test(*row) for row in schema.rows(leaves))
    text = f"Row {number}, {f!r}, "
    if taken and not unused:
        return f"{text}has no answer."
    if taken:
        return (
            f"{text}decides no {' and no '.join(unused)}: earlier rows or metadata "
            "come first for all its leaves."
        )
    owners = [
        f"{show(path)} is {show(schema.paths[i])}"
        for path, i in graphdef.aliases
        if f.test(path, schema.kinds[i], schema.metadata[i], leaves[i])
    ]
    shared = f" A shared leaf has its first path: {', '.join(owners)}."
    return f"{text}takes no leaf.{shared if owners else ''}"


def _cell(name: str, answers: Mapping[str, Any], names: Mapping[Any, str]) -> str:
    if name == "optimizer" and (name in answers or "trainable" in answers):
        tx = answers.get(name, UNSET)
        frozen = tx is None or answers.get("trainable") is False
        return "frozen" if frozen else names.get(tx, repr(UNSET))
    answer = answers.get(name, UNSET)
    return answer if isinstance(answer, str) else format_answer(name, answer)


def _named(
    rules: Rows, found: Found
) -> tuple[dict[Any, str], dict[str, tuple[str, ...]]]:
    """A name for each optax transformation, and the rows that give it."""
    given: dict[Any, dict[str, None]] = {}
    for tx, by in zip(found.answers, found.by, strict=True):
        if tx is not None and tx is not UNSET:
            who = by if isinstance(by, str) else repr(rules[by - 1][0])
            given.setdefault(tx, {})[who] = None
    names = {tx: f"tx {number}" for number, tx in enumerate(given, 1)}
    return names, {names[tx]: tuple(by) for tx, by in given.items()}
