"""Variables: values, metadata, kinds and their options, and arrays in disguise."""

from __future__ import annotations

import copy
import gc
import math
import operator
import pickle
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import sortal
from sortal import nnx
from sortal._engine.statics import EMPTY
from sortal._engine.variable import (
    Variable,
    check_writable,
    describe,
    make,
    make_all,
    write,
)
from sortal.errors import TraceError, VariableAttributeError, VariableError
from strategies import KINDS, LoRA, jax_arrays, metadata, variables

Param = sortal.Param


def both(value, **metadata):
    """A Param of ours and one of Flax's with the same value."""
    return Param(value, **metadata), flax_nnx.Param(value, **metadata)


def same(a, b):
    assert jnp.asarray(a).dtype == jnp.asarray(b).dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# -------------------------------------------------------------------- values
def test_the_value_is_kept_as_it_is():
    for value in (1, 2.5, "text", None, np.ones(2), jnp.ones(2), {"a": 1}, (1, [2])):
        variable = Variable(value)
        assert variable.value is value
        assert variable.get_value() is value


def test_setting_the_value_replaces_it_whole():
    variable = Param(jnp.zeros(2))
    new = np.ones(3)
    variable.value = new
    assert variable.value is new
    other = jnp.ones((2, 2), jnp.int32)
    variable.set_value(other)
    assert variable.value is other
    assert variable[...] is other


def test_a_variable_in_a_variable_is_refused_with_what_to_write():
    inner = sortal.BatchStat(1)
    with pytest.raises(VariableError, match=r"Param\(\.\.\.\) was given a BatchStat"):
        Param(inner)
    with pytest.raises(VariableError, match=r"Write Param\(variable\.value\)"):
        Param(inner)
    outer = Param(1)
    with pytest.raises(
        VariableError,
        match=r"value of a Param cannot be a BatchStat\. "
        r"Write variable\.value = other\.value",
    ):
        outer.value = inner
    with pytest.raises(VariableError, match="cannot be a BatchStat"):
        outer.set_value(inner)
    assert outer.value == 1


def test_a_reference_of_jax_in_a_variable_is_refused_with_what_to_write():
    ref = jax.new_ref(jnp.ones(2))
    with pytest.raises(VariableError, match=r"Cannot pass a Ref.*Param\(ref\[\.\.\."):
        Param(ref)
    assert Param(ref[...]).value.tolist() == [1, 1]


@pytest.mark.parametrize("index", [0, -1, slice(1, None), (0, 1), [0, 1], None, ...])
def test_reading_by_index_gives_what_flax_gives(index):
    ours, theirs = both(jnp.arange(6.0).reshape(2, 3))
    index = np.array(index) if isinstance(index, list) else index
    same(ours[index], theirs[index])
    same(ours.get_value(index=index), theirs.get_value(index=index))


