"""custom_vjp and custom_jvp: the rules are used, with their effects, or refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal
from models import Count, Holder, Linear, has_tracer, untouched
from sortal import BatchStat, DiffState, Param
from sortal.errors import ArgumentError, GradientError

X = jnp.arange(6.0).reshape(2, 3) / 6


class Stats(sortal.Module):
    """A layer with a running mean, a count, and an integer Param."""

    def __init__(self) -> None:
        self.linear = Linear(3, 2)
        self.mean = BatchStat(jnp.zeros(2))
        self.calls = Count(jnp.array(0))
        self.bins = Param(jnp.array([4]))

    def __call__(self, x: Any) -> Any:
        y = self.linear(x)
        self.calls[...] += 1
        self.mean[...] = 0.9 * self.mean + 0.1 * y.mean(0)
        return jnp.tanh(y)


def run(m: Any, x: Any) -> Any:
    return m(x)


def clipped_vjp(limit: float = 0.1, **options: Any) -> Any:
    """``run`` with the cotangent clipped, by sortal."""
    f = sortal.custom_vjp(run, **options)

    def fwd(m: Any, x: Any) -> Any:
        return f(m, x), (m, x)

    def bwd(residuals: Any, ct: Any) -> Any:
        m, x = residuals
        ct = jnp.clip(ct, -limit, limit)
        assert int(m.bins.value.shape[0]) == 1
        by_y = ct * (1 - jnp.tanh(m.linear(x)) ** 2)
        by_linear = {"kernel": x.T @ by_y, "bias": by_y.sum(0)}
        return {"linear": by_linear}, by_y @ m.linear.kernel.value.T

    f.defvjp(fwd, bwd)
    return f


def params_of(m: Any) -> dict[str, Any]:
    return {"k": m.linear.kernel.value, "b": m.linear.bias.value}


def flat(s: Any) -> dict[str, Any]:
    return {"k": s["linear"]["kernel"].value, "b": s["linear"]["bias"].value}


@jax.custom_vjp
def clip(y: Any) -> Any:
    return y


clip.defvjp(lambda y: (y, None), lambda _, ct: (jnp.clip(ct, -0.1, 0.1),))


def by_hand(p: Any, x: Any) -> Any:
    return clip(jnp.tanh(x @ p["k"] + p["b"]))


def total(f: Any) -> Any:
    return lambda m, x: (f(m, x) * jnp.array([[1.0, -3.0], [0.05, 2.0]])).sum()


def assert_close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def called_once(m: Stats) -> None:
    assert int(m.calls.value) == 1
    mean = 0.1 * (X @ m.linear.kernel.value + m.linear.bias.value).mean(0)
    assert_close(m.mean.value, mean)
    assert not has_tracer(m)


FLOATS = sortal.Under("linear")
NESTINGS = {
    "plain": lambda f: sortal.grad(f, argnums=(0, 1), wrt=FLOATS),
    "jit outside": lambda f: sortal.jit(sortal.grad(f, argnums=(0, 1), wrt=FLOATS)),
    "jit inside": lambda f: sortal.grad(sortal.jit(f), argnums=(0, 1), wrt=FLOATS),
    "remat": lambda f: sortal.grad(sortal.remat(f), argnums=(0, 1), wrt=FLOATS),
    "vjp": lambda f: lambda m, x: sortal.vjp(f, m, x, wrt=FLOATS)[1](jnp.array(1.0)),
}


# ------------------------------------------------------------------------- custom_vjp
@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_pull_back_of_ones_own_is_used_and_effects_happen_once(nesting: str) -> None:
    m = Stats()
    expected = jax.grad(total(by_hand), argnums=(0, 1))(params_of(m), X)
    by_m, by_x = NESTINGS[nesting](total(clipped_vjp()))(m, X)
    assert_close((flat(by_m), by_x), expected)
    called_once(m)


def test_without_differentiation_it_is_the_function_itself() -> None:
    for wrap in (lambda f: f, sortal.jit):
        m = Stats()
        assert_close(wrap(clipped_vjp())(m, X), by_hand(params_of(m), X))
        called_once(m)


def test_other_kinds_and_none_have_zero_cotangents() -> None:
    m = Stats()
    by_m = sortal.grad(total(clipped_vjp()), wrt=BatchStat)(m, X)
    assert_close(by_m["mean"].value, jnp.zeros(2))
    f = sortal.custom_vjp(run)
    f.defvjp(lambda m, x: (f(m, x), x), lambda x, ct: (None, ct @ jnp.ones((2, 3))))
    by_m, by_x = sortal.grad(total(f), argnums=(0, 1), wrt=FLOATS)(m, X)
    assert_close(flat(by_m), jax.tree.map(jnp.zeros_like, params_of(m)))
    assert float(abs(by_x).sum()) > 0
    f.defvjp(
        lambda m, x: (f(m, x), x),
        lambda x, ct: ({"linear": {"kernel": None, "bias": ct.sum(0)}}, None),
    )
    by_m = sortal.grad(total(f), wrt=FLOATS)(m, X)
    assert_close(by_m["linear"]["bias"].value, jnp.array([1.05, -1.0]))
    assert_close(by_m["linear"]["kernel"].value, jnp.zeros((3, 2)))


def test_a_cotangent_may_be_a_state_or_a_module_as_in_nnx_code() -> None:
    @sortal.custom_vjp
    def f(m: Any) -> Any:
        return jnp.sin(m.x[...]) * m.y

    def fwd(m: Any) -> Any:
        return f(m), (jnp.cos(m.x[...]), jnp.sin(m.x[...]), m)

    def as_module(residuals: Any, g: Any) -> Any:
        cos, sin, m = residuals
        by_m = sortal.clone(m)
        by_m.x[...], by_m.y[...] = cos * g * m.y, 2 * sin * g
        return (by_m,)

    def as_state(residuals: Any, g: Any) -> Any:
        return [sortal.state(as_module(residuals, g)[0])]

    m = Holder(x=Param(jnp.array(1.0)), y=Param(jnp.array(3.0)), name="static")
    for bwd in (as_module, as_state):
        f.defvjp(fwd, bwd)
        by_m = sortal.grad(f)(m)
        assert_close(by_m["x"].value, jnp.cos(1.0) * 3)
        assert_close(by_m["y"].value, 2 * jnp.sin(1.0))


def test_arguments_not_differentiated_by_go_first_and_may_be_anything() -> None:
    def scale(f: Any, m: Any, x: Any, by: Any = 2.0) -> Any:
        return f(m.w * x) * by

    f = sortal.custom_vjp(scale, nondiff_argnums=(0, -1))

    def bwd(fn: Any, by: Any, residuals: Any, ct: Any) -> Any:
        (name, x), m = residuals
        assert fn is jnp.sin
        assert name == "kept"
        return {"w": ct * x * by * 100}, ct * m.w * by

    f.defvjp(lambda fn, m, x, by: (scale(fn, m, x, by), (("kept", x), m)), bwd)
    m = Holder(w=Param(jnp.array(3.0)))
    for by in (2.0, jnp.array(2.0)):
        g = lambda m, x, by=by: f(jnp.sin, m, x, by=by)  # noqa: E731
        by_m, by_x = sortal.jit(sortal.grad(g, argnums=(0, 1)))(m, 5.0)
        assert_close((by_m["w"].value, by_x), (jnp.array(1000.0), jnp.array(6.0)))
    by_by = sortal.grad(lambda by: f(jnp.sin, m, 5.0, by))(2.0)
    assert float(by_by) == 0


def test_a_module_not_differentiated_by_is_given_to_bwd() -> None:
    def f_(m: Any, x: Any) -> Any:
        m.calls[...] += 1
        return m.w * x

    f = sortal.custom_vjp(f_, nondiff_argnums=0)
    f.defvjp(lambda m, x: (f(m, x), None), lambda m, _, ct: (10 * ct * m.w,))
    m = Holder(w=Param(jnp.array(3.0)), calls=Count(jnp.array(0)))
    by_m, by_x = sortal.grad(f, argnums=(0, 1))(m, 5.0)
    assert (float(by_m["w"].value), float(by_x)) == (0, 30)
    assert int(m.calls.value) == 1


def test_a_diff_state_says_which_leaves_have_a_cotangent() -> None:
    taken = DiffState(0, sortal.PathContains("x"))
    f = sortal.custom_vjp(lambda m: m.x * m.y * m.s, nondiff_argnums=(taken,))
    f.defvjp(lambda m: (f(m), None), lambda _, ct: ({"x": 7 * ct},))
    m = Holder(x=Param(jnp.array(1.0)), y=Param(jnp.array(3.0)), s=Count(jnp.array(1)))
    by_m = sortal.grad(f)(m)
    assert (float(by_m["x"].value), float(by_m["y"].value)) == (7, 0)


def test_a_tied_weight_gets_the_sum_of_both_cotangents() -> None:
    w = Param(jnp.array(2.0))
    a, b = Holder(w=w, again=w), Holder(w=w)
    f = sortal.custom_vjp(lambda a, b: a.w * b.w)

    def bwd(residuals: Any, ct: Any) -> Any:
        a, b = residuals
        assert a.w is a.again
        assert a.w is b.w
        return {"again": ct * 3}, {"w": ct * 4}

    f.defvjp(lambda a, b: (f(a, b), (a, b)), bwd)
    assert float(sortal.grad(f)(a, b)["again"].value) == 7
    first, second = sortal.grad(f, argnums=(0, 1))(a, b)
    assert float(first["again"].value) == 7
    assert second.paths() == ()


def test_objects_returned_are_live_and_none_in_the_cotangent() -> None:
    def f_(m: Any) -> Any:
        m.tag = "set"
        m.sow(sortal.Intermediate, "seen", m.w * 1)
        return {"m": m, "y": m.w * 2}

    f = sortal.custom_vjp(f_)

    def bwd(_: Any, ct: Any) -> Any:
        assert ct["m"] is None
        return ({"w": ct["y"] * 50},)

    f.defvjp(lambda m: (f(m), None), bwd)

    def loss(m: Any) -> Any:
        out = f(m)
        assert out["m"] is m
        return out["y"]

    for g in (sortal.grad(loss), sortal.jit(sortal.grad(loss))):
        m = Holder(w=Param(jnp.array(2.0)))
        assert float(g(m)["w"].value) == 50
        assert m.tag == "set"
        assert float(m.seen.value[0]) == 2
        assert f(m)["m"] is m


def test_vmap_over_arrays_around_and_inside() -> None:
    f = sortal.custom_vjp(lambda m, x: (m.w * x).sum())
    f.defvjp(
        lambda m, x: (f(m, x), (m, x)),
        lambda r, ct: ({"w": 2 * ct * r[1]}, 3 * ct * r[0].w),
    )
    m, xs = Holder(w=Param(jnp.ones(3))), jnp.arange(12.0).reshape(4, 3)
    by_m, by_x = jax.vmap(lambda x: sortal.grad(f, argnums=(0, 1))(m, x))(xs)
    assert_close((by_m["w"].value, by_x), (2 * xs, jnp.full((4, 3), 3.0)))
    inside = lambda m: jax.vmap(lambda x: f(m, x))(xs).sum()  # noqa: E731
    assert_close(sortal.grad(inside)(m)["w"].value, 2 * xs.sum(0))


def test_it_may_be_a_method() -> None:
    class Doubled(sortal.Module):
        def __init__(self) -> None:
            self.w = Param(jnp.array(3.0))

        @sortal.custom_vjp
        def times(self, x: Any) -> Any:
            """Multiplies."""
            return self.w * x

    Doubled.times.defvjp(
        lambda m, x: (m.w * x, x), lambda x, ct: ({"w": ct * x * 9}, None)
    )
    by_m = sortal.grad(lambda m: m.times(2.0))(Doubled())
    assert float(by_m["w"].value) == 18
    assert Doubled.times.__doc__ == "Multiplies."
    assert Doubled.times.__name__ == "times"


# ------------------------------------------------------------------------- custom_jvp
def doubled_jvp() -> Any:
    """``run`` with twice its derivative, by sortal."""
    f = sortal.custom_jvp(run)

    @f.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        (m, x), (by_m, dx) = primals, tangents
        assert by_m.paths() == (("linear", "bias"), ("linear", "kernel"))
        k, linear = m.linear.kernel.value, by_m["linear"]
        y = m.linear(x)
        dy = dx @ k + x @ linear["kernel"].value + linear["bias"].value
        return f(m, x), 2 * dy * (1 - jnp.tanh(y) ** 2)

    return f


@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_jvp_rule_is_used_and_effects_happen_once(nesting: str) -> None:
    m = Stats()
    plain = lambda p, x: jnp.tanh(x @ p["k"] + p["b"])  # noqa: E731
    by_jax = jax.grad(total(plain), argnums=(0, 1))(params_of(m), X)
    by_m, by_x = NESTINGS[nesting](total(doubled_jvp()))(m, X)
    assert_close((flat(by_m), by_x), jax.tree.map(lambda g: 2 * g, by_jax))
    called_once(m)


def test_a_jvp_rule_is_used_by_jvp_and_linearize() -> None:
    m = Stats()
    dots = {"linear": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    p, plain = params_of(m), lambda p: jnp.tanh(X @ p["k"] + p["b"])
    ones = jax.tree.map(jnp.ones_like, p)
    expected = 2 * jax.jvp(plain, (p,), (ones,))[1]
    f = doubled_jvp()
    for call in (
        lambda m: sortal.jvp(lambda m: f(m, X), (m,), (dots,), wrt=FLOATS)[1],
        lambda m: sortal.linearize(lambda m: f(m, X), m, wrt=FLOATS)[1](dots),
        sortal.jit(
            lambda m: sortal.jvp(lambda m: f(m, X), (m,), (dots,), wrt=FLOATS)[1]
        ),
    ):
        m = Stats()
        assert_close(call(m), expected)
        called_once(m)


def test_jvp_arguments_not_differentiated_by_go_first() -> None:
    f = sortal.custom_jvp(lambda fn, w, n: fn(w[...]) * n, nondiff_argnums=(0,))

    @f.defjvp
    def rule(fn: Any, primals: Any, tangents: Any) -> Any:
        (w, n), (dw, dn) = primals, tangents
        assert dn.dtype == jax.dtypes.float0
        return {"y": f(fn, w, n), "w": w}["y"], 9 * dw.leaves()[0].value

    w = Param(jnp.array(3.0))
    by_w = sortal.grad(lambda w: f(jnp.sin, w, jnp.array(2)))(w)
    assert float(by_w.leaves()[0].value) == 9


def test_objects_returned_are_none_in_the_tangent() -> None:
    @sortal.custom_jvp
    def f(m: Any) -> Any:
        m.n[...] += 1
        return m, m.w * 2

    given: list[Any] = [lambda m, dy: (None, dy), lambda m, dy: (m, dy)]
    for form in given:

        def rule(primals: Any, tangents: Any, form: Any = form) -> Any:
            (m,), (dm,) = primals, tangents
            m.n[...] += 1
            return (m, m.w * 2), form(m, 50 * dm["w"].value)

        f.defjvp(rule)
        m = Holder(w=Param(jnp.array(2.0)), n=Count(jnp.array(0)))
        assert float(sortal.grad(lambda m: f(m)[1])(m)["w"].value) == 50
        assert int(m.n.value) == 1


# ---------------------------------------------------------------------------- errors
def test_all_faults_of_cotangents_are_listed() -> None:
    f = sortal.custom_vjp(run)
    bad = {"linear": {"kernel": jnp.ones((2, 2))}, "mean": jnp.ones(2)}
    f.defvjp(lambda m, x: (f(m, x), None), lambda _, ct: (bad, jnp.ones(3)))
    m = Stats()
    with untouched(m), pytest.raises(GradientError) as e:
        sortal.grad(total(f), wrt=FLOATS)(m, X)
    text = str(e.value)
    assert "cotangents must have the paths, shapes and dtypes" in text
    assert "cotangent 0: linear.kernel (Param): expected float32[3,2], found" in text
    assert "cotangent 0: linear.bias (Param): missing" in text
    assert "cotangent 0: mean: unknown" in text
    assert "cotangent 1: expected float32[2,3], found float32[3]" in text


@pytest.mark.parametrize(
    ("fwd", "bwd", "text"),
    [
        (lambda m: m.w * 2, None, r"fwd must return \(out, residuals\); found a"),
        (None, lambda _, ct: ct, "bwd must return a tuple with one cotangent"),
        (None, lambda _, ct: (1.0, 2.0), "one cotangent is due for each of 1 arg"),
    ],
)
def test_rules_that_return_something_else_are_refused(
    fwd: Any, bwd: Any, text: str
) -> None:
    f = sortal.custom_vjp(lambda m: m.w * 2)
    f.defvjp(fwd or (lambda m: (f(m), None)), bwd)
    m = Holder(w=Param(jnp.array(1.0)))
    with untouched(m), pytest.raises(ArgumentError, match=text):
        sortal.grad(f)(m)


def test_a_jvp_rule_that_returns_something_else_is_refused() -> None:
    f = sortal.custom_jvp(lambda m: m.w * 2)
    m = Holder(w=Param(jnp.array(1.0)))
    f.defjvp(lambda p, t: p[0].w * 2)
    with pytest.raises(ArgumentError, match=r"jvp rule must return \(out, tangent_out"):
        sortal.grad(f)(m)
    f.defjvp(lambda p, t: (p[0].w * 2, (1.0, 2.0)))
    with untouched(m), pytest.raises(GradientError) as e:
        sortal.grad(f)(m)
    assert "tangent_out of <lambda>'s jvp rule must have the structure of" in str(e)


@pytest.mark.parametrize(
    "nesting",
    [
        sortal.grad,
        lambda f: sortal.grad(sortal.jit(f)),
        lambda f: sortal.jit(sortal.grad(f)),
    ],
    ids=["grad", "grad of jit", "jit of grad"],
)
def test_a_rule_that_changes_other_leaves_is_refused(nesting: Any) -> None:
    def count(m: Any) -> Any:
        m.calls[...] += 1
        return m.w * 2

    def silent(m: Any) -> Any:
        return m.w * 2, None

    def adds(m: Any) -> Any:
        m.new = 1
        return count(m), None

    m = Holder(w=Param(jnp.array(1.0)), calls=Count(jnp.array(0)))
    f = sortal.custom_vjp(count)
    g = sortal.custom_jvp(count)
    g.defjvp(lambda p, t: (p[0].w * 2, t[0]["w"].value))
    rows = "calls (Count): only count changes it"
    for rule, row in ((silent, rows), (adds, "objects that are returned, added or")):
        f.defvjp(rule, lambda _, ct: (None,))
        with untouched(m), pytest.raises(GradientError) as e:
            nesting(f)(m)
        assert "count and its fwd must change the same leaves and return the" in str(e)
        assert row in str(e.value)
        assert "Call count itself inside fwd" in str(e.value)
    with untouched(m), pytest.raises(GradientError) as e:
        nesting(g)(m)
    assert "count and its jvp rule must change" in str(e.value)
    assert rows in str(e.value)


def test_a_function_that_needs_values_is_differentiated_where_it_has_them() -> None:
    @sortal.custom_vjp
    def f(m: Any) -> Any:
        m.calls[...] += 1
        return m.w * 2 if m.w > 0 else m.w

    f.defvjp(lambda m: (f(m), None), lambda _, ct: ({"w": 7 * ct},))
    m = Holder(w=Param(jnp.array(1.0)), calls=Count(jnp.array(0)))
    assert float(sortal.grad(f)(m)["w"].value) == 7.0
    assert int(m.calls.value) == 1


@pytest.mark.parametrize(
    "read",
    [
        np.asarray,
        float,
        lambda x: jnp.arange(3.0)[jnp.arange(3) < x][0],
    ],
    ids=["to NumPy", "to a number", "as a mask"],
)
def test_a_function_that_reads_values_gives_way_to_its_rule(read: Any) -> None:
    f = sortal.custom_vjp(lambda m, x: m.w * read(x))
    f.defvjp(lambda m, x: (m.w * x, x), lambda x, ct: ({"w": 7 * x * ct}, None))
    m = Holder(w=Param(jnp.array(1.0)))
    assert float(sortal.grad(f)(m, jnp.array(2.0))["w"].value) == 14.0


def test_calls_without_rules_and_wrong_arguments_are_refused() -> None:
    def f(m: Any, *, scale: Any = 1.0) -> Any:
        return m

    def g(m: Any) -> Any:
        return m

    with pytest.raises(ArgumentError, match=r"g has no derivative yet; .* g.defvjp\("):
        sortal.custom_vjp(g)(1.0)
    with pytest.raises(ArgumentError, match=r"g has no derivative yet; .* g.defjvp\("):
        sortal.custom_jvp(g)(1.0)
    keyword = sortal.custom_vjp(f)
    keyword.defvjp(f, f)
    with pytest.raises(
        ArgumentError, match="all go by position; f has the keywords sc"
    ):
        keyword(1.0)
    far = sortal.custom_jvp(g, nondiff_argnums=(3,))
    far.defjvp(g)
    with pytest.raises(ArgumentError, match="has 3, but g was called with 1 arg"):
        far(1.0)
    for make in (sortal.custom_vjp, sortal.custom_jvp):
        for bound in (Linear(3, 2), Linear(3, 2).__call__):
            with pytest.raises(ArgumentError, match="takes a plain function, because"):
                make(bound)


def test_an_exception_in_a_rule_leaves_the_model_untouched() -> None:
    def fwd(m: Any, x: Any) -> Any:
        m(x)
        m.new = 1
        raise KeyError("stop")

    f = sortal.custom_vjp(run)
    f.defvjp(fwd, fwd)
    m = Stats()
    with untouched(m), pytest.raises(KeyError, match="stop"):
        sortal.grad(total(f), wrt=FLOATS)(m, X)


@pytest.mark.parametrize("made", [clipped_vjp, doubled_jvp])
def test_a_program_with_a_rule_keeps_nothing_of_the_call(made: Any) -> None:
    m, f = Stats(), made()
    with jax.checking_leaks():
        y = sortal.jit(f)(m, X)
    assert_close(y, jnp.tanh(X @ m.linear.kernel.value + m.linear.bias.value))
    assert int(m.calls.value) == 1
