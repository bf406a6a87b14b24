"""Flax NNX objects under Sortal's verbs and transforms give Flax's own results."""

from __future__ import annotations

import copy
import functools
import gc
import re
import subprocess
import sys
import tempfile
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sortal
from sortal._engine.plan import bind
from sortal.errors import (
    ArgumentError,
    AxisError,
    FilterError,
    UnsupportedError,
    UpdateError,
    VariableError,
)

nnx = pytest.importorskip("flax.nnx")

X = jnp.linspace(-1, 1, 24).reshape(6, 4)


class Block(nnx.Module):
    """A layer with Params, BatchStats and a random stream."""

    def __init__(self, rngs: Any):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.drop(nnx.relu(self.norm(self.linear(x))))


class Calls(nnx.Variable):
    """A kind of the user's own."""


class Net(nnx.Module):
    """Blocks in a List, a tied Variable, a count, settings of several types."""

    def __init__(self, rngs: Any):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.named = nnx.Dict(head=nnx.Linear(4, 2, rngs=rngs))
        self.tied = self.blocks[0].linear.bias
        self.calls = Calls(jnp.array(0), unit="calls")
        self.raw = nnx.data(jnp.ones(2))
        self.sizes = (4, 2)
        self.options = {"depth": 2}

    def __call__(self, x: Any) -> Any:
        self.calls[...] += 1
        for block in self.blocks:
            x = block(x)
        return self.named.head(x + self.tied[...].sum()) * self.raw


def bits(value: Any) -> np.ndarray:
    value = value.get_value() if hasattr(value, "get_value") else value
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value)


def flat(state: Any) -> dict[Any, np.ndarray]:
    """Path to bits, of a State of either library."""
    pairs = state.flat_state() if isinstance(state, sortal.State) else None
    return {p: bits(x) for p, x in pairs or nnx.to_flat_state(state)}


def assert_same(a: Any, b: Any) -> None:
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=str(path))


def test_what_differs_is_found_by_the_helper():
    with pytest.raises(AssertionError):
        assert_same(nnx.state(Net(nnx.Rngs(0))), nnx.state(Net(nnx.Rngs(1))))


# ------------------------------------------------------------------------------ verbs
FILTERS = {
    "all": ((), ()),
    "theirs": ((nnx.Param,), (nnx.Param,)),
    "ours": ((sortal.Param,), (nnx.Param,)),
    "a user's": ((Calls,), (Calls,)),
    "several": ((sortal.BatchStat, nnx.RngState), (nnx.BatchStat, nnx.RngState)),
    "the rest": ((nnx.Param, ...), (nnx.Param, ...)),
    "their filter object": ((nnx.Not(nnx.Param),), (nnx.Not(nnx.Param),)),
    "a path": ((nnx.PathContains("head"),), (nnx.PathContains("head"),)),
}


@pytest.mark.parametrize("name", FILTERS)
def test_state_takes_what_flax_takes(name):
    ours, theirs = FILTERS[name]
    model = Net(nnx.Rngs(0))
    found, wanted = sortal.state(model, *ours), nnx.state(model, *theirs)
    several = isinstance(wanted, tuple)
    for a, b in zip(found, wanted, strict=True) if several else [(found, wanted)]:
        assert_same(a, b)
        assert a.paths() == tuple(p for p, _ in nnx.to_flat_state(b))


def test_kinds_of_one_name_in_the_two_libraries_are_one_and_others_are_not():
    ours = sortal.BatchNorm(4, rngs=sortal.Rngs(0))
    assert sortal.state(ours, nnx.Param).paths() == (("bias",), ("scale",))
    assert sortal.state(ours, nnx.Variable).paths() == sortal.state(ours).paths()
    assert sortal.state([Calls(1.0)], sortal.Variable).paths() == ((0,),)
    assert not sortal.state([Calls(1.0)], sortal.Param).paths()

    class Param(nnx.Variable):
        pass

    assert not sortal.state([Param(1.0)], sortal.Param).paths()
    assert not sortal.OfType(sortal.RngCount)(("a",), nnx.RngKey(1.0))
    assert sortal.OfType(sortal.RngState)(("a",), nnx.RngKey(1.0))


def test_an_earlier_filter_of_the_other_library_swallows_a_later_one():
    with pytest.raises(sortal.errors.FilterError, match="can take nothing"):
        sortal.split(Net(nnx.Rngs(0)), sortal.Variable, nnx.Param)


def test_a_leaf_of_the_state_is_a_detached_variable_of_flax():
    model = Net(nnx.Rngs(0))
    leaf = sortal.state(model)["calls"]
    assert type(leaf) is Calls
    assert leaf.get_metadata("unit") == "calls"
    leaf.set_value(jnp.array(7))
    assert int(model.calls.get_value()) == 0


def test_split_and_merge_round_trip():
    model = Net(nnx.Rngs(0))
    graphdef, params, rest = sortal.split(model, nnx.Param, ...)
    again = sortal.merge(graphdef, params, rest)
    assert type(again) is Net
    assert again.tied is again.blocks[0].linear.bias
    assert again.tied is not model.tied
    assert again.sizes == (4, 2)
    assert again.options == {"depth": 2}
    assert_same(nnx.state(again), nnx.state(model))
    # Flax takes what was built for one of its own.
    assert nnx.graphdef(again) == nnx.graphdef(model)
    call = nnx.jit(Net.__call__)
    np.testing.assert_array_equal(call(again, X), call(model, X))


