"""Why a function was compiled again: what is recorded, compared and said."""

from __future__ import annotations

import gc
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sortal
from models import Holder, Linear, Net, Norm
from sortal import BatchStat, Param, RetraceWarning, explain_retrace
from sortal.errors import ArgumentError, RetraceError


def reasons(f: Any) -> list[list[str]]:
    return [list(row.reasons) for row in explain_retrace(f).retraces]


def after(edit: Callable[[Any], None]) -> list[str]:
    """The reasons of the one retrace that an edit of a Net causes."""
    f, net = sortal.jit(lambda model: None), Net()
    f(net)
    f(net)
    edit(net)
    f(net)
    f(net)
    (found,) = reasons(f)
    return found


# -------------------------------------------------------------------- typical reasons
def test_a_flip_to_eval_and_back_is_one_retrace() -> None:
    f, net, x = sortal.jit(lambda model, x: model(x)), Net(), jnp.ones((2, 3))
    for _ in range(3):
        f(net, x)
        net.eval()
        f(net, x)
        net.train()
    assert explain_retrace(f).compiles == 2
    assert reasons(f) == [["model.norm.use_running_average: False -> True"]]


def test_a_changed_rate_of_dropout() -> None:
    model = sortal.nn.Dropout(0.5, rngs=sortal.Rngs(0))
    f = sortal.jit(lambda model: None)
    f(Holder(dropout=model))
    model.rate = 0.25
    f(Holder(dropout=model))
    assert reasons(f) == [["model.dropout.rate: 0.5 -> 0.25"]]


def test_changed_dtypes_and_shapes_of_leaves_with_path_and_kind() -> None:
    def edit(m: Any) -> None:
        m.layers[0].kernel.value = m.layers[0].kernel.value.astype(jnp.bfloat16)
        m.norm.mean.value = jnp.zeros(5)

    assert after(edit) == [
        "model.layers.0.kernel (Param): float32[3,4] -> bfloat16[3,4]",
        "model.norm.mean (BatchStat): float32[4] -> float32[5]",
    ]


def test_a_weak_type_and_a_raw_array() -> None:
    f = sortal.jit(lambda m: None)
    f(Holder(raw=jnp.zeros(2), w=Param(jnp.array(1, jnp.int32))))
    f(Holder(raw=jnp.zeros(3), w=Param(jnp.asarray(1))))
    assert reasons(f) == [
        [
            "m.raw (unlabelled array): float32[2] -> float32[3]",
            "m.w (Param): int32[] -> int32[] (weakly typed)",
        ]
    ]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda m: setattr(m, "rate", 0.5), ["model.rate: absent -> 0.5"]),
        (lambda m: delattr(m, "calls"), ["model.calls: Count -> absent"]),
        (
            lambda m: setattr(m.norm, "mean", Param(m.norm.mean.value)),
            ["model.norm.mean: BatchStat -> Param"],
        ),
        (
            lambda m: m.norm.mean.set_metadata(tag="slow"),
            ["model.norm.mean: BatchStat -> BatchStat {'tag': 'slow'}"],
        ),
        (
            lambda m: m.layers.append(Param(jnp.ones(1))),
            ["model.layers.2: absent -> Param"],
        ),
        (
            lambda m: setattr(m.layers[1], "bias", m.layers[0].bias),
            ["model.layers.1.bias: Param -> alias of model.layers.0.bias"],
        ),
        (
            lambda m: m.layers.__setitem__(1, Norm(2)),
            [
                "model.layers.1: Linear -> Norm",
                "model.layers.1.bias: Param -> absent",
                "model.layers.1.kernel: Param -> absent",
                "model.layers.1.mean: absent -> BatchStat",
                "model.layers.1.scale: absent -> Param",
                "model.layers.1.use_running_average: absent -> False",
            ],
        ),
    ],
)
def test_edits_of_structure_by_path(edit: Any, expected: list[str]) -> None:
    assert sorted(after(edit)) == sorted(expected)


