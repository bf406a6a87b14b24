"""Orbax checkpoints, read and written through Orbax."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sortal._engine.nested import nest
from sortal._engine.paths import part
from sortal.checkpoint import disk
from sortal.checkpoint.values import dtype_name
from sortal.errors import DamagedError, SaveError, UnsupportedError
from sortal.interop.files.entries import Entry, Opened, named

_MARK = "_METADATA"
_JSON = "metadata"
_MINE, _NAMES = "sortal", "names"
_VALUE = "value"
"""The level that Flax NNX has below each Variable."""

_Keys = tuple[Any, ...]


class Items(NamedTuple):
    """The folders of the trees of a checkpoint by name, and the one that holds them.

    The name of a single tree is empty.
    """

    root: Path
    trees: dict[str, Path]


def items(path: Path) -> Items:
    """The trees of the checkpoint at a path; none where there is no checkpoint.

    The path is one that ``StandardCheckpointer.save``, ``v1.save``,
    ``v1.save_checkpointables`` or a step of a ``CheckpointManager`` made, or the folder
    of all steps, of which the last is taken.
    """
    if (path / _MARK).is_file():
        return Items(path, {"": path})
    if not path.is_dir():
        return Items(path, {})
    inside = {p.name: p for p in sorted(path.iterdir()) if p.is_dir()}
    if steps := [n for name in inside if type(n := part(name)) is int]:
        return items(path / str(max(steps)))
    trees = {name: p for name, p in inside.items() if (p / _MARK).is_file()}
    return Items(path, trees if len(trees) != 1 else {"": next(iter(trees.values()))})


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise UnsupportedError(
            "folders of Orbax are read and written through its package, which is not "
            "installed. Install it with: pip install orbax-checkpoint"
        ) from None
    return ocp


class _Tree(NamedTuple):
    """One tree of a checkpoint, as its metadata have it."""

    folder: Path
    tree: Any
    about: dict[str, Any]

    def load(self, keys: Sequence[_Keys]) -> list[Any]:
        """Some leaves; of the others no byte is read."""
        ocp = _orbax()
        chosen, plain = set(keys), ocp.RestoreArgs(restore_type=str)
        array = ocp.RestoreArgs(restore_type=np.ndarray)
        leaves, structure = jax.tree.flatten(self.tree)
        asked = [
            x if at in chosen else ocp.PLACEHOLDER
            for x, (at, _) in zip(leaves, _leaves(self.tree), strict=True)
        ]
        how = [array if hasattr(x, "shape") else plain for x in leaves]
        given = ocp.args.PyTreeRestore(
            structure.unflatten(asked), restore_args=structure.unflatten(how)
        )
        try:
            with ocp.PyTreeCheckpointer() as reader:
                found = dict(_leaves(reader.restore(self.folder, args=given)))
        except Exception as e:
            raise DamagedError(f"{self.folder} is damaged: {e}") from e
        values = [found[k] for k in keys]
        return [x if isinstance(x, str) else np.asarray(x) for x in values]


def read(path: Path) -> Opened:
    """Opens an Orbax checkpoint, without the last level ``value`` of Flax NNX.

    The name of one of several items comes first in the names of its entries.
    """
    found = items(path)
    if not found.trees:
        raise DamagedError(f"{path} is not a checkpoint of Orbax.")
    places: dict[Any, tuple[str, _Keys]] = {}
    entries: list[Entry] = []
    trees = {item: _opened(folder) for item, folder in found.trees.items()}

    def together(asked: Sequence[Entry]) -> list[Any]:
        at = [places[e.name] for e in asked]
        values: dict[Any, Any] = {}
        for item in dict.fromkeys(item for item, _ in at):
            keys = [k for name, k in at if name == item]
            loaded = zip(keys, trees[item].load(keys), strict=True)
            values.update(((item, k), x) for k, x in loaded)
        return [values[place] for place in at]

    for item, tree in trees.items():
        for keys, name, x in _named(tree):
            whole = (part(item), *name) if item else name
            places[whole] = item, keys
            read_one = functools.partial(lambda t, k: t.load([k])[0], tree, keys)
            entries.append(_entry(whole, x, read_one))
    folder = found.trees.get("", found.root)
    return Opened(folder, "orbax", _json(found.root), entries, together=together)


def _opened(folder: Path) -> _Tree:
    ocp = _orbax()
    try:
        with ocp.PyTreeCheckpointer() as reader:
            about: Any = reader.metadata(folder).item_metadata
            return _Tree(folder, about.tree, dict(about.custom_metadata or {}))
    except Exception as e:
        raise DamagedError(f"{folder} is damaged: {e}") from e


def _entry(name: Any, x: Any, get: Any) -> Entry:
    if (shape := getattr(x, "shape", None)) is None:
        return Entry(name, "str", (), 0, get, plain=True)
    dtype = np.dtype(getattr(x, "dtype", None) or np.float32)
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    return Entry(name, dtype_name(dtype), tuple(shape), size, get)


def _json(root: Path) -> dict[str, Any]:
    """What items of ``JsonSave`` hold, as metadata."""
    found = {}
    for file in sorted(root.glob(f"*/{_JSON}")):
        try:
            found[file.parent.name] = json.loads(disk.read(file))
        except (OSError, ValueError, RecursionError):
            continue  # another sort of item
    return {"metadata": found} if found else {}


def _leaves(tree: Any) -> Iterator[tuple[_Keys, Any]]:
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield tuple(getattr(k, "key", getattr(k, "idx", str(k))) for k in path), x


# ------------------------------------------------------------------------------ names
def _named(tree: _Tree) -> Iterator[tuple[_Keys, _Keys, Any]]:
    """The keys, the name and the metadata of each leaf.

    Sortal's first export had no levels ``value``; that of today has a list of the names
    that are not as the rule would have them.
    """
    leaves = list(_leaves(tree.tree))
    mine = tree.about.get(_MINE)
    rule = _Rule(keys for keys, _ in leaves) if mine != 1 else _parts
    given = _given(tree)
    found = [(keys, given.get(keys) or rule(keys), x) for keys, x in leaves]
    if len({name for _, name, _ in found}) < len(found):
        raise DamagedError(
            f"{tree.folder} is damaged: two arrays have one of its names"
        )
    yield from found


def _given(tree: _Tree) -> dict[_Keys, _Keys]:
    """The list of names that an export of Sortal has."""
    try:
        found = {tuple(k): tuple(n) for k, n in tree.about.get(_NAMES, ())}
    except (TypeError, ValueError) as e:
        raise DamagedError(f"{tree.folder} is damaged: its names: {e}") from None
    if any(type(k) not in (str, int) for name in found.values() for k in name):
        raise DamagedError(f"{tree.folder} is damaged: its names are no paths")
    return found


class _Rule:
    """The name of a leaf: without a last level ``value`` that has none beside it."""

    def __init__(self, keys: Iterable[_Keys]):
        self._below = Counter(k[:-1] for k in keys)

    def __call__(self, keys: _Keys) -> _Keys:
        alone = len(keys) > 1 and keys[-1] == _VALUE and self._below[keys[:-1]] == 1
        return _parts(keys[:-1] if alone else keys)


def _parts(keys: _Keys) -> _Keys:
    return tuple(part(k) if isinstance(k, str) else k for k in keys)


# ----------------------------------------------------------------------------- writing
def write(path: Path, entries: Iterable[Entry]) -> None:
    """Writes nested dicts of arrays into a new folder, with levels as of Flax NNX."""
    ocp = _orbax()
    if path.exists():
        raise SaveError(f"{path} exists, and Orbax cannot replace it safely.")
    found = named(entries, lambda name: tuple(map(str, name)), bool, "Orbax")
    leaves = {_keys(name, e): e for name, e in found.items()}
    rule = _Rule(leaves)
    others = [
        [keys, e.name]
        for keys, e in leaves.items()
        if rule(keys) != e.name and all(type(k) in (str, int) for k in e.name)
    ]
    tree = nest((keys, _live(e)) for keys, e in leaves.items())
    about = {_MINE: 2, _NAMES: others}
    given = ocp.args.PyTreeSave(tree, custom_metadata=about)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
            writer.save(path, given)
    except Exception as e:
        raise SaveError(f"Orbax could not write {path}: {e}") from e


def _keys(name: tuple[str, ...], e: Entry) -> _Keys:
    """The keys of an entry, with a level ``value`` where a Variable ends."""
    if e.kind is None:
        return name
    at = len(name) - e.inner
    return (*name[:at], _VALUE, *name[at:])


def _live(e: Entry) -> Any:
    value = e.read()
    if e.dtype.startswith("key<"):
        return jax.random.wrap_key_data(value, impl=e.dtype[4:-1])
    # Of JAX's arrays the file keeps the sharding, which Flax's newest recipe asks for.
    return value if isinstance(value, jax.Array) else np.asarray(value)
