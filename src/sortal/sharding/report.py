"""Where every leaf of a model lies or would lie, who said so, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sortal._engine.foreign import is_kind
from sortal._engine.paths import Path, show
from sortal._engine.plan import bind
from sortal._engine.schema import Kind, kind_name
from sortal._engine.tables import Report, Table, nbytes, size
from sortal._engine.variable import Param
from sortal.errors import PathError, ShardingError, listing
from sortal.policy.rule import format_answer
from sortal.sharding.mesh_axes import axes_of, short
from sortal.sharding.placing import on_mesh
from sortal.sharding.resolution import UNRULED

_SHOWN = 40


class ShardingRow(NamedTuple):
    """One leaf: its declared spec, who gave it, and its bytes.

    ``by`` is as in ``Resolved``; ``on_device`` counts the bytes on one device. ``lies``
    is the spec that the array has now; None where it is abstract or on another mesh.
    """

    path: Path
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    by: str
    bytes: int
    on_device: int
    lies: PartitionSpec | None


class ShardingReport(Report):
    """What ``sharding_report`` returns; print it, or read its ``rows``.

    Attributes:
      rows: one ShardingRow for each leaf.
      mesh: the mesh.
      total: the bytes of all leaves, each counted once.
      on_device: the bytes of all leaves on each device.
      unruled: the bytes of leaves that are replicated because nothing speaks of them.
      elsewhere: the rows of leaves that lie on the mesh otherwise than declared.
    """

    def __init__(self, rows: Iterable[ShardingRow], mesh: Any):
        self.rows: tuple[ShardingRow, ...] = tuple(rows)
        self.mesh = mesh
        self.total = sum(r.bytes for r in self.rows)
        self.on_device = sum(r.on_device for r in self.rows)
        self.unruled = sum(r.bytes for r in self.rows if r.by == UNRULED)
        self.elsewhere = tuple(r for r in self.rows if not self._there(r))

    def _there(self, row: ShardingRow) -> bool:
        """Whether a leaf lies as declared; axes of size 1 divide nothing."""
        if row.lies is None:
            return True
        lies, due = (NamedSharding(self.mesh, spec) for spec in (row.lies, row.spec))
        return lies.is_equivalent_to(due, len(row.shape))

    def draw(self, path: Path | str) -> None:
        """Prints which device has which part of one leaf, drawn by ``jax.debug``.

        Args:
          path: the path of a leaf, as a tuple or as text such as ``"layers.0.kernel"``.

        Raises:
          PathError: there is no such leaf.
        """
        texts = {show(r.path): r for r in self.rows} | {r.path: r for r in self.rows}
        row = texts.get(path)
        if row is None:
            raise PathError(
                f"no leaf {path!r} in this report; it has:\n"
                + listing(show(r.path) for r in self.rows)
            )
        jax.debug.visualize_sharding(row.shape, NamedSharding(self.mesh, row.spec))

    def tables(self) -> tuple[Table, ...]:
        axes = ", ".join(f"{axis}: {n}" for axis, n in dict(self.mesh.shape).items())
        kinds: dict[Kind, list[ShardingRow]] = {}
        for row in self.rows:
            kinds.setdefault(row.kind, []).append(row)
        by_kind = [
            (
                kind_name(kind),
                str(len(mine)),
                size(sum(r.bytes for r in mine)),
                size(sum(r.on_device for r in mine)),
                size(sum(r.bytes for r in mine if r.by == UNRULED)),
            )
            for kind, mine in kinds.items()
        ]
        total = ("all", str(len(self.rows)), *map(size, self._sums()))
        largest = sorted(self.rows, key=lambda r: -r.on_device)[:_SHOWN]
        by_leaf = [
            (
                show(r.path),
                kind_name(r.kind),
                "x".join(map(str, r.shape)) or "-",
                format_answer("spec", r.spec),
                r.by,
                size(r.bytes),
                size(r.on_device),
            )
            for r in largest
        ]
        heads = ("kind", "leaves>", "bytes>", "on each>", "no rule>")
        leaf_heads = ("leaf", "kind", "shape>", "spec", "by", "bytes>", "on each>")
        title = "Largest leaves" if len(self.rows) > _SHOWN else "Leaves"
        return (
            Table(f"Mesh ({axes})", heads, (*by_kind, total), self._notes()),
            Table(title, leaf_heads, tuple(by_leaf)),
        )

    def _sums(self) -> tuple[int, int, int]:
        return self.total, self.on_device, self.unruled

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self.unruled:
            notes.append(
                f"{size(self.unruled)} are replicated because no metadata, row or "
                "kind speaks of them. If that is meant, write a last row "
                "...: Rule(spec=P())."
            )
        if self.elsewhere:
            some = [show(r.path) for r in self.elsewhere[:6]]
            notes.append(
                f"{len(self.elsewhere)} leaves lie otherwise than declared: "
                f"{', '.join(some)}. Call shard(model, mesh, policy)."
            )
        return tuple(notes)


def sharding_report(
    model: Any, mesh: Mesh | None = None, policy: Any = None, *, rules: Any = ()
) -> ShardingReport:
    """Where each leaf of a model belongs on a mesh, who says so, and its bytes.

    Args:
      model: a Module, real or abstract, of Sortal or Flax; or a container of these.
      mesh: the mesh, which may be a ``jax.sharding.AbstractMesh``; that of
        ``jax.set_mesh`` if absent.
      policy: a Policy, or a mapping of filter to Rule; see ``specs`` for the order.
      rules: pairs of a name of an axis and a mesh axis.

    Returns:
      A ShardingReport.

    Raises:
      ArgumentError: two rules give one name of an axis different mesh axes.
      PolicyError: a kind or a Variable has an answer that is no spec.
      ShardingError: there is no mesh, or specs do not fit; all are listed.

    Example:
      >>> import jax
      >>> import sortal
      >>> from sortal.sharding import presets
      >>> mesh = jax.sharding.AbstractMesh((8,), ("data",))
      >>> make = lambda: sortal.Linear(64, 64, rngs=sortal.Rngs(0))
      >>> model = sortal.abstract(make)
      >>> report = sortal.sharding_report(model, mesh, presets.fsdp("data"))
      >>> report.total, report.on_device
      (16640, 2304)
    """
    found = on_mesh(model, mesh, policy, rules)
    schema, sizes = found.plan.graphdef.schema, dict(found.mesh.shape)
    rows = []
    for i, (value, (spec, by)) in enumerate(
        zip(found.values, found.found, strict=True)
    ):
        parts = math.prod(sizes[axis] for _, axis in axes_of(spec))
        count = sum(map(nbytes, jax.tree.leaves(value)))
        sharding = getattr(value, "sharding", None)
        named = sharding if isinstance(sharding, NamedSharding) else None
        lies = named.spec if named is not None and named.mesh == found.mesh else None
        rows.append(
            ShardingRow(
                schema.paths[i],
                schema.kinds[i],
                tuple(getattr(value, "shape", ())),
                str(getattr(value, "dtype", type(value).__name__)),
                spec,
                by,
                count,
                count // parts,
                None if lies is None else short(lies),
            )
        )
    return ShardingReport(rows, found.mesh)


def assert_sharded(
    model: Any,
    tolerance: float = 0.02,
    *,
    mesh: Mesh | None = None,
    kind: type = Param,
) -> None:
    """Refuses a model whose arrays are not divided over the devices of a mesh.

    A device may hold more than an even share of the bytes, by ``tolerance`` times the
    bytes of all (the measure is that of MaxText's
    ``assert_params_sufficiently_sharded``).

    Args:
      model: a Module, real or abstract with shardings; or a container of these.
      tolerance: the part of all bytes that a device may hold beyond an even share.
      mesh: the mesh; that of ``jax.set_mesh`` if absent, or else the largest on which
        an array of the model lies.
      kind: the kind whose leaves count.

    Raises:
      ShardingError: the fullest device holds more, no leaf counts, or there is no
        mesh; the leaves that are not divided are listed, the largest first.

    Example:
      >>> import jax
      >>> import sortal
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> model = sortal.shard(sortal.Linear(4, 4, rngs=sortal.Rngs(0)), mesh)
      >>> sortal.assert_sharded(model)
    """
    plan = bind(model)
    schema, values = plan.graphdef.schema, plan.values()
    chosen = [i for i, k in enumerate(schema.kinds) if is_kind(k, kind)]
    arrays = [
        (schema.describe(i), x) for i in chosen for x in jax.tree.leaves(values[i])
    ]
    total = sum(nbytes(x) for _, x in arrays)
    if not total:
        raise ShardingError(
            f"the model has no {kind.__name__}, so there is nothing to be sharded; it "
            "has:\n" + listing(map(schema.describe, range(len(schema))))
        )
    devices = _devices(arrays, mesh)
    rows = [
        (nbytes(x) * (_part(x.sharding, x.shape) - 1 / devices), name, nbytes(x))
        for name, x in arrays
    ]
    beyond = sum(more for more, _, _ in rows) / total
    if beyond > tolerance:
        worst = sorted((r for r in rows if r[0] > 0), key=lambda r: r[0], reverse=True)
        here = round(total / devices + beyond * total)
        raise ShardingError(
            f"a device holds {size(here)} of {size(total)}, where an even "
            f"share of {devices} devices is {size(total // devices)}: {beyond:.1%} "
            f"of all too much, and {tolerance:.1%} is allowed. Not divided evenly:\n"
            f"{listing(f'{name}: {size(n)}' for _, name, n in worst)}\nGive them a "
            "spec, as in shard(model, mesh, presets.fsdp('data'))."
        )


def _devices(arrays: list[tuple[str, Any]], mesh: Any) -> int:
    """Over how many devices arrays, given with their names, are to be divided."""
    lacking = [name for name, x in arrays if getattr(x, "sharding", None) is None]
    if lacking:
        raise ShardingError(
            "these have no sharding, for they are abstract and on no mesh:\n"
            f"{listing(lacking)}\nGive abstract(fn, mesh, policy) a mesh."
        )
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return mesh.size
    found = [x.sharding for _, x in arrays]
    # A mesh of one device is a mesh; an array that was never put on one lies on none.
    sizes = [s.num_devices for s in found if isinstance(s, NamedSharding)]
    sizes += [s.num_devices for s in found if s.num_devices > 1]
    if not sizes:
        raise ShardingError(
            "these lie on one device and on no mesh:\n"
            f"{listing(name for name, _ in arrays)}\nCall shard(model, mesh, policy), "
            "or pass the mesh= over which they are to be divided."
        )
    return max(sizes)


def _part(sharding: Any, shape: tuple[int, ...]) -> float:
    """The part of an array that each of its devices holds."""
    return math.prod(sharding.shard_shape(shape)) / max(math.prod(shape), 1)
