"""Specs from names of axes, and values put on a mesh; against Flax and plain JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal as nnx
from sortal.errors import ArgumentError, ShardingError
from sortal.sharding.mesh_axes import spec_of


def mesh(*types: AxisType) -> Mesh:
    names = ("x", "y")[: len(types)]
    return jax.make_mesh((1,) * len(types), names, axis_types=types)


AUTO, EXPLICIT = mesh(AxisType.Auto), mesh(AxisType.Explicit)


def test_a_rule_names_a_mesh_axis_several_or_none() -> None:
    rules = [("a", "x"), ("b", ("x", "y")), ("c", None)]
    with nnx.logical_axis_rules(rules):
        assert spec_of(("a", "b", "c", "d", None)) == P(
            "x", ("x", "y"), None, "d", None
        )
    assert spec_of(("a",)) == P("a")
    assert spec_of(P("a"), rules) == P("x")
    assert spec_of(NamedSharding(AUTO, P("x"))) == P("x")


def test_the_last_rule_of_one_list_holds_and_two_lists_must_agree() -> None:
    assert spec_of(("a",), (("a", "x"), ("a", "y"))) == P("y")
    with nnx.logical_axis_rules([("a", "x")]):
        assert spec_of(("a",), (("a", "x"),)) == P("x")
        with pytest.raises(
            ArgumentError,
            match="two rules give one name of an axis different mesh axes; found:\n"
            r"  'a': 'x' and 'y'\nGive each name one rule",
        ):
            spec_of(("a",), (("a", "y"),))


def test_rules_that_linen_was_given_hold_here() -> None:
    with linen.logical_axis_rules([("a", "x")]):
        assert spec_of(("a",)) == P("x")


@pytest.mark.parametrize("on", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_a_new_variable_is_put_on_the_mesh_of_the_context(on: Mesh) -> None:
    with jax.set_mesh(on):
        v = nnx.Param(jnp.ones(2), out_sharding=("a",), sharding_rules=(("a", "x"),))
        assert v.value.sharding.spec == P("x")
        bare = nnx.Param(jnp.ones(2), out_sharding=("x",), eager_sharding=False)
        assert bare.value.sharding.spec != P("x")
        with nnx.use_eager_sharding(False):
            assert not nnx.using_eager_sharding()
            bare = nnx.Param(jnp.ones(2), out_sharding=("x",))
        assert bare.value.sharding.spec != P("x")
        assert nnx.using_eager_sharding()


@pytest.mark.parametrize(
    "metadata",
    [
        {"out_sharding": ("x",), "mesh": AUTO},
        {"out_sharding": NamedSharding(AUTO, P("x"))},
    ],
    ids=["metadata", "sharding"],
)
def test_a_new_variable_is_put_on_the_mesh_it_names(metadata: Any) -> None:
    v = nnx.Param(jnp.ones(2), **metadata)
    assert v.value.sharding.spec == P("x")


def test_without_a_mesh_or_without_numbers_the_value_stays_as_it_is() -> None:
    value = jnp.ones(2)
    assert nnx.Param(value, out_sharding=("x",)).value is value
    abstract = jax.ShapeDtypeStruct((2,), jnp.float32)
    with jax.set_mesh(AUTO):
        assert nnx.Param(abstract, out_sharding=("x",)).value is abstract
        assert nnx.Param(value, out_sharding=()).value is value


def test_a_mesh_of_two_ways_is_refused() -> None:
    both = mesh(AxisType.Auto, AxisType.Explicit)
    with pytest.raises(
        ArgumentError, match=r"all Explicit or all Auto; found .*Pass ea"
    ):
        nnx.Param(jnp.ones(2), out_sharding=("x",), mesh=both)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_new_variable_that_the_mesh_cannot_divide_is_refused(kind: AxisType) -> None:
    def refused(names: Any) -> str:
        with pytest.raises(ShardingError) as e:
            nnx.Param(jnp.ones((3, 2)), out_sharding=names)
        return str(e.value)

    with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(kind,))):
        assert refused(("embed", None)) == (
            "a new Variable of shape [3, 2] has the names of axes ('embed', None), by "
            "which it is to be divided over the mesh ('x': 2) as P('embed', None), but "
            "the mesh has no axis 'embed'. Give each name a rule with "
            "logical_axis_rules or sharding_rules=, or the Variable another shape, or "
            "eager_sharding=False."
        )
        assert "but dimension 0, 3, cannot be divided by 2." in refused(("x",))
        assert "but the axis 'x' stands there twice." in refused(("x", "x"))
        assert "3 entries for 2 dimensions." in refused((None, None, "x"))