def test_equal_models_share_one_graphdef_and_settings_change_it():
    a, b = Net(nnx.Rngs(0)), Net(nnx.Rngs(1))
    assert sortal.graphdef(a) is sortal.graphdef(b)
    b.eval()
    assert sortal.graphdef(a) is not sortal.graphdef(b)
    text = "\n".join(map(str, sortal.graphdef(a).diff(sortal.graphdef(b))))
    assert "blocks.0.drop.deterministic: False -> True" in text


def test_update_writes_in_place_and_all_or_nothing():
    model, other = Net(nnx.Rngs(0)), Net(nnx.Rngs(1))
    kernel = model.named.head.kernel
    sortal.update(model, sortal.state(other, nnx.Param))
    assert model.named.head.kernel is kernel
    assert_same(nnx.state(model, nnx.Param), nnx.state(other, nnx.Param))
    sortal.update(model, nnx.state(Net(nnx.Rngs(2)), nnx.Param))
    before = flat(nnx.state(model))
    wrong = {"named": {"head": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(2)}}}
    with pytest.raises(UpdateError, match=r"named\.head\.kernel \(Param\)"):
        sortal.update(model, wrong)
    after = flat(nnx.state(model))
    assert all(np.array_equal(before[p], after[p]) for p in before)


def test_kinds_of_one_library_may_be_written_from_the_other():
    ours = sortal.Linear(4, 2, rngs=sortal.Rngs(0))
    theirs = nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    sortal.update(theirs, sortal.state(ours))
    assert type(theirs.kernel) is nnx.Param
    np.testing.assert_array_equal(bits(theirs.kernel), bits(ours.kernel))


def test_a_deep_copy_of_a_state_has_the_variables_of_flax_read_or_not():
    variable = nnx.Param(jnp.ones(2), note="n")
    state = sortal.State({"a": variable, "b": {"c": variable}})
    other, same = copy.deepcopy((state, state))
    assert other is same
    assert other == state
    assert type(other["a"]) is nnx.Param
    assert other["a"] is other["b"]["c"] is not variable


def test_clone_pop_and_variables():
    model = Net(nnx.Rngs(0))
    copied = sortal.clone(model)
    assert_same(nnx.state(copied), nnx.state(model))
    copied.calls[...] += 1
    assert int(model.calls.get_value()) == 0
    assert sortal.variables(model, Calls)["calls"] is model.calls
    model.seen = nnx.Intermediate(jnp.ones(2))
    popped = sortal.pop(model, nnx.Intermediate)
    assert popped.paths() == (("seen",),)
    assert not hasattr(model, "seen")
    assert "seen" not in {p[0] for p, _ in nnx.to_flat_state(nnx.state(model))}


def test_explain_and_tabulate_name_their_kinds():
    model = Net(nnx.Rngs(0))
    text = str(sortal.explain(model, nnx.Param, ...))
    assert "blocks.0.linear.kernel" in text
    assert "different kinds are called" not in text
    assert "Calls" in str(sortal.tabulate(model))


def test_variables_that_are_no_plain_boxes_are_refused_by_path():
    model = nnx.Dict(a=nnx.Param(jnp.ones(2), ref=True), b=nnx.Param(jnp.ones(2)))
    model.b.set_metadata(names=["x"])
    with pytest.raises(UnsupportedError) as caught:
        sortal.state(model)
    text = str(caught.value)
    assert "a (Param): made with ref=True" in text
    assert "b (Param): its metadata 'names' cannot be hashed" in text


@pytest.mark.skipif(
    not hasattr(nnx.variablelib, "HijaxVariable"), reason="this Flax has none"
)
def test_variables_of_hijax_are_refused_by_path():
    """Their class is none of Variable's, so that they would be arrays or statics."""
    with nnx.var_defaults(hijax=True):
        linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        variable = nnx.Param(jnp.ones(2))
    holder = sortal.Sequential(linear)
    holder.w = variable
    for use in (
        lambda: sortal.state(linear, sortal.Param),
        lambda: sortal.split([linear]),
        lambda: sortal.state(holder),
        lambda: sortal.state([variable]),
        lambda: sortal.grad(lambda m: m(X[:, :2]).sum())(linear),
        lambda: sortal.jit(lambda m: m)(holder),
        lambda: sortal.jit(lambda v: v)(variable),
        lambda: sortal.Optimizer(linear, optax.sgd(0.1)),
    ):
        with pytest.raises(UnsupportedError, match="hijax=True") as error:
            use()
        assert "make it without" in str(error.value)
    with pytest.raises(UnsupportedError) as error:
        sortal.state(holder)
    assert re.findall(r"^  (\S+) ", str(error.value), re.MULTILINE) == [
        "layers.0.bias",
        "layers.0.kernel",
        "w",
    ]


