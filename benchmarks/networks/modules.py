"""The network as modules of Sortal, or of Flax NNX; the code is one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from benchmarks.networks import STEPS, WIDTH, inputs, layer, mesh
from benchmarks.workload import full, kernel


def call(nnx: Any, name: str, depth: int, jitted: bool) -> Callable[[], Any] | None:
    """See the package; ``nnx`` is the library."""
    # Sortal holds modules in plain lists.
    sequence = list if nnx.__name__ == "sortal" else nnx.List

    class Layer(nnx.Module):
        def __init__(self, index: int):
            self.weight = nnx.Param(kernel(index, WIDTH))
            self.bias = nnx.Param(full(WIDTH, 0.0))
            self.mean = nnx.BatchStat(full(WIDTH, 0.0))

        def __call__(self, x: Any) -> Any:
            x, self.mean[...] = layer(
                x, self.weight[...], self.bias[...], self.mean[...]
            )
            return x

    class Network(nnx.Module):
        def __init__(self) -> None:
            self.layers = sequence([Layer(i) for i in range(depth)])

        def __call__(self, x: Any) -> Any:
            for each in self.layers:
                x = each(x)
            return x

    if nnx.__name__ != "sortal" and name in SORTAL_ONLY:
        return None
    model = Network()
    function = FUNCTIONS[name](nnx, model)
    return _called(nnx.jit(function) if jitted else function, model)


def _called(function: Any, model: Any) -> Callable[[], Any]:
    x = inputs()

    def call() -> Any:
        return jax.block_until_ready(function(model, x))

    return call


def _total(model: Any, x: Any) -> Any:
    return (model(x) ** 2).mean()


def _first(grads: Any) -> Any:
    return jax.tree.leaves(grads)[0]


def _grad(nnx: Any, model: Any) -> Any:
    grad = nnx.grad(_total)
    return lambda model, x: _first(grad(model, x))


def _vmap(nnx: Any, model: Any) -> Any:
    _stack(nnx, model)
    axes = nnx.StateAxes({nnx.Param: None, nnx.BatchStat: 0})
    return nnx.vmap(lambda model, x: model(x[None])[0], in_axes=(axes, 0))


def _stack(nnx: Any, model: Any) -> None:
    for each in model.layers:
        each.mean = nnx.BatchStat(jnp.stack([each.mean[...]] * len(inputs())))


def _remat(nnx: Any, model: Any) -> Any:
    grad = nnx.grad(nnx.remat(_total))
    return lambda model, x: _first(grad(model, x))


def _mode(nnx: Any) -> dict[str, bool]:
    """Flax has vjp and jvp in this mode only; Sortal has no modes."""
    return {} if nnx.__name__ == "sortal" else {"graph_updates": False}


def _vjp(nnx: Any, model: Any) -> Any:
    def function(model: Any, x: Any) -> Any:
        out, pull = nnx.vjp(_total, model, x, **_mode(nnx))
        return _first(pull(jnp.ones_like(out))[0])

    return function


def _jvp(nnx: Any, model: Any) -> Any:
    def function(model: Any, x: Any) -> Any:
        tangents = (_tangent(nnx, model), jnp.ones_like(x))
        return nnx.jvp(_total, (model, x), tangents, **_mode(nnx))[1]

    return function


def _tangent(nnx: Any, model: Any) -> Any:
    """The Params as a direction; Flax wants one for the means as well."""
    if nnx.__name__ == "sortal":
        return nnx.state(model, nnx.Param)
    tangent = nnx.clone(model)
    for each in tangent.layers:
        each.mean[...] = jnp.zeros_like(each.mean[...])
    return tangent


def _linearize(nnx: Any, model: Any) -> Any:
    def function(model: Any, x: Any) -> Any:
        _, push = nnx.linearize(_total, model, x)
        return push(nnx.state(model, nnx.Param), jnp.ones_like(x))

    return function


def _custom_vjp(nnx: Any, model: Any) -> Any:
    by_params = nnx.DiffState(0, nnx.Param)
    total = nnx.custom_vjp(_total, nondiff_argnums=(by_params,))

    def fwd(model: Any, x: Any) -> Any:
        return total(model, x), (nnx.state(model, nnx.Param), x)

    def bwd(residuals: Any, cotangent: Any) -> Any:
        params, x = residuals
        # Flax pairs it with the cotangents of what was written.
        by_out = cotangent if nnx.__name__ == "sortal" else cotangent[1]
        return jax.tree.map(lambda p: by_out * (p + 1), params), by_out * x

    total.defvjp(fwd, bwd)
    grad = nnx.grad(total, argnums=by_params)
    return lambda model, x: _first(grad(model, x))


def _custom_jvp(nnx: Any, model: Any) -> Any:
    total = nnx.custom_jvp(_total)

    @total.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        model, x = primals
        params = nnx.state(model, nnx.Param)
        dots = jax.tree.map(lambda p, t: ((p + 1) * t).sum(), params, tangents[0])
        return _total(model, x), sum(jax.tree.leaves(dots))

    grad = nnx.grad(total)
    return lambda model, x: _first(grad(model, x))


def _scan(nnx: Any, model: Any) -> Any:
    axes = nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None})
    return nnx.scan(
        lambda model, x: model(x),
        in_axes=(axes, nnx.Carry),
        out_axes=nnx.Carry,
        length=STEPS,
    )


def _while_loop(nnx: Any, model: Any) -> Any:
    def body(state: Any) -> Any:
        model, x, i = state
        return model, model(x), i + 1

    def goes_on(state: Any) -> Any:
        return state[2] < STEPS

    def function(model: Any, x: Any) -> Any:
        return nnx.while_loop(goes_on, body, (model, x, 0))[1]

    return function


def _fori_loop(nnx: Any, model: Any) -> Any:
    def body(_: Any, state: Any) -> Any:
        model, x = state
        return model, model(x)

    return lambda model, x: nnx.fori_loop(0, STEPS, body, (model, x))[1]


def _negated(model: Any, x: Any) -> Any:
    return model(-x)


def _cond(nnx: Any, model: Any) -> Any:
    return lambda model, x: nnx.cond(x.sum() < 1e9, operator.call, _negated, model, x)


def _switch(nnx: Any, model: Any) -> Any:
    def function(model: Any, x: Any) -> Any:
        index = (x.sum() > 1e9).astype(int)
        return nnx.switch(index, [operator.call, _negated], model, x)

    return function


def _shard_map(nnx: Any, model: Any) -> Any:
    return nnx.shard_map(
        lambda model, x: model(x),
        mesh=mesh(),
        in_specs=(P(), P("data")),
        out_specs=P("data"),
        check_vma=False,
    )


SORTAL_ONLY = ("linearize", "custom_jvp")
"""Flax has none."""

FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "grad": _grad,
    "vmap": _vmap,
    "remat": _remat,
    "vjp": _vjp,
    "jvp": _jvp,
    "linearize": _linearize,
    "custom_vjp": _custom_vjp,
    "custom_jvp": _custom_jvp,
    "scan": _scan,
    "while_loop": _while_loop,
    "fori_loop": _fori_loop,
    "cond": _cond,
    "switch": _switch,
    "shard_map": _shard_map,
}
