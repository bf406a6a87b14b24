"""split_inputs and merge_inputs do what Flax's do."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from flax.nnx.transforms import general as theirs

from sortal import nnx

X = jnp.arange(6.0).reshape(3, 2)


def compiled(lib: Any, general: Any) -> Any:
    """Values, an edit, a new Variable and the model itself come out."""

    @general.split_inputs
    @jax.jit
    @general.merge_inputs
    def step(model: Any, twin: Any, x: Any) -> Any:
        assert model is twin
        y = model(x)
        model.kernel[...] *= 0
        model.seen, model.name = lib.BatchStat(x.sum()), "b"
        return y, model

    model = lib.Linear(2, 3, rngs=lib.Rngs(0))
    outs = [step(model, model, X), step(model, model, X)]
    assert all(returned is model for _, returned in outs)
    return [y for y, _ in outs], model.kernel[...], model.seen[...], model.name


def branches(lib: Any, general: Any) -> Any:
    def count(model: Any, x: Any) -> Any:
        model.n[...] += 1
        return model.n * x

    model = lib.Dict(n=lib.Variable(jnp.array(1)))
    choose = general.split_inputs(jax.lax.cond)
    inner = [general.merge_inputs(f) for f in (count, lambda model, x: x + model.n)]
    return [choose(p, *inner, model, jnp.array(5)) for p in (True, False)], model.n[...]


def mapped(lib: Any, general: Any) -> Any:
    axes = (None, 0)

    @general.split_inputs
    @partial(jax.vmap, in_axes=axes, out_axes=(axes, 0))
    @general.merge_inputs
    def forward(model: Any, x: Any) -> Any:
        return model(x)

    return forward(lib.Linear(2, 3, rngs=lib.Rngs(0)), X)


def without_models(lib: Any, general: Any) -> Any:
    step = general.split_inputs(ctxtag="own")(
        jax.jit(general.merge_inputs(ctxtag="own")(lambda x: x + 1))
    )
    return step(X)


@pytest.mark.parametrize("program", [compiled, branches, mapped, without_models])
def test_a_program_gives_what_it_gives_with_flax(program: Any) -> None:
    ours = program(nnx, nnx.transforms.general)
    flax = program(flax_nnx, theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, flax)
