"""Files on disk: commit by rename, fsync, the lock of a directory, and clean-up."""

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
    """A new name for the folder that holds the arrays of one save."""
    return f"arrays-{secrets.token_hex(8)}"


def local(path: Any) -> Path:
    """A path from the user as an absolute one.

    Addresses such as ``gs://...`` are refused: as a path, one would make a local folder
    of that name.
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
    """The number of a step; refuses all but integers of zero or more."""
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
    """The committed steps in a directory, in rising order; none if there is no such."""
    try:
        names = [p.name for p in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [int(name) for name in names if _STEP.fullmatch(name)]
    return sorted(n for n in found if (directory / str(n) / _manifest.NAME).is_file())


def step_of(folder: Path) -> int:
    """The step number in the name of a folder."""
    if not _STEP.fullmatch(folder.name):
        raise DamagedError(f"{folder} does not have the number of a step as its name.")
    return int(folder.name)


def read_manifest(directory: Path, step: int) -> Manifest:
    """The manifest of a committed step; refuses one of another step."""
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
    """Calls fsync on a file, or on a folder for the names of its files."""
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)


class Syncs:
    """Calls fsync on many paths from four threads, while more files are being written.

    File systems group fsyncs that arrive together. The threads are plain ones, because
    ``concurrent.futures`` takes no work once the main thread has ended, and a save may
    outlive it.
    """

    def __init__(self) -> None:
        self._paths: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._faults: list[OSError] = []
        self._threads = [threading.Thread(target=self._work) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (path := self._paths.get()) is not None:
            try:
                sync(path)
            except OSError as e:
                self._faults.append(e)

    def add(self, path: Path) -> None:
        """Queues a path."""
        self._paths.put(path)

    def finish(self) -> list[OSError]:
        """Waits for all; returns the errors."""
        for _ in self._threads:
            self._paths.put(None)
        for thread in self._threads:
            thread.join()
        return self._faults


def write_file(file: Path, data: bytes) -> None:
    """Writes and fsyncs a new file; its name needs a ``sync`` of the folder."""
    with file.open("xb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


@contextlib.contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A new file that replaces ``path`` once the block has written all of it."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}{suffix}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as e:
        raise SaveError(f"writing {path} failed: {e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def commit(directory: Path, manifest: Manifest) -> None:
    """Makes a step count, by renaming its manifest into place.

    Readers find either the old manifest or this one. The arrays are on disk before.
    """
    folder = directory / str(manifest.step)
    temporary = unfinished(folder, manifest)
    temporary.unlink(missing_ok=True)
    write_file(temporary, _manifest.to_bytes(manifest))
    temporary.replace(folder / _manifest.NAME)
    sync(folder)


def unfinished(folder: Path, manifest: Manifest) -> Path:
    """Where a manifest is written before it is renamed."""
    return folder / f".manifest-{manifest.folder.removeprefix('arrays-')}"


def forget(directory: Path, step: int) -> None:
    """Deletes a step: its manifest first, so that it no longer counts."""
    folder = directory / str(step)
    (folder / _manifest.NAME).unlink()
    sync(folder)
    clean_step(folder, keep=None)


def clean(directory: Path) -> None:
    """Removes what interrupted saves and deletions left, and nothing else."""
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
            continue  # its folder is not known, so everything is kept
        clean_step(folder, keep)


def clean_step(folder: Path, keep: str | None) -> None:
    """Removes the array folders of a step but ``keep``; an empty step goes too."""
    for path in list(folder.iterdir()):
        if path.name != keep and is_ours(path.name):
            remove = shutil.rmtree if path.is_dir() else Path.unlink
            remove(path)
    if keep is None:
        with contextlib.suppress(OSError):  # it holds files that are not ours
            folder.rmdir()
    sync(folder.parent)


def is_ours(name: str) -> bool:
    """Whether only a save gives this name to a file in the folder of a step."""
    return bool(_FOLDER.fullmatch(name) or _UNFINISHED.fullmatch(name))


# ---------------------------------------------------------------------------- writers
class Lock:
    """The lock of a directory's one writer; the system releases it if the owner dies.

    Raises:
      WriterError: another writer holds it.
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
        with contextlib.suppress(OSError):  # a full disk; the lock holds anyway
            self._file.truncate(0)
            me = f"process {os.getpid()} on {socket.gethostname()}\n"
            self._file.write(me.encode())

    def release(self) -> None:
        """Releases the lock."""
        self._file.close()


@contextlib.contextmanager
def as_save_error(what: str, outcome: str = "") -> Iterator[None]:
    """Turns errors of the system and of TensorStore into a SaveError."""
    try:
        yield
    except SaveError:
        raise
    except (OSError, ValueError, RuntimeError) as e:
        raise SaveError(f"{what} failed{outcome}: {e}") from e
