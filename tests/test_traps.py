"""The traps of other libraries, one test each: what must be right or refused loudly.

Every test here fails on the obvious implementation, and most of them on one that is in
wide use.
"""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal
from models import Count, Holder, Linear, Net, has_tracer, portrait, untouched
from sortal import BatchStat, Param, Variable, nnx
from sortal.errors import (
    FilterError,
    GradientError,
    MergeError,
    PathError,
    StaleBufferError,
    UpdateError,
)

X = jnp.ones((2, 3))


class LoRAParam(Param):
    """A narrower kind of Param."""


# -------------------------------------------------------------------------- filters
def test_a_wide_filter_before_a_narrow_one_is_an_error_not_an_empty_state() -> None:
    with pytest.raises(FilterError, match="can take nothing") as e:
        sortal.split(Net(), Variable, Param, ...)
    assert "Write the narrower one first: Param, Variable" in str(e.value)
    params, rest = sortal.split(Net(), Param, Variable)[1:]
    assert (len(params.paths()), len(rest.paths())) == (5, 2)


def test_a_filter_swallowed_only_by_this_model_is_an_error_too() -> None:
    """Globs say nothing of each other, but the leaves that they take here do."""
    with pytest.raises(FilterError, match="can take nothing"):
        sortal.state(Net(), sortal.At("layers.**"), sortal.At("layers.0.kernel"))


def test_split_is_exhaustive_while_state_may_leave_out() -> None:
    with pytest.raises(FilterError, match=r"norm\.mean \(BatchStat\)"):
        sortal.split(Net(), Param, Count)
    assert len(sortal.state(Net(), Param, Count)) == 2


def test_a_subclass_matches_the_filter_of_its_base() -> None:
    m = Holder(w=Param(jnp.ones(1)), lora=LoRAParam(jnp.ones(1)))
    assert sortal.state(m, Param).paths() == (("lora",), ("w",))
    assert sortal.state(m, LoRAParam, Param)[1].paths() == (("w",),)
    grads = sortal.grad(lambda m: (m.w * m.lora).sum())(m)
    assert grads.paths() == (("lora",), ("w",))
    assert type(grads["lora"]) is LoRAParam


def test_gradients_narrower_than_the_model_update_what_they_have() -> None:
    m = Holder(w=Param(jnp.ones(1)), lora=LoRAParam(jnp.ones(1)))
    grads = sortal.grad(lambda m: (m.w * m.lora).sum(), wrt=LoRAParam)(m)
    sortal.update(m, jax.tree.map(lambda g: -g, grads))
    assert (m.w[0], m.lora[0]) == (1, -1)


def test_a_string_filter_is_a_tag_and_a_path_by_mistake_is_hinted() -> None:
    m = Holder(lin=Linear(1, 1), tagged=Param(jnp.ones(1), tag="lin"))
    assert sortal.state(m, "lin").paths() == (("tagged",),)
    with pytest.raises(FilterError, match=r"for the path write Under\('lin'\)"):
        sortal.split(Holder(lin=Linear(1, 1)), "lin")


def test_two_classes_of_one_name_are_two_kinds() -> None:
    other = type("Param", (Variable,), {})
    m = Holder(w=Param(jnp.ones(1)), v=other(jnp.ones(1)))
    assert sortal.state(m, Param).paths() == (("w",),)
    with pytest.raises(UpdateError, match="wrong kind"):
        sortal.update(m, {"w": other(jnp.ones(1))})


# ------------------------------------------------------------------- update and merge
@pytest.mark.parametrize(
    "wrong",
    [
        {"kernal": jnp.ones((3, 3))},
        {"kernel": jnp.ones((7, 2))},
        {"kernel": BatchStat(jnp.ones((3, 3)))},
        {"kernel": jnp.ones((3, 3), jnp.bfloat16)},
        {"bias": jnp.ones(3), "kernel": {"deeper": jnp.ones(1)}},
    ],
    ids=["misspelled", "shape", "kind", "dtype", "structure"],
)
def test_update_is_strict_and_whole(wrong: Any) -> None:
    m = Linear(3, 3)
    with untouched(m), pytest.raises(UpdateError):
        sortal.update(m, {"bias": jnp.full(3, 9.0), **wrong})
    assert not hasattr(m, "kernal")


def test_list_indices_as_text_are_refused_and_not_taken_as_new_paths() -> None:
    net = Net()
    saved = {"layers": {"0": {"bias": jnp.ones(4)}}}
    with (
        untouched(net),
        pytest.raises(UpdateError, match=r"unknown: layers\['0'\]\.bias"),
    ):
        sortal.update(net, saved)
    fixed = nnx.restore_int_paths(saved)
    sortal.update(net, fixed)
    assert net.layers[0].bias[0] == 1
    with pytest.raises(PathError, match=r"layers\['9'\]"):
        sortal.state(net).replace_by_pure_dict({"layers": {"9": jnp.ones(1)}})


