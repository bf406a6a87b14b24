"""EMA: the numbers of Flax, buffers of its own, a model that follows, refusals."""

from __future__ import annotations

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from hypothesis import strategies as st

from sortal import nnx
from sortal.errors import ArgumentError, FilterError, TraceError, UpdateError

KERNEL = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)


def make(lib, dtype=jnp.float32):
    class Layer(lib.Module):
        def __init__(self, kernel):
            self.kernel = lib.Param(jnp.asarray(kernel, dtype))
            self.bias = lib.Param(jnp.zeros(2, dtype))

    class Net(lib.Module):
        def __init__(self):
            self.layers = lib.List([Layer(KERNEL), Layer(2 * KERNEL)])
            self.mean = lib.BatchStat(jnp.ones(2, dtype))

    return Net()


def train(lib, model, step):
    for layer in model.layers:
        layer.kernel[...] = layer.kernel[...] * (1 + 0.1 * step)
        layer.bias[...] = layer.bias[...] + 0.3
    model.mean[...] = model.mean[...] * 0.7


def equal(xs, ys):
    for x, y in zip(jax.tree.leaves(xs), jax.tree.leaves(ys), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("decay", [0.9, 0.999, 0, 1.0])
@pytest.mark.parametrize("only", ["all", "params"])
def test_the_average_in_float32_is_that_of_flax_bit_for_bit(decay, only):
    mine, theirs = make(nnx), make(flax_nnx)
    chosen = {} if only == "all" else {"only": nnx.Param}
    ema = nnx.EMA(mine, decay, **chosen)
    chosen = {} if only == "all" else {"only": flax_nnx.Param}
    reference = flax_nnx.EMA(theirs, decay, **chosen)
    for step in range(4):
        train(nnx, mine, step)
        train(flax_nnx, theirs, step)
        ema.update(mine)
        reference.update(theirs)
        equal(ema.params, reference.params)
    equal(nnx.state(ema.apply_to(mine)), flax_nnx.state(reference.apply_to(theirs)))


def test_the_average_under_jit_is_that_of_flax_bit_for_bit():
    def run(lib):
        model = make(lib)
        ema = lib.EMA(model, 0.9)

        @lib.jit
        def step(model, ema):
            train(lib, model, 1)
            ema.update(model)

        for _ in range(3):
            step(model, ema)
        return ema.params

    equal(run(nnx), run(flax_nnx))


def test_a_decay_that_is_an_array_averages_in_the_dtype_of_the_leaf():
    model = make(nnx, jnp.bfloat16)
    ema = nnx.EMA(model, jnp.float32(0.5), only=nnx.Param)
    train(nnx, model, 1)
    ema.update(model)
    bias = ema.params.layers[0].bias.value
    assert bias.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(bias, np.float32), 0.15, rtol=1e-2)


def test_params_have_the_kinds_paths_and_metadata_of_the_model():
    model = make(nnx)
    model.layers[0].kernel.set_metadata(spec=("x",))
    ema = nnx.EMA(model, 0.9, only=nnx.Param)
    assert ema.params.schema is nnx.state(model, nnx.Param).schema
    assert ema.params.layers[0].kernel.get_metadata() == {"spec": ("x",)}
    paths = nnx.state(ema, nnx.Param).paths()
    assert paths[0] == ("params", "layers", 0, "bias")


def test_no_buffer_is_shared_with_the_model_at_any_time():
    model = make(nnx)
    ema = nnx.EMA(model, 1.0)
    for _ in range(2):
        mine = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(model)}
        kept = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(ema)}
        assert not mine & kept
        ema.update(model)


def test_the_average_outlives_a_donated_model():
    model = make(nnx)
    ema = nnx.EMA(model, 0.5)
    step = nnx.jit(lambda model: train(nnx, model, 1), donate_argnums=0)
    old = model.layers[0].kernel.value
    step(model)
    assert old.is_deleted()
    ema.update(model)
    assert np.isfinite(np.asarray(ema.params.layers[0].kernel.value)).all()


