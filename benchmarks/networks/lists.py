"""The network as lists of arrays, in plain JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from benchmarks.networks import STEPS, WIDTH, inputs, layer, mesh
from benchmarks.workload import full, kernel


def call(name: str, depth: int, jitted: bool) -> Callable[[], Any]:
    """See the package."""
    params = [(kernel(i, WIDTH), full(WIDTH, 0.0)) for i in range(depth)]
    means = [full(WIDTH, 0.0) for _ in range(depth)]
    if name == "vmap":
        means = [jnp.stack([mean] * len(inputs())) for mean in means]
    function = FUNCTIONS[name]
    function = jax.jit(function) if jitted else function
    live = [means]
    x = inputs()

    def call() -> Any:
        out, live[0] = function(params, live[0], x)
        return jax.block_until_ready(out)

    return call


def _apply(params: Any, means: Any, x: Any) -> Any:
    new = []
    for (weight, bias), mean in zip(params, means, strict=True):
        x, changed = layer(x, weight, bias, mean)
        new.append(changed)
    return x, new


def _total(params: Any, means: Any, x: Any) -> Any:
    out, means = _apply(params, means, x)
    return (out**2).mean(), means


def _grad_of(total: Any) -> Callable[..., Any]:
    def function(params: Any, means: Any, x: Any) -> Any:
        grads, means = jax.grad(total, has_aux=True)(params, means, x)
        # By path, as the modules' gradients are ordered: the first layer's bias.
        return grads[0][1], means

    return function


def _vmap(params: Any, means: Any, x: Any) -> Any:
    def one(params: Any, means: Any, x: Any) -> Any:
        out, means = _apply(params, means, x[None])
        return out[0], means

    return jax.vmap(one, in_axes=(None, 0, 0))(params, means, x)


def _vjp(params: Any, means: Any, x: Any) -> Any:
    def total(params: Any, x: Any) -> Any:
        return _total(params, means, x)

    out, pull, new = jax.vjp(total, params, x, has_aux=True)
    return pull(jnp.ones_like(out))[0][0][1], new


def _jvp(params: Any, means: Any, x: Any) -> Any:
    def total(params: Any, x: Any) -> Any:
        return _total(params, means, x)

    tangents = (params, jnp.ones_like(x))
    _, dot, new = jax.jvp(total, (params, x), tangents, has_aux=True)
    return dot, new


def _linearize(params: Any, means: Any, x: Any) -> Any:
    def total(params: Any, x: Any) -> Any:
        return _total(params, means, x)

    _, push, new = jax.linearize(total, params, x, has_aux=True)
    return push(params, jnp.ones_like(x)), new


@jax.custom_vjp
def _pulled(params: Any, means: Any, x: Any) -> Any:
    return _total(params, means, x)


def _pulled_fwd(params: Any, means: Any, x: Any) -> Any:
    return _total(params, means, x), (params, x)


def _pulled_bwd(residuals: Any, cotangent: Any) -> Any:
    params, x = residuals
    by_out = cotangent[0]
    return jax.tree.map(lambda p: by_out * (p + 1), params), None, by_out * x


_pulled.defvjp(_pulled_fwd, _pulled_bwd)


@jax.custom_jvp
def _pushed(params: Any, means: Any, x: Any) -> Any:
    return _total(params, means, x)


@_pushed.defjvp
def _pushed_jvp(primals: Any, tangents: Any) -> Any:
    params, means, x = primals
    dots = jax.tree.map(lambda p, t: ((p + 1) * t).sum(), params, tangents[0])
    out, means = _total(params, means, x)
    zeros = jax.tree.map(jnp.zeros_like, means)
    return (out, means), (sum(jax.tree.leaves(dots)), zeros)


# The functions of loops are the same objects at each call, and the Params are carried:
# JAX compiles a loop that it is given eagerly anew where its function is a new one.
def _scanned(carry: Any, _: Any) -> Any:
    params, means, x = carry
    x, means = _apply(params, means, x)
    return (params, means, x), None


def _scan(params: Any, means: Any, x: Any) -> Any:
    (_, means, out), _ = jax.lax.scan(_scanned, (params, means, x), length=STEPS)
    return out, means


def _goes_on(state: Any) -> Any:
    return state[3] < STEPS


def _body(state: Any) -> Any:
    params, means, x, i = state
    x, means = _apply(params, means, x)
    return params, means, x, i + 1


def _while_loop(params: Any, means: Any, x: Any) -> Any:
    start = (params, means, x, 0)
    _, means, out, _ = jax.lax.while_loop(_goes_on, _body, start)
    return out, means


def _turn(_: Any, state: Any) -> Any:
    params, means, x = state
    x, means = _apply(params, means, x)
    return params, means, x


def _fori_loop(params: Any, means: Any, x: Any) -> Any:
    _, means, out = jax.lax.fori_loop(0, STEPS, _turn, (params, means, x))
    return out, means


def _negated(params: Any, means: Any, x: Any) -> Any:
    return _apply(params, means, -x)


def _cond(params: Any, means: Any, x: Any) -> Any:
    return jax.lax.cond(x.sum() < 1e9, _apply, _negated, params, means, x)


def _switch(params: Any, means: Any, x: Any) -> Any:
    index = (x.sum() > 1e9).astype(int)
    return jax.lax.switch(index, [_apply, _negated], params, means, x)


def _shard_map(params: Any, means: Any, x: Any) -> Any:
    mapped = jax.shard_map(
        _apply,
        mesh=mesh(),
        in_specs=(P(), P(), P("data")),
        out_specs=(P("data"), P()),
        check_vma=False,
    )
    return mapped(params, means, x)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "grad": _grad_of(_total),
    "vmap": _vmap,
    "remat": _grad_of(jax.checkpoint(_total)),
    "vjp": _vjp,
    "jvp": _jvp,
    "linearize": _linearize,
    "custom_vjp": _grad_of(_pulled),
    "custom_jvp": _grad_of(_pushed),
    "scan": _scan,
    "while_loop": _while_loop,
    "fori_loop": _fori_loop,
    "cond": _cond,
    "switch": _switch,
    "shard_map": _shard_map,
}
