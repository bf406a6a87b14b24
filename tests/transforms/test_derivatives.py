"""vjp, jvp, linearize and make_jaxpr: numbers of plain JAX, and what is refused."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from jax.extend.core import jaxpr_as_fun

import sortal
from models import Count, Holder, Linear, Net, has_tracer, untouched
from sortal import BatchStat, Param
from sortal.errors import ArgumentError, FilterError, GradientError, TraceError

X = jnp.arange(6.0).reshape(2, 3) / 6
CT = jnp.array([[1.0, -2.0], [0.5, 3.0]])


def forward(p: Any, x: Any) -> Any:
    """What a Net in training mode computes, on a dict of arrays."""
    h = x @ p["k0"] + p["b0"]
    h = jnp.tanh((h - h.mean(0)) * p["scale"])
    return h @ p["k1"] + p["b1"]


def mean_of(p: Any, x: Any) -> Any:
    """The running mean after one call, from zero."""
    return 0.1 * (x @ p["k0"] + p["b0"]).mean(0)


def flat(s: Any) -> dict[str, Any]:
    first, second = s["layers"][0], s["layers"][1]
    found = {"k0": first["kernel"], "b0": first["bias"], "k1": second["kernel"]}
    found |= {"b1": second["bias"], "scale": s["norm"]["scale"]}
    return {k: v.value for k, v in found.items()}


def arrays(net: Net) -> dict[str, Any]:
    return flat(sortal.state(net, Param))


def directions(net: Net) -> Any:
    """A tangent for each Param, no two alike."""
    params = sortal.state(net, Param)
    numbers = iter(range(100))
    return jax.tree.map(lambda x: jnp.cos(x + next(numbers)), params)


def assert_close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def called_once(net: Net, params: Any) -> None:
    assert int(net.calls.value) == 1
    assert_close(net.norm.mean.value, mean_of(params, X))
    assert not has_tracer(net)


# ------------------------------------------------------------------------------ vjp
@pytest.mark.parametrize("seed", [0, 1])
def test_vjp_has_the_numbers_of_jax_and_writes_back_once(seed: int) -> None:
    net = Net(seed)
    params = arrays(net)
    expected, by_jax = jax.vjp(forward, params, X)
    out, pull = sortal.vjp(lambda m, x: m(x), net, X)
    assert_close(out, expected)
    for _ in range(2):
        by_net, by_x = pull(CT)
        assert by_net.paths() == sortal.state(net, Param).paths()
        assert {type(v) for v in by_net.leaves()} == {Param}
        assert_close((flat(by_net), by_x), by_jax(CT))
    called_once(net, params)


def test_vjp_gives_float0_for_integers_as_jax_does() -> None:
    f = lambda m, n, x: m.w * n * x["a"]  # noqa: E731
    m = Holder(w=Param(jnp.array(2.0)))
    _, pull = sortal.vjp(f, m, jnp.array(3), {"a": jnp.array(5.0)})
    by_m, by_n, by_x = pull(jnp.array(1.0))
    assert float(by_m["w"].value) == 15
    assert by_n.dtype == jax.dtypes.float0
    assert float(by_x["a"]) == 6


def test_vjp_has_a_filter_and_aux() -> None:
    m = Holder(w=Param(jnp.array(2.0)), s=BatchStat(jnp.array(3.0)))
    f = lambda m: (m.w * m.s, {"m": m, "y": m.w + 1})  # noqa: E731
    out, pull, aux = sortal.vjp(f, m, has_aux=True, wrt=BatchStat)
    (by_m,) = pull(jnp.array(1.0))
    assert by_m.paths() == (("s",),)
    assert float(by_m["s"].value) == 2
    assert float(out) == 6
    assert aux["m"] is m
    assert float(aux["y"]) == 3


def test_a_tied_weight_gets_the_sum_in_vjp_and_counts_twice_in_jvp() -> None:
    w = Param(jnp.full(1, 2.0))
    a, b = Holder(w=w), Holder(v=w, again=w)
    f = lambda a, b: 3 * a.w + b.v**2 * b.again  # noqa: E731
    slope = jax.grad(lambda w: (3 * w + w**3).sum())(w.value)
    _, pull = sortal.vjp(f, a, b)
    by_a, by_b = pull(jnp.ones(1))
    assert by_b.paths() == ()  # it is in the first one's State, once
    assert_close(by_a["w"].value, slope)
    dot = jnp.full(1, 7.0)
    _, dots = sortal.jvp(f, (a, b), ({"w": dot}, {"again": jnp.full(1, 7.0)}))
    assert_close(dots, slope * 7)


def test_returned_objects_are_live_and_carry_no_cotangent() -> None:
    net = Net()
    params = arrays(net)

    def f(m: Any, x: Any) -> Any:
        return {"net": m, "y": m(x), "layer": m.layers[0], "new": Count(x)}

    out, pull = sortal.vjp(f, net, X)
    assert out["net"] is net
    assert out["layer"] is net.layers[0]
    assert_close(out["new"].value, X)
    expected = jax.vjp(lambda p: forward(p, X), params)[1](CT)[0]
    for ct in (
        {"net": None, "y": CT, "layer": None, "new": None},
        {**out, "y": CT},
    ):
        assert_close(flat(pull(ct)[0]), expected)
    with pytest.raises(GradientError) as e:
        pull(CT)
    assert "must have the structure of the output, PyTreeDef({'layer': None" in str(e)
    out, dot = sortal.jvp(f, (net, X), (directions(net), X))
    assert dot["net"] is None
    assert dot["layer"] is None
    assert out["net"] is net


def test_structure_edits_are_carried_out() -> None:
    def f(m: Any) -> Any:
        m.sow(sortal.Intermediate, "y", m.bias * 2)
        m.flag = "set"
        return m.bias.sum()

    for call in (
        lambda m: sortal.vjp(f, m),
        lambda m: sortal.jvp(f, (m,), (sortal.state(m, Param),)),
        lambda m: sortal.linearize(f, m),
    ):
        m = Linear(3, 2)
        call(m)
        assert_close(m.y.value[0], m.bias.value * 2)
        assert m.flag == "set"
        assert not has_tracer(m)


def test_a_bound_method_or_module_is_no_primal_but_is_written_back() -> None:
    net = Net()
    params = arrays(net)
    _, pull = sortal.vjp(net, X)
    assert_close(pull(CT), jax.vjp(lambda x: forward(params, x), X)[1](CT))
    called_once(net, params)
    layer, h = net.layers[1], jnp.ones((2, 4))
    _, dot = sortal.jvp(layer.__call__, (h,), (2 * h,))
    assert_close(dot, 2 * h @ params["k1"])


def test_a_module_without_such_leaves_has_an_empty_state() -> None:
    m = Holder(w=Param(jnp.ones(2)))
    rngs = sortal.Rngs(0)
    f = lambda m, rngs: m.w * rngs.normal((2,))  # noqa: E731
    out, pull = sortal.vjp(f, m, rngs)
    by_m, by_rngs = pull(jnp.ones(2))
    assert by_rngs.paths() == ()
    assert_close(by_m["w"].value, out)
    assert int(rngs.default.count.value) == 1
    out, dot = sortal.jvp(f, (m, rngs), ({"w": jnp.full(2, 2.0)}, {}))
    assert_close(dot, 2 * out)


def test_the_decorator_forms() -> None:
    net = Net()
    params = arrays(net)
    expected = jax.vjp(lambda p: forward(p, X), params)[1](CT)[0]
    dots = jax.jvp(lambda p: forward(p, X), (params,), (flat(directions(net)),))[1]

    @sortal.vjp
    def f(m: Any, x: Any) -> Any:
        return m(x)

    @sortal.jvp
    def g(m: Any) -> Any:
        return m(X)

    for call in (f, sortal.vjp(lambda m, x: m(x))):
        assert_close(flat(call(net, X)[1](CT)[0]), expected)
    assert_close(g((net,), (directions(net),))[1], dots)
    assert_close(sortal.jvp(lambda m: m(X))((net,), (directions(net),))[1], dots)


def test_vjp_agrees_with_flax() -> None:
    def pulled(nnx: Any, **options: Any) -> list[Any]:
        m = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        out, pull = nnx.vjp(lambda m, x: jnp.sin(m(x)), m, X, **options)
        by_m, by_x = pull(CT)
        return [out, by_m["kernel"][...], by_m["bias"][...], by_x]

    mine = pulled(sortal)
    m = flax_nnx.Linear(3, 2, rngs=flax_nnx.Rngs(0))
    f = lambda m, x: jnp.sin(m(x))  # noqa: E731
    out, pull = flax_nnx.vjp(f, m, X, graph=False)
    by_m, by_x = pull(CT)
    assert_close(mine, [out, by_m.kernel[...], by_m.bias[...], by_x])


# ------------------------------------------------------------------ jvp and linearize
@pytest.mark.parametrize("form", ["state", "dict", "module"])
def test_jvp_and_linearize_have_the_numbers_of_jax(form: str) -> None:
    net = Net()
    params, dots = arrays(net), directions(net)
    expected, by_jax = jax.jvp(forward, (params, X), (flat(dots), X**2))
    given: Any = dots
    if form == "dict":
        given = dots.to_pure_dict()
    elif form == "module":
        given = sortal.clone(net)
        sortal.update(given, dots)
    out, dot = sortal.jvp(lambda m, x: m(x), (net, X), (given, X**2))
    assert_close((out, dot), (expected, by_jax))
    called_once(net, params)
    again = Net()
    out, push = sortal.linearize(lambda m, x: m(x), again, X)
    for _ in range(2):
        assert_close((out, push(given, X**2)), (expected, by_jax))
    called_once(again, params)


def test_jvp_and_linearize_have_a_filter_and_aux() -> None:
    m = Holder(w=Param(jnp.array(2.0)), s=BatchStat(jnp.array(3.0)))
    f = lambda m: (m.w * m.s, (m, m.w + 1))  # noqa: E731
    dot = {"s": jnp.array(5.0)}
    out, by_s, aux = sortal.jvp(f, (m,), (dot,), has_aux=True, wrt=BatchStat)
    assert (float(out), float(by_s), float(aux[1])) == (6, 10, 3)
    assert aux[0] is m
    out, push, aux = sortal.linearize(f, m, has_aux=True, wrt=BatchStat)
    assert (float(out), float(push(dot)), float(aux[1])) == (6, 10, 3)
    assert aux[0] is m


def test_a_variable_alone_and_a_value_that_is_a_tree() -> None:
    w = Param(jnp.array(3.0))
    (by_w,) = sortal.vjp(lambda w: w[...] ** 2, w)[1](jnp.array(1.0))
    assert float(by_w.leaves()[0].value) == 6
    for dot in (jnp.array(2.0), 2.0, by_w):
        found = sortal.jvp(lambda w: w[...] ** 2, (w,), (dot,))[1]
        assert float(found) == 6 * float(jax.tree.leaves(dot)[0])
    m = Holder(p=Param({"a": jnp.array(2.0), "b": [jnp.array(5.0)]}))
    f = lambda m: m.p.value["a"] * m.p.value["b"][0]  # noqa: E731
    dots = {"p": Param({"a": jnp.array(1.0), "b": [jnp.array(10.0)]})}
    assert float(sortal.jvp(f, (m,), (dots,))[1]) == 25
    (by_m,) = sortal.vjp(f, m)[1](jnp.array(1.0))
    assert_close(by_m["p"].value, {"a": jnp.array(5.0), "b": [jnp.array(2.0)]})


# -------------------------------------------------------------------------- nestings
def pulled(m: Any) -> Any:
    return sortal.vjp(lambda m: m(X), m)[1](CT)[0]


def pushed(m: Any) -> Any:
    return sortal.jvp(lambda m: m(X), (m,), (directions(m),))[1]


def linear(m: Any) -> Any:
    return sortal.linearize(lambda m: m(X), m)[1](directions(m))


@pytest.mark.parametrize("wrap", [lambda f: f, sortal.jit, sortal.remat])
def test_under_jit_there_is_one_derivative_and_one_effect(wrap: Any) -> None:
    params, dots = arrays(Net()), flat(directions(Net()))
    by_jax = jax.jvp(lambda p: forward(p, X), (params,), (dots,))[1]
    for f in (pushed, linear):
        net = Net()
        assert_close(wrap(f)(net), by_jax)
        called_once(net, params)
    net = Net()
    expected = jax.vjp(lambda p: forward(p, X), params)[1](CT)[0]
    assert_close(flat(wrap(pulled)(net)), expected)
    called_once(net, params)


def test_jit_may_return_the_functions_that_pull_and_push() -> None:
    params, dots = arrays(Net()), directions(Net())
    for wrap in (sortal.jit, lambda f: f):
        net = Net()
        _, pull = wrap(lambda m: sortal.vjp(lambda m: m(X), m))(net)
        expected = jax.vjp(lambda p: forward(p, X), params)[1](CT)[0]
        assert_close(flat(pull(CT)[0]), expected)
        called_once(net, params)
        _, push = wrap(lambda m: sortal.linearize(lambda m: m(X), m))(Net())
        by_jax = jax.jvp(lambda p: forward(p, X), (params,), (flat(dots),))[1]
        assert_close(push(dots), by_jax)


def test_the_function_that_pulls_back_keeps_no_model_alive() -> None:
    net = Net()
    gone = weakref.ref(net)
    _, pull = sortal.vjp(lambda m: m(X), net)
    del net
    gc.collect()
    assert gone() is None
    assert flat(pull(CT)[0])


def test_derivatives_of_derivatives_are_those_of_jax() -> None:
    params = arrays(Net())
    f = lambda p: (forward(p, X) ** 2).sum()  # noqa: E731
    ones = jax.tree.map(jnp.ones_like, params)
    by_jax = jax.grad(lambda p: jax.jvp(f, (p,), (ones,))[1])(params)

    def loss(m: Any) -> Any:
        return (m(X) ** 2).sum()

    def slope(m: Any) -> Any:
        dots = jax.tree.map(jnp.ones_like, sortal.state(m, Param))
        return sortal.jvp(loss, (m,), (dots,))[1]

    def pulled_slope(m: Any) -> Any:
        (by_m,) = sortal.vjp(loss, m)[1](jnp.array(1.0))
        return sum(x.sum() for x in jax.tree.leaves(by_m))

    for g in (slope, pulled_slope):
        for outer in (sortal.grad(g), lambda m, g=g: sortal.vjp(g, m)[1](1.0)[0]):
            net = Net()
            assert_close(flat(outer(net)), by_jax)
            called_once(net, params)


def test_vmap_over_arrays_around_a_derivative_by_a_model() -> None:
    layer, xs = Linear(3, 4), jnp.stack([X, X + 1, X**2])
    params = {"bias": layer.bias.value, "kernel": layer.kernel.value}
    f = lambda p, x: jnp.sin(x @ p["kernel"] + p["bias"])  # noqa: E731

    def both(x: Any) -> Any:
        g = lambda m: jnp.sin(m(x))  # noqa: E731
        (pulled,) = sortal.vjp(g, layer)[1](x @ layer.kernel)
        return pulled.to_pure_dict(), sortal.jvp(g, (layer,), (params,))[1]

    def by_hand(x: Any) -> Any:
        g = lambda p: f(p, x)  # noqa: E731
        (pulled,) = jax.vjp(g, params)[1](x @ params["kernel"])
        return pulled, jax.jvp(g, (params,), (params,))[1]

    assert_close(jax.vmap(both)(xs), jax.vmap(by_hand)(xs))


# ---------------------------------------------------------------------------- errors
def test_an_exception_inside_leaves_the_model_untouched() -> None:
    net = Net()

    def f(m: Any) -> Any:
        m(X)
        m.new = 1
        raise KeyError("stop")

    for call in (
        lambda: sortal.vjp(f, net),
        lambda: sortal.jvp(f, (net,), (directions(net),)),
        lambda: sortal.linearize(f, net),
        lambda: sortal.make_jaxpr(f)(net),
    ):
        with untouched(net), pytest.raises(KeyError, match="stop"):
            call()


def test_all_faults_of_tangents_are_listed_before_anything_runs() -> None:
    net = Net()
    dots = directions(net).to_pure_dict()
    dots["layers"][0]["kernel"] = jnp.ones((3, 3))
    dots["layers"][1]["bias"] = jnp.ones(2, jnp.int32)
    dots["norm"]["mean"] = jnp.ones(4)
    dots["norm"]["scale"] = None
    del dots["layers"][0]["bias"]

    def never(*_: Any) -> Any:
        raise AssertionError

    with untouched(net), pytest.raises(GradientError) as e:
        sortal.jvp(never, (net, X), (dots, X[0]))
    text = str(e.value)
    assert "tangents must have the paths, shapes and dtypes of the leaves" in text
    assert (
        "tangent 0: layers.0.kernel (Param): expected float32[3,4], found float32[3,3]"
        in text
    )
    assert (
        "tangent 0: layers.1.bias (Param): expected float32[2], found int32[2]" in text
    )
    assert "tangent 0: norm.scale (Param): expected float32[4], found None" in text
    assert "tangent 0: layers.0.bias (Param): missing" in text
    assert "tangent 0: norm.mean: unknown" in text
    assert "tangent 1: expected float32[2,3], found float32[3]" in text
    assert "layers.1.kernel" not in text
    _, push = sortal.linearize(lambda m, x: m(x), net, X)
    with pytest.raises(GradientError, match=r"norm\.mean: unknown"):
        push(dots, X)


@pytest.mark.parametrize(
    ("dot", "text"),
    [
        (1, "expected a State or nested dict of the module's leaves, found a int"),
        (
            None,
            "expected a State or nested dict of the module's leaves, found a NoneType",
        ),
        ({"w": 1}, r"w \(Param\): expected float32\[\], found 1 \(int32\[\]\)"),
        ({"w": "x"}, r"w \(Param\): expected float32\[\], found 'x'"),
        ({"w": [1.0]}, r"w \(Param\): expected float32\[\], found \[1.0\]"),
    ],
)
def test_a_tangent_of_another_form_is_refused(dot: Any, text: str) -> None:
    m = Holder(w=Param(jnp.array(1.0)))
    with pytest.raises(GradientError, match=text):
        sortal.jvp(lambda m: m.w * 2, (m,), (dot,))


def test_a_tangent_of_another_structure_or_type_is_refused() -> None:
    f = lambda x: x["a"] * 2  # noqa: E731
    with pytest.raises(GradientError, match="tangent 0: the argument has another str"):
        sortal.jvp(f, ({"a": 1.0},), ([1.0],))
    m = Holder(p=Param({"a": jnp.array(2.0)}))
    with pytest.raises(GradientError, match=r"p \(Param\): the argument has another"):
        sortal.jvp(lambda m: m.p.value["a"], (m,), ({"p": Param([1.0])},))
    with pytest.raises(
        GradientError, match=r"expected float0\[2\], found float32\[2\]"
    ):
        sortal.jvp(lambda n: n * 1.0, (jnp.arange(2),), (jnp.ones(2),))


def test_different_tangents_for_one_shared_variable_are_refused() -> None:
    w = Param(jnp.array(2.0))
    a, b = Holder(w=w), Holder(v=w)
    with pytest.raises(GradientError) as e:
        sortal.jvp(lambda a, b: a.w * b.v, (a, b), ({"w": 1.0}, {"v": 2.0}))
    text = str(e.value)
    assert "tangent 0: w (Param) and tangent 1: v (Param)" in text
    assert "Give the very same array for both" in text


def test_the_number_of_tangents_and_their_tuple_are_checked() -> None:
    with pytest.raises(ArgumentError, match="one tangent is due for each of 2 arg"):
        sortal.jvp(lambda a, b: a, (1.0, 2.0), (1.0,))
    with pytest.raises(ArgumentError, match="jvp takes primals as a tuple; found a fl"):
        sortal.jvp(lambda a: a, 1.0, (1.0,))
    with pytest.raises(ArgumentError, match="jvp takes tangents as a tuple; found a f"):
        sortal.jvp(lambda a: a, (1.0,), 1.0)


def test_wrt_that_takes_nothing_of_any_module_is_refused() -> None:
    a, b = Holder(w=Param(jnp.array(1.0))), Holder(s=BatchStat(jnp.array(1.0)))
    with untouched(a, b), pytest.raises(FilterError) as e:
        sortal.vjp(lambda a, x, b: a.w * x, a, 1.0, b, wrt=sortal.Cache)
    text = str(e.value)
    assert "wrt=Cache takes none of the 2 leaves of the modules among the prim" in text
    assert "0: w (Param)" in text
    assert "2: s (BatchStat)" in text
    m = Holder(n=Param(jnp.array(1)))
    with pytest.raises(GradientError, match=r"n \(Param\): int32\[\]"):
        sortal.linearize(lambda m: m.n * 1.0, m)


def test_what_is_no_array_or_number_is_refused_by_place() -> None:
    m = Holder(w=Param(jnp.array(1.0)))
    for call in (
        lambda: sortal.vjp(lambda m, x: m.w, m, {"a": 1, "how": "fast", "f": len}),
        lambda: sortal.grad(lambda m, x: m.w, argnums=(0, 1))(m, {"how": "fast"}),
    ):
        with pytest.raises(GradientError) as e:
            call()
        text = str(e.value)
        assert "only arrays and numbers can be differentiated by; found" in text
        assert "argument 1['how']: 'fast'" in text
        assert "'a'" not in text
        assert "Let the function close over the rest" in text


def test_aux_without_a_pair_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"must return \(out, aux\); found float32"):
        sortal.vjp(lambda x: x, 1.0, has_aux=True)


def test_a_model_of_an_outer_raw_trace_is_refused() -> None:
    net = Net()
    with untouched(net), pytest.raises(TraceError, match=r"calls \(Count\)"):
        jax.jit(lambda x: sortal.vjp(lambda m, x: m(x), net, x)[0])(X)


# ------------------------------------------------------------------------- make_jaxpr
def test_the_jaxpr_is_of_bare_values_and_touches_nothing() -> None:
    net = Net()
    params = arrays(net)
    with untouched(net):
        jaxpr = sortal.make_jaxpr(lambda m, x: m(x))(net, X)
    outs = [v.aval.shape for v in jaxpr.outvars]
    assert len(jaxpr.invars) == 7 + 1
    assert outs == [(2, 2), (), (4,)]  # the output, calls, the running mean
    values = jax.tree.leaves(net)
    y, calls, mean = jaxpr_as_fun(jaxpr)(*values, X)
    assert_close(y, forward(params, X))
    assert int(calls) == 1
    assert_close(mean, mean_of(params, X))


def test_a_jaxpr_names_its_arguments_by_path() -> None:
    def f(model: Any, x: Any) -> Any:
        return model(x)

    jaxpr = sortal.make_jaxpr(f)(Linear(3, 2), X)
    names = jaxpr.jaxpr.debug_info.arg_names
    assert [n for n in names if "kernel" in n]
    assert all(n.startswith(("model", "x")) for n in names)


def test_make_jaxpr_gives_shapes_and_takes_static_arguments_and_keywords() -> None:
    net = Net()

    def f(m: Any, how: str, x: Any, *, by: Any) -> Any:
        assert how == "twice"
        return {"m": m, "y": m(x) * by}

    with untouched(net):
        made = sortal.make_jaxpr(f, static_argnums=1, return_shape=True)
        jaxpr, shape = made(net, "twice", X, by=2.0)
    assert shape["y"].shape == (2, 2)
    assert isinstance(shape["m"].norm.mean.value, jax.ShapeDtypeStruct)
    assert len(jaxpr.jaxpr.invars) == 7 + 2
    layer = net.layers[1]
    assert len(sortal.make_jaxpr(layer)(jnp.ones((1, 4))).jaxpr.invars) == 3


def test_make_jaxpr_takes_modules_of_partials_and_methods_as_inputs() -> None:
    class Scale(sortal.Module):
        def __init__(self) -> None:
            self.w = sortal.Param(jnp.ones(2))
            self.calls = sortal.Variable(jnp.array(0))

        def __call__(self, x: Any, by: Any = 1.0) -> Any:
            self.calls[...] += 1
            return self.w * x * by

    m, x = Scale(), jnp.ones(2)
    ways = [
        (m, (x,), 3),
        (functools.partial(m), (x,), 3),
        (functools.partial(Scale.__call__, m), (x,), 3),
        (functools.partial(Scale.__call__, by=2.0), (m, x), 3),
        (functools.partial(Scale.__call__, m, by=2.0), (x,), 3),
        (functools.partial(Scale.__call__, x=x, by=2.0), (m,), 2),
    ]
    for f, args, inputs in ways:
        made = sortal.make_jaxpr(f)(*args)
        assert len(made.jaxpr.invars) == inputs, f
        assert len(made.out_avals) == 2  # the output and the number of calls
    assert int(m.calls.value) == 0
