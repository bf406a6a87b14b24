"""EMA: the numbers of Flax, buffers of its own, a model that follows, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("decay", [0.9, 0.999, 0, 1.0])
@pytest.mark.parametrize("only", ["all", "params"])
def test_the_average_is_that_of_flax_bit_for_bit(dtype, decay, only):
    mine, theirs = make(nnx, dtype), make(flax_nnx, dtype)
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


# ------------------------------------------------------------------- refusals
@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan"), 99])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ArgumentError, match="is not a share from 0 to 1"):
        nnx.EMA(make(nnx), decay)


def test_a_filter_that_takes_nothing_is_refused():
    with pytest.raises(FilterError, match=r"only=Cache takes no leaf.*only=Param"):
        nnx.EMA(make(nnx), 0.9, only=nnx.Cache)


def test_leaves_without_an_average_are_all_listed():
    model = make(nnx)
    model.count = nnx.Variable(jnp.array(0))
    model.rngs = nnx.Rngs(0)
    model.raw = jnp.ones(2)
    model.number = nnx.Variable(3)
    with pytest.raises(FilterError) as caught:
        nnx.EMA(model, 0.9)
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
    with pytest.raises(TraceError, match=r"\(Param\) from inside a transform"):
        nnx.jit(lambda w: ema.update({"w": w}))(jnp.zeros(2))
    assert ema.params["w"].value is kept
