"""Programs that NNX users write give the same bits with either library."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx

import sortal

X = jnp.linspace(-1, 1, 12).reshape(4, 3)


def block(nnx: Any) -> Any:
    class Block(nnx.Module):
        def __init__(self, rngs: Any):
            self.linear = nnx.Linear(3, 3, rngs=rngs)
            self.bn = nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.dropout(nnx.gelu(self.bn(self.linear(x))))

    return Block


def methods_in_the_class_body(nnx: Any) -> Any:
    """The constructor mapped over layers, the call scanned over them."""

    class Layers(nnx.Module):
        @nnx.split_rngs(splits=5)
        @nnx.vmap(in_axes=(0, 0))
        def __init__(self, rngs: Any):
            self.linear = nnx.Linear(3, 3, rngs=rngs)
            self.bn = nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def __call__(self, x: Any) -> Any:
            return self.dropout(nnx.gelu(self.bn(self.linear(x))))

    model = Layers(nnx.Rngs(0))
    return model, [model(X), nnx.jit(lambda m, x: m(x))(model, X)]


def carried_by_kind(nnx: Any) -> Any:
    """A recurrent cell whose state and random stream go from step to step."""

    class Cell(nnx.Module):
        def __init__(self, rngs: Any):
            self.linear = nnx.Linear(3, 3, rngs=rngs)
            self.h = nnx.BatchStat(jnp.zeros(3))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            self.h[...] = self.dropout(jnp.tanh(self.linear(x) + self.h[...]))
            return self.h[...]

    axes = nnx.StateAxes({(nnx.RngState, nnx.BatchStat): nnx.Carry, ...: None})

    @nnx.scan(in_axes=(axes, 0), out_axes=0)
    def run(cell: Any, x: Any) -> Any:
        return cell(x)

    cell = Cell(nnx.Rngs(0))
    return cell, [run(cell, X), run(cell, X)]


def ensemble_with_shared_params(nnx: Any) -> Any:
    """Params shared, statistics and random streams of each replica its own."""
    model = block(nnx)(nnx.Rngs(0))
    nnx.split_rngs(model, splits=2)
    for name in ("mean", "var"):
        old = getattr(model.bn, name)
        setattr(model.bn, name, nnx.BatchStat(jnp.stack([old[...]] * 2)))
    axes = nnx.StateAxes({nnx.Param: None, ...: 0})

    @nnx.vmap(in_axes=(axes, 0), out_axes=0)
    def forward(model: Any, x: Any) -> Any:
        return model(x)

    return model, [forward(model, jnp.stack([X, 2 * X])) for _ in range(2)]


def an_ensemble_trained_under_jit(nnx: Any) -> Any:
    """vmap of a whole training step, each member with its own optimizer."""
    make = block(nnx)

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: Any) -> Any:
        model = make(rngs)
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    @nnx.vmap(in_axes=(0, 0, None), out_axes=0)
    def step(model: Any, optimizer: Any, x: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    model, optimizer = create(nnx.Rngs(0))
    return (model, optimizer), [step(model, optimizer, X) for _ in range(3)]


def layers_under_remat(nnx: Any) -> Any:
    """Gradients through a scan over layers, each recomputed."""
    make = block(nnx)

    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: Any) -> Any:
        return make(rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def forward(layer: Any, x: Any) -> Any:
        return layer(x)

    @nnx.jit
    def grads(model: Any) -> Any:
        return nnx.grad(lambda m: (forward(m, X) ** 2).sum())(model)

    model = create(nnx.Rngs(0))
    return model, jax.tree.leaves(grads(model))


def loops_and_branches(nnx: Any) -> Any:
    """A while loop over a module, and a branch that writes."""
    model = block(nnx)(nnx.Rngs(0))

    def body(value: Any) -> Any:
        model, x, i = value
        return model, model(x), i + 1

    model, y, _ = nnx.while_loop(lambda v: v[2] < 3, body, (model, X, 0))
    model.total = nnx.Variable(jnp.zeros(()))

    def add(model: Any, y: Any) -> None:
        model.total[...] += y.sum()

    def skip(model: Any, y: Any) -> None:
        pass

    nnx.cond(y.sum() < 1e6, add, skip, model, y)
    nnx.cond(y.sum() > 1e6, add, skip, model, y)
    return model, [
        y,
        nnx.fori_loop(0, 2, lambda i, v: (v[0], v[0](v[1])), (model, y))[1],
    ]


PROGRAMS = (
    methods_in_the_class_body,
    carried_by_kind,
    ensemble_with_shared_params,
    an_ensemble_trained_under_jit,
    layers_under_remat,
    loops_and_branches,
)


def leaves(tree: Any) -> list[Any]:
    found = jax.tree.leaves(tree)
    return [
        np.asarray(jax.random.key_data(x))
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        else np.asarray(x)
        for x in found
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_outputs_and_final_state_are_those_of_flax_to_the_bit(program: Any) -> None:
    ours, found = program(sortal)
    theirs, expected = program(flax_nnx)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    mine = leaves(sortal.state(ours))
    reference = leaves(flax_nnx.state(theirs))
    assert len(mine) == len(reference) > 0
    for a, b in zip(mine, reference, strict=True):
        np.testing.assert_array_equal(a, b)
