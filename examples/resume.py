"""Training that may be killed at any moment, and ends as if it never had been.

The digits of ``sortal demo`` again, with a step saved now and then, beside the program.
Started a second time on the same directory it goes on where the last saved step was:
parameters, the optimizer's moments, BatchNorm's statistics, Dropout's random stream and
the order of the data are all there, so the result is the same to the last bit.

    python examples/resume.py runs/digits     # stop it with Ctrl-C, or kill -9
    python examples/resume.py runs/digits     # goes on

It needs scikit-learn, which ships the data.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import sortal as nnx
from sortal.demo import digits

BATCH = 64


class Position:
    """Where in the data training is: the order of an epoch, and how far it got."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.batch = 0

    def batches(self, data: digits.Digits) -> Iterator[Any]:
        """The batches that are left of this epoch."""
        self.drawn_from = self.rng.bit_generator.state
        found = list(digits.batches(data, BATCH, self.rng))
        while self.batch < len(found):
            batch = found[self.batch]
            self.batch += 1
            yield batch
        self.batch = 0

    def saved(self) -> Any:
        """What brings a Position back here, as JSON."""
        return {"rng": self.drawn_from, "batch": self.batch}

    def restore(self, saved: Any) -> None:
        """Goes back to where ``saved`` was."""
        self.rng.bit_generator.state = saved["rng"]
        self.batch = saved["batch"]


def fingerprint(root: Any) -> str:
    """A hash of all values of a model, bit by bit."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.state(root)):
        typed = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        sha.update(np.asarray(jax.random.key_data(leaf) if typed else leaf).tobytes())
    return sha.hexdigest()


def main() -> None:
    """Trains, or goes on training."""
    parser = argparse.ArgumentParser(description="Training that survives kills.")
    parser.add_argument("directory", help="where the steps are saved")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--every", type=int, default=20, help="steps between saves")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    data = digits.load_digits(options.seed)
    in_epoch = len(data.labels) // BATCH
    model, optimizer, metrics = digits.build(options.seed, options.epochs * in_epoch)
    everything = {"model": model, "optimizer": optimizer, "metrics": metrics}
    position = Position(options.seed)
    step = 0
    checkpoints = nnx.Checkpoints(options.directory, keep=2)
    if checkpoints.latest() is not None:
        found = checkpoints.restore(everything)
        position.restore(found.metadata)
        step = found.step
        print(f"resumed at step {step}", flush=True)

    model.train()
    while model.epochs < options.epochs:  # the last epoch saved may lack its end
        for images, labels in position.batches(data):
            digits.train_step(model, optimizer, metrics, images, labels)
            step += 1
            print(f"step {step}", flush=True)
            if step % options.every == 0:
                checkpoints.save(
                    everything, step=step, metadata=position.saved(), wait=False
                )
        digits.end_epoch(model)
    checkpoints.close()
    print(fingerprint(everything))


if __name__ == "__main__":
    main()
