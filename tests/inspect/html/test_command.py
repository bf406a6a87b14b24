"""``sortal show`` writes the page of a file or of what a function returns."""

from __future__ import annotations

import numpy as np
import pytest

import sortal
from sortal.inspect import cli

PROGRAM = """
import sortal

def make():
    return sortal.Linear(2, 3, rngs=sortal.Rngs(0))

def sized(n):
    return sortal.Linear(n, n, rngs=sortal.Rngs(0))

number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shown_program.py").write_text(PROGRAM)
    np.savez(tmp_path / "m.npz", w=np.ones(3))
    return tmp_path


def run(capsys, *words):
    status = cli.main(["show", *words])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_page_of_a_file_is_written(here, capsys):
    status, out, _ = run(capsys, "m.npz", "-o", "out.html")
    assert status == 0
    assert out.startswith("out.html: m.npz: 1 leaf, 24 B; ")
    assert (here / "out.html").read_text() == sortal.show("m.npz").html


def test_the_page_of_what_a_function_of_this_folder_returns(here, capsys):
    status, out, _ = run(capsys, "shown_program:make", "-o", "out.html")
    assert status == 0
    assert "Linear: 2 leaves, 36 B" in out
    assert '"numbers":[[' in (here / "out.html").read_text()


def test_shapes_alone_and_no_values(here, capsys):
    run(capsys, "shown_program:make", "-o", "a.html", "--abstract")
    assert "abstract: it has no values" in (here / "a.html").read_text()
    run(capsys, "m.npz", "-o", "b.html", "--no-values", "--title", "Mine")
    assert "values were not asked for" in (here / "b.html").read_text()
    assert "<h1>Mine</h1>" in (here / "b.html").read_text()


def test_two_are_compared(here, capsys):
    status, _, _ = run(capsys, "shown_program:make", "m.npz", "-o", "c.html")
    assert status == 0
    assert '"changes":' in (here / "c.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.npz"], "there is no "),
        (["shown_program:other"], "shown_program has no function other."),
        (["no_such_module:f"], "there is no module no_such_module, and no file "),
        (["shown_program:number"], "shown_program:number is no function, but 3."),
        (
            ["shown_program:sized"],
            (
                "shown_program:sized cannot be called without arguments (missing a "
                "required argument: 'n'). Write a function that takes none and returns "
                "the model."
            ),
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(here, capsys, words, message):
    status, out, err = run(capsys, *words, "-o", "x.html")
    assert (status, out) == (2, "")
    assert err.startswith("sortal show: ")
    assert message in err
    assert not (here / "x.html").exists()
