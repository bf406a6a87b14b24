"""Axes that leaves do not have, and axes that they would lose on their way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sortal._engine.foreign import same_kind
from sortal._engine.variable import RngCount, RngKey, describe
from sortal.errors import AxisError, listing
from sortal.transforms._adapter.binding import BoundArguments
from sortal.transforms._adapter.effects import Effects, Result
from sortal.transforms._adapter.prefixes import Spread, given_for_objects


def check_ranks(spread: Spread) -> None:
    """Refuses int axes that leaves do not have.

    Args:
      spread: the answers for one call.

    Raises:
      AxisError: some leaves have fewer axes; all are listed.
    """
    bad = [
        (plan.graphdef.schema, j, f"{describe(x)} has no axis {axis}")
        for plan, axes in zip(spread.bound.plans, spread.roots, strict=True)
        for j, (axis, value) in enumerate(zip(axes, plan.values(), strict=True))
        if isinstance(axis, int)
        for x in without(axis, value)
    ]
    if not bad:
        return
    remedies = ["Give them axis None, as in StateAxes({Kind: None, ...: 0})."]
    drawn = [
        any(same_kind(s.kinds[j], k) for k in (RngKey, RngCount)) for s, j, _ in bad
    ]
    if any(drawn):  # with axis None all replicas would draw the same
        remedies.insert(0, "Divide random streams first, by @split_rngs(splits=n).")
    raise AxisError(
        "these leaves do not have the axis they are to be mapped over:\n"
        f"{listing(f'{s.describe(j)}: {why}' for s, j, why in bad)}\n"
        + " ".join(remedies[: 1 if all(drawn) else None])
    )


def without(axis: int, value: Any, more: int = 0) -> list[Any]:
    """The arrays of a value that, given ``more`` axes, do not have the axis."""
    # Nearly all values are one array, and taking a tree apart costs more than the rest.
    arrays = [value] if isinstance(value, jax.Array) else jax.tree.leaves(value)
    ranks = [np.ndim(x) + more for x in arrays]
    return [x for x, n in zip(arrays, ranks, strict=True) if not -n <= axis < n]


def refuse_moved(spread: Spread, out_given: Any, result: Result) -> None:
    """Refuses another axis for objects that come back as themselves.

    Args:
      spread: the axes of the arguments.
      out_given: those of the output, as the user gave them.
      result: what the function did.

    Raises:
      AxisError: some leaves would move; all are listed.
    """
    bound, effects = spread.bound, result.effects
    if not (bound.roots and effects.outputs):
        return
    schema = bound.alias_map.graphdef.schema
    rows = [
        f"{schema.describe(k)}: {spread.of_leaf(k)} in, {out} out"
        for n, out in given_for_objects(out_given, result.out).items()
        if out is None or type(out) is int
        for k in _came_in(bound, effects, n)
        if _moves(spread, k, out)
    ]
    if rows:
        raise AxisError(
            "vmap: what was passed in comes back as itself, with the axis that it has; "
            f"out_axes gives it another:\n{listing(rows)}\nGive both the same axis, or "
            "return a new object: clone(model)."
        )


def _came_in(bound: BoundArguments, effects: Effects, n: int) -> Iterator[int]:
    """The leaves of output ``n`` that were passed in, by their number on entry."""
    edits = effects.edits
    graphdef = bound.alias_map.graphdef if edits is None else edits.graphdef
    for k in graphdef.leaves_below(effects.outputs[n]).values():
        origin = k if edits is None else edits.leaves[k].origin
        if origin is not None:
            yield origin


def _moves(spread: Spread, k: int, out: int | None) -> bool:
    axis = spread.of_leaf(k)
    if axis is None:
        return out not in (None, 0)  # 0 is the default, for what is new
    ranks = map(np.ndim, jax.tree.leaves(spread.bound.live_leaf(k)._value))
    return out is None or any(axis % n != out % n for n in ranks)
