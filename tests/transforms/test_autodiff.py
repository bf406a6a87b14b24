"""grad and value_and_grad by kind: numbers of plain JAX, and what is refused."""

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
from models import Count, Holder, Linear, Net, has_tracer, objects, portrait, untouched
from sortal import BatchStat, DiffState, Param, nnx
from sortal.errors import ArgumentError, FilterError, GradientError, TraceError

X = jnp.arange(6.0).reshape(2, 3) / 6


def loss(m: Any, x: Any = X) -> Any:
    return (m(x) ** 2).mean()


def by_hand(p: Any, x: Any = X) -> Any:
    """``loss`` of a Net in training mode, on a dict of arrays."""
    h = x @ p["k0"] + p["b0"]
    h = jnp.tanh((h - h.mean(0)) * p["scale"])
    return ((h @ p["k1"] + p["b1"]) ** 2).mean()


def arrays(net: Net) -> dict[str, Any]:
    (first, second), norm = net.layers, net.norm
    found = {"k0": first.kernel, "b0": first.bias, "k1": second.kernel}
    found |= {"b1": second.bias, "scale": norm.scale}
    return {k: v.value for k, v in found.items()}


def flat(state: Any) -> dict[str, Any]:
    return {
        "k0": state["layers"][0]["kernel"].value,
        "b0": state["layers"][0]["bias"].value,
        "k1": state["layers"][1]["kernel"].value,
        "b1": state["layers"][1]["bias"].value,
        "scale": state["norm"]["scale"].value,
    }


def assert_close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------------- numbers
@given(st.integers(0, 5))
def test_value_and_gradient_are_those_of_jax_on_a_dict(seed: int) -> None:
    net = Net(seed)
    expected, by_jax = jax.value_and_grad(by_hand)(arrays(net))
    value, grads = sortal.value_and_grad(loss)(net)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert_close(flat(grads), by_jax)


def test_a_gradient_is_a_state_of_the_paths_and_kinds_taken() -> None:
    net = Net()
    net.layers[0].kernel.set_metadata(tag="first")
    grads = sortal.grad(loss)(net)
    params = sortal.state(net, Param)
    assert grads.paths() == params.paths()
    assert {type(v) for v in grads.leaves()} == {Param}
    assert grads["layers"][0]["kernel"].get_metadata("tag") == "first"
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    sortal.update(net, stepped)


