"""Specs and names of axes inside a map, whose leaves are parts, and after it.

A part has the specs of the whole without the entry of the axis that it is a part along,
and gets it back on the way out, as does what has its metadata, such as a moment, and as
do leaves of States. So do names in ``out_sharding`` where ``transform_metadata`` names
the axis, as in Flax. Where it does not, nobody can tell whether names were meant for
the whole or for its parts, and nothing acts on them inside.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sortal._engine.annotations import PARTITION_NAME
from sortal._engine.graphdef import GraphDef
from sortal._engine.schema import Schema
from sortal._engine.state import State, snapshot
from sortal._engine.statics import PLACEMENT, Metadata
from sortal.errors import ArgumentError, listing
from sortal.sharding.resolution import SPECS
from sortal.transforms._adapter.effects import Effects
from sortal.transforms._adapter.prefixes import is_answer, of_each
from sortal.transforms._adapter.tracing import (
    FlatModule,
    find_flat_modules,
    flat_module_def,
    replace_flat_modules,
)

NOTHING: Mapping[str, Any] = types.MappingProxyType({})


class Parts(NamedTuple):
    """What the leaves of a GraphDef are inside a map.

    Attributes:
      before: the metadata of each leaf outside.
      inside: the GraphDef with that of parts; None where nothing says anything of axes.
      axes: for each leaf the axis, counted from the front, or None.
      of_wholes: whether there are names that may speak of whole arrays.
    """

    before: Sequence[Metadata] = ()
    inside: GraphDef | None = None
    axes: Sequence[int | None] = ()
    of_wholes: bool = False

    def restored(self, effects: Effects, names: Mapping[str, Any]) -> Effects:
        """What a call did, with the metadata of wholes for the leaves that came in.

        Args:
          effects: what it did to parts.
          names: ``transform_metadata``.

        Returns:
          The Effects.
        """
        edits, inside = effects.edits, self.inside
        if edits is None or inside is None:
            return effects

        def whole(k: int | None, now: Metadata) -> Metadata:
            if k is None:
                return now
            before, part = self.before[k], inside.schema.metadata[k]
            if now is part or before is part:
                return before if now is part else now
            kept = {key for key in now if key in part and now[key] == part[key]}
            new = {key: x for key, x in now.items() if key not in kept}
            new[_ENTRIES] = part.get(_ENTRIES)
            new = _with_axis(new, self.axes[k], names)
            return Metadata.of({**new, **{x: before[x] for x in kept & before.keys()}})

        def wholes(graphdef: GraphDef, origins: Iterable[int | None]) -> GraphDef:
            pairs = zip(origins, graphdef.schema.metadata, strict=True)
            return _with_metadata(graphdef, [whole(*pair) for pair in pairs])

        graphdef = wholes(edits.graphdef, [leaf.origin for leaf in edits.leaves])
        roots = edits.roots
        if roots is not None:
            roots = wholes(roots, map(inside.schema.index.get, roots.schema.paths))
        edits = edits._replace(graphdef=graphdef, roots=roots)
        return Effects(effects.written, effects.outputs, edits)


def as_parts(
    given: Any, axis_of: Callable[[int], Any], names: Mapping[str, Any]
) -> tuple[Any, Parts]:
    """Arguments inside of a map, with the metadata of parts.

    Args:
      given: the arguments, with FlatModules in the place of roots.
      axis_of: the axis of each leaf of their joint GraphDef; what is no int is whole.
      names: ``transform_metadata``: the axis's name under ``PARTITION_NAME``, and what
        other tuples in the metadata have there, under their names.

    Returns:
      The arguments, and the Parts.

    Raises:
      ArgumentError: names of axes have another name there; all are listed.
    """
    flat = find_flat_modules(given)
    if not flat:
        return given, Parts()
    graphdef = flat[0].definition.graphdef
    schema = graphdef.schema
    names = names if PARTITION_NAME in names else NOTHING
    if not names and not schema.memo("speaks of axes", lambda: _speaks(schema)):
        return given, Parts()
    axes: list[int | None] = [None] * len(schema)
    for module in flat:
        for k, part in zip(module.definition.leaves, module.values, strict=True):
            axis = axis_of(k)
            if isinstance(axis, int):
                axes[k] = from_front(axis, part)
    # The GraphDef of parts is a function of these alone.
    key = ("parts", tuple(axes), tuple(names.items()))
    parts: Parts = graphdef.memo(key, lambda: _parts(graphdef, axes, names))
    of_parts: Any = parts.inside

    def inside(c: FlatModule) -> FlatModule:
        d = c.definition
        return FlatModule(c.values, flat_module_def(of_parts, d.number, d.of, d.some))

    return replace_flat_modules(given, inside), parts


def from_front(axis: int, part: Any) -> int:
    """An axis of a whole, counted from the front, given a part."""
    return axis % (max(map(np.ndim, jax.tree.leaves(part)), default=0) + 1)


def _speaks(schema: Schema) -> bool:
    pairs = zip(schema.kinds, schema.metadata, strict=True)
    return any(SPECS & _with_kind(*pair).keys() for pair in pairs)


def _parts(graphdef: GraphDef, axes: Sequence[Any], names: Mapping[str, Any]) -> Parts:
    schema = graphdef.schema
    inside, of_wholes = _schema_of_parts(schema, axes, names)
    of_parts = GraphDef.of(graphdef.root, graphdef.records, inside)
    return Parts(schema.metadata, of_parts, tuple(axes), of_wholes)


def _schema_of_parts(
    schema: Schema, axes: Sequence[Any], names: Mapping[str, Any]
) -> tuple[Schema, bool]:
    """The leaves as parts, and whether there are names that may speak of wholes."""
    bad, of_wholes, metadata = [], False, list(schema.metadata)
    for i, axis in enumerate(axes):
        new, taken = dict(metadata[i]), []
        if axis is not None:
            new = _with_kind(schema.kinds[i], new)
            of_wholes |= bool(new.get(_NAMES) and new.get("spec") is None and not names)
            for key, expected in _keys(new, names, None):
                old = new[key]
                new[key], entry = _without(old, axis)
                if key in _SPECS:
                    taken.append(entry)
                elif entry not in (expected, None):
                    found = f"{old!r} has {entry!r} at axis {axis}"
                    bad.append(f"{schema.describe(i)}: {found}")
        if taken or _ENTRIES in new:
            new[_ENTRIES] = (*new.get(_ENTRIES, ()), *(taken or [None])[:1])
        metadata[i] = Metadata.of(new)
    if bad:
        raise ArgumentError(
            f"transform_metadata says {dict(names)!r}, and these have something else "
            f"there:\n{listing(bad)}\nGive them the axis of that name, or name it as "
            "they do."
        )
    return Schema.of(schema.paths, schema.kinds, metadata), of_wholes


def named(
    effects: Effects, axes: Sequence[Any], names: Mapping[str, Any], entry: Any = None
) -> Effects:
    """What a call did, with the new axis in the metadata of new Variables.

    Args:
      effects: what it did.
      axes: for each leaf that came into being inside, the axis along which it comes
        out stacked, counted from the front, or None.
      names: ``transform_metadata``.
      entry: what specs are given there that do not come from a part.

    Returns:
      The same but for the metadata.
    """
    edits = effects.edits
    if edits is None:
        return effects
    new, schema = iter(axes), edits.graphdef.schema
    metadata = list(schema.metadata)
    for i, leaf in enumerate(edits.leaves):
        if leaf.origin is None:
            metadata[i] = _whole(schema, i, next(new), names, entry)
    edits = edits._replace(graphdef=_with_metadata(edits.graphdef, metadata))
    return Effects(effects.written, effects.outputs, edits)


def _with_metadata(graphdef: GraphDef, metadata: Sequence[Metadata]) -> GraphDef:
    schema = graphdef.schema
    schema = Schema.of(schema.paths, schema.kinds, metadata)
    return GraphDef.of(graphdef.root, graphdef.records, schema)


# ---------------------------------------------------- States, which are values to JAX
def states_as_parts(
    given: Any, axes: Any, names: Mapping[str, Any]
) -> tuple[Any, bool]:
    """Arguments inside of a map, with the metadata of parts in their States.

    Args:
      given: the arguments.
      axes: a prefix tree of their axes; what is no int is whole.
      names: ``transform_metadata``.

    Returns:
      The arguments, and whether there are names that may speak of whole arrays.

    Raises:
      ArgumentError: as ``as_parts``.
    """
    found = [False]

    def part(schema: Schema, axes: Sequence[Any]) -> Schema:
        known = names if PARTITION_NAME in names else NOTHING
        inside, of_wholes = _schema_of_parts(schema, axes, known)
        found[0] |= of_wholes
        return inside

    return _map_states(part, given, axes), found[0]


def states_as_wholes(
    out: Any, axes: Any, names: Mapping[str, Any], entry: Any = None
) -> Any:
    """What a call returned, with the metadata of wholes in its States.

    Args:
      out: the output.
      axes: a prefix tree of the axes along which it comes out stacked, or None.
      names: ``transform_metadata``.
      entry: as for ``named``.

    Returns:
      The same but for the metadata.
    """

    def whole(schema: Schema, axes: Sequence[Any]) -> Schema:
        each = [_whole(schema, i, axis, names, entry) for i, axis in enumerate(axes)]
        return Schema.of(schema.paths, schema.kinds, each)

    return _map_states(whole, out, axes)


def _map_states(f: Callable[..., Schema], tree: Any, axes: Any) -> Any:
    """A tree whose States have the Schema that ``f`` makes of theirs and their axes."""
    parts, treedef = jtu.tree_flatten(tree, is_leaf=_is_state)
    if not any(map(_is_state, parts)):
        return tree

    def mapped(x: Any, axes: Any) -> Any:
        if not _is_state(x):
            return x
        values = x.values_list()
        pairs = zip(map(_first, axes.values_list()), values, strict=True)
        at = [from_front(a, v) if isinstance(a, int) else None for a, v in pairs]
        return snapshot(f(x.schema, at), values)

    return treedef.unflatten(
        map(mapped, parts, treedef.flatten_up_to(of_each(axes, tree)))
    )


def _is_state(x: Any) -> bool:
    return isinstance(x, State)


def _first(axes: Any) -> Any:
    """The axis of a value, which has it for each of its arrays."""
    return next(iter(jtu.tree_leaves(axes, is_leaf=is_answer)), None)


# ---------------------------------------------------------------- one leaf's metadata
_NAMES, _SPECS = "out_sharding", ("spec", PLACEMENT)
_ENTRIES = "entries_outside"
"""The metadata of a part under which is kept what was taken from its spec.

