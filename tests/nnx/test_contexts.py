"""update_context: a module through a transform of one's own, as in Flax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx

from sortal import nnx
from sortal.errors import ArgumentError, TraceError, UnsupportedError

LIBRARIES = pytest.mark.parametrize("lib", [nnx, flax_nnx], ids=["sortal", "flax"])


def compiled(lib: Any, change: Any, tag: str = "test") -> Any:
    """A function of modules over plain ``jax.jit``; and how often it was traced."""
    traces = []

    @jax.jit
    def inside(graphdef: Any, *states: Any) -> Any:
        traces.append(None)
        with lib.merge_context(tag, inner=True) as ctx:
            node = ctx.merge(graphdef, *states)
        out = change(node)
        with lib.split_context(tag) as ctx:
            return ctx.split(node if out is None else out, lib.Param, ...)

    @lib.update_context(tag)
    def outside(node: Any) -> Any:
        with lib.split_context(tag) as ctx:
            graphdef, *states = ctx.split(node, lib.Param, ...)
        graphdef, *states = inside(graphdef, *states)
        with lib.merge_context(tag, inner=False) as ctx:
            return ctx.merge(graphdef, *states)

    return outside, traces


def model_of(lib: Any) -> Any:
    class Model(lib.Module):
        def __init__(self) -> None:
            self.layer = lib.Linear(2, 2, rngs=lib.Rngs(0))
            self.count = lib.Variable(jnp.array(0))

    return Model()


@LIBRARIES
def test_values_are_written_to_the_very_objects(lib: Any) -> None:
    def change(model: Any) -> None:
        model.count[...] += 1
        model.layer.kernel[...] *= 2

    model = model_of(lib)
    layer, kernel, value = model.layer, model.layer.kernel, model.layer.kernel[...]
    f, traces = compiled(lib, change)
    for _ in range(3):
        assert f(model) is model
    assert model.layer is layer
    assert model.layer.kernel is kernel
    assert int(model.count[...]) == 3
    assert jnp.array_equal(model.layer.kernel[...], value * 8)
    assert len(traces) == 1


@LIBRARIES
def test_edits_of_structure_come_out(lib: Any) -> None:
    def change(model: Any) -> None:
        model.name = "changed"
        model.new = lib.Param(model.count[...] + 5)
        model.itself = model
        model.tied = model.layer.kernel
        del model.layer.bias

    model = model_of(lib)
    kernel = model.layer.kernel
    assert compiled(lib, change)[0](model) is model
    assert (model.name, int(model.new[...])) == ("changed", 5)
    assert model.itself is model
    assert model.tied is kernel
    assert not hasattr(model.layer, "bias")


@LIBRARIES
def test_several_objects_in_a_tuple_keep_what_they_share(lib: Any) -> None:
    def change(pair: Any) -> None:
        a, b = pair
        a.layer, b.layer = b.layer, a.layer
        b.count[...] += 10

    a, b = model_of(lib), model_of(lib)
    b.count = a.count
    first, second = a.layer, b.layer
    out = compiled(lib, change)[0]((a, b))
    assert out[0] is a
    assert out[1] is b
    assert a.layer is second
    assert b.layer is first
    assert a.count is b.count
    assert int(a.count[...]) == 10


@LIBRARIES
def test_a_part_or_a_new_object_may_come_out(lib: Any) -> None:
    model = model_of(lib)
    layer = model.layer
    assert compiled(lib, lambda model: model.layer)[0](model) is layer

    def wrapped(model: Any) -> Any:
        new = lib.Dict(inner=model.layer)
        new.inner.bias[...] += 1
        return new

    new = compiled(lib, wrapped)[0](model)
    assert new.inner is layer
    assert jnp.array_equal(layer.bias[...], jnp.ones(2))


@LIBRARIES
def test_a_context_is_known_by_its_tag_while_it_lasts(lib: Any) -> None:
    with lib.update_context("outer") as outer:
        with lib.update_context("outer") as inner:
            assert lib.current_update_context("outer") is inner
        assert lib.current_update_context("outer") is outer
        with pytest.raises(ValueError, match="No update context found for tag 'else'"):
            lib.current_update_context("else")
    with pytest.raises(ValueError, match="No update context found for tag 'outer'"):
        lib.current_update_context("outer")


@LIBRARIES
def test_without_a_tag_it_is_split_and_merge(lib: Any) -> None:
    model = model_of(lib)
    with lib.split_context() as ctx:
        graphdef, state = ctx.split(model)
    with lib.merge_context() as ctx:
        copy = ctx.merge(graphdef, state)
    assert copy is not model
    assert jnp.array_equal(copy.layer.kernel[...], model.layer.kernel[...])


def test_a_second_split_or_merge_in_a_context_is_refused() -> None:
    model = model_of(nnx)
    with nnx.update_context("x"), nnx.split_context("x") as ctx:
        graphdef, state = ctx.split(model)
        with pytest.raises(UnsupportedError, match=r"ctx\.split\(\(a, b\)\)"):
            ctx.split(model)
    with nnx.merge_context() as merging:
        merging.merge(graphdef, state)
        with pytest.raises(UnsupportedError, match=r"ctx\.split\(\(a, b\)\)"):
            merging.merge(graphdef, state)


def test_an_outer_merge_takes_what_the_inner_split_gave() -> None:
    model = model_of(nnx)
    with nnx.update_context("x"):
        with nnx.split_context("x") as ctx:
            graphdef, state = ctx.split(model)
        with (
            nnx.merge_context("x", inner=False) as ctx,
            pytest.raises(ArgumentError, match=r"merge_context\('x', inner=True\)"),
        ):
            ctx.merge(graphdef, state)


def test_an_outer_merge_inside_the_trace_is_refused() -> None:
    model = model_of(nnx)

    def change(copy: Any) -> None:
        copy.count[...] += 1
        with nnx.split_context("test") as ctx:
            graphdef, state = ctx.split(copy)
        with nnx.merge_context("test", inner=False) as ctx:
            ctx.merge(graphdef, state)

    with pytest.raises(TraceError):
        compiled(nnx, change)[0](model)
    assert int(model.count[...]) == 0
