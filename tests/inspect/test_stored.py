"""The commands on files say what is there, and their exit codes fit scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.checkpoint import files
from sortal.checkpoint.store import Reader
from sortal.inspect import cli, stored


@pytest.fixture
def steps(tmp_path):
    where = tmp_path / "steps"
    root = {
        "w": nnx.Param(jnp.ones((2, 3))),
        "s": nnx.BatchStat(jnp.ones(4, jnp.bfloat16)),
        "r": nnx.Rngs(0),
        "n": nnx.Cache(3),
    }
    nnx.save(where, root, step=1, metadata={"epoch": 5})
    root["w"].value = root["w"].value.at[0, 1].set(3.5)
    nnx.save(where, root, step=2)
    return where


def run(capsys, *words):
    status = cli.main([str(w) for w in words])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_inspect_shows_kinds_and_the_largest_leaves(steps, capsys):
    status, out, _ = run(capsys, "inspect", steps, "--step", 1)
    assert status == 0
    assert "(sortal, step 1)" in out.replace("\n", "")
    assert "Param" in out
    assert "bfloat16" in out
    assert "{'epoch': 5}" in out
    status, out, _ = run(capsys, "inspect", steps, "--json")
    found = json.loads(out)
    assert (status, found["step"], found["format"]) == (0, 2, "sortal")
    rows = {row["path"]: row for row in found["leaves"]}
    assert rows["w"]["shape"] == [2, 3]
    assert rows["w"]["bytes"] == 24
    assert rows["w"]["kind"] == "sortal.Param"
    assert rows["r.default.key"]["dtype"] == "key<threefry2x32>"


def test_diff_says_what_changed_by_how_much(steps, capsys):
    words = ("diff", steps, steps, "--step-a", 1)
    status, out, _ = run(capsys, *words)
    assert status == 1
    assert "max |difference| 2.5" in out
    status, out, _ = run(capsys, *words, "--json")
    found = json.loads(out)
    (change,) = found["changes"]
    assert (change["path"], change["what"], change["largest"]) == ("w", "values", 2.5)
    kinds = {row["kind"]: (row["leaves"], row["changed"]) for row in found["kinds"]}
    assert kinds["sortal.Param"] == (1, 1)
    assert kinds["sortal.BatchStat"] == (1, 0)
    status, out, _ = run(capsys, "diff", steps, steps, "--json")
    assert (status, json.loads(out)["same"]) == (0, True)


def test_diff_says_what_differs_in_structure(tmp_path, capsys):
    one = {"a": nnx.Param(jnp.ones(2)), "b": nnx.Param(jnp.ones(2)), "c": nnx.Cache(1)}
    two = {"a": nnx.Cache(jnp.ones(2)), "b": nnx.Param(jnp.ones(3)), "d": nnx.Cache(1)}
    for name, root in (("one", one), ("two", two)):
        nnx.save(tmp_path / name, root, step=0)
    _, out, _ = run(capsys, "diff", tmp_path / "one", tmp_path / "two", "--json")
    found = {(c["path"], c["what"]) for c in json.loads(out)["changes"]}
    assert found == {("a", "kind"), ("b", "shape"), ("c", "removed"), ("d", "added")}


def test_a_nan_on_one_side_is_a_difference(tmp_path):
    for name, x in (("a", [1.0, np.nan]), ("b", [np.nan, np.nan])):
        np.savez(tmp_path / f"{name}.npz", x=np.array(x))
    files = (str(tmp_path / "a.npz"), str(tmp_path / "b.npz"))
    (change,) = stored.diff(*files).rows
    assert change.largest == np.inf
    assert not stored.diff(files[1], files[1]).rows


def test_verify_reads_everything(steps, capsys):
    status, out, _ = run(capsys, "verify", steps)
    assert (status, "intact" in out) == (0, True)
    (chunk,) = steps.glob("2/arrays-*/Param/packed/c.0")
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(data)
    (chunk.parent / "more").write_text("")
    status, out, _ = run(capsys, "verify", steps, "--json")
    found = json.loads(out)
    assert (status, found["intact"]) == (1, False)
    assert found["faults"][0].startswith("Param/packed/c.0: damaged (")
    assert found["extra"] == ["Param/packed/more"]
    status, out, _ = run(capsys, "verify", steps)
    assert "is not of this checkpoint" in out.replace("\n", " ")
    assert run(capsys, "verify", steps, "--step", 1)[0] == 0
    manifest = steps / "2" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    status, out, _ = run(capsys, "verify", steps)
    assert (status, "manifest" in out) == (1, True)


def test_convert_writes_every_format_and_all_say_the_same(steps, tmp_path, capsys):
    targets = [tmp_path / "x.safetensors", f"orbax:{tmp_path / 'o'}", tmp_path / "s"]
    for target in targets:
        assert run(capsys, "convert", steps, target)[0] == 0
        where = str(target).removeprefix("orbax:")
        found = stored.diff(str(tmp_path / "x.safetensors"), where)
        assert {c.path for c in found.rows} <= {("r", "default", "key")}
    _, out, _ = run(capsys, "convert", steps, tmp_path / "y.safetensors", "--json")
    assert json.loads(out)["arrays"] == 5


def test_what_cannot_be_done_is_one_line_and_exit_code_2(steps, tmp_path, capsys):
    for words in (
        ("inspect", tmp_path / "no"),
        ("diff", steps, tmp_path / "no"),
        ("verify", tmp_path / "no"),
        ("convert", steps, tmp_path / "x.npz"),  # which cannot hold bfloat16
        ("inspect", steps, "--step", 7),
    ):
        status, out, err = run(capsys, *words)
        assert (status, out) == (2, "")
        assert err.startswith(f"sortal {words[0]}: ")
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(steps), "--step", "first"])
    assert "must be a number or 'latest', found first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["verify", str(steps), "--no"])
    assert "unrecognized arguments: --no" in capsys.readouterr().err


def test_gguf_files_are_inspected_and_plain_ones_converted(tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "test")
    value = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("blk.0.weight", value)
    quantised = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, out, _ = run(capsys, "inspect", tmp_path / "x.gguf", "--json")
    rows = {row["path"]: row for row in json.loads(out)["leaves"]}
    assert rows["blk.0.weight"]["shape"] == [2, 32]
    assert rows["q"]["dtype"] == "q8_0"
    status, _, err = run(capsys, "convert", tmp_path / "x.gguf", tmp_path / "y.npz")
    assert (status, "1 arrays are quantised, such as q (q8_0)" in err) == (2, True)


# ------------------------------------------------------------------ nothing is left out
def differing(tmp_path, one, two) -> set[tuple[str, str]]:
    for name, value in (("one", one), ("two", two)):
        nnx.save(tmp_path / name, {"v": nnx.Variable(value)}, step=0)
    found = stored.diff(str(tmp_path / "one"), str(tmp_path / "two"))
    return {(stored.show(c.path), c.what) for c in found.rows}


@pytest.mark.parametrize(
    ("one", "two", "found"),
    [
        ({"a": 1.0, "n": (1, 0.5)}, {"a": 1.0, "n": (2, 0.7)}, {"v.n.0", "v.n.1"}),
        ({"a": jnp.ones(1), "n": 1}, {"a": jnp.ones(1), "n": 2}, {"v.n"}),
        ({"a": None}, {"a": []}, {"v"}),
        ((1, 2), [1, 2], {"v"}),
        ({"n": 1}, {"n": True}, {"v.n"}),
        (0.0, -0.0, {"v"}),
        ("a", "b", {"v"}),
        (b"a", b"a\0", {"v"}),
        (2**100, 2**100 + 1, {"v"}),
    ],
)
def test_diff_sees_plain_values_and_containers(tmp_path, one, two, found):
    assert {path for path, _ in differing(tmp_path, one, two)} == found


@pytest.mark.parametrize(
    "value", [2**100, float("nan"), -(1 << 63), "text", b"\0", None, [], (1, [None])]
)
def test_diff_of_equal_plain_values_is_empty(tmp_path, value):
    assert differing(tmp_path, value, value) == set()


def test_diff_of_equal_huge_integers_is_exit_code_0(tmp_path, capsys):
    nnx.save(tmp_path, {"v": nnx.Variable(2**100)}, step=0)
    assert run(capsys, "diff", tmp_path, tmp_path)[0] == 0
    nnx.save(tmp_path, {"v": nnx.Variable(10**5000)}, step=1)
    assert run(capsys, "diff", tmp_path, tmp_path, "--step-a", 0)[0] == 1


def test_json_of_every_report_is_json(tmp_path, capsys):
    """RFC 8259 has no NaN and no infinity."""

    def refuse(text):
        raise AssertionError(text)

    for name, x in (("a", [np.nan, 1.0]), ("b", [0.0, np.inf])):
        np.savez(tmp_path / f"{name}.npz", x=np.array(x))
    words = ("diff", tmp_path / "a.npz", tmp_path / "b.npz", "--json")
    status, out, _ = run(capsys, *words)
    (change,) = json.loads(out, parse_constant=refuse)["changes"]
    assert (status, change["largest"]) == (1, "inf")
    with nnx.Checkpoints(tmp_path / "c") as checkpoints:
        metrics = {"loss": float("nan")}
        checkpoints.save({"w": jnp.ones(1)}, step=0, metrics=metrics)
    _, out, _ = run(capsys, "inspect", tmp_path / "c", "--json")
    assert json.loads(out, parse_constant=refuse)["metrics"] == {"loss": "nan"}


def test_a_key_that_is_no_text_is_shown_escaped(tmp_path):
    """A lone surrogate, as in the names of files that are not UTF-8."""
    nnx.save(tmp_path, {"a\udc80": jnp.ones(1)}, step=0)
    done = subprocess.run(
        [sys.executable, "-m", "sortal.inspect.cli", "inspect", str(tmp_path)],
        capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"a\\udc80" in done.stdout


def test_a_reader_that_goes_away_is_no_traceback(steps):
    command = [sys.executable, "-m", "sortal.inspect.cli", "inspect", str(steps)]
    for more in ([], ["--json"]):
        gone, out = os.pipe()
        os.close(gone)
        done = subprocess.run(
            [*command, *more], stdout=out, stderr=subprocess.PIPE, check=False
        )
        os.close(out)
        assert (done.returncode, done.stderr) == (0, b"")


# ------------------------------------------------------------------------- convert
class Own(nnx.Param):
    """A kind that only this file knows."""


def test_convert_between_folders_of_sortal_keeps_everything(tmp_path, capsys):
    shared = nnx.Param(jnp.ones((2, 3)))
    root = {
        "a": Own(jnp.ones(3), tag="t"),
        "b": shared,
        "c": {"d": shared},
        "k": nnx.Rngs(0),
        "n": nnx.Cache({"x": (1, None), "y": "text"}),
        "big": nnx.Param(jnp.ones((2100, 1024))),
    }
    with nnx.Checkpoints(tmp_path / "one") as checkpoints:
        checkpoints.save(root, step=7, metadata={"e": 1}, metrics={"loss": 0.5})
    status, _, err = run(capsys, "convert", tmp_path / "one", tmp_path / "two")
    assert (status, err) == (0, "")
    old, new = (files.read_manifest(tmp_path / n, 7) for n in ("one", "two"))
    assert old.folder != new.folder
    assert old._replace(folder="") == new._replace(folder="")
    root["a"].value = jnp.zeros(3)
    found = nnx.restore(tmp_path / "two", root)
    assert (found.metadata, found.metrics) == ({"e": 1}, {"loss": 0.5})
    assert root["a"].value.tolist() == [1.0] * 3
    assert run(capsys, "verify", tmp_path / "two")[0] == 0


def test_convert_never_replaces_a_step(steps, tmp_path, capsys):
    before = (steps / "2" / "manifest.json").read_bytes()
    status, _, err = run(capsys, "convert", steps, steps)
    assert (status, "has a step 2 already" in err) == (2, True)
    np.savez(tmp_path / "x.npz", w=np.ones(1))
    assert run(capsys, "convert", tmp_path / "x.npz", tmp_path / "t")[0] == 0
    status, _, err = run(capsys, "convert", tmp_path / "x.npz", tmp_path / "t")
    assert (status, "has a step 0 already" in err) == (2, True)
    assert (steps / "2" / "manifest.json").read_bytes() == before
    assert run(capsys, "verify", steps)[0] == 0


def test_convert_of_a_damaged_step_copies_nothing(steps, tmp_path, capsys):
    (chunk,) = steps.glob("2/arrays-*/Param/packed/c.0")
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(data)
    status, _, err = run(capsys, "convert", steps, tmp_path / "t")
    assert (status, "is damaged" in err) == (2, True)
    assert not files.steps(tmp_path / "t")


@pytest.mark.parametrize(
    "value", ["text", b"x", {"a": 1.0, "n": ("x",)}, 2**100, [2**64]]
)
def test_convert_refuses_values_that_a_format_would_lose(tmp_path, capsys, value):
    root = {"w": nnx.Param(jnp.ones(1)), "v": nnx.Variable(value)}
    nnx.save(tmp_path / "s", root, step=0)
    for target in ("x.npz", "x.safetensors", "orbax:o"):
        where = str(tmp_path / target).replace(str(tmp_path / "orbax:"), "orbax:")
        status, _, err = run(capsys, "convert", tmp_path / "s", where)
        assert status == 2
        assert "holds arrays only" in err
        assert "\n  v" in err
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_convert_keeps_numbers_in_containers(tmp_path, capsys):
    nnx.save(
        tmp_path / "s", {"v": nnx.Variable({"a": jnp.ones(1), "n": (1, 0.5)})}, step=0
    )
    assert run(capsys, "convert", tmp_path / "s", tmp_path / "x.npz")[0] == 0
    with np.load(tmp_path / "x.npz") as found:
        assert {k: v.tolist() for k, v in found.items()} == {
            "v.a": [1.0], "v.n.0": 1, "v.n.1": 0.5,
        }  # fmt: skip
    assert not stored.diff(str(tmp_path / "s"), str(tmp_path / "x.npz")).rows


def test_a_folder_may_have_a_dot_in_its_name(steps, tmp_path, capsys):
    assert run(capsys, "convert", steps, tmp_path / "run-v1.5")[0] == 0
    assert files.steps(tmp_path / "run-v1.5") == [2]
    status, _, err = run(capsys, "convert", steps, tmp_path / "x.pkl")
    assert (status, "no format of this ending" in err) == (2, True)


def test_diff_reads_neighbours_together(tmp_path, monkeypatch):
    """Reading each array by itself reads a whole chunk for each."""
    root = [nnx.Param(jnp.full(3, i)) for i in range(200)]
    for name in ("a", "b"):
        nnx.save(tmp_path / name, root, step=0)
    reads = []
    read = Reader.read
    monkeypatch.setattr(
        Reader, "read", lambda *words: (reads.append(words[1]), read(*words))[1]
    )
    assert not stored.diff(str(tmp_path / "a"), str(tmp_path / "b")).rows
    assert len(reads) == 2
