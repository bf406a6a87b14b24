"""Flax NNX, in each of the ways that it offers to call a compiled function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from benchmarks import workload as w

LABEL = "flax"


class Linear(nnx.Module):
    """A linear layer."""

    def __init__(self, index: int, width: int):
        self.kernel = nnx.Param(w.kernel(index, width))
        self.bias = nnx.Param(w.full(width, 0.0))
        _set_statics(self)

    def __call__(self, x: Any) -> Any:
        return w.linear(x, self.kernel[...], self.bias[...])


class Norm(nnx.Module):
    """A normalization with running statistics."""

    def __init__(self, width: int):
        self.scale = nnx.Param(w.full(width, 1.0))
        self.bias = nnx.Param(w.full(width, 0.0))
        self.mean = nnx.BatchStat(w.full(width, 0.0))
        self.var = nnx.BatchStat(w.full(width, 1.0))
        _set_statics(self)

    def __call__(self, x: Any) -> Any:
        y, self.mean[...], self.var[...] = w.normalize(
            x, self.scale[...], self.bias[...], self.mean[...], self.var[...]
        )
        return y


class Block(nnx.Module):
    """A linear layer and a normalization."""

    def __init__(self, index: int, width: int):
        self.linear = Linear(index, width)
        self.norm = Norm(width)
        self.index, self.width = index, width

    def __call__(self, x: Any) -> Any:
        return w.residual(x, self.norm(self.linear(x)))


class Trunk(nnx.Module):
    """The stack of blocks."""

    def __init__(self, depth: int, width: int):
        self.layers = nnx.List([Block(i, width) for i in range(depth)])
        self.depth, self.width = depth, width

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nnx.Module):
    """The model."""

    def __init__(self, depth: int, width: int):
        self.trunk = Trunk(depth, width)
        self.depth, self.width = depth, width

    def __call__(self, x: Any) -> Any:
        return self.trunk(x)


class Cell(nnx.Module):
    """One Param and one BatchStat."""

    def __init__(self) -> None:
        self.weight = nnx.Param(w.full(2, 0.0))
        self.mean = nnx.BatchStat(w.full(2, 0.0))
        _set_statics(self)


class Cells(nnx.Module):
    """A list of cells."""

    def __init__(self, leaves: int):
        self.layers = nnx.List([Cell() for _ in range(leaves // 2)])


def _set_statics(module: Any) -> None:
    for name, value in w.STATICS.items():
        setattr(module, name, value)


def build(shape: w.Shape) -> tuple[Any, ...]:
    """The roots: the model, and its optimizer where the shape has one."""
    if isinstance(shape, w.Cells):
        return (Cells(shape.leaves),)
    model = Model(shape.depth, shape.width)
    return (model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param))


def operations(shape: w.Shape, wanted: tuple[str, ...]) -> w.Operations:
    """Calls for each row that is wanted."""
    roots = build(shape)
    model = roots[0]
    definition, params, rest = nnx.split(model, nnx.Param, ...)
    doubled = jax.tree.map(lambda x: x * 2, params)
    one_of = w.alternate(params, doubled)

    other = Cell()

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
    }
    found = {row: {LABEL: calls[row]} for row in wanted if row in calls}
    if w.NOOP in wanted:
        found[w.NOOP] = _ways(lambda *roots: None, shape, lambda _: None)
    if w.STEP in wanted:
        found[w.STEP] = _ways(
            increment, shape, lambda v: v.get_value().block_until_ready()
        )
    return found


def variables(*roots: Any) -> list[Any]:
    """All Variables below the roots."""
    return [v for _, v in nnx.iter_graph(roots) if isinstance(v, nnx.Variable)]


def increment(*roots: Any) -> None:
    """Adds one to every leaf."""
    for variable in variables(*roots):
        variable[...] = variable[...] + 1


def _ways(
    fn: Callable[..., Any], shape: w.Shape, wait: Callable[[Any], Any]
) -> dict[str, Callable[[], Any]]:
    """``fn`` compiled in each way, on a model of its own, which the call waits for."""
    ways: dict[str, Callable[..., Callable[[], Any]]] = {
        "flax": lambda *r: _bind(nnx.jit(fn), r),
        "flax graph=False": lambda *r: _bind(nnx.jit(fn, graph=False), r),
        "flax jit_partial": lambda *r: nnx.jit_partial(fn, *r, graph=False),
        "flax cached_partial": lambda *r: nnx.cached_partial(nnx.jit(fn), *r),
    }
    if isinstance(shape, w.Cells):
        ways = {LABEL: ways[LABEL]}
    found = {}
    for name, way in ways.items():
        roots = build(shape)
        last = variables(roots[-1])[-1]
        try:
            called = way(*roots)
            called()
        except (AttributeError, TypeError, ValueError):
            continue  # a way that this version of Flax does not have
        found[name] = _then(called, wait, last)
    return found


def _bind(fn: Callable[..., Any], roots: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: fn(*roots)


def _then(
    call: Callable[[], Any], wait: Callable[[Any], Any], last: Any
) -> Callable[[], Any]:
    def both() -> Any:
        call()
        return wait(last)

    return both


def step_with(value_and_grad: Callable[..., Any]) -> Callable[..., Any]:
    """A whole training step, still to be compiled; it returns the loss."""

    def step(model: Any, adam: Any, x: Any, y: Any) -> Any:
        def loss_of(model: Any) -> Any:
            return ((model(x) - y) ** 2).mean()

        loss, grads = value_and_grad(loss_of)(model)
        adam.update(model, grads)
        return loss

    return step


def training(shape: w.Blocks) -> dict[str, Callable[[], Any]]:
    """The training step in several ways; the call returns the loss."""
    step = step_with(nnx.value_and_grad)
    x, y = w.batch(shape.width)
    plain = nnx.jit(step)
    first, second = build(shape), build(shape)
    cached = nnx.cached_partial(nnx.jit(step), *second)
    return {
        "flax": lambda: plain(*first, x, y).block_until_ready(),
        "flax cached_partial": lambda: cached(x, y).block_until_ready(),
    }
