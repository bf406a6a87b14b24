"""What all pictures are drawn with: colours for light and dark, and lines of text."""

from __future__ import annotations

from html import escape
from typing import NamedTuple

MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SANS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Arial, sans-serif"


class Colours(NamedTuple):
    """What a picture is drawn in; `kinds` are those of the pills."""

    paper: str
    line: str
    text: str
    faint: str
    kinds: dict[str, tuple[str, str]]
    """Background and text of each kind's name."""


LIGHT = Colours(
    "#ffffff",
    "#d8dee6",
    "#1d2733",
    "#5c6b7c",
    {
        "Param": ("#d7e6ff", "#0b4fae"),
        "BatchStat": ("#ffe6c4", "#8a4b00"),
        "Calls": ("#ffd9e4", "#a3174c"),
        "RngKey": ("#dcefe3", "#14663a"),
        "RngCount": ("#dcefe3", "#14663a"),
        "Cache": ("#e6dcf8", "#5b2a9d"),
        "LoRAParam": ("#ffd9e4", "#a3174c"),
        "OptVariable": ("#dfe5ec", "#3b4a5c"),
    },
)
DARK = Colours(
    "#171c24",
    "#333d4b",
    "#e8edf3",
    "#9aa9ba",
    {
        "Param": ("#1c3f74", "#cfe1ff"),
        "BatchStat": ("#5c3a0c", "#ffdfb0"),
        "Calls": ("#64203b", "#ffd0de"),
        "RngKey": ("#1d4a31", "#c5efd5"),
        "RngCount": ("#1d4a31", "#c5efd5"),
        "Cache": ("#43296f", "#e0d0ff"),
        "LoRAParam": ("#64203b", "#ffd0de"),
        "OptVariable": ("#37424f", "#d5dde7"),
    },
)


def words(
    x: float,
    y: float,
    text: str,
    fill: str,
    family: str,
    size: float,
    anchor: str = "start",
    weight: int = 400,
) -> str:
    """One line of text."""
    return (
        f'<text x="{x}" y="{y}" fill="{fill}" font-family="{family}" '
        f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )
