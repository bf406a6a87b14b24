"""Files on disk: fsync, commit by rename, and the lock of a directory.

``bucket`` has the same functions for object stores.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sortal.checkpoint import forks
from sortal.checkpoint.manifest import LARGEST, File, is_chunk
from sortal.errors import SaveError, WriterError

IN_FLIGHT = 5
"""How many chunks are written at a time; see decision 0021."""
LOCK = ".lock"


def spec(at: Path) -> dict[str, Any]:
    """TensorStore's specification of what lies in a folder."""
    return {"driver": "file", "path": f"{at}/"}


def context() -> Any:
    """A TensorStore context."""
    return forks.context(
        file_io_concurrency={"limit": IN_FLIGHT},
        # We sync, and TensorStore would also sync the folder after each chunk. The name
        # of the folder of arrays is unique, so its files need no locks.
        file_io_sync=False,
        file_io_locking={"mode": "none"},
    )


# --------------------------------------------------------------------------- reading
def tree(
    directory: Path, wanted: Callable[[str], Any]
) -> dict[str, dict[str, bool | None]]:
    """The names in each wanted folder of a directory, and whether each is a folder.

    None stands for links and other things that are neither folder nor file.
    """
    found = {}
    for name, is_folder in _names(directory).items():
        if is_folder and wanted(name):
            with contextlib.suppress(OSError):  # just deleted, or not to be read
                found[name] = _names(directory / name)
    return found


def _names(folder: Path) -> dict[str, bool | None]:
    with os.scandir(folder) as found:
        return {
            entry.name: entry.is_dir(follow_symlinks=False)
            or (False if entry.is_file(follow_symlinks=False) else None)
            for entry in found
        }


def names(folder: Path) -> list[str]:
    """The names of all files below a folder; none below a link, or if it is gone."""
    if folder.is_symlink():
        return []
    walked = ((Path(at), inside) for at, _, inside in os.walk(folder))
    return [str((at / x).relative_to(folder)) for at, inside in walked for x in inside]


def open_file(file: Path) -> int:
    """A descriptor of a regular file; others, which may block, are an OSError."""
    at = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(at).st_mode):
        return at
    os.close(at)
    raise OSError(errno.EINVAL, "not a regular file")


def read(file: Path, most: int = LARGEST) -> bytes:
    """The bytes of a regular file; by default of one no larger than any manifest."""
    with os.fdopen(open_file(file), "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"larger than it can be: {size:,} bytes")
        return opened.read()


def fingerprints(
    root: Path, sizes: Mapping[str, int]
) -> Iterator[tuple[str, File | OSError]]:
    """The size and checksum of each file below ``root``; ``sizes`` are those due.

    A chunk ends with the crc32c of its other bytes. Others are not read if they have
    another size.
    """
    for name, size in sizes.items():
        try:
            yield name, _fingerprint(root / name, size)
        except OSError as e:
            yield name, e


def _fingerprint(file: Path, size: int) -> File:
    at = open_file(file)
    try:
        found = os.fstat(at).st_size
        if is_chunk(str(file)):
            tail = int.from_bytes(os.pread(at, 4, max(found - 4, 0)), "little")
            return File(found, f"crc32c:{tail:08x}")
        data = os.pread(at, found, 0) if found == size else b""
        return File(found, f"sha256:{hashlib.sha256(data).hexdigest()}")
    finally:
        os.close(at)


def absent(root: Path, sizes: Mapping[str, int]) -> list[str]:
    """The files below ``root`` that are not there as files of their sizes."""
    if not stat.S_ISDIR(root.lstat().st_mode):  # a link
        return list(sizes)
    return [name for name, size in sizes.items() if not _is_there(root / name, size)]


def _is_there(file: Path, size: int) -> bool:
    try:
        found = file.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


# --------------------------------------------------------------------------- writing
def write(root: Path, files: Mapping[str, bytes]) -> None:
    """Writes files below a new folder; they are durable after ``sync``."""
    root.mkdir(parents=True)
    for folder in dict.fromkeys((root / name).parent for name in files):
        folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (root / name).write_bytes(data)


def sync(path: Path) -> None:
    """Calls fsync on a file, or on a folder for the names of its files."""
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)


def sync_tree(root: Path, files: Iterable[str]) -> None:
    """Syncs what ``write`` made, and the names in its folders and in those above."""
    paths = [root / name for name in files]
    above = [root.parent, root.parent.parent]
    syncs = Syncs()
    for path in dict.fromkeys([*paths, *(p.parent for p in paths), *above]):
        syncs.add(path)
    if faults := syncs.finish():
        raise faults[0]


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


def publish(file: Path, temporary: str, data: bytes) -> None:
    """Puts a file in the place of the one there, by a rename; readers find either."""
    beside = file.with_name(temporary)
    beside.unlink(missing_ok=True)
    write_file(beside, data)
    beside.replace(file)


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with what is in it; follows no link."""
    if stat.S_ISDIR(path.lstat().st_mode):
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_empty(folder: Path) -> None:
    """Removes a folder if nothing is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _relied_on(directory: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise SaveError(
            f"{directory} is on a file system that cannot do what saves rely on "
            f"({what}: {e.strerror or e}). Save to another one."
        ) from e


def check_file_system(directory: Path, locked: Path) -> None:
    """Tries what saves rely on, with two files that are removed again.

    ``locked`` is a file that this process has locked.

    Raises:
      SaveError: a part of it does not work.
    """
    import fcntl

    with locked.open("r+b") as other, contextlib.suppress(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise SaveError(
            f"{directory} is on a file system whose locks (flock) keep nobody out, so "
            "that two writers could not be kept apart. Save to another one."
        )
    new, old = directory / ".check-new", directory / ".check-old"
    try:
        for file in (new, old):
            file.unlink(missing_ok=True)
            file.write_bytes(file.name.encode())
            with _relied_on(directory, "fsync"):
                sync(file)
        with _relied_on(directory, "rename"):
            new.replace(old)
            if old.read_bytes() != new.name.encode():
                raise OSError("another file is there afterwards")
        with _relied_on(directory, "fsync"):
            sync(directory)
    finally:
        for file in (new, old):
            file.unlink(missing_ok=True)


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
            with _relied_on(directory, "fsync"):
                for folder in made:
                    sync(folder.parent)
            self._file = self._open()
        except OSError as e:
            raise SaveError(f"cannot write to {directory}: {e}") from e
        self._take(directory)
        if not os.fstat(self._file.fileno()).st_size:  # nobody has saved here before
            self._check(directory)
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

    def _check(self, directory: Path) -> None:
        try:
            check_file_system(directory, self._path)
        except BaseException as e:
            self._path.unlink(missing_ok=True)
            self._file.close()
            if isinstance(e, OSError):
                raise SaveError(f"cannot write to {directory}: {e}") from e
            raise

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
