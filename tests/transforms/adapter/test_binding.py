"""The adapter: what enters a trace, what leaves it, and what is brought back."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import sortal
from models import (
    Count,
    Holder,
    Linear,
    Net,
    has_tracer,
    models,
    objects,
    portrait,
    untouched,
)
from sortal import BatchStat, Cache, Param, nnx
from sortal.errors import StructureError, TraceError
from sortal.transforms._adapter import binding

# What each transform makes of a function that is called with one model.
TRANSFORMS: dict[str, Callable[[Any], Callable[[Any], Any]]] = {
    "jit": sortal.jit,
    "remat": sortal.remat,
    "grad": lambda f: (
        lambda m: sortal.grad(lambda m: ((m.w[...] ** 2).sum(), f(m)), has_aux=True)(m)[
            1
        ]
    ),
    "jit of grad": lambda f: sortal.jit(TRANSFORMS["grad"](f)),
    "jit of remat": lambda f: sortal.jit(sortal.remat(f)),
    "remat of jit": lambda f: sortal.remat(sortal.jit(f)),
    "jit of jit": lambda f: sortal.jit(sortal.jit(f)),
}
through = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


def model() -> Holder:
    """One of each: a shared Variable, containers, raw arrays, statics."""
    shared = Param(jnp.ones(2))
    return Holder(
        w=shared,
        tied=[shared, {"k": BatchStat(jnp.zeros(2))}],
        layer=Linear(2, 2),
        raw=jnp.zeros(2),
        pair=(jnp.zeros(1), Param(jnp.zeros(1))),
        rate=0.5,
    )


def swap(m: Any) -> None:
    m.tied[0], m.layer.kernel = m.layer.kernel, m.tied[0]


EDITS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda m: None,
    "a value": lambda m: m.w.set_value(m.w * 2),
    "a shared value": lambda m: m.tied[0].set_value(m.w * 2),
    "part of a value": lambda m: m.layer.kernel.__setitem__((0, 1), 7.0),
    "a raw array": lambda m: setattr(m, "raw", m.raw + 1),
    "a raw array in a tuple": lambda m: setattr(m, "pair", (m.pair[0] + 1, m.pair[1])),
    "a value in a tuple": lambda m: m.pair[1].set_value(m.pair[1] + 1),
    "a static": lambda m: setattr(m, "rate", 0.25),
    "a new attribute": lambda m: setattr(m, "new", Cache(m.w + 1)),
    "a new module": lambda m: setattr(m, "sub", Linear(2, 3)),
    "a new raw array": lambda m: setattr(m, "other", m.raw + 5),
    "a new static": lambda m: setattr(m, "name", "x"),
    "sow": lambda m: (
        m.layer.sow(sortal.Intermediate, "y", m.w * 3)
        if isinstance(m.layer, Linear)
        else None
    ),
    "pop": lambda m: sortal.pop(m.layer, Param).paths() and None,
    "a deleted attribute": lambda m: delattr(m, "raw"),
    "a replaced module": lambda m: setattr(m, "layer", Linear(1, 1, seed=4)),
    "a replaced Variable": lambda m: setattr(m.layer, "bias", BatchStat(m.w * 4)),
    "a list grown": lambda m: m.tied.append(Param(m.w + 2)),
    "a list shrunk": lambda m: m.tied.pop() and None,
    "a list cleared": lambda m: m.tied.clear(),
    "a list replaced": lambda m: setattr(m, "tied", [m.w, 1]),
    "a leaf for a static": lambda m: setattr(m, "rate", m.raw * 1),
    "a static for a leaf": lambda m: setattr(m, "raw", 3),
    "a tuple replaced": lambda m: setattr(m, "pair", (m.pair[1], m.pair[0])),
    "a dict grown": lambda m: m.tied[1].update(z=Param(m.w + 0), a=2),
    "a dict reordered": lambda m: m.tied[1].update(a=m.tied[1].pop("k"), k=1),
    "Variables exchanged": swap,
    "a new alias": lambda m: setattr(m, "alias", m.layer),
    "a new cycle": lambda m: setattr(m.layer, "parent", m),
    "an untied weight": lambda m: m.tied.__setitem__(0, Param(m.w + 1)),
    "metadata": lambda m: m.w.set_metadata(tag="t"),
    "metadata and value": lambda m: (
        m.w.set_metadata(tag="t"),
        m.w.set_value(m.w + 1),
    )[0],
    "everything at once": lambda m: (
        m.w.set_value(m.w + 1),
        m.tied.append(m.layer),
        setattr(m, "layer", Linear(2, 2, seed=9)),
        setattr(m, "raw", m.raw - 1),
        setattr(m, "rate", 1),
    )[0],
}


@through
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_inside_a_transform_is_the_edit_made_plainly(
    edit: Any, transform: Any
) -> None:
    plain, live = model(), model()
    edit(plain)
    parts = dict(objects(live))
    f = transform(edit)
    f(live)
    assert portrait(live) == portrait(plain)
    assert not has_tracer(live)
    kept = {i for i, x in objects(live).items() if parts.get(i) is x}
    expected = model()
    before = dict(objects(expected))
    edit(expected)
    stayed = {i for i, x in objects(expected).items() if before.get(i) is x}
    mutable = lambda ids, of: [i for i in ids if not isinstance(of[i], tuple)]  # noqa: E731
    assert len(mutable(kept, parts)) == len(mutable(stayed, before))


@through
@pytest.mark.parametrize("name", ["a new attribute", "sow", "a list grown", "metadata"])
def test_an_edit_made_twice_through_one_transform(name: str, transform: Any) -> None:
    plain, live = model(), model()
    f = transform(EDITS[name])
    for _ in range(3):
        EDITS[name](plain)
        f(live)
        assert portrait(live) == portrait(plain)


@given(models())
def test_a_model_goes_through_jit_unharmed(random: Any) -> None:
    with untouched(random):
        assert sortal.jit(lambda m: m)(random) is random


@given(models())
def test_a_copy_made_inside_is_equal_and_apart(random: Any) -> None:
    made = sortal.jit(sortal.clone)(random)
    as_jax = jax.tree.map(jnp.asarray, random)
    assert portrait(jax.tree.map(jnp.asarray, made)) == portrait(as_jax)
    mutable = {i for i, x in objects(made).items() if not isinstance(x, tuple)}
    assert not mutable & objects(random).keys()


# ---------------------------------------------------------------------- identity
@through
def test_an_output_that_came_in_is_the_very_same_object(transform: Any) -> None:
    live = model()
    out = transform(lambda m: {"all": m, "part": [m.layer, (m.layer.kernel, m.tied)]})
    result = out(live)
    assert result["all"] is live
    assert result["part"][0] is live.layer
    assert result["part"][1][0] is live.layer.kernel
    assert result["part"][1][1][0] is live.w


@through
def test_a_new_output_holds_the_live_objects_that_it_refers_to(transform: Any) -> None:
    live = model()
    made = transform(lambda m: Holder(inner=m.layer, own=Param(m.w * 2)))(live)
    assert made.inner is live.layer
    assert type(made.own) is Param
    assert made.own[0] == 2
    made.own[...] = 0.0
    assert not hasattr(live, "own")


def test_a_new_object_returned_and_attached_is_one_object() -> None:
    live = model()

    @sortal.jit
    def attach(m: Any) -> Any:
        m.extra = Linear(1, 1)
        return m.extra, m.extra.kernel

    extra, kernel = attach(live)
    assert extra is live.extra
    assert kernel is extra.kernel


def test_functions_may_build_models_from_nothing() -> None:
    made = sortal.jit(lambda seed: Linear(2, 3))(0)
    np.testing.assert_array_equal(made.kernel.value, Linear(2, 3).kernel.value)
    made.kernel[...] = 0.0
    one, two = sortal.jit(lambda: [Linear(1, 1)] * 2)()
    assert one is two


# ----------------------------------------------------------------------- sharing
@pytest.mark.parametrize("transform", [sortal.jit, sortal.remat])
def test_what_arguments_share_is_one_inside(transform: Any) -> None:
    live = Net()
    trainer = Holder(model=live, step=Count(jnp.array(0)))

    def f(trainer: Any, model: Any, again: Any, *, kernel: Any) -> Any:
        assert trainer.model is model
        assert model is again
        assert kernel[0] is model.layers[0].kernel
        model.calls[...] += 1
        trainer.model.calls[...] += 1
        again.norm.mean[...] = 3.0
        kernel[0][...] = 2.0
        return kernel[0], again

    kernel, again = transform(f)(trainer, live, live, kernel=[live.layers[0].kernel])
    assert kernel is live.layers[0].kernel
    assert again is live
    assert int(live.calls.value) == 2
    assert live.norm.mean[0] == 3
    assert live.layers[0].kernel[0, 0] == 2
    assert trainer.model is live


def test_a_part_and_its_whole_are_linked_in_either_order() -> None:
    for order in (lambda m: (m.norm, m), lambda m: (m, m.norm)):
        live = Net()

        def f(a: Any, b: Any) -> None:
            whole, part = (a, b) if isinstance(a, Net) else (b, a)
            assert whole.norm is part
            part.mean[...] += 1

        sortal.jit(f)(*order(live))
        assert live.norm.mean[0] == 1


def test_a_changed_sharing_between_arguments_is_noticed() -> None:
    f = sortal.jit(lambda a, b: a.w is b.w)
    a, b = Holder(w=Param(jnp.ones(1))), Holder(w=Param(jnp.ones(1)))
    assert not f(a, b)
    b.w = a.w
    assert f(a, b)
    b.w = Param(jnp.ones(1))
    assert not f(a, b)


def test_writes_that_alternate_between_arguments_reach_their_own() -> None:
    """Leaves of shared parts are numbered by the first argument that reaches them."""
    inner = Holder(w=Param(jnp.zeros(1)))
    a, b = Holder(x=inner, z=Param(jnp.zeros(1))), Holder(w=Param(jnp.zeros(1)))
    both = Holder(a=Holder(m=b), b=inner, c=Param(jnp.zeros(1)))

    @sortal.jit
    def f(inner: Any, both: Any, a: Any) -> None:
        for n, v in enumerate([inner.w, both.a.m.w, both.c, a.z], 1):
            v.value = v.value + n

    f(inner, both, a)
    assert [float(v[0]) for v in (inner.w, b.w, both.c, a.z)] == [1, 2, 3, 4]


def test_very_many_pairs_of_models_stay_apart() -> None:
    f = sortal.jit(lambda a, b: (a.w.set_value(a.w + 1), b.w.set_value(b.w + 2))[0])
    pairs = [
        (Holder(w=Param(jnp.zeros(()))), Holder(w=Param(jnp.zeros(()))))
        for _ in range(300)
    ]
    for _ in range(2):
        for a, b in pairs:
            f(a, b)
    assert {(float(a.w.value), float(b.w.value)) for a, b in pairs} == {(2, 4)}


def test_raw_arrays_of_a_shared_module_are_one_inside() -> None:
    live = model()

    def f(a: Any, b: Any) -> None:
        a.raw = a.raw + 1
        b.raw = b.raw + 1

    sortal.jit(f)(live, live)
    assert live.raw[0] == 2


def test_modules_anywhere_in_pytrees_of_arguments_are_found() -> None:
    a, b = Linear(1, 1), Linear(1, 1)

    @sortal.jit
    def f(tree: Any, *rest: Any, **named: Any) -> Any:
        tree["x"][0].bias[...] = rest[0]
        named["deep"][1]["y"].bias[...] = 9.0
        return tree

    out = f({"x": (a, 3)}, jnp.array(5.0), deep=[None, {"y": b}])
    assert out["x"][0] is a
    assert (a.bias[0], b.bias[0]) == (5, 9)


def test_variables_and_states_are_arguments_too() -> None:
    live = Net()
    count = live.calls

    @sortal.jit
    def f(count: Any, state: Any) -> Any:
        count[...] += 1
        state["norm"]["mean"].value = state["norm"]["mean"].value + 4
        return state

    before = sortal.state(live)
    after = f(count, before)
    assert int(count.value) == 1
    assert isinstance(after, sortal.State)
    assert after["norm"]["mean"][0] == 4
    assert before["norm"]["mean"][0] == 0
    assert f(count=count, state=after)["norm"]["mean"][0] == 8


# ---------------------------------------------------------------- never happens
class Stop(Exception):  # noqa: N818
    """Raised on purpose."""


@through
def test_an_exception_inside_leaves_the_live_model_untouched(transform: Any) -> None:
    live = model()

    def fail(m: Any) -> None:
        m.w[...] = 9.0
        m.layer = Linear(1, 1)
        m.tied.append(1)
        m.new = m.w
        m.w.set_metadata(tag="t")
        raise Stop

    with untouched(live), pytest.raises(Stop):
        transform(fail)(live)
    assert not has_tracer(live)


OUTSIDE: dict[str, Callable[[Any, Any], Any]] = {
    "value": lambda m, x: setattr(m.layer.kernel, "value", x),
    "part": lambda m, x: m.layer.kernel.__setitem__(0, x),
    "set_value": lambda m, x: m.layer.kernel.set_value(x),
    "update": lambda m, x: sortal.update(m, {"layer": {"kernel": x}}),
    "metadata": lambda m, x: m.layer.kernel.set_metadata(tag="t"),
    "pop": lambda m, x: sortal.pop(m.layer, Param),
    "inner jit": lambda m, x: sortal.jit(
        lambda m, x: m.layer.kernel.__setitem__(..., m.layer.kernel * x[0, 0])
    )(m, x),
    "inner grad": lambda m, x: sortal.grad(
        lambda m: (m.layer.kernel.set_value(m.layer.kernel * x), m.w[...].sum())[1]
    )(m),
    "inner remat": lambda m, x: sortal.remat(
        lambda m: m.layer.kernel.set_value(m.layer.kernel * x)
    )(m),
}
JAX: dict[str, Callable[[Any], Any]] = {
    "sortal.jit": lambda f: sortal.jit(f)(jnp.ones((2, 2))),
    "jax.jit": lambda f: jax.jit(f)(jnp.ones((2, 2))),
    "jax.vmap": lambda f: jax.vmap(f)(jnp.ones((3, 2, 2))),
    "jax.grad": lambda f: jax.grad(lambda x: (f(x), x.sum())[1])(jnp.ones((2, 2))),
    "jax.eval_shape": lambda f: jax.eval_shape(f, jnp.ones((2, 2))),
    "jax.lax.scan": lambda f: jax.lax.scan(
        lambda c, x: (f(x), (c, None))[1], 0, jnp.ones((3, 2, 2))
    ),
}


def pairs(inner: Any, outer: Any) -> Any:
    """Each inner thing in ``jax.jit``, and the first in each outer thing."""
    first = next(iter(inner))
    return [(name, "jax.jit") for name in inner] + [
        (first, name) for name in outer if name != "jax.jit"
    ]


@pytest.mark.parametrize(("name", "around"), pairs(OUTSIDE, JAX))
def test_a_write_to_a_closed_over_model_is_refused_naming_path_and_kind(
    name: str, around: str
) -> None:
    live = model()
    with untouched(live), pytest.raises(TraceError) as e:
        JAX[around](lambda x: OUTSIDE[name](live, x))
    assert "layer.kernel (Param)" in str(e.value)
    assert "Pass the object that holds it as an argument" in str(e.value)
    assert not has_tracer(live)


def test_a_closed_over_model_may_be_read() -> None:
    live = Linear(2, 2)
    x = jnp.ones((1, 2))
    expected = np.asarray(x) @ np.asarray(live.kernel.value)
    for transform in (jax.jit, sortal.jit, jax.vmap):
        np.testing.assert_allclose(transform(live)(x), expected, rtol=1e-6)


OUTSIDE_EDITS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "attribute": (lambda m, x: setattr(m.layer, "y", x), "layer.y (of a Linear)"),
    "sow": (
        lambda m, x: m.layer.sow(sortal.Intermediate, "y", x),
        "layer.y (of a Linear)",
    ),
    "raw array": (lambda m, x: setattr(m, "raw", x), "raw (of a Holder)"),
    "static": (lambda m, x: setattr(m, "rate", 0), "rate (of a Holder)"),
    "delete": (lambda m, x: delattr(m, "rate"), "rate (of a Holder)"),
    "update": (lambda m, x: sortal.update(m, {"raw": x}), "raw (unlabelled array)"),
    "inner raw array": (
        lambda m, x: sortal.jit(lambda m, x: setattr(m, "raw", x))(m, x),
        "raw (unlabelled array)",
    ),
    "inner raw array in a list": (
        lambda m, x: sortal.jit(lambda m, x: m.more.__setitem__(0, x))(m, x),
        "more.0 (unlabelled array)",
    ),
    "inner sow": (
        lambda m, x: sortal.jit(
            lambda m, x: m.layer.sow(sortal.Intermediate, "y", x) and None
        )(m, x),
        "layer (Linear)",
    ),
    "inner list": (
        lambda m, x: sortal.jit(lambda m, x: m.more.append(x))(m, x),
        "(Holder)",
    ),
    "inner metadata": (
        lambda m, x: sortal.remat(lambda m: m.layer.bias.set_metadata(tag="t"))(m),
        "layer.bias (Param)",
    ),
}


@pytest.mark.parametrize(("name", "around"), pairs(OUTSIDE_EDITS, JAX))
def test_an_edit_of_a_closed_over_model_is_refused_and_leaks_no_tracer(
    name: str, around: str
) -> None:
    live = model()
    live.more = [jnp.zeros(2)]
    edit, place = OUTSIDE_EDITS[name]
    with untouched(live), pytest.raises(TraceError) as e:
        JAX[around](lambda x: edit(live, x[0]))
    assert place in str(e.value)
    assert not has_tracer(live)


def test_a_failed_write_back_writes_neither_values_nor_edits() -> None:
    live, own = model(), []

    def f(m: Any, other: Any, x: Any) -> None:
        other.bias[...] = x
        m.w[...] = x
        m.new = Param(x + 1)

    def outer(x: Any) -> Any:
        own.append(Linear(2, 2))
        sortal.jit(f)(live, own[0], x)

    with untouched(live), pytest.raises(TraceError, match="Holder"):
        jax.jit(outer)(jnp.ones(2))
    assert portrait(own[0].kernel) == portrait(Linear(2, 2).kernel)


@pytest.mark.parametrize("transform", [sortal.jit, sortal.remat])
def test_two_threads_call_one_function_on_models_of_their_own(transform: Any) -> None:
    barrier = threading.Barrier(4, timeout=60)

    def slow(m: Any, x: Any) -> Any:
        m.calls[...] += 1
        barrier.wait()  # every thread is inside its trace at once
        m.norm.mean[...] = m.norm.mean + x
        return m

    nets = [Net(i) for i in range(4)]
    for i, net in enumerate(nets):
        net.rate = i  # so that each thread traces for itself
    errors: list[BaseException] = []
    f = transform(slow)

    def call(i: int) -> None:
        try:
            assert f(nets[i], float(i)) is nets[i]
        except BaseException as e:  # noqa: BLE001
            errors.append(e)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    for i, net in enumerate(nets):
        assert int(net.calls.value) == 1
        assert net.norm.mean[0] == i
        assert not has_tracer(net)


def test_threads_race_on_a_compiled_function_without_mixing_models() -> None:
    f = sortal.jit(lambda m, x: m.norm.mean.set_value(m.norm.mean + x))
    nets = [Net(i) for i in range(2)]
    f(Net(), 0.0)

    def call(i: int) -> None:
        for _ in range(100):
            f(nets[i], float(i + 1))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [float(n.norm.mean[0]) for n in nets] == [100, 200]


# -------------------------------------------------------------------- the function
def test_threads_that_bind_many_pairs_of_models_get_their_own_values() -> None:
    """More pairs than are remembered, so that all threads make room all the time."""
    models = [Holder(w=Param(float(k))) for k in range(40)]
    errors: list[Any] = []

    def call(first: int) -> None:
        try:
            for i in [*range(40)] * 6:
                for j in range(first, 40):
                    bound = binding.BoundArguments((models[i], models[j]), {})
                    given = [x.values for x in bound.args]
                    assert given == [[i], [j] if i != j else []]
        except BaseException as e:  # noqa: BLE001 - a thread must not swallow it
            errors.append(e)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors


# A container in itself, taken apart by JAX, uses up Python's stack for ever.


def stack_is_whole() -> bool:
    nested: list[Any] = []
    for _ in range(200):
        nested = [nested]
    return len(repr(nested)) > 200


def test_an_object_set_into_itself_and_returned_can_be_passed_again() -> None:
    m = Holder(ref=nnx.data(None), w=Param(jnp.ones(2)))

    @sortal.jit
    def f(m: Any) -> Any:
        m.ref = m
        return m

    for _ in range(3):
        assert f(m) is m
        assert m.ref is m
    assert stack_is_whole()


def test_what_holds_itself_never_reaches_jax() -> None:
    m = Holder(w=Param(jnp.ones(2)), list=[], pair=())
    m.list.append(m.list)
    m.pair = (m, m.list)
    assert sortal.jit(lambda m: (m.w * 2, m))(m)[1] is m
    inside = [jnp.ones(1)]
    inside.append(inside)
    with pytest.raises(RecursionError):
        sortal.jit(lambda x: x[0])(inside)

    def returns(x: Any) -> Any:
        inside: list[Any] = [x]
        inside.append(inside)
        return inside

    with pytest.raises(RecursionError):
        sortal.jit(returns)(jnp.ones(1))
    assert stack_is_whole()


@pytest.mark.parametrize("value", [lambda m: m, lambda m: [m], lambda m: Holder(v=m)])
def test_an_object_in_the_value_of_its_own_variable_is_refused(value: Any) -> None:
    m = Holder(w=Param(jnp.ones(2)))
    m.v = Count(jnp.ones(1))
    m.v.value = value(m)
    for call in (sortal.jit(lambda m: m.w * 2), jax.tree.leaves):
        if type(value(m)) is Holder and value(m) is not m:
            m.v.value = Holder(v=Count([m]))
        with pytest.raises(StructureError, match=r"v \(Count\)"):
            call(m)
    assert stack_is_whole()


@pytest.mark.parametrize("where", ["root", "child"])
def test_what_a_trace_adds_to_an_empty_module_is_seen_by_plans_made_before(where):
    model = sortal.Module()
    if where == "child":
        model.child = sortal.Module()
    assert sortal.state(model).paths() == ()

    def add(model):
        holder = model if where == "root" else model.child
        holder.w = sortal.Param(jnp.ones(2))

    sortal.jit(add)(model)
    expected = ("w",) if where == "root" else ("child", "w")
    assert sortal.state(model).paths() == (expected,)


def test_a_class_that_is_changed_inside_a_trace_is_changed_outside() -> None:
    class Other(Holder):
        pass

    m = Holder(w=Param(jnp.ones(2)), child=Holder(w=Param(jnp.ones(2))))

    @sortal.jit
    def f(m: Any) -> None:
        m.child.__class__ = Other
        m.__class__ = Other

    f(m)
    assert (type(m), type(m.child)) == (Other, Other)
    f(m)
    assert sortal.state(m).paths() == (("child", "w"), ("w",))


def test_what_is_known_of_several_roots_goes_with_them() -> None:
    """A static may lead to its model, which nothing here may keep alive."""

    class Scaled(sortal.Module):
        def __init__(self) -> None:
            self.w = Param(jnp.ones(2))
            self.act = lambda x: x * self.w

    def used() -> Any:
        model = Scaled()
        assert binding.BoundArguments((model, Net()), {}).alias_map.definitions
        return weakref.ref(model)

    model = used()
    gc.collect()
    assert model() is None
