"""NumPy archives: nothing lost, nothing believed, every refusal one of ours."""

from __future__ import annotations

import io
import random
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from sortal.errors import DamagedError, RestoreError, SaveError
from sortal.interop.files.exchange import export, load_arrays, open_arrays


def test_leaves_of_one_name_are_refused_and_all_listed(tmp_path):
    root = {
        "a.b": jnp.ones(1),
        "a": {"b": jnp.zeros(1)},
        0: jnp.ones(1),
        "0": jnp.ones(2),
    }
    with pytest.raises(SaveError, match="several leaves have one name") as caught:
        export(tmp_path / "x.npz", root)
    assert "0: 0, ['0']\n  a.b: a.b, ['a.b']" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["allow_pickle", "file", "x.npy", "a/b", "ü", "", "args"]
)
def test_a_leaf_of_any_name_comes_back(tmp_path, name):
    export(tmp_path / "x.npz", {name: jnp.arange(3), "other": jnp.ones(1)})
    with np.load(tmp_path / "x.npz") as found:
        assert set(found.files) == {name, "other"}
        assert found[name].tolist() == [0, 1, 2]
    assert [
        e.read().tolist()
        for e in open_arrays(tmp_path / "x.npz").entries
        if e.name == (tuple(name.split(".")))
    ] == [[0, 1, 2]]


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_archive_holds_is_refused(tmp_path, name):
    with pytest.raises(SaveError, match="names that NumPy's archives cannot hold"):
        export(tmp_path / "x.npz", {name: jnp.arange(3)})


def header(text: str, data: bytes = b"") -> bytes:
    """A member of an archive with any text as its header."""
    body = text.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + data


def archive(member: bytes, **options) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", **options) as file:
        file.writestr("x.npy", member)
    return made.getvalue()


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    "content",
    [
        archive(header(GOOD.replace("(2,)", f"({10**15},)"))),
        archive(header(GOOD.replace("(2,)", "(-2,)"), b"\0" * 8)),
        archive(header(GOOD, b"\0" * 4)),
        archive(header(GOOD, b"\0" * 12)),
        archive(header("{'descr': ", b"\0" * 8)),
        archive(header("(((", b"\0" * 8)),
        archive(header("'''", b"\0" * 8)),
        archive(header("[" * 9000, b"\0" * 8)),
        archive(header(GOOD.replace("'<f4'", "'O'"), b"\0" * 8)),
        archive(header(GOOD.replace("'<f4'", "'V8'"), b"\0" * 16)),
        archive(header(GOOD.replace("'<f4'", "'junk'"), b"\0" * 8)),
        archive(b""),
        archive(b"\x93NUMPY\x09\x00"),
        archive(header(GOOD, b"\0" * 8), compression=zipfile.ZIP_LZMA),
    ],
)
def test_an_archive_that_lies_is_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DamagedError, match="no archive of arrays, or damaged"):
        open_arrays(tmp_path / "x.npz")


def test_an_encrypted_archive_is_refused(tmp_path):
    good = bytearray(archive(header(GOOD, b"\0" * 8)))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        good[good.index(mark) + at] |= 1
    (tmp_path / "x.npz").write_bytes(good)
    with pytest.raises(DamagedError, match="x is encrypted"):
        open_arrays(tmp_path / "x.npz")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    content = bytearray(
        archive(header(GOOD.replace("(2,)", f"({2**28},)"), b"\0" * 64),
                compression=zipfile.ZIP_DEFLATED)
    )  # fmt: skip
    at = content.index(b"PK\x01\x02") + 24  # the size that the directory states
    size = len(header(GOOD.replace("(2,)", f"({2**28},)"))) + 2**30
    content[at : at + 4] = size.to_bytes(4, "little")
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DamagedError, match="cannot hold"):
        open_arrays(tmp_path / "x.npz")


def test_every_mutation_is_refused_or_read_right(tmp_path):
    """Every error is one of ours, and what is read has the value written."""
    value = {"a": np.arange(5.0), "b": np.arange(6, dtype=np.int8).reshape(2, 3)}
    file = tmp_path / "x.npz"
    rng = random.Random(0)  # noqa: S311 - no secrets here
    for save in (np.savez, np.savez_compressed):
        save(file, **value)
        good = file.read_bytes()
        for _ in range(300):
            wrong = bytearray(good)
            for _ in range(rng.choice([1, 1, 2, 8])):
                wrong[rng.randrange(len(wrong))] = rng.choice(
                    [0, 1, 255, rng.randrange(256)]
                )
            file.write_bytes(wrong)
            try:
                found = dict(load_arrays(file).flat_state())
            except DamagedError:
                continue
            for (name, *_), x in found.items():
                if name in value:
                    assert x.tobytes() == value[name].tobytes()


def test_names_that_no_state_has_together_are_refused_with_the_file(tmp_path):
    path, content = tmp_path / "crafted.npz", io.BytesIO()
    np.save(content, np.ones(2))
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a", "a.npy"):  # of one array, once the suffix is gone
            archive.writestr(name, content.getvalue())
    with pytest.raises(DamagedError, match=r"crafted\.npz.*one name"):
        load_arrays(path)
    np.savez(path, **{"a": np.ones(2), "a.b": np.ones(2)})
    with pytest.raises(RestoreError, match=r"(?s)crafted\.npz: .*\n  a\.b\n.*names="):
        load_arrays(path)
    assert load_arrays(path, names={"c": "a"}).paths() == (("a", "b"), ("c",))
