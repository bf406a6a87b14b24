"""The benchmark of faults: a little of each attack, and what it must notice."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import sortal
from benchmarks import attacks, histories
from benchmarks.attacks import BAD
from sortal.checkpoint import files, manager


def bad(found):
    return {what: n for what, n in found.items() if what in BAD and n}


def test_manifests_changed_by_each_rule_do_no_harm(tmp_path):
    found = attacks.lying(tmp_path, 3 * len(attacks.RULES))
    assert not bad(found)
    assert found["noticed"] > found["equal"]


def test_links_and_pipes_do_no_harm(tmp_path):
    found = attacks.links(tmp_path, 20)
    assert not bad(found)
    assert found["noticed"]


@pytest.mark.parametrize("jump", [False, True])
def test_histories_lose_nothing(tmp_path, jump):
    assert histories.histories(tmp_path, 15, jump) == {"kept": 15, "lost": 0}


def test_a_manager_that_deletes_one_too_many_is_noticed(tmp_path, monkeypatch):
    delete_old = manager.Checkpoints._delete_old

    def more(self, saved):
        delete_old(self, saved)
        kept = [x for x in files.by_age(self.directory) if x.kept]
        if len(kept) > 2:
            files.forget(self.directory, kept[0].number)

    monkeypatch.setattr(manager.Checkpoints, "_delete_old", more)
    assert histories.histories(tmp_path, 15)["lost"]


def test_a_restore_of_other_numbers_and_a_raw_error_are_noticed(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sortal, "restore", lambda *_, **__: None)
        assert attacks.lying(tmp_path / "a", 9)["silent"] == 9

    def fail(*_, **__):
        raise KeyError("x")

    monkeypatch.setattr(sortal, "restore", fail)
    assert attacks.lying(tmp_path / "b", 9)["raw"] >= 9


def test_something_touched_outside_is_noticed(tmp_path, monkeypatch):
    def touch(run):
        (run.parent / "outside" / "file").write_text("other")

    monkeypatch.setattr(attacks, "_next", touch)
    assert attacks.links(tmp_path, 3)["outside"]


def test_a_hang_is_noticed():
    start = time.monotonic()
    with pytest.raises(attacks._HangError), attacks._limited(1):
        time.sleep(20)
    assert time.monotonic() - start < 15
