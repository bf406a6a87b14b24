"""The groups of an Optimizer: which transformation trains which leaves."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from sortal._engine.paths import Path
from sortal._engine.schema import Schema, path_hints, taken
from sortal._engine.state import State, snapshot
from sortal.errors import OptimizerError, listing
from sortal.filters import Everything, Filter
from sortal.training.fitting import ANEW


def groups_of(tx: Any) -> Any:
    """The (filter, transformation) pairs; None where there is one transformation."""
    # A transformation may itself be a plain tuple, but then of functions.
    pairs = type(tx) is tuple and tx and type(tx[0]) is tuple
    return tx if pairs else None


def divide(tx: Any, groups: Any, params: State) -> list[tuple[Any, Any]]:
    """Each transformation with the positions of its leaves, None for all of them."""
    if groups is None:
        return [(tx, None)]
    schema = params.schema
    filters = tuple(f for f, _ in groups)
    if all(f.structural for f in filters):
        at = schema.memo(("groups", filters), lambda: _assign(schema, filters, None))
    else:
        at = _assign(schema, filters, params.leaves())
    return [(t, mine) for (_, t), mine in zip(groups, at, strict=True)]


def _assign(
    schema: Schema, filters: tuple[Filter, ...], leaves: Sequence[Any] | None
) -> list[tuple[int, ...]]:
    takers: list[list[int]] = [[] for _ in schema.paths]
    for g, f in enumerate(filters):
        for i in taken(f, schema, leaves):
            takers[i].append(g)
    last = len(filters) - 1
    if isinstance(filters[last], Everything):
        takers = [[g for g in mine if g != last] or [last] for mine in takers]
    bad = [
        f"{schema.describe(i)}: "
        + (f"in {', '.join(repr(filters[g]) for g in mine)}" if mine else "in no group")
        for i, mine in enumerate(takers)
        if len(mine) != 1
    ]
    if bad:
        raise OptimizerError(
            "each trained leaf must be in exactly one of the groups "
            f"{', '.join(map(repr, filters))}; found:\n{listing(bad)}\n"
            "Narrow the filters with & and ~, narrow wrt, or add a last group `...` "
            f"for the rest.{path_hints(schema, filters)}"
        )
    groups: list[list[int]] = [[] for _ in filters]
    for i, (g,) in enumerate(takers):
        groups[g].append(i)
    parts = list(map(tuple, groups))
    empty = [repr(f) for f, mine in zip(filters, parts, strict=True) if not mine]
    if empty:
        raise OptimizerError(
            f"no trained leaf is in the group {', '.join(empty)}; there are:\n"
            + listing(map(schema.describe, range(len(schema))))
            + path_hints(schema, filters)
        )
    return parts


def parts_of(state: State, positions: Sequence[Any]) -> list[State]:
    """A State for each group, of the leaves at its positions; None is all of them."""
    values, whole = state.values_list(), state.schema
    return [
        state
        if at is None
        else snapshot(
            whole.memo(("part", at), functools.partial(whole.pick, at)),
            [values[i] for i in at],
        )
        for at in positions
    ]


def check_groups(
    groups: Any, parts: Sequence[State], made_for: Sequence[tuple[Path, ...]]
) -> None:
    """Refuses leaves in other groups than at the start, which have their state."""
    if all(x.schema.paths == was for x, was in zip(parts, made_for, strict=True)):
        return
    before = {path: g for g, paths in enumerate(made_for) for path in paths}
    rows = [
        f"{part.schema.describe(i)}: in {groups[g][0]!r}, was in "
        f"{groups[before[path]][0]!r}"
        for g, part in enumerate(parts)
        for i, path in enumerate(part.schema.paths)
        if before[path] != g
    ]
    if rows:
        raise OptimizerError(
            "the model's trainable leaves are in other groups than when the optimizer "
            f"was made, which have no state for them:\n{listing(rows)}\n{ANEW}"
        )


def scatter(into: list[Any], at: Any, values: list[Any]) -> None:
    """Puts the values of a group at its positions; None is all of them."""
    if at is None:
        into[: len(values)] = values
        return
    for i, value in zip(at, values, strict=True):
        into[i] = value


def takes_extra(tx: Any) -> bool:
    """Whether the update of a transformation takes keyword arguments."""
    import optax

    plain = isinstance(tx, optax.GradientTransformation)
    return not plain or isinstance(tx, optax.GradientTransformationExtraArgs)
