"""What a mapped function returns of what it was given keeps the axis that it has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sortal.errors import AxisError, listing
from sortal.transforms._adapter.binding import BoundArguments
from sortal.transforms._adapter.effects import Effects, Result
from sortal.transforms._adapter.prefixes import Spread, given_for_objects


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
