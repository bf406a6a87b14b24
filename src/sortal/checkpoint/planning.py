"""What a restore would read: which chunks of which arrays, for each device."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sortal._engine.paths import Path, show
from sortal._engine.plan import bind
from sortal._engine.schema import Kind, kind_name
from sortal._engine.tables import Report, Table, size
from sortal.checkpoint import files
from sortal.checkpoint.fitting import Fit, Options, fit
from sortal.checkpoint.loading import Want, check_shardings, wanted
from sortal.checkpoint.manifest import Manifest, Stored, chunk_counts, chunk_file
from sortal.checkpoint.restoring import _Kinds, candidates, find_step, shardings
from sortal.checkpoint.values import arrays, numpy_dtype
from sortal.errors import PathError, listing
from sortal.policy.policy import Policy

_CHECKSUM = 4
"""Bytes at the end of each chunk."""
_SHOWN = 40


class ReadRow(NamedTuple):
    """One array: where it is stored, and what of it the devices read.

    ``at`` has for each axis of the stored array the begin and end of each device's
    part. Small arrays are ``packed`` with others into one of one axis, of bytes.
    """

    path: Path
    kind: Kind
    array: str
    stored: Stored
    at: tuple[tuple[np.ndarray, np.ndarray], ...]
    bytes: int
    packed: bool

    @property
    def kept(self) -> np.ndarray:
        """The bytes that each device keeps."""
        sizes = [end - begin for begin, end in self.at]
        return np.prod(sizes, axis=0) * _itemsize(self.stored)

    @property
    def files(self) -> np.ndarray:
        """The number of chunk files that each device reads."""
        pairs = zip(self.at, self.stored.chunks, strict=True)
        return np.prod([-(-end // c) - begin // c for (begin, end), c in pairs], axis=0)

    def of(self, device: int) -> list[tuple[str, tuple[slice, ...]]]:
        """The chunk files that one device reads, and which part of each it keeps."""
        ranges = []
        for (begins, ends), c in zip(self.at, self.stored.chunks, strict=True):
            begin, end = int(begins[device]), int(ends[device])
            ranges.append(
                [
                    (i, slice(max(begin - i * c, 0), min(end - i * c, c)))
                    for i in range(begin // c, -(-end // c))
                ]
            )
        return [
            (chunk_file(self.array, (i for i, _ in at)), tuple(part for _, part in at))
            for at in itertools.product(*ranges)
        ]


class RestorePlan(Report):
    """What ``restore_plan`` returns; print it, or read its ``rows``.

    Attributes:
      rows: one ReadRow for each array of the checkpoint that would be read.
      total: the bytes of these arrays.
      kept: for each device, in the order of the mesh, the bytes that it would hold.
      read: for each device the bytes of the chunks that these come from. A process
        reads a part once that several of its devices hold.
    """

    def __init__(self, rows: Iterable[ReadRow], where: str):
        self.rows: tuple[ReadRow, ...] = tuple(rows)
        self.where = where
        self.total = sum(r.bytes for r in self.rows)
        devices = max((len(r.kept) for r in self.rows), default=1)
        self.kept = np.zeros(devices, np.int64)
        self.read = np.zeros(devices, np.int64)
        packs: dict[str, set[str]] = {}
        for row in self.rows:
            self.kept[: len(row.kept)] += row.kept
            if row.packed:
                # Neighbours share chunks, and all devices read all of them.
                packs.setdefault(row.array, set()).update(f for f, _ in row.of(0))
            else:
                self.read[: len(row.kept)] += row.files * _file_size(row.stored)
        stored = {row.array: row.stored for row in self.rows}
        self.read += sum(
            len(names) * _file_size(stored[p]) for p, names in packs.items()
        )

    def of(self, path: Path | str, device: int = 0) -> list[Any]:
        """Which chunk files a device reads for one leaf, and what of each it keeps.

        Args:
          path: the path of a leaf, as a tuple or as text such as ``"layers.0.kernel"``.
          device: its number in the order of the mesh.

        Returns:
          Pairs of a file and slices of the chunk in it.

        Raises:
          PathError: there is no such leaf.
        """
        rows = [r for r in self.rows if path in (r.path, show(r.path))]
        if not rows:
            raise PathError(
                f"no leaf {path!r} in this plan; it has:\n"
                + listing(show(r.path) for r in self.rows)
            )
        return [pair for row in rows for pair in row.of(device)]

    def tables(self) -> tuple[Table, ...]:
        kinds: dict[Kind, list[ReadRow]] = {}
        for row in self.rows:
            kinds.setdefault(row.kind, []).append(row)
        cells = [
            (
                kind_name(kind),
                str(len(mine)),
                size(sum(r.bytes for r in mine)),
                size(sum(int(r.kept.max()) for r in mine)),
            )
            for kind, mine in kinds.items()
        ]
        most = int(self.kept.max()), int(self.read.max())
        cells.append(("all", str(len(self.rows)), size(self.total), size(most[0])))
        note = f"The device that reads most reads {size(most[1])} of chunks."
        largest = sorted(self.rows, key=lambda r: -r.bytes)[:_SHOWN]
        leaves = [
            (
                show(r.path),
                "x".join(map(str, r.stored.chunks)),
                str(math.prod(chunk_counts(r.stored))),
                str(int(r.files.max())),
                size(int(r.kept.max())),
            )
            for r in largest
        ]
        heads = ("kind", "arrays>", "bytes>", "on each>")
        leaf_heads = ("leaf", "chunk", "files>", "read by each>", "on each>")
        title = "Largest leaves" if len(self.rows) > _SHOWN else "Leaves"
        return (
            Table(self.where, heads, tuple(cells), (note,)),
            Table(title, leaf_heads, tuple(leaves)),
        )


def _itemsize(stored: Stored) -> int:
    return numpy_dtype(stored.dtype).itemsize


def _file_size(stored: Stored) -> int:
    return math.prod(stored.chunks) * _itemsize(stored) + _CHECKSUM


def restore_plan(
    directory: str | os.PathLike[str],
    root: Any,
    /,
    *,
    step: int | str = "latest",
    only: Any = None,
    policy: Policy | None = None,
    partial: bool = False,
    rename: Mapping[str, str] | None = None,
    cast: bool = False,
    kinds: Mapping[str, type] | None = None,
    sharding: Any = None,
) -> RestorePlan:
    """What ``restore`` with the same arguments would read; only the manifest is read.

    Args:
      directory: where the steps are.
      root: a model, real or abstract, such as ``abstract(fn, mesh, policy)``, whose
        mesh may be a ``jax.sharding.AbstractMesh``.
      step: the number of a step, or ``"latest"``.
      only: as of ``restore``.
      policy: as of ``restore``.
      partial: as of ``restore``.
      rename: as of ``restore``.
      cast: as of ``restore``.
      kinds: as of ``restore``.
      sharding: as of ``restore``.

    Returns:
      A RestorePlan.

    Raises:
      ArgumentError: the directory is neither a path nor an address of an object store.
      NoCheckpointError: there is no such step.
      DamagedError: the manifest is damaged.
      RestoreError: the checkpoint does not fit the model; every difference is listed.
      FilterError: ``only`` is no filter.

    Example:
      >>> import tempfile
      >>> import sortal as nnx
      >>> directory = tempfile.mkdtemp()
      >>> saving = nnx.save(directory, nnx.Linear(2, 3, rngs=nnx.Rngs(0)), step=1)
      >>> model = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> plan = nnx.restore_plan(directory, model)
      >>> plan.total, plan.of("kernel")
      (36, [('Param/packed/c.0', (slice(64, 88, None),))])
    """
    directory = files.located(directory)
    number = find_step(directory, step)
    manifest = files.read_manifest(directory, number)
    options = Options(only, policy, partial, rename, cast, None)
    return planned(
        bind(root),
        manifest,
        options,
        kinds or {},
        sharding,
        f"step {number} of {directory}",
    )


def planned(
    plan: Any,
    manifest: Manifest,
    options: Options,
    kinds: Mapping[str, type],
    sharding: Any,
    where: str,
) -> RestorePlan:
    """The RestorePlan of a model's plan and a manifest; see ``restore_plan``."""
    schema = plan.graphdef.schema
    known = _Kinds([k for k in schema.kinds if k], kinds)
    given = candidates(manifest, known)
    found: Fit = fit(plan, given, manifest.aliases, options, where)
    to = shardings(sharding, schema, plan)
    wants = []
    for pair in found.pairs:
        three = zip(arrays(pair.stored), arrays(pair.live), pair.like, strict=True)
        for stored, live, like in three:
            want = wanted(schema.paths[pair.at], stored, like, live, to[pair.at])
            wants.append((pair.at, want))
    check_shardings(want for _, want in wants)
    rows = [
        ReadRow(
            want.path,
            schema.kinds[at],
            place.array,
            manifest.arrays[place.array],
            _parts(want, manifest.arrays[place.array]),
            want.array.nbytes,
            place.offset is not None,
        )
        for at, want in wants
        if (place := want.array.place) is not None
    ]
    return RestorePlan(rows, where)


