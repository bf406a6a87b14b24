"""What is said about the package outside of its source agrees with it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import sortal
from sortal.inspect import cli

ROOT = Path(__file__).parents[1]
BLOCK = re.MULTILINE | re.DOTALL


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", text, re.MULTILINE) == [sortal.__version__]


def test_python_m_sortal_is_the_command() -> None:
    command = [sys.executable, "-m", "sortal", "--version"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == f"sortal {cli.version()}\n"


def test_what_the_readme_links_to_is_there_and_in_the_sdist() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = settings["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    readme = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=BLOCK)
    paths = re.findall(r'(?:\]\(|src="|srcset=")([^)#"]+)', readme)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert {"/" + path.partition("/")[0] for path in paths} <= set(listed)


def test_the_versions_in_the_readme_are_those_that_were_tested() -> None:
    readme, page = ((ROOT / x).read_text() for x in ("README.md", "docs/versions.md"))
    (table,) = re.findall(r"^\| Python \|.*?\n\n", page, BLOCK)
    assert f"<!-- `nox -s versions` writes this table -->\n\n{table}" in readme
