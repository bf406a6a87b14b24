"""Optimizer: the numbers of optax, state that keeps its place, refusals that tell."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx

import sortal
from sortal import nnx
from sortal.errors import (
    ArgumentError,
    FilterError,
    OptimizerError,
    PolicyError,
    TraceError,
)
from sortal.policy.policy import UNSET
from sortal.training.optimizer import Hyperparam

rng = np.random.default_rng(0)
SHAPES = {"bias": (4,), "kernel": (4, 4)}
VALUES = [
    {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    for _ in range(3)
]
X = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)


def make(lib):
    """The same model in `sortal` or `flax.nnx`."""

    class Layer(lib.Module):
        def __init__(self, values):
            self.kernel = lib.Param(jnp.array(values["kernel"]))
            self.bias = lib.Param(jnp.array(values["bias"]))

        def __call__(self, x):
            return x @ self.kernel[...] + self.bias[...]

    class Net(lib.Module):
        def __init__(self):
            self.layers = lib.List([Layer(v) for v in VALUES[:2]])
            self.head = Layer(VALUES[2])
            self.seen = lib.BatchStat(jnp.zeros(2))

        def __call__(self, x):
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return self.head(x)

    return Net()


def loss_of(model):
    return (model(X) ** 2).mean()


def as_dict():
    """The parameters as plain nested dicts, in the order of the model's paths."""
    return {
        "head": {k: jnp.array(v) for k, v in VALUES[2].items()},
        "layers": [{k: jnp.array(v) for k, v in vs.items()} for vs in VALUES[:2]],
    }


def dict_loss(params):
    x = X
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return ((x @ params["head"]["kernel"] + params["head"]["bias"]) ** 2).mean()


def equal(xs, ys):
    xs, ys = jax.tree.leaves(xs), jax.tree.leaves(ys)
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys, strict=True):
        assert jnp.asarray(x).dtype == jnp.asarray(y).dtype
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert (x == y).all()
        else:
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def values(model):
    return nnx.state(model, nnx.Param).values_list()


def is_matrix(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def in_head(path):
    return "head" in jax.tree_util.keystr(path)


def head_or_body(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "head" if in_head(path) else "body", params
    )


SCHEDULE = optax.cosine_decay_schedule(0.1, 4)
TRANSFORMATIONS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.01),
    "adamw with a mask": lambda: optax.adamw(0.01, weight_decay=0.1, mask=is_matrix),
    "clipping": lambda: optax.chain(optax.clip_by_global_norm(0.01), optax.adam(0.01)),
    "schedule": lambda: optax.adam(SCHEDULE),
    "adafactor": lambda: optax.adafactor(0.01, min_dim_size_to_factor=2),
    "masked": lambda: optax.masked(optax.adam(0.01), is_matrix),
    "labels": lambda: optax.multi_transform(
        {"head": optax.adam(0.01), "body": optax.sgd(0.1)}, head_or_body
    ),
    "freezing": lambda: optax.multi_transform(
        {"head": optax.adam(0.01), "body": optax.set_to_zero()}, head_or_body
    ),
    "multi-steps": lambda: optax.MultiSteps(optax.adam(0.01), 2),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
    "if finite": lambda: optax.apply_if_finite(optax.adam(0.01), 3),
}
every_transformation = pytest.mark.parametrize(
    "tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS
)


@every_transformation
def test_eager_steps_are_those_of_optax_on_dicts_and_of_flax_bit_for_bit(tx):
    model, other, params = make(nnx), make(flax_nnx), as_dict()
    optimizer = nnx.Optimizer(model, tx(), wrt=nnx.Param)
    reference = flax_nnx.Optimizer(other, tx(), wrt=flax_nnx.Param)
    plain = tx()
    kept = plain.init(params)
    for _ in range(3):
        grads = jax.grad(dict_loss)(params)
        flat = jax.tree.leaves(grads)
        mine = nnx.state(model, nnx.Param)
        given = jax.tree.unflatten(jax.tree.structure(mine), flat)
        updates = optimizer.update(model, given)
        theirs = flax_nnx.state(other, flax_nnx.Param)
        reference.update(other, jax.tree.unflatten(jax.tree.structure(theirs), flat))
        wanted, kept = plain.update(grads, kept, params)
        params = optax.apply_updates(params, wanted)
        equal(updates, wanted)
        equal(values(model), params)
        equal(values(model), flax_nnx.state(other, flax_nnx.Param))
        equal(optimizer.opt_state, kept)
    assert int(optimizer.step) == int(reference.step[...]) == 3
    assert optimizer.step.value.dtype == jnp.uint32


@every_transformation
def test_jitted_steps_are_those_of_flax_bit_for_bit(tx):
    def train(lib):
        model = make(lib)
        optimizer = lib.Optimizer(model, tx(), wrt=lib.Param)

        @lib.jit
        def step(model, optimizer):
            loss, grads = lib.value_and_grad(loss_of)(model)
            optimizer.update(model, grads)
            return loss

        return [step(model, optimizer) for _ in range(3)], lib.state(model, lib.Param)

    (mine, params), (theirs, wanted) = train(nnx), train(flax_nnx)
    equal(mine, theirs)
    equal(params, wanted)


def lbfgs():
    search = optax.scale_by_backtracking_linesearch(4)
    return optax.lbfgs(memory_size=2, linesearch=search)


@pytest.mark.parametrize("tx", [lbfgs, optax.polyak_sgd], ids=["lbfgs", "polyak"])
def test_keyword_arguments_reach_optax_as_with_flax(tx):
    def train(lib):
        model = make(lib)
        optimizer = lib.Optimizer(model, tx(), wrt=lib.Param)

        @lib.jit
        def step(model, optimizer):
            graphdef, _, rest = lib.split(model, lib.Param, ...)

            def value_fn(params):
                return loss_of(lib.merge(graphdef, params, rest))

            loss, grads = lib.value_and_grad(loss_of)(model)
            more = {"grad": grads, "value_fn": value_fn} if tx is lbfgs else {}
            optimizer.update(model, grads, value=loss, **more)
            return loss

        losses = [step(model, optimizer) for _ in range(3)]
        return losses, lib.state(model, lib.Param)

    (mine, params), (theirs, wanted) = train(nnx), train(flax_nnx)
    equal(mine, theirs)
    equal(params, wanted)
    assert mine[-1] < mine[0]


