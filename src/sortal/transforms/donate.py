"""Donation by kind: which values of a call are given away, and how they travel."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer

from sortal._engine.paths import Path
from sortal._engine.schema import Kind
from sortal._engine.statics import is_hashable, static_key
from sortal.errors import ArgumentError, FilterError, listing
from sortal.filters import Filter, to_filter
from sortal.policy.policy import Policy
from sortal.transforms._adapter.binding import Entered, Joint, identity
from sortal.transforms._adapter.tracing import (
    Carrier,
    Result,
    Ticket,
    find_carriers,
    replace_carriers,
    run,
    ticket,
)

_BY_SHAPE: Any = object()
_ATTEMPTS = 4


@dataclass(frozen=True)
class DonatedBy(Filter):
    """Takes the leaves that a Policy, a kind or a Variable says to donate."""

    policy: Policy

    @property
    def structural(self) -> bool:  # type: ignore[override]
        return self.policy.is_structural("donate")

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        return self.policy.decide("donate", path, kind, metadata, leaf)[0] is True


class OtherLeaves(Exception):  # noqa: N818 - no error: says what a trace found
    """Stops a trace in which other leaves were overwritten than those donated."""

    def __init__(self, written: frozenset[int]):
        super().__init__(written)
        self.written = written


class Part(NamedTuple):
    """Which values of one root are lent, which stay, and the Tickets of the halves."""

    lent: tuple[int, ...]
    kept: tuple[int, ...]
    lent_ticket: Ticket
    kept_ticket: Ticket


class Donation:
    """What a jitted function donates.

    JAX donates whole arguments, and a root is one argument; so the donated values of
    all roots travel in an argument of their own, the first, and are put back to their
    roots inside the trace.

    Args:
      given: a filter literal, a Policy, True for what the function overwrites, or None.
      donated: positions and names of arguments that are donated whole.
      static: positions and names of static arguments.
      mirrored: whether the first argument has the form of the others, so that
        shardings of theirs are its own too.
    """

    def __init__(
        self,
        given: Any,
        donated: Collection[Any],
        static: Collection[Any],
        mirrored: bool,
    ):
        self.filter: Filter | None = None
        if given is not None and given is not True:
            is_policy = isinstance(given, Policy)
            self.filter = DonatedBy(given) if is_policy else to_filter(given)
        self._overwritten = given is True
        self._donated, self._static, self._mirrored = donated, static, mirrored
        self._learned: dict[Any, frozenset[int]] = {}

    def call(self, function: Callable[..., Any], entered: Entered) -> Any:
        """Calls what JAX made of ``run``, or its ``lower`` or ``trace``."""
        for _ in range(_ATTEMPTS):
            args, kwargs = self._lend(entered)
            try:
                return function(*args, **kwargs)
            except OtherLeaves as e:
                self._learn(entered, e.written)
        raise ArgumentError(
            "donate=True donates what the function overwrites, but it overwrites "
            "other leaves each time that it is traced. Say which to donate by a "
            "filter: donate=Cache."
        )

    def run(
        self, fn: Callable[..., Any], lent: Any, args: Sequence[Any], kwargs: Any
    ) -> Result:
        """``tracing.run`` for arguments that ``rejoin`` made whole."""
        given = {k for c in find_carriers(lent) for k in c.ticket.leaves}
        if not self._overwritten:
            return run(fn, args, kwargs, given)
        returned = {k for c in self._whole(args, kwargs) for k in c.ticket.leaves}
        result = run(fn, args, kwargs, returned)
        written = frozenset(result.exit.written) - returned
        if written != given - returned:
            raise OtherLeaves(written)
        return result

    def is_differentiated(self, entered: Entered) -> bool:
        """Whether a leaf that a filter or position donates is traced.

        Its value may be one that somebody outside differentiates by, who keeps it;
        JAX would give its buffer away all the same.
        """
        if self._overwritten or not entered.roots:
            return False
        traced = [
            k
            for c in entered.carriers
            for k, value in zip(c.ticket.leaves, c.values, strict=True)
            if isinstance(value, Tracer)
        ]
        return bool(traced) and not self._chosen(entered).isdisjoint(traced)

    def forget(self) -> None:
        """Forgets what was learned about functions that were traced."""
        self._learned.clear()

    def _whole(self, args: Sequence[Any], kwargs: Any) -> Iterator[Carrier]:
        """The roots in arguments that are donated whole."""
        if self._donated:
            for name, x in [*enumerate(args), *kwargs.items()]:
                if name in self._donated:
                    yield from find_carriers(x)

    def _lend(self, entered: Entered) -> tuple[tuple[Any, ...], dict[str, Any]]:
        lent: dict[int, Carrier] = {}
        kept: dict[int, Carrier] = {}
        parts = division(entered.joint, self._chosen(entered)) if entered.roots else []
        if not entered.roots and self.filter is not None:
            raise FilterError(
                f"donate={self.filter!r}: there is no Module or Variable among the "
                "arguments. Arrays are donated with donate_argnums."
            )
        for i, part in enumerate(parts):
            if part is not None:
                values = entered.carriers[i].values
                taken = values if not part.kept else [values[j] for j in part.lent]
                lent[i] = Carrier(taken, part.lent_ticket)
                kept[i] = Carrier([values[j] for j in part.kept], part.kept_ticket)

        def halve(name: Any, x: Any) -> Any:
            if name in self._static:
                return x
            return replace_carriers(x, lambda c: kept.get(c.ticket.number, c))

        args = [halve(i, x) for i, x in enumerate(entered.args)]
        kwargs = {k: halve(k, x) for k, x in entered.kwargs.items()}
        make_distinct(list(lent.values()), (args, kwargs))
        first: Any = list(lent.values())
        if self._mirrored:
            dynamic = enumerate(entered.args)
            first = tuple(mirror(x, lent) for i, x in dynamic if i not in self._static)
        return (first, *args), kwargs

    def _chosen(self, entered: Entered) -> frozenset[int]:
        """Numbers of the leaves to donate."""
        roots = self._whole(entered.args, entered.kwargs)
        whole = frozenset(c.ticket.number for c in roots)
        graphdef = entered.joint.graphdef
        if self._overwritten:
            taken = self._guess(entered, whole)
            return taken.union(*(entered.joint.tickets[i].leaves for i in whole))
        if self.filter is None or self.filter.structural:
            key = ("donated", self.filter, whole)
            return graphdef.memo(key, lambda: self._take(entered, whole))
        return self._take(entered, whole)

    def _take(self, entered: Entered, whole: frozenset[int]) -> frozenset[int]:
        taken = {k for i in whole for k in entered.joint.tickets[i].leaves}
        if self.filter is None:
            return frozenset(taken)
        at = enumerate(entered.joint.leaf_at)
        numbers = {identity(entered.plans[i].leaves[j]): k for k, (i, j) in at}
        by_filter: set[int] = set()
        for plan in entered.plans:
            rows = plan.graphdef.schema.rows(plan.view())
            hits = [self.filter.test(*row) for row in rows]
            live = zip(plan.leaves, hits, strict=True)
            by_filter |= {numbers[identity(x)] for x, hit in live if hit}
        if not by_filter:
            schemas = [plan.graphdef.schema for plan in entered.plans]
            raise FilterError(
                f"donate={self.filter!r} takes no leaf of any argument; there are:\n"
                + listing(s.describe(i) for s in schemas for i in range(len(s)))
                + "\nName a kind that is there, or leave donate out."
            )
        return frozenset(taken | by_filter)

    def _key(self, entered: Entered, whole: frozenset[int]) -> Any:
        named = [*enumerate(entered.args), *entered.kwargs.items()]
        statics = [(name, x) for name, x in named if name in self._static]
        # Others JAX refuses, in words of its own.
        hashable = tuple((n, static_key(x)) for n, x in statics if is_hashable(x))
        return entered.joint.graphdef, whole, hashable

    def _guess(self, entered: Entered, whole: frozenset[int]) -> frozenset[int]:
        """What was overwritten when last traced; verified where it is traced anew."""
        key = self._key(entered, whole)
        found = self._learned.get(key, frozenset())
        if found is _BY_SHAPE:
            found = self._learned.get((key, self._shapes(entered)), frozenset())
        return found

    def _learn(self, entered: Entered, written: frozenset[int]) -> None:
        roots = self._whole(entered.args, entered.kwargs)
        key = self._key(entered, frozenset(c.ticket.number for c in roots))
        if len(self._learned) > 256:
            self._learned.clear()
        if key not in self._learned:
            self._learned[key] = written
        else:  # shapes decide what is overwritten, so they have to be looked at
            self._learned[key] = _BY_SHAPE
            self._learned[key, self._shapes(entered)] = written

    def _shapes(self, entered: Entered) -> Any:
        args = [x for i, x in enumerate(entered.args) if i not in self._static]
        named = {k: x for k, x in entered.kwargs.items() if k not in self._static}
        leaves, treedef = jtu.tree_flatten((args, named))
        return treedef, tuple(map(jax.typeof, leaves))


def division(joint: Joint, lent: frozenset[int]) -> list[Part | None]:
    """For each root how its values are divided; None where none is lent."""

    def part(whole: Ticket) -> Part | None:
        places = list(enumerate(whole.leaves))
        taken = [(j, k) for j, k in places if k in lent]
        rest = [(j, k) for j, k in places if k not in lent]
        if not taken:
            return None
        return Part(
            tuple(j for j, _ in taken),
            tuple(j for j, _ in rest),
            ticket(whole.graphdef, whole.number, whole.of, tuple(k for _, k in taken)),
            ticket(whole.graphdef, whole.number, whole.of, tuple(k for _, k in rest)),
        )

    return joint.graphdef.memo(
        ("division", lent), lambda: [part(whole) for whole in joint.tickets]
    )


def rejoin(lent: Any, args: Sequence[Any], kwargs: Any) -> tuple[list[Any], Any]:
    """The arguments of a call with the lent values back in their roots."""
    halves = {c.ticket.number: c for c in find_carriers(lent)}

    def whole(kept: Carrier) -> Carrier:
        half = halves.get(kept.ticket.number)
        if half is None:
            return kept
        values: dict[int, Any] = {}
        for c in (half, kept):
            values.update(zip(c.ticket.leaves, c.values, strict=True))
        of = kept.ticket
        return Carrier(
            [values[k] for k in sorted(values)], ticket(of.graphdef, of.number, of.of)
        )

    return (
        [replace_carriers(x, whole) for x in args],
        {k: replace_carriers(x, whole) for k, x in kwargs.items()},
    )


def mirror(tree: Any, lent: dict[int, Carrier]) -> Any:
    """``tree`` with the lent half in the place of each root, and else no leaves."""
    return jtu.tree_map(
        lambda x: lent.get(x.ticket.number) if isinstance(x, Carrier) else None,
        tree,
        is_leaf=lambda x: isinstance(x, Carrier),
    )


def make_distinct(lent: list[Carrier], others: Any) -> None:
    """Copies lent arrays that occur elsewhere in the call, or twice.

    One buffer cannot be donated twice, and one that also stays must survive.

    Args:
      lent: the Carriers of lent values, which are changed.
      others: what else is passed to the call.
    """
    every = list(map(id, jtu.tree_leaves([c.values for c in lent])))
    seen = set(map(id, jtu.tree_leaves(others)))
    if len(set(every)) == len(every) and seen.isdisjoint(every):
        return

    def once(value: Any) -> Any:
        if id(value) in seen and isinstance(value, jax.Array):
            return jnp.copy(value)
        seen.add(id(value))
        return value

    for carrier in lent:
        carrier.values = jtu.tree_map(once, carrier.values)


def with_first(
    fn: Callable[..., Any], traced: Any, options: dict[str, Any], donation: Donation
) -> dict[str, Any]:
    """Options of ``jax.jit`` for a function with the lent values as first argument.

    Args:
      fn: the user's function.
      traced: what JAX is to trace, which is given the signature of ``fn`` after one
        more parameter.
      options: the options for ``fn``.
      donation: what is donated.

    Returns:
      The options for ``traced``.
    """
    try:
        signature = inspect.signature(fn)
        first = inspect.Parameter("_lent", inspect.Parameter.POSITIONAL_ONLY)
        parameters = [first, *signature.parameters.values()]
        traced.__signature__ = signature.replace(parameters=parameters)
    except (TypeError, ValueError):
        pass  # JAX then asks nothing of it
    moved = dict(options)
    for what, named in (("static", donation._static), ("donate", donation._donated)):
        moved[f"{what}_argnums"] = tuple(
            sorted(i + 1 for i in named if isinstance(i, int))
        )
        moved[f"{what}_argnames"] = tuple(
            sorted(k for k in named if isinstance(k, str))
        )
    moved["donate_argnums"] = (0, *moved["donate_argnums"])
    shardings = moved.get("in_shardings")
    if isinstance(shardings, (tuple, list)):
        moved["in_shardings"] = (tuple(shardings), *shardings)
    return moved
