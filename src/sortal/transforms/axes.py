"""Axes that leaves do not have, and axes that they would lose on their way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sortal._engine.foreign import same_kind
from sortal._engine.variable import RngCount, RngKey, describe
from sortal.errors import AxisError, listing
from sortal.sharding.mesh_axes import put
from sortal.transforms._adapter.binding import BoundArguments
from sortal.transforms._adapter.effects import Effects, Result
from sortal.transforms._adapter.prefixes import Spread, given_for_objects
from sortal.transforms._adapter.tracing import (
    FlatModule,
    find_flat_modules,
    replace_flat_modules,
)


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


def divided_alike(given: Any, axis_of: Callable[[int], Any]) -> Any:
    """Arguments whose leaves are divided alike along the axes they are mapped over.

    On an Explicit mesh JAX takes no others. A leaf that is whole there goes where the
    leaves are that are divided.

    Args:
      given: the arguments, with FlatModules in the place of roots.
      axis_of: the axis of each leaf of their joint GraphDef.

    Returns:
      The arguments; None where all are divided alike, or in several ways.
    """
    axes: dict[int, int] = {}
    entries: dict[Any, Any] = {}  # and the mesh of each
    for c in find_flat_modules(given):
        for k, x in zip(c.definition.leaves, c.values, strict=True):
            axis = axis_of(k)
            if isinstance(axis, int) and isinstance(x, jax.Array):
                axes[k] = axis % x.ndim
                entries[_spec(x)[axes[k]]] = jax.typeof(x).sharding.mesh
    if len(entries) != 2 or None not in entries:
        return None
    ((entry, mesh),) = [pair for pair in entries.items() if pair[0] is not None]

    def divided(k: int, x: Any) -> Any:
        if k not in axes or _spec(x)[axes[k]] is not None:
            return x
        spec = [*_spec(x)]
        spec[axes[k]] = entry
        return put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def alike(c: FlatModule) -> FlatModule:
        pairs = zip(c.definition.leaves, c.values, strict=True)
        return FlatModule([divided(k, x) for k, x in pairs], c.definition)

    return replace_flat_modules(given, alike)


def _spec(x: jax.Array) -> tuple[Any, ...]:
    spec = tuple(jax.typeof(x).sharding.spec)
    return (*spec, *[None] * (x.ndim - len(spec)))


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
        for k in came_in(bound, effects, n)
        if _moves(spread, k, out)
    ]
    if rows:
        raise AxisError(
            "vmap: what was passed in comes back as itself, with the axis that it has; "
            f"out_axes gives it another:\n{listing(rows)}\nGive both the same axis, or "
            "return a new object: clone(model)."
        )


def came_in(bound: BoundArguments, effects: Effects, n: int) -> Iterator[int]:
    """The leaves of an object that is returned and were passed in, by number on entry.

    Args:
      bound: the arguments.
      effects: what the function did.
      n: the number of the object's Ref.

    Yields:
      The number of each leaf in the joint GraphDef.
    """
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
