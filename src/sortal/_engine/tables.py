"""Tables of text for terminals, pipes and notebooks; rich is imported to draw them."""

from __future__ import annotations

import io
import math
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


# ------------------------------------------------------------------ numbers
def nbytes(x: Any) -> int:
    """The bytes of an array, real or abstract, or of a number; of other objects 0.

    Example:
      >>> import numpy as np
      >>> nbytes(np.ones((2, 3), np.float16)), nbytes(1.5), nbytes("text")
      (12, 4, 0)
    """
    dtype, shape = getattr(x, "dtype", None), getattr(x, "shape", None)
    if dtype is not None and shape is not None:
        return math.prod(shape) * dtype.itemsize
    if isinstance(x, (bool, int, float, complex)):
        import jax.numpy as jnp

        return jnp.result_type(x).itemsize
    return 0


def size(count: int) -> str:
    """A number of bytes with a unit.

    Example:
      >>> size(512), size(20_480), size(3 * 10**9)
      ('512 B', '20.5 kB', '3.0 GB')
    """
    if count < 1000:
        return f"{count} B"
    scaled, units = float(count), iter("kMGTPE")
    for unit in units:
        scaled /= 1000
        if scaled < 999.95 or unit == "E":
            break
    return f"{scaled:.1f} {unit}B"