def test_the_gradients_of_flax_are_the_same() -> None:
    def build(nnx: Any) -> Any:
        class Model(nnx.Module):
            def __init__(self, rngs: Any):
                self.b = nnx.Param(rngs.params.normal((3,)))
                self.a = nnx.Param(rngs.params.normal((2, 3)))
                self.s = nnx.BatchStat(jnp.ones(3))

            def __call__(self, x: Any) -> Any:
                self.s[...] = self.s[...] + x.sum()
                return jnp.sin(x @ self.a[...] + self.b[...] * self.s[...])

        return Model(nnx.Rngs(0))

    def run(nnx: Any) -> tuple[Any, ...]:
        model = build(nnx)
        value, grads = nnx.value_and_grad(lambda m: m(jnp.ones((4, 2))).sum())(model)
        leaves = [np.asarray(g[...]) for _, g in nnx.to_flat_state(grads)]
        return [np.asarray(value), *leaves, np.asarray(model.s[...])]

    for mine, theirs in zip(run(nnx), run(flax_nnx), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_grad_of_grad() -> None:
    m = Holder(w=Param(jnp.array(2.0)), v=Param(jnp.array(3.0)))
    cubic = lambda m: m.w[...] ** 3 * m.v[...]  # noqa: E731

    def slope(m: Any) -> Any:
        return sortal.grad(cubic)(m)["w"].value

    second = sortal.grad(slope)(m)
    hessian = jax.hessian(lambda p: p["w"] ** 3 * p["v"])({"w": 2.0, "v": 3.0})
    np.testing.assert_allclose(second["w"].value, hessian["w"]["w"])
    np.testing.assert_allclose(second["v"].value, hessian["w"]["v"])


@pytest.mark.parametrize(
    "wrap",
    [
        sortal.grad,
        lambda f: sortal.jit(sortal.grad(f)),
        lambda f: sortal.grad(sortal.jit(f)),
        lambda f: sortal.jit(sortal.grad(sortal.jit(f))),
        lambda f: sortal.grad(sortal.remat(f)),
        lambda f: lambda m: sortal.value_and_grad(f)(m)[1],
        lambda f: sortal.jit(lambda m: sortal.grad(lambda n: f(n))(m)),
    ],
)
def test_every_nesting_has_one_gradient_and_one_effect(wrap: Any) -> None:
    net, twin = Net(), Net()
    by_jax = jax.grad(by_hand)(arrays(net))
    twin(X)
    assert_close(flat(wrap(loss)(net)), by_jax)
    assert int(net.calls.value) == 1
    np.testing.assert_allclose(net.norm.mean.value, twin.norm.mean.value, rtol=1e-6)
    assert not has_tracer(net)


# ---------------------------------------------------------------------------- forms
def test_aux_comes_back_with_objects_that_came_in_as_themselves() -> None:
    net = Net()

    def f(m: Any, x: Any) -> Any:
        return loss(m, x), {"m": m, "layer": m.layers[0], "y": x * 2, "new": Count(x)}

    grads, aux = sortal.grad(f, has_aux=True)(net, X)
    (value, again), grads_too = sortal.value_and_grad(f, has_aux=True)(net, X)
    for found in (aux, again):
        assert found["m"] is net
        assert found["layer"] is net.layers[0]
        np.testing.assert_array_equal(found["new"].value, X)
    assert_close(flat(grads), flat(grads_too))
    np.testing.assert_allclose(value, by_hand(arrays(net)), rtol=1e-6)


def test_argnums_and_keywords_are_those_of_jax() -> None:
    def f(a: Any, m: Any, b: Any, *, c: Any) -> Any:
        return (a["x"] * m.w * b * c).sum()

    m, a, b = Holder(w=Param(jnp.ones(2))), {"x": jnp.full(2, 3.0)}, jnp.full(2, 5.0)
    only = sortal.grad(f, argnums=1)(a, m, b, c=2.0)
    np.testing.assert_array_equal(only["w"].value, [30, 30])
    ga, gm, gb = sortal.grad(f, argnums=(0, 1, -1))(a, m, b, c=2.0)
    np.testing.assert_array_equal(ga["x"], [10, 10])
    np.testing.assert_array_equal(gm["w"].value, [30, 30])
    np.testing.assert_array_equal(gb, [6, 6])
    assert isinstance(sortal.grad(f, argnums=(1,))(a, m, b, c=2.0), tuple)
    plain = jax.grad(lambda a: f(a, m, b, c=2.0))(a)
    assert_close(sortal.grad(f)(a, m, b, c=2.0), plain)


def test_diff_states_choose_a_filter_for_each_argument() -> None:
    m = Holder(w=Param(jnp.ones(1)), s=BatchStat(jnp.full(1, 2.0)))
    n = Holder(w=Param(jnp.full(1, 3.0)))
    f = lambda m, n: (m.w * m.s * n.w).sum()  # noqa: E731
    one = sortal.grad(f, argnums=DiffState(0, BatchStat))(m, n)
    assert one.paths() == (("s",),)
    np.testing.assert_array_equal(one["s"].value, [3])
    both = sortal.grad(f, argnums=(DiffState(0, ...), DiffState(1, Param)))(m, n)
    assert both[0].paths() == (("s",), ("w",))
    assert both[1].paths() == (("w",),)


@pytest.mark.parametrize(
    ("wrt", "paths"),
    [
        (BatchStat, [("norm", "mean")]),
        (sortal.At("layers.0.*"), [("layers", 0, "bias"), ("layers", 0, "kernel")]),
        ((BatchStat, sortal.At("**.scale")), [("norm", "mean"), ("norm", "scale")]),
        (lambda path, _: path[-1] == "scale", [("norm", "scale")]),
        (sortal.Under("norm"), [("norm", "mean"), ("norm", "scale")]),
    ],
)
def test_wrt_takes_any_filter(wrt: Any, paths: Any) -> None:
    net = Net()
    net.eval()
    grads = sortal.grad(loss, wrt=wrt)(net)
    assert list(grads.paths()) == paths
    graphdef, mine, rest = sortal.split(net, wrt, ...)
    plain = jax.grad(lambda s: loss(sortal.merge(graphdef, s, rest)))(mine)
    assert_close(jax.tree.leaves(grads), jax.tree.leaves(plain))


def test_an_argument_that_holds_several_modules_gets_a_state_for_each() -> None:
    a, b = Holder(w=Param(jnp.ones(1))), Holder(w=Param(jnp.full(1, 2.0)))

    def f(nets: Any) -> Any:
        return (nets["a"].w * nets["more"][0].w * nets["x"]).sum()

    grads = sortal.grad(f)({"a": a, "more": (b,), "x": jnp.full(1, 5.0)})
    np.testing.assert_array_equal(grads["a"]["w"].value, [10])
    np.testing.assert_array_equal(grads["more"][0]["w"].value, [5])
    np.testing.assert_array_equal(grads["x"], [2])


def test_a_variable_alone_may_be_differentiated_by() -> None:
    w = Param(jnp.full(1, 3.0))
    grads = sortal.grad(lambda w: (w[...] ** 2).sum())(w)
    np.testing.assert_array_equal(jax.tree.leaves(grads)[0], [6])


def test_decorator_forms_and_methods() -> None:
    @sortal.grad(wrt=Param)
    def f(m: Any) -> Any:
        return loss(m)

    @sortal.value_and_grad(argnums=1, has_aux=True)
    def g(x: Any, m: Any) -> Any:
        return loss(m, x), x

    net = Net()
    by_jax = jax.grad(by_hand)(arrays(net))
    assert_close(flat(f(net)), by_jax)
    assert f.__name__ == "f"
    assert_close(flat(g(X, net)[1]), by_jax)
    bound = sortal.grad(lambda m: m.layers[0](X).sum())(net)
    method = sortal.grad(Probe(net).total)()
    assert_close(flat(bound), flat(method["net"]))


class Probe(sortal.Module):
    """Has a method that returns a scalar."""

    def __init__(self, net: Any) -> None:
        self.net = net

    def total(self) -> Any:
        return self.net.layers[0](X).sum()


# -------------------------------------------------------------------------- sharing
def test_a_shared_variable_gets_the_sum_of_its_gradients_at_its_first_path() -> None:
    m = Holder(b=Param(jnp.full(1, 2.0)))
    m.a = m.b
    grads = sortal.grad(lambda m: (3 * m.a + m.b**2).sum())(m)
    assert grads.paths() == (("a",),)
    np.testing.assert_array_equal(grads["a"].value, [3 + 2 * 2])


def test_variables_shared_by_two_arguments_are_one_in_the_function() -> None:
    w = Param(jnp.full(1, 2.0))
    a, b = Holder(w=w), Holder(v=w)
    f = lambda a, b: (3 * a.w + b.v**2).sum()  # noqa: E731
    first, second = sortal.grad(f, argnums=(0, 1))(a, b)
    np.testing.assert_array_equal(first["w"].value, [7])
    assert second.paths() == ()  # given to a second optimizer, it would count twice
    np.testing.assert_array_equal(sortal.grad(f, argnums=1)(a, b)["v"].value, [7])
    np.testing.assert_array_equal(sortal.grad(f)(a, b)["w"].value, [7])


# -------------------------------------------------------------------- effects inside
def test_other_kinds_that_change_are_written_back_and_params_are_left_alone() -> None:
    net, twin = Net(), Net()
    kernel = net.layers[0].kernel.value
    sortal.value_and_grad(loss)(net)
    twin(X)
    assert portrait(net) == portrait(twin)
    assert net.layers[0].kernel.value is kernel
    assert not has_tracer(net)


def test_a_param_changed_inside_is_written_back_and_differentiated_through() -> None:
    m = Holder(w=Param(jnp.full(1, 3.0)))

    def f(m: Any) -> Any:
        m.w[...] = m.w**2
        return m.w[...].sum()

    grads = sortal.grad(f)(m)
    np.testing.assert_array_equal(grads["w"].value, [6])
    np.testing.assert_array_equal(m.w.value, [9])
    assert not has_tracer(m)


def test_an_exception_inside_leaves_the_model_untouched() -> None:
    net = Net()

    def f(m: Any) -> Any:
        m(X)
        m.new = 1
        raise KeyError("stop")

    with untouched(net), pytest.raises(KeyError, match="stop"):
        sortal.grad(f)(net)


def test_a_model_of_an_outer_raw_trace_is_refused() -> None:
    net = Net()
    with untouched(net), pytest.raises(TraceError, match=r"calls \(Count\)"):
        jax.jit(lambda x: sortal.grad(loss)(net, x))(X)


# --------------------------------------------------------------------------- errors
def test_wrt_that_takes_nothing_lists_what_there_is() -> None:
    net = Net()
    with untouched(net), pytest.raises(FilterError) as e:
        sortal.grad(lambda x, m: loss(m, x), argnums=1, wrt=sortal.Cache)(X, net)
    text = str(e.value)
    assert "wrt=Cache takes none of the 7 leaves of argument 1" in text
    assert "layers.0.kernel (Param)" in text
    assert "norm.mean (BatchStat)" in text


def test_a_path_given_as_a_string_earns_a_hint_once() -> None:
    nets = {"a": Net(), "b": Net()}
    with untouched(nets["a"]), pytest.raises(FilterError) as e:
        sortal.grad(lambda nets: loss(nets["a"], X), wrt="a.norm")(nets)
    hint = "'a.norm' is read as a tag; for the path write Under('a.norm')."
    assert str(e.value).count(hint) == 1


def test_an_integer_leaf_is_refused_by_path_and_kind_unless_allowed() -> None:
    m = Holder(w=Param(jnp.ones(1)), n=Param(jnp.array([2])), u=Param(jnp.array(True)))
    f = lambda m: (m.w * m.n).sum()  # noqa: E731
    with untouched(m), pytest.raises(GradientError) as e:
        sortal.grad(f)(m)
    text = str(e.value)
    assert "wrt=Param takes leaves that cannot be differentiated" in text
    assert "n (Param): int32[1]" in text
    assert "u (Param): bool[]" in text
    assert "w (Param)" not in text
    assert "another kind than Param, or narrow wrt" in text
    grads = sortal.grad(f, allow_int=True)(m)
    assert grads["n"].value.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(grads["w"].value, [2])


def test_random_streams_are_not_differentiated_by_default() -> None:
    m = Holder(w=Param(jnp.ones(2)), rngs=sortal.Rngs(0))
    grads = sortal.grad(lambda m: (m.w * m.rngs.normal((2,))).sum())(m)
    assert grads.paths() == (("w",),)
    assert int(m.rngs.default.count.value) == 1
    with pytest.raises(GradientError, match=r"rngs\.default\.key \(RngKey\): key<fry>"):
        sortal.grad(lambda m: m.w[...].sum(), wrt=...)(m)


def test_complex_parameters_need_holomorphic() -> None:
    m = Holder(w=Param(jnp.ones(1, complex)))
    f = lambda m: (m.w[...] ** 2).sum()  # noqa: E731
    grads = sortal.grad(f, holomorphic=True)(m)
    np.testing.assert_array_equal(grads["w"].value, [2])


@pytest.mark.parametrize("bad", ["0", 1.0, True, (0, None), None])
def test_malformed_argnums_are_refused_at_once(bad: Any) -> None:
    with pytest.raises(ArgumentError, match="argnums must be an int, a DiffState"):
        sortal.grad(loss, argnums=bad)


@pytest.mark.parametrize("n", [1, 5, -2])
def test_argnums_out_of_range_are_refused_at_the_call(n: int) -> None:
    text = f"argnums={n}, but loss was called with 1 positional"
    with pytest.raises(ArgumentError, match=text):
        sortal.grad(loss, argnums=n)(Net())


@pytest.mark.parametrize("out", [lambda m: m.w[...].sum(), lambda m: (1.0, 2, 3)])
def test_has_aux_without_a_pair_is_refused(out: Any) -> None:
    m = Holder(w=Param(jnp.ones(1)))
    with untouched(m), pytest.raises(ArgumentError, match=r"must return \(loss, aux\)"):
        sortal.grad(out, has_aux=True)(m)


def test_differentiating_keeps_every_object_of_the_model() -> None:
    net = Net()
    parts = objects(net).keys()
    for _ in range(2):
        sortal.grad(loss)(net)
    assert objects(net).keys() == parts


def test_sow_inside_a_gradient_is_kept() -> None:
    m = Linear(3, 1)

    def f(m: Any) -> Any:
        y = m(X)
        m.sow(sortal.Intermediate, "y", y)
        return y.sum()

    sortal.grad(f)(m)
    np.testing.assert_allclose(m.y.value[0], m(X), rtol=1e-6)
    assert not has_tracer(m)
