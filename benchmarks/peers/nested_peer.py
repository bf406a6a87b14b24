"""Plain JAX on the same arrays in lists of dicts, as programs hold them.

JAX sorts the keys of each dict and follows each level at every call, which a flat list
spares it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from benchmarks import workload as w
from benchmarks.peers import raw_peer

LABEL = "raw jax, nested"


def parts(shape: w.Blocks | w.Pair) -> tuple[Any, Any]:
    """The Params and the statistics, a dict for each layer."""
    flat, statistics = map(iter, raw_peer.parts(shape))
    if isinstance(shape, w.Pair):
        return {name: _linear(flat) for name in ("first", "second")}, {}
    params = [
        {"linear": _linear(flat), "norm": {"scale": next(flat), "bias": next(flat)}}
        for _ in range(shape.depth)
    ]
    means = [
        {"norm": {"mean": next(statistics), "var": next(statistics)}}
        for _ in range(shape.depth)
    ]
    return {"trunk": {"layers": params}}, {"trunk": {"layers": means}}


def _linear(flat: Any) -> dict[str, Any]:
    return {"kernel": next(flat), "bias": next(flat)}


def build(shape: w.Blocks | w.Pair) -> tuple[Any, ...]:
    """The model's Params and statistics, a count, and Optax's state."""
    return raw_peer.with_adam(*parts(shape))


def operations(shape: w.Blocks | w.Pair, wanted: tuple[str, ...]) -> w.Operations:
    """Calls for the compiled rows."""
    live = [build(shape)]
    noop = jax.jit(lambda *roots: None)
    plus = jax.jit(lambda *roots: jax.tree.map(lambda x: x + 1, roots))

    def step() -> Any:
        live[0] = plus(*live[0])
        return live[0][2].block_until_ready()

    calls: dict[str, Callable[[], Any]] = {
        w.NOOP: lambda: noop(*live[0]),
        w.STEP: step,
    }
    return {row: {LABEL: calls[row]} for row in wanted if row in calls}


def _apply(layer: dict[str, Any], x: Any) -> Any:
    return w.linear(x, layer["kernel"], layer["bias"])


def _stack(params: Any, statistics: Any, x: Any) -> tuple[Any, Any]:
    """The output of ``Blocks`` and its new statistics."""
    new = []
    layers = params["trunk"]["layers"], statistics["trunk"]["layers"]
    for layer, held in zip(*layers, strict=True):
        norm, now = layer["norm"], held["norm"]
        y, mean, var = w.normalize(
            _apply(layer["linear"], x),
            norm["scale"],
            norm["bias"],
            now["mean"],
            now["var"],
        )
        new.append({"norm": {"mean": mean, "var": var}})
        x = w.residual(x, y)
    return x, {"trunk": {"layers": new}}


def _pair(params: Any, statistics: Any, x: Any) -> tuple[Any, Any]:
    """The output of ``Pair``, which has no statistics."""
    return _apply(params["second"], w.between(_apply(params["first"], x))), statistics


def _trained(shape: w.Blocks | w.Pair) -> tuple[Any, ...]:
    forward = _pair if isinstance(shape, w.Pair) else _stack
    return forward, build(shape), shape.width


def training(shape: w.Blocks | w.Pair) -> dict[str, Callable[[], Any]]:
    """A whole training step; the call returns the loss."""
    return {LABEL: raw_peer.train(*_trained(shape))}


def lowering(shape: w.Blocks | w.Pair) -> dict[str, Callable[[], Any]]:
    """The same step, written anew, traced and lowered."""
    return {LABEL: raw_peer.lower(*_trained(shape))}
