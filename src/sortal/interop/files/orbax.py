"""Orbax checkpoints, read and written through Orbax."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sortal._engine.nested import nest
from sortal.checkpoint.values import dtype_name
from sortal.errors import DamagedError, SaveError
from sortal.interop.files.entries import Entry, Opened

_MARK = "_METADATA"


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
    steps = sorted((int(p.name), p) for p in path.iterdir() if p.name.isdigit())
    return folder_of(steps[-1][1]) if steps and not inside else None


def read(path: Path) -> Opened:
    """Opens an Orbax checkpoint, without the last level ``value`` of Flax NNX."""
    import orbax.checkpoint as ocp

    folder = folder_of(path)
    if folder is None:
        raise DamagedError(f"{path} is not a checkpoint of Orbax.")
    try:
        with ocp.PyTreeCheckpointer() as reader:
            tree: Any = reader.metadata(folder).item_metadata.tree
    except Exception as e:
        raise DamagedError(f"{folder} is damaged: {e}") from e
    found: dict[Any, Any] = {}

    def get(keys: Any) -> np.ndarray:
        # Orbax reads whole trees only, so the first request reads all of it.
        if not found:
            found.update(_load(folder, tree))
        return found[keys]

    entries = []
    for keys, x in _leaves(tree):
        shape = tuple(getattr(x, "shape", ()))
        dtype = np.dtype(getattr(x, "dtype", None) or np.float32)
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        entry = Entry(
            _name(keys), dtype_name(dtype), shape, size, lambda k=keys: get(k)
        )
        entries.append(entry)
    return Opened(folder, "orbax", {}, entries)


def _load(folder: Path, tree: Any) -> dict[Any, Any]:
    import orbax.checkpoint as ocp

    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            loaded = reader.restore(folder, restore_args=plain)
    except Exception as e:
        raise DamagedError(f"{folder} is damaged: {e}") from e
    return {keys: np.asarray(x) for keys, x in _leaves(loaded)}


def _leaves(tree: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield tuple(getattr(k, "key", getattr(k, "idx", str(k))) for k in path), x


def _name(keys: tuple[Any, ...]) -> tuple[Any, ...]:
    keys = keys[:-1] if len(keys) > 1 and keys[-1] == "value" else keys
    return tuple(int(k) if isinstance(k, str) and k.isdigit() else k for k in keys)


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Writes nested dicts of arrays into a new folder."""
    import orbax.checkpoint as ocp

    if path.exists():
        raise SaveError(f"{path} exists, and Orbax cannot replace it safely.")
    tree = nest((tuple(map(str, e.name)), np.asarray(e.read())) for e in entries)
    try:
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(path, tree)
    except Exception as e:
        raise SaveError(f"Orbax could not write {path}: {e}") from e
