"""restore and load_state: read a step into a model, or into a new State."""

from __future__ import annotations

import functools
import os
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sortal._engine.foreign import register_imported, variable_bases
from sortal._engine.leaves import Leaves, store_all
from sortal._engine.paths import Path as ModelPath
from sortal._engine.paths import show
from sortal._engine.plan import bind
from sortal._engine.schema import Schema
from sortal._engine.state import State
from sortal._engine.statics import EMPTY, Metadata
from sortal._engine.variable import Variable, make
from sortal.checkpoint import files
from sortal.checkpoint.fitting import (
    Candidate,
    Fit,
    Options,
    fit,
    listing_of,
    odd_items,
)
from sortal.checkpoint.layout import bases_of, is_kind, qualified
from sortal.checkpoint.loading import Want, check_shardings, load, wanted
from sortal.checkpoint.manifest import NAME, Kind, Leaf, Manifest, short
from sortal.checkpoint.pending import settle
from sortal.checkpoint.processes import Group, not_in_a_trace, uncollected
from sortal.checkpoint.store import Reader
from sortal.checkpoint.values import Nest, Tree, arrays, build, numpy_dtype, tuple_of
from sortal.errors import (
    ArgumentError,
    CheckpointError,
    DamagedError,
    NoCheckpointError,
    RestoreError,
    SortalError,
    listing,
)
from sortal.filters import to_filter
from sortal.policy.policy import Policy
from sortal.transforms._adapter.prefixes import leaf_answers


class Restored(NamedTuple):
    """What ``restore`` did.

    Attributes:
      step: the step that was read.
      metadata: what ``save`` was given as metadata.
      metrics: what a ``Checkpoints`` was given as metrics.
      path: the folder of the step.
      leaves: the paths that were restored.
      kept: the paths that were left as they were, or filled.

    Example:
      >>> import tempfile
      >>> import sortal as nnx
      >>> directory = tempfile.mkdtemp()
      >>> saving = nnx.save(directory, nnx.Rngs(0), step=3, metadata={"epoch": 1})
      >>> found = nnx.restore(directory, nnx.Rngs(1))
      >>> found.step, found.metadata, found.leaves
      (3, {'epoch': 1}, (('default', 'count'), ('default', 'key')))
    """

    step: int
    metadata: Any
    metrics: Mapping[str, float]
    path: files.Location
    leaves: tuple[ModelPath, ...]
    kept: tuple[ModelPath, ...]


