"""What a value is made of: taken apart, put together, compared, all exactly."""

from __future__ import annotations

import collections
import enum
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sortal as nnx
from sortal.checkpoint import files
from sortal.checkpoint.values import (
    DTYPES,
    Array,
    Key,
    Nest,
    Plain,
    UnsavableError,
    arrays,
    build,
    describe,
    difference,
    numpy_dtype,
    spec_of,
    tuple_of,
    with_arrays,
)
from sortal.errors import DamagedError, SaveError

IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


class Moment(NamedTuple):
    mean: Any
    count: Any


def never(stored: str, live: str) -> bool:
    return False


# -------------------------------------------------------------------------- arrays
def test_every_dtype_is_described_by_its_name_and_measured_as_numpy_does():
    for name in DTYPES:
        value, live = np.zeros((2, 3), numpy_dtype(name)), []
        found = describe(value, live)
        assert found == Array((2, 3), name, "numpy")
        assert found.nbytes == value.nbytes
        assert live[0] is value


def test_no_dtype_that_jax_has_is_forgotten():
    types = [x for x in vars(jnp).values() if isinstance(x, type(jnp.float32))]
    found = {jnp.dtype(x).name for x in types}
    assert len(found) > 20
    assert found - DTYPES <= {"int1", "uint1"}  # of which nothing can be computed


def test_what_numpy_alone_has_is_refused_by_name():
    class Struct(enum.Enum):
        A = 1

    for value, words in (
        (np.zeros(2, "M8[s]"), "dtype datetime64[s]"),
        (np.zeros(2, "S3"), "dtype |S3"),
        (np.str_("x"), "dtype <U1"),
        (np.zeros(2, object), "dtype object"),
        (np.zeros(2, "i4,f4"), "dtype [('f0', '<i4'), ('f1', '<f4')]"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "a MaskedArray, of which"),
        (np.ones((2, 2)).view(np.matrix), "a matrix, of which only the numbers"),
        ({1, 2}, "a set, {1, 2}"),
        (Struct.A, "a Struct, <Struct.A: 1>"),
        ({True: 1}, "a dict with the key True"),
        ({np.int64(1): 1}, "a dict with the key np.int64(1)"),
        ([{"a": {(1, 2): 1}}], "a dict with the key (1, 2)"),
    ):
        with pytest.raises(UnsavableError) as caught:
            describe(value, [])
        assert words in str(caught.value)


def test_a_node_whose_keys_read_alike_is_refused():
    """Its keys are stored as text, and a manifest with one key twice is no manifest."""
    node = collections.OrderedDict({1.5: 1, "1.5": 2})
    with pytest.raises(UnsavableError, match=r"OrderedDict with several keys of one"):
        describe(node, [])
    found = describe(collections.OrderedDict({1.5: 1, "2.5": 2}), [])
    assert found.keys == ("1.5", "2.5")


def test_byte_order_and_the_platforms_names_of_dtypes_are_no_part_of_a_value():
    assert describe(np.zeros(2, ">f8"), []).dtype == "float64"
    assert describe(np.zeros(2, np.longlong), []).dtype == "int64"
    marked = np.dtype("f4", metadata={"unit": "m"})
    assert describe(np.zeros(2, marked), []).dtype == "float32"


def test_forms_weak_types_and_shapes_are_told_apart():
    scalar, zero_d = np.float32(1), np.zeros((), np.float32)
    assert describe(scalar, []) == Array((), "float32", "scalar")
    assert describe(zero_d, []) == Array((), "float32", "numpy")
    assert describe(jnp.float32(1), []) == Array((), "float32")
    assert describe(jnp.asarray(1.5), []) == Array((), "float32", weak=True)
    assert describe(jnp.zeros((3, 0)), []) == Array((3, 0), "float32")
    assert describe(jnp.zeros((3, 0)), []).nbytes == 0
    assert describe(1.5, []) == Plain(1.5)
    abstract = jax.ShapeDtypeStruct((2,), jnp.bfloat16)
    assert describe(abstract, []) == describe(jnp.ones(2, jnp.bfloat16), [])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_keys_are_their_words_with_or_without_values(impl):
    keys = jax.random.split(jax.random.key(3, impl=impl), (2, 3))
    words, live, none = jax.random.key_data(keys), [], []
    found = describe(keys, live)
    assert found == Array((2, 3), "uint32", "jax", key=Key(impl, words.shape[-1]))
    assert found.stored_shape == words.shape
    assert found.nbytes == words.nbytes
    assert np.array_equal(live[0], words)
    assert describe(jax.ShapeDtypeStruct(keys.shape, keys.dtype), none) == found


