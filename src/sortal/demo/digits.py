"""Trains on handwritten digits in under a minute, and shows what writes which array.

Run it with ``sortal demo``. It needs scikit-learn, which has the data: 1,797 digits of
8 by 8 pixels.

The network holds arrays of six kinds. Each array gets its kind once, where its Variable
is made. The optimizer finds its parameters, BatchNorm its statistics and Dropout its
random stream by kind; at the end a table, counted from the arrays themselves, shows
what changed them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sortal as nnx
from sortal.inspect import Table, changes, drawn, size

# ---------------------------------------------------------------------- the network


class BatchStat(nnx.Variable):
    """An own kind, for statistics of the input.

    It has the name of ``nnx.BatchStat`` but is another kind, because kinds are classes:
    a filter by one class does not take Variables of the other.
    """


class Normalise(nnx.Module):
    """Scales every pixel to mean 0 and variance 1 over the training images seen."""

    def __init__(self, shape: tuple[int, ...]):
        self.running_mean = BatchStat(jnp.zeros(shape))
        self.running_var = BatchStat(jnp.ones(shape))
        self.batches = nnx.Variable(jnp.zeros((), jnp.int32))
        self.use_running_average = False  # model.train() and model.eval() set it

    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.use_running_average:
            self.batches[...] += 1
            # At first an average over all batches, later over about the last fifty.
            rate = 1 / jnp.minimum(self.batches[...], 50)
            self.running_mean[...] += rate * (x.mean(0) - self.running_mean[...])
            self.running_var[...] += rate * (x.var(0) - self.running_var[...])
        centred = x - self.running_mean[...]
        return centred / jnp.sqrt(self.running_var[...] + 0.01)


class Block(nnx.Module):
    """A convolution, batch normalisation and ReLU."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(inputs, outputs, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x)))


class Network(nnx.Module):
    """Two convolutional blocks and a linear head."""

    def __init__(self, rngs: nnx.Rngs, width: int = 24):
        self.normalise = Normalise((8, 8, 1))
        first = Block(1, width, rngs=rngs)
        self.blocks = [first, Block(width, 2 * width, rngs=rngs)]
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(2 * 2 * 2 * width, 10, rngs=rngs)
        self.epochs = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.normalise(images)
        for block in self.blocks:
            x = nnx.max_pool(block(x), (2, 2), strides=(2, 2))
        return self.head(self.dropout(x.reshape(len(x), -1)))


# --------------------------------------------------------------------- the training


