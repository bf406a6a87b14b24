"""Donation by kind: which values of a call are given away, and how they travel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from sortal._engine.jax_compat import outside_traces
from sortal._engine.leaves import picker
from sortal._engine.paths import Path
from sortal._engine.schema import Kind
from sortal._engine.stale import note_donor
from sortal._engine.variable import check_writable
from sortal.errors import FilterError, listing
from sortal.filters import Filter, leaf_filter
from sortal.policy.policy import Policy
from sortal.transforms._adapter.binding import AliasMap, BoundArguments, identity
from sortal.transforms._adapter.functions import lead_with
from sortal.transforms._adapter.tracing import (
    FlatModule,
    FlatModuleDef,
    find_flat_modules,
    flat_module_def,
    is_flat_module,
    replace_flat_modules,
    run,
)


@dataclass(frozen=True, repr=False)
class DonatedBy(Filter):
    """Takes the leaves that a Policy, a kind or a Variable says to donate."""

    policy: Policy

    @property
    def structural(self) -> bool:  # type: ignore[override]
        return self.policy.is_structural("donate")

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        return self.policy.decide("donate", path, kind, metadata, leaf)[0] is True

    def __repr__(self) -> str:
        return repr(self.policy)


class Overwritten:
    """The numbers of the leaves that a function overwrites, as an output of JAX's."""

    __slots__ = ("leaves",)

    def __init__(self, leaves: frozenset[int]):
        self.leaves = leaves


jtu.register_pytree_node(
    Overwritten, lambda x: ((), x.leaves), lambda leaves, _: Overwritten(leaves)
)


class Part(NamedTuple):
    """How the values of one root are divided: what is lent and what stays of them."""

    lent: Callable[[Sequence[Any]], Sequence[Any]]
    kept: Callable[[Sequence[Any]], Sequence[Any]]
    lent_def: FlatModuleDef
    kept_def: FlatModuleDef


class Donation:
    """What a jitted function donates.

    JAX donates whole arguments, and a root is one argument; so the donated values of
    all roots travel in an argument of their own, the first, and are put back to their
    roots inside the trace.

    Args:
      fn: the user's function.
      given: a filter literal, a Policy, True for what the function overwrites, or None.
      donated: positions and names of arguments that are donated whole.
      static: positions and names of static arguments.
      mirrored: whether the first argument has the form of the others, so that
        shardings of theirs are its own too.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        given: Any,
        donated: Collection[Any],
        static: Collection[Any],
        mirrored: bool,
    ):
        self.filter: Filter | None = None
        if given is not None and given is not True:
            is_policy = isinstance(given, Policy)
            self.filter = DonatedBy(given) if is_policy else leaf_filter(given)
        self._overwritten = given is True
        self._donated, self._static, self._mirrored = donated, static, mirrored
        note_donor(self, fn)

        def find(*args: Any, **kwargs: Any) -> Overwritten:
            # Evaluated abstractly, so that nothing of it is in the program.
            result = jax.eval_shape(lambda: run(fn, args, kwargs))
            return Overwritten(frozenset(result.effects.written))

        numbers = tuple(x for x in static if isinstance(x, int))
        names = tuple(x for x in static if isinstance(x, str))
        self.find: Any = jax.jit(find, static_argnums=numbers, static_argnames=names)
        """A function of the bound arguments that returns what is overwritten.

        It runs an empty program, which JAX keeps by all that could change the answer.
        """

    def acts(self, bound: BoundArguments) -> bool:
        """Whether a call gives buffers away; inside of another transform none does.

        JAX would, of a model that is there as it is outside. But what was returned in
        their place may not be written to that model, or is needed for a derivative.
        """
        if outside_traces() or not bound.roots:
            return True
        if self.filter is not None:
            self._chosen(bound)  # refuses a filter that takes nothing
        return False

    def forget(self) -> None:
        """Forgets what was found out by tracing."""
        self.find.clear_cache()

    def _whole(self, args: Sequence[Any], kwargs: Any) -> Iterator[FlatModule]:
        """The roots in arguments that are donated whole."""
        if self._donated:
            for name, x in [*enumerate(args), *kwargs.items()]:
                if name in self._donated:
                    yield from find_flat_modules(x)

    def lend(
        self, bound: BoundArguments, *, runs: bool = True
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with what is donated taken out, and put into a first one.

        Args:
          bound: the arguments.
          runs: whether they are for a call; if not, they may be abstract.

        Returns:
          Positional and keyword arguments.

        Raises:
          FilterError: the filter takes no leaf.
          TraceError: what is returned for a leaf could not be written to it.
        """
        lent: dict[int, FlatModule] = {}
        kept: dict[int, FlatModule] = {}
        if not bound.roots and self.filter is not None:
            raise FilterError(
                f"donate={self.filter!r}: there is no Module or Variable among the "
                "arguments. Arrays are donated with donate_argnums."
            )
        chosen = self._chosen(bound, runs) if bound.roots else frozenset()
        if runs and not all(plan.leaves.ours() for plan in bound.plans):
            check_writable(map(bound.live_leaf, chosen))
        parts = division(bound.alias_map, chosen) if bound.roots else []
        for i, part in enumerate(parts):
            if part is not None:
                values = bound.flat_modules[i].values
                lent[i] = FlatModule(list(part.lent(values)), part.lent_def)
                kept[i] = FlatModule(list(part.kept(values)), part.kept_def)

        def halve(name: Any, x: Any) -> Any:
            if name in self._static:
                return x
            return replace_flat_modules(x, lambda c: kept.get(c.definition.number, c))

        args = [halve(i, x) for i, x in enumerate(bound.args)]
        kwargs = {k: halve(k, x) for k, x in bound.kwargs.items()}
        named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        whole = {k: named.pop(k) for k in self._donated & named.keys()}
        for k, x in make_distinct(list(lent.values()), whole, named).items():
            if k in kwargs:
                kwargs[k] = x
            else:
                args[k] = x
        first: Any = list(lent.values())
        if self._mirrored:
            dynamic = enumerate(bound.args)
            first = tuple(mirror(x, lent) for i, x in dynamic if i not in self._static)
        return (first, *args), kwargs

    def _chosen(self, bound: BoundArguments, runs: bool = True) -> frozenset[int]:
        """Numbers of the leaves to donate."""
        roots = self._whole(bound.args, bound.kwargs)
        whole = frozenset(c.definition.number for c in roots)
        graphdef = bound.alias_map.graphdef
        if self._overwritten:
            find = self.find if runs else self.find.eval_shape
            taken = find(*bound.args, **bound.kwargs).leaves
            return taken.union(*(bound.alias_map.definitions[i].leaves for i in whole))
        if self.filter is None or self.filter.structural:
            key = ("donated", self.filter, whole)
            return graphdef.memo(key, lambda: self._take(bound, whole))
        return self._take(bound, whole)

    def _take(self, bound: BoundArguments, whole: frozenset[int]) -> frozenset[int]:
        taken = {k for i in whole for k in bound.alias_map.definitions[i].leaves}
        if self.filter is None:
            return frozenset(taken)
        at = enumerate(bound.alias_map.leaf_at)
        numbers = {identity(bound.plans[i].leaves[j]): k for k, (i, j) in at}
        by_filter: set[int] = set()
        for plan in bound.plans:
            rows = plan.graphdef.schema.rows(plan.view())
            hits = [self.filter.test(*row) for row in rows]
            live = zip(plan.leaves, hits, strict=True)
            by_filter |= {numbers[identity(x)] for x, hit in live if hit}
        if not by_filter:
            schemas = [plan.graphdef.schema for plan in bound.plans]
            raise FilterError(
                f"donate={self.filter!r} takes no leaf of any argument; there are:\n"
                + listing(s.describe(i) for s in schemas for i in range(len(s)))
                + "\nName a kind that is there, or leave donate out."
            )
        return frozenset(taken | by_filter)