One entry for each map that is being traced, the innermost last; they go where copies of
the metadata go.
"""


def _with_kind(kind: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with the kind's spec, where nothing in it comes before."""
    found = dict(metadata)
    if metadata.get("spec") is None and not metadata.get(_NAMES):
        spec = _spec_of(kind)
        found |= {"spec": spec} if isinstance(spec, _AXES) else {}
    return found


def _spec_of(kind: Any) -> Any:
    return getattr(kind, "options", {}).get("spec")


_AXES = (PartitionSpec, NamedSharding)


def _keys(
    metadata: Mapping[str, Any], names: Mapping[str, Any], entry: Any
) -> list[tuple[str, Any]]:
    """What in the metadata has an entry for each axis, and that for the mapped one."""
    found = [(key, entry) for key in _SPECS if isinstance(metadata.get(key), _AXES)]
    if PARTITION_NAME not in names:
        return found
    given = {_NAMES: names[PARTITION_NAME], **names}
    named = [(key, given[key]) for key in given.keys() & metadata.keys()]
    several = (tuple, list, *_AXES)
    return found + [
        pair
        for pair in named
        if metadata[pair[0]] and isinstance(metadata[pair[0]], several)
    ]


def _whole(
    schema: Schema, i: int, axis: int | None, names: Mapping[str, Any], entry: Any
) -> Metadata:
    """The metadata of a leaf that comes out stacked along an axis, or None."""
    kind, metadata = schema.kinds[i], schema.metadata[i]
    if axis is None:
        return Metadata.of(_with_axis(metadata, None, names, entry))
    new = _with_axis(_with_kind(kind, metadata), axis, names, entry)
    if new.get("spec") is not None and new["spec"] == _spec_of(kind):
        del new["spec"]  # what the kind says itself, as before the map
    return Metadata.of(new)


