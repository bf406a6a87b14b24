"""Equinox: models are immutable pytrees; what changes is returned."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from benchmarks import workload as w
from benchmarks.peers.models import make

LABEL = "equinox"


class Layer(eqx.Module):
    """What layers hold beside their arrays."""

    axis: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)
    features: int = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    param_dtype: Any = eqx.field(static=True)
    precision: Any = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)
    use_scale: bool = eqx.field(static=True)


class Linear(Layer):
    """A linear layer."""

    kernel: jax.Array
    bias: jax.Array

    def __init__(self, index: int, width: int):
        self.kernel = w.kernel(index, width)
        self.bias = w.full(width, 0.0)
        _set_statics(self)

    def __call__(self, x: Any) -> Any:
        return w.linear(x, self.kernel, self.bias)


class Norm(Layer):
    """A normalization; calling it also returns it with new statistics."""

    scale: jax.Array
    bias: jax.Array
    mean: jax.Array
    var: jax.Array

    def __init__(self, width: int):
        self.scale, self.bias = w.full(width, 1.0), w.full(width, 0.0)
        self.mean, self.var = w.full(width, 0.0), w.full(width, 1.0)
        _set_statics(self)

    def __call__(self, x: Any) -> tuple[Any, ...]:
        return w.normalize(x, self.scale, self.bias, self.mean, self.var)


class Block(eqx.Module):
    """A linear layer and a normalization."""

    linear: Linear
    norm: Norm
    index: int = eqx.field(static=True)
    width: int = eqx.field(static=True)

    def __init__(self, index: int, width: int):
        self.linear, self.norm = Linear(index, width), Norm(width)
        self.index, self.width = index, width

    def __call__(self, x: Any) -> tuple[Any, Any, Any]:
        y, mean, var = self.norm(self.linear(x))
        return w.residual(x, y), mean, var


class Trunk(eqx.Module):
    """The stack of blocks."""

    layers: list[Block]
    depth: int = eqx.field(static=True)
    width: int = eqx.field(static=True)

    def __init__(self, depth: int, width: int):
        self.layers = [Block(i, width) for i in range(depth)]
        self.depth, self.width = depth, width

    def __call__(self, x: Any) -> tuple[Any, list[Any]]:
        statistics = []
        for layer in self.layers:
            x, mean, var = layer(x)
            statistics += [mean, var]
        return x, statistics


class Model(eqx.Module):
    """The model."""

    trunk: Trunk
    depth: int = eqx.field(static=True)
    width: int = eqx.field(static=True)

    def __init__(self, depth: int, width: int):
        self.trunk = Trunk(depth, width)
        self.depth, self.width = depth, width

    def __call__(self, x: Any) -> tuple[Any, list[Any]]:
        return self.trunk(x)


class Pair(eqx.Module):
    """Two linear layers."""

    first: Linear
    second: Linear

    def __init__(self, width: int):
        self.first, self.second = Linear(0, width), Linear(1, width)

    def __call__(self, x: Any) -> tuple[Any, list[Any]]:
        return self.second(w.between(self.first(x))), []


class Cell(Layer):
    """One trainable array and one statistic."""

    weight: jax.Array
    mean: jax.Array

    def __init__(self) -> None:
        self.weight, self.mean = w.full(2, 0.0), w.full(2, 0.0)
        _set_statics(self)


class Cells(eqx.Module):
    """A list of cells."""

    layers: list[Cell]

    def __init__(self, leaves: int):
        self.layers = [Cell() for _ in range(leaves // 2)]


def _set_statics(module: Any) -> None:
    for name, value in w.STATICS.items():
        setattr(module, name, value)


def _is_statistic(path: Any) -> bool:
    return path[-1].name in ("mean", "var")


def trainable(model: Any) -> Any:
    """The model with True at what Adam trains and False at the statistics."""
    return jax.tree_util.tree_map_with_path(lambda p, _: not _is_statistic(p), model)


MODELS = SimpleNamespace(Model=Model, Pair=Pair, Cells=Cells)


def build(shape: w.Shape) -> tuple[Any, ...]:
    """The roots: the model, and Adam's state where the shape has one."""
    model = make(MODELS, shape)
    if isinstance(shape, w.Cells):
        return (model,)
    params = eqx.filter(model, trainable(model))
    return (model, (jnp.array(0, jnp.uint32), optax.adam(1e-3).init(params)))


def operations(shape: w.Shape, wanted: tuple[str, ...]) -> w.Operations:
    """Calls for each row that is wanted; ``update`` has no counterpart."""
    roots = build(shape)
    model = roots[0]
    spec = trainable(model)
    params, rest = eqx.partition(model, spec)
    everything = eqx.filter(model, eqx.is_array)

    calls: dict[str, Callable[[], Any]] = {
        w.STATE: lambda: eqx.filter(model, eqx.is_array),
        w.PARAMS: lambda: eqx.filter(model, spec),
        w.PARAMS_LEAVES: lambda: jax.tree.leaves(eqx.filter(model, spec)),
        w.SPLIT: lambda: eqx.partition(model, spec),
        w.MERGE: lambda: eqx.combine(params, rest),
        w.AGAIN: lambda: eqx.partition(eqx.combine(params, rest), spec),
        w.LEAVES: lambda: jax.tree.leaves(model),
        w.STATE_LEAVES: lambda: jax.tree.leaves(params),
        w.STATE_MAP: lambda: jax.tree.map(w.same, everything),
        w.NOOP: _noop(roots),
        w.STEP: _step(roots),
    }
    return {row: {LABEL: calls[row]} for row in wanted if row in calls}


def _noop(roots: tuple[Any, ...]) -> Callable[[], Any]:
    jitted = eqx.filter_jit(lambda *roots: None)
    return lambda: jitted(*roots)


def _step(roots: tuple[Any, ...]) -> Callable[[], Any]:
    jitted = eqx.filter_jit(lambda *roots: jax.tree.map(lambda x: x + 1, roots))
    live = [roots]

    def call() -> Any:
        live[0] = jitted(*live[0])
        return jax.tree.leaves(live[0][-1])[-1].block_until_ready()

    return call


def _step_of(spec: Any, tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(model: Any, adam: Any, x: Any, y: Any) -> Any:
        params, rest = eqx.partition(model, spec)

        def loss_of(params: Any) -> Any:
            out, statistics = eqx.combine(params, rest)(x)
            return ((out - y) ** 2).mean(), statistics

        (loss, statistics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        count, moments = adam
        updates, moments = tx.update(grads, moments, params)
        params = eqx.apply_updates(params, updates)
        rest = jax.tree.unflatten(jax.tree.structure(rest), statistics)
        return loss, eqx.combine(params, rest), (count + 1, moments)

    return step


def training(shape: w.Shape) -> dict[str, Callable[[], Any]]:
    """A whole training step; the call returns the loss."""
    live = [build(shape)]
    step = eqx.filter_jit(_step_of(trainable(live[0][0]), optax.adam(1e-3)))
    x, y = w.batch(shape.width)

    def call() -> Any:
        loss, *new = step(*live[0], x, y)
        live[0] = tuple(new)
        return loss.block_until_ready()

    return {LABEL: call}


def lowering(shape: w.Shape) -> dict[str, Callable[[], Any]]:
    """The same step, written anew, traced and lowered."""
    roots, batch = build(shape), w.batch(shape.width)
    spec, tx = trainable(roots[0]), optax.adam(1e-3)
    return {LABEL: lambda: eqx.filter_jit(_step_of(spec, tx)).lower(*roots, *batch)}