def division(alias_map: AliasMap, lent: frozenset[int]) -> list[Part | None]:
    """For each root how its values are divided; None where none is lent."""

    def part(whole: FlatModuleDef) -> Part | None:
        places = list(enumerate(whole.leaves))
        taken = [(j, k) for j, k in places if k in lent]
        rest = [(j, k) for j, k in places if k not in lent]
        if not taken:
            return None
        return Part(
            picker([j for j, _ in taken]),
            picker([j for j, _ in rest]),
            flat_module_def(
                whole.graphdef, whole.number, whole.of, tuple(k for _, k in taken)
            ),
            flat_module_def(
                whole.graphdef, whole.number, whole.of, tuple(k for _, k in rest)
            ),
        )

    return alias_map.graphdef.memo(
        ("division", lent), lambda: [part(whole) for whole in alias_map.definitions]
    )


def rejoin(lent: Any, args: Sequence[Any], kwargs: Any) -> tuple[list[Any], Any]:
    """The arguments of a call with the lent values back in their roots."""
    halves = {c.definition.number: c for c in find_flat_modules(lent)}

    def whole(kept: FlatModule) -> FlatModule:
        half = halves.get(kept.definition.number)
        if half is None:
            return kept
        values: dict[int, Any] = {}
        for c in (half, kept):
            values.update(zip(c.definition.leaves, c.values, strict=True))
        of = kept.definition
        return FlatModule(
            [values[k] for k in sorted(values)],
            flat_module_def(of.graphdef, of.number, of.of),
        )

    return (
        [replace_flat_modules(x, whole) for x in args],
        {k: replace_flat_modules(x, whole) for k, x in kwargs.items()},
    )


def mirror(tree: Any, lent: dict[int, FlatModule]) -> Any:
    """``tree`` with the lent half in the place of each root, and else no leaves."""
    return jtu.tree_map(
        lambda x: lent.get(x.definition.number) if is_flat_module(x) else None,
        tree,
        is_leaf=is_flat_module,
    )


def make_distinct(
    lent: list[FlatModule], whole: dict[Any, Any], others: dict[Any, Any]
) -> dict[Any, Any]:
    """Copies donated arrays that occur elsewhere in the call, or twice.

    One buffer cannot be donated twice, and one that also stays must survive. On several
    devices XLA does not refuse such a call, it ends the process.

    Args:
      lent: the FlatModules of lent values, which are changed.
      whole: arguments that JAX is to donate.
      others: what else is passed to the call.

    Returns:
      The arguments of ``whole``; none where nothing occurs twice.
    """
    given = [c.values for c in lent]
    every = jtu.tree_leaves((given, list(whole.values()), list(others.values())))
    if len(set(map(id, every))) == len(every):
        return {}
    seen = set(map(id, jtu.tree_leaves(list(others.values()))))

    def once(value: Any) -> Any:
        if id(value) in seen and isinstance(value, jax.Array):
            return jnp.copy(value)
        seen.add(id(value))
        return value

    for flat_module in lent:
        flat_module.values = jtu.tree_map(once, flat_module.values)
    return {k: jtu.tree_map(once, x) for k, x in whole.items()}


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
    lead_with(traced, ["_lent"], fn)
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
