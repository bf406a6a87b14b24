"""Draws the picture of the start page and the README: `python docs/site/pictures.py`.

Nothing in it is drawn by hand: the rows are the leaves of a model, and the marks are
what one training step did to each. It is kept in assets/, so that building the site
needs no JAX, with the maps of gallery.py; tests/test_site.py draws all again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sortal as nnx
from sortal._engine.paths import show
from sortal.inspect import rows

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import gallery  # noqa: E402
from drawing import DARK, LIGHT, MONO, SANS, Colours, words  # noqa: E402

ASSETS = HERE / "assets"


class Calls(nnx.Variable):
    """A kind of one's own: how often the model was called."""


class Model(nnx.Module):
    """The model of the start page."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = [nnx.Linear(2, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)]
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.calls = Calls(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        x = self.dropout(nnx.relu(self.norm(self.layers[0](x))))
        return self.layers[1](x)


def columns() -> tuple[list[rows.LeafRow], dict[str, set[str]]]:
    """The model's leaves, and the paths that each part of one training step touches."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x = jnp.linspace(-1, 1, 64).reshape(32, 2)

    def values() -> dict[str, np.ndarray]:
        found = nnx.state(model).flat_state()
        return {show(p): np.asarray(jax.random.key_data(v) if is_key(v) else v)
                for p, v in ((p, v.get_value()) for p, v in found)}  # fmt: skip

    before = values()
    grads = nnx.jit(nnx.grad(lambda m: (m(x) ** 2).mean()))(model)
    called = values()
    nnx.jit(lambda o, m, g: o.update(m, g) and None)(optimizer, model, grads)
    stepped = values()
    order = list(LIGHT.kinds)
    return sorted(rows.leaves(model), key=lambda leaf: order.index(leaf.label)), {
        "has a gradient": {show(p) for p in grads.paths()},
        "updated by Adam": differ(called, stepped),
        "written by the call": differ(before, called),
    }


def is_key(value: jax.Array) -> bool:
    """Whether an array holds random keys."""
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def differ(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> set[str]:
    """The paths whose values differ."""
    return {path for path in a if not np.array_equal(a[path], b[path])}


# ------------------------------------------------------------------------ drawing
ROW, TOP, LEFT = 30, 104, 32
VALUE, PILL, MARKS, STEP = 250, 384, 520, 148


def draw(colours: Colours) -> str:
    """The picture of the model, as SVG."""
    leaves, touched = columns()
    width = MARKS + STEP * len(touched) + 4
    height = TOP + ROW * len(leaves) + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        f'width="{width}" height="{height}" role="img" font-size="15">',
        "<title>A model by kind, and what one training step does to each leaf</title>",
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="12"',
        f'fill="{colours.paper}" stroke="{colours.line}"/>',
        words(LEFT, 42, "One model, by kind", colours.text, SANS, 19, weight=600),
        words(LEFT, 66, "and one training step", colours.faint, SANS, 15),
    ]
    for i, name in enumerate(touched):
        x = MARKS + STEP * i + STEP // 2 - 8
        parts.append(words(x, 66, name, colours.faint, SANS, 14, "middle"))
    for i, leaf in enumerate(leaves):
        parts += row(TOP + ROW * i, leaf, touched, colours)
    return "\n".join([*parts, "</svg>", ""])


def row(
    y: int, leaf: rows.LeafRow, touched: dict[str, set[str]], colours: Colours
) -> list[str]:
    """One leaf: its path, value and kind, and a mark in each column."""
    path, middle = show(leaf.path), y + 5
    back, ink = colours.kinds[leaf.label]
    right = MARKS + STEP * len(touched) - LEFT + 4
    parts = [
        f'<path d="M{LEFT} {y - 15}H{right}" stroke="{colours.line}"/>',
        words(LEFT, middle, path, colours.text, MONO, 14),
        words(VALUE, middle, leaf.value, colours.faint, MONO, 13),
        f'<rect x="{PILL}" y="{y - 11}" width="112" height="22" rx="11"',
        f'fill="{back}"/>',
        words(PILL + 56, middle, leaf.label, ink, SANS, 13.5, "middle", 600),
    ]
    for i, paths in enumerate(touched.values()):
        x = MARKS + STEP * i + STEP // 2 - 8
        if path in paths:
            parts.append(f'<circle cx="{x}" cy="{y}" r="7" fill="{ink}"/>')
        else:
            parts.append(
                f'<circle cx="{x}" cy="{y}" r="2" fill="{colours.faint}" '
                'fill-opacity="0.55"/>'
            )
    return parts


def pictures() -> dict[str, str]:
    """Every picture by its file name."""
    themes = {"light": LIGHT, "dark": DARK}
    drawn = {f"model-{name}.svg": draw(colours) for name, colours in themes.items()}
    for subject, model in gallery.models().items():
        for name, colours in themes.items():
            drawn[f"{subject}-{name}.svg"] = gallery.draw(model, colours)
    return drawn


if __name__ == "__main__":
    for file, text in pictures().items():
        (ASSETS / file).write_text(text)