def restore(
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
    fill: Any = None,
    kinds: Mapping[str, type] | None = None,
    sharding: Any = None,
    fallback: bool = False,
) -> Restored:
    """Reads a step into a live model: all of it, or nothing.

    The model decides what is restored: each of its leaves takes the value at its path,
    in its own form, on its own devices. An abstract model (``eval_shape``) becomes a
    real one. Whatever differs is refused, all of it at once, before anything changes.
    All processes of a program call it together.

    Args:
      directory: where the steps are: a path, or an address such as ``s3://bucket/key``.
      root: what was given to ``save``, or something of the same structure.
      step: the number of a step, or ``"latest"``.
      only: a filter; other leaves are left as they are, and not read.
      policy: a Policy; leaves whose column ``checkpoint`` says ``drop`` are left.
      partial: True allows leaves that only one side has, and sharing that differs.
      rename: from globs of paths in the checkpoint to globs of paths in the model.
      cast: True converts floats to floats, and integers to integers that can hold them.
      fill: where leaves come from that the checkpoint lacks: a State, or a function of
        (path, kind).
      kinds: from the full names of kinds in the checkpoint to classes here.
      sharding: where arrays are put instead of where the model has them: a Sharding or
        PartitionSpec for all, a ``StateSharding``, or a Policy with specs.
      fallback: True takes, where the latest step is damaged, the newest that is whole,
        with a RuntimeWarning that names both.

    Returns:
      What was restored.

    Raises:
      ArgumentError: the directory is neither a path nor an address of an object store;
        ``fallback`` with another step than the latest; an option of a wrong type.
      NoCheckpointError: there is no such step.
      DamagedError: a file is damaged, missing, or not what was written.
      RestoreError: the checkpoint does not fit the model; every difference is listed.
      TraceError: it is called inside a transform.
      FilterError: ``only`` is no filter.

    Example:
      >>> import tempfile
      >>> import sortal as nnx
      >>> directory = tempfile.mkdtemp()
      >>> saving = nnx.save(directory, nnx.Linear(2, 3, rngs=nnx.Rngs(0)), step=1)
      >>> model = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> nnx.restore(directory, model).step
      1
      >>> model.kernel.shape
      (2, 3)
    """
    options = Options(only, policy, partial, rename, cast, fill)
    directory = files.located(directory)
    if fallback and step != "latest":
        raise ArgumentError(
            f"fallback=True is for the newest step, step='latest'; found {step!r}."
        )
    group = Group(f"restoring from {directory}")
    plan: Any = None
    passed: dict[int, str] = {}
    left = _TRIES
    while True:
        n = f"{len(passed)}.{left}"
        number = _agreed_step(directory, step, passed, group, n)
        plan = plan or bind(root)
        manifest, read_from, damage, fault = None, "", "", ""
        try:
            with uncollected():
                manifest = _manifest(directory, step, number, passed)
                found, leaves, values = _read_into(
                    plan, directory, manifest, options, kinds or {}, sharding
                )
            read_from = manifest.folder
        except SortalError as e:
            if not (left and _changed(e, directory, step, number, manifest, passed)):
                newest = directory / str(number) if step == "latest" else None
                damage, fault = _told(e, newest, fallback, alone=group.count == 1)
        answers = group.decide(f"read {n}", [read_from, damage], fault)
        if damages := [text for _, text in answers if text]:
            passed[number], left = damages[0], _TRIES
        elif manifest and read_from and all(x == read_from for x, _ in answers):
            break
        elif not left:
            raise DamagedError(f"step {number} was replaced again and again")
        left -= 1
    store_all([leaves], values)
    _warn_of_damage(directory, number, passed)
    paths = plan.graphdef.schema.paths
    return Restored(
        number, manifest.metadata, manifest.metrics, directory / str(number),
        tuple(paths[p.at] for p in found.pairs),
        tuple(paths[i] for i in sorted([*found.kept, *found.filled])),
    )  # fmt: skip


def _agreed_step(
    directory: files.Location,
    step: int | str,
    passed: Mapping[int, str],
    group: Group,
    n: str,
) -> int:
    """The number of the step that all processes are to read."""
    number, fault = -1, ""
    try:
        not_in_a_trace("restore")
        settle(directory)
        number = find_step(directory, step, passed) if group.leads else -1
    except SortalError as e:
        if group.count == 1:
            raise
        fault = str(e)
    return group.decide(f"step {n}", number, fault)[0]


def _told(
    error: SortalError, newest: files.Location | None, fallback: bool, alone: bool
) -> tuple[str, str]:
    """The damage that another step is read for, or the fault; as texts for all.

    Where no other process waits for it, the fault is raised.
    """
    if isinstance(error, DamagedError) and fallback:
        return str(error), ""
    if isinstance(error, DamagedError) and newest:
        error = DamagedError(
            f"step {newest.name}, the newest in {newest.parent}, cannot be read: "
            f"{error}\n"
            "fallback=True takes the newest step that is whole instead."
        ).with_traceback(error.__traceback__)
    if alone:
        raise error
    return "", str(error)


def _warn_of_damage(
    directory: files.Location, taken: int, passed: Mapping[int, str]
) -> None:
    if passed:
        word = "step" if len(passed) == 1 else "steps"
        warnings.warn(
            f"step {taken} of {directory} was restored instead of {word} "
            f"{', '.join(map(str, passed))}, newer and damaged:\n{_faults(passed)}",
            RuntimeWarning,
            stacklevel=3,
        )


def _faults(passed: Mapping[int, str]) -> str:
    return listing(f"{number}: {text}" for number, text in passed.items())


_NONE: Mapping[int, str] = types.MappingProxyType({})
_TRIES = 20
"""How often a step is read that a writer replaces or deletes meanwhile."""


