"""Files that survive a crash: commits by rename, locks, steps, and the clean-up."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sortal.checkpoint import manifest as _manifest
from sortal.checkpoint.manifest import Manifest
from sortal.errors import (
    ArgumentError,
    DamagedError,
    NoCheckpointError,
    SaveError,
    WriterError,
)

LOCK = ".lock"
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")
_FOLDER = re.compile(r"arrays-[0-9a-f]{16}")
_UNFINISHED = re.compile(r"\.manifest-[0-9a-f]{16}")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def new_folder() -> str:
    """A name for the folder of one save's arrays; no two saves share one."""
    return f"arrays-{secrets.token_hex(8)}"


def local(path: Any) -> Path:
    """A path that the user gave, as an absolute one.

    Args:
      path: a string or path.

    Returns:
      The Path.

    Raises:
      ArgumentError: it is no path, or the address of something remote, of which a
        folder of that name would be made here.
    """
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise ArgumentError(
            "a directory or file is a string or a path; found a "
            f"{type(path).__name__}. It comes first, before the model."
        ) from None
    if _URL.match(text):
        raise ArgumentError(
            f"checkpoints and files are read and written by the file system; found the "
            f"address {text!r}. Use a local folder and copy it, or one where the "
            "storage is mounted."
        )
    return Path(text).absolute()


def step_number(step: Any) -> int:
    """Checks the number of a step.

    Args:
      step: an integer, zero or more.

    Returns:
      The number.

    Raises:
      ArgumentError: it is something else.
    """
    try:
        number = step.__index__()
    except (AttributeError, TypeError):
        number = -1
    if isinstance(step, bool) or not 0 <= number < 10**18:
        raise ArgumentError(
            f"a step is a whole number, zero or more; found {step!r}. Write for "
            "example step=1000."
        )
    return number


