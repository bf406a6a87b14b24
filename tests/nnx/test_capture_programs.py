"""capture, sow and perturb give what they give with Flax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx
from tests.nnx.test_names import same

from sortal import nnx
from sortal.errors import PathError, VariableError

X = jnp.arange(6.0).reshape(3, 2)


def net(nnx: Any) -> Any:
    class Inner(nnx.Module):
        def __init__(self, rngs: Any):
            self.linear = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            y = self.perturb("at", self.linear(x))
            self.sow(nnx.Intermediate, "y", y)
            return y

    class Net(nnx.Module):
        def __init__(self, rngs: Any):
            self.inner = Inner(rngs)

        def features(self, x: Any) -> Any:
            self.sow(nnx.Intermediate, "features", x)
            return self.inner(x)

        def __call__(self, x: Any) -> Any:
            return self.features(x) + self.features(2 * x)

    return Net(nnx.Rngs(0))


def shown(nnx: Any, state: Any) -> Any:
    pairs = nnx.to_flat_state(state)
    return [(path, jax.tree.leaves(v.get_value())) for path, v in pairs]


def named_like_a_method(nnx: Any) -> Any:
    """A method that sows its own name can be called again."""
    model = net(nnx)
    y, seen = nnx.capture(model, nnx.Intermediate)(X)
    z, again = nnx.capture(model, nnx.Intermediate)(X)
    left = [type(v).__name__ for _, v in nnx.iter_graph(model)].count("Intermediate")
    return y, z, shown(nnx, seen), shown(nnx, again), left


def of_methods(nnx: Any) -> Any:
    """method_outputs, sown as their own kind beside another."""

    class Out(nnx.Variable):
        pass

    model = net(nnx)
    _, outs, seen = nnx.capture(model, Out, nnx.Intermediate, method_outputs=Out)(X)
    # Flax keeps one of two kinds that are sown by one name.
    own = [pair for pair in shown(nnx, outs) if pair[0] != ("features",)]
    return own, shown(nnx, seen), "sowing" in str(type(model).features)


def through_transforms(nnx: Any) -> Any:
    """jit, grad and vmap between capture and the module."""
    model = net(nnx)

    @nnx.jit(graph=True, graph_updates=True)
    def forward(model: Any, x: Any) -> Any:
        return model(x)

    _, first = nnx.capture(forward, nnx.Intermediate)(model, X)
    _, second = nnx.capture(forward, nnx.Intermediate)(model, 2 * X)

    @nnx.jit(graph=True, graph_updates=True)
    @nnx.capture(nnx.Intermediate)
    def inside(model: Any, x: Any) -> Any:
        return model(x)

    y, third = inside(model, X)
    return shown(nnx, first), shown(nnx, second), y, shown(nnx, third)


def copies(nnx: Any) -> Any:
    """capture of a merged copy inside jax.vmap."""
    graphdef, state = nnx.split(net(nnx))

    @jax.vmap
    def one(x: Any) -> Any:
        y, seen = nnx.capture(nnx.merge(graphdef, state), nnx.Intermediate)(x)
        return y, nnx.to_pure_dict(seen)

    return one(X)


def perturbed(nnx: Any) -> Any:
    """Gradients by perturbations, with what is sown beside them."""
    model = net(nnx)
    _, zeros = nnx.capture(model, nnx.Perturbation)(X)

    def loss(zeros: Any, model: Any) -> Any:
        run = nnx.capture(model, nnx.Intermediate, init=zeros)
        y, seen = run(X)
        return (y**2).sum(), nnx.to_pure_dict(seen)

    grad = nnx.grad(loss, has_aux=True, graph=True, graph_updates=True)
    grads, seen = grad(zeros, model)
    return shown(nnx, zeros), jax.tree.leaves(grads), seen


PROGRAMS = (named_like_a_method, of_methods, through_transforms, copies, perturbed)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_capture_gives_what_it_gives_with_flax(program: Any) -> None:
    same(program(nnx), program(flax_nnx))


def test_an_error_leaves_methods_and_modules_as_they_were() -> None:
    class Fails(nnx.Module):
        def __call__(self) -> None:
            raise RuntimeError

    method = Fails.__call__
    model = Fails()
    with pytest.raises(RuntimeError):
        nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)()
    assert Fails.__call__ is method
    assert not vars(model)


def test_what_is_compiled_without_outputs_of_methods_does_not_serve_with_them() -> None:
    model = net(nnx)
    forward = nnx.jit(lambda model, x: model(x))
    nnx.capture(forward, nnx.Intermediate)(model, X)
    run = nnx.capture(forward, nnx.Intermediate, method_outputs=nnx.Intermediate)
    _, seen = run(model, X)
    assert len(seen["features"].value) == 4
    assert len(seen["__call__"].value) == 1


def test_captures_nest() -> None:
    model = net(nnx)

    @nnx.capture(nnx.Intermediate)
    def outer(model: Any, x: Any) -> Any:
        y = model.features(x)
        return y, nnx.capture(model.features, nnx.Intermediate)(x)[1]

    (_, inner), seen = outer(model, X)
    assert len(seen["features"].value) == 1
    assert len(inner["features"].value) == 1


def test_perturbations_of_modules_that_are_not_there_are_refused() -> None:
    init = nnx.State({"lost": {"at": nnx.Perturbation(1.0)}})
    with pytest.raises(PathError, match=r"does not have:\n.*\('lost', 'at'\)"):
        nnx.capture(net(nnx), init=init)(X)


def test_what_is_sown_does_not_hide_a_method() -> None:
    model = net(nnx)
    with pytest.raises(VariableError, match=r"Net\.features is a method, wh"):
        model(X)
    assert "features" not in vars(model)


def test_kinds_that_are_not_captured_are_dropped_as_in_flax() -> None:
    for library in (nnx, flax_nnx):
        model = net(library)
        library.capture(model, library.Perturbation)(X)
        kinds = [type(v).__name__ for _, v in library.iter_graph(model)]
        assert "Intermediate" not in kinds