def test_values_in_numpy_are_copied():
    class Raw(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(np.ones(2, np.float32))

    model = Raw()
    ema = nnx.EMA(model, 0.5)
    model.w.value[:] = 5
    assert ema.params.w.value.tolist() == [1.0, 1.0]
    ema.update(model)
    assert ema.params.w.value.tolist() == [3.0, 3.0]


def test_a_small_pytree_in_one_variable_is_averaged_leaf_by_leaf():
    class Pair(nnx.Module):
        def __init__(self):
            self.w = nnx.Param((jnp.ones(2), jnp.zeros(3)))

    model = Pair()
    ema = nnx.EMA(model, 0.5)
    model.w.value = (jnp.zeros(2), jnp.ones(3))
    ema.update(model)
    assert [x.tolist() for x in ema.params.w.value] == [[0.5] * 2, [0.5] * 3]


def test_a_list_of_filters_is_any_of_them():
    ema = nnx.EMA(make(nnx), 0.5, only=[nnx.Param, nnx.BatchStat])
    assert len(ema.params.paths()) == 5
    ema.update(make(nnx))


def test_update_takes_a_state_or_nested_dict_as_well():
    model = make(nnx)
    one, two, three = (nnx.EMA(model, 0.9, only=nnx.Param) for _ in range(3))
    train(nnx, model, 1)
    one.update(model)
    two.update(nnx.state(model))
    three.update({"layers": nnx.state(model)["layers"]})
    equal(one.params, two.params)
    equal(one.params, three.params)


# -------------------------------------------------------------------- apply_to
def test_the_averaged_model_shares_variables_and_follows_updates():
    model = make(nnx)
    ema = nnx.EMA(model, 0.5, only=nnx.Param)
    averaged = ema.apply_to(model)
    assert averaged.layers[1].kernel is ema.params.layers[1].kernel
    assert averaged.mean is not model.mean
    train(nnx, model, 1)
    before = averaged.layers[0].bias.value
    ema.update(model)
    assert not np.array_equal(before, averaged.layers[0].bias.value)
    assert averaged.mean.value.tolist() == [1.0, 1.0]
    assert ema.apply_to(model).mean.value is model.mean.value


def test_the_averaged_model_keeps_following_when_updates_are_jitted():
    model = make(nnx)
    ema = nnx.EMA(model, 0.5, only=nnx.Param)
    averaged = ema.apply_to(model)

    @nnx.jit
    def step(model, ema):
        train(nnx, model, 1)
        ema.update(model)

    step(model, ema)
    assert averaged.layers[0].bias is ema.params.layers[0].bias
    np.testing.assert_allclose(averaged.layers[0].bias.value, 0.15, rtol=1e-6)


def test_the_model_is_left_as_it_was():
    model = make(nnx)
    ema = nnx.EMA(model, 0.5)
    before = nnx.state(model).values_list()
    graphdef = nnx.graphdef(model)
    train(nnx, model, 1)
    trained = nnx.state(model).values_list()
    ema.update(model)
    ema.apply_to(model)
    assert nnx.graphdef(model) is graphdef
    after = nnx.state(model).values_list()
    assert all(a is b for a, b in zip(trained, after, strict=True))
    assert not any(a is b for a, b in zip(before, after, strict=True))


def test_apply_to_works_inside_jit():
    model = make(nnx)
    ema = nnx.EMA(model, 0.5, only=nnx.Param)
    total = nnx.jit(lambda e, m: e.apply_to(m).layers[0].kernel.value.sum())
    np.testing.assert_allclose(total(ema, model), KERNEL.sum(), rtol=1e-5)


def test_a_shared_parameter_is_averaged_once_and_stays_shared():
    class Tied(nnx.Module):
        def __init__(self):
            self.a = nnx.Param(jnp.ones(2))
            self.b = self.a

    model = Tied()
    ema = nnx.EMA(model, 0.5)
    averaged = ema.apply_to(model)
    assert averaged.a is averaged.b
    assert ema.params.paths() == (("a",),)


def test_without_a_filter_keys_and_counts_are_the_model_s_own():
    class Net(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
            self.seen = nnx.Variable(jnp.array(0))

        def __call__(self, x):
            self.seen[...] += 1
            return self.drop(self.norm(self.layer(x)))

    def average(model, **options):
        ema = nnx.EMA(model, 0.5, **options)
        for _ in range(2):
            nnx.jit(lambda m, e: (m(jnp.ones((3, 2))), e.update(m)))(model, ema)
        return ema

    chosen = average(Net(), only=(nnx.Param, nnx.BatchStat))
    model = Net()
    ema = average(model)
    equal(ema.params, chosen.params)
    new = ema.apply_to(model)
    assert int(new.seen.value) == int(new.drop.rngs.count.value) == 2
    x = jnp.ones((3, 2))
    assert bool(((new(x) == 0) == (model(x) == 0)).all())


def test_without_a_filter_a_raw_array_that_could_be_averaged_is_refused():
    model = make(nnx)
    model.raw, model.places = jnp.ones(2), jnp.arange(2)
    with pytest.raises(FilterError, match=r"only=Dtyped\(inexact\) takes") as caught:
        nnx.EMA(model, 0.9)
    assert "raw (unlabelled array): float32[2]" in str(caught.value)
    assert "places" not in str(caught.value)


# ------------------------------------------------------------------- refusals
@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan"), 99])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ArgumentError, match="is not a share from 0 to 1"):
        nnx.EMA(make(nnx), decay)


def test_a_filter_that_takes_nothing_is_refused():
    with pytest.raises(FilterError, match=r"only=Cache takes no leaf.*only=Param"):
        nnx.EMA(make(nnx), 0.9, only=nnx.Cache)


def test_a_path_given_as_a_string_earns_a_hint():
    with pytest.raises(FilterError, match=r"for the path write Under\('head'\)\."):
        nnx.EMA({"head": make(nnx)}, 0.9, only="head")


def test_what_is_averaged_without_a_filter_can_be_read():
    assert repr(nnx.EMA(make(nnx), 0.9).filter) == "Dtyped(inexact)"


def test_leaves_without_an_average_are_all_listed():
    model = make(nnx)
    model.count = nnx.Variable(jnp.array(0))
    model.rngs = nnx.Rngs(0)
    model.raw = jnp.ones(2)
    model.number = nnx.Variable(3)
    with pytest.raises(FilterError) as caught:
        nnx.EMA(model, 0.9, only=nnx.Everything())
    text = str(caught.value)
    assert text.startswith("only=... takes leaves")
    for row in (
        "count (Variable): int32[]",
        "rngs.default.key (RngKey): key<fry>[]",
        "rngs.default.count (RngCount): uint32[]",
        "raw (unlabelled array): float32[2]",
        "number (Variable): 3",
    ):
        assert row in text
    assert "kernel" not in text


@pytest.fixture
def tracked():
    model = make(nnx)
    ema = nnx.EMA(model, 0.9, only=nnx.Param)
    before = ema.params.values_list()
    yield model, ema
    after = ema.params.values_list()
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_missing_and_untracked_leaves_are_all_listed_and_nothing_changes(tracked):
    model, ema = tracked
    del model.layers[0].kernel
    model.layers[1].scale = nnx.Param(jnp.ones(2))
    with pytest.raises(UpdateError) as caught:
        ema.update(model)
    assert "missing: layers.0.kernel (Param)" in str(caught.value)
    assert "not tracked: layers.1.scale (Param)" in str(caught.value)
    with pytest.raises(UpdateError, match=r"missing: layers\.0\.kernel \(Param\)") as e:
        ema.apply_to(model)
    assert "scale" not in str(e.value)


def test_apply_to_allows_leaves_that_are_not_tracked():
    model = make(nnx)
    ema = nnx.EMA(model, 0.9, only=nnx.Param)
    model.layers[1].scale = nnx.Param(jnp.ones(2))
    assert ema.apply_to(model).layers[1].scale.value.tolist() == [1.0, 1.0]


def test_other_shapes_are_all_listed_and_nothing_changes(tracked):
    model, ema = tracked
    model.layers[0].kernel.value = jnp.ones((1, 2))
    model.layers[1].bias.value = jnp.ones(())
    with pytest.raises(UpdateError) as caught:
        ema.update(model)
    assert "layers.0.kernel (Param) is float32[3,2], found float32[1,2]" in str(
        caught.value
    )
    assert "layers.1.bias (Param) is float32[2], found float32[]" in str(caught.value)


def test_an_average_from_outside_a_trace_is_refused_and_left_alone():
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)))
    ema = nnx.EMA(model, 0.9)
    kept = ema.params["w"].value
    with pytest.raises(TraceError, match=r"\(Param\) would be written from inside"):
        nnx.jit(lambda w: ema.update({"w": w}))(jnp.zeros(2))
    assert ema.params["w"].value is kept


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9999])
def test_an_average_of_what_does_not_change_does_not_move(dtype, decay):
    class Net(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.array([1.703, -0.5, 1e-3], dtype))

    model = Net()
    ema = nnx.EMA(model, decay)
    step = nnx.jit(lambda e, m: e.update(m))
    for _ in range(300):
        step(ema, model)
    wanted = np.asarray(model.w.value, np.float64)
    found = ema.params.w.value
    assert found.dtype == dtype
    rtol = 3e-5 if dtype == jnp.float32 else 0  # in float32 as Flax rounds
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=rtol)


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "complex64"]),
    decay=st.sampled_from([0, 0.5, 0.9, 0.999, 0.9999, 1]),
    steps=st.lists(st.floats(-3, 3, width=16), min_size=1, max_size=60),
    jitted=st.booleans(),
)
def test_the_average_is_that_of_float64_given_out_in_the_dtype_of_the_leaf(
    dtype, decay, steps, jitted
):
    class Net(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.array([1.7, 0.25], dtype))

    model = Net()
    ema = nnx.EMA(model, decay)
    averaged = ema.apply_to(model)
    update = nnx.jit(lambda e, m: e.update(m)) if jitted else nnx.EMA.update
    exact = np.asarray(model.w.value, np.complex128)
    for step in steps:
        model.w.value = jnp.array([step, 1 + step / 7], dtype)
        exact = decay * exact + (1 - decay) * np.asarray(model.w.value, np.complex128)
        update(ema, model)
    found = averaged.w.value
    assert found.dtype == model.w.value.dtype
    eps = max(float(jnp.finfo(found.dtype).eps), 6e-6)
    np.testing.assert_allclose(
        np.asarray(found, np.complex128), exact, rtol=eps, atol=1e-5
    )