def test_two_classes_of_one_name_are_told_apart() -> None:
    other = types.new_class("Norm", (Norm,))
    (reason,) = after(lambda m: setattr(m, "norm", other(4)))
    assert reason.startswith("model.norm: models.Norm ")
    assert f" -> {other.__module__}.{other.__qualname__} " in reason


def test_a_transformation_of_optax_that_is_built_at_each_call() -> None:
    net = Linear(2, 2)
    f = sortal.jit(lambda opt: None)
    for _ in range(2):
        f(sortal.Optimizer(net, optax.sgd(0.1), wrt=Param))
    ((reason,),) = reasons(f)
    assert reason.startswith("opt.tx: GradientTransformation")
    assert reason.endswith("-> another that looks the same; build it once and reuse it")
    assert "0x" not in reason


# -------------------------------------------------------------------- other arguments
def test_another_batch_and_another_dtype() -> None:
    f, m = sortal.jit(lambda m, x, *more, scale: None), Linear(1, 1)
    f(m, jnp.ones((8, 3)), jnp.ones(1), scale=1.0)
    f(m, jnp.ones((7, 3)), jnp.ones(1), scale=1.0)
    f(m, jnp.ones((7, 3)), jnp.ones(1, jnp.int32), scale=jnp.ones(1))
    assert reasons(f) == [
        ["x: float32[8,3] -> float32[7,3]"],
        [
            "more[0]: float32[1] -> int32[1]",
            "scale: float32[] (weakly typed) -> float32[1]",
        ],
    ]


def test_a_number_of_python_that_an_optimizer_changes_is_told_to_have_a_dtype() -> None:
    def train(start: jax.Array) -> str:
        model = sortal.Param(start)
        optimizer = sortal.Optimizer(model, optax.sgd(0.5))

        @sortal.jit
        def step(model: Any, optimizer: Any) -> None:
            optimizer.update(model, sortal.grad(lambda w: w**2)(model))

        step(model, optimizer)
        step(model, optimizer)
        return str(sortal.explain_retrace(step))

    text = train(jnp.array(0.5))
    assert "  model (Param): float32[] (weakly typed) -> float32[]\n" in text
    assert text.endswith("give it a dtype, as in jnp.array(0.5, jnp.float32).")
    assert train(jnp.array(0.5, jnp.float32)).endswith("was compiled once.")


def test_the_structure_of_a_pytree() -> None:
    f, x = sortal.jit(lambda batch, mask=None: None), jnp.ones(2)
    f({"a": x})
    f({"a": x, "b": x})
    f({"a": x}, x)
    f({"a": x}, None)
    f([x])
    f((x,))
    assert reasons(f)[0] == ["batch['b']: absent -> float32[2]"]
    assert reasons(f)[1] == ["mask: absent -> float32[2]"]
    assert reasons(f)[2] == ["mask: float32[2] -> None"]
    assert reasons(f)[4] == ["batch: structure [*] -> (*,)"]


def test_a_state_is_told_by_path() -> None:
    f = sortal.jit(lambda state: None)
    f(sortal.state(Linear(1, 2)))
    f(sortal.state(Linear(3, 2)))
    assert reasons(f) == [["state['kernel']: float32[1,2] -> float32[3,2]"]]


def test_static_arguments_by_position_and_name() -> None:
    def f(x: Any, n: int, *, mode: str) -> None: ...

    g = sortal.jit(f, static_argnums=1, static_argnames="mode")
    g(1.0, 1, mode="a")
    g(1.0, 2, mode="a")
    g(1.0, 2, mode="b")
    g(1.0, 2, mode="b")
    assert reasons(g) == [["n: 1 -> 2"], ["mode: 'a' -> 'b'"]]


def test_a_static_function_that_is_made_at_each_call() -> None:
    f = sortal.jit(lambda act: None, static_argnums=0)
    for _ in range(2):
        f(lambda x: x)
    ((reason,),) = reasons(f)
    assert "<lambda>> -> another that looks the same" in reason


def test_an_argument_passed_by_name() -> None:
    f = sortal.jit(lambda m: None)
    f(Linear(1, 1))
    f(m=Linear(1, 1))
    assert reasons(f) == [["m: passed by position -> by name"]]


