"""Models of others, written with Flax NNX, as they are: the results are Flax's own.

Each model is built anew, from one seed, for whoever works on it, because a step changes
it. A package that is not installed, or that this version of JAX is too new for, is
skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sortal

nnx = pytest.importorskip("flax.nnx")


DESCENT = optax.sgd(0.1, momentum=0.9)


class Case(NamedTuple):
    """A model, its inputs, its output as one pytree of arrays, and its loss."""

    model: Any
    inputs: tuple[Any, ...]
    forward: Callable[..., Any]
    loss: Callable[..., Any]


def need(module: str) -> Any:
    # ImportError as well: a package may be there, but for an older JAX.
    return pytest.importorskip(module, exc_type=ImportError)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def call(model: Any, *inputs: Any) -> Any:
    return model(*inputs)


def squares(model: Any, *inputs: Any) -> Any:
    return (model(*inputs) ** 2).mean()


def cax_automaton() -> Case:
    """Steps by nnx.scan under nnx.jit of its own; its cells drop out."""
    core, perceive, update = map(
        need, ("cax.core", "cax.core.perceive", "cax.core.update")
    )

    class Automaton(core.ComplexSystem):
        def __init__(self, rngs: Any):
            sizes = {"channel_size": 4, "perception_size": 8}
            self.perceive = perceive.ConvPerceive(**sizes, rngs=rngs)
            self.update = update.NCAUpdate(
                **sizes,
                hidden_layer_sizes=(8,),
                cell_dropout_rate=0.5,
                alive_threshold=-9.0,
                rngs=rngs,
            )

        def _step(self, state: Any, input: Any = None, **_: Any) -> Any:
            return self.update(state, self.perceive(state), input)

    def forward(model: Any, x: Any) -> Any:
        return model(x, num_steps=2)

    def loss(model: Any, x: Any) -> Any:
        return (forward(model, x) ** 2).mean()

    return Case(Automaton(nnx.Rngs(0)), (normal(6, 6, 4),), forward, loss)


def jraphx_network() -> Case:
    """Graph convolutions with BatchNorm and Dropout in an nnx.List."""
    models = need("jraphx.nn.models")
    model = models.GCN(
        3, 8, 2, 2, dropout_rate=0.5, norm="batch_norm", rngs=nnx.Rngs(0)
    )
    edges = jnp.array([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])
    return Case(model, (normal(5, 3), edges), call, squares)


def mamba2_language_model() -> Case:
    """A state-space model with tied embeddings; returns a dict with None in it."""
    mamba2 = need("mamba2_jax")
    config = mamba2.Mamba2Config(
        vocab_size=11, hidden_size=8, state_size=4, head_dim=4, chunk_size=4,
        num_hidden_layers=1,
    )  # fmt: skip
    model = mamba2.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))

    def loss(model: Any, tokens: Any) -> Any:
        return model(tokens, labels=tokens)["loss"]

    tokens = jnp.arange(8).reshape(2, 4)
    return Case(model, (tokens,), call, loss)


def nnx_ppo_actor_critic() -> Case:
    """Has a kind of its own, and one Rngs in several layers."""
    factories = need("nnx_ppo.networks.factories")
    model = factories.make_mlp_actor_critic(3, 2, [8], [8], nnx.Rngs(0))

    def forward(model: Any, x: Any) -> Any:
        out = model(model.initialize_state(x.shape[0]), x)
        found = (out.output.actions, out.output.value_estimates)
        return found, out.output.loglikelihoods, out.regularization_loss

    def loss(model: Any, x: Any) -> Any:
        return sum(y.mean() for y in jax.tree.leaves(forward(model, x)))

    return Case(model, (normal(4, 3),), forward, loss)


def synecdoche_hypernetwork() -> Case:
    """Makes another model's state; holds a treedef, lists of shapes and a constant."""
    hyper = need("synecdoche")
    target = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param)
    model = hyper.RandomProjection(target, 5, rngs=nnx.Rngs(1))

    def forward(model: Any, x: Any) -> Any:
        layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        nnx.update(layer, model())
        return layer(x)

    def loss(model: Any, x: Any) -> Any:
        return (forward(model, x) ** 2).mean()

    return Case(model, (normal(2, 3),), forward, loss)


class TwoLayers(nnx.Module):
    """What qwix is given."""

    def __init__(self, rngs: Any):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.second = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(nnx.relu(self.first(x)))


def qwix_low_rank() -> Case:
    """Adds LoRAParams to layers, and changes their class, when it is applied."""
    qwix = need("qwix")
    x = normal(2, 4)
    provider = qwix.LoraProvider(module_path="first", rank=2, alpha=1.0)
    model = qwix.apply_lora_to_model(
        TwoLayers(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1)
    )
    return Case(model, (x,), call, squares)


