"""A step copied into another directory, byte by byte, with all that it holds."""

from __future__ import annotations

import os
from collections.abc import Callable

from sortal.checkpoint import files
from sortal.checkpoint.files import Location, on
from sortal.checkpoint.manifest import Manifest, is_chunk
from sortal.checkpoint.store import Reader
from sortal.checkpoint.verifying import read_step, verify
from sortal.errors import DamagedError, SaveError, listing


def refuse_existing(directory: Location, step: int) -> None:
    """Refuses a directory that has a step of that number."""
    if step in files.steps(directory):
        raise SaveError(
            f"{directory} has a step {step} already, which is not replaced. Write to "
            "another directory, or delete that step first."
        )


def copy_step(
    folder: Location,
    directory: str | os.PathLike[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Location:
    """Copies the folder of a step into a directory; returns the folder there.

    Each may be on disk or in an object store. Every byte is read and checked before the
    copy counts.

    Raises:
      DamagedError: the step is damaged.
      SaveError: the directory has a step of that number, or cannot be written to.
      WriterError: another writer is at work there.
    """
    directory = files.located(directory)
    manifest = read_step(folder)
    refuse_existing(directory, manifest.step)
    if faults := verify(folder, progress=progress).faults:
        raise DamagedError(
            f"{folder} is damaged; nothing was copied:\n{listing(faults)}"
        )
    lock = on(directory).Lock(directory)
    try:
        refuse_existing(directory, manifest.step)
        new = manifest._replace(folder=files.new_folder(directory, kept=False))
        to = directory / str(manifest.step)
        with files.as_save_error(f"copying {folder} to {to}"):
            files.clean(directory)
            try:
                _copy(folder / manifest.folder, to / new.folder, new)
                if any(leaf.passing for leaf in new.leaves):
                    on(to).write_file(to / files.mark(new.folder), b"")
                files.commit(directory, new)
            except BaseException:
                files.discard(directory, new.step, new.folder)
                raise
    finally:
        lock.release()
    return to


def _copy(old: Location, new: Location, manifest: Manifest) -> None:
    described = [name for name in manifest.files if not is_chunk(name)]
    on(new).write(new, {name: on(old).read(old / name) for name in described})
    for name in filter(is_chunk, manifest.files):
        data = on(old).read(old / name, manifest.files[name].size)
        on(new).write_file(new / name, data)
    on(new).sync_tree(new, described)
    reader = Reader(new, manifest)
    if odd := reader.faults(manifest.files):
        raise OSError(f"the copy differs:\n{listing(map(': '.join, odd.items()))}")
