"""Progress is kept in one file, and a file that cannot be had stops nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from sortal.learn import progress
from sortal.learn.progress import OVERRIDE, Progress


def test_what_was_saved_is_there_again(tmp_path: Path) -> None:
    file = tmp_path / "new" / "learn.json"
    first = Progress(file)
    first.done.add("kinds")
    first.hints["module"] = 2
    first.save()
    again = Progress(file)
    assert (again.done, again.hints) == ({"kinds"}, {"module": 2})
    assert first.notes == again.notes == []
    assert [f.name for f in file.parent.iterdir()] == ["learn.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"done": 1, "hints": {}}', '{"done": []}', "\xff"]
)
def test_a_file_that_cannot_be_read_counts_as_none_and_is_named(
    tmp_path: Path, text: str
) -> None:
    file = tmp_path / "learn.json"
    file.write_bytes(text.encode("latin-1"))
    found = Progress(file)
    assert found.done == set()
    (note,) = found.notes
    assert note.startswith("Progress could not be read (")
    found.save()
    assert Progress(file).notes == []


def test_a_place_that_cannot_be_written_is_a_note(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    found = Progress(blocked / "learn.json")
    found.notes.clear()
    found.save()
    (note,) = found.notes
    assert note.startswith("Progress could not be saved (")
    assert OVERRIDE in note


def test_a_user_without_a_home_can_learn(monkeypatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(progress, "place", homeless)
    found = Progress()
    found.save()
    (note,) = found.notes
    assert "home directory" in note


def test_the_place_is_that_of_the_environment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv(OVERRIDE, raising=False)
    assert progress.place() == tmp_path / "sortal" / "learn.json"
    monkeypatch.setenv(OVERRIDE, str(tmp_path / "mine.json"))
    assert progress.place() == tmp_path / "mine.json"
    monkeypatch.delenv(OVERRIDE)
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert progress.place() == tmp_path / ".local/share/sortal/learn.json"
