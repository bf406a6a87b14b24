"""A step copied into another directory, byte by byte, with all that it holds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from sortal.checkpoint import disk, files
from sortal.checkpoint.manifest import Manifest
from sortal.checkpoint.store import Reader
from sortal.checkpoint.verifying import read_step, verify
from sortal.errors import DamagedError, SaveError, listing


def refuse_existing(directory: Path, step: int) -> None:
    """Refuses a directory that has a step of that number."""
    if step in files.steps(directory):
        raise SaveError(
            f"{directory} has a step {step} already, which is not replaced. Write to "
            "another directory, or delete that step first."
        )


def copy_step(
    folder: Path,
    directory: str | os.PathLike[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Copies the folder of a step into a directory; returns the folder there.

    Every byte is read and checked before the copy counts.

    Raises:
      DamagedError: the step is damaged.
      SaveError: the directory has a step of that number, or cannot be written to.
      WriterError: another writer is at work there.
    """
    directory = files.local(directory)
    manifest = read_step(folder)
    refuse_existing(directory, manifest.step)
    if faults := verify(folder, progress=progress).faults:
        raise DamagedError(
            f"{folder} is damaged; nothing was copied:\n{listing(faults)}"
        )
    lock = disk.Lock(directory)
    try:
        refuse_existing(directory, manifest.step)
        new = manifest._replace(folder=files.new_folder(directory, kept=False))
        to = directory / str(manifest.step)
        with files.as_save_error(f"copying {folder} to {to}"):
            files.clean(directory)
            try:
                _copy(folder / manifest.folder, to / new.folder, new)
                if any(leaf.passing for leaf in new.leaves):
                    disk.write_file(to / files.mark(new.folder), b"")
                files.commit(directory, new)
            except BaseException:
                shutil.rmtree(to / new.folder, ignore_errors=True)
                raise
    finally:
        lock.release()
    return to


def _copy(old: Path, new: Path, manifest: Manifest) -> None:
    folders = {new, new.parent, new.parent.parent}
    syncs = disk.Syncs()
    try:
        for name in manifest.files:
            to = new / name
            folders.add(to.parent)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(old / name, to)
            syncs.add(to)
    finally:
        faults = syncs.finish()
    if faults:
        raise faults[0]
    for folder in folders:
        disk.sync(folder)
    reader = Reader(new, manifest)
    if odd := reader.faults(manifest.files):
        raise OSError(f"the copy differs:\n{listing(map(': '.join, odd.items()))}")