@pytest.mark.parametrize(
    ("index", "new"),
    [
        (0, 7.0),
        (0, np.array([1, 2, 3])),
        ((0, 1), 5),
        (slice(None), jnp.ones(3)),
        (..., 2),
        (..., 2.5),
        (..., jnp.ones((2, 3))),
        (..., jnp.ones((1, 3), jnp.int32)),
        (..., np.ones((2, 3), np.float64)),
        ((slice(None), 1), -1.0),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_writing_by_index_casts_and_broadcasts_as_flax_does(index, new, dtype):
    ours, theirs = both(jnp.arange(6).reshape(2, 3).astype(dtype))
    with warnings.catch_warnings():
        # JAX's word on a cast that loses bits; the same in both libraries.
        warnings.simplefilter("ignore", FutureWarning)
        ours[index] = new
        theirs[index] = new
        same(ours.value, theirs[...])
        ours.set_value(new, index=index)
    same(ours.value, theirs[...])
    assert ours.dtype == dtype


def test_writing_a_shape_that_does_not_broadcast_is_an_error_and_changes_nothing():
    variable = Param(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"float32\[2\].*float32\[3\]"):
        variable[...] = jnp.ones(2)
    same(variable.value, jnp.zeros(3))


def test_writing_by_index_of_another_variable_takes_its_value():
    variable = Param(jnp.zeros(2))
    variable[...] = sortal.BatchStat(jnp.ones(2))
    same(variable.value, jnp.ones(2))
    variable[0] = sortal.BatchStat(3.0)
    same(variable.value, jnp.array([3.0, 1.0]))


def test_the_idioms_of_nnx_code_update_the_value():
    variable = Param(jnp.array([1.0, 2.0]))
    variable[...] += 1
    same(variable.value, jnp.array([2.0, 3.0]))
    variable.value *= 2
    same(variable.value, jnp.array([4.0, 6.0]))
    variable[1] -= 6
    same(variable[...], jnp.array([4.0, 0.0]))
    variable[...] = variable @ jnp.eye(2)
    same(variable[...], jnp.array([4.0, 0.0]))


def test_a_write_by_index_leaves_the_old_value_as_it_was():
    for value in (jnp.zeros(2), np.zeros(2), [0, 0], {0: 0, 1: 0}):
        variable, old = Variable(value), copy.deepcopy(value)
        variable[0] = 1
        assert variable[0] == 1
        assert jax.tree.all(
            jax.tree.map(
                lambda a, b: (a == b).all() if hasattr(a, "all") else a == b, value, old
            )
        )
        assert type(variable.value) is type(value) or isinstance(value, jax.Array)


def test_numpy_values_stay_numpy_until_a_jax_array_is_written():
    variable = Variable(np.zeros(3, np.float32))
    variable[0] = 1
    variable[...] = np.arange(3)
    assert type(variable.value) is np.ndarray
    assert variable.value.dtype == np.float32
    variable[1] = jnp.array(5.0)
    assert isinstance(variable.value, jax.Array)
    same(variable.value, jnp.array([0.0, 5.0, 2.0], jnp.float32))


@pytest.mark.parametrize("value", [1, "text", (1, 2), {"a": 1}, None])
def test_the_whole_of_a_value_that_is_no_array_is_read_and_written_by_dots(value):
    variable = Variable(0)
    variable[...] = value
    assert variable[...] is value
    assert variable.value is value


def test_dots_replace_an_abstract_value_by_an_array():
    variable = Param(jax.ShapeDtypeStruct((2,), jnp.float32))
    variable[...] = jnp.ones(2)
    same(variable.value, jnp.ones(2))


def test_a_whole_write_keeps_where_the_value_lies_as_flax_does():
    """Writing an array from one device must not undo a sharding."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    ours, theirs = both(jax.device_put(jnp.zeros(4), sharding))
    ours[...] = jnp.ones(4)
    theirs[...] = jnp.ones(4)
    assert theirs[...].sharding == sharding
    assert ours.value.sharding == sharding
    same(ours.value, jnp.ones(4))


def test_a_whole_write_of_a_fitting_array_keeps_the_very_array():
    variable, new = Param(jnp.zeros(2)), jnp.ones(2)
    variable[...] = new
    assert variable.value is new


def test_a_value_with_items_is_measured_and_iterated_like_it():
    assert len(Variable([1, 2])) == 2
    assert list(Variable((1, 2))) == [1, 2]
    assert 2 in Variable([1, 2])
    assert 3 not in Variable([1, 2])
    assert [int(x) for x in Param(jnp.arange(3))] == [0, 1, 2]
    assert Variable(lambda x, y=0: x + y)(1, y=2) == 3


# --------------------------------------------------------------- arithmetic
BINARY = "add sub mul truediv floordiv mod pow".split()
BITS = "and_ or_ xor lshift rshift".split()
COMPARE = "eq ne lt le gt ge".split()


@pytest.mark.parametrize("name", BINARY + COMPARE)
def test_operators_give_what_the_value_gives_on_either_side(name):
    f, x = getattr(operator, name), jnp.array([1.0, 2.0, 5.0])
    others = [2.0, 2, x[::-1], np.array([2.0, 1.0, 4.0], np.float32)]
    for other in others:
        same(f(Param(x), other), f(x, jnp.asarray(other)))
        same(f(other, Param(x)), f(jnp.asarray(other), x))
    same(f(Param(x), sortal.BatchStat(x + 1)), f(x, x + 1))
    if name in BINARY or name == "eq":  # Flax has no other comparisons
        same(f(Param(x), 2.0), f(flax_nnx.Param(x), 2.0))
        same(f(2.0, Param(x)), f(2.0, flax_nnx.Param(x)))


@pytest.mark.parametrize("name", BITS)
def test_bit_operators_give_what_the_value_gives_on_either_side(name):
    f, x = getattr(operator, name), jnp.array([1, 2, 5])
    same(f(Param(x), 2), f(x, 2))
    same(f(2, Param(x)), f(2, x))
    same(f(Param(x), Param(x)), f(flax_nnx.Param(x), flax_nnx.Param(x)))


def test_matrix_products_work_on_either_side():
    a, b = jnp.arange(6.0).reshape(2, 3), jnp.arange(6.0).reshape(3, 2)
    same(Param(a) @ b, a @ b)
    same(a @ Param(b), a @ b)
    same(Param(a) @ Param(b), a @ b)


def test_numpy_arrays_on_the_left_give_jax_arrays_also_inside_jit():
    """NumPy would else ask for the Variable's data, which a tracer does not have."""
    x = np.array([1.0, 2.0], np.float32)
    assert isinstance(x * Param(jnp.ones(2)), jax.Array)
    out = jax.jit(lambda value: x * Param(value) + np.float32(1) * Param(value))(x)
    same(out, jnp.array([2.0, 6.0]))


@pytest.mark.parametrize("name", ["neg", "pos", "abs", "invert"])
def test_unary_operators_give_what_the_value_gives(name):
    f, x = getattr(operator, name), jnp.array([1, -2])
    same(f(Param(x)), f(x))
    same(f(Param(x)), f(flax_nnx.Param(x)))


def test_conversions_to_python_numbers():
    assert int(Param(jnp.array(3))) == 3
    assert float(Param(jnp.array(1.5))) == 1.5
    assert complex(Param(jnp.array(1.5))) == 1.5
    assert bool(Param(jnp.array(True)))
    assert not Param(jnp.array(0))
    assert [10, 20, 30][Param(jnp.array(1))] == 20
    assert range(Param(jnp.array(2))) == range(2)
    assert round(Param(1.26), 1) == 1.3
    assert round(Param(1.6)) == 2
    assert math.floor(Param(jnp.array(1.5))) == 1
    assert math.ceil(Param(1.5)) == 2


IN_PLACE = {
    "iadd": "+=", "isub": "-=", "imul": "*=", "imatmul": "@=", "itruediv": "/=",
    "ifloordiv": "//=", "imod": "%=", "ipow": "**=", "ilshift": "<<=",
    "irshift": ">>=", "iand": "&=", "ixor": "^=", "ior": "|=",
}  # fmt: skip


@pytest.mark.parametrize(("name", "symbol"), IN_PLACE.items())
def test_in_place_operators_are_refused_with_what_to_write(name, symbol):
    variable = Param(jnp.array([1, 2]))
    with pytest.raises(VariableError) as caught:
        getattr(operator, name)(variable, 1)
    text = str(caught.value)
    assert (
        f"variable {symbol} x would put a plain array in the place of a Param" in text
    )
    assert f"Write variable[...] {symbol} x." in text
    same(variable.value, jnp.array([1, 2]))
    with pytest.raises(NotImplementedError):
        getattr(operator, name)(flax_nnx.Param(jnp.array([1, 2])), 1)


# ------------------------------------------------------- as an array of JAX
FUNCTIONS = {
    "jnp.dot": lambda v, x: jnp.dot(v, x),
    "jnp.sum": lambda v, x: jnp.sum(v),
    "jnp.exp": lambda v, x: jnp.exp(v),
    "jnp.where": lambda v, x: jnp.where(x > 1, v, 0.0),
    "jnp.concatenate": lambda v, x: jnp.concatenate([v[...], x]),
    "jnp.stack": lambda v, x: jnp.stack([v, x]),
    "jnp.einsum": lambda v, x: jnp.einsum("i,i->", v, x),
    "jnp.asarray": lambda v, x: jnp.asarray(v),
    "jnp.array": lambda v, x: jnp.array(v),
    "jnp.zeros_like": lambda v, x: jnp.zeros_like(v),
    "jnp.broadcast_to": lambda v, x: jnp.broadcast_to(v, (2, 3)),
    "jnp.linalg.norm": lambda v, x: jnp.linalg.norm(v),
    "lax.dot": lambda v, x: lax.dot(v[...], x),
    "jax.nn.softmax": lambda v, x: jax.nn.softmax(v[...]),
    "x.at": lambda v, x: v.at[0].set(9.0),
    "x.T": lambda v, x: v.T,
    "x.sum": lambda v, x: v.sum(),
    "x.astype": lambda v, x: v.astype(jnp.int32),
    "x.reshape": lambda v, x: v.reshape(3, 1),
}


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_of_arrays_take_a_variable_eagerly_and_in_jit(f):
    x = jnp.array([1.0, 2.0, 3.0])
    expected = f(x, x)
    same(f(Param(x), x), expected)
    same(f(flax_nnx.Param(x), x), expected)
    same(jax.jit(f)(Param(x), x), expected)
    variable = Param(x)
    same(jax.jit(lambda y: f(variable, y))(x), expected)


def test_numpy_takes_a_variable():
    variable = Param(jnp.array([1.0, 2.0]))
    assert type(np.asarray(variable)) is np.ndarray
    np.testing.assert_array_equal(variable, [1.0, 2.0])
    assert np.asarray(variable, np.int32).dtype == np.int32
    assert np.sum(variable) == 3
    own = np.array(variable)
    own[0] = 9
    same(variable.value, jnp.array([1.0, 2.0]))


def test_properties_of_the_value_are_those_of_the_variable():
    variable = Param(jnp.ones((2, 3), jnp.bfloat16))
    assert variable.shape == (2, 3)
    assert variable.ndim == 2
    assert variable.dtype == jnp.bfloat16
    assert variable.size == 6
    assert not hasattr(variable, "no_such_name")


# ------------------------------------------------------------------ metadata
def test_metadata_is_read_by_name_all_or_by_attribute():
    variable = Param(1, tag="a", unit="m")
    assert variable.get_metadata() == {"tag": "a", "unit": "m"}
    assert variable.get_metadata("tag") == "a"
    assert variable.get_metadata("absent", None) is None
    assert variable.get_metadata("absent", default=3) == 3
    assert variable.has_metadata("tag")
    assert not variable.has_metadata("absent")
    assert variable.unit == "m"
    variable.get_metadata()["tag"] = "changed"
    assert variable.get_metadata("tag") == "a"


def test_metadata_is_set_by_keyword_by_name_and_whole():
    variable = Param(1, tag="a")
    variable.set_metadata(unit="m", tag="b")
    variable.set_metadata("size", 3)
    assert variable.get_metadata() == {"tag": "b", "unit": "m", "size": 3}
    variable.set_metadata({"only": True})
    assert variable.get_metadata() == {"only": True}
    variable.del_metadata("only")
    assert variable.get_metadata() == {}
    assert variable._metadata is EMPTY


def test_metadata_that_is_not_there_is_an_error_that_lists_what_is():
    variable = Param(1, tag="a", unit="m")
    text = r"Param has no metadata 'tga'; it has \['tag', 'unit'\]\. Pass default="
    with pytest.raises(VariableAttributeError, match=text):
        variable.get_metadata("tga")
    with pytest.raises(VariableAttributeError, match=text):
        variable.del_metadata("tga")
    assert variable.get_metadata() == {"tag": "a", "unit": "m"}


@pytest.mark.parametrize(
    ("args", "keywords", "found"),
    [
        ((), {}, "0 positional and 0 keyword"),
        (("tag",), {}, "1 positional and 0 keyword"),
        (("tag", 1, 2), {}, "3 positional and 0 keyword"),
        ((1, 2), {}, "2 positional and 0 keyword"),
        (({"a": 1},), {"b": 2}, "1 positional and 1 keyword"),
        (("a", 1), {"b": 2}, "2 positional and 1 keyword"),
    ],
)
def test_metadata_set_in_any_other_form_is_refused(args, keywords, found):
    variable = Param(1, tag="a")
    with pytest.raises(
        VariableError, match=f"takes a dict, or a name .* found {found}"
    ):
        variable.set_metadata(*args, **keywords)
    assert variable.get_metadata() == {"tag": "a"}


def test_unhashable_metadata_is_refused_when_it_is_given():
    text = r"metadata must be hashable, found axes=\['x'\]\. Use a tuple for a list"
    with pytest.raises(VariableError, match="Param: " + text):
        Param(1, axes=["x"], tag="a")
    variable = Param(1)
    for write_it in (
        lambda: variable.set_metadata(axes=["x"]),
        lambda: variable.set_metadata("axes", ["x"]),
        lambda: variable.set_metadata({"axes": ["x"]}),
        lambda: variable.replace(axes=["x"]),
    ):
        with pytest.raises(VariableError, match=text):
            write_it()
    assert variable.get_metadata() == {}
    with pytest.raises(VariableError, match="keep arrays in Variables"):
        Param(1, scale=jnp.ones(2))


def test_metadata_does_not_shadow_what_arrays_and_variables_have():
    """In Flax, metadata named ``T`` stands before transposition."""
    variable = Param(jnp.zeros((2, 3)), T="mine", shape=5, replace=7)
    assert variable.T.shape == (3, 2)
    assert variable.shape == (2, 3)
    assert callable(variable.replace)
    assert variable.get_metadata() == {"T": "mine", "shape": 5, "replace": 7}


@given(variables(), metadata)
def test_replace_makes_another_variable_and_leaves_the_first(variable, more):
    before = (variable.value, variable.get_metadata())
    other = variable.replace(jnp.ones(1), **more)
    assert type(other) is type(variable)
    assert other.get_metadata().keys() == before[1].keys() | more.keys()
    same(other.value, jnp.ones(1))
    assert variable.value is before[0]
    assert variable.get_metadata().keys() == before[1].keys()
    assert variable.replace().value is variable.value
    assert variable.copy().value is variable.value
    assert variable.copy() is not variable
    assert variable.replace(Param(3)).value == 3


# ---------------------------------------------------------------- attributes
def test_a_misspelt_attribute_names_the_variable_and_not_what_jax_holds():
    variable = Param(jnp.zeros((2, 3)), tag="a")
    with pytest.raises(VariableAttributeError) as caught:
        _ = variable.vlaue
    text = str(caught.value)
    assert "Param has no attribute 'vlaue'" in text
    assert "its metadata ['tag']" in text
    assert "its value float32[2,3]" in text
    assert "ArrayImpl" not in text


def test_setting_an_attribute_is_refused_with_both_remedies():
    variable = Param(1)
    with pytest.raises(VariableAttributeError) as caught:
        variable.tag = "a"
    text = str(caught.value)
    assert "Cannot set attribute tag of a Param" in text
    assert "variable.value = x or variable[...] = x" in text
    assert "variable.set_metadata(tag=x)" in text
    assert variable.get_metadata() == {}


def test_deleting_an_attribute_is_refused_with_the_remedy():
    variable = Param(1, tag="a")
    with pytest.raises(
        VariableAttributeError, match=r"variable\.del_metadata\('tag'\)"
    ):
        del variable.tag
    with pytest.raises(
        VariableAttributeError, match="Cannot delete attribute value of a Param"
    ):
        del variable.value
    assert variable.value == 1
    assert variable.tag == "a"


def test_a_kind_may_define_properties_and_methods():
    class Scaled(Param):
        @property
        def half(self):
            return self.value / 2

        @half.setter
        def half(self, x):
            self.value = 2 * x

        def double(self):
            return self.value * 2

    variable = Scaled(4.0)
    assert (variable.half, variable.double()) == (2.0, 8.0)
    variable.half = 5.0
    assert variable.value == 10.0


def test_a_value_that_is_missing_dunder_methods_says_so_to_python():
    assert not hasattr(Variable(1), "__fspath__")
    with pytest.raises(AttributeError, match="__fspath__"):
        _ = Variable(1).__fspath__


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        (Param(jnp.zeros((2, 3))), "Param(float32[2,3])"),
        (Param(np.zeros(2, np.int8), tag="a"), "Param(int8[2], tag='a')"),
        (Variable(jax.random.key(0)), "Variable(key<fry>[])"),
        (Variable((1, "x")), "Variable((1, 'x'))"),
        (Variable(jax.ShapeDtypeStruct((4,), jnp.int32)), "Variable(int32[4])"),
        (LoRA([0] * 100), "LoRA(list(...))"),
    ],
)
def test_a_variable_prints_its_kind_shape_and_metadata_not_its_numbers(variable, text):
    assert repr(variable) == text