def _changed(
    error: SortalError,
    directory: files.Location,
    step: int | str,
    number: int,
    manifest: Manifest | None,
    passed: Mapping[int, str] = _NONE,
) -> bool:
    """Whether an error while a step was read comes from a change of it meanwhile."""
    if not isinstance(error, (DamagedError, NoCheckpointError)):
        return False
    try:
        now = find_step(directory, step, passed)
        return now != number or files.read_manifest(directory, now) != manifest
    except CheckpointError:
        return manifest is not None


def _manifest(
    directory: files.Location, step: int | str, number: int, passed: Any = _NONE
) -> Manifest:
    """The manifest of a step; of the newest only if none is newer once it was read.

    A newer step takes the keep-last leaves out of the manifest before it.
    """
    manifest = files.read_manifest(directory, number)
    if step == "latest" and find_step(directory, step, passed) != number:
        raise DamagedError(
            f"a newer step than {number} was saved while it was read, each time anew"
        )
    return manifest


def _read_into(
    plan: Any,
    directory: files.Location,
    manifest: Manifest,
    options: Options,
    kinds: Mapping[str, type],
    sharding: Any,
) -> tuple[Fit, Leaves, list[Any]]:
    known = _Kinds([k for k in plan.graphdef.schema.kinds if k], kinds)
    given = candidates(manifest, known)
    where = f"step {manifest.step} of {directory}"
    found = fit(plan, given, manifest.aliases, options, where)
    reader = Reader(directory / str(manifest.step) / manifest.folder, manifest)
    return found, *read_fit(plan, found, reader, sharding)


def find_step(
    directory: files.Location,
    step: int | str,
    passed: Mapping[int, str] = _NONE,
) -> int:
    """The number of a step; ``step`` may be ``"latest"``.

    ``passed`` has the numbers of steps that are damaged, and how.
    """
    if step != "latest":
        return files.step_number(step)
    # A listing may see a step that goes meanwhile, and not yet the newer one.
    found = files.by_age(directory) or files.by_age(directory)
    if not found:
        there = ""
        if isinstance(directory, Path) and not directory.is_dir():
            there = ", which is no folder"
        raise NoCheckpointError(
            f"no checkpoint in {directory}{there}.{_above(directory)}"
        )
    whole = [x.number for x in found if x.number not in passed]
    if not whole:
        raise DamagedError(f"no step in {directory} is whole:\n{_faults(passed)}")
    return whole[-1]


def _above(directory: files.Location) -> str:
    """Advice where a step was given instead of the directory of steps."""
    if directory.name.isdecimal() and (directory / NAME).is_file():
        return (
            f" It is a step itself: write {str(directory.parent)!r}, "
            f"step={directory.name}."
        )
    return ""


def candidates(manifest: Manifest, known: _Kinds) -> list[Candidate]:
    """The leaves of a checkpoint, with their kinds as classes."""
    classes = [known.find(k) for k in manifest.kinds]
    return [Candidate(x.path, classes[x.kind], x.value) for x in manifest.leaves]


def read_fit(
    plan: Any, found: Fit, reader: Reader, sharding: Any
) -> tuple[Leaves, list[Any]]:
    """Reads the values that a Fit needs; returns live leaves and a value for each."""
    schema = plan.graphdef.schema
    placed = shardings(sharding, schema, plan)
    wants: list[Want] = []
    for pair in found.pairs:
        three = zip(arrays(pair.stored), arrays(pair.live), pair.like, strict=True)
        for stored, live, like in three:
            path = schema.paths[pair.at]
            wants.append(wanted(path, stored, like, live, placed[pair.at]))
    made = iter(read(reader, wants))
    current = plan.values()
    values = [build(p.stored, made, current[p.at]) for p in found.pairs]
    at = [p.at for p in found.pairs] + list(found.filled)
    return Leaves(plan.leaves[i] for i in at), [*values, *found.filled.values()]