def test_roots_that_come_go_and_share() -> None:
    f, a, b = sortal.jit(lambda x, y: None), Linear(1, 1), Linear(1, 1)
    f(a, b)
    f(a, a)
    f(a, 1.0)
    f(Param(jnp.ones(1)), 1.0)
    f({"a": a, "b": Param(jnp.ones(1))}, 1.0)
    assert reasons(f)[0][0] == "y: Linear -> alias of x"
    assert reasons(f)[1] == [
        "y: alias of x -> absent",
        "y: absent -> float32[] (weakly typed)",
    ]
    assert reasons(f)[2] == [
        "x: Linear -> Param",
        "x.bias: Param -> absent",
        "x.kernel: Param -> absent",
    ]
    assert "x['a'].bias: absent -> Param" in reasons(f)[3]
    assert "x['b']: absent -> Param" in reasons(f)[3]


def test_the_order_of_named_arguments_is_part_of_the_call() -> None:
    f, a, b = sortal.jit(lambda **m: None), Linear(1, 1), Linear(1, 1)
    f(x=a, y=b)
    f(y=b, x=a)
    assert reasons(f) == [["order of the arguments: x, y -> y, x"]]


def test_methods_are_told_from_self() -> None:
    net, x = Net(), jnp.ones((2, 3))
    f = sortal.jit(net.__call__)
    f(x)
    net.eval()
    f(x)
    assert reasons(f) == [["self.norm.use_running_average: False -> True"]]

    class Model(sortal.Module):
        rate = 1

        @sortal.jit
        def step(self) -> None: ...

    model = Model()
    model.step()
    model.rate = 2
    model.step()
    assert reasons(model.step) == [["self.rate: absent -> 2"]]


def test_another_configuration_is_no_change_of_arguments() -> None:
    f = sortal.jit(lambda x: x @ x)
    f(jnp.ones((2, 2)))
    with jax.default_matmul_precision("float32"):
        f(jnp.ones((2, 2)))
    ((reason,),) = reasons(f)
    assert reason.startswith("nothing that was recorded: JAX also traces anew")


def test_shardings_that_are_part_of_a_type() -> None:
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    f = sortal.jit(lambda x: None)
    with jax.set_mesh(mesh):
        f(jax.device_put(jnp.ones(4), NamedSharding(mesh, PartitionSpec())))
        f(jax.device_put(jnp.ones(4), NamedSharding(mesh, PartitionSpec("i"))))
    assert reasons(f) == [["x: float32[4] -> float32[4] over ('i',)"]]


# ------------------------------------------------------------------------- the record
def test_calls_that_hit_the_cache_record_nothing() -> None:
    f, net, x = sortal.jit(lambda m, x: m(x)), Net(), jnp.ones((2, 3))
    assert explain_retrace(f).compiles == 0
    for _ in range(3):
        f(net, x)
    f(Net(5), x + 1)
    report = explain_retrace(f)
    assert (report.compiles, report.retraces) == (1, ())
    assert str(report).endswith("was compiled once.")


@pytest.mark.parametrize("donate", [True, Param, None])
def test_donation_counts_each_compile_once(donate: Any) -> None:
    f, net = sortal.jit(lambda m, x: m(x), donate=donate), Net()
    for n in (2, 2, 3, 3):
        f(net, jnp.ones((n, 3)))
    assert explain_retrace(f).compiles == 2
    assert reasons(f) == [["x: float32[2,3] -> float32[3,3]"]]


def test_each_compile_is_compared_with_the_closest_and_of_those_the_latest() -> None:
    f = sortal.jit(lambda m, x: None)
    f(Holder(a=1, b=1), 1.0)
    f(Holder(a=2, b=2), jnp.ones(2))
    f(Holder(a=1, b=3), 1.0)
    f(Holder(a=1, b=4), 1.0)
    assert [row.closest for row in explain_retrace(f).retraces] == [1, 1, 3]
    assert str(explain_retrace(f)).splitlines()[-2:] == [
        "compile 4, compared with compile 3:",
        "  m.b: 3 -> 4",
    ]
    assert repr(explain_retrace(f)) == str(explain_retrace(f))


