"""A restore is planned from the manifest alone; the plan is what TensorStore reads."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal
from sortal._engine.plan import bind
from sortal.checkpoint.fitting import Options
from sortal.checkpoint.layout import encode_path, qualified
from sortal.checkpoint.manifest import Kind, Leaf, Manifest
from sortal.checkpoint.planning import planned
from sortal.checkpoint.store import stored_array
from sortal.checkpoint.values import Place, describe
from sortal.demo.llama import Config, Llama
from sortal.errors import PathError, RestoreError
from sortal.sharding import presets

MESH = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
ROWS = {sortal.At("**.kernel"): sortal.Rule(spec=P("a", "b"))}


class Net(sortal.Module):
    """A kernel stored by itself in several chunks, and a bias packed with others."""

    def __init__(self) -> None:
        self.linear = sortal.Linear(1024, 1536, rngs=sortal.Rngs(0))


def test_the_parts_of_the_chunks_are_the_values_that_each_device_restores(tmp_path):
    model = Net()
    sortal.save(tmp_path, model, step=3)
    abstract = sortal.abstract(Net, MESH, ROWS)
    plan = sortal.restore_plan(tmp_path, abstract)
    sortal.restore(tmp_path, abstract)
    kernel = abstract.linear.kernel.value
    folder = next((tmp_path / "3").glob("arrays-*"))
    (row,) = (r for r in plan.rows if r.path == ("linear", "kernel"))
    for i, device in enumerate(MESH.devices.flat):
        (shard,) = (s for s in kernel.addressable_shards if s.device == device)
        parts, seen = plan.of("linear.kernel", i), 0
        for name, at in parts:
            data = (folder / name).read_bytes()[:-4]
            chunk = np.frombuffer(data, np.float32).reshape(row.stored.chunks)[at]
            numbers = map(int, name.rpartition("/c.")[2].split("."))
            starts = [
                n * c + part.start - (here.start or 0)
                for n, c, part, here in zip(
                    numbers, row.stored.chunks, at, shard.index, strict=True
                )
            ]
            there = tuple(map(slice, starts, np.add(starts, chunk.shape)))
            np.testing.assert_array_equal(chunk, np.asarray(shard.data)[there])
            seen += chunk.nbytes
        assert seen == shard.data.nbytes == row.kept[i]
        assert len(parts) == row.files[i]
    bias = abstract.linear.bias.value
    ((name, at),) = plan.of(("linear", "bias"), 7)
    data = (folder / name).read_bytes()[at[0]]
    np.testing.assert_array_equal(np.frombuffer(data, np.float32), bias)
    assert plan.total == kernel.nbytes + bias.nbytes
    assert (plan.kept == kernel.nbytes // 8 + bias.nbytes).all()
    sizes = {f: (folder / f).stat().st_size for r in plan.rows for f, _ in r.of(0)}
    assert plan.read[0] == sum(sizes.values())
    assert "linear.kernel" in str(plan)


def test_other_shardings_and_no_mesh_are_planned_too(tmp_path):
    sortal.save(tmp_path, Net(), step=1)
    alone = sortal.restore_plan(tmp_path, Net())
    assert alone.kept.tolist() == [alone.total]
    positions = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    assert sortal.restore_plan(tmp_path, Net(), sharding=positions).kept.size == 1
    spec = NamedSharding(MESH, P(("b", "a")))
    plan = sortal.restore_plan(tmp_path, Net(), sharding=spec)
    (row,) = (r for r in plan.rows if r.path == ("linear", "kernel"))
    expected = spec.devices_indices_map((1024, 1536))
    begins = [expected[d][0].start or 0 for d in MESH.devices.flat]
    assert row.at[0][0].tolist() == begins


def test_what_does_not_fit_is_refused_as_restore_does(tmp_path):
    sortal.save(tmp_path, Net(), step=1)
    other = sortal.Linear(2, 2, rngs=sortal.Rngs(0))
    with pytest.raises(RestoreError, match="kernel"):
        sortal.restore_plan(tmp_path, other)
    with pytest.raises(PathError, match="no leaf 'kernle'"):
        sortal.restore_plan(tmp_path, Net()).of("kernle")


def manifest_of(model: Any) -> Manifest:
    """A checkpoint of an abstract model, as it would be laid out from the same mesh."""
    schema = bind(model).graphdef.schema
    kinds = list(dict.fromkeys(schema.kinds))
    leaves, stored = [], {}
    for i, value in enumerate(bind(model).values()):
        array = describe(value, [])
        name = f"{kinds.index(schema.kinds[i])}/{i}"
        if array.stored_shape:
            shard = value.sharding.shard_shape(value.shape)
            stored[name] = stored_array(array, shard)
            array = array._replace(place=Place(name, None))
        path = encode_path(schema.paths[i])
        leaves.append(Leaf(path, kinds.index(schema.kinds[i]), array))
    named = tuple(Kind(qualified(k), (), str(i)) for i, k in enumerate(kinds))
    return Manifest(0, "", named, tuple(leaves), (), stored, {}, "")


def test_a_restore_of_70_billion_parameters_onto_256_devices_is_planned():
    config = Config(
        vocabulary=128_256,
        features=8192,
        hidden=28_672,
        layers=80,
        heads=64,
        key_value_heads=8,
        tied=False,
    )

    def make():
        model = Llama(config, rngs=sortal.Rngs(0), param_dtype=jnp.bfloat16)
        return model, sortal.Optimizer(model, optax.adam(1e-3), wrt=sortal.Param)

    mesh = AbstractMesh((16, 16), ("data", "model"))
    policy = presets.fsdp_tensor_parallel()
    model = sortal.abstract(make, mesh, policy)
    manifest = manifest_of(model)
    plan = planned(bind(model), manifest, Options(), {}, None, "step 0")
    report = sortal.sharding_report(model, mesh, policy)
    scalars = sum(r.bytes for r in report.rows if r.shape == ())
    assert plan.total == report.total - scalars
    assert (plan.kept == report.on_device - scalars).all()
    assert plan.read.max() < 1.01 * plan.kept.max()
    params = [r for r in report.rows if r.kind is sortal.Param]
    assert 70e9 < sum(r.bytes for r in params) / 2 < 71e9
    assert report.on_device < 1.02 * report.total / 256
    sortal.assert_sharded(model)