def read(reader: Reader, wants: Sequence[Want]) -> list[Any]:
    """Reads arrays; refuses what the devices or JAX cannot hold."""
    check_shardings(wants)
    lost = [
        f"{show(w.path)}: {w.array.dtype}"
        for w in wants
        if w.form == "jax" and w.dtype.endswith(("64", "128")) and _cut(w.dtype)
    ]
    if lost:
        raise RestoreError(
            "JAX holds 64-bit numbers only with jax_enable_x64, and would cut these "
            "short:\n"
            f"{listing(lost)}\nSet jax_enable_x64, or restore into a model of other "
            "dtypes with cast=True."
        )
    return load(reader, wants)


def _cut(name: str) -> bool:
    dtype = numpy_dtype(name)
    return jax.dtypes.canonicalize_dtype(dtype) != dtype


def shardings(given: Any, schema: Schema, plan: Any) -> list[Any]:
    """The sharding of each leaf of a model; None keeps the leaf's present one."""
    if given is None:
        return [None] * len(schema)
    placed = leaf_answers(given, "spec", schema, plan.view)
    return [_sharding(x) for x in placed]


def _sharding(given: Any) -> Any:
    if isinstance(given, jax.sharding.PartitionSpec):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise RestoreError(
                f"{given} is a spec, and no mesh is set; use jax.set_mesh(mesh), or "
                "give a NamedSharding."
            )
        try:
            return jax.sharding.NamedSharding(mesh, given)
        except ValueError as e:
            raise RestoreError(
                f"{given} does not fit the mesh; the model was left as it was: {e}"
            ) from None
    return given


# ---------------------------------------------------------------------- without a model
def load_state(
    directory: str | os.PathLike[str],
    /,
    *,
    step: int | str = "latest",
    only: Any = None,
    kinds: Mapping[str, type] | None = None,
    sharding: Any = None,
) -> State:
    """Reads the leaves of a step without a model.

    Args:
      directory: where the steps are: a path, or an address such as ``s3://bucket/key``.
      step: the number of a step, or ``"latest"``.
      only: a filter; other leaves are not read.
      kinds: from the full names of kinds in the checkpoint to classes here. A kind
        whose class is not loaded gets a stand-in, derived from the nearest base that
        is; nothing is imported.
      sharding: a Sharding or PartitionSpec for all, a ``StateSharding``, or a Policy;
        the default device if absent.

    Returns:
      A State.

    Raises:
      ArgumentError: the directory is neither a path nor an address of an object store;
        ``kinds`` of a wrong type.
      NoCheckpointError: there is no such step.
      DamagedError: a file is damaged, missing, or not what was written.
      RestoreError: a value needs a model to be built, or the filter takes nothing.
      FilterError: ``only`` is no filter.

    Example:
      >>> import tempfile
      >>> import sortal as nnx
      >>> directory = tempfile.mkdtemp()
      >>> saving = nnx.save(directory, nnx.BatchNorm(3, rngs=nnx.Rngs(0)), step=1)
      >>> nnx.load_state(directory, only=nnx.BatchStat)
      State(
        mean: BatchStat(float32[3])
        var: BatchStat(float32[3])
      )
    """
    directory = files.located(directory)
    not_in_a_trace("load_state")
    settle(directory)
    for left in reversed(range(_TRIES)):
        number, manifest = find_step(directory, step), None
        try:
            with uncollected():
                manifest = _manifest(directory, step, number)
                return _read_state(directory, manifest, only, kinds or {}, sharding)
        except SortalError as e:
            if not left or not _changed(e, directory, step, number, manifest):
                raise
    raise AssertionError  # the last try returns or raises


