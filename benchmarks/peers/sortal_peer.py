"""Sortal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

import sortal
from benchmarks import workload as w
from benchmarks.peers.models import define, make

LABEL = "sortal"

MODELS = define(sortal.Module, sortal.Param, sortal.BatchStat, list)


def build(shape: w.Shape) -> tuple[Any, ...]:
    """The roots: the model, and its optimizer where the shape has one."""
    model = make(MODELS, shape)
    if isinstance(shape, w.Cells):
        return (model,)
    return (model, sortal.Optimizer(model, optax.adam(1e-3), wrt=sortal.Param))


def operations(shape: w.Shape, wanted: tuple[str, ...]) -> w.Operations:
    """Calls for each row that is wanted."""
    roots = build(shape)
    calls = verbs(roots[0], MODELS.Cell())
    calls |= {w.NOOP: noop(roots), w.STEP: _step(roots)}
    return {row: {LABEL: calls[row]} for row in wanted}


def verbs(model: Any, other: Any) -> dict[str, Callable[[], Any]]:
    """Calls of the verbs on a model, of this library or of Flax, by row.

    Args:
      model: the model.
      other: an object that is no part of it, whose attributes are written.

    Returns:
      The calls.
    """
    definition, params, rest = sortal.split(model, sortal.Param, ...)
    everything = sortal.state(model)
    doubled = jax.tree.map(lambda x: x * 2, params)
    one_of = w.alternate(params, doubled)

    def edited() -> Any:
        other.features = one_of() is params
        return sortal.state(model, sortal.Param)

    def again() -> Any:
        merged = sortal.merge(definition, params, rest)
        return sortal.split(merged, sortal.Param, ...)

    return {
        w.STATE: lambda: sortal.state(model),
        w.PARAMS: lambda: sortal.state(model, sortal.Param),
        w.PARAMS_LEAVES: lambda: jax.tree.leaves(sortal.state(model, sortal.Param)),
        w.EDITED: edited,
        w.SPLIT: lambda: sortal.split(model, sortal.Param, ...),
        w.MERGE: lambda: sortal.merge(definition, params, rest),
        w.AGAIN: again,
        w.UPDATE: lambda: sortal.update(model, one_of()),
        w.LEAVES: lambda: jax.tree.leaves(model),
        w.STATE_LEAVES: lambda: jax.tree.leaves(params),
        w.STATE_MAP: lambda: jax.tree.map(w.same, everything),
    }


def noop(roots: tuple[Any, ...]) -> Callable[[], Any]:
    """A compiled call that takes the roots and does nothing."""
    jitted = sortal.jit(lambda *roots: None)
    return lambda: jitted(*roots)


def _increment(*roots: Any) -> None:
    for root in roots:
        for variable in sortal.variables(root).leaves():
            variable[...] = variable[...] + 1


def _step(roots: tuple[Any, ...]) -> Callable[[], Any]:
    jitted = sortal.jit(_increment)
    last = sortal.variables(roots[-1]).leaves()[-1]

    def call() -> Any:
        jitted(*roots)
        return last.value.block_until_ready()

    return call


def train(roots: tuple[Any, ...], width: int) -> Callable[[], Any]:
    """A call of a whole training step of the roots, which returns the loss."""
    arguments = (*roots, *w.batch(width))
    step = sortal.jit(w.step_with(sortal.value_and_grad))
    return lambda: step(*arguments).block_until_ready()


def lower(roots: tuple[Any, ...], width: int) -> Callable[[], Any]:
    """A call that traces and lowers the same step, written anew."""
    arguments = (*roots, *w.batch(width))
    return lambda: sortal.jit(w.step_with(sortal.value_and_grad)).lower(*arguments)


def training(shape: w.Shape) -> dict[str, Callable[[], Any]]:
    """A whole training step; the call returns the loss."""
    return {LABEL: train(build(shape), shape.width)}


def lowering(shape: w.Shape) -> dict[str, Callable[[], Any]]:
    """The same step, written anew, traced and lowered."""
    return {LABEL: lower(build(shape), shape.width)}