def test_an_old_key_is_an_array_of_words_and_fits_no_new_one():
    old = describe(jax.random.PRNGKey(0), [])
    assert old == Array((2,), "uint32")
    new = describe(jax.random.split(jax.random.key(0)), [])
    assert old.shape == new.shape
    assert difference(old, new, never) == "dtype"


# ------------------------------------------------------------------------------ laws
plain = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=3),
)
numbers = st.builds(
    np.zeros,
    st.sampled_from([(), (2,), (0, 3), (2, 1)]),
    st.sampled_from(["f4", "i2", ml_dtypes.bfloat16, "?"]),
)
values = st.recursive(
    st.none() | plain | numbers,
    lambda x: st.one_of(
        st.lists(x, max_size=3),
        st.lists(x, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), x, max_size=3),
        st.dictionaries(st.integers(), x, max_size=3),
        st.builds(Moment, x, x),
    ),
    max_leaves=8,
)


def signature(value: Any) -> Any:
    """All that must agree for one value to take the place of another, by JAX."""
    leaves = jax.tree.leaves(value)
    about = [
        (x.shape, x.dtype.name) if isinstance(x, np.ndarray) else type(x)
        for x in leaves
    ]
    return jax.tree.structure(value), about


@given(values)
def test_what_is_taken_apart_comes_together_again(value):
    live: list[Any] = []
    tree = describe(value, live)
    found = build(tree, iter(live), value)
    assert jax.tree.structure(found) == jax.tree.structure(value)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(value), strict=True)
    assert all(x is y for x, y in pairs)


@given(values)
def test_arrays_are_numbered_as_jax_numbers_them(value):
    live: list[Any] = []
    tree = describe(value, live)
    due = [x for x in jax.tree.leaves(value) if isinstance(x, np.ndarray)]
    assert len(live) == len(due) == len(list(arrays(tree)))
    assert all(x is y for x, y in zip(live, due, strict=True))
    assert with_arrays(tree, iter(arrays(tree))) == tree or "nan" in repr(tree)


@given(values, values)
def test_two_values_fit_just_where_jax_sees_one_structure(a, b):
    first, second = describe(a, []), describe(b, [])
    assert not difference(first, first, never)
    same = signature(a) == signature(b)
    assert (not difference(first, second, never)) == same
    assert (not difference(second, first, never)) == same


def test_dicts_of_mixed_keys_have_one_order():
    """JAX could not sort them at all."""
    a = {1: np.zeros(1), "1": np.ones(1), None: np.ones(2), -3: np.ones(3)}
    b = dict(reversed(a.items()))
    live: list[Any] = []
    tree = describe(b, live)
    assert tree == describe(a, [])
    found = build(tree, iter(live))
    assert all(found[k] is a[k] for k in a)
    assert len(found) == 4


# ----------------------------------------------------------------------- differences
def test_a_difference_has_the_word_of_its_sort():
    def word(a: Any, b: Any) -> str:
        return difference(describe(a, []), describe(b, []), never)

    assert word(jnp.ones(2), jnp.ones((2, 1))) == "shape"
    assert word(jnp.ones(2), jnp.ones(2, jnp.bfloat16)) == "dtype"
    assert word(jnp.uint32(1), jax.random.key(0)) == "dtype"
    keys = [jax.random.key(0, impl=impl) for impl in IMPLEMENTATIONS]
    assert word(keys[0], keys[1]) == "PRNG implementation"
    assert word(keys[1], keys[2]) == "PRNG implementation"
    assert word(1, True) == "type"
    assert word(1.0, jnp.float32(1)) == "type"
    assert word(None, 1) == "type"
    assert word([1], (1,)) == "structure"
    assert word([1], [1, 2]) == "structure"
    assert word({"a": 1}, {"b": 1}) == "structure"
    assert word({"1": 1}, {1: 1}) == "structure"
    assert word(Moment(1, 2), (1, 2)) == "structure"
    assert word({"a": [1, jnp.ones(2)]}, {"a": [1, jnp.ones(3)]}) == "shape"
    # Where it lives, and whether its type is weak, do not matter.
    assert word(np.ones(2, np.float32), jnp.ones(2)) == ""
    assert word(jnp.asarray(1.0), np.float32(1)) == ""


def test_casts_are_asked_for_with_the_stored_dtype_first():
    asked = []

    def cast(stored: str, live: str) -> bool:
        asked.append((stored, live))
        return True

    stored, live = describe(jnp.ones(1), []), describe(jnp.ones(1, jnp.float16), [])
    assert difference(stored, live, cast) == ""
    assert asked == [("float32", "float16")]


