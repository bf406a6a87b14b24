"""SpectraX: modules that are pytrees, and written by a compiled call where it says so.

Its Optimizer is functional, and so the state of Adam is passed in and returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
import spectrax as spx
from spectrax.contrib import Optimizer
from spectrax.nn import ModuleList

from benchmarks import workload as w
from benchmarks.peers.models import define, make

LABEL = "spectrax"

PARAMS, STATISTICS = "parameters", "batch_stats"
SELECTOR = spx.select().variables(PARAMS)


class Param(spx.Parameter):
    """A Parameter that ``[...]`` reads and writes whole, with no slicing."""

    def __getitem__(self, index: Any) -> Any:
        return self.value

    def __setitem__(self, index: Any, value: Any) -> None:
        self.value = value


class BatchStat(spx.Buffer):
    """A running statistic, the same way."""

    def __init__(self, value: Any):
        super().__init__(value, kind=STATISTICS)

    __getitem__, __setitem__ = Param.__getitem__, Param.__setitem__


MODELS = define(spx.Module, Param, BatchStat, ModuleList)
for _name, _class in vars(MODELS).items():
    # SpectraX finds a class again by the name of its module and its own.
    _class.__module__, _class.__qualname__ = __name__, _name
    globals()[_name] = _class


def build(shape: w.Shape) -> tuple[Any, ...]:
    """The roots: the model, and its optimizer where the shape has one."""
    model = make(MODELS, shape)
    if isinstance(shape, w.Cells):
        return (model,)
    return (model, Optimizer.create(model, optax.adam(1e-3)))


def operations(shape: w.Shape, wanted: tuple[str, ...]) -> w.Operations:
    """Calls for each row that is wanted."""
    roots = build(shape)
    model = roots[0]
    definition, everything = spx.export(model)
    params, rest = _split(model)[1:]
    doubled = jax.tree.map(lambda x: x * 2, params)
    one_of = w.alternate(params, doubled)
    other = MODELS.Cell()

    def edited() -> Any:
        other.features = one_of() is params
        return _params(model)

    calls: dict[str, Callable[[], Any]] = {
        w.STATE: lambda: spx.tree_state(model),
        w.PARAMS: lambda: _params(model),
        w.PARAMS_LEAVES: lambda: jax.tree.leaves(_params(model)),
        w.EDITED: edited,
        w.SPLIT: lambda: _split(model),
        w.MERGE: lambda: spx.bind(definition, params.overlay(rest)),
        w.AGAIN: lambda: _split(spx.bind(definition, params.overlay(rest))),
        w.UPDATE: lambda: spx.update(model, one_of()),
        w.LEAVES: lambda: jax.tree.leaves(model),
        w.STATE_LEAVES: lambda: jax.tree.leaves(params),
        w.STATE_MAP: lambda: jax.tree.map(w.same, everything),
        w.NOOP: _noop(roots),
        w.STEP: _step(roots),
    }
    return {row: {LABEL: calls[row]} for row in wanted}


def _params(model: Any) -> Any:
    return spx.tree_state(model).filter(PARAMS)


def _split(model: Any) -> tuple[Any, Any, Any]:
    definition, state = spx.export(model)
    return definition, *SELECTOR.partition_state(model, state)


def _noop(roots: tuple[Any, ...]) -> Callable[[], Any]:
    jitted = spx.jit(lambda *roots: None)
    return lambda: jitted(*roots)


def _step(roots: tuple[Any, ...]) -> Callable[[], Any]:
    @spx.jit(mutable=[PARAMS, STATISTICS])
    def jitted(model: Any, *others: Any) -> Any:
        for _, variable in spx.live_variables(model):
            variable.value = variable.value + 1
        return jax.tree.map(lambda x: x + 1, others)

    model, *others = roots
    last, live = spx.live_variables(model)[-1][1], [others]

    def call() -> Any:
        live[0] = jitted(model, *live[0])
        return last.value.block_until_ready()

    return call


def _compiled() -> Any:
    """The training step, a new function at each call."""

    @spx.jit(mutable=[PARAMS, STATISTICS])
    def step(model: Any, adam: Any, x: Any, y: Any) -> Any:
        definition, params, rest = _split(model)

        def loss_of(params: Any) -> Any:
            merged = spx.bind(definition, params.overlay(rest))
            loss = ((merged(x) - y) ** 2).mean()
            return loss, spx.tree_state(merged).filter(STATISTICS)

        (loss, statistics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        params, adam = adam.update(params, grads)
        spx.update(model, params.overlay(statistics))
        return loss, adam

    return step


def training(shape: w.Shape) -> dict[str, Callable[[], Any]]:
    """A whole training step; the call returns the loss."""
    model, adam = build(shape)
    step, live = _compiled(), [adam]
    x, y = w.batch(shape.width)

    def call() -> Any:
        loss, live[0] = step(model, live[0], x, y)
        return loss.block_until_ready()

    return {LABEL: call}


def lowering(shape: w.Shape) -> dict[str, Callable[[], Any]]:
    """The same step, written anew, traced and lowered."""
    arguments = (*build(shape), *w.batch(shape.width))
    return {LABEL: lambda: _compiled().lower(*arguments)}
