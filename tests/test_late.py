"""Late names are those of the contents tables, and are read when asked for."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sortal
from sortal import _late as late
from sortal import _nnx_names as nnx_names
from sortal import nnx

PACKAGES = {
    "sortal": (sortal, late.TABLE, late.MODULES),
    "sortal.nnx": (nnx, nnx_names.TABLE, nnx_names.MODULES),
}
NAMES = [(p, name) for p, (_, table, _) in PACKAGES.items() for name in table]
MODULES = [(p, name) for p, (_, _, modules) in PACKAGES.items() for name in modules]


def seen_by_type_checkers(package: ModuleType) -> dict[str, str]:
    """What a package imports for type checkers alone: name to what it stands for."""
    assert package.__file__
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = [x for x in tree.body if isinstance(x, ast.If)]
    found = [x for x in block.body if isinstance(x, ast.ImportFrom)]
    pairs = [(x.module, a) for x in found for a in x.names if a.name != "*"]
    return {a.asname or a.name: f"{module}.{a.name}" for module, a in pairs}


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_the_table_that_is_looked_up(package: str) -> None:
    module, table, modules = PACKAGES[package]
    names = {name: f"{file}.{name}" for name, file in table.items()}
    assert seen_by_type_checkers(module) == names | modules


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_a_late_name_is_what_its_file_has(package: str, name: str) -> None:
    module, table, _ = PACKAGES[package]
    found = getattr(module, name)
    assert found is getattr(importlib.import_module(table[name]), name)
    assert name in dir(module)


@pytest.mark.parametrize(("package", "name"), MODULES)
def test_a_late_module_is_read_under_its_own_name(package: str, name: str) -> None:
    module, _, modules = PACKAGES[package]
    assert getattr(module, name) is importlib.import_module(modules[name])
    assert name in dir(module)


@pytest.mark.parametrize("package", PACKAGES)
def test_an_unknown_name_is_an_attribute_error(package: str) -> None:
    module, _, _ = PACKAGES[package]
    with pytest.raises(
        AttributeError, match=f"module '{package}' has no attribute 'sav'"
    ):
        _ = module.sav


def test_nothing_late_is_read_before_it_is_asked_for() -> None:
    code = (
        "import sys, sortal\n"
        "names = ('checkpoint.saving', 'decoding', 'inspect.text', 'nnx')\n"
        "assert not {f'sortal.{n}' for n in names} & set(sys.modules)\n"
        "from sortal import save\n"
        "assert sortal.checkpoint is sys.modules['sortal.checkpoint']\n"
        "from sortal import nnx\n"
        "mine = {n for n in sys.modules if n.startswith('sortal.nnx.')}\n"
        "assert mine == {'sortal.nnx.keywords', 'sortal.nnx.old_names'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
