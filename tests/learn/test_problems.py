"""Every problem: its text is whole, its example runs, its wrong answers are named."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

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
    verdict = judge(lesson, lesson.start, seed=2, rounds=1)
    assert not verdict.right
    # Who has written nothing has made no mistake, but where the start is to be mended.
    mistaken = "a Python number in the model" if lesson.name == "recompilation" else ""
    assert (verdict.pitfall, verdict.error) == (mistaken, "")


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
    verdict = judge(lesson, lesson.solution, seed=2, rounds=1)
    assert verdict.right, verdict


@pytest.mark.parametrize(("lesson", "pitfall", "edits"), CASES)
def test_a_wrong_answer_is_told_its_pitfall(lesson, pitfall, edits) -> None:
    source = lesson.solution
    for old, new in edits:
        assert source.count(old) >= 1, f"{old!r} is not in the solution"
        source = source.replace(old, new)
    verdict = judge(lesson, source, seed=2, rounds=1)
    assert not verdict.right
    assert verdict.pitfall == pitfall, verdict


@EACH
def test_every_pitfall_of_the_text_has_a_wrong_answer(lesson: Lesson) -> None:
    assert {pitfall for pitfall, *_ in MISTAKES[lesson.name]} == set(lesson.pitfalls)


@EACH
def test_a_check_names_no_pitfall_that_the_text_has_not(lesson: Lesson) -> None:
    file = importlib.import_module(lesson.module).__file__
    tree = ast.parse(Path(file).read_text())
    named = [
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.keyword)
        if n.arg == "pitfall"
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.List):  # of pitfalls and the results they lead to
            pairs = [p for p in node.elts if isinstance(p, ast.Tuple)]
            named += [pair.elts[0] for pair in pairs]
        if isinstance(node, ast.FunctionDef) and node.name in {"_pitfall", "_why"}:
            named += [n.value for n in ast.walk(node) if isinstance(n, ast.Return)]
    texts = {n.value for part in named for n in _results(part)}
    assert texts <= {*lesson.pitfalls, ""}


def _results(node: ast.expr) -> list[ast.Constant]:
    """The texts that an expression may be."""
    if isinstance(node, ast.IfExp):
        return _results(node.body) + _results(node.orelse)
    return [node] if isinstance(node, ast.Constant) else []


def test_the_problems_are_numbered_from_one_to_twenty() -> None:
    assert [lesson.number for lesson in lessons()] == list(range(1, 21))
    assert all(importlib.import_module(lesson.module).check for lesson in lessons())


# What Flax has no name for is written with Flax in another way.
IN_FLAX = {
    "paths": """
from flax import nnx


def decoder_kernels(model):
    def below(path, variable):
        return path[0] == "decoder" and path[-1] == "kernel"

    return nnx.state(model, nnx.All(nnx.Param, below))
""",
    "optimizer_groups": """
import jax
import optax
from flax import nnx


def make_optimizer(model, fast, slow):
    def groups(params):
        def group(path, leaf):
            return "head" if "head" in str(path[0]) else "body"

        return jax.tree_util.tree_map_with_path(group, params)

    rates = {"head": optax.sgd(fast), "body": optax.sgd(slow)}
    return nnx.Optimizer(model, optax.partition(rates, groups), wrt=nnx.Param)
""",
    "checkpoint": """
import sortal
from flax import nnx


def save_params(model, directory):
    sortal.save(directory, model, step=0, only=nnx.Param)


def load_params(model, directory):
    sortal.restore(directory, model, only=nnx.Param)
""",
}
FLAX = "from flax import nnx"


@EACH
@pytest.mark.parametrize("library", ["from sortal import nnx", FLAX])
def test_an_answer_is_right_by_either_import(lesson: Lesson, library: str) -> None:
    source = lesson.solution.replace("import sortal as nnx", library)
    if library == FLAX:
        source = IN_FLAX.get(lesson.name, source)
    verdict = judge(lesson, source, seed=2, rounds=1)
    if (lesson.name, library) == ("sharding", FLAX):  # Flax's kinds have no options
        assert "unexpected keyword argument 'spec'" in verdict.error
        assert "this problem is for Sortal" in lesson.text
    else:
        assert verdict.right, verdict


@pytest.mark.parametrize(
    ("pitfall", "edits"), [(p, e) for p, *e in MISTAKES["state_filter"]]
)
def test_pitfalls_are_named_by_flax_too(pitfall, edits) -> None:
    source = lessons()[3].solution.replace("import sortal as nnx", FLAX)
    for old, new in edits:
        source = source.replace(old, new)
    assert judge(lessons()[3], source, seed=2, rounds=1).pitfall == pitfall