def _parts(want: Want, stored: Stored) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Begin and end of each device's part, for each axis of the stored array."""
    offset = want.array.place.offset if want.array.place else None
    if offset is not None:
        begin = np.full(_devices(want.sharding), offset, np.int64)
        return ((begin, begin + want.array.nbytes),)
    shape = stored.shape
    if isinstance(want.sharding, jax.sharding.NamedSharding):
        return _named(want.sharding, shape)
    if want.sharding is None:
        return tuple((np.zeros(1, np.int64), np.full(1, n)) for n in shape)
    found = want.sharding.devices_indices_map(shape).values()
    ends = [list(map(_ends, at, shape)) for at in found]
    table = np.asarray(ends, np.int64)
    return tuple((table[:, d, 0], table[:, d, 1]) for d in range(len(shape)))


def _ends(part: slice, n: int) -> tuple[int, int]:
    return part.indices(n)[:2]


def _devices(sharding: Any) -> int:
    return 1 if sharding is None else sharding.num_devices


def _named(
    sharding: jax.sharding.NamedSharding, shape: tuple[int, ...]
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    sizes = dict(sharding.mesh.shape)
    places = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    place = dict(zip(sizes, places, strict=True))
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    found = []
    for n, entry in zip(shape, entries, strict=True):
        number, parts = np.zeros(places.shape[1], np.int64), 1
        for axis in entry if isinstance(entry, tuple) else (entry,):
            if isinstance(axis, str):
                number, parts = number * sizes[axis] + place[axis], parts * sizes[axis]
        found.append((number * (n // parts), (number + 1) * (n // parts)))
    return tuple(found)
