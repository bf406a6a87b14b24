"""Late names are those of the contents table, and are read when asked for."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sortal
from sortal import _late as late


def test_type_checkers_see_the_table_that_is_looked_up() -> None:
    tree = ast.parse(Path(sortal.__file__).read_text(encoding="utf-8"))
    (block,) = [x for x in tree.body if isinstance(x, ast.If)]
    seen = {a.asname: f"{x.module}.{a.name}" for x in block.body for a in x.names}
    names = {name: f"{file}.{name}" for name, file in late.TABLE.items()}
    assert seen == names | late.MODULES


@pytest.mark.parametrize("name", late.TABLE)
def test_a_late_name_is_what_its_file_has(name: str) -> None:
    found = getattr(sortal, name)
    assert found is getattr(importlib.import_module(late.TABLE[name]), name)
    assert name in dir(sortal)


@pytest.mark.parametrize("name", late.MODULES)
def test_a_late_module_is_read_under_its_own_name(name: str) -> None:
    assert getattr(sortal, name) is importlib.import_module(late.MODULES[name])
    assert name in dir(sortal)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sortal' has no attribute 'sav'"):
        _ = sortal.sav


def test_nothing_late_is_read_before_it_is_asked_for() -> None:
    code = (
        "import sys, sortal\n"
        "names = ('checkpoint.saving', 'decoding', 'inspect.text')\n"
        "assert not {f'sortal.{n}' for n in names} & set(sys.modules)\n"
        "remat = sortal.checkpoint\n"
        "assert remat is sortal.remat\n"
        "from sortal import save\n"
        "import sortal.checkpoint.manager\n"
        "assert sortal.checkpoint is remat\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