# ------------------------------------------------------------------------ staleness
EDITS = {
    "eval": lambda m: m.eval(),
    "a setting": lambda m: setattr(m, "sizes", (5,)),
    "a new attribute": lambda m: setattr(m, "extra", nnx.Param(jnp.ones(1))),
    "around setattr": lambda m: vars(m).update(sizes=(6,)),
    "a deleted attribute": lambda m: delattr(m, "sizes"),
    "a replaced Variable": lambda m: setattr(m, "calls", Calls(jnp.array(3))),
    "deep down": lambda m: setattr(m.blocks[1].norm, "momentum", 0.5),
    "a List": lambda m: m.blocks.append(Block(nnx.Rngs(3))),
    "a plain dict": lambda m: m.options.update(depth=3),
    "metadata": lambda m: m.calls.set_metadata(unit="steps"),
    "metadata whole": lambda m: m.calls.set_metadata({"unit": "times"}),
    "a moved attribute": lambda m: (setattr(m, "b", m.calls), delattr(m, "calls")),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_by_any_way_is_noticed(name):
    model = Net(nnx.Rngs(0))
    model.options = {"depth": 2}
    old = sortal.graphdef(model)
    assert bind(model).valid(model)
    EDITS[name](model)
    new = sortal.graphdef(model)
    assert new is not old or name == "a replaced Variable"
    fresh = sortal.graphdef(sortal.merge(*sortal.split(model)))
    assert new is fresh
    if name == "a replaced Variable":
        assert int(bits(sortal.state(model)["calls"])) == 3


def test_a_plan_is_kept_while_nothing_but_values_changes():
    model = Net(nnx.Rngs(0))
    plan = bind(model)
    model(X)
    model.raw = jnp.zeros(2)
    assert bind(model) is plan
    np.testing.assert_array_equal(bits(sortal.state(model)["raw"]), 0)
    model.eval()
    assert bind(model) is not plan
    model.train()
    assert bind(model) is plan


def test_a_dropped_model_is_freed_at_once():
    model = Net(nnx.Rngs(0))
    sortal.jit(Net.__call__)(model, X)
    array = weakref.ref(model.named.head.kernel.get_value())
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
        assert array() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------------- transforms
def trained(jit: Any, value_and_grad: Any, steps: int, model: Any, tx: Any) -> Any:
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @jit
    def step(model, optimizer, x):
        loss, grads = value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, X * (1 + i))) for i in range(steps)]
    return losses, nnx.state((model, optimizer))


@pytest.mark.parametrize("inner", ["sortal", "flax"])
def test_training_gives_the_bits_of_flax(inner):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    theirs = trained(nnx.jit, nnx.value_and_grad, 4, Net(nnx.Rngs(0)), tx)
    grad = sortal.value_and_grad if inner == "sortal" else nnx.value_and_grad
    ours = trained(sortal.jit, grad, 4, Net(nnx.Rngs(0)), tx)
    assert ours[0] == theirs[0]
    assert_same(ours[1], theirs[1])


class Image(nnx.Module):
    """A convolution with BatchNorm and Dropout."""

    def __init__(self, rngs: Any):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x.reshape(-1, 3, 2, 1)[:, :2]
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.head(self.drop(x))


class Transformer(nnx.Module):
    """Four layers of attention and a perceptron."""

    def __init__(self, rngs: Any):
        make = lambda size: nnx.Linear(*size, rngs=rngs)  # noqa: E731
        self.norms = nnx.List([nnx.LayerNorm(4, rngs=rngs) for _ in range(4)])
        self.attention = nnx.List(
            [nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False) for _ in range(4)]
        )
        self.up = nnx.List([make((4, 8)) for _ in range(4)])
        self.down = nnx.List([make((8, 4)) for _ in range(4)])
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        layers = zip(self.norms, self.attention, self.up, self.down, strict=True)
        for norm, attention, up, down in layers:
            x = x + attention(norm(x))
            x = x + self.drop(down(nnx.gelu(up(x))))
        return x


@pytest.mark.parametrize("cls", [Image, Transformer])
def test_fifty_steps_of_training_give_the_bits_of_flax(cls):
    tx = optax.adam(1e-2)
    theirs = trained(nnx.jit, nnx.value_and_grad, 50, cls(nnx.Rngs(0)), tx)
    ours = trained(sortal.jit, sortal.value_and_grad, 50, cls(nnx.Rngs(0)), tx)
    assert ours[0] == theirs[0]
    assert_same(ours[1], theirs[1])


def test_a_model_goes_back_and_forth_between_the_two_jits():
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    ways = {"both": [nnx.jit(step), sortal.jit(step)], "flax": [nnx.jit(step)]}
    found = {}
    for name, jits in ways.items():
        model = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        losses = [float(jits[i % len(jits)](model, optimizer, X)) for i in range(6)]
        found[name] = losses, nnx.state((model, optimizer))
    assert found["both"][0] == found["flax"][0]
    assert_same(found["both"][1], found["flax"][1])


def test_our_optimizer_trains_their_model():
    model, twin = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    optimizer = sortal.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    other = nnx.Optimizer(twin, optax.adam(1e-2), wrt=nnx.Param)
    for _ in range(3):
        # Grads of either library, to the optimizer of either.
        grads = nnx.grad(lambda m: (m(X) ** 2).mean())(model)
        optimizer.update(model, grads)
        other.update(twin, sortal.grad(lambda m: (m(X) ** 2).mean())(twin))
    assert_same(nnx.state(model), nnx.state(twin))


def test_what_was_passed_in_comes_out_as_the_same_object():
    model = Net(nnx.Rngs(0))
    out = sortal.jit(lambda m: (m, m.named.head, m.calls, {"l": m.blocks}))(model)
    assert out[0] is model
    assert out[1] is model.named.head
    assert out[2] is model.calls
    assert out[3]["l"] is model.blocks


def test_structure_edits_in_a_trace_are_carried_out():
    def edit(model, x):
        model.seen = nnx.Intermediate(x * 2)
        model.mode = "seen"
        model.named.head = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
        del model.sizes

    ours, theirs = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    sortal.jit(edit)(ours, X)
    nnx.jit(edit)(theirs, X)
    assert ours.mode == "seen"
    assert not hasattr(ours, "sizes")
    assert_same(nnx.state(ours), nnx.state(theirs))
    assert nnx.graphdef(ours) == nnx.graphdef(theirs)
    sortal.jit(lambda m: m.named.head.kernel.set_value(jnp.zeros((4, 1))))(ours)
    assert not np.asarray(ours.named.head.kernel.get_value()).any()


