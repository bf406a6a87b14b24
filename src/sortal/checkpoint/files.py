"""The files of steps: which there are, what counts, commits, deletions and clean-up.

A directory is a path on disk or an address in an object store; ``disk`` and ``bucket``
have what differs between them.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from sortal.checkpoint import bucket, disk
from sortal.checkpoint import manifest as _manifest
from sortal.checkpoint.bucket import Address
from sortal.checkpoint.manifest import Manifest
from sortal.errors import (
    ArgumentError,
    CheckpointError,
    DamagedError,
    NoCheckpointError,
    SaveError,
)

Location = Path | Address
"""A directory or file: on disk, or in an object store."""
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")
_FOLDER = re.compile(r"arrays-(?:([0-9a-f]{12})-[0-9a-f]{8}(-kept)?|[0-9a-f]{16})")
_BESIDE = re.compile(
    r"\.(?:manifest|last)-(?:[0-9a-f]{12}-[0-9a-f]{8}(?:-kept)?|[0-9a-f]{16})"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def on(at: Location) -> Any:
    """What reads and writes there: the module ``disk`` or ``bucket``."""
    return bucket if isinstance(at, Address) else disk


def new_folder(directory: Location, kept: bool) -> str:
    """A new name for the folder that holds the arrays of one save.

    It has the number of the save in this directory, so that the order of saves is known
    without a clock, and says whether a ``Checkpoints`` saved it and may delete it.
    """
    names = (name for inside in _tree(directory).values() for name in _arrays(inside))
    number = max(map(_number, names), default=-1) + 1
    number = min(max(number, 0), (1 << 48) - 1)
    return f"arrays-{number:012x}-{secrets.token_hex(4)}{'-kept' if kept else ''}"


def _number(folder: str) -> int:
    """The number of a save; less than all where the first version named the folder."""
    found = _FOLDER.fullmatch(folder)
    return int(found[1], 16) if found and found[1] else -1


def located(path: Any) -> Location:
    """The directory of a checkpoint from the user: a path, or an address.

    Addresses are those of object stores, ``s3://bucket/key`` and ``gs://bucket/key``,
    and ``file:///path``.
    """
    if isinstance(path, Address):
        return path
    text = _text(path)
    if _SURROGATE.search(text):
        raise ArgumentError(
            f"the path of a checkpoint is text; this is no text in UTF-8: {text!r:.200}"
        )
    if (address := Address.of(text)) is not None:
        return address
    file = text.startswith("file:///")
    path = local(unquote(urlsplit(text).path) if file else text)
    if "\\" in str(path):
        raise ArgumentError(
            "the path of a checkpoint has no backslashes, which TensorStore takes for "
            f"slashes; found {str(path)!r:.200}."
        )
    return path


def _text(path: Any) -> str:
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise ArgumentError(
            "a directory or file is a string or a path; found a "
            f"{type(path).__name__}. It comes first, before the model."
        ) from None
    if not text:
        raise ArgumentError("a path is empty; the present folder is '.'.")
    return text


def local(path: Any) -> Path:
    """A path from the user as an absolute one.

    Addresses such as ``gs://...`` are refused: as a path, one would make a local folder
    of that name.
    """
    text = _text(path)
    if _URL.match(text):
        raise ArgumentError(
            f"this is read and written by the file system; found the address {text!r}. "
            "Use a local folder and copy it, or one where the storage is mounted. "
            "Checkpoints may also be at s3://bucket/key and gs://bucket/key."
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


def steps(directory: Location) -> list[int]:
    """The committed steps in a directory, in rising order; none if there is no such."""
    return sorted(n for n, inside in _tree(directory).items() if _committed(inside))


def by_age(directory: Location) -> list[Step]:
    """The committed steps, from the one saved first to the one saved last.

    Steps of the first version, whose saves have no number, come first, by their own.
    """
    tree = _tree(directory).items()
    found = [_step(directory, n, inside) for n, inside in tree if _committed(inside)]
    return sorted(found, key=lambda step: (_number(step.folder), step.number))


def _step(directory: Location, number: int, inside: _Names) -> Step:
    folders = _arrays(inside)
    folder = max(folders, key=_number, default="")
    # While it is replaced, after an interrupted save, or when its arrays are gone.
    if len(folders) != 1:
        with contextlib.suppress(CheckpointError):
            folder = glance(directory, number)["folder"]
    passing = inside.get(mark(folder)) is False
    return Step(number, folder, folder.endswith("-kept"), passing)


_Names = Mapping[str, bool | None]
"""The names in a folder; True for a folder, False for a file, None for a link."""


def _tree(directory: Location) -> dict[int, _Names]:
    """What is in the folders that have numbers of steps as names; links are none."""
    try:
        found = on(directory).tree(directory, _STEP.fullmatch)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as e:
        raise CheckpointError(f"{directory} cannot be read: {e}") from e
    return {int(name): inside for name, inside in found.items()}


def _committed(inside: _Names) -> bool:
    return inside.get(_manifest.NAME) is False


def _arrays(inside: _Names) -> list[str]:
    """The names of the folders of arrays in the folder of a step."""
    return [n for n, is_folder in inside.items() if is_folder and _FOLDER.fullmatch(n)]


def step_of(folder: Location) -> int:
    """The step number in the name of a folder."""
    if not _STEP.fullmatch(folder.name):
        raise DamagedError(f"{folder} does not have the number of a step as its name.")
    return int(folder.name)


def read_manifest(directory: Location, step: int) -> Manifest:
    """The manifest of a committed step; refuses one of another step."""
    file = directory / str(step) / _manifest.NAME
    manifest = _manifest.from_bytes(_manifest_bytes(directory, step), str(file))
    _check_names(file, step, manifest.step, manifest.folder)
    return manifest


def glance(directory: Location, step: int) -> dict[str, Any]:
    """The JSON of a step's manifest; its bytes are those that were written.

    Much faster than ``read_manifest``, which also checks that it does not contradict
    itself.
    """
    file = directory / str(step) / _manifest.NAME
    body = _manifest.body(_manifest_bytes(directory, step), str(file))
    _check_names(file, step, body["step"], body["folder"])
    return body


def _manifest_bytes(directory: Location, step: int) -> bytes:
    file = directory / str(step) / _manifest.NAME
    try:
        return on(file).read(file)
    except (FileNotFoundError, NotADirectoryError):
        found = ", ".join(map(str, steps(directory))) or "none"
        raise NoCheckpointError(
            f"no step {step} in {directory}; the steps there are: {found}."
        ) from None
    except OSError as e:
        raise DamagedError(f"{file} cannot be read: {e}") from e


def _check_names(file: Location, step: int, found: Any, folder: Any) -> None:
    if found != step:
        raise DamagedError(
            f"{file.parent} holds step {found}: it was renamed or copied. Give it "
            "the name of its step."
        )
    if not _FOLDER.fullmatch(folder):
        raise DamagedError(
            f"{file}: its arrays are in {folder!r:.60}, no name that a save gives"
        )


def is_whole(directory: Location, step: Step) -> bool:
    """Whether the manifest is readable and all files are there in their sizes."""
    try:
        body = glance(directory, step.number)
        root = directory / str(step.number) / body["folder"]
        sizes = {name: size for name, (size, _) in body["files"].items()}
        return not on(root).absent(root, sizes)
    except (CheckpointError, OSError, TypeError, ValueError):
        return False


# ---------------------------------------------------------------------------- commit
def commit(directory: Location, manifest: Manifest) -> None:
    """Makes a step count, by putting its manifest into place.

    Readers find either the old manifest or this one. The arrays are on disk before.
    """
    folder, data = directory / str(manifest.step), _manifest.to_bytes(manifest)
    temporary = unfinished(manifest.folder)
    on(folder).publish(folder / _manifest.NAME, temporary, data)
    try:
        on(folder).sync(folder)
    except OSError as e:
        raise SaveError(
            f"step {manifest.step} is saved to {directory} and can be restored, but "
            f"syncing its folder failed, so that a power cut may undo the save: {e}"
        ) from e


def unfinished(folder: str) -> str:
    """Where a manifest is written before it is renamed."""
    return f".manifest-{folder.removeprefix('arrays-')}"


def mark(folder: str) -> str:
    """The file that says of a save that some of its leaves go at the next one."""
    return f".last-{folder.removeprefix('arrays-')}"


def discard(directory: Location, step: int, folder: str) -> None:
    """Removes what a save has written that was not committed, as far as it can be."""
    path = directory / str(step)
    for name in (folder, unfinished(folder), mark(folder)):
        with contextlib.suppress(OSError):
            on(path).remove(path / name)
    on(path).remove_empty(path)


def forget(directory: Location, step: int) -> None:
    """Deletes a step: its manifest first, so that it no longer counts."""
    folder = directory / str(step)
    on(folder).remove(folder / _manifest.NAME)
    on(folder).sync(folder)
    clean_step(directory, step, keep=None)


def clean(directory: Location) -> None:
    """Removes what interrupted saves and deletions left, and nothing else.

    What cannot be removed is left, with a warning.
    """
    for step, inside in _tree(directory).items():
        keep, ours = None, list(filter(is_ours, inside))
        try:
            if _manifest.NAME in inside:
                if len(_arrays(inside)) == len(ours) == 1:
                    continue
                keep = read_manifest(directory, step).folder
            clean_step(directory, step, keep)
        except CheckpointError:
            continue  # its folder is not known, so everything is kept
        except OSError as e:
            warnings.warn(
                f"an interrupted save left files that cannot be removed: {e}",
                stacklevel=2,
            )


def clean_step(directory: Location, step: int, keep: str | None) -> None:
    """Removes what saves made in a step but ``keep``; an empty step goes too."""
    folder = directory / str(step)
    kept = () if keep is None else (keep, mark(keep))
    for name in on(directory).tree(directory, str(step).__eq__).get(str(step), ()):
        if name not in kept and is_ours(name):
            on(folder).remove(folder / name)
    if keep is None:
        on(folder).remove_empty(folder)
    on(directory).sync(directory)


def remove_arrays(root: Location, keep: Iterable[str]) -> None:
    """Removes the arrays in a folder of arrays, but those named."""
    there = (name.rpartition("/")[0] for name in on(root).names(root))
    for name in sorted({x for x in there if "/" in x} - set(keep)):
        on(root).remove(root / name)


def is_ours(name: str) -> bool:
    """Whether only a save gives this name to a file in the folder of a step."""
    return bool(_FOLDER.fullmatch(name) or _BESIDE.fullmatch(name))


@contextlib.contextmanager
def as_save_error(what: str, outcome: str = "") -> Iterator[None]:
    """Turns errors of the system and of TensorStore into a SaveError."""
    try:
        yield
    except SaveError:
        raise
    except (OSError, ValueError, RuntimeError, MemoryError) as e:
        raise SaveError(f"{what} failed{outcome}: {e}") from e