def _read_state(
    directory: files.Location,
    manifest: Manifest,
    only: Any,
    kinds: Mapping[str, type],
    sharding: Any,
) -> State:
    number = manifest.step
    known = _Kinds([], kinds)
    classes = [known.find(k) for k in manifest.kinds]
    leaves = [x for x in manifest.leaves if _takes(only, x, classes[x.kind])]
    if only is not None and not leaves:
        raise RestoreError(
            f"only={to_filter(only)!r} takes none of the leaves of step {number} of "
            f"{directory}:\n" + listing(map(manifest.describe, manifest.leaves))
        )
    alone = [
        f"{manifest.describe(x)}: {x.value.shown}"
        for x in leaves
        if any(nest.what == "node" and not tuple_of(nest) for nest in _nests(x.value))
    ]
    if alone:
        raise RestoreError(
            "values of types that only a model can build; restore into a model, or "
            f"leave them out with only=:\n{listing(alone)}"
        )
    schema = Schema.of(
        [x.path for x in leaves],
        [classes[x.kind] for x in leaves],
        [Metadata.of(x.metadata) if x.metadata else EMPTY for x in leaves],
    )
    placed = [None] * len(leaves)
    if sharding is not None:
        placed = [
            _sharding(x) for x in leaf_answers(sharding, "spec", schema, lambda: leaves)
        ]
    wants = [
        Want(x.path, a, a.form, a.dtype, a.weak, to, to is not None)
        for x, to in zip(leaves, placed, strict=True)
        for a in arrays(x.value)
    ]
    reader = Reader(directory / str(number) / manifest.folder, manifest)
    made = iter(read(reader, wants))
    values = [build(x.value, made) for x in leaves]
    return State.from_flat_path(
        (path, value if kind is None else make(kind, value, metadata))
        for path, kind, metadata, value in schema.rows(values)
    )


def _takes(only: Any, leaf: Leaf, kind: Any) -> bool:
    if only is None:
        return True
    chosen = to_filter(only)
    if not chosen.structural:
        raise RestoreError(
            f"only={chosen!r} looks at values, which are not read yet; use kinds, tags "
            "and paths."
        )
    return chosen.test(leaf.path, kind, leaf.metadata, None)


def _nests(tree: Tree) -> Iterator[Nest]:
    if isinstance(tree, Nest):
        yield tree
        for child in tree.children:
            yield from _nests(child)


# ------------------------------------------------------------------------------ kinds
class _Kinds:
    """Finds the class of a kind by its name, without importing anything."""

    def __init__(self, here: Sequence[type], given: Mapping[str, type]):
        if odd := odd_items(given, _names_kind):
            raise ArgumentError(
                "kinds= is a mapping from full names in the checkpoint to kinds, as in "
                "kinds={'old.module.Name': Name}; found:\n" + listing_of(odd)
            )
        self._given = given
        self._known = _variables() | {qualified(k): k for k in here}

    def find(self, kind: Kind) -> Any:
        """The class; a stand-in where it is not loaded."""
        if kind.name is None:
            return None
        found = self._given.get(kind.name) or self._known.get(kind.name)
        return found or self._moved(kind) or self._stand_in(kind)

    def _moved(self, kind: Kind) -> Any:
        """The class if its program ran as a script once and was imported once."""
        module, _, name = str(kind.name).rpartition(".")
        bases = tuple(b.rpartition(".")[2] for b in kind.bases)
        same = [
            cls
            for full, cls in self._known.items()
            if full.rpartition(".")[2] == name
            and "__main__" in (module, full.rpartition(".")[0])
            and tuple(b.__name__ for b in bases_of(cls)) == bases
        ]
        return same[0] if len(same) == 1 else None

    def _stand_in(self, kind: Kind) -> Any:
        bases = (self._known.get(b) for b in kind.bases)
        base = next((b for b in bases if b is not None), Variable)
        return _stand_in(kind.name or "", short(kind), base)


@functools.lru_cache(maxsize=4096)
def _stand_in(full: str, name: str, base: type) -> Any:
    return type(name, (base,), {"__module__": full.rpartition(".")[0], "__slots__": ()})


def _names_kind(name: Any, kind: Any) -> bool:
    return type(name) is str and isinstance(kind, type) and is_kind(kind)


def _variables() -> dict[str, type]:
    """All kinds that are loaded, by full name; a name that two share is left out."""
    found: dict[str, Any] = {}
    register_imported(sys.modules)
    todo: list[type] = [Variable, *variable_bases()]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        name = qualified(cls)
        found[name] = None if found.get(name, cls) is not cls else cls
        if cls.__module__ == "sortal":
            # Version 0.1.0 stored these kinds under the module that defined them.
            found[f"sortal.variable.{cls.__name__}"] = cls
    return {name: cls for name, cls in found.items() if cls is not None}
