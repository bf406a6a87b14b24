"""The manifest: comes back as written, and nothing else is taken for one."""

from __future__ import annotations

import copy
import hashlib
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sortal as nnx
from benchmarks import faults
from sortal.checkpoint import manifest as m
from sortal.checkpoint.manifest import from_bytes, to_bytes
from sortal.errors import DamagedError


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> bytes:
    where = tmp_path_factory.mktemp("m")
    path = nnx.save(where, faults.model(1, 5.0), step=3, metadata={"a": [1]}).path
    return (path / m.NAME).read_bytes()


def written(body: object) -> bytes:
    """A manifest file around anything, with the right checksum."""
    text = json.dumps(body).encode()
    digest = hashlib.sha256(text).hexdigest()
    return b'{"sha256":"%s","manifest":%s}\n' % (digest.encode(), text)


def test_a_manifest_comes_back_as_it_was_written(data):
    found = from_bytes(data, "here")
    assert to_bytes(found) == data
    assert found.step == 3


def test_every_flipped_bit_is_noticed(data):
    rng = random.Random(0)  # noqa: S311 - no secrets here
    for _ in range(500):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        wrong = bytearray(data)
        wrong[at] ^= 1 << bit
        with pytest.raises(DamagedError, match=r"^here: "):
            from_bytes(bytes(wrong), "here")


def test_every_length_but_the_right_one_is_noticed(data):
    for end in (0, 1, 70, len(data) // 2, len(data) - 1):
        with pytest.raises(DamagedError):
            from_bytes(data[:end], "here")
    with pytest.raises(DamagedError):
        from_bytes(data + b"\n", "here")


def test_a_newer_version_says_what_to_do(data):
    body = json.loads(data)["manifest"]
    body["version"] = 2
    with pytest.raises(DamagedError, match=r"in version 2 .* reads 1; install a newer"):
        from_bytes(written(body), "here")


def hostile():
    """Ways to write a manifest that lies, and what must be said of each."""

    def change(path, value):
        def apply(body):
            at = body
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value

        return apply

    yield change(["format"], "other"), "not a manifest of Sortal"
    yield change(["folder"], "../x"), "a file name"
    yield change(["folder"], ".."), "a file name"
    yield change(["step"], -1), "where a size or number is expected"
    yield change(["step"], True), "where a size or number is expected"
    yield change(["kinds", 0, "group"], "a/b"), "a file name"
    yield change(["leaves", 0, "kind"], 99), "of kind 99"
    yield change(["leaves", 0, "path"], [1.5]), "a path with the entry 1.5"
    yield change(["leaves", 0, "keep"], "first"), "kept 'first'"
    yield change(["leaves", 0, "value"], {"nest": "code"}), "nested in a 'code'"
    yield change(["leaves", 0, "value"], {"plain": ["eval", "x"]}), "KeyError"
    yield change(["leaves", 0, "value"], {"plain": ["bytes", "!"]}), "Error"
    yield change(["leaves", 0, "value"], [[]]), "TypeError"
    yield change(["leaves", 0, "value", "dtype"], "object"), "dtype 'object'"
    yield change(["leaves", 0, "value", "shape"], [1 << 62, 9]), "a shape"
    yield change(["leaves", 0, "value", "shape"], [1 << 40]), "does not lie inside"
    yield change(["leaves", 0, "value", "in"], "/etc/passwd"), "a file name"
    yield change(["leaves", 0, "value", "in"], "Param/none"), "KeyError"
    yield change(["leaves", 0, "value", "form"], "pickle"), "the form 'pickle'"
    yield change(["arrays", "Param/packed", "shape"], [1 << 50]), "more chunks than"
    yield change(["arrays", "Param/packed", "chunks"], [0]), "in chunks of"
    yield change(["arrays", "Param/packed", "dtype"], "O"), "dtype 'O'"
    yield change(["files", "Param/../../x"], [1, "crc32c:00000000"]), "a file name"
    yield change(["files", "Param/more"], [1, "crc32c:00000000"]), "not those of the"
    yield change(["files", "Param/packed/c.0"], [1, "md5:0"]), "a checksum"
    yield (lambda b: b["files"].pop("zarr.json")), "not those of the arrays: zarr.json"
    yield (lambda b: b["files"].pop("Param/zarr.json")), "not those of the arrays: Par"
    yield (lambda b: b["leaves"].append(b["leaves"][0])), "two leaves have one path"
    yield change(["leaves", 0, "metadata"], {"a": [1]}), "the metadata {'a': [1]}"
    yield (lambda b: b.pop("kinds")), "KeyError"


@pytest.mark.parametrize(("apply", "message"), list(hostile()))
def test_a_manifest_that_lies_is_refused(data, apply, message):
    body = copy.deepcopy(json.loads(data)["manifest"])
    assert body["leaves"][0]["path"] == ["count"]
    apply(body)
    with pytest.raises(DamagedError) as caught:
        from_bytes(written(body), "here")
    assert message in str(caught.value)


def test_json_that_is_deep_huge_or_nothing_is_refused():
    deep = b"[" * 100_000 + b"]" * 100_000
    for text in (deep, b"9" * 10_000, b"null", b"[]", b"{", b"\xff", b'{"format":1}'):
        digest = hashlib.sha256(text).hexdigest().encode()
        wrapped = b'{"sha256":"%s","manifest":%s}\n' % (digest, text)
        with pytest.raises(DamagedError):
            from_bytes(wrapped, "here")


@given(st.binary(max_size=300))
def test_noise_is_refused(noise):
    with pytest.raises(DamagedError):
        from_bytes(noise, "here")


plain = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(),
)


@given(st.dictionaries(st.sampled_from("abc"), plain, max_size=3))
def test_python_values_come_back_to_the_bit(found):
    trees = [m.Plain(x) for x in found.values()]
    back = [m._read_tree(json.loads(json.dumps(m._tree_to_json(t))), 0) for t in trees]
    for old, new in zip(trees, back, strict=True):
        assert type(new.value) is type(old.value)
        assert repr(new.value) == repr(old.value)