def test_a_value_is_described_shortly():
    assert describe(jnp.zeros(())) == "float32[]"
    assert describe(1.5) == "1.5"
    assert describe("x" * 100) == "str(...)"


# --------------------------------------------------------- identity and ==
@given(variables(), variables())
def test_variables_are_told_apart_by_identity_in_sets_and_dicts(a, b):
    assert len({a, b, a}) == 2
    assert {a: 1, b: 2}[a] == 1
    assert hash(a) == hash(a)


def test_comparison_is_by_value_as_for_arrays():
    x = jnp.array([1, 2])
    same(Param(x) == x, jnp.array([True, True]))
    same(Param(x) == Param(x + 1), jnp.array([False, False]))
    same(Param(x) != Param(x), jnp.array([False, False]))


# ------------------------------------------------------- copies and pickles
def assert_twins(a, b):
    assert type(a) is type(b)
    assert a._metadata is b._metadata
    assert a is not b
    same(a.value, b.value)


@given(variables())
def test_variables_survive_pickle_copy_and_deepcopy(variable):
    assert_twins(pickle.loads(pickle.dumps(variable)), variable)
    assert_twins(copy.copy(variable), variable)
    assert_twins(copy.deepcopy(variable), variable)


def test_copies_are_written_to_apart():
    variable = Param(jnp.zeros(2), tag="a")
    for other in (
        copy.copy(variable),
        copy.deepcopy(variable),
        pickle.loads(pickle.dumps(variable)),
    ):
        other[...] = jnp.ones(2)
        other.set_metadata(tag="b")
    same(variable.value, jnp.zeros(2))
    assert variable.tag == "a"