def test_keyword_arguments_may_be_variables_and_states_of_bare_values():
    seen = {}

    def update(updates, state, params, *, value, extra, other):
        seen.update(value=value, extra=extra, other=other)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    model = make(nnx)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(loss_of)(model)
    bare = grads.map(lambda path, v: v.value)
    foreign = nnx.State({"x": jnp.ones(1)})
    optimizer.update(
        model, grads, value=nnx.Param(jnp.ones(())), extra=bare, other=foreign
    )
    assert isinstance(seen["value"], jax.Array)
    assert jax.tree.structure(seen["extra"]) == jax.tree.structure(grads)
    assert seen["other"] is foreign


def test_masks_and_labels_made_from_states_work_boxed_bare_or_computed():
    def trained(mask):
        model = make(nnx)
        tx = optax.adamw(0.01, weight_decay=0.1, mask=mask)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(2):
            optimizer.update(model, nnx.grad(loss_of)(model))
        return values(model)

    params = nnx.state(make(nnx), nnx.Param)
    bare = nnx.map_state(lambda path, v: v.ndim > 1, params)
    equal(trained(is_matrix), trained(is_matrix(params)))
    equal(trained(is_matrix), trained(bare))


def test_bare_labels_by_path_split_the_state_and_survive_jit():
    model = make(nnx)
    params = nnx.state(model, nnx.Param)
    labels = nnx.map_state(lambda path, _: "a" if path[0] == "head" else "b", params)
    tx = optax.multi_transform({"a": optax.adam(0.01), "b": optax.sgd(0.1)}, labels)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_of)(model))

    reference = make(nnx)
    by_path = TRANSFORMATIONS["labels"]()
    other = nnx.Optimizer(reference, by_path, wrt=nnx.Param)
    for _ in range(3):
        step(model, optimizer)
        step(reference, other)
    equal(values(model), values(reference))


# ------------------------------------------------------------------ what is kept
def test_state_lies_at_the_parameters_paths_in_kinds_of_opt_state():
    model = make(nnx)
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    state = nnx.state(optimizer)
    at = ("opt_state", 0, "mu", "layers", 0, "kernel")
    assert at in state.paths()
    kinds = dict(zip(state.paths(), state.schema.kinds, strict=True))
    assert kinds[at] is nnx.OptVariable
    assert kinds["opt_state", 0, "count"] is nnx.OptArray
    assert kinds["step",] is nnx.OptState
    assert set(kinds.values()) == {nnx.OptVariable, nnx.OptArray, nnx.OptState}
    assert optimizer.opt_state[0].mu.layers[0].kernel.value.shape == (4, 4)
    assert nnx.state(optimizer, nnx.OptState).paths() == state.paths()


def test_state_has_the_metadata_of_its_parameters():
    model = make(nnx)
    model.head.kernel.set_metadata(spec=("x", None))
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    assert optimizer.opt_state[0].nu.head.kernel.get_metadata() == {"spec": ("x", None)}


def test_metadata_edited_after_the_start_does_no_harm():
    model, reference = make(nnx), make(nnx)
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    other = nnx.Optimizer(reference, optax.adam(0.01), wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, nnx.grad(loss_of)(model))
        other.update(reference, nnx.grad(loss_of)(reference))
        model.head.kernel.set_metadata(note=1)
    equal(values(model), values(reference))


def test_updates_are_written_into_the_variables_that_are_there():
    model = make(nnx)
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    before = list(map(id, nnx.variables(optimizer).leaves()))
    graphdef = nnx.graphdef(optimizer)
    optimizer.update(model, nnx.grad(loss_of)(model))
    assert list(map(id, nnx.variables(optimizer).leaves())) == before
    assert nnx.graphdef(optimizer) is graphdef


def test_optax_sees_gradients_and_moments_with_the_treedef_of_the_parameters():
    seen = []

    def update(updates, state, params=None):
        seen.extend([updates, state, params])
        return updates, state

    tx = optax.GradientTransformation(lambda params: params, update)
    model = make(nnx)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(loss_of)(model))
    expected = jax.tree.structure(nnx.state(model, nnx.Param))
    assert [jax.tree.structure(x) for x in seen] == [expected] * 3


def test_state_whose_structure_changes_is_stored_anew():
    def init(params):
        return ()

    def update(updates, state, params=None):
        return updates, {"n": jnp.array(len(state)), "g": updates}

    model = make(nnx)
    tx = optax.GradientTransformation(init, update)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(loss_of)(model))
    assert int(optimizer.opt_state["n"]) == 0
    held = optimizer.opt_state["n"]
    optimizer.update(model, nnx.grad(loss_of)(model))
    assert int(held) == 2
    assert held is optimizer.opt_state["n"]


def test_a_state_of_another_structure_or_a_raw_array_is_stored_anew():
    def update(updates, state, params=None):
        return updates, {"a": nnx.State({"head": jnp.ones(2)})}

    model = make(nnx)
    tx = optax.GradientTransformation(lambda params: {"a": params}, update)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(loss_of)(model))
    assert isinstance(optimizer.opt_state["a"]["head"], nnx.OptArray)
    optimizer.opt_state = {"a": jnp.ones(3)}
    optimizer.update(model, nnx.grad(loss_of)(model))
    assert isinstance(optimizer.opt_state["a"]["head"], nnx.OptArray)


def test_paths_and_variables_of_a_transformations_own_making_are_kept():
    def init(params):
        own = nnx.State({"mine": nnx.Param(jnp.zeros(2))})
        return {"own": own, "one": nnx.Param(jnp.ones(1))}

    model = make(nnx)
    tx = optax.GradientTransformation(init, lambda g, s, p=None: (g, s))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef = nnx.graphdef(optimizer)
    optimizer.update(model, nnx.grad(loss_of)(model))
    assert nnx.graphdef(optimizer) is graphdef
    assert isinstance(optimizer.opt_state["own"]["mine"], nnx.OptVariable)
    assert optimizer.opt_state["one"].value.tolist() == [1.0]


def test_a_single_variable_in_a_new_optax_state_is_written_by_value():
    def init(params):
        return {"one": jnp.ones(1)}

    def update(updates, state, params=None):
        return updates, {"one": nnx.Param(2 * state["one"])}

    model = make(nnx)
    tx = optax.GradientTransformation(init, update)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(loss_of)(model))
    assert optimizer.opt_state["one"].value.tolist() == [2.0]


