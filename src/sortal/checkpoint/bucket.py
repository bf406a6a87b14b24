"""Files in object stores, ``s3://`` and ``gs://``, through TensorStore's drivers.

The functions are those of ``disk``. There are no folders, locks and renames. An object
is there, and durable, once it is written; a write may ask that nobody wrote meanwhile.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

from sortal.checkpoint import forks
from sortal.checkpoint.manifest import LARGEST, File, is_chunk
from sortal.errors import ArgumentError, CheckpointError, SaveError, WriterError

IN_FLIGHT = 16
"""How many chunks are written at a time."""
_URL = re.compile(r"(s3|gs)://([A-Za-z0-9][A-Za-z0-9._-]+)(?:/(.*))?", re.DOTALL)
_LOCK = ".lock"


class Address(NamedTuple):
    """The address of an object, or of all whose keys begin with it and a slash."""

    scheme: str
    bucket: str
    key: str

    @classmethod
    def of(cls, text: str) -> Address | None:
        """The address in a text; None where it is none of an object store."""
        found = _URL.fullmatch(text)
        if found is None:
            return None
        parts = unquote(found[3] or "").strip("/").split("/")
        if set(parts) & {"", ".", ".."} and parts != [""]:
            raise ArgumentError(
                f"an address has no empty part and no '.' or '..'; found {text!r:.200}."
            )
        return cls(found[1], found[2], "/".join(parts))

    def __truediv__(self, name: str) -> Address:
        return self._replace(key=f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        """The address without its last part."""
        return self._replace(key=self.key.rpartition("/")[0])

    def __fspath__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    def is_file(self) -> bool:
        """Whether there is an object of this key."""
        try:
            return _look(self).state == "value"
        except OSError as e:
            raise CheckpointError(f"{self} cannot be read: {e}") from e


def spec(at: Address) -> dict[str, Any]:
    """TensorStore's specification of what lies below an address.

    Other stores that speak S3 are found as by AWS's own tools, by the variables
    ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``.
    """
    found = {"bucket": at.bucket, "path": f"{at.key}/" if at.key else ""}
    if at.scheme == "gs":
        return {"driver": "gcs", **found}
    env = os.environ
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
    if endpoint:
        region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"
        found |= {"endpoint": endpoint.rstrip("/"), "aws_region": region}
    return {"driver": "s3", **found}


def context() -> Any:
    """A TensorStore context; one, so that credentials are looked up once."""
    return _context(_settings())


def _settings() -> tuple[Any, ...]:
    env = (x for x in os.environ.items() if x[0].startswith(("AWS_", "GOOGLE_")))
    return (os.getpid(), *sorted(env))


@functools.lru_cache(maxsize=4)
def _context(settings: tuple[Any, ...]) -> Any:
    # Some seconds; by default, a store that does not answer is asked for minutes.
    retries = {"max_retries": 6, "max_delay": "4s"}
    return forks.context(s3_request_retries=retries, gcs_request_retries=retries)


@functools.lru_cache(maxsize=16)
def _opened(scheme: str, bucket: str, settings: tuple[Any, ...]) -> Any:
    import tensorstore as ts

    store = spec(Address(scheme, bucket, ""))
    opened = ts.KvStore.open(store, context=_context(settings))
    return _os_errors(opened.result)


def _kvs(at: Address) -> Any:
    forks.refuse_fork(CheckpointError)
    return _opened(at.scheme, at.bucket, _settings())


def _os_errors(do: Callable[[], Any]) -> Any:
    try:
        return do()
    except (ValueError, RuntimeError) as e:
        raise OSError(errno.EIO, str(e)) from e


# --------------------------------------------------------------------------- reading
def tree(
    directory: Address, wanted: Callable[[str], Any]
) -> dict[str, dict[str, bool | None]]:
    """The names in each wanted folder of a directory, and whether each is a folder."""
    found: dict[str, dict[str, bool | None]] = {}
    for key in names(directory):
        folder, slash, rest = key.partition("/")
        if slash and wanted(folder):
            name, below, _ = rest.partition("/")
            found.setdefault(folder, {})[name] = bool(below)
    return found


def names(folder: Address) -> list[str]:
    """The names of all files below a folder."""
    import tensorstore as ts

    prefix = f"{folder.key}/" if folder.key else ""
    keys = ts.KvStore.KeyRange(prefix, f"{folder.key}0" if folder.key else "")
    found = map(os.fsdecode, _os_errors(_kvs(folder).list(keys).result))
    # Some emulators list all that there is.
    return [key[len(prefix) :] for key in found if key.startswith(prefix)]


def read(file: Address, most: int = LARGEST) -> bytes:
    """The bytes of a file; by default of one no larger than any manifest."""
    found = _os_errors(lambda: _kvs(file).read(file.key).result())
    if found.state != "value":
        raise FileNotFoundError(errno.ENOENT, "no such object", str(file))
    if (size := len(found.value)) > most:
        raise OSError(errno.EFBIG, f"larger than it can be: {size:,} bytes")
    return found.value


def fingerprints(
    root: Address, sizes: Mapping[str, int]
) -> Iterator[tuple[str, File | OSError]]:
    """The size and checksum of each file below ``root``; ``sizes`` are those due."""
    kvs = _kvs(root)
    started = {}
    for name, size in sizes.items():
        part = slice(max(size - 4, 0), None) if is_chunk(name) else None
        started[name] = kvs.read((root / name).key, byte_range=part)
    for name, future in started.items():
        try:
            yield name, _fingerprint(root / name, sizes[name], future)
        except OSError as e:
            yield name, e


def _fingerprint(file: Address, size: int, future: Any) -> File:
    before = max(size - 4, 0) if is_chunk(str(file)) else 0
    if future.exception() is not None:  # perhaps it is too short to have that part
        before, future = 0, _kvs(file).read(file.key)
    found = _os_errors(future.result)
    if found.state != "value":
        raise FileNotFoundError(errno.ENOENT, "no such object")
    data = found.value
    if not is_chunk(str(file)):
        return File(len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")
    tail = int.from_bytes(data[-4:], "little")
    return File(before + len(data), f"crc32c:{tail:08x}")


def absent(root: Address, sizes: Mapping[str, int]) -> list[str]:
    """The files below ``root`` that are not there in their sizes."""
    kvs = _kvs(root)
    # From its last byte on, so that one byte says the size.
    started = {
        name: kvs.read((root / name).key, byte_range=slice(size - 1, None))
        for name, size in sizes.items()
    }
    return [name for name, future in started.items() if not _ends_there(future)]


def _ends_there(future: Any) -> bool:
    try:
        found = future.result()
    except (ValueError, RuntimeError):  # shorter
        return False
    return found.state == "value" and len(found.value) == 1


# --------------------------------------------------------------------------- writing
def write(root: Address, files: Mapping[str, bytes | None]) -> None:
    """Writes files below ``root``; those whose bytes are None are removed."""
    kvs = _kvs(root)
    started = [kvs.write((root / name).key, data) for name, data in files.items()]
    # All of them end before an error, or one could write what was removed meanwhile.
    faults = [e for future in started if (e := future.exception()) is not None]
    if faults:
        raise OSError(errno.EIO, str(faults[0])) from faults[0]


def sync(path: Address) -> None:
    """Does nothing: what is written is durable."""


class Syncs:
    """Does nothing, as ``sync``."""

    def add(self, path: Address) -> None:
        """Does nothing."""

    def finish(self) -> list[BaseException]:
        """No errors."""
        return []


def sync_tree(root: Address, files: Iterable[str]) -> None:
    """Does nothing, as ``sync``."""


def write_file(file: Address, data: bytes) -> None:
    """Writes one file."""
    write(file.parent, {file.name: data})


def _look(at: Address) -> Any:
    """An object as it is now, without its bytes."""
    kvs = _kvs(at)
    return _os_errors(lambda: kvs.read(at.key, byte_range=slice(0, 0)).result())


def publish(file: Address, temporary: str, data: bytes) -> None:
    """Writes a file in the place of the one there; readers find either.

    It is an error if another writer wrote it meanwhile, where the store can tell.
    """
    before = _look(file).stamp.generation
    if not _swap(_kvs(file), file.key, data, before):
        raise WriterError(f"another writer wrote {file} at the same time.")


def _swap(kvs: Any, key: str, data: bytes, before: bytes) -> bool:
    """Writes an object unless it has changed."""
    stamp = _os_errors(lambda: kvs.write(key, data, if_equal=before).result())
    return bool(stamp.generation)


def remove(path: Address) -> None:
    """Removes a file, or all files below a folder."""
    below = (f"{path.name}/{name}" for name in names(path))
    write(path.parent, dict.fromkeys((path.name, *below)))


def remove_empty(folder: Address) -> None:
    """Does nothing: there are no folders."""


class Lock:
    """A claim to be the one writer; another writer that makes one takes it over.

    There are no locks, and nothing tells whether the process of an older claim is still
    alive. So the writer that began first is refused, at the latest when it commits.

    Raises:
      WriterError: another writer claimed the directory at the same moment.
      SaveError: the store cannot be written to.
    """

    def __init__(self, directory: Address):
        self._file, self._process = directory / _LOCK, os.getpid()
        where = f"process {os.getpid()} on {socket.gethostname()}"
        self._claim = f"{where}\n{secrets.token_hex(16)}\n".encode()
        try:
            before = _look(self._file).stamp.generation
            taken = _swap(_kvs(self._file), self._file.key, self._claim, before)
            if not taken and _look(self._file).state == "missing":
                write_file(self._file, self._claim)  # says what is in the way
                taken = True
        except OSError as e:
            raise SaveError(f"cannot write to {directory}: {e}") from e
        if not taken:
            raise WriterError(f"another writer is at work in {directory}.")

    @property
    def holds(self) -> bool:
        """Whether no other writer has claimed the directory since."""
        if self._process != os.getpid():
            return False
        try:
            return read(self._file) == self._claim
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Leaves the claim, which hinders nobody."""
