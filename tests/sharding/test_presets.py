"""Each preset trains as one device does, with the collectives that it implies."""

from __future__ import annotations

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal
from sortal.demo.digits import Network
from sortal.demo.llama import Config, Llama
from sortal.errors import ShardingError
from sortal.sharding import presets
from sortal.sharding.presets import LargestAxis

STEPS = 50
LLAMA = Config(
    vocabulary=64,
    features=32,
    hidden=64,
    layers=2,
    heads=4,
    key_value_heads=2,
    context=8,
)
PRESETS = {
    "data_parallel": (presets.data_parallel(), {"data": 8}),
    "zero1": (presets.zero1(min_size=64), {"data": 8}),
    "fsdp": (presets.fsdp(min_size=64), {"data": 8}),
    "tensor_parallel": (presets.tensor_parallel(), {"data": 4, "model": 2}),
    "fsdp_tensor_parallel": (
        presets.fsdp_tensor_parallel(min_size=64),
        {"data": 4, "model": 2},
    ),
}
# What each implies. XLA's CPU backend writes a reduce-scatter as an all-reduce of which
# each device takes its part.
COLLECTIVES = {
    "data_parallel": {"all-reduce"},
    "zero1": {"all-reduce", "all-gather"},
    "fsdp": {"all-reduce", "all-gather"},
    "tensor_parallel": {"all-reduce"},
    "fsdp_tensor_parallel": {"all-reduce", "all-gather"},
}


def mesh_of(sizes):
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def transformer():
    model = Llama(LLAMA, rngs=sortal.Rngs(0))
    return model, sortal.Optimizer(model, optax.adam(1e-3), wrt=sortal.Param)


def digits():
    model = Network(sortal.Rngs(0), width=8)
    model.dropout.deterministic = True
    return model, sortal.Optimizer(model, optax.adam(1e-3), wrt=sortal.Param)


def text_loss(model, tokens):
    logits = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def image_loss(model, images):
    labels = (images.sum((1, 2, 3)) > 0).astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def step_of(loss):
    def step(model, optimizer, batch):
        value, grads = sortal.value_and_grad(loss)(model, batch)
        optimizer.update(model, grads)
        return value

    return step


def batches(kind):
    rng = np.random.default_rng(0)
    if kind == "transformer":
        return rng.integers(0, 64, (STEPS, 8, 9)).astype(np.int32)
    return rng.normal(size=(STEPS, 16, 8, 8, 1)).astype(np.float32)


KINDS = {"transformer": (transformer, text_loss), "digits": (digits, image_loss)}


@pytest.fixture(scope="module")
def alone():
    """The losses of one device."""
    found = {}
    for name, (make, loss) in KINDS.items():
        step, both = sortal.jit(step_of(loss)), make()
        found[name] = [float(step(*both, batch)) for batch in batches(name)]
    return found


def counts(text):
    """How often each collective stands in a compiled program."""
    names = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    return Counter(re.findall(rf" ({names})(?:-start)?\(", text))


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        (kind, preset)
        for kind in KINDS
        for preset in PRESETS
        # A convolutional network has no heads to divide.
        if not (kind == "digits" and "tensor" in preset)
    ],
)
def test_a_preset_trains_as_one_device_does_and_keeps_what_it_says(kind, preset, alone):
    (make, loss), (policy, sizes) = KINDS[kind], PRESETS[preset]
    mesh = mesh_of(sizes)
    both = sortal.shard(make(), mesh, policy)
    report = sortal.sharding_report(both, mesh, policy)
    step = sortal.jit(step_of(loss))
    rows = NamedSharding(mesh, P("data"))
    losses, held = [], sortal.variables(both).leaves()
    for i, batch in enumerate(batches(kind)):
        losses.append(float(step(*both, jax.device_put(batch, rows))))
        jax.block_until_ready([x.value for x in held])
        if i % 10 == 0:
            assert not sortal.sharding_report(both, mesh, policy).elsewhere
    np.testing.assert_allclose(losses, alone[kind], rtol=1e-5, atol=1e-5)
    assert bytes_on_each(both) == {report.on_device}
    batch = jax.device_put(batches(kind)[0], rows)
    found = counts(step.lower(*both, batch).compile().as_text())
    print(kind, preset, report.on_device, report.total, dict(found))  # noqa: T201
    assert set(found) <= COLLECTIVES[preset] | {"reduce-scatter"}
    assert found["all-reduce"] > 0


def bytes_on_each(model):
    held = Counter()
    for x in jax.tree.leaves(sortal.state(model)):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        for part in x.addressable_shards:
            held[part.device] += part.data.nbytes
    return set(held.values())


