"""Programs that Flax's tree mode ends, on Flax's own objects.

Each program runs twice: with Flax's transforms and the modes that it was written for,
and with Sortal's while Flax is in tree mode, which its design note 5310 makes the
default.
`docs/flax-tree-mode.md` shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sortal import nnx as sortal_nnx

flax_nnx = pytest.importorskip("flax.nnx")
PROGRAMS: list[Callable[[Any], Any]] = []
X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


def ended(program: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A program of transforms ``t`` on objects of Flax, which tree mode ends."""
    PROGRAMS.append(program)
    return program


class Net(flax_nnx.Module):
    """Params, statistics, and a stream of keys."""

    def __init__(self, rngs: Any):
        self.linear = flax_nnx.Linear(3, 3, rngs=rngs)
        self.norm = flax_nnx.BatchNorm(3, rngs=rngs)
        self.dropout = flax_nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.norm(self.linear(x)))


def net() -> Net:
    return Net(flax_nnx.Rngs(0))


def read(model: Any) -> Any:
    """All arrays of a model, as Flax reads them."""
    leaves = jax.tree.leaves(flax_nnx.state(model, graph=True))
    keys = jax.dtypes.prng_key
    return [jax.random.key_data(x) if _is(x, keys) else x for x in leaves]


def _is(x: Any, dtype: Any) -> bool:
    return jnp.issubdtype(x.dtype, dtype)


def loss_of(model: Any, x: Any = X) -> Any:
    return (model(x) ** 2).mean()


# ------------------------------------------------------------------ prefix filters
@ended
def vmap_with_an_axis_for_each_kind(t: Any) -> Any:
    axes = t.StateAxes({flax_nnx.Param: 0, ...: None})

    @t.split_rngs(splits=3)
    @t.vmap(in_axes=(0,), out_axes=axes)
    def create(rngs: Any) -> Any:
        return flax_nnx.Linear(3, 2, rngs=rngs)

    stack = create(flax_nnx.Rngs(0))
    out = t.vmap(lambda m, x: m(x), in_axes=(axes, None))(stack, X)
    return out, read(stack)


@ended
def scan_over_layers_with_shared_statistics(t: Any) -> Any:
    class Layer(flax_nnx.Module):
        def __init__(self, rngs: Any):
            self.linear = flax_nnx.Linear(3, 3, rngs=rngs)
            self.calls = flax_nnx.Variable(jnp.array(0))

    @t.split_rngs(splits=4)
    @t.vmap
    def create(rngs: Any) -> Any:
        return flax_nnx.Linear(3, 3, rngs=rngs)

    stack = create(flax_nnx.Rngs(0))
    layer = Layer(flax_nnx.Rngs(1))
    layer.linear = stack
    axes = t.StateAxes({flax_nnx.Param: 0, ...: t.Carry})

    @t.scan(in_axes=(axes, t.Carry), out_axes=t.Carry)
    def forward(layer: Any, x: Any) -> Any:
        layer.calls[...] += 1
        return jnp.tanh(layer.linear(x))

    return forward(layer, X), read(layer)


@ended
def jit_with_a_sharding_for_each_kind(t: Any) -> Any:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    there = jax.NamedSharding(mesh, jax.P())
    by_kind = t.StateSharding({flax_nnx.Param: there, ...: None})
    model = net()
    forward = t.jit(lambda m, x: m(x), in_shardings=(by_kind, None))
    return forward(model, X), read(model)


# ----------------------------------------------------------------------- gradients
@ended
def a_training_step_whose_gradients_are_by_param(t: Any) -> Any:
    model = net()
    optimizer = flax_nnx.Optimizer(model, optax.adam(1e-2), wrt=flax_nnx.Param)

    @t.jit
    def step(model: Any, optimizer: Any) -> Any:
        loss, grads = t.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    return [step(model, optimizer) for _ in range(3)], read(model), read(optimizer)


