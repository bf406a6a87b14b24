"""Builds the site into build/site: `./run site`.

Pages come from docs/, from files that are kept elsewhere (the changelog, examples, the
course), and from the source's docstrings. They are gathered in build/pages, where each
relative link to a file of the repository becomes a link to that file's page. MkDocs
then builds them, strictly, and every link and anchor of the result is checked.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import links  # noqa: E402
import reference  # noqa: E402

ROOT = HERE.parents[1]
DOCS = ROOT / "docs"
LEARN = ROOT / "src" / "sortal" / "learn"
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "src/sortal/_engine/README.md": "engine.md",
}
"""Pages whose text lives outside of docs/."""

LISTED = {
    "decisions": "What was decided, why, and what follows from it.",
    "examples": "Whole programs, which the tests run.",
    "learn": "Problems to solve at a terminal, in order: `sortal learn` lists them "
    "with your progress, `sortal learn 4` writes a file to edit, and `sortal learn 4 "
    "--check file.py` judges it.",
}
"""Folders that have a page that lists the others, and what it says first."""

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")
FOLDED = re.compile(r"^## (Hints|Solution)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^( *```.*?^ *```) *$", re.MULTILINE | re.DOTALL)
SHIM = "https://unpkg.com/iframe-worker/shim"
"""What the plugin `offline` would load from elsewhere; a copy is in assets/."""


def main(argv: Sequence[str] | None = None) -> int:
    """Builds the site; the exit code is 1 if anything on it is broken.

    Args:
      argv: the command line; the process's own if absent.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(prog="./run site", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build", metavar="FOLDER")
    out = parser.parse_args(argv).out.resolve()
    pages, site = out / "pages", out / "site"
    for folder in (pages, site):
        shutil.rmtree(folder, ignore_errors=True)
    gather(pages)
    config = out / "mkdocs.yml"
    config.write_text(yaml.safe_dump(configuration(pages, site), sort_keys=False))
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f"]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    if subprocess.run([*command, str(config)], check=False, env=quiet).returncode:
        return 1
    localise(site)
    broken = links.broken(site)
    print("\n".join(broken) or f"every link of {site} leads somewhere")
    return 1 if broken else 0


# ------------------------------------------------------------------------- pages
def gather(pages: Path) -> None:
    """Writes every page and picture into one folder."""
    where = sources()
    for path, page in where.items():
        text = as_page(path, path.read_text())
        write(pages / page, relink(text, path, page, where))
    for name, text in reference.pages().items():
        write(pages / "reference" / name, text)
    for folder, what in LISTED.items():
        if (pages / folder).is_dir():
            write(pages / folder / "index.md", index(pages / folder, what))
    for picture in DOCS.rglob("*"):
        if picture.suffix in {".svg", ".png", ".css", ".js", ".html"}:
            shown = picture.relative_to(DOCS)
            shown = Path(*shown.parts[1:]) if shown.parts[0] == "site" else shown
            (pages / shown).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, pages / shown)


def sources() -> dict[Path, str]:
    """Each file that becomes a page, and the page's name."""
    found = {p: p.relative_to(DOCS).as_posix() for p in sorted(DOCS.rglob("*.md"))}
    found |= {ROOT / file: page for file, page in ELSEWHERE.items()}
    for example in sorted((ROOT / "examples").glob("*.py")):
        found[example] = f"examples/{example.stem}.md"
    # The course: whatever texts are there become pages.
    found |= {text: f"learn/{text.name}" for text in sorted(LEARN.rglob("*.md"))}
    return {path: page for path, page in found.items() if path.exists()}


def as_page(path: Path, text: str) -> str:
    """The Markdown of a file; a program becomes its docstring and its code.

    What a problem of the course would give away is folded.
    """
    if path.is_relative_to(LEARN):
        return FOLDED.sub(fold, text)
    if path.suffix != ".py":
        return text
    said = ast.get_docstring(ast.parse(text)) or ""
    head, _, rest = said.partition("\n")
    body = text.split('"""', 2)[2].lstrip("\n")
    name = path.relative_to(ROOT).as_posix()
    return f"# {head.rstrip('.')}\n\n{rest}\n\n```python title={name!r}\n{body}```\n"


