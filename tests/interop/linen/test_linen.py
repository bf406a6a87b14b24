"""Linen modules in Sortal models and back; against Flax in test_nnx_names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen

from sortal import nnx
from sortal.errors import ArgumentError
from sortal.interop.linen.collections import boxed, from_linen, to_linen

X = jnp.ones((1, 2))
INIT = linen.initializers.ones_init()


def dense(names: Any = None) -> Any:
    if names is None:
        return linen.Dense(3)
    return linen.Dense(3, kernel_init=linen.with_partitioning(INIT, names))


def test_boxes_of_linen_are_metadata_and_come_back() -> None:
    for box in (linen.with_partitioning, linen.with_logical_partitioning):
        layer = linen.Dense(3, kernel_init=box(INIT, (None, "a")))
        variables = layer.init(jax.random.key(0), X)
        inside = from_linen(variables)
        kernel = inside[("kernel",)]
        assert kernel.get_metadata("out_sharding") == (None, "a")
        assert kernel.value.shape == (2, 3)
        back = to_linen(inside.items())
        assert jax.tree.structure(back) == jax.tree.structure(variables)
        assert variables["params"]["kernel"].names == (None, "a")


def test_a_kind_with_named_axes_is_partitioned_in_linen() -> None:
    named = nnx.Param(jnp.ones(2), out_sharding=("a",))
    assert boxed(named).names == ("a",)
    assert boxed(nnx.Param(1)) == 1


def test_paths_and_leaves_that_do_not_fit_are_listed() -> None:
    with pytest.raises(
        ArgumentError, match=r"one path.*found:\n  a: in cache and another\nRename one"
    ):
        from_linen({"params": {"a": 1}, "cache": {"a": 2}})
    with pytest.raises(
        ArgumentError, match=r"these are not Variables:\n  a\nWrite Param"
    ):
        to_linen([(("a",), jnp.ones(1))])


def test_to_nnx_has_the_methods_of_the_linen_module_and_keeps_variables() -> None:
    class Net(linen.Module):
        def setup(self) -> None:
            self.inner = linen.Dense(3)
            self.n = self.variable("cache", "n", lambda: jnp.array(0))

        def __call__(self, x: Any) -> Any:
            self.n.value += 1
            return self.inner(x)

        def double(self, x: Any) -> Any:
            return 2 * self.inner(x)

    net = nnx.bridge.ToNNX(Net(), rngs=jax.random.key(0)).lazy_init(X)
    assert isinstance(net.module, Net)
    assert net.rngs is net.to_nnx__rngs
    count = net.n
    assert jnp.array_equal(net.double(X), 2 * net(X, mutable=["cache"]))
    assert net.n is count
    assert int(count.value) == 2
    with pytest.raises(
        AttributeError, match="ToNNX of a Net has no attribute 'kernel'"
    ):
        net.kernel  # noqa: B018
    # Equal Linen modules are one structure, so that nothing is compiled twice.
    twin = nnx.bridge.ToNNX(Net(), rngs=jax.random.key(1)).lazy_init(X)
    assert nnx.graphdef(twin) is nnx.graphdef(net)


def test_a_method_of_the_linen_module_makes_the_variables_too() -> None:
    class Scale(linen.Module):
        @linen.compact
        def scaled(self, x: Any) -> Any:
            return x * self.param("scale", linen.initializers.ones_init(), (2,))

    layer = nnx.bridge.ToNNX(Scale(), rngs=jax.random.key(0))
    nnx.bridge.lazy_init(layer.scaled, X)
    assert layer.scale.shape == (2,)
    assert jnp.array_equal(layer.scaled(X), X)


def test_streams_for_one_call_may_be_given() -> None:
    layer = nnx.bridge.ToNNX(linen.Dropout(0.5, deterministic=False))
    keys = nnx.Rngs(dropout=0)
    first = layer(jnp.ones(64), rngs=keys)
    assert not jnp.array_equal(first, layer(jnp.ones(64), rngs=keys))


def test_what_is_no_linen_module_or_no_module_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match=r"ToNNX takes a Linen module, .* found a Lin"
    ):
        nnx.bridge.ToNNX(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ArgumentError, match="lazy_init takes a Module or a method of one"
    ):
        nnx.bridge.lazy_init(len, X)


def test_to_linen_calls_methods_and_may_keep_bare_values() -> None:
    class Scale(nnx.Module):
        def __init__(self, size: int):
            self.w = nnx.Param(jnp.ones(size), out_sharding=("a",))

        def __call__(self, x: Any) -> Any:
            return self.w * x

        def half(self, x: Any) -> Any:
            return self(x) / 2

    layer = nnx.bridge.to_linen(Scale, 2, skip_rng=True)
    variables = layer.init(jax.random.key(0), X)
    assert variables["params"]["w"].get_partition_spec() == jax.P("a")
    halves = layer.apply(variables, X, nnx_method="half")
    assert jnp.array_equal(halves, X / 2)
    bare = nnx.bridge.to_linen(Scale, 2, skip_rng=True, metadata_fn=None)
    assert isinstance(bare.init(jax.random.key(0), X)["params"]["w"], jax.Array)


class Counted(linen.Module):
    """Counts its calls where it may, and sows."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        n = self.variable("batch_stats", "n", lambda: jnp.zeros(()))
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            n.value = n.value + 1
        self.sow("intermediates", "sum", x.sum())
        return linen.Dense(3)(x) + n.value


