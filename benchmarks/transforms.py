"""Transforms of one network of 300 Variables: called eagerly, and under jit.

Under jit, the transform stands inside one jitted call, with the model as its argument
and its new statistics as results. The network is that of ``benchmarks.networks``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.networks import STEPS, lists, modules
from benchmarks.report import Table, timed_row
from benchmarks.sections import Peers, agree, progress
from benchmarks.timing import Effort, compare

ROWS = tuple(lists.FUNCTIONS)
PATIENCE = 0.5
"""Seconds from which on a call is timed once: some of Flax's, called eagerly."""
SHALLOW = 1
"""Layers of the eager ``shard_map``: JAX compiles each operation in it at each call."""

Call = Callable[[], Any]


def transforms(peers: Peers, effort: Effort, depth: int = 100) -> Table:
    """Each transform, eagerly and under jit, side by side.

    Args:
      peers: those asked for; Sortal, Flax and raw JAX take part.
      effort: how long to measure.
      depth: layers, of three Variables each.

    Returns:
      The Table.
    """
    table = Table(
        f"Transforms of a network of {depth} layers, {3 * depth} Variables",
        "microseconds per call, medians",
        notes=[
            (
                "the function writes a running mean in every layer; vmap maps inputs "
                "and means and shares the Params, the loops take "
                f"{STEPS} steps over the whole network. Flax's vjp and jvp "
                "differentiate by the means as well."
            ),
            (
                "eagerly, every transform is given the same function object at each "
                "call, with which JAX keeps what it compiled; shard_map compiles each "
                "operation at each call all the same, and so has "
                f"{SHALLOW} layer there. Calls of {PATIENCE} s and more are timed once."
            ),
        ],
    )
    makers = _makers(peers)
    # Comparing the results has warmed each call up once.
    effort = replace(effort, warmup=1, patience=PATIENCE)
    for jitted in (False, True):
        for name in ROWS:
            table.rows.append(_row(makers, effort, name, depth, jitted))
    return table


def _row(
    makers: dict[str, Any], effort: Effort, name: str, depth: int, jitted: bool
) -> Any:
    if name == "shard_map" and not jitted:
        depth = min(depth, SHALLOW)
    row = f"{name}, {'under jit' if jitted else 'eager'}"
    progress(row)
    calls: dict[str, Call] = {}
    for label, make in makers.items():
        call = make(name, depth, jitted)
        if call is not None:
            calls[label] = call
    agree(row, calls)
    return timed_row(row, compare(calls, effort))


def _makers(peers: Peers) -> dict[str, Callable[[str, int, bool], Call | None]]:
    makers: dict[str, Any] = {}
    if "sortal" in peers:
        import sortal

        makers["sortal"] = functools.partial(modules.call, sortal)
    if "flax" in peers:
        from flax import nnx

        makers["flax"] = functools.partial(modules.call, nnx)
    if "raw" in peers:
        makers["raw jax"] = lists.call
    return makers
