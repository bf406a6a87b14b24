"""The commands on files say what is there, and their exit codes fit scripts."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
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
