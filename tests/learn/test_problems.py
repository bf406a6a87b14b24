"""Every problem: its text is whole, its example runs, its wrong answers are named."""

from __future__ import annotations

import doctest
import importlib

import pytest

from learn.mistakes import MISTAKES
from sortal.learn import judge, lessons
from sortal.learn.lesson import HEADINGS, Lesson

CASES = [
    pytest.param(lesson, pitfall, edits, id=f"{lesson.name}-{i}")
    for lesson in lessons()
    for i, (pitfall, *edits) in enumerate(MISTAKES[lesson.name])
]
EACH = pytest.mark.parametrize("lesson", lessons(), ids=lambda lesson: lesson.name)


@EACH
def test_a_text_has_all_parts_and_a_start_that_is_not_right(lesson: Lesson) -> None:
    assert tuple(lesson.sections) == HEADINGS
    assert len(lesson.hints) >= 3
    assert len(lesson.pitfalls) >= 3
    assert not judge(lesson, lesson.start, seed=2, rounds=1).right


@EACH
def test_the_worked_example_runs_and_prints_what_it_says(lesson: Lesson) -> None:
    parser, out = doctest.DocTestParser(), []
    test = parser.get_doctest(
        lesson.sections["Worked example"], {}, lesson.name, lesson.file, 0
    )
    assert test.examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    runner.run(test, out=out.append)
    assert not out, "".join(out)


@EACH
def test_the_solution_is_right(lesson: Lesson) -> None:
    verdict = judge(lesson, lesson.solution, seed=2, rounds=2)
    assert verdict.right, verdict


@pytest.mark.parametrize(("lesson", "pitfall", "edits"), CASES)
def test_a_wrong_answer_is_told_its_pitfall(lesson, pitfall, edits) -> None:
    source = lesson.solution
    for old, new in edits:
        assert source.count(old) >= 1, f"{old!r} is not in the solution"
        source = source.replace(old, new)
    verdict = judge(lesson, source, seed=2)
    assert not verdict.right
    assert verdict.pitfall == pitfall, verdict


@EACH
def test_every_pitfall_of_the_text_has_a_wrong_answer(lesson: Lesson) -> None:
    assert {pitfall for pitfall, *_ in MISTAKES[lesson.name]} == set(lesson.pitfalls)


def test_the_problems_are_numbered_from_one_to_twenty() -> None:
    assert [lesson.number for lesson in lessons()] == list(range(1, 21))
    assert all(importlib.import_module(lesson.module).check for lesson in lessons())


# Flax's own names for the same things: who learns with either is judged alike.
ALSO_IN_FLAX = {
    "kinds", "module", "call", "state_filter", "counters", "split_merge", "update",
    "batchnorm", "training_step",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ALSO_IN_FLAX))
@pytest.mark.parametrize("library", ["from sortal import nnx", "from flax import nnx"])
def test_the_same_solution_is_right_by_another_import(name: str, library: str) -> None:
    (lesson,) = (lesson for lesson in lessons() if lesson.name == name)
    source = lesson.solution.replace("import sortal as nnx", library)
    verdict = judge(lesson, source, seed=2, rounds=1)
    assert verdict.right, verdict
