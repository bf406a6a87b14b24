"""Flax NNX, in each of the ways that it offers to call a compiled function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from benchmarks import workload as w
from benchmarks.peers.models import define, make

LABEL = "flax"

MODELS = define(nnx.Module, nnx.Param, nnx.BatchStat, nnx.List)


def build(shape: w.Shape) -> tuple[Any, ...]:
    """The roots: the model, and its optimizer where the shape has one."""
    model = make(MODELS, shape)
    if isinstance(shape, w.Cells):
        return (model,)
    return (model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param))


def operations(shape: w.Shape, wanted: tuple[str, ...]) -> w.Operations:
    """Calls for each row that is wanted."""
    roots = build(shape)
    model = roots[0]
    definition, params, rest = nnx.split(model, nnx.Param, ...)
    everything = nnx.state(model)
    doubled = jax.tree.map(lambda x: x * 2, params)
    one_of = w.alternate(params, doubled)

    other = MODELS.Cell()

    def edited() -> Any:
        other.features = one_of() is params
        return nnx.state(model, nnx.Param)

    def again() -> Any:
        merged = nnx.merge(definition, params, rest)
        return nnx.split(merged, nnx.Param, ...)

    calls: dict[str, Callable[[], Any]] = {
        w.STATE: lambda: nnx.state(model),
        w.PARAMS: lambda: nnx.state(model, nnx.Param),
        w.PARAMS_LEAVES: lambda: jax.tree.leaves(nnx.state(model, nnx.Param)),
        w.EDITED: edited,
        w.SPLIT: lambda: nnx.split(model, nnx.Param, ...),
        w.MERGE: lambda: nnx.merge(definition, params, rest),
        w.AGAIN: again,
        w.UPDATE: lambda: nnx.update(model, one_of()),
        w.LEAVES: lambda: jax.tree.leaves(model),
        w.STATE_LEAVES: lambda: jax.tree.leaves(params),
        w.STATE_MAP: lambda: jax.tree.map(w.same, everything),
    }
    found = {row: {LABEL: calls[row]} for row in wanted if row in calls}
    if w.NOOP in wanted:
        found[w.NOOP] = _ways(lambda *roots: None, shape)
    if w.STEP in wanted:
        found[w.STEP] = _ways(increment, shape, waits=True)
    return found


def variables(*roots: Any) -> list[Any]:
    """All Variables below the roots."""
    return [v for _, v in nnx.iter_graph(roots) if isinstance(v, nnx.Variable)]


def increment(*roots: Any) -> None:
    """Adds one to every leaf."""
    for variable in variables(*roots):
        variable[...] = variable[...] + 1


def _ways(
    fn: Callable[..., Any], shape: w.Shape, *rest: Any, waits: bool = False
) -> dict[str, Callable[[], Any]]:
    """``fn`` of the roots and ``rest``, compiled in each way, on a model of its own.

    Args:
      fn: the function; what it returns is returned by the call.
      shape: of the model; ``Cells`` are called in the plain way only.
      rest: further arguments.
      waits: whether the call waits for the last Variable.

    Returns:
      The calls by way.
    """
    ways: dict[str, Callable[..., Callable[..., Any]]] = {
        LABEL: lambda *roots: _bind(nnx.jit(fn), *roots),
        "flax graph=False": lambda *roots: _bind(nnx.jit(fn, graph=False), *roots),
        "flax jit_partial": lambda *roots: nnx.jit_partial(fn, *roots, graph=False),
        "flax cached_partial": lambda *roots: nnx.cached_partial(nnx.jit(fn), *roots),
    }
    if isinstance(shape, w.Cells):
        ways = {LABEL: ways[LABEL]}
    found = {}
    for name, way in ways.items():
        roots = build(shape)
        try:
            call = _bind(way(*roots), *rest)
        except (AttributeError, TypeError):
            continue  # a way that this version of Flax does not have
        found[name] = _waiting(call, variables(roots[-1])[-1]) if waits else call
    return found


def _bind(fn: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    return lambda *others: fn(*first, *others)


def _waiting(call: Callable[[], Any], last: Any) -> Callable[[], Any]:
    def both() -> Any:
        call()
        return last.get_value().block_until_ready()

    return both


def training(shape: w.Shape) -> dict[str, Callable[[], Any]]:
    """The training step in each way; the call returns the loss."""
    calls = _ways(w.step_with(nnx.value_and_grad), shape, *w.batch(shape.width))
    return {name: _ready(call) for name, call in calls.items()}


def _ready(call: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: call().block_until_ready()


def lowering(shape: w.Shape) -> dict[str, Callable[[], Any]]:
    """The same step, written anew, traced and lowered."""
    arguments = (*build(shape), *w.batch(shape.width))
    return {LABEL: lambda: nnx.jit(w.step_with(nnx.value_and_grad)).lower(*arguments)}
