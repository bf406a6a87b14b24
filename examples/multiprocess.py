"""One training in several processes, which any of them may leave at any moment.

The digits of ``sortal demo``, or with ``--model lm`` a small transformer that learns,
byte by byte, the text of Python's own help (``pydoc_data.topics``, which comes with
Python). Parameters and optimizer state are divided over all devices, each process loads
its part of each batch, and steps are saved beside the training.

    sortal launch -n 2 --devices 2 examples/multiprocess.py runs/digits
    sortal launch -n 2 --devices 2 examples/multiprocess.py runs/lm --model lm
    sortal launch -n 2 --devices 2 examples/multiprocess.py runs/lost --kill-at 30
    sortal launch -n 4 --devices 2 examples/multiprocess.py runs/lost     # goes on
    srun -n 16 python examples/multiprocess.py /shared/runs/digits

Started again on the same directory it goes on where the last saved step was, with the
same data in the same order, on whatever number of processes. It needs Grain, and for
the digits scikit-learn: pip install "sortal[demo,distributed]".
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import sortal as nnx
from sortal import distributed
from sortal.demo import digits, llama
from sortal.sharding import presets

# ------------------------------------------------------------------- model and data


class Rows:
    """What Grain reads: the rows of several arrays of equal length."""

    def __init__(self, *columns: np.ndarray):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        return tuple(column[i] for column in self.columns)


def text_rows(length: int = 64) -> Rows:
    """Python's help in pieces of ``length`` bytes, each with the byte that follows."""
    from pydoc_data import topics

    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    data = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    pieces = data[: len(data) // length * length].reshape(-1, length)
    return Rows(pieces[:-1], np.roll(data, -1)[: pieces[:-1].size].reshape(-1, length))


def build_lm(seed: int, steps: int) -> tuple[Any, nnx.Optimizer, nnx.MultiMetric]:
    """As ``digits.build``: a transformer of two layers over bytes."""
    config = llama.Config(
        vocabulary=256, features=64, hidden=128, layers=2, heads=4, key_value_heads=2
    )
    model = llama.Llama(config, rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    return model, optimizer, nnx.MultiMetric(loss=nnx.metrics.Average("loss"))


@nnx.jit
def lm_step(model: Any, optimizer: Any, metrics: Any, tokens: Any, due: Any) -> Any:
    """As ``digits.train_step``: one step, in place; the loss."""

    def loss_fn(model: Any) -> jax.Array:
        logits = model(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, due).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    metrics.update(loss=loss)
    optimizer.update(model, grads)
    return loss


def load_digits(seed: int) -> Rows:
    """The digits to learn from."""
    data = digits.load_digits(seed)
    return Rows(data.images, data.labels)


TASKS = {
    "digits": (load_digits, digits.build, digits.train_step),
    "lm": (lambda seed: text_rows(), build_lm, lm_step),
}


def batches(rows: Rows, size: int, seed: int) -> Iterator[Any]:
    """This process's part of each batch; a batch is the same on any number of them.

    Part k of the text of all parts belongs to process ``k % count``, so that its
    iterator's state, a position, is that of all.
    """
    here, count = jax.process_index(), jax.process_count()
    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    mine = order.batch(size // count)[here::count]
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(mine.to_iter_dataset(reading))


# ----------------------------------------------------------------------- the training


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Training in several processes.")
    add = parser.add_argument
    add("directory", help="where the steps are saved, which all processes can reach")
    add("--model", choices=TASKS, default="digits")
    add("--parallel", choices=("fsdp", "data"), default="fsdp")
    add("--steps", type=int, default=100)
    add("--batch", type=int, default=64, help="rows of all processes together")
    add("--every", type=int, default=20, help="steps between saves")
    add("--seed", type=int, default=0)
    add("--sync", action="store_true", help="wait for each save")
    add("--kill-at", type=int, help="the last process kills itself at this step")
    add("--losses", type=Path, help="a file to which the loss of each step is added")
    return parser.parse_args()


def main() -> None:
    """Trains, or goes on training."""
    options = parse()
    distributed.initialize()
    first = jax.process_index() == 0
    load, build, train_step = TASKS[options.model]
    if options.batch % jax.device_count():
        raise SystemExit(f"--batch is to be a multiple of {jax.device_count()} devices")

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    policy = presets.data_parallel()
    if options.parallel == "fsdp":
        policy = presets.fsdp("data", min_size=256)
    objects = nnx.init_sharded(lambda: build(options.seed, options.steps), mesh, policy)
    model, optimizer, metrics = objects
    everything = {"model": model, "optimizer": optimizer, "metrics": metrics}
    report = nnx.sharding_report(everything, mesh, policy)
    if first:
        print(
            f"{jax.process_count()} processes, {jax.device_count()} devices: "
            f"{report.total:,} bytes, {report.on_device:,} on each device",
            flush=True,
        )

    data = batches(load(options.seed), options.batch, options.seed)
    step = 0
    with (
        nnx.Checkpoints(options.directory, keep=2) as checkpoints,
        bar(options) as draw,
    ):
        if checkpoints.latest() is not None:
            found = checkpoints.restore(everything)
            data.set_state(found.metadata)
            step = found.step
            if first:
                print(f"resumed at step {step}", flush=True)
        model.train()
        stop = False
        while step < options.steps and not stop:
            batch = distributed.shard_batch(next(data), mesh)
            loss = float(train_step(model, optimizer, metrics, *batch))
            step += 1
            if step == 1:
                distributed.assert_same(everything)
            draw(step, loss)
            if (
                options.kill_at == step
                and jax.process_index() == jax.process_count() - 1
            ):
                os.kill(os.getpid(), signal.SIGKILL)
            stop = told_to_stop(step)
            if step % options.every == 0 or step == options.steps or stop:
                checkpoints.save(
                    everything, step=step, metadata=data.get_state(), wait=options.sync
                )
    told = ", ".join(f"{k} {float(v):.4f}" for k, v in metrics.compute().items())
    if first:
        print(f"step {step}: {told}", flush=True)


def told_to_stop(step: int) -> bool:
    """Whether a scheduler has sent SIGTERM; JAX has all processes agree on the step."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
        step
    )


class bar:  # noqa: N801 - it reads as a function
    """A progress bar, which the first process alone draws; and the file of losses."""

    def __init__(self, options: argparse.Namespace):
        self.first = jax.process_index() == 0
        columns = TextColumn("step {task.completed}/{task.total}"), BarColumn()
        told = TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn()
        self.progress = Progress(
            *columns, *told, console=Console(stderr=True), disable=not self.first
        )
        self.task = self.progress.add_task("", total=options.steps, loss="compiling")
        self.losses = options.losses if self.first else None

    def __enter__(self) -> Any:
        self.progress.start()
        return self.draw

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def draw(self, step: int, loss: float) -> None:
        """Shows a step."""
        self.progress.update(self.task, completed=step, loss=f"{loss:.4f}")
        if self.losses is not None:
            with self.losses.open("a") as file:
                file.write(json.dumps([step, loss]) + "\n")


if __name__ == "__main__":
    main()
