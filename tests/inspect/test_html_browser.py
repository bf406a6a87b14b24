"""The page in a browser: what a reader does with it works, and nothing is fetched."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import sortal
from sortal.demo import digits, smollm2

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None,
        reason="the package playwright is not installed here",
    ),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed here"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM, args=ARGUMENTS, headless=True
        )
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, tmp_path) -> Iterator[Any]:
    """Opens the page of a picture; says at the end that nothing went wrong in it."""
    noise: list[str] = []
    opened: list[Any] = []

    def open_page(picture: Any, **options: Any) -> Any:
        picture.save(tmp_path / "page.html")
        address = (tmp_path / "page.html").as_uri()
        page = browser.new_page(**options)
        page.set_default_timeout(10_000)
        page.on("console", lambda m: noise.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: noise.append(str(e)))
        page.on("dialog", lambda d: noise.append(f"dialog {d.message}"))
        page.on("request", lambda r: r.url == address or noise.append(r.url))
        page.goto(address)
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.close()
    assert noise == []


@pytest.fixture(scope="module")
def both() -> Any:
    """The digits model and its optimizer."""
    return digits.build(0, 100)[:2]


def rows(page: Any) -> list[str]:
    """The names of the rows that are shown."""
    return page.locator(".row .name .text").all_inner_texts()


def row(page: Any, name: str) -> Any:
    return page.locator(".row", has=page.locator(f".text:text-is('{name}')")).first


def count(page: Any, text: str) -> int:
    """How many leaves the page says that a filter takes."""
    page.fill("#filter", text)
    return int(page.get_attribute("#answer", "data-count"))


def test_the_page_of_the_digits_model(visit, both):
    page = visit(sortal.show(both, title="Digits"))
    assert page.inner_text("h1") == "Digits"

    page.click("#fold")
    assert rows(page) == ["0", "1"]
    row(page, "0").click()
    page.keyboard.press("ArrowRight")
    assert rows(page)[:3] == ["0", "blocks", "dropout"]
    page.keyboard.press("ArrowRight")
    selected = page.get_attribute("#tree", "aria-activedescendant")
    assert page.get_attribute(f"#{selected}", "aria-expanded") == "false"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert rows(page) == ["0", "1"]

    for text, wanted in {
        "Param": sortal.Param,
        'Param & At("**.kernel")': sortal.Param & sortal.At("**.kernel"),
        "digits.BatchStat": digits.BatchStat,
        'sortal.BatchStat | Under("1.opt_state")': (
            sortal.BatchStat | sortal.Under("1.opt_state")
        ),
        "Not(Variable)": sortal.Not(sortal.Variable),
    }.items():
        assert count(page, text) == len(sortal.state(both, wanted).paths()), text
    page.fill("#filter", "BatchStat")
    assert page.inner_text("#answer") == (
        "2 kinds are called BatchStat: write sortal.BatchStat or "
        "sortal.demo.digits.BatchStat"
    )
    page.fill("#filter", "Param")
    page.check("#only")
    page.click("#unfold")
    assert set(page.locator(".row .chip").all_inner_texts()) == {"Param"}

    page.fill("#filter", 'At("0.head.kernel")')
    row(page, "kernel").click()
    assert page.inner_text("#detail h2") == "0.head.kernel"
    assert "smallest" in page.inner_text("#detail")
    assert page.locator("#detail .histogram rect").count() > 20


def test_the_theme_is_that_of_the_system_until_it_is_switched(visit):
    picture = sortal.show(sortal.Linear(2, 3, rngs=sortal.Rngs(0)))
    page = visit(picture, color_scheme="dark")
    back = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(back)
    page.click("#theme")
    light = page.evaluate(back)
    assert (dark, light) == ("rgb(20, 22, 27)", "rgb(251, 251, 252)")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(back) == light


def test_the_page_of_smollm2(visit):
    try:
        model, _ = smollm2.load()
    except ModuleNotFoundError as e:
        pytest.skip(f"{e.name}, which the weights need, is not installed")
    page = visit(sortal.show(model, title="SmolLM2-135M"))
    assert page.inner_text("#summary").startswith("272 leaves")
    for text, wanted in {
        'At("**.kernel")': sortal.At("**.kernel"),
        'Param & ~Under("blocks")': sortal.Param & ~sortal.Under("blocks"),
        'Under("blocks.1*")': sortal.Under("blocks.1*"),
    }.items():
        assert count(page, text) == len(sortal.state(model, wanted).paths()), text
    page.click("#clear")
    page.click("#unfold")
    # Of what is unfolded only what can be seen is in the page.
    assert 20 < len(rows(page)) < 100
    page.press("#tree", "End")
    assert rows(page)[-1] == "scale"
    page.click("#fold")
    row(page, "embed").click()
    page.keyboard.press("ArrowRight")
    page.click(".badge.tie")
    assert page.inner_text("#detail h2") == "head.table"

    page.click("#tab-map")
    label = "embed, 1 leaf, 113.2 MB, 21% of all bytes"
    assert page.get_by_role("button", name=label, exact=True).count() == 1
    page.click("#by-kind")
    assert page.locator("#map g").count() > 3
    page.locator("#map g").first.focus()
    page.keyboard.press("Enter")
    assert "Param" in page.inner_text("#crumbs")
    page.keyboard.press("Escape")
    assert page.inner_text("#crumbs").startswith("all")


def test_a_tied_weight_leads_to_its_other_places(visit):
    shared = sortal.Param(jnp.ones((2, 3)))
    filler = {f"x{n}": sortal.Param(jnp.ones(1)) for n in range(200)}
    page = visit(
        sortal.show({"embed": {"w": shared}, "fill": filler, "head": [shared]})
    )
    page.click("#fold")
    row(page, "embed").click()
    page.keyboard.press("ArrowRight")
    page.click(".badge.tie")
    assert page.inner_text("#detail h2") == "head.0"
    page.get_by_role("button", name="embed.w", exact=True).click()
    assert page.inner_text("#detail h2") == "embed.w"
    page.keyboard.press("Enter")
    assert page.inner_text("#detail h2") == "head.0"
    assert count(page, "Param") == 201


def test_arrays_in_no_variable_are_one_kind_that_filters_tell_apart(visit):
    layer = {"j": jnp.ones(2), "n": np.ones(2)}
    page = visit(sortal.show({"a": layer, "b": layer}))
    assert page.locator("#kinds b").all_inner_texts() == ["unlabelled array"]
    page.click("#kinds button")
    assert page.get_attribute("#answer", "data-count") == "2"
    assert (count(page, "jax.Array"), count(page, "np.ndarray")) == (1, 1)
    page.fill("#filter", "")
    page.click("#unfold")
    assert "shared" in row(page, "b").inner_text()


def test_two_models_and_what_changed(visit):
    old = {"a": sortal.Param(jnp.zeros(2)), "gone": sortal.BatchStat(jnp.ones(2))}
    new = {"a": sortal.Param(jnp.array([0.0, 0.25])), "new": sortal.Param(jnp.ones(2))}
    page = visit(sortal.show(old, new))
    page.click("#tab-changes")
    text = page.inner_text("#panel-changes")
    assert "3 differences" in text
    assert "0.25" in text
    page.click("#panel-changes button.path")
    assert page.inner_text("#detail h2") == "a"
    assert "largest difference" in page.inner_text("#detail")


def test_a_notebook_shows_the_page_in_a_frame_that_may_do_nothing_else(
    browser, tmp_path
):
    picture = sortal.show({"w": sortal.Param(jnp.ones(2))}, title="In a notebook")
    frame = f"<!doctype html><title>notebook</title>{picture._repr_html_()}"
    (tmp_path / "notebook.html").write_text(frame, encoding="utf-8")
    page = browser.new_page()
    noise: list[str] = []
    page.on("console", lambda m: noise.append(m.text))
    page.goto((tmp_path / "notebook.html").as_uri())
    inside = page.frame_locator("iframe")
    inside.locator("#theme").click()
    assert inside.locator("h1").inner_text() == "In a notebook"
    assert inside.locator("#summary").inner_text().startswith("1 leaf")
    page.close()
    assert noise == []


def test_hostile_names_are_text(visit):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    page = visit(sortal.show({evil: {evil: sortal.Param(1.0, tag=evil)}}, title=evil))
    page.click("#unfold")
    assert page.inner_text("h1") == evil
    page.get_by_role("treeitem").last.click()
    assert evil in page.inner_text("#detail h2")
    page.click("#tab-map")
    assert page.locator("img").count() == 0


def test_of_ten_thousand_leaves_those_in_sight_are_drawn(visit):
    leaf = np.ones(2, np.float32)
    blocks = [{f"w{k}": sortal.Param(leaf) for k in range(10)} for _ in range(1000)]
    page = visit(sortal.show({"blocks": blocks}))
    page.click("#unfold")
    assert page.inner_text("#summary").startswith("10,000 leaves")
    assert len(rows(page)) < 100
    assert count(page, 'At("blocks.*7.w*")') == 1000
    assert page.evaluate("document.querySelectorAll('*').length") < 2000


CONTRAST = """
() => {
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const parts = rgba(colour).slice(0, 3).map((x) => x / 255);
    const [r, g, b] = parts.map((x) => (x > 0.04 ? ((x + 0.055) / 1.055) ** 2.4 : x / 12.92));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (let x = e; x; x = x.parentElement) {
      const group = x.tagName === "g" ? getComputedStyle(x.querySelector("rect")).fill : null;
      const colour = group ?? getComputedStyle(x).backgroundColor;
      if (rgba(colour)[3] === 255) return colour;
    }
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const box = e.getBoundingClientRect();
    if (!own || !box.width || ["SCRIPT", "NOSCRIPT", "title"].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const text = light(e.tagName === "text" ? style.fill : style.color);
    const [a, b] = [text, light(behind(e))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), `${e.tagName} ${e.className.baseVal ?? e.className}: ${e.textContent}`]);
  }
  return found.sort((x, y) => x[0] - y[0]);
}
"""  # noqa: E501


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(visit, theme):
    kinds = [type(f"Kind{n}", (sortal.Variable,), {}) for n in range(24)]
    built_in = [sortal.Param, sortal.BatchStat, sortal.Cache, sortal.RngCount]
    model = {k.__name__: [k(jnp.arange(9.0))] for k in [*kinds, *built_in]}
    model["nan"] = [sortal.Param(jnp.array([jnp.nan, 1.0])), np.ones(3)]
    other = {**model, "more": sortal.Param(1.0), "nan": [np.ones(1), np.ones(1)]}
    page = visit(
        sortal.show(model, other),
        color_scheme=theme,
        viewport={"width": 1360, "height": 2200},
    )
    page.click("#unfold")
    for text in ("Param | Under('Kind*.0')", "~~", "..."):
        page.fill("#filter", text)
        page.locator(".row.leaf").nth(3).click()
        least, where = page.evaluate(CONTRAST)[0]
        assert least >= 4.5, where
    for tab in ("map", "changes"):
        page.click(f"#tab-{tab}")
        least, where = page.evaluate(CONTRAST)[0]
        assert least >= 4.5, where


@pytest.mark.parametrize("width", [360, 1360])
def test_nothing_is_wider_than_the_screen(visit, both, width):
    picture = sortal.show(both, both[0])
    page = visit(picture, viewport={"width": width, "height": 800})
    for tab in ("tree", "map", "changes"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