# ----------------------------------------------------------------------------- nodes
def test_a_node_is_built_only_from_one_like_it():
    value = {"m": Moment(jnp.ones(1), 3), "o": optax.EmptyState()}
    live: list[Any] = []
    tree = describe(value, live)
    like = {"m": Moment(None, None), "o": optax.EmptyState()}
    found = build(tree, iter(live), like)
    assert type(found["m"]) is Moment
    assert found["m"].count == 3
    assert type(found["o"]) is optax.EmptyState
    assert type(build(tree, iter(live))["m"]) is Moment  # a named tuple needs none
    gone = tree._replace(children=[tree.children[0]._replace(name="gone.Moment")] * 2)
    with pytest.raises(
        DamagedError, match=r"a value is a gone\.Moment, which only a m"
    ):
        build(gone, iter(live))


def test_values_are_shown_as_they_nest():
    value = {"b": [jnp.ones((3, 4)), None], "a": jax.random.key(0), 1: "x"}
    assert describe(value, []).shown == (
        "dict(1: str, a: key<threefry2x32>[], b: list(float32[3,4], none()))"
    )
    shown = describe(Moment(np.float16(1), 2), []).shown
    assert shown == f"{__name__}.Moment(mean: float16[], count: int)"


def test_deep_values_are_refused(tmp_path):
    value = 1
    for _ in range(150):
        value = [value]
    with pytest.raises(SaveError, match="nested more than a hundred deep"):
        nnx.save(tmp_path, {"w": nnx.Param(value)}, step=0)


def test_a_hundred_containers_are_not_too_deep():
    value: Any = np.ones(1)
    for _ in range(100):
        value = (value,)
    assert isinstance(describe(value, []), Nest)
    with pytest.raises(UnsavableError):
        describe(([value],), [])


# ------------------------------------------------------------------------- shardings
def test_the_manifest_says_how_arrays_were_sharded(tmp_path):
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    placed = NamedSharding(mesh, P(("x", "y"), None))
    nnx.save(tmp_path, {"w": jax.device_put(jnp.ones((8, 2)), placed)}, step=0)
    (leaf,) = files.read_manifest(tmp_path, 0).leaves
    assert leaf.value.sharding == {
        "mesh": {"x": 2, "y": 4},
        "spec": [["x", "y"], None],
    }


def test_every_sharding_is_plain_json():
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=kinds)
    assert spec_of(None) is None
    assert spec_of(jnp.ones(1).sharding) is None
    spec = P("x", None, ("y",), P.UNCONSTRAINED)
    found = spec_of(NamedSharding(mesh, spec))
    assert json.loads(json.dumps(found)) == found
    assert found["spec"][:2] == ["x", None]
    assert "UNCONSTRAINED" in found["spec"][3]


@pytest.mark.parametrize(
    "impl", ["threefry2x32", "rbg", "unsafe_rbg", "threefry4x32", "philox4x32"]
)
def test_abstract_keys_of_every_implementation_are_restored(tmp_path, impl):
    try:
        key = jax.random.key(3, impl=impl)
    except ValueError:
        pytest.skip(f"this JAX has no {impl}")
    nnx.save(tmp_path, {"k": nnx.RngKey(key)}, step=0)
    into = {"k": nnx.RngKey(jax.eval_shape(lambda: jax.random.key(0, impl=impl)))}
    nnx.restore(tmp_path, into)
    assert str(jax.random.key_impl(into["k"].value)) == impl
    found, due = (jax.random.key_data(x) for x in (into["k"].value, key))
    assert np.array_equal(found, due)


def test_states_of_optax_are_loaded_without_a_model(tmp_path):
    """They are named tuples; MaskedNode is one without fields."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = optax.masked(optax.adam(1e-3), {"a": True, "b": False}).init(params)
    nnx.save(tmp_path, {"o": nnx.Variable(state)}, step=0)
    found = nnx.load_state(tmp_path)["o"].value
    assert jax.tree.structure(found) == jax.tree.structure(state)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_only_named_tuples_of_the_same_fields_are_made_without_a_model():
    whole = Nest("node", "optax.EmptyState", (), ())
    assert tuple_of(whole) is optax.EmptyState
    for name in ("optax.adam", "os.system", "builtins.tuple", "no.module", "optax", ""):
        assert tuple_of(whole._replace(name=name)) is None
    assert tuple_of(whole._replace(keys=("a",), children=(whole,))) is None
