"""Orbax checkpoints, read and written through Orbax."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sortal._engine.nested import nest
from sortal.checkpoint.values import dtype_name
from sortal.errors import DamagedError, SaveError
from sortal.interop.files.entries import Entry, Opened, named, part

_MARK = "_METADATA"
_MINE = "sortal"


def folder_of(path: Path) -> Path | None:
    """The folder of Orbax's tree at a path; None where there is none, or no single one.

    The path is one that ``StandardCheckpointer.save``, ``v1.save`` or a step of a
    ``CheckpointManager`` made, or the folder of all steps, of which the last is taken.
    """
    if (path / _MARK).is_file():
        return path
    if not path.is_dir():
        return None
    inside = [p for p in path.iterdir() if (p / _MARK).is_file()]
    if len(inside) == 1:
        return inside[0]
    steps = [(n, p) for p in path.iterdir() if type(n := part(p.name)) is int]
    steps.sort()
    return folder_of(steps[-1][1]) if steps and not inside else None


def read(path: Path) -> Opened:
    """Opens an Orbax checkpoint, without the last level ``value`` of Flax NNX."""
    import orbax.checkpoint as ocp

    folder = folder_of(path)
    if folder is None:
        raise DamagedError(f"{path} is not a checkpoint of Orbax.")
    try:
        with ocp.PyTreeCheckpointer() as reader:
            about: Any = reader.metadata(folder).item_metadata
            tree: Any = about.tree
    except Exception as e:
        raise DamagedError(f"{folder} is damaged: {e}") from e
    # Orbax reads whole trees only, so the first request reads all of it.
    all_of = functools.cache(lambda: _load(folder, tree))
    # Flax NNX writes a last level ``value``, and Sortal's own export says that it
    # writes none.
    mine = _MINE in (about.custom_metadata or {})
    below = Counter(keys[:-1] for keys, _ in _leaves(tree))
    entries = []
    for keys, x in _leaves(tree):
        variable = len(keys) > 1 and keys[-1] == "value" and below[keys[:-1]] == 1
        name = tuple(
            part(k) if isinstance(k, str) else k
            for k in (keys[:-1] if variable and not mine else keys)
        )

        def get(k: Any = keys) -> Any:
            return all_of()[k]

        if (shape := getattr(x, "shape", None)) is None:
            entries.append(Entry(name, "str", (), 0, get, plain=True))
            continue
        dtype = np.dtype(getattr(x, "dtype", None) or np.float32)
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        entries.append(Entry(name, dtype_name(dtype), tuple(shape), size, get))
    return Opened(folder, "orbax", {}, entries)


def _load(folder: Path, tree: Any) -> dict[Any, Any]:
    import orbax.checkpoint as ocp

    plain = jax.tree.map(
        lambda x: ocp.RestoreArgs(
            restore_type=np.ndarray if hasattr(x, "shape") else str
        ),
        tree,
    )
    try:
        with ocp.PyTreeCheckpointer() as reader:
            loaded = reader.restore(folder, restore_args=plain)
    except Exception as e:
        raise DamagedError(f"{folder} is damaged: {e}") from e
    return {
        keys: x if isinstance(x, str) else np.asarray(x) for keys, x in _leaves(loaded)
    }


def _leaves(tree: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield tuple(getattr(k, "key", getattr(k, "idx", str(k))) for k in path), x


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Writes nested dicts of arrays into a new folder."""
    import orbax.checkpoint as ocp

    if path.exists():
        raise SaveError(f"{path} exists, and Orbax cannot replace it safely.")
    found = named(entries, _keys, bool, "Orbax")
    tree = nest((keys, np.asarray(e.read())) for keys, e in found.items())
    given = ocp.args.PyTreeSave(tree, custom_metadata={_MINE: 1})
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
            writer.save(path, given)
    except Exception as e:
        raise SaveError(f"Orbax could not write {path}: {e}") from e


def _keys(name: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(map(str, name))
