"""Eager transforms: compiled once for each function object, and no staler than JAX.

A function here prints whenever Python runs it.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import re
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal
from models import Count
from sortal import Carry, Param, StateAxes
from sortal._engine.bounded import Bounded
from sortal.errors import ArgumentError, LoopError, ShardingError, StaleBufferError
from sortal.transforms import eager

RATE = 1.0
same = np.testing.assert_array_equal


class Scale(sortal.Module):
    shift = 0.0

    def __init__(self, w: float = 2.0, config: Any = None) -> None:
        self.w, self.n = Param(jnp.full(2, w, "float32")), Count(jnp.array(0))
        self.training, self.config = True, config

    def __call__(self, x: Any) -> Any:
        print("traced")  # noqa: T201
        self.n[...] += 1
        rate = 1.0 if self.config is None else self.config.rate
        return x * self.w * RATE * rate * (1.0 if self.training else -1.0) + self.shift


class Settings:
    def __init__(self, rate: float) -> None:
        self.rate = rate


def apply(m: Any, x: Any) -> Any:
    return m(x)


def one(make: Any, f: Any) -> Any:
    """``make(f)``, one object for each function object."""
    return vars(f).setdefault(make.__name__, make(f))


def negated(m: Any, x: Any) -> Any:
    return -x


def below_one(value: Any) -> Any:
    return value[2] < 1


def while_body(f: Any) -> Any:
    return lambda v: (v[0], f(v[0], v[1]), v[2] + 1)


def fori_body(f: Any) -> Any:
    return lambda i, v: (v[0], f(*v))


def by_cond(f: Any, m: Any, x: Any) -> Any:
    return sortal.cond(jnp.array(True), f, negated, m, x)


def by_switch(f: Any, m: Any, x: Any) -> Any:
    return sortal.switch(1, [negated, f], m, x)


def by_while(f: Any, m: Any, x: Any) -> Any:
    return sortal.while_loop(below_one, one(while_body, f), (m, x, 0))[1]


def by_fori(f: Any, m: Any, x: Any) -> Any:
    return sortal.fori_loop(0, 1, one(fori_body, f), (m, x))[1]


def by_remat(f: Any, m: Any, x: Any) -> Any:
    return sortal.remat(f)(m, x)


def by_scan(f: Any, m: Any, x: Any) -> Any:
    axes = (StateAxes({...: Carry}), Carry)
    return sortal.scan(f, length=1, in_axes=axes, out_axes=Carry)(m, x)


def raw_scan_body(f: Any) -> Any:
    return lambda x, _: (f(0, x), None)


def raw(way: Any, f: Any, x: Any) -> Any:
    """The same transform of a function that makes nothing of its model, in JAX."""
    if way is by_cond:
        return jax.lax.cond(True, f, negated, 0, x)
    if way is by_switch:
        return jax.lax.switch(1, [negated, f], 0, x)
    if way is by_while:
        return jax.lax.while_loop(below_one, one(while_body, f), (0, x, 0))[1]
    if way is by_fori:
        return jax.lax.fori_loop(0, 1, one(fori_body, f), (0, x))[1]
    if way is by_remat:
        return jax.checkpoint(f)(0, x)
    return jax.lax.scan(one(raw_scan_body, f), x, length=1)[0]


WAYS = [by_cond, by_switch, by_while, by_fori, by_remat, by_scan]
every = pytest.mark.parametrize("way", WAYS)
X = jnp.array([1.0, 3.0])


@pytest.fixture
def traced(capsys: Any) -> Callable[[], bool]:
    """Whether Python ran the user's function since the last time of asking."""
    return lambda: "traced" in capsys.readouterr().out


@pytest.fixture(autouse=True)
def programs(monkeypatch: Any) -> Bounded[Any]:
    found: Bounded[Any] = Bounded(64)
    monkeypatch.setattr(eager, "_programs", found)
    return found