def _with_axis(
    metadata: Mapping[str, Any],
    axis: int | None,
    names: Mapping[str, Any],
    entry: Any = None,
) -> dict[str, Any]:
    """Metadata of a part as that of a whole."""
    new = dict(metadata)
    *others, mine = new.pop(_ENTRIES, None) or (None,)
    if others:
        new[_ENTRIES] = tuple(others)
    if axis is None:
        return new
    for key, one in _keys(new, names, entry if mine is None else mine):
        # Entries may be left out at the end, where they would be None.
        parts = [*_entries(new[key])]
        parts += [None] * (axis - len(parts))
        new[key] = _like(new[key], [*parts[:axis], one, *parts[axis:]])
    return new


def _without(of: Any, axis: int) -> tuple[Any, Any]:
    """Names or a spec without the entry of an axis, and the entry."""
    entries = [*_entries(of)]
    entry = entries.pop(axis) if axis < len(entries) else None
    return _like(of, entries), entry


def _entries(of: Any) -> tuple[Any, ...]:
    return tuple(getattr(of, "spec", of))


def _like(old: Any, entries: Sequence[Any]) -> Any:
    if isinstance(old, NamedSharding):
        return NamedSharding(old.mesh, PartitionSpec(*entries))
    return PartitionSpec(*entries) if isinstance(old, PartitionSpec) else tuple(entries)
