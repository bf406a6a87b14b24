"""save: writes the leaves of models as one step, which counts when all is on disk."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from sortal.checkpoint import files
from sortal.checkpoint.layout import Layout, check_json, lay_out
from sortal.checkpoint.manifest import Manifest, now
from sortal.checkpoint.pending import Saving, settle
from sortal.checkpoint.processes import Group, not_in_a_trace, uncollected
from sortal.checkpoint.store import (
    Writer,
    fingerprints,
    prepare,
    refuse_fork,
    sync_tree,
)
from sortal.checkpoint.taking import Taken, take
from sortal.checkpoint.values import arrays
from sortal.errors import CheckpointError, SaveError
from sortal.policy.policy import Policy

T = TypeVar("T")


def save(
    directory: str | os.PathLike[str],
    root: Any,
    /,
    *,
    step: int,
    only: Any = None,
    policy: Policy | None = None,
    metadata: Any = None,
    wait: bool = True,
) -> Saving:
    """Saves a model, or several objects at once, as one step in a directory.

    The step counts once every byte of it is on disk; until then, and if anything goes
    wrong, the directory holds what it held before. A step that is there already is
    replaced in the same way. All processes of a program call it together.

    Args:
      directory: where the steps are; it is made if need be.
      root: a Module, or a container such as ``{"model": model, "optimizer":
        optimizer}``; what they share is saved once.
      step: the number of the step.
      only: a filter; leaves that it does not take are not saved. All if absent.
      policy: a Policy, whose column ``checkpoint`` is read: ``keep``, ``drop``, or
        ``keep-last``, which stays until a newer step is saved. Without one the
        options of kinds and the metadata of Variables are read.
      metadata: plain JSON that is kept with the step.
      wait: False returns at once and writes in a thread. The model may be changed and
        donated at once. A failure is raised by the returned object's ``wait`` or by
        the next call about a checkpoint, or printed at exit.

    Returns:
      A Saving, which has the ``path`` of the step.

    Raises:
      ArgumentError: the step is no whole number, or the directory no local path.
      SaveError: something cannot be saved or written; nothing was committed.
      WriterError: another writer is at work in the directory.
      TraceError: it is called inside a transform.
      FilterError: ``only`` is no filter.

    Example:
      >>> import tempfile
      >>> import sortal as nnx
      >>> directory = tempfile.mkdtemp()
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> saving = nnx.save(directory, model, step=100, only=nnx.Param)
      >>> nnx.load_state(directory).paths()
      (('bias',), ('kernel',))
    """
    directory = files.local(directory)
    return begin(
        directory, root, files.step_number(step), only=only, policy=policy,
        metadata=metadata, wait=wait, lock=lambda: files.Lock(directory).release,
    )  # fmt: skip


def begin(
    directory: Path,
    root: Any,
    step: int,
    *,
    only: Any,
    policy: Policy | None,
    metadata: Any,
    wait: bool,
    lock: Callable[[], Callable[[], None]],
    metrics: Mapping[str, float] | None = None,
    afterwards: Callable[[Manifest], None] | None = None,
) -> Saving:
    """Does the work of ``save``, for ``save`` and ``Checkpoints``.

    In process 0 ``lock`` takes the right to write and returns what releases it.
    ``afterwards``, which only ``Checkpoints`` gives, is called there when the step is
    committed.
    """
    not_in_a_trace("save")
    refuse_fork(SaveError)
    settle(directory)
    group = Group(f"saving step {step} to {directory}")
    taken, folder, fault = None, "", ""
    held = contextlib.ExitStack()
    try:
        check_json("metadata", metadata)
        metadata = copy.deepcopy(metadata)  # the caller may change it meanwhile
        with uncollected():
            taken = take(root, only, policy, pin=not wait)
        if group.leads:
            held.callback(lock())
            folder = files.new_folder(directory, kept=afterwards is not None)
    except Exception as e:
        if group.count == 1:
            raise
        fault = str(e)
    try:
        folder = _agreed(group, "begin", folder, fault)[0]
    except BaseException:
        held.close()
        raise
    assert taken is not None  # noqa: S101 - else there was a fault
    head = Manifest(
        step, folder, (), (), (), {}, {}, "", metadata, dict(metrics or {}),
        _versions(), now(),
    )  # fmt: skip

    def work() -> None:
        with held:
            _write(directory, taken, head, group, afterwards)

    saving = Saving(directory, step, work)
    return saving.run() if wait else saving.start()


def _agreed(group: Group, round: str, mine: Any, fault: str) -> list[Any]:
    try:
        return group.decide(round, mine, fault)
    except SaveError:
        raise
    except CheckpointError as e:
        raise SaveError(str(e)) from None


def _write(
    directory: Path,
    taken: Taken,
    head: Manifest,
    group: Group,
    afterwards: Callable[[Manifest], None] | None,
) -> None:
    root = directory / str(head.step) / head.folder
    what = f"saving step {head.step} to {directory}"
    try:
        layout = _together(group, "folders", what, lambda: _prepare(root, taken, group))
        manifest = head._replace(
            kinds=layout.kinds, leaves=layout.leaves, aliases=layout.aliases,
            arrays=layout.arrays, graphdef=layout.graphdef,
        )  # fmt: skip
        _together(group, "arrays", what, lambda: _arrays(root, layout, group))
        _together(
            group, "commit", what, lambda: _commit(directory, layout, manifest, group)
        )
    except SaveError:
        if group.leads:
            _undo(directory, head)
        raise
    if group.leads:
        with files.as_save_error(
            f"step {manifest.step} is saved to {directory}, but tidying up after it"
        ):
            _retire(directory, manifest)
            if afterwards is not None:
                afterwards(manifest)


def _undo(directory: Path, manifest: Manifest) -> None:
    folder = directory / str(manifest.step)
    with contextlib.suppress(CheckpointError, OSError):
        if files.read_manifest(directory, manifest.step).folder == manifest.folder:
            return  # it is committed already: only the sync failed
    shutil.rmtree(folder / manifest.folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        files.unfinished(folder, manifest.folder).unlink(missing_ok=True)
        files.mark(folder, manifest.folder).unlink(missing_ok=True)
        folder.rmdir()


def _together(group: Group, round: str, what: str, do: Callable[[], T]) -> T:
    """Does a step of the work in all processes; an error in one is raised in all."""
    fault, cause, found = "", None, None
    try:
        with files.as_save_error(what, _NOTHING):
            found = do()
    except SaveError as e:
        if group.count == 1:
            raise
        fault, cause = str(e), e
    try:
        _agreed(group, round, None, fault)
    except SaveError as e:
        raise e from cause
    return cast("T", found)


_NOTHING = "; nothing was committed, and earlier steps are as they were"


def _prepare(root: Path, taken: Taken, group: Group) -> Layout:
    with uncollected():
        layout = lay_out(taken)
    if not group.leads:
        return layout
    files.clean(root.parent.parent)
    root.mkdir(parents=True)
    groups = [k.group for k in layout.kinds]
    prepare(root, layout.arrays, groups)
    if any(leaf.passing for leaf in layout.leaves):
        files.write_file(files.mark(root.parent, root.name), b"")
    return layout


def _arrays(root: Path, layout: Layout, group: Group) -> None:
    with Writer(root) as writer:
        for name, stored in layout.arrays.items():
            if name in layout.packs and group.leads:
                writer.pack(name, stored, layout.packs[name])
            elif name in layout.shared or (name in layout.own and group.leads):
                writer.write(name, stored, layout.own[name])


def _commit(directory: Path, layout: Layout, manifest: Manifest, group: Group) -> None:
    if not group.leads:
        return
    root = directory / str(manifest.step) / manifest.folder
    groups = [k.group for k in layout.kinds]
    sync_tree(root, layout.arrays, groups)
    found = fingerprints(root, layout.arrays, groups)
    with uncollected():
        files.commit(directory, manifest._replace(files=found))


def _retire(directory: Path, manifest: Manifest) -> None:
    """Removes the step that is replaced, and ``keep-last`` leaves of older steps."""
    files.clean_step(directory / str(manifest.step), manifest.folder)
    for step in files.by_age(directory):
        if step.passing and step.number != manifest.step:
            with contextlib.suppress(CheckpointError):  # a damaged one is left as it is
                _drop_passing(directory, files.read_manifest(directory, step.number))


def _drop_passing(directory: Path, old: Manifest) -> None:
    passing = (leaf for leaf in old.leaves if leaf.passing)
    gone = {a.place.array for x in passing for a in arrays(x.value) if a.place}
    kept = old._replace(
        leaves=tuple(x for x in old.leaves if not x.passing),
        arrays={n: a for n, a in old.arrays.items() if n not in gone},
        files={n: f for n, f in old.files.items() if n.rpartition("/")[0] not in gone},
    )
    folder = directory / str(old.step)
    if kept != old:
        files.commit(directory, kept)
    files.remove_arrays(folder / old.folder, kept.arrays)
    # Last, so that an interrupted removal is done by the next save.
    files.mark(folder, old.folder).unlink()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("sortal", "jax", "numpy", "tensorstore"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