def test_a_low_precision_leaf_has_a_wide_average_beside_it():
    model = make(nnx, jnp.bfloat16)
    ema = nnx.EMA(model, 0.999, only=nnx.Param)
    assert {v.value.dtype for v in ema.params.leaves()} == {jnp.dtype(jnp.bfloat16)}
    assert {v.value.dtype for v in ema.wide.leaves()} == {jnp.dtype(jnp.float32)}
    assert ema.wide.paths() == ema.params.paths()
    assert nnx.EMA(make(nnx), 0.999).wide is None, "wide enough already"


def test_a_low_precision_average_goes_on_after_saving_its_state():
    model = make(nnx, jnp.bfloat16)
    one, two = nnx.EMA(model, 0.99), nnx.EMA(model, 0.99)
    train(nnx, model, 1)
    one.update(model)
    nnx.update(two, nnx.state(one))
    for ema in (one, two):
        ema.update(model)
    equal(nnx.state(one), nnx.state(two))


def a_dict(m):
    return {"a": m(), "b": m()}


def nested(m):
    return {"a": [m(), (m(),)], "b": {"c": m()}}


@pytest.mark.parametrize("lib", [nnx, flax_nnx], ids=["sortal", "flax"])
@pytest.mark.parametrize(
    "build",
    [a_dict, nested, lambda m: [m(), m()], lambda m: (m(), m())],
    ids=["dict", "nested", "list", "tuple"],
)
def test_a_container_of_models_is_a_model(lib, build):
    class Net(lib.Module):
        def __init__(self):
            self.w = lib.Param(jnp.ones(2))
            self.n = lib.BatchStat(jnp.ones(2))

    models = build(Net)
    ema = nnx.EMA(models, 0.75, only=nnx.Param)
    assert ema.params.paths() == nnx.state(models, nnx.Param).paths()
    for variable in nnx.variables(models, nnx.Param).leaves():
        variable[...] = jnp.full(2, 3.0)
    ema.update(models)
    averaged = ema.apply_to(models)
    assert type(averaged) is type(models)
    found = nnx.state(averaged, nnx.Param).values_list()
    assert [x.tolist() for x in found] == [[1.5, 1.5]] * len(found)


