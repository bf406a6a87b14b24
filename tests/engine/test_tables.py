"""Tables print the same text everywhere, and in colour where that is asked for."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sortal._engine.tables import Report, Table, drawn, html, plain

AGES = Table("Ages", ("who", "years>"), (("Ada", "36"), ("Bo", "7")), ("a note",))


class Ages(Report):
    def tables(self):
        return (AGES, AGES._replace(title="Again", notes=()))


def test_plain_text_aligns_words_left_and_numbers_right():
    assert str(Ages()).splitlines() == [
        "Ages",
        "who  years",
        "----------",
        "Ada     36",
        "Bo       7",
        "",
        "! a note",
        "",
        "Again",
        "who  years",
        "----------",
        "Ada     36",
        "Bo       7",
    ]
    assert repr(Ages()) == str(Ages()) == plain(*Ages().tables())


def test_a_long_cell_is_folded_at_80_columns_and_loses_nothing():
    text = plain(Table("t", ("a", "b"), (("x" * 100, "y" * 30),)))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("x") == 100
    assert text.count("y") == 30


def test_rich_draws_the_title_in_bold():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard")
    console.print(Ages())
    assert "\x1b[1mAges" in file.getvalue()
    assert file.getvalue().count("Ada") == 2


def test_a_cell_that_looks_like_markup_is_printed_as_it_is():
    file = io.StringIO()
    console = Console(file=file, color_system=None)
    console.print(drawn(Table("t", ("a",), (("[bold]x[/bold]",),))))
    assert "[bold]x[/bold]" in file.getvalue()


def test_html_is_one_element_with_its_text_escaped():
    text = html(Table("t", ("a",), (("<b>",),)))
    assert text.startswith("<pre")
    assert text.rstrip().endswith("</pre>")
    assert "&lt;b&gt;" in text
    assert Ages()._repr_html_().count("Ada") == 2


def test_notes_hang_beside_their_sign():
    text = plain(Table("t", ("a",), (("x",),), ("long " * 40,)))
    signs = [line[:3] for line in text.splitlines() if "long" in line]
    assert signs == ["! l", "  l", "  l"]


def test_a_report_must_say_what_its_tables_are():
    with pytest.raises(NotImplementedError):
        str(Report())