def qwix_quantized() -> Case:
    """Trains with weights and activations rounded to int8."""
    qwix = need("qwix")
    x = normal(2, 4)
    rule = qwix.QtRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    model = qwix.quantize_model(TwoLayers(nnx.Rngs(0)), qwix.QtProvider([rule]), x)
    return Case(model, (x,), call, squares)


CASES = (
    cax_automaton,
    jraphx_network,
    mamba2_language_model,
    nnx_ppo_actor_critic,
    synecdoche_hypernetwork,
    qwix_low_rank,
    qwix_quantized,
)
cases = pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
# qwix 0.1 uses names of Flax that are deprecated.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::DeprecationWarning:qwix._src.{module}")
    for module in ("model", "qconfig", "providers.lora", "utils.flax_util")
]


@pytest.fixture(autouse=True)
def cheap_keys():
    """Most of the time would go into compiling JAX's default generator."""
    with jax.default_prng_impl("rbg"):
        yield


def bits(x: Any) -> tuple[Any, ...]:
    """A value that is equal for arrays of the same shape, dtype and bits only."""
    # What Flax has compiled code read only, it puts back as a JAX array; we let be.
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return str(x.dtype), bits(jax.random.key_data(x))
    return x.shape, str(x.dtype), np.asarray(x).tobytes()


def tree_bits(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [bits(x) for x in leaves]


def state_bits(model: Any, *filters: Any) -> dict[Any, Any]:
    """What Flax itself reads out of a model: kind and bits by path."""
    flat = nnx.to_flat_state(nnx.state(model, *filters))
    return {
        path: (type(leaf), tree_bits(leaf.get_value()))
        if isinstance(leaf, nnx.Variable)
        else bits(leaf)
        for path, leaf in flat
    }


def step_of(library: Any) -> Callable[..., Any]:
    """One optimizer step in the words of a library: both have the same."""

    def step(model: Any, optimizer: Any, loss: Any, inputs: Any) -> Any:
        value, grads = library.value_and_grad(loss)(model, *inputs)
        optimizer.update(model, grads)
        return value

    return library.jit(step, static_argnums=2)


@functools.cache
def stepped_by_flax(build: Callable[[], Case]) -> tuple[Any, ...]:
    case = build()
    optimizer = nnx.Optimizer(case.model, DESCENT, wrt=nnx.Param)
    loss = step_of(nnx)(case.model, optimizer, case.loss, case.inputs)
    return bits(loss), state_bits(case.model), state_bits(optimizer)


@cases
def test_state_has_the_paths_and_values_of_flax(build):
    model = build().model
    found = sortal.state(model, nnx.Param).flat_state()
    assert {
        path: (type(leaf), tree_bits(leaf.get_value())) for path, leaf in found
    } == state_bits(model, nnx.Param)
    assert list(sortal.state(model).paths()) == [
        path for path, _ in nnx.to_flat_state(nnx.state(model))
    ]


@cases
def test_split_and_merge_give_back_the_same_model(build):
    model = build().model
    merged = sortal.merge(*sortal.split(model, nnx.Param, ...))
    assert type(merged) is type(model)
    assert merged is not model
    assert state_bits(merged) == state_bits(model)
    assert nnx.graphdef(merged) == nnx.graphdef(model)


@cases
def test_the_compiled_forward_pass_is_that_of_flax(build):
    ours, theirs = build(), build()
    found = sortal.jit(ours.forward)(ours.model, *ours.inputs)
    expected = nnx.jit(theirs.forward)(theirs.model, *theirs.inputs)
    assert tree_bits(found) == tree_bits(expected)
    # What it changes, such as statistics and counts of random keys, as well.
    assert state_bits(ours.model) == state_bits(theirs.model)


@cases
def test_a_step_with_the_optimizer_of_flax_is_that_of_flax(build):
    case = build()
    optimizer = nnx.Optimizer(case.model, DESCENT, wrt=nnx.Param)
    loss = step_of(sortal)(case.model, optimizer, case.loss, case.inputs)
    assert (
        bits(loss),
        state_bits(case.model),
        state_bits(optimizer),
    ) == stepped_by_flax(build)


@cases
def test_a_step_with_our_optimizer_is_that_of_flax(build):
    case = build()
    before = state_bits(case.model, nnx.Param)
    optimizer = sortal.Optimizer(case.model, DESCENT, wrt=nnx.Param)
    loss = step_of(sortal)(case.model, optimizer, case.loss, case.inputs)
    assert (bits(loss), state_bits(case.model)) == stepped_by_flax(build)[:2]
    assert state_bits(case.model, nnx.Param) != before