def test_zero_1_keeps_every_spec_over_300_steps():
    mesh = mesh_of({"data": 8})
    policy = presets.zero1(min_size=64)
    model = sortal.Linear(16, 16, rngs=sortal.Rngs(0))
    optimizer = sortal.Optimizer(model, optax.adam(1e-3), wrt=sortal.Param)
    both = sortal.shard((model, optimizer), mesh, policy)
    step = sortal.jit(step_of(lambda m, x: (m(x) ** 2).mean()))
    x = jax.device_put(np.ones((8, 16), np.float32), NamedSharding(mesh, P("data")))
    divided = sortal.sharding_report(both, mesh, policy).rows
    assert sum(r.spec != P() for r in divided) == 2  # of the kernel: mu and nu
    for _ in range(300):
        # XLA's CPU devices share threads, and wait for ever where calls pile up.
        step(*both, x)
        jax.block_until_ready(sortal.state(both).values_list())
        assert not sortal.sharding_report(both, mesh, policy).elsewhere


def test_the_largest_axis_that_divides_is_divided():
    mesh = AbstractMesh((4, 2), ("data", "model"))
    spec = LargestAxis("data", min_size=16)
    assert spec((6, 8), mesh) == P(None, "data")
    assert spec((8, 8), mesh) == P("data", None)
    assert spec((6, 7), mesh) == P()
    assert spec((2, 4), mesh) == P()  # too small
    assert spec((), mesh) == P()
    given = LargestAxis("data", min_size=16, given=P(None, "model"))
    assert given((8, 16), mesh) == P("data", "model")
    assert given((6, 16), mesh) == P(None, "model")


def test_an_axis_that_the_mesh_lacks_is_refused():
    with pytest.raises(ShardingError, match="it has 'model'"):
        LargestAxis("data")((4, 4), AbstractMesh((2,), ("model",)))


def test_statistics_per_device_are_those_of_each_devices_own_batch():
    """Parameters are shared, and each device keeps the mean of what it saw."""
    mesh = mesh_of({"data": 8})
    policy = presets.per_device_statistics("data")

    class Mean(sortal.Module):
        def __init__(self):
            self.scale = sortal.Param(jnp.full((), 2.0))
            self.mean = sortal.BatchStat(jnp.zeros(8))

    model = Mean()

    def see(m, x):
        m.mean[...] = x.mean(keepdims=True) * m.scale

    x = np.arange(16.0, dtype=np.float32)
    mapped = sortal.shard_map(
        see, mesh=mesh, in_specs=(policy, P("data")), out_specs=P()
    )
    sortal.jit(mapped)(model, x)
    np.testing.assert_allclose(model.mean, 2 * x.reshape(8, 2).mean(1))


def test_only_adapters_and_their_moments_are_divided_in_a_fine_tuning(alone):
    """LoRA around attention: what is frozen is on every device, and stays as it was."""
    mesh = mesh_of({"data": 8})
    policy = {
        sortal.LoRAParam: sortal.Rule(spec=LargestAxis("data", min_size=1)),
        ...: sortal.Rule(spec=P()),
    }

    def make():
        model = Llama(LLAMA, rngs=sortal.Rngs(0))
        for block in model.blocks:
            for name in ("query", "value"):
                base = getattr(block.attention, name)
                sizes = base.in_features, 8, base.out_features
                lora = sortal.LoRA(*sizes, base_module=base, rngs=sortal.Rngs(1))
                setattr(block.attention, name, lora)
        tx = optax.adam(1e-2)
        return model, sortal.Optimizer(model, tx, wrt=sortal.LoRAParam)

    def step(model, optimizer, tokens):
        wrt = sortal.DiffState(0, sortal.LoRAParam)
        differentiate = sortal.value_and_grad(text_loss, argnums=wrt)
        value, grads = differentiate(model, tokens)
        optimizer.update(model, grads)
        return value

    one, both = make(), sortal.shard(make(), mesh, policy)
    frozen = sortal.Param & ~sortal.OfType(sortal.LoRAParam)
    before = sortal.state(both[0], frozen)
    step, rows = sortal.jit(step), NamedSharding(mesh, P("data"))
    for batch in batches("transformer")[:5]:
        found = float(step(*both, jax.device_put(batch, rows)))
        jax.block_until_ready(sortal.state(both).values_list())
        np.testing.assert_allclose(found, float(step(*one, batch)), rtol=1e-5)
    report = sortal.sharding_report(both, mesh, policy)
    assert not report.elsewhere
    divided = {r.path for r in report.rows if r.spec != P()}
    adapters = [r.path for r in report.rows if r.kind is sortal.LoRAParam]
    assert len(adapters) == 8
    assert len(divided) == 8 * 3  # each, and its two moments
    assert divided.issuperset(adapters)
    assert sortal.state(both[0], frozen) == before