def test_overlapping_states_do_not_merge_into_whichever_is_last() -> None:
    graphdef, state = sortal.split(Linear(1, 1))
    with pytest.raises(MergeError, match=r"given twice: bias \(Param\)"):
        sortal.merge(graphdef, state, {"bias": Param(jnp.ones(1))})


def test_merge_with_params_alone_names_what_is_missing() -> None:
    graphdef, params, _ = sortal.split(Net(), Param, ...)
    with pytest.raises(MergeError, match=r"missing: calls \(Count\)") as e:
        sortal.merge(graphdef, params)
    assert "missing: norm.mean (BatchStat)" in str(e.value)


# ---------------------------------------------------------------- snapshots, buffers
@pytest.mark.parametrize("take", [sortal.state, lambda m: sortal.split(m)[1]])
def test_a_state_is_no_live_view(take: Any) -> None:
    net = Net()
    taken = take(net)
    with untouched(net):
        taken["calls"].value = jnp.array(9)
        taken["calls"][...] = 8
        taken["layers"][0]["bias"] = jnp.ones(4)
    net.calls[...] += 1
    assert int(taken["calls"].value) == 8


def test_merge_makes_variables_of_its_own_that_no_state_or_twin_shares() -> None:
    graphdef, state = sortal.split(Linear(1, 1))
    one, two = sortal.merge(graphdef, state), sortal.merge(graphdef, state)
    one.bias[...] = 5.0
    assert (two.bias[0], state["bias"][0]) == (0, 0)


def test_an_ema_that_shares_buffers_says_so_by_path_when_they_are_donated() -> None:
    net = Net()
    ema = sortal.clone(net)
    step = sortal.jit(lambda m: m.calls.set_value(m.calls + 1), donate_argnums=0)
    step(net)
    with pytest.raises(StaleBufferError, match=r"layers.*kernel"):
        sortal.jit(lambda m: m.calls + 1)(ema)


def test_an_ema_with_arrays_of_its_own_survives_donation() -> None:
    net = Net()
    ema = sortal.clone(net, arrays=True)
    before = portrait(ema)
    sortal.jit(lambda m: m.calls.set_value(m.calls + 1), donate_argnums=0)(net)
    assert portrait(ema) == before
    assert int(sortal.jit(lambda m: m.calls + 1)(ema)) == 1


def test_one_buffer_twice_in_a_donated_model_is_no_error() -> None:
    zeros = jnp.zeros(3)
    m = Holder(a=Param(zeros), b=Param(zeros), c=[zeros, zeros])
    step = sortal.jit(lambda m: m.a.set_value(m.a + 1), donate_argnums=0)
    for n in (1, 2):
        step(m)
        assert (m.a[0], m.b[0], m.c[1][0]) == (n, 0, 0)


def test_numpy_values_are_not_aliased_by_snapshots() -> None:
    array = np.zeros(2)
    m = Holder(w=Param(array), raw=array)
    taken, twin = sortal.state(m), sortal.clone(m)
    array[:] = 7
    assert not np.any(taken["w"].value)
    assert not np.any(twin.raw)


# ---------------------------------------------------------------------- tied weights
def test_a_tied_weight_is_found_at_one_path_and_counted_once() -> None:
    m = Holder(b=Param(jnp.full(1, 2.0)), z=Holder())
    m.a = m.z.w = m.b
    assert sortal.state(m).paths() == (("a",),)
    assert sortal.graphdef(m).aliases == ((("b",), 0), (("z", "w"), 0))
    for made in (sortal.clone(m), copy.deepcopy(m), sortal.jit(sortal.clone)(m)):
        assert made.a is made.b is made.z.w
    sortal.jit(lambda m: m.z.w.set_value(m.b * 2))(m)
    assert m.a[0] == 4


# ----------------------------------------------------------------------- static data
def test_mode_flips_and_rebuilt_optimisers_do_not_retrace_for_ever() -> None:
    traces = []

    def f(m: Any, x: Any) -> Any:
        traces.append(1)
        return m(x)

    jitted, net = sortal.jit(f), Net()
    for _ in range(5):
        net.train()
        jitted(net, X)
        net.eval()
        jitted(net, X)
        jitted(copy.deepcopy(net), X)
    assert len(traces) == 2


def test_statics_that_python_takes_as_equal_do_not_share_a_program() -> None:
    f = sortal.jit(lambda m: jnp.zeros(2, int) * m.by)
    dtypes = [f(Holder(by=by)).dtype for by in (1, 1.0, True, 1j)]
    assert dtypes == [jnp.int32, jnp.float32, jnp.int32, jnp.complex64]
    g = sortal.jit(lambda m: 1.0 / jnp.float32(m.by))
    assert [float(g(Holder(by=by))) for by in (0.0, -0.0)] == [np.inf, -np.inf]


def test_an_array_is_never_static_data_so_that_its_change_is_seen() -> None:
    m = Holder(table={"mean": np.zeros(2)}, scale=jnp.ones(()))
    f = sortal.jit(lambda m: m.table["mean"] * m.scale)
    f(m)
    m.table["mean"] = np.full(2, 3.0)
    m.scale = jnp.array(2.0)
    assert f(m)[0] == 6


