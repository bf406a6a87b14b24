"""The arrays of a file, whatever its format."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sortal._engine.paths import part, show
from sortal.checkpoint.files import Location
from sortal.checkpoint.values import dtype_name
from sortal.errors import SaveError, listing

_NO_STRUCTURES: Mapping[Any, str] = {}


class Entry(NamedTuple):
    """One array or plain value of a file.

    ``kind`` is the full name, where the format has kinds. ``dtype`` is named as in the
    format, ``nbytes`` is the size there, and ``read`` returns the whole array. The
    ``dtype`` of a plain value is its Python type, and ``read`` returns it; that of PRNG
    keys is ``key<...>``, and ``read`` returns their words. ``mapped`` returns the array
    as a view of the file, of which only what is used is read. So many of the last parts
    of ``name`` as ``inner`` says are inside of the value of a leaf.
    """

    name: tuple[Any, ...]
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Any]
    kind: str | None = None
    spec: Any = None
    plain: bool = False
    mapped: Callable[[], np.ndarray] | None = None
    inner: int = 0

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


class Opened(NamedTuple):
    """A file or folder of arrays: its format, its own metadata, its entries.

    ``structures`` has the containers in the value of a leaf, as text. ``together``
    reads several entries in less time than one by one.
    """

    path: Location
    format: str
    about: dict[str, Any]
    entries: list[Entry]
    structures: Mapping[tuple[Any, ...], str] = _NO_STRUCTURES
    together: Callable[[Sequence[Entry]], list[Any]] | None = None

    def values(self, entries: Sequence[Entry]) -> list[Any]:
        """The values of some of its entries, in order."""
        if self.together is not None:
            return self.together(entries)
        return [e.read() for e in entries]


def parts(text: str) -> tuple[Any, ...]:
    """A dotted name as a path, in which digits are integers.

    Example:
      >>> parts("layers.0.weight")
      ('layers', 0, 'weight')
    """
    return tuple(map(part, text.split(".")))


def dotted(name: tuple[Any, ...]) -> str:
    """A path as a name with dots."""
    return ".".join(map(str, name))


def named(
    entries: Iterable[Entry],
    name: Callable[[tuple[Any, ...]], Any],
    holds: Callable[[Any], bool],
    what: str,
) -> dict[Any, Entry]:
    """Entries by their names in a file; refuses all that the file would lose.

    ``name`` gives the name of a path, ``holds`` whether the format has such names, and
    ``what`` says in messages what the format is.

    Raises:
      SaveError: several leaves have one name, or the format cannot hold a name.
    """
    found: dict[Any, list[Entry]] = {}
    for e in entries:
        found.setdefault(name(e.name), []).append(e)
    if odd := [show(same[0].name) for x, same in found.items() if not holds(x)]:
        raise SaveError(
            f"names that {what} cannot hold:\n{listing(odd)}\nGive others with names=."
        )
    twice = [
        f"{_text(x)}: {', '.join(show(e.name) for e in same)}"
        for x, same in sorted(found.items(), key=lambda item: _text(item[0]))
        if len(same) > 1
    ]
    if twice:
        raise SaveError(
            f"several leaves have one name in the file:\n{listing(twice)}\n"
            "Give others with names=."
        )
    return {x: same[0] for x, same in found.items()}


def _text(name: Any) -> str:
    return name if isinstance(name, str) else dotted(name)


def encodable(text: str) -> bool:
    """Whether a text is valid Unicode: a lone surrogate is not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_BATCH = 64 << 20


def in_batches(opened: Opened, entries: Sequence[Entry]) -> list[Entry]:
    """The same entries, whose arrays are read with their neighbours, by 64 MiB.

    They are to be read in order, each once.
    """
    batches: list[list[Entry]] = []
    room = 0
    for e in entries:
        if not batches or e.nbytes > room:
            batches.append([])
            room = _BATCH
        batches[-1].append(e)
        room -= e.nbytes
    return [e for batch in batches for e in _batched(opened, batch)]


def _batched(opened: Opened, batch: list[Entry]) -> list[Entry]:
    values: dict[int, Any] = {}
    arrays = [e for e in batch if not e.plain]

    def get(i: int) -> Any:
        if i not in values:
            values.update(enumerate(opened.values(arrays)))
        return values.pop(i)

    number = itertools.count()
    return [
        e if e.plain else e._replace(read=functools.partial(get, next(number)))
        for e in batch
    ]


def words_of(e: Entry) -> int:
    """How many words each of its PRNG keys has."""
    return e.nbytes // 4 // e.elements if e.elements else e.read().shape[-1]


def as_array(e: Entry) -> Entry | None:
    """An entry as an array alone: keys as their words, and numbers as NumPy has them.

    None for a plain value that no array holds.
    """
    if e.dtype.startswith("key<"):
        return e._replace(dtype="uint32", shape=(*e.shape, words_of(e)))
    if not e.plain:
        return e
    value = e.read()
    if type(value) not in (bool, int, float, complex):
        return None
    array = np.asarray(value)
    if array.dtype.kind not in "bifc":  # an integer of more than 64 bits
        return None
    read = e.read
    return e._replace(
        dtype=dtype_name(array.dtype), nbytes=array.nbytes, plain=False,
        read=lambda: np.asarray(read()),
    )  # fmt: skip