def test_an_exception_in_a_trace_leaves_the_model_as_it_was():
    model = Net(nnx.Rngs(0))
    before = flat(nnx.state(model))

    def fails(m):
        m.calls[...] += 1
        m.extra = 1
        raise KeyError("no")

    with pytest.raises(KeyError):
        sortal.jit(fails)(model)
    assert not hasattr(model, "extra")
    after = flat(nnx.state(model))
    assert all(np.array_equal(before[p], after[p]) for p in before)


def test_a_write_to_what_was_not_passed_in_is_refused():
    model = Net(nnx.Rngs(0))

    def bad(x):
        model.calls[...] = x

    with pytest.raises(Exception, match="trace level"):
        sortal.jit(bad)(jnp.array(1))
    assert int(model.calls.get_value()) == 0


def stacked(lib: Any) -> Any:
    """Layers made under vmap, scanned with remat; gradients of the whole."""

    @lib.split_rngs(splits=3)
    @lib.vmap
    def make(rngs: Any) -> Any:
        return Block(rngs)

    model = make(nnx.Rngs(0))
    axes = lib.StateAxes({...: 0})

    @lib.scan(in_axes=(axes, lib.Carry), out_axes=lib.Carry)
    @lib.remat
    def forward(model: Any, x: Any) -> Any:
        return model(x)

    y = lib.jit(forward)(model, X)
    grads = lib.jit(lib.grad(lambda m: (forward(m, X) ** 2).sum()))(model)
    return y, nnx.state(model), grads


def test_axes_and_the_like_may_be_written_in_the_words_of_flax():
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    axes = nnx.StateAxes({nnx.Param: None, ...: 0})
    mapped = sortal.vmap(lambda m, x: m(x), in_axes=(axes, 0))
    np.testing.assert_allclose(mapped(model, X), model(X), rtol=1e-6)
    by = nnx.DiffState(0, nnx.PathContains("bias"))
    grads = sortal.grad(lambda m: m(X).sum(), argnums=by)(model)
    assert grads.paths() == (("bias",),)
    shared = nnx.StateAxes({...: None})
    _, ys = sortal.scan(
        lambda m, x: (m(x).sum() + x, x),
        in_axes=(shared, nnx.Carry),
        out_axes=(nnx.Carry, 0),
        length=3,
    )(model, jnp.ones(4))
    assert ys.shape == (3, 4)
    shardings = nnx.StateSharding({...: None})
    call = sortal.jit(lambda m, x: m(x), in_shardings=(shardings, None))
    np.testing.assert_allclose(call(model, X), model(X), rtol=1e-6)


def test_layers_made_by_vmap_and_scanned_equal_those_of_flax():
    (y, state, grads), (y2, state2, grads2) = stacked(sortal), stacked(nnx)
    np.testing.assert_array_equal(y, y2)
    assert_same(state, state2)
    for path, g in flat(grads).items():
        np.testing.assert_allclose(g, flat(grads2)[path], rtol=1e-5, atol=1e-6)


def test_a_shared_kind_written_differently_under_vmap_is_refused_by_path():
    model = Net(nnx.Rngs(0))
    with pytest.raises(AxisError, match=r"calls \(Calls\)"):
        sortal.vmap(lambda m, x: m.calls.set_value(x), in_axes=(None, 0))(
            model, jnp.arange(2)
        )


def test_shard_map_and_loops_take_their_models():
    model = Block(nnx.Rngs(0))
    model.eval()
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    specs = sortal.StateSharding({...: P()})
    sharded = sortal.shard_map(
        lambda m, x: m(x), mesh=mesh, in_specs=(specs, P("d")), out_specs=P("d")
    )
    np.testing.assert_allclose(sharded(model, X), model(X), rtol=1e-6)
    net = Net(nnx.Rngs(0))

    def body(state):
        net, i = state
        net.calls[...] += i
        return net, i + 1

    out, _ = sortal.while_loop(lambda s: s[1] < 4, body, (net, 0))
    assert out is net
    assert int(net.calls.get_value()) == 6


def test_metrics_and_states_of_flax_are_carried_and_updated():
    metric = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))

    @sortal.jit
    def update(metric, state, x):
        metric.update(loss=x)
        state["calls"][...] += 1
        return state

    state = nnx.state(Net(nnx.Rngs(0)), Calls)
    out = update(metric, state, jnp.arange(4.0))
    assert float(metric.compute()["loss"]) == 1.5
    assert out is state
    assert int(state["calls"].get_value()) == 1


def test_hooks_do_not_run_when_values_are_carried():
    def hook(variable, value):
        return value + 100

    with pytest.warns(UserWarning, match="hooks are deprecated"):
        model = nnx.Dict(w=nnx.Param(jnp.ones(2), on_set_value=hook))
    sortal.update(model, jax.tree.map(lambda x: x * 2, sortal.state(model)))
    np.testing.assert_array_equal(model.w.get_raw_value(), 2)
    sortal.jit(lambda m: m.w.set_value(jnp.zeros(2)))(model)
    np.testing.assert_array_equal(model.w.get_raw_value(), 100)


def test_pickled_and_copied_models_are_models():
    model = Net(nnx.Rngs(0))
    sortal.state(model)
    again = copy.deepcopy(model)
    assert_same(sortal.state(again), nnx.state(model))


