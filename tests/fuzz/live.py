"""Sortal as programs see it, and the one place that knows its internals."""

from __future__ import annotations

import gc
import types
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sortal
from sortal import nnx

try:
    import flax.nnx as flax_nnx
except ImportError:
    flax_nnx = None

slots = False
Module, Pytree = nnx.Module, nnx.Pytree
Variable, State, GraphDef = nnx.Variable, nnx.State, nnx.GraphDef
Param, BatchStat, List, Dict = nnx.Param, nnx.BatchStat, nnx.List, nnx.Dict
FlaxModule = flax_nnx and flax_nnx.Module
FlaxParam = flax_nnx and flax_nnx.Param
FlaxList, FlaxDict = (flax_nnx.List, flax_nnx.Dict) if flax_nnx else (None, None)
kinds = (Variable, flax_nnx.Variable) if flax_nnx else (Variable,)
modules = (Pytree, FlaxModule) if flax_nnx else (Pytree,)
Optimizer, data, static, dataclass = nnx.Optimizer, nnx.data, nnx.static, nnx.dataclass
key = jax.random.key


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def attributes(x: Any) -> list[tuple[str, Any]]:
    """A module's attributes, without those that Flax keeps for itself."""
    found = vars(x).items()
    hidden = ("_pytree__", "_length")
    return [(k, v) for k, v in found if not k.startswith(hidden)]


def metadata(variable: Any) -> dict[str, Any]:
    return variable.get_metadata()


def is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def key_sum(x: Any) -> Any:
    return jax.random.key_data(x).sum().astype(np.float32)


def to_numpy(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if is_key(x) else x)


def state_items(s: Any) -> list[tuple[Any, Any]]:
    return list(zip(s.paths(), s.leaves(), strict=True))


def array(tracked: Any) -> Any:
    """A function that makes a new array and notes it."""

    def arr(value: Any) -> Any:
        made = jax.device_put(np.array(value, np.float32))
        tracked.append(weakref.ref(made))
        return made

    return arr


def optimizer(model: Any, rates: tuple[float, float], *, wrt: Any) -> Any:
    rate, momentum = rates
    return Optimizer(model, optax.sgd(rate, momentum=momentum), wrt=wrt)


def scan(f: Any, *, length: int) -> Any:
    return nnx.scan(f, length=length)


def vmap(f: Any, in_axes: Any) -> Any:
    return nnx.vmap(f, in_axes=in_axes)


def mapped(model: Any) -> Any:
    return jax.tree.map(lambda x: x, model)


def iter_graph(model: Any) -> list[Any]:
    return list(sortal.iter_graph(model))  # NNX's has static values, too


names = types.SimpleNamespace(
    **{
        name: getattr(nnx, name)
        for name in (
            "state split merge update pop clone variables graphdef data static State "
            "List Dict Rngs Not Under All jit cond switch fori_loop while_loop remat"
        ).split()
    },
    # NNX's give an empty State where ours refuse.
    grad=sortal.grad,
    value_and_grad=sortal.value_and_grad,
    Optimizer=optimizer,
    mapped=mapped,
    iter_graph=iter_graph,
    scan=scan,
    vmap=vmap,
)


# ----------------------------------------------------------------- internals
def throw_away(objects: list[Any], jitted: list[Any]) -> None:
    """Drops all that is kept between calls: plans, memos, compiled programs.

    What JAX keeps for single operations stays: it depends on shapes alone.

    Args:
      objects: the modules and containers of a program.
      jitted: the functions that ``jit`` returned.
    """
    from sortal._engine import graphdef, nodes, plan, schema
    from sortal.transforms import eager

    for x in objects:
        if isinstance(x, nodes.Node):
            nodes.set_plans(x, ())
    plan._sides.clear()
    for pool in (graphdef.GraphDef._pool, schema.Schema._pool):
        for kept in list(pool.values()):
            kept._memo.clear()
    for key in list(eager._programs._entries):
        eager._programs.drop(key)
    for f in jitted:
        f.clear_cache()


def behind_view(s: Any) -> list[Any]:
    """The values of the whole State that a view keeps alive."""
    return s._stored.values() if s._prefix else []


def collect() -> None:
    while gc.collect():  # what is freed may have kept a cycle
        pass
