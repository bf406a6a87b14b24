"""Random streams: bit for bit those of Flax NNX, and errors that say what is there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from hypothesis import given
from hypothesis import strategies as st

import sortal
from models import Holder, untouched
from sortal.errors import RngAttributeError, RngError
from sortal.random import _INITIALIZERS, _RANDOM

# Flax's own word to its users; Sortal keeps the argument for the code that has it.
old_spelling = pytest.mark.filterwarnings(
    "ignore:The 'split' argument of 'fork':DeprecationWarning"
)


def data(key: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(key))


def keys_of(rngs: Any) -> dict[str, Any]:
    """Key data and count of each stream of either library."""
    return {
        name: (data(s.key[...]), np.asarray(s.count[...])) for name, s in rngs.items()
    }


def assert_same_streams(ours: Any, theirs: Any) -> None:
    mine, other = keys_of(ours), keys_of(theirs)
    assert mine.keys() == other.keys()
    for name, keys in mine.items():
        for a, b in zip(keys, other[name], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
            assert a.dtype == b.dtype


SEEDS = {
    "seed": lambda nnx: nnx.Rngs(3),
    "streams": lambda nnx: nnx.Rngs(params=0, dropout=1),
    "both": lambda nnx: nnx.Rngs(7, params=0, noise=2),
    "mapping": lambda nnx: nnx.Rngs({"params": 4, "default": 5}),
    "typed key": lambda nnx: nnx.Rngs(jax.random.key(9), a=jax.random.key(1)),
    "raw key": lambda nnx: nnx.Rngs(jax.random.PRNGKey(2)),
    "rbg": lambda nnx: nnx.Rngs(jax.random.key(9, impl="rbg")),
}
calls = st.lists(
    st.sampled_from(["default", "params", "dropout", "noise", "other", "()"]),
    max_size=8,
)


@pytest.mark.parametrize("make", SEEDS.values(), ids=SEEDS)
@given(calls=calls)
def test_keys_are_those_of_flax_bit_for_bit(make: Any, calls: list[str]) -> None:
    ours, theirs = make(sortal), make(flax_nnx)
    for name in calls:
        if name in ours or "default" in ours:
            get = (lambda r: r()) if name == "()" else (lambda r, n=name: r[n]())
            np.testing.assert_array_equal(data(get(ours)), data(get(theirs)))
    assert_same_streams(ours, theirs)


SPLITS = {
    "fork": lambda r, _: r.fork(),
    "fork by number": lambda r, _: r.fork(split=3),
    "fork by shape": lambda r, _: r.fork(split=(2, 3)),
    "fork by filter": lambda r, _: r.fork(split={"params": 4, ...: None}),
    "split": lambda r, _: r.split(3),
    "split by filter": lambda r, _: r.split({"params": (2,), ...: None}),
    "broadcast": lambda r, _: r.broadcast(3),
    "broadcast by filter": lambda r, _: r.broadcast({"params": 2, ...: None}),
    "stream fork": lambda r, n: n.Rngs(r["params"].fork(), x=r["params"].fork(split=2)),
}


@old_spelling
@pytest.mark.parametrize("derive", SPLITS.values(), ids=SPLITS)
def test_derived_streams_and_what_is_left_are_those_of_flax(derive: Any) -> None:
    ours, theirs = sortal.Rngs(0, params=1), flax_nnx.Rngs(0, params=1)
    assert_same_streams(derive(ours, sortal), derive(theirs, flax_nnx))
    assert_same_streams(ours, theirs)


def test_a_stream_is_made_from_a_stream_without_sharing_its_variables() -> None:
    first = sortal.Rngs(params=1)
    first.params()
    again = sortal.Rngs(params=first.params)
    theirs = flax_nnx.Rngs(params=1)
    np.testing.assert_array_equal(data(again.params()), data(theirs.params()))
    assert int(first.params.count.value) == 1


@pytest.mark.parametrize("name", ["normal", "uniform", "bernoulli", "bits", "gumbel"])
def test_draws_are_those_of_jax_random_with_the_next_key(name: str) -> None:
    rngs = sortal.Rngs(0)
    key = jax.random.fold_in(jax.random.key(0), 0)
    shape = {"shape": (3,)}
    expected = getattr(jax.random, name)(key, **shape)
    np.testing.assert_array_equal(getattr(rngs, name)(**shape), expected)
    assert int(rngs.default.count.value) == 1
    theirs = getattr(flax_nnx.Rngs(0), name)(**shape)
    np.testing.assert_array_equal(expected, theirs)


def test_initialisers_are_those_of_jax_with_the_next_key() -> None:
    made = sortal.Rngs(0).lecun_normal()((3, 4), jnp.float32)
    key = jax.random.fold_in(jax.random.key(0), 0)
    expected = jax.nn.initializers.lecun_normal()(key, (3, 4), jnp.float32)
    np.testing.assert_array_equal(made, expected)


def test_every_draw_and_initialiser_of_flax_is_there() -> None:
    theirs = {n for n in dir(flax_nnx.Rngs) if not n.startswith("_")}
    ours = {n for n in dir(sortal.Rngs) if not n.startswith("_")}
    assert theirs - ours <= {"set_attributes", "to_pure_dict"}
    assert {*_RANDOM, *_INITIALIZERS} <= ours
    assert all(hasattr(sortal.RngStream(0, tag="x"), n) for n in _RANDOM)


def test_an_unknown_stream_falls_back_to_default_and_advances_it() -> None:
    rngs = sortal.Rngs(0)
    assert rngs.anything is rngs.default
    rngs.anything()
    rngs["else"]()
    assert int(rngs.default.count.value) == 2
    assert "anything" not in rngs
    assert list(rngs) == ["default"]
    assert len(sortal.Rngs(0, a=1)) == 2


def test_a_missing_stream_without_default_names_those_there_are() -> None:
    rngs = sortal.Rngs(params=0, noise=1)
    with pytest.raises(RngAttributeError) as e:
        rngs.dropout()
    assert "No RngStream named 'dropout'" in str(e.value)
    assert "there is params, noise" in str(e.value)
    assert "Rngs(dropout=seed)" in str(e.value)
    with pytest.raises(RngError, match="there is none"):
        sortal.Rngs()()
    assert not hasattr(rngs, "dropout")
    with pytest.raises(KeyError):
        rngs["dropout"]
    with pytest.raises(AttributeError, match="__wrapped__"):
        _ = rngs.__wrapped__


@pytest.mark.parametrize("bad", [1.5, "seed", True, None, np.ones(2), [1]])
def test_a_seed_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(RngError, match="stream 'a' needs a seed"):
        sortal.Rngs(a=bad)


def test_float_arrays_are_no_keys() -> None:
    with pytest.raises(RngError, match=r"found float32\[2\]"):
        sortal.Rngs(jnp.ones(2))


# ------------------------------------------------------------ split, fork, in place
def model_with(nnx: Any) -> Any:
    class Dropout(nnx.Module):
        def __init__(self, rngs: Any):
            self.rngs = rngs.dropout.fork()

    class Model(nnx.Module):
        def __init__(self, rngs: Any):
            self.a, self.b = Dropout(rngs), Dropout(rngs)
            self.rngs = rngs

    return Model(nnx.Rngs(0, dropout=1))


def streams_of(model: Any) -> dict[str, Any]:
    model = {"a": model.a.rngs, "b": model.b.rngs, **dict(model.rngs.items())}
    return {k: (data(s.key[...]), np.asarray(s.count[...])) for k, s in model.items()}


IN_PLACE = {
    "split": lambda nnx, m: nnx.split_rngs(m, splits=3),
    "split by shape": lambda nnx, m: nnx.split_rngs(m, splits=(2, 2)),
    "split one kind": lambda nnx, m: nnx.split_rngs(m, splits=2, only="default"),
    "squeeze": lambda nnx, m: nnx.split_rngs(m, splits=1, squeeze=True),
    "fork": lambda nnx, m: nnx.fork_rngs(m),
    "fork split": lambda nnx, m: nnx.fork_rngs(m, split=4),
    "fork some": lambda nnx, m: nnx.fork_rngs(m, split={"dropout": 2}),
    "reseed": lambda nnx, m: nnx.reseed(m, dropout=5),
}


@old_spelling
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_streams_of_a_model_change_in_place_as_in_flax_and_come_back(
    change: Any,
) -> None:
    ours, theirs = model_with(sortal), model_with(flax_nnx)
    backups = change(sortal, ours)
    other = change(flax_nnx, theirs)
    assert_equal(streams_of(ours), streams_of(theirs))
    if backups is not None:
        sortal.restore_rngs(backups)
        flax_nnx.restore_rngs(other)
        assert_equal(streams_of(ours), streams_of(theirs))


def assert_equal(mine: dict[str, Any], other: dict[str, Any]) -> None:
    assert mine.keys() == other.keys()
    for name, keys in mine.items():
        for a, b in zip(keys, other[name], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_the_context_restores_also_after_an_exception() -> None:
    rngs = sortal.Rngs(0)

    def fail() -> None:
        with sortal.split_rngs(rngs, splits=2):
            assert rngs.default.key.shape == (2,)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert rngs.default.key.shape == ()
    with sortal.fork_rngs(rngs) as backups:
        assert len(list(backups)) == 1


def test_the_decorator_splits_the_streams_of_all_arguments_for_each_call() -> None:
    model, rngs = model_with(sortal), sortal.Rngs(5)
    shapes = []

    @sortal.split_rngs(splits=3, only=("default", "dropout"))
    def f(model: Any, x: int, *, rngs: Any) -> int:
        shapes.append((model.a.rngs.key.shape, rngs.default.key.shape))
        return x

    assert f(model, 4, rngs=rngs) == 4
    assert f.__name__ == "f"
    assert shapes == [((3,), (3,))]
    assert model.a.rngs.key.shape == rngs.default.key.shape == ()


def test_a_stream_is_forked_once_by_the_first_filter_that_takes_it() -> None:
    model = model_with(sortal)
    sortal.fork_rngs(model, split={"dropout": 2, ...: None})
    assert model.rngs.dropout.key.shape == model.a.rngs.key.shape == (2,)
    assert model.rngs.default.key.shape == ()
    counts = [model.rngs.dropout.count, model.rngs.default.count]
    assert [c.value.tolist() for c in counts] == [[0, 0], 0]


def test_a_stream_met_twice_is_split_once() -> None:
    rngs = sortal.Rngs(0)
    sortal.split_rngs(Holder(a=rngs, b=rngs, c=[rngs.default]), splits=2)
    assert rngs.default.key.shape == (2,)


def test_squeeze_is_for_one_split_only() -> None:
    rngs = sortal.Rngs(0)
    with untouched(rngs), pytest.raises(RngError, match="squeeze=True is for splits=1"):
        sortal.split_rngs(rngs, splits=2, squeeze=True)


# ------------------------------------------------------------------------- reseed
def test_reseed_matches_shapes_or_asks_a_function() -> None:
    ours, theirs = sortal.Rngs(0, a=1), flax_nnx.Rngs(0, a=1)
    for nnx, rngs in ((sortal, ours), (flax_nnx, theirs)):
        nnx.split_rngs(rngs, splits=3, only="a")
        nnx.reseed(rngs, policy="match_shape", a=7, default=2)
    assert_same_streams(ours, theirs)
    asked = []

    def policy(path: Any, key: Any, shape: Any) -> Any:
        asked.append((path, shape))
        return jax.random.split(key, shape)

    sortal.reseed(Holder(r=ours), policy=policy, a=1)
    assert asked == [(("r", "a"), (3,))]
    assert ours.a.count.shape == (3,)


def test_reseed_refuses_several_keys_and_changes_nothing() -> None:
    rngs = sortal.Rngs(0, a=1)
    sortal.split_rngs(rngs, splits=3, only="a")
    text = r"several keys: r\.a key<fry>\[3\]. Pass policy='match_shape'"
    with untouched(rngs), pytest.raises(RngError, match=text):
        sortal.reseed(Holder(r=rngs), a=7, default=3)


@pytest.mark.parametrize("policy", ["match", None, 3])
def test_reseed_refuses_an_unknown_policy(policy: Any) -> None:
    rngs = sortal.Rngs(0)
    with (
        untouched(rngs),
        pytest.raises(RngError, match="policy must be 'scalars_only'"),
    ):
        sortal.reseed(rngs, policy=policy, default=1)


# --------------------------------------------------------------------- with models
def test_streams_are_leaves_with_their_name_as_tag() -> None:
    model = Holder(rngs=sortal.Rngs(0, dropout=1))
    taken = sortal.state(model, "dropout")
    assert taken.paths() == (("rngs", "dropout", "count"), ("rngs", "dropout", "key"))
    assert [type(v) for v in taken.leaves()] == [sortal.RngCount, sortal.RngKey]


def test_a_key_drawn_inside_jit_advances_the_live_stream_as_outside() -> None:
    rngs, plain = sortal.Rngs(0), sortal.Rngs(0)
    draw = sortal.jit(lambda r: r())
    for _ in range(3):
        np.testing.assert_array_equal(data(draw(rngs)), data(plain()))
    assert int(rngs.default.count.value) == 3


def test_a_stream_closed_over_by_a_jitted_function_is_refused() -> None:
    model = Holder(rngs=sortal.Rngs(0))
    text = r"rngs\.default\.count \(RngCount\)"
    with untouched(model), pytest.raises(sortal.TraceError, match=text):
        sortal.jit(lambda x: x + jax.random.normal(model.rngs()))(1.0)


def test_a_key_of_a_split_stream_outside_of_vmap_is_refused() -> None:
    rngs = sortal.Rngs(0, dropout=1)
    with sortal.split_rngs(rngs, splits=4, only="dropout"):
        for draw in (rngs.dropout, rngs.dropout.normal, rngs.fork):
            with pytest.raises(RngError) as e:
                draw()
            assert str(e.value).startswith(
                "stream 'dropout' holds several keys, key<fry>[4], and draws by one. "
            )
        assert rngs.dropout.count.value.tolist() == [0, 0, 0, 0]
    rngs.dropout()


def test_rngs_inside_vmap_by_split_streams_give_one_draw_for_each_key() -> None:
    rngs = sortal.Rngs(0)
    forked = rngs.fork(split=4)
    graphdef, state = sortal.split(forked)
    made = jax.vmap(lambda s: sortal.merge(graphdef, s).normal((2,)))(state)
    key = jax.random.fold_in(jax.random.key(0), 0)
    for row, k in zip(made, jax.random.split(key, 4), strict=True):
        expected = jax.random.normal(jax.random.fold_in(k, 0), (2,))
        np.testing.assert_array_equal(row, expected)


def test_key_data_may_be_numpys_and_must_have_the_shape_of_a_key() -> None:
    key = jax.random.key(3)
    assert sortal.Rngs(np.asarray(jax.random.key_data(key))).default.key.value == key
    for wrong in (jnp.uint32(3), jnp.zeros(3, jnp.uint32)):
        with pytest.raises(RngError, match=r"needs a seed .* found uint32\["):
            sortal.Rngs(wrong)
