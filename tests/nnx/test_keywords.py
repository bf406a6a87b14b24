"""Keywords of NNX's two modes: taken, and of no effect."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sortal
from sortal import nnx
from sortal.errors import ArgumentError
from sortal.nnx.keywords import ignoring

MESH = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
X = jnp.linspace(-1, 1, 6).reshape(3, 2)
MODES: list[dict[str, Any]] = [
    {},
    {"graph": None, "graph_updates": None},
    {"graph": True, "graph_updates": True},
    {"graph": False, "graph_updates": False},
]


def model() -> Any:
    return nnx.Linear(2, 2, rngs=nnx.Rngs(0))


def square(m: Any) -> Any:
    return (m(X) ** 2).mean()


def scaled(m: Any, x: Any) -> Any:
    return m.kernel * x


def by_hand(on: dict[str, Any]) -> Any:
    f = nnx.custom_vjp(**on)(scaled)
    bare = on.get("graph") is False
    f.defvjp(
        lambda m, x: (scaled(m, x), x),
        lambda x, g: ({"kernel": (g if bare else g[1]) * x, "bias": None}, None),
    )
    return nnx.grad(lambda m: f(m, 2.0).sum())(model())


AXES: dict[str, Any] = {"in_axes": (nnx.Carry, 0), "out_axes": nnx.Carry}
TRANSFORMS = {
    "jit": lambda on: nnx.jit(lambda m: m(X), **on)(model()),
    "eval_shape": lambda on: nnx.eval_shape(model, **on).kernel.shape,
    "grad": lambda on: nnx.grad(square, **on)(model()),
    "value_and_grad": lambda on: nnx.value_and_grad(**on)(square)(model()),
    "vjp": lambda on: nnx.vjp(square, model(), **on)[1](1.0),
    "jvp": lambda on: nnx.jvp(
        square, (model(),), (nnx.state(model(), nnx.Param),), **on
    ),
    "make_jaxpr": lambda on: str(nnx.make_jaxpr(lambda m: m(X), **on)(model())),
    "custom_vjp": by_hand,
    "remat": lambda on: nnx.remat(model().__call__, **on)(X),
    "checkpoint": lambda on: nnx.checkpoint(**on)(square)(model()),
    "vmap": lambda on: nnx.vmap(in_axes=(None, 0), **on)(lambda m, x: m(x))(model(), X),
    "shard_map": lambda on: nnx.shard_map(
        lambda x: 2 * x,
        mesh=MESH,
        in_specs=jax.P("data"),
        out_specs=jax.P("data"),
        **on,
    )(X),
    "scan": lambda on: nnx.scan(lambda c, x: c + x, **AXES, **on)(jnp.zeros(2), X),
    "while_loop": lambda on: nnx.while_loop(lambda x: x < 3, lambda x: x + 1, 0, **on),
    "fori_loop": lambda on: nnx.fori_loop(0, 3, lambda i, x: x + i, 0, **on),
    "cond": lambda on: nnx.cond(True, lambda x: x + 3, lambda x: x, 0, **on),
    "switch": lambda on: nnx.switch(1, [lambda x: x, lambda x: x + 3], 0, **on),
    "split_rngs": lambda on: nnx.split_rngs(**on, splits=3)(
        lambda r: r.default.key.shape
    )(nnx.Rngs(0)),
    "fork_rngs": lambda on: nnx.fork_rngs(**on)(lambda r: r.default.bits())(
        nnx.Rngs(0)
    ),
}
VERBS = {
    "state": lambda **on: nnx.state(model(), nnx.Param, **on),
    "graphdef": lambda **on: nnx.graphdef(model(), **on),
    "split": lambda **on: nnx.split(model(), nnx.Param, ..., **on)[1],
    "clone": lambda **on: nnx.state(nnx.clone(model(), **on)),
    "variables": lambda **on: nnx.variables(model(), nnx.Param, **on),
    "iter_graph": lambda **on: [p for p, _ in nnx.iter_graph(model(), **on)],
    "iter_modules": lambda **on: [p for p, _ in nnx.iter_modules(model(), **on)],
    "iter_children": lambda **on: [k for k, _ in nnx.iter_children(model(), **on)],
    "as_abstract": lambda **on: nnx.as_abstract(nnx.eval_shape(model), **on).bias.shape,
    "get_abstract_model": lambda **on: nnx.get_abstract_model(model, MESH, **on)[0],
    "reseed": lambda **on: nnx.reseed(nnx.Rngs(0), default=1, **on),
    "Optimizer": lambda **on: nnx.state(nnx.Optimizer(model(), optax.adam(1.0), **on)),
    "ModelAndOptimizer": lambda **on: nnx.state(
        nnx.ModelAndOptimizer(model(), optax.sgd(1.0), **on)
    ),
    "EMA": lambda **on: nnx.EMA(model(), 0.5, **on).params,
    "with_attributes": lambda **on: nnx.state(
        nnx.with_attributes(model(), use_bias=True, **on)
    ),
}


def same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("on", MODES[1:], ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_takes_both_keywords_and_does_what_it_does(
    name: str, on: dict[str, Any]
) -> None:
    same(TRANSFORMS[name](on), TRANSFORMS[name]({}))


@pytest.mark.parametrize("graph", [None, True, False])
@pytest.mark.parametrize("name", VERBS)
def test_a_verb_takes_graph_and_does_what_it_does(name: str, graph: Any) -> None:
    same(VERBS[name](graph=graph), VERBS[name]())


@pytest.mark.parametrize("flag", [True, False])
def test_merge_takes_copy_and_always_makes_new_variables(flag: bool) -> None:
    old = model()
    assert nnx.merge(*nnx.split(old), copy=flag).kernel is not old.kernel


@pytest.mark.parametrize("name", [*TRANSFORMS, *VERBS, "merge"])
def test_documentation_and_signature_name_the_keyword(name: str) -> None:
    thing = getattr(nnx, name)
    keyword = "copy" if name == "merge" else "graph"
    assert keyword in inspect.signature(thing).parameters
    if name not in {"split_rngs", "fork_rngs", "custom_vjp"}:  # where it has a meaning
        assert f"  {keyword}: ignored; for NNX compatibility." in thing.__doc__
    assert "_unknown" not in inspect.signature(thing).parameters


@pytest.mark.parametrize("name", ["state", "clone", "variables", "merge"])
def test_another_keyword_is_refused_as_ever(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"{name} has no option grpah"):
        getattr(nnx, name)(*sortal.split(model()), grpah=True)


def test_what_jit_gives_is_the_same_object_with_all_its_methods() -> None:
    f = nnx.jit(lambda m: m(X), graph=True)
    assert type(f) is type(sortal.jit(square))
    assert "stablehlo" in f.lower(model()).as_text()


def test_both_optimizers_are_of_one_family() -> None:
    mine = nnx.Optimizer(model(), optax.adam(0.1))
    native = sortal.Optimizer(model(), optax.adam(0.1))
    assert isinstance(mine, sortal.Optimizer)
    assert nnx.Optimizer[nnx.Linear] is nnx.Optimizer
    same(jax.tree.leaves(nnx.state(mine)), jax.tree.leaves(nnx.state(native)))


def test_the_decorator_adds_to_signature_and_documentation_and_drops_the_keyword() -> (
    None
):
    def f(x: int, *, y: int = 0, **_unknown: int) -> tuple[int, int]:
        """One.

        Args:
          x: a number.
          y: another.

        Returns:
          Both.
        """
        assert not _unknown
        return x, y

    g = ignoring("graph", empty=("axes",))(f)
    assert g(1, y=2, graph=True, axes=()) == (1, 2)
    assert list(inspect.signature(g).parameters) == ["x", "y", "graph", "axes"]
    assert g.__doc__ == (
        "One.\n\nArgs:\n  x: a number.\n  y: another.\n"
        "  graph: ignored; for NNX compatibility.\n"
        "  axes: must be empty; for NNX compatibility.\n\nReturns:\n  Both."
    )
    with pytest.raises(AssertionError):
        g(1, axes=("a",))
