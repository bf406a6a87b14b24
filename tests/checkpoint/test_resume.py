"""Training that is stopped and resumed ends with the same bits.

``python -m benchmarks.faults --only resumed`` kills real processes that train the whole
network of the demo, twenty times.
"""

from __future__ import annotations

import builtins
import gc
import runpy
import sys
from pathlib import Path

import jax.numpy as jnp
import optax

import sortal as nnx
from sortal.demo import digits

EXAMPLE = Path(__file__).parents[2] / "examples" / "resume.py"


class Small(nnx.Module):
    """As the demo's network, but quick to compile."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)
        self.epochs = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, images):
        x = self.norm(images.reshape(len(images), -1))
        return self.head(self.dropout(x))


def build(seed, steps):
    model = Small(nnx.Rngs(seed))
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
    return model, nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param), metrics


def test_digits_stopped_in_the_middle_end_as_if_they_had_run_through(
    tmp_path, monkeypatch
):
    printed: list[str] = []
    stop_at = ""

    def note(text, **how):
        printed.append(text)
        if text == stop_at:
            raise KeyboardInterrupt

    def run(name):
        words = [str(tmp_path / name), "--epochs", "2", "--every", "3"]
        monkeypatch.setattr(sys, "argv", ["resume.py", *words])
        try:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        except KeyboardInterrupt:
            gc.collect()
        return printed[-1]

    monkeypatch.setattr(builtins, "print", note)
    monkeypatch.setattr(digits, "build", build)
    undisturbed = run("a")
    assert len(undisturbed) == 64
    stop_at = "step 26"
    assert run("b") == stop_at
    stop_at = ""
    printed.clear()
    assert run("b") == undisturbed
    assert printed[0] == "resumed at step 24"

    def stopped(model):
        if model.epochs == 1:  # after the last save, before the last thing done
            raise KeyboardInterrupt
        end_epoch(model)

    end_epoch = digits.end_epoch
    monkeypatch.setattr(digits, "end_epoch", stopped)
    assert run("c") == "step 42"
    monkeypatch.setattr(digits, "end_epoch", end_epoch)
    printed.clear()
    assert run("c") == undisturbed
    assert printed == ["resumed at step 42", undisturbed]


def test_a_scale_whose_type_was_weak_at_the_start_goes_on_as_it_was(tmp_path):
    """Times a weak type bfloat16 stays so, and times float32 it does not."""

    def build():
        w = jnp.arange(1, 9, dtype="bfloat16") / 7
        return {"w": nnx.Param(w), "scale": nnx.Variable(jnp.asarray(1.0))}

    def step(model):
        w, scale = model["w"].value, model["scale"].value
        model["w"].value = (w * scale + w * scale).astype("bfloat16")
        model["scale"].value = scale * jnp.float32(0.93)

    through, resumed = build(), build()
    for _ in range(3):
        step(through)
    nnx.save(tmp_path, through, step=3)
    nnx.restore(tmp_path, resumed)
    step(through)
    step(resumed)
    assert through["w"].value.tolist() == resumed["w"].value.tolist()
