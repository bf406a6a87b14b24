"""Memory of the host, with a CPU that passes for an accelerator."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal
from sortal._engine import host
from sortal._engine.host import host_memory, to_host
from sortal.checkpoint import taking
from sortal.inspect.html.numbers import host as shown


@pytest.fixture
def far(monkeypatch):
    """As on an accelerator: all is far from the host but what is pinned there."""
    for module in (host, taking):
        monkeypatch.setattr(module, "is_near", lambda s: s.memory_kind == "pinned_host")


def test_arrays_of_a_cpu_stay_as_they_are():
    arrays = [jnp.arange(3), jnp.ones((2, 2))]
    assert all(x is y for x, y in zip(to_host(arrays), arrays, strict=True))


@pytest.mark.usefixtures("far")
def test_arrays_of_an_accelerator_are_copied_to_pinned_memory():
    arrays = [jnp.arange(3), jnp.ones((2, 2), jnp.bfloat16)]
    copies = to_host(arrays)
    assert [x.sharding.memory_kind for x in copies] == ["pinned_host"] * 2
    for x, y in zip(copies, arrays, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert all(x is y for x, y in zip(to_host(copies), copies, strict=True))


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_was_on_an_accelerator_is_saved_as_it_was(
    tmp_path, monkeypatch, wait, dtype
):
    # An accelerator's memory is not Python's.
    def refused(x):
        raise BufferError

    monkeypatch.setattr("sortal.checkpoint.taking.memoryview", refused, raising=False)
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.P("x"))
    model = sortal.Module()
    model.one = sortal.Param(jnp.arange(5, dtype=dtype))
    many = jnp.arange(1 << 20, dtype=jnp.float32).astype(dtype)
    model.many = sortal.Param(jax.device_put(many, split))
    want = jax.tree.map(np.array, sortal.state(model))

    @sortal.jit(donate=True)
    def step(model):
        sortal.update(model, jax.tree.map(lambda x: x * 0, sortal.state(model)))

    saving = sortal.save(tmp_path, model, step=1, wait=wait)
    step(model)
    if saving is not None:
        saving.wait()
    sortal.restore(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, sortal.state(model), want)


@pytest.mark.usefixtures("far")
def test_what_is_shown_of_an_accelerator_are_its_values():
    np.testing.assert_array_equal(shown(jnp.arange(4)), [0, 1, 2, 3])
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.P("x"))
    found = shown(jax.device_put(jnp.arange(16), split))
    np.testing.assert_array_equal(found, np.arange(16))


def test_jax_copies_from_host_memory_even_where_it_may_not():
    memory = host_memory((64,), np.dtype("f4"))
    memory[:] = 1
    array = jax.device_put(memory)
    memory[:] = 2
    assert float(array[0]) == 1