def test_a_deep_copy_owns_its_numpy_value_and_containers():
    value = {"a": np.zeros(2), "b": [jnp.ones(1)]}
    variable = Variable(value)
    other = copy.deepcopy(variable)
    value["a"][0] = 9
    value["b"].append(1)
    assert other.value["a"][0] == 0
    assert len(other.value["b"]) == 1


def test_a_deep_copy_keeps_sharing():
    variable = Param(jnp.zeros(2))
    a, b = copy.deepcopy([variable, variable])
    assert a is b
    assert a is not variable


def test_a_variable_that_nobody_holds_is_freed():
    variable = Param(jnp.zeros(2))
    ref = weakref.ref(variable)
    del variable
    gc.collect()
    assert ref() is None


# --------------------------------------------------------------------- kinds
def test_class_keywords_are_the_options_of_a_kind_and_inherited():
    class Stat(Variable, axis=0, checkpoint="keep"):
        pass

    class Running(Stat, checkpoint="drop"):
        pass

    assert Stat.options == {"axis": 0, "checkpoint": "keep"}
    assert Running.options == {"axis": 0, "checkpoint": "drop"}
    assert Variable.options == {}
    assert Param.options == {}


def test_options_come_from_all_bases_the_nearer_one_first():
    class A(Variable, axis=0, spec=1):
        pass

    class B(A):
        pass

    class C(A, axis=2, donate=True):
        pass

    class Both(B, C):
        pass

    assert Both.options == {"axis": 2, "spec": 1, "donate": True}


