"""Every name that Flax exports is here, refused, or absent for a reason."""

from __future__ import annotations

import importlib
import inspect
import re
import types
from pathlib import Path
from typing import Any

import pytest
from flax import nnx as flax_nnx
from tests.nnx.test_names import refused

from sortal import _nnx_names, nnx
from sortal.errors import UnsupportedError

GUIDE = Path(__file__).parents[2] / "docs" / "migrating-from-flax.md"
ABSENT = _nnx_names.ABSENT
REFUSED = {"pmap": "`nnx.jit` with shardings, or `nnx.shard_map`"}
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
    rows = [
        "| names | here |",
        "|---|---|",
        "| all others | same arguments |",
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
    assert len(ABSENT) + len(REFUSED) <= 10


@pytest.mark.parametrize(("name", "why"), ABSENT.items())
def test_an_absent_name_says_why(name: str, why: str) -> None:
    with pytest.raises(AttributeError, match=re.escape(f"has no {name}: {why}.")):
        getattr(nnx, name)


def test_the_bridge_has_each_name_or_says_what_to_write() -> None:
    public = {x for x in dir(flax_nnx.bridge) if not x.startswith("_")}
    inside = {"interop", "module", "variables", "wrappers"}
    lacking = {x for x in public - inside if not hasattr(nnx.bridge, x)}
    assert lacking == set(nnx.bridge.ABSENT)
    with pytest.raises(AttributeError, match="no AttrPriority: attributes are"):
        nnx.bridge.AttrPriority  # noqa: B018


INSIDE = {"canonicalize_padding", "to_opt_state"}


def test_what_a_file_of_flax_defines_is_in_the_file_of_that_name() -> None:
    root = Path(str(flax_nnx.__file__)).parent
    for file in [*root.glob("nn/[a-z]*.py"), *root.glob("training/[a-z]*.py")]:
        name = f"{file.parent.name}.{file.stem}"
        theirs = importlib.import_module(f"flax.nnx.{name}")
        ours = importlib.import_module(f"sortal.nnx.{name}")
        for k, x in vars(theirs).items():
            public = inspect.isclass(x) or inspect.isfunction(x)
            if public and x.__module__ == theirs.__name__ and k[0] != "_":
                assert hasattr(ours, k) or k in INSIDE, f"{name}.{k}"
                assert getattr(ours, k, None) is getattr(nnx, k, getattr(ours, k, None))


def test_texts_of_reprlib_are_those_of_flax() -> None:
    def program(lib: Any) -> str:
        class Point(lib.reprlib.Representable):
            def __nnx_repr__(self) -> Any:
                yield lib.reprlib.Object(type(self), same_line=self.flat)
                yield lib.reprlib.Attr("x", [1, "a", None])
                yield lib.reprlib.Attr("t", int)

        texts = []
        for Point.flat in (True, False):  # type: ignore[misc]
            texts.append(repr(Point()))
            texts.append(repr(lib.reprlib.PrettyMapping({"k": Point()})))
            texts.append(repr(lib.reprlib.PrettySequence([Point(), 1.5])))
        return "\n".join(texts)

    assert program(nnx) == program(flax_nnx)


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
