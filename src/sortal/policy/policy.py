"""Policy: what each pipeline does with each leaf, by kind or filter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sortal._engine.paths import Path
from sortal._engine.plan import bind
from sortal._engine.schema import Kind, Schema, kind_name, select
from sortal._engine.variable import Param
from sortal.errors import PolicyError, listing
from sortal.filters import All, Filter, leaf_filter
from sortal.policy.rule import COLUMNS, UNSET, Rule, fault
from sortal.policy.table import SHOWN, Found, PolicyTable
from sortal.sharding.mesh_axes import in_force, own_spec

View = Callable[[], Sequence[Any]]


class Policy:
    """A table from filter to Rule; each pipeline reads one column of it.

    In each column the first row counts that takes the leaf and has an answer, so write
    the narrower filter first. A Variable's own metadata of the column's name comes
    before all rows, an option of its kind (``class BatchStat(Variable, axis=0)``)
    after them. ``policy | other`` has the rows of both, those of ``policy`` first.

    Args:
      rules: a mapping from filter literal to Rule, or another Policy.

    Raises:
      FilterError: a key is no filter.
      PolicyError: ``rules`` is no mapping, or a value is no Rule.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import sortal as nnx
      >>> policy = nnx.Policy({
      ...     nnx.At("head.**"): nnx.Rule(optimizer=None),
      ...     nnx.Param: nnx.Rule(optimizer=optax.sgd(0.1), checkpoint="keep"),
      ...     nnx.Cache: nnx.Rule(checkpoint="drop"),
      ... })
      >>> model = {"head": nnx.Param(jnp.ones(2)), "body": nnx.Param(jnp.ones(2))}
      >>> policy.table(model).columns
      ('optimizer', 'checkpoint')
    """

    __slots__ = ("_hash", "rows")

    rows: tuple[tuple[Filter, Rule], ...]
    _hash: int

    def __init__(self, rules: Mapping[Any, Rule] | Policy):
        rows = rules.rows if isinstance(rules, Policy) else _rows(rules)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "_hash", hash(rows))

    def column(
        self, name: str, schema: Schema, view: View | None, default: Any = UNSET
    ) -> list[Any]:
        """One answer for each leaf.

        Args:
          name: the column, a field of Rule.
          schema: the leaves.
          view: gives the leaves themselves, for filters that look at values.
          default: the answer for leaves that have none.

        Returns:
          The answers, in order.

        Raises:
          PolicyError: there is no such column; a leaf has no answer and no default is
            given; a kind or a Variable has an answer of the wrong type; or a filter
            looks at values and ``view`` is None. All leaves concerned are listed.
        """
        found = self.find(name, schema, view)
        if default is UNSET:
            left = [i for i, by in enumerate(found.by) if by is None]
            _check_answered(name, schema, left)
        return [default if x is UNSET else x for x in found.answers]

    def all_answers(self, name: str) -> list[Any]:
        """All answers that rows give in a column.

        Args:
          name: the column, a field of Rule.

        Returns:
          The answers, in the order of the rows.
        """
        return [answer for _, _, answer in self._answering(name)]

    def optimizer_groups(self, model: Any, wrt: Any = UNSET) -> dict[Filter, Any]:
        """The leaves to train, by the optax transformation that trains them.

        Args:
          model: a Module, or a container of Modules and Variables.
          wrt: leaves that must have an answer, and alone are trained. If absent, every
            Param must have one, and whatever has a transformation is trained.

        Returns:
          One entry for each transformation, in the order of the leaves: the filter of
          what it trains, and itself.

        Raises:
          PolicyError: a leaf has no answer, a row's transformation trains no leaf, or
            nothing is trained.
        """
        plan = bind(model)
        schema = plan.graphdef.schema
        found = self.find("optimizer", schema, plan.view)
        trainable = self.column("trainable", schema, plan.view, True)
        asked = select(schema, (Param if wrt is UNSET else wrt,), plan.view).parts[0][1]
        left = [i for i in asked if found.by[i] is None and trainable[i]]
        _check_answered("optimizer", schema, left)
        self._check_rows_train(found, schema)
        at = range(len(schema)) if wrt is UNSET else asked
        groups = dict.fromkeys(found.answers[i] for i in at if trainable[i])
        used = [tx for tx in groups if tx is not None and tx is not UNSET]
        if not used:
            raise PolicyError(
                f"the Policy trains none of the {len(schema)} leaves of the model; "
                "each is frozen or has no optimizer:\n"
                + listing(map(schema.describe, range(len(schema))))
                + "\nWrite a row such as Param: Rule(optimizer=optax.adam(1e-3))."
            )
        filters = [TrainedBy(self, tx) for tx in used]
        if wrt is not UNSET:
            filters = [All(wrt, f) for f in filters]
        return dict(zip(filters, used, strict=True))

    def table(self, model: Any) -> PolicyTable:
        """What every pipeline does with every leaf, before anything runs.

        Args:
          model: a Module, a State, or a container of Modules, Variables and arrays.

        Returns:
          A PolicyTable; print it, or read its ``rows``.

        Raises:
          PolicyError: a kind or a Variable has an answer of the wrong type.
          StructureError: a static value in the model cannot be hashed.
        """
        plan = bind(model)
        schema = plan.graphdef.schema
        every = {name: self.find(name, schema, plan.view) for name in SHOWN}
        return PolicyTable(self.rows, plan.graphdef, plan.view(), every)

    def find(self, name: str, schema: Schema, view: View | None) -> Found:
        """The answers of a column, and what gives each; as ``column``, without checks.

        Args:
          name: the column, a field of Rule.
          schema: the leaves.
          view: gives the leaves themselves, for filters that look at values.

        Returns:
          A Found; UNSET and None where nothing answers.

        Raises:
          PolicyError: there is no such column; a kind or a Variable has an answer of
            the wrong type; or a filter looks at values and ``view`` is None.
        """
        if name not in COLUMNS:
            raise PolicyError(
                f"{name!r} is no column; the columns are {', '.join(COLUMNS)}."
            )
        if self.is_structural(name):
            key = (Policy, name, self, in_force() if name == "spec" else ())
            return schema.memo(key, lambda: self._ask(name, schema))
        if view is None:
            raise PolicyError(
                f"the column {name!r} has rows that look at values, which are not at "
                "hand here; use kinds, tags and paths as their filters."
            )
        return self._ask(name, schema, view())

    def is_structural(self, name: str) -> bool:
        """Whether the answers of a column depend on structure alone."""
        return all(f.structural for _, f, _ in self._answering(name))

    def _answering(self, name: str) -> Iterator[tuple[int, Filter, Any]]:
        for number, (f, rule) in enumerate(self.rows, 1):
            answer = getattr(rule, name)
            if answer is not UNSET:
                yield number, f, answer

    def _ask(self, name: str, schema: Schema, leaves: Any = None) -> Found:
        pairs = [self.decide(name, *row) for row in schema.rows(leaves)]
        faults = [
            f"{schema.describe(i)}: {wrong} (from its {by})"
            for i, (answer, by) in enumerate(pairs)
            if isinstance(by, str) and (wrong := fault(name, answer))
        ]
        if faults:
            raise PolicyError(
                "kinds and Variables have answers that no pipeline understands:\n"
                f"{listing(faults)}\nChange the class keyword of the kind, or the "
                "metadata of the Variable."
            )
        return Found(tuple(a for a, _ in pairs), tuple(by for _, by in pairs))

    def decide(
        self, name: str, path: Path, kind: Kind, metadata: Mapping, leaf: Any
    ) -> tuple[Any, Any]:
        """The answer for one leaf and what gave it; UNSET and None if nothing did."""
        own = metadata.get(name, UNSET)
        if own is UNSET and name == "spec":
            own = own_spec(metadata)
            own = UNSET if own is None else own
        if own is not UNSET:
            return own, "metadata"
        for number, f, answer in self._answering(name):
            if f.test(path, kind, metadata, leaf):
                return answer, number
        option = getattr(kind, "options", {}).get(name, UNSET)
        return option, None if option is UNSET else "kind"

    def _check_rows_train(self, found: Found, schema: Schema) -> None:
        rows = self._answering("optimizer")
        idle = [
            f"row {number}, {f!r}"
            for number, f, tx in rows
            if tx is not None and number not in found.by
        ]
        if idle:
            raise PolicyError(
                f"rows with an optimizer train no leaf:\n{listing(idle)}\nIn each "
                "column the first row that takes a leaf counts: write the narrower one "
                "first, or mend its filter. The leaves are:\n"
                + listing(map(schema.describe, range(len(schema))))
            )

    def __or__(self, other: Policy | Mapping[Any, Rule]) -> Policy:
        if not isinstance(other, (Policy, Mapping)):
            return NotImplemented
        return _from_rows((*self.rows, *Policy(other).rows))

    def __ror__(self, other: Mapping[Any, Rule]) -> Policy:
        if not isinstance(other, Mapping):
            return NotImplemented
        return Policy(other) | self

    def __setattr__(self, name: str, value: Any) -> None:
        raise PolicyError(
            f"cannot set {name!r}: a Policy never changes. Write a new one, or "
            "Policy({...}) | policy, whose new rows come first."
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.rows == other.rows

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> Any:
        return (_from_rows, (self.rows,))

    def __repr__(self) -> str:
        rows = ", ".join(f"{f!r}: {rule!r}" for f, rule in self.rows)
        return f"Policy({{{rows}}})"


def _rows(rules: Any) -> tuple[tuple[Filter, Rule], ...]:
    if not isinstance(rules, Mapping):
        raise PolicyError(
            "Policy takes a mapping, {filter: Rule(...)}, or another Policy; found a "
            f"{type(rules).__name__}."
        )
    rows = tuple((leaf_filter(literal), rule) for literal, rule in rules.items())
    bad = [f"{f!r}: {rule!r:.60}" for f, rule in rows if not isinstance(rule, Rule)]
    if bad:
        raise PolicyError(
            "each value of a Policy is a Rule, such as Rule(axis=0); found:\n"
            + listing(bad)
        )
    return rows


def _from_rows(rows: tuple[tuple[Filter, Rule], ...]) -> Policy:
    # A mapping cannot hold one filter twice, but two joined Policies can.
    made = Policy({})
    object.__setattr__(made, "rows", rows)
    object.__setattr__(made, "_hash", hash(rows))
    return made


_EMPTY = Policy({})


def answers(
    name: str,
    schema: Schema,
    given: Policy | None = None,
    view: View | None = None,
    default: Any = UNSET,
) -> list[Any]:
    """``Policy.column``; without a Policy, kinds and metadata alone give answers."""
    if given is not None and not isinstance(given, Policy):
        raise PolicyError(
            "policy= is a Policy, such as Policy({Param: Rule(...)}); found "
            f"{given!r:.100}."
        )
    return (_EMPTY if given is None else given).column(name, schema, view, default)


def _check_answered(name: str, schema: Schema, left: Sequence[int]) -> None:
    if not left:
        return
    example = f"{name}={COLUMNS[name].example}"
    kinds = [schema.kinds[i] for i in left]
    kind = next((kind_name(k) for k in kinds if k is not None), "")
    ways = [f"a row of the Policy, such as {kind or '...'}: Rule({example})"]
    if kind:
        ways += [
            f"an option of the kind, class {kind}(Variable, {example})",
            f"metadata of the Variable, {kind}(x, {example})",
        ]
    raw = " Unlabelled arrays are answered by rows alone." if None in kinds else ""
    raise PolicyError(
        f"nothing says what {name!r} is of {len(left)} "
        f"{'leaf' if len(left) == 1 else 'leaves'}:\n"
        f"{listing(map(schema.describe, left))}\nWrite {'; or '.join(ways)}.{raw}"
    )


@dataclass(frozen=True, repr=False)
class TrainedBy(Filter):
    """Takes the leaves that one optax transformation of a Policy trains.

    Example:
      >>> import optax
      >>> import sortal as nnx
      >>> tx = optax.sgd(0.1)
      >>> trained = TrainedBy(nnx.Policy({nnx.Param: nnx.Rule(optimizer=tx)}), tx)
      >>> trained(("w",), nnx.Param(1.0)), trained(("n",), nnx.Variable(1.0))
      (True, False)
    """

    policy: Policy
    tx: Any

    @property
    def structural(self) -> bool:  # type: ignore[override]
        return all(map(self.policy.is_structural, ("optimizer", "trainable")))

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        row = (path, kind, metadata, leaf)
        trainable, _ = self.policy.decide("trainable", *row)
        answer, _ = self.policy.decide("optimizer", *row)
        return answer == self.tx and trainable is not False

    def __repr__(self) -> str:
        rows = self.policy.rows
        by = [repr(f) for f, rule in rows if rule.optimizer == self.tx]
        return f"TrainedBy({', '.join(by) or 'metadata or kind'})"
