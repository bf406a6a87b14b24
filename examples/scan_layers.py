"""A stack of 24 transformer blocks: unrolled, scanned, and scanned with remat.

``vmap`` over the constructor builds all layers at once, as one module whose leaves have
a layer axis; ``scan`` goes through them. XLA then compiles one block in the place of
24, and with ``remat`` keeps one activation for each block in the place of all of them.
Loss and gradients are the same; compile time and peak memory are printed.

    python examples/scan_layers.py
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sortal as nnx


class Block(nnx.Module):
    """Causal self-attention and a feed-forward network, each with its residual.

    Args:
      key: the key that all first weights come from.
      width: features of the stream.
      heads: attention heads.
    """

    def __init__(self, key: jax.Array, *, width: int, heads: int = 4):
        rngs = nnx.Rngs(key)
        size = (heads, width // heads)
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.LinearGeneral(width, (3, *size), rngs=rngs)
        self.out = nnx.LinearGeneral(size, width, axis=(-2, -1), rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.moveaxis(self.qkv(self.norm1(x)), -3, 0)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Unrolled(nnx.Module):
    """The blocks in a list."""

    def __init__(self, keys: jax.Array, width: int):
        self.blocks = [Block(key, width=width) for key in keys]

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


class Scanned(nnx.Module):
    """The blocks as one module with a layer axis."""

    def __init__(self, keys: jax.Array, width: int, *, remat: bool):
        self.blocks = nnx.vmap(lambda key: Block(key, width=width))(keys)
        self.remat = remat

    def __call__(self, x: jax.Array) -> jax.Array:
        def layer(block: Block, x: jax.Array) -> jax.Array:
            return block(x)

        step = nnx.remat(layer) if self.remat else layer
        through = nnx.scan(step, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return through(self.blocks, x)


class Measured(NamedTuple):
    """What one variant costs, and the loss and gradients it gives."""

    compile_seconds: float
    peak_mebibytes: float
    loss: float
    grads: dict[Any, np.ndarray]


def measure(model: nnx.Module, x: jax.Array) -> Measured:
    """Compiles the loss and its gradient, and runs it once."""

    @nnx.jit
    def step(model: Any, x: jax.Array) -> Any:
        return nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)

    start = time.perf_counter()
    compiled = step.lower(model, x).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.output_size_in_bytes
    loss, grads = step(model, x)
    flat = {path: np.asarray(leaf) for path, leaf in grads.flat_state()}
    return Measured(seconds, peak / 2**20, float(loss), flat)


def largest_gap(unrolled: Measured, scanned: Measured) -> float:
    """The largest difference between gradients, relative to the largest gradient."""
    gaps = []
    for path, stacked in scanned.grads.items():
        layers = [unrolled.grads["blocks", i, *path[1:]] for i in range(len(stacked))]
        gaps.append(np.abs(stacked - np.stack(layers)).max() / np.abs(stacked).max())
    return float(max(gaps))


def main(argv: list[str] | None = None) -> dict[str, Measured]:
    """Measures the three variants and prints them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args(argv)
    keys = jax.random.split(jax.random.key(0), args.layers)
    x = jax.random.normal(jax.random.key(1), (4, args.length, args.width))
    models = {
        "unrolled": Unrolled(keys, args.width),
        "scanned": Scanned(keys, args.width, remat=False),
        "scanned, remat": Scanned(keys, args.width, remat=True),
    }
    found = {name: measure(model, x) for name, model in models.items()}
    print(f"{args.layers} blocks of width {args.width}, loss and gradient:")
    print(f"{'':16}{'compile':>10}{'peak memory':>14}{'loss':>12}{'gradients':>12}")
    for name, row in found.items():
        gap = (
            "-" if name == "unrolled" else f"{largest_gap(found['unrolled'], row):.0e}"
        )
        print(
            f"{name:16}{row.compile_seconds:>8.2f} s{row.peak_mebibytes:>10.1f} MiB"
            f"{row.loss:>12.6f}{gap:>12}"
        )
    return found


if __name__ == "__main__":
    main()