def test_the_state_never_shares_a_buffer_with_the_model():
    keeps = optax.GradientTransformation(
        lambda params: (params, params.values_list()[0]), lambda g, s, p=None: (g, s)
    )
    model = make(nnx)
    optimizer = nnx.Optimizer(model, keeps, wrt=nnx.Param)
    mine = {x.unsafe_buffer_pointer() for x in values(model)}
    kept = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(nnx.state(optimizer))]
    assert not mine & set(kept)
    equal(optimizer.opt_state[0], values(model))


@pytest.mark.parametrize("donated", [(0, 1), (1,)], ids=["both", "optimizer"])
def test_training_goes_on_with_donated_buffers(donated):
    model, reference = make(nnx), make(nnx)
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    other = nnx.Optimizer(reference, optax.adam(0.01), wrt=nnx.Param)

    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_of)(model))

    fast, slow = nnx.jit(step, donate_argnums=donated), nnx.jit(step)
    for _ in range(3):
        old = optimizer.opt_state[0].mu.head.kernel.value
        fast(model, optimizer)
        slow(reference, other)
        assert old.is_deleted()
    equal(values(model), values(reference))


def test_a_step_is_compiled_once():
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        optimizer.update(model, nnx.grad(loss_of)(model))

    model = make(nnx)
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    for _ in range(3):
        step(model, optimizer)
    assert len(traces) == 1


@pytest.mark.parametrize("write", ["value", "item"])
def test_a_hyperparameter_written_between_steps_takes_effect_uncompiled(write):
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        optimizer.update(model, nnx.grad(loss_of)(model))

    model = make(nnx)
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step(model, optimizer)
    before = values(model)
    rate = optimizer.opt_state.hyperparams["learning_rate"]
    assert type(rate).__name__ == "Hyperparam"
    assert isinstance(rate, nnx.OptArray)
    if write == "value":
        rate.value = 0.0
    else:
        rate[...] = 0.0
    step(model, optimizer)
    equal(values(model), before)
    assert optimizer.opt_state.hyperparams["learning_rate"] is rate
    rate.value = np.float64(0.1)
    step(model, optimizer)
    assert not np.array_equal(values(model)[0], before[0])
    assert len(traces) == 1


def test_a_hyperparameter_takes_a_number_in_its_own_dtype_and_an_array_as_it_is():
    strong, weak = Hyperparam(jnp.ones((), jnp.bfloat16)), Hyperparam(jnp.asarray(1.0))
    strong.value, weak.value = 0.5, 0.25
    assert strong.value.dtype == jnp.bfloat16
    assert weak.value.weak_type
    strong.value = jnp.ones(2)
    assert strong.value.shape == (2,)
    plain = Hyperparam(1.0)
    plain.value = 2
    assert plain.value == 2
    weak.set_value(3.0, index=...)
    assert float(weak.value) == 3.0


# ------------------------------------------------------------------------ groups
def grouped(model, **options):
    groups = {
        nnx.At("head.**"): optax.adam(0.01),
        nnx.At("layers.**"): optax.sgd(0.1, momentum=0.9),
    }
    return nnx.Optimizer(model, groups, **options)


def test_groups_train_as_each_transformation_alone_would():
    model, params = make(nnx), as_dict()
    optimizer = grouped(model)
    txs = {"head": optax.adam(0.01), "layers": optax.sgd(0.1, momentum=0.9)}
    kept = {k: tx.init(params[k]) for k, tx in txs.items()}
    for _ in range(3):
        grads = jax.grad(dict_loss)(params)
        given = nnx.state(model, nnx.Param)
        given = jax.tree.unflatten(jax.tree.structure(given), jax.tree.leaves(grads))
        updates = optimizer.update(model, given)
        wanted = {}
        for k, tx in txs.items():
            wanted[k], kept[k] = tx.update(grads[k], kept[k], params[k])
        params = optax.apply_updates(params, wanted)
        equal(updates, wanted)
        equal(values(model), params)


def test_groups_keep_state_for_their_own_leaves_only_at_readable_paths():
    optimizer = grouped(make(nnx), wrt=nnx.Param)
    found = nnx.state(optimizer, nnx.OptVariable).paths()
    assert ("opt_state", 0, 0, "mu", "head", "kernel") in found
    assert ("opt_state", 1, 0, "trace", "layers", 0, "bias") in found
    assert len(found) == 2 * 2 + 4
    assert len(nnx.state(nnx.Optimizer(make(nnx), {nnx.At("head.**"): optax.adam(1.0)}),
                         nnx.OptVariable).paths()) == 4  # fmt: skip


def test_groups_compile_once_and_train_under_jit():
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        optimizer.update(model, nnx.grad(loss_of)(model))
        return loss_of(model)

    model = make(nnx)
    optimizer = grouped(model, wrt=nnx.Param)
    reference = make(nnx)
    other = grouped(reference, wrt=nnx.Param)
    for _ in range(3):
        step(model, optimizer)
        other.update(reference, nnx.grad(loss_of)(reference))
    for x, y in zip(values(model), values(reference), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    assert len(traces) == 1


def test_a_last_group_of_everything_takes_the_rest():
    model = make(nnx)
    groups = {nnx.At("head.**"): optax.adam(0.01), ...: optax.sgd(0.1, momentum=0.9)}
    optimizer = nnx.Optimizer(model, groups, wrt=nnx.Param)
    reference = make(nnx)
    other = grouped(reference)
    for m, o in [(model, optimizer), (reference, other)]:
        o.update(m, nnx.grad(loss_of)(m))
    equal(values(model), values(reference))


def test_groups_may_be_chosen_by_value():
    model = make(nnx)
    groups = {nnx.Shaped(ndim=1): optax.sgd(0.0), nnx.Shaped(ndim=2): optax.sgd(0.1)}
    optimizer = nnx.Optimizer(model, groups, wrt=nnx.Param)
    before = model.head.bias.value, model.head.kernel.value
    optimizer.update(model, nnx.grad(loss_of)(model))
    assert np.array_equal(before[0], model.head.bias.value)
    assert not np.array_equal(before[1], model.head.kernel.value)


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.flatten(optax.adam(0.1))])
def test_a_leaf_that_moved_to_another_group_is_refused(tx):
    class Other(nnx.Param):
        pass

    model = {k: nnx.Param(jnp.ones(2)) for k in "abc"} | {"d": Other(jnp.ones(2))}
    groups = {Other: tx, ...: tx}
    optimizer = nnx.Optimizer(model, groups, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model))
    optimizer.update(model, grads)
    before = snapshot_of(optimizer)
    model["a"], model["d"] = Other(jnp.ones(2)), nnx.Param(jnp.ones(2))
    with pytest.raises(OptimizerError) as caught:
        optimizer.update(model, grads)
    assert "  a (Other): in Other, was in ...\n" in str(caught.value)
    assert "  d (Param): in ..., was in Other\n" in str(caught.value)
    same(before, snapshot_of(optimizer))
    with pytest.raises(OptimizerError, match="in other groups than when"):
        optimizer.optax_state(model)


