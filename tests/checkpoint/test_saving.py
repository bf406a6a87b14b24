"""save: what is written, what is refused, and what a failure leaves behind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from benchmarks import faults
from sortal.checkpoint import disk, files
from sortal.checkpoint.verifying import verify
from sortal.errors import ArgumentError, SaveError, StructureError, WriterError


class Buffer(nnx.Variable, checkpoint="drop"):
    pass


class Last(nnx.Variable, checkpoint="keep-last"):
    pass


def test_a_step_is_a_folder_with_a_manifest_and_one_group_for_each_kind(tmp_path):
    root = {"w": nnx.Param(jnp.ones(3)), "m": nnx.BatchStat(jnp.ones(3))}
    saving = nnx.save(tmp_path, root, step=7)
    assert saving.path == tmp_path / "7"
    assert saving.done
    assert saving.step == 7
    assert {p.name for p in saving.path.iterdir()} >= {"manifest.json"}
    (folder,) = saving.path.glob("arrays-*")
    groups = {p.name for p in folder.iterdir() if p.is_dir()}
    assert groups == {"Param", "BatchStat"}


def test_only_saves_what_the_filter_takes(tmp_path):
    nnx.save(tmp_path, nnx.BatchNorm(3, rngs=nnx.Rngs(0)), step=0, only=nnx.Param)
    assert nnx.load_state(tmp_path).paths() == (("bias",), ("scale",))


def test_kinds_policies_and_metadata_say_what_is_dropped(tmp_path):
    root = {
        "a": Buffer(jnp.ones(1)),
        "b": nnx.Cache(jnp.ones(1)),
        "c": nnx.Param(jnp.ones(1)),
        "d": nnx.Param(jnp.ones(1), checkpoint="drop"),
    }
    policy = nnx.Policy({nnx.Cache: nnx.Rule(checkpoint="drop")})
    nnx.save(tmp_path, root, step=0, policy=policy)
    assert nnx.load_state(tmp_path).paths() == (("c",),)
    # What is not due is left as it is, without a word.
    root["c"].value = jnp.zeros(1)
    nnx.restore(tmp_path, root, policy=policy)
    assert root["c"].value == 1


def test_keep_last_goes_when_a_newer_step_is_saved(tmp_path):
    root = {"a": Last(jnp.ones(3)), "b": nnx.Param(jnp.ones((1100, 1000)))}
    root["c"] = Last(jnp.full((1100, 1000), 2.0))
    nnx.save(tmp_path, root, step=1)
    assert len(nnx.load_state(tmp_path, step=1).paths()) == 3
    nnx.save(tmp_path, root, step=2)
    assert nnx.load_state(tmp_path, step=1).paths() == (("b",),)
    assert len(nnx.load_state(tmp_path, step=2).paths()) == 3
    left = [p.name for p in tmp_path.glob("1/arrays-*/Last/*")]
    assert left == ["zarr.json"]
    with pytest.raises(nnx.errors.RestoreError, match=r"missing: a \(Last\)"):
        nnx.restore(tmp_path, root, step=1)


def test_an_interrupted_removal_of_keep_last_data_is_done_by_the_next_save(
    tmp_path, monkeypatch
):
    root = {"a": Last(jnp.ones(3)), "b": nnx.Param(jnp.ones(3)), "n": Last(7)}
    nnx.save(tmp_path, root, step=1)

    def killed(*_):
        raise OSError(5, "killed")

    monkeypatch.setattr(files, "remove_arrays", killed)
    with pytest.raises(SaveError, match="tidying up"):
        nnx.save(tmp_path, root, step=2)
    monkeypatch.undo()
    assert nnx.load_state(tmp_path, step=1).paths() == (("b",),)
    assert list(tmp_path.glob("1/arrays-*/Last/packed*"))
    nnx.save(tmp_path, {"b": root["b"]}, step=3)
    assert [p.name for p in tmp_path.glob("1/arrays-*/Last/*")] == ["zarr.json"]
    assert not list(tmp_path.glob("*/.last-*"))
    assert verify(tmp_path, 1).faults == verify(tmp_path, 1).extra == ()


def test_a_step_saved_again_is_replaced_whole(tmp_path):
    nnx.save(tmp_path, {"w": nnx.Param(jnp.ones(3)), "x": nnx.Cache(1)}, step=0)
    nnx.save(tmp_path, {"w": nnx.Param(jnp.zeros(3))}, step=0)
    assert nnx.load_state(tmp_path).paths() == (("w",),)
    assert len(list((tmp_path / "0").iterdir())) == 2


def test_a_wrong_number_of_a_step_is_refused(tmp_path):
    for step in (-1, 1.5, True, "3", None, 10**18):
        with pytest.raises(ArgumentError, match="a step is a whole number, zero or"):
            nnx.save(tmp_path, nnx.Rngs(0), step=step)
    assert nnx.save(tmp_path, nnx.Rngs(0), step=np.int64(3)).step == 3


def test_a_save_inside_a_transform_is_refused(tmp_path):
    def inside(x):
        nnx.save(tmp_path, {"w": nnx.Param(x)}, step=0)

    with pytest.raises(nnx.TraceError, match="save inside a transform would run once"):
        jax.jit(inside)(jnp.ones(2))


def test_a_model_without_leaves_is_saved(tmp_path):
    nnx.save(tmp_path, {"layers": []}, step=0)
    assert nnx.restore(tmp_path, {"layers": []}).leaves == ()


def test_a_static_that_cannot_be_hashed_is_refused_by_path(tmp_path):
    model = nnx.Module()
    model.options = bytearray()
    with pytest.raises(StructureError, match="options"):
        nnx.save(tmp_path, model, step=0)


def test_two_writers_of_one_directory_are_refused(tmp_path):
    held = disk.Lock(tmp_path)
    with pytest.raises(WriterError, match=r"another writer is at work in .*process \d"):
        nnx.save(tmp_path, nnx.Rngs(0), step=0)
    held.release()
    nnx.save(tmp_path, nnx.Rngs(0), step=0)


# ------------------------------------------------------------------- what goes wrong
def test_a_full_disk_is_a_clear_error_and_leaves_earlier_steps(tmp_path):
    found = faults.starved(tmp_path, 6)
    assert found["refused"]
    assert found["intact"] == 6
    assert found["crash"] == found["lost"] == found["left behind"] == 0
    with (
        faults.small_files(50_000),
        pytest.raises(SaveError, match=r"saving step 9 .* failed; nothing was commit"),
    ):
        nnx.save(tmp_path, faults.model(1, 1.0), step=9)


def test_a_read_only_directory_is_a_clear_error():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        with (
            faults.read_only(folder),
            pytest.raises(SaveError, match=r"cannot write to .*Permission denied"),
        ):
            nnx.save(folder, nnx.Rngs(0), step=0)


def test_a_file_in_the_place_of_the_directory_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot write to"):
        nnx.save(tmp_path / "file", nnx.Rngs(0), step=0)


def test_what_others_put_there_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "notes.txt").write_text("mine")
    (tmp_path / "4").write_text("a file")
    nnx.save(tmp_path, nnx.Rngs(0), step=1)
    assert files.steps(tmp_path) == [1]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "3" / "notes.txt").read_text() == "mine"


def test_leftovers_of_a_killed_save_are_ignored_and_cleaned_up(tmp_path):
    nnx.save(tmp_path, nnx.Rngs(0), step=1)
    for step in ("1", "2"):
        left = tmp_path / step / "arrays-0123456789abcdef"
        left.mkdir(parents=True)
        (left / "junk").write_text("")
        (tmp_path / step / ".manifest-0123456789abcdef").write_text("")
    assert files.steps(tmp_path) == [1]
    assert nnx.restore(tmp_path, nnx.Rngs(1)).step == 1
    nnx.save(tmp_path, nnx.Rngs(0), step=3)
    assert not list(tmp_path.rglob("*0123456789abcdef*"))
    assert not (tmp_path / "2").exists()
    assert nnx.restore(tmp_path, nnx.Rngs(1), step=1).step == 1


@pytest.mark.parametrize(("same", "wait"), [(False, False), (True, True)])
def test_killed_saves_lose_no_committed_step(tmp_path, same, wait):
    """In small; ``python -m benchmarks.faults`` does it two hundred times."""
    found = faults.kills(tmp_path, 1, same, wait)
    assert found["intact"] == 1
    assert found["left behind"] == found["lost"] == found["other"] == 0


def test_the_manifest_is_json_that_says_where_everything_is(tmp_path):
    root = {"a": nnx.Param(jnp.ones((2, 3), jnp.bfloat16)), "k": jax.random.key(1)}
    root["b"] = root["a"]
    path = nnx.save(tmp_path, root, step=5, metadata={"x": 1}).path
    found = json.loads((path / "manifest.json").read_text())["manifest"]
    assert (found["format"], found["version"]) == ("sortal checkpoint", 1)
    assert found["step"] == 5
    assert found["metadata"] == {"x": 1}
    assert found["aliases"] == [[["b"], ["a"]]]
    assert found["kinds"][0]["name"] == "sortal.Param"
    assert found["kinds"][0]["bases"] == ["sortal.Variable"]
    first, second = found["leaves"]
    assert first["path"] == ["a"]
    assert first["value"] == {
        "shape": [2, 3],
        "dtype": "bfloat16",
        "in": "Param/packed",
        "at": 0,
    }
    assert second["value"]["key"] == ["threefry2x32", 2]
    assert {"jax", "numpy", "python", "tensorstore"} <= set(found["versions"])
    size, checksum = found["files"]["Param/packed/c.0"]
    assert size == 12 + 4
    assert checksum.startswith("crc32c:")


def test_what_the_disk_does_not_keep_is_a_failed_save(tmp_path, monkeypatch):
    """A chunk that cannot be synced, as when the disk reports an error late."""
    root = {"x": nnx.Param(jnp.arange(3_000_000))}
    nnx.save(tmp_path, root, step=1)
    real = disk.sync

    def failing(path):
        if path.name == "c.1":
            raise OSError(5, "Input/output error")
        real(path)

    monkeypatch.setattr(disk, "sync", failing)
    with pytest.raises(SaveError, match="Input/output error") as caught:
        nnx.save(tmp_path, root, step=2)
    assert "nothing was committed" in str(caught.value)
    monkeypatch.undo()
    assert files.steps(tmp_path) == [1]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["1"]
    assert nnx.restore(tmp_path, root).step == 1


def test_leaves_of_an_older_step_are_not_removed_through_a_link(tmp_path):
    """The folder of arrays was moved elsewhere, and a link put into its place."""
    root = {
        "w": nnx.Param(jnp.ones(2)),
        "x": nnx.Param(jnp.ones(2), checkpoint="keep-last"),
    }
    path = nnx.save(tmp_path / "run", root, step=1).path
    (arrays,) = path.glob("arrays-*")
    elsewhere = tmp_path / "elsewhere"
    arrays.rename(elsewhere)
    arrays.symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    nnx.save(tmp_path / "run", root, step=2)
    assert sorted(elsewhere.rglob("*")) == before
