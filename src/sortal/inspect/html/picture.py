"""``show``: a picture of a model or a file, as a page of HTML."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sortal._engine.tables import size
from sortal.inspect.html.page import data_of, page
from sortal.inspect.html.source import source_of


class Picture:
    """A page that shows a model by kind; notebooks show it in place.

    Attributes:
      html: the whole page, one document that fetches nothing.
      summary: what it shows, in one line.
    """

    def __init__(self, html: str, summary: str):
        self.html = html
        self.summary = summary

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page to a file.

        Args:
          path: the file, such as ``model.html``; one that is there is replaced.
        """
        Path(path).write_text(self.html, encoding="utf-8", newline="\n")

    def __repr__(self) -> str:
        return f"Picture({self.summary}; write it with .save('model.html'))"

    def _repr_html_(self) -> str:
        # A document of its own, which has no access to the notebook around it.
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" sandbox="allow-scripts" '
            f'title="{html.escape(self.summary)}" style="width:100%;height:720px;'
            'border:1px solid #8886;border-radius:8px"></iframe>'
        )


def show(
    model: Any,
    other: Any = None,
    /,
    *,
    mesh: Mesh | None = None,
    policy: Any = None,
    rules: Any = (),
    values: bool = True,
    title: str | None = None,
    step: int | str = "latest",
) -> Picture:
    """A page that shows a model by kind: a tree, filters to try, numbers, a treemap.

    Args:
      model: a Module, real or abstract, of Sortal or Flax; an Optimizer, a State, or a
        container of these. Or the path of a file: a checkpoint of Sortal or Orbax, a
        folder of Hugging Face, safetensors, NumPy or GGUF.
      other: the same again; the page then shows what changed from ``model`` to it.
      mesh: a mesh for the specs and bytes on a device; that of ``jax.set_mesh`` if
        absent, and without one they are where the arrays lie.
      policy: a Policy, or a mapping of filter to Rule, as for ``sharding_report``.
      rules: pairs of a name of an axis and a mesh axis; used where there is a mesh.
      values: whether arrays are read, for histograms and differences.
      title: the title of the page; the name of the class or file if absent.
      step: which step, in a folder of steps.

    Returns:
      A Picture: the last value of a notebook's cell is shown, and ``save`` writes it.

    Raises:
      NoCheckpointError: a path has nothing of a known format.
      StructureError: a static value in the model cannot be hashed.
      UnsupportedError: Jinja2 is not installed.

    Example:
      >>> import tempfile
      >>> import sortal
      >>> picture = sortal.show(sortal.Linear(2, 3, rngs=sortal.Rngs(0)))
      >>> picture
      Picture(Linear: 2 leaves, 36 B; write it with .save('model.html'))
      >>> picture.save(tempfile.mkdtemp() + "/model.html")
    """
    sharding = {"mesh": mesh, "policy": policy, "rules": rules}
    source = source_of(model, step, sharding)
    against = None if other is None else source_of(other, step, sharding)
    data = data_of(source, against, values, title)
    total = size(sum(item.bytes for item in source.items))
    leaves = f"{len(source.items):,} lea{'f' if len(source.items) == 1 else 'ves'}"
    return Picture(page(data), f"{data['title']}: {leaves}, {total}")
