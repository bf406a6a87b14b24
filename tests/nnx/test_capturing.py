"""capture: what a call sows is returned, and the model left as it was."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

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
