"""Every name that Flax exports is here, refused, or absent for a reason."""

from __future__ import annotations

import inspect
import types
from pathlib import Path

import pytest
from flax import nnx as flax_nnx
from tests.nnx.test_names import refused

from sortal import nnx
from sortal.errors import UnsupportedError

GUIDE = Path(__file__).parents[2] / "docs" / "migrating-from-flax.md"
ABSENT = {
    "deprecations": "a tool of Flax's own source",
    "extract": "internals of Flax's transforms",
    "proxy_caller": "internals of `call`",
    "reprlib": "internals of Flax's prints",
    "visualization": "internals of `display`",
    "wrappers": "`nnx.bridge` has its names",
}
REFUSED = {
    "pmap": "`nnx.jit` with shardings, or `nnx.shard_map`",
    "update_context": "`nnx.jit` in the place of `jax.jit`",
    "UpdateContext": "`nnx.jit` in the place of `jax.jit`",
    "current_update_context": "`nnx.jit` in the place of `jax.jit`",
    "split_context": "`nnx.jit` in the place of `jax.jit`",
    "SplitContext": "`nnx.jit` in the place of `jax.jit`",
    "merge_context": "`nnx.jit` in the place of `jax.jit`",
    "MergeContext": "`nnx.jit` in the place of `jax.jit`",
}
NAMES = [name for name in dir(flax_nnx) if not name.startswith("_")]


def missing_arguments(name: str) -> list[str]:
    """What a call may give to Flax's, by name or by place, and not to ours."""
    ours, theirs = getattr(nnx, name), getattr(flax_nnx, name)
    if isinstance(theirs, types.ModuleType) or not callable(theirs):
        return []
    try:
        return sorted(x for x in refused(ours, theirs) if not x.startswith("_"))
    except (TypeError, ValueError):  # an annotation, or a class without a signature
        return []


def table() -> str:
    """The comparison, as the migration guide shows it."""
    there = [n for n in NAMES if n not in ABSENT and n not in REFUSED]
    fewer = {n: missing for n in there if (missing := missing_arguments(n))}
    same = len(there) - len(fewer)
    rows = [
        "| names | here |",
        "|---|---|",
        f"| {same} of {len(NAMES)} | same arguments |",
    ]
    rows += [
        f"| `{n}` | takes no {', '.join(f'`{x}`' for x in missing)} |"
        for n, missing in fewer.items()
    ]
    rows += [f"| `{n}` | refused: write {why} |" for n, why in REFUSED.items()]
    rows += [f"| `{n}` | absent: {why} |" for n, why in ABSENT.items()]
    return "\n".join(rows)


def test_the_guide_shows_the_comparison() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    shown = text.partition("## Name by name\n")[2].partition("\n## ")[0]
    assert table() in shown


def test_each_name_is_there_or_is_said_to_be_absent() -> None:
    lacking = [n for n in NAMES if not hasattr(nnx, n)]
    assert lacking == sorted(ABSENT)
    assert len(ABSENT) <= 10


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_name_raises_what_to_write(name: str) -> None:
    thing = getattr(nnx, name)
    needed = [
        p
        for p in inspect.signature(thing).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    with pytest.raises(UnsupportedError, match=r"nnx\.jit"):
        thing(*(["x"] * len(needed)))