def fold(section: re.Match[str]) -> str:
    """A section as a box that is closed until it is clicked."""
    inside = textwrap.indent(section.group(2).strip(), "    ")
    return f'??? tip "{section.group(1)}"\n\n{inside}\n\n'


def relink(text: str, path: Path, page: str, where: dict[Path, str]) -> str:
    """Turns links between files of the repository into links between pages."""

    def target(match: re.Match[str]) -> str:
        file = (path.parent / match.group(1)).resolve()
        if file in where:
            return os.path.relpath(where[file], Path(page).parent)
        if file.is_dir() and any(p.is_relative_to(file) for p in where):
            inside = next(w for p, w in where.items() if p.is_relative_to(file))
            return os.path.relpath(f"{Path(inside).parent}/index.md", Path(page).parent)
        if file.is_relative_to(HERE):  # assets: docs/site/assets is assets/
            return os.path.relpath(file.relative_to(HERE), Path(page).parent)
        return match.group(1)

    parts = FENCE.split(text)  # code stands at the odd places
    parts[::2] = [LINK.sub(target, part) for part in parts[::2]]
    return "".join(parts)


def index(folder: Path, what: str) -> str:
    """A page that lists the pages of its folder."""
    mark = "1." if folder.name == "learn" else "-"
    rows = [f"{mark} [{title(p)}]({p.name})" for p in sorted(folder.glob("*.md"))]
    return f"# {folder.name.title()}\n\n{what}\n\n" + "\n".join(rows) + "\n"


def title(page: Path) -> str:
    """The first heading of a page."""
    found = re.search(r"^# +(.*)$", page.read_text(), re.MULTILINE)
    return found.group(1).replace("`", "") if found else page.stem


def write(page: Path, text: str) -> None:
    """Writes a page and the folders above it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)


# ----------------------------------------------------------------- configuration
def configuration(pages: Path, site: Path) -> dict[str, Any]:
    """The settings in mkdocs.yml with places filled in, and the whole navigation."""
    text = (HERE / "mkdocs.yml").read_text()
    for mark, path in {
        "[SRC]": reference.SOURCE,
        "[EXTENSION]": HERE / "reading.py",
    }.items():
        text = text.replace(mark, f"[{str(path)!r}]")
    settings = yaml.safe_load(text)
    every = {p.relative_to(pages).as_posix() for p in pages.rglob("*.md")}
    rest = every - set(listed(settings["nav"], every))
    settings["nav"] = navigation(settings["nav"], every, rest)
    return settings | {"docs_dir": pages.name, "site_dir": site.name}


def listed(nav: Any, every: set[str]) -> list[str]:
    """The pages that a navigation names, those in its folders included."""
    if isinstance(nav, str):
        inside = [p for p in every if nav.endswith("/") and p.startswith(nav)]
        return inside or [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [page for value in values for page in listed(value, every)]


def navigation(nav: list[Any], every: set[str], rest: set[str]) -> list[Any]:
    """A navigation with folders and `*` written out, and absent pages left out."""
    found: list[Any] = []
    for entry in nav:
        if entry == "*":
            found += sorted(rest)
        elif isinstance(entry, str):
            found += [entry] if entry in every else []
        else:
            ((name, inside),) = entry.items()
            if isinstance(inside, list):
                inside = navigation(inside, every, rest)
            elif inside.endswith("/"):
                inside = in_order(inside, every)
            elif inside not in every:
                inside = None
            found += [{name: inside}] if inside else []
    return found


def in_order(folder: str, every: set[str]) -> list[str]:
    """The pages of a folder: the index, then by name or as the reference has them."""
    inside = [page for page in every if page.startswith(folder)]
    slugs = [f"reference/{subject.slug}.md" for subject in reference.SUBJECTS]
    place = {page: i for i, page in enumerate(slugs)}
    return sorted(
        inside, key=lambda p: (not p.endswith("index.md"), place.get(p, 0), p)
    )


def localise(site: Path) -> None:
    """Puts a copy on the site in the place of the one script loaded from elsewhere."""
    for page in site.rglob("*.html"):
        here = os.path.relpath(site / "assets" / "iframe-worker.js", page.parent)
        page.write_text(page.read_text().replace(SHIM, here))


if __name__ == "__main__":
    sys.exit(main())