def test_options_of_a_kind_are_not_written_to():
    with pytest.raises(TypeError, match="item assignment"):
        Param.options["axis"] = 0


def test_an_unknown_option_is_refused_with_those_there_are():
    text = (
        "class Stat: unknown kind option axes, sepc. The options are axis, checkpoint, "
        "donate, optimizer, reduce, spec, trainable."
    )
    with pytest.raises(VariableError, match=text):

        class Stat(Variable, sepc=1, axes=0, axis=1):
            pass


def test_a_kind_with_an_init_of_its_own_works():
    class Counter(Variable):
        def __init__(self):
            super().__init__(jnp.array(0), unit="steps")

    made = Counter()
    twins = jax.tree.map(lambda x: x + 1, made), copy.deepcopy(made), made.replace(2)
    assert [type(x) for x in twins] == [Counter] * 3
    assert [int(x.value) for x in twins] == [1, 0, 2]
    assert all(x.unit == "steps" for x in twins)


def test_the_kinds_of_nnx_are_there_with_their_order():
    for name in ("Param", "BatchStat", "Cache", "Intermediate", "Perturbation"):
        assert issubclass(getattr(sortal, name), Variable)
        assert hasattr(nnx, name)
    assert issubclass(sortal.RngKey, sortal.RngState)
    assert issubclass(sortal.RngCount, sortal.RngState)
    assert issubclass(sortal.OptVariable, sortal.OptState)
    assert issubclass(sortal.OptArray, sortal.OptState)
    assert nnx.VariableState is Variable