@every
def test_a_second_call_runs_no_python_and_has_the_values_of_now(
    way: Any, traced: Any
) -> None:
    m = Scale()
    same(way(apply, m, X), X * 2)
    assert traced()
    m.w.value = jnp.array([5.0, 7.0])
    same(way(apply, m, X + 1), (X + 1) * m.w.value)
    other = Scale(3.0)
    same(way(apply, other, X), X * 3)
    assert not traced()
    assert (int(m.n.value), int(other.n.value)) == (2, 1)


@every
@pytest.mark.parametrize("what", ["mode", "new", "metadata", "kind", "shape", "dtype"])
def test_another_structure_shape_or_dtype_is_traced(
    way: Any, what: str, traced: Any
) -> None:
    m, x, sign = Scale(), X, 1
    way(apply, m, x)
    traced()
    if what == "mode":
        m.training, sign = False, -1
    elif what == "new":
        m.more = Param(jnp.zeros(1))
    elif what == "metadata":
        m.w.set_metadata(tag="other")
    elif what == "kind":
        m.n = sortal.BatchStat(m.n.value)
    elif what == "shape":
        x = jnp.ones((3, 2))
    else:
        x, m.w.value = X.astype(jnp.bfloat16), m.w.value.astype(jnp.bfloat16)
    found = way(apply, m, x)
    assert traced()
    assert found.dtype == x.dtype
    same(found, x * 2 * sign)
    way(apply, m, x)
    assert not traced()


@every
def test_a_new_function_is_traced(way: Any, traced: Any) -> None:
    m = Scale()

    def times(by: float) -> Any:
        return lambda m, x: m(x) * by

    for by in (2.0, 3.0, 0.0, -0.0, 2.0):
        found = way(times(by), m, X)
        assert traced()
        same(found, X * 2 * by)
        assert np.signbit(found).all() == np.signbit(by)


# What a function may read besides its arguments.

HOLDER = types.SimpleNamespace(rate=1.0)
NAMES = {"rate": 1.0}


def of_helper() -> float:
    def read(holder: Any) -> float:
        return holder.rate

    return read(HOLDER)


def of_getattr() -> float:
    return getattr(HOLDER, "ra" + "te")


def of_globals() -> float:
    return globals()["NAMES"]["rate"]


def of_function() -> float:
    return vars(of_function)["rate"]


def of_import() -> float:
    return vars(sys.modules["settings_of_a_test"])["rate"]


def of_random() -> float:
    return float(np.random.uniform())  # noqa: NPY002


READS = [of_helper, of_getattr, of_globals, of_function, of_import, of_random]


@pytest.fixture
def set_rate(monkeypatch: Any) -> Callable[[float], None]:
    """Gives what all of ``READS`` read another value."""
    settings = types.ModuleType("settings_of_a_test")
    monkeypatch.setitem(sys.modules, settings.__name__, settings)

    def write(rate: float) -> None:
        HOLDER.rate = NAMES["rate"] = rate
        vars(of_function)["rate"] = vars(settings)["rate"] = rate
        np.random.seed(int(rate))  # noqa: NPY002

    return write


@every
@pytest.mark.parametrize("again", [False, True], ids=["new", "same"])
@pytest.mark.parametrize("read", READS)
def test_what_a_function_reads_is_as_new_or_old_as_in_jax(
    way: Any, read: Any, again: bool, set_rate: Any
) -> None:
    """A new function reads the values of now; the same one those of its trace."""

    def new() -> Any:
        return lambda m, x: x * read()

    m, ours, plain = Scale(), new(), new()
    found, by_jax = [], []
    for rate in (2.0, 3.0):
        set_rate(rate)
        found.append(way(ours if again else new(), m, X)[0])
        set_rate(rate)
        by_jax.append(raw(way, plain if again else new(), X)[0])
    assert (by_jax[0] == by_jax[1]) == again
    same(found, by_jax)


