"""The site: it builds strictly, no link is broken, and a browser finds its way."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "site"
CHROMIUM = shutil.which("chromium")
# It must ask nobody for anything, not even for its own updates.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


def load(name: str) -> ModuleType:
    """A file of docs/site as a module."""
    if name == "build":
        pytest.importorskip("yaml", reason="needs mkdocs: pip install sortal[docs]")
    spec = importlib.util.spec_from_file_location(name, SITE / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site: built by the first test that asks, in whichever process."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs mkdocs: pip install sortal[docs]")
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    with (out.parent / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "done").exists():
            command = [sys.executable, str(SITE / "build.py"), "--out", str(out)]
            built = subprocess.run(command, check=False, capture_output=True, text=True)
            assert not built.returncode, built.stdout + built.stderr
            (out / "done").touch()
    return out / "site"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium."""
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


# ---------------------------------------------------------------------- the pages
def test_every_link_and_anchor_leads_somewhere(site: Path) -> None:
    assert load("links").broken(site) == []


def test_every_public_name_has_a_place_in_the_reference(site: Path) -> None:
    reference = load("reference")
    text = "".join(p.read_text() for p in (site / "reference").glob("*.html"))
    ours = [n.public for n in reference.names() if not reference._is_jax(n)]
    assert len(ours) > 200
    assert [name for name in ours if f'id="{name}"' not in text] == []


def test_every_page_is_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text()
    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.html")}
    absent = {page for page in pages - {"404.html"} if f'href="{page}"' not in home}
    # Of a section only the first page is linked from other sections.
    assert {page for page in absent if "/" not in page} <= {"index.html"}


def test_broken_links_of_each_sort_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="#here">.</a><a href="#gone">.</a>'
        '<a href="b.html">.</a><a href="c.html#top">.</a><a href="https://x.y/">.</a>'
        '<img src="no.png"><script src="https://x.y/z.js"></script>'
    )
    (tmp_path / "c.html").write_text("<h1 id='top'>C</h1>")
    assert sorted(load("links").broken(tmp_path)) == [
        "a.html: #gone has no anchor 'gone'",
        "a.html: b.html is not there",
        "a.html: https://x.y/z.js is loaded from another host",
        "a.html: no.png is not there",
    ]


def test_links_between_files_become_links_between_pages() -> None:
    build = load("build")
    docs, where = ROOT / "docs", build.sources()
    text = (
        "[a](../examples/lora.py) [b](sharding.md#presets) [c](../examples) [d](#e) "
        "[f](https://x.y/z) ![g](site/assets/model.svg) [h](../LICENSE)\n"
        "```\n[i](../examples/lora.py)\n```\n"
    )
    assert build.relink(text, docs / "how-to" / ".." / "x.md", "x.md", where) == (
        "[a](examples/lora.md) [b](sharding.md#presets) [c](examples/index.md) [d](#e) "
        "[f](https://x.y/z) ![g](assets/model.svg) [h](../LICENSE)\n"
        "```\n[i](../examples/lora.py)\n```\n"
    )


def test_the_navigation_has_every_page_once_and_none_that_is_not_there() -> None:
    build = load("build")
    nav = ["index.md", {"How": ["a.md", "gone.md", "*"]}, {"Learn": "learn/"}]
    every = {"index.md", "a.md", "b.md"}
    rest = every - set(build.listed(nav, every))
    found = build.navigation(nav, every, rest)
    assert found == ["index.md", {"How": ["a.md", "b.md"]}]
    every |= {"learn/2.md", "learn/1.md", "learn/index.md"}
    assert build.navigation(nav, every, {"b.md"})[-1] == {
        "Learn": ["learn/index.md", "learn/1.md", "learn/2.md"]
    }


def test_what_a_problem_gives_away_is_folded() -> None:
    build = load("build")
    text = "# P\n\n## Hints\n\n1. one\n\n## Solution\n\n```python\nx\n```\n"
    assert build.as_page(build.LEARN / "p.md", text) == (
        '# P\n\n??? tip "Hints"\n\n    1. one\n\n'
        '??? tip "Solution"\n\n    ```python\n    x\n    ```\n\n'
    )


def test_a_name_without_a_page_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load("reference")
    monkeypatch.setattr(reference, "SUBJECTS", reference.SUBJECTS[1:])
    with pytest.raises(ValueError, match=r"sortal._engine.annotations, which no"):
        reference.pages()


def test_the_pictures_are_what_the_model_does() -> None:
    for file, text in load("pictures").pictures().items():
        kept = (SITE / "assets" / file).read_text()
        assert kept == text, f"{file} differs; run: python {SITE}/pictures.py"


# -------------------------------------------------------------------- the browser
@pytest.fixture
def visit(browser: Any, site: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page on the start page; complaints and requests to anywhere are failures."""
    width, height = SIZES[request.param]
    context = browser.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(20_000)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    local = ("file:", "data:", "blob:", "about:")
    page.on(
        "request", lambda r: None if r.url.startswith(local) else wrong.append(r.url)
    )
    page.goto((site / "index.html").as_uri())
    yield page
    context.close()
    assert wrong == []


def fits(page: Any) -> bool:
    """Whether the page itself does not scroll sideways."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("visit", SIZES, indirect=True)
def test_a_visitor_clicks_from_start_to_tutorial_to_reference(visit: Any) -> None:
    assert fits(visit)
    text = visit.locator("article")
    text.get_by_role("link", name="Your first model").first.click()
    visit.wait_for_url("**/tutorials/first-model.html")
    assert text.locator("h1").inner_text().startswith("Your first model")
    assert fits(visit)
    text.get_by_role("link", name="transforms").click()
    visit.wait_for_url("**/reference/transforms.html")
    assert visit.locator("h2[id='sortal.jit']").is_visible()
    assert fits(visit)


@pytest.mark.parametrize("visit", SIZES, indirect=True)
def test_a_visitor_finds_a_name_by_searching(visit: Any) -> None:
    if visit.viewport_size["width"] < 600:
        visit.locator("label.md-header__button[for='__search']").click()
    field = visit.get_by_role("textbox", name="Search")
    field.press_sequentially("explain_retrace")
    page = ".md-search-result__item:has([href*='reference/transforms.html'])"
    visit.locator(page).first.wait_for()
    more = visit.locator(f"{page} summary")
    if more.is_visible():  # sections of one page beyond the first few are folded
        more.click()
    visit.locator(f"{page} [href*='#sortal.explain_retrace']").click()
    visit.wait_for_url("**/reference/transforms.html*#sortal.explain_retrace")
    assert visit.locator("h2[id='sortal.explain_retrace']").is_visible()


@pytest.mark.parametrize("visit", ["desktop"], indirect=True)
def test_a_visitor_switches_to_dark_colours(visit: Any) -> None:
    body = visit.locator("body")
    for _ in range(2):
        visit.locator("form[data-md-component='palette'] label:visible").click()
    assert body.get_attribute("data-md-color-scheme") == "slate"
    assert visit.locator("img[src*='model-dark']").is_visible()
    assert not visit.locator("img[src*='model-light']").is_visible()