def test_a_kind_takes_a_type_argument():
    assert Param[jax.Array](1).value == 1
    assert isinstance(Param[jax.Array](1), Param)


# ------------------------------------------------------------------ as a pytree
@given(variables())
def test_a_variable_is_a_pytree_of_its_value(variable):
    leaves, treedef = jax.tree.flatten(variable)
    assert leaves == [variable.value] or leaves[0] is variable.value
    assert_twins(treedef.unflatten(leaves), variable)
    (path, _), *_ = jax.tree_util.tree_flatten_with_path(variable)[0]
    assert jax.tree_util.keystr(path) == ".value"


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_definition_tells_kinds_and_metadata_apart(kind):
    mine = jax.tree.structure(kind(1, tag="a"))
    assert mine == jax.tree.structure(kind(2, tag="a"))
    assert mine != jax.tree.structure(kind(1, tag="b"))
    others = [k for k in KINDS if k is not kind]
    assert all(mine != jax.tree.structure(k(1, tag="a")) for k in others)


def test_a_variable_goes_through_plain_transforms_by_value():
    variable = Param(jnp.array([1.0, 2.0]), tag="a")
    out = jax.jit(lambda v: jax.tree.map(lambda x: 2 * x, v))(variable)
    assert type(out) is Param
    assert out.tag == "a"
    same(out.value, jnp.array([2.0, 4.0]))
    gradient = jax.grad(lambda v: (v[...] ** 2).sum())(variable)
    assert type(gradient) is Param
    same(gradient.value, jnp.array([2.0, 4.0]))
    same(jax.vmap(lambda v: v * 3)(variable), jnp.array([3.0, 6.0]))


