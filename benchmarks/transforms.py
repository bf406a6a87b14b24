"""Transforms of one network of 300 Variables: called eagerly, and under jit.

The network is a stack of layers of two Params and a running mean that is written at
each call. ``Theirs`` holds it in modules, of Sortal or of Flax; ``Raw`` in lists of
arrays, returned where they change, as users of plain JAX write it. Each transform is
given the same function of it. Under jit, the transform stands inside one jitted call,
with the model as its argument and its new statistics as results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.report import Table, timed_row
from benchmarks.sections import Peers, progress
from benchmarks.timing import Effort, compare
from benchmarks.workload import full, kernel

ROWS = ("grad", "vmap", "remat", "vjp", "scan", "while_loop", "cond", "shard_map")
EAGER = ("grad", "vmap", "scan", "while_loop", "cond")
WIDTH = 8
STEPS = 4

Call = Callable[[], Any]


def transforms(peers: Peers, effort: Effort, depth: int = 100) -> Table:
    """Each transform, eagerly and under jit, side by side.

    Args:
      peers: those asked for; Sortal, Flax and raw JAX take part.
      effort: how long to measure.
      depth: layers, of three Variables each.

    Returns:
      The Table.
    """
    table = Table(
        f"Transforms of a network of {depth} layers, {3 * depth} Variables",
        "microseconds per call, medians",
        notes=[
            (
                "overhead is what a call takes longer than the same transform of lists "
                "of arrays in raw JAX; flax/sortal overhead is Flax's over Sortal's."
            ),
            (
                "the function writes a running mean in every layer; vmap maps inputs "
                f"and means and shares the Params, scan and while_loop take {STEPS} "
                "steps over the whole network. Flax's vjp refuses functions that write."
            ),
            (
                "eagerly, JAX compiles a loop or branch anew whenever its function is "
                "new, as raw JAX's are here, which close over the arrays, and those of "
                "while_loop and cond in all three."
            ),
        ],
    )
    makers = _makers(peers, depth)
    for jitted in (False, True):
        for name in ROWS if jitted else EAGER:
            row = f"{name}, {'under jit' if jitted else 'eager'}"
            progress(row)
            calls: dict[str, Call] = {}
            for label, make in makers.items():
                call = make(name, jitted)
                if call is not None:
                    calls[label] = call
            agree(row, calls)
            timings = compare(calls, effort)
            found = timed_row(row, timings)
            found.values["flax/sortal overhead"] = _overheads(timings)
            table.rows.append(found)
    return table


def _makers(peers: Peers, depth: int) -> dict[str, Callable[[str, bool], Call | None]]:
    makers: dict[str, Any] = {}
    if "sortal" in peers:
        import sortal

        makers["sortal"] = functools.partial(_modules, sortal, depth)
    if "flax" in peers:
        from flax import nnx

        makers["flax"] = functools.partial(_modules, nnx, depth)
    if "raw" in peers:
        makers["raw jax"] = functools.partial(_lists, depth)
    return makers


def _overheads(timings: Any) -> float | None:
    if not {"sortal", "flax", "raw jax"} <= timings.keys():
        return None
    raw = timings["raw jax"].median
    ours, theirs = timings["sortal"].median - raw, timings["flax"].median - raw
    return theirs / ours if ours > 0 else float("inf")


def agree(row: str, calls: dict[str, Call]) -> None:
    """Refuses to time contenders that compute different numbers."""
    found = {label: float(jnp.sum(call())) for label, call in calls.items()}
    for label, value in found.items():
        for other, reference in found.items():
            if abs(value - reference) > 1e-3 * (1 + abs(reference)):
                raise AssertionError(f"{row}: {label} and {other} differ: {found}")


def inputs() -> jax.Array:
    """A small batch."""
    return jnp.linspace(-1, 1, 4 * WIDTH, dtype=jnp.float32).reshape(4, WIDTH)


def layer(x: Any, weight: Any, bias: Any, mean: Any) -> tuple[Any, Any]:
    """One layer's output and its new running mean."""
    x = x + jnp.tanh(x @ weight + bias)
    return x, 0.9 * mean + 0.1 * x.mean(0)


# ------------------------------------------------------------- modules of a library
def _modules(nnx: Any, depth: int, name: str, jitted: bool) -> Call | None:
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
            self.layers = nnx.List([Layer(i) for i in range(depth)])

        def __call__(self, x: Any) -> Any:
            for each in self.layers:
                x = each(x)
            return x

    if name == "vjp" and nnx.__name__ != "sortal":
        return None
    model = Network()
    function = _MODULES[name](nnx, model)
    return _called(nnx.jit(function) if jitted else function, model)