def test_the_record_is_bounded_and_keeps_counting() -> None:
    f = sortal.jit(lambda x: None)
    for n in range(1, 21):
        f(np.ones(n, np.float32))
    report = explain_retrace(f)
    assert report.compiles == 20
    assert [row.number for row in report.retraces] == list(range(6, 21))
    assert report.retraces[-1].reasons == ("x: float32[19] -> float32[20]",)
    f.clear_cache()
    assert explain_retrace(f).compiles == 0


def test_no_array_and_no_model_is_kept_alive() -> None:
    f, net, x = sortal.jit(lambda m, x: m(x)), Net(), jnp.ones((2, 3))
    f(net, x)
    dead = [weakref.ref(net), weakref.ref(net.norm.mean.value), weakref.ref(x)]
    del net, x
    gc.collect()
    assert [r() for r in dead] == [None] * 3
    assert explain_retrace(f).compiles == 1


def test_a_trace_that_failed_is_not_recorded() -> None:
    def fail(x: Any) -> None:
        raise ValueError("my own")

    f = sortal.jit(fail)
    with pytest.raises(ValueError, match=r"^my own"):
        f(1.0)
    assert explain_retrace(f).compiles == 0


def test_models_a_thousand_levels_deep_are_compared() -> None:
    def deep(rate: float) -> Any:
        model = Holder(rate=rate, w=Param(jnp.ones(1)))
        for _ in range(1000):
            model = Holder(a=model)
        return model

    f = sortal.jit(lambda m: None)
    f(deep(0.5))
    f(deep(1.0))
    assert reasons(f) == [["m." + "a." * 1000 + "rate: 0.5 -> 1.0"]]


def test_what_is_no_jitted_function_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"made by sortal\.jit; found 3"):
        explain_retrace(3)
    with pytest.raises(ArgumentError, match=r"found <PjitFunction"):
        explain_retrace(jax.jit(lambda x: x))


# ------------------------------------------------------------------------- on_retrace
def test_a_warning_names_the_reason_and_points_to_the_call() -> None:
    def step(m: Any, x: Any) -> None: ...

    f, m = sortal.jit(step, on_retrace="warn"), Linear(1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f(m, jnp.ones(2))
        f(m, jnp.ones(2))
    with pytest.warns(RetraceWarning) as caught:
        f(m, jnp.ones(3))
    (warning,) = caught
    assert str(warning.message) == (
        f"{step.__qualname__}: compile 2, compared with compile 1:\n"
        "  x: float32[2] -> float32[3]"
    )
    assert warning.filename == __file__
    assert explain_retrace(f).compiles == 2


@pytest.mark.parametrize("donate", [None, True])
def test_an_error_leaves_the_model_and_the_record_as_they_were(donate: Any) -> None:
    def step(m: Any, x: Any) -> None:
        m.bias[...] = m.bias + x

    f, m = sortal.jit(step, on_retrace="raise", donate=donate), Linear(1, 1)
    f(m, 1.0)
    for _ in range(2):
        with pytest.raises(RetraceError) as e:
            f(m, jnp.ones(1))
        assert "  x: float32[] (weakly typed) -> float32[1]\n" in str(e.value)
        assert "on_retrace='warn'" in str(e.value)
    assert m.bias[0] == 1
    f(m, 1.0)
    assert m.bias[0] == 2
    assert explain_retrace(f).compiles == 1


def test_every_way_to_call_jit_takes_on_retrace() -> None:
    @sortal.jit(on_retrace="raise")
    def f(x: Any) -> None: ...

    f(1.0)
    with pytest.raises(RetraceError):
        f(1)
    with pytest.raises(ArgumentError, match=r"'ignore', 'warn' or 'raise'; found 'no'"):
        sortal.jit(f, on_retrace="no")


def test_kinds_are_reported_where_only_they_differ() -> None:
    f = sortal.jit(lambda v: None)
    f(Param(jnp.ones(1)))
    f(BatchStat(jnp.ones(1)))
    assert reasons(f) == [["v: Param -> BatchStat"]]