def test_an_average_of_a_flax_model_is_that_of_flax():
    theirs, other = make(flax_nnx), make(flax_nnx)
    ema, reference = nnx.EMA(theirs, 0.9), flax_nnx.EMA(other, 0.9)
    for step in range(3):
        train(flax_nnx, theirs, step)
        train(flax_nnx, other, step)
        ema.update(theirs)
        reference.update(other)
    equal(ema.params, reference.params)
    averaged = ema.apply_to(theirs)
    assert type(averaged) is type(theirs)
    equal(nnx.state(averaged), flax_nnx.state(reference.apply_to(other)))


@pytest.mark.parametrize("decay", ["0.9", 1.5, np.float32(1.5), jnp.array(-0.1), None])
def test_a_decay_of_any_type_that_is_no_share_is_refused(decay):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match="is not a share from 0 to 1"):
        nnx.EMA(model, decay, only=nnx.Param)
    for share in (np.float32(0.5), jnp.array(0.5), 1, 0):
        nnx.EMA(model, share, only=nnx.Param).update(model)
    nnx.jit(lambda m, d: nnx.EMA(m, d, only=nnx.Param).update(m))(model, 0.5)


def test_the_average_of_another_shape_is_not_put_into_a_model():
    ema = nnx.EMA(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), 0.9, only=nnx.Param)
    with pytest.raises(UpdateError, match=r"kernel .* float32\[2,3\], found .*\[4,3\]"):
        ema.apply_to(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
