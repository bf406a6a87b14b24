"""while_loop, fori_loop, cond and switch: numbers of plain JAX; what is refused."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal
from models import Count, Holder, Linear, has_tracer, untouched
from sortal import BatchStat, Cache, Intermediate, Param, Variable
from sortal.errors import ArgumentError, LoopError, TraceError

D, SLOTS = 3, 5
W = jnp.asarray(np.random.default_rng(0).normal(size=(D, D)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(D,)), jnp.float32)

through = pytest.mark.parametrize("transform", [lambda f: f, sortal.jit])
same = np.testing.assert_array_equal


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


class Decoder(sortal.Module):
    """Attends to what it wrote into its cache so far."""

    def __init__(self) -> None:
        self.w = Param(W)
        self.keys = Cache(jnp.zeros((SLOTS, D)))
        self.index = Cache(jnp.array(0))

    def __call__(self, x: Any) -> Any:
        i = self.index[...]
        self.keys[...] = self.keys[...].at[i].set(x @ self.w[...])
        self.index[...] += 1
        seen = jnp.arange(SLOTS) <= i
        weights = jax.nn.softmax(jnp.where(seen, self.keys @ x, -jnp.inf))
        return weights @ self.keys[...]


def decode_by_hand(steps: int) -> tuple[Any, Any]:
    """The same without a cache: all keys are computed anew at each step."""
    x, inputs = X, []
    for _ in range(steps):
        inputs.append(x)
        keys = jnp.stack(inputs) @ W
        x = jax.nn.softmax(keys @ x) @ keys
    cache = jnp.zeros((SLOTS, D)).at[:steps].set(jnp.stack(inputs) @ W)
    return x, cache


def loops() -> dict[str, Callable[..., Any]]:
    """Ways to run a body of a value four times."""

    def by_while(body: Any, value: Any) -> Any:
        def step(value: Any) -> Any:
            i, inner = value
            return i + 1, body(inner)

        return sortal.while_loop(lambda v: v[0] < 4, step, (0, value))[1]

    def by_fori(body: Any, value: Any) -> Any:
        return sortal.fori_loop(2, 6, lambda i, v: body(v), value)

    def by_unrolled(body: Any, value: Any) -> Any:
        return sortal.fori_loop(0, 4, lambda i, v: body(v), value, unroll=2)

    def by_traced(body: Any, value: Any) -> Any:
        run = lambda n, v: sortal.fori_loop(0, n, lambda i, v: body(v), v)  # noqa: E731
        return sortal.jit(run)(jnp.array(4), value)

    return {
        "while": by_while,
        "fori": by_fori,
        "unrolled": by_unrolled,
        "jit": by_traced,
    }


every_loop = pytest.mark.parametrize("loop", loops().values(), ids=loops())


# ------------------------------------------------------------------------------ loops
@every_loop
def test_a_cache_that_a_loop_writes_has_what_decoding_without_one_gives(
    loop: Any,
) -> None:
    m = Decoder()
    again, x = loop(lambda v: (v[0], v[0](v[1])), (m, X))
    expected, cache = decode_by_hand(4)
    assert again is m
    close(x, expected)
    close(m.keys.value, cache)
    assert int(m.index.value) == 4
    assert m.w.value is W
    assert not has_tracer(m)


@every_loop
def test_modules_anywhere_in_the_value_come_back_as_themselves(loop: Any) -> None:
    a, b, total = Holder(n=Count(jnp.array(0))), Decoder(), Cache(jnp.zeros(()))

    def body(value: Any) -> Any:
        value["list"][0].n[...] += 1
        x = value["list"][1]["b"](value["x"])
        value["total"][...] += 2
        return {**value, "x": x}

    value = {"list": [a, {"b": b}], "x": X, "total": total, "again": a, "none": None}
    out = loop(body, value)
    assert out["list"][0] is a
    assert out["again"] is a
    assert out["list"][1]["b"] is b
    assert out["total"] is total
    assert out["none"] is None
    assert int(a.n.value) == 4
    assert float(total.value) == 8.0
    close(out["x"], decode_by_hand(4)[0])


def test_two_modules_that_share_a_variable_share_it_in_the_loop() -> None:
    n = Count(jnp.array(1))
    a, b = Holder(n=n), Holder(n=n, w=Param(jnp.ones(())))

    def body(value: Any) -> Any:
        a, b = value
        a.n[...] += 1
        b.n[...] *= 2
        return value

    sortal.fori_loop(0, 3, lambda i, v: body(v), (a, b))
    assert a.n is b.n is n
    assert int(n.value) == 22


def loop_equation(f: Any, name: str, *args: Any) -> Any:
    jaxpr = sortal.jit(f).trace(*args).jaxpr
    found = []

    def look(jaxpr: Any) -> None:
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            if eqn.primitive.name == name:
                found.append(eqn)
            elif "jaxpr" in eqn.params:
                look(eqn.params["jaxpr"])

    look(jaxpr)
    (eqn,) = found
    return eqn


def test_params_that_are_only_read_are_constants_of_the_loop() -> None:
    def decode(m: Any, n: Any) -> Any:
        sortal.while_loop(
            lambda v: v[0].index[...] < n, lambda v: (v[0], v[0](v[1])), (m, X)
        )

    def fori(m: Any, n: Any) -> Any:
        sortal.fori_loop(0, n, lambda i, v: (v[0], v[0](v[1])), (m, X))

    def shapes(eqn: Any) -> list[Any]:
        return sorted(v.aval.shape for v in eqn.outvars)

    carried = [(), (D,), (SLOTS, D)]
    assert shapes(loop_equation(decode, "while", Decoder(), 4)) == carried
    of_fori = shapes(loop_equation(fori, "while", Decoder(), jnp.array(4)))
    assert (D, D) not in of_fori
    assert (SLOTS, D) in of_fori

    def still(m: Any) -> Any:
        return sortal.fori_loop(0, 3, lambda i, v: (v[0], v[1] @ v[0].w), (m, X))[1]

    # The index, and what is multiplied.
    assert shapes(loop_equation(still, "scan", Decoder())) == [(), (D,)]


def test_a_loop_of_no_steps_changes_nothing() -> None:
    m = Decoder()
    with untouched(m):
        out = sortal.while_loop(
            lambda v: v[0].index < 0, lambda v: (v[0], v[0](v[1])), (m, X)
        )
        assert out[0] is m
        same(out[1], X)
        sortal.fori_loop(3, 3, lambda i, v: (v[0], v[0](v[1])), (m, X))


def test_the_body_may_be_a_method_a_module_or_a_partial() -> None:
    class Adder(sortal.Module):
        def __init__(self) -> None:
            self.w = Param(jnp.array(2.0))
            self.calls = Count(jnp.array(0))

        def add(self, x: Any) -> Any:
            self.calls[...] += 1
            return x + self.w

        def at(self, i: Any, x: Any) -> Any:
            self.calls[...] += 1
            return x + self.w * i

        __call__ = add

    m = Adder()
    assert float(sortal.while_loop(lambda x: x < 7, m.add, 1.0)) == 7.0
    assert int(m.calls.value) == 3
    assert float(sortal.while_loop(lambda x: x < 7, m, 1.0)) == 7.0
    assert int(m.calls.value) == 6
    assert float(sortal.fori_loop(0, 4, m.at, 0.0)) == 12.0
    assert int(m.calls.value) == 10

    def scaled(m: Any, mode: str, k: Any, i: Any, x: Any) -> Any:
        assert mode == "fast"
        m.calls[...] += k
        return m.at(i, x)

    body = functools.partial(scaled, m, "fast", 5)
    assert float(sortal.fori_loop(0, 4, body, 0.0)) == 12.0
    assert int(m.calls.value) == 10 + 4 * 6


def test_a_variable_may_be_the_condition_and_the_value() -> None:
    flags = Holder(going=Variable(jnp.array(True)), n=Count(jnp.array(0)))

    def body(m: Any) -> Any:
        m.n[...] += 1
        m.going[...] = m.n[...] < 3
        return m

    assert sortal.while_loop(lambda m: m.going, body, flags) is flags
    assert int(flags.n.value) == 3


def test_gradients_flow_through_a_loop_of_known_length() -> None:
    def loss(m: Any) -> Any:
        _, x = sortal.fori_loop(0, 4, lambda i, v: (v[0], v[0](v[1])), (m, X))
        return (x**2).sum()

    def by_hand(w: Any) -> Any:
        x, inputs = X, []
        for _ in range(4):
            inputs.append(x)
            keys = jnp.stack(inputs) @ w
            x = jax.nn.softmax(keys @ x) @ keys
        return (x**2).sum()

    m = Decoder()
    close(sortal.grad(loss)(m)["w"].value, jax.grad(by_hand)(W))
    assert int(m.index.value) == 4


def test_vmap_of_a_loop_runs_each_as_long_as_it_needs() -> None:
    m = Holder(n=Count(jnp.array([0, 2, 9])))

    def run(m: Any) -> Any:
        def body(m: Any) -> Any:
            m.n[...] += 2
            return m

        sortal.while_loop(lambda m: m.n[...] < 5, body, m)

    sortal.vmap(run)(m)
    same(m.n.value, [6, 6, 9])


def test_loops_nest() -> None:
    m = Holder(n=Count(jnp.array(0)), h=Cache(jnp.array(1.0)))

    def inner(j: Any, m: Any) -> Any:
        m.n[...] += 1
        m.h[...] = m.h * 1.5
        return m

    def outer(i: Any, m: Any) -> Any:
        return sortal.fori_loop(0, i, inner, m)

    sortal.fori_loop(0, 4, outer, m)
    assert int(m.n.value) == 6
    close(m.h.value, 1.5**6)


def test_weak_types_are_promoted_as_in_jax() -> None:
    m = Holder(n=Count(0), h=Cache(1.0))

    def body(i: Any, m: Any) -> Any:
        m.n.value = m.n.value + jnp.int32(1)
        m.h.value = m.h.value * jnp.float32(2)
        return m

    sortal.fori_loop(0, 3, body, m)
    assert (int(m.n.value), float(m.h.value)) == (3, 8.0)


def test_without_jit_what_any_step_wrote_counts() -> None:
    m = Holder(even=Cache(jnp.array(0)), odd=Cache(jnp.array(0)), i=Count(jnp.array(0)))

    def body(m: Any) -> Any:
        if int(m.i[...]) % 2:
            m.odd[...] += m.i
        else:
            m.even[...] += m.i
        m.i[...] += 1
        return m

    with jax.disable_jit():
        sortal.while_loop(lambda m: m.i < 6, body, m)
    assert (int(m.even.value), int(m.odd.value)) == (6, 9)


# --------------------------------------------------------------------- loops: refused
def victim() -> Holder:
    return Holder(w=Param(jnp.ones(2)), n=Count(jnp.array(0)), sub=Holder(r=1), rate=1)


def refused(text: str, f: Any, *args: Any, error: Any = LoopError) -> str:
    with untouched(*args), pytest.raises(error) as info:
        f(*args)
    assert text in str(info.value), str(info.value)
    return str(info.value)


def run_while(body: Any) -> Any:
    return lambda v: sortal.while_loop(lambda v: True, body, v)


def run_fori(body: Any) -> Any:
    return lambda v: sortal.fori_loop(0, 3, lambda i, v: body(v), v)


def edit_static(m: Any) -> None:
    m.rate = 2


def edit_added(m: Any) -> None:
    m.sow(Intermediate, "seen", m.w[...])


def edit_removed(m: Any) -> None:
    del m.w


def edit_replaced(m: Any) -> None:
    m.w = Param(m.w * 2)


def edit_metadata(m: Any) -> None:
    m.w.set_metadata(tag="late")


EDITS = {
    edit_static: "rate: 1 -> 2",
    edit_added: "seen: absent -> Intermediate",
    edit_removed: "w: Param -> absent",
    edit_replaced: "w (Param) is another Variable now",
    edit_metadata: "w: Param -> Param {'tag': 'late'}",
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("run", [run_while, run_fori])
def test_a_body_that_edits_structure_is_refused(run: Any, edit: Any) -> None:
    def body(m: Any) -> Any:
        m.n[...] += 1
        edit(m)
        return m

    name = "while_loop" if run is run_while else "fori_loop"
    text = refused(EDITS[edit], run(body), victim())
    assert text.startswith(f"the body of {name} must leave the structure as it is")
    assert text.endswith("and Variables before, and write only values inside.")


@pytest.mark.parametrize(
    ("after", "row"),
    [
        (lambda v: v[0], "it was given (Holder 0, *), and returned Holder 0."),
        (
            lambda v: (v[1], v[0]),
            "it was given (Holder 0, *), and returned (*, Holder 0).",
        ),
        (lambda v: (v[0].n, v[1]), "and returned (n (Count), *)."),
        (lambda v: (v[0].sub, v[1]), "and returned (sub (Holder), *)."),
        (lambda v: (victim(), v[1]), "an object that is returned was made inside"),
        (lambda v: (v[0], v[1][:1]), "value[1]: float32[2] -> float32[1]"),
        (lambda v: (v[0], v[1].astype(int)), "value[1]: float32[2] -> int32[2]"),
    ],
)
@pytest.mark.parametrize("run", [run_while, run_fori])
def test_a_body_that_returns_something_else_is_refused(
    run: Any, after: Any, row: str
) -> None:
    refused(row, run(after), (victim(), jnp.ones(2)))


@pytest.mark.parametrize("run", [run_while, run_fori])
def test_writes_of_other_shapes_and_dtypes_are_refused_together(run: Any) -> None:
    def body(m: Any) -> Any:
        m.w.value = m.w[:1]
        m.n.value = m.n * 1.5
        return m

    refused(
        "must keep the shape and dtype of what it hands on; it changed:\n"
        "  n (Count): int32[] -> float32[]\n  w (Param): float32[2] -> float32[1]\n"
        "Cast or reshape what is written, as in variable[...] = x.astype(",
        run(body),
        victim(),
    )


def test_two_modules_that_change_places_are_refused() -> None:
    a, b = victim(), victim()
    refused(
        "it was given (Holder 0, Holder 1), and returned (Holder 1, Holder 0).",
        run_fori(lambda v: (v[1], v[0])),
        (a, b),
    )


def test_a_condition_that_writes_is_refused() -> None:
    def condition(m: Any) -> Any:
        m.n[...] += 1
        m.w[...] += 1
        return m.n < 3

    text = refused(
        "the condition of while_loop must not write; it wrote to:\n"
        "  n (Count)\n  w (Param)\nWrite in the body.",
        lambda m: sortal.while_loop(condition, lambda m: m, m),
        victim(),
    )
    assert text.endswith("body.")
    refused(
        "the condition of while_loop must leave the structure",
        lambda m: sortal.while_loop(lambda m: edit_static(m) or True, lambda m: m, m),
        victim(),
    )


def test_a_condition_that_is_a_method_is_refused() -> None:
    layer = Linear(2, 2)
    refused(
        "the condition of while_loop is a method of a module; pass the module in",
        lambda v: sortal.while_loop(layer.__call__, lambda v: v, v),
        victim(),
        error=ArgumentError,
    )


@pytest.mark.parametrize("name", ["while_loop", "fori_loop", "cond", "switch"])
def test_unknown_keywords_are_refused(name: str) -> None:
    add = lambda x: x + 1  # noqa: E731
    args = {
        "while_loop": (lambda x: x < 3, add, 0),
        "fori_loop": (0, 3, lambda i, x: x + 1, 0),
        "cond": (True, lambda x: x + 3, add, 0),
        "switch": (1, [add, lambda x: x + 3], 0),
    }[name]
    f = getattr(sortal, name)
    assert int(f(*args)) == 3
    with pytest.raises(ArgumentError, match=rf"^{name} has no option gaph\.$"):
        f(*args, gaph=True)


def test_a_write_to_a_model_that_is_closed_over_is_refused() -> None:
    m = victim()

    def write(x: Any) -> Any:
        m.n[...] += 1
        return x

    for f in (
        lambda: sortal.while_loop(lambda x: x < 3, write, 0),
        lambda: sortal.fori_loop(0, 3, lambda i, x: write(x), 0),
        lambda: sortal.cond(True, write, lambda x: x, 0),
    ):
        with untouched(m), pytest.raises(TraceError, match="n"):
            f()


# --------------------------------------------------------------------------- branches
def branchy() -> Holder:
    return Holder(
        a=Cache(jnp.array(1.0)),
        b=BatchStat(jnp.array(2.0)),
        w=Param(jnp.array(3.0)),
        inner=Holder(u=Param(jnp.array(4.0))),
    )


def write_a(m: Any, x: Any) -> Any:
    m.a[...] += x * m.w
    return x * 2


def write_b(m: Any, x: Any) -> Any:
    m.b[...] *= x
    return x + m.a


def write_both(m: Any, x: Any) -> Any:
    return write_b(m, write_a(m, x))


def expected(branch: int) -> tuple[float, float, float]:
    """a, b and the output after a branch, for x = 5."""
    return [(16.0, 2.0, 10.0), (1.0, 10.0, 6.0), (16.0, 20.0, 26.0)][branch]


PREDICATES = {
    "Python": bool,
    "NumPy": np.bool_,
    "JAX": jnp.array,
    "Variable": lambda x: Variable(jnp.array(x)),
}


@through
@pytest.mark.parametrize("pred", PREDICATES)
@pytest.mark.parametrize("branch", [0, 1])
def test_each_branch_of_cond_writes_its_own_leaves(
    branch: int, pred: str, transform: Any
) -> None:
    m = branchy()
    w = m.w.value

    def f(pred: Any, m: Any, x: Any) -> Any:
        return sortal.cond(pred, write_a, write_b, m, x)

    out = transform(f)(PREDICATES[pred](branch == 0), m, 5.0)
    assert (float(m.a.value), float(m.b.value), float(out)) == expected(branch)
    assert m.w.value is w
    assert not has_tracer(m)


@through
@pytest.mark.parametrize("index", [-4, 0, 1, 2, 7])
def test_switch_runs_one_branch_and_clamps_the_index(
    index: int, transform: Any
) -> None:
    m = branchy()

    def f(index: Any, m: Any, x: Any) -> Any:
        return sortal.switch(index, [write_a, write_b, write_both], m, x)

    out = transform(f)(index, m, 5.0)
    found = (float(m.a.value), float(m.b.value), float(out))
    assert found == expected(min(max(index, 0), 2))


def test_only_leaves_that_some_branch_writes_are_outputs() -> None:
    def read(pred: Any, m: Any) -> Any:
        return sortal.cond(pred, lambda m: m.w * 2, lambda m: m.inner.u * 3, m)

    def both(pred: Any, m: Any) -> Any:
        return sortal.cond(pred, write_a, write_b, m, 1.0)

    pred = jnp.array(True)
    outs = [
        len(loop_equation(g, "cond", pred, branchy()).outvars) for g in (read, both)
    ]
    assert outs == [1, 3]
    m = branchy()
    a, w = m.a.value, m.w.value
    sortal.cond(pred, lambda m: write_a(m, 1.0), lambda m: 0.0 * write_a(m, 2.0), m)
    assert m.a.value is not a
    assert m.w.value is w


def test_branches_may_return_modules_and_get_the_live_ones_back() -> None:
    m = branchy()

    def first(m: Any, x: Any) -> Any:
        m.a[...] += x
        return {"m": m, "inner": m.inner, "u": m.inner.u, "x": x}

    def second(m: Any, x: Any) -> Any:
        return {"m": m, "inner": m.inner, "u": m.inner.u, "x": x * 2}

    out = sortal.cond(jnp.array(False), first, second, m, 1.0)
    assert out["m"] is m
    assert out["inner"] is m.inner
    assert out["u"] is m.inner.u
    assert float(out["x"]) == 2.0
    assert float(m.a.value) == 1.0
    assert sortal.switch(jnp.array(1), [lambda m: m] * 3, m) is m


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_branches_may_be_modules_methods_and_partials(index: int) -> None:
    class Counting(sortal.Module):
        def __init__(self, k: float):
            self.k = Param(jnp.array(k))
            self.calls = Count(jnp.array(0))

        def __call__(self, x: Any, times: str = "once") -> Any:
            self.calls[...] += {"once": 1, "twice": 2}[times]
            return x * self.k

    ms = [Counting(2.0), Counting(3.0), Counting(5.0)]
    twice = functools.partial(lambda m, times, x: m(x, times), ms[2], "twice")
    plain = lambda x: x * 7  # noqa: E731
    branches = [ms[0], ms[1].__call__, twice, plain]
    out = sortal.switch(jnp.array(index), branches, 1.0)
    assert float(out) == [2.0, 3.0, 5.0, 7.0][index]
    calls = [int(m.calls.value) for m in ms]
    assert calls == [[1, 0, 0], [0, 1, 0], [0, 0, 2], [0, 0, 0]][index]
    assert float(sortal.cond(index > 1, ms[0], ms[0], 1.0)) == 2.0
    assert int(ms[0].calls.value) == calls[0] + 1


def test_one_branch_alone_is_run() -> None:
    m = branchy()
    assert float(sortal.switch(jnp.array(5), [write_a], m, 5.0)) == 10.0
    assert float(m.a.value) == 16.0


def plain_cond(pred: Any, a: Any, b: Any, w: Any, x: Any) -> Any:
    """``write_a`` or ``write_b`` on arrays: output, a, b."""
    return jax.lax.cond(
        pred,
        lambda: (x * 2 * w, a + x * w, b),
        lambda: ((x + a) * w, a, b * x),
    )


@pytest.mark.parametrize("pred", [True, False])
def test_gradients_are_those_of_the_branch_that_ran(pred: bool) -> None:
    def loss(m: Any, x: Any) -> Any:
        y = sortal.cond(jnp.array(pred), write_a, write_b, m, x)
        return y * m.w + m.a * 3 + m.b * 5

    def by_hand(w: Any, a: Any, x: Any) -> Any:
        y, a, b = plain_cond(pred, a, 2.0, w, x)
        return y + a * 3 + b * 5

    m = branchy()
    grads, dx = sortal.grad(loss, argnums=(0, 1))(m, 5.0)
    dw, _, by_jax = jax.grad(by_hand, argnums=(0, 1, 2))(3.0, 1.0, 5.0)
    close(grads["w"].value, dw)
    assert float(grads["inner"]["u"].value) == 0.0
    close(dx, by_jax)
    assert (float(m.a.value), float(m.b.value)) == expected(int(not pred))[:2]


def test_vmap_chooses_for_each_replica() -> None:
    preds = jnp.array([True, False, True])
    m = Holder(
        a=Cache(jnp.arange(3.0)), b=BatchStat(jnp.ones(3)), w=Param(jnp.array(3.0))
    )
    axes = sortal.StateAxes({Param: None, ...: 0})
    run = lambda p, m, x: sortal.cond(p, write_a, write_b, m, x)  # noqa: E731
    ys = sortal.vmap(run, in_axes=(0, axes, None))(preds, m, 5.0)
    for i in range(3):
        y, a, b = plain_cond(preds[i], float(i), 1.0, 3.0, 5.0)
        close([ys[i] * 3, m.a.value[i], m.b.value[i]], [y, a, b])


def test_cond_inside_cond_inside_a_loop() -> None:
    m = Holder(a=Count(jnp.array(0)), b=Count(jnp.array(0)), c=Count(jnp.array(0)))

    def add(name: str) -> Any:
        def write(m: Any) -> None:
            getattr(m, name)[...] += 1

        return write

    def body(i: Any, m: Any) -> Any:
        inner = lambda m: sortal.cond(i % 4 == 2, add("b"), add("c"), m)  # noqa: E731
        sortal.cond(i % 2 == 1, add("a"), inner, m)
        return m

    sortal.jit(lambda m: sortal.fori_loop(0, 10, body, m) and None)(m)
    assert [int(x.value) for x in (m.a, m.b, m.c)] == [5, 2, 3]


def test_a_value_that_is_weak_in_one_branch_is_no_other_dtype() -> None:
    m = Holder(a=Cache(jnp.float32(1)))

    def strong(m: Any) -> Any:
        m.a[...] += jnp.float32(1)
        return jnp.float32(1)

    def weak(m: Any) -> Any:
        m.a.value = 5.0
        return 2.0

    assert float(sortal.cond(jnp.array(False), strong, weak, m)) == 2.0
    assert float(m.a.value) == 5.0
    assert m.a.dtype == jnp.float32


# ------------------------------------------------------------------ branches: refused
@pytest.mark.parametrize("edit", EDITS)
def test_a_structure_edit_is_named_with_its_branch(edit: Any) -> None:
    text = refused(
        EDITS[edit], lambda m: sortal.cond(True, lambda m: None, edit, m), victim()
    )
    assert text.startswith("the false branch of cond must leave the structure as it is")
    text = refused(
        EDITS[edit],
        lambda m: sortal.switch(0, [lambda m: None, lambda m: None, edit], m),
        victim(),
    )
    assert text.startswith("branch 2 of switch must leave the structure as it is")


def test_written_values_of_other_shapes_or_dtypes_are_named_with_their_branch() -> None:
    def narrow(m: Any) -> None:
        m.w.value = m.w[:1]
        m.n.value = m.n * 1.5

    refused(
        "the true branch of cond must keep the shape and dtype of what it hands on; it "
        "changed:\n  n (Count): int32[] -> float32[]\n  w (Param): float32[2] -> "
        "float32[1]\n",
        lambda m: sortal.cond(False, narrow, lambda m: None, m),
        victim(),
    )


def test_outputs_of_other_shapes_or_dtypes_are_named_with_their_branches() -> None:
    refused(
        "all branches must return the same shapes and dtypes; they returned:\n"
        "  output['a']: float32[2] by the true branch of cond, float32[1] by the false "
        "branch of cond\n  output['b'][1]: int32[] by the true branch of cond, "
        "float32[] by the false branch of cond\nCast or reshape",
        lambda m: sortal.cond(
            jnp.array(True),
            lambda m: {"a": m.w[...], "b": (0, m.n[...])},
            lambda m: {"a": m.w[:1], "b": (0, m.n * 1.0)},
            m,
        ),
        victim(),
    )
    refused(
        "output: float32[2] by branch 0 of switch, float32[2] by branch 1 of switch, "
        "int32[] by branch 2 of switch",
        lambda m: sortal.switch(
            0, [lambda m: m.w * 1, lambda m: m.w * 2, lambda m: m.n * 1], m
        ),
        victim(),
    )


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (lambda m: None, "returns Holder 0, the false branch of cond returns None."),
        (lambda m: m.sub, "the false branch of cond returns sub (Holder)."),
        (lambda m: m.w, "the false branch of cond returns w (Param)."),
        (lambda m: (m,), "the false branch of cond returns (Holder 0,)."),
    ],
)
def test_branches_that_return_other_objects_are_refused(second: Any, text: str) -> None:
    refused(
        "all branches must return the same structure with the same objects in it; the "
        "true branch of cond returns Holder 0",
        lambda m: sortal.cond(True, lambda m: m, second, m),
        victim(),
    )
    refused(text, lambda m: sortal.cond(True, lambda m: m, second, m), victim())


def test_an_object_that_a_branch_makes_is_refused() -> None:
    refused(
        "the true branch of cond must leave the structure as it is, for it is compiled "
        "once for all steps; it changed:\n  an object that is returned was made inside",
        lambda m: sortal.cond(True, lambda m: victim(), lambda m: m, m),
        victim(),
    )


def test_of_what_is_replaced_as_a_whole_one_row_is_shown() -> None:
    def sync(agent: Any) -> None:
        agent.target, agent.more = agent.net, Linear(D, D)

    refused(
        "it changed:\n  target: Linear -> alias of net\n  more: absent -> Linear\nMake",
        lambda a: sortal.cond(True, sync, lambda a: None, a),
        Holder(net=Linear(D, D), target=Linear(D, D)),
    )


def test_switch_needs_a_branch() -> None:
    with pytest.raises(ArgumentError, match=r"^switch needs at least one branch\.$"):
        sortal.switch(0, [], 1)


def test_an_exception_in_a_branch_leaves_everything_as_it_was() -> None:
    def broken(m: Any) -> Any:
        m.n[...] += 1
        raise KeyError("mine")

    m = victim()
    with untouched(m), pytest.raises(KeyError, match="mine"):
        sortal.cond(False, broken, lambda m: None, m)


@pytest.mark.parametrize("how", ["cond", "while_loop", "fori_loop"])
def test_a_model_that_is_dropped_after_a_call_is_freed_at_once(how: str) -> None:
    """And not only when cycles are collected: its arrays may fill the memory."""
    model = sortal.Linear(2, 2, rngs=sortal.Rngs(0))
    kernel = weakref.ref(model.kernel.value)
    gc.disable()
    try:
        if how == "cond":
            sortal.cond(True, lambda m: m.bias[...], lambda m: -m.bias, model)
        elif how == "while_loop":
            sortal.while_loop(
                lambda v: v[1] < 2, lambda v: (v[0], v[1] + 1), (model, 0)
            )
        else:
            sortal.fori_loop(0, 2, lambda i, m: m, model)
        del model
        assert kernel() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("loop", "where"),
    [
        (
            lambda f, m: sortal.fori_loop(0, 2, lambda i, m: f(m), m),
            "body of fori_loop",
        ),
        (lambda f, m: sortal.while_loop(lambda m: False, f, m), "body of while_loop"),
        (
            lambda f, m: sortal.scan(
                lambda m, x: (f(m), x),
                in_axes=(sortal.Carry, 0),
                out_axes=(sortal.Carry, 0),
            )(m, jnp.ones(2)),
            "step of scan",
        ),
    ],
    ids=["fori", "while", "scan"],
)
def test_a_step_that_moves_an_array_on_an_explicit_mesh_is_told_by_path(
    loop: Any, where: str
) -> None:
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)

    def step(m: Any) -> Any:
        m.w[...] = jax.sharding.reshard(m.w[...], jax.P("a"))
        return m

    with jax.set_mesh(mesh):
        m = Holder(w=Param(jnp.ones((8, 4))))
        with pytest.raises(LoopError) as e:
            loop(step, m)
        assert str(e.value).startswith(
            f"the {where} must keep where on the mesh lies what it hands on; it "
            "changed:\n"
            "  w (Param): float32[8,4], P(None, None) -> P('a', None)\n"
            "Put it there before the loop, or write jax.sharding.reshard(x, spec) with "
            "the spec that it has."
        )
        m.w.value = jax.sharding.reshard(m.w.value, jax.P("a"))
        loop(step, m)
        assert m.w.value.sharding.spec == jax.P("a", None)


def test_branches_that_leave_values_at_other_places_are_told_by_path() -> None:
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)

    def moves(spec: Any) -> Any:
        def branch(m: Any) -> Any:
            m.w[...] = jax.sharding.reshard(m.w[...], spec)
            return {"y": jax.sharding.reshard(m.w[...], jax.P()), "w": m.w[...]}

        return branch

    def stays(m: Any) -> Any:
        return {"y": m.w[...], "w": jax.sharding.reshard(m.w[...], jax.P("a"))}

    with jax.set_mesh(mesh):
        m = Holder(w=Param(jnp.ones((8, 4))))
        for wrap in (sortal.jit, lambda f: f):
            with untouched(m), pytest.raises(LoopError) as e:
                wrap(lambda m: sortal.cond(True, moves(jax.P("a")), stays, m))(m)
            assert str(e.value) == (
                "all branches must leave at one place of the mesh what any of them "
                "writes or returns; it lies at:\n"
                "  w (Param): P('a', None) by the true branch of cond, P(None, None) "
                "by the false branch of cond\n"
                "Write jax.sharding.reshard(x, spec) with one spec in all of them."
            )
        with pytest.raises(
            LoopError, match=r"output\['w'\]: P\('a', None\) by branch 0"
        ):
            sortal.switch(0, [moves(jax.P("a")), moves(jax.P(None, "b"))], m)
        sortal.switch(1, [moves(jax.P("a")), moves(jax.P("a"))], m)
        assert m.w.value.sharding.spec == jax.P("a", None)


DEVICES = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


class Mean(sortal.Variable, reduce="mean"):
    """A kind whose replicas are averaged."""


def on_devices(f: Any) -> Any:
    spec = jax.P("d")
    specs = sortal.StateSharding({...: jax.P()}), spec
    mapped = sortal.shard_map(f, mesh=DEVICES, in_specs=specs, out_specs=spec)
    return sortal.jit(mapped)


@pytest.mark.parametrize("which", ["cond", "switch"])
def test_a_branch_may_write_what_then_differs_between_devices(which: str) -> None:
    """The other branch leaves there what all devices share; against each by itself."""
    x = jnp.array([1.0, -2.0, 3.0, -4.0])

    def add(m: Any, x: Any) -> Any:
        m.w[...] += x[0]
        return x

    def leave(m: Any, x: Any) -> Any:
        return m.w[...] * jnp.zeros(1)

    def step(m: Any, x: Any) -> Any:
        if which == "cond":
            return sortal.cond(x[0] > 0, add, leave, m, x)
        return sortal.switch(jnp.where(x[0] > 0, 1, 0), [leave, add], m, x)

    m = Holder(w=Mean(jnp.array(8.0)))
    assert on_devices(step)(m, x).tolist() == [1.0, 0.0, 3.0, 0.0]
    assert float(m.w.value) == np.mean([9.0, 8.0, 11.0, 8.0])


@pytest.mark.parametrize("loop", ["scan", "fori", "while"])
def test_a_step_whose_carry_comes_to_differ_between_devices_is_told_by_path(
    loop: str,
) -> None:
    def step(m: Any, x: Any) -> Any:
        m.w[...] += x[0]
        return m

    def run(m: Any, x: Any) -> Any:
        if loop == "scan":
            sortal.scan(step, in_axes=(sortal.Carry, 0), out_axes=sortal.Carry)(
                m, x[None]
            )
        elif loop == "fori":
            sortal.fori_loop(0, 1, lambda i, m: step(m, x), m)
        else:
            sortal.while_loop(lambda m: m.w < 1, lambda m: step(m, x), m)
        return x

    x, m = jnp.arange(4.0), Holder(w=Mean(jnp.array(0.0)))
    with untouched(m), pytest.raises(LoopError) as e:
        on_devices(run)(m, x)
    _, _, text = str(e.value).partition(" hands on ")
    assert text.startswith(
        "what differs between devices and is the same on all before the loop:\n"
        "  w (Mean): float32[] differs along d\n"
        "Write before it x = jax.lax.pcast(x, ('d',), to='varying'), of a Variable "
        "variable[...] = jax.lax.pcast(variable[...], ('d',), to='varying')."
    )
    if loop == "while":
        return  # it would not end on the first device

    def as_told(m: Any, x: Any) -> Any:
        m.w[...] = jax.lax.pcast(m.w[...], ("d",), to="varying")
        return run(m, x)

    on_devices(as_told)(m, x)
    assert float(m.w.value) == x.mean()
