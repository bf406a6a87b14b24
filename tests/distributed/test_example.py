"""The training of examples/multiprocess.py, killed and resumed.

``python -m benchmarks.processes`` does the same often, and at random moments. Its
worker runs the example with a model that is quick to compile.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import sortal as nnx

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "multiprocess.py"
WORKER = ROOT / "benchmarks" / "process_worker.py"


def losses(path):
    return dict(map(json.loads, path.read_text().splitlines()))


def test_a_killed_training_ends_as_one_that_ran_through(launch, clusters, tmp_path):
    """In float64, in which nothing hangs on the order of a sum.

    It is started again as SLURM would, without ``sortal launch``.
    """
    pytest.importorskip("grain")
    text = f"import runpy; runpy.run_path({str(WORKER)!r}, run_name='__main__')"

    def words(name, *more):
        told = "--losses", str(tmp_path / f"{name}.jsonl")
        steps = "--model", "tiny", "--steps", "8", "--every", "3"
        return "train", str(tmp_path / name), *steps, *told, *more

    alone = launch(text, *words("alone"), n=1, devices=2, wide=True).end(240)
    assert alone.code == 0, alone.err[-3000:]
    more = "--kill-at", "5", "--sync"
    killed = launch(text, *words("killed", *more), devices=1, wide=True).end(240)
    assert killed.code == 137
    assert "process 1 was ended by SIGKILL" in killed.err
    one = {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": "", "JAX_ENABLE_X64": "1"}
    resumed = clusters("slurm", str(WORKER), *words("killed"), **one)
    assert [done.code for done in resumed] == [0, 0], resumed
    first, second = (done.out for done in resumed)
    assert first[-1].startswith("step 8: loss")
    assert any(x.startswith("2 processes, 2 devices: ") for x in first)
    assert "resumed at step 3" in first
    # The other process says nothing but what the worker adds.
    assert all(x.startswith(("pid", "holds", "[Gloo]")) for x in second), second
    # What each process holds is what the report says.
    held = [x.split() for x in first + second if x.startswith("holds")]
    assert len(held) == 2
    assert all(row[1] == row[3] for row in held)
    due, found = (losses(tmp_path / f"{x}.jsonl") for x in ("alone", "killed"))
    assert found == pytest.approx(due, rel=1e-7)
    with jax.enable_x64(True):
        states = [
            nnx.load_state(tmp_path / x, step=8, only=nnx.Not(nnx.RngKey))
            for x in ("alone", "killed")
        ]
        for (path, x), (_, y) in zip(*(s.flat_state() for s in states), strict=True):
            assert np.allclose(x.value, y.value, rtol=1e-6, atol=1e-9), path


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("grain")
    return runpy.run_path(str(EXAMPLE))


def test_the_text_is_cut_into_pieces_with_the_bytes_that_follow(example):
    rows = example["text_rows"](64)
    pieces, due = rows.columns
    assert pieces.shape == due.shape
    assert pieces.shape[1] == 64
    assert len(rows) > 5000
    assert np.array_equal(pieces.ravel()[1:], due.ravel()[:-1])
    assert bytes(pieces[0].astype(np.uint8)).isascii()


def test_a_batch_is_the_same_on_any_number_of_processes(example, monkeypatch):
    rows = example["Rows"](np.arange(50))

    def drawn(count, skip=0):
        parts = []
        for rank in range(count):
            monkeypatch.setattr(example["jax"], "process_count", lambda: count)
            monkeypatch.setattr(example["jax"], "process_index", lambda rank=rank: rank)
            data = example["batches"](rows, 8, 3)
            if skip:
                data.set_state({"next_index": skip})
            parts.append([next(data)[0] for _ in range(15 - skip)])
        return [np.concatenate(x).tolist() for x in zip(*parts, strict=True)]

    whole = drawn(1)
    assert drawn(2) == drawn(4) == whole
    assert drawn(2, skip=9) == whole[9:]
    order = np.concatenate(whole)
    assert sorted(order[:50]) == list(range(50))
    assert order[:50].tolist() != order[50:100].tolist()
