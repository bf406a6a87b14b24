"""Folders of Hugging Face: safetensors in one file, or in shards with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sortal.checkpoint.disk import replacing
from sortal.errors import ArgumentError, DamagedError, SaveError, listing
from sortal.interop.files import safetensors
from sortal.interop.files.entries import Entry, Opened, dotted

_WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.safetensors")
_LARGEST_INDEX = 100_000_000


def is_folder(path: Path) -> bool:
    """Whether it is a folder with a model that this file reads."""
    return any((path / name).is_file() for name in (INDEX, _WHOLE))


def read(path: Path) -> Opened:
    """Opens a folder: the shards that the index names, as one; no array is read."""
    if not (path / INDEX).is_file():
        whole = safetensors.read(path / _WHOLE)
        return whole._replace(path=path, format="huggingface")
    try:
        places = _index(path / INDEX)
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise DamagedError(
            f"{path / INDEX} is no index of shards, or damaged "
            f"({type(e).__name__}: {e})"
        ) from None
    except OSError as e:
        raise DamagedError(f"{path / INDEX} cannot be read: {e}") from e
    absent = [name for name in dict.fromkeys(places.values())
              if not (path / name).is_file()]  # fmt: skip
    if absent:
        raise DamagedError(f"{path} lacks shards of its index:\n{listing(absent)}")
    shards = {name: safetensors.read(path / name) for name in set(places.values())}
    found = {
        (shard, dotted(e.name)): e
        for shard, opened in shards.items()
        for e in opened.entries
    }
    if lost := [f"{x}: not in {shard}" for x, shard in places.items()
                if (shard, x) not in found]:  # fmt: skip
        raise DamagedError(f"{path / INDEX} is wrong about:\n{listing(lost)}")
    entries = [found[shard, x] for x, shard in places.items()]
    return Opened(path, "huggingface", {"shards": sorted(shards)}, entries)


def _index(file: Path) -> dict[str, str]:
    if file.stat().st_size > _LARGEST_INDEX:
        raise ValueError("larger than any index")
    places = json.loads(file.read_bytes())["weight_map"]
    if type(places) is not dict:
        raise TypeError("the weight_map is no object")
    for shard in places.values():
        if not _SHARD.fullmatch(shard):
            raise ValueError(f"a shard {shard!r:.60}")
    return places


def write(
    path: Path, entries: Iterable[Entry], config: Mapping[str, Any] | None, most: int
) -> None:
    """Writes a folder with shards of at most ``most`` bytes, and the index last.

    ``config`` becomes its ``config.json``.
    """
    _check_options(config, most)
    if is_folder(path) or any(path.glob("model-*.safetensors")):
        raise SaveError(f"{path} has a model already, which is not replaced.")
    shards: list[list[Entry]] = []
    room = 0
    for e in entries:
        if not shards or e.nbytes > room:
            shards.append([])
            room = most
        shards[-1].append(e)
        room -= e.nbytes
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise SaveError(f"cannot write to {path}: {e}") from e
    if config is not None:
        _write_json(path / "config.json", dict(config))
    about = {"format": "pt"}  # which transformers asks for
    if len(shards) == 1:
        safetensors.write(path / _WHOLE, shards[0], about)
        return
    places = {}
    for n, shard in enumerate(shards, 1):
        name = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        safetensors.write(path / name, shard, about)
        places.update({dotted(e.name): name for e in shard})
    size = sum(e.nbytes for shard in shards for e in shard)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    _write_json(path / INDEX, index)


def _check_options(config: Any, shard_bytes: Any) -> None:
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ArgumentError(
            f"shard_bytes= is a number of bytes, 1 or more; found {shard_bytes!r:.60}."
        )
    if config is not None and not isinstance(config, Mapping):
        raise ArgumentError(f"config= is a mapping; found a {type(config).__name__}.")
    try:
        json.dumps(None if config is None else dict(config))
    except (TypeError, ValueError, RecursionError) as e:
        raise ArgumentError(f"config= is not JSON: {e}") from None


def _write_json(path: Path, x: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(x, indent=2) + "\n", "utf-8")