def test_a_group_whose_structure_changes_leaves_the_others_in_place():
    def update(updates, state, params=None):
        return updates, (jnp.ones(()), *state)

    grows = optax.GradientTransformation(lambda params: (), update)
    model = make(nnx)
    groups = {nnx.At("head.**"): optax.adam(0.01), ...: grows}
    optimizer = nnx.Optimizer(model, groups, wrt=nnx.Param)
    mu = optimizer.opt_state[0][0].mu.head.kernel
    optimizer.update(model, nnx.grad(loss_of)(model))
    assert optimizer.opt_state[0][0].mu.head.kernel is mu
    assert len(optimizer.opt_state[1]) == 1


def test_of_several_groups_those_get_keyword_arguments_that_take_them():
    model = make(nnx)
    groups = {nnx.At("head.**"): optax.polyak_sgd(), ...: optax.scale(-0.1)}
    optimizer = nnx.Optimizer(model, groups, wrt=nnx.Param)
    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads, value=loss, grad=grads)
    assert loss_of(model) < loss


def test_leaves_in_no_group_or_in_two_are_all_listed_with_their_filters():
    groups = {nnx.At("head.**"): optax.sgd(0.1), nnx.At("**.bias"): optax.sgd(0.2)}
    with pytest.raises(OptimizerError) as caught:
        nnx.Optimizer(make(nnx), groups, wrt=nnx.Param)
    text = str(caught.value)
    assert "head.bias (Param): in At('head.**'), At('**.bias')" in text
    assert "layers.0.kernel (Param): in no group" in text
    assert "layers.1.kernel (Param): in no group" in text
    assert "head.kernel" not in text
    assert "a last group `...`" in text


def test_a_group_without_leaves_is_refused():
    groups = {nnx.At("haed.**"): optax.sgd(0.1), ...: optax.sgd(0.2)}
    with pytest.raises(OptimizerError, match=r"in the group At\('haed\.\*\*'\)"):
        nnx.Optimizer(make(nnx), groups, wrt=nnx.Param)


@pytest.mark.parametrize(
    ("groups", "wrt"),
    [
        ({"head": optax.sgd(0.1), ...: optax.sgd(0.2)}, nnx.Param),
        ({"head": optax.sgd(0.1), nnx.At("layers.**"): optax.sgd(0.2)}, nnx.Param),
        ({"head": optax.sgd(0.1), "layers.0": optax.sgd(0.2)}, UNSET),
        (optax.sgd(0.1), "head"),
    ],
)
def test_a_path_given_as_a_string_earns_a_hint_that_works(groups, wrt):
    with pytest.raises(OptimizerError) as caught:
        nnx.Optimizer(make(nnx), groups, wrt=wrt)
    hint = "'head' is read as a tag; for the path write Under('head')."
    assert str(caught.value).count(hint) == 1
    nnx.Optimizer(make(nnx), optax.sgd(0.1), wrt=nnx.Under("head"))


def test_a_dict_without_groups_is_refused():
    with pytest.raises(
        OptimizerError, match=r"dict of groups is empty; write \{filter"
    ):
        nnx.Optimizer(make(nnx), {})


# ---------------------------------------------------------------------- refusals
def test_what_is_no_transformation_is_refused():
    with pytest.raises(
        OptimizerError, match=r"adam\(1e-3\), is expected; found:\n  tx: 0\.1"
    ):
        nnx.Optimizer(make(nnx), 0.1)
    with pytest.raises(OptimizerError, match=r"Param: 'sgd'"):
        nnx.Optimizer(make(nnx), {nnx.Param: "sgd"})


def test_a_filter_that_takes_nothing_is_refused_with_what_there_is():
    with pytest.raises(OptimizerError) as caught:
        nnx.Optimizer(make(nnx), optax.sgd(0.1), wrt=nnx.Cache)
    assert "wrt=Cache takes none of the 7 leaves" in str(caught.value)
    assert "seen (BatchStat)" in str(caught.value)


def test_parameters_that_are_not_floating_are_all_refused():
    model = make(nnx)
    model.a, model.b = nnx.Param(jnp.arange(3)), nnx.Param(2)
    model.c = nnx.Param(jax.random.key(0))
    with pytest.raises(OptimizerError) as caught:
        nnx.Optimizer(model, optax.sgd(0.1))
    text = str(caught.value)
    for row in ("a (Param): int32[3]", "b (Param): 2", "c (Param): key<fry>[]"):
        assert row in text
    assert "head.kernel" not in text
    assert "narrow wrt" in text


def test_raw_arrays_are_trained_where_they_can_be_written_and_refused_elsewhere():
    class Raw(nnx.Module):
        def __init__(self, w):
            self.w = w

    model = Raw([jnp.ones(2)])
    optimizer = nnx.Optimizer(model, optax.sgd(0.5, momentum=0.9), wrt=...)
    optimizer.update(model, {"w": {0: jnp.ones(2)}})
    assert model.w[0].tolist() == [0.5, 0.5]
    with pytest.raises(
        OptimizerError, match=r"cannot be written:\n  w\.0 \(unlabelled"
    ):
        nnx.Optimizer(Raw((jnp.ones(2),)), optax.sgd(0.5), wrt=...)


def snapshot_of(*objects):
    return [nnx.state(x).values_list() for x in objects]


def same(before, after):
    for x, y in zip(before, after, strict=True):
        assert all(a is b for a, b in zip(x, y, strict=True))


