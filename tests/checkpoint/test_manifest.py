"""The manifest: comes back as written, and nothing else is taken for one."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import random
import tracemalloc

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sortal as nnx
from benchmarks import faults
from sortal.checkpoint import manifest as m
from sortal.checkpoint.manifest import from_bytes, to_bytes
from sortal.errors import DamagedError, RestoreError, SortalError
from sortal.inspect import stored


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
    yield change(["kinds", 0, "name"], "a.b\0"), "where the name of a class is expected"
    yield change(["kinds", 0, "name"], "a.\ud800"), "UnicodeEncodeError"
    yield change(["leaves", 0, "value", "sharding"], "x"), "TypeError"
    yield change(["leaves", 0, "value", "sharding"], {"mesh": 3}), "a dict is expected"
    yield (
        change(["leaves", 0, "value", "sharding"], {"mesh": {}, "spec": [[5]]}),
        "where a str is expected",
    )
    empty = {"shape": [0, 1 << 62], "dtype": "float32"}
    yield change(["leaves", 0, "value"], empty), "a shape (0, 46116"
    yield change(["leaves", 0, "value"], {"plain": ["str", 5]}), "a str is expected"
    one = {"plain": ["int", "0x1"]}
    for what, more in (
        ("none", {"children": [one]}),
        ("list", {"children": [one], "keys": ["a"]}),
        ("dict", {"children": [one, one]}),
        ("dict", {"children": [one], "keys": [1.5]}),
        ("dict", {"children": [one], "keys": [["a"]]}),
    ):
        value = {"nest": what, **more}
        yield change(["leaves", 0, "value"], value), "a value w"
    yield change(["leaves", 0, "value"], {"nest": "node"}), "a node of the class None"
    yield change(["leaves", 1, "path"], ["count", "x"]), "runs through a leaf"
    yield change(["leaves", 1, "path"], []), "runs through a leaf"
    yield (
        change(["files", "Param/packed/c.0"], [10**15, "crc32c:00000000"]),
        "do not have the size of its chunks",
    )


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


def test_a_file_too_large_for_a_manifest_is_not_read(tmp_path):
    (tmp_path / "3").mkdir()
    with (tmp_path / "3" / m.NAME).open("wb") as file:
        file.truncate(6 << 30)  # sparse: it takes no disk
    tracemalloc.start()
    with pytest.raises(DamagedError, match="larger than it can be: 6,442,450,944"):
        nnx.load_state(tmp_path, step=3)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10 << 20


def test_a_manifest_of_very_many_values_is_not_parsed():
    """Text of 57 MB would become 1 GB of lists."""
    text = b'{"a":[' + b"[]," * 19_000_000 + b"[]]}"
    digest = hashlib.sha256(text).hexdigest().encode()
    data = b'{"sha256":"%s","manifest":%s}\n' % (digest, text)
    tracemalloc.start()
    with pytest.raises(DamagedError, match=r"than any manifest: 57,\d+,\d+ byte"):
        from_bytes(data, "here")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10 << 20


def test_more_elements_than_files_can_hold_are_refused_before_memory_is_taken(tmp_path):
    """The manifest may lie about the file, and the file is asked."""
    path = nnx.save(tmp_path, {"w": jnp.ones(4)}, step=3).path
    body = json.loads((path / m.NAME).read_bytes())["manifest"]
    (name,) = body["arrays"]
    body["arrays"][name] = {"dtype": "uint8", "shape": [10**15], "chunks": [10**15]}
    body["files"][f"{name}/c.0"][0] = 10**15 + 4
    body["leaves"][0]["value"] |= {"shape": [10**15], "dtype": "uint8"}
    (path / m.NAME).write_bytes(written(body))
    with pytest.raises(DamagedError, match="bytes, not 1,000,000,000,000,004"):
        nnx.load_state(tmp_path, step=3)


def test_keys_of_an_unknown_implementation_are_an_error_of_ours(tmp_path):
    path = nnx.save(tmp_path, {"k": jax.random.key(0)}, step=3).path
    body = json.loads((path / m.NAME).read_bytes())["manifest"]
    body["leaves"][0]["value"]["key"] = ["nope", 2]
    (path / m.NAME).write_bytes(written(body))
    with pytest.raises(RestoreError, match="k: PRNG keys of 'nope', which this"):
        nnx.load_state(tmp_path, step=3)


# ------------------------------------------------------------------ mutations by rule
ODD = [
    None, True, False, 0, -1, 1, 1 << 40, 1 << 62, 1 << 63, 1 << 70, 1.5, float("nan"),
    1e400, "", "x", "a/b", "..", "\0", "\ud800", "x" * 300, [], [[]], [1], ["x"],
    [None], {}, {"a": 1}, {"shape": [1]}, {"plain": ["int", "0x1"]}, {"nest": "none"},
    {"nest": "dict", "keys": ["a"], "children": [{"nest": "none"}]}, [0] * 40,
]  # fmt: skip


def places(x, at=()):
    """The paths of all values inside JSON."""
    items = x.items() if type(x) is dict else enumerate(x) if type(x) is list else ()
    for key, child in items:
        yield (*at, key)
        yield from places(child, (*at, key))


def mutate(rng: random.Random, body: dict) -> None:
    """Puts something else in one place: a value, another part of it, nothing, twice."""
    every = list(places(body))
    *above, last = rng.choice(every)
    holder = functools.reduce(lambda x, key: x[key], above, body)
    how = rng.randrange(10)
    if how == 0:
        del holder[last]
    elif how == 1 and type(holder) is dict:
        holder[rng.choice(["", "\ud800", "a/b", "x"])] = holder.pop(last)
    elif how == 2 and type(holder[last]) is list:
        holder[last] = holder[last] * 2
    elif how == 3:
        other = functools.reduce(lambda x, key: x[key], rng.choice(every), body)
        holder[last] = copy.deepcopy(other)
    else:
        holder[last] = copy.deepcopy(rng.choice(ODD))


@pytest.mark.parametrize("seed", range(4))
def test_every_mutation_is_refused_or_read_in_every_way(tmp_path, seed):
    """Whatever the manifest says, an error is one of ours, and all say something."""
    path = nnx.save(tmp_path, faults.model(1, 0.01), step=3, metadata={"a": [1]}).path
    good = json.loads((path / m.NAME).read_bytes())["manifest"]
    rng = random.Random(seed)  # noqa: S311 - no secrets here
    where = str(tmp_path)
    ways = (
        lambda: nnx.load_state(tmp_path, step=3),
        lambda: nnx.restore(tmp_path, faults.model(1, 0.01), step=3),
        lambda: str(stored.inspect(where, 3)),
        lambda: json.dumps(stored.inspect(where, 3).data()),
        lambda: str(stored.check(where, 3, lambda done, total: None)),
        lambda: str(stored.diff(where, where, (3, 3))),
    )
    for _ in range(120):
        body = copy.deepcopy(good)
        for _ in range(rng.choice([1, 1, 2])):
            mutate(rng, body)
        (path / m.NAME).write_bytes(written(body))
        for way in ways:
            with contextlib.suppress(SortalError):
                way()
