"""The one file that knows JAX versions and JAX names that are not public."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.tree_util as jtu

# `jax.extend.core.get_opaque_trace_state` is the public way to ask "which trace is
# this?", but builds a Python object with a Python `__eq__` at each call; every write
# to a Variable asks. `trace_ctx` gives the object that it wraps, which is compared
# by identity at a quarter of the cost. Both names are the same from 0.10 to 0.12.
from jax._src.core import trace_ctx

# Nothing public says whether a value differs between the replicas of a vmap; JAX itself
# finds out in the same way when it checks out_axes=None.
from jax._src.interpreters.batching import BatchTracer


def current_trace() -> Any:
    """A token for the trace that is current; compare tokens with ``is``."""
    return trace_ctx.trace._weakref


def outside_traces() -> bool:
    """Whether no transform is being traced."""
    return trace_ctx.is_top_level()


def one_level(node: Any) -> tuple[list[tuple[Any, Any]], Any] | None:
    """Takes a registered JAX pytree apart by one level.

    Args:
      node: any object.

    Returns:
      The children as (key, child) pairs and the treedef that puts them together, or
      None where JAX sees ``node`` as a leaf.
    """
    pairs, treedef = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if len(pairs) == 1 and pairs[0][1] is node:
        return None
    return [(plain_key(path[0]), child) for path, child in pairs], treedef


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


def varying_axes(value: Any) -> frozenset[Any]:
    """The mesh axes along which a value inside ``jax.shard_map`` may differ."""
    found = getattr(jax.typeof(value), "manual_axis_type", None)
    return frozenset() if found is None else found.varying