@pytest.fixture
def trained():
    model = make(nnx)
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    before = snapshot_of(model, optimizer)
    yield model, optimizer
    same(before, snapshot_of(model, optimizer))


def test_missing_and_unknown_gradients_are_all_listed(trained):
    model, optimizer = trained
    grads = nnx.grad(loss_of)(model)
    del grads["head"]
    grads["tail"] = nnx.Param(jnp.ones(2))
    grads["seen"] = nnx.BatchStat(jnp.ones(2))
    with pytest.raises(OptimizerError) as caught:
        sortal.Optimizer.update(optimizer, model, grads)
    text = str(caught.value)
    for row in (
        "missing: head.bias (Param)",
        "missing: head.kernel (Param)",
        "unknown: seen (BatchStat)",
        "unknown: tail (Param)",
        "grads.filter(wrt)",
    ):
        assert row in text


def test_gradients_of_the_wrong_shape_are_all_listed(trained):
    model, optimizer = trained
    grads = nnx.grad(loss_of)(model)
    grads["head"]["bias"].value = jnp.ones(())
    grads["layers"][1]["kernel"].value = (jnp.ones((4, 4)),)
    with pytest.raises(OptimizerError) as caught:
        optimizer.update(model, grads)
    text = str(caught.value)
    assert "head.bias (Param) is float32[4], its gradient float32[]" in text
    assert "layers.1.kernel (Param) is float32[4,4]" in text
    assert "layers.0" not in text


def test_gradients_that_are_no_state_are_refused(trained):
    model, optimizer = trained
    with pytest.raises(ArgumentError, match="State or a nested dict"):
        optimizer.update(model, [1.0])


def test_arguments_the_wrong_way_round_are_refused(trained):
    model, optimizer = trained
    with pytest.raises(OptimizerError, match="with the live model first"):
        optimizer.update(nnx.grad(loss_of)(model), model)


def test_a_model_with_other_parameters_than_at_the_start_is_refused(trained):
    _, optimizer = trained
    other = make(nnx)
    del other.head
    other.tail = nnx.Param(jnp.ones(2))
    grads = nnx.state(other, nnx.Param)
    with pytest.raises(OptimizerError) as caught:
        optimizer.update(other, grads)
    text = str(caught.value)
    assert "missing: head.kernel (Param)" in text
    assert "unknown: tail (Param)" in text
    assert "Make a new Optimizer" in text


def test_a_model_from_outside_a_trace_is_refused_and_left_alone():
    class Scale(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(2))

    model = Scale()
    optimizer = nnx.Optimizer(model, optax.adam(0.01))
    before = snapshot_of(model, optimizer)

    @nnx.jit
    def step(optimizer):
        optimizer.update(model, {"w": jnp.ones(2)})

    with pytest.raises(TraceError, match=r"\(Param\) would be written from inside"):
        step(optimizer)
    same(before, snapshot_of(model, optimizer))


def test_unknown_keyword_arguments_are_refused_by_optax_before_anything(trained):
    model, optimizer = trained
    tx = optax.GradientTransformation(
        optax.identity().init, lambda updates, state, params=None: (updates, state)
    )
    optimizer = nnx.Optimizer(model, tx)
    with pytest.raises(TypeError, match="valeu"):
        optimizer.update(model, nnx.grad(loss_of)(model), valeu=1.0)


# ----------------------------------------------------------- forms of gradients
@pytest.mark.parametrize(
    "form",
    [
        lambda g: g,
        lambda g: g.to_pure_dict(),
        lambda g: g.map(lambda path, v: v.value),
        lambda g: g.flat_state(),
        lambda g: jax.tree.map(lambda x: 1.0 * x, g),
        lambda g: g.map(lambda path, v: v.replace(note=1)),
    ],
    ids=["state", "dict", "bare", "flat", "mapped", "other metadata"],
)
def test_gradients_may_come_in_every_form_of_a_state(form):
    model, reference = make(nnx), make(nnx)
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.01))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    other = nnx.Optimizer(reference, tx, wrt=nnx.Param)
    for _ in range(2):
        grads = nnx.grad(loss_of)(model)
        updates = optimizer.update(model, form(grads))
        equal(updates, other.update(reference, grads))
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
    equal(values(model), values(reference))


def test_a_parameter_may_hold_a_small_pytree():
    class Pair(nnx.Module):
        def __init__(self):
            self.w = nnx.Param((jnp.ones(2), jnp.zeros(3)))

    model = Pair()
    optimizer = nnx.Optimizer(model, optax.adam(0.5))
    grads = nnx.grad(lambda m: m.w.value[0].sum() + m.w.value[1].sum())(model)
    optimizer.update(model, grads)
    assert [x.shape for x in model.w.value] == [(2,), (3,)]
    np.testing.assert_allclose(model.w.value[0], 0.5, rtol=1e-4)


def test_wrt_may_be_a_list_and_is_kept_as_a_tuple():
    model = make(nnx)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=[nnx.Param, nnx.BatchStat])
    grads = nnx.grad(loss_of, wrt=(nnx.Param, nnx.BatchStat))(model)
    optimizer.update(model, grads)
    assert optimizer.wrt == (nnx.Param, nnx.BatchStat)


def test_frozen_leaves_have_no_state_and_stay():
    model = make(nnx)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.At("head.**"))
    body = model.layers[0].kernel.value
    optimizer.update(model, nnx.grad(loss_of, wrt=nnx.At("head.**"))(model))
    assert model.layers[0].kernel.value is body
    paths = nnx.state(optimizer, nnx.OptVariable).paths()
    assert {path[3] for path in paths} == {"head"}


def test_a_shared_parameter_is_updated_once():
    class Tied(nnx.Module):
        def __init__(self):
            self.a = nnx.Param(jnp.ones(2))
            self.b = self.a

    model = Tied()
    optimizer = nnx.Optimizer(model, optax.sgd(0.25))
    optimizer.update(model, nnx.grad(lambda m: (m.a[...] + m.b[...]).sum())(model))
    assert model.b.value.tolist() == [0.5, 0.5]
    assert model.a is model.b


