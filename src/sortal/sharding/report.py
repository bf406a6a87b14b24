"""Where every leaf of a model lies or would lie, who said so, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sortal._engine.foreign import is_kind
from sortal._engine.paths import Path, show
from sortal._engine.plan import bind
from sortal._engine.schema import Kind, kind_name
from sortal._engine.tables import Report, Table
from sortal._engine.variable import Param
from sortal.errors import PathError, ShardingError, listing
from sortal.policy.rule import format_answer
from sortal.sharding.placing import on_mesh
from sortal.sharding.resolution import UNRULED, axes_of

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
        self.elsewhere = tuple(
            r for r in self.rows if r.lies is not None and r.lies != short(r.spec)
        )

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
                _bytes(sum(r.bytes for r in mine)),
                _bytes(sum(r.on_device for r in mine)),
                _bytes(sum(r.bytes for r in mine if r.by == UNRULED)),
            )
            for kind, mine in kinds.items()
        ]
        total = ("all", str(len(self.rows)), *map(_bytes, self._sums()))
        largest = sorted(self.rows, key=lambda r: -r.on_device)[:_SHOWN]
        by_leaf = [
            (
                show(r.path),
                kind_name(r.kind),
                "x".join(map(str, r.shape)) or "-",
                format_answer("spec", r.spec),
                r.by,
                _bytes(r.bytes),
                _bytes(r.on_device),
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
                f"{_bytes(self.unruled)} are replicated because no metadata, row or "
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
    model: Any, mesh: Mesh, policy: Any = None, *, rules: Any = ()
) -> ShardingReport:
    """Where each leaf of a model belongs on a mesh, who says so, and its bytes.

    Args:
      model: a Module, real or abstract, of Sortal or Flax; or a container of these.
      mesh: the mesh, which may be a ``jax.sharding.AbstractMesh``.
      policy: a Policy, or a mapping of filter to Rule; see ``specs`` for the order.
      rules: pairs of a name of an axis and a mesh axis.

    Returns:
      A ShardingReport.

    Raises:
      ArgumentError: two rules give one name of an axis different mesh axes.
      PolicyError: a kind or a Variable has an answer that is no spec.
      ShardingError: specs do not fit their leaves or the mesh; all are listed.

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
    schema, sizes = found.plan.graphdef.schema, dict(mesh.shape)
    rows = []
    for i, (value, (spec, by)) in enumerate(
        zip(found.values, found.found, strict=True)
    ):
        parts = math.prod(sizes[axis] for _, axis in axes_of(spec))
        count = sum(map(nbytes, jax.tree.leaves(value)))
        sharding = getattr(value, "sharding", None)
        named = sharding if isinstance(sharding, NamedSharding) else None
        lies = named.spec if named is not None and named.mesh == mesh else None
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
    return ShardingReport(rows, mesh)


def nbytes(x: Any) -> int:
    """The bytes of an array, real or abstract; of keys, those of their words."""
    dtype = getattr(x, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        x = jax.eval_shape(jax.random.key_data, x)
    if dtype is None:
        return np.asarray(x).nbytes
    return math.prod(x.shape) * x.dtype.itemsize


def short(spec: Any) -> PartitionSpec:
    """A spec without Nones at its end, which say nothing."""
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def assert_sharded(model: Any, tolerance: float = 0.02, *, kind: type = Param) -> None:
    """Refuses a model whose arrays are not divided over the devices they lie on.

    A device may hold more than an even share of the bytes, by ``tolerance`` times the
    bytes of all (the measure is that of MaxText's
    ``assert_params_sufficiently_sharded``).

    Args:
      model: a Module, real or abstract with shardings; or a container of these.
      tolerance: the part of all bytes that a device may hold beyond an even share.
      kind: the kind whose leaves count.

    Raises:
      ShardingError: the fullest device holds more, or no leaf counts; the leaves that
        are replicated are listed, the largest first.

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
    total, here, devices = 0, 0, 1
    rows = []
    for i in chosen:
        for x in jax.tree.leaves(values[i]):
            sharding = getattr(x, "sharding", None)
            if sharding is None:
                raise ShardingError(
                    f"{schema.describe(i)} has no sharding: it is abstract and on no "
                    "mesh. Give abstract(fn, mesh, policy) a mesh."
                )
            n = len(sharding.device_set) if not _abstract(sharding) else _size(sharding)
            devices, size = max(devices, n), nbytes(x)
            part = math.prod(sharding.shard_shape(x.shape)) / max(math.prod(x.shape), 1)
            total, here = total + size, here + size * part
            rows.append(
                (size * part - size / n, f"{schema.describe(i)}: {_bytes(size)}")
            )
    if not total:
        raise ShardingError(
            f"the model has no {kind.__name__}, so there is nothing to be sharded; it "
            "has:\n" + listing(map(schema.describe, range(len(schema))))
        )
    beyond = (here - total / devices) / total
    if beyond > tolerance:
        rows = sorted((r for r in rows if r[0] > 0), key=lambda r: -r[0])
        raise ShardingError(
            f"a device holds {_bytes(int(here))} of {_bytes(total)}, where an even "
            f"share of {devices} devices is {_bytes(total // devices)}: {beyond:.1%} "
            f"of all too much, and {tolerance:.1%} is allowed. Not divided evenly:\n"
            f"{listing(text for _, text in rows)}\nGive them a spec, as in "
            "shard(model, mesh, presets.fsdp('data'))."
        )


def _abstract(sharding: Any) -> bool:
    return isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh)


def _size(sharding: Any) -> int:
    return math.prod(dict(sharding.mesh.shape).values())


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.4g} TB"