def test_a_method_is_a_new_function_and_an_object_the_same_as_in_jax(
    set_rate: Any,
) -> None:
    class Reads(sortal.Module):
        def __call__(self, m: Any, x: Any) -> Any:
            return x * of_helper()

    class Plain:
        def __call__(self, m: Any, x: Any) -> Any:
            return x * of_helper()

    m, plain, found, by_jax = Reads(), Plain(), [], []
    for rate in (2.0, 3.0):
        set_rate(rate)
        found += [by_cond(f, m, X)[0] for f in (m.__call__, m)]
        by_jax += [raw(by_cond, f, X)[0] for f in (plain.__call__, plain)]
    assert [float(x) for x in by_jax] == [2.0, 2.0, 3.0, 2.0]
    same(found, by_jax)


@every
@pytest.mark.parametrize("what", ["module", "variable", "array", "partial"])
def test_what_is_closed_over_has_its_value_of_now(way: Any, what: str) -> None:
    m, other, arrays = Scale(), Scale(3.0), {"a": jnp.ones(2)}

    def call(m: Any, x: Any) -> Any:
        if what == "module":
            return x * other.w
        if what == "variable":
            return x * variable
        return x * arrays["a"]

    variable = other.w
    fn = call
    if what == "partial":
        fn = functools.partial(lambda m, x, held: x * held["a"], held=arrays)
    for k in range(3):
        other.w.value = arrays["a"] = jnp.full(2, 1.0 + k)
        same(way(fn, m, X), X * (1 + k))


@every
def test_a_number_in_a_variable_that_is_closed_over_is_as_old_as_a_global(
    way: Any,
) -> None:
    number, array = sortal.Variable(2.0), sortal.Variable(jnp.array(2.0))

    def numbers(m: Any, x: Any) -> Any:
        return x * number.value

    def arrays(m: Any, x: Any) -> Any:
        return x * array.value

    def read(m: Any, x: Any) -> Any:
        return x * m.value

    for new, old in ((2.0, 2.0), (5.0, 2.0)):
        number.value, array.value = new, jnp.array(new)
        same(way(numbers, Scale(), X), X * old)
        same(way(arrays, Scale(), X), X * new)
        same(way(read, number, X), X * new)


@every
@pytest.mark.parametrize("what", ["global", "class", "object", "dataclass", "import"])
def test_what_methods_of_an_argument_read_has_its_value_of_now(
    way: Any, what: str, monkeypatch: Any
) -> None:
    """Where the function is a new one."""
    record = dataclasses.make_dataclass("Config", [("rate", float)], eq=False)
    config = {"object": Settings, "dataclass": record}.get(what)
    m = Scale(config=config and config(rate=1.0))
    if what == "import":
        m.config = types.ModuleType("settings")
        vars(m.config)["rate"] = 1.0
    same(way(lambda m, x: m(x), m, X), X * 2)
    if what == "global":
        monkeypatch.setattr(f"{__name__}.RATE", 2.0)
    elif what == "class":
        monkeypatch.setattr(Scale, "shift", 1.0)
    else:
        vars(m.config)["rate"] = 2.0
    found = way(lambda m, x: m(x), m, X)
    same(found, X * 2 + 1 if what == "class" else X * 4)


@every
def test_what_a_static_function_closes_over_has_its_value_of_now(way: Any) -> None:
    rates = [1.0]
    m = Scale()
    m.activation = lambda x: x * rates[0]
    for k in range(1, 4):
        rates[0] = float(k)
        same(way(lambda m, x: m.activation(x), m, X), X * k)


def test_another_with_block_for_names_of_axes_is_seen() -> None:
    def make(m: Any, x: Any) -> Any:
        return x if sortal.using_eager_sharding() else -x

    m = Scale()
    same(by_remat(make, m, X), X)
    with sortal.use_eager_sharding(False):
        same(by_remat(make, m, X), -X)
    same(by_remat(make, m, X), X)


@every
def test_an_error_is_raised_at_every_call_and_leaves_nothing(
    way: Any, traced: Any
) -> None:
    def broken(m: Any, x: Any) -> Any:
        m.w[...] *= 2
        print("traced")  # noqa: T201
        if x.shape == (2,):
            raise ZeroDivisionError("on purpose")
        return x

    m = Scale()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            way(broken, m, X)
        assert traced()
        same(m.w.value, jnp.full(2, 2.0))
    same(way(broken, m, jnp.ones(3)), jnp.ones(3))
    same(m.w.value, jnp.full(2, 4.0))


