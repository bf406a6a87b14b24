"""The command ``sortal`` says what it is asked, and what is missing in one sentence."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

from sortal.demo import digits
from sortal.inspect import cli


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"sortal {cli.version()}\n"


def test_a_tree_that_is_not_installed_says_so(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert cli.version() == "(source)"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"1.2 of {name}")
    assert cli.version() == "1.2 of sortal"


def test_help_lists_the_demo(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    assert "learn handwritten digits" in capsys.readouterr().out


def test_help_of_the_demo_lists_its_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: sortal demo")
    for option in ("--epochs", "--seed", "--batch", "--train", "--quiet"):
        assert option in out


def test_without_a_command_help_is_printed_and_the_exit_code_is_2(capsys):
    assert cli.main([]) == 2
    assert "usage: sortal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no"], "unrecognized arguments: --no"),
        (["other"], "invalid choice: 'other'"),
        (["demo", "--no"], "sortal demo: error: unrecognized arguments: --no"),
        (["demo", "--epochs", "0"], "--epochs: must be 1 or more, found 0"),
        (["demo", "--epochs", "x"], "--epochs: invalid"),
        (["demo", "--train", "tail"], "invalid choice: 'tail'"),
    ],
)
def test_a_wrong_word_is_named_and_the_exit_code_is_2(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_words_after_the_command_are_the_demos(monkeypatch):
    seen = []
    monkeypatch.setattr(digits, "main", lambda argv, prog: seen.append(argv) or 0)
    assert cli.main(["demo", "--seed", "3", "--quiet"]) == 0
    assert seen == [["--seed", "3", "--quiet"]]


def test_without_scikit_learn_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["demo"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "The digits come with scikit-learn, which is not installed. Install it with: "
        "pip install scikit-learn\n"
    )


def test_stopping_from_the_keyboard_leaves_no_traceback(monkeypatch, capsys):
    def stop(argv, prog):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "main", stop)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "\nStopped.\n"