# --------------------------------------------------------------------------- mixtures
class OfBoth(sortal.Module):
    """A Module of ours with layers of both."""

    def __init__(self, rngs: Any):
        self.theirs = nnx.Linear(4, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.ours = sortal.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.ours(self.drop(self.theirs(x)))


class Theirs(nnx.Module):
    """A Module of Flax with layers of both."""

    __init__ = OfBoth.__init__
    __call__ = OfBoth.__call__


@pytest.mark.parametrize("cls", [OfBoth, Theirs])
@pytest.mark.parametrize("rngs", [sortal.Rngs, nnx.Rngs])
def test_layers_of_both_libraries_are_trained_in_one_model(cls, rngs):
    model = cls(rngs(0))

    class Reference(nnx.Module):
        def __init__(self, rngs: Any):
            self.theirs = nnx.Linear(4, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.ours = nnx.Linear(4, 4, rngs=rngs)

        __call__ = OfBoth.__call__

    twin = Reference(nnx.Rngs(0))
    optimizer = sortal.Optimizer(model, optax.sgd(0.1))
    theirs = nnx.Optimizer(twin, optax.sgd(0.1), wrt=nnx.Param)

    @sortal.jit
    def step(model, optimizer):
        grads = sortal.grad(lambda m: (m(X) ** 2).mean())(model)
        optimizer.update(model, grads)

    for _ in range(2):
        step(model, optimizer)
        theirs.update(twin, nnx.grad(lambda m: (m(X) ** 2).mean())(twin))
    found, wanted = flat(sortal.state(model, sortal.Param)), nnx.state(twin, nnx.Param)
    for path, value in flat(wanted).items():
        np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-6)
    assert int(model.drop.rngs.count[...]) == 2


def test_rng_helpers_work_on_their_streams():
    model = Block(nnx.Rngs(0))
    with sortal.split_rngs(model, splits=3):
        assert model.drop.rngs.key.shape == (3,)
    assert model.drop.rngs.key.shape == ()
    sortal.reseed(model, default=7)
    assert int(model.drop.rngs.count.get_value()) == 0


# ------------------------------------------------------------------------- meeting it
def test_flax_is_imported_by_the_user_alone_and_found_when_it_comes():
    code = (
        "import sys, sortal, jax.numpy as jnp\n"
        "assert 'flax' not in sys.modules\n"
        "sortal.state(sortal.Linear(2, 3, rngs=sortal.Rngs(0)))\n"
        "assert 'flax' not in sys.modules\n"
        "from flax import nnx\n"
        "layer = nnx.Dropout(0.5, rngs=sortal.Rngs(0))\n"
        "layer(jnp.ones(2))\n"
        "print(sortal.state(layer).paths())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "(('rngs', 'count'), ('rngs', 'key'))"


def test_an_old_flax_is_refused_with_what_to_do():
    code = (
        "import flax, sortal\n"
        "from flax import nnx\n"
        "flax.__version__ = '0.11.2'\n"
        "sortal.Rngs(0)\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        sortal.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))\n"
        "    except sortal.errors.UnsupportedError as e:\n"
        "        print(e)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    lines = ran.stdout.strip().splitlines()
    assert len(lines) == 2
    assert "found 0.11.2. Write pip install --upgrade flax." in lines[0]


class FlaxTwice(nnx.Module):
    factor = 2

    def __init__(self):
        self.w = nnx.Param(jnp.ones(2))

    def double(self, x):
        return 2 * x * self.w


class FlaxThrice(FlaxTwice):
    factor = 3


class FlaxPair(nnx.Module):
    def __init__(self):
        self.child = FlaxTwice()


def test_another_class_of_a_flax_object_or_variable_is_an_edit():
    model = FlaxPair()
    total = sortal.jit(lambda m: m.child.factor * m.child.w.sum())
    assert total(model) == 4
    model.child.__class__ = FlaxThrice
    assert total(model) == 6
    alone = FlaxTwice()
    factor = sortal.jit(lambda m: m.factor * m.w.sum())
    assert factor(alone) == 4
    alone.__class__ = FlaxThrice
    assert factor(alone) == 6
    assert len(sortal.state(alone, nnx.Param)) == 1
    alone.w.__class__ = nnx.BatchStat
    assert len(sortal.state(alone, nnx.Param)) == 0
    assert len(sortal.state(alone, nnx.BatchStat)) == 1


def test_attributes_of_a_flax_object_replaced_whole_are_an_edit():
    for model, part in ((m := FlaxPair(), m), (m := FlaxPair(), m.child)):
        before = sortal.graphdef(model)
        object.__setattr__(part, "__dict__", {**vars(part)})
        assert sortal.graphdef(model) is before
        part.more = 1
        assert sortal.graphdef(model) is not before


def test_settings_of_a_flax_object_in_making_are_structure():
    model = nnx.bridge.Module()
    before = sortal.graphdef(model)
    model._pytree__state._is_setup = True
    assert sortal.clone(model)._pytree__state.is_setup
    assert sortal.graphdef(model) is not before


@pytest.mark.parametrize(
    "tie",
    [
        lambda m: setattr(m.child, "up", nnx.data([m])),
        lambda m: setattr(m, "act", m.child.double),
        lambda m: setattr(m.child, "act", lambda x: m.child.double(x)),
        lambda m: setattr(m.child, "act", functools.partial(lambda a, x: a, m)),
        lambda m: setattr(m, "itself", nnx.data(m)),
    ],
    ids=["parent", "method", "lambda", "partial", "itself"],
)
def test_a_flax_root_with_references_back_to_it_is_freed(tie):
    def used():
        model = FlaxPair()
        tie(model)
        sortal.state(model)
        sortal.clone(model)
        return weakref.ref(model)

    gone = [used() for _ in range(3)]
    gc.collect()
    assert [x() is None for x in gone] == [True] * 3


def test_a_flax_root_tied_to_itself_after_its_last_use_is_freed():
    def used():
        model = FlaxPair()
        sortal.state(model)
        model.child.up = nnx.data([model])
        return weakref.ref(model)

    gone = used()
    gc.collect()
    assert gone() is None


# ------------------------------------------------- modes, and modules of both libraries
def mixed(outer, inner):
    """A model of one library around layers of the other."""

    class Net(outer.Module):
        def __init__(self):
            self.drop = inner.Dropout(0.5, rngs=inner.Rngs(0))
            self.norm = inner.BatchNorm(3, rngs=inner.Rngs(0))
            self.own = outer.Dropout(0.5, rngs=outer.Rngs(1))

        def __call__(self, x):
            return self.own(self.norm(self.drop(x)))

    return Net()


def test_eval_and_train_reach_the_layers_of_flax_in_a_module():
    model = mixed(sortal, nnx)
    model.eval()
    x = jnp.ones((4, 3)) + jnp.arange(3)
    mean = model.norm.mean[...]
    out = model(x)
    np.testing.assert_allclose(out, x / np.sqrt(1 + 1e-5), rtol=1e-5)
    assert (model.norm.mean[...] == mean).all(), "statistics are frozen"
    model.train()
    assert not model.drop.deterministic
    assert not model.norm.use_running_average
    model(x)
    assert (model.norm.mean[...] != mean).any()


class Mixed(nnx.Module):
    """A layer of each library in a module of Flax."""

    def __init__(self):
        self.theirs = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        self.ours = sortal.Linear(3, 2, rngs=sortal.Rngs(1))

    def __call__(self, x):
        return self.ours(self.theirs(x))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_flax_s_optimizer_says_that_it_would_not_train_a_layer_of_ours(compiled):
    model = Mixed()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    def step(model, optimizer):
        grads = sortal.grad(lambda m: (m(X) ** 2).mean())(model)
        optimizer.update(model, grads)

    before = flat(sortal.state(model))
    with pytest.raises(UnsupportedError) as error:
        (sortal.jit(step) if compiled else step)(model, optimizer)
    text = str(error.value)
    assert text.startswith("Flax does not see these Variables of Sortal, and by kind")
    assert "ours.kernel (Param)" in text
    assert "theirs.kernel" not in text
    assert "such as sortal.Optimizer(model, tx)" in text
    after = flat(sortal.state(model))
    assert all((after[path] == before[path]).all() for path in before)
    ours = sortal.Optimizer(model, optax.sgd(0.1))
    ours.update(model, sortal.grad(lambda m: (m(X) ** 2).mean())(model))
    after = flat(sortal.state(model))
    assert all((after[path] != before[path]).any() for path in before)


def test_flax_s_optimizer_trains_its_own_layers_by_a_state_without_ours():
    model = Mixed()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    loss = lambda m: (m(X) ** 2).mean()  # noqa: E731
    grads = sortal.grad(loss, wrt=sortal.Param & sortal.Under("theirs"))(model)
    before = flat(sortal.state(model))
    optimizer.update(model, grads)
    after = flat(sortal.state(model))
    assert (after["theirs", "kernel"] != before["theirs", "kernel"]).any()


@pytest.mark.parametrize("outer", [sortal, nnx], ids=["sortal", "flax"])
@pytest.mark.parametrize("inner", [sortal, nnx], ids=["sortal", "flax"])
def test_set_attributes_reaches_the_modules_of_both(outer, inner):
    model = mixed(outer, inner)
    x = jnp.ones((4, 3)) + jnp.arange(3)
    sortal.set_attributes(model, deterministic=True, use_running_average=True)
    np.testing.assert_allclose(model(x), x / np.sqrt(1 + 1e-5), rtol=1e-5)
    sortal.set_attributes(model, inner.Dropout, deterministic=False)
    assert not model.drop.deterministic
    assert model.norm.use_running_average
    with pytest.raises(ArgumentError, match=r"\['determinstic'\], in 4 modules"):
        sortal.set_attributes(model, determinstic=True)


def test_explain_says_where_the_eval_of_flax_stopped():
    """Flax's own method walks Flax's modules alone."""
    model = mixed(nnx, sortal)
    assert "evaluation" not in str(sortal.explain(model, ...))
    model.eval()
    text = str(sortal.explain(model, ...)).replace("\n", " ")
    assert "deterministic is True in Flax's modules (own) and False in Sortal's" in text
    assert "sortal.set_attributes(model, deterministic=True)" in text
    sortal.set_attributes(model, deterministic=True, use_running_average=True)
    assert "Flax's modules" not in str(sortal.explain(model, ...))


@pytest.mark.parametrize("outer", [sortal, nnx], ids=["sortal", "flax"])
@pytest.mark.parametrize("inner", [sortal, nnx], ids=["sortal", "flax"])
def test_a_view_reaches_the_modules_of_both(outer, inner):
    from sortal.nnx import view

    model = mixed(outer, inner)
    frozen = view(model, deterministic=True, use_running_average=True)
    x = jnp.ones((4, 3)) + jnp.arange(3)
    np.testing.assert_allclose(frozen(x), x / np.sqrt(1 + 1e-5), rtol=1e-5)
    assert not model.drop.deterministic
    assert frozen.norm.scale is model.norm.scale


@pytest.mark.parametrize("outer", [sortal, nnx], ids=["sortal", "flax"])
@pytest.mark.parametrize("inner", [sortal, nnx], ids=["sortal", "flax"])
def test_modules_of_both_are_iterated(outer, inner):
    model = mixed(outer, inner)
    found = dict(sortal.iter_modules(model))
    assert found[()] is model
    assert found[("drop",)] is model.drop
    children = [name for name, _ in sortal.iter_children(model)]
    assert children == ["drop", "norm", "own"]


def test_a_variable_of_flax_is_no_value_of_one_of_ours():
    theirs, ours = nnx.Param(jnp.ones(2)), sortal.Param(jnp.zeros(2))
    for write in (
        lambda: sortal.Param(theirs),
        lambda: setattr(ours, "value", theirs),
        lambda: ours.set_value(theirs),
    ):
        with pytest.raises(VariableError, match=r"Param.*Write .*\.value"):
            write()
    assert (ours.value == 0).all()
    ours[...] = theirs
    assert isinstance(ours.value, jax.Array)
    assert (ours.value == 1).all()


FILTER_OBJECTS = [
    (nnx.OfType(nnx.Param), sortal.Param),
    (nnx.Not(nnx.Param), sortal.Not(sortal.Param)),
    (nnx.All(nnx.Param, nnx.PathContains("ours")), sortal.Param & sortal.Under("ours")),
    (nnx.Any(nnx.filterlib.PathIn(("ours", "bias")), "tag"), sortal.At("ours.bias")),
    (nnx.Not(nnx.WithTag("tag")), ...),
    (nnx.PathContains("ur", exact=False), sortal.Under("ours")),
    (nnx.Any(lambda path, leaf: path[0] == "ours"), sortal.Under("ours")),
    (nnx.Everything(), ...),
    (nnx.Nothing(), None),
]


@pytest.mark.parametrize(("theirs", "ours"), FILTER_OBJECTS)
def test_a_filter_object_of_flax_takes_kinds_of_both_libraries(theirs, ours):
    """Called as a function, it would know Flax's classes alone."""
    model = Mixed()
    model.stat = sortal.BatchStat(jnp.ones(2))
    assert sortal.state(model, theirs).paths() == sortal.state(model, ours).paths()
    inner = (nnx.Not(theirs), sortal.Not(ours))
    a, b = (sortal.state(model, written).paths() for written in inner)
    assert a == b


def test_a_layer_in_a_filter_object_of_flax_is_refused():
    with pytest.raises(FilterError, match="Linear: a filter takes leaves"):
        sortal.state(Mixed(), nnx.Not(nnx.OfType(nnx.Linear)))


# ------------------------------------------------------------------------- sowing
class Sows(nnx.Module):
    """Sows and perturbs, and holds a module of either library that does."""

    def __init__(self, inner=None):
        self.inner = inner

    def __call__(self, x):
        self.sow(nnx.Intermediate, "x", x)
        x = self.perturb("at", 2 * x)
        return x if self.inner is None else self.inner(x)


class OurSows(sortal.Module):
    __init__, __call__ = Sows.__init__, Sows.__call__


NESTED = {
    "flax": lambda: Sows(Sows()),
    "sortal in flax": lambda: Sows(OurSows()),
    "flax in sortal": lambda: OurSows(Sows(Sows())),
    "in turns": lambda: OurSows(Sows(OurSows(Sows()))),
}


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="this Flax has none")
@pytest.mark.parametrize("kinds", [sortal, nnx], ids=["our kinds", "Flax's kinds"])
@pytest.mark.parametrize("name", NESTED)
def test_what_modules_of_flax_sow_is_captured(name, kinds):
    from sortal.nnx import capture

    model = NESTED[name]()
    depth = len(list(sortal.iter_modules(model)))
    x = jnp.array(3.0)
    out, sown, zeros = capture(model, kinds.Intermediate, kinds.Perturbation)(x)
    assert out == x * 2**depth
    paths = [("inner",) * n for n in range(depth)]
    assert {p: v.get_value() for p, v in sown.flat_state()} == {
        (*p, "x"): (x * 2**n,) for n, p in enumerate(paths)
    }
    assert {p: v.get_value() for p, v in zeros.flat_state()} == {
        (*p, "at"): 0 for p in paths
    }
    assert not sortal.state(model).paths()
    loss = lambda zeros, model: capture(model, init=zeros)(x)  # noqa: E731
    grads = sortal.grad(loss)(zeros, model)
    assert {p: v.get_value() for p, v in grads.flat_state()} == {
        (*p, "at"): 2 ** (depth - 1 - n) for n, p in enumerate(paths)
    }

    @sortal.jit
    def forward(model, x):
        return capture(model, kinds.Intermediate)(x)

    _, again = forward(model, x)
    assert again.paths() == sown.paths()
    assert not sortal.state(model).paths()


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="this Flax has none")
def test_after_an_error_modules_of_flax_capture_nothing():
    from sortal.nnx import capture

    class Fails(Sows):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "x", x)
            raise RuntimeError

    model = Sows(Fails())
    with pytest.raises(RuntimeError):
        capture(model, nnx.Intermediate)(1.0)
    assert [k for k in vars(model) if "captures" in k] == []
    assert [k for k in vars(model.inner) if "captures" in k] == []


