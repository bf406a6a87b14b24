"""Maps of models: the area of a leaf is its bytes, and its colour is its kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from drawing import MONO, SANS, Colours, words

import sortal as nnx
from sortal._engine.paths import show
from sortal._engine.tables import size
from sortal.demo import digits, llama
from sortal.inspect import rows

WIDTH, HEIGHT, EDGE = 960, 460, 20


def models() -> dict[str, Any]:
    """The models of the gallery, without memory for their arrays."""

    def decoder() -> Any:
        model = llama.Llama(llama.Config(), rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
        nnx.init_cache(model, batch=1, length=8192)
        return model

    def adapted() -> Any:
        sizes = llama.Config(
            vocabulary=512, features=128, hidden=256, layers=4, heads=4,
            key_value_heads=2,
        )  # fmt: skip
        model = llama.Llama(sizes, rngs=nnx.Rngs(0))
        for block in model.blocks:
            for name in ("gate", "up", "down"):
                layer = getattr(block.feed, name)
                around = nnx.LoRA(
                    layer.in_features, 16, layer.out_features,
                    base_module=layer, rngs=nnx.Rngs(1),
                )  # fmt: skip
                setattr(block.feed, name, around)
        return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)

    made = {
        "digits": lambda: digits.build(0, 100)[:2],
        "decoder": decoder,
        "adapted": adapted,
    }
    return {name: nnx.eval_shape(make) for name, make in made.items()}


class Box(NamedTuple):
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float


def draw(model: Any, colours: Colours) -> str:
    """The map of a model, as SVG, with a legend of kinds and bytes."""
    leaves = sorted(rows.leaves(model), key=lambda leaf: -leaf.bytes)
    kinds: dict[str, list[rows.LeafRow]] = {}
    for leaf in leaves:
        kinds.setdefault(leaf.label, []).append(leaf)
    order = sorted(kinds, key=lambda kind: -total(kinds[kind]))
    below, height = legend({kind: kinds[kind] for kind in order}, colours)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        f'width="{WIDTH}" height="{height}" role="img">',
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="12"',
        f'fill="{colours.paper}" stroke="{colours.line}"/>',
    ]
    room = Box(EDGE, EDGE, WIDTH - 2 * EDGE, HEIGHT - EDGE)
    blocks = layout([total(kinds[kind]) for kind in order], room)
    for kind, block in zip(order, blocks, strict=True):
        places = layout([leaf.bytes for leaf in kinds[kind]], block)
        for leaf, place in zip(kinds[kind], places, strict=True):
            parts += cell(leaf, place, colours)
    return "\n".join([*parts, *below, "</svg>", ""])


def cell(leaf: rows.LeafRow, at: Box, colours: Colours) -> Iterator[str]:
    """One leaf; its path is written where there is room for it."""
    back, ink = shade(leaf.label, colours)
    path = show(leaf.path)
    yield (
        f'<rect x="{at.x:.1f}" y="{at.y:.1f}" width="{at.width:.1f}" '
        f'height="{at.height:.1f}" fill="{back}" stroke="{colours.paper}"/>'
    )
    names = path.split(".")
    for text in (path, *(".".join(names[-i:]) for i in (3, 2, 1))):
        if at.height > 18 and 7.1 * len(text) + 10 < at.width:
            yield words(round(at.x + 6, 1), round(at.y + 15, 1), text, ink, MONO, 11.5)
            value = leaf.value.removesuffix(", abstract")
            if at.height > 34 and 7.1 * len(value) + 10 < at.width:
                y = round(at.y + 30, 1)
                yield words(round(at.x + 6, 1), y, value, ink, MONO, 11)
            return


def legend(
    kinds: dict[str, list[rows.LeafRow]], colours: Colours
) -> tuple[list[str], int]:
    """A name for each colour, with its leaves and bytes; and where that ends."""
    parts: list[str] = []
    x, y = EDGE, HEIGHT + 34
    for kind, leaves in kinds.items():
        text = f"{kind}: {len(leaves)} in {size(total(leaves))}"
        if x + 8 * len(text) + 24 > WIDTH - EDGE:
            x, y = EDGE, y + 26
        back, _ = shade(kind, colours)
        at = f'x="{x}" y="{y - 12}" width="16" height="16"'
        parts.append(f'<rect {at} rx="4" fill="{back}"/>')
        parts.append(words(x + 24, y + 1, text, colours.text, SANS, 13.5))
        x += 8 * len(text) + 40
    return parts, y + 24


def shade(kind: str, colours: Colours) -> tuple[str, str]:
    """Background and text of a kind; a kind of one's own is one that is counted."""
    name = kind.rpartition(".")[2]
    name = "OptVariable" if name.startswith("Opt") else name
    return colours.kinds.get(name, colours.kinds["Calls"])


def total(leaves: Sequence[rows.LeafRow]) -> int:
    """The bytes of some leaves."""
    return sum(leaf.bytes for leaf in leaves)


def layout(sizes: Sequence[float], room: Box) -> list[Box]:
    """Boxes of these areas that fill a room, as square as can be.

    Rows are laid along the shorter side, each as long as that makes its worst box more
    square: "squarified treemaps" by Bruls, Huizing and van Wijk.
    """
    boxes: list[Box] = []
    left = list(sizes)
    while left:
        side = min(room.width, room.height)
        scale = room.width * room.height / (sum(left) or 1)
        count = 1
        while count < len(left) and worst(left[: count + 1], side, scale) <= worst(
            left[:count], side, scale
        ):
            count += 1
        taken, left = left[:count], left[count:]
        depth = sum(taken) * scale / side if side else 0.0
        along = 0.0
        for area in taken:
            length = area * scale / depth if depth else 0.0
            boxes.append(
                Box(room.x, room.y + along, depth, length)
                if room.width >= room.height
                else Box(room.x + along, room.y, length, depth)
            )
            along += length
        room = (
            Box(room.x + depth, room.y, room.width - depth, room.height)
            if room.width >= room.height
            else Box(room.x, room.y + depth, room.width, room.height - depth)
        )
    return boxes


def worst(sizes: Sequence[float], side: float, scale: float) -> float:
    """How far from square the worst box of a row is."""
    whole = sum(sizes) * scale
    if not whole or not min(sizes):
        return float("inf")
    return max(
        side**2 * max(sizes) * scale / whole**2,
        whole**2 / (side**2 * min(sizes) * scale),
    )
