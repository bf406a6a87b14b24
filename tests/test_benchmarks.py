"""The benchmarks run, and each contender does the work that it is said to do."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optax")
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import checkpoints, decode, peers, sections, timing, transforms
from benchmarks import workload as w
from benchmarks.__main__ import main
from benchmarks.report import Row, Table, number, timed_row
from benchmarks.targets import check
from benchmarks.timing import Effort, Timing, compare

TINY = Effort(repeats=1, seconds=0.0, warmup=0)
FOUND, _ = peers.load()


@pytest.fixture(autouse=True)
def _no_full_collections(monkeypatch):
    """Nothing is timed here, and what other tests left is much to search through."""
    still = types.SimpleNamespace(
        collect=lambda: 0, freeze=lambda: None, unfreeze=lambda: None
    )
    for module in (timing, checkpoints):
        monkeypatch.setattr(module, "gc", still)


def test_the_model_has_the_size_that_the_table_names():
    model, adam = FOUND["sortal"].build(w.Blocks())
    import sortal

    assert len(list(sortal.iter_modules(model))) == 152
    assert len(sortal.state(model).paths()) == 300
    assert len(sortal.state(model, sortal.Param).paths()) == 200
    assert len(sortal.state(adam).paths()) == 402
    attributes = sum(len(vars(m)) for _, m in sortal.iter_modules(model))
    assert attributes == 1406


def _summary(x):
    return x.shape, float(x.sum())


@pytest.mark.parametrize("name", list(FOUND))
def test_two_linears_and_their_adam_state_have_fourteen_leaves(name):
    import jax

    if name == "brainstate":
        model, adam = FOUND[name].build(w.Pair())
        assert len(model.states()) + len(adam.held) == 14
    elif name in ("flax", "sortal_on_flax"):
        assert len(FOUND["flax"].variables(*FOUND[name].build(w.Pair()))) == 14
    else:
        assert len(jax.tree.leaves(FOUND[name].build(w.Pair()))) == 14


@pytest.mark.parametrize(
    "name", [n for n in FOUND if n not in ("raw", "nested", "brainstate")]
)
def test_contenders_hold_equal_leaves(name):
    import jax

    shape = w.Blocks(2)
    ours = jax.tree.leaves(FOUND["sortal"].build(shape)[0])
    theirs = jax.tree.leaves(FOUND[name].build(shape)[0])
    assert len(ours) == len(theirs)
    assert sorted(map(_summary, ours)) == sorted(map(_summary, theirs))


@pytest.mark.parametrize("name", list(FOUND))
def test_steps_change_leaves_each_time(name):
    for step in FOUND[name].operations(w.Blocks(2), (w.STEP,))[w.STEP].values():
        first, second = np.asarray(step()), np.asarray(step())
        np.testing.assert_allclose(second - first, 1.0)


def test_verbs_have_all_contenders():
    table = sections.verbs(FOUND, TINY, w.Blocks(1))
    assert [row.name for row in table.rows] == list(w.VERBS)
    assert all(row.values["sortal"] for row in table.rows)
    if "flax" in FOUND:
        without = [r.name for r in table.rows if "sortal on flax" not in r.values]
        assert without == [w.LEAVES]


def test_compiled_calls_have_all_contenders_and_all_ways_of_flax():
    table = sections.compiled(FOUND, TINY, w.Blocks(1), w.Blocks(1))
    assert [row.name for row in table.rows] == list(w.COMPILED)
    labels = {peer.LABEL for peer in FOUND.values()}
    if "flax" in FOUND:
        ways = ("graph=False", "jit_partial", "cached_partial")
        labels |= {f"flax {way}" for way in ways}
    assert all(labels | {"sortal/raw"} <= row.values.keys() for row in table.rows)


def test_each_lowering_traces_a_new_function(monkeypatch):
    traced = []
    normalize = w.normalize
    monkeypatch.setattr(
        w, "normalize", lambda *a: traced.append(1) or normalize(*a), raising=True
    )
    for name, peer in FOUND.items():
        (lower,) = peer.lowering(w.Blocks(1)).values()
        counts = []
        for _ in range(2):
            traced.clear()
            assert "dot_general" in lower().as_text()
            counts.append(len(traced))
        assert counts[0] == counts[1] > 0, name


def test_transforms_compute_the_same_in_all_contenders():
    """Each row refuses contenders that differ, so that all rows come is the claim."""
    table = transforms.transforms(FOUND, TINY, depth=1)
    rows = [f"{name}, eager" for name in transforms.ROWS]
    rows += [f"{name}, under jit" for name in transforms.ROWS]
    assert [row.name for row in table.rows] == rows
    assert all({"sortal", "raw jax"} <= row.values.keys() for row in table.rows)


def test_contenders_that_differ_are_not_timed():
    with pytest.raises(AssertionError, match="differ"):
        sections.agree("row", {"one": lambda: 1.0, "other": lambda: 2.0})


def test_decoders_give_the_same_tokens_and_others_are_not_timed():
    found = {n: decode.load(n, decode.SMALL, 2, 8) for n in ("sortal", "flax", "raw")}
    decode.agree(found, batch=2, steps=4)
    wrong = found["raw"]._replace(step=lambda token: token, loop=None)
    with pytest.raises(AssertionError, match="sortal and raw give different tokens"):
        decode.agree({"sortal": found["sortal"], "raw": wrong}, batch=2, steps=2)


def test_the_command_writes_both_files(tmp_path: Path):
    out = tmp_path / "deep" / "tiny"
    line = ["--quick", "--only", "tracing", "--peers", "sortal,raw", "--out", str(out)]
    assert main(line) == 0
    assert "Tracing and lowering" in out.with_suffix(".md").read_text()
    data = json.loads(out.with_suffix(".json").read_text())
    assert data["facts"]["python"]
    assert data["tables"][0]["rows"][0]["details"]["sortal"]["calls"] > 0


def test_checkpoints_are_timed_and_their_memory_measured(tmp_path, capsys):
    words = ["--quick", "--contenders", "sortal;raw file + fsync"]
    assert checkpoints.main([*words, "--directory", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for title in (
        "## Large: 4 MB", "## Small", "## Many", "## Gpt2: 1 MB in 148 leaves",
        "## Directories with 30 steps", "## Memory of a synchronous save",
    ):  # fmt: skip
        assert title in printed
    assert printed.count("blocked") == len(checkpoints.STATES)
    assert list(tmp_path.iterdir()) == []


def test_unknown_section_is_refused():
    with pytest.raises(SystemExit):
        main(["--only", "nothing"])


def test_compare_ranks_slow_below_fast():
    found = compare({"fast": lambda: None, "slow": lambda: sum(range(5000))}, TINY)
    assert found["slow"].best > found["fast"].best


def test_a_slow_call_is_measured_once():
    called = []
    found = compare({"slow": lambda: called.append(1)}, Effort(5, 0.0, 0, patience=0.0))
    assert len(called) == found["slow"].calls == 1


def test_ratios_and_targets():
    def timing(x):
        return Timing(x, x, 1)

    row = timed_row(w.NOOP, {"sortal on flax": timing(3.0), "raw jax": timing(2.0)})
    (line,) = check([Table("t", "us", [row])])
    assert line == (
        "met: jitted no-op, sortal on flax/raw: 1.50 (1.50 by minimums), at most 2"
    )
    row = timed_row(w.NOOP, {"sortal": timing(2.0), "raw jax": timing(1.0)})
    assert row.values["sortal/raw"] == 2.0
    lines = check([Table("t", "us", [row])])
    assert lines == [
        "MISSED: jitted no-op, sortal/raw: 2.00 (2.00 by minimums), at most 1.12"
    ]


def test_flatness_judges_from_a_thousand_leaves():
    rows = [Row(n, {"sortal": v}) for n, v in (("10", 9), ("1,000", 1), ("10,000", 3))]
    assert "NOT within" in sections.flatness(Table("t", "ns", rows))
    assert "3.00" in sections.flatness(Table("t", "ns", rows))
    rows = [
        Row(n, {"sortal": v, "raw jax": v * v})
        for n, v in (("1,000", 2), ("10,000", 3))
    ]
    assert "1.50, within 2. Raw JAX: 2.25." in sections.flatness(Table("t", "ns", rows))


def test_numbers_are_short():
    assert [number(x) for x in (None, 1234.6, 1.23456)] == ["-", "1,235", "1.23"]


def test_calls_over_several_devices_are_timed_beside_raw_jax(capsys) -> None:
    from benchmarks import sharded

    assert sharded.main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert sharded.STEP in out
    assert "at most 1.15" in out
