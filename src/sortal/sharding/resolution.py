"""Which partition spec each leaf has, who says so, and whether it can have it.

The rule, in one place for every pipeline: a Variable's metadata, then the first row of
the Policy that takes the leaf, then the option of its kind, then where ``shard`` put
it; what nothing speaks of is replicated. Optimizer state has the spec of its parameter,
unless a row takes it that does not take the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sortal._engine.foreign import is_kind
from sortal._engine.paths import Path
from sortal._engine.schema import Schema
from sortal._engine.statics import PLACEMENT
from sortal._engine.variable import OptState
from sortal.errors import PolicyError, ShardingError, listing
from sortal.policy.policy import Policy
from sortal.policy.rule import UNSET, format_answer
from sortal.sharding.mesh_axes import (
    in_shard_map,
    more_rules,
    put,
    short,
    show_sizes,
    spec_fault,
)

WHOLE = PartitionSpec()
UNRULED = "no rule"
"""What ``by`` is where a leaf is replicated because nothing speaks of it."""


class Resolved(NamedTuple):
    """The spec of one leaf and who gave it.

    ``by`` is ``"metadata"``, ``"row 2"``, ``"kind"``, ``"parameter"`` of optimizer
    state that follows one, ``"placement"``, or ``"no rule"``.
    """

    spec: PartitionSpec
    by: str


def resolve(
    schema: Schema,
    values: Sequence[Any],
    policy: Any = None,
    mesh: Any = None,
    view: Callable[[], Sequence[Any]] | None = None,
    rules: Any = (),
) -> list[Resolved]:
    """The spec of each leaf.

    Args:
      schema: the leaves.
      values: their values, or what has their shapes.
      policy: a Policy, or a mapping of filter to Rule, whose ``spec`` column is read.
      mesh: the mesh, for specs that are functions of it.
      view: gives the leaves themselves, for filters that look at values.
      rules: pairs of a name of an axis and a mesh axis.

    Returns:
      One Resolved for each leaf.

    Raises:
      ArgumentError: two rules give one name of an axis different mesh axes.
      PolicyError: a kind or a Variable has an answer that is no spec.
      ShardingError: a spec is a function of the mesh, and there is none.
    """
    table = Policy({} if policy is None else policy)
    with more_rules(rules or ()):
        found = table.find("spec", schema, view)
        leaves = (
            view() if view is not None and not table.is_structural("spec") else None
        )
        rows = list(schema.rows(leaves))
        given = [_named(*pair) for pair in zip(found.answers, found.by, strict=True)]
        owners = _owners(schema)
        for i, owner in owners.items():
            its_own = _row_of_state(
                table, rows[i], None if owner is None else rows[owner]
            )
            if its_own is not None:
                given[i] = _named(*its_own)
            elif owner is not None and given[i][1] != "metadata":
                given[i] = WHOLE, UNRULED
    made = [
        _resolved(answer, by, value, mesh, schema, i)
        for i, ((answer, by), value) in enumerate(zip(given, values, strict=True))
    ]
    for i, (_, by) in enumerate(made):
        there = placement(values[i], schema.metadata[i])
        if by == UNRULED and there is not None and mesh in (None, there.mesh):
            made[i] = Resolved(short(there.spec), "placement")
    for i, owner in owners.items():
        made[i] = _of_state(made, i, owner, values)
    return made


def _named(answer: Any, by: Any) -> tuple[Any, str]:
    if answer is UNSET:
        return WHOLE, UNRULED
    return answer, f"row {by}" if isinstance(by, int) else by


def _resolved(
    answer: Any, by: str, value: Any, mesh: Any, schema: Schema, i: int
) -> Resolved:
    spec = spec_for(answer, value, mesh, lambda: schema.describe(i))
    if not isinstance(spec, PartitionSpec):
        raise PolicyError(
            f"{schema.describe(i)}: its {by} says {spec!r:.80}, where a PartitionSpec "
            "is needed; the mesh is given beside it. Write PartitionSpec('data')."
        )
    return Resolved(spec, by)


def spec_for(answer: Any, value: Any, mesh: Any, name: Callable[[], str]) -> Any:
    """An answer of a ``spec`` column as JAX takes it, for one value.

    Args:
      answer: a spec, a NamedSharding, None, or a function of (shape, mesh).
      value: the value.
      mesh: the mesh; that of ``jax.set_mesh`` if None.
      name: gives path and kind of the leaf.

    Returns:
      A PartitionSpec; another Sharding as it is.

    Raises:
      ShardingError: a function is given, and there is no mesh.
    """
    if answer is None:
        return WHOLE
    if isinstance(answer, NamedSharding):
        return answer.spec
    if isinstance(answer, (PartitionSpec, jax.sharding.Sharding)):
        return answer
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            raise ShardingError(
                f"{name()}: its spec, {format_answer('spec', answer)}, depends on the "
                "mesh, and there is none. Pass mesh=, or call it within "
                "jax.set_mesh(mesh)."
            )
    return answer(shape_of(value), mesh)


def placement(value: Any, metadata: Mapping[str, Any]) -> NamedSharding | None:
    """Where ``shard`` put a leaf; None for a part of it, which has another rank."""
    sharding = metadata.get(PLACEMENT)
    if sharding is None or not hasattr(value, "shape"):
        return sharding
    return sharding if len(sharding.spec) == len(value.shape) else None


def at_full_rank(sharding: NamedSharding, value: Any) -> NamedSharding:
    """The same sharding with an entry for each dimension, as ``placement`` expects."""
    entries = [*sharding.spec]
    entries += [None] * (len(shape_of(value)) - len(entries))
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def at_placement(value: Any, metadata: Mapping[str, Any]) -> Any:
    """A new value where the metadata says that ``shard`` put the like of it."""
    sharding = placement(value, metadata)
    if sharding is None or not isinstance(value, jax.Array) or in_shard_map():
        return value
    return put(value, NamedSharding(sharding.mesh, short(sharding.spec)))


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of an array; () for a small pytree, which can only be replicated."""
    return tuple(getattr(value, "shape", ()))


