"""The report counts what lies on each device, says who said so, and names the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sortal
from sortal._engine.tables import nbytes
from sortal.errors import PathError, ShardingError

MESH = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
ROWS = {sortal.At("kernel"): sortal.Rule(spec=P("d"))}


def linear():
    return sortal.Linear(16, 8, rngs=sortal.Rngs(0))


def test_rows_say_the_spec_who_gave_it_and_the_bytes_on_each_device():
    report = sortal.sharding_report(linear(), MESH, ROWS)
    bias, kernel = report.rows
    assert (bias.spec, bias.by, bias.bytes, bias.on_device) == (P(), "no rule", 32, 32)
    assert (kernel.spec, kernel.by) == (P("d"), "row 1")
    assert (kernel.bytes, kernel.on_device) == (512, 64)
    assert (report.total, report.on_device, report.unruled) == (544, 96, 32)


def test_what_is_replicated_for_lack_of_a_rule_is_told_from_what_is_declared_so():
    declared = {**ROWS, ...: sortal.Rule(spec=P())}
    report = sortal.sharding_report(linear(), MESH, declared)
    assert report.unruled == 0
    assert report.rows[0].by == "row 2"
    assert "no metadata" not in str(report)
    assert "32 B are replicated because no metadata, row or" in str(
        sortal.sharding_report(linear(), MESH, ROWS)
    )


def test_leaves_that_lie_elsewhere_are_named():
    model = sortal.shard(linear(), MESH)
    report = sortal.sharding_report(model, MESH, ROWS)
    assert [r.path for r in report.elsewhere] == [("kernel",)]
    assert "1 leaves lie otherwise than declared: kernel." in str(report)
    sortal.shard(model, MESH, ROWS)
    assert not sortal.sharding_report(model, MESH, ROWS).elsewhere


def test_a_mesh_axis_of_one_device_moves_nothing_elsewhere():
    """XLA may leave such an axis out of the sharding of what a program returns."""
    types = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((8, 1), ("d", "one"), axis_types=types)
    rows = {sortal.At("kernel"): sortal.Rule(spec=P("one", "d"))}
    model = sortal.shard(linear(), mesh, rows)
    there = jax.sharding.NamedSharding(mesh, P(None, "d"))
    model.kernel.value = jax.device_put(model.kernel.value, there)
    assert not sortal.sharding_report(model, mesh, rows).elsewhere


def test_text_and_html_have_each_kind_and_leaf():
    report = sortal.sharding_report(linear(), MESH, ROWS)
    lines = str(report).splitlines()
    assert lines[0] == "Mesh (d: 8)"
    assert ["kernel", "Param", "16x8", "P('d')", "row", "1", "512", "B", "64", "B"] in [
        line.split() for line in lines
    ]
    assert "kernel" in report._repr_html_()


def test_a_picture_of_one_leaf_is_drawn(capsys):
    report = sortal.sharding_report(linear(), MESH, ROWS)
    report.draw("kernel")
    assert "CPU 7" in capsys.readouterr().out
    with pytest.raises(PathError, match="no leaf 'kernle'"):
        report.draw("kernle")


def test_models_of_flax_and_keys_and_pytrees_are_counted():
    from flax import nnx

    model = {"flax": nnx.Linear(2, 4, rngs=nnx.Rngs(0)), "rngs": sortal.Rngs(0)}
    report = sortal.sharding_report(model, MESH)
    real = sum(map(nbytes, jax.tree.leaves(sortal.state(model))))
    assert report.total == real


def test_assert_sharded_takes_what_is_divided_and_lists_what_is_not():
    model = sortal.shard(linear(), MESH, ROWS)
    sortal.assert_sharded(model, tolerance=0.06)
    with pytest.raises(ShardingError) as e:
        sortal.assert_sharded(model, tolerance=0.02)
    assert "a device holds 96 B of 544 B" in str(e.value)
    assert "an even share of 8 devices is 68 B" in str(e.value)
    assert "bias (Param): 32 B" in str(e.value)
    assert "kernel" not in str(e.value)
    sortal.assert_sharded(sortal.abstract(linear, MESH, ROWS), tolerance=0.06)
    with pytest.raises(ShardingError, match=r"(?s)no sharding.*bias \(Param\)"):
        sortal.assert_sharded(sortal.abstract(linear))
    with pytest.raises(ShardingError, match="the model has no BatchStat"):
        sortal.assert_sharded(model, kind=sortal.BatchStat)


def test_assert_sharded_refuses_what_lies_on_no_mesh_or_on_another():
    with pytest.raises(ShardingError) as e:
        sortal.assert_sharded(linear())
    assert "lie on one device and on no mesh" in str(e.value)
    assert "bias (Param)\n  kernel (Param)\nCall shard(model" in str(e.value)
    part = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    model = sortal.shard(linear(), part, {sortal.Param: sortal.Rule(spec=P("d"))})
    sortal.assert_sharded(model)
    with pytest.raises(ShardingError, match="an even share of 8 devices is 68 B"):
        sortal.assert_sharded(model, mesh=MESH)
    with jax.set_mesh(MESH), pytest.raises(ShardingError, match="of 8 devices"):
        sortal.assert_sharded(model)


def test_assert_sharded_names_a_leaf_that_was_left_on_one_device():
    model = sortal.shard(linear(), MESH, {sortal.Param: sortal.Rule(spec=P("d"))})
    model.kernel.value = jnp.ones((16, 8))
    with pytest.raises(ShardingError, match=r"(?s)evenly:\n *kernel \(Param\): 512 B"):
        sortal.assert_sharded(model)
