"""Modules written as Linen's are: the same programs give the same with Flax."""

from __future__ import annotations

import copy
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from flax import nnx as flax_nnx
from flax.core import FrozenDict

from sortal import nnx
from sortal.errors import ArgumentError

X = jnp.arange(6.0).reshape(3, 2) / 6
PROGRAMS: list[Any] = []


def alike(program: Any) -> Any:
    """A program that must have equal output under either library."""
    PROGRAMS.append(program)
    return program


def plain(x: Any) -> Any:
    """Output as numbers, texts and containers of them."""
    if isinstance(x, dict | FrozenDict):
        return {str(k): plain(v) for k, v in sorted(x.items())}
    if isinstance(x, tuple | list):
        return [plain(v) for v in x]
    if type(x).__name__ == "NNXMeta":
        return [x.var_type.__name__, plain(x.value), str(x.get_partition_spec())]
    return np.asarray(x).tolist() if isinstance(x, jax.Array | np.ndarray) else x


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_a_program_has_the_output_that_it_has_in_flax(program: Any) -> None:
    ours, theirs = program(nnx), program(flax_nnx)
    assert plain(ours) == plain(theirs)


def layers(nnx: Any) -> Any:
    bridge = nnx.bridge

    class Dense(bridge.Module):
        dout: int

        @bridge.compact
        def __call__(self, x: Any) -> Any:
            init = nnx.initializers.lecun_normal()
            w = self.param("kernel", init, (x.shape[-1], self.dout))
            b = self.param("bias", nnx.initializers.zeros_init(), (self.dout,))
            n = self.variable("counts", "n", lambda: jnp.zeros((), jnp.int32))
            n[...] += 1
            return x @ w[...] + b[...][None]

    class Compact(bridge.Module):
        dout: int

        @bridge.compact
        def __call__(self, x: Any) -> Any:
            x = jax.nn.relu(Dense(4)(x))
            assert bridge.current_module() is self
            x = Dense(4, name="middle")(x)
            return Dense(self.dout)(x)

        def half(self, x: Any) -> Any:
            return self(x) / 2

    class Setup(bridge.Module):
        dout: int

        def setup(self) -> None:
            self.first = Dense(4)
            self.second = Dense(self.dout)

        def __call__(self, x: Any) -> Any:
            return self.second(self.first(x))

    return types.SimpleNamespace(Dense=Dense, Compact=Compact, Setup=Setup)


@alike
def compact_and_setup_make_and_take_variables(nnx: Any) -> Any:
    found = []
    for cls in (layers(nnx).Dense, layers(nnx).Compact, layers(nnx).Setup):
        model = cls(3)
        y, variables = model.init_with_output(0, X)
        again = cls(3).init({"params": jax.random.key(1)}, X)
        z, after = model.apply(variables, X, mutable=["counts"])
        found += [y, variables, again, z, after, model.apply(again, X)]
        found += [model.scope is None, bool(model.variables)]
    return found


@alike
def methods_are_chosen_by_name_or_as_functions(nnx: Any) -> Any:
    kinds = layers(nnx)
    model = kinds.Compact(3)
    variables = model.init(0, X, method=kinds.Compact.half)
    return [
        model.apply(variables, X, method="half"),
        model.apply(variables, X, method=kinds.Compact.half),
    ]


@alike
def modules_of_other_styles_are_submodules(nnx: Any) -> Any:
    bridge = nnx.bridge

    class Net(bridge.Module):
        @bridge.compact
        def __call__(self, x: Any) -> Any:
            x = bridge.nnx_in_bridge_mdl(lambda r: nnx.Linear(2, 3, rngs=r))(x)
            x = bridge.linen_in_bridge_mdl(linen.Dense(4))(x)
            return bridge.linen_in_bridge_mdl(linen.Dense(2), name="last")(x)

    variables = Net().init(nnx.Rngs(0, params=1), X)
    return jax.tree.map(jnp.shape, variables), Net().apply(variables, X).shape


@alike
def streams_give_keys_and_inits_may_be_partitioned(nnx: Any) -> Any:
    class Noisy(nnx.bridge.Module):
        @nnx.bridge.compact
        def __call__(self, x: Any) -> Any:
            assert self.is_initializing() is (self.scope.mutable is True)
            shape = jax.random.uniform(self.make_rng("noise"), x.shape)
            return x + shape + self.param("w", nnx.initializers.ones_init(), (2,))

    variables = Noisy().init({"params": 0, "noise": 1}, X)
    return variables, Noisy().apply(variables, X, rngs={"noise": jax.random.key(3)})


@alike
def a_class_by_functions(nnx: Any) -> Any:
    layer = nnx.bridge.functional(nnx.Linear)(2, 3)
    state = layer.init(rngs=nnx.Rngs(0))
    y, _ = layer.apply(state)(X)
    return y, layer.graphdef is not None


@alike
def variables_with_metadata_are_boxed_whole(nnx: Any) -> Any:
    class Tagged(nnx.Module):
        def __init__(self, *, rngs: Any) -> None:
            self.w = nnx.Param(jnp.ones(2), note="a")
            self.n = nnx.BatchStat(jnp.zeros(2))

        def __call__(self, x: Any) -> Any:
            return x * self.w[...] * len(self.w.note)

    model = nnx.bridge.to_linen(Tagged)
    variables = model.init(jax.random.key(0), X)
    box = variables["params"]["w"]
    assert isinstance(box, nnx.bridge.NNXMeta)
    assert isinstance(box.to_nnx_variable(), nnx.Param)
    return [
        (box.var_type.__name__, box.value, box.metadata["note"]),
        box.unbox(),
        box.replace_boxed(3).value,
        variables["batch_stats"],
        model.apply(variables, X),
    ]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_what_is_made_linen_can_be_copied(copied: Any) -> None:
    layer = copied(nnx.bridge.to_linen(nnx.Linear, 2, out_features=3))
    assert layer.out_features == 3
    assert layer.init_with_output(jax.random.key(0), X)[0].shape == (3, 3)


def test_a_box_keeps_the_names_of_axes_when_linen_adds_and_removes_one() -> None:
    box = nnx.bridge.NNXMeta(nnx.Param, jnp.ones(2), {"out_sharding": ("a",)})
    named = {nnx.PARTITION_NAME: "layers"}
    more = box.add_axis(0, named)
    assert more.get_partition_spec() == jax.P("layers", "a")
    assert more.remove_axis(0, named).get_partition_spec() == jax.P("a")


def test_what_cannot_be_is_refused() -> None:
    kinds = layers(nnx)
    with pytest.raises(ArgumentError, match=r"param works in setup\(\) and in methods"):
        kinds.Dense(3)(X)
    variables = kinds.Dense(3).init(0, X)
    with pytest.raises(ArgumentError, match=r"kernel has the shape \[\(2, 3\)\]; init"):
        kinds.Dense(4).apply(variables, X)
    with pytest.raises(ArgumentError, match="compact is for methods of"):
        nnx.bridge.compact(lambda self: 0)(nnx.Module())
    with pytest.raises(ArgumentError, match="is called in a method of"):
        nnx.bridge.linen_in_bridge_mdl(linen.Dense(3))
    with pytest.raises(ArgumentError, match="call init before apply"):
        nnx.bridge.functional(nnx.Linear)(2, 3).apply({})