class Holder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.bridge.ToNNX(Counted(), rngs=rngs).lazy_init(X)

    def __call__(self, x: Any) -> Any:
        return self.inner(x)


class InBridge(nnx.bridge.Module):
    @nnx.bridge.compact
    def __call__(self, x: Any) -> Any:
        return nnx.bridge.linen_in_bridge_mdl(Counted(), name="inner")(x)


@pytest.mark.parametrize("outer", [nnx.bridge.to_linen(Holder), InBridge()])
def test_a_linen_module_inside_changes_what_the_outer_call_may_change(
    outer: Any,
) -> None:
    variables = outer.init(jax.random.key(0), X)
    first = outer.apply(variables, X)
    for n in (1, 2):
        _, new = outer.apply(variables, X, mutable=["batch_stats"])
        variables = {**variables, **new}
        assert new["batch_stats"]["inner"]["n"] == n
        assert "intermediates" not in new
    _, new = outer.apply(variables, X, mutable=["intermediates"])
    assert new["intermediates"]["inner"]["sum"] == (2,)
    assert jnp.allclose(outer.apply(variables, X), first + 2)


def test_a_compiled_function_inside_keeps_what_could_be_changed_at_its_trace() -> None:
    counted = Counted()

    class Compiled(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.inner = nnx.bridge.ToNNX(counted, rngs=rngs).lazy_init(X)

        @nnx.jit
        def __call__(self, x: Any) -> Any:
            return self.inner(x)

    outer = nnx.bridge.to_linen(Compiled)
    variables = outer.init(jax.random.key(0), X)
    outer.apply(variables, X)
    _, new = outer.apply(variables, X, mutable=["batch_stats"])
    assert new["batch_stats"]["inner"]["n"] == 0
    Compiled.__call__.clear_cache()  # type: ignore[attr-defined]
    _, new = outer.apply(variables, X, mutable=["batch_stats"])
    assert new["batch_stats"]["inner"]["n"] == 1


@pytest.mark.parametrize("name", ["module", "rngs", "to_nnx__held"])
def test_names_that_to_nnx_has_itself_are_refused(name: str) -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(3, name=name)(x)

    model = nnx.bridge.ToNNX(Net(), rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=rf"of its own.*:\n  {name}\nRename"):
        model.lazy_init(X)
    assert not [*nnx.state(model, nnx.Param)]
