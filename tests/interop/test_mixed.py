"""The same programs with layers of both libraries in one another, as in Flax alone.

Each program is a model of three levels, and each level is of either library. It is
trained and evaluated by Sortal, and compared with Flax's own model under Flax's own
transforms and Optimizer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sortal

flax = pytest.importorskip("flax.nnx")

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(8, 2)), jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(2).normal(size=(2, 6, 4)), jnp.float32)

LIBRARIES = {"sortal": sortal, "flax": flax}
NESTINGS = [
    pytest.param([LIBRARIES[name] for name in names], id=" in ".join(names))
    for names in itertools.product(LIBRARIES, repeat=3)
    if len({*names}) == 2
]


def holding(library: Any, call: Callable[..., Any], **children: Any) -> Any:
    """An object of a library's Module with these attributes."""

    class Holder(library.Module):
        def __call__(self, *args: Any) -> Any:
            return call(self, *args)

    made = Holder()
    for name, child in children.items():
        setattr(made, name, child)
    return made


def mlp(layer: Any, middle: Any, outer: Any) -> Any:
    block = holding(
        middle,
        lambda m, x: m.drop(jax.nn.relu(m.norm(m.linear(x)))),
        linear=layer.Linear(4, 8, rngs=layer.Rngs(0)),
        norm=layer.BatchNorm(8, rngs=layer.Rngs(0)),
        drop=layer.Dropout(0.4, rngs=layer.Rngs(1)),
    )
    return holding(
        outer,
        lambda m, x: m.head(m.block(x)),
        block=block,
        head=layer.Linear(8, 2, rngs=layer.Rngs(2)),
    )


def attention(layer: Any, middle: Any, outer: Any) -> Any:
    heads = layer.MultiHeadAttention(
        num_heads=2,
        in_features=4,
        dropout_rate=0.3,
        decode=False,
        rngs=layer.Rngs(params=0, dropout=1),
    )
    block = holding(middle, lambda m, x: x + m.heads(x), heads=heads)
    return holding(
        outer,
        lambda m, x: m.head(m.block(x)),
        block=block,
        head=layer.Linear(4, 2, rngs=layer.Rngs(2)),
    )


def lora(layer: Any, middle: Any, outer: Any) -> Any:
    block = holding(
        middle,
        lambda m, x: m.drop(m.adapted(x)),
        adapted=layer.LoRALinear(4, 8, lora_rank=2, rngs=layer.Rngs(0)),
        drop=layer.Dropout(0.4, rngs=layer.Rngs(1)),
    )
    return holding(
        outer,
        lambda m, x: m.head(m.block(x)),
        block=block,
        head=layer.LoRALinear(8, 2, lora_rank=2, rngs=layer.Rngs(2)),
    )


class Program(NamedTuple):
    build: Callable[..., Any]
    loss: Callable[[Any], Any]
    trained: str
    inputs: Any


PROGRAMS = {
    "MLP": Program(mlp, lambda m: ((m(X) - Y) ** 2).mean(), "Param", X),
    "attention": Program(attention, lambda m: (m(TOKENS) ** 2).mean(), "Param", TOKENS),
    "LoRA": Program(lora, lambda m: ((m(X) - Y) ** 2).mean(), "LoRAParam", X),
}
MODES = {"deterministic": True, "use_running_average": True}
IN_TRAINING = dict.fromkeys(MODES, False)


def values(state: Any) -> dict[Any, np.ndarray]:
    pairs = state.flat_state() if isinstance(state, sortal.State) else None
    pairs = flax.to_flat_state(state) if pairs is None else pairs
    found = {path: x.get_value() for path, x in pairs}
    keys = {p for p, x in found.items() if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)}
    return {
        path: np.asarray(jax.random.key_data(x) if path in keys else x)
        for path, x in found.items()
    }


def by_flax(program: Program, steps: int) -> Any:
    model = program.build(flax, flax, flax)
    kind = getattr(flax, program.trained)
    optimizer = flax.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=kind)
    model.train()

    @flax.jit
    def step(model: Any, optimizer: Any) -> Any:
        grad = flax.value_and_grad(program.loss, argnums=flax.DiffState(0, kind))
        loss, grads = grad(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    model.eval()
    return losses, model(program.inputs), values(flax.state(model))


def by_sortal(program: Program, libraries: Any, steps: int) -> Any:
    model = program.build(*libraries)
    kind = getattr(sortal, program.trained)
    optimizer = sortal.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=kind)
    sortal.set_attributes(model, raise_if_not_found=False, **IN_TRAINING)

    @sortal.jit
    def step(model: Any, optimizer: Any) -> Any:
        loss, grads = sortal.value_and_grad(program.loss, wrt=kind)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    sortal.set_attributes(model, raise_if_not_found=False, **MODES)
    first, second = (model(program.inputs) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    return losses, second, values(sortal.state(model))


def assert_close(mine: Any, theirs: Any) -> None:
    np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request: Any) -> Any:
    found = PROGRAMS[request.param]
    return found, by_flax(found, 3)