# ------------------------------------------------------------------------ every verb
def averaged(model):
    ema = sortal.EMA(model, decay=0.5, only=sortal.Param)
    sortal.update(
        model, jax.tree.map(lambda x: x + 1, sortal.state(model, sortal.Param))
    )
    ema.update(model)
    return sortal.state(ema.apply_to(model))


def popped(model):
    model.seen = type(model.norm.mean)(jnp.ones(2))
    return sortal.pop(model, lambda path, leaf: path[0] == "seen"), sortal.state(model)


def restored(model):
    with tempfile.TemporaryDirectory() as place:
        sortal.save(place, model, step=1)
        before = sortal.state(model)
        sortal.update(model, {"norm": {"scale": jnp.zeros(3)}})
        sortal.restore(place, model)
    return before, sortal.state(model)


def test_a_checkpoint_read_without_a_model_has_flaxs_kinds(tmp_path):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    sortal.save(tmp_path, {"m": model, "rngs": nnx.Rngs(0)}, step=1)
    model.kernel.set_value(jnp.zeros((2, 3)))
    found = sortal.load_state(tmp_path, only=nnx.Param)
    assert type(found["m"]["kernel"]) is nnx.Param
    sortal.update({"m": model}, found)
    assert model.kernel[...].any()
    assert type(sortal.load_state(tmp_path)["rngs"].default.key) is nnx.RngKey


