"""What holds a buffer that was donated says so where it is read."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.errors import StaleBufferError


class Model(nnx.Module):
    def __init__(self) -> None:
        self.layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))


@nnx.jit(donate=nnx.Param)
def train(model: Any) -> None:
    model.layer.kernel[...] *= 2


def stale() -> tuple[Any, Any, Any]:
    """A model after a step that donates, and a State and a clone from before."""
    model = Model()
    state, twin = nnx.state(model), nnx.clone(model)
    train(model)
    return model, state, twin


READS: dict[str, Callable[[Any], Any]] = {
    "+": lambda x: x + 1,
    "+ from the right": lambda x: 1 + x,
    "@ with another": lambda x: jnp.ones((1, 2)) @ x,
    "==": lambda x: x == 1,
    "-": operator.neg,
    "an item": lambda x: x[0, 0],
    "NumPy": np.asarray,
    "a method": lambda x: x.mean(),
}


@pytest.mark.parametrize("name", READS)
def test_a_variable_says_so_by_path_and_kind_where_it_is_read(name: str) -> None:
    _, state, twin = stale()
    with pytest.raises(StaleBufferError, match=r"layer\.kernel \(Param\)") as e:
        READS[name](twin.layer.kernel)
    assert "donated to an earlier call" in str(e.value)
    with pytest.raises(StaleBufferError, match=r"\(Param\): float32\[2,2\]"):
        READS[name](state["layer"]["kernel"])


def test_the_error_of_xla_itself_is_explained_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What JAX has not noticed XLA does, with another class of error."""
    _, _, twin = stale()

    def add(x: Any, other: Any) -> Any:
        raise ValueError("INVALID_ARGUMENT: Buffer has been deleted or donated.")

    monkeypatch.setattr(type(jnp.ones(1)), "__add__", add)
    with pytest.raises(StaleBufferError, match=r"layer\.kernel \(Param\)"):
        operator.add(twin.layer.kernel, 1)
    with pytest.raises(ValueError, match="INVALID"):
        operator.add(nnx.Param(jnp.ones(2)), 1)


def test_functions_that_donate_are_named() -> None:
    _, _, twin = stale()
    line = train._fn.__code__.co_firstlineno  # type: ignore[attr-defined]
    with pytest.raises(StaleBufferError, match=rf"train \(test_stale\.py:{line}\)"):
        operator.add(twin.layer.kernel, 1)


def test_update_with_a_stale_state_is_refused_and_changes_nothing() -> None:
    model, state, _ = stale()
    before = model.layer.kernel.value
    with pytest.raises(StaleBufferError) as e:
        nnx.update(model, state)
    text = str(e.value)
    assert text.startswith("2 leaves hold buffers that were donated")
    assert "layer.bias (Param): float32[2]\n" in text
    assert "layer.kernel (Param): float32[2,2]\n" in text
    assert "clone(model, arrays=True)" in text
    assert model.layer.kernel.value is before


def test_a_stale_state_or_array_in_a_call_is_named_by_argument() -> None:
    _, state, twin = stale()
    arrays = {"w": twin.layer.kernel.value}
    step = nnx.jit(lambda params, batch: jax.tree.leaves((params, batch)))
    with pytest.raises(StaleBufferError) as e:
        step(state, arrays)
    text = str(e.value)
    assert text.startswith("3 leaves")
    assert "params: layer.kernel (Param): float32[2,2]" in text
    assert "batch['w']: float32[2,2]" in text
    with pytest.raises(StaleBufferError, match=r"params: layer\.bias \(Param\)"):
        nnx.find_nan(step)(state, jnp.ones(2))


def test_what_needs_no_values_still_works() -> None:
    model, state, twin = stale()
    kernel = state["layer"]["kernel"]
    assert (kernel.shape, kernel.dtype) == ((2, 2), jnp.float32)
    assert "Param" in str(state)
    assert nnx.eval_shape(lambda m: m.layer(jnp.ones((1, 2))), twin).shape == (1, 2)
    nnx.update(twin, nnx.state(model))
    assert jnp.array_equal(twin.layer.kernel, model.layer.kernel)


def test_other_errors_of_operators_are_left_as_they_are() -> None:
    kernel: Any = nnx.Param(jnp.ones(2))
    with pytest.raises(TypeError, match="unsupported"):
        operator.add(kernel, "text")
