"""Checkpoints: which steps stay, which is the best, and who may write."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import shutil

import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sortal as nnx
from sortal.checkpoint import disk, files, saving
from sortal.checkpoint.manifest import File, Stored, to_bytes
from sortal.checkpoint.values import Place
from sortal.errors import ArgumentError, NoCheckpointError, SaveError, WriterError


def model(x: float = 0.0):
    return {"w": nnx.Param(jnp.full(2, float(x)))}


def test_the_newest_the_regular_and_the_best_stay(tmp_path):
    kept = nnx.Checkpoints(tmp_path, keep=2, keep_every=4, best="accuracy")
    scores = [0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6, math.nan]
    for step, score in enumerate(scores):
        kept.save(model(step), step=step, metrics={"accuracy": score, "loss": 1})
    assert kept.steps() == (0, 2, 4, 6, 7)
    assert (kept.latest(), kept.best()) == (7, 2)
    into = model()
    found = kept.restore(into, step="best")
    assert found.step == 2
    assert found.metrics == {"accuracy": 0.9, "loss": 1.0}
    assert into["w"].value[0] == 2
    assert kept.restore(into).step == 7


@settings(max_examples=10, suppress_health_check=[*HealthCheck], deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(1, 5)),
)
def test_what_stays_is_what_the_rules_say(tmp_path_factory, saved, keep, every):
    """A model of the rules, told in one line, kept beside the files."""
    with nnx.Checkpoints(
        tmp_path_factory.mktemp("k"), keep=keep, keep_every=every
    ) as kept:
        due: list[int] = []
        for step in saved:
            kept.save(model(step), step=step)
            due = [*(n for n in due if n != step), step]
            due = [n for n in due if n in due[-keep:] or (every and n % every == 0)]
            assert kept.steps() == tuple(sorted(due))


def test_less_may_be_better(tmp_path):
    with nnx.Checkpoints(tmp_path, keep=1, best="loss", mode="min") as kept:
        for step, loss in enumerate([3.0, 1.0, 2.0]):
            kept.save(model(), step=step, metrics={"loss": loss}, wait=False)
        kept.restore(model())
        assert kept.steps() == (1, 2)


def test_a_save_without_the_metric_of_the_best_is_refused(tmp_path):
    kept = nnx.Checkpoints(tmp_path, best="accuracy")
    with pytest.raises(SaveError, match=r"'accuracy', which is not among .*\['loss'\]"):
        kept.save(model(), step=0, metrics={"loss": 1.0})
    with pytest.raises(NoCheckpointError, match="has the metric 'accuracy'"):
        kept.restore(model(), step="best")


def test_numbers_that_keep_nothing_are_refused(tmp_path):
    for wrong in ({"keep": 0}, {"keep_every": -1}, {"keep": 1.5}, {"mode": "most"}):
        with pytest.raises(
            ArgumentError, match="keep and keep_every are numbers from 1"
        ):
            nnx.Checkpoints(tmp_path, **wrong)


def test_a_second_writer_is_refused_until_the_first_has_closed(tmp_path):
    first, second = nnx.Checkpoints(tmp_path), nnx.Checkpoints(tmp_path)
    first.save(model(), step=0)
    first.save(model(), step=1)
    with pytest.raises(WriterError):
        second.save(model(), step=2)
    assert second.restore(model()).step == 1
    first.close()
    second.save(model(), step=2)
    with pytest.raises(WriterError):
        first.delete(2)
    del second
    gc.collect()
    first.delete("latest")
    assert first.steps() == (0, 1)


def test_a_step_that_is_not_there_cannot_be_deleted(tmp_path):
    kept = nnx.Checkpoints(tmp_path)
    with pytest.raises(NoCheckpointError, match="no checkpoint in"):
        kept.delete("latest")
    kept.save(model(), step=1)
    with pytest.raises(NoCheckpointError, match="no step 3 in"):
        kept.delete(3)
    assert kept.latest() == 1


def test_the_policy_of_the_manager_holds_for_saving_and_restoring(tmp_path):
    policy = nnx.Policy({nnx.Cache: nnx.Rule(checkpoint="drop")})
    kept = nnx.Checkpoints(tmp_path, policy=policy)
    root = {"w": nnx.Param(jnp.ones(1)), "c": nnx.Cache(jnp.ones(1))}
    kept.save(root, step=0, only=nnx.Not(nnx.RngState))
    root["c"].value = root["w"].value = jnp.zeros(1)
    kept.restore(root)
    assert root["w"].value == 1
    assert root["c"].value == 0


# ---------------------------------------------------------------- what must not go
def saved(directory, *steps, keep=None):
    with nnx.Checkpoints(directory, keep=keep) as kept:
        for step in steps:
            kept.save(model(step), step=step)


def test_a_step_that_cannot_be_read_takes_no_place_among_those_kept(tmp_path):
    saved(tmp_path, 5)
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "manifest.json").write_bytes(b"junk")
    (tmp_path / "8").symlink_to(tmp_path / "5")
    saved(tmp_path, 6, keep=1)
    assert nnx.restore(tmp_path, model(), step=6).step == 6
    assert (tmp_path / "9" / "manifest.json").read_bytes() == b"junk"
    assert (tmp_path / "8").is_symlink()


@pytest.mark.parametrize("what", ["manifest", "chunk"])
def test_a_step_damaged_since_is_no_reason_to_delete_a_whole_one(tmp_path, what):
    saved(tmp_path, 1, 2)
    if what == "manifest":
        (tmp_path / "2" / "manifest.json").write_bytes(b"junk")
    else:
        (found,) = tmp_path.glob("2/*/Param/packed/c.0")
        found.unlink()
    saved(tmp_path, 3, keep=2)
    for step in (1, 3):
        assert nnx.restore(tmp_path, model(), step=step).step == step
    assert (tmp_path / "2" / "manifest.json").exists()


def test_the_step_just_saved_stays_whatever_its_number(tmp_path):
    saved(tmp_path, 100, 200, 300)
    saved(tmp_path, 150, keep=2)
    assert files.steps(tmp_path) == [150, 300]
    assert nnx.Checkpoints(tmp_path).latest() == 150


def test_a_training_goes_on_from_an_earlier_step(tmp_path):
    """What is newest is what was saved last, so the way not taken goes first."""
    with nnx.Checkpoints(tmp_path, keep=2, best="score") as kept:
        for step, score in ((10, 0.9), (20, 0.1), (30, 0.2), (40, 0.3)):
            kept.save(model(step), step=step, metrics={"score": score})
        assert kept.restore(model(), step="best").step == 10
        for step in (11, 12, 13):
            kept.save(model(step), step=step, metrics={"score": 0.5})
            assert kept.latest() == step
            assert step in kept.steps()
        assert kept.steps() == (10, 12, 13)
    into = model()
    assert nnx.restore(tmp_path, into).step == 13
    assert into["w"].value[0] == 13
    assert "w" in nnx.load_state(tmp_path).paths()[0]


def test_a_step_saved_again_is_the_newest(tmp_path):
    saved(tmp_path, 1, 2, 3)
    saved(tmp_path, 2)
    assert nnx.restore(tmp_path, model()).step == 2


def test_what_is_newest_does_not_depend_on_the_clock(tmp_path, monkeypatch):
    for step, year in ((3, 2030), (2, 2020), (1, 2010)):
        monkeypatch.setattr(saving, "now", lambda year=year: f"{year}-01-01T00:00:00")
        nnx.save(tmp_path, model(step), step=step)
    assert nnx.restore(tmp_path, model()).step == 1


def test_steps_of_an_older_format_come_before_those_saved_now(tmp_path):
    """Their folders have no number; among them, the number of the step says."""
    for step in (7, 9, 8):
        as_of_old(nnx.save(tmp_path, model(step), step=step).path)
    assert nnx.restore(tmp_path, model()).step == 9
    saved(tmp_path, 1, 2, keep=1)
    assert files.steps(tmp_path) == [2, 7, 8, 9]
    assert nnx.restore(tmp_path, model()).step == 2


def as_of_old(path):
    """Gives the folder of arrays the form of name that the first version gave."""
    manifest = files.read_manifest(path.parent, int(path.name))
    old = manifest._replace(folder=f"arrays-{int(path.name):016x}")
    (path / manifest.folder).rename(path / old.folder)
    (path / "manifest.json").write_bytes(to_bytes(old))


@pytest.mark.parametrize("how", ["an input error", "a newer format"])
def test_the_best_step_stays_when_its_manifest_cannot_be_read(
    tmp_path, how, monkeypatch
):
    rule = {"keep": 1, "best": "score"}
    with nnx.Checkpoints(tmp_path, **rule) as kept:
        kept.save(model(1), step=1, metrics={"score": 0.9})
        kept.save(model(2), step=2, metrics={"score": 0.1})
    manifest = tmp_path / "1" / "manifest.json"
    before = manifest.read_bytes()
    if how == "a newer format":
        manifest.write_bytes(of_version(before, 2))
    else:
        monkeypatch.setattr(disk, "read", failing(disk.read, "1"))
    with nnx.Checkpoints(tmp_path, **rule) as kept:
        kept.save(model(3), step=3, metrics={"score": 0.2})
    monkeypatch.undo()
    manifest.write_bytes(before)
    assert nnx.restore(tmp_path, model(), step=1).step == 1
    assert nnx.Checkpoints(tmp_path, **rule).best() == 1


def failing(read, step):
    def other(file):
        if file.parent.name == step:
            raise OSError(5, "Input/output error")
        return read(file)

    return other


def of_version(data, version):
    body = json.loads(data)["manifest"] | {"version": version}
    text = json.dumps(body, separators=(",", ":")).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    return b'{"sha256":"' + digest + b'","manifest":' + text + b"}\n"


def test_a_manager_deletes_only_what_managers_saved(tmp_path):
    for step in range(10):
        nnx.save(tmp_path, model(step), step=step)
    saved(tmp_path, 10, 11, 12, 13, keep=2)
    assert files.steps(tmp_path) == [*range(10), 12, 13]


def test_nothing_outside_the_directory_is_deleted(tmp_path):
    """A manifest by hand names a folder that is a link to somewhere else."""
    home = tmp_path / "home"
    (home / "Documents").mkdir(parents=True)
    (home / "Documents" / "letter").write_text("mine")
    run = tmp_path / "run"
    saved(run, 1)
    step = run / "1"
    manifest = files.read_manifest(run, 1)
    (leaf,) = manifest.leaves
    last = leaf._replace(
        passing=True,
        value=leaf.value._replace(place=Place("Documents", None), dtype="float32"),
    )
    hostile = manifest._replace(
        folder="data",
        leaves=(last,),
        arrays={"Documents": Stored("float32", (2,), (2,))},
        files={
            name: File(12, "crc32c:00000000")
            for name in ("zarr.json", "Documents/zarr.json", "Documents/c.0",
                         "Param/zarr.json")
        },
    )  # fmt: skip
    (step / "data").symlink_to(home)
    (step / "manifest.json").write_bytes(to_bytes(hostile))
    with pytest.raises(nnx.errors.DamagedError, match="no name that a save gives"):
        files.read_manifest(run, 1)
    for name in ("arrays-0123456789abcdef", "arrays-000000000009-01234567-kept"):
        (step / name).symlink_to(home)
        (run / name).symlink_to(home)
    (run / "7").symlink_to(home)
    (home / "arrays-0123456789abcdef").mkdir()
    saved(run, 2, 3, keep=1)
    assert (home / "Documents" / "letter").read_text() == "mine"
    assert (home / "arrays-0123456789abcdef").is_dir()


def test_the_cost_of_a_save_does_not_grow_with_the_steps(tmp_path, monkeypatch):
    """Counted in manifests that are read."""
    counts = []
    real = disk.read

    def counted(file):
        counts[-1] += 1
        return real(file)

    monkeypatch.setattr(disk, "read", counted)
    with nnx.Checkpoints(tmp_path, keep=2, keep_every=2, best="score") as kept:
        for step in range(12):
            counts.append(0)
            kept.save(model(step), step=step, metrics={"score": step % 5})
    for step in range(12, 16):
        counts.append(0)
        nnx.save(tmp_path, model(step), step=step)
    assert max(counts[6:12]) <= max(counts[:6])
    assert counts[12:] == [0] * 4


def test_a_manager_whose_directory_was_removed_saves_again(tmp_path):
    run = tmp_path / "run"
    with nnx.Checkpoints(run) as kept:
        kept.save(model(), step=1)
        shutil.rmtree(run)
        kept.save(model(), step=2)
        assert kept.steps() == (2,)
        with pytest.raises(WriterError):
            nnx.save(run, model(), step=3)


def test_the_best_step_says_why_it_lacks_keep_last_leaves(tmp_path):
    root = {**model(), "t": nnx.Cache(jnp.ones(1), checkpoint="keep-last")}
    with nnx.Checkpoints(tmp_path, best="score") as kept:
        for step, score in ((1, 0.9), (2, 0.1)):
            kept.save(root, step=step, metrics={"score": score})
        with pytest.raises(nnx.errors.RestoreError, match="Only the step saved last"):
            kept.restore(root, step="best")
        assert kept.restore(root, step="best", partial=True).step == 1


def test_a_best_step_that_another_takes_the_place_of_is_looked_for_again(
    tmp_path, monkeypatch
):
    kept = nnx.Checkpoints(tmp_path, best="score", keep=1)
    kept.save(model(1), step=1, metrics={"score": 0.1})
    real, due = kept._find, [1]

    def slow(step):
        found = real(step)
        for _ in due[:1]:
            due.clear()
            kept.save(model(2), step=2, metrics={"score": 0.2})
        return found

    monkeypatch.setattr(kept, "_find", slow)
    assert kept.restore(model(), step="best").step == 2


def test_metrics_that_are_no_numbers_are_refused_all_at_once(tmp_path):
    kept = nnx.Checkpoints(tmp_path)
    with pytest.raises(SaveError, match=r"(?s)loss: None.*'high': '1'") as caught:
        kept.save(model(), step=0, metrics={"loss": None, "high": "1", "x": 1})
    assert "'x'" not in str(caught.value)
    with pytest.raises(SaveError, match=r"metrics are numbers by name.*\n  0\.5"):
        kept.save(model(), step=0, metrics=0.5)
    assert kept.steps() == ()


def test_a_best_step_needs_the_name_of_a_metric(tmp_path):
    """Else no step would ever be kept for being best."""
    for wrong in (3, ("loss",), True):
        with pytest.raises(ArgumentError, match="the name of a metric; found best="):
            nnx.Checkpoints(tmp_path, best=wrong)
    nnx.save(tmp_path, nnx.Rngs(0), step=1)
    kept = nnx.Checkpoints(tmp_path)
    with pytest.raises(NoCheckpointError, match="no metric to tell by: give it the"):
        kept.restore(nnx.Rngs(0), step="best")