@pytest.mark.parametrize("way", [w for w in WAYS if w is not by_remat])
def test_what_jax_cannot_take_is_refused_by_its_place(way: Any) -> None:
    m = Scale()
    with pytest.raises(ArgumentError) as e:
        way(apply, m, [X, "train"])
    text = str(e.value)
    assert re.search(r"found:\n  \w+( \d)?(\[\d\])+: 'train'\n", text)
    assert text.endswith("Let the function close over settings.")
    elsewhere = jax.device_put(X, jax.devices()[1])
    m.w.value = jax.device_put(m.w.value, jax.devices()[0])
    with pytest.raises(ShardingError, match=r"on others:\n  .*: device \d"):
        way(apply, m, elsewhere)
    m.w.value.delete()
    with pytest.raises(StaleBufferError, match=r"w \(Param\): float32\[2\]"):
        way(apply, m, X)


@pytest.mark.parametrize("way", [by_cond, by_switch])
def test_branches_in_a_trace_name_what_jax_cannot_take(way: Any) -> None:
    with pytest.raises(ArgumentError, match=r"found:\n  x\[1\]: 'train'\nLet the func"):
        sortal.jit(lambda m: way(apply, m, [X, "train"]))(Scale())


@every
def test_nothing_is_kept_inside_of_other_traces(way: Any, programs: Any) -> None:
    m = Scale()
    with jax.checking_leaks():
        same(sortal.jit(functools.partial(way, apply))(m, X), X * 2)
        axes = (StateAxes({...: None}), 0)
        f = sortal.vmap(lambda m, x: way(lambda m, x: x * m.w, m, x), in_axes=axes)
        same(f(m, jnp.stack([X, X + 1])), jnp.stack([X, X + 1]) * 2)
    assert not len(programs)


@every
def test_derivatives_use_what_is_kept(way: Any, traced: Any) -> None:
    if way is by_while:  # which JAX cannot differentiate backwards
        return
    m = Scale()

    def total(m: Any, x: Any) -> Any:
        return (way(apply, m, x) ** 2).sum()

    same(sortal.grad(total)(m, X)["w"].value, 2 * X**2 * 2)
    assert traced()
    m.w.value = jnp.full(2, 3.0, "float32")
    same(sortal.grad(total)(m, X)["w"].value, 2 * X**2 * 3)
    same(way(apply, m, X), X * 3)
    assert not traced()
    assert int(m.n.value) == 3


@every
def test_a_traced_value_that_is_closed_over_has_its_value_of_now(way: Any) -> None:
    if way is by_while:
        return
    m, values = Scale(), []

    def call(m: Any, x: Any) -> Any:
        return x * values[0]

    def total(y: Any) -> Any:
        values[:] = [y]
        return way(call, m, X).sum()

    for k in (1.0, 2.0):
        y = jnp.full(2, k)
        value, grads = jax.value_and_grad(total)(y)
        assert value == 4 * k
        same(grads, X)
        same(total(y), 4 * k)


@every
def test_what_is_kept_keeps_no_model_and_no_array(way: Any, programs: Any) -> None:
    m, x = Scale(), jnp.ones(2)
    for _ in range(2):
        way(apply, m, x)
    assert len(programs) == 1
    refs = [weakref.ref(y) for y in (m, m.w, m.w.value, x)]
    gc.disable()
    try:
        del m, x
        assert [ref() for ref in refs] == [None] * 4
    finally:
        gc.enable()


@every
def test_what_is_kept_is_freed_with_the_function_and_keeps_it_not(
    way: Any, programs: Any
) -> None:
    m = Scale()

    def make() -> Any:
        held = Scale()
        return lambda m, x: x * (2.0 if held.training else 1.0), weakref.ref(held)

    call, held = make()
    same(way(call, m, X), X * 2)
    assert len(programs) == 1
    del call
    gc.collect()
    assert held() is None
    assert not len(programs)


