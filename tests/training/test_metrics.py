"""Metrics: the numbers of Flax, eager and jitted; refusals; nothing half-updated."""

from __future__ import annotations

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from hypothesis import strategies as st

import sortal as nnx
from sortal.errors import ArgumentError
from sortal.training.metrics import (
    Accuracy,
    Average,
    Metric,
    MetricState,
    MultiMetric,
    Statistics,
    Welford,
)

rng = np.random.default_rng(0)
VALUES = [
    jnp.asarray(rng.normal(size=(3, 5)), jnp.float32),
    2.5,
    jnp.arange(4),
    3,
    jnp.float32(-1.0),
    rng.normal(size=6).astype(np.float32),
]
LOGITS = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
LABELS = jnp.asarray(rng.integers(0, 4, size=6), jnp.int32)
MASK = jnp.array([1, 0, 1, 1, 0, 1], bool)


def equal(xs, ys):
    xs, ys = jax.tree.leaves(xs), jax.tree.leaves(ys)
    for x, y in zip(xs, ys, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def shared(mine, theirs):
    """Our Variables that Flax's metric has too."""
    names = flax_nnx.state(theirs)
    return nnx.state(mine, lambda path, _: path[0] in names)


@pytest.mark.parametrize("name", ["Average", "Welford"])
def test_eager_numbers_are_those_of_flax_at_every_update(name):
    mine = getattr(nnx.metrics, name)("loss")
    theirs = getattr(flax_nnx.metrics, name)("loss")
    for _ in range(2):
        equal(mine.compute(), theirs.compute())
        for value in VALUES:
            mine.update(loss=value, other="ignored")
            theirs.update(loss=value, other="ignored")
            equal(mine.compute(), theirs.compute())
        mine.reset()
        theirs.reset()
    equal(shared(mine, theirs), flax_nnx.state(theirs))


@pytest.mark.parametrize("name", ["Average", "Welford"])
def test_jitted_numbers_are_those_of_flax(name):
    def run(lib):
        metric = getattr(lib.metrics, name)()
        step = lib.jit(lambda metric, x: metric.update(values=x))
        for x in VALUES[::2]:
            step(metric, x)
        before = metric.compute()
        lib.jit(lambda metric: metric.reset())(metric)
        return before, metric.compute()

    equal(run(nnx), run(flax_nnx))


def test_updates_of_equal_shape_compile_once():
    traces = []

    @nnx.jit
    def step(metric, x):
        traces.append(1)
        metric.update(values=x)

    metric = Average()
    for _ in range(3):
        step(metric, VALUES[0])
    assert len(traces) == 1
    assert int(metric.count) == 45


@pytest.mark.parametrize("dtype", [bool, jnp.int32, jnp.float32])
def test_a_mask_of_the_values_shape_gives_the_numbers_of_flax(dtype):
    mine, theirs = nnx.metrics.Average(), flax_nnx.metrics.Average()
    for values in (jnp.arange(6), jnp.asarray(rng.normal(size=6), jnp.float32)):
        mine.update(mask=MASK.astype(dtype), values=values)
        theirs.update(mask=MASK.astype(dtype), values=values)
        equal(mine.compute(), theirs.compute())


def test_a_mask_that_is_broadcast_counts_every_value_it_covers():
    values = jnp.arange(6.0).reshape(3, 2)
    average = Average()
    average.update(values=values, mask=jnp.array([[True], [False], [True]]))
    assert float(average.compute()) == float((0 + 1 + 4 + 5) / 4)


def test_an_average_may_be_given_a_variable():
    average = Average()
    average.update(values=nnx.Param(jnp.array([1.0, 2.0])))
    assert float(average.compute()) == 1.5


@pytest.mark.parametrize("dtype", [jnp.int32, np.int64])
@pytest.mark.parametrize("mask", [None, MASK])
def test_accuracy_of_many_classes_is_that_of_flax(dtype, mask):
    labels = np.asarray(LABELS).astype(dtype)
    more = {} if mask is None else {"mask": mask}
    mine, theirs = nnx.metrics.Accuracy(), flax_nnx.metrics.Accuracy()
    for metric in (mine, theirs):
        for logits in (LOGITS, -LOGITS):
            metric.update(logits=logits, labels=labels, loss=1.0, **more)
    equal(mine.compute(), theirs.compute())
    equal(shared(mine, theirs), flax_nnx.state(theirs))


@pytest.mark.parametrize("threshold", [0.0, 0.5, -1.0])
def test_accuracy_of_two_classes_is_that_of_flax(threshold):
    mine = nnx.metrics.Accuracy(threshold=threshold)
    theirs = flax_nnx.metrics.Accuracy(threshold=threshold)
    for metric in (mine, theirs):
        metric.update(logits=LOGITS[:, 0], labels=LABELS)
        metric.update(logits=LOGITS[:, 1], labels=LABELS, mask=MASK)
    equal(mine.compute(), theirs.compute())


def test_accuracy_takes_small_integers_as_labels_and_another_argname():
    accuracy = Accuracy(None, "hits")
    accuracy.update(logits=LOGITS, labels=LABELS.astype(jnp.uint8))
    plain = Accuracy()
    plain.update(logits=LOGITS, labels=LABELS)
    equal(accuracy.compute(), plain.compute())


def multi(lib):
    return lib.MultiMetric(
        accuracy=lib.metrics.Accuracy(),
        loss=lib.metrics.Average("loss"),
        spread=lib.metrics.Welford("loss"),
    )


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_several_metrics_give_the_numbers_of_flax(jit):
    def run(lib):
        def update(metrics, logits, labels, loss, mask):
            metrics.update(
                logits=logits, labels=labels, loss=loss, mask={"accuracy": mask}
            )

        update = lib.jit(update) if jit else update
        metrics = multi(lib)
        for loss in (jnp.arange(4.0), jnp.ones(2)):
            update(metrics, LOGITS, LABELS, loss, MASK)
        found = metrics.compute()
        metrics.reset()
        return found, metrics.compute()

    mine, theirs = run(nnx), run(flax_nnx)
    assert list(mine[0]) == ["accuracy", "loss", "spread"]
    equal(mine, theirs)


def test_one_mask_goes_to_all_metrics():
    metrics = MultiMetric(accuracy=Accuracy(), loss=Average("loss"))
    loss = jnp.arange(6.0)
    metrics.update(logits=LOGITS, labels=LABELS, loss=loss, mask=MASK)
    found = metrics.compute()
    assert float(found["loss"]) == float(loss[MASK].mean())
    assert int(metrics.accuracy.count) == 4


def test_metrics_hold_metric_state_and_can_be_split():
    metrics = multi(nnx)
    graphdef, state = metrics.split(MetricState)
    assert set(state.schema.kinds) == {MetricState}
    assert state.paths()[0] == ("accuracy", "count")
    assert isinstance(nnx.merge(graphdef, state), MultiMetric)


def test_statistics_are_a_pytree():
    welford = Welford()
    welford.update(values=jnp.arange(4.0))
    found = nnx.jit(lambda w: w.compute())(welford)
    assert isinstance(found, Statistics)
    assert len(jax.tree.leaves(found)) == 3
    np.testing.assert_allclose(found.standard_deviation, np.arange(4.0).std())


# ------------------------------------------------------------------- refusals
@pytest.mark.parametrize("metric", [Average("loss"), Welford("loss")])
def test_a_missing_keyword_is_named_with_what_was_given(metric):
    name = type(metric).__name__
    with pytest.raises(
        ArgumentError, match=rf"{name}\.update needs .*'loss'; found 'los'"
    ):
        metric.update(los=1.0)
    with pytest.raises(
        ArgumentError, match=r"found nothing\. Write update\(loss=\.\.\."
    ):
        metric.update()
    with pytest.raises(
        ArgumentError, match=r"as 'loss'; found a list\. Write loss=jnp"
    ):
        metric.update(loss=[1.0])


def test_a_mask_with_a_number_is_refused():
    with pytest.raises(ArgumentError, match=r"found the number 1\.0"):
        Average().update(values=1.0, mask=jnp.array(True))


def test_a_mask_that_does_not_broadcast_is_refused():
    with pytest.raises(
        ArgumentError, match=r"mask, bool\[6\], .* values, float32\[4\]"
    ):
        Average().update(values=jnp.ones(4), mask=MASK)


def test_a_mask_is_refused_where_it_would_be_ignored():
    with pytest.raises(ArgumentError, match=r"Welford\.update takes no mask"):
        Welford().update(values=jnp.ones(6), mask=MASK)


@pytest.mark.parametrize("threshold", ["0.5", True, jnp.float32(0.5)])
def test_a_threshold_that_is_no_number_is_refused(threshold):
    with pytest.raises(ArgumentError, match="threshold must be a Python number"):
        Accuracy(threshold=threshold)


@pytest.mark.parametrize(
    ("threshold", "logits", "labels", "text"),
    [
        (None, (6, 4), (6, 4), "one axis, the classes, more than .*not one-hot"),
        (None, (6, 4), (5,), r"logits float32\[6,4\] and labels int32\[5\]"),
        (None, (), (), "one axis, the classes, more"),
        (0.5, (6, 4), (6,), "the shape of the labels.*leave the threshold out"),
        (0.5, (6,), (1,), "the shape of the labels"),
    ],
)
def test_shapes_that_do_not_fit_are_shown(threshold, logits, labels, text):
    with pytest.raises(ArgumentError, match=text):
        Accuracy(threshold).update(
            logits=jnp.ones(logits), labels=jnp.ones(labels, jnp.int32)
        )


def test_labels_that_are_no_integers_are_refused():
    with pytest.raises(ArgumentError, match=r"integers; found float32\[6\]"):
        Accuracy().update(logits=LOGITS, labels=jnp.ones(6))
    with pytest.raises(ArgumentError, match="needs the keyword 'labels'"):
        Accuracy().update(logits=LOGITS)


def test_names_of_methods_and_values_that_are_no_metrics_are_all_refused():
    with pytest.raises(ArgumentError) as caught:
        MultiMetric(update=Average(), loss=1.0, fine=Average())
    assert "update: the name of a method" in str(caught.value)
    assert "loss: a float, not a Metric" in str(caught.value)
    assert "fine" not in str(caught.value)


def test_a_mask_for_no_metric_is_refused():
    metrics = MultiMetric(loss=Average())
    with pytest.raises(ArgumentError, match="the mask 'lost'; there are 'loss'"):
        metrics.update(values=jnp.ones(2), mask={"lost": jnp.ones(2)})


def test_a_refusal_by_one_metric_leaves_all_as_they_were():
    metrics = MultiMetric(a=Average("a"), b=Average("b"))
    metrics.update(a=1.0, b=2.0)
    before = nnx.state(metrics).values_list()
    with pytest.raises(ArgumentError, match="needs the keyword 'b'"):
        metrics.update(a=5.0)
    after = nnx.state(metrics).values_list()
    assert all(x is y for x, y in zip(before, after, strict=True))


def test_a_metric_of_ones_own_must_define_its_methods():
    class Bare(Metric):
        pass

    for method in ("reset", "update", "compute"):
        with pytest.raises(NotImplementedError, match=rf"Bare .* define {method}\(\)"):
            getattr(Bare(), method)()


# ---------------------------------------------------- against NumPy in float64
DTYPES = ["float32", "bfloat16", "float16", "int8", "int32", "bool"]
MASKS = ["none", "bool", "int32", "float32", "bfloat16", "float16"]
batches = st.lists(
    st.tuples(
        st.sampled_from([0, 5]),  # each shape is compiled anew
        st.just(3),
        st.sampled_from(DTYPES),
        st.sampled_from(MASKS),
        st.booleans(),
        st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=4,
)


def drawn(rows, columns, dtype, mask, across, seed):
    """Values, a mask or None, and both in float64; NaN where the mask is zero."""
    r = np.random.default_rng(seed)
    values = np.asarray(jnp.asarray(r.normal(size=(rows, columns)) * 3, dtype))
    shape = (rows, 1) if across else (rows, columns)
    if mask == "none":
        return values, None, values.astype(np.float64), np.ones(values.shape)
    weights = r.integers(0, 3, size=shape) / (4 if "float" in mask else 1)
    weights = np.asarray(jnp.asarray(weights, mask))
    wide = np.broadcast_to(weights.astype(np.float64), values.shape)
    exact = values.astype(np.float64)
    if "float" in dtype:
        values = np.where(wide == 0, np.asarray(np.nan, values.dtype), values)
    return values, weights, exact, wide


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(batches=batches)
def test_the_average_is_that_of_float64_for_any_mask_weights_and_dtype(batches):
    average = Average("x")
    total, weight, scale = 0.0, 0.0, 0.0
    for batch in batches:
        values, mask, exact, wide = drawn(*batch)
        average.update(x=jnp.asarray(values), mask=mask)
        total += (exact * wide).sum()
        scale += (abs(exact) * wide).sum()
        weight += wide.sum()
    found = float(average.compute())
    if weight == 0:
        assert np.isnan(found)
    else:
        assert abs(found - total / weight) <= 1e-5 * scale / weight + 1e-7


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(batches=batches)
def test_mean_and_deviation_are_those_of_float64_for_any_dtype(batches):
    welford = Welford("x")
    seen = []
    for rows, columns, dtype, _, across, seed in batches:
        values, *_ = drawn(rows, columns, dtype, "none", across, seed)
        welford.update(x=jnp.asarray(values))
        seen.append(values.astype(np.float64).ravel())
    every = np.concatenate(seen)
    found = welford.compute()
    if every.size:
        np.testing.assert_allclose(found.mean, every.mean(), atol=1e-5)
        np.testing.assert_allclose(found.standard_deviation, every.std(), atol=1e-5)
        error = every.std() / every.size**0.5
        np.testing.assert_allclose(found.standard_error_of_mean, error, atol=1e-5)
    else:
        assert float(found.mean) == 0
        assert np.isnan(found.standard_deviation)


def test_fractional_weights_are_weights():
    average = Average()
    average.update(values=jnp.array([1.0, 3.0]), mask=jnp.array([0.5, 0.25]))
    assert float(average.compute()) == np.float32(1.25 / 0.75)


def test_a_value_that_is_masked_may_be_nan():
    average = Average()
    average.update(values=jnp.array([1.0, jnp.nan]), mask=jnp.array([True, False]))
    assert float(average.compute()) == 1.0
    average.update(values=jnp.array([jnp.nan]))
    assert np.isnan(average.compute()), "one that counts may not"


def test_every_value_under_a_mask_of_bfloat16_is_counted():
    average = Average()
    mask = jnp.ones(1000, jnp.bfloat16)
    for _ in range(3):
        average.update(values=jnp.ones(1000), mask=mask)
    assert int(average.count.value) == 3000
    assert float(average.compute()) == 1.0


def test_a_mask_that_is_not_finite_gives_nan():
    for bad in (jnp.nan, jnp.inf):
        average = Average()
        average.update(values=jnp.ones(2), mask=jnp.array([1.0, bad]))
        assert np.isnan(average.compute())


def test_an_empty_batch_changes_nothing():
    welford = Welford()
    for batch in (jnp.zeros(0), jnp.array([1.0, 3.0]), jnp.zeros((0, 4))):
        welford.update(values=batch)
    assert float(welford.compute().mean) == 2.0
    assert float(welford.compute().standard_deviation) == 1.0


@pytest.mark.parametrize("metric", [Average, Welford, Accuracy])
def test_complex_values_and_masks_are_refused(metric):
    for name in ("logits",) if metric is Accuracy else ("values",):
        given = {name: jnp.ones((2, 2), complex), "labels": jnp.zeros(2, int)}
        with pytest.raises(ArgumentError, match=r"real numbers .* complex64\[2,2\]"):
            metric().update(**given)
    with pytest.raises(ArgumentError, match=r"mask .* real numbers.*complex64\[2\]"):
        Average().update(values=jnp.ones(2), mask=jnp.ones(2, complex))


def test_fractional_weights_add_up_under_jit_and_after_a_reset():
    average = Average()
    step = nnx.jit(lambda m, v, w: m.update(values=v, mask=w))
    for _ in range(10):
        step(average, jnp.array([2.0, 4.0]), jnp.array([0.3, 0.9]))
    assert int(average.count.value) == 12
    np.testing.assert_allclose(average.compute(), 3.5, rtol=1e-6)
    average.reset()
    assert np.isnan(average.compute())
    average.update(values=jnp.ones(1))
    assert float(average.compute()) == 1.0


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("mask", [None, np.array([0.0, 1.0, 2.0, 0.5])])
@pytest.mark.parametrize("dtype", [np.float64, np.int64, bool])
def test_values_of_numpys_own_dtypes_are_taken_without_a_warning(x64, mask, dtype):
    with jax.enable_x64(x64):
        values = np.array([0, 1, 1, 0], dtype)
        average, welford = Average(), Welford()
        average.update(values=values, mask=mask)
        welford.update(values=values)
        assert average.compute() == (0.5 if mask is None else np.float32(3 / 3.5))
        assert welford.compute().mean == welford.compute().standard_deviation == 0.5
        kept = [x.dtype for x in jax.tree.leaves((average, welford))]
        assert set(map(str, kept)) == {"float32", "int32"}


@pytest.mark.parametrize("mask", [None, jnp.ones(3)])
def test_more_values_than_can_be_counted_give_nan_until_a_reset(mask):
    average, welford = nnx.metrics.Average(), nnx.metrics.Welford()
    for metric in (average, welford):
        metric.update(values=1.0)
        metric.count.value = jnp.array(2**31 - 4, jnp.int32)
    average.total.value = average.count.value.astype(jnp.float32)
    for _ in range(2):
        average.update(values=jnp.ones(3), mask=mask)
        welford.update(values=jnp.ones(3))
        if int(average.count.value) == 2**31 - 1:
            assert average.compute() == welford.compute().mean == 1
    assert np.isnan(average.compute())
    assert np.isnan(jax.tree.leaves(welford.compute())).all()
    average.update(values=1.0)
    assert np.isnan(average.compute())
    for metric in (average, welford):
        metric.reset()
        metric.update(values=jnp.ones(3))
    assert average.compute() == welford.compute().mean == 1
