"""verify: reads every byte of a step and compares it with what was written."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sortal._engine.host import host_memory
from sortal.checkpoint import files
from sortal.checkpoint.files import Location
from sortal.checkpoint.manifest import NAME, Manifest
from sortal.checkpoint.restoring import find_step
from sortal.checkpoint.store import Reader, chunk_slices
from sortal.checkpoint.values import numpy_dtype
from sortal.errors import CheckpointError, DamagedError


class Verified(NamedTuple):
    """What was read, its faults, and the files that the manifest does not list."""

    path: Location
    files: int
    bytes: int
    faults: tuple[str, ...]
    extra: tuple[str, ...]


def open_step(path: str | os.PathLike[str], step: int | str = "latest") -> Location:
    """The folder of a step; ``path`` is that folder, or the one of all steps."""
    at = files.located(path)
    if (at / NAME).is_file():
        return at
    return at / str(find_step(at, step))


def read_step(path: Location) -> Manifest:
    """The manifest in the folder of a step."""
    return files.read_manifest(path.parent, files.step_of(path))


def verify(
    path: str | os.PathLike[str],
    step: int | str = "latest",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verified:
    """Reads every file of a step, given as for ``open_step``.

    ``progress`` is called with the bytes read so far, and all there are.
    """
    for _ in range(_TRIES):
        folder = open_step(path, step)
        manifest = read_step(folder)
        found = _verify(folder, manifest, progress)
        if not found.faults or not _changed(path, step, folder, manifest):
            break
    return found


_TRIES = 20
"""How often a step is read that a writer replaces or deletes meanwhile."""


def _changed(path: Any, step: int | str, folder: Location, manifest: Manifest) -> bool:
    try:
        return open_step(path, step) != folder or read_step(folder) != manifest
    except CheckpointError:
        return True


def _verify(
    folder: Location, manifest: Manifest, progress: Callable[[int, int], None]
) -> Verified:
    root = folder / manifest.folder
    reader = Reader(root, manifest)
    bad = reader.faults(manifest.files)
    faults = [f"{name}: {fault}" for name, fault in bad.items()]
    total = sum(file.size for file in manifest.files.values())
    done = 0
    for name, stored in manifest.arrays.items():
        for file, at in chunk_slices(name, stored):
            if file not in bad:
                shape = tuple(s.stop - s.start for s in at)
                memory = host_memory(shape, np.dtype(numpy_dtype(stored.dtype)))
                try:
                    reader.wait(reader.read(name, at, memory))
                except DamagedError as e:
                    faults.append(f"{file}: damaged ({e.__cause__})")
            done += manifest.files[file].size
            progress(done, total)
    progress(total, total)
    extra = sorted(set(files.on(root).names(root)) - set(manifest.files))
    return Verified(folder, len(manifest.files) + 1, total, tuple(faults), tuple(extra))