# ------------------------------------------------------------------ optimizer state
def _owners(schema: Schema) -> dict[int, int | None]:
    """For each leaf of optimizer state its parameter, where that is here too.

    The end of its path is the path of the parameter below the model. Where two have one
    end, that of the shorter path is nearer to its model.
    """
    state = [i for i, kind in enumerate(schema.kinds) if is_kind(kind, OptState)]
    if not state:
        return {}
    ends: dict[Path, int] = {}
    others = [i for i, kind in enumerate(schema.kinds) if kind is not None]
    others = sorted(set(others) - set(state))
    for k in range(max((len(schema.paths[i]) for i in others), default=0)):
        for i in others:
            if k < len(schema.paths[i]):
                ends.setdefault(schema.paths[i][k:], i)
    found: dict[int, int | None] = {}
    for i in state:
        path = schema.paths[i]
        mine = (ends.get(path[k:]) for k in range(1, len(path)))
        found[i] = next((at for at in mine if at is not None), None)
    return found


def _row_of_state(table: Policy, row: Any, owner: Any) -> tuple[Any, int] | None:
    """The first row that speaks of optimizer state: not of its parameter as well."""
    for number, (f, rule) in enumerate(table.rows, 1):
        takes = rule.spec is not UNSET and f.test(*row)
        if takes and (owner is None or not f.test(*owner)):
            return rule.spec, number
    return None


def _of_state(
    made: list[Resolved], i: int, owner: int | None, values: Sequence[Any]
) -> Resolved:
    """What one leaf of optimizer state has, once all others are known."""
    mine, shape = made[i], shape_of(values[i])
    if mine.by.startswith("row"):
        return mine
    if owner is None:
        # Metadata is the parameter's, whose shape may be another.
        short = mine.by == "metadata" and len(mine.spec) > len(shape)
        return Resolved(WHOLE, "parameter") if short else mine
    its = made[owner]
    if its.by in ("placement", UNRULED) and mine.by == "placement":
        return mine
    spec = like_parameter(its.spec, shape_of(values[owner]), shape)
    return Resolved(spec, UNRULED if its.by == UNRULED else "parameter")


