"""Sortal's verbs and transforms on the models and optimizers of Flax, as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sortal
from benchmarks import workload as w
from benchmarks.peers import flax_peer, sortal_peer

LABEL = "sortal on flax"

build = flax_peer.build


def operations(shape: w.Shape, wanted: tuple[str, ...]) -> w.Operations:
    """Calls for each row that is wanted; leaves are asked of JAX, which asks Flax."""
    roots = build(shape)
    calls = sortal_peer.verbs(roots[0], flax_peer.MODELS.Cell())
    del calls[w.LEAVES]
    calls |= {w.NOOP: sortal_peer.noop(roots), w.STEP: _step(roots)}
    return {row: {LABEL: calls[row]} for row in wanted if row in calls}


def _step(roots: tuple[Any, ...]) -> Callable[[], Any]:
    jitted = sortal.jit(flax_peer.increment)
    last = flax_peer.variables(roots[-1])[-1]

    def call() -> Any:
        jitted(*roots)
        return last.get_value().block_until_ready()

    return call


def training(shape: w.Shape) -> dict[str, Callable[[], Any]]:
    """A whole training step; the call returns the loss."""
    return {LABEL: sortal_peer.train(build(shape), shape.width)}


def lowering(shape: w.Shape) -> dict[str, Callable[[], Any]]:
    """The same step, written anew, traced and lowered."""
    return {LABEL: sortal_peer.lower(build(shape), shape.width)}
