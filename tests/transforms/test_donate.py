"""Donation by kind: whose buffers go, whose stay, and what a call must not lose."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import sortal
from models import Count, Holder, Linear, Net, Norm, has_tracer, portrait
from sortal import At, BatchStat, Cache, Dtyped, OptState, Param, Variable
from sortal.errors import FilterError, StaleBufferError, TraceError


def buffers(m: Any) -> dict[str, jax.Array]:
    """Every array of a model by path, found by hand."""
    found = {}

    def visit(x: Any, path: str) -> None:
        if isinstance(x, Variable):
            x = x.value
        if isinstance(x, jax.Array):
            found[path] = x
        elif isinstance(x, (list, tuple, dict)):
            for k, v in x.items() if isinstance(x, dict) else enumerate(x):
                visit(v, f"{path}.{k}")
        elif isinstance(x, sortal.Pytree):
            for k, v in vars(x).items():
                visit(v, f"{path}.{k}")

    visit(m, "")
    return found


def gone(old: dict[str, jax.Array]) -> set[str]:
    return {path.strip(".") for path, x in old.items() if x.is_deleted()}


KERNELS = {"layers.0.kernel", "layers.1.kernel"}
PARAMS = KERNELS | {"layers.0.bias", "layers.1.bias", "norm.scale"}


# ------------------------------------------------------------------------- by filter
@pytest.mark.parametrize(
    ("donate", "expected"),
    [
        (Param, PARAMS),
        (At("layers.*.kernel"), KERNELS),
        (Param | BatchStat, PARAMS | {"norm.mean"}),
        ((BatchStat, Count), {"norm.mean", "calls"}),
        (Dtyped(jnp.integer), {"calls"}),
        (lambda path, leaf: path[-1] == "bias", {"layers.0.bias", "layers.1.bias"}),
        (..., PARAMS | {"norm.mean", "calls"}),
    ],
    ids=["kind", "path", "union", "several", "dtype", "function", "all"],
)
def test_the_leaves_that_a_filter_takes_and_no_others_are_donated(
    donate: Any, expected: set[str]
) -> None:
    net, x = Net(), jnp.ones((2, 3))
    twin = Net()
    f = sortal.jit(lambda m, x: m(x), donate=donate)
    for _ in range(2):
        old = buffers(net)
        y, by_twin = f(net, x), twin(x)
        assert gone(old) == expected
        np.testing.assert_allclose(y, by_twin, rtol=1e-6)
    np.testing.assert_allclose(net.norm.mean.value, twin.norm.mean.value, rtol=1e-6)
    assert portrait(net.layers) == portrait(twin.layers)
    assert int(net.calls.value) == 2
    assert not has_tracer(net)
    assert not x.is_deleted()


def test_what_is_not_donated_and_only_read_keeps_its_very_array() -> None:
    net = Net()
    mean = net.norm.mean.value
    sortal.jit(lambda m: None, donate=Param)(net)
    assert net.norm.mean.value is mean


@pytest.mark.parametrize("options", [{"donate": False}, {"donate": None}, {}])
def test_nothing_is_donated_unasked(options: Any) -> None:
    net, x = Net(), jnp.ones((2, 3))
    old = buffers(net)
    sortal.jit(lambda m, x: m(x), **options)(net, x)
    assert gone(old) == set()


def test_memory_is_reused_to_the_byte() -> None:
    net = Net()
    f = sortal.jit(lambda m: m.calls.set_value(m.calls + 1), donate=At("**.kernel"))
    by_hand = 4 * (3 * 4 + 4 * 2)  # float32
    analysis = f.lower(net).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == by_hand
    plain = sortal.jit(lambda m: m.calls.set_value(m.calls + 1))
    assert plain.lower(net).compile().memory_analysis().alias_size_in_bytes == 0


def test_a_large_cache_is_updated_where_it_is() -> None:
    m = Holder(
        cache=Cache(jnp.zeros((64, 128))), w=Param(jnp.ones(128)), raw=jnp.ones(2)
    )

    def put(m: Any, i: Any) -> None:
        m.cache[...] = m.cache.value.at[i].set(m.w.value)

    f = sortal.jit(put, donate=Cache)
    where = m.cache.value.unsafe_buffer_pointer()
    for i in range(3):
        f(m, i)
        assert m.cache.value.unsafe_buffer_pointer() == where
    np.testing.assert_array_equal(m.cache.value.sum(1)[:4], [128, 128, 128, 0])


def test_a_training_step_by_kind_has_the_numbers_of_optax_by_hand() -> None:
    net, x = Linear(3, 2), jnp.arange(6.0).reshape(2, 3)
    tx = optax.adam(0.1)
    params = {"b": net.bias.value + 0, "k": net.kernel.value + 0}
    opt = sortal.Optimizer(net, tx, wrt=Param)

    @sortal.jit(donate=Param | OptState)
    def step(m: Any, opt: Any, x: Any) -> None:
        opt.update(m, sortal.grad(lambda m: (m(x) ** 2).sum())(m))

    state = tx.init(params)
    for _ in range(3):
        old = buffers(net)
        step(net, opt, x)
        assert gone(old) == {"kernel", "bias"}
        grads = jax.grad(lambda p: ((x @ p["k"] + p["b"]) ** 2).sum())(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(net.kernel.value, params["k"], rtol=1e-5)
    np.testing.assert_allclose(net.bias.value, params["b"], rtol=1e-5)


def test_a_path_counts_from_each_argument_also_for_what_they_share() -> None:
    layer = Linear(2, 2)
    outer = Holder(inner=layer)
    for args in [(outer, layer), (layer, outer)]:
        old = layer.kernel.value, layer.bias.value
        sortal.jit(lambda a, b: None, donate=At("inner.kernel"))(*args)
        assert [x.is_deleted() for x in old] == [True, False]


def test_roots_in_containers_and_keywords_are_found() -> None:
    a, b, c = Linear(1, 1), Param(jnp.ones(2)), Linear(1, 1, 1)
    x = jnp.ones(2)
    f = sortal.jit(lambda d, *, c: d["x"] + d["m"][0].bias, donate=Param)
    y = f({"m": [a, b], "x": x}, c=c)
    np.testing.assert_array_equal(y, [1, 1])
    np.testing.assert_array_equal(b.value, [1, 1])
    assert not x.is_deleted()
    for array in (a.bias.value, c.kernel.value):
        assert not array.is_deleted()


def test_static_and_donated_arguments_keep_their_positions() -> None:
    def f(m: Any, x: Any, n: int, *, mode: str) -> Any:
        m.bias[...] = m.bias + n
        return (x * n, mode == "a")

    x, m = jnp.ones(2), Linear(2, 2)
    old = buffers(m)
    options = {"static_argnums": (2,), "static_argnames": ("mode",)}
    g = sortal.jit(f, donate=At("bias"), donate_argnums=1, **options)
    y, is_a = g(m, x, 3, mode="a")
    np.testing.assert_array_equal(y, [3, 3])
    assert bool(is_a)
    assert x.is_deleted()
    assert gone(old) == {"bias"}
    h = sortal.jit(f, donate=True, static_argnames=("n", "mode"))
    assert float(h(m, jnp.ones(1), n=2, mode="b")[0][0]) == 2
    np.testing.assert_array_equal(m.bias.value, [5, 5])


def test_methods_and_filters_go_together() -> None:
    norm, x = Norm(3), jnp.ones((2, 3))
    old = buffers(norm)
    sortal.jit(norm.__call__, donate=BatchStat, donate_argnums=0)(x)
    assert gone(old) == {"mean"}
    assert x.is_deleted()
    np.testing.assert_allclose(norm.mean.value, [0.1] * 3)


def test_a_filter_and_a_donated_argument_add_up() -> None:
    a, b = Linear(2, 2), Linear(2, 2, 1)
    old_a, old_b = buffers(a), buffers(b)
    sortal.jit(lambda a, b: None, donate=At("bias"), donate_argnames="b")(a, b)
    assert gone(old_a) == {"bias"}
    assert gone(old_b) == {"bias", "kernel"}


def test_raw_arrays_in_objects_lists_and_tuples_can_be_donated() -> None:
    m = Holder(raw=jnp.ones(2), pair=(jnp.zeros(3), 1), items=[jnp.full(4, 2.0)])
    f = sortal.jit(lambda m: None, donate=...)
    for _ in range(2):
        f(m)
        assert [float(x[0]) for x in (m.raw, m.pair[0], m.items[0])] == [1, 0, 2]


def test_structure_edits_and_donation_go_together() -> None:
    m = Linear(2, 2)

    def edit(m: Any) -> None:
        m.more = Cache(m.bias + 1)
        del m.kernel

    old = buffers(m)
    sortal.jit(edit, donate=At("bias"))(m)
    assert gone(old) == {"bias"}
    np.testing.assert_array_equal(m.bias.value, [0, 0])
    np.testing.assert_array_equal(m.more.value, [1, 1])
    assert not hasattr(m, "kernel")


def test_shardings_by_argument_hold_for_donated_leaves_too() -> None:
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("i"))
    every = NamedSharding(mesh, PartitionSpec())
    m = Holder(w=Param(jax.device_put(jnp.ones((4, 2)), rows)), b=Cache(jnp.ones(4)))
    f = sortal.jit(
        lambda m, d: m.w.set_value(m.w * d["x"].sum()),
        donate=Param,
        in_shardings=(rows, {"x": every}),
    )
    f(m, {"x": jnp.ones(4)})
    assert m.w.value.sharding.is_equivalent_to(rows, 2)
    np.testing.assert_array_equal(m.w.value, np.full((4, 2), 4))
    assert m.b.value.sharding.is_equivalent_to(rows, 1)


# ------------------------------------------------------------------- one buffer twice
def test_one_buffer_in_two_donated_leaves_is_copied() -> None:
    array = jnp.ones(3)
    m = Holder(a=Param(array), b=Param(array))
    sortal.jit(lambda m: m.a.set_value(m.a + 1), donate=Param)(m)
    assert (m.a[0], m.b[0]) == (2, 1)
    assert array.is_deleted()


@pytest.mark.parametrize("donate", [Param, True])
def test_a_buffer_that_also_stays_survives(donate: Any) -> None:
    array = jnp.ones(3)
    m = Holder(a=Param(array), b=Cache(array))
    y = sortal.jit(lambda m, x: m.a.set_value(m.a + x), donate=donate)(m, array)
    assert (m.a[0], m.b[0], array[0], y) == (2, 1, 1, None)
    assert m.b.value is array


# ----------------------------------------------------------------------- overwritten
def test_an_array_that_is_donated_and_in_a_model_too_is_copied() -> None:
    def add(m: Any, x: Any, *, state: Any) -> Any:
        m.bias[...] = m.bias + x + state["bias"][...]
        return x * 2, state

    m = Linear(2, 2)
    for donate in (None, True, Param):
        m.bias.value = jnp.ones(2)
        x, state = m.bias.value, sortal.state(m)
        f = sortal.jit(add, donate=donate, donate_argnames=("x", "state"))
        np.testing.assert_array_equal(f(m, x, state=state)[0], [2, 2])
        np.testing.assert_array_equal(m.bias.value, [3, 3])
        assert not gone(buffers(m))


def test_true_donates_what_is_overwritten_and_returns_no_more() -> None:
    net, x = Net(), jnp.ones((2, 3))
    f = sortal.jit(lambda m, x: m(x), donate=True)
    for _ in range(2):
        old = buffers(net)
        f(net, x)
        assert gone(old) == {"calls", "norm.mean"}
    assert len(f.trace(net, x).jaxpr.out_avals) == 3
    net.eval()
    old = buffers(net)
    f(net, x)
    assert gone(old) == {"calls"}


def test_true_works_before_the_first_call_and_where_nothing_is_written() -> None:
    net, x = Net(), jnp.ones((2, 3))
    f = sortal.jit(lambda m, x: m(x), donate=True)
    analysis = f.lower(net, x).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == 4 + 4 * 4  # calls, norm.mean
    assert int(net.calls.value) == 0
    reader = sortal.jit(lambda m, x: m.layers[0](x), donate=True)
    old = buffers(net)
    reader(net, x)
    assert gone(old) == set()
    assert float(sortal.jit(lambda x: x + 1, donate=True)(1.0)) == 2


def test_true_traces_twice_at_first_and_then_no_more() -> None:
    traces = []

    def f(m: Any, n: int) -> None:
        traces.append(n)
        m.bias[...] = m.bias + n

    g, m = sortal.jit(f, donate=True, static_argnums=1), Linear(2, 2)
    for _ in range(3):
        g(m, 1)
    assert traces == [1, 1]
    g(m, 2)
    assert traces == [1, 1, 2, 2]
    np.testing.assert_array_equal(m.bias.value, [5, 5])


def test_true_tells_apart_shapes_that_decide_what_is_overwritten() -> None:
    traces = []

    def f(m: Any, x: Any) -> None:
        traces.append(x.shape)
        target = m.kernel if x.shape == (1,) else m.bias
        target[...] = target + 1

    g, m = sortal.jit(f, donate=True), Linear(2, 2)
    for n in [1, 2, 1, 2, 1, 2]:
        old = buffers(m)
        g(m, jnp.ones(n))
        assert gone(old) == {"kernel" if n == 1 else "bias"}
    settled = len(traces)
    for n in [1, 2, 1, 2]:
        g(m, jnp.ones(n))
    assert len(traces) == settled
    np.testing.assert_array_equal(m.bias.value, [5, 5])


def test_true_with_a_donated_argument_returns_all_of_that_one() -> None:
    a, b = Linear(2, 2), Linear(2, 2, 1)
    f = sortal.jit(
        lambda a, b: b.bias.set_value(b.bias + 1), donate=True, donate_argnums=0
    )
    for _ in range(2):
        old_a, old_b = buffers(a), buffers(b)
        f(a, b)
        assert gone(old_a) == {"bias", "kernel"}
        assert gone(old_b) == {"bias"}


def test_true_loses_nothing_where_each_trace_writes_elsewhere() -> None:
    turn = []

    def f(m: Any) -> None:
        turn.append(None)
        leaf = [m.kernel, m.bias][len(turn) % 2]
        leaf[...] = leaf + 1

    m, expected = Linear(2, 2), Linear(2, 2)
    sortal.jit(f, donate=True)(m)  # found in the first trace, called in the second
    expected.kernel[...] = expected.kernel + 1
    assert portrait(m) == portrait(expected)


def test_finding_what_is_overwritten_runs_nothing() -> None:
    printed = []

    def f(m: Any) -> None:
        jax.debug.callback(printed.append, m.bias.sum())
        m.bias[...] = m.bias + 1

    m = Linear(2, 2)
    for _ in range(2):
        sortal.jit(f, donate=True)(m)
    jax.effects_barrier()
    assert len(printed) == 2


def test_true_lowers_for_shapes_alone() -> None:
    f = sortal.jit(lambda m: m.bias.set_value(m.bias + 1), donate=True)
    shapes = sortal.eval_shape(lambda: Linear(2, 2))
    memory = f.lower(shapes).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 2 * 4


def test_an_exception_in_the_function_donates_nothing() -> None:
    def fail(m: Any) -> None:
        m.bias[...] = m.bias + 1
        raise ValueError("my own")

    m = Linear(2, 2)
    before = portrait(m)
    for donate in (True, Param):
        with pytest.raises(ValueError, match=r"^my own"):
            sortal.jit(fail, donate=donate)(m)
        assert portrait(m) == before


def test_clear_cache_forgets_what_was_learned() -> None:
    traces = []

    def f(m: Any) -> None:
        traces.append(None)
        m.bias[...] = m.bias + 1

    g, m = sortal.jit(f, donate=True), Linear(1, 1)
    g(m)
    g.clear_cache()
    g(m)
    assert len(traces) == 4


# --------------------------------------------------------------------------- refusals
def test_a_buffer_given_away_by_kind_is_reported_by_path_and_kind_later() -> None:
    net = Net()
    twin, state = sortal.clone(net), sortal.state(net)
    f = sortal.jit(lambda m: None, donate=At("layers.*.bias"))
    f(net)
    with pytest.raises(StaleBufferError) as e:
        f(twin)
    text = str(e.value)
    assert text.startswith("2 leaves hold buffers that were donated")
    assert "layers.0.bias" in text
    assert "layers.1.bias" in text
    assert "kernel" not in text
    with pytest.raises(StaleBufferError, match=r"layers\.0\.bias \(Param\)"):
        sortal.update(net, state)
    sortal.jit(lambda m: m.layers[0].bias + 1)(net)


def test_a_filter_that_takes_nothing_is_refused_with_what_there_is() -> None:
    f = sortal.jit(lambda a, b: None, donate=Cache)
    a, b = Linear(1, 1), Holder(raw=jnp.ones(1))
    for _ in range(2):
        with pytest.raises(FilterError) as e:
            f(a, b)
        assert str(e.value) == (
            "donate=Cache takes no leaf of any argument; there are:\n"
            "  bias (Param)\n"
            "  kernel (Param)\n"
            "  raw (unlabelled array)\n"
            "Name a kind that is there, or leave donate out."
        )
    f(a, Holder(c=Cache(jnp.ones(1))))


def test_a_filter_without_any_module_is_refused() -> None:
    with pytest.raises(
        FilterError, match=r"donate=Param: there is no Module .* donate_"
    ):
        sortal.jit(lambda x: x, donate=Param)(jnp.ones(1))


def test_what_is_no_filter_is_refused_before_any_call() -> None:
    with pytest.raises(FilterError, match="0 \\(int\\) is not a filter"):
        sortal.jit(lambda m: m, donate=0)


# ---------------------------------------------------------------------------- nesting
def test_inside_another_trace_donation_changes_no_number() -> None:
    m = Linear(2, 2)
    inner = sortal.jit(lambda m: m.bias.set_value(m.bias + 1), donate=True)
    by_kind = sortal.jit(lambda m: m.bias.set_value(m.bias + 1), donate=Param)

    @sortal.jit
    def outer(m: Any) -> Any:
        inner(m)
        by_kind(m)
        return m.bias + 0

    kernel = m.kernel.value
    np.testing.assert_array_equal(outer(m), [2, 2])
    np.testing.assert_array_equal(m.bias.value, [2, 2])
    assert not kernel.is_deleted()


@pytest.mark.parametrize("options", [{"donate_argnums": 0}, {"donate": Param}])
def test_a_call_that_is_differentiated_gives_no_buffer_away(options: Any) -> None:
    model = sortal.BatchNorm(3, rngs=sortal.Rngs(0))
    x = jnp.arange(6.0).reshape(2, 3)
    call = sortal.jit(lambda m, x: (m(x) ** 2).sum(), **options)
    first = sortal.grad(lambda m: call(m, x))(model)
    again = sortal.grad(lambda m: call(m, x))(model)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(model))

    def by_hand(scale: Any) -> Any:
        y = (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + model.epsilon)
        return ((y * scale) ** 2).sum()

    slope = jax.grad(by_hand)(model.scale.value)
    for grads in (first, again):
        assert jnp.allclose(grads["scale"].value, slope, atol=1e-5)


GIVEN = [{"donate_argnums": 0}, {"donate": Param}, {"donate": True}]


def read(m: Any, x: Any) -> Any:
    return (x * m.kernel).sum() + m.bias.sum()


def write(m: Any, x: Any) -> Any:
    m.bias[...] = m.bias + 1
    return read(m, x)


@pytest.mark.parametrize("options", GIVEN)
@pytest.mark.parametrize(
    "within",
    [
        lambda f, m, x: jax.vmap(lambda x: f(m, x))(x),
        lambda f, m, x: jax.grad(lambda x: f(m, x))(x),
        lambda f, m, x: jax.jvp(lambda x: f(m, x), (x,), (x,)),
        lambda f, m, x: jax.jit(lambda x: f(m, x))(x),
        lambda f, m, x: sortal.grad(f, argnums=1)(m, x),
    ],
    ids=["vmap", "grad", "jvp", "jit", "as an argument"],
)
def test_inside_another_transform_a_model_keeps_its_buffers(
    within: Any, options: Any
) -> None:
    """JAX donates there too, though no write comes back, or it returns what is gone."""
    m, x = Linear(2, 2), jnp.ones((2, 2))
    old = buffers(m)
    found = within(sortal.jit(read, **options), m, x)
    assert not gone(old | buffers(m))
    expected = within(read, Linear(2, 2), x)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, expected))

    m = Linear(2, 2)
    old = buffers(m)
    try:
        within(sortal.jit(write, **options), m, x)
    except TraceError:
        assert all(buffers(m)[path] is x for path, x in old.items())
    assert not gone(old | buffers(m))


def test_inside_another_transform_a_filter_that_takes_nothing_is_refused() -> None:
    m, f = Linear(1, 1), sortal.jit(read, donate=Cache)
    with pytest.raises(FilterError, match="takes no leaf"):
        jax.vmap(lambda x: f(m, x))(jnp.ones((1, 1, 1)))


def test_calls_inside_of_another_transform_are_no_retrace_of_those_outside() -> None:
    m, x = Linear(2, 2), jnp.ones((2, 2))
    f = sortal.jit(read, donate=Param, on_retrace="raise")
    for _ in range(2):
        f(m, x)
        jax.grad(lambda x: f(m, x))(x)


def test_a_compiled_program_gives_nothing_away_that_it_cannot_write() -> None:
    m, x = Linear(2, 2), jnp.ones((2, 2))
    program = sortal.jit(write, donate=Param).lower(m, x).compile()
    with pytest.raises(TraceError, match=r"bias \(Param\)"):
        jax.vmap(lambda _: program(m, x))(x)
    assert not gone(buffers(m))


def test_an_error_of_the_donated_call_itself_is_not_told_as_a_stale_buffer() -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("the disk is full")

    def f(m: Any) -> Any:
        found = jax.pure_callback(fail, jax.ShapeDtypeStruct((), "float32"), m.bias)
        m.bias[...] = m.bias + found

    m = Linear(1, 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the disk is full"):
        sortal.jit(f, donate=True)(m)
    with pytest.raises(StaleBufferError, match=r"m: bias \(Param\)"):
        sortal.jit(f, donate=True)(m)


LOST = (
    "the call failed, and left no values where buffers were donated:\n"
    "  m: bias (Param): float32[1]\n"
    "  x: float32[2]\n"
    "Restore these, or call without donation what may fail."
)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_call_that_fails_when_it_runs_says_what_is_lost(ahead: bool) -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("the disk is full")

    def f(m: Any, x: Any) -> Any:
        found = jax.pure_callback(fail, jax.ShapeDtypeStruct((), "float32"), m.bias)
        m.bias[...] = m.bias + found
        return x + 1

    m, x = Linear(1, 1), jnp.ones(2)
    call: Any = sortal.jit(f, donate=True, donate_argnames="x")
    if ahead:
        call = call.lower(m, x=x).compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match="the disk is full") as e:
        call(m, x=x)
    assert LOST in e.value.__notes__
    assert gone(buffers(m)) == {"bias"}


def test_a_nan_that_is_found_after_a_call_says_what_is_lost() -> None:
    def f(m: Any, x: Any) -> None:
        m.bias[...] = m.bias + jnp.log(x)

    m, call = Linear(1, 1), sortal.jit(f, donate=True)
    call(m, 1.0)
    with jax.debug_nans(True), pytest.raises(FloatingPointError) as e:
        call(m, -1.0)
    assert LOST.replace("  x: float32[2]\n", "") in e.value.__notes__


def test_a_call_that_fails_before_it_runs_has_lost_nothing() -> None:
    def f(m: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError) as e:
        sortal.jit(f, donate=Param)(Linear(1, 1))
    assert not any("donated" in note for note in e.value.__notes__)


@pytest.mark.parametrize(
    "said",
    [
        "INVALID_ARGUMENT: Buffer has been deleted or donated.",
        "Array has been deleted with shape=float32[3].",
        "INVALID_ARGUMENT: Donation requested for invalid buffer",
    ],
)
def test_each_form_in_which_xla_says_so_is_told_as_a_stale_buffer(said: str) -> None:
    def f(m: Any) -> Any:
        raise RuntimeError(said)

    m = Linear(1, 1)
    m.bias.value.delete()
    with pytest.raises(StaleBufferError, match=r"m: bias \(Param\)"):
        sortal.jit(f, donate=True)(m)


# ------------------------------------------------------------------- by random programs
VARIABLES, RAW = ("p", "q", "c"), ("x", "y", "z")


def aliased(places: list[int]) -> Holder:
    """A model whose leaves hold some of three arrays, several the same one."""
    pool = [jnp.array([i, i + 0.25]) for i in range(1, 4)]
    p, q, c, x, y, z, t, u = (pool[i] for i in places)
    return Holder(p=Param(p), q=Param(q), c=Cache(c), x=x, y=y, z=[z], t=(t, u))


def value(m: Any, name: str) -> Any:
    x = m.z[0] if name == "z" else getattr(m, name)
    return x.value if isinstance(x, Variable) else x


def put(m: Any, name: str, new: Any) -> None:
    if name in VARIABLES:
        getattr(m, name).value = new
    elif name == "z":
        m.z[0] = new
    else:
        setattr(m, name, new)


def run(steps: list[Any], m: Any) -> list[Any]:
    """Values change places, are added, or are taken by a tuple or a new object."""
    out: list[Any] = []
    for what, a, b in steps:
        one, other = value(m, a), value(m, b)
        if what == "swap":
            put(m, a, other)
            put(m, b, one)
        elif what == "add":
            put(m, a, one + other)
        elif what == "tuple":
            m.t = (other, m.t[0])
        elif what == "new":
            out.append(Holder(v=one, w=Param(other), t=(m.t[1],)))
        else:
            out.append(one)
    return out


STEPS = st.tuples(
    st.sampled_from(["swap", "add", "tuple", "new", "give"]),
    st.sampled_from(VARIABLES + RAW),
    st.sampled_from(VARIABLES + RAW),
)


@settings(max_examples=50)
@given(
    places=st.lists(st.integers(0, 2), min_size=8, max_size=8),
    steps=st.lists(STEPS, min_size=1, max_size=5),
    donate=st.sampled_from([None, True, ..., Param, Cache, At("t.*")]),
)
def test_no_number_depends_on_what_is_donated_or_held_twice(
    places: list[int], steps: list[Any], donate: Any
) -> None:
    """Two calls give what the function gives in plain Python, called eagerly."""

    def function(m: Any) -> Any:
        return run(steps, m)

    live, plain = aliased(places), aliased(places)
    compiled = sortal.jit(function, donate=donate)
    for _ in range(2):
        found, expected = (
            buffers([compiled(live), live]),
            buffers([function(plain), plain]),
        )
        assert found.keys() == expected.keys()
        for path, x in expected.items():
            assert found[path].tolist() == x.tolist(), path