# -------------------------------------------------------- the object as a whole
def test_model_and_optimizer_is_flax_bit_for_bit():
    def train(lib, both, jit):
        def step(both):
            both.update(lib.grad(loss_of)(both.model))

        for _ in range(3):
            (lib.jit(step) if jit else step)(both)
        return lib.state(both.model, lib.Param)

    for jit in (False, True):
        mine = nnx.ModelAndOptimizer(make(nnx), optax.adam(0.01))
        theirs = flax_nnx.ModelAndOptimizer(
            make(flax_nnx), optax.adam(0.01), wrt=flax_nnx.Param
        )
        equal(train(nnx, mine, jit), train(flax_nnx, theirs, jit))
        assert int(mine.step) == 3


def test_an_optimizer_that_holds_the_model_shares_it_with_another_argument():
    model = make(nnx)
    both = nnx.ModelAndOptimizer(model, optax.sgd(0.1))

    @nnx.jit
    def step(model, both):
        before = model.head.kernel.value
        both.update(nnx.grad(loss_of)(model))
        return before, model.head.kernel.value

    before, after = step(model, both)
    assert both.model is model
    assert not np.array_equal(before, after)
    assert np.array_equal(model.head.kernel.value, after)


def test_an_optimizer_can_be_split_merged_updated_copied_and_pickled():
    model = make(nnx)
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(loss_of)(model))
    merged = nnx.merge(*nnx.split(optimizer))
    for other in (merged, nnx.clone(optimizer), copy.deepcopy(optimizer)):
        assert nnx.state(other) == nnx.state(optimizer)
        twin = nnx.clone(model)
        other.update(twin, nnx.grad(loss_of)(twin))
        assert int(other.step) == 2
    assert int(optimizer.step) == 1
    state = pickle.loads(pickle.dumps(nnx.state(optimizer)))
    fresh = nnx.Optimizer(model, optimizer.tx, wrt=nnx.Param)
    nnx.update(fresh, state)
    assert nnx.state(fresh) == nnx.state(optimizer)


def test_an_optimizer_can_be_made_abstractly_and_under_jit():
    def build():
        model = make(nnx)
        return model, nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)

    _, abstract = nnx.eval_shape(build)
    assert abstract.opt_state[0].mu.head.kernel.value.shape == (4, 4)
    model, optimizer = nnx.jit(build)()
    optimizer.update(model, nnx.grad(loss_of)(model))
    assert int(optimizer.step) == 1


def test_the_class_may_be_subscripted_in_annotations():
    assert nnx.Optimizer[int] is nnx.Optimizer


def test_importing_sortal_and_naming_the_class_imports_no_optax():
    program = "import sys, sortal; sortal.Optimizer; assert 'optax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


# ----------------------------------------------------------------------- by policy
class Frozen(nnx.Param, optimizer=None):
    pass


def by_policy():
    """A Policy for `make(nnx)`, and the transformations by top-level name."""
    txs = {"head": optax.adam(0.01), "layers": optax.sgd(0.1, momentum=0.9)}
    policy = nnx.Policy(
        {
            nnx.At("layers.*.bias"): nnx.Rule(trainable=False),
            nnx.At("head.**"): nnx.Rule(optimizer=txs["head"]),
            nnx.Param: nnx.Rule(optimizer=txs["layers"], checkpoint="keep"),
        }
    )
    return policy, txs


def trained_of(params):
    return {
        "head": params["head"],
        "layers": [{"kernel": layer["kernel"]} for layer in params["layers"]],
    }


@pytest.mark.parametrize("jitted", [False, True])
def test_a_policy_trains_as_its_transformations_by_hand_and_freezes_the_rest(jitted):
    policy, txs = by_policy()
    model, params = make(nnx), as_dict()
    optimizer = nnx.Optimizer(model, policy)

    def step(model, optimizer):
        grads = nnx.grad(loss_of, argnums=nnx.DiffState(0, optimizer.wrt))(model)
        optimizer.update(model, grads)

    run = nnx.jit(step) if jitted else step
    trained = trained_of(params)
    kept = {k: tx.init(trained[k]) for k, tx in txs.items()}

    def by_hand(params, trained, kept):
        grads = trained_of(jax.grad(dict_loss)(params))
        wanted, after = {}, {}
        for k, tx in txs.items():
            wanted[k], after[k] = tx.update(grads[k], kept[k], trained[k])
        trained = optax.apply_updates(trained, wanted)
        layers = [
            {**old, **new}
            for old, new in zip(params["layers"], trained["layers"], strict=True)
        ]
        return {"head": trained["head"], "layers": layers}, trained, after

    plain = jax.jit(by_hand) if jitted else by_hand
    for _ in range(3):
        run(model, optimizer)
        params, trained, kept = plain(params, trained, kept)
    for mine, wanted in zip(values(model), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-6, atol=1e-7)
    for layer, old in zip(model.layers, VALUES, strict=False):
        np.testing.assert_array_equal(layer.bias[...], old["bias"])
        assert not np.array_equal(layer.kernel[...], old["kernel"])


def test_a_policy_keeps_state_for_what_it_trains_alone():
    policy, _ = by_policy()
    optimizer = nnx.Optimizer(make(nnx), tx=policy)
    kept = nnx.state(optimizer, nnx.OptVariable).paths()
    assert {path[-2:] for path in kept} == {
        ("head", "bias"),
        ("head", "kernel"),
        (0, "kernel"),
        (1, "kernel"),
    }
    assert [repr(f) for f, _ in optimizer.tx] == [
        "TrainedBy(At('head.**'))",
        "TrainedBy(Param)",
    ]


def test_kinds_and_metadata_answer_for_the_optimizer_too():
    tx = optax.sgd(1.0)
    model = {
        "a": nnx.Param(jnp.ones(2), optimizer=tx),
        "b": Frozen(jnp.ones(2)),
        "c": nnx.Param(jnp.ones(2), trainable=False),
        "d": nnx.BatchStat(jnp.ones(2)),
    }
    optimizer = nnx.Optimizer(model, nnx.Policy({}))
    optimizer.update(model, {"a": jnp.full(2, 0.25)})
    assert {k: v.value.tolist() for k, v in model.items()} == {
        "a": [0.75, 0.75],
        "b": [1.0, 1.0],
        "c": [1.0, 1.0],
        "d": [1.0, 1.0],
    }


