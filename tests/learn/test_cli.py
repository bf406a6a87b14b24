"""What a learner sees: the list, a lesson, hints, a verdict, a solution."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from sortal.inspect import cli as command
from sortal.learn import Verdict, cli, judge, lessons
from sortal.learn.process import Judged
from sortal.learn.progress import OVERRIDE, Progress


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path: Path) -> None:
    """An empty folder, progress of its own, and judging in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(OVERRIDE, str(tmp_path / "progress.json"))

    def here(lesson, file: Path) -> Judged:
        name = str(file)
        verdict = judge(lesson, file.read_text(), filename=name, seed=2, rounds=1)
        return Judged(verdict, "printed\n")

    monkeypatch.setattr(cli, "judge_apart", here)


def said(capsys, *words: str, status: int = 0) -> str:
    assert cli.main(words) == status
    return capsys.readouterr().out


def test_the_list_shows_all_twenty_and_what_is_next(capsys) -> None:
    out = said(capsys)
    assert len(out.splitlines()) == 22
    assert "  [ ]  4  The state filter\n" in out
    assert out.endswith("0 of 20 done. Next: sortal learn 1\n")


def test_it_is_a_command_of_sortal(capsys) -> None:
    assert command.main(["learn"]) == 0
    assert "The state filter" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["learn", "--help"])
    assert capsys.readouterr().out.startswith("usage: sortal learn")


def test_a_problem_is_shown_and_its_file_written_once(capsys) -> None:
    out = said(capsys, "4")
    assert out.startswith("# 4. The state filter\n")
    assert "Your file:   04_state_filter.py\n" in out
    assert "sortal learn 4 --check 04_state_filter.py" in out
    file = Path("04_state_filter.py")
    assert file.read_text() == "# Problem 4: The state filter\n\n" + lessons()[3].start
    file.write_text("mine")
    assert "(it was there already, and is left as it is)" in said(capsys, "4")
    assert file.read_text() == "mine"


def test_a_file_that_cannot_be_written_is_printed(capsys, monkeypatch) -> None:
    def refused(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    out = said(capsys, "4")
    assert "04_state_filter.py could not be written: [Errno 13]" in out
    assert "class Affine(nnx.Module):" in out


def test_hints_come_one_at_a_time_and_again_by_number(capsys) -> None:
    hints = lessons()[3].hints
    for i, hint in enumerate(hints, 1):
        assert said(capsys, "4", "--hint") == f"Hint {i} of {len(hints)}: {hint}\n\n"
    assert "You have had all 4 hints" in said(capsys, "4", "--hint")
    assert said(capsys, "4", "--hint", "1").startswith("Hint 1 of 4: ")
    assert said(capsys, "1", "--hint").startswith("Hint 1 of 3: ")
    assert cli.main(["4", "--hint", "9"]) == 2
    assert "there are hints 1 to 4, found 9" in capsys.readouterr().err


def test_a_wrong_answer_is_explained_and_a_right_one_counts(capsys) -> None:
    lesson = lessons()[3]
    file = Path("04_state_filter.py")
    file.write_text(lesson.solution.replace("(nnx.Variable)", "(nnx.Param)"))
    out = said(capsys, "4", "--check", status=1)
    assert out.startswith("Your code printed:\n    printed\n\nNot yet. ")
    assert "expected:\n    [4. 2. 1.]  float32[3]" in out
    assert "found:\n    [4. 3. 1.]  float32[3]" in out
    assert "Pitfall: **`BatchStat` derived from `Param`**. A subclass of" in out
    assert out.endswith("A hint: sortal learn 4 --hint\n")
    assert Progress().done == set()
    file.write_text(lesson.solution)
    out = said(capsys, "4", "--check", "04_state_filter.py")
    assert "Right! Problem 4, The state filter, is done. Next: sortal learn 5\n" in out
    assert "  [x]  4  The state filter\n" in said(capsys)


def test_an_exception_is_shown_with_its_line(capsys) -> None:
    Path("a.py").write_text("x = 1\ny = x / 0\n")
    out = said(capsys, "4", "--check", "a.py", status=1)
    assert '    File "a.py", line 2, in <module>' in out
    assert "    ZeroDivisionError: division by zero" in out


def test_what_the_terminal_cannot_show_is_escaped(monkeypatch) -> None:
    printed = Judged(Verdict(right=False, found="\u2260\ud800"), "\u00e9\n")
    monkeypatch.setattr(cli, "judge_apart", lambda *_: printed)
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr("sys.stdout", ascii_only)
    assert cli.main(["4", "--check"]) == 1
    ascii_only.seek(0)
    out = ascii_only.read()
    assert "    \\xe9\n" in out
    assert "    \\u2260\\ud800\n" in out


def test_the_last_problem_ends_the_course(capsys, monkeypatch) -> None:
    progress = Progress()
    progress.done = {lesson.name for lesson in lessons()[:-1]}
    progress.save()
    right = Judged(Verdict(right=True), "")
    monkeypatch.setattr(cli, "judge_apart", lambda *_: right)
    assert "That was the last of the 20.\n" in said(capsys, "20", "--check")
    assert said(capsys).endswith("20 of 20 done. That is all of them!\n")


def test_a_solution_is_shown_and_is_right(capsys) -> None:
    out = said(capsys, "4", "--solution")
    assert out == lessons()[3].solution


def test_on_a_terminal_markdown_is_laid_out(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    out = said(capsys, "4", "--hint")
    assert out.startswith("Hint 1 of 4: ")
    assert "nnx.state(model)" in out
    assert "`" not in out


def test_progress_that_cannot_be_saved_is_said_and_stops_nothing(
    capsys, monkeypatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(OVERRIDE, str(tmp_path / "file" / "x.json"))
    assert cli.main(["4", "--hint"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Hint 1 of 4")
    assert "Progress could not be saved" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0"], "there are problems 1 to 20, found 0"),
        (["21"], "there are problems 1 to 20, found 21"),
        (["x"], "invalid int value: 'x'"),
        (["--hint"], "say which problem, as in: sortal learn 4 --hint"),
        (["4", "--hint", "--solution"], "not allowed with argument"),
    ],
)
def test_what_cannot_be_done_is_refused(capsys, words, message) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(capsys) -> None:
    assert cli.main(["4", "--check"]) == 2
    err = capsys.readouterr().err
    assert "04_state_filter.py cannot be read: " in err
    assert "sortal learn 4 writes a file to edit." in err
