"""Every public name is documented, as it is, with an example that runs."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

import pytest

TABLES = ("sortal", "sortal.nn", "sortal.nnx", "sortal.interop.linen")
# Names that need no example of their own, and why. An entry that has one, or that no
# contents table lists any more, is an error.
KINDS = (
    "BatchStat Cache Intermediate OptArray OptState OptVariable Param Perturbation "
    "RngCount RngKey RngState"
)
NO_EXAMPLE: dict[str, str] = {
    f"sortal.{kind}": "a kind is used as Variable's example uses it"
    for kind in KINDS.split()
} | {"sortal.nnx.pmap": "refused by a sentence that says what to write"}
SECTION = re.compile(r"^(Args|Arguments):[ \t]*\n", re.MULTILINE)
ENTRY = re.compile(r"^(\*{0,2}\w+(?:, *\*{0,2}\w+)*)(?: \([^)]*\))?:")


def names_of(table: ModuleType) -> list[str]:
    """What a contents table exports: `__all__`, or its redundant `as` imports."""
    if hasattr(table, "__all__"):
        return list(table.__all__)
    assert table.__file__
    tree = ast.parse(Path(table.__file__).read_text())
    return [
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if alias.asname is not None and not alias.asname.startswith("_")
    ]


def public() -> Iterator[tuple[str, Any]]:
    """Each public function and class that Sortal itself defines, under its name."""
    for table in TABLES:
        if importlib.util.find_spec(table) is None:
            continue
        module = importlib.import_module(table)
        for name in names_of(module):
            thing = getattr(module, name)
            ours = getattr(thing, "__module__", "").startswith("sortal")
            ours = ours and get_origin(thing) is None  # an annotation has no docstring
            if ours and (inspect.isclass(thing) or callable(thing)):
                yield f"{table}.{name}", thing


def own_doc(thing: Any) -> str:
    """The docstring that was written for it, not one inherited or generated."""
    doc = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    generated = dataclasses.is_dataclass(thing) and (doc or "").startswith(
        f"{getattr(thing, '__name__', '')}("
    )
    return "" if not doc or generated else inspect.cleandoc(doc)


def documented(doc: str) -> set[str] | None:
    """The names in the `Args:` section of a cleaned docstring; None without one."""
    section = SECTION.search(doc)
    if section is None:
        return None
    lines = []
    for line in doc[section.end() :].splitlines():
        if line and not line.startswith(" "):
            break
        lines.append(line)
    body = inspect.cleandoc("\n" + "\n".join(lines)).splitlines()
    entries = [m for line in body if (m := ENTRY.match(line))]
    return {n.strip() for m in entries for n in m.group(1).split(",")}


def accepted(function: Any) -> set[str]:
    """The names of a signature, starred as in a docstring; private ones left out."""
    stars = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    return {
        stars.get(p.kind, "") + name
        for name, p in inspect.signature(function).parameters.items()
        if name not in {"self", "cls"} and not name.startswith("_")
    }


def difference(doc: str, function: Any) -> str:
    """How an `Args:` section and a signature disagree; empty where they do not."""
    told = documented(doc)
    if told is None:
        return ""
    real = accepted(function)
    rows = [f"documents {n}, which it does not take" for n in sorted(told - real)]
    rows += [f"takes {n}, which it does not document" for n in sorted(real - told)]
    return "; ".join(rows)


def methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public functions and properties that the class body itself defines."""
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        elif isinstance(member, property):
            member = member.fget
        if inspect.isfunction(member) and member.__module__.startswith("sortal"):
            yield name, member


def inherits_doc(cls: type, name: str) -> bool:
    """Whether a base class says what the method of this name does."""
    return any(getattr(vars(b).get(name), "__doc__", None) for b in cls.__mro__[1:])


PUBLIC = dict(public())
CLASSES = {name: thing for name, thing in PUBLIC.items() if inspect.isclass(thing)}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring_of_its_own(name: str) -> None:
    assert own_doc(PUBLIC[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_documented_arguments_are_those_of_the_signature(name: str) -> None:
    assert not difference(own_doc(PUBLIC[name]), PUBLIC[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example(name: str) -> None:
    thing = PUBLIC[name]
    if inspect.isclass(thing) and issubclass(thing, Exception):
        pytest.skip("an error is shown by the examples and tests of what raises it")
    assert (">>>" in own_doc(thing)) != (name in NO_EXAMPLE)


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_method_says_what_it_does_and_takes(name: str) -> None:
    cls = CLASSES[name]
    silent = [m for m, f in methods(cls) if not f.__doc__ and not inherits_doc(cls, m)]
    wrong = {
        m: d
        for m, f in methods(cls)
        if (d := difference(inspect.cleandoc(f.__doc__ or ""), f))
    }
    assert not silent
    assert not wrong


def test_every_exemption_is_of_a_public_name_and_has_a_reason() -> None:
    assert set(NO_EXAMPLE) <= set(PUBLIC)
    assert all(NO_EXAMPLE.values())


def test_contents_tables_are_read() -> None:
    assert {"sortal.Module", "sortal.Param", "sortal.split"} <= set(PUBLIC)
    assert "sortal._engine.annotations" not in PUBLIC


# The checks, on things made to fail them. ---------------------------------------------


def _sample(a: int, *rest: int, flag: bool = False, _hidden: int = 0, **more: int):
    """Does nothing.

    Args:
      a: the first, with
        an indented line: that is no entry.
      *rest (tuple): others.
      flag: note: a colon.
      **more: and more.

    Returns:
      wrong: nothing.
    """


def test_a_section_that_fits_its_signature_is_accepted() -> None:
    assert documented(own_doc(_sample)) == {"a", "*rest", "flag", "**more"}
    assert difference(own_doc(_sample), _sample) == ""


def test_missing_and_invented_arguments_are_both_named() -> None:
    def function(a: int, b: int) -> None:
        """Does nothing.

        Arguments:
          a, c: the first and one that is not there.
        """

    assert difference(own_doc(function), function) == (
        "documents c, which it does not take; takes b, which it does not document"
    )


def test_inherited_and_generated_docstrings_do_not_count() -> None:
    class Base:
        """Said here."""

    class Child(Base):
        pass

    @dataclasses.dataclass
    class Generated:
        x: int

    assert own_doc(Base) == "Said here."
    assert own_doc(Child) == ""
    assert own_doc(Generated) == ""


def test_methods_of_a_class_are_found_in_every_form() -> None:
    class Sample:
        def plain(self) -> None: ...
        @staticmethod
        def still() -> None: ...
        @classmethod
        def made(cls) -> None: ...
        @property
        def seen(self) -> None: ...
        def _own(self) -> None: ...

    for member in vars(Sample).values():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if inspect.isfunction(function):
            function.__module__ = "sortal.sample"
    assert [name for name, _ in methods(Sample)] == ["plain", "still", "made", "seen"]