# ----------------------------------------------------------------------------- steps
def steps(directory: Path) -> list[int]:
    """The committed steps in a directory, in rising order; none if it is not there."""
    try:
        names = [p.name for p in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [int(name) for name in names if _STEP.fullmatch(name)]
    return sorted(n for n in found if (directory / str(n) / _manifest.NAME).is_file())


def step_of(folder: Path) -> int:
    """The step whose folder this is, by its name."""
    if not _STEP.fullmatch(folder.name):
        raise DamagedError(f"{folder} does not have the number of a step as its name.")
    return int(folder.name)


def read_manifest(directory: Path, step: int) -> Manifest:
    """The manifest of a committed step.

    Args:
      directory: where the steps are.
      step: which.

    Returns:
      The Manifest.

    Raises:
      NoCheckpointError: the step is not there, or was never committed.
      DamagedError: it is damaged, or that of another step.
    """
    folder = directory / str(step)
    try:
        data = (folder / _manifest.NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        found = ", ".join(map(str, steps(directory))) or "none"
        raise NoCheckpointError(
            f"no step {step} in {directory}; the steps there are: {found}."
        ) from None
    except OSError as e:
        raise DamagedError(f"{folder / _manifest.NAME} cannot be read: {e}") from e
    manifest = _manifest.from_bytes(data, str(folder / _manifest.NAME))
    if manifest.step != step:
        raise DamagedError(
            f"{folder} holds step {manifest.step}: it was renamed or copied. Give it "
            "the name of its step."
        )
    return manifest


# ------------------------------------------------------------------------ durability
def sync(path: Path) -> None:
    """Syncs a file, or the names in a folder, so that they survive a loss of power."""
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)


class Syncs:
    """Makes many paths survive, some at once, while others are still being written.

    A file system writes several such wishes down in one go. The threads are plain ones:
    those of ``concurrent.futures`` take no work once the main thread has ended, and a
    save may outlive it.
    """

    def __init__(self) -> None:
        self._due: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._faults: list[OSError] = []
        self._threads = [threading.Thread(target=self._work) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (path := self._due.get()) is not None:
            try:
                sync(path)
            except OSError as e:
                self._faults.append(e)

    def add(self, path: Path) -> None:
        """Starts to sync a path."""
        self._due.put(path)

    def finish(self) -> list[OSError]:
        """Waits until all are synced; says what went wrong."""
        for _ in self._threads:
            self._due.put(None)
        for thread in self._threads:
            thread.join()
        return self._faults


def write_file(file: Path, data: bytes) -> None:
    """Writes a new file whose content survives; its name does after ``sync``."""
    with file.open("xb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


def commit(directory: Path, manifest: Manifest) -> None:
    """Commits a step: from here on readers find this manifest, or the old one.

    Args:
      directory: where the steps are.
      manifest: what to commit; its folder and arrays are on disk already.
    """
    folder = directory / str(manifest.step)
    temporary = unfinished(folder, manifest)
    temporary.unlink(missing_ok=True)
    write_file(temporary, _manifest.to_bytes(manifest))
    temporary.replace(folder / _manifest.NAME)
    sync(folder)


def unfinished(folder: Path, manifest: Manifest) -> Path:
    """Where a manifest is written before it gets its name."""
    return folder / f".manifest-{manifest.folder.removeprefix('arrays-')}"


def forget(directory: Path, step: int) -> None:
    """Deletes a step: first its manifest, which makes it count, then its files."""
    folder = directory / str(step)
    (folder / _manifest.NAME).unlink()
    sync(folder)
    clean_step(folder, keep=None)


def clean(directory: Path) -> None:
    """Removes what interrupted saves and deletions left behind, and nothing else."""
    for folder in directory.iterdir():
        name = folder.name
        if not _STEP.fullmatch(name) or not folder.is_dir():
            continue
        ours = [p.name for p in folder.iterdir() if is_ours(p.name)]
        committed = (folder / _manifest.NAME).is_file()
        if committed and len(ours) == 1 and _FOLDER.fullmatch(ours[0]):
            continue
        try:
            keep = read_manifest(directory, int(name)).folder if committed else None
        except DamagedError:
            continue  # what belongs to it cannot be known, so all is kept
        clean_step(folder, keep)


def clean_step(folder: Path, keep: str | None) -> None:
    """Removes the folders of arrays in a step, but one; and the step if that is all."""
    for path in list(folder.iterdir()):
        if path.name != keep and is_ours(path.name):
            remove = shutil.rmtree if path.is_dir() else Path.unlink
            remove(path)
    if keep is None:
        with contextlib.suppress(OSError):  # something of somebody else is in it
            folder.rmdir()
    sync(folder.parent)


def is_ours(name: str) -> bool:
    """Whether a name in the folder of a step is one that only a save gives."""
    return bool(_FOLDER.fullmatch(name) or _UNFINISHED.fullmatch(name))


# ---------------------------------------------------------------------------- writers
class Lock:
    """The lock on a directory for one writer; the system frees it when the owner dies.

    Args:
      directory: where; it is made if need be.

    Raises:
      WriterError: somebody else has it.
      SaveError: the directory cannot be made or written to.
    """

    def __init__(self, directory: Path):
        import fcntl

        try:
            made = [p for p in (directory, *directory.parents) if not p.exists()]
            directory.mkdir(parents=True, exist_ok=True)
            for folder in made:
                sync(folder.parent)
            self._file = (directory / LOCK).open("a+b", buffering=0)
        except OSError as e:
            raise SaveError(f"cannot write to {directory}: {e}") from e
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read(200).decode(errors="replace").strip() or "unknown"
            self._file.close()
            raise WriterError(
                f"another writer is at work in {directory} ({owner}). One directory "
                "has one writer: close the other Checkpoints, or save elsewhere."
            ) from None
        with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
            self._file.truncate(0)
            me = f"process {os.getpid()} on {socket.gethostname()}\n"
            self._file.write(me.encode())

    def release(self) -> None:
        """Releases the lock."""
        self._file.close()


@contextlib.contextmanager
def as_save_error(what: str, outcome: str = "") -> Iterator[None]:
    """Turns errors of the system and of TensorStore into a SaveError.

    Args:
      what: what was being done, for the message.
      outcome: what that means.

    Raises:
      SaveError: something went wrong inside.
    """
    try:
        yield
    except SaveError:
        raise
    except (OSError, ValueError, RuntimeError) as e:
        raise SaveError(f"{what} failed{outcome}: {e}") from e
