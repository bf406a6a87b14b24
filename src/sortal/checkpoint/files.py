"""Files on disk: commit by rename, fsync, the lock of a directory, and clean-up."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import re
import secrets
import shutil
import socket
import stat
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sortal.checkpoint import manifest as _manifest
from sortal.checkpoint.manifest import Manifest
from sortal.errors import (
    ArgumentError,
    CheckpointError,
    DamagedError,
    NoCheckpointError,
    SaveError,
    WriterError,
)

LOCK = ".lock"
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")
_FOLDER = re.compile(r"arrays-(?:([0-9a-f]{12})-[0-9a-f]{8}(-kept)?|[0-9a-f]{16})")
_BESIDE = re.compile(
    r"\.(?:manifest|last)-(?:[0-9a-f]{12}-[0-9a-f]{8}(?:-kept)?|[0-9a-f]{16})"
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def new_folder(directory: Path, kept: bool) -> str:
    """A new name for the folder that holds the arrays of one save.

    It has the number of the save in this directory, so that the order of saves is known
    without a clock, and says whether a ``Checkpoints`` saved it and may delete it.
    """
    names = (name for step in _folders(directory) for name in _arrays(step))
    number = max(map(_number, names), default=-1) + 1
    number = min(max(number, 0), (1 << 48) - 1)
    return f"arrays-{number:012x}-{secrets.token_hex(4)}{'-kept' if kept else ''}"


def _number(folder: str) -> int:
    """The number of a save; less than all where the first version named the folder."""
    found = _FOLDER.fullmatch(folder)
    return int(found[1], 16) if found and found[1] else -1


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
    if "\0" in text:
        raise ArgumentError(f"a path has no zero bytes; found {text!r:.200}.")
    path = Path(os.path.expanduser(text)).absolute()  # noqa: PTH111 - never raises
    # TensorStore takes no "..", and one after a link is not the folder above in text.
    return path.resolve() if ".." in path.parts else path


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
class Step(NamedTuple):
    """A committed step, as far as the names of its files tell.

    ``folder`` has its arrays. ``kept``: a ``Checkpoints`` saved it. ``passing``: it has
    leaves that go when a later step is saved.
    """

    number: int
    folder: str
    kept: bool
    passing: bool


def steps(directory: Path) -> list[int]:
    """The committed steps in a directory, in rising order; none if there is no such."""
    found = _folders(directory)
    return sorted(int(p.name) for p in found if _is_file(p / _manifest.NAME))


def by_age(directory: Path) -> list[Step]:
    """The committed steps, from the one saved first to the one saved last.

    Steps of the first version, whose saves have no number, come first, by their own.
    """
    found = []
    for number in steps(directory):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # just deleted
            found.append(_step(directory, number))
    return sorted(found, key=lambda step: (_number(step.folder), step.number))


def _step(directory: Path, number: int) -> Step:
    path = directory / str(number)
    folders = _arrays(path)
    folder = max(folders, key=_number, default="")
    # While it is replaced, after an interrupted save, or when its arrays are gone.
    if len(folders) != 1:
        with contextlib.suppress(CheckpointError):
            folder = glance(directory, number)["folder"]
    return Step(number, folder, folder.endswith("-kept"), _is_file(mark(path, folder)))


def _folders(directory: Path) -> list[Path]:
    """The folders that have numbers of steps as names; links are none."""
    try:
        with os.scandir(directory) as found:
            return [
                directory / entry.name
                for entry in found
                if _STEP.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise CheckpointError(f"{directory} cannot be read: {e}") from e


def _arrays(step: Path) -> list[str]:
    """The names of the folders of arrays in the folder of a step."""
    with os.scandir(step) as found:
        return [
            entry.name
            for entry in found
            if _FOLDER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]


def _is_file(path: Path) -> bool:
    """Whether it is a regular file, and no link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def step_of(folder: Path) -> int:
    """The step number in the name of a folder."""
    if not _STEP.fullmatch(folder.name):
        raise DamagedError(f"{folder} does not have the number of a step as its name.")
    return int(folder.name)


def open_file(file: Path) -> int:
    """A descriptor of a regular file; others, which may block, are an OSError."""
    at = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(at).st_mode):
        return at
    os.close(at)
    raise OSError(errno.EINVAL, "not a regular file")


