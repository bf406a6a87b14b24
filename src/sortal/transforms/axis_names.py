"""transform_metadata: names for the axes along which new Variables come out stacked."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

from sortal._engine.annotations import PARTITION_NAME
from sortal._engine.graphdef import GraphDef
from sortal._engine.schema import Schema
from sortal._engine.statics import Metadata
from sortal.transforms._adapter.effects import Effects

NOTHING: Mapping[str, Any] = types.MappingProxyType({})
_SHARDING = "out_sharding"


def named(effects: Effects, axes: Sequence[Any], given: Mapping[str, Any]) -> Effects:
    """What a call did, with the new axis named in the metadata of new Variables.

    Args:
      effects: what it did.
      axes: for each leaf that came into being inside, the axis along which it comes
        out stacked, or None.
      given: ``transform_metadata``: the axis's name under ``PARTITION_NAME``, and what
        to insert into other tuples in the metadata under their names.

    Returns:
      The same but for the metadata; ``effects`` itself where nothing is named.
    """
    edits = effects.edits
    if PARTITION_NAME not in given or edits is None:
        return effects
    names = {_SHARDING: given[PARTITION_NAME], **given}
    del names[PARTITION_NAME]
    graphdef, new = edits.graphdef, iter(axes)
    schema = graphdef.schema
    metadata = [
        old if leaf.origin is not None else _with_axis(old, next(new), names)
        for old, leaf in zip(schema.metadata, edits.leaves, strict=True)
    ]
    schema = Schema.of(schema.paths, schema.kinds, metadata)
    changed = GraphDef.of(graphdef.root, graphdef.records, schema)
    return Effects(effects.written, effects.outputs, edits._replace(graphdef=changed))


def _with_axis(old: Metadata, axis: Any, names: Mapping[str, Any]) -> Metadata:
    if not isinstance(axis, int):
        return old
    found = {
        key: _inserted(old[key], axis, name)
        for key, name in names.items()
        if old.get(key) and (key == _SHARDING or isinstance(old[key], tuple))
    }
    return Metadata.of({**old, **found}) if found else old


def _inserted(names: Any, axis: int, name: Any) -> tuple[Any, ...]:
    names = list(names)
    axis = axis if axis >= 0 else len(names) + 1 + axis
    # Names may be left out at the end, where they would be None.
    names += [None] * (axis - len(names))
    return (*names[:axis], name, *names[axis:])
