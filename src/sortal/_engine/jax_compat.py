"""The only file that depends on a JAX version or uses private names of JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.tree_util as jtu

# `jax.extend.core.get_opaque_trace_state` is the public way to identify a trace, but it
# builds a Python object with a Python `__eq__` at each call, and every write to a
# Variable needs one. `trace_ctx` gives the object that it wraps, which is compared by
# identity at a quarter of the cost. Both names are the same from 0.10 to 0.12.
# No public function lets processes agree from another thread: those of
# `multihost_utils` run a computation on all devices, which only the main thread may.
from jax._src import clusters, distributed
from jax._src.array import ArrayImpl as ArrayImpl
from jax._src.core import EvalTrace, ShapedArray, trace_ctx
from jax._src.interpreters import pxla
from jax._src.interpreters.ad import JVPTrace, LinearizeTrace

# No public function tells whether a value differs between the replicas of a vmap; JAX
# tests for it in the same way when it checks out_axes=None.
from jax._src.interpreters.batching import BatchTrace, BatchTracer


def current_trace() -> Any:
    """A token for the trace that is current; compare tokens with ``is``."""
    return trace_ctx.trace._weakref


def outside_traces() -> bool:
    """Whether no transform is being traced."""
    return trace_ctx.is_top_level()


def only_differentiated() -> bool:
    """Whether no transform is being traced, derivatives apart.

    Derivatives compute as they trace; others record a program, or compute for several
    replicas at once. No public function tells which is current.
    """
    trace = trace_ctx.trace
    while isinstance(trace, (JVPTrace, LinearizeTrace)):
        trace = trace.parent_trace
    return isinstance(trace, EvalTrace)


def one_level(node: Any) -> tuple[list[tuple[Any, Any]], Any] | None:
    """The children of a registered JAX pytree, one level down.

    Returns:
      The children as (key, child) pairs and the treedef that puts them together, or
      None where JAX sees ``node`` as a leaf. Where two of the node's own keys read the
      same, the keys are positions.
    """
    pairs, treedef = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if len(pairs) == 1 and pairs[0][1] is node:
        return None
    keys = [plain_key(path[0]) for path, _ in pairs]
    if len(set(keys)) < len(keys):
        keys = list(range(len(pairs)))
    return list(zip(keys, (child for _, child in pairs), strict=True)), treedef


def plain_key(key: Any) -> Any:
    """The bare name or index inside a JAX key-path entry."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)


def register_pytree(
    cls: type,
    flatten: Callable[[Any], tuple[Any, Any]],
    flatten_with_keys: Callable[[Any], tuple[Any, Any]],
    unflatten: Callable[[Any, Any], Any],
) -> None:
    """Registers ``cls`` as a JAX pytree with key paths."""
    jtu.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


def differs_in_vmap(value: Any) -> bool:
    """Whether a value inside ``jax.vmap`` differs between the innermost replicas."""
    return (
        isinstance(value, BatchTracer)
        and value._trace is trace_ctx.trace
        and isinstance(value.batch_dim, int)
    )


def mapped_sizes() -> list[int]:
    """The sizes of the ``jax.vmap`` calls being traced, outermost first."""
    found = []
    trace: Any = trace_ctx.trace
    while trace is not None:
        if isinstance(trace, BatchTrace):
            found.append(trace.axis_data.size)
        trace = getattr(trace, "parent_trace", None)
    return found[::-1]


def scan_layout(equation: Any) -> tuple[int, int]:
    """How many inputs of a ``scan`` equation are constants, and how many the carry."""
    params = equation.params
    if "ft_in" not in params:  # before 0.11
        return params["num_consts"], params["num_carry"]
    numbers = params["ft_in"].update(range(len(equation.invars)))
    consts, carry, _ = map(list, numbers.unpack())
    return len(consts), len(carry)


def varying_axes(value: Any) -> frozenset[Any]:
    """The mesh axes along which a value inside ``jax.shard_map`` may differ."""
    found = getattr(jax.typeof(value), "manual_axis_type", None)
    return frozenset() if found is None else found.varying


def put_pieces(
    like: Any, sharding: Any, pieces: list[Any], devices: list[Any], committed: bool
) -> Any:
    """An array made from pieces of host memory, one for each device.

    Nothing public makes an uncommitted array, or a weakly typed one, from host memory;
    and ``jax.device_put`` costs three times as much for each small array.

    Args:
      like: shape, dtype and ``weak_type`` of the whole.
      sharding: how it lies on devices.
      pieces: NumPy arrays, one for each device.
      devices: the devices, in the order of the pieces.
      committed: whether the array is bound to its devices.

    Returns:
      The array.
    """
    aval = ShapedArray(like.shape, like.dtype, weak_type=like.weak_type)
    return pxla.batched_device_put(aval, sharding, pieces, devices, committed)


def in_a_cluster() -> bool:
    """Whether JAX finds that a scheduler, or a cloud, has started this process.

    No public function tells; ``jax.distributed.initialize`` asks the same objects.
    """
    kinds = clusters.ClusterEnv._cluster_types
    return any(not x.opt_in_only_method and x.is_env_present() for x in kinds)


def coordinator() -> Any:
    """The client that carries messages between the processes of one program."""
    return distributed.global_state.client


def numbered() -> tuple[int, int]:
    """Which process this is, and of how many, for messages.

    ``jax.process_index`` asks the devices, and so would start them.
    """
    return distributed.global_state.process_id, distributed.global_state.num_processes
