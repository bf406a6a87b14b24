"""Metadata that an initialiser gives to the Variable of the value that it makes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from sortal.errors import VariableError

PARTITION_NAME = "partition_name"
"""The key under which ``transform_metadata`` gives the name of a new axis."""

HOOKS = (
    "on_get_value", "on_set_value", "on_create_value", "on_add_axis", "on_remove_axis",
)  # fmt: skip
_BOXES = ("hijax", "ref")
_DROPPED = frozenset((*HOOKS, *_BOXES))
_OLD_NAMES = ("sharding", "sharding_names")


@dataclasses.dataclass(frozen=True)
class VariableMetadata:
    """A value with metadata for the Variable that will hold it.

    Args:
      raw_value: the value.
      metadata: entries of the Variable's metadata.

    Example:
      >>> import jax.numpy as jnp
      >>> from sortal import nnx
      >>> nnx.Param(nnx.VariableMetadata(jnp.ones(2), metadata={"unit": "m"}))
      Param(float32[2], unit='m')
    """

    raw_value: Any
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)


def with_metadata(
    initializer: Callable[..., Any],
    on_set_value: Any = (),
    on_get_value: Any = (),
    on_create_value: Any = (),
    on_add_axis: Any = (),
    on_remove_axis: Any = (),
    **metadata: Any,
) -> Callable[..., VariableMetadata]:
    """An initialiser whose Variables get metadata.

    Args:
      initializer: a function of (key, shape, dtype).
      on_set_value: hooks, which Sortal does not have.
      on_get_value: likewise.
      on_create_value: likewise.
      on_add_axis: likewise.
      on_remove_axis: likewise.
      **metadata: entries of the Variable's metadata.

    Returns:
      The initialiser.

    Raises:
      VariableError: a hook is given.

    Example:
      >>> import sortal as nnx
      >>> init = nnx.with_metadata(nnx.initializers.zeros_init(), unit="m")
      >>> nnx.Linear(2, 3, kernel_init=init, rngs=nnx.Rngs(0)).kernel
      Param(float32[2,3], unit='m')
    """
    given = (on_get_value, on_set_value, on_create_value, on_add_axis, on_remove_axis)
    refuse_hooks("with_metadata", [n for n, f in zip(HOOKS, given, strict=True) if f])

    @functools.wraps(initializer)
    def wrapper(*args: Any, **kwargs: Any) -> VariableMetadata:
        return VariableMetadata(initializer(*args, **kwargs), metadata=metadata)

    return wrapper


def with_partitioning(
    initializer: Callable[..., Any], sharding: Any, mesh: Any = None, **metadata: Any
) -> Callable[..., VariableMetadata]:
    """An initialiser whose Variables have names for their axes.

    Args:
      initializer: a function of (key, shape, dtype).
      sharding: a name, a tuple of names or None for each axis; or a PartitionSpec.
      mesh: the mesh; that of ``jax.set_mesh`` if absent.
      **metadata: further entries of the Variable's metadata.

    Returns:
      The initialiser. Its Variables have the metadata ``out_sharding``, and are put on
      the mesh where there is one.

    Raises:
      VariableError: the metadata has a hook.

    Example:
      >>> import sortal as nnx
      >>> init = nnx.with_partitioning(nnx.initializers.ones_init(), (None, "model"))
      >>> layer = nnx.Linear(2, 4, kernel_init=init, rngs=nnx.Rngs(0))
      >>> list(nnx.get_partition_spec(nnx.state(layer))["kernel"].value)
      [None, 'model']
    """
    where = {} if mesh is None else {"mesh": mesh}
    return with_metadata(initializer, out_sharding=sharding, **where, **metadata)


def refuse_hooks(owner: str, names: list[str]) -> None:
    """Refuses functions that NNX would call when a value is read or written."""
    if names:
        raise VariableError(
            f"{owner}: {', '.join(names)} would be hooks, which are never called here. "
            "Write a kind of your own that defines get_value or set_value."
        )


def normalised(owner: str, metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Metadata under today's names, with tuples in the place of lists of axis names."""
    refuse_hooks(owner, [n for n in HOOKS if metadata.get(n)])
    boxes = [n for n in _BOXES if metadata.get(n)]
    if boxes:
        raise VariableError(
            f"{owner}: {boxes[0]}=True would let jax.jit carry out what a function "
            "writes; a Variable holds its value itself. Leave it out, and write the "
            "jit of this library in the place of jax.jit."
        )
    found = {k: v for k, v in metadata.items() if k not in _DROPPED}
    for old in _OLD_NAMES:
        if old in found:
            found["out_sharding"] = found.pop(old)
    for name in ("out_sharding", "sharding_rules"):
        if isinstance(found.get(name), list):
            found[name] = _tuples(found[name])
    return found


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, (list, tuple)) else x