def like_parameter(
    spec: PartitionSpec, full: tuple[int, ...], shape: tuple[int, ...]
) -> PartitionSpec:
    """The spec of optimizer state of a parameter of shape ``full``.

    State of the parameter's shape has its spec. State that lacks one of its axes, as
    factored moments do, lacks that entry. Where the shapes do not say which axis that
    is, or have nothing to do with one another, it is replicated.

    Example:
      >>> from jax.sharding import PartitionSpec as P
      >>> list(like_parameter(P("a", "b"), (4, 8), (8,)))
      ['b']
    """
    if shape == full:
        return spec
    if len(shape) != len(full) - 1:
        return WHOLE
    entries = (*spec, *[None] * (len(full) - len(spec)))
    lacking = {
        entries[:axis] + entries[axis + 1 :]
        for axis in range(len(full))
        if full[:axis] + full[axis + 1 :] == shape
    }
    return PartitionSpec(*lacking.pop()) if len(lacking) == 1 else WHOLE


SPECS = frozenset({"spec", "out_sharding", PLACEMENT})
"""The entries of metadata that say something of each dimension."""


def with_spec_like(
    metadata: Mapping[str, Any], full: tuple[int, ...], shape: tuple[int, ...]
) -> dict[str, Any]:
    """A parameter's metadata for optimizer state of another shape.

    Args:
      metadata: that of a parameter of shape ``full``.
      full: the shape of the parameter.
      shape: the shape of the state.

    Returns:
      The same, with specs as of ``like_parameter``.
    """
    found = dict(metadata)
    for name in SPECS & found.keys():
        old = found[name]
        spec = getattr(old, "spec", old)
        if callable(spec) or not spec:
            continue  # it depends on the shape, or says nothing
        new = like_parameter(PartitionSpec(*spec), full, shape)
        if isinstance(old, NamedSharding):
            entries = [*new, *[None] * (len(shape) - len(new))]
            new = NamedSharding(old.mesh, PartitionSpec(*entries))
        found[name] = new
    return found


# ------------------------------------------------------------------------ what fits
def check_specs(
    schema: Schema, values: Sequence[Any], specs: Iterable[Any], mesh: Any
) -> None:
    """Refuses specs that do not fit their leaves or the mesh, all at once.

    Args:
      schema: the leaves.
      values: their values, or what has their shapes.
      specs: a PartitionSpec for each; anything else is passed over.
      mesh: the mesh.

    Raises:
      ShardingError: some do not fit; each is listed with path, kind, shape and reason.
    """
    sizes = dict(mesh.shape)
    bad = []
    for i, (value, spec) in enumerate(zip(values, specs, strict=True)):
        if not isinstance(spec, PartitionSpec):
            continue
        for x in jax.tree.leaves(value):
            fault = spec_fault(np.shape(x), spec, sizes)
            if fault:
                shown = format_answer("spec", spec)
                row = f"{schema.describe(i)} {list(np.shape(x))}: {shown}, but {fault}"
                bad.append(row)
    if bad:
        raise ShardingError(
            f"these specs cannot act on the mesh ({show_sizes(sizes)}):\n"
            f"{listing(bad)}\nNothing was moved. Give a name of an axis a rule with "
            "logical_axis_rules or rules=, an array another shape or spec, or the "
            "Policy an earlier row."
        )


def refuse_fixed(schema: Schema, fixed: Iterable[int]) -> None:
    """Refuses to move raw arrays that their holders do not let go.

    Args:
      schema: the leaves.
      fixed: the numbers of those that were to be moved.

    Raises:
      ShardingError: there are some; all are listed.
    """
    rows = [schema.describe(i) for i in sorted(fixed)]
    if rows:
        raise ShardingError(
            "raw arrays in tuples and other values cannot be put elsewhere:\n"
            f"{listing(rows)}\nHold them in Variables, such as Param(array)."
        )
