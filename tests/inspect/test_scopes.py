"""Paths of modules in traced programs: how they are found, and what that leaves be."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import pytest
from jax.extend.source_info_util import current_name_stack

import sortal as nnx
from blocks import Model, X, call, culprit


def test_nothing_watches_the_thread_afterwards_even_after_an_error() -> None:
    def block(x: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        nnx.find_nan(call)(Model(block), X)
    assert sys.getprofile() is None
    assert str(current_name_stack()) == ""


def test_a_profiler_stays_in_place_and_costs_the_path_alone() -> None:
    seen = []
    sys.setprofile(lambda *event: seen.append(event))
    try:
        found = culprit(call, Model(jnp.log), X)
        assert sys.getprofile() is not None
    finally:
        sys.setprofile(None)
    assert seen
    assert (found.operation, found.path, found.module) == ("log", (), "")


def test_threads_search_side_by_side() -> None:
    functions = [jnp.log, jnp.reciprocal, jnp.sqrt] * 2

    def search(k: int) -> Any:
        model = Model(functions[k])
        model.blocks = model.blocks[1 - k % 2 :]
        found = culprit(call, model, -jnp.abs(X - X))
        return found.operation, found.path

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(search, [0, 1, 3, 4]))
    assert found == [
        ("log", ("blocks", 0)),
        ("integer_pow", ("blocks", 1)),
        ("log", ("blocks", 1)),
        ("integer_pow", ("blocks", 0)),
    ]


def test_a_program_that_compares_structures_is_searched_without_paths() -> None:
    def step(model: Any, x: Any) -> Any:
        a, b = map(nnx.graphdef, model.blocks)
        assert a == b
        return model(x)

    model = Model(jnp.log)
    model.blocks[0].fn = jnp.log
    found = culprit(step, model, X - X)
    assert (found.operation, found.path) == ("log", ("blocks", 0))


def test_a_model_made_inside_the_step_is_told_by_its_class_and_paths() -> None:
    def step(x: Any) -> Any:
        return Model(jnp.log)(x)

    found = culprit(step, X)
    assert (found.argument, found.path, found.module) == ("", ("blocks", 1), "Op")


def test_a_part_of_a_model_keeps_its_path_in_transforms() -> None:
    def step(model: Any, x: Any) -> Any:
        return nnx.value_and_grad(lambda block: block(x).sum())(model.blocks[1])

    assert culprit(step, Model(jnp.log), X).path == ("blocks", 1)


def test_a_replica_that_cannot_be_told_is_none() -> None:
    def step(model: Any, x: Any) -> Any:
        return nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(model, x)

    found = culprit(step, Model(jnp.log), jnp.ones((2, 2)).at[1, 0].set(0))
    assert (found.replicas, found.output.first) == ((None,), (1, 0))
