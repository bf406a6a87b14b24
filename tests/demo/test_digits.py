"""The demo on digits learns, and what it says of kinds is so."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

import sortal
from sortal.demo import digits
from sortal.inspect import cli


def options(*words: str):
    return digits.parse(list(words))


def trained(*words: str) -> digits.Result:
    chosen = options(*words)
    data = digits.load_digits(chosen.seed)
    steps = chosen.epochs * (len(data.labels) // chosen.batch)
    objects = digits.build(chosen.seed, steps, chosen.train)
    return digits.train(data, objects, chosen)


@pytest.fixture(scope="module")
def result() -> digits.Result:
    # The processor's seconds: the clock's depend on what else the machine is doing.
    started = time.process_time()
    found = trained()
    return found._replace(seconds=time.process_time() - started)


def test_held_out_accuracy_is_at_least_97_percent_within_a_minute(result):
    assert result.accuracy >= 0.97
    assert result.seconds < 60
    assert result.losses[-1] < result.losses[0]


def test_the_split_is_a_partition_drawn_by_the_seed():
    data, again, other = (digits.load_digits(seed) for seed in (0, 0, 1))
    assert len(data.images) + len(data.held_out_images) == 1797
    assert len(data.held_out_labels) == 449
    assert np.array_equal(data.images, again.images)
    assert not np.array_equal(data.labels, other.labels)
    pixels = np.concatenate([data.images, data.held_out_images])
    others = np.concatenate([other.images, other.held_out_images])
    assert sorted(map(np.ndarray.tobytes, pixels)) == sorted(
        map(np.ndarray.tobytes, others)
    )


def test_an_epoch_meets_no_image_twice():
    data = digits.load_digits(0)
    numbered = data._replace(images=np.arange(1348), labels=np.arange(1348))
    seen = [x for x, _ in digits.batches(numbered, 64, np.random.default_rng(0))]
    assert {x.shape for x in seen} == {(64,)}
    assert len(set(np.concatenate(seen))) == 64 * (1348 // 64)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    one, two, other = (trained("--epochs", "1", "--seed", s) for s in "001")
    state, same = sortal.state(one.model), sortal.state(two.model)
    assert not any(row.changed for row in sortal.inspect.differences(state, same))
    assert one.losses == two.losses != other.losses
    assert one.accuracy == two.accuracy


def test_each_kind_is_changed_by_whom_it_should_be(result):
    data = digits.load_digits(0)
    objects = digits.build(0, 100)[:2]
    before = sortal.state(objects)
    parts = digits.writers(*objects, data.images[:64], data.labels[:64])
    assert parts == {
        "forward pass": {
            digits.BatchStat: 2,
            sortal.BatchStat: 4,
            sortal.RngCount: 1,
            sortal.Variable: 1,
        },
        "optimizer": {
            sortal.Param: 8,
            sortal.OptArray: 2,
            sortal.OptState: 1,
            sortal.OptVariable: 16,
        },
        "you": {sortal.Variable: 1},
    }
    rows = sortal.inspect.differences(before, objects)
    assert not any(row.changed for row in rows), "the step was taken on copies"
    table = digits.kind_table("t", (result.model, result.optimizer), before, parts)
    cells = {row[0]: row[1:] for row in table.cells}
    assert cells["Param"] == ("8", "12,658", "50.6 kB", "8", "optimizer")
    assert cells["RngKey"][-2:] == ("0", "")
    assert cells["Variable"][-2:] == ("2", "forward pass 1, you 1")
    assert cells["digits.BatchStat"] == ("2", "128", "512 B", "2", "forward pass")
    assert cells["sortal.BatchStat"][-2:] == ("4", "forward pass")


def test_learning_the_head_only_leaves_other_parameters_as_they_were():
    model, optimizer, _ = digits.build(0, 21, "head")
    first = sortal.state(model)
    result = trained("--epochs", "1", "--train", "head")
    (params, *_) = sortal.inspect.differences(first, result.model)
    assert params.paths == (("head", "bias"), ("head", "kernel"))
    assert len(sortal.state(optimizer, sortal.OptVariable)) == 1


def test_a_quiet_run_prints_one_line(capsys):
    words = ["demo", "--quiet", "--epochs", "1", "--batch", "100000"]
    assert cli.main(words) == 0
    line = r"held-out accuracy \d+\.\d\d% after 1 epochs, \d+\.\d s\n"
    assert re.fullmatch(line, capsys.readouterr().out)