@pytest.mark.parametrize("libraries", NESTINGS)
def test_training_and_evaluation_are_those_of_flax_alone(program, libraries):
    what, (losses, outputs, after) = program
    mine, found, state = by_sortal(what, libraries, 3)
    assert_close(mine, losses)
    assert len(set(mine)) == 3, "the losses of training differ"
    assert_close(found, outputs)
    assert state.keys() == after.keys()
    for path, x in state.items():
        np.testing.assert_allclose(
            x, after[path], rtol=1e-4, atol=1e-5, err_msg=str(path)
        )


def decoder(layer: Any, middle: Any, outer: Any) -> Any:
    heads = layer.MultiHeadAttention(
        num_heads=2, in_features=4, decode=True, rngs=layer.Rngs(0)
    )
    heads.init_cache(TOKENS.shape)
    block = holding(middle, lambda m, x: x + m.heads(x), heads=heads)
    return holding(outer, lambda m, x: m.block(x), block=block)


@functools.cache
def decoded_by_flax() -> Any:
    model = decoder(flax, flax, flax)
    call = flax.jit(lambda m, x: m(x))
    outputs = [call(model, TOKENS[:, t : t + 1]) for t in range(TOKENS.shape[1])]
    return outputs, values(flax.state(model))


@pytest.mark.parametrize("libraries", NESTINGS)
def test_decoding_from_a_cache_is_that_of_flax_alone(libraries):
    outputs, after = decoded_by_flax()
    model = decoder(*libraries)
    call = sortal.jit(lambda m, x: m(x), donate=sortal.Cache)
    for t, output in enumerate(outputs):
        assert_close(call(model, TOKENS[:, t : t + 1]), output)
    state = values(sortal.state(model))
    assert state.keys() == after.keys()
    assert state["block", "heads", "cache_index"] == len(outputs)
    for path, x in state.items():
        assert_close(x, after[path])


@pytest.mark.parametrize("libraries", NESTINGS[1:5:3])
def test_only_what_is_trained_changes(libraries):
    program = PROGRAMS["LoRA"]
    model = program.build(*libraries)
    before = values(
        sortal.state(model, sortal.Param & ~sortal.OfType(sortal.LoRAParam))
    )
    adapters = values(sortal.state(model, sortal.LoRAParam))
    optimizer = sortal.Optimizer(model, optax.sgd(0.1), wrt=sortal.LoRAParam)
    for _ in range(2):
        grads = sortal.grad(program.loss, wrt=sortal.LoRAParam)(model)
        optimizer.update(model, grads)
    after = values(sortal.state(model, sortal.Param))
    assert len(before) == 4
    assert all((after[path] == x).all() for path, x in before.items())
    assert all((after[path] != x).any() for path, x in adapters.items())


WRAPPERS = {
    "RNN": lambda outer, inner: outer.RNN(inner.GRUCell(4, 3, rngs=inner.Rngs(0))),
    "Bidirectional": lambda outer, inner: outer.Bidirectional(
        outer.RNN(inner.GRUCell(4, 3, rngs=inner.Rngs(0))),
        outer.RNN(inner.GRUCell(4, 3, rngs=inner.Rngs(1))),
    ),
    "LoRA": lambda outer, inner: outer.LoRA(
        4, 2, 3, base_module=inner.Linear(4, 3, rngs=inner.Rngs(0)), rngs=outer.Rngs(0)
    ),
    "Sequential": lambda outer, inner: outer.Sequential(
        inner.Linear(4, 3, rngs=inner.Rngs(0)), inner.LayerNorm(3, rngs=inner.Rngs(0))
    ),
    "WeightNorm": lambda outer, inner: outer.WeightNorm(
        inner.Linear(4, 3, rngs=inner.Rngs(0)), rngs=outer.Rngs(0)
    ),
    "SpectralNorm": lambda outer, inner: outer.SpectralNorm(
        inner.Linear(4, 3, rngs=inner.Rngs(0)), rngs=outer.Rngs(0)
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_layer_of_ours_around_one_of_flax_is_that_of_flax_alone(name):
    reference, model = WRAPPERS[name](flax, flax), WRAPPERS[name](sortal, flax)
    for _ in range(2):
        assert_close(model(TOKENS), reference(TOKENS))
    theirs = [path for path, _ in flax.to_flat_state(flax.state(reference))]
    assert sorted(map(str, sortal.state(model).paths())) == sorted(map(str, theirs))
