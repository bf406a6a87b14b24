"""Module: recording, modes, iteration, printing, dataclasses, data and static."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

import sortal
from models import Count, Holder, Linear, Net, portrait, untouched
from sortal import nnx
from sortal.errors import ArgumentError, VariableError


class Dropout(sortal.Module):
    """Has the two attributes that modes are about."""

    def __init__(self) -> None:
        self.deterministic = False
        self.rate = 0.5


# ---------------------------------------------------------------------------- sow
def test_sow_appends_to_a_tuple_under_the_kind_given() -> None:
    model = Linear(1, 1)
    assert model.sow(sortal.Intermediate, "y", jnp.ones(1)) is True
    assert model.sow(sortal.Intermediate, "y", jnp.zeros(2)) is True
    assert type(model.y) is sortal.Intermediate
    assert [v.shape for v in model.y.value] == [(1,), (2,)]


def test_sow_reduces_as_asked() -> None:
    model = Linear(1, 1)
    for x in (1.0, 5.0, 2.0):
        model.sow(Count, "top", jnp.array(x), jnp.maximum, lambda: -jnp.inf)
    assert float(model.top.value) == 5


@pytest.mark.parametrize("name", ["kernel", "__doc__x"])
def test_sow_and_perturb_into_an_attribute_of_another_kind_are_refused(
    name: str,
) -> None:
    model = Linear(1, 1)
    setattr(model, name, sortal.Param(jnp.ones((1, 1))))
    text = rf"Expected '{name}' to be of type 'Intermediate', got 'Param', in a Linear"
    with untouched(model), pytest.raises(VariableError, match=text):
        model.sow(sortal.Intermediate, name, 1.0)
    text = rf"Expected '{name}' to be of type 'Perturbation', got 'Param'"
    with untouched(model), pytest.raises(VariableError, match=text):
        model.perturb(name, jnp.ones((1, 1)))


def test_sow_into_a_plain_attribute_is_refused() -> None:
    model = Holder(size=3)
    with pytest.raises(VariableError, match="'Cache', got 'int', in a Holder"):
        model.sow(sortal.Cache, "size", 1)


def test_perturb_gives_the_gradient_by_an_intermediate_value() -> None:
    class Model(sortal.Module):
        def __call__(self, x: Any) -> Any:
            return (3.0 * self.perturb("h", x**2)).sum()

    model, x = Model(), jnp.arange(3.0)
    np.testing.assert_array_equal(model(x), 15)
    assert type(model.h) is sortal.Perturbation
    grads = sortal.grad(lambda m, x: m(x), wrt=sortal.Perturbation)(model, x)
    np.testing.assert_array_equal(grads["h"].value, jnp.full(3, 3.0))


# -------------------------------------------------------------------------- modes
def test_train_and_eval_set_what_is_there_and_nothing_else() -> None:
    model = Holder(items=[Dropout(), Net()], own=Dropout())
    model.eval()
    assert model.own.deterministic is True
    assert model.items[0].deterministic is True
    assert model.items[1].norm.use_running_average is True
    assert not hasattr(model.items[1], "deterministic")
    model.train(rate=0.1)
    assert (model.own.deterministic, model.own.rate) == (False, 0.1)
    assert model.items[1].norm.use_running_average is False


def test_set_attributes_chooses_modules_by_class_and_path() -> None:
    model = Holder(a=Dropout(), b=Dropout(), c=Net())
    model.set_attributes(sortal.At("a"), rate=0.1)
    model.set_attributes(Dropout, deterministic=True)
    assert (model.a.rate, model.b.rate) == (0.1, 0.5)
    assert model.a.deterministic is model.b.deterministic is True


def test_set_attributes_with_a_name_that_no_module_has_sets_nothing() -> None:
    model = Holder(a=Dropout())
    text = r"attributes: \['determinstic'\], in 2 modules chosen; nothing was set"
    with untouched(model), pytest.raises(ArgumentError, match=text) as e:
        model.set_attributes(rate=0.0, determinstic=True)
    assert "raise_if_not_found=False" in str(e.value)
    model.set_attributes(raise_if_not_found=False, determinstic=True, rate=0.0)
    assert model.a.rate == 0.0
    assert not hasattr(model.a, "determinstic")


def test_setting_an_equal_value_of_another_type_is_carried_out() -> None:
    model = Dropout()
    model.set_attributes(deterministic=0)
    assert model.deterministic == 0
    assert type(model.deterministic) is int


# ---------------------------------------------------------------------- iteration
def nest(nnx: Any) -> Any:
    class Leaf(nnx.Module):
        pass

    class Inner(nnx.Module):
        def __init__(self) -> None:
            self.z, self.a = Leaf(), Leaf()
            self.items = nnx.List([Leaf() for _ in range(11)])

    class Outer(nnx.Module):
        def __init__(self) -> None:
            self.second, self.first = Inner(), Leaf()
            self.table = nnx.Dict(y=Leaf(), x=Inner())
            self.again = self.first

    return Outer()


def test_modules_are_iterated_in_the_order_of_flax() -> None:
    theirs = [(p, type(m).__name__) for p, m in flax_nnx.iter_modules(nest(flax_nnx))]
    ours = nest(nnx)
    for found in (sortal.iter_modules(ours), ours.iter_modules()):
        assert [(p, type(m).__name__) for p, m in found] == theirs


def test_children_are_iterated_in_the_order_of_flax() -> None:
    theirs = [k for k, m in flax_nnx.iter_children(nest(flax_nnx))]
    ours = nest(nnx)
    for found in (sortal.iter_children(ours), ours.iter_children()):
        assert [k for k, _ in found] == theirs
    assert dict(ours.iter_children())["again"] is ours.first


def test_each_module_is_met_once_also_in_a_cycle() -> None:
    model = Holder(child=Holder())
    model.child.parent = model
    assert [p for p, _ in model.iter_modules()] == [("child",), ()]


# ------------------------------------------------------------------------ printing
def test_the_repr_shows_structure_kinds_and_shapes_but_no_values() -> None:
    assert repr(Linear(2, 3)) == (
        "Linear(\n  kernel=Param(float32[2,3]),\n  bias=Param(float32[3]),\n)"
    )
    assert repr(Dropout()) == "Dropout(deterministic=False, rate=0.5)"
    model = Holder(items=[1, (2, "x")], table={"k": np.zeros((2, 2))})
    assert "items=[1, (2, 'x')]" in repr(model)
    assert "'k': float64[2,2]" in repr(model)
    classes = Holder(dtype=jnp.float32, kind=sortal.Param)
    assert repr(classes) == "Holder(dtype=float32, kind=Param)"


def test_the_repr_of_a_cycle_ends_and_shows_each_node_once() -> None:
    model = Holder(child=Dropout())
    model.me, model.again = model, model.child
    assert "me=Holder(...)" in repr(model)
    assert "again=Dropout(...)" in repr(model)


# ---------------------------------------------------------------- data and static
def test_data_makes_a_number_a_leaf_and_static_makes_it_none() -> None:
    model = Holder(rate=nnx.data(0.1), shape=nnx.static((2, 3)), plain=0.5)
    assert model.rate == 0.1
    assert jax.tree.leaves(model) == [0.1]
    assert sortal.state(model).to_pure_dict() == {"rate": 0.1}
    model.rate = 0.7
    assert jax.tree.leaves(model) == [0.7]
    assert jax.tree.leaves(sortal.clone(model)) == [0.7]
    made = jax.tree.map(lambda x: x + 1, model)
    assert (made.rate, made.shape, made.plain) == (1.7, (2, 3), 0.5)


def test_data_of_a_module_or_array_is_what_it_would_be_anyway() -> None:
    inner = Linear(1, 1)
    model = Holder(a=nnx.data(inner), b=nnx.data([Linear(1, 1)]))
    plain = Holder(a=inner, b=[Linear(1, 1)])
    assert sortal.state(model).paths() == sortal.state(plain).paths()


def test_a_static_that_cannot_be_hashed_is_refused_by_path() -> None:
    model = Holder(inner=Holder(s=nnx.static({1, 2})))
    with pytest.raises(sortal.errors.StructureError, match=r"inner\.s: a set"):
        sortal.state(model)


def test_dataclass_modules_have_fields_of_both_roles() -> None:
    @sortal.dataclass
    class Scale(sortal.Module):
        w: Any
        factor: float = nnx.data(default=2.0)
        sizes: tuple[int, ...] = nnx.static(default=(1, 2))
        extra: dict[str, int] = dataclasses.field(default_factory=dict)

    @sortal.dataclass(frozen=False)
    class Child(Scale):
        gain: float = nnx.data(default=3.0)

    model = Child(sortal.Param(jnp.ones(1)), 4.0)
    assert sortal.state(model).paths() == (("factor",), ("gain",), ("w",))
    assert (model.factor, model.gain, model.sizes) == (4.0, 3.0, (1, 2))
    assert portrait(sortal.clone(model)) == portrait(model)
    assert hash(model) == hash(model)
    assert model != Child(model.w, 4.0)
    assert model.extra is not Child(model.w).extra
    assert "factor=4.0" in repr(model)


def test_roles_of_one_instance_are_not_those_of_another() -> None:
    first, second = Holder(x=nnx.data(1)), Holder(x=1)
    assert jax.tree.leaves(first) == [1]
    assert jax.tree.leaves(second) == []


# ----------------------------------------------------------------------- class tree
def test_a_pytree_subclass_can_opt_out_of_being_a_jax_pytree() -> None:
    class Opaque(sortal.Pytree, pytree=False):
        def __init__(self) -> None:
            self.w = sortal.Param(jnp.ones(1))

    opaque = Opaque()
    assert jax.tree.leaves(opaque) == [opaque]
    assert sortal.state(opaque).paths() == (("w",),)


def test_modules_of_one_class_compare_by_identity_and_can_be_dict_keys() -> None:
    a, b = Linear(1, 1), Linear(1, 1)
    assert a != b
    assert len({a, b}) == 2


def test_init_may_be_left_out_and_attributes_set_later() -> None:
    model = sortal.Module()
    model.w = sortal.Param(jnp.ones(1))
    assert sortal.state(model).paths() == (("w",),)
    assert jax.tree.map(lambda x: x + 1, model).w[0] == 2


@pytest.mark.parametrize("before", [1, sortal.Param(2.0)])
def test_replacing_the_dict_of_a_module_is_noticed(before: Any) -> None:
    model = Holder(a=before)
    sortal.state(model)
    model.__dict__ = {"w": sortal.Param(jnp.ones(1))}
    assert sortal.state(model).paths() == (("w",),)