def test_callable_objects_are_kept_and_not_kept_alive(traced: Any) -> None:
    m, other = Scale(), Scale(3.0)
    for _ in range(2):
        same(sortal.cond(True, m, other, X), X * 2)
        same(sortal.cond(False, m, other, X), X * 3)
    traced()
    m.w.value = jnp.full(2, 4.0, "float32")
    same(sortal.cond(True, m, other, X), X * 4)
    assert not traced()
    assert (int(m.n.value), int(other.n.value)) == (3, 2)
    ref = weakref.ref(m)
    del m
    assert ref() is None


def test_as_many_are_kept_as_there_may_be(monkeypatch: Any) -> None:
    programs: Bounded[Any] = Bounded(3)
    monkeypatch.setattr(eager, "_programs", programs)
    m = Scale()
    calls = [lambda m, x, k=k: m(x) * k for k in range(5)]
    for k, call in enumerate(calls):
        same(by_cond(call, m, X), X * 2 * k)
        assert len(programs) <= 3


@pytest.mark.parametrize("way", [by_cond, by_switch, by_while, by_fori])
def test_structure_edits_are_refused_at_every_call(way: Any) -> None:
    def edit(m: Any, x: Any) -> Any:
        m.extra = Param(jnp.ones(2))
        return x

    m, texts = Scale(), []
    for _ in range(2):
        with pytest.raises(LoopError, match="must leave the structure as it is") as e:
            way(edit, m, X)
        texts.append(str(e.value))
    assert texts[0] == texts[1]
    assert "extra" in texts[0]
    assert not hasattr(m, "extra")


def test_structure_edits_of_remat_are_carried_out_by_what_is_kept(traced: Any) -> None:
    def edit(m: Any, x: Any) -> Any:
        m.extra = Param(m.w * 2)
        return m(x)

    for w in (2.0, 3.0):
        m = Scale(w)
        same(by_remat(edit, m, X), X * w)
        same(m.extra.value, jnp.full(2, 2 * w))
    traced()
    m = Scale(4.0)
    by_remat(edit, m, X)
    assert not traced()
    same(m.extra.value, jnp.full(2, 8.0))


def test_bounds_of_fori_loop_and_static_arguments_of_remat_are_seen() -> None:
    m = Scale(1.0)
    for n in (1, 3, np.int32(2), jnp.array(4)):
        found = sortal.fori_loop(0, n, lambda i, v: (v[0], v[1] + i), (m, 0))[1]
        assert int(found) == sum(range(int(n)))
    powered = sortal.remat(lambda m, x, n: m(x) ** n[0], static_argnums=2)
    for n in ((2,), (3,), (2.0,)):
        same(powered(m, X, n), X ** n[0])


@every
def test_without_jit_the_numbers_are_the_same(way: Any) -> None:
    m = Scale()
    with jax.disable_jit():
        for k in (1, 2):
            same(way(apply, m, X), X * 2)
            assert int(m.n.value) == k


def test_arrays_that_a_trace_closes_over_are_found_wherever_they_are() -> None:
    array, scalar = jnp.ones(2), jnp.float32(2) + 1

    def inner(x: Any) -> Any:
        return x * array

    def outer(y: Any) -> Any:
        assert eager.closes_over(jax.jit(lambda x: x * y).trace(X))
        return y.sum()

    jax.grad(outer)(X)
    for f in (
        inner,
        lambda x: x * scalar,
        jax.jit(inner),
        jax.checkpoint(inner),
        lambda x: jax.lax.cond(x[0] > 0, inner, lambda x: x, x),
        lambda x: jax.lax.scan(lambda c, _: (inner(c), None), x, length=2)[0],
        lambda x: x * np.arange(2.0),
    ):
        assert eager.closes_over(jax.jit(f).trace(X))
    for f in (lambda x: x * 2.0 + jnp.ones(2), jnp.sin, jax.jit(lambda x: x)):
        assert not eager.closes_over(jax.jit(f).trace(X))