# --------------------------------------------------- writes in foreign traces
class Layer(sortal.Module):
    def __init__(self):
        self.kernel = Param(jnp.ones(2))
        self.stats = [sortal.BatchStat(jnp.zeros(2))]


def set_value(layer, x):
    layer.kernel.value = x


def set_item(layer, x):
    layer.kernel[...] = x


def set_part(layer, x):
    layer.kernel[0] = x[0]


def set_metadata(layer, x):
    layer.kernel.set_metadata(tag="x")


WRITES = [set_value, set_item, set_part, set_metadata]


def run_jit(body):
    jax.jit(body)(jnp.ones(2))


def run_grad(body):
    jax.grad(lambda x: (body(x), x.sum())[1])(jnp.ones(2))


def run_vmap(body):
    jax.vmap(body)(jnp.ones((3, 2)))


def run_scan(body):
    lax.scan(lambda c, x: (body(x), (c, None))[1], 0, jnp.ones((3, 2)))


@pytest.mark.parametrize("transform", [run_jit, run_grad, run_vmap, run_scan])
@pytest.mark.parametrize("write_it", WRITES)
def test_a_write_in_the_body_of_a_plain_transform_names_path_and_kind(
    transform, write_it
):
    """A closed-over Variable would keep a tracer, or lose the update."""
    layer = Layer()
    before = layer.kernel.value
    with pytest.raises(TraceError) as caught:
        transform(lambda x: write_it(layer, x))
    assert "kernel (Param)" in str(caught.value)
    assert "Pass the object that holds it as an argument" in str(caught.value)
    assert layer.kernel.value is before
    assert layer.kernel.get_metadata() == {}