def test_of_a_policy_wrt_trains_a_part():
    policy, _ = by_policy()
    model = make(nnx)
    wrt = [nnx.At("head.kernel"), nnx.At("layers.**")]
    optimizer = nnx.Optimizer(model, policy, wrt=wrt)
    trained = nnx.state(model, optimizer.wrt).paths()
    assert trained == (
        ("head", "kernel"),
        ("layers", 0, "kernel"),
        ("layers", 1, "kernel"),
    )


def test_a_policy_may_not_train_what_has_no_gradient():
    policy = nnx.Policy({...: nnx.Rule(optimizer=optax.sgd(0.1))})
    model = {"count": nnx.Variable(jnp.array(0)), "w": nnx.Param(jnp.ones(2))}
    with pytest.raises(OptimizerError) as caught:
        nnx.Optimizer(model, policy)
    assert "neither floating nor complex" in str(caught.value)
    assert "  count (Variable): int32[]" in str(caught.value)
    optimizer = nnx.Optimizer(model, policy, wrt=nnx.Param)
    assert nnx.state(model, optimizer.wrt).paths() == (("w",),)


def test_params_that_no_policy_answers_for_are_all_listed():
    policy = nnx.Policy({nnx.At("head.**"): nnx.Rule(optimizer=optax.sgd(0.1))})
    with pytest.raises(PolicyError) as caught:
        nnx.Optimizer(make(nnx), policy)
    assert str(caught.value) == (
        "nothing says what 'optimizer' is of 4 leaves:\n"
        "  layers.0.bias (Param)\n  layers.0.kernel (Param)\n"
        "  layers.1.bias (Param)\n  layers.1.kernel (Param)\n"
        "Write a row of the Policy, such as Param: Rule(optimizer=optax.adam(1e-3)); "
        "or an option of the kind, class Param(Variable, optimizer=optax.adam(1e-3)); "
        "or metadata of the Variable, Param(x, optimizer=optax.adam(1e-3))."
    )


def test_a_param_added_later_under_a_row_of_the_policy_is_noticed():
    policy, _ = by_policy()
    model = make(nnx)
    optimizer = nnx.Optimizer(model, policy)
    model.late = nnx.Param(jnp.ones(2))
    with pytest.raises(OptimizerError, match=r"unknown: late \(Param\)"):
        optimizer.update(model, nnx.state(model, optimizer.wrt))


def test_gradients_of_frozen_leaves_are_refused_by_name():
    policy, _ = by_policy()
    model = make(nnx)
    optimizer = sortal.Optimizer(model, policy)
    with pytest.raises(OptimizerError, match=r"unknown: layers.0.bias \(Param\)"):
        optimizer.update(model, nnx.grad(loss_of)(model))


def test_an_optimizer_by_policy_can_be_copied_split_and_merged():
    policy, _ = by_policy()
    model = make(nnx)
    optimizer = nnx.Optimizer(model, policy)
    graphdef, state = nnx.split(optimizer)
    for other in (copy.deepcopy(optimizer), nnx.merge(graphdef, state)):
        twin = nnx.clone(model)
        other.update(twin, nnx.state(twin, other.wrt))
        assert int(other.step) == 1
    assert int(optimizer.step) == 0


# ----------------------------------------------------------------- shapes and dtypes
class Vector(nnx.Module):
    def __init__(self, shape=(3,), dtype=jnp.float32):
        self.w = nnx.Param(jnp.ones(shape, dtype))


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
@pytest.mark.parametrize(
    ("was", "now"), [((3,), (1,)), ((1,), (3,)), ((3,), (2,)), ((3,), (1, 3))]
)
def test_a_parameter_that_changed_its_shape_is_refused(tx, jitted, was, now):
    model = Vector(was)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    model.w = nnx.Param(jnp.ones(now))
    grads = nnx.grad(lambda m: (m.w.value**2).sum())(model)
    step = nnx.jit(optimizer.update) if jitted else optimizer.update
    before = nnx.state(optimizer)
    a, b = (str(list(x)).replace(" ", "") for x in (now, was))
    message = rf"w \(Param\) is float32{a}, its state in opt_state.* is float32{b}"
    message = message.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(OptimizerError, match=message):
        step(model, grads)
    assert model.w.value.shape == now
    equal(nnx.state(optimizer), before)


def test_a_parameter_that_changed_its_dtype_is_refused():
    model = Vector()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    model.w.value = model.w.value.astype(jnp.bfloat16)
    grads = nnx.grad(lambda m: (m.w.value**2).sum())(model)
    message = r"w \(Param\) is bfloat16\[3\], was float32"
    with pytest.raises(OptimizerError, match=message):
        optimizer.update(model, grads)


def test_updates_of_another_shape_than_the_parameter_are_refused():
    model = Vector()

    def wide(grads, state, params=None):
        return jax.tree.map(lambda g: jnp.stack([g, g]), grads), state

    tx = optax.GradientTransformation(lambda _: (), wide)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda m: m.w.value.sum())(model)
    message = r"w \(Param\) is float32\[3\], its update float32\[2,3\]"
    with pytest.raises(OptimizerError, match=message):
        optimizer.update(model, grads)
    assert model.w.value.tolist() == [1.0, 1.0, 1.0]


def test_state_that_takes_its_shape_at_the_first_step_is_stored():
    def update(grads, state, params=None):
        return grads, jax.tree.map(jnp.add, state, grads)

    tx = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda _: jnp.zeros(()), params), update
    )
    model = Vector()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, nnx.grad(lambda m: m.w.value.sum())(model))
    assert optimizer.opt_state["w"].value.tolist() == [2.0, 2.0, 2.0]


