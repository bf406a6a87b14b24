"""jit, remat and eval_shape: what is compiled, kept, donated, and refused."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sortal
from models import Count, Holder, Linear, Net, has_tracer, portrait, untouched
from sortal import Param, nnx
from sortal.errors import ArgumentError, StaleBufferError, TraceError


class Counted:
    """A function of a model that counts how often it is traced."""

    def __init__(self, f: Any) -> None:
        self.f, self.traces = f, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.traces += 1
        return self.f(*args, **kwargs)


def n_out(f: Any, *args: Any) -> int:
    return len(f.trace(*args).jaxpr.out_avals)


# ------------------------------------------------------- only what changed comes out
def test_a_read_only_param_is_no_output() -> None:
    x = jnp.ones((2, 3))
    net = Net()
    assert n_out(sortal.jit(lambda m: None), net) == 0
    assert n_out(sortal.jit(lambda m: m), net) == 0
    assert n_out(sortal.jit(lambda m, x: m(x)), net, x) == 3  # y, calls, mean
    net.eval()
    assert n_out(sortal.jit(lambda m, x: m(x)), net, x) == 2  # y, calls


def test_a_value_written_back_as_it_was_is_no_output() -> None:
    def f(m: Any) -> None:
        m.bias.value = m.bias.value
        sortal.update(m, sortal.state(m))

    assert n_out(sortal.jit(f), Linear(2, 2)) == 0


def test_a_sown_value_and_a_new_variable_are_the_only_outputs() -> None:
    net = Net()
    f = sortal.jit(
        lambda m: (m.sow(sortal.Intermediate, "y", m.norm.mean + 1), None)[1]
    )
    assert n_out(f, net) == 1
    f(net)
    assert net.y.value[0][0] == 1


def test_values_that_did_not_change_keep_their_very_arrays() -> None:
    net = Net()
    kernel, mean = net.layers[0].kernel.value, net.norm.mean.value
    sortal.jit(lambda m, x: m(x))(net, jnp.ones((2, 3)))
    assert net.layers[0].kernel.value is kernel
    assert net.norm.mean.value is not mean


def test_the_result_is_that_of_plain_jax_written_by_hand() -> None:
    net, x = Net(), jnp.arange(6.0).reshape(2, 3)
    w0, b0 = net.layers[0].kernel.value, net.layers[0].bias.value
    w1, b1 = net.layers[1].kernel.value, net.layers[1].bias.value

    @jax.jit
    def by_hand(x: Any, mean: Any) -> Any:
        h = x @ w0 + b0
        mean, batch = 0.9 * mean + 0.1 * h.mean(0), h.mean(0)
        return jnp.tanh((h - batch) * 1.0) @ w1 + b1, mean

    y, mean = by_hand(x, jnp.zeros(4))
    np.testing.assert_allclose(sortal.jit(net)(x), y, rtol=1e-6)
    np.testing.assert_allclose(net.norm.mean.value, mean, rtol=1e-6)
    assert int(net.calls.value) == 1


# ------------------------------------------------------------------------ retracing
def test_a_second_call_does_not_retrace_nor_does_a_rebuilt_equal_model() -> None:
    counted = Counted(lambda m, x: m(x))
    f, x = sortal.jit(counted), jnp.ones((2, 3))
    net = Net()
    for _ in range(3):
        f(net, x)
    f(Net(7), x)
    f(sortal.clone(net), x)
    sortal.update(net, jax.tree.map(lambda v: v + 1, sortal.state(net)))
    f(net, x)
    assert counted.traces == 1


def test_train_and_eval_flips_trace_each_mode_once() -> None:
    counted = Counted(lambda m, x: m(x))
    f, net, x = sortal.jit(counted), Net(), jnp.ones((2, 3))
    for _ in range(3):
        net.eval()
        f(net, x)
        net.train()
        f(net, x)
    assert counted.traces == 2


def test_every_change_of_structure_is_traced_anew() -> None:
    counted = Counted(lambda m: m.rate)
    f, m = sortal.jit(counted), Holder(rate=1, items=[])
    for i, (edit, now) in enumerate(
        [
            (lambda: None, 1),
            (lambda: setattr(m, "rate", 2), 2),
            (lambda: setattr(m, "rate", 2.0), 2.0),
            (lambda: m.items.append(1), 2.0),
            (lambda: vars(m).update(sly=Param(jnp.ones(1))), 2.0),
            (lambda: m.sly.set_metadata(tag="t"), 2.0),
        ],
        1,
    ):
        edit()
        assert f(m) == now
        assert counted.traces == i
    f(m)
    assert counted.traces == 6


def test_structure_edits_settle_so_that_later_calls_do_not_retrace() -> None:
    counted = Counted(lambda m: m.sow(sortal.Cache, "y", m.bias + 1, lambda _, x: x))
    f, m = sortal.jit(counted), Linear(1, 1)
    for _ in range(4):
        f(m)
    assert counted.traces == 2


def test_sow_then_pop_returns_to_the_compiled_program() -> None:
    counted = Counted(lambda m: m.sow(sortal.Intermediate, "y", m.bias + 1))
    f, m = sortal.jit(counted), Linear(1, 1)
    for _ in range(3):
        f(m)
        assert sortal.pop(m, sortal.Intermediate)["y"].value[0][0] == 1
    assert counted.traces == 1


def test_clear_cache_forgets_the_programs() -> None:
    counted = Counted(lambda m: m.bias + 1)
    f = sortal.jit(counted)
    f(Linear(1, 1))
    f.clear_cache()
    f(Linear(1, 1))
    assert counted.traces == 2


# -------------------------------------------------------------------------- methods
class Stepper(sortal.Module):
    """Methods that are jitted where they are defined."""

    def __init__(self) -> None:
        self.n = Count(jnp.array(0))

    @sortal.jit
    def __call__(self, by: Any = 1) -> Any:
        self.n[...] += by
        return self.n + 0

    @functools.partial(sortal.jit, static_argnames="times")
    def repeat(self, *, times: int) -> None:
        for _ in range(times):
            self.n[...] += 1

    @sortal.jit(static_argnums=1)
    def grow(self, name: str) -> None:
        setattr(self, name, Count(self.n + 0))


def test_methods_may_be_jitted_where_they_are_defined() -> None:
    stepper, other = Stepper(), Stepper()
    assert int(stepper()) == 1
    assert int(stepper(by=4)) == 5
    assert int(other()) == 1
    stepper.repeat(times=3)
    assert int(stepper.n.value) == 8
    stepper.grow("more")
    assert int(stepper.more.value) == 8
    assert Stepper.__call__.__name__ == "__call__"
    assert not has_tracer(stepper)


def test_options_of_a_bound_method_count_from_its_own_arguments() -> None:
    class Scaled(sortal.Module):
        def __init__(self) -> None:
            self.w = Param(jnp.ones(2))

        def power(self, x: Any, n: int) -> Any:
            return self.w * x**n if n else x

    m = Scaled()
    f = sortal.jit(m.power, static_argnums=1, donate_argnums=0)
    x = jnp.full(2, 3.0)
    np.testing.assert_array_equal(f(x, 2), [9, 9])
    assert x.is_deleted()
    assert not m.w.value.is_deleted()
    g = sortal.jit(m.power, static_argnums=-1)
    np.testing.assert_array_equal(g(jnp.full(2, 3.0), 1), [3, 3])


# --------------------------------------------------------------------------- static
def power(m: Any, x: Any, n: int = 1, *, mode: str = "a") -> Any:
    assert isinstance(n, int)
    assert isinstance(mode, str)
    m.calls[...] += n
    return x**n


@pytest.mark.parametrize(
    "options",
    [
        {"static_argnums": 2},
        {"static_argnums": (2,)},
        {"static_argnames": "n"},
        {"static_argnames": ("n", "mode")},
        {"static_argnums": 2, "static_argnames": ("mode",)},
    ],
    ids=str,
)
def test_static_arguments_by_position_and_by_name(options: Any) -> None:
    f, net, x = sortal.jit(power, **options), Net(), jnp.full(1, 3.0)
    assert f(net, x, 2)[0] == 9
    if len(options) == 1:  # JAX reads one spelling from the other only alone
        assert f(net, x, n=3)[0] == 27
    if "mode" in str(options):
        assert f(net, x, 3, mode="b")[0] == 27
    assert int(net.calls.value) in {5, 8}


def test_a_static_module_is_handed_over_as_it_is() -> None:
    net = Net()
    f = sortal.jit(lambda m, x: x + (m is net), static_argnums=0)
    assert int(f(net, jnp.array(1))) == 2


# ------------------------------------------------------------------------- donation
@pytest.mark.parametrize(
    "options",
    [{"donate_argnums": 0}, {"donate_argnums": (0,)}, {"donate_argnames": "m"}],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_donated_model_is_usable_afterwards_and_its_old_buffers_are_gone(
    options: Any, by_name: bool
) -> None:
    def step(m: Any) -> None:
        m.calls[...] += 1
        m.layers[0].kernel[...] = m.layers[0].kernel * 2

    net = Net()
    expected = portrait(net.layers[1])
    twice = 2 * np.asarray(net.layers[0].kernel.value)
    old, read_only = net.layers[0].kernel.value, net.layers[1].kernel.value
    f = sortal.jit(step, **options)
    for n in (1, 2):
        _ = f(m=net) if by_name else f(net)
        assert int(net.calls.value) == n
    np.testing.assert_array_equal(net.layers[0].kernel.value, 2 * twice)
    assert old.is_deleted()
    assert read_only.is_deleted()
    assert portrait(net.layers[1]) == expected


def test_one_buffer_in_two_variables_can_be_donated() -> None:
    array = jnp.ones(3)
    m = Holder(a=Param(array), b=Param(array), raw=array)
    sortal.jit(lambda m: m.a.set_value(m.a + 1), donate_argnums=0)(m)
    assert (m.a[0], m.b[0], m.raw[0]) == (2, 1, 1)


def test_a_stale_buffer_met_later_is_reported_by_path() -> None:
    net = Net()
    twin = sortal.clone(net)
    sortal.jit(lambda m: None, donate_argnums=0)(net)
    with pytest.raises(StaleBufferError) as e:
        sortal.jit(lambda m, x: m(x))(twin, jnp.ones((2, 3)))
    text = str(e.value)
    assert "donated to an earlier call" in text
    assert "['layers'][0]['kernel']" in text or "layers.0.kernel" in text
    assert "clone(model, arrays=True)" in text


def test_errors_that_are_no_stale_buffers_are_left_as_they_are() -> None:
    def fail(m: Any) -> None:
        raise ValueError("my own")

    with pytest.raises(ValueError, match=r"^my own") as e:
        sortal.jit(fail)(Linear(1, 1))
    assert type(e.value) is ValueError


# ------------------------------------------------------------------------ shardings
def test_shardings_of_plain_arrays_are_obeyed() -> None:
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("i"))
    every = NamedSharding(mesh, PartitionSpec())
    f = sortal.jit(lambda x, y: x + y, in_shardings=(rows, every), out_shardings=rows)
    out = f(jnp.ones((4, 2)), jnp.ones((4, 2)))
    assert out.sharding.is_equivalent_to(rows, 2)
    method = sortal.jit(Linear(2, 2).__call__, in_shardings=(rows,))
    assert len(method(jnp.ones((4, 2))).sharding.device_set) == 4
    m = Holder(w=Param(jax.device_put(jnp.ones((4, 2)), rows)))
    g = sortal.jit(lambda m: m.w.set_value(m.w * 2))
    g(m)
    assert m.w.value.sharding.is_equivalent_to(rows, 2)


# --------------------------------------------------------------- nesting, other JAX
def test_jit_of_grad_of_jit_is_the_gradient_by_hand() -> None:
    net, x = Linear(3, 2), jnp.arange(6.0).reshape(2, 3)

    def by_hand(p: Any) -> Any:
        return ((x @ p["w"] + p["b"]) ** 2).sum()

    params = {"w": net.kernel.value, "b": net.bias.value}
    expected = jax.jit(jax.grad(jax.jit(by_hand)))(params)
    inner = sortal.jit(lambda m: (m(x) ** 2).sum())
    grads = sortal.jit(sortal.grad(inner))(net)
    np.testing.assert_allclose(grads["kernel"].value, expected["w"], rtol=1e-6)
    np.testing.assert_allclose(grads["bias"].value, expected["b"], rtol=1e-6)


def test_raw_vmap_over_split_states_runs_an_ensemble() -> None:
    x = jnp.ones((2, 3))
    nets = [Linear(3, 2, seed) for seed in range(3)]
    graphdef = sortal.graphdef(nets[0])
    states = jax.tree.map(lambda *v: jnp.stack(v), *map(sortal.state, nets))

    @sortal.jit
    def run(states: Any, x: Any) -> Any:
        return jax.vmap(lambda s: sortal.merge(graphdef, s)(x))(states)

    for row, net in zip(run(states, x), nets, strict=True):
        np.testing.assert_allclose(row, net(x), rtol=1e-6)


def test_a_live_model_through_an_outer_raw_jit_closure_is_refused() -> None:
    net = Net()
    inner = sortal.jit(lambda m, x: m(x))
    with untouched(net), pytest.raises(TraceError, match=r"calls \(Count\)"):
        jax.jit(lambda x: inner(net, x))(jnp.ones((2, 3)))
    assert not has_tracer(net)
    inner(net, jnp.ones((2, 3)))
    assert int(net.calls.value) == 1


def test_a_model_passed_through_an_outer_raw_jit_is_a_copy_inside() -> None:
    net, inner = Net(), sortal.jit(lambda m, x: m(x))

    def outer(m: Any, x: Any) -> Any:
        inner(m, x)
        return m.calls.value

    with untouched(net):
        assert int(jax.jit(outer)(net, jnp.ones((2, 3)))) == 1


def test_lower_trace_and_eval_shape_run_and_change_nothing() -> None:
    net, x = Net(), jnp.ones((2, 3))
    f = sortal.jit(lambda m, x: (m, m(x)))
    with untouched(net):
        assert "tanh" in f.lower(net, x).as_text()
        f.trace(net, x)
        shape = f.eval_shape(net, x)[1]
    assert (shape.shape, shape.dtype) == ((2, 2), jnp.float32)
    bound = sortal.jit(net.__call__)
    with untouched(net):
        assert bound.eval_shape(x).shape == (2, 2)


def test_eval_shape_of_a_jitted_function_knows_its_static_arguments() -> None:
    def f(m: Any, x: Any, n: int, *, how: str = "sum") -> Any:
        assert isinstance(n, int)
        return jnp.tile(getattr(jnp, how)(m(x)), n)

    net, x = Net(), jnp.ones((2, 3))
    for jitted in (
        sortal.jit(f, static_argnums=2, static_argnames="how"),
        sortal.jit(functools.partial(f, net), static_argnums=1, static_argnames="how"),
        sortal.jit(f, static_argnames=("n", "how")),
    ):
        args = (x,) if len(jitted._first) else (net, x)
        with untouched(net):
            assert jitted.eval_shape(*args, 3).shape == (3,)
            assert jitted.eval_shape(*args, 4, how="max").shape == (4,)


class Method(sortal.Module):
    def __init__(self) -> None:
        self.w = Param(jnp.ones(3))

    @functools.partial(sortal.jit, static_argnums=2)
    def call(self, x: Any, n: int) -> Any:
        return (self.w * x).sum() * n


def test_a_jitted_method_can_be_lowered_traced_and_given_shapes() -> None:
    m, x = Method(), jnp.ones(3)
    assert "multiply" in m.call.lower(x, 2).as_text()
    assert len(m.call.trace(x, 2).jaxpr.in_avals) == 2
    assert m.call.eval_shape(x, 2).shape == ()
    assert nnx.jit_partial(lambda m, x: m.w * x, m).lower(x).in_tree is not None
    assert float(m.call(x, 2)) == 6
    assert sortal.grad(m.call)(x, 2)["w"].value.tolist() == [2, 2, 2]
    assert len(sortal.make_jaxpr(m.call, static_argnums=1)(x, 2).in_avals) == 2


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"jit takes a function .* found 3"):
        sortal.jit(3)


# ----------------------------------------------------------------------- eval_shape
def test_eval_shape_builds_models_without_arrays() -> None:
    made = sortal.eval_shape(lambda: Net(3))
    assert all(type(v) is jax.ShapeDtypeStruct for v in jax.tree.leaves(made))
    assert sortal.graphdef(made) is sortal.graphdef(Net())
    made.norm.mean.value = jnp.zeros(4)
    assert sortal.state(made)["norm"]["mean"].shape == (4,)


def test_eval_shape_touches_nothing_and_returns_abstract_copies() -> None:
    net, x = Net(), jnp.ones((2, 3))

    def f(m: Any, x: Any) -> Any:
        m.extra = Param(m(x))
        m.layers.append(1)
        return m, m.extra

    with untouched(net):
        made, extra = sortal.eval_shape(f, net, x)
    assert made is not net
    assert extra is made.extra
    assert extra.value == jax.ShapeDtypeStruct((2, 2), jnp.float32)
    assert type(made.layers[0].kernel.value) is jax.ShapeDtypeStruct
    assert len(made.layers) == 3
    assert not has_tracer(made)


def test_eval_shape_of_an_abstract_model() -> None:
    made = sortal.eval_shape(lambda: Net())
    out = sortal.eval_shape(
        lambda m, x: m(x), made, jax.ShapeDtypeStruct((5, 3), jnp.float32)
    )
    assert out.shape == (5, 2)


# ---------------------------------------------------- programs compiled ahead
class Ahead(nnx.Module):
    def __init__(self) -> None:
        self.w = nnx.Param(jnp.arange(3.0))
        self.n = nnx.Variable(jnp.array(0))

    @nnx.jit
    def count(self, x: Any) -> Any:
        self.n[...] += 1
        return self.w * x


def scaled(model: Ahead, x: Any, by: int = 1) -> Any:
    model.n[...] += by
    return model.w[...] * x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"donate": nnx.Variable},
        {"donate": True},
        {"in_shardings": None},
        {"donate_argnums": 0},
    ],
    ids=str,
)
def test_a_program_compiled_ahead_is_called_as_the_function(options: Any) -> None:
    model, other = Ahead(), Ahead()
    program = nnx.jit(scaled, **options).lower(model, 2.0).compile()
    assert int(model.n[...]) == 0
    np.testing.assert_array_equal(program(model, 3.0), np.arange(3.0) * 3)
    np.testing.assert_array_equal(program(other, 4.0), np.arange(3.0) * 4)
    program(other, 4.0)
    assert (int(model.n[...]), int(other.n[...])) == (1, 2)


@pytest.mark.parametrize("donate", [None, nnx.Variable])
def test_what_was_static_is_left_out_of_a_call_of_a_program(donate: Any) -> None:
    model = Ahead()
    by_place = nnx.jit(scaled, static_argnums=2, donate=donate)
    by_name = nnx.jit(scaled, static_argnames="by", donate=donate)
    by_place.lower(model, 1.0, 5).compile()(model, 2.0)
    by_name.lower(model, 1.0, by=7).compile()(model, 2.0)
    assert int(model.n[...]) == 12


def test_shardings_go_into_a_program() -> None:
    mesh = jax.make_mesh((1,), ("d",))
    on = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = Ahead()
    f = nnx.jit(scaled, in_shardings=on, out_shardings=on)
    out = f.lower(model, jnp.ones(3)).compile()(model, jnp.ones(3))
    assert out.sharding == on
    assert int(model.n[...]) == 1


def test_programs_of_methods_and_partials_take_the_other_arguments() -> None:
    model = Ahead()
    of_method = model.count.lower(1.0).compile()
    of_partial = nnx.jit_partial(scaled, model).lower(1.0).compile()
    of_bound = nnx.jit(model.count).lower(1.0).compile()
    for program in (of_method, of_partial, of_bound):
        np.testing.assert_array_equal(program(2.0), np.arange(3.0) * 2)
    assert int(model.n[...]) == 3
    assert of_method.cost_analysis() is not None
    assert "HloModule" in of_partial.as_text()


def test_a_program_refuses_another_structure_or_shape() -> None:
    model = Ahead()
    program = nnx.jit(scaled).lower(model, jnp.ones(3)).compile()
    with pytest.raises(ArgumentError, match="compiled for other arguments") as e:
        program(model, jnp.ones((2, 3)))
    assert "compiled with float32[3] and called with float32[2,3]" in str(e.value)
    assert "x64" not in str(e.value)
    with pytest.raises(ArgumentError, match="compiled for other arguments"):
        program({"model": model}, jnp.ones(3))
    other = Ahead()
    other.more = nnx.Param(jnp.ones(1))
    with pytest.raises(ArgumentError) as e:
        program(other, jnp.ones(3))
    assert "other arguments:\n  at args[0]: a model of another structure\n" in str(
        e.value
    )
    assert int(model.n[...]) == 0
