"""Partition specs and shardings of models, by NNX's module name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sortal import functional
from sortal._engine.annotations import PARTITION_NAME as PARTITION_NAME
from sortal._engine.annotations import with_partitioning as with_partitioning
from sortal._engine.variable import is_variable
from sortal.errors import ArgumentError
from sortal.nnx.keywords import ignoring
from sortal.sharding import specs
from sortal.sharding.specs import get_named_sharding as get_named_sharding
from sortal.sharding.specs import get_partition_spec as get_partition_spec
from sortal.sharding.specs import get_var_pspec as get_var_pspec

as_abstract = ignoring("graph")(specs.as_abstract)
get_abstract_model = ignoring("graph")(specs.get_abstract_model)
abstract_with_sharding = as_abstract


def add_axis(tree: Any, index: int, transform_metadata: Mapping[Any, Any]) -> Any:
    """Names a new axis of Variables, in place, where their metadata names axes.

    Args:
      tree: a model, State or pytree of Variables.
      index: where the new axis stands.
      transform_metadata: ``{nnx.PARTITION_NAME: name}``.

    Returns:
      The tree.

    Raises:
      ArgumentError: ``transform_metadata`` has no ``nnx.PARTITION_NAME``.

    Example:
      >>> from sortal import nnx
      >>> v = nnx.Param(1, out_sharding=("embed",))
      >>> _ = nnx.spmd.add_axis([v], 0, {nnx.PARTITION_NAME: "layers"})
      >>> v.get_metadata("out_sharding")
      ('layers', 'embed')
    """
    name = _partition_name(transform_metadata)

    def longer(names: list[Any]) -> list[Any]:
        names += [None] * (index - len(names))
        names.insert(index, name)
        return names

    return _with_names(tree, longer)


def remove_axis(tree: Any, index: int, transform_metadata: Mapping[Any, Any]) -> Any:
    """Takes the name of an axis out of the metadata of Variables, in place.

    Args:
      tree: a model, State or pytree of Variables.
      index: where the axis stands.
      transform_metadata: ``{nnx.PARTITION_NAME: name}``.

    Returns:
      The tree.

    Raises:
      ArgumentError: ``transform_metadata`` has no ``nnx.PARTITION_NAME``, or a Variable
        has another name there.

    Example:
      >>> from sortal import nnx
      >>> v = nnx.Param(1, out_sharding=("layers", "embed"))
      >>> _ = nnx.spmd.remove_axis([v], 0, {nnx.PARTITION_NAME: "layers"})
      >>> v.get_metadata("out_sharding")
      ('embed',)
    """
    name = _partition_name(transform_metadata)

    def shorter(names: list[Any]) -> list[Any]:
        if not -len(names) <= index < len(names) or names[index] != name:
            raise ArgumentError(
                f"the axis {name!r} should be at place {index} of out_sharding="
                f"{tuple(names)}, and is not there."
            )
        del names[index]
        return names

    return _with_names(tree, shorter)


def _partition_name(transform_metadata: Mapping[Any, Any]) -> Any:
    if PARTITION_NAME not in transform_metadata:
        raise ArgumentError(
            "the name of the axis is needed: write {nnx.PARTITION_NAME: name}; found "
            f"{dict(transform_metadata)}."
        )
    return transform_metadata[PARTITION_NAME]


def _with_names(tree: Any, change: Callable[[list[Any]], list[Any]]) -> Any:
    leaves = [x for _, x in functional.variables(tree).flat_state()]
    named = [
        x for x in leaves if is_variable(x) and x.get_metadata("out_sharding", None)
    ]
    new = [tuple(change(list(x.get_metadata("out_sharding")))) for x in named]
    for x, names in zip(named, new, strict=True):
        x.set_metadata(out_sharding=names)
    return tree
