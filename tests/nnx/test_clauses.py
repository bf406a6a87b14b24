"""Small programs under either library: equal output, or an error of ours."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx

from sortal import nnx
from sortal.errors import ArgumentError, AxisError, OptimizerError, VariableError

PROGRAMS: list[Any] = []


def alike(program: Any) -> Any:
    """A program that must have equal output under either library."""
    PROGRAMS.append(program)
    return program


def plain(lib: Any, x: Any) -> Any:
    """Output as numbers, texts and containers of them."""
    if isinstance(x, lib.State):
        x = lib.to_pure_dict(x)
    if isinstance(x, dict):
        return {k: plain(lib, v) for k, v in x.items()}
    if isinstance(x, tuple | list):
        return [plain(lib, v) for v in x]
    if isinstance(x, lib.Variable):
        x = x[...]
    return np.asarray(x).tolist() if isinstance(x, jax.Array | np.ndarray) else x


@pytest.mark.filterwarnings(r"ignore:\s*Using 'Module:DeprecationWarning")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_a_program_has_the_output_that_it_has_in_flax(program: Any) -> None:
    assert plain(nnx, program(nnx)) == plain(flax_nnx, program(flax_nnx))


def small(lib: Any, value: float = 1.0) -> Any:
    class Small(lib.Module):
        def __init__(self) -> None:
            self.w = lib.Param(jnp.full(3, value))
            self.n = lib.BatchStat(jnp.zeros(3))

        def __call__(self, x: Any) -> Any:
            return self.w[...] * x

    return Small()


# ----------------------------------------------------------------- axes and shardings
def test_vmap_refuses_to_move_the_axis_of_what_was_passed_in() -> None:
    v = nnx.Param(jnp.arange(6.0).reshape(2, 3))
    with pytest.raises(AxisError, match=r"<root> \(Param\): 0 in, 1 out"):
        nnx.vmap(lambda v: v, in_axes=0, out_axes=1)(v)
    with pytest.raises(AxisError, match=r"0 in, None out"):
        nnx.vmap(lambda v: (v, v * 2), in_axes=0, out_axes=(None, 0))(v)
    with pytest.raises(AxisError, match=r"w \(Param\): None in, 1 out"):
        nnx.vmap(lambda m, x: m, in_axes=(None, 0), out_axes=1)(
            small(nnx), jnp.ones((2, 3))
        )
    assert nnx.vmap(lambda v: v, in_axes=1, out_axes=-1)(v) is v
    assert nnx.vmap(lambda v: nnx.clone(v), out_axes=1)(v).shape == (3, 2)


@alike
def a_stream_that_all_steps_share_gives_the_same_key_at_each(lib: Any) -> Any:
    layer = lib.Dropout(0.5, rngs=lib.Rngs(0))

    @lib.scan(in_axes=(None, lib.Carry, 0), out_axes=(lib.Carry, 0))
    def step(layer: Any, c: Any, x: Any) -> Any:
        return c, layer(x)

    return step(layer, 0.0, jnp.ones((3, 8)))


def test_a_shared_stream_goes_on_after_scan() -> None:
    rngs = nnx.Rngs(0)

    @nnx.scan(in_axes=(None, 0), out_axes=0)
    def draw(rngs: Any, x: Any) -> Any:
        return rngs.uniform() + 0 * x

    drawn = draw(rngs, jnp.arange(3.0))
    assert float(drawn[0]) == float(drawn[1]) == float(drawn[2])
    assert int(rngs.default.count[...]) == 1
    assert float(draw(rngs, jnp.arange(3.0))[0]) != float(drawn[0])
    assert draw(rngs, jnp.zeros(0)).shape == (0,)
    assert int(rngs.default.count[...]) == 2


# ----------------------------------------------------------------------------- values
@alike
def an_empty_sequential_is_the_identity(lib: Any) -> Any:
    return lib.Sequential()(jnp.ones(2))


@pytest.mark.parametrize("name", ["hijax", "ref"])
def test_a_variable_that_jax_jit_would_update_is_refused(name: str) -> None:
    with pytest.raises(VariableError, match=rf"Param: {name}=True would let jax.jit"):
        nnx.Param(jnp.ones(2), **{name: True})
    assert not getattr(nnx.Param(jnp.ones(2), **{name: False}), name)


def on_mesh() -> Any:
    mesh = jax.make_mesh((1,), ("d",))
    return lambda *names: jax.NamedSharding(mesh, jax.P(*names))


@pytest.mark.parametrize("how", ["one", "by kind"])
def test_in_shardings_place_what_is_only_read(how: str) -> None:
    there = on_mesh()()
    given = there if how == "one" else nnx.StateSharding({...: there})
    model = small(nnx)
    before = model.w[...]
    forward = nnx.jit(lambda m, x: m(x), in_shardings=(given, None))
    for _ in range(2):
        np.testing.assert_array_equal(forward(model, 2.0), 2 * np.ones(3))
        assert model.w[...].sharding == model.n[...].sharding == there
    assert before.sharding != there


def test_jit_refuses_two_shardings_of_one_variable() -> None:
    at = on_mesh()
    v = nnx.Param(jnp.ones((2, 2)))
    add = nnx.jit(lambda a, b: a[...] + b[...], in_shardings=(at(), at("d")))
    with pytest.raises(AxisError, match=r"<root> \(Param\): .*P\(\).*P\('d',?\)"):
        add(v, v)
    both = nnx.jit(lambda a, b: a.v[...] + b[...], in_shardings=(at("d"), at()))
    holder = small(nnx)
    holder.v = v
    with pytest.raises(AxisError, match=r"one sharding each"):
        both(holder, v)
    same = nnx.jit(lambda a, b: a[...] + b[...], in_shardings=(at("d"), at("d")))
    assert same(v, v).shape == (2, 2)


# ------------------------------------------------------------- arguments by keyword
@alike
def vmap_takes_axes_of_keywords_from_the_signature(lib: Any) -> Any:
    @lib.vmap(in_axes=(None, 1))
    def f(m: Any, x: Any) -> Any:
        return m.w[...] * x.sum()

    x = jnp.arange(6.0).reshape(3, 2)
    return f(m=small(lib), x=x), f(small(lib), x=x), f(x=x, m=small(lib))


@alike
def vmap_gives_each_replica_its_keys_by_keyword(lib: Any) -> Any:
    @lib.split_rngs(splits=3)
    @lib.vmap(in_axes=(0, 0))
    def f(rngs: Any, x: Any) -> Any:
        return rngs.uniform((2,)) * x

    return f(lib.Rngs(0), x=jnp.ones(3))


@alike
def scan_takes_keywords(lib: Any) -> Any:
    @lib.scan(in_axes=(lib.Carry, None, 0), out_axes=(lib.Carry, 0))
    def f(c: Any, m: Any, b: Any) -> Any:
        return c + b, m.w[...] * b

    return f(c=0.0, m=small(lib), b=jnp.arange(3.0)), f(
        0.0, b=jnp.arange(2.0), m=small(lib)
    )


@alike
def derivatives_take_keywords(lib: Any) -> Any:
    def loss(m: Any, x: Any = 3.0) -> Any:
        return (m.w[...] * x).sum()

    both = lib.grad(lambda a, b: (a * b).sum(), argnums=(0, 1))
    value, grads = lib.value_and_grad(loss)(m=small(lib), x=2.0)
    return (
        value,
        lib.to_pure_dict(grads),
        lib.to_pure_dict(lib.grad(loss)(x=4.0, m=small(lib))),
        both(jnp.ones(2), b=jnp.arange(2.0)),
        lib.grad(loss, argnums=1)(small(lib)),
    )


def test_axes_for_defaults_may_be_given() -> None:
    f = nnx.vmap(lambda m, x, y=2.0: m(x) * y, in_axes=(None, 0, None))
    np.testing.assert_array_equal(f(small(nnx), jnp.ones(2)), np.full((2, 3), 2.0))
    with pytest.raises(ArgumentError, match=r"in_axes has 3 entries"):
        nnx.vmap(lambda m, x: m(x), in_axes=(None, 0, None))(small(nnx), jnp.ones(2))


# ----------------------------------------------------------------------- derivatives
@alike
def the_gradient_by_a_module_without_params_is_empty(lib: Any) -> Any:
    class Stats(lib.Module):
        def __init__(self) -> None:
            self.v = lib.BatchStat(jnp.ones(2))

    def loss(stats: Any, model: Any) -> Any:
        return (stats.v[...] * model.w[...][:2]).sum()

    grads = lib.grad(loss, argnums=(0, 1))(Stats(), small(lib))
    alone = lib.grad(loss)(Stats(), small(lib))
    return [lib.to_pure_dict(x) for x in (*grads, alone)], len(alone)


@alike
def the_gradient_by_a_state_has_all_its_leaves(lib: Any) -> Any:
    graphdef, params, rest = lib.split(small(lib), lib.Param, ...)

    def loss(rest: Any, params: Any) -> Any:
        model = lib.merge(graphdef, params, rest)
        return (model.w[...] * (1 + model.n[...])).sum()

    value, (a, b) = lib.value_and_grad(loss, argnums=(0, 1))(rest, params)
    empty = lib.grad(lambda s: jnp.ones(()))(lib.state(small(lib), lib.Cache))
    return value, lib.to_pure_dict(a), lib.to_pure_dict(b), lib.to_pure_dict(empty)


@alike
def the_gradient_by_a_variable_is_one(lib: Any) -> Any:
    def loss(v: Any) -> Any:
        return sum((x[...] ** 2).sum() for x in jax.tree.leaves(v, is_leaf=of(lib)))

    a, b = lib.Param(jnp.arange(2.0)), lib.BatchStat(jnp.ones(2))
    value, by_b = lib.value_and_grad(loss)(b)
    by_both = lib.grad(loss)({"a": a, "b": [b]})
    (by_a,), aux = lib.grad(lambda v: (loss(v), 3), has_aux=True)((a,))
    stepped = jax.tree.map(lambda x, g: x - 0.1 * g, a, by_a)
    found = (by_b, by_both["a"], by_both["b"][0], by_a, stepped)
    return value, aux, [(type(x).__name__, x[...]) for x in found]


def of(lib: Any) -> Any:
    return lambda x: isinstance(x, lib.Variable)


@alike
def gradients_by_perturbations(lib: Any) -> Any:
    class Net(lib.Module):
        def __init__(self, rngs: Any):
            self.linear = lib.Linear(2, 2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return (self.perturb("h", self.linear(x)) ** 2).sum()

    model = Net(lib.Rngs(0))
    model(jnp.ones(2))
    by = lib.DiffState(0, lib.Perturbation)
    grads = lib.grad(lambda m: m(jnp.ones(2)), argnums=by)(model)
    graphdef, params, perturbations = lib.split(model, lib.Param, lib.Perturbation)
    again = lib.grad(lambda p: lib.merge(graphdef, params, p)(jnp.ones(2)))(
        perturbations
    )
    return lib.to_pure_dict(grads), lib.to_pure_dict(again)


@alike
def the_backward_function_is_given_gradients_of_inputs_and_output(lib: Any) -> Any:
    @lib.custom_vjp
    def f(m: Any) -> Any:
        return jnp.sin(m.x[...]) * m.y[...]

    def fwd(m: Any) -> Any:
        return f(m), (jnp.cos(m.x[...]), jnp.sin(m.x[...]), m)

    def bwd(residuals: Any, g: Any) -> Any:
        (m_g,), out_g = g
        cos_x, sin_x, m = residuals
        m_g["x"][...] = cos_x * out_g * m.y[...]
        m_g["y"][...] = sin_x * out_g
        return (m_g,)

    class Foo(lib.Module):
        def __init__(self) -> None:
            self.x, self.y = lib.Param(jnp.array(1.0)), lib.Param(jnp.array(0.5))

    f.defvjp(fwd, bwd)
    return lib.to_pure_dict(lib.grad(f)(Foo()))


@alike
def a_pullback_deletes_what_is_not_differentiated(lib: Any) -> Any:
    chosen = lib.DiffState(0, lib.PathContains("x"))

    @lib.custom_vjp(nondiff_argnums=(chosen,))
    def f(m: Any) -> Any:
        return jnp.sin(m.x[...]) * m.y[...]

    def bwd(cos: Any, g: Any) -> Any:
        (m_g,), out_g = g
        m_g = jax.tree.map(lambda x: x, m_g)
        m_g["x"][...] = cos * out_g * 3
        del m_g["y"]
        return (m_g,)

    f.defvjp(lambda m: (f(m), jnp.cos(m.x[...])), bwd)
    m = lib.Dict(x=lib.Param(jnp.array(1.0)), y=lib.Param(jnp.array(2.0)))
    return lib.grad(f, argnums=chosen)(m)


@alike
def the_backward_function_of_several_arguments(lib: Any) -> Any:
    @lib.custom_vjp(nondiff_argnums=(0,))
    def f(k: Any, m: Any, x: Any, v: Any) -> Any:
        return (m.w[...] * x).sum() * k * v[...]

    def bwd(k: Any, m: Any, g: Any) -> Any:
        (m_g, x_g, v_g), out_g = g
        assert x_g is None
        m_g["w"][...] = out_g * k * jnp.ones(3)
        return m_g, m.w[...] * out_g * k, jax.tree.map(lambda a: a + 7, v_g)

    f.defvjp(lambda k, m, x, v: (f(k, m, x, v), m), bwd)
    v = lib.Param(jnp.array(2.0))
    by_m, by_x, by_v = lib.grad(f, argnums=(1, 2, 3))(
        2, small(lib, 2.0), jnp.arange(3.0), v
    )
    return lib.to_pure_dict(by_m), by_x, by_v[...]


@alike
def the_backward_function_without_graph_is_given_that_of_the_output(lib: Any) -> Any:
    @lib.custom_vjp(graph=False)
    def f(x: Any) -> Any:
        return x * 2

    f.defvjp(lambda x: (f(x), x), lambda x, g: (10 * g * x,))
    return lib.grad(f, graph=False)(jnp.array(3.0))


@alike
def names_of_files_that_programs_use(lib: Any) -> Any:
    things = [small(lib), lib.Param(1), 3, [1], jnp.ones(1), lib.List()]
    with pytest.raises(ValueError, match="none"):
        lib.module.first_from(None, error_msg="none")
    return (
        [lib.graph.is_node(x) for x in things],
        [lib.graph.is_graph_node(x) for x in things],
        lib.module.first_from(None, 0, 1, error_msg=""),
    )


# ----------------------------------------------------------------------------- marks
@alike
def fields_of_a_dataclass_say_what_is_static(lib: Any) -> Any:
    @dataclasses.dataclass
    class Both(lib.Pytree):
        a: int = dataclasses.field(metadata={"static": False})
        b: int = dataclasses.field(metadata={"static": True})
        c: int = 3

    return jax.tree.leaves(Both(1, 2)), lib.to_pure_dict(lib.state(Both(1, 2)))


@alike
def items_of_a_list_may_be_marked(lib: Any) -> Any:
    items = lib.List([lib.data(jnp.ones(1)), lib.static(3), lib.data(lib.Param(2))])
    items.append(lib.data(4))
    return len(items), items[1], lib.to_pure_dict(lib.state(items))


# -------------------------------------------------------------------------- training
@alike
def an_optimizer_takes_its_part_of_the_gradients(lib: Any) -> Any:
    model = small(lib)
    optimizer = lib.Optimizer(model, optax.adam(0.1), wrt=lib.Param)
    everything = jax.tree.map(jnp.ones_like, lib.state(model))
    optimizer.update(model, everything)
    return lib.to_pure_dict(lib.state(model))


def test_an_optimizer_refuses_gradients_of_what_the_model_has_not() -> None:
    model, other = small(nnx), small(nnx)
    other.v = nnx.Param(jnp.ones(1))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(OptimizerError, match=r"unknown: v \(Param\)"):
        optimizer.update(model, nnx.state(other))
    with pytest.raises(OptimizerError, match=r"missing: w \(Param\)"):
        optimizer.update(model, nnx.state(model, nnx.BatchStat))


@alike
def optimizer_state_has_the_axes_of_optimizer_sharding(lib: Any) -> Any:
    mesh = jax.make_mesh((1,), ("d",))
    with jax.set_mesh(mesh):

        class Layer(lib.Module):
            def __init__(self) -> None:
                self.w = lib.Param(jnp.ones((4, 2)), optimizer_sharding=("d", None))

        model = Layer()
        optimizer = lib.Optimizer(model, optax.adam(0.1), wrt=lib.Param)
        optimizer.update(model, lib.grad(lambda m: (m.w[...] ** 2).sum())(model))
        moments = jax.tree.leaves(lib.state(optimizer)["opt_state"])
    placed = [str(x.sharding.spec) for x in moments if x.ndim == 2]
    return placed, lib.to_pure_dict(lib.state(model))


@pytest.mark.parametrize("donate", [None, nnx.BatchStat])
@pytest.mark.parametrize("static", [{"static_argnames": "k"}, {"static_argnums": 2}])
def test_jit_with_shardings_takes_keywords(static: Any, donate: Any) -> None:
    there = on_mesh()()
    options: Any = {"in_shardings": (there, there), "donate": donate, **static}
    f = nnx.jit(lambda m, x, k: m(x) * k, **options)
    for out in (f(small(nnx), 2.0, k=3), f(k=3, x=2.0, m=small(nnx))):
        np.testing.assert_array_equal(out, np.full(3, 6.0))
    assert "stablehlo" in f.lower(small(nnx), x=2.0, k=3).as_text()


def test_a_number_has_no_axis_to_map_over() -> None:
    with pytest.raises(ValueError, match=r"rank should be at least 1"):
        nnx.vmap(lambda m, x, y=2.0: m(x) * y, in_axes=(None, 0, 0))(
            small(nnx), jnp.arange(2.0)
        )
