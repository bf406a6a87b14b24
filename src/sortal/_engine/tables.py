"""Tables of text for terminals, pipes and notebooks; rich is imported to draw them."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

_WIDTH = 80


class Table(NamedTuple):
    """Cells as text, to be drawn: a title, headings, rows of cells, and notes.

    A heading that ends in ``>`` aligns its column to the right, as for numbers.
    """

    title: str
    headings: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


class Report:
    """Base of what inspection returns: ``rows`` of data that print as tables.

    ``str`` and ``repr`` give text 80 columns wide without colour; rich and notebooks
    get coloured tables.
    """

    rows: tuple[Any, ...]

    def tables(self) -> tuple[Table, ...]:
        """The tables to draw."""
        raise NotImplementedError

    def __str__(self) -> str:
        return plain(*self.tables())

    __repr__ = __str__

    def __rich__(self) -> Any:
        return drawn(*self.tables())

    def _repr_html_(self) -> str:
        return html(*self.tables())


# ------------------------------------------------------------------ drawing
def drawn(*tables: Table) -> Any:
    """Tables as one thing for rich to print."""
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    parts: list[Any] = []
    for table in tables:
        gap = [Text("")] if parts else []
        parts += [*gap, Text(table.title, "bold"), _draw(table)]
        # A grid keeps the sign in a column of its own where a sentence wraps.
        notes = RichTable.grid(padding=(0, 1))
        for note in table.notes:
            notes.add_row(Text("!", "yellow"), Text(note, "yellow"))
        parts += [Text(""), notes] if table.notes else []
    return Group(*parts)


def _draw(table: Table) -> Any:
    from rich.box import Box
    from rich.table import Table as RichTable
    from rich.text import Text

    # Only characters that any terminal, pipe or log file can show.
    rule = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    made = RichTable(
        box=rule,
        header_style="dim",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in table.headings:
        number = heading.endswith(">")
        made.add_column(
            heading.rstrip(">"),
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=number,
        )
    for cells in table.cells:
        # Text, not str: a path such as table['a'] would be read as markup.
        made.add_row(*map(Text, cells))
    return made


def plain(*tables: Table) -> str:
    """Tables as text of 80 columns, without colour.

    Example:
      >>> print(plain(Table("Ages", ("who", "years>"), (("Ada", "36"),))))
      Ages
      who  years
      ----------
      Ada     36
    """
    from rich.console import Console

    file = io.StringIO()
    console = Console(
        file=file, width=_WIDTH, color_system=None, force_terminal=False, _environ={}
    )
    console.print(drawn(*tables))
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    return "\n".join(lines).strip("\n")


def html(*tables: Table) -> str:
    """Tables as HTML for a notebook."""
    from rich.console import Console

    console = Console(
        file=io.StringIO(), width=100, record=True, force_jupyter=False, _environ={}
    )
    console.print(drawn(*tables))
    # No colours of text and background are set, so that dark themes stay dark.
    return console.export_html(
        inline_styles=True,
        code_format="<pre style='line-height:1.3;white-space:pre'>{code}</pre>",
    )
