"""Sortal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sortal
from benchmarks import workload as w

LABEL = "sortal"


class Linear(sortal.Module):
    """A linear layer."""

    def __init__(self, index: int, width: int):
        self.kernel = sortal.Param(w.kernel(index, width))
        self.bias = sortal.Param(w.full(width, 0.0))
        _set_statics(self)

    def __call__(self, x: Any) -> Any:
        return w.linear(x, self.kernel.value, self.bias.value)


class Norm(sortal.Module):
    """A normalization with running statistics."""

    def __init__(self, width: int):
        self.scale = sortal.Param(w.full(width, 1.0))
        self.bias = sortal.Param(w.full(width, 0.0))
        self.mean = sortal.BatchStat(w.full(width, 0.0))
        self.var = sortal.BatchStat(w.full(width, 1.0))
        _set_statics(self)

    def __call__(self, x: Any) -> Any:
        y, self.mean.value, self.var.value = w.normalize(
            x,
            self.scale.value,
            self.bias.value,
            self.mean.value,
            self.var.value,
        )
        return y


class Block(sortal.Module):
    """A linear layer and a normalization."""

    def __init__(self, index: int, width: int):
        self.linear = Linear(index, width)
        self.norm = Norm(width)
        self.index, self.width = index, width

    def __call__(self, x: Any) -> Any:
        return w.residual(x, self.norm(self.linear(x)))


class Trunk(sortal.Module):
    """The stack of blocks."""

    def __init__(self, depth: int, width: int):
        self.layers = [Block(i, width) for i in range(depth)]
        self.depth, self.width = depth, width

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Model(sortal.Module):
    """The model."""

    def __init__(self, depth: int, width: int):
        self.trunk = Trunk(depth, width)
        self.depth, self.width = depth, width

    def __call__(self, x: Any) -> Any:
        return self.trunk(x)


class Cell(sortal.Module):
    """One Param and one BatchStat."""

    def __init__(self) -> None:
        self.weight = sortal.Param(w.full(2, 0.0))
        self.mean = sortal.BatchStat(w.full(2, 0.0))
        _set_statics(self)


class Cells(sortal.Module):
    """A list of cells."""

    def __init__(self, leaves: int):
        self.layers = [Cell() for _ in range(leaves // 2)]


class Adam(sortal.Module):
    """Adam's state as Variables; stands in where ``sortal.Optimizer`` is missing."""

    def __init__(self, model: Any, tx: optax.GradientTransformation, wrt: Any):
        self.tx = tx
        self.step = sortal.OptState(jnp.array(0, jnp.uint32))
        params = sortal.state(model, wrt).values_list()
        self.state = jax.tree.map(sortal.OptState, tx.init(params))

    def update(self, model: Any, grads: Any) -> None:
        """Applies one step of gradients to the model's Params."""
        params = sortal.variables(model, sortal.Param).leaves()
        state = jax.tree.map(lambda v: v.value, self.state, is_leaf=_is_variable)
        values = [v.value for v in params]
        updates, new = self.tx.update(grads.values_list(), state, values)
        for variable, value in zip(
            params, optax.apply_updates(values, updates), strict=True
        ):
            variable.value = value
        old = jax.tree.leaves(self.state, is_leaf=_is_variable)
        for variable, value in zip(old, jax.tree.leaves(new), strict=True):
            variable.value = value
        self.step.value = self.step.value + 1


def _is_variable(x: Any) -> bool:
    return isinstance(x, sortal.Variable)


def _set_statics(module: Any) -> None:
    for name, value in w.STATICS.items():
        setattr(module, name, value)


def optimizer(model: Any) -> Any:
    """``sortal.Optimizer`` with Adam, or what stands in for it."""
    make = getattr(sortal, "Optimizer", Adam)
    return make(model, optax.adam(1e-3), wrt=sortal.Param)


def build(shape: w.Shape) -> tuple[Any, ...]:
    """The roots: the model, and its optimizer where the shape has one."""
    if isinstance(shape, w.Cells):
        return (Cells(shape.leaves),)
    model = Model(shape.depth, shape.width)
    return (model, optimizer(model))


def operations(shape: w.Shape, wanted: tuple[str, ...]) -> w.Operations:
    """Calls for each row that is wanted."""
    roots = build(shape)
    calls = verbs(roots[0], Cell())
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
    }


def noop(roots: tuple[Any, ...]) -> Callable[[], Any]:
    """A compiled call that takes the roots and does nothing."""
    jitted = sortal.jit(lambda *roots: None)
    return lambda: jitted(*roots)


def increment(*roots: Any) -> None:
    """Adds one to every leaf."""
    for root in roots:
        for variable in sortal.variables(root).leaves():
            variable.value = variable.value + 1


def _step(roots: tuple[Any, ...]) -> Callable[[], Any]:
    jitted = sortal.jit(increment)
    last = sortal.variables(roots[-1]).leaves()[-1]

    def call() -> Any:
        jitted(*roots)
        return last.value.block_until_ready()

    return call


def training(shape: w.Blocks) -> dict[str, Callable[[], Any]]:
    """A whole training step; the call returns the loss."""
    model, adam = build(shape)
    x, y = w.batch(shape.width)

    @sortal.jit
    def step(model: Any, adam: Any, x: Any, y: Any) -> Any:
        def loss_of(model: Any) -> Any:
            return ((model(x) - y) ** 2).mean()

        loss, grads = sortal.value_and_grad(loss_of)(model)
        adam.update(model, grads)
        return loss

    return {LABEL: lambda: step(model, adam, x, y).block_until_ready()}