@ended
def gradients_by_a_filter(t: Any) -> Any:
    class Adapted(flax_nnx.Module):
        def __init__(self, rngs: Any):
            self.base = flax_nnx.Linear(3, 3, rngs=rngs)
            self.low_rank = flax_nnx.LoRA(3, 2, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.base(x) + 1 + self.low_rank(x)

    model = Adapted(flax_nnx.Rngs(0))
    by = t.DiffState(0, flax_nnx.LoRAParam)
    grads = t.grad(loss_of, argnums=by)(model)
    return jax.tree.leaves(grads), len(jax.tree.leaves(grads))


@ended
def a_pull_back_written_by_hand(t: Any) -> Any:
    class Foo(flax_nnx.Module):
        def __init__(self) -> None:
            self.x = flax_nnx.Param(jnp.array(1.0))
            self.y = flax_nnx.Param(jnp.array(2.0))

    @t.custom_vjp
    def f(m: Any) -> Any:
        return jnp.sin(m.x[...]) * m.y[...]

    def forward(m: Any) -> Any:
        return f(m), (jnp.cos(m.x[...]), jnp.sin(m.x[...]), m)

    def backward(residuals: Any, g: Any) -> Any:
        (m_updates_g,), out_g = g
        cos_x, sin_x, m = residuals
        m_g = t.clone(m_updates_g)
        m_g["x"][...] = cos_x * out_g * m.y[...]
        m_g["y"][...] = sin_x * out_g
        return (m_g,)

    f.defvjp(forward, backward)
    return jax.tree.leaves(t.grad(f)(Foo()))


# ------------------------------------------------------------------ shared references
class Tied(flax_nnx.Module):
    """Embeddings that are also the last layer's kernel, and a layer used twice."""

    def __init__(self, rngs: Any):
        self.embed = flax_nnx.Embed(5, 3, rngs=rngs)
        self.first = self.second = flax_nnx.Linear(3, 3, rngs=rngs)
        self.head = flax_nnx.Linear(3, 5, use_bias=False, rngs=rngs)
        self.head.kernel = self.embed.embedding

    def __call__(self, tokens: Any) -> Any:
        x = self.second(jnp.tanh(self.first(self.embed(tokens))))
        return x @ self.head.kernel[...].T


@ended
def tied_weights_and_a_layer_used_twice(t: Any) -> Any:
    model, tokens = Tied(flax_nnx.Rngs(0)), jnp.array([0, 3, 1])
    # That of Flax refuses the model, too.
    optimizer = t.Optimizer(model, optax.sgd(0.1), wrt=flax_nnx.Param)

    @t.jit
    def step(model: Any, optimizer: Any) -> Any:
        def loss(m: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(
                m(tokens), tokens
            ).mean()

        value, grads = t.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [step(model, optimizer) for _ in range(2)]
    assert model.head.kernel is model.embed.embedding
    assert model.first is model.second
    return losses, read(model)


@ended
def one_object_in_two_arguments(t: Any) -> Any:
    shared = flax_nnx.Variable(jnp.array(1.0))

    @t.jit
    def add(a: Any, b: Any) -> Any:
        a["v"][...] += 1
        return b["v"][...] * 10

    return add({"v": shared}, {"v": shared}), shared[...]


# ------------------------------------------------------------------ edits of structure
@ended
def attributes_made_inside(t: Any) -> Any:
    model = net()

    @t.jit
    def grow(model: Any) -> Any:
        model.scale = flax_nnx.Param(jnp.full(3, 2.0))
        model.linear, model.last = model.norm, model.linear
        return model.last.kernel[...].sum() + model.scale[...].sum()

    return grow(model), model.last.kernel[...], model.scale[...]


@ended
def modes_set_inside(t: Any) -> Any:
    model = net()
    t.jit(lambda m: m.eval())(model)
    return model(X), model.dropout.deterministic


@ended
@pytest.mark.filterwarnings("ignore")
def what_is_sown_is_popped_outside(t: Any) -> Any:
    class Sower(flax_nnx.Module):
        def __init__(self) -> None:
            self.w = flax_nnx.Param(jnp.arange(3.0))

        def __call__(self, x: Any) -> Any:
            self.sow(flax_nnx.Intermediate, "h", self.w[...] * x)
            return x

    model = Sower()
    t.jit(lambda m, x: m(x))(model, X)
    sown = t.pop(model, flax_nnx.Intermediate)
    return jax.tree.leaves(sown), len(jax.tree.leaves(t.state(model)))


@ended
def gradients_by_perturbations(t: Any) -> Any:
    class Perturbed(flax_nnx.Module):
        def __init__(self, rngs: Any):
            self.linear = flax_nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.perturb("h", self.linear(x))

    model = Perturbed(flax_nnx.Rngs(0))

    @t.jit
    def step(model: Any) -> Any:
        model(X)
        by = t.DiffState(0, (flax_nnx.Param, flax_nnx.Perturbation))
        grads = t.grad(loss_of, argnums=by)(model)
        t.pop(model, flax_nnx.Perturbation)
        return jax.tree.leaves(grads)

    return step(model), read(model)


# --------------------------------------------------------------------------- metadata
@ended
def names_of_axes_that_a_map_adds(t: Any) -> Any:
    @t.split_rngs(splits=4)
    @t.vmap(transform_metadata={flax_nnx.PARTITION_NAME: "layers"})
    def create(rngs: Any) -> Any:
        init = flax_nnx.with_partitioning(
            flax_nnx.initializers.lecun_normal(), ("in", "out")
        )
        return flax_nnx.Linear(3, 2, kernel_init=init, rngs=rngs)

    with jax.set_mesh(jax.make_mesh((1, 1, 1), ("layers", "in", "out"))):
        stack = create(flax_nnx.Rngs(0))
    assert stack.kernel.get_metadata("out_sharding") == ("layers", "in", "out")
    return stack.kernel[...]


def numbers(tree: Any) -> list[Any]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def in_graph_mode(program: Any) -> Any:
    with flax_nnx.set_graph_mode(True), flax_nnx.set_graph_updates(True):
        return numbers(program(flax_nnx))


def in_tree_mode(program: Any, transforms: Any) -> Any:
    with flax_nnx.set_graph_mode(False), flax_nnx.set_graph_updates(False):
        return numbers(program(transforms))


programs = pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
pytestmark = pytest.mark.filterwarnings("ignore:\\s*Using 'Module:DeprecationWarning")


@programs
def test_a_program_gives_in_tree_mode_the_numbers_of_graph_mode(program: Any) -> None:
    expected, found = in_graph_mode(program), in_tree_mode(program, sortal_nnx)
    assert len(found) == len(expected) > 0
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@programs
def test_the_transforms_of_flax_end_it_in_tree_mode(program: Any) -> None:
    expected = in_graph_mode(program)
    try:
        found = in_tree_mode(program, flax_nnx)
    except Exception:  # noqa: BLE001
        return
    assert [x.tolist() for x in found] != [x.tolist() for x in expected]
