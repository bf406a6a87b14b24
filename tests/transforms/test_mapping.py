"""vmap and shard_map over modules: numbers of plain JAX, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal
from models import Count, Holder, Linear, Norm, has_tracer, untouched
from sortal import (
    At,
    BatchStat,
    Cache,
    Intermediate,
    Param,
    Policy,
    Rule,
    StateAxes,
    StateSharding,
    Variable,
)
from sortal.errors import ArgumentError, AxisError, PolicyError, TraceError

X = jnp.arange(24.0).reshape(4, 2, 3) / 7  # four replicas of a batch of two
SHARED = StateAxes({Param: None, ...: 0})


class Mean(Variable, axis=None, reduce="mean"):
    """A kind whose replicas are averaged."""


class Slice(Variable, axis=1):
    """A kind that is stacked along axis 1."""


def close(a: Any, b: Any, rtol: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=1e-6)


def ensemble_of(*models: Linear) -> Linear:
    """A Linear whose arrays are those of several, stacked along axis 0."""
    made = Linear(3, 4)
    for name in ("kernel", "bias"):
        values = [getattr(m, name).value for m in models]
        getattr(made, name).value = jnp.stack(values)
    return made


def linears(n: int = 4) -> list[Linear]:
    return [Linear(3, 4, seed) for seed in range(n)]


# -------------------------------------------------------------------- axes in and out
def test_an_int_axis_maps_every_leaf_of_a_module() -> None:
    parts = linears()
    y = sortal.vmap(lambda m, x: m(x))(ensemble_of(*parts), X)
    by_hand = [x @ m.kernel.value + m.bias.value for m, x in zip(parts, X, strict=True)]
    close(y, jnp.stack(by_hand))


def test_an_axis_of_none_shares_every_leaf() -> None:
    model = Linear(3, 4)
    y = sortal.vmap(lambda m, x: m(x), in_axes=(None, 0))(model, X)
    close(y, jax.vmap(lambda x: x @ model.kernel.value + model.bias.value)(X))


def test_axes_by_kind_take_the_first_filter_and_the_ellipsis_the_rest() -> None:
    model = Holder(w=Param(jnp.arange(3.0)), b=Cache(jnp.arange(4.0)), raw=jnp.ones(4))
    axes = StateAxes({Param: None, ...: 0})
    got = sortal.vmap(lambda m, x: (x @ m.w + m.b) * m.raw, in_axes=(axes, 0))(model, X)
    by_jax = jax.vmap(lambda w, b, raw, x: (x @ w + b) * raw, (None, 0, 0, 0))(
        model.w.value, model.b.value, model.raw, X
    )
    close(got, by_jax)


def test_axes_by_path() -> None:
    model = Holder(a=Holder(w=Param(jnp.ones(4))), b=Holder(w=Param(jnp.arange(3.0))))
    axes = StateAxes({At("a.**"): 0, At("b.**"): None})
    got = sortal.vmap(lambda m: m.a.w * m.b.w, in_axes=axes)(model)
    close(got, jnp.ones(4)[:, None] * jnp.arange(3.0))


def test_a_filter_for_a_kind_takes_its_subclasses() -> None:
    class Lora(Param):
        pass

    model = Holder(w=Param(jnp.arange(3.0)), lora=Lora(jnp.arange(4.0)))
    axes = StateAxes({Lora: 0, Param: None})
    got = sortal.vmap(lambda m: m.w + m.lora, in_axes=axes)(model)
    close(got, jnp.arange(3.0) + jnp.arange(4.0)[:, None])
    axes = StateAxes({Param: None})
    got = sortal.vmap(lambda m, x: m.lora * x, in_axes=(axes, 0))(model, jnp.ones(2))
    close(got, jnp.stack([jnp.arange(4.0)] * 2))


def test_prefixes_go_into_tuples_and_dicts_of_modules() -> None:
    a, b, c = (Holder(w=Param(jnp.arange(4.0) + i)) for i in range(3))

    def f(pair: Any, named: Any, *, x: Any) -> Any:
        return pair[0].w + pair[1].w.sum() + named["c"].w * named["s"] * x.w

    in_axes = ((0, None), {"c": StateAxes({...: 0}), "s": None})
    d = Holder(w=Param(jnp.arange(4.0) * 3))
    got = sortal.vmap(f, in_axes=in_axes)((a, b), {"c": c, "s": 2.0}, x=d)
    values = [m.w.value for m in (a, b, c, d)]
    by_jax = jax.vmap(lambda a, b, c, d: a + b.sum() + c * 2.0 * d, (0, None, 0, 0))
    close(got, by_jax(*values))


def test_one_answer_for_a_container_holds_for_all_modules_in_it() -> None:
    models = [Holder(w=Param(jnp.arange(4.0))), Holder(w=Param(jnp.ones((2, 4))))]
    got = sortal.vmap(lambda ms, x: ms[0].w * ms[1].w[0] * x, in_axes=(-1, None))(
        models, 2.0
    )
    close(got, 2 * jnp.arange(4.0))


def test_none_among_the_arguments_is_no_leaf() -> None:
    model = Holder(w=Param(jnp.arange(4.0)))
    args = {"m": model, "mask": None}
    got = sortal.vmap(lambda a: a["m"].w * 2 if a["mask"] is None else 0)(args)
    close(got, 2 * jnp.arange(4.0))


def test_variables_themselves_are_mapped_and_written() -> None:
    count = Count(jnp.arange(4))

    def f(c: Any) -> Any:
        c[...] += 10
        return c * 2

    close(sortal.vmap(f)(count), 2 * (jnp.arange(4) + 10))
    close(count.value, jnp.arange(4) + 10)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_leaves_are_mapped_and_written_along_their_axis(axis: int) -> None:
    w = jnp.arange(12.0).reshape((4, 3) if axis == 0 else (3, 4))
    model = Holder(w=Cache(w))

    def f(m: Any) -> Any:
        m.w[...] = m.w * m.w.sum()
        return m.w.sum()

    got = sortal.vmap(f, in_axes=axis)(model)
    close(got, jax.vmap(lambda w: (w * w.sum()).sum(), axis)(w))
    close(model.w.value, jax.vmap(lambda w: w * w.sum(), axis, axis)(w))


def test_variables_that_hold_trees_are_mapped_leaf_by_leaf() -> None:
    model = Holder(c=Cache({"k": jnp.arange(4.0), "v": jnp.ones((4, 2))}))

    def f(m: Any) -> Any:
        tree = m.c.value
        m.c.value = {"k": tree["k"] + 1, "v": tree["v"] * tree["k"]}
        return tree["v"].sum()

    got = sortal.vmap(f)(model)
    close(got, jnp.full(4, 2.0))
    close(model.c.value["k"], jnp.arange(4.0) + 1)
    close(model.c.value["v"], jnp.ones((4, 2)) * jnp.arange(4.0)[:, None])


def test_raw_arrays_that_differ_are_listed_once() -> None:
    model = Holder(w=Param(jnp.ones(4)), t=(jnp.ones(4),), u=jnp.ones(3))

    def f(m: Any) -> None:
        m.t = (m.w.value,)
        m.u = m.u + m.w

    axes = StateAxes({Param: 0, ...: None})
    with untouched(model), pytest.raises(AxisError) as e:
        sortal.vmap(f, in_axes=axes)(model)
    assert str(e.value).count("u (unlabelled array): float32[3]") == 1
    assert str(e.value).count("t.0 (unlabelled array): float32[]") == 1
    axes = StateAxes({At("u"): None, ...: 0})

    def g(m: Any) -> None:
        m.t = (m.w * m.t[0] + 1,)
        m.u = m.u * 2

    sortal.vmap(g, in_axes=axes)(model)
    close(model.t[0], jnp.full(4, 2.0))
    close(model.u, jnp.full(3, 2.0))


def test_raw_arrays_are_leaves_like_others() -> None:
    model = Holder(w=Param(jnp.ones(2)), raw=jnp.arange(4.0))

    def f(m: Any) -> Any:
        m.raw = m.raw * 2 + m.w.sum()
        return m.raw

    close(sortal.vmap(f, in_axes=SHARED)(model), jnp.arange(4.0) * 2 + 2)
    close(model.raw, jnp.arange(4.0) * 2 + 2)


def test_states_take_axes_by_kind() -> None:
    model = Holder(w=Param(jnp.arange(3.0)), c=Cache(jnp.arange(4.0)))
    state = sortal.state(model)
    got = sortal.vmap(lambda s: s["w"].value * s["c"].value, in_axes=SHARED)(state)
    close(got, jnp.arange(4.0)[:, None] * jnp.arange(3.0))
    back = sortal.vmap(
        lambda s: jax.tree.map(lambda x: x * 2, s), in_axes=0, out_axes=0
    )(sortal.state(model, Cache))
    close(back["c"].value, jnp.arange(4.0) * 2)


def test_output_prefixes_are_those_of_jax() -> None:
    model = Linear(3, 4)

    def f(m: Any, x: Any) -> Any:
        return {"y": m(x), "n": m.bias.value, "p": (x, x)}

    def by_hand(k: Any, b: Any, x: Any) -> Any:
        return {"y": x @ k + b, "n": b, "p": (x, x)}

    out_axes = {"y": 1, "n": None, "p": (0, -1)}
    got = sortal.vmap(f, in_axes=(None, 0), out_axes=out_axes)(model, X)
    k, b = model.kernel.value, model.bias.value
    jax.tree.map(close, got, jax.vmap(by_hand, (None, None, 0), out_axes)(k, b, X))


def test_collectives_sizes_and_names_reach_jax() -> None:
    model = Holder(w=Param(jnp.arange(4.0)))
    got = sortal.vmap(
        lambda m: m.w - jax.lax.pmean(m.w.value, "i"), axis_name="i", axis_size=4
    )(model)
    close(got, jnp.arange(4.0) - 1.5)
    made = sortal.vmap(lambda: jnp.ones(2), axis_size=5)()
    assert made.shape == (5, 2)
    named = sortal.vmap(lambda m: m.w * 2, spmd_axis_name="data")(model)
    close(named, jnp.arange(4.0) * 2)


def test_the_decorator_takes_options_or_none() -> None:
    @sortal.vmap
    def twice(m: Any) -> Any:
        return m.w * 2

    @sortal.vmap(in_axes=None, axis_size=3, transform_metadata={})
    def thrice(m: Any) -> Any:
        return m.w * 3

    model = Holder(w=Param(jnp.arange(4.0)))
    close(twice(model), jnp.arange(4.0) * 2)
    assert thrice(model).shape == (3, 4)
    assert twice.__name__ == "twice"


def test_bound_methods_and_callable_modules_share_their_leaves() -> None:
    model = Linear(3, 4)
    expected = jax.vmap(lambda x: x @ model.kernel.value + model.bias.value)(X)
    close(sortal.vmap(model)(X), expected)
    close(sortal.vmap(model.__call__, in_axes=(0,))(X), expected)
    norm = Norm(3)
    with untouched(norm), pytest.raises(AxisError, match=re.escape("mean (BatchStat)")):
        sortal.vmap(norm)(X)


# ------------------------------------------------------------- Policies and precedence
def test_axes_come_from_metadata_then_the_policy_then_the_kind() -> None:
    def build(**metadata: Any) -> Holder:
        return Holder(w=Slice(jnp.arange(12.0).reshape(3, 4), **metadata))

    def f(m: Any) -> Any:
        return m.w.value * 2

    w = jnp.arange(12.0).reshape(3, 4)
    vmap = sortal.vmap
    close(vmap(f, in_axes=Policy({}))(build()), 2 * w.T)
    close(vmap(f, in_axes=StateAxes({}))(build()), 2 * w.T)
    close(vmap(f, in_axes=Policy({Slice: Rule(axis=0)}))(build()), 2 * w)
    close(vmap(f, in_axes=StateAxes({Slice: 0}))(build()), 2 * w)
    close(vmap(f, in_axes=Policy({Slice: Rule(axis=0)}))(build(axis=1)), 2 * w.T)
    close(vmap(f, in_axes=StateAxes({Slice: 0}))(build(axis=1)), 2 * w)
    close(vmap(f, in_axes=Policy({}))(build(axis=0)), 2 * w)
    close(vmap(f, in_axes=0)(build(axis=1)), 2 * w)


def test_a_leaf_without_an_answer_is_refused_with_all_others() -> None:
    model = Holder(w=Param(jnp.ones(4)), b=BatchStat(jnp.ones(4)), c=Cache(jnp.ones(4)))
    with untouched(model), pytest.raises(PolicyError) as e:
        sortal.vmap(lambda m: m.w, in_axes=Policy({Cache: Rule(axis=0)}))(model)
    assert "'axis' is of 2 leaves" in str(e.value)
    assert "b (BatchStat)" in str(e.value)
    assert "w (Param)" in str(e.value)
    with pytest.raises(PolicyError, match=re.escape("b (BatchStat)")):
        sortal.vmap(lambda m: m.w, in_axes=StateAxes({Param: 0, Cache: 0}))(model)


# ------------------------------------------------------------------ modules made inside
def make(key: Any) -> Any:
    return Holder(
        w=Param(jax.random.normal(key, (2, 3))), c=Cache(jax.random.uniform(key, (2,)))
    )


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_modules_made_inside_come_out_stacked(axis: int) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    made = sortal.vmap(make, out_axes=axis)(keys)
    close(
        made.w.value,
        jax.vmap(lambda k: jax.random.normal(k, (2, 3)), out_axes=axis)(keys),
    )
    assert type(made.c) is Cache
    assert not has_tracer(made)


def test_modules_made_inside_are_stacked_by_kind() -> None:
    keys = jax.random.split(jax.random.key(0), 5)

    def f(key: Any) -> Any:
        made = make(key)
        made.shared = Intermediate(jnp.arange(3.0))
        made.own = Slice(jax.random.normal(key, (2,)))
        return made, key

    axes = StateAxes({Param: 2, Cache: -1, Intermediate: None})
    made, _ = sortal.vmap(f, out_axes=(axes, 0))(keys)
    normal = jax.random.normal
    close(made.w.value, jax.vmap(lambda k: normal(k, (2, 3)), out_axes=2)(keys))
    uniform = jax.random.uniform
    close(made.c.value, jax.vmap(lambda k: uniform(k, (2,)), out_axes=-1)(keys))
    close(made.shared.value, jnp.arange(3.0))
    close(made.own.value, jax.vmap(lambda k: normal(k, (2,)), out_axes=1)(keys))


def test_an_ensemble_of_layers_is_that_of_flax() -> None:
    def create(nnx: Any) -> Any:
        @nnx.vmap
        def ensemble(key: Any) -> Any:
            return nnx.Linear(2, 3, rngs=nnx.Rngs(key))

        models = ensemble(jax.random.split(jax.random.key(0), 5))
        y = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(models, jnp.ones(2))
        return models.kernel[...], y

    jax.tree.map(close, create(sortal), create(flax_nnx))


def test_a_new_leaf_that_cannot_have_its_axis_is_refused() -> None:
    def f(x: Any) -> Any:
        return Holder(a=Param(x), b=Cache(x), c=Param(jnp.ones((2, 2))))

    with pytest.raises(AxisError) as e:
        sortal.vmap(f, out_axes=StateAxes({Cache: -2, ...: 1}))(jnp.ones(4))
    assert "a (Param): float32[] has no axis 1" in str(e.value)
    assert "b (Cache): float32[] has no axis -2" in str(e.value)
    assert "c (Param)" not in str(e.value)


def test_new_leaves_are_chosen_by_value_like_others() -> None:
    axes = StateAxes({sortal.Shaped(ndim=1): 1, ...: 0})

    def f(x: Any) -> Any:
        return Holder(a=Param(x), b=Param(jnp.ones((2, 2)) * x[0]))

    made = sortal.vmap(f, out_axes=axes)(jnp.ones((4, 3)))
    assert made.a.shape == (3, 4)
    assert made.b.shape == (4, 2, 2)


def test_a_new_leaf_shared_by_all_replicas_must_not_differ() -> None:
    with pytest.raises(AxisError, match=re.escape("w (Param): float32[2,3]")):
        sortal.vmap(make, out_axes=StateAxes({Param: None, Cache: 0}))(
            jax.random.split(jax.random.key(0), 5)
        )


# ------------------------------------------------------------------- what is written
def test_statistics_of_replicas_are_those_of_a_loop() -> None:
    norm = sortal.BatchNorm(3, momentum=0.9, rngs=sortal.Rngs(0))
    for stat in (norm.mean, norm.var):
        stat.value = jnp.stack([stat.value] * 4)
    params = norm.scale.value, norm.bias.value
    y = sortal.vmap(lambda m, x: m(x), in_axes=(SHARED, 0))(norm, X)
    for i, x in enumerate(X):
        alone = flax_nnx.BatchNorm(3, momentum=0.9, rngs=flax_nnx.Rngs(0))
        close(y[i], alone(x), rtol=1e-5)
        close(norm.mean[i], alone.mean[...])
        close(norm.var[i], alone.var[...])
    close(norm.scale.value, params[0])
    assert norm.scale.value is params[0]


def test_writing_what_all_replicas_share_is_refused_by_path_and_kind() -> None:
    model = Holder(
        bn=sortal.BatchNorm(3, rngs=sortal.Rngs(0)), fc=Linear(3, 4), n=Count(0)
    )

    def f(m: Any, x: Any) -> Any:
        m.fc.kernel[...] += x.sum()
        m.n[...] += 1
        return m.bn(x)

    with untouched(model), pytest.raises(AxisError) as e:
        sortal.vmap(f, in_axes=(None, 0))(model, X)
    assert str(e.value) == (
        "vmap: all replicas share leaves of axis None, but these were written with "
        "values that differ between replicas:\n"
        "  bn.mean (BatchStat): float32[3]\n"
        "  bn.var (BatchStat): float32[3]\n"
        "  fc.kernel (Param): float32[3,4]\n"
        "Give the kind an axis, as in StateAxes({Kind: 0, ...: None}), or declare how "
        "replicas are reduced to one: class Kind(Variable, reduce='mean'), "
        "Rule(reduce='mean') in the Policy, or metadata reduce='mean' on the Variable."
    )
    assert not has_tracer(model)


def test_replicas_may_write_alike_to_what_they_share() -> None:
    model = Holder(w=Param(jnp.ones(3)), n=Count(jnp.array(0)), rngs=sortal.Rngs(0))

    def f(m: Any, x: Any) -> Any:
        m.n[...] += 1
        return x * m.w + jax.random.normal(m.rngs(), (3,))

    y = sortal.vmap(f, in_axes=(None, 0))(model, jnp.arange(4.0))
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (3,))
    close(y, jnp.arange(4.0)[:, None] * jnp.ones(3) + noise)
    assert int(model.n.value) == 1
    assert int(model.rngs.default.count.value) == 1


def geometric(x: Any) -> Any:
    return jnp.exp(jnp.log(x).mean(0))


@pytest.mark.parametrize(
    ("how", "by_hand"),
    [
        ("mean", lambda x: x.mean(0)),
        ("sum", lambda x: x.sum(0)),
        ("max", lambda x: x.max(0)),
        ("min", lambda x: x.min(0)),
        (geometric, geometric),
    ],
)
def test_replicas_are_reduced_as_declared(how: Any, by_hand: Any) -> None:
    class Stat(Variable, axis=None, reduce=how):
        pass

    def f(m: Any, x: Any) -> None:
        m.s[...] = m.s + x

    x = jnp.arange(1.0, 13.0).reshape(4, 3)
    expected = by_hand(x + 1)
    models = [
        (Holder(s=Stat(jnp.ones(3))), None),
        (Holder(s=BatchStat(jnp.ones(3), reduce=how)), None),
        (
            Holder(s=BatchStat(jnp.ones(3))),
            Policy({BatchStat: Rule(axis=None, reduce=how)}),
        ),
    ]
    for model, axes in models:
        sortal.vmap(f, in_axes=(axes, 0))(model, x)
        close(model.s.value, expected)


def test_what_replicas_agree_on_is_summed_but_not_averaged() -> None:
    class Total(Variable, axis=None, reduce="sum"):
        pass

    model = Holder(mean=Mean(jnp.ones(2)), total=Total(jnp.ones(2)), n=Mean(1))

    def f(m: Any, x: Any) -> Any:
        m.mean[...] += 1
        m.n[...] += 1
        m.total[...] += 1
        return x

    sortal.vmap(f, in_axes=(None, 0))(model, X)
    close(model.mean.value, jnp.full(2, 2.0))
    close(model.total.value, jnp.full(2, 8.0))
    assert int(model.n.value) == 2


def test_trees_are_reduced_leaf_by_leaf() -> None:
    model = Holder(s=Mean({"a": jnp.zeros(2), "b": jnp.zeros(())}))

    def f(m: Any, x: Any) -> None:
        m.s.value = {"a": m.s.value["a"] + x, "b": m.s.value["b"] + 1}

    sortal.vmap(f, in_axes=(None, 0))(model, jnp.arange(4.0))
    close(model.s.value["a"], jnp.full(2, 1.5))
    close(model.s.value["b"], 1.0)


def test_a_mean_of_integers_is_refused_with_all_others() -> None:
    model = Holder(a=Mean(jnp.array(1)), b=Mean(jnp.array(2)), c=Mean(jnp.array(0.0)))

    def f(m: Any, x: Any) -> None:
        for name in "abc":
            getattr(m, name)[...] += x

    with untouched(model), pytest.raises(AxisError) as e:
        sortal.vmap(f, in_axes=(None, 0))(model, jnp.arange(4))
    assert "a (Mean): int32[]" in str(e.value)
    assert "b (Mean): int32[]" in str(e.value)
    assert "c (Mean)" not in str(e.value)
    assert "a mean of integers would be rounded" in str(e.value)


def test_a_reduction_may_look_at_values_of_the_leaf() -> None:
    policy = Policy({sortal.Shaped(ndim=1): Rule(axis=None, reduce="max")})
    model = Holder(s=BatchStat(jnp.zeros(2)))

    def f(m: Any, x: Any) -> None:
        m.s[...] = m.s + x

    sortal.vmap(f, in_axes=(policy, 0))(model, jnp.arange(4.0))
    close(model.s.value, jnp.full(2, 3.0))


@pytest.mark.parametrize("value", [3.0, jnp.array(3.0), {"k": jnp.ones(4), "n": 1.0}])
def test_leaves_that_lack_their_axis_are_all_listed(value: Any) -> None:
    model = Holder(a=Param(value), b=Cache(jnp.ones(4)), c=Param(value))
    with untouched(model), pytest.raises(AxisError) as e:
        sortal.vmap(lambda m: m.b.value)(model)
    assert "a (Param): " in str(e.value)
    assert "c (Param): " in str(e.value)
    assert "has no axis 0" in str(e.value)
    assert "b (Cache)" not in str(e.value)


def test_leaves_of_other_lengths_are_named_by_path() -> None:
    model = Holder(a=Param(jnp.ones(4)), b=Cache(jnp.ones(3)))
    with pytest.raises(ValueError, match="must have one size") as e:
        sortal.vmap(lambda m: m.a.value)(model)
    assert re.search(r"\ba\b.*float32\[4\]", str(e.value))
    assert re.search(r"\bb\b.*float32\[3\]", str(e.value))


def test_a_written_value_that_cannot_have_its_axis_is_refused() -> None:
    model = Holder(w=Cache(jnp.ones((3, 4))))

    def f(m: Any) -> None:
        m.w.value = m.w.value.sum()

    with untouched(model), pytest.raises(AxisError) as e:
        sortal.vmap(f, in_axes=1)(model)
    assert "w (Cache): float32[] has no axis 1" in str(e.value)


# ---------------------------------------------------------------------------- sharing
def test_a_shared_variable_has_one_axis() -> None:
    shared = Param(jnp.arange(4.0))
    a, b = Holder(w=shared, own=Cache(jnp.ones(4))), Holder(v=shared)
    with untouched(a, b), pytest.raises(AxisError) as e:
        sortal.vmap(lambda a, b: a.w + b.v, in_axes=(0, None))(a, b)
    assert "w (Param): 0, and v (Param): None" in str(e.value)

    def f(a: Any, b: Any) -> Any:
        assert a.w is b.v
        a.w[...] += 1
        return b.v * a.own

    close(sortal.vmap(f)(a, b), jnp.arange(4.0) + 1)
    close(shared.value, jnp.arange(4.0) + 1)
    by_kind = StateAxes({Param: 0})
    close(sortal.vmap(f, in_axes=(0, by_kind))(a, b), jnp.arange(4.0) + 2)


def test_tied_weights_are_one_leaf() -> None:
    table = Param(jnp.arange(8.0).reshape(4, 2))
    model = Holder(embed=Holder(w=table), head=Holder(w=table))

    def f(m: Any) -> Any:
        assert m.embed.w is m.head.w
        m.head.w[...] *= 2
        return m.embed.w.sum()

    close(sortal.vmap(f)(model), jnp.array([2.0, 10, 18, 26]))
    assert model.embed.w is model.head.w is table


# --------------------------------------------------------------------- structure edits
def test_new_leaves_have_the_axis_of_their_kind() -> None:
    class Total(Variable, axis=None, reduce="sum"):
        pass

    model = Holder(w=Param(jnp.arange(3.0)), sub=Holder())

    def f(m: Any, x: Any) -> Any:
        m.cache = Cache(x)
        m.sub.total = Total(x.sum())
        m.sub.side = Slice(x)
        m.plain = m.w.sum()
        m.name = "done"
        return x @ m.w

    axes = StateAxes({Param: None, Cache: 0, At("plain"): None})
    x = X[:, 0]
    y = sortal.vmap(f, in_axes=(axes, 0))(model, x)
    close(y, x @ jnp.arange(3.0))
    close(model.cache.value, x)
    close(model.sub.total.value, x.sum())
    close(model.sub.side.value, x.T)
    close(model.plain, 3.0)
    assert model.name == "done"
    assert not has_tracer(model)


def test_sown_values_are_stacked_and_popped_ones_are_gone() -> None:
    class Layer(Linear):
        def __call__(self, x: Any) -> Any:
            y = super().__call__(x)
            self.sow(Intermediate, "y", y)
            return y

    model = Layer(3, 4)
    axes = StateAxes({Param: None, ...: 0})
    y = sortal.vmap(lambda m, x: m(x), in_axes=(axes, 0))(model, X)
    close(model.y.value[0], y)
    popped = sortal.vmap(lambda m: sortal.pop(m, Intermediate)["y"].value, in_axes=axes)
    close(popped(model)[0], y)
    assert not hasattr(model, "y")


def test_a_replaced_module_is_carried_out() -> None:
    def f(m: Any, key: Any) -> None:
        m.layer = sortal.Linear(3, 2, rngs=sortal.Rngs(key))
        del m.gone

    keys = jax.random.split(jax.random.key(1), 4)
    stacked = ensemble_of(*linears())
    model = Holder(layer=stacked, gone=Param(jnp.ones((4, 2))))
    sortal.vmap(f)(model, keys)
    alone = [flax_nnx.Linear(3, 2, rngs=flax_nnx.Rngs(k)) for k in keys]
    close(model.layer.kernel.value, jnp.stack([m.kernel[...] for m in alone]))
    assert not hasattr(model, "gone")


def test_a_module_passed_in_comes_back_as_itself() -> None:
    model = Holder(w=Param(jnp.arange(4.0)), sub=Holder(v=Param(jnp.ones(4))))

    def f(m: Any) -> Any:
        m.w[...] += 1
        return m, {"sub": m.sub, "w": m.w, "new": Holder(of=m.sub)}

    out, rest = sortal.vmap(f)(model)
    assert out is model
    assert rest["sub"] is model.sub
    assert rest["w"] is model.w
    assert rest["new"].of is model.sub
    close(model.w.value, jnp.arange(4.0) + 1)


def test_an_exception_inside_changes_nothing() -> None:
    model = Holder(w=Param(jnp.arange(4.0)), sub=Holder())

    def f(m: Any) -> None:
        m.w[...] += 1
        m.sub.new = Cache(jnp.ones(2))
        raise KeyError("stop")

    with untouched(model), pytest.raises(KeyError, match="stop"):
        sortal.vmap(f)(model)
    assert not has_tracer(model)


def test_writing_a_module_that_was_closed_over_is_refused() -> None:
    model = Holder(n=Count(jnp.array(0)))

    def f(x: Any) -> Any:
        model.n[...] += x.sum()
        return x

    with untouched(model), pytest.raises(TraceError, match=re.escape("n (Count)")):
        sortal.vmap(f)(X)


# --------------------------------------------------------------- with other transforms
def test_vmap_of_vmap() -> None:
    w = jnp.arange(24.0).reshape(2, 3, 4)
    model = Holder(w=Cache(w), s=Mean(jnp.zeros(4)), p=Param(jnp.ones(4)))

    def f(m: Any) -> Any:
        m.w[...] *= 2
        m.s[...] += m.w
        return m.w @ m.p

    axes = StateAxes({Cache: 0, Param: None})
    got = sortal.vmap(sortal.vmap(f, in_axes=axes), in_axes=axes)(model)
    close(got, 2 * w.sum(-1))
    close(model.w.value, 2 * w)
    close(model.s.value, 2 * w.mean((0, 1)))


def test_an_inner_map_may_write_what_only_the_outer_one_splits() -> None:
    model = Holder(n=Cache(jnp.zeros(2)))

    def f(m: Any, x: Any) -> Any:
        m.n[...] += 1
        return x + m.n

    inner = sortal.vmap(f, in_axes=(None, 0))
    got = sortal.vmap(inner, in_axes=(0, None))(model, jnp.arange(3.0))
    close(got, jnp.stack([jnp.arange(3.0) + 1] * 2))
    close(model.n.value, jnp.ones(2))


def test_a_mapped_function_under_jit_is_traced_once() -> None:
    norm, traces = Norm(3), []
    norm.mean.value = jnp.zeros((4, 3))

    def f(m: Any, x: Any) -> Any:
        traces.append(1)
        return m(x)

    step = sortal.jit(sortal.vmap(f, in_axes=(SHARED, 0)))
    step(norm, X)
    step(norm, X + 1)
    mean = jnp.zeros((4, 3))
    for x in (X, X + 1):
        mean = 0.9 * mean + 0.1 * x.mean(1)
    close(norm.mean.value, mean)
    assert len(traces) == 1


def test_a_refused_write_under_jit_names_the_leaf() -> None:
    norm = Norm(3)
    step = sortal.jit(sortal.vmap(lambda m, x: m(x), in_axes=(None, 0)))
    with untouched(norm), pytest.raises(AxisError, match=re.escape("mean (BatchStat)")):
        step(norm, X)


def test_gradients_of_each_replica() -> None:
    parts = linears()
    grads = sortal.vmap(sortal.grad(lambda m, x: (m(x) ** 2).sum()))(
        ensemble_of(*parts), X
    )
    for i, (m, x) in enumerate(zip(parts, X, strict=True)):
        k, b = m.kernel.value, m.bias.value
        dk, db = jax.grad(lambda k, b, x=x: ((x @ k + b) ** 2).sum(), (0, 1))(k, b)
        close(grads["kernel"].value[i], dk, rtol=1e-5)
        close(grads["bias"].value[i], db, rtol=1e-5)


def test_gradients_through_a_map_with_statistics_written() -> None:
    norm = Norm(3)
    norm.mean.value = jnp.zeros((4, 3))

    def loss(m: Any, x: Any) -> Any:
        return (sortal.vmap(lambda m, x: m(x), in_axes=(SHARED, 0))(m, x) ** 3).sum()

    def by_hand(scale: Any) -> Any:
        return (((X - X.mean(1, keepdims=True)) * scale) ** 3).sum()

    value, grads = sortal.value_and_grad(loss)(norm, X)
    expected, by_jax = jax.value_and_grad(by_hand)(jnp.ones(3))
    close(value, expected)
    close(grads["scale"].value, by_jax)
    close(norm.mean.value, 0.1 * X.mean(1))


# -------------------------------------------------------------------------------- keys
def test_dropout_differs_between_replicas_as_in_a_loop() -> None:
    model = Holder(drop=sortal.Dropout(0.5, rngs=sortal.Rngs(dropout=0)))
    x = jnp.ones((6, 6))
    rng_axes = StateAxes({sortal.RngState: 0})
    sortal.split_rngs(model, splits=4)
    y = sortal.vmap(lambda m, x: m.drop(x), in_axes=(rng_axes, None))(model, x)
    drop = flax_nnx.Dropout(0.5, rngs=flax_nnx.Rngs(dropout=0))
    flax_nnx.split_rngs(drop, splits=4)
    expected = flax_nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(drop, x)
    close(y, expected)
    assert len({np.asarray(part).tobytes() for part in y}) == 4
    close(model.drop.rngs.count.value, jnp.ones(4))


def test_keys_are_stacked_and_moved_like_arrays() -> None:
    keys = jax.random.split(jax.random.key(3), (2, 4))

    def f(m: Any) -> Any:
        m.k.value = jax.random.split(m.k.value[0], 2)
        m.new = sortal.RngKey(m.k.value)
        return jax.random.normal(m.k.value[1])

    def by_hand(k: Any) -> Any:
        k = jax.random.split(k[0], 2)
        return jax.random.normal(k[1]), jax.random.key_data(k)

    model = Holder(k=sortal.RngKey(keys))
    y = sortal.vmap(f, in_axes=1)(model)
    expected, data = jax.vmap(by_hand, 1, (0, 1))(keys)
    close(y, expected)
    close(jax.random.key_data(model.k.value), data)
    close(jax.random.key_data(model.new.value), data)


def test_an_ensemble_trains_as_its_members_do() -> None:
    x, target = X[0], jnp.ones((2, 4))

    def step(m: Any, opt: Any) -> Any:
        value, grads = sortal.value_and_grad(lambda m: ((m(x) - target) ** 2).mean())(m)
        opt.update(m, grads)
        return value

    @sortal.vmap
    def create(key: Any) -> Any:
        m = sortal.Linear(3, 4, rngs=sortal.Rngs(key))
        return m, sortal.Optimizer(m, optax.adam(0.1), wrt=Param)

    keys = jax.random.split(jax.random.key(0), 3)
    models, opts = create(keys)
    starts = models.kernel.value, models.bias.value
    train = sortal.jit(sortal.vmap(step))
    values = [train(models, opts) for _ in range(3)]

    def loss(p: Any) -> Any:
        return ((x @ p[0] + p[1] - target) ** 2).mean()

    tx = optax.adam(0.1)
    for i in range(3):
        p: Any = tuple(a[i] for a in starts)
        memory: Any = tx.init(p)
        for value in values:
            expected, grads = jax.value_and_grad(loss)(p)
            updates, memory = tx.update(grads, memory)
            p = jax.tree.map(jnp.add, p, updates)
            close(value[i], expected, rtol=1e-5)
        close(models.kernel[i], p[0], rtol=1e-4)


# --------------------------------------------------------------------- bad arguments
def test_unknown_options_are_refused() -> None:
    with pytest.raises(ArgumentError, match="vmap has no option in_axis"):
        sortal.vmap(lambda m: m, in_axis=0)
    with pytest.raises(ArgumentError, match="shard_map has no option axes"):
        sortal.shard_map(lambda m: m, in_specs=P(), out_specs=P(), axes=0)


def test_one_entry_is_due_for_each_argument() -> None:
    with pytest.raises(ArgumentError) as e:
        sortal.vmap(lambda m, x: m, in_axes=(0,))(Holder(), X)
    assert str(e.value) == (
        "in_axes has 1 entries, but the function was called with 2 positional "
        "arguments. Give one entry for each."
    )


# -------------------------------------------------------------------------- shard_map
N = 4
AUTO = jax.sharding.AxisType.Auto
MESH = jax.make_mesh((N,), ("data",), axis_types=(AUTO,), devices=jax.devices()[:N])
GRID = jax.make_mesh(
    (2, 2), ("a", "b"), axis_types=(AUTO, AUTO), devices=jax.devices()[:N]
)
BATCH = jnp.arange(24.0).reshape(8, 3) / 5


def sharded(f: Any, in_specs: Any, out_specs: Any, **options: Any) -> Any:
    return sortal.shard_map(
        f, mesh=MESH, in_specs=in_specs, out_specs=out_specs, **options
    )


def compiled(f: Any, in_specs: Any, out_specs: Any, **options: Any) -> Any:
    """As one program: called eagerly, JAX compiles a program for each operation."""
    return sortal.jit(sharded(f, in_specs, out_specs, **options))


def test_params_are_shared_and_batches_split() -> None:
    model = Linear(3, 4)
    forward = sharded(lambda m, x: m(x), (P(), P("data")), P("data"))
    expected = BATCH @ model.kernel.value + model.bias.value
    with untouched(model):
        close(forward(model, BATCH), expected)
        close(sortal.jit(forward)(model, BATCH), expected)


def test_statistics_of_each_device_have_a_leading_axis() -> None:
    specs = StateSharding({Param: P(), BatchStat: P("data")})

    def f(m: Any, x: Any) -> Any:
        m.mean[...] = 0.9 * m.mean + 0.1 * x.mean(0, keepdims=True)
        return (x - x.mean(0)) * m.scale

    norm = Norm(3)
    norm.mean.value = jnp.ones((N, 3))
    y = sortal.jit(sharded(f, (specs, P("data")), P("data")))(norm, BATCH)
    parts = BATCH.reshape(N, 2, 3)
    close(norm.mean.value, 0.9 + 0.1 * parts.mean(1))
    close(y, (parts - parts.mean(1, keepdims=True)).reshape(8, 3))
    one_device = Norm(3)
    one_device.mean.value = jnp.ones((N, 3))
    mapped = sortal.vmap(lambda m, x: m(x), in_axes=(SHARED, 0))(one_device, parts)
    close(y, mapped.reshape(8, 3))
    close(norm.mean.value, one_device.mean.value)


REDUCED = [
    ("mean", lambda x: jax.lax.pmean(x, "data")),
    ("sum", lambda x: jax.lax.psum(x, "data")),
    ("max", lambda x: jax.lax.pmax(x, "data")),
    ("min", lambda x: jax.lax.pmin(x, "data")),
    (geometric, lambda x: jnp.exp(jax.lax.pmean(jnp.log(x), "data"))),
]


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize(("how", "by_jax"), REDUCED)
def test_devices_are_reduced_as_declared(how: Any, by_jax: Any, checked: bool) -> None:
    class Stat(Variable, spec=P(), reduce=how):
        pass

    def f(m: Any, x: Any) -> None:
        m.s[...] = m.s + x.mean(0)

    def by_hand(x: Any) -> Any:
        return by_jax(1 + x.mean(0))

    by_hand = jax.shard_map(by_hand, mesh=MESH, in_specs=P("data"), out_specs=P())
    expected = jax.jit(by_hand)(BATCH)
    models = [
        (Holder(s=Stat(jnp.ones(3))), P()),
        (Holder(s=BatchStat(jnp.ones(3), reduce=how)), StateSharding({...: P()})),
        (
            Holder(s=BatchStat(jnp.ones(3))),
            Policy({BatchStat: Rule(spec=P(), reduce=how)}),
        ),
    ]
    for model, specs in models:
        step = sharded(f, (specs, P("data")), P(), check_vma=checked)
        sortal.jit(step)(model, BATCH)
        close(model.s.value, expected)


def test_batchnorm_reduced_over_devices_is_pmean_of_its_statistics() -> None:
    norm = sortal.BatchNorm(3, momentum=0.9, rngs=sortal.Rngs(0))
    policy = Policy({Param: Rule(spec=P()), BatchStat: Rule(spec=P(), reduce="mean")})
    step = sharded(lambda m, x: m(x), (policy, P("data")), P("data"))
    y = sortal.jit(step)(norm, BATCH)

    def by_hand(x: Any) -> Any:
        mean, var = x.mean(0), x.var(0)
        new = 0.1 * mean, 0.9 + 0.1 * var
        return (x - mean) / jnp.sqrt(var + 1e-5), jax.lax.pmean(new, "data")

    by_hand = jax.shard_map(
        by_hand, mesh=MESH, in_specs=P("data"), out_specs=(P("data"), P())
    )
    expected, (mean, var) = jax.jit(by_hand)(BATCH)
    close(y, expected, rtol=1e-4)
    close(norm.mean.value, mean)
    close(norm.var.value, var, rtol=1e-5)


def test_writes_that_differ_between_devices_are_refused() -> None:
    model = Holder(norm=Norm(3), n=Count(jnp.array(0)), fc=Linear(3, 3))

    def f(m: Any, x: Any) -> Any:
        m.n[...] += 1
        m.fc.bias[...] += x[0]
        return m.norm(x)

    with untouched(model), pytest.raises(AxisError) as e:
        sortal.jit(sharded(f, (P(), P("data")), P("data")))(model, BATCH)
    assert str(e.value) == (
        "shard_map: these leaves were written with values that differ between devices "
        "that are to share them:\n"
        "  fc.bias (Param) of spec P(): float32[3] differs along data\n"
        "  norm.mean (BatchStat) of spec P(): float32[3] differs along "
        "data\n"
        "Give the kind a spec, as in StateSharding({Kind: P('data'), ...: P()}), or "
        "declare how replicas are reduced to one: class Kind(Variable, reduce='mean'), "
        "Rule(reduce='mean') in the Policy, or metadata reduce='mean' on the Variable."
    )
    with untouched(model), pytest.raises(AxisError, match=re.escape("fc.bias (Param)")):
        sharded(f, (P(), P("data")), P("data"))(model, BATCH)
    assert not has_tracer(model)


def test_devices_may_write_alike_to_what_they_share() -> None:
    class Total(Variable, spec=P(), reduce="sum"):
        pass

    model = Holder(n=Count(jnp.array(0)), m=Mean(jnp.array(3)), t=Total(jnp.ones(2)))

    def f(m: Any, x: Any) -> Any:
        m.n[...] += 1
        m.m[...] += 1
        m.t[...] += 1
        return x

    sortal.jit(sharded(f, (P(), P("data")), P("data")))(model, BATCH)
    assert int(model.n.value) == 1
    assert int(model.m.value) == 4
    close(model.t.value, jnp.full(2, 2.0 * N))


def test_a_function_may_reduce_numbers_of_any_sort() -> None:
    def total(x: Any) -> Any:
        return x.any(0) if x.dtype == bool else x.sum(0)

    def make(dtype: Any) -> Any:
        return BatchStat(jnp.zeros(2, dtype), reduce=total)

    dtypes = {"b": bool, "i": jnp.int32, "z": jnp.complex64, "h": jnp.bfloat16}
    model = Holder(**{name: make(dtype) for name, dtype in dtypes.items()})
    x = jnp.arange(8.0).reshape(N, 2)

    def f(m: Any, x: Any) -> None:
        m.b.value = x[0] > 5
        m.i.value = x[0].astype(jnp.int32)
        m.z.value = x[0] * (1 - 2j)
        m.h.value = x[0].astype(jnp.bfloat16)

    compiled(f, (P(), P("data")), P())(model, x)
    assert model.b.value.tolist() == [True, True]
    assert model.i.value.tolist() == [12, 16]
    close(model.z.value, x.sum(0) * (1 - 2j))
    close(model.h.value.astype(jnp.float32), x.sum(0))


def test_a_value_too_short_for_its_spec_is_refused_by_path() -> None:
    model = Holder(s=Cache(jnp.ones(8)), t=Cache(jnp.ones(8)))

    def f(m: Any) -> None:
        m.s.value = m.s.value.sum()

    with untouched(model), pytest.raises(AxisError) as e:
        sharded(f, P("data"), P())(model)
    assert "s (Cache) of spec P('data'): float32[]" in str(e.value)
    assert "t (Cache)" not in str(e.value)


def test_messages_of_jax_call_the_function_by_its_name() -> None:
    def forward(m: Any) -> Any:
        return m.s.value

    with pytest.raises(ValueError, match="out_specs which require replication") as e:
        sortal.jit(sharded(forward, P("data"), P()))(Holder(s=Cache(jnp.ones(8))))
    assert "forward'" in str(e.value)
    assert "_Sharded" not in str(e.value)


def averaging(m: Any, x: Any) -> Any:
    m.s[...] = 0.5 * m.s + x.mean()
    return m.w * x


def averaged() -> Any:
    return Holder(s=Mean(jnp.zeros(())), w=Param(jnp.ones(())))


def test_gradients_through_devices_with_statistics_reduced() -> None:
    model, x = averaged(), jnp.arange(8.0)
    forward = sharded(averaging, (P(), P("data")), P("data"))
    step = sortal.value_and_grad(lambda m, x: (forward(m, x) ** 2).sum())
    value, grads = sortal.jit(step)(model, x)
    close(value, (x**2).sum())
    close(grads["w"].value, 2 * (x**2).sum())
    close(model.s.value, x.mean())


def test_maps_over_replicas_and_devices_nest() -> None:
    x = jnp.arange(16.0).reshape(8, 2)
    inside, outside = averaged(), averaged()
    per_row = sortal.vmap(averaging, in_axes=(None, 0))
    close(compiled(per_row, (P(), P("data")), P("data"))(inside, x), x)
    close(inside.s.value, x.mean())
    per_device = sharded(averaging, (P(), P("data")), P("data"))
    mapped = sortal.vmap(per_device, in_axes=(None, 1), out_axes=1)
    got = sortal.jit(mapped)(outside, x)
    close(got, x)
    close(outside.s.value, x.mean())


def test_the_mesh_may_be_that_of_the_context() -> None:
    model, x = averaged(), jnp.arange(8.0)
    explicit = jax.make_mesh(
        (N,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,),
        devices=jax.devices()[:N],
    )  # fmt: skip
    forward = sortal.shard_map(
        averaging, in_specs=(P(), P("data")), out_specs=P("data")
    )
    with jax.set_mesh(explicit):
        y = sortal.jit(forward)(model, jax.device_put(x, P("data")))
    close(y, x)
    close(model.s.value, x.mean())


def test_without_checks_an_undeclared_difference_is_not_noticed() -> None:
    model, x = Holder(s=Cache(jnp.zeros(()))), jnp.arange(8.0)

    def f(m: Any, x: Any) -> None:
        m.s[...] += x.mean()

    compiled(f, (P(), P("data")), P(), check_vma=False)(model, x)
    assert float(model.s.value) in x.reshape(N, 2).mean(1).tolist()


def test_a_mean_of_integers_of_devices_is_refused_with_all_others() -> None:
    model = Holder(a=Mean(jnp.array(1)), b=Mean(jnp.array(2)), c=Mean(jnp.array(0.0)))

    def f(m: Any, x: Any) -> None:
        for name in "abc":
            variable = getattr(m, name)
            variable[...] += x[0].astype(variable.dtype)

    with untouched(model), pytest.raises(AxisError) as e:
        compiled(f, (P(), P("data")), P())(model, jnp.arange(4))
    assert "shard_map: replicas wrote integers that differ" in str(e.value)
    assert "a (Mean): int32[]" in str(e.value)
    assert "b (Mean): int32[]" in str(e.value)
    assert "c (Mean)" not in str(e.value)


def test_only_the_axes_that_a_spec_leaves_out_are_reduced() -> None:
    model = Holder(s=Mean(jnp.zeros((2, 3))), t=Mean(jnp.zeros(3)))
    specs = StateSharding({At("s"): P("a"), At("t"): P()})

    def f(m: Any, x: Any) -> None:
        m.s[...] += x.mean(0, keepdims=True)
        m.t[...] += x.mean(0)

    step = sortal.shard_map(
        f, mesh=GRID, in_specs=(specs, P(("a", "b"))), out_specs=P()
    )
    sortal.jit(step)(model, BATCH)
    close(model.s.value, BATCH.reshape(2, 4, 3).mean(1))
    close(model.t.value, BATCH.mean(0))


def test_a_map_inside_another_reduces_over_its_own_axes_only() -> None:
    model = Holder(s=Mean(jnp.zeros((2, 3))))

    def inner(m: Any, x: Any) -> None:
        m.s[...] += x.mean(0, keepdims=True)

    def outer(m: Any, x: Any) -> None:
        sortal.shard_map(
            inner, in_specs=(P(), P("b")), out_specs=P(), axis_names={"b"}
        )(m, x)

    step = sortal.shard_map(
        outer,
        mesh=GRID,
        in_specs=(P("a"), P("a")),
        out_specs=P(),
        axis_names={"a"},
    )
    sortal.jit(step)(model, BATCH)
    close(model.s.value, BATCH.reshape(2, 4, 3).mean(1))


def test_gradients_summed_over_devices_are_those_of_one_device() -> None:
    model = Linear(3, 4)

    def loss(m: Any, x: Any) -> Any:
        return (m(x) ** 2).sum()

    def by_hand(k: Any, b: Any) -> Any:
        return ((BATCH @ k + b) ** 2).sum()

    expected = jax.grad(by_hand, (0, 1))(model.kernel.value, model.bias.value)

    def whole(m: Any, x: Any) -> Any:
        return jax.lax.psum(loss(m, x), "data")

    outside = sortal.grad(compiled(whole, (P(), P("data")), P()))(model, BATCH)

    # Varying parameters, so that JAX does not sum the gradients of its own accord.
    def inside(m: Any, x: Any) -> Any:
        return sortal.grad(loss)(m, x)

    summed = sharded(inside, (P(), P("data")), P())
    got = sortal.jit(summed)(model, BATCH)

    def unchecked(m: Any, x: Any) -> Any:
        return jax.lax.psum(sortal.grad(loss)(m, x), "data")

    by_psum = sharded(unchecked, (P(), P("data")), P(), check_vma=False)
    for grads in (outside, got, sortal.jit(by_psum)(model, BATCH)):
        close(grads["kernel"].value, expected[0], rtol=1e-5)
        close(grads["bias"].value, expected[1], rtol=1e-5)


def test_a_training_step_with_reduced_statistics_is_that_of_one_device() -> None:
    def step(m: Any, x: Any) -> Any:
        def loss(m: Any) -> Any:
            return (m(x) ** 2).mean()

        value, grads = sortal.value_and_grad(loss)(m)
        grads = jax.lax.pmean(grads, "data")
        sortal.update(m, jax.tree.map(lambda p, g: p - 0.1 * g, m.params(), grads))
        return jax.lax.pmean(value, "data")

    class Model(Linear):
        def params(self) -> Any:
            return sortal.state(self, Param)

    model, alone = Model(3, 4), Model(3, 4)
    run = sortal.jit(sharded(step, (P(), P("data")), P(), check_vma=False))
    k, b = alone.kernel.value, alone.bias.value

    def by_hand(k: Any, b: Any) -> Any:
        return ((BATCH @ k + b) ** 2).mean()

    for _ in range(2):
        expected, (dk, db) = jax.value_and_grad(by_hand, (0, 1))(k, b)
        k, b = k - 0.1 * dk, b - 0.1 * db
        close(run(model, BATCH), expected, rtol=1e-5)
    close(model.kernel.value, k, rtol=1e-5)
    close(model.bias.value, b, rtol=1e-5)


def test_shardings_stand_for_their_specs() -> None:
    split, whole = NamedSharding(MESH, P("data")), NamedSharding(MESH, P())
    model = Holder(w=Param(jnp.ones(3)), s=BatchStat(jnp.zeros(8)))
    specs = StateSharding({Param: whole, BatchStat: split})

    def f(m: Any, x: Any) -> Any:
        m.s[...] += x @ m.w
        return {"y": x * 2, "m": m, "n": jax.lax.psum(x.sum(), "data")}

    outs = {"y": split, "m": None, "n": whole}
    got = compiled(f, (specs, split), outs)(model, BATCH)
    close(got["y"], BATCH * 2)
    close(got["n"], BATCH.sum())
    close(model.s.value, BATCH.sum(1))
    assert got["m"] is model


def test_specs_come_from_metadata_then_the_policy_then_the_kind() -> None:
    class Split(Variable, spec=P("data")):
        pass

    def shape(policy: Any, **metadata: Any) -> Any:
        model, seen = Holder(v=Split(jnp.ones(4), **metadata)), []
        sharded(lambda m: seen.append(m.v.shape), policy, P())(model)
        return seen[0]

    assert shape(Policy({})) == (1,)
    assert shape(Policy({Split: Rule(spec=P())})) == (4,)
    assert shape(Policy({Split: Rule(spec=None)})) == (4,)
    assert shape(Policy({Split: Rule(spec=P("data"))}), spec=P()) == (4,)
    assert shape(StateSharding({Split: P()}), spec=P("data")) == (4,)
    assert shape(StateSharding({})) == (1,)


def test_one_spec_under_two_names_is_one_spec() -> None:
    shared = Param(jnp.ones(3))
    a, b = Holder(w=shared), Holder(v=shared)
    whole = StateSharding({...: NamedSharding(MESH, P())})
    f = compiled(lambda a, b: a.w + b.v, (whole, P()), P())
    close(f(a, b), jnp.full(3, 2.0))
    with pytest.raises(AxisError, match=re.escape("w (Param)")) as e:
        sharded(lambda a, b: a.w + b.v, (P(), P("data")), P())(a, b)
    assert "v (Param): P('data')" in str(e.value)


def test_modules_made_on_devices_have_the_spec_of_their_kind() -> None:
    def f(x: Any) -> Any:
        made = Holder(c=Cache(x * 2), w=Param(jnp.ones(2)))
        made.total = Mean(x.sum())
        return made

    specs = StateSharding({Cache: P("data"), ...: P()})
    made = compiled(f, P("data"), specs)(jnp.arange(8.0))
    close(made.c.value, jnp.arange(8.0) * 2)
    close(made.w.value, jnp.ones(2))
    close(made.total.value, 7.0)


def test_a_new_leaf_of_a_spec_that_nobody_mentioned_is_refused() -> None:
    class Split(Variable, spec=P("data")):
        pass

    model = Holder(w=Param(jnp.ones(3)))

    def f(m: Any, x: Any) -> None:
        m.new = Split(x)

    specs = StateSharding({Param: P()})
    with untouched(model), pytest.raises(AxisError) as e:
        sharded(f, (specs, P(("data",))), P())(model, BATCH)
    assert "new (Split): P('data')" in str(e.value)
    assert "Give their kind a row" in str(e.value)
    mentioned = StateSharding({Param: P(), Split: P("data")})
    compiled(f, (mentioned, P(("data",))), P())(model, BATCH)
    close(model.new.value, BATCH)


def test_the_shard_map_decorator_takes_methods_and_no_keywords() -> None:
    model = Linear(3, 4)
    expected = BATCH @ model.kernel.value + model.bias.value

    @sortal.shard_map(mesh=MESH, in_specs=(P(), P("data")), out_specs=P("data"))
    def forward(m: Any, x: Any) -> Any:
        return m(x)

    close(forward(model, BATCH), expected)
    close(sharded(model, P("data"), P("data"))(BATCH), expected)
    with pytest.raises(ArgumentError, match="by position; found x"):
        forward(model, x=BATCH)
    with pytest.raises(ArgumentError, match="in_specs has 2 entries"):
        forward(model)


def test_an_exception_on_devices_changes_nothing() -> None:
    model = Holder(n=Count(jnp.array(0)))

    def f(m: Any, x: Any) -> None:
        m.n[...] += 1
        m.new = Cache(x)
        raise KeyError("stop")

    with untouched(model), pytest.raises(KeyError, match="stop"):
        sharded(f, (P(), P("data")), P())(model, BATCH)
    assert not has_tracer(model)


def test_a_sharded_function_under_jit_is_traced_once() -> None:
    model, traces = Holder(n=Count(jnp.array(0)), w=Param(jnp.ones(3))), []

    def f(m: Any, x: Any) -> Any:
        traces.append(1)
        m.n[...] += 1
        return x @ m.w

    step = sortal.jit(sharded(f, (P(), P("data")), P("data")))
    step(model, BATCH)
    # The first call leaves the count on all devices, so the second may compile anew.
    step(model, BATCH)
    seen = len(traces)
    step(model, BATCH)
    assert len(traces) == seen <= 2
    assert int(model.n.value) == 3


def test_streams_that_were_not_divided_are_to_be_divided_and_not_shared() -> None:
    """With axis None each layer of the stack would draw the same kernel."""
    with pytest.raises(AxisError) as e:
        sortal.vmap(lambda rngs: sortal.Linear(2, 2, rngs=rngs))(sortal.Rngs(0))
    assert str(e.value).splitlines() == [
        "these leaves do not have the axis they are to be mapped over:",
        "  default.count (RngCount): uint32[] has no axis 0",
        "  default.key (RngKey): key<fry>[] has no axis 0",
        "Divide random streams first, by @split_rngs(splits=n).",
    ]
    both = Holder(w=Param(1.0), rngs=sortal.Rngs(0))
    with pytest.raises(AxisError, match=r"by @split_rngs.*\. Give them axis None"):
        sortal.vmap(lambda model: None)(both)


def test_leaves_go_along_with_those_that_a_mesh_divides_by_the_mapped_axis() -> None:
    """JAX takes no arrays that are divided differently along the mapped axis."""
    mesh = jax.make_mesh((1,), ("layers",), axis_types=(AxisType.Explicit,))
    whole = jnp.arange(6.0).reshape(2, 3)
    with jax.set_mesh(mesh):
        part = jax.device_put(whole, NamedSharding(mesh, P("layers")))
        model = Holder(a=Param(part), b=Param(whole), c=Cache(whole.T))
        axes = StateAxes({Cache: 1, ...: 0})
        out = sortal.vmap(lambda m: m.a * m.b + m.c, in_axes=(axes,))(model)
    assert out.tolist() == (whole * whole + whole).tolist()
    assert model.b.value is whole
