"""Late names are those of the contents tables, and are read when asked for."""

from __future__ import annotations

import ast
import importlib.metadata
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sortal
from sortal import _late as late
from sortal import _nnx_names as nnx_names
from sortal import nnx

PACKAGES = {"sortal": (sortal, late.TABLE), "sortal.nnx": (nnx, nnx_names.TABLE)}
NAMES = [(p, name) for p, (_, table) in PACKAGES.items() for name in table]


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
    module, table = PACKAGES[package]
    assert seen_by_type_checkers(module) == table


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_a_late_name_is_what_its_file_has(package: str, name: str) -> None:
    module, table = PACKAGES[package]
    found, full = getattr(module, name), table[name]
    assert found is pkgutil.resolve_name(full)
    assert getattr(module, name) is found
    assert name in dir(module)


@pytest.mark.parametrize("package", PACKAGES)
def test_an_unknown_name_is_an_attribute_error(package: str) -> None:
    module, _ = PACKAGES[package]
    with pytest.raises(
        AttributeError, match=f"module '{package}' has no attribute 'sav'"
    ):
        _ = module.sav


def test_every_file_can_be_the_first_that_is_asked_for() -> None:
    code = """
import importlib, sys
import jax
import sortal
for file in sorted({full.rpartition(".")[0] for full in sortal._late.TABLE.values()}):
    for name in [n for n in sys.modules if n.partition(".")[0] == "sortal"]:
        del sys.modules[name]
    importlib.import_module(file)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_read_before_it_is_asked_for() -> None:
    code = (
        "import sys\n"
        "def read(): return {n for n in sys.modules if n.startswith('sortal.')}\n"
        "import sortal\n"
        "assert 'sortal._engine.variable' not in read()\n"
        "from sortal import save, nnx\n"
        "assert sortal.checkpoint is sys.modules['sortal.checkpoint']\n"
        "assert not {n for n in read() if n.startswith('sortal.nn.')}\n"
        "mine = {n for n in read() if n.startswith('sortal.nnx.')}\n"
        "mine = {n.removeprefix('sortal.nnx.') for n in mine}\n"
        "assert mine == {'added', 'annotated', 'flax_errors', 'keywords', "
        "'old_names', 'state_names'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_that_of_the_installed_package() -> None:
    assert sortal.__version__ == importlib.metadata.version("sortal")
