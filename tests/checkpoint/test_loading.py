"""From storage to where arrays are wanted: exact numbers, right place, few reads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sortal as nnx
from models import untouched
from sortal.checkpoint.files import on
from sortal.checkpoint.loading import Want, host_value, load, wanted
from sortal.checkpoint.manifest import Manifest, Stored
from sortal.checkpoint.store import (
    CHUNK,
    Reader,
    descriptions,
    fingerprints,
    zarr_json,
)
from sortal.checkpoint.values import Array, Key, Place, describe
from sortal.errors import RestoreError


def disk(root: Path, **arrays: np.ndarray) -> Reader:
    """Arrays put on disk by TensorStore alone, of two chunks a row, and a Reader."""
    import tensorstore as ts

    found = {}
    for name, value in arrays.items():
        chunks = tuple(max(1, n // 2) for n in value.shape)
        found[name] = Stored(value.dtype.name, value.shape, chunks)
        spec = {
            "driver": "zarr3",
            "kvstore": on(root / name).spec(root / name),
            "metadata": zarr_json(found[name]),
            "store_data_equal_to_fill_value": True,
        }
        ts.open(spec, create=True).result().write(value).result()
    described = descriptions(found, ())
    for name, data in described.items():
        (root / name).write_bytes(data)
    files = fingerprints(root, found, described)
    return Reader(root, Manifest(0, "x", (), (), (), found, files, ""))


def alone(name: str, value: np.ndarray, **more: Any) -> Array:
    return Array(value.shape, value.dtype.name, place=Place(name, None), **more)


# --------------------------------------------------------------------------- wants
def test_a_live_array_asks_for_its_own_form_place_and_commitment():
    mesh = jax.make_mesh((8,), ("x",))
    to = NamedSharding(mesh, P("x"))
    second = jax.devices()[1]

    def want(value: Any, sharding: Any = None) -> Want:
        live: list[Any] = []
        described = describe(value, live)
        return wanted(("w",), described, live[0], described, sharding)

    assert want(np.ones(8, "i2"))[2:] == ("numpy", "int16", False, None, False)
    assert want(np.int16(1))[2:] == ("scalar", "int16", False, None, False)
    assert want(np.ones(8), to).sharding is None
    assert want(jnp.ones(8))[2:] == ("jax", "float32", False, None, False)
    one = jnp.asarray(1.0)
    assert want(one).weak
    weak, strong = Array((), "float32", weak=True), Array((), "float32")
    assert wanted((), weak, one, strong, None).weak
    assert not wanted((), strong, one, weak, None).weak
    assert wanted((), strong._replace(form="numpy"), one, weak, None).weak
    assert wanted((), Array((), "float16"), one, weak, None).weak
    stored, half = Array((8,), "float32"), Array((8,), "float16", "numpy")
    assert wanted((), stored, np.ones(8, "f2"), half, None).dtype == "float16"
    placed = jax.device_put(jnp.ones(8), second)
    assert want(placed)[5:] == (placed.sharding, True)
    assert want(jax.device_put(jnp.ones(8), to))[5:] == (to, True)
    assert want(placed, to)[5:] == (to, True)
    abstract = jax.ShapeDtypeStruct((8,), jnp.float32)
    assert want(abstract)[5:] == (None, False)
    assert want(abstract, to)[5:] == (to, True)


DTYPES = ("float32", "bfloat16", "int4", "bool", "complex64", "uint32", "float8_e5m2")


CASES = [(f, s) for f in ("jax", "numpy") for s in ((), (0,), (3, 0), (1,), (3, 4))]


@pytest.mark.parametrize(("form", "shape"), [*CASES, ("scalar", ())])
def test_every_form_dtype_and_shape_arrives_as_it_was(form, shape):
    for name in DTYPES:
        value = (np.arange(np.prod(shape, dtype=int)) % 2).astype(jnp.dtype(name))
        value = value.reshape(shape)
        want = Want(("w",), Array(shape, name), form, name)
        found = host_value(want, value)
        types = {"jax": jax.Array, "numpy": np.ndarray, "scalar": np.generic}
        assert isinstance(found, types[form]), name
        assert (found.shape, found.dtype) == (shape, jnp.dtype(name))
        assert np.asarray(found).tobytes() == value.tobytes()
        if form == "jax":
            assert not found.committed
        if form == "numpy":
            assert found.flags.writeable
            assert found.flags.owndata


SPECS = [P(), P("x"), P(None, "y"), P("x", "y"), P("y", "x"), P(("x", "y"))]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_shards_are_what_jax_itself_would_put_there(tmp_path, spec):
    """Of arrays read by parts, of arrays in memory, and of arrays without elements."""
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    to = NamedSharding(mesh, spec)
    value = np.arange(128, dtype=np.float32).reshape(8, 16)
    reader = disk(tmp_path, w=value)
    wants = [Want(("w",), alone("w", value), "jax", "float32", False, to, True)]
    empty = np.zeros((0, 16), np.float32)
    array = Array(empty.shape, "float32")
    wants.append(Want(("e",), array, "jax", "float32", False, to, True))
    found = load(reader, wants)
    for got, due in zip(found, (value, empty), strict=True):
        due = jax.device_put(due, to)
        assert got.sharding == due.sharding
        assert got.committed
        assert np.array_equal(got, due)
        ours = {s.device: (s.index, np.asarray(s.data)) for s in got.addressable_shards}
        for shard in due.addressable_shards:
            index, data = ours[shard.device]
            assert index == shard.index
            assert np.array_equal(data, shard.data)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_words_become_keys_that_draw_the_same_numbers(tmp_path, impl):
    keys = jax.random.split(jax.random.key(5, impl=impl), 8)
    words = np.asarray(jax.random.key_data(keys))
    reader = disk(tmp_path, k=words)
    key = Key(impl, words.shape[-1])
    array = Array(keys.shape, "uint32", key=key, place=Place("k", None))
    to = NamedSharding(jax.make_mesh((8,), ("x",)), P("x"))
    found, spread = load(
        reader,
        [
            Want(("k",), array, "jax", "uint32"),
            Want(("k",), array, "jax", "uint32", False, to, True),
        ],
    )
    due = jax.random.bits(keys[3], (4,))
    assert found.dtype == keys.dtype
    assert np.array_equal(jax.random.bits(found[3], (4,)), due)
    assert spread.sharding.is_equivalent_to(to, 1)
    assert np.array_equal(jax.random.key_data(spread), words)


# --------------------------------------------------------------------------- packs
@settings(max_examples=20)
@given(st.data())
def test_any_choice_of_a_pack_in_any_order_arrives(tmp_path_factory, data):
    """Also twice, next to each other or far apart, and where one overlaps another."""
    pack = np.arange(3000, dtype=np.uint32).view(np.uint8)
    reader = disk(tmp_path_factory.mktemp("p"), p=pack)
    spans = data.draw(
        st.lists(
            st.tuples(st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=6
        )
    )
    wants = [
        Want(
            ("w",), Array((n,), "uint32", place=Place("p", 64 * at)), "numpy", "uint32"
        )
        for at, n in spans
    ]
    for (at, n), found in zip(spans, load(reader, wants), strict=True):
        assert found.tolist() == list(range(16 * at, 16 * at + n))


def test_far_apart_arrays_of_a_pack_are_read_without_what_lies_between(tmp_path):
    """Two small reads, not one of everything."""
    pack = np.zeros(8 * CHUNK, np.uint8)
    pack[:4], pack[-4:] = 1, 2
    reader = disk(tmp_path, p=pack)
    first = Array((4,), "uint8", place=Place("p", 0))
    last = Array((4,), "uint8", place=Place("p", 8 * CHUNK - 4))
    asked = []
    read = reader.read
    reader.read = lambda name, at, into: asked.append(at) or read(name, at, into)
    found = load(reader, [Want(("w",), a, "numpy", "uint8") for a in (last, first)])
    assert [x.tolist() for x in found] == [[2] * 4, [1] * 4]
    assert asked == [(slice(0, 4),), (slice(8 * CHUNK - 4, 8 * CHUNK),)]


def test_each_part_is_read_once_however_many_devices_have_it(tmp_path):
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    value = np.arange(64, dtype=np.int32).reshape(8, 8)
    reader = disk(tmp_path, w=value)
    asked = []
    read = reader.read
    reader.read = lambda name, at, into: asked.append(at) or read(name, at, into)
    to = NamedSharding(mesh, P("x"))
    (found,) = load(
        reader, [Want(("w",), alone("w", value), "jax", "int32", False, to, True)]
    )
    assert np.array_equal(found, value)
    assert asked == [
        (slice(0, 4), slice(0, 8)),
        (slice(4, 8), slice(0, 8)),
    ]


# --------------------------------------------------------------------------- casts
def cast(value: np.ndarray, dtype: str) -> np.ndarray:
    want = Want(("w",), Array(value.shape, value.dtype.name), "numpy", dtype)
    return host_value(want, value)


FLOATS = (
    "float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2 float8_e4m3 "
    "float6_e2m3fn float4_e2m1fn float8_e8m0fnu"
).split()
INTS = "int4 uint4 int8 uint8 int16 int32 uint32 int64 uint64".split()


def test_every_number_type_is_cast_to_every_other_of_its_sort():
    for names in (FLOATS, INTS):
        for of, to in itertools.product(names, names):
            value = np.array([1, 2, 4]).astype(jnp.dtype(of))
            assert cast(value, to).astype(float).tolist() == [1, 2, 4], (of, to)


@given(
    st.sampled_from(FLOATS),
    st.sampled_from(["float64", "float32", "bfloat16", "float8_e5m2"]),
    st.floats(allow_nan=True, allow_infinity=True, width=32),
)
def test_floats_are_rounded_or_refused_and_never_become_another_sort(to, of, number):
    """NaN stays NaN, infinity infinity; and what is larger than the largest is none."""
    with np.errstate(all="ignore"):
        value = np.array([number]).astype(jnp.dtype(of))
        # By way of the widest, since ml_dtypes has no casts between some of its types.
        new = value.astype(np.float64).astype(jnp.dtype(to))
    exact, near = float(value[0]), float(new[0])
    largest = {"float6_e2m3fn": 7.5, "float4_e2m1fn": 6.0}.get(to, np.inf)
    if np.isnan(exact) or np.isinf(exact):
        fits = repr(exact).strip("-") == repr(near).strip("-")
    else:
        fits = np.isfinite(near) and abs(exact) <= largest
    if fits:
        assert cast(value, to).tobytes() == new.tobytes()
    else:
        with pytest.raises(RestoreError, match=rf"1 numbers that {to} cannot hold, su"):
            cast(value, to)


@given(st.sampled_from(INTS), st.sampled_from(INTS), st.data())
def test_integers_are_the_same_integers_or_refused(to, of, data):
    low, high = int(jnp.iinfo(of).min), int(jnp.iinfo(of).max)
    number = data.draw(st.integers(low, high))
    value = np.array([number]).astype(jnp.dtype(of))
    assert int(value[0]) == number
    if int(jnp.iinfo(to).min) <= number <= int(jnp.iinfo(to).max):
        assert int(cast(value, to)[0]) == number
    else:
        with pytest.raises(RestoreError, match=f"w has 1 numbers that {to} cannot"):
            cast(value, to)


def test_complex_numbers_are_cast_by_their_parts():
    value = np.array([1e30 + 1j, complex(np.inf, -1), 3e38 + 3e38j])
    found = cast(value, "complex64")
    assert found.dtype == np.complex64
    assert found.tolist() == value.astype(np.complex64).tolist()
    with pytest.raises(RestoreError, match="2 numbers that complex64 cannot hold"):
        cast(np.array([1e300 + 0j, 1e300j, 1]), "complex64")


def test_one_number_that_does_not_fit_spoils_no_other_and_is_counted():
    value = np.array([1, 300, -1, 127, 128], np.int64)
    with pytest.raises(RestoreError, match="2 numbers that int8 cannot hold, such"):
        cast(value, "int8")


# --------------------------------------------------------------------- as restore does
def test_cast_converts_numbers_or_says_that_it_cannot(tmp_path):
    nnx.save(
        tmp_path,
        {"f": nnx.Param(jnp.array([1 / 3, 2.0])), "i": nnx.Cache(jnp.array([1, 300]))},
        step=0,
    )
    into = {
        "f": nnx.Param(jnp.zeros(2, jnp.bfloat16)),
        "i": nnx.Cache(jnp.zeros(2, jnp.int16)),
    }
    nnx.restore(tmp_path, into, cast=True)
    assert jnp.array_equal(into["f"].value, jnp.array([1 / 3, 2.0], jnp.bfloat16))
    assert into["i"].value.tolist() == [1, 300]
    assert into["i"].value.dtype == jnp.int16
    into["i"].value = jnp.zeros(2, jnp.int8)
    with untouched(into), pytest.raises(RestoreError, match="1 numbers that int8 cann"):
        nnx.restore(tmp_path, into, cast=True)
    into["i"].value = jnp.zeros(2, jnp.float32)
    with pytest.raises(RestoreError, match="dtype: i"):
        nnx.restore(tmp_path, into, cast=True)


def test_a_float_that_would_become_infinite_is_refused(tmp_path):
    nnx.save(tmp_path, {"x": nnx.Param(jnp.array([1e30, jnp.inf]))}, step=0)
    with pytest.raises(RestoreError, match="1 numbers that float16 cannot hold, such"):
        nnx.restore(tmp_path, {"x": nnx.Param(jnp.zeros(2, jnp.float16))}, cast=True)


def test_restored_arrays_can_be_donated(tmp_path):
    nnx.save(tmp_path, {"x": nnx.Param(jnp.ones(1_200_000))}, step=0)
    x = nnx.load_state(tmp_path)["x"].value
    pointer = x.unsafe_buffer_pointer()
    y = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert x.is_deleted()
    assert y.unsafe_buffer_pointer() == pointer


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (P("x"), "w: (7, 3) cannot be split so: "),
        (P(None, None, None), "is for 3 axes, and the shape is (7, 3)"),
        (P("y"), "does not fit the mesh; the model was left as it was: "),
        ("x", "w: 'x', of the type str"),
        (5, "w: 5, of the type int"),
        (jax.devices()[0], "Device"),
    ],
    ids=str,
)
def test_a_sharding_that_does_not_fit_is_refused_before_anything_is_read(
    tmp_path, given, message
):
    nnx.save(tmp_path, {"w": nnx.Param(jnp.ones((7, 3)))}, step=1)
    into = {"w": nnx.Param(jnp.zeros((7, 3)))}
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        for read in (
            lambda: nnx.restore(tmp_path, into, sharding=given),
            lambda: nnx.load_state(tmp_path, sharding=given),
        ):
            with pytest.raises(RestoreError) as caught:
                read()
            assert message in str(caught.value)
    assert not into["w"].value.any()