def test_an_ensemble_made_outside_is_trained_inside_vmap():
    models = nnx.vmap(lambda k: nnx.Linear(2, 1, rngs=nnx.Rngs(k)))(
        jax.random.split(jax.random.key(0), 3)
    )
    optimizer = nnx.Optimizer(models, optax.adam(0.1), wrt=nnx.Param)
    alone = [jax.tree.map(lambda x, i=i: x[i], nnx.state(models)) for i in range(3)]

    def step(model, optimizer):
        def loss(m):
            return (m(jnp.ones((1, 2))) ** 2).sum()

        optimizer.update(model, nnx.grad(loss)(model))

    axes = nnx.StateAxes({nnx.OptVariable: 0, ...: None})
    nnx.vmap(step, in_axes=(0, axes), axis_size=3)(models, optimizer)
    for i, state in enumerate(alone):
        model = nnx.merge(nnx.graphdef(models), state)
        own = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
        step(model, own)
        found = jax.tree.map(lambda x, i=i: x[i], nnx.state(models))
        for a, b in zip(found.values_list(), values(model), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


# ------------------------------------------------------------- containers as models
CONTAINERS = {
    "a module": lambda m: m(),
    "a dict": lambda m: {"a": m(), "b": m()},
    "a list": lambda m: [m(), m()],
    "a tuple": lambda m: (m(), m()),
    "a List": lambda m: nnx.List([m(), m()]),
    "a Dict": lambda m: nnx.Dict(a=m(), b=m()),
    "nested": lambda m: {"a": [m(), (m(),)], "b": {"c": m()}},
    "more than ten": lambda m: [m() for _ in range(11)],
    "in a List": lambda m: nnx.List([{"a": m()}, (m(),)]),
}


@pytest.mark.parametrize("lib", [nnx, flax_nnx], ids=["sortal", "flax"])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_of_models_trains_as_plain_optax(name, jitted, lib):
    class Net(lib.Module):
        def __init__(self):
            self.w = lib.Param(jnp.array([1.0, -2.0]))
            self.n = lib.BatchStat(jnp.ones(2))

    models = CONTAINERS[name](Net)
    nets = [x for _, x in nnx.iter_graph(models) if isinstance(x, Net)]
    tx = optax.adam(0.1)
    optimizer = nnx.Optimizer(models, tx, wrt=nnx.Param)

    def loss(models):
        nets = [x for _, x in nnx.iter_graph(models) if isinstance(x, Net)]
        return sum((i + 1) * (n.w[...] ** 2).sum() for i, n in enumerate(nets))

    def step(models, optimizer):
        return optimizer.update(models, nnx.grad(loss, wrt=optimizer.wrt)(models))

    step = nnx.jit(step) if jitted else step
    params = [jnp.array([1.0, -2.0]) for _ in nets]
    state = tx.init(params)
    for _ in range(3):
        step(models, optimizer)
        grads = [2 * (i + 1) * p for i, p in enumerate(params)]
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for net, p in zip(nets, params, strict=True):
        np.testing.assert_allclose(net.w[...], p, rtol=1e-6)


def test_path_filters_see_the_same_paths_in_grad_and_optimizer():
    models = {"a": Vector(), "b": Vector()}
    for wrt in (nnx.At("a.w"), nnx.Under("a"), nnx.PathContains("a")):
        optimizer = nnx.Optimizer(models, optax.sgd(0.5), wrt=wrt)
        with pytest.raises(
            FilterError, match=r"takes none of .*\n(.|\n)*b.w \(Param\)"
        ):
            sortal.grad(lambda m: m["b"].w.value.sum(), wrt=nnx.At("b"))(models)
        found = nnx.grad(lambda m: m["a"].w.value.sum(), wrt=optimizer.wrt)(models)
        optimizer.update(models, found)
    assert models["a"].w.value.tolist() == [-0.5] * 3
    assert models["b"].w.value.tolist() == [1.0] * 3


def test_what_a_policy_freezes_in_a_container_has_no_gradient():
    models = {"a": Vector(), "b": Vector()}
    policy = nnx.Policy(
        {
            nnx.Under("b"): nnx.Rule(trainable=False),
            nnx.Param: nnx.Rule(optimizer=optax.sgd(0.5)),
        }
    )
    optimizer = nnx.Optimizer(models, policy)

    def loss(m):
        return m["a"].w.value.sum() + m["b"].w.value.sum()

    optimizer.update(models, nnx.grad(loss, wrt=optimizer.wrt)(models))
    assert models["a"].w.value.tolist() == [0.5] * 3
    assert models["b"].w.value.tolist() == [1.0] * 3


# ------------------------------------------------------------ the state as optax's own
def test_the_state_as_optax_made_it_serves_optaxs_own_functions():
    model = make(nnx)
    params = as_dict()
    tx = optax.contrib.schedule_free_adamw(0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state = tx.init(params)
    for _ in range(3):
        optimizer.update(model, nnx.grad(loss_of)(model))
        updates, state = tx.update(jax.grad(dict_loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    given = optimizer.optax_state(model)
    found = optax.contrib.schedule_free_eval_params(given, nnx.state(model, nnx.Param))
    wanted = optax.contrib.schedule_free_eval_params(state, params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert type(given) is type(state)
    assert int(optax.tree.get(given, "count")) == 3
    assert isinstance(found, nnx.State)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_the_state_as_optax_made_it_has_the_structure_of_a_new_one(name):
    model, tx = make(nnx), TRANSFORMATIONS[name]()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    fresh = tx.init(params)
    found = optimizer.optax_state(model)
    assert jax.tree.structure(found) == jax.tree.structure(fresh)
    equal(found, fresh)
    doubled = optax.tree_map_params(tx, lambda x: 2 * x, found)
    equal(doubled, optax.tree_map_params(tx, lambda x: 2 * x, fresh))


def test_of_groups_each_gives_out_a_state_of_its_own():
    model = make(nnx)
    head = nnx.Under("head")
    groups = {head: optax.adam(0.1), ...: optax.sgd(0.1, momentum=0.9)}
    optimizer = nnx.Optimizer(model, groups, wrt=nnx.Param)
    first, second = optimizer.optax_state(model)
    equal(first, optax.adam(0.1).init(nnx.state(model, head)))
    rest = nnx.state(model, nnx.All(nnx.Param, nnx.Not(head)))
    equal(second, optax.sgd(0.1, momentum=0.9).init(rest))


def test_complex_gradients_of_real_parameters_are_refused():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    grads = {"kernel": jnp.ones((2, 3)) * 1j, "bias": jnp.ones(3)}
    with pytest.raises(OptimizerError, match=r"kernel .*its gradient complex64\[2,3\]"):
        optimizer.update(model, grads)
    assert optimizer.step == 0


def test_a_model_without_leaves_says_how_it_came_to_have_none() -> None:
    class Base(sortal.Module):
        def __init__(self):
            self.w = sortal.Param(jnp.ones(2))

    class Forgot(Base):
        def __init__(self):
            pass

    with pytest.raises(OptimizerError, match=r"a Forgot, has no leaves.*super\(\)"):
        sortal.Optimizer(Forgot(), optax.sgd(0.1))
