"""A verdict says what is wrong, with what, and what was found instead."""

from __future__ import annotations

import pytest

from sortal.learn import judge, lessons

FILTER = lessons()[3]


def test_a_right_answer_has_a_verdict_without_words() -> None:
    verdict = judge(FILTER, FILTER.solution, seed=2)
    assert verdict.right
    assert verdict.message == verdict.error == verdict.pitfall == ""


def test_a_wrong_answer_shows_what_was_expected_and_found() -> None:
    source = FILTER.solution.replace("(nnx.Variable):", "(nnx.Param):")
    verdict = judge(FILTER, source, seed=2, rounds=1)
    assert not verdict.right
    assert verdict.expected == "[4. 2. 1.]  float32[3]"
    assert verdict.found == "[4. 3. 1.]  float32[3]"
    assert "hidden=" in verdict.case


def test_a_mistake_that_is_not_known_has_no_pitfall() -> None:
    source = FILTER.solution.replace("dtype=float)", "dtype=float) * 7")
    verdict = judge(FILTER, source, seed=2, rounds=1)
    assert not verdict.right
    assert verdict.pitfall == ""


def test_arguments_differ_from_call_to_call_and_are_those_of_a_seed() -> None:
    source = "def state_filter_count(seed, x, hidden): return x"
    cases = [judge(FILTER, source, seed=seed).case for seed in (1, 1, 2, None, None)]
    assert cases[0] == cases[1]
    assert len(set(cases)) == 4


@pytest.mark.parametrize("ending", ["raise KeyError('k')", "import sys; sys.exit(0)"])
def test_what_an_answer_raises_is_a_verdict_with_its_lines(ending: str) -> None:
    verdict = judge(FILTER, f"def state_filter_count(seed, x, hidden): {ending}")
    assert not verdict.right
    assert "line 1, in state_filter_count" in verdict.error


def test_an_object_that_raises_when_the_judge_looks_at_it_is_a_verdict() -> None:
    source = (
        "import sortal as nnx\nclass Affine(nnx.Module):\n"
        "    def __init__(self, *a, rngs): pass\n"
        "    @property\n    def kernel(self): raise RuntimeError('not here')\n"
    )
    verdict = judge(lessons()[1], source)
    assert not verdict.right
    assert "RuntimeError: not here" in verdict.error


def test_a_fault_of_the_judge_is_not_a_verdict(monkeypatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("sortal.learn.judging.Answer", broken)
    with pytest.raises(ZeroDivisionError):
        judge(FILTER, "x = 1")
