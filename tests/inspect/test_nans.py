"""find_nan: planted NaNs and infinities, each found by operation, line and module.

Each function of ``PLANTED`` returns a step and its arguments. The line to blame ends in
a comment with the name of the function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx as flax_nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sortal as nnx
from blocks import (
    INF,
    ZEROS,
    Model,
    Op,
    X,
    call,
    culprit,
    differentiate,
    linear,
    train,
)
from sortal.errors import ArgumentError, StaleBufferError, TraceError, UnsupportedError


@dataclass
class Planted:
    """A step that goes wrong, and what must be said of it."""

    make: Callable[[], tuple[Any, tuple[Any, ...]]]
    operation: str
    path: tuple[Any, ...] = ("blocks", 1)
    argument: str = "model"
    phase: str = "forward"
    more: dict[str, Any] | None = None


PLANTED: dict[str, Planted] = {}


def planted(operation: str, **options: Any) -> Callable[[Any], Any]:
    def add(make: Any) -> Any:
        PLANTED[make.__name__] = Planted(make, operation, **options)
        return make

    return add


# --------------------------------------------------- outside of an operation's domain
@planted("log")
def log_of_zero() -> Any:
    def block(x: Any) -> Any:
        return jnp.log(x)  # log_of_zero

    return call, (Model(block), X)


@planted("log")
def log_of_a_negative_number() -> Any:
    def block(x: Any) -> Any:
        return jnp.log(x - 2)  # log_of_a_negative_number

    return call, (Model(block), X + 1)


@planted("log1p")
def log1p_of_minus_one() -> Any:
    def block(x: Any) -> Any:
        return jnp.log1p(-x)  # log1p_of_minus_one

    return call, (Model(block), X)


@planted("div")
def zero_division_in_a_norm() -> Any:
    def block(x: Any) -> Any:
        length = jnp.linalg.norm(x, axis=-1, keepdims=True)
        return x / length  # zero_division_in_a_norm

    return call, (Model(block), ZEROS)


@planted("div")
def constant_features_are_standardized() -> Any:
    def block(x: Any) -> Any:
        return (x - x.mean()) / x.std()  # constant_features_are_standardized

    return call, (Model(block), ZEROS)


@planted("div")
def cosine_similarity_of_nothing() -> Any:
    def block(x: Any) -> Any:
        a, b = x
        lengths = jnp.linalg.norm(a) * jnp.linalg.norm(b)
        return a @ b / lengths  # cosine_similarity_of_nothing

    return call, (Model(block), ZEROS)


@planted("div")
def divergence_from_what_cannot_be() -> Any:
    def block(x: Any) -> Any:
        p, q = jax.nn.softmax(x)
        q = q.at[0].set(0)
        return p * jnp.log(p / q)  # divergence_from_what_cannot_be

    return call, (Model(block), X)


@planted("sqrt")
def variance_made_negative_by_cancellation() -> Any:
    def block(x: Any) -> Any:
        variance = jnp.mean(x**2) - jnp.mean(x) ** 2 - 1e-2
        return jnp.sqrt(variance)  # variance_made_negative_by_cancellation

    return call, (Model(block), ZEROS + 1000)


@planted("rsqrt")
def reciprocal_root_of_zero() -> Any:
    def block(x: Any) -> Any:
        return jax.lax.rsqrt(x)  # reciprocal_root_of_zero

    return call, (Model(block), X)


@planted("pow")
def root_of_a_negative_number_as_a_power() -> Any:
    def block(x: Any) -> Any:
        return (x - 2) ** 0.3  # root_of_a_negative_number_as_a_power

    return call, (Model(block), X)


@planted("integer_pow")
def negative_power_of_zero() -> Any:
    def block(x: Any) -> Any:
        return x**-2  # negative_power_of_zero

    return call, (Model(block), X)


@planted("acos")
def arccos_beyond_one() -> Any:
    def block(x: Any) -> Any:
        return jnp.arccos(x / x.max() * 1.0000002)  # arccos_beyond_one

    return call, (Model(block), X)


@planted("asin")
def arcsin_beyond_one() -> Any:
    def block(x: Any) -> Any:
        return jnp.arcsin(x)  # arcsin_beyond_one

    return call, (Model(block), X)


@planted("atanh")
def arctanh_of_one() -> Any:
    def block(x: Any) -> Any:
        return jnp.arctanh(x / x.max())  # arctanh_of_one

    return call, (Model(block), X)


@planted("acosh")
def arccosh_below_one() -> Any:
    def block(x: Any) -> Any:
        return jnp.arccosh(x)  # arccosh_below_one

    return call, (Model(block), X)


@planted("mul")
def zero_times_a_constant_infinity() -> Any:
    def block(x: Any) -> Any:
        return x * INF  # zero_times_a_constant_infinity

    return call, (Model(block), X)


@planted("cholesky")
def cholesky_of_what_is_not_positive() -> Any:
    def block(x: Any) -> Any:
        return jnp.linalg.cholesky(-jnp.eye(3))  # cholesky_of_what_is_not_positive

    return call, (Model(block), X)


@planted("log")
def entropy_of_a_certain_thing() -> Any:
    def block(x: Any) -> Any:
        p = jax.nn.one_hot(1, 3)
        return -(p * jnp.log(p)).sum()  # entropy_of_a_certain_thing

    return call, (Model(block), X)


@planted("log")
def log_of_an_underflown_softmax() -> Any:
    def block(x: Any) -> Any:
        return jnp.log(jax.nn.softmax(x * 100))  # log_of_an_underflown_softmax

    return call, (Model(block), X)


@planted("log")
def log_of_a_sum_of_underflown_exponentials() -> Any:
    def block(x: Any) -> Any:
        total = jnp.exp(x - 1000).sum()
        return jnp.log(total)  # log_of_a_sum_of_underflown_exponentials

    return call, (Model(block), X)


@planted("div")
def logit_of_one() -> Any:
    def block(x: Any) -> Any:
        p = x / 5
        return jnp.log(p / (1 - p))  # logit_of_one

    return call, (Model(block), X)


# ------------------------------------------------------------------------- overflow
@planted("exp")
def exp_overflows() -> Any:
    def block(x: Any) -> Any:
        return jnp.exp(x * 100)  # exp_overflows

    return call, (Model(block), X)


@planted("exp")
def softmax_by_hand() -> Any:
    def block(x: Any) -> Any:
        powers = jnp.exp(x * 100)  # softmax_by_hand
        return powers / powers.sum()

    return call, (Model(block), X)


@planted("exp")
def likelihood_of_a_tiny_variance() -> Any:
    def block(x: Any) -> Any:
        log_variance = x - 100
        return x**2 * jnp.exp(-log_variance)  # likelihood_of_a_tiny_variance

    return call, (Model(block), X)


@planted("cosh")
def log_cosh_overflows() -> Any:
    def block(x: Any) -> Any:
        return jnp.log(jnp.cosh(x * 100))  # log_cosh_overflows

    return call, (Model(block), X)


@planted("mul")
def bfloat16_overflows() -> Any:
    def block(x: Any) -> Any:
        return x.astype(jnp.bfloat16) * 1e38  # bfloat16_overflows

    return call, (Model(block), X)


@planted("mul")
def float16_overflows() -> Any:
    def block(x: Any) -> Any:
        return x * x  # float16_overflows

    return call, (Model(block), (X * 100).astype(jnp.float16))


@planted("convert_element_type")
def cast_to_float16_overflows() -> Any:
    def block(x: Any) -> Any:
        return (x * 1e5).astype(jnp.float16)  # cast_to_float16_overflows

    return call, (Model(block), X)


@planted("convert_element_type")
def integers_cast_to_float16_overflow() -> Any:
    def block(x: Any) -> Any:
        tokens = jnp.arange(3) * 100_000
        return x * tokens.astype(jnp.float16)  # integers_cast_to_float16_overflow

    return call, (Model(block), X)


@planted("dot_general")
def float16_matrix_product_overflows() -> Any:
    def block(x: Any) -> Any:
        return x @ x.T  # float16_matrix_product_overflows

    return call, (Model(block), (X * 100).astype(jnp.float16))


@planted("convert_element_type")
def float16_sum_overflows() -> Any:
    def block(x: Any) -> Any:
        return x.sum()  # float16_sum_overflows

    return call, (Model(block), (X * 10000).astype(jnp.float16))


@planted("cumprod")
def cumprod_overflows() -> Any:
    def block(x: Any) -> Any:
        return jnp.cumprod(x * 1e20, axis=1)  # cumprod_overflows

    return call, (Model(block), X + 1)


@planted("cumsum")
def cumsum_overflows() -> Any:
    def block(x: Any) -> Any:
        return jnp.cumsum(x * 5e37, axis=1)  # cumsum_overflows

    return call, (Model(block), X)


@planted("integer_pow")
def eighth_power_overflows() -> Any:
    def block(x: Any) -> Any:
        return (x * 1e6) ** 8  # eighth_power_overflows

    return call, (Model(block), X)


@planted("sub")
def difference_of_extremes_overflows() -> Any:
    def block(x: Any) -> Any:
        least = jnp.finfo(x.dtype).min
        return jnp.where(x > 1, x, least) - x * 6e37  # difference_of_extremes_overflows

    return call, (Model(block), X)


# ------------------------------------------------------------------------- in masks
@planted("sub")
def softmax_of_nothing_but_minus_infinity() -> Any:
    def block(x: Any) -> Any:
        logits = jnp.where(x > 9, x, -INF)
        return jax.nn.softmax(logits)  # softmax_of_nothing_but_minus_infinity

    return call, (Model(block), X)


@planted("sub")
def attention_that_is_masked_everywhere() -> Any:
    mask = jnp.array([[True, True], [False, False]])

    def block(x: Any) -> Any:
        scores = x @ x.T + jnp.where(mask, 0, -INF)
        return jax.nn.softmax(scores) @ x  # attention_that_is_masked_everywhere

    return call, (Model(block), X)


@planted("sub")
def mask_of_minus_infinity_as_an_argument() -> Any:
    def step(model: Any, x: Any, mask: Any) -> Any:
        return model((x, mask)[0] + mask)

    def block(x: Any) -> Any:
        return jax.nn.log_softmax(x)  # mask_of_minus_infinity_as_an_argument

    return step, (Model(block), X, jnp.full((2, 3), -INF))


# ------------------------------------------------------------------------ backward
@planted("div", phase="backward")
def gradient_of_a_root_at_zero() -> Any:
    def block(x: Any) -> Any:
        return jnp.sqrt(x)  # gradient_of_a_root_at_zero

    return differentiate, (Model(block), X)


@planted("div", phase="backward")
def gradient_of_a_norm_at_zero() -> Any:
    def block(x: Any) -> Any:
        return jnp.linalg.norm(x)  # gradient_of_a_norm_at_zero

    return differentiate, (Model(block), ZEROS)


@planted("div", phase="backward")
def gradient_of_the_branch_not_taken() -> Any:
    def block(x: Any) -> Any:
        roots = jnp.sqrt(x)  # gradient_of_the_branch_not_taken
        return jnp.where(x > 0, roots, 0)

    return differentiate, (Model(block), X)


@planted("div", phase="backward")
def gradient_of_a_deviation_without_any() -> Any:
    def block(x: Any) -> Any:
        return x.std()  # gradient_of_a_deviation_without_any

    return differentiate, (Model(block), ZEROS + 2)


@planted("pow", phase="backward")
def gradient_of_a_power_below_one_at_zero() -> Any:
    def block(x: Any) -> Any:
        return x**0.3  # gradient_of_a_power_below_one_at_zero

    return differentiate, (Model(block), X)


@planted("rsqrt", phase="backward")
def gradient_of_arccos_at_one() -> Any:
    def block(x: Any) -> Any:
        return jnp.arccos(x / 5)  # gradient_of_arccos_at_one

    return differentiate, (Model(block), X)


@planted("div", phase="backward")
def backward_function_of_custom_vjp() -> Any:
    @jax.custom_vjp
    def double(x: Any) -> Any:
        return x * 2

    def backward(x: Any, g: Any) -> Any:
        return (g / x,)  # backward_function_of_custom_vjp

    double.defvjp(lambda x: (double(x), x), backward)
    return differentiate, (Model(double), X)


# --------------------------------------------------------------- loops and branches
@planted("log", more={"iterations": (2,)})
def in_a_step_of_scan() -> Any:
    def body(total: Any, x: Any) -> Any:
        return total + jnp.log(x), total  # in_a_step_of_scan

    def block(x: Any) -> Any:
        return jax.lax.scan(body, 0.0, x)[1]

    return call, (Model(block), jnp.array([3.0, 2.0, 0.0, 1.0]))


@planted("div", phase="backward", more={"iterations": (1,)})
def in_the_backward_pass_of_scan() -> Any:
    def body(total: Any, x: Any) -> Any:
        return total + jnp.sqrt(x), total  # in_the_backward_pass_of_scan

    def block(x: Any) -> Any:
        return jax.lax.scan(body, 0.0, x)[0]

    return differentiate, (Model(block), jnp.array([3.0, 0.0, 2.0, 1.0]))


@planted("exp", path=("layers",), more={"iterations": (1,), "module": "Op"})
def in_a_layer_of_scanned_layers() -> Any:
    class Deep(nnx.Module):
        def __init__(self, fn: Any):
            self.layers = nnx.vmap(lambda _: Op(fn))(jnp.arange(3))

        def __call__(self, x: Any) -> Any:
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0))(
                x, self.layers
            )

    def block(x: Any) -> Any:
        return jnp.exp(x)  # in_a_layer_of_scanned_layers

    def step(model: Any, x: Any) -> Any:
        return nnx.scan(
            lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )(x, model.layers)

    return step, (Deep(block), jnp.array(5.0))


@planted("mul", more={"iterations": (2,)})
def in_an_iteration_of_while() -> Any:
    def square(x: Any) -> Any:
        return x * x  # in_an_iteration_of_while

    def block(x: Any) -> Any:
        return jax.lax.while_loop(lambda x: x < 1e38, square, x)

    return call, (Model(block), jnp.array(1e5))


@planted("div", more={"iterations": (2,)})
def in_an_iteration_of_fori_loop() -> Any:
    def body(i: Any, x: Any) -> Any:
        return x / (2.0 - i)  # in_an_iteration_of_fori_loop

    def block(x: Any) -> Any:
        return jax.lax.fori_loop(0, 4, body, x)

    return call, (Model(block), jnp.array(3.0))


@planted("sqrt")
def in_the_branch_of_cond() -> Any:
    def negative(x: Any) -> Any:
        return jnp.sqrt(x)  # in_the_branch_of_cond

    def block(x: Any) -> Any:
        return jax.lax.cond(x.sum() < 0, negative, lambda x: x, x)

    return call, (Model(block), -X)


@planted("log")
def in_remat() -> Any:
    @jax.checkpoint
    def block(x: Any) -> Any:
        return jnp.sin(jnp.log(x))  # in_remat

    return differentiate, (Model(block), X)


@planted("log", more={"replicas": (3,)})
def in_a_replica_of_vmap() -> Any:
    def block(x: Any) -> Any:
        return jnp.log(x)  # in_a_replica_of_vmap

    def step(model: Any, x: Any) -> Any:
        return nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(model, x)

    return step, (Model(block), jnp.ones((5, 2)).at[3, 1].set(0))


@planted("div", phase="backward", more={"replicas": (1,)})
def in_a_replica_of_the_gradient() -> Any:
    def block(x: Any) -> Any:
        return jnp.sqrt(x)  # in_a_replica_of_the_gradient

    def step(model: Any, x: Any) -> Any:
        one = nnx.grad(lambda m, x: m(x).sum())
        return nnx.vmap(one, in_axes=(None, 0))(model, x)

    return step, (Model(block), jnp.ones((5, 2)).at[1, 1].set(0))


@planted("log")
def in_a_function_compiled_before() -> Any:
    @jax.jit
    def helper(x: Any) -> Any:
        return jnp.log(x)  # in_a_function_compiled_before

    helper(X)
    return call, (Model(helper), X)


@planted("log")
def in_shard_map() -> Any:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))

    def block(x: Any) -> Any:
        return jnp.log(x)  # in_shard_map

    mapped = jax.shard_map(block, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    return call, (Model(mapped), X)


# --------------------------------------------------------------- steps of training
@planted("div", path=(), argument="optimizer", more={"module": "Optimizer"})
def adam_without_epsilon_and_gradient() -> Any:
    model = linear()
    optimizer = nnx.Optimizer(model, optax.adam(1e-3, eps=0.0), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any) -> Any:
        grads = nnx.grad(lambda model: (model(x) * 0).sum())(model)
        optimizer.update(model, grads)  # adam_without_epsilon_and_gradient

    return step, (model, optimizer, X)


@planted("mul", path=(), argument="optimizer", more={"module": "Optimizer"})
def learning_rate_far_too_large() -> Any:
    model = linear()
    optimizer = nnx.Optimizer(model, optax.sgd(1e38), wrt=nnx.Param)

    @nnx.jit(donate=nnx.Variable)
    def step(model: Any, optimizer: Any, x: Any) -> Any:
        grads = nnx.grad(lambda model: (model(x) * 100).sum())(model)
        optimizer.update(model, grads)  # learning_rate_far_too_large

    return step, (model, optimizer, X)


@planted("dot_general", path=("inner",), more={"kinds": ("Param",), "module": "Linear"})
def parameters_that_have_grown() -> Any:
    class Outer(nnx.Module):
        def __init__(self) -> None:
            self.inner = linear()
            self.inner.kernel.value = jnp.full((3, 2), 3e38)

        def __call__(self, x: Any) -> Any:
            return self.inner(x)  # parameters_that_have_grown

    return call, (Outer(), X)


@planted("input", path=("inner", "kernel"), more={"kinds": ("Param",), "line": ""})
def nan_in_a_parameter() -> Any:
    class Outer(nnx.Module):
        def __init__(self) -> None:
            self.inner = linear()
            self.inner.kernel[0, 1] = jnp.nan

        def __call__(self, x: Any) -> Any:
            return self.inner(x)

    return call, (Outer(), X)


@planted("input", path=(), argument="batch['x']", more={"line": ""})
def nan_in_the_batch() -> Any:
    def step(model: Any, batch: Any) -> Any:
        return model(batch["x"])

    return step, (Model(jnp.exp), {"x": X.at[0, 0].set(jnp.nan), "y": ZEROS})


@planted("rsqrt", path=("norm",), more={"module": "BatchNorm"})
def batch_norm_of_one_example() -> Any:
    class Outer(nnx.Module):
        def __init__(self) -> None:
            self.norm = nnx.BatchNorm(3, epsilon=0.0, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.norm(x)  # batch_norm_of_one_example

    return call, (Outer(), X[:1])


@planted("div", path=(), argument="metrics['accuracy']", more={"module": "Mean"})
def mean_of_no_examples() -> Any:
    class Mean(nnx.Metric):
        def __init__(self) -> None:
            self.total = nnx.Variable(jnp.array(0.0))
            self.count = nnx.Variable(jnp.array(0.0))

        def reset(self) -> None: ...

        def update(self, *, values: Any) -> None:
            self.total[...] += values.sum()
            self.count[...] += values.size

        def compute(self) -> Any:
            return self.total.value / self.count.value  # mean_of_no_examples

    def step(metrics: Any) -> Any:
        return metrics["accuracy"].compute()

    return step, ({"accuracy": Mean()},)


@planted("log", path=("head",), argument="critic", more={"kinds": ("Param",)})
def one_of_two_models() -> Any:
    class Outer(nnx.Module):
        def __init__(self, fn: Any):
            self.head = Op(fn)

        def __call__(self, x: Any) -> Any:
            return self.head(x)

    def block(x: Any) -> Any:
        return jnp.log(x)  # one_of_two_models

    @nnx.jit
    def step(maker: Any, critic: Any, x: Any) -> Any:
        return critic(maker(x))

    return step, (Outer(lambda x: x), Outer(block), X)


# ------------------------------------------------------------------ models of Flax
class FlaxModel(flax_nnx.Module):
    def __init__(self, fn: Any):
        self.blocks = flax_nnx.List([flax_nnx.Linear(3, 3, rngs=flax_nnx.Rngs(0))])
        self.head = FlaxOp(fn)

    def __call__(self, x: Any) -> Any:
        return self.head(self.blocks[0](x) * 0 + x)


class FlaxOp(flax_nnx.Module):
    def __init__(self, fn: Any):
        self.fn = fn
        self.scale = flax_nnx.Param(jnp.array(1.0))

    def __call__(self, x: Any) -> Any:
        return self.fn(x * self.scale[...])


@planted("log", path=("head",), more={"module": "FlaxOp"})
def in_a_model_of_flax() -> Any:
    def block(x: Any) -> Any:
        return jnp.log(x)  # in_a_model_of_flax

    return call, (FlaxModel(block), X)


@planted("div", path=("head",), phase="backward")
def in_a_step_of_flax() -> Any:
    def block(x: Any) -> Any:
        return jnp.sqrt(x)  # in_a_step_of_flax

    model = FlaxModel(block)
    optimizer = flax_nnx.Optimizer(model, optax.sgd(0.1), wrt=flax_nnx.Param)

    @flax_nnx.jit
    def step(model: Any, optimizer: Any, x: Any) -> Any:
        loss, grads = flax_nnx.value_and_grad(lambda m: m(x).sum())(model)
        optimizer.update(model, grads)
        return loss

    return step, (model, optimizer, X)


@planted("sqrt", path=("blocks",), more={"module": "FlaxOp", "iterations": (1,)})
def in_scanned_layers_of_flax() -> Any:
    def block(x: Any) -> Any:
        return jnp.sqrt(x - 2)  # in_scanned_layers_of_flax

    class Deep(flax_nnx.Module):
        def __init__(self) -> None:
            self.blocks = flax_nnx.vmap(lambda _: FlaxOp(block))(jnp.arange(3))

        def __call__(self, x: Any) -> Any:
            axes = (0, flax_nnx.Carry)
            layers = flax_nnx.remat(lambda block, x: block(x))
            return flax_nnx.scan(layers, in_axes=axes, out_axes=flax_nnx.Carry)(
                self.blocks, x
            )

    def step(model: Any, x: Any) -> Any:
        return flax_nnx.value_and_grad(lambda model: model(x).sum())(model)

    return flax_nnx.jit(step), (Deep(), X + 2)


@planted("rsqrt", path=("norm",), more={"module": "LayerNorm"})
def layer_norm_of_flax_without_epsilon() -> Any:
    class Outer(flax_nnx.Module):
        def __init__(self) -> None:
            self.norm = flax_nnx.LayerNorm(3, epsilon=0.0, rngs=flax_nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.norm(x)  # layer_norm_of_flax_without_epsilon

    return call, (Outer(), ZEROS)


def test_there_are_fifty() -> None:
    assert len(PLANTED) >= 50


@pytest.mark.parametrize("name", PLANTED)
def test_the_culprit_is_named_by_operation_line_and_module(name: str) -> None:
    case = PLANTED[name]
    step, arguments = case.make()
    found = nnx.find_nan(step)(*arguments)
    assert found is not None
    more = case.more or {}
    assert (found.operation, found.path) == (case.operation, case.path), found
    assert (found.argument, found.phase) == (case.argument, case.phase), found
    if case.operation != "input":
        assert found.code.endswith(f"# {name}"), found
        assert found.line.startswith("test_nans.py:")
    for attribute, value in more.items():
        assert getattr(found, attribute) == value, found
    assert found.remedy
    assert found.operation in str(found)


# ------------------------------------------------------------------- what it leaves be
def test_models_optimizers_counts_and_donated_buffers_stay_as_they_were() -> None:
    model = nnx.Sequential(linear(), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.adam(1.0), wrt=nnx.Param)
    before = jax.tree.leaves(nnx.split((model, optimizer))[1])
    graphdef = nnx.graphdef(model)
    step = nnx.jit(train, donate=nnx.Variable)
    assert nnx.find_nan(step)(model, optimizer, X * 1e30) is not None
    after = jax.tree.leaves(nnx.split((model, optimizer))[1])
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert not any(x.is_deleted() for x in after)
    assert nnx.graphdef(model) is graphdef


def test_a_search_is_no_compile_of_the_step() -> None:
    step = nnx.jit(lambda model, x: model(x), on_retrace="raise")
    model = Model(lambda x: x)
    step(model, X)
    nnx.find_nan(step)(model, X)
    nnx.find_nan(step)(model, jnp.ones(4))
    assert nnx.explain_retrace(step).compiles == 1


# -------------------------------------------------------------------- how it is called
def test_static_arguments_keywords_and_methods_are_as_the_step_takes_them() -> None:
    @nnx.jit(static_argnames=("power", "scale"))
    def step(x: Any, power: int, *, scale: float, model: Any) -> Any:
        return model(x) ** (power if scale else 1)

    model = Model(lambda x: x)
    found = culprit(step, X, -1, model=model, scale=2.0)
    assert (found.operation, found.inputs[0].zeros) == ("integer_pow", 1)
    assert nnx.find_nan(step)(X, -1, model=model, scale=0.0) is None

    class Method(nnx.Module):
        @nnx.jit
        def forward(self, x: Any) -> Any:
            return jnp.log(x)

    found = culprit(Method().forward, X)
    assert (found.argument, found.module) == ("self", "Method")
    assert culprit(Model(jnp.log), X).path == ("blocks", 1)


def test_a_step_that_writes_to_what_it_was_not_given_is_refused() -> None:
    count = nnx.Variable(jnp.array(0))

    def step(x: Any) -> Any:
        count[...] += 1
        return x

    with pytest.raises(TraceError):
        nnx.find_nan(step)(X)


def test_a_search_inside_of_a_transform_is_refused() -> None:
    with pytest.raises(TraceError, match="outside of them"):
        jax.jit(nnx.find_nan(lambda x: x))(X)


def test_what_is_written_to_a_ref_is_not_followed() -> None:
    def step(x: Any) -> Any:
        ref = jax.new_ref(x)
        ref[...] = jnp.log(ref[...])
        return ref[...]

    with pytest.raises(UnsupportedError, match=r"jax\.Ref"):
        nnx.find_nan(step)(X)


def test_buffers_that_were_donated_before_are_refused_by_path() -> None:
    model = Model(lambda x: x)
    stale = nnx.clone(model)
    nnx.jit(lambda model: None, donate=nnx.Param)(model)
    with pytest.raises(StaleBufferError, match=r"blocks\.0\.scale"):
        nnx.find_nan(call)(stale, X)


def test_arguments_that_are_no_arrays_are_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="x: 'text'"):
        nnx.find_nan(call)(Model(lambda x: x), "text")


# ------------------------------------------------------------------------ how it reads
def test_the_text_says_what_where_from_what_and_what_to_write() -> None:
    step, arguments = log_of_zero()
    number = log_of_zero.__code__.co_firstlineno + 3
    assert str(culprit(step, *arguments)) == (
        "log made infinity from finite inputs (1 of 6 elements, first at [1, 0])\n"
        "  where   model.blocks.1 (Op), forward\n"
        f"  line    test_nans.py:{number}: return jnp.log(x)  # log_of_zero\n"
        "  input   float32[2,3] in [0, 5], 1 zero\n"
        "  output  float32[2,3] in [0, 1.60944], 1 zero, 1 infinite\n"
        "  results output\n"
        "  remedy  the logarithm of zero: add a small number, or compute in "
        "logarithms throughout, with log_softmax, logsumexp or log_sigmoid."
    )


def test_an_input_is_told_by_path_and_kind() -> None:
    step, arguments = nan_in_a_parameter()
    found = culprit(step, *arguments)
    lines = str(found).splitlines()
    assert lines == [
        "input holds NaN (1 of 6 elements, first at [0, 1])",
        "  where   model.inner.kernel",
        f"  output  {lines[2][10:]}",
        "  results output",
        f"  remedy  {found.remedy}",
    ]
    assert lines[2].endswith("1 NaN, model.inner.kernel (Param)")
