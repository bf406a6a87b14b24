"""A few hundred random programs agree three ways, and what is planted is found."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import subprocess
import sys

import pytest

from fuzz import reference, runs, trial, world

ROOT = pathlib.Path(__file__).parents[2]


def agree(labels):
    outcome = runs.run(labels)
    assert not outcome.failures, "\n\n".join(map(str, outcome.failures))
    return outcome.counts


def program(*lines, compiled=False):
    codes = [compile(line, "<program>", "exec") for line in lines]
    return trial.Program("by hand", list(lines), codes, compiled)


def test_programs_of_verbs_and_edits_agree_three_ways():
    counts = agree(f"edits:{n}" for n in range(600))
    assert counts["programs in threads"] > 50
    assert sum(n for name, n in counts.items() if name.startswith("error")) > 50


def test_programs_that_compile_agree_three_ways():
    agree(f"compiled:{n}" for n in range(25))


def test_a_program_is_the_same_each_time_it_is_drawn():
    for label in ("edits:7", "compiled:8"):
        (a, _), (b, _) = (runs.draw(label, collections.Counter()) for _ in range(2))
        assert a.lines == b.lines


def test_what_only_a_kept_plan_gets_wrong_is_told_apart():
    lines = (
        "m = A(w=P(arr(1)))",
        "s = nnx.state(m)",
        "m.b = P(arr(2))",
        "t = nnx.state(m)",
    )
    from sortal._engine.plan import Plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "valid", lambda self, root: True)
        failure = trial.check(program(*lines))
    assert failure is not None
    assert "at the end" in failure.kept
    assert not failure.afresh


def test_a_program_that_differs_is_shortened(monkeypatch):
    from sortal._engine.plan import Plan

    monkeypatch.setattr(Plan, "valid", lambda self, root: True)
    failure = trial.check(
        program(
            "m = A(w=P(arr(1)))",
            "x = A(a=K(arr(3)))",
            "s = nnx.state(m)",
            "x.a = [K(arr(4))]",
            "m.b = P(arr(2))",
            "t = nnx.state(m)",
        )
    )
    assert len(trial.shrink(failure).program.lines) == 4


def test_an_array_that_something_keeps_is_found():
    lines = ("m = A(w=arr(1))", "kept.append(m.w)", "del m")
    found = program(*lines)
    kept = []
    expected = dataclasses.make_dataclass("E", ["outcomes", "portrait"])(
        ["", "", ""], world.World(reference).portrait()
    )
    with _global("kept", kept):
        assert "nothing leads to" in trial.run_live(found, expected)


@contextlib.contextmanager
def _global(name, value):
    from fuzz import zoo

    zoo.PLAIN[name] = value
    try:
        yield
    finally:
        del zoo.PLAIN[name]


def test_the_command_prints_a_table_and_replays_a_program():
    def run(*args):
        command = [sys.executable, "-m", "tests.fuzz", *args]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False
        )

    many = run("--edits", "20", "--jobs", "1")
    assert many.returncode == 0, many.stdout + many.stderr
    assert "no difference" in many.stdout
    assert "20 programs of edits" in many.stdout
    one = run("--replay", "edits:3")
    assert one.returncode == 0
    assert "agrees three ways" in one.stdout
