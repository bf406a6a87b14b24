"""Why arguments cannot be mapped over together: their axes have several sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sortal._engine.variable import describe
from sortal.errors import AxisError, listing
from sortal.transforms._adapter.prefixes import Spread
from sortal.transforms._adapter.tracing import is_flat_module


def refuse_sizes(spread: Spread, cause: Exception) -> None:
    """Says so where it is why JAX refused a call; looked at only after it has.

    Args:
      spread: the axes of the arguments.
      cause: what JAX raised.

    Raises:
      AxisError: the axes have several sizes; all are listed.
    """
    found = [*_of_models(spread), *_of_others(spread)]
    if len({size for _, size in found}) > 1:
        raise AxisError(
            "the axes to map over must have one size; found:\n"
            + listing(f"{where} has {size}" for where, size in found)
            + "\nGive what all replicas share axis None: in_axes=(None, 0), or by kind "
            "StateAxes({Param: None, ...: 0})."
        ) from cause


def _of_models(spread: Spread) -> Iterator[tuple[str, int]]:
    for plan, axes in zip(spread.bound.plans, spread.roots, strict=True):
        schema = plan.graphdef.schema
        for i, (axis, value) in enumerate(zip(axes, plan.values(), strict=True)):
            for x in jax.tree.leaves(value) if isinstance(axis, int) else ():
                yield _row(axis, schema.describe(i), x)


def _of_others(spread: Spread) -> Iterator[tuple[str, int]]:
    bound = spread.bound
    positions = range(len(bound.args))
    named = [(f"argument {i}", spread.args[i], bound.args[i]) for i in positions]
    named += [(repr(k), spread.kwargs[k], x) for k, x in bound.kwargs.items()]
    for name, prefix, arg in named:
        rows: list[tuple[str, int]] = []

        def note(axis: Any, part: Any, name: str = name, rows: Any = rows) -> None:
            if isinstance(axis, int):
                leaves = jax.tree.leaves(part)
                rows += [_row(axis, name, x) for x in leaves if _has(axis, x)]

        jax.tree.map(
            note, prefix, arg, is_leaf=lambda x: x is None or is_flat_module(x)
        )
        yield from rows


def _has(axis: int, x: Any) -> bool:
    """Whether an array has the axis; JAX has said so of one that has not."""
    return -np.ndim(x) <= axis < np.ndim(x)


def _row(axis: int, where: str, x: Any) -> tuple[str, int]:
    return f"axis {axis} of {where}, {describe(x)},", np.shape(x)[axis]
