"""A process that fails, is killed or interrupted ends the others, with a message."""

from __future__ import annotations

import signal
import time

import pytest

import sortal as nnx
from sortal.distributed import failures

TRAINING = """
import sys, time
from sortal import distributed
distributed.initialize(heartbeat_timeout=5)
import jax, numpy as np
import sortal as nnx
from sortal.checkpoint import files

how, where = sys.argv[1:]
mesh = jax.make_mesh((jax.device_count(),), ("data",))
model = nnx.shard(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), mesh)
distributed.assert_same(model)
batch = distributed.shard_batch(np.ones((4, 4), np.float32), mesh)
step = nnx.jit(lambda m, x: m(x).sum())

def slow(*args, sync=files.commit):
    time.sleep(2)
    sync(*args)

files.commit = slow
for number in range(10_000):
    step(model, batch).block_until_ready()
    if number == 5:
        saving = nnx.save(where, model, step=5, wait=False)
        print("running", flush=True)
    if number == 9 and jax.process_index() == 1 and how == "raise":
        raise ValueError("no more\\ndata")
    time.sleep(0.02)
"""


def test_an_exception_in_one_ends_all_and_the_save_under_way_is_finished(
    launch, tmp_path
):
    run = launch(TRAINING, "raise", str(tmp_path / "steps"), devices=1)
    run.until("running")
    began = time.monotonic()
    done = run.end()
    assert time.monotonic() - began < 30
    assert done.code == failures.FAILED
    told = [x for x in done.err.splitlines() if "sortal: process 1 of 2 (pid" in x]
    assert sorted(x[:3] for x in told) == ["[0]", "[1]"]
    line = TRAINING.splitlines().index('        raise ValueError("no more\\ndata")')
    due = f"program0.py:{line + 1}, <module>: ValueError: no more data"
    assert all(x.endswith(due) for x in told), told
    assert "[0] Process 0 ends because of it." in done.err
    assert done.err.endswith("sortal launch: process 1 ended with exit code 1.\n")
    assert nnx.load_state(tmp_path / "steps").paths() == (("bias",), ("kernel",))


def test_one_interrupt_ends_all_and_the_save_under_way_is_finished(launch, tmp_path):
    run = launch(TRAINING, "run", str(tmp_path / "steps"), devices=1)
    for _ in range(2):  # the save has begun in both
        run.until("running")
    run.process.send_signal(signal.SIGINT)
    done = run.end()
    assert done.code == failures.INTERRUPTED
    assert " was interrupted in " in done.err
    assert "Traceback" not in done.err
    assert nnx.load_state(tmp_path / "steps").paths() == (("bias",), ("kernel",))


def test_a_process_that_ends_too_early_is_noticed(launch):
    text = """
import time
from sortal import distributed
from sortal.distributed import failures
distributed.initialize(shutdown_timeout=1)
if failures.numbered()[0] == 0:
    time.sleep(300)
"""
    done = launch(text).end()
    assert done.code == failures.FAILED
    assert (
        "it is at its end, and others are not: the end of the program: "
        "process 0 of 2 did not come within 1 s." in done.err
    )


def test_a_stopped_process_is_noticed_by_its_heartbeat(launch):
    text = """
import os, signal, time
from sortal import distributed
distributed.initialize(heartbeat_timeout=3)
import jax
if jax.process_index() == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(300)
"""
    done = launch(text, devices=1).end(60)
    assert done.code == 128 + signal.SIGSTOP
    assert "process 1 was stopped and not continued.\n" in done.err


def raised(text):
    try:
        exec(compile(text, "train.py", "exec"), {})  # noqa: S102 - our own text
    except Exception as e:  # noqa: BLE001 - whatever it is
        return e
    raise AssertionError(text)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("def f():\n  1 / 0\nf()", "train.py:2, f"),
        ("import jax\njax.jit(lambda x: 1 / 0)(1)", "train.py:2, <lambda>"),
        ("import sortal\nsortal.At('')", "train.py:2, <module>"),
    ],
)
def test_the_place_is_the_innermost_of_the_program_itself(text, where):
    assert failures._where(raised(text).__traceback__) == where


def test_a_failure_is_one_line():
    assert failures._one_line(ValueError, ValueError("a\n  b")) == "ValueError: a b"
    assert failures._one_line(KeyError, KeyError()) == "KeyError"
    assert failures._where(None) == ""
