"""Two models are told apart by kind and by leaf, and by how much."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal
from page_scripts import SHARDING
from sortal.inspect.html import compare
from sortal.inspect.html.page import data_of
from sortal.inspect.html.source import read_arrays, source_of


def changes(a, b, values=True):
    """What a page has of each change, by its path, and of each kind."""
    old, new = (source_of(x, "latest", SHARDING) for x in (a, b))
    data = data_of(old, new, values, None)
    keys, found = data["keys"], data["changes"]
    rows = {
        ".".join(str(keys[n]) for n in path): (
            data["kinds"][kind]["label"], what, data["texts"][detail], largest
        )
        for path, kind, what, detail, largest in found["rows"]
    }  # fmt: skip
    return rows, {label: rest for label, *rest in found["kinds"]}


def test_each_way_in_which_a_leaf_may_differ():
    old = {
        "same": sortal.Param(jnp.ones(3)),
        "moved": sortal.Param(jnp.array([1.0, 2.0, 3.0, 4.0])),
        "nan": sortal.Param(jnp.zeros(2)),
        "kind": sortal.Param(jnp.ones(1)),
        "shape": sortal.Param(jnp.ones(2)),
        "dtype": sortal.BatchStat(jnp.ones(2)),
        "old": sortal.Cache(jnp.ones(2)),
        "key": sortal.RngKey(jax.random.key(0)),
    }
    new = {
        "same": sortal.Param(jnp.ones(3)),
        "moved": sortal.Param(jnp.array([1.0, 2.0, 3.0, 4.5])),
        "nan": sortal.Param(jnp.array([0.0, jnp.nan])),
        "kind": sortal.BatchStat(jnp.ones(1)),
        "shape": sortal.Param(jnp.ones((2, 1))),
        "dtype": sortal.BatchStat(jnp.ones(2, jnp.bfloat16)),
        "new": sortal.Cache(jnp.ones(2)),
        "key": sortal.RngKey(jax.random.key(1)),
    }
    rows, kinds = changes(old, new)
    assert rows == {
        "moved": ("Param", "values", "25.00% of its numbers", 0.5),
        "nan": ("Param", "values", "50.00% of its numbers", "inf"),
        "kind": ("Param", "kind", "Param -> BatchStat", None),
        "shape": ("Param", "shape", "float32[2] -> float32[2,1]", None),
        "dtype": ("BatchStat", "dtype", "float32[2] -> bfloat16[2]", None),
        "old": ("Cache", "removed", "float32[2]", None),
        "new": ("Cache", "added", "float32[2]", None),
        "key": ("RngKey", "values", "50.00% of its numbers", None),
    }
    assert kinds["Param"] == [5, {"values": 2, "kind": 1, "shape": 1}, "inf"]
    assert kinds["Cache"] == [0, {"removed": 1, "added": 1}, None]


def test_equal_models_have_no_difference_and_values_may_be_left_out():
    a, b = (sortal.Linear(2, 3, rngs=sortal.Rngs(n)) for n in (0, 1))
    assert changes(a, a)[0] == {}
    assert list(changes(a, b)[0]) == ["kernel"]
    assert changes(a, b, values=False)[0] == {}


def test_abstract_leaves_differ_in_structure_alone():
    def make(n):
        return sortal.abstract(lambda: sortal.Linear(2, n, rngs=sortal.Rngs(0)))

    assert changes(make(3), make(3))[0] == {}
    assert changes(make(3), make(4))[0]["kernel"][1] == "shape"
    real = sortal.Linear(2, 3, rngs=sortal.Rngs(0))
    assert changes(real, make(3))[0]["kernel"][1:3] == (
        "unknown",
        "not compared: abstract: it has no values",
    )


def test_kinds_are_compared_where_both_sides_have_them(tmp_path):
    x = np.ones(2, np.float32)
    np.savez(tmp_path / "m.npz", w=x)
    sortal.save(tmp_path / "s", {"w": sortal.Param(x)}, step=0)
    assert changes({"w": sortal.Param(x)}, tmp_path / "m.npz")[0] == {}
    assert changes({"w": sortal.Param(x)}, tmp_path / "s")[0] == {}
    rows, _ = changes({"w": sortal.BatchStat(x)}, tmp_path / "s")
    assert rows["w"][1:3] == ("kind", "BatchStat -> Param")


def test_kinds_of_flax_and_of_sortal_that_count_as_one_are_one():
    flax_nnx = pytest.importorskip("flax.nnx")
    x = jnp.ones(2)
    assert changes({"w": sortal.Param(x)}, {"w": flax_nnx.Param(x)})[0] == {}


def test_a_value_that_cannot_be_read_is_not_said_to_be_equal():
    old, new = (
        source_of({"w": sortal.Param(jnp.ones(2))}, "latest", SHARDING).items[0]
        for _ in range(2)
    )
    broken = ([], "it cannot be read: the disk is gone")
    (found,) = compare.changed(old, new, broken, True, True)
    assert found.what == "unknown"
    assert found.detail == "not compared: it cannot be read: the disk is gone"
    assert list(compare.changed(old, new, read_arrays(old), True, True)) == []


def test_other_containers_of_values_are_not_compared_by_chance():
    a = {"v": sortal.Cache({"x": jnp.ones(2), "y": jnp.ones(3)})}
    b = {"v": sortal.Cache({"x": jnp.ones(2)})}
    rows, _ = changes(a, b)
    assert rows["v"][1:3] == (
        "unknown",
        "not compared: the values are other containers",
    )