def loss_fn(
    model: Network, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy with label smoothing, and the logits."""
    logits = model(images)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.05)
    return optax.softmax_cross_entropy(logits, targets).mean(), logits


def gradients(
    model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> tuple[Any, Any]:
    """Loss, logits, and the gradient by the Variables that the optimizer updates."""
    wrt = nnx.DiffState(0, optimizer.wrt)
    differentiate = nnx.value_and_grad(loss_fn, argnums=wrt, has_aux=True)
    return differentiate(model, images, labels)


@nnx.jit
def train_step(
    model: Network,
    optimizer: nnx.Optimizer,
    metrics: nnx.MultiMetric,
    images: jax.Array,
    labels: jax.Array,
) -> jax.Array:
    """One step; updates all three objects in place and returns the loss."""
    (loss, logits), grads = gradients(model, optimizer, images, labels)
    metrics.update(loss=loss, logits=logits, labels=labels)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def predict(model: Network, images: jax.Array) -> jax.Array:
    """The most likely digit of each image."""
    return model(images).argmax(-1)


def end_epoch(model: Network) -> None:
    """A write by the user's own code: the number of epochs, kept in the model."""
    model.epochs[...] += 1


class Digits(NamedTuple):
    """Images and labels, for training and held out."""

    images: np.ndarray
    labels: np.ndarray
    held_out_images: np.ndarray
    held_out_labels: np.ndarray


def load_digits(seed: int) -> Digits:
    """Reads the digits, with pixels from 0 to 1, and holds a quarter of them out."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = images[order], labels[order].astype(np.int32)
    cut = len(images) // 4
    return Digits(images[cut:], labels[cut:], images[:cut], labels[:cut])


def batches(
    digits: Digits, size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All training images once, in random order, in batches of equal size."""
    order = rng.permutation(len(digits.images))
    for i in range(0, len(order) - size + 1, size):
        chosen = order[i : i + size]
        yield digits.images[chosen], digits.labels[chosen]


def build(
    seed: int, steps: int, train: str = "all"
) -> tuple[Network, nnx.Optimizer, nnx.MultiMetric]:
    """The network, its optimizer and the metrics.

    The learning rate falls over ``steps``. ``train`` is ``"all"`` parameters, or those
    of the ``"head"``.
    """
    model = Network(nnx.Rngs(seed))
    warm, steps = max(steps // 10, 1), max(steps, 2)
    rate = optax.warmup_cosine_decay_schedule(1e-3, 1e-2, warm, steps)
    # Param is the kind that is learned; a filter may select some of them.
    wrt = nnx.Param if train == "all" else nnx.All(nnx.Param, nnx.PathContains("head"))
    optimizer = nnx.Optimizer(model, optax.adamw(rate, weight_decay=0.05), wrt=wrt)
    metrics = nnx.MultiMetric(
        loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy()
    )
    return model, optimizer, metrics


class Result(NamedTuple):
    """The trained objects, and the measurements."""

    model: Network
    optimizer: nnx.Optimizer
    losses: list[float]
    """The mean training loss of each epoch."""
    accuracy: float
    """On the held-out images."""
    seconds: float


def train(
    digits: Digits,
    objects: tuple[Network, nnx.Optimizer, nnx.MultiMetric],
    options: argparse.Namespace,
    report: Callable[[dict[str, float]], None] = lambda found: None,
) -> Result:
    """Trains the objects of ``build`` in place, and measures on held-out images."""
    model, optimizer, metrics = objects
    started = time.perf_counter()
    rng = np.random.default_rng(options.seed)
    losses = []
    for _ in range(options.epochs):
        model.train()  # turns dropout and the updates of statistics on
        for images, labels in batches(digits, options.batch, rng):
            train_step(model, optimizer, metrics, images, labels)
        end_epoch(model)
        found = {name: float(x) for name, x in metrics.compute().items()}
        metrics.reset()
        losses.append(found["loss"])
        report(found)
    model.eval()
    guesses = np.asarray(predict(model, digits.held_out_images))
    accuracy = float((guesses == digits.held_out_labels).mean())
    return Result(model, optimizer, losses, accuracy, time.perf_counter() - started)


# ------------------------------------------------------------- who writes what: tables


def writers(
    model: Network, optimizer: nnx.Optimizer, images: np.ndarray, labels: np.ndarray
) -> dict[str, dict[Any, int]]:
    """The number of leaves of each kind that each part of one step changes.

    The step is taken on copies; changes are counted bit for bit.
    """
    model, optimizer = both = nnx.clone((model, optimizer))
    model.train()
    found: dict[str, dict[Any, int]] = {}
    before = nnx.state(both)

    def note(part: str) -> None:
        nonlocal before
        after = nnx.state(both)
        rows = changes(before, after).rows
        found[part] = {row.kind: row.changed for row in rows if row.changed}
        before = after

    _, grads = nnx.jit(gradients)(model, optimizer, images, labels)
    note("forward pass")
    optimizer.update(model, grads)
    note("optimizer")
    end_epoch(model)
    note("you")
    return found


def kind_table(
    title: str,
    objects: tuple[Network, nnx.Optimizer],
    before: Any = None,
    parts: dict[str, dict[Any, int]] | None = None,
) -> Any:
    """One row for each kind: its size, and its changes since ``before``, if given.

    ``before`` is an earlier state, ``parts`` the result of ``writers``.
    """
    rows = nnx.tabulate(objects).rows
    heads = ["kind", "leaves>", "elements>", "bytes>"]
    cells = [[r.label, str(r.leaves), f"{r.elements:,}", size(r.bytes)] for r in rows]
    if before is not None and parts is not None:
        heads += ["changed>", "by"]
        changed = {row.kind: row.changed for row in changes(before, objects).rows}
        for row, line in zip(rows, cells, strict=True):
            line.append(str(changed[row.kind]))
            line.append(_who(row.kind, row.leaves, parts))
    return Table(title, tuple(heads), tuple(map(tuple, cells)))


def _who(kind: Any, leaves: int, parts: dict[str, dict[Any, int]]) -> str:
    """The parts that change leaves of a kind; with a number where it is not all."""
    found = [(part, kinds.get(kind, 0)) for part, kinds in parts.items()]
    return ", ".join(p if n == leaves else f"{p} {n}" for p, n in found if n)


NEXT = """
What you can try next
  sortal demo --seed 1       another split and other weights; the same seed
                             gives the same numbers to the last bit
  sortal demo --train head   learn the head only: the optimizer's filter says
                             so, and its state and the tables follow
  On a model of your own:
    print(sortal.tabulate(model))               every leaf and kind
    print(sortal.explain(model, sortal.Param))  what a filter takes and leaves
  In the file of this demo: derive BatchStat from nnx.Param and run it again.
  The tables show the optimizer at your statistics, the loss what comes of it.
"""


# ------------------------------------------------------------------ the command line


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> Any:
    """The options of a command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train a small network on handwritten digits, and see which "
        "arrays the optimizer, the forward pass and your own code change.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--epochs", type=_positive, default=20, help="rounds over the data (20)")
    add("--batch", type=_positive, default=64, help="images in a step (64)")
    add("--seed", type=int, default=0, help="of the split, weights and dropout (0)")
    add("--train", choices=("all", "head"), default="all", help="what is learned (all)")
    add("--quiet", action="store_true", help="print the final line only")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, found {text}")
    return number


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs the program; returns the exit code, 2 if scikit-learn is missing."""
    options = parse(argv, prog)
    try:
        digits = load_digits(options.seed)
    except ModuleNotFoundError:
        sys.stderr.write(
            "The digits come with scikit-learn, which is not installed. Install it "
            "with: pip install scikit-learn\n"
        )
        return 2
    options.batch = min(options.batch, len(digits.labels))
    steps = options.epochs * (len(digits.labels) // options.batch)
    objects = build(options.seed, steps, options.train)
    if options.quiet:
        _say(train(digits, objects, options))
    else:
        _show(digits, objects, options)
    return 0


def _say(result: Result) -> None:
    sys.stdout.write(
        f"held-out accuracy {result.accuracy:.2%} after {len(result.losses)} epochs, "
        f"{result.seconds:.1f} s\n"
    )


def _show(digits: Digits, objects: Any, options: argparse.Namespace) -> None:
    """Trains with tables before and after, and a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    model, optimizer, _ = objects
    console = Console()
    console.print(
        f"{len(digits.labels)} digits to learn from, {len(digits.held_out_labels)} "
        "held out. Model and optimizer, by kind:\n"
    )
    console.print(drawn(kind_table("Before training", (model, optimizer))), "")
    before = nnx.state((model, optimizer))
    parts = writers(model, optimizer, *_first_batch(digits, options))
    columns = [TextColumn(f"{{task.fields[{name}]}}") for name in ("loss", "accuracy")]
    epochs = TextColumn("epoch {task.completed}/{task.total}")
    with Progress(epochs, BarColumn(), *columns, TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=options.epochs, loss="compiling", accuracy="")

        def report(found: dict[str, float]) -> None:
            loss, accuracy = f"loss {found['loss']:.3f}", f"{found['accuracy']:.1%}"
            bar.update(task, advance=1, loss=loss, accuracy=f"accuracy {accuracy}")

        result = train(digits, objects, options, report)
    console.print()
    console.print(
        drawn(kind_table("After training", (model, optimizer), before, parts))
    )
    console.print(
        "\nChanged: other bits than before. By: seen in one step, taken apart on a "
        "copy.\n"
    )
    found = nnx.explain(model, nnx.Param, nnx.BatchStat)
    title = "What explain(model, nnx.Param, nnx.BatchStat) says"
    console.print(drawn(found.tables()[0]._replace(title=title, notes=found.notes)))
    console.print()
    _say(result)
    console.print(NEXT, highlight=False, markup=False)


def _first_batch(digits: Digits, options: argparse.Namespace) -> Any:
    return next(batches(digits, options.batch, np.random.default_rng(options.seed)))


if __name__ == "__main__":
    sys.exit(main())