def read_file(file: Path) -> bytes:
    """The bytes of a regular file, no larger than any manifest."""
    with os.fdopen(open_file(file), "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > _manifest.LARGEST:
            raise OSError(errno.EFBIG, f"larger than any manifest: {size:,} bytes")
        return opened.read()


def read_manifest(directory: Path, step: int) -> Manifest:
    """The manifest of a committed step; refuses one of another step."""
    file = directory / str(step) / _manifest.NAME
    manifest = _manifest.from_bytes(_manifest_bytes(directory, step), str(file))
    _check_names(file, step, manifest.step, manifest.folder)
    return manifest


def glance(directory: Path, step: int) -> dict[str, Any]:
    """The JSON of a step's manifest; its bytes are those that were written.

    Much faster than ``read_manifest``, which also checks that it does not contradict
    itself.
    """
    file = directory / str(step) / _manifest.NAME
    body = _manifest.body(_manifest_bytes(directory, step), str(file))
    _check_names(file, step, body["step"], body["folder"])
    return body


def _manifest_bytes(directory: Path, step: int) -> bytes:
    file = directory / str(step) / _manifest.NAME
    try:
        return read_file(file)
    except (FileNotFoundError, NotADirectoryError):
        found = ", ".join(map(str, steps(directory))) or "none"
        raise NoCheckpointError(
            f"no step {step} in {directory}; the steps there are: {found}."
        ) from None
    except OSError as e:
        raise DamagedError(f"{file} cannot be read: {e}") from e


def _check_names(file: Path, step: int, found: Any, folder: Any) -> None:
    if found != step:
        raise DamagedError(
            f"{file.parent} holds step {found}: it was renamed or copied. Give it "
            "the name of its step."
        )
    if not _FOLDER.fullmatch(folder):
        raise DamagedError(
            f"{file}: its arrays are in {folder!r:.60}, no name that a save gives"
        )


def is_whole(directory: Path, step: Step) -> bool:
    """Whether the manifest is readable and all files are there in their sizes."""
    try:
        body = glance(directory, step.number)
        root = directory / str(step.number) / body["folder"]
        expected = {root / name: size for name, (size, _) in body["files"].items()}
        found = {file: file.lstat() for file in (root, *expected)}
    except (CheckpointError, OSError, TypeError, ValueError):
        return False
    return stat.S_ISDIR(found[root].st_mode) and all(
        stat.S_ISREG(found[file].st_mode) and found[file].st_size == size
        for file, size in expected.items()
    )


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
    outlive it. Where no thread can be started, ``finish`` does the work. Nothing waits
    for a thread if ``finish`` is never called, as after an interrupt.
    """

    def __init__(self) -> None:
        self._paths: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._faults: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        with contextlib.suppress(RuntimeError):  # no more threads
            for _ in range(4):
                thread = threading.Thread(target=self._work, daemon=True)
                thread.start()
                self._threads.append(thread)

    def _work(self) -> None:
        while (path := self._paths.get()) is not None:
            try:
                sync(path)
            except BaseException as e:  # noqa: BLE001 - none may pass for a sync
                self._faults.append(e)

    def add(self, path: Path) -> None:
        """Queues a path."""
        self._paths.put(path)

    def finish(self) -> list[BaseException]:
        """Waits for all; returns the errors."""
        for _ in self._threads or (None,):
            self._paths.put(None)
        if not self._threads:
            self._work()
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
    temporary = unfinished(folder, manifest.folder)
    temporary.unlink(missing_ok=True)
    write_file(temporary, _manifest.to_bytes(manifest))
    temporary.replace(folder / _manifest.NAME)
    try:
        sync(folder)
    except OSError as e:
        raise SaveError(
            f"step {manifest.step} is saved to {directory} and can be restored, but "
            f"syncing its folder failed, so that a power cut may undo the save: {e}"
        ) from e


def unfinished(step: Path, folder: str) -> Path:
    """Where a manifest is written before it is renamed."""
    return step / f".manifest-{folder.removeprefix('arrays-')}"


def mark(step: Path, folder: str) -> Path:
    """The file that says of a save that some of its leaves go at the next one."""
    return step / f".last-{folder.removeprefix('arrays-')}"


def forget(directory: Path, step: int) -> None:
    """Deletes a step: its manifest first, so that it no longer counts."""
    folder = directory / str(step)
    (folder / _manifest.NAME).unlink()
    sync(folder)
    clean_step(folder, keep=None)


def clean(directory: Path) -> None:
    """Removes what interrupted saves and deletions left, and nothing else.

    What cannot be removed is left, with a warning.
    """
    for folder in _folders(directory):
        committed = os.path.lexists(folder / _manifest.NAME)
        try:
            ours = [p.name for p in folder.iterdir() if is_ours(p.name)]
            if committed:
                if sum(map(bool, map(_FOLDER.fullmatch, ours))) == len(ours) == 1:
                    continue
                keep = read_manifest(directory, int(folder.name)).folder
            else:
                keep = None
            clean_step(folder, keep)
        except CheckpointError:
            continue  # its folder is not known, so everything is kept
        except OSError as e:
            warnings.warn(
                f"an interrupted save left files that cannot be removed: {e}",
                stacklevel=2,
            )


def clean_step(folder: Path, keep: str | None) -> None:
    """Removes what saves made in a step but ``keep``; an empty step goes too."""
    kept = () if keep is None else (keep, mark(folder, keep).name)
    for path in list(folder.iterdir()):
        if path.name not in kept and is_ours(path.name):
            remove(path)
    if keep is None:
        with contextlib.suppress(OSError):  # it holds files that are not ours
            folder.rmdir()
    sync(folder.parent)


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with what is in it; follows no link."""
    if stat.S_ISDIR(path.lstat().st_mode):
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_arrays(root: Path, keep: Iterable[str]) -> None:
    """Removes the arrays in a folder of arrays, but those named; follows no link."""
    if not stat.S_ISDIR(root.lstat().st_mode):
        return
    kept = {root / name for name in keep}
    for group in list(root.iterdir()):
        if stat.S_ISDIR(group.lstat().st_mode):
            for path in list(group.iterdir()):
                if path not in kept and stat.S_ISDIR(path.lstat().st_mode):
                    remove(path)


def is_ours(name: str) -> bool:
    """Whether only a save gives this name to a file in the folder of a step."""
    return bool(_FOLDER.fullmatch(name) or _BESIDE.fullmatch(name))


# ---------------------------------------------------------------------------- writers
class Lock:
    """The lock of a directory's one writer; the system releases it if the owner dies.

    Raises:
      WriterError: another writer holds it.
      SaveError: the directory cannot be made or written to.
    """

    def __init__(self, directory: Path):
        self._path, self._process = directory / LOCK, os.getpid()
        try:
            made = [p for p in (directory, *directory.parents) if not p.exists()]
            directory.mkdir(parents=True, exist_ok=True)
            for folder in made:
                sync(folder.parent)
            self._file = self._open()
        except OSError as e:
            raise SaveError(f"cannot write to {directory}: {e}") from e
        self._take(directory)
        with contextlib.suppress(OSError):  # a full disk; the lock holds anyway
            self._file.truncate(0)
            me = f"process {os.getpid()} on {socket.gethostname()}\n"
            self._file.write(me.encode())

    def _open(self) -> Any:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        at = os.open(self._path, flags, 0o666)
        if not stat.S_ISREG(os.fstat(at).st_mode):
            os.close(at)
            raise OSError(errno.EINVAL, f"{self._path} is not a regular file")
        return os.fdopen(at, "r+b", buffering=0)

    def _take(self, directory: Path) -> None:
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            owner = self._file.read(200).decode(errors="replace").strip() or "unknown"
            self._file.close()
            raise WriterError(
                f"another writer is at work in {directory} ({owner}). One directory "
                "has one writer: close the other Checkpoints, or save elsewhere."
            ) from None
        except OSError as e:
            self._file.close()
            raise SaveError(
                f"{directory} is on a file system without locks (flock: {e.strerror}), "
                "so that two writers could not be kept apart. Save to another one."
            ) from e

    @property
    def holds(self) -> bool:
        """Whether this process holds it, and the file is still in its directory."""
        if self._file.closed or self._process != os.getpid():
            return False
        try:
            there = os.lstat(self._path)
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(self._file.fileno()))

    def release(self) -> None:
        """Releases the lock, also where forked children have the file open."""
        import fcntl

        if not self._file.closed and self._process == os.getpid():
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


@contextlib.contextmanager
def as_save_error(what: str, outcome: str = "") -> Iterator[None]:
    """Turns errors of the system and of TensorStore into a SaveError."""
    try:
        yield
    except SaveError:
        raise
    except (OSError, ValueError, RuntimeError, MemoryError) as e:
        raise SaveError(f"{what} failed{outcome}: {e}") from e