def _called(function: Any, model: Any) -> Call:
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


def _vjp(nnx: Any, model: Any) -> Any:
    def function(model: Any, x: Any) -> Any:
        out, pull = nnx.vjp(_total, model, x)
        return _first(pull(jnp.ones_like(out))[0])

    return function


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

    def function(model: Any, x: Any) -> Any:
        return nnx.while_loop(lambda state: state[2] < STEPS, body, (model, x, 0))[1]

    return function


def _cond(nnx: Any, model: Any) -> Any:
    def function(model: Any, x: Any) -> Any:
        return nnx.cond(x.sum() < 1e9, lambda m, x: m(x), lambda m, x: m(-x), model, x)

    return function


def _mesh() -> Any:
    return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))


def _shard_map(nnx: Any, model: Any) -> Any:
    return nnx.shard_map(
        lambda model, x: model(x),
        mesh=_mesh(),
        in_specs=(P(), P("data")),
        out_specs=P("data"),
        check_vma=False,
    )


_MODULES: dict[str, Callable[[Any, Any], Any]] = {
    "grad": _grad,
    "vmap": _vmap,
    "remat": _remat,
    "vjp": _vjp,
    "scan": _scan,
    "while_loop": _while_loop,
    "cond": _cond,
    "shard_map": _shard_map,
}


# ------------------------------------------------------------------ lists of arrays
def _lists(depth: int, name: str, jitted: bool) -> Call:
    params = [(kernel(i, WIDTH), full(WIDTH, 0.0)) for i in range(depth)]
    means = [full(WIDTH, 0.0) for _ in range(depth)]
    if name == "vmap":
        means = [jnp.stack([mean] * len(inputs())) for mean in means]
    function = _LISTS[name]
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


def _raw_total(params: Any, means: Any, x: Any) -> Any:
    out, means = _apply(params, means, x)
    return (out**2).mean(), means


def _raw_grad(params: Any, means: Any, x: Any) -> Any:
    grads, means = jax.grad(_raw_total, has_aux=True)(params, means, x)
    # By path, as the modules' gradients are ordered: the first layer's bias.
    return grads[0][1], means


def _raw_vmap(params: Any, means: Any, x: Any) -> Any:
    def one(params: Any, means: Any, x: Any) -> Any:
        out, means = _apply(params, means, x[None])
        return out[0], means

    return jax.vmap(one, in_axes=(None, 0, 0))(params, means, x)


def _raw_remat(params: Any, means: Any, x: Any) -> Any:
    total = jax.checkpoint(_raw_total)
    grads, means = jax.grad(total, has_aux=True)(params, means, x)
    return grads[0][1], means


def _raw_vjp(params: Any, means: Any, x: Any) -> Any:
    def total(params: Any, x: Any) -> Any:
        return _raw_total(params, means, x)

    out, pull, new = jax.vjp(total, params, x, has_aux=True)
    return pull(jnp.ones_like(out))[0][0][1], new


def _raw_scan(params: Any, means: Any, x: Any) -> Any:
    def step(carry: Any, _: Any) -> Any:
        return _apply(params, carry[1], carry[0]), None

    (out, means), _ = jax.lax.scan(step, (x, means), length=STEPS)
    return out, means


def _raw_while_loop(params: Any, means: Any, x: Any) -> Any:
    def body(state: Any) -> Any:
        x, means, i = state
        return (*_apply(params, means, x), i + 1)

    out, means, _ = jax.lax.while_loop(lambda s: s[2] < STEPS, body, (x, means, 0))
    return out, means


def _raw_cond(params: Any, means: Any, x: Any) -> Any:
    return jax.lax.cond(
        x.sum() < 1e9, _apply, lambda p, m, x: _apply(p, m, -x), params, means, x
    )


def _raw_shard_map(params: Any, means: Any, x: Any) -> Any:
    mapped = jax.shard_map(
        _apply,
        mesh=_mesh(),
        in_specs=(P(), P(), P("data")),
        out_specs=(P("data"), P()),
        check_vma=False,
    )
    return mapped(params, means, x)


_LISTS: dict[str, Callable[..., Any]] = {
    "grad": _raw_grad,
    "vmap": _raw_vmap,
    "remat": _raw_remat,
    "vjp": _raw_vjp,
    "scan": _raw_scan,
    "while_loop": _raw_while_loop,
    "cond": _raw_cond,
    "shard_map": _raw_shard_map,
}
