"""transfer: chosen values from one live model to another, on other devices."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal
from sortal.errors import FilterError, TraceError, UpdateError


def mesh_of(devices, **axes):
    return Mesh(
        np.array(devices).reshape(tuple(axes.values())),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
    )


TRAINERS = mesh_of(jax.devices()[:4], data=4)
GENERATORS = mesh_of(jax.devices()[4:], rows=2, columns=2)
ALL = mesh_of(jax.devices(), data=8)


class Decoder(sortal.Module):
    def __init__(self, seed=0):
        rngs = sortal.Rngs(seed)
        self.up = sortal.Linear(8, 16, rngs=rngs)
        self.norm = sortal.BatchNorm(16, rngs=rngs)
        self.down = sortal.Linear(16, 8, rngs=rngs)
        self.cache = sortal.Cache(jnp.zeros((4, 8)))

    def __call__(self, x):
        return self.down(self.norm(self.up(x), use_running_average=True))


def trainer(mesh=TRAINERS, seed=1):
    rule = sortal.Rule(spec=P("data"))
    return sortal.shard(Decoder(seed), mesh, {sortal.At("**.kernel"): rule})


def generator(mesh=GENERATORS, seed=2):
    rule = sortal.Rule(spec=P("rows", "columns"))
    return sortal.shard(Decoder(seed), mesh, {sortal.At("**.kernel"): rule})


def flat(model, *only):
    return dict(sortal.state(model, *only).flat_state())


def numbers(model, *only):
    return {p: np.asarray(x.value) for p, x in flat(model, *only).items()}


def buffers(model, *only):
    return [
        s.data.unsafe_buffer_pointer()
        for x in jax.tree.leaves(sortal.state(model, *only))
        for s in x.addressable_shards
    ]


@contextlib.contextmanager
def compiled():
    """The programs that JAX traces or compiles within the block."""
    found = []

    def note(event, *_, **__):
        if "compile" in event or "trace" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_the_record_of_programs_sees_one():
    with compiled() as programs:
        jax.jit(lambda x: x + 1)(np.ones(3))
    assert programs


def test_parameters_come_to_another_mesh_and_nothing_else_moves():
    source, other = trainer(), generator()
    before = {p: x.value.sharding for p, x in flat(other).items()}
    rest = buffers(other, sortal.Not(sortal.Param))
    due = numbers(source, sortal.Param)
    moved = sortal.transfer(source, other)
    found = numbers(other, sortal.Param)
    assert moved.leaves == tuple(due) == tuple(found)
    for path in due:
        np.testing.assert_array_equal(found[path], due[path])
    assert {p: x.value.sharding for p, x in flat(other).items()} == before
    assert buffers(other, sortal.Not(sortal.Param)) == rest
    # Kernels lie divided on four devices, the four vectors whole on each.
    assert moved.bytes == 4 * (2 * 8 * 16 + 4 * (16 + 16 + 16 + 8))


def test_a_generator_goes_on_without_a_new_trace_or_program():
    source, other = trainer(), generator()
    traces = []

    @sortal.jit(donate=sortal.Cache)
    def decode(model, x):
        traces.append(1)
        y = model(x)
        model.cache[...] += y
        return y

    x = jax.device_put(np.ones((4, 8), np.float32), NamedSharding(GENERATORS, P()))
    decode(other, x)
    decode(other, x)
    sortal.transfer(source, other)
    with compiled() as programs:
        y = decode(other, x)
    assert (len(traces), programs) == (1, [])
    w = {".".join(path): x for path, x in numbers(source, sortal.Param).items()}
    h = np.ones((4, 8)) @ w["up.kernel"] + w["up.bias"]
    h = h / np.sqrt(1 + 1e-5)  # of BatchNorm, with its first statistics
    due = h @ w["down.kernel"] + w["down.bias"]
    np.testing.assert_allclose(y, due, rtol=1e-4, atol=1e-5)


def test_a_trainer_that_donates_leaves_the_generator_alone():
    source = trainer(ALL)
    other = trainer(ALL, seed=3)  # the same sharding, so that a copy could be saved
    optimizer = sortal.Optimizer(source, optax.sgd(0.1), wrt=sortal.Param)

    @sortal.jit(donate=True)
    def train(model, optimizer):
        grads = sortal.grad(lambda m: (m(jnp.ones((4, 8))) ** 2).mean())(model)
        optimizer.update(model, grads)

    train(source, optimizer)
    sortal.transfer(source, other)
    assert not set(buffers(source)) & set(buffers(other))
    due = numbers(other, sortal.Param)
    train(source, optimizer)
    for path, x in numbers(other, sortal.Param).items():
        np.testing.assert_array_equal(x, due[path])


@pytest.mark.parametrize("there", [TRAINERS, ALL], ids=["fewer", "more"])
@pytest.mark.parametrize("here", [None, TRAINERS, ALL], ids=["one", "few", "all"])
def test_arrays_that_are_whole_everywhere_are_copied_too(here, there):
    source, other = Decoder(1), Decoder(2)
    if here is not None:
        sortal.shard(source, here)
    sortal.shard(other, there)
    sortal.transfer(source, other)
    assert not set(buffers(source)) & set(buffers(other))


@pytest.mark.parametrize("where", ["uncommitted", "one device", "host"])
def test_a_model_on_no_mesh_keeps_what_its_values_are(where):
    source, other = trainer(), Decoder(2)
    if where == "one device":
        device = jax.devices()[5]
        sortal.update(other, jax.device_put(sortal.state(other), device))
    if where == "host":
        sortal.update(other, jax.tree.map(np.asarray, sortal.state(other)))

    @sortal.jit
    def decode(model, x):
        return model(x)

    decode(other, np.ones((4, 8), np.float32))
    before = {p: (type(x.value), getattr(x.value, "sharding", None),
                  getattr(x.value, "committed", None))
              for p, x in flat(other).items()}  # fmt: skip
    sortal.transfer(source, other)
    assert before == {p: (type(x.value), getattr(x.value, "sharding", None),
                          getattr(x.value, "committed", None))
                      for p, x in flat(other).items()}  # fmt: skip
    with compiled() as programs:
        decode(other, np.ones((4, 8), np.float32))
    assert programs == []
    np.testing.assert_array_equal(other.up.kernel.value, source.up.kernel.value)


def test_all_that_does_not_match_is_listed_before_anything_moves():
    source = {
        "same": sortal.Param(jnp.ones(2)), "kind": sortal.Param(jnp.ones(2)),
        "shape": sortal.Param(jnp.ones(2)), "dtype": sortal.Param(jnp.ones(2)),
        "more": sortal.Param(jnp.ones(2)), "tree": sortal.Param({"a": jnp.ones(2)}),
        "number": sortal.Param(1.5),
    }  # fmt: skip
    other = {
        "same": sortal.Param(jnp.zeros(2)), "kind": sortal.BatchStat(jnp.zeros(2)),
        "shape": sortal.Param(jnp.zeros((2, 3))),
        "dtype": sortal.Param(jnp.zeros(2, jnp.bfloat16)),
        "less": sortal.Param(jnp.zeros(2)), "tree": sortal.Param({"b": jnp.ones(2)}),
        "number": sortal.Param(0.5),
    }  # fmt: skip
    before = buffers({k: x for k, x in other.items() if k != "number"})
    with pytest.raises(UpdateError) as caught:
        sortal.transfer(source, other, only=(sortal.Param, sortal.BatchStat))
    told = str(caught.value).splitlines()
    assert told[0] == "the models do not match; nothing was moved:"
    assert sorted(line.strip() for line in told[1:-1]) == [
        "dtype: dtype (Param) is float32 here, bfloat16 in the other",
        "kind: kind is Param here, BatchStat in the other",
        "less (Param): only in the other",
        "more (Param): only here",
        "shape: shape (Param) is (2,) here, (2, 3) in the other",
        "structure: tree (Param) holds other containers in the other",
        "type: number (Param) is a float here, a float in the other; only arrays move",
    ]
    assert told[-1] == "Choose with only= what both have, in one form."
    assert before == buffers({k: x for k, x in other.items() if k != "number"})


def test_values_that_are_gone_or_abstract_are_refused():
    source = {"gone": sortal.Param(jnp.ones(2)), "abstract": sortal.Param(jnp.ones(2))}
    other = {"gone": sortal.Param(jnp.ones(2)), "abstract": sortal.Param(jnp.ones(2))}
    source["gone"].value.delete()
    source["abstract"].value = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(UpdateError) as caught:
        sortal.transfer(source, other)
    assert "abstract (Param) is a ShapeDtypeStruct here" in str(caught.value)
    assert "gone (Param): its buffer was donated to a call" in str(caught.value)


def test_raw_arrays_that_cannot_be_written_are_refused():
    source, other = {"t": (jnp.ones(2),)}, {"t": (jnp.zeros(2),)}
    with pytest.raises(UpdateError, match=r"t\.0 .*: a raw array in a tuple or other"):
        sortal.transfer(source, other, only=...)
    source, other = {"t": [jnp.ones(2)]}, {"t": [jnp.zeros(2)]}
    assert sortal.transfer(source, other, only=...).bytes == 8
    assert other["t"][0].sum() == 2


def test_a_filter_that_takes_nothing_is_refused():
    with pytest.raises(FilterError, match=r"only=Cache.* takes none of the leaves"):
        sortal.transfer(
            sortal.Linear(2, 3, rngs=sortal.Rngs(0)),
            sortal.Linear(2, 3, rngs=sortal.Rngs(0)),
            only=sortal.Cache,
        )


def test_keys_and_nested_values_move_too():
    def model(seed, x):
        nested = {"a": jnp.full(2, x), "b": (jnp.full(3, x),)}
        key = jax.random.key(seed)
        return {"key": sortal.RngKey(key), "nest": sortal.Param(nested)}

    source, other = model(1, 1.0), model(2, 0.0)
    moved = sortal.transfer(source, other, only=...)
    assert moved.bytes == 8 + 8 + 12
    assert jnp.array_equal(
        jax.random.key_data(other["key"].value), jax.random.key_data(jax.random.key(1))
    )
    assert other["nest"].value["b"][0].tolist() == [1.0] * 3


@pytest.mark.parametrize("shape", [(), (4,)])
def test_keys_lie_where_the_other_model_has_them(shape):
    def keys(seed, place):
        found = jax.random.key(seed)
        found = jax.random.split(found, shape) if shape else found
        return {"k": sortal.RngKey(jax.device_put(found, place) if place else found)}

    spec = P("rows") if shape else P()
    for place in (None, NamedSharding(GENERATORS, spec), jax.devices()[3]):
        source, other = keys(1, NamedSharding(TRAINERS, P())), keys(2, place)
        before = other["k"].value
        sortal.transfer(source, other, only=sortal.RngKey)
        after = other["k"].value
        assert (after.sharding, after.committed) == (before.sharding, before.committed)
        assert jnp.array_equal(*(jax.random.key_data(jax.device_get(x["k"].value))
                                 for x in (source, other)))  # fmt: skip


def test_weak_types_stay_those_of_the_destination():
    source = {"a": sortal.Param(jnp.float32(2)), "b": sortal.Param(jnp.asarray(3.0))}
    other = {"a": sortal.Param(jnp.asarray(1.0)), "b": sortal.Param(jnp.float32(1))}
    sortal.transfer(source, other)
    assert other["a"].value.weak_type
    assert not other["b"].value.weak_type
    assert (float(other["a"].value), float(other["b"].value)) == (2.0, 3.0)


@pytest.mark.parametrize("forms", ["host to device", "device to host", "host to host"])
def test_host_memory_is_copied_both_ways(forms):
    make = {"host": _aligned, "device": lambda x: jnp.full(4096, x)}
    one, _, two = forms.split()
    source, other = make[one](1.0), make[two](0.0)
    source, other = {"w": sortal.Param(source)}, {"w": sortal.Param(other)}
    assert sortal.transfer(source, other).bytes == 4 * 4096
    if one == "host":
        source["w"].value[:] = 2
    np.testing.assert_array_equal(other["w"].value, np.ones(4096))


def _aligned(x):
    """Memory of NumPy as JAX would keep it, without a copy."""
    raw = np.empty(4 * 4096 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    memory = raw[start : start + 4 * 4096].view(np.float32)
    memory[:] = x
    return memory


def test_it_is_refused_inside_a_transform():
    source, other = Decoder(0), Decoder(1)
    with pytest.raises(TraceError, match="transfer inside a transform"):
        sortal.jit(lambda a, b: sortal.transfer(a, b).bytes)(source, other)
