"""Transforms inside transforms: random models and nestings against arrays in a dict.

Each nesting is written twice, for models and for dicts of arrays; the second knows
nothing of Sortal. A nesting is a chain of wrappers, each of which takes a function of a
model and a vector that returns a number, and makes another of the same sort.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sortal
from models import Holder, has_tracer, untouched
from sortal import Carry, Param, StateAxes, Variable

D, STEPS, BATCH = 2, 3, 2


class Mean(Variable, axis=None, reduce="mean"):
    """A running mean: replicas that see other data agree on their mean."""


class Calls(Variable, axis=None, reduce="max"):
    """A count."""


class Layer(sortal.Module):
    def __init__(self, w: Param, b: Param, mean: Any):
        self.w, self.b = w, b
        if mean is not None:
            self.mean = mean


# -------------------------------------------------------------------- one model, twice
def model_call(m: Any, x: Any) -> Any:
    for layer in layers_of(m):
        h = x @ layer.w + layer.b
        if hasattr(layer, "mean"):
            layer.mean[...] = 0.9 * layer.mean + 0.1 * h
            h = h - layer.mean
        x = jnp.tanh(h)
    m.calls[...] += 1
    return (x**2).sum() + 0.1 * x.sum()


def array_call(plan: Any, p: Any, s: Any, x: Any) -> tuple[Any, Any]:
    s = dict(s)
    for w, b, mean in plan:
        h = x @ p[w] + p[b]
        if mean is not None:
            s[mean] = 0.9 * s[mean] + 0.1 * h
            h = h - s[mean]
        x = jnp.tanh(h)
    s["calls"] = s["calls"] + 1
    return (x**2).sum() + 0.1 * x.sum(), s


def layers_of(m: Any) -> list[Any]:
    if m.layout == "list":
        return m.layers
    if m.layout == "dict":
        return [m.layers[k] for k in sorted(m.layers)]
    return [m.inner["first"], *m.inner["rest"][0]]


@st.composite
def plans(draw: Any) -> Any:
    """For each layer the names of its kernel, bias and running mean; some are tied."""
    plan: list[Any] = []
    for i in range(draw(st.integers(1, 3))):
        again = draw(st.sampled_from(["none", "none", "w", "b", "mean", "layer"]))
        w, b = f"w{i}", f"b{i}"
        mean = f"mean{i}" if draw(st.booleans()) else None
        if plan and again != "none":
            other = draw(st.sampled_from(plan))
            w = other[0] if again in {"w", "layer"} else w
            b = other[1] if again in {"b", "layer"} else b
            mean = other[2] if again in {"mean", "layer"} else mean
        plan.append((w, b, mean))
    return plan


def arrays(plan: Any, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(seed)
    p, s = {}, {"calls": jnp.array(0)}
    for w, b, mean in plan:
        p.setdefault(w, jnp.asarray(rng.normal(size=(D, D)), jnp.float32))
        p.setdefault(b, jnp.asarray(rng.normal(size=(D,)), jnp.float32))
        if mean is not None:
            s.setdefault(mean, jnp.asarray(rng.normal(size=(D,)), jnp.float32))
    return p, s


def build(plan: Any, p: Any, s: Any, layout: str) -> tuple[Any, dict[str, Any]]:
    """The model, and its Variables by the names of the arrays."""
    named: dict[str, Any] = {k: Param(v) for k, v in p.items()}
    named |= {k: (Calls if k == "calls" else Mean)(v) for k, v in s.items()}
    made: dict[Any, Layer] = {}
    for names in plan:
        w, b, mean = names
        if names not in made:
            made[names] = Layer(named[w], named[b], mean and named[mean])
    layers = [made[names] for names in plan]
    m = Holder(calls=named["calls"], layout=layout)
    if layout == "list":
        m.layers = layers
    elif layout == "dict":
        m.layers = {f"l{i}": layer for i, layer in enumerate(layers)}
    else:
        m.inner = {"rest": [layers[1:], "text"], "first": layers[0]}
    return m, named


# ------------------- each wrapper, for models and for functions (p, s, x) -> (y, s)
def several(x: Any, n: int) -> Any:
    return jnp.stack([x * (1 + i / 3) for i in range(n)])


def model_scan(f: Any) -> Any:
    axes = StateAxes({Param: None, ...: Carry})

    def g(m: Any, x: Any) -> Any:
        ys = sortal.scan(f, in_axes=(axes, 0), out_axes=0)(m, several(x, STEPS))
        return ys.sum()

    return g


def array_scan(f: Any) -> Any:
    def g(p: Any, s: Any, x: Any) -> Any:
        def step(s: Any, x: Any) -> Any:
            y, s = f(p, s, x)
            return s, y

        s, ys = jax.lax.scan(step, s, several(x, STEPS))
        return ys.sum(), s

    return g


def model_carry(f: Any) -> Any:
    """The model goes round in the carry, with what it makes of its own output."""

    def g(m: Any, x: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            m, x = carry
            y = f(m, x)
            return (m, jnp.sin(x + y)), y

        (again, x), ys = sortal.scan(step, in_axes=(Carry, None), length=STEPS)(
            (m, x), None
        )
        assert again is m
        return ys.sum() + x.sum()

    return g


def array_carry(f: Any) -> Any:
    def g(p: Any, s: Any, x: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            s, x = carry
            y, s = f(p, s, x)
            return (s, jnp.sin(x + y)), y

        (s, x), ys = jax.lax.scan(step, (s, x), None, length=STEPS)
        return ys.sum() + x.sum(), s

    return g


def model_vmap(f: Any) -> Any:
    def g(m: Any, x: Any) -> Any:
        return sortal.vmap(f, in_axes=(None, 0))(m, several(x, BATCH)).sum()

    return g


def array_vmap(f: Any) -> Any:
    def g(p: Any, s: Any, x: Any) -> Any:
        ys, s = jax.vmap(f, in_axes=(None, None, 0))(p, s, several(x, BATCH))
        s = {k: v.max(0) if k == "calls" else v.mean(0) for k, v in s.items()}
        return ys.sum(), s

    return g


def model_grad(f: Any) -> Any:
    def g(m: Any, x: Any) -> Any:
        y, grads = sortal.value_and_grad(f)(m, x)
        return y + 0.1 * sum((v**2).sum() for v in jax.tree.leaves(grads))

    return g


def array_grad(f: Any) -> Any:
    def g(p: Any, s: Any, x: Any) -> Any:
        (y, s), grads = jax.value_and_grad(f, has_aux=True)(p, s, x)
        return y + 0.1 * sum((v**2).sum() for v in grads.values()), s

    return g


def model_cond(f: Any) -> Any:
    def other(m: Any, x: Any) -> Any:
        m.calls[...] += 10
        return (x * layers_of(m)[0].b).sum()

    def g(m: Any, x: Any) -> Any:
        return sortal.cond(x.sum() > 0.7, f, other, m, x)

    return g


def array_cond(f: Any, bias: str) -> Any:
    def g(p: Any, s: Any, x: Any) -> Any:
        def other(p: Any, s: Any, x: Any) -> Any:
            return (x * p[bias]).sum(), {**s, "calls": s["calls"] + 10}

        return jax.lax.cond(x.sum() > 0.7, f, other, p, s, x)

    return g


def model_fori(f: Any) -> Any:
    def g(m: Any, x: Any) -> Any:
        def body(i: Any, value: Any) -> Any:
            m, total = value
            return m, total + f(m, x * (1 + i))

        return sortal.fori_loop(0, STEPS, body, (m, 0.0))[1]

    return g


def array_fori(f: Any) -> Any:
    def g(p: Any, s: Any, x: Any) -> Any:
        def body(i: Any, value: Any) -> Any:
            s, total = value
            y, s = f(p, s, x * (1 + i))
            return s, total + y

        s, total = jax.lax.fori_loop(0, STEPS, body, (s, 0.0))
        return total, s

    return g


WRAPPERS: dict[str, tuple[Any, Any]] = {
    "jit": (sortal.jit, lambda f: f),
    "remat": (sortal.remat, lambda f: f),
    "scan": (model_scan, array_scan),
    "carry": (model_carry, array_carry),
    "vmap": (model_vmap, array_vmap),
    "grad": (model_grad, array_grad),
    "cond": (model_cond, array_cond),
    "fori": (model_fori, array_fori),
}


def nested(names: Any, plan: Any) -> tuple[Any, Any]:
    mine, theirs = model_call, functools.partial(array_call, plan)
    for name in names:
        by_model, by_array = WRAPPERS[name]
        if name == "cond":
            by_array = functools.partial(by_array, bias=plan[0][1])
        mine, theirs = by_model(mine), by_array(theirs)
    return mine, theirs


def chains() -> Any:
    names = st.lists(st.sampled_from(sorted(WRAPPERS)), min_size=1, max_size=3)
    return names.filter(lambda found: found.count("grad") <= 1)


def at(m: Any, path: Any) -> Any:
    for key in path:
        m = m[key] if isinstance(m, (list, dict)) else getattr(m, key)
    return m


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    plan=plans(),
    chain=chains(),
    layout=st.sampled_from(["list", "dict", "nested"]),
    seed=st.integers(0, 9),
)
def test_values_states_and_gradients_are_those_of_functions_of_arrays(
    plan: Any, chain: Any, layout: str, seed: int
) -> None:
    p, s = arrays(plan, seed)
    m, named = build(plan, p, s, layout)
    x = jnp.array([0.3, 0.5])
    mine, theirs = nested(chain, plan)
    (value, after), gradients = jax.jit(jax.value_and_grad(theirs, has_aux=True))(
        p, s, x
    )

    found, grads = sortal.jit(sortal.value_and_grad(mine))(m, x)
    close(found, value)
    for name, expected in after.items():
        close(named[name].value, expected)
    for name, expected in p.items():
        assert named[name].value is expected
    assert not has_tracer(m)
    assert len(grads.paths()) == len(p)
    names = {id(v): k for k, v in named.items()}
    for path, leaf in zip(grads.paths(), grads.leaves(), strict=True):
        close(leaf.value, gradients[names[id(at(m, path))]])


def test_the_comparison_notices_a_lost_update_and_a_wrong_gradient() -> None:
    plan = [("w0", "b0", "mean0"), ("w0", "b1", None)]
    p, s = arrays(plan, 0)
    _, theirs = nested(["scan"], plan)
    _, once = array_call(plan, p, s, jnp.array([0.3, 0.5]))
    _, after = theirs(p, s, jnp.array([0.3, 0.5]))
    assert int(once["calls"]) == 1
    assert int(after["calls"]) == STEPS
    assert float(abs(after["mean0"] - once["mean0"]).max()) > 1e-3
    untied = [("w0", "b0", "mean0"), ("w1", "b1", None)]
    q = {**p, "w1": p["w0"]}
    f = lambda plan, p: array_call(plan, p, s, jnp.array([0.3, 0.5]))[0]  # noqa: E731
    tied = jax.grad(functools.partial(f, plan))(p)["w0"]
    alone = jax.grad(functools.partial(f, untied))(q)["w0"]
    assert float(abs(tied - alone).max()) > 1e-3


# ----------------------------------------------------- known pains, each with its claim
def test_scan_does_not_copy_stacked_params_that_it_only_reads() -> None:
    """A scan that hands all leaves on would return 3 MB of Params beside 2 kB.

    They are sliced along axis 1: along axis 0, JAX itself forwards what is only read.
    """
    n, size = 3, 512
    m = Holder(w=Param(jnp.ones((size, n, size))), n=Calls(jnp.array(0)))
    axes = StateAxes({Param: 1, ...: Carry})

    def forward(m: Any, x: Any) -> Any:
        def layer(m: Any, x: Any) -> Any:
            m.n[...] += 1
            return x @ m.w / size

        return sortal.scan(layer, in_axes=(axes, Carry), out_axes=Carry)(m, x)

    compiled = sortal.jit(forward).lower(m, jnp.ones(size)).compile()
    outputs = compiled.memory_analysis().output_size_in_bytes
    assert outputs < 4 * size + 1024
    w = m.w.value
    np.testing.assert_allclose(sortal.jit(forward)(m, jnp.ones(size)), jnp.ones(size))
    assert m.w.value is w
    assert int(m.n.value) == n


def test_stacked_layers_draw_as_if_unrolled_whether_their_stream_is_theirs_or_one() -> (
    None
):
    """RNG state has a role of its own, beside Params that are sliced."""

    class Noise(sortal.Module):
        def __init__(self, key: Any):
            self.scale = Param(jnp.array(2.0))
            self.rngs = sortal.Rngs(noise=key)

        def __call__(self, x: Any) -> Any:
            return x + self.scale * jax.random.normal(self.rngs.noise(), x.shape)

    x, keys = jnp.zeros(4), jax.random.split(jax.random.key(1), 3)
    own = sortal.vmap(Noise)(keys)
    run = sortal.jit(sortal.scan(lambda m, x: m(x), in_axes=(0, Carry), out_axes=Carry))
    drawn = [jax.random.normal(jax.random.fold_in(k, 0), (4,)) for k in keys]
    close(run(own, x), 2 * sum(drawn))
    drawn = [jax.random.normal(jax.random.fold_in(k, 1), (4,)) for k in keys]
    close(run(own, x), 2 * sum(drawn))

    one = Noise(jax.random.key(5))
    one.scale.value = jnp.array([1.0, 2.0, 3.0])
    axes = StateAxes({sortal.RngState: Carry, ...: 0})
    run = sortal.scan(lambda m, x: m(x), in_axes=(axes, Carry), out_axes=Carry)
    keys = [jax.random.fold_in(jax.random.key(5), i) for i in range(3)]
    expected = sum((i + 1.0) * jax.random.normal(k, (4,)) for i, k in enumerate(keys))
    close(run(one, x), expected)
    assert int(one.rngs.noise.count.value) == 3


def test_a_cache_that_a_while_loop_writes_keeps_object_structure_and_value() -> None:
    """Several objects in the value, the cache under jit, and the loop under remat."""

    class Memory(sortal.Module):
        def __init__(self) -> None:
            self.slots = sortal.Cache(jnp.zeros(5))
            self.w = Param(jnp.array(1.5))

        def __call__(self, i: Any, x: Any) -> Any:
            self.slots[...] = self.slots[...].at[i].set(x * self.w)
            return self.slots[...].sum()

    @sortal.jit
    def decode(a: Any, b: Any, x: Any) -> Any:
        def body(value: Any) -> Any:
            i, (a, b), x = value
            return i + 1, (a, b), sortal.remat(lambda a, b: b(i, a(i, x)))(a, b)

        return sortal.while_loop(lambda v: v[0] < 3, body, (0, (a, b), x))

    a, b = Memory(), Memory()
    cells, before = (a.slots, b.slots), sortal.graphdef(a)
    _, (a2, b2), x = decode(a, b, 1.0)
    first, second, y = np.zeros(5), np.zeros(5), 1.0
    for i in range(3):
        first[i] = y * 1.5
        second[i] = first.sum() * 1.5
        y = second.sum()
    assert a2 is a
    assert b2 is b
    assert a.slots is cells[0]
    assert b.slots is cells[1]
    assert sortal.graphdef(a) == before
    close(a.slots.value, first)
    close(b.slots.value, second)
    close(x, y)


def test_an_update_in_a_plain_jax_transform_is_never_lost_without_a_word() -> None:
    """Closed over, a write is refused; passed as an argument, the copy is returned."""
    m = Holder(n=Calls(jnp.array(0)))

    def bump(x: Any) -> Any:
        m.n[...] += 1
        return x

    loops = [
        lambda: jax.jit(bump)(1.0),
        lambda: jax.grad(bump)(1.0),
        lambda: jax.lax.scan(lambda c, x: (bump(c), x), 0.0, jnp.ones(2)),
        lambda: jax.lax.cond(jnp.array(True), bump, lambda x: x, 1.0),
        lambda: jax.lax.fori_loop(0, 2, lambda i, x: bump(x), 1.0),
        lambda: sortal.scan(lambda c, x: (bump(c), x))(0.0, jnp.ones(2)),
        lambda: sortal.vmap(sortal.remat(bump))(jnp.ones(2)),
    ]
    for loop in loops:
        with untouched(m), pytest.raises(sortal.TraceError, match="n"):
            loop()


def test_sown_values_and_gradients_survive_jit_of_scan_of_remat() -> None:
    """``sow`` under a fast path, with a gradient taken inside it."""

    class Block(sortal.Module):
        def __init__(self, w: Any):
            self.w = Param(w)

        def __call__(self, x: Any) -> Any:
            self.sow(sortal.Intermediate, "seen", x)
            return jnp.sin(x * self.w)

    ws = jnp.array([0.5, 1.5, 2.5])
    m = sortal.vmap(Block)(ws)
    axes = StateAxes({sortal.Intermediate: 0, ...: 0})

    @sortal.jit
    def train(m: Any, x: Any) -> Any:
        def loss(m: Any) -> Any:
            step = sortal.remat(lambda m, x: m(x))
            run = sortal.scan(step, in_axes=(axes, Carry), out_axes=Carry)
            return run(m, x)

        return sortal.grad(loss)(m)

    def by_hand(ws: Any) -> Any:
        x, seen = jnp.array(0.7), []
        for w in ws:
            seen.append(x)
            x = jnp.sin(x * w)
        return x, jnp.stack(seen)

    grads = train(m, jnp.array(0.7))
    expected, seen = jax.grad(by_hand, has_aux=True)(ws)
    close(grads["w"].value, expected)
    close(sortal.pop(m, sortal.Intermediate)["seen"].value[0], seen)
    assert set(vars(m)) == {"w"}