def test_an_unhashable_static_is_refused_at_the_first_use_not_the_second() -> None:
    m = Holder(options={1, 2})
    with pytest.raises(sortal.errors.StructureError, match="options: a set"):
        sortal.jit(lambda m: 1)(m)


# ------------------------------------------------------------------------- gradients
def test_grad_differentiates_params_only_whatever_else_is_in_the_model() -> None:
    net = Net()
    net.rngs = sortal.Rngs(0)
    grads = sortal.grad(lambda m: m(X).sum())(net)
    assert len(grads.paths()) == 5
    assert {type(v) for v in grads.leaves()} == {Param}


def test_a_random_key_asked_to_be_differentiated_by_is_named() -> None:
    with pytest.raises(GradientError, match=r"default\.key \(RngKey\)"):
        sortal.grad(lambda r: 0.0, wrt=...)(sortal.Rngs(0))


def test_leaves_that_wrt_leaves_out_are_absent_and_not_passed_through() -> None:
    net = Net()
    grads = sortal.grad(lambda m: m(X).sum(), wrt=sortal.At("layers.1.*"))(net)
    assert grads.paths() == (("layers", 1, "bias"), ("layers", 1, "kernel"))
    assert not any(leaf.value is None for leaf in grads.leaves())
    frozen = net.layers[0].kernel.value
    params = sortal.state(net, Param)
    sortal.update(net, jax.tree.map(lambda g: g * 0, grads))
    assert net.layers[0].kernel.value is frozen
    assert len(params.paths()) == 5


# ------------------------------------------------------------------------ trace level
def test_a_model_built_inside_eval_shape_is_usable_outside() -> None:
    made = sortal.eval_shape(lambda: Net())
    made.layers[0].kernel.value = jnp.ones((3, 4))
    sortal.update(made.norm, sortal.state(Net().norm), strict=False)
    made.extra = 1
    assert not has_tracer(made)


def test_a_model_built_by_a_plain_jax_transform_is_usable_outside() -> None:
    made = jax.jit(lambda: Net())()
    made.calls[...] += 1
    made.extra = Param(jnp.ones(1))
    stacked = jax.vmap(lambda x: jax.tree.map(lambda v: v * x, Linear(1, 1)))(X[:, 0])
    stacked.bias[...] = 1.0
    assert stacked.kernel.shape == (2, 1, 1)


def test_merge_inside_grad_gives_variables_that_may_be_written_to() -> None:
    graphdef, params, rest = sortal.split(Net(), Param, ...)

    def loss(params: Any) -> Any:
        net = sortal.merge(graphdef, params, rest)
        return (net(X) ** 2).sum(), sortal.state(net, BatchStat)

    grads, stats = jax.grad(loss, has_aux=True)(params)
    assert grads.paths() == params.paths()
    assert not np.array_equal(stats["norm"]["mean"].value, np.zeros(4))


def test_an_update_of_a_variable_inside_jit_is_not_lost() -> None:
    net, twin = Net(), Net()
    sortal.jit(lambda m, x: m(x))(net, X)
    twin(X)
    assert int(net.calls.value) == 1
    np.testing.assert_allclose(net.norm.mean.value, twin.norm.mean.value, rtol=1e-6)


def test_an_update_of_a_variable_captured_by_raw_jit_is_refused_not_lost() -> None:
    net = Net()
    with untouched(net), pytest.raises(nnx.TraceContextError, match="calls"):
        jax.jit(lambda x: net(x))(X)


# ----------------------------------------------------------------------------- holes
def test_none_is_no_hole_and_is_kept_where_it_stands() -> None:
    m = Holder(bias=None, w=Param(jnp.ones(1)), items=[None, Param(jnp.ones(1)), None])
    graphdef, params = sortal.split(m)
    assert params.paths() == (("items", 1), ("w",))
    made = sortal.merge(graphdef, jax.tree.map(lambda x: x * 2, params))
    assert made.bias is made.items[0] is made.items[2] is None
    doubled = jax.tree.map(lambda x: x * 2, m)
    assert doubled.bias is None
    assert doubled.items[1][0] == 2


def test_a_variable_that_holds_none_or_a_tree_goes_through_all_verbs() -> None:
    m = Holder(
        cache=sortal.Cache(None), tree=sortal.Cache({"k": jnp.ones(1), "n": None})
    )

    def fill(m: Any) -> None:
        m.cache.value = jnp.ones(2)
        m.tree.value = {"k": m.tree.value["k"] + 1, "n": None}

    assert portrait(sortal.clone(m)) == portrait(m)
    sortal.jit(fill)(m)
    assert m.cache.value.shape == (2,)
    assert m.tree.value["k"][0] == 2
    assert m.tree.value["n"] is None
    sortal.jit(lambda m: m.cache.set_value(None))(m)
    assert m.cache.value is None