def test_the_path_in_the_message_goes_through_containers():
    layer = Layer()
    with pytest.raises(TraceError, match=r"stats\.0 \(BatchStat\)"):
        run_jit(lambda x: layer.stats[0].set_value(x))


def test_a_variable_in_no_object_is_named_as_such():
    loose = [Param(jnp.ones(2))]
    with pytest.raises(TraceError, match=r"an object of its own \(Param\)"):
        run_jit(lambda x: loose[0].set_value(x))


def test_reading_in_the_body_of_a_transform_is_free():
    layer = Layer()
    same(jax.jit(lambda x: x + layer.kernel)(jnp.ones(2)), jnp.full(2, 2.0))


def test_a_variable_made_inside_a_trace_is_written_there_and_not_outside():
    made = []

    @jax.jit
    def body(x):
        variable = Param(x)
        variable[...] = x + 1
        variable.set_metadata(tag="a")
        made.append(variable)
        return variable[...]

    same(body(jnp.ones(2)), jnp.full(2, 2.0))
    with pytest.raises(TraceError, match=r"\(Param\)"):
        made[0].value = jnp.ones(2)


def test_a_batch_of_writes_is_refused_whole_and_lists_all():
    layer = Layer()

    def body(x):
        inside = Param(x)
        check_writable([inside])
        check_writable([layer.kernel, inside, layer.stats[0]])

    with pytest.raises(
        TraceError, match=r"kernel \(Param\), .*stats\.0 \(BatchStat\) would be"
    ):
        run_jit(body)
    check_writable([layer.kernel, layer.stats[0]])


# ---------------------------------------------------------- for the engine
def test_make_skips_the_init_of_the_kind():
    class Counter(Variable):
        def __init__(self):
            raise AssertionError

    made = make(Counter, 3, EMPTY)
    assert type(made) is Counter
    assert made.value == 3
    write(made, 4)
    assert made.value == 4


def test_make_all_leaves_values_of_no_kind_bare():
    made = make_all([Param, None], [1, 2], [EMPTY, EMPTY])
    assert type(made[0]) is Param
    assert made[0].value == 1
    assert made[1] == 2


@given(st.lists(jax_arrays, max_size=3))
def test_a_variable_may_hold_a_pytree(arrays):
    variable = Variable({"all": arrays})
    leaves = jax.tree.leaves(variable)
    assert all(a is b for a, b in zip(leaves, arrays, strict=True))
    doubled = jax.tree.map(lambda x: x, variable)
    assert jax.tree.structure(doubled) == jax.tree.structure(variable)


def test_no_idiom_here_warns_where_flax_does():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variable = Param(jnp.zeros(1))
        variable.value = variable.value + 1
        variable.value += 1
    with pytest.warns(DeprecationWarning, match="value"):
        _ = flax_nnx.Param(jnp.zeros(1)).value
