"""Every Python example in the README and under docs/ runs."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python *\n(.*?)^``` *$", re.MULTILINE | re.DOTALL)
# An example that cannot run here (another library, another machine) says why in a line
# of its own above the fence.
EXCUSE = re.compile(r"<!-- not run: \S.* -->\s*\Z")


def examples(text: str) -> list[tuple[int, str]]:
    """The line number and the code of each fenced Python block that is to run."""
    return [
        (text.count("\n", 0, fence.start(1)), fence.group(1))
        for fence in FENCE.finditer(text)
        if not EXCUSE.search(text, 0, fence.start())
    ]


def run(text: str, name: str) -> list[str]:
    """Runs the blocks of one document, in one namespace; the failures as text.

    A block with prompts is a doctest; one without is executed as it stands.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    parser = doctest.DocTestParser()
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    failures: list[str] = []
    for line, code in examples(text):
        if ">>>" in code:
            test = parser.get_doctest(code, names, name, name, line)
            runner.run(test, out=failures.append, clear_globs=False)
            names.update(test.globs)
        else:
            padded = "\n" * line + code
            try:
                exec(compile(padded, name, "exec"), names)  # noqa: S102 - our own text
            except Exception as error:  # noqa: BLE001 - any failure is reported
                failures.append(f"{name}:{line + 1}: {type(error).__name__}: {error}")
    return failures


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_example_in_a_document_runs(document: Path) -> None:
    failures = run(document.read_text(), document.name)
    assert not failures, "\n".join(failures)


def test_the_readme_has_examples() -> None:
    assert examples((ROOT / "README.md").read_text())


def test_blocks_of_a_document_share_their_names() -> None:
    text = "```python\nx = 1\n```\n\n```python\n>>> x + 1\n2\n>>> y = 3\n```\n"
    assert run(text + "```python\nassert y == 3\n```\n", "d") == []


def test_a_wrong_result_is_caught_with_its_line() -> None:
    (failure,) = run("one\n\n```python\n>>> 1 + 1\n3\n```\n", "d")
    assert 'File "d", line 4' in failure
    assert "Expected:\n    3\nGot:\n    2" in failure


def test_a_failing_block_without_prompts_is_caught() -> None:
    (failure,) = run("```python\nassert 1 == 2, 'no'\n```\n", "d")
    assert failure == "d:2: AssertionError: no"


def test_only_a_block_with_a_stated_reason_is_left_out() -> None:
    block = "```python\n1 / 0\n```\n"
    assert run("<!-- not run: needs two machines -->\n" + block, "d") == []
    assert len(run("<!-- not run: -->\n" + block, "d")) == 1
    assert len(run("<!-- not run: a reason -->\nThen:\n" + block, "d")) == 1


def test_blocks_in_other_languages_are_not_run() -> None:
    assert examples("```\n1 / 0\n```\n```sh\nfalse\n```\n```pycon\n1 / 0\n```\n") == []
