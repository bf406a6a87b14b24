"""capture: what a call sows is returned, and the model left as it was."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

from sortal import nnx
from sortal.errors import ArgumentError


class Seen(nnx.Intermediate):
    pass


class Inner(nnx.Module):
    def __call__(self, x: Any) -> Any:
        self.sow(Seen, "y", x)
        return x


class Net(nnx.Module):
    def __init__(self) -> None:
        self.layers = [Inner(), Inner()]

    def __call__(self, x: Any) -> Any:
        self.sow(nnx.Intermediate, "x", x)
        for layer in self.layers:
            x = layer(2 * x)
        return x

    def fails(self, x: Any) -> Any:
        self(x)
        raise RuntimeError


def test_each_kind_has_a_state_and_nothing_is_left() -> None:
    net = Net()
    out, seen, rest = nnx.capture(net, Seen, nnx.Intermediate)(1)
    assert out == 4
    assert seen.to_pure_dict() == {"layers": {0: {"y": (2,)}, 1: {"y": (4,)}}}
    assert rest.to_pure_dict() == {"x": (1,)}
    assert not nnx.state(net).paths()


def test_what_was_sown_before_is_there_afterwards_even_after_an_error() -> None:
    net = Net()
    net(1)
    before = nnx.state(net).to_pure_dict()
    net_of = nnx.variables(net)
    nnx.capture(net, nnx.Intermediate)(5)
    with pytest.raises(RuntimeError):
        nnx.capture(net.fails, nnx.Intermediate)(5)
    assert nnx.state(net).to_pure_dict() == before
    assert nnx.variables(net)["x"] is net_of["x"]


def test_functions_methods_decorators_and_traces() -> None:
    net = Net()

    @nnx.jit
    @nnx.capture(Seen)
    def forward(net: Any, x: Any) -> Any:
        return net.layers[0](x)

    out, seen = forward(net, jnp.array(3))
    assert (int(out), seen["layers"][0]["y"].value) == (3, (3,))
    assert not nnx.state(net).paths()
    assert nnx.capture(net.__call__)(1) == 4


def test_a_perturbation_put_in_is_differentiated() -> None:
    class Perturbed(nnx.Module):
        def __call__(self, x: Any) -> Any:
            return (3 * self.perturb("at", x)).sum()

    net = Perturbed()
    _, zeros = nnx.capture(net, nnx.Perturbation)(jnp.ones(2))

    def loss(zeros: Any, net: Any, x: Any) -> Any:
        return nnx.capture(net, init=zeros)(x)

    grads = nnx.grad(loss)(zeros, net, jnp.ones(2))
    assert grads["at"].value.tolist() == [3, 3]
    assert not nnx.state(net).paths()


def test_what_capture_cannot_do_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match="capture needs to know which module sows: a"
    ):
        nnx.capture(lambda x: x, Seen)(1)


# ------------------------------------------------------------ Flax's layers in models
class TheirLayer(flax_nnx.Module):
    """A layer of Flax that sows and perturbs by Flax's own kinds."""

    def __init__(self, rngs: Any):
        self.linear = flax_nnx.Linear(2, 2, rngs=rngs)

    def features(self, x: Any) -> Any:
        return self.linear(x)

    def __call__(self, x: Any) -> Any:
        y = self.perturb("at", self.features(x))
        self.sow(flax_nnx.Intermediate, "y", y)
        self.sow(flax_nnx.Intermediate, "features", 2 * y)
        return y


def holder_of(lib: Any) -> Any:
    class Holder(lib.Module):
        def __init__(self) -> None:
            self.theirs = TheirLayer(flax_nnx.Rngs(0))
            self.scale = lib.Param(jnp.array(2.0))

        def __call__(self, x: Any) -> Any:
            self.sow(lib.Intermediate, "x", x)
            return self.theirs(x) * self.scale[...]

    return Holder()


def flat(lib: Any, state: Any) -> Any:
    pairs = lib.to_flat_state(state)
    leaves = [(path, jax.tree.leaves(leaf)) for path, leaf in pairs]
    return [(path, [np.asarray(x).tolist() for x in xs]) for path, xs in leaves]


def test_what_layers_of_flax_sow_is_captured_as_by_flax() -> None:
    def program(lib: Any) -> Any:
        model, x = holder_of(lib), jnp.ones((1, 2))
        before = sorted(vars(model.theirs))
        _, seen = lib.capture(model, lib.Intermediate)(x)
        jitted = lib.jit(lambda m, x: lib.capture(m, lib.Intermediate)(x))
        _, again = jitted(model, x)
        _, start = lib.capture(model, lib.Perturbation)(x)

        def loss(model: Any, perturbations: Any) -> Any:
            run = lib.capture(model, lib.Intermediate, init=perturbations)
            y, seen = run(x)
            return (y**2).sum(), seen

        by = lib.grad(loss, argnums=(0, 1), has_aux=True)
        (_, grads), sown = by(model, start)
        _, out = lib.capture(model, lib.Intermediate, method_outputs=lib.Intermediate)(
            x
        )
        assert sorted(vars(model.theirs)) == before
        return [flat(lib, s) for s in (seen, again, start, grads, sown, out)]

    assert program(nnx) == program(flax_nnx)


def test_a_model_of_flax_is_captured_in_place() -> None:
    layer, x = TheirLayer(flax_nnx.Rngs(0)), jnp.ones((1, 2))
    _, seen = nnx.capture(layer, nnx.Intermediate)(x)
    _, expected = flax_nnx.capture(layer, flax_nnx.Intermediate)(x)
    assert flat(nnx, seen) == flat(flax_nnx, expected)
    assert not hasattr(layer, "__captures__")


def test_what_is_recorded_may_be_left_out_where_nothing_is_captured() -> None:
    class Net(nnx.Module):
        def __call__(self, x: Any) -> Any:
            self.sow(nnx.Intermediate, "h", x, capture_noop=True)
            return self.perturb("p", x, capture_noop=True)

    model = Net()
    model(jnp.ones(2))
    assert vars(model) == {}
    _, sown, zeros = nnx.capture(model, nnx.Intermediate, nnx.Perturbation)(jnp.ones(2))
    assert (sown.paths(), zeros.paths()) == ((("h",),), (("p",),))
