"""Checks of releases: `pipx run nox -s package`, and `-s versions`.

`package` builds what would be published and tries it as a stranger would. `versions`
runs tests under each supported Python with the oldest and newest JAX and Flax, and
writes docs/versions.md and the table in the README from what it found; `-s versions --
--whole` runs the whole suite each time. A Python that is not installed is passed over,
and nox says so.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["package"]
nox.options.default_venv_backend = "uv|virtualenv"

ROOT = Path(__file__).parent
BUILD = ROOT / "build"
CELLS = BUILD / "versions"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
JAX = ("jax==0.10.0", "jax")
FLAX = ("flax==0.12.7", "flax")
"""Older ones read names that JAX 0.10 lacks (to 0.12.2) or deprecates (to 0.12.6)."""
QUICK = (
    "tests/test_functional.py",
    "tests/test_filters.py",
    "tests/test_module.py",
    "tests/engine/test_jax_compat.py",
    "tests/engine/test_state.py",
    "tests/transforms/test_compile.py",
    "tests/training/test_optimizer.py",
    "tests/nn/test_linear.py",
    "tests/checkpoint/test_saving.py",
    "tests/interop/test_flax.py",
    "tests/interop/test_tree_mode.py",
)
"""What a cell runs unless `--whole` is given: a file for each room of the source."""
MARK = "<!-- `nox -s versions` writes this table -->\n\n"
"""Where in the README the table stands."""


# ----------------------------------------------------------------------- packages
@nox.session
def package(session: nox.Session) -> None:
    """Builds wheel and sdist, checks both, and runs the demo from the wheel."""
    session.install("build", "twine", "cffconvert")
    session.run("cffconvert", "--validate", "-i", "CITATION.cff")
    out = BUILD / "package"
    shutil.rmtree(out, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(out), silent=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    session.run("twine", "check", "--strict", str(wheel), str(sdist))
    missing = [*lacks_of_wheel(wheel), *lacks_of_sdist(sdist)]
    if missing:
        session.error("not as they should be:\n  " + "\n  ".join(missing))
    elsewhere = Path(session.create_tmp()).resolve()
    empty = elsewhere / "empty"
    session.run("python", "-m", "venv", "--clear", str(empty))
    python = str(empty / "bin" / "python")
    session.run(python, "-m", "pip", "install", "-q", f"{wheel}[demo]", external=True)
    with session.chdir(elsewhere):  # so that no file of the repository can help
        session.run(python, "-m", "sortal", "--version", external=True)
        demo = [str(empty / "bin" / "sortal"), "demo", "--quiet", "--epochs", "3"]
        session.run(*demo, external=True)


def lacks_of_wheel(wheel: Path) -> list[str]:
    """Files of the source that the wheel lacks, and files that are none of its."""
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    kept = [p for p in (source / "sortal").rglob("*") if p.is_file()]
    due = {
        p.relative_to(source).as_posix() for p in kept if "__pycache__" not in p.parts
    }
    strange = {n for n in names - due if ".dist-info/" not in n}
    licenses = [n for n in names if n.endswith(".dist-info/licenses/LICENSE")]
    return [
        *(f"{name} is not in the wheel" for name in sorted(due - names)),
        *(f"{name} is in the wheel" for name in sorted(strange)),
        *([] if licenses else ["the wheel has no LICENSE"]),
    ]


def lacks_of_sdist(sdist: Path) -> list[str]:
    """What the tests need and the sdist lacks."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    due = {"LICENSE", "README.md", "CITATION.cff", "run", "noxfile.py"}
    for folder in ("src", "tests", "docs", "examples", "benchmarks"):
        due |= {p.relative_to(ROOT).as_posix() for p in files(ROOT / folder)}
    return [f"{name} is not in the sdist" for name in sorted(due - names)]


def files(folder: Path) -> list[Path]:
    """The files below a folder that were not made by running something."""
    made = {"__pycache__", ".hypothesis"}
    return [p for p in folder.rglob("*") if p.is_file() and not made & set(p.parts)]


# ----------------------------------------------------------------------- versions
@nox.session(python=PYTHONS)
@nox.parametrize("flax", FLAX, ids=("oldest-flax", "newest-flax"))
@nox.parametrize("jax", JAX, ids=("oldest-jax", "newest-jax"))
def versions(session: nox.Session, jax: str, flax: str) -> None:
    """Runs tests with one set of versions, and writes the table."""
    found = {"python": session.python, "jax": jax, "flax": flax}
    whole = "--whole" in session.posargs
    try:
        extra = ".[test]" if whole else ".[demo,export]"
        more = () if whole else ("pytest>=9", "hypothesis>=6.130", "safetensors")
        session.install(extra, jax, flax, *more)
    except nox.command.CommandFailed:
        keep(found | {"result": "cannot be installed together"})
        return
    asked = "import importlib.metadata as m, platform as p; print(p.python_version(), "
    asked += "m.version('jax'), m.version('flax'))"
    said = str(session.run("python", "-c", asked, silent=True)).split()
    found |= dict(zip(("python", "jax", "flax"), said[-3:], strict=True))
    tests = () if whole else QUICK
    report = CELLS / "report.xml"
    CELLS.mkdir(parents=True, exist_ok=True)
    session.run(
        *("python", "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(f"--junitxml={report}", *tests),
        success_codes=[0, 1, 2],  # failures, and files that cannot be imported
    )
    keep(found | {"result": outcome(report), "whole": whole})


def outcome(report: Path) -> str:
    """How many tests passed and failed, in words."""
    from xml.etree import ElementTree as ET

    suite = next(ET.parse(report).getroot().iter("testsuite"))
    count = {
        k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")
    }
    bad = count["failures"] + count["errors"]
    passed = count["tests"] - bad - count["skipped"]
    return f"{bad} of {passed + bad} failed" if bad else f"{passed} passed"


def keep(cell: dict[str, object]) -> None:
    """Keeps one cell's result, and writes the page of all that there are."""
    day = dt.datetime.now(dt.UTC).date().isoformat()
    name = "-".join(str(cell[k]).replace("=", "") for k in ("python", "jax", "flax"))
    CELLS.mkdir(parents=True, exist_ok=True)
    (CELLS / f"{name}.json").write_text(json.dumps(cell | {"day": day}))
    cells = [json.loads(p.read_text()) for p in sorted(CELLS.glob("*.json"))]
    (ROOT / "docs" / "versions.md").write_text(page(cells))
    readme = ROOT / "README.md"
    before, mark, after = readme.read_text().partition(MARK)
    rest = after.partition("|\n\n")[2]
    readme.write_text(f"{before}{mark}{table(cells)}\n{rest}")


def table(cells: list[dict[str, object]]) -> str:
    """What was tested, in a row for each cell."""
    columns = ("python", "jax", "flax", "result", "day")
    rows = ["| " + " | ".join(str(c[k]) for k in columns) + " |\n" for c in cells]
    heading = "| Python | JAX | Flax | tests | day |\n|---|---|---|---|---|\n"
    return heading + "".join(rows)


def page(cells: list[dict[str, object]]) -> str:
    """The page of tested versions."""
    quick = "\n".join(f"- `{test}`" for test in QUICK)
    return (
        "# Versions tested\n\n"
        "Written by `nox -s versions`, each row in an environment of its own: the "
        "oldest and newest JAX and Flax that Sortal supports, under each Python. "
        "`cannot be installed together` is pip's answer where JAX or Flax have no such "
        "release for that Python.\n\n"
        f"{table(cells)}\n"
        "A row runs these files, and the whole suite with `nox -s versions -- --whole`:"
        f"\n\n{quick}\n"
    )
