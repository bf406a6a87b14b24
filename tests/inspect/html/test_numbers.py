"""Facts about numbers are those that NumPy gives for the whole array at once."""

from __future__ import annotations

import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sortal.checkpoint.values import DTYPES, numpy_dtype
from sortal.inspect.html.numbers import BINS, Gap, Numbers, gap, host, numbers

FLOATS = hnp.arrays(
    st.sampled_from([np.float16, np.float32, np.float64]),
    hnp.array_shapes(max_dims=3, max_side=6, min_dims=0),
    elements=st.floats(width=16),
)


def found(x) -> Numbers:
    got = numbers([np.asarray(x)])
    assert got is not None
    return got


@given(FLOATS)
def test_floats_are_counted_as_numpy_counts_them(x):
    got, finite = found(x), x[np.isfinite(x)].astype(np.float64)
    assert got.count == x.size
    assert got.zeros == (x == 0).sum()
    assert got.nans == np.isnan(x).sum()
    assert got.infinities == np.isinf(x).sum()
    if not finite.size:
        assert (got.low, got.high, got.mean, got.std, got.bins) == (*[None] * 4, ())
        return
    assert (got.low, got.high) == (finite.min(), finite.max())
    assert got.mean is not None
    assert got.std is not None
    assert math.isclose(got.mean, finite.mean(), rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(got.std, finite.std(), rel_tol=1e-6, abs_tol=1e-6)
    assert sum(got.bins) == finite.size


def test_a_histogram_of_many_blocks_is_that_of_numpy():
    x = np.random.default_rng(0).normal(size=200_000)
    x[:5] = np.nan, np.inf, -np.inf, 0.0, -0.0
    finite = x[np.isfinite(x)]
    got = found(x)
    expected, _ = np.histogram(finite, BINS)
    assert np.abs(np.array(got.bins) - expected).max() <= 1  # edges are rounded
    assert (got.zeros, got.nans, got.infinities) == (2, 1, 2)


@given(
    st.sampled_from(["int8", "uint16", "int32", "int64", "uint64"]).flatmap(
        lambda d: hnp.arrays(d, hnp.array_shapes(max_dims=2, min_dims=0))
    )
)
def test_extremes_of_integers_are_exact_and_few_values_have_a_bin_each(x):
    got = found(x)
    assert (got.low, got.high) == (int(x.min()), int(x.max()))
    assert isinstance(got.low, int)
    assert sum(got.bins) == x.size
    if int(x.max()) - int(x.min()) < BINS and abs(int(x.max())) < 1 << 50:
        low = int(x.min())
        assert got.bins == tuple((x == low + n).sum() for n in range(len(got.bins)))


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_that_can_be_stored_is_counted(name):
    x = np.array([0, 1, 1]).astype(numpy_dtype(name))
    got = found(x)
    wide = x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)
    numeric = np.abs(wide[~np.isnan(wide)])
    assert got.count == 3
    assert (got.low, got.high) == (numeric.min(), numeric.max())
    assert got.nans == np.isnan(wide).sum()


def test_the_largest_and_the_smallest_floats_have_bins():
    big = found([np.finfo(float).max, -np.finfo(float).max])
    assert (big.bins[0], big.bins[-1], big.std) == (1, 1, None)
    small = found([0.0, 5e-324])
    assert (small.bins[0], small.bins[-1]) == (1, 1)


def test_what_is_empty_or_no_number_has_no_facts():
    assert numbers([np.zeros((0, 3))]) is None
    assert numbers([np.array(["a"]), np.array(b"x")]) is None


def test_little_memory_is_used_beside_the_array():
    x = np.ones((2000, 1000), np.float32).T
    tracemalloc.start()
    numbers([x])
    gap(x.T, x.T + 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000  # of which the sum is eight


def test_the_host_has_arrays_of_all_devices_and_jax_keeps_no_copy():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("data")))
    assert (host(x) == np.arange(16.0)).all()
    assert x._npy_value is None  # type: ignore[attr-defined]


def test_keys_texts_and_objects_can_be_compared():
    key = jax.random.key(3)
    assert (host(key) == np.asarray(jax.random.key_data(key))).all()
    assert host("abc").tobytes() == np.array("abc").tobytes()
    assert host({1}).item() == "{1}"
    assert host(1 << 100).item() == str(1 << 100)


@given(FLOATS, st.data())
def test_the_gap_between_two_arrays_is_that_of_numpy(x, data):
    y = x.copy()
    if x.size and data.draw(st.booleans()):
        y.reshape(-1)[data.draw(st.integers(0, x.size - 1))] = data.draw(
            st.floats(width=16)
        )
    got = gap(x, y)
    if x.tobytes() == y.tobytes():
        assert got is None
        return
    assert got is not None
    with np.errstate(all="ignore"):
        apart = np.atleast_1d(np.abs(x.astype(float) - y.astype(float)))
    apart[(x == y) | (np.isnan(x) & np.isnan(y))] = 0
    assert got.largest == np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max()
    assert got.share == 1 / x.size


def test_gaps_of_other_dtypes():
    nan = np.array([np.nan, 1.0])
    assert gap(nan, np.array([0.0, 1.0])) == Gap(np.inf, 0.5)
    assert gap(nan, nan.copy()) is None
    one, two = (np.array([1, n]).astype("bfloat16") for n in (2, 3))
    assert gap(one, two) == Gap(1.0, 0.5)
    assert gap(np.array([1 + 1j]), np.array([1 - 1j])) == Gap(2.0, 1.0)
    assert gap(np.array([True]), np.array([False])) == Gap(1.0, 1.0)
    texts = gap(np.array(["a", "b"]), np.array(["a", "c"]))
    assert texts is not None
    assert math.isnan(texts.largest)
    assert texts.share == 0.5