def sharded(model):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    policy = {sortal.Param: sortal.Rule(spec=P("d"))}
    made = sortal.shard(model, mesh, policy)
    state = sortal.state(made)
    where = {path: str(x.get_value().sharding.spec) for path, x in state.flat_state()}
    return state, where, str(sortal.specs(made, policy))


def captured(model):
    from sortal.nnx import capture

    return capture(model, sortal.Intermediate)(jnp.ones((2, 3)))[1]


def with_new_streams(model):
    from sortal import nnx as names

    return (
        sortal.state(names.with_rngs(model, split=2), sortal.RngState),
        sortal.state(names.with_rngs(model, fork="default"), sortal.RngState),
        sortal.state(names.with_rngs(model, broadcast=2), sortal.RngState),
        sortal.state(names.split_rngs(model, splits=3, graph=False), sortal.RngState),
        sortal.state(
            names.split_rngs(model, splits=1, squeeze=True, graph=False),
            sortal.RngState,
        ),
        sortal.state(names.fork_rngs(model, split=2, graph=False), sortal.RngState),
        sortal.state(names.fork_rngs(model, graph=False), sortal.RngState),
        tuple(bits(key).tolist() for _, key, _ in names.rnglib.backup_keys(model)),
    )


def walked(model):
    from sortal import nnx as names

    return (
        tuple(key for key, _ in names.iter_module_children(model)),
        names.as_pure(sortal.state(model, sortal.Param))["norm"]["scale"].tolist(),
        str(names.find_duplicates([model, model.own])),
    )


