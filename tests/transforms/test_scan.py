"""scan: numbers of loops written by hand, roles by kind, and what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

import sortal
from models import Count, Holder, Linear, has_tracer, untouched
from sortal import (
    BatchStat,
    Cache,
    Carry,
    Intermediate,
    Param,
    Policy,
    RngState,
    Rule,
    StateAxes,
    Variable,
)
from sortal.errors import ArgumentError, AxisError, LoopError, PolicyError, TraceError

N, T, D = 3, 4, 2
XS = jnp.arange(T * D, dtype=jnp.float32).reshape(T, D) / 7
KERNELS = jnp.asarray(np.random.default_rng(0).normal(size=(N, D, D)), jnp.float32)
BIASES = jnp.asarray(np.random.default_rng(1).normal(size=(N, D)), jnp.float32)


class Layer(sortal.Module):
    """An affine layer with a running mean, a count, and dropout where it has a key."""

    def __init__(self, kernel: Any, bias: Any):
        self.kernel = Param(kernel)
        self.bias = Param(bias)
        self.mean = BatchStat(jnp.zeros(bias.shape))
        self.calls = Count(jnp.zeros(bias.shape[:-1], jnp.int32))

    def __call__(self, x: Any) -> Any:
        y = x @ self.kernel + self.bias
        self.mean[...] = 0.5 * self.mean + 0.5 * y.mean(0)
        self.calls[...] += 1
        return jnp.tanh(y - self.mean)


def layer_by_hand(kernel: Any, bias: Any, mean: Any, x: Any) -> Any:
    y = x @ kernel + bias
    mean = 0.5 * mean + 0.5 * y.mean(0)
    return mean, jnp.tanh(y - mean)


class Cell(sortal.Module):
    """An RNN cell whose memory is of kind Cache."""

    def __init__(self) -> None:
        self.w = Param(KERNELS[0])
        self.h = Cache(jnp.zeros(D))

    def __call__(self, x: Any) -> Any:
        self.h[...] = jnp.tanh(self.h @ self.w + x)
        return self.h * 2


OVER_TIME = StateAxes({Cache: Carry, ...: None})


def rnn_by_hand(w: Any, h: Any, xs: Any) -> Any:
    ys = []
    for x in xs:
        h = jnp.tanh(h @ w + x)
        ys.append(h * 2)
    return h, jnp.stack(ys)


def scan_equation(f: Any, *args: Any) -> Any:
    """The one scan equation of ``sortal.jit(f)``."""
    jaxpr = sortal.jit(f).trace(*args).jaxpr
    found = []

    def look(jaxpr: Any) -> None:
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            if eqn.primitive.name == "scan":
                found.append(eqn)
            elif "jaxpr" in eqn.params:
                look(eqn.params["jaxpr"])

    look(jaxpr)
    (eqn,) = found
    return eqn


def shapes(variables: Any) -> list[tuple[int, ...]]:
    return sorted(v.aval.shape for v in variables)


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


same = np.testing.assert_array_equal


# ------------------------------------------------------------------------ over layers
def stacked() -> Layer:
    made = sortal.vmap(Layer)(KERNELS, BIASES)
    assert made.kernel.shape == (N, D, D)
    return made


def test_layers_made_by_vmap_and_scanned_are_the_unrolled_loop_to_the_bit() -> None:
    def forward(m: Layer, x: Any) -> Any:
        step = lambda m, x: m(x)  # noqa: E731
        return sortal.scan(step, in_axes=(0, Carry), out_axes=Carry)(m, x)

    @jax.jit
    def by_hand(kernels: Any, biases: Any, x: Any) -> Any:
        means = []
        for i in range(N):
            mean, x = layer_by_hand(kernels[i], biases[i], jnp.zeros(D), x)
            means.append(mean)
        return x, jnp.stack(means)

    m = stacked()
    y = sortal.jit(forward)(m, XS)
    expected, means = by_hand(KERNELS, BIASES, XS)
    same(y, expected)
    same(m.mean.value, means)
    same(m.calls.value, [1] * N)
    same(m.kernel.value, KERNELS)

    def loss(m: Layer) -> Any:
        return (forward(m, XS) ** 2).sum()

    grads = sortal.jit(sortal.grad(loss))(stacked())
    by_jax = jax.jit(
        jax.grad(lambda k, b: (by_hand(k, b, XS)[0] ** 2).sum(), argnums=(0, 1))
    )(KERNELS, BIASES)
    close(grads["kernel"].value, by_jax[0])
    close(grads["bias"].value, by_jax[1])


def test_gradients_through_scan_are_those_of_lax_scan_to_the_bit() -> None:
    def loss(m: Layer) -> Any:
        step = lambda m, x: m(x)  # noqa: E731
        out = sortal.scan(step, in_axes=(0, Carry), out_axes=Carry)(m, XS)
        return (out**2).sum()

    def by_hand(p: Any) -> Any:
        def step(x: Any, p: Any) -> Any:
            mean, x = layer_by_hand(p[0], p[1], jnp.zeros(D), x)
            return x, mean

        return (jax.lax.scan(step, XS, p)[0] ** 2).sum()

    grads = sortal.jit(sortal.grad(loss))(stacked())
    kernel, bias = jax.jit(jax.grad(by_hand))((KERNELS, BIASES))
    same(grads["kernel"].value, kernel)
    same(grads["bias"].value, bias)


def test_a_batch_norm_of_flax_scanned_over_layers_has_the_same_numbers() -> None:
    def build(nnx: Any) -> Any:
        class Block(nnx.Module):
            def __init__(self, rngs: Any):
                self.linear = nnx.Linear(D, D, rngs=rngs)
                self.norm = nnx.BatchNorm(D, rngs=rngs)

            def __call__(self, x: Any) -> Any:
                return jax.nn.relu(self.norm(self.linear(x)))

        make = lambda key: Block(nnx.Rngs(key))  # noqa: E731
        block = nnx.vmap(make)(jax.random.split(jax.random.key(0), N))
        step = nnx.scan(
            lambda m, x: m(x), in_axes=(0, carry_of[nnx]), out_axes=carry_of[nnx]
        )
        y = step(block, XS)
        return [y, block.linear.kernel[...], block.norm.mean[...], block.norm.var[...]]

    carry_of = {sortal: Carry, flax_nnx: flax_nnx.Carry}
    for mine, theirs in zip(build(sortal), build(flax_nnx), strict=True):
        close(mine, theirs)


class Noisy(sortal.Module):
    def __init__(self, key: Any):
        self.rngs = sortal.Rngs(dropout=key)
        self.w = Param(jnp.ones(D))

    def __call__(self, x: Any) -> Any:
        keep = jax.random.bernoulli(self.rngs.dropout(), 0.5, x.shape)
        return jnp.where(keep, x * self.w * 2, 0.0)


def test_each_layer_draws_from_its_own_stream_and_goes_on_from_there() -> None:
    keys = jax.random.split(jax.random.key(7), N)
    m = sortal.vmap(Noisy)(keys)
    forward = sortal.scan(lambda m, x: m(x), in_axes=(0, Carry), out_axes=Carry)
    x = jnp.ones((8, D))
    for count in range(2):
        expected = x
        for key in keys:
            drawn = jax.random.fold_in(key, count)
            keep = jax.random.bernoulli(drawn, 0.5, x.shape)
            expected = jnp.where(keep, expected * 2, 0.0)
        same(forward(m, x), expected)
        same(m.rngs.dropout.count.value, [count + 1] * N)
    same(jax.random.key_data(m.rngs.dropout.key.value), jax.random.key_data(keys))


def test_one_stream_of_random_numbers_may_be_carried_through_all_layers() -> None:
    """Stacked Params, with one RngState that goes from layer to layer."""
    m = Noisy(jax.random.key(3))
    m.w.value = jnp.stack([jnp.full(D, 1.0 + i) for i in range(N)])
    axes = StateAxes({RngState: Carry, ...: 0})
    x = jnp.ones((8, D))
    y = sortal.scan(lambda m, x: m(x), in_axes=(axes, Carry), out_axes=Carry)(m, x)
    for i in range(N):
        drawn = jax.random.fold_in(jax.random.key(3), i)
        keep = jax.random.bernoulli(drawn, 0.5, x.shape)
        x = jnp.where(keep, x * (1.0 + i) * 2, 0.0)
    same(y, x)
    assert int(m.rngs.dropout.count.value) == N


def test_modules_that_each_step_makes_come_out_stacked() -> None:
    def step(i: Any, k: Any) -> Any:
        return i + 1, Holder(w=Param(k * i), c=Count(i))

    last, m = sortal.scan(step)(jnp.array(0), KERNELS)
    assert int(last) == N
    assert type(m) is Holder
    assert not has_tracer(m)
    same(m.w.value, KERNELS * jnp.arange(N)[:, None, None])
    same(m.c.value, [0, 1, 2])
    _, m = sortal.scan(step, out_axes=(Carry, StateAxes({Param: 2, ...: 0})))(
        jnp.array(0), KERNELS
    )
    same(m.w.value, jnp.moveaxis(KERNELS * jnp.arange(N)[:, None, None], 0, 2))
    same(m.c.value, [0, 1, 2])


# -------------------------------------------------------------------------- over time
def roles() -> dict[str, Any]:
    class Memory(Cache, axis=Carry):
        pass

    class Fixed(Param, axis=None):
        pass

    declared = Cell()
    declared.w, declared.h = Fixed(KERNELS[0]), Memory(jnp.zeros(D))
    policy = Policy({Cache: Rule(axis=Carry), Param: Rule(axis=None)})
    noted = Cell()
    noted.h = Cache(jnp.zeros(D), axis=Carry)
    return {
        "StateAxes": (Cell(), OVER_TIME),
        "Policy": (Cell(), policy),
        "kind options": (declared, StateAxes({})),
        "metadata": (noted, StateAxes({Param: None})),
        "Policy of nothing, kind options": (declared, Policy({})),
    }


@pytest.mark.parametrize("how", roles())
@pytest.mark.parametrize("transform", [lambda f: f, sortal.jit])
def test_a_cache_goes_from_step_to_step_while_params_stay(
    how: str, transform: Any
) -> None:
    cell, axes = roles()[how]
    w = cell.w.value
    step = sortal.scan(lambda m, x: m(x), in_axes=(axes, 0), out_axes=0)
    ys = transform(step)(cell, XS)
    h, expected = rnn_by_hand(KERNELS[0], jnp.zeros(D), XS)
    close(ys, expected)
    close(cell.h.value, h)
    assert cell.w.value is w


def test_gradients_flow_through_time_and_through_the_carried_kind() -> None:
    def loss(m: Cell, xs: Any) -> Any:
        ys = sortal.scan(lambda m, x: m(x), in_axes=(OVER_TIME, 0), out_axes=0)(m, xs)
        return (ys**2).sum() + m.h.value.sum()

    def by_hand(w: Any, h: Any) -> Any:
        h, ys = rnn_by_hand(w, h, XS)
        return (ys**2).sum() + h.sum()

    cell = Cell()
    dw, dh = jax.grad(by_hand, argnums=(0, 1))(KERNELS[0], jnp.zeros(D))
    grads = sortal.grad(loss, wrt=(Param, Cache))(cell, XS)
    close(grads["w"].value, dw)
    close(grads["h"].value, dh)
    close(cell.h.value, rnn_by_hand(KERNELS[0], jnp.zeros(D), XS)[0])


def test_one_kind_of_each_role_in_one_module() -> None:
    m = Holder(
        part=Param(jnp.arange(2.0 * T).reshape(2, T)),
        memory=Cache(jnp.array(1.0)),
        shared=BatchStat(jnp.array(10.0)),
    )
    axes = StateAxes({Param: 1, Cache: Carry, BatchStat: None})

    def step(m: Any) -> Any:
        m.memory[...] += m.part.sum() * m.shared
        m.part[...] *= m.memory
        return m.memory[...]

    columns, memory, parts, ys = m.part.value.T, 1.0, [], []
    for column in columns:
        memory += column.sum() * 10.0
        parts.append(column * memory)
        ys.append(memory)
    found = sortal.scan(step, in_axes=(axes,), out_axes=0)(m)
    same(found, ys)
    same(m.part.value, jnp.stack(parts, 1))
    assert float(m.memory.value) == ys[-1]


def test_a_carry_may_be_a_tuple_of_modules_arrays_and_containers() -> None:
    a, b = Holder(c=Count(jnp.array(0))), Holder(w=Param(jnp.ones(D)), h=Cache(XS[0]))

    def step(carry: Any, x: Any) -> Any:
        (a, total, parts), y = carry
        a.c[...] += 1
        parts["b"].h[...] = parts["b"].h * parts["b"].w + x
        return ((a, total + x, parts), y + 1), (x * 2, y)

    init = ((a, jnp.zeros(D), {"b": b, "none": None}), 0)
    ((a2, total, parts), y), (double, counts) = sortal.scan(step)(init, XS)
    assert a2 is a
    assert parts["b"] is b
    assert parts["none"] is None
    assert int(a.c.value) == int(y) == T
    expected, totals = XS[0], jnp.zeros(D)
    for x in XS:
        expected, totals = expected + x, totals + x
    same(b.h.value, expected)
    same(total, totals)
    same(double, XS * 2)
    same(counts, range(T))


def test_a_variable_may_be_the_carry_itself() -> None:
    total = Cache(jnp.zeros(D))

    def step(total: Any, x: Any) -> Any:
        total[...] += x
        return total, None

    last, nothing = sortal.scan(step)(total, XS)
    assert last is total
    assert nothing is None
    same(total.value, XS[0] + XS[1] + XS[2] + XS[3])


def test_a_module_given_twice_is_one_object_and_needs_one_role() -> None:
    cell = Cell()

    def step(m: Any, again: Any, x: Any) -> Any:
        assert m is again
        return m(x)

    scan = sortal.scan(step, in_axes=(OVER_TIME, OVER_TIME, 0), out_axes=0)
    ys = scan(cell, cell, XS)
    h, expected = rnn_by_hand(KERNELS[0], jnp.zeros(D), XS)
    close(ys, expected)
    close(cell.h.value, h)
    with untouched(cell), pytest.raises(AxisError, match="found two for"):
        sortal.scan(step, in_axes=(OVER_TIME, None, 0), out_axes=0)(cell, cell, XS)


# ------------------------------------------------------------------------------ forms
def both(f: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
    """``f`` of a carry and a slice by Sortal, with a module in it, and by JAX."""
    m = Holder(w=Param(jnp.full(D, 2.0)))
    given = {k: v for k, v in options.items() if k not in {"in_axes", "out_axes"}}
    mine = sortal.scan(
        lambda m, c, x: f(m.w[...], c, x), in_axes=(None, Carry, 0), **given
    )(m, *args)
    theirs = jax.lax.scan(lambda c, x: f(jnp.full(D, 2.0), c, x), *args, **given)
    return mine, theirs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reverse": True},
        {"unroll": 2},
        {"unroll": True},
        {"length": T},
        {"_split_transpose": True},
    ],
)
def test_options_are_those_of_jax(options: dict[str, Any]) -> None:
    def f(w: Any, c: Any, x: Any) -> Any:
        return c * w + x, {"y": c - x}

    mine, theirs = both(f, jnp.ones(D), XS, **options)
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    jax.tree.map(same, mine, theirs)


def test_reverse_writes_the_parts_of_a_sliced_leaf_where_they_came_from() -> None:
    m = Holder(p=Param(jnp.arange(3.0)), c=Cache(jnp.array(0.0)))

    def step(m: Any) -> None:
        m.c[...] = m.c * 10 + m.p
        m.p[...] = m.c[...]

    axes = StateAxes({Cache: Carry, ...: 0})
    sortal.scan(step, in_axes=(axes,), out_axes=0, reverse=True)(m)
    same(m.p.value, [210.0, 21.0, 2.0])
    assert float(m.c.value) == 210.0


def test_length_alone_says_how_often() -> None:
    m = Holder(c=Count(jnp.array(0)))

    def step(m: Any) -> Any:
        m.c[...] += 1
        return m

    assert sortal.scan(step, in_axes=Carry, out_axes=Carry, length=5)(m) is m
    assert int(m.c.value) == 5


def test_length_zero_changes_nothing() -> None:
    m = Holder(c=Count(jnp.array(3)), p=BatchStat(jnp.zeros((0, 2))))

    def step(m: Any, x: Any) -> Any:
        m.c[...] += 1
        m.p[...] += 1
        return x

    axes = StateAxes({Count: Carry, ...: 0})
    ys = sortal.scan(step, in_axes=(axes, 0), out_axes=0)(m, jnp.zeros((0, 5)))
    assert ys.shape == (0, 5)
    assert int(m.c.value) == 3
    assert m.p.shape == (0, 2)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_slices_are_taken_and_stacked_along_the_axes_given(axis: int) -> None:
    xs = jnp.arange(24.0).reshape(2, 3, 4)
    m = Holder(s=BatchStat(xs))

    def step(m: Any, x: Any) -> Any:
        m.s[...] = m.s + x
        return {"twice": x * 2, "sum": x.sum()}

    axes = {"twice": axis, "sum": 0}
    found = sortal.scan(step, in_axes=(axis, axis), out_axes=axes)(m, xs)
    same(found["twice"], xs * 2)
    rest = tuple({0, 1, 2} - {axis % 3})
    same(found["sum"], xs.sum(rest))
    same(m.s.value, xs + xs)


def test_what_is_stacked_may_be_a_tuple_around_the_carry() -> None:
    m = Holder(c=Count(jnp.array(0)))

    def step(x: Any, m: Any) -> Any:
        m.c[...] += 1
        return x.sum(), m, {"x": x}, None

    scan = sortal.scan(step, in_axes=(0, Carry), out_axes=(0, Carry, 1, None))
    sums, again, twice, nothing = scan(XS, m)
    assert again is m
    assert nothing is None
    assert int(m.c.value) == T
    close(sums, [x.sum() for x in XS])
    same(twice["x"], XS.T)


def test_a_step_that_returns_nothing_is_fine_without_a_carry() -> None:
    m = Holder(c=Count(jnp.zeros(T)))

    def step(m: Any, x: Any) -> None:
        m.c[...] = x.sum()

    assert sortal.scan(step, in_axes=(0, 0), out_axes=0)(m, XS) is None
    close(m.c.value, [x.sum() for x in XS])


def test_parts_of_modules_that_are_returned_are_the_live_ones() -> None:
    inner = Holder(c=Count(jnp.array(0)), w=Param(jnp.ones(D)))
    m = Holder(inner=inner, frozen=Holder(w=Param(jnp.ones(D))))

    def step(m: Any, x: Any) -> Any:
        m.inner.c[...] += 1
        return x, (m.frozen, m.inner.w, x)

    last, (frozen, w, ys) = sortal.scan(
        lambda x, m, y: step(m, x + y),
        in_axes=(Carry, StateAxes({Count: Carry, ...: None}), 0),
    )(jnp.zeros(D), m, XS)
    assert frozen is m.frozen
    assert w is m.inner.w
    assert int(m.inner.c.value) == T
    same(last, XS[0] + XS[1] + XS[2] + XS[3])
    assert ys.shape == XS.shape


@pytest.mark.parametrize("jit", [False, True])
def test_what_is_carried_is_not_what_the_steps_return_to_be_stacked(jit: bool) -> None:
    def history(m: Any, x: Any) -> Any:
        m.inner.c[...] += 1
        return m, {"count": m.inner.c, "same": m.inner, "x": x}

    m = Holder(inner=Holder(c=Count(jnp.array(0))))
    scanned = sortal.scan(history)
    with untouched(m), pytest.raises(AxisError) as caught:
        (sortal.jit(scanned) if jit else scanned)(m, XS)
    assert str(caught.value) == (
        "scan: what goes from step to step comes back once, as it is after the last "
        "step, and is not stacked; besides the carry the step returned:\n"
        "  inner.c (Count)\nReturn there its value at each step, variable[...], or a "
        "copy, clone(model)."
    )

    def values(m: Any, x: Any) -> Any:
        m.inner.c[...] += 1
        return m, (m.inner.c[...], sortal.clone(m.inner))

    again, (counts, copies) = sortal.scan(values)(m, XS)
    assert again is m
    assert counts.tolist() == copies.c[...].tolist() == list(range(1, T + 1))


def test_a_method_or_a_callable_module_is_a_step_whose_module_is_shared() -> None:
    layer = Linear(D, D)
    expected = jnp.stack([x @ layer.kernel.value for x in XS])
    close(sortal.scan(layer, in_axes=(0,), out_axes=0)(XS), expected)
    close(sortal.scan(layer.__call__, in_axes=(0,), out_axes=0)(XS), expected)
    cell = Cell()
    with untouched(cell), pytest.raises(AxisError, match=r"h \(Cache\)"):
        sortal.scan(cell, in_axes=(0,), out_axes=0)(XS)


def test_scan_decorates() -> None:
    @sortal.scan(in_axes=(Carry, 0), out_axes=Carry)
    def total(c: Any, x: Any) -> Any:
        """Adds."""
        return c + x

    assert total.__doc__ == "Adds."
    same(total(jnp.zeros(D), XS), XS[0] + XS[1] + XS[2] + XS[3])


def test_a_pure_state_is_sliced_by_kind_too() -> None:
    m = Holder(w=Param(XS), c=BatchStat(jnp.array(2.0)))
    state = sortal.state(m)
    axes = StateAxes({Param: 0, ...: None})

    def step(s: Any) -> Any:
        return s["w"].value * s["c"].value

    same(sortal.scan(step, in_axes=(axes,), out_axes=0)(state), XS * 2)


def test_a_state_is_stacked_along_an_axis_for_each_of_its_keys() -> None:
    layers = [Param(XS), {"b": Cache(XS)}]
    state = sortal.state(Holder(w=Param(XS), layers=layers))
    axes = sortal.State({"w": 0, "layers": 1})
    out = sortal.scan(lambda s: s, in_axes=(0,), out_axes=axes)(state)
    turned = {path: x.value.T for path, x in state["layers"].flat_state()}
    assert out["layers"].paths() == tuple(turned)
    assert [x.value.tolist() for x in out["layers"].leaves()] == [
        x.tolist() for x in turned.values()
    ]
    same(out["w"].value, XS)


def test_leaves_of_a_state_cannot_be_carried_by_kind() -> None:
    """Nobody would see what the last step left in them."""
    m = Holder(w=Param(XS), c=Cache(jnp.array(2.0)), n=Count(jnp.array(1)))
    state, axes = sortal.state(m), StateAxes({Param: 0, ...: Carry})

    def step(s: Any, carry: Any) -> Any:
        return s["w"].value * s["c"].value, (carry[1], carry[0])

    scan = sortal.scan(step, in_axes=(axes, Carry), out_axes=(0, Carry))
    with pytest.raises(ArgumentError) as e:
        scan(state, (jnp.array(3.0), jnp.array(4.0)))
    assert "\n  argument 0['c'].value: float32[]\n" in str(e.value)
    assert "\n  argument 0['n'].value: int32[]\n" in str(e.value)
    with pytest.raises(ArgumentError, match=r"argument 0\['c'\]"):
        sortal.scan(lambda s: s["w"].value, in_axes=(axes,), out_axes=0)(state)


def test_weak_types_are_promoted_as_in_jax() -> None:
    m = Holder(c=Cache(0.0), n=Count(0))

    def step(m: Any, x: Any) -> Any:
        m.c.value = m.c.value + x
        m.n.value = m.n.value + 1
        return m, m.c.value

    last, ys = sortal.scan(step)(m, jnp.ones(T))
    assert last is m
    same(ys, [1.0, 2.0, 3.0, 4.0])
    assert int(m.n.value) == T


def test_values_that_are_pytrees_are_sliced_and_stacked_leaf_by_leaf() -> None:
    m = Holder(c=Cache({"a": XS, "b": (XS.T,)}))
    axes = StateAxes({...: 0})
    m.c.value = {"a": XS, "b": (XS * 3,)}

    def step(m: Any) -> None:
        m.c.value = {"a": m.c.value["b"][0], "b": (m.c.value["a"],)}

    sortal.scan(step, in_axes=(axes,), out_axes=0)(m)
    same(m.c.value["a"], XS * 3)
    same(m.c.value["b"][0], XS)


# -------------------------------------------------------------------- what steps add
class Sower(sortal.Module):
    def __init__(self) -> None:
        self.w = Param(jnp.full(D, 2.0))
        self.inner = Holder(n=Count(jnp.array(0)))

    def __call__(self, x: Any) -> Any:
        self.sow(Intermediate, "hidden", x * self.w)
        self.inner.n[...] += 1
        self.inner.sow(Intermediate, "sums", x.sum())
        return x * 3


SOWN = StateAxes({Intermediate: 0, Count: Carry, ...: None})


@pytest.mark.parametrize("transform", [lambda f: f, sortal.jit])
def test_what_is_sown_inside_comes_out_stacked(transform: Any) -> None:
    m = Sower()
    step = sortal.scan(lambda m, x: m(x), in_axes=(SOWN, 0), out_axes=0)
    same(transform(step)(m, XS), XS * 3)
    (hidden,) = m.hidden.value
    (sums,) = m.inner.sums.value
    same(hidden, XS * 2)
    close(sums, [x.sum() for x in XS])
    assert type(m.hidden) is Intermediate
    assert int(m.inner.n.value) == T
    popped = sortal.pop(m, Intermediate)
    assert list(popped.paths()) == [("hidden",), ("inner", "sums")]
    transform(step)(m, XS)
    same(m.hidden.value[0], XS * 2)


def test_sowing_beside_a_module_in_the_carry() -> None:
    """The numbers of objects on entry are not those of the structure after."""
    carried = Holder(z=Holder(c=Count(jnp.array(0))), a=Cache(jnp.zeros(D)))
    m = Sower()

    def step(carry: Any, m: Any, x: Any) -> Any:
        (carried, total) = carry
        carried.z.c[...] += 1
        carried.a[...] += m(x)
        return (carried, total + 1), (m.w, x)

    out = sortal.scan(step, in_axes=(Carry, SOWN, 0))((carried, 0), m, XS)
    (again, total), (w, xs) = out
    assert again is carried
    assert w is m.w
    assert int(total) == int(carried.z.c.value) == T
    same(xs, XS)
    same(m.hidden.value[0], XS * 2)
    close(carried.a.value, (XS * 3).sum(0))


def test_what_a_step_adds_to_a_module_of_int_axis_is_stacked_along_it() -> None:
    m = Holder(w=Param(XS))

    def step(m: Any) -> None:
        m.twice = Cache(m.w * 2)
        m.label = "seen"
        m.with_w = m.w

    axes = StateAxes({Cache: 1, ...: 0})
    sortal.scan(step, in_axes=(axes,), out_axes=0)(m)
    same(m.twice.value, XS.T * 2)
    assert m.label == "seen"
    assert m.with_w is m.w


# ------------------------------------------------------------ no more than what changed
def wide() -> Holder:
    return Holder(
        w=Param(jnp.ones((T, 5, 5))),
        u=Param(jnp.ones((5, 5))),
        s=BatchStat(jnp.zeros((T, 5))),
        h=Cache(jnp.zeros(5)),
    )


WIDE = StateAxes({sortal.PathIn(("u",)): None, Param: 0, BatchStat: 0, Cache: Carry})


def wide_step(m: Any) -> None:
    m.h[...] = jnp.tanh(m.h @ m.w + m.h @ m.u)
    m.s[...] = m.h[...]


def test_params_that_are_only_read_are_no_outputs_of_the_loop() -> None:
    run = sortal.scan(wide_step, in_axes=(WIDE,), out_axes=0)
    eqn = scan_equation(run, wide())
    # The Cache is carried, the BatchStat stacked; neither Param is there.
    assert shapes(eqn.outvars) == [(T, 5), (5,)]


def test_params_of_a_carried_module_that_are_only_read_are_constants() -> None:
    def step(m: Any, x: Any) -> Any:
        m(x)
        return m, None

    eqn = scan_equation(sortal.scan(step), Cell(), XS)
    assert shapes(eqn.outvars) == [(D,)]


def test_memory_is_that_of_plain_jax() -> None:
    def by_hand(p: Any) -> Any:
        def step(h: Any, w: Any) -> Any:
            h = jnp.tanh(h @ w + h @ p["u"])
            return h, h

        h, s = jax.lax.scan(step, p["h"], p["w"])
        return h, s

    n, t = 64, 16
    p = {"w": jnp.ones((t, n, n)), "u": jnp.ones((n, n)), "h": jnp.zeros(n)}
    m = Holder(
        w=Param(p["w"]),
        u=Param(p["u"]),
        s=BatchStat(jnp.zeros((t, n))),
        h=Cache(p["h"]),
    )
    run = sortal.scan(wide_step, in_axes=(WIDE,), out_axes=0)

    def peak(compiled: Any) -> tuple[int, int]:
        found = compiled.memory_analysis()
        return found.output_size_in_bytes, found.temp_size_in_bytes

    mine = peak(sortal.jit(run).lower(m).compile())
    theirs = peak(jax.jit(by_hand).lower(p).compile())
    a_param = n * n * 4
    assert mine[0] - theirs[0] < a_param // 8
    assert mine[1] - theirs[1] < a_param // 8


def test_values_of_leaves_that_are_only_read_stay_the_same_arrays() -> None:
    m = wide()
    w, u = m.w.value, m.u.value
    sortal.scan(wide_step, in_axes=(WIDE,), out_axes=0)(m)
    assert m.w.value is w
    assert m.u.value is u


# ---------------------------------------------------------------------------- nesting
def test_remat_inside_scan_has_the_same_numbers_and_effects() -> None:
    def loss(wrap: Any) -> Any:
        def f(m: Layer) -> Any:
            step = sortal.scan(
                wrap(lambda m, x: m(x)), in_axes=(0, Carry), out_axes=Carry
            )
            return (step(m, XS) ** 2).sum()

        return f

    def by_hand(p: Any) -> Any:
        @jax.checkpoint
        def step(x: Any, p: Any) -> Any:
            mean, x = layer_by_hand(p[0], p[1], jnp.zeros(D), x)
            return x, mean

        x, means = jax.lax.scan(step, XS, p)
        return (x**2).sum(), means

    m = stacked()
    grads = sortal.grad(loss(sortal.remat))(m)
    (kernel, bias), means = jax.grad(by_hand, has_aux=True)((KERNELS, BIASES))
    close(grads["kernel"].value, kernel)
    close(grads["bias"].value, bias)
    close(m.mean.value, means)
    same(m.calls.value, [1] * N)


def test_scan_over_layers_inside_scan_over_time() -> None:
    m = Holder(
        cells=Holder(w=Param(KERNELS), h=Cache(jnp.zeros((N, D)))),
        steps=Count(jnp.array(0)),
    )

    def layer(cell: Any, x: Any) -> Any:
        cell.h[...] = jnp.tanh(cell.h @ cell.w + x)
        return cell.h[...]

    def step(m: Any, x: Any) -> Any:
        m.steps[...] += 1
        return sortal.scan(layer, in_axes=(0, Carry), out_axes=Carry)(m.cells, x)

    axes = StateAxes({(Cache, Count): Carry, ...: None})
    ys = sortal.jit(sortal.scan(step, in_axes=(axes, 0), out_axes=0))(m, XS)
    hs, expected = [jnp.zeros(D)] * N, []
    for x in XS:
        for i in range(N):
            hs[i] = x = jnp.tanh(hs[i] @ KERNELS[i] + x)
        expected.append(x)
    close(ys, jnp.stack(expected))
    close(m.cells.h.value, jnp.stack(hs))
    assert int(m.steps.value) == T


def test_vmap_of_scan_is_scan_of_each() -> None:
    cells = Holder(w=Param(KERNELS), h=Cache(jnp.zeros((N, D))))

    def over_time(cell: Any, xs: Any) -> Any:
        def step(cell: Any, x: Any) -> Any:
            cell.h[...] = jnp.tanh(cell.h @ cell.w + x)
            return cell.h * 2

        return sortal.scan(step, in_axes=(OVER_TIME, 0), out_axes=0)(cell, xs)

    ys = sortal.vmap(over_time, in_axes=(0, None))(cells, XS)
    for i in range(N):
        h, expected = rnn_by_hand(KERNELS[i], jnp.zeros(D), XS)
        close(ys[i], expected)
        close(cells.h.value[i], h)


def test_without_jit_each_step_counts_also_where_they_write_different_leaves() -> None:
    m = Holder(even=Cache(jnp.array(0)), odd=Cache(jnp.array(0)))

    def step(m: Any, i: Any) -> Any:
        if int(i) % 2:
            m.odd[...] += i
        else:
            m.even[...] += i
        return m, i

    with jax.disable_jit():
        sortal.scan(step)(m, jnp.arange(6))
    assert int(m.even.value) == 6
    assert int(m.odd.value) == 9


# ----------------------------------------------------------------------------- errors
def refused(error: Any, text: str, f: Any, *args: Any, **options: Any) -> str:
    with untouched(*args), pytest.raises(error) as info:
        sortal.scan(f, **options)(*args)
    message = str(info.value)
    assert text in message, message
    return message


def write(m: Any, x: Any) -> Any:
    m.w[...] += x
    m.h[...] += x
    m.sub["n"][...] += 1
    return x


def victim() -> Holder:
    return Holder(
        w=Param(jnp.ones(D)),
        h=Cache(jnp.ones(D)),
        sub={"n": Count(jnp.array(0))},
        rate=1,
    )


def test_a_written_leaf_of_axis_none_is_refused_with_all_others() -> None:
    axes = StateAxes({Param: Carry, ...: None})
    text = refused(
        AxisError,
        "leaves of axis None are the same at each step, but were written:\n"
        "  h (Cache)\n  sub.n (Count)\nGive them Carry",
        write,
        victim(),
        XS,
        in_axes=(axes, 0),
        out_axes=0,
    )
    assert "w (Param)" not in text


def test_a_carried_leaf_of_another_shape_or_dtype_is_refused() -> None:
    def step(m: Any, x: Any) -> Any:
        m.w.value = m.w[:1]
        m.h.value = m.h.astype(jnp.bfloat16)
        m.sub["n"].value = (m.sub["n"].value, x)
        return x

    refused(
        LoopError,
        "the step of scan must keep the shape and dtype of what it hands on; it "
        "changed:\n  h (Cache): float32[2] -> bfloat16[2]\n  sub.n (Count): int32[] -> "
        "tuple of int32[], float32[2]\n  w (Param): float32[2] -> float32[1]\nCast or",
        step,
        victim(),
        XS,
        in_axes=(StateAxes({...: Carry}), 0),
        out_axes=0,
    )


@pytest.mark.parametrize(
    ("after", "row"),
    [
        (
            lambda c: (c[0], {"a": c[1]["a"].astype(int)}),
            "carry[1]['a']: float32[2] ->",
        ),
        (lambda c: (c[0], {"a": c[1]["a"][:1]}), "carry[1]['a']: float32[2] -> float"),
        (
            lambda c: (c[0], c[1]["a"]),
            "(Holder 0, {'a': *}), and returned (Holder 0, *)",
        ),
        (lambda c: (c[0], {"a": c[0]}), "and returned (Holder 0, {'a': Holder 0})"),
        (lambda c: (c[0].sub["n"], c[1]), "and returned (sub.n (Count), {'a': *})"),
        (
            lambda c: (Holder(w=Param(c[0].w.value)), c[1]),
            "and returned (a new object, {'a': *})",
        ),
    ],
)
def test_a_carry_of_another_structure_shape_dtype_or_object_is_refused(
    after: Any, row: str
) -> None:
    init = (victim(), {"a": jnp.ones(D)})
    refused(LoopError, row, lambda c, x: (after(c), x), init, XS)


def edit_static(m: Any) -> None:
    m.rate = 2


def edit_removed(m: Any) -> None:
    del m.sub


def edit_new(m: Any) -> None:
    m.extra = Cache(m.w * 2)


def edit_kind(m: Any) -> None:
    m.h = Param(m.h.value)


def edit_metadata(m: Any) -> None:
    m.w.set_metadata(tag="late")


def edit_swap(m: Any) -> None:
    m.sub["n"][...] += 1
    m.first, m.second = m.second, m.first


EDITS = {
    edit_static: "rate: 1 -> 2",
    edit_removed: "sub",
    edit_new: "extra (Cache) has Carry",
    edit_kind: "h: Cache -> Param",
    edit_metadata: "w: Param -> Param {'tag': 'late'}",
    edit_swap: "first (Cache) is another Variable now\n"
    "  second (Cache) is another Variable now",
}


def test_a_raw_array_that_is_written_beside_what_is_added_is_named() -> None:
    def step(m: Any, x: Any) -> Any:
        m.raw = m.raw + x
        m.sown = sortal.Intermediate(m.raw)
        return x

    m = Holder()
    m.raw = jnp.zeros(3)
    axes = sortal.StateAxes({sortal.Intermediate: 0, ...: sortal.Carry})
    with pytest.raises(LoopError) as e:
        sortal.scan(step, in_axes=(axes, 0), out_axes=0)(m, jnp.arange(4.0))
    assert "  raw (unlabelled array) has Carry\n" in str(e.value)
    assert "sown" not in str(e.value)
    assert str(e.value).endswith(
        "A raw array that is written beside what a step adds counts as added; hold it "
        "in a Variable."
    )
    assert vars(m).keys() == {"raw"}


@pytest.mark.parametrize("edit", EDITS)
def test_a_step_that_edits_structure_is_refused(edit: Any) -> None:
    def step(m: Any, x: Any) -> Any:
        m.h[...] += x
        edit(m)
        return x

    m = victim()
    m.first, m.second = Cache(jnp.zeros(1)), Cache(jnp.ones(1))
    text = refused(
        LoopError,
        EDITS[edit],
        step,
        m,
        XS,
        in_axes=(StateAxes({...: Carry}), 0),
        out_axes=0,
    )
    assert "\nMake attributes" in text or "\nGive the kind an axis" in text


def test_variables_that_change_places_at_each_step_are_refused() -> None:
    """Done after the loop, it would be done once, where T times were meant."""
    m = Holder(a=BatchStat(XS), b=BatchStat(XS * 2), c=Count(jnp.zeros(T)))

    def step(m: Any) -> None:
        m.a, m.b = m.b, m.a

    refused(
        LoopError,
        "a (BatchStat) is another Variable now",
        step,
        m,
        in_axes=(0,),
        out_axes=0,
    )


def test_axes_that_cannot_be_are_refused() -> None:
    f = lambda a, b: (a, b)  # noqa: E731
    one = "one whole argument at most can be Carry"
    refused(ArgumentError, one, f, XS, XS, in_axes=(Carry, Carry))
    refused(ArgumentError, one, f, (XS, 1), XS, in_axes=((Carry, None), 0))
    for out_axes in (0, (0, 0), (Carry, Carry), ((Carry, 0), 0), [Carry, 0]):
        text = f"out_axes={out_axes!r} must say Carry at one place"
        refused(ArgumentError, text, f, XS[0], XS, out_axes=out_axes)
    for out_axes in (Carry, (Carry, 0)):
        text = f"out_axes={out_axes!r} must say Carry at one place"
        refused(ArgumentError, text, f, XS, XS, in_axes=0, out_axes=out_axes)
    refused(
        ArgumentError,
        "in_axes has 2 entries, but the function was called with 1",
        f,
        XS,
    )


def test_outputs_that_do_not_fit_out_axes_are_refused() -> None:
    m = victim()
    refused(
        ArgumentError,
        "asks for a tuple of 2; the step of scan returned Holder 0.",
        lambda m, x: m,
        m,
        XS,
    )
    refused(
        ArgumentError,
        "out_axes=(Carry, (0, 0)) does not fit the output of the step of scan: "
        "(Holder 0, (*, *, *)).",
        lambda m, x: (m, (x, x, x)),
        m,
        XS,
        out_axes=(Carry, (0, 0)),
    )
    refused(
        ArgumentError,
        "gives axis None to what comes out of each step:\n  output[1]['y']\nGive an",
        lambda m, x: (m, {"y": x}),
        m,
        XS,
        out_axes=(Carry, {"y": None}),
    )


def test_the_number_of_steps_must_be_known_and_one() -> None:
    m = victim()
    f = lambda m, x: (m, x)  # noqa: E731
    refused(ArgumentError, "Give length=.", f, m, XS, in_axes=(Carry, None))
    refused(
        ArgumentError,
        "found several:\n  w (Param): float32[3,2] along axis 0: 3 steps\n  argument "
        "1['x']: float32[4,2] along axis 0: 4 steps",
        lambda m, x: x,
        Holder(w=Param(jnp.ones((3, D)))),
        {"x": XS},
        in_axes=(0, 0),
        out_axes=0,
    )
    refused(
        ArgumentError,
        "  length: 9 steps\n  argument 1: float32[4,2] along axis 0: 4 steps",
        f,
        m,
        XS,
        length=9,
    )


def test_an_axis_that_is_not_there_is_refused_by_path() -> None:
    m = victim()
    refused(
        AxisError,
        "sub.n (Count): int32[] has no axis 0",
        write,
        m,
        XS,
        in_axes=(0, 0),
        out_axes=0,
    )
    refused(
        AxisError,
        "argument 1: float32[4,2] has no axis 2",
        write,
        m,
        XS,
        in_axes=(None, 2),
        out_axes=0,
    )
    refused(
        PolicyError,
        "h (Cache)",
        write,
        m,
        XS,
        in_axes=(StateAxes({Param: None}), 0),
        out_axes=0,
    )


def test_what_has_no_axis_to_be_stacked_along_is_refused_with_all_others() -> None:
    def step(m: Any, x: Any) -> Any:
        m.w.set_value(m.w.value.sum())
        return Holder(n=sortal.Param(x.sum())), x.sum()

    m = Holder(w=sortal.Param(jnp.ones((3, 3))))
    given = (sortal.StateAxes({sortal.At("w"): 1}), 0)

    def refused(out_axes: Any) -> str:
        with untouched(m), pytest.raises(AxisError) as found:
            sortal.scan(step, in_axes=given, out_axes=out_axes)(m, jnp.ones((3, 2)))
        return str(found.value)

    assert refused((1, 0)).split("\n")[1:3] == [
        "  n (Param): float32[] has no axis 1 once stacked",
        "  w (Param): float32[] has no axis 1 once stacked",
    ]
    assert "output[1]: float32[] has no axis -2 once stacked" in refused((0, -2))


def test_unknown_keywords_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^scan has no option lenght\.$"):
        sortal.scan(lambda c, x: (c, x), lenght=3)


def test_arguments_by_keyword_are_refused_as_scans_own() -> None:
    f = sortal.scan(lambda c, x: (c, x))
    with pytest.raises(ArgumentError, match=r"^scan takes arguments by position; .* x"):
        f(0.0, x=XS)


def test_a_write_to_a_model_that_is_closed_over_is_refused() -> None:
    m = victim()

    def step(c: Any, x: Any) -> Any:
        m.h[...] += x
        return c, x

    with untouched(m), pytest.raises(TraceError, match="h"):
        sortal.scan(step)(0, XS)
    assert not has_tracer(m)


def test_an_exception_in_a_step_leaves_everything_as_it_was() -> None:
    m = victim()

    def step(m: Any, x: Any) -> Any:
        write(m, x)
        raise KeyError("mine")

    with untouched(m), pytest.raises(KeyError, match="mine"):
        sortal.scan(step)(m, XS)


def test_variables_are_kept_apart_by_kind_and_not_by_class_name() -> None:
    """Two kinds of one name have two roles."""
    first = type("Same", (Variable,), {})
    second = type("Same", (Variable,), {})
    m = Holder(a=first(jnp.array(0.0)), b=second(jnp.arange(3.0)))

    def step(m: Any) -> None:
        m.a[...] += m.b[...]

    sortal.scan(step, in_axes=(StateAxes({first: Carry, second: 0}),), out_axes=0)(m)
    assert float(m.a.value) == 3.0


def test_called_again_outside_of_jit_the_step_is_not_traced_again(capsys):
    @sortal.scan(in_axes=(sortal.StateAxes({...: None}), sortal.Carry, 0))
    def step(layer, x, y):
        print("traced")  # noqa: T201
        return layer(x) + y, x

    layer = sortal.Linear(2, 2, rngs=sortal.Rngs(0))
    for _ in range(3):
        step(layer, jnp.ones(2), jnp.ones((4, 2)))
    assert capsys.readouterr().out == "traced\n"


def test_numbers_that_all_steps_share_stay_python_numbers():
    @sortal.scan(in_axes=(sortal.Carry, None), out_axes=sortal.Carry, length=2)
    def step(x, double):
        return 2 * x if double else x

    assert step(jnp.array(1.0), True) == 4
    assert step(jnp.array(1.0), False) == 1
