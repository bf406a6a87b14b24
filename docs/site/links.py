"""Finds what is broken on a built site: links, anchors, and anything from elsewhere."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src"}
"""What a browser fetches by itself, and the attribute that says from where."""
NOT_FETCHED = {"canonical", "next", "prev", "alternate", "home"}


class Page(HTMLParser):
    """The links, anchors and loaded files of one page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = {"", "__nothing"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser for each element."""
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        address = found.get(LOADS.get(tag, ""), "")
        if address and found.get("rel") not in NOT_FETCHED:
            self.loads.append(address)


def broken(site: Path) -> list[str]:
    """Each link of a built site that leads nowhere, in words.

    Args:
      site: the folder of the built site.

    Returns:
      A sentence for each: a file or an anchor that is not there, and whatever a page
      loads from another host. Links to other hosts are not followed.
    """
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for address in [*page.links, *page.loads]:
            why = _wrong(path, address, pages, loads=address in page.loads)
            found += [f"{path.relative_to(site)}: {address} {why}"] if why else []
    return found


def _wrong(path: Path, address: str, pages: dict[Path, Page], *, loads: bool) -> str:
    parts = urlsplit(address)
    if parts.scheme in {"data", "mailto", "javascript"}:
        return ""
    if parts.scheme or parts.netloc:
        return "is loaded from another host" if loads else ""
    if path.name == "404.html":  # served at any depth: its addresses begin at the root
        return ""
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    if not target.exists():
        return "is not there"
    anchor = unquote(parts.fragment)
    if target in pages and anchor not in pages[target].anchors:
        return f"has no anchor {anchor!r}"
    return ""


if __name__ == "__main__":
    print("\n".join(broken(Path(sys.argv[1]).resolve())))
