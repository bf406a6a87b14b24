"""Conversion between Linen's variables, nested dicts by collection, and Variables."""

from __future__ import annotations

import contextvars
import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sortal._engine.annotations import PARTITION_NAME
from sortal._engine.kind_names import (
    variable_name_from_type,
    variable_type_from_name,
)
from sortal._engine.nested import nest
from sortal._engine.paths import Path, show
from sortal._engine.variable import Variable
from sortal.errors import ArgumentError, listing
from sortal.sharding.specs import get_var_pspec

_BOX = "linen_meta_type"
"""The metadata key of the Linen box class that held the value."""


mutable_here: contextvars.ContextVar[Any]
mutable_here = contextvars.ContextVar("mutable_here", default=False)
"""What the module that runs may change: the default of the Linen modules inside it."""


@contextmanager
def changing(mutable: Any) -> Iterator[None]:
    """Has Linen modules that are called inside change these collections too."""
    token = mutable_here.set(mutable)
    try:
        yield
    finally:
        mutable_here.reset(token)


def from_linen(variables: Mapping[str, Any]) -> dict[Path, Variable]:
    """Variables by path, without the collection, which gives their kind.

    Raises:
      ArgumentError: several collections have the same path; all are listed.
    """
    found: dict[Path, Variable] = {}
    twice = []
    for collection, nested in variables.items():
        kind = variable_type_from_name(collection, allow_register=True)
        for path, x in _leaves(nested):
            if path in found:
                twice.append(f"{show(path)}: in {collection} and another")
            found[path] = _unboxed(kind, x)
    if twice:
        raise ArgumentError(
            "two Linen collections have a variable of one path, which can be one "
            f"attribute only; found:\n{listing(twice)}\nRename one in the Linen module."
        )
    return found


def _leaves(nested: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if not isinstance(nested, Mapping):
        yield path, nested
        return
    for key, x in nested.items():
        yield from _leaves(x, (*path, key))


def _unboxed(kind: type[Variable], x: Any) -> Variable:
    from flax.core import meta

    if not isinstance(x, meta.AxisMetadata):
        return kind(x)
    # to_nnx_metadata of some boxes of Flax changes the box, hence the copy.
    box: Any = copy.copy(x)
    if isinstance(box, variable_box()):
        return box.to_nnx_variable()
    values = box.to_nnx_metadata() if hasattr(box, "to_nnx_metadata") else vars(box)
    metadata = {**values, _BOX: type(x)}
    return kind(metadata.pop("value"), **metadata)


def to_linen(leaves: Iterable[tuple[Path, Any]], box: Any = None) -> dict[str, Any]:
    """Nested dicts by collection, as Linen's ``apply`` takes them.

    ``box`` makes Linen's value of a Variable; ``boxed`` by default.

    Raises:
      ArgumentError: leaves are not Variables, so that they have no collection.
    """
    leaves = list(leaves)
    bad = [show(path) for path, x in leaves if not isinstance(x, Variable)]
    if bad:
        raise ArgumentError(
            "Linen needs the collection of each value, which follows from its kind; "
            f"these are not Variables:\n{listing(bad)}\nWrite Param(array)."
        )
    box = box or boxed
    collection_of = functools.partial(variable_name_from_type, allow_register=True)
    return nest(((collection_of(type(x)), *path), box(x)) for path, x in leaves)


def boxed(variable: Variable) -> Any:
    """A value as Linen holds it.

    It is in the box that it came in, or in a ``Partitioned`` where metadata names its
    axes.
    """
    metadata = variable.get_metadata()
    box = metadata.pop(_BOX, None)
    if box is None:
        if not variable.get_metadata("out_sharding", None):
            return variable.value
        from flax.core import meta

        box = meta.Partitioned
    if hasattr(box, "from_nnx_metadata"):
        return box.from_nnx_metadata({"value": variable.value, **metadata})
    return box(variable.value, **metadata)


def boxed_whole(variable: Variable) -> Any:
    """A value as NNX's bridge hands it to Linen.

    It is in the box that it came in, or with its kind and metadata, where it has any,
    in a ``variable_box``.
    """
    metadata = variable.get_metadata()
    if _BOX in metadata or not metadata:
        return boxed(variable)
    return variable_box()(type(variable), variable.value, metadata)


@functools.cache
def variable_box() -> Any:
    """The class of Linen boxes that hold a Variable: its kind, value and metadata.

    It is made at the first use, so that Flax is imported only where it is used.
    """
    from flax import struct
    from flax.core import meta

    class NNXMeta(struct.PyTreeNode, meta.AxisMetadata):
        var_type: type[Variable] = struct.field(pytree_node=False)
        value: Any = struct.field(pytree_node=True)
        metadata: dict[str, Any] = struct.field(pytree_node=False)

        def unbox(self) -> Any:
            return self.value

        def replace_boxed(self, val: Any) -> Any:
            return self.replace(value=val)

        def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
            return self._renamed(lambda names, name: names.insert(index, name), params)

        def remove_axis(self, index: int, params: dict[Any, Any]) -> Any:
            return self._renamed(lambda names, _: names.pop(index), params)

        def _renamed(self, change: Any, params: dict[Any, Any]) -> Any:
            if not self.metadata.get("out_sharding"):
                return self
            names = list(self.metadata["out_sharding"])
            change(names, params.get(PARTITION_NAME))
            return self.replace(metadata={**self.metadata, "out_sharding": (*names,)})

        def get_partition_spec(self) -> Any:
            return get_var_pspec(self.to_nnx_variable())

        def to_nnx_variable(self) -> Variable:
            return self.var_type(self.value, **self.metadata)

    return NNXMeta
