"""save: writes the leaves of models as one step, which counts when all is on disk."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

from sortal.checkpoint import files, forks
from sortal.checkpoint.layout import Layout, check_json, lay_out
from sortal.checkpoint.manifest import Manifest, now
from sortal.checkpoint.pending import Saving, settle
from sortal.checkpoint.processes import Group, not_in_a_trace, uncollected
from sortal.checkpoint.store import Writer, descriptions, fingerprints
from sortal.checkpoint.taking import Taken, take
from sortal.checkpoint.values import arrays
from sortal.errors import CheckpointError, SaveError, WriterError
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
      directory: where the steps are, a path or an address such as
        ``s3://bucket/key``; it is made if need be.
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
      ArgumentError: the step is no whole number, or the directory neither a path nor
        an address of an object store.
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
    at = files.located(directory)
    return begin(
        at, root, files.step_number(step), only=only, policy=policy,
        metadata=metadata, wait=wait, lock=lambda: _released(files.on(at).Lock(at)),
    )  # fmt: skip


@contextlib.contextmanager
def _released(lock: Any) -> Iterator[Any]:
    try:
        yield lock
    finally:
        lock.release()


def begin(
    directory: files.Location,
    root: Any,
    step: int,
    *,
    only: Any,
    policy: Policy | None,
    metadata: Any,
    wait: bool,
    lock: Callable[[], contextlib.AbstractContextManager[Any]],
    metrics: Mapping[str, float] | None = None,
    afterwards: Callable[[Manifest], None] | None = None,
) -> Saving:
    """Does the work of ``save``, for ``save`` and ``Checkpoints``.

    In process 0 ``lock`` takes the right to write, for as long as the save lasts.
    ``afterwards``, which only ``Checkpoints`` gives, is called there when the step is
    committed.
    """
    not_in_a_trace("save")
    forks.refuse_fork(SaveError)
    settle(directory)
    group = Group(f"saving step {step} to {directory}")
    taken, locked, folder, fault = None, None, "", ""
    held = contextlib.ExitStack()
    try:
        check_json("metadata", metadata)
        metadata = copy.deepcopy(metadata)  # the caller may change it meanwhile
        with uncollected():
            taken = take(root, only, policy, pin=not wait)
        if group.leads:
            locked = held.enter_context(lock())
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
            _write(directory, taken, head, group, locked, afterwards)

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
    directory: files.Location,
    taken: Taken,
    head: Manifest,
    group: Group,
    lock: Any,
    afterwards: Callable[[Manifest], None] | None,
) -> None:
    root = directory / str(head.step) / head.folder
    what = f"saving step {head.step} to {directory}"
    try:
        layout, described = _together(
            group, "folders", what, lambda: _prepare(root, taken, group)
        )
        manifest = head._replace(
            kinds=layout.kinds, leaves=layout.leaves, aliases=layout.aliases,
            arrays=layout.arrays, graphdef=layout.graphdef,
        )  # fmt: skip
        _together(group, "arrays", what, lambda: _arrays(root, layout, group))
        _together(
            group, "commit", what,
            lambda: group.leads and _commit(directory, manifest, described, lock),
        )  # fmt: skip
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


def _undo(directory: files.Location, head: Manifest) -> None:
    with contextlib.suppress(CheckpointError, OSError):
        if files.read_manifest(directory, head.step).folder == head.folder:
            return  # it is committed already: only the sync failed
    files.discard(directory, head.step, head.folder)


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


def _prepare(
    root: files.Location, taken: Taken, group: Group
) -> tuple[Layout, dict[str, bytes]]:
    with uncollected():
        layout = lay_out(taken)
    described = descriptions(layout.arrays, [k.group for k in layout.kinds])
    if group.leads:
        files.clean(root.parent.parent)
        files.on(root).write(root, described)
        if any(leaf.passing for leaf in layout.leaves):
            files.on(root).write_file(root.parent / files.mark(root.name), b"")
    return layout, described


def _arrays(root: files.Location, layout: Layout, group: Group) -> None:
    with Writer(root) as writer:
        for name, stored in layout.arrays.items():
            if name in layout.packs and group.leads:
                writer.pack(name, stored, layout.packs[name])
            elif name in layout.shared or (name in layout.own and group.leads):
                writer.write(name, stored, layout.own[name])


def _commit(
    directory: files.Location, manifest: Manifest, described: Any, lock: Any
) -> None:
    root = directory / str(manifest.step) / manifest.folder
    files.on(root).sync_tree(root, described)
    _refuse_other_writers(directory, lock)  # whose clean-up may have removed arrays
    found = fingerprints(root, manifest.arrays, described)
    _refuse_other_writers(directory, lock)
    with uncollected():
        files.commit(directory, manifest._replace(files=found))


def _refuse_other_writers(directory: files.Location, lock: Any) -> None:
    if not lock.holds:
        raise WriterError(
            f"another writer has taken over {directory} since this save began; "
            "nothing was committed. One directory has one writer."
        )


def _retire(directory: files.Location, manifest: Manifest) -> None:
    """Removes the step that is replaced, and ``keep-last`` leaves of older steps."""
    files.clean_step(directory, manifest.step, manifest.folder)
    for step in files.by_age(directory):
        if step.passing and step.number != manifest.step:
            with contextlib.suppress(CheckpointError):  # a damaged one is left as it is
                _drop_passing(directory, files.read_manifest(directory, step.number))


def _drop_passing(directory: files.Location, old: Manifest) -> None:
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
    files.on(folder).remove(folder / files.mark(old.folder))


@functools.cache
def _versions() -> Mapping[str, str]:
    """The versions in this process; to read them takes as long as a small save."""
    found = {"python": platform.python_version()}
    for name in ("sortal", "jax", "numpy", "tensorstore"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
