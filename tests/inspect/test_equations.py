"""A program evaluated equation by equation: what is blamed, and what is not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sortal as nnx
from blocks import INF, Model, X, call, culprit, train


# ------------------------------------------------------------------ what is not blamed
def masked_softmax(model: Any, x: Any) -> Any:
    logits = jnp.where(jnp.arange(3) < 2, model(x), -INF)
    return jax.nn.softmax(logits), jnp.argmax(logits)


def double_where(model: Any, x: Any) -> Any:
    def loss(model: Any) -> Any:
        x_ = model(x)
        return jnp.where(x_ > 0, jnp.sqrt(jnp.where(x_ > 0, x_, 1)), 0).sum()

    return nnx.value_and_grad(loss)(model)


def chosen_afterwards(model: Any, x: Any) -> Any:
    return jnp.where(x > 0, jnp.log(model(x)), 0)


def running_maximum(model: Any, x: Any) -> Any:
    body = lambda top, row: (jnp.maximum(top, row.max()), top > 0)  # noqa: E731
    return jax.lax.scan(body, -INF, model(x))


def saturated(model: Any, x: Any) -> Any:
    return jnp.tanh(jnp.exp(model(x) * 100)), 1 / jnp.exp(model(x) * 100)


def integers(model: Any, x: Any) -> Any:
    return jnp.isnan(jnp.log(model(x) - 2)), (model(x) / 0).astype(jnp.int32)


def printed(model: Any, x: Any) -> Any:
    jax.debug.print("{}", x.sum())
    return model(x)


def random_numbers(model: Any, x: Any) -> Any:
    drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    return drop(model(x)) + jax.random.normal(jax.random.key(0), x.shape)


@pytest.mark.parametrize(
    "step",
    [
        masked_softmax,
        double_where,
        chosen_afterwards,
        running_maximum,
        saturated,
        integers,
        printed,
        random_numbers,
    ],
)
def test_what_ends_finite_is_not_blamed(step: Any) -> None:
    assert nnx.find_nan(step)(Model(lambda x: x), X) is None


def test_steps_of_training_that_are_finite_are_all_finite() -> None:
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Dropout(0.5, rngs=nnx.Rngs(1)),
        nnx.Linear(4, 1, rngs=nnx.Rngs(2)),
    )
    optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
    assert nnx.find_nan(train)(model, optimizer, X) is None


def test_infinity_that_is_returned_is_told_by_the_line_that_writes_it() -> None:
    def step(x: Any) -> Any:
        return jnp.where(x > 2, x, -INF)  # a constant

    found = culprit(step, X)
    assert found.operation == "constant"
    assert found.code.endswith("# a constant")


def test_of_a_mask_and_an_overflow_the_overflow_is_blamed() -> None:
    def step(x: Any) -> Any:
        logits = jnp.where(x > 0, jnp.exp(x * 100), -INF)  # the overflow
        return jax.nn.softmax(logits)

    found = culprit(step, X)
    assert (found.operation, found.code[-14:]) == ("exp", "# the overflow")


def test_nan_that_a_step_closes_over_is_told() -> None:
    constant = jnp.array([1.0, jnp.nan])
    found = culprit(lambda x: x + constant, jnp.ones(2))
    assert found.operation == "closed over"
    assert (found.output.shape, found.output.nans) == ((2,), 1)


def test_nan_in_an_input_that_reaches_no_result_is_not_told() -> None:
    model = Model(lambda x: x)
    model.blocks[0].unused = nnx.BatchStat(jnp.array(jnp.nan))
    assert nnx.find_nan(call)(model, X) is None


def test_of_two_culprits_the_first_is_told_and_every_result() -> None:
    def step(x: Any) -> Any:
        return {"b": jnp.log(x), "a": 1 / x, "c": x}

    found = culprit(step, X)
    assert found.operation == "log"
    assert found.results == ("output['a']", "output['b']")


def test_in_a_mesh_of_devices_the_equation_inside_is_found() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def block(x: Any) -> Any:
        mean = jax.lax.pmean(x, "data")
        body = lambda total, row: (total + row.sum(), row)  # noqa: E731
        rows = jnp.log(x)  # log
        return jax.lax.scan(body, rows[0, 1], rows)[1] / mean

    mapped = jax.shard_map(block, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    found = culprit(call, Model(mapped), X)
    assert (found.operation, found.code[-5:], found.path) == (
        "log",
        "# log",
        ("blocks", 1),
    )