def placed_by_names(model):
    from sortal import nnx as names

    model.norm.scale.set_metadata(out_sharding=("d",))
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))

    def shown(tree):
        state = sortal.state(tree, sortal.Param)
        return tuple((p, str(x.get_value())) for p, x in state.flat_state())

    abstract = sortal.eval_shape(lambda m: sortal.clone(m), model)
    with jax.set_mesh(mesh):
        made = sortal.state(names.as_abstract(abstract), sortal.Param)
    return (
        shown(names.get_partition_spec(model)),
        shown(names.get_partition_spec(sortal.state(model))),
        shown(names.get_named_sharding(sortal.state(model), mesh)),
        str(made["norm"]["scale"].get_value().sharding),
    )


VERBS = {
    "names of axes": placed_by_names,
    "new streams": with_new_streams,
    "walks": walked,
    "state": lambda m: sortal.state(m, sortal.Param),
    "split and merge": lambda m: sortal.state(sortal.merge(*sortal.split(m))),
    "variables": lambda m: sortal.variables(m),
    "clone": lambda m: sortal.state(sortal.clone(m, arrays=True)),
    "pop": popped,
    "iter_graph": lambda m: [
        p for p, x in sortal.iter_graph(m) if p and not isinstance(x, tuple)
    ],
    "iter_modules": lambda m: [p for p, _ in sortal.iter_modules(m)],
    "iter_children": lambda m: [name for name, _ in sortal.iter_children(m)],
    "explain": lambda m: str(sortal.explain(m, sortal.Param, sortal.BatchStat)).count(
        "own.rngs"
    ),
    "tabulate": lambda m: str(sortal.tabulate(m)).count("own.rngs"),
    "EMA": averaged,
    "save and restore": restored,
    "shard": sharded,
    "reseed": lambda m: (sortal.reseed(m, default=3), sortal.state(m, sortal.RngKey)),
    "capture": captured,
}


def comparable(x):
    if isinstance(x, sortal.State):
        return {path: bits(x).tolist() for path, x in x.flat_state()}
    return [comparable(y) for y in x] if isinstance(x, tuple) else x


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_does_to_a_model_of_flax_what_it_does_to_ours(name):
    theirs, ours = VERBS[name](mixed(nnx, nnx)), VERBS[name](mixed(sortal, sortal))
    assert comparable(theirs) == comparable(ours)


def test_a_filter_that_holds_a_flax_model_does_not_keep_it():
    class Holding(sortal.Filter):
        structural = True

        def __init__(self, model):
            self.model = model

        def test(self, path, kind, metadata, leaf):
            return True

    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    model.only_here = nnx.Param(0.0)  # what other models share keeps filters too
    sortal.state(model)
    sortal.state(model, Holding(model))
    held = weakref.ref(model)
    del model
    gc.collect()
    gc.collect()
    assert held() is None
