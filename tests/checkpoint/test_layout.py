"""What a save will write: which leaves, under which names, each byte in one place."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sortal as nnx
from sortal._engine.plan import bind
from sortal.checkpoint.files import read_manifest
from sortal.checkpoint.layout import (
    aliases_of,
    check_json,
    file_name,
    free,
    lay_out,
)
from sortal.checkpoint.manifest import encode_path
from sortal.checkpoint.store import ALIGN, CHUNK, SMALL, as_bytes
from sortal.checkpoint.taking import take
from sortal.checkpoint.values import DTYPES, arrays, numpy_dtype
from sortal.errors import SaveError

BIG = SMALL // 4
"""Elements of float32 that are not packed."""


class Last(nnx.Variable, checkpoint="keep-last"):
    pass


def laid(root: Any, only: Any = None, policy: Any = None, pin: bool = False) -> Any:
    return lay_out(take(root, only, policy, pin))


# ------------------------------------------------------------------------------ laws
shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
dtypes = st.sampled_from(sorted(DTYPES - {"int2", "uint2"}))
kinds = st.sampled_from([nnx.Param, nnx.BatchStat, Last])
NOT_ON_CPU = {
    "int64", "uint64", "float64", "complex128", "float6_e2m3fn", "float6_e3m2fn"
}  # fmt: skip
"""Dtypes of which JAX makes no array here."""
leaf = st.tuples(kinds, shapes, dtypes, st.booleans())


def packed_bytes(found: Any, name: str) -> bytes:
    """A pack as its parts say; what they leave out is zero, and none overlap."""
    whole, taken = np.zeros((2, *found.arrays[name].shape), np.uint8)
    for at, part in found.packs[name]:
        part = as_bytes(part)
        whole[at : at + part.size] = part
        taken[at : at + part.size] += 1
        assert at + part.size <= whole.size
    assert taken.max(initial=0) <= 1
    return whole.tobytes()


@given(st.lists(leaf, max_size=12), st.booleans())
def test_every_byte_of_every_leaf_has_one_place_in_a_pack(given, pin):
    """Packs are as long as their last array ends; arrays are aligned and apart."""
    root = {}
    for i, (kind, shape, dtype, by_jax) in enumerate(given):
        value = np.full(shape, i % 2 + 1, numpy_dtype(dtype))
        by_jax = by_jax and dtype not in NOT_ON_CPU
        root[f"x{i:02}"] = kind(jnp.asarray(value) if by_jax else value)
    found = laid(root, pin=pin)
    packs = {name: packed_bytes(found, name) for name in found.packs}
    spans: dict[str, list[tuple[int, int]]] = {}
    for leaf in found.leaves:
        value = root[leaf.path[0]].value
        place = leaf.value.place
        if not value.size:
            assert place is None
            continue
        spans.setdefault(place.array, []).append(
            (place.offset, place.offset + value.nbytes)
        )
        data = packs[place.array][place.offset :][: value.nbytes]
        assert data == np.asarray(value).tobytes()
    assert spans.keys() == found.packs.keys() == found.arrays.keys()
    for name, taken in spans.items():
        assert taken == sorted(taken)
        assert all(start % ALIGN == 0 for start, _ in taken)
        pairs = itertools.pairwise(taken)
        assert all(end <= start < end + ALIGN for (_, end), (start, _) in pairs)
        assert found.arrays[name].shape == (taken[-1][1],)


def test_small_arrays_that_follow_one_another_are_one_part_of_their_pack():
    """What lies between two of them in the model but not in the pack divides them."""
    ones = [nnx.Param(jnp.full(16, i, jnp.float32)) for i in range(4)]
    big, other = nnx.Param(np.ones(16, np.float32)), nnx.Cache(jnp.ones(16))
    (whole,) = laid(ones).packs["Param/packed"]
    assert (whole[0], whole[1].size) == (0, 4 * ALIGN)
    for between in (big, other):
        found = laid([*ones[:2], between, *ones[2:]])
        parts = [(at, as_bytes(x)) for at, x in found.packs["Param/packed"]]
        assert sum(x.size for _, x in parts) == (5 if between is big else 4) * ALIGN
        assert len(parts) == (3 if between is big else 2)
        text = packed_bytes(found, "Param/packed")
        values = [np.asarray(x.value) for x in ones]
        values.insert(2, big.value) if between is big else None
        assert text == b"".join(x.tobytes() for x in values)


@settings(max_examples=20, suppress_health_check=[*HealthCheck])
@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), dtypes, st.data())
def test_large_arrays_are_cut_into_chunks_of_the_due_size(shape, dtype, data):
    """Computed from the shape alone: nothing is allocated."""
    from sortal.checkpoint.store import stored_array
    from sortal.checkpoint.values import Array

    whole = (*(n * 97 for n in shape[:1]), *(n * 31 for n in shape[1:]))
    size = math.prod(whole) * numpy_dtype(dtype).itemsize
    alone = stored_array(Array(whole, dtype))
    held = math.prod(alone.chunks) * numpy_dtype(dtype).itemsize
    assert all(1 <= c <= n for c, n in zip(alone.chunks, whole, strict=True))
    assert held <= 2 * max(CHUNK, size // 32)
    assert held == size or held * 4 > CHUNK or min(alone.chunks) == 1
    parts = [data.draw(st.sampled_from([1, 2, 4])) for _ in whole]
    shard = tuple(n // p for n, p in zip(whole, parts, strict=True))
    many = tuple(s * p for s, p in zip(shard, parts, strict=True))
    found = stored_array(Array(many, dtype), shard)
    assert all(s % c == 0 for s, c in zip(shard, found.chunks, strict=True))


def test_arrays_lie_in_packs_up_to_a_size_and_by_themselves_from_it_on():
    root = {"a": nnx.Param(jnp.zeros(BIG - 1)), "b": nnx.Param(jnp.zeros(BIG))}
    found = laid(root)
    places = {x.path: x.value.place for x in found.leaves}
    assert places[("a",)] == ("Param/packed", 0)
    assert places[("b",)] == ("Param/b", None)
    assert found.arrays["Param/packed"].shape == ((BIG - 1) * 4,)
    assert found.arrays["Param/b"].shape == (BIG,)
    (piece,) = found.own["Param/b"]
    assert piece.start == (0,)


def test_a_sharded_array_is_given_by_each_shard_once():
    """Replicas are not written twice; together the pieces are the array."""
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    value = np.arange(4 * BIG, dtype=np.float32).reshape(4, -1)
    for spec in (("y",), ("x", "y"), (None, ("y", "x")), ()):
        to = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        found = laid({"w": nnx.Param(jax.device_put(value, to))})
        count = np.zeros(value.shape, np.int8)
        for start, data in found.own["Param/w"]:
            at = tuple(slice(s, s + n) for s, n in zip(start, data.shape, strict=True))
            assert np.array_equal(data, value[at])
            count[at] += 1
        assert (count == 1).all()
        assert not found.shared


def test_a_shared_leaf_is_laid_out_once_and_named_at_its_other_paths():
    tied = nnx.Param(jnp.ones(3))
    module = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    found = laid({"a": tied, "b": [tied, module], "c": module})
    assert [x.path for x in found.leaves] == [
        ("a",),
        ("b", 1, "bias"),
        ("b", 1, "kernel"),
    ]
    assert found.aliases == ((("b", 0), ("a",)), (("c",), ("b", 1)))
    assert found.arrays["Param/packed"].shape == (2 * ALIGN + 16,)
    assert aliases_of(bind({"a": tied}).graphdef) == ()


# ------------------------------------------------------------------ what is refused
def test_a_container_that_holds_itself_is_laid_out():
    root: dict[str, Any] = {"w": nnx.Param(jnp.ones(2))}
    root["again"] = [root]
    found = laid(root)
    assert [x.path for x in found.leaves] == [("w",)]
    assert (("again", 0), ()) in found.aliases
    root["more"] = 3
    with pytest.raises(SaveError, match=r"found:\n  more: 3\nPut them"):
        laid(root)


def test_metadata_that_contains_itself_or_is_too_deep_is_refused():
    loop: list[Any] = [1]
    loop += [loop, {"x": loop}]
    with pytest.raises(SaveError) as caught:
        check_json("metadata", {"a": loop, "b": {1}, "c": 10**5000})
    rows = str(caught.value).splitlines()[1:-1]
    assert rows == [
        "  metadata['a'][1]: something that contains itself",
        "  metadata['a'][2]['x']: something that contains itself",
        "  metadata['b']: a set",
        "  metadata['c']: an integer of 16,610 bits",
    ]
    deep: Any = 1
    for _ in range(101):
        deep = [deep]
    with pytest.raises(SaveError, match="more than a hundred containers deep"):
        check_json("metadata", deep)
    check_json("metadata", deep[0])
    both = {"x": 1}
    check_json("metadata", [both, both])


plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()
)
jsons = st.recursive(
    plain,
    lambda x: st.one_of(
        st.lists(x, max_size=3),
        st.dictionaries(st.text() | st.integers(), x, max_size=3),
        st.lists(x, max_size=2).map(tuple),
    ),
    max_leaves=6,
)


@given(jsons)
def test_metadata_is_taken_just_where_json_gives_it_back(value):
    try:
        text = json.dumps(value, allow_nan=False)
        due = repr(json.loads(text)) == repr(value)
    except (TypeError, ValueError):
        due = False
    try:
        check_json("metadata", value)
        taken = True
    except SaveError:
        taken = False
    assert taken == due


# ------------------------------------------------------------------------------ names
@given(st.text(st.characters(exclude_categories=[])))
def test_a_text_becomes_a_name_that_any_system_takes(text):
    name = file_name(text)
    assert 1 <= len(name) <= 100
    assert name.isascii()
    assert not set(name) & set('/\\:*?"<>| \0')
    assert not name.startswith(".")
    assert name == file_name(text)


@given(st.lists(st.text("aA.%~/é", max_size=4), unique=True, max_size=6))
def test_different_texts_have_different_names_even_without_capitals(texts):
    taken: set[str] = set()
    for text in texts:
        taken.add(free(file_name(text), taken).casefold())
    assert len(taken) == len(texts)


def test_long_texts_that_begin_alike_have_names_of_their_own():
    assert file_name("x" * 300) != file_name("x" * 301)
    assert file_name("é" * 300) != file_name("é" * 301)


@pytest.mark.parametrize(
    "path",
    [("zarr", "json"), ("zarr.json",), ("packed",), ("packed~last",), ("\udc80",)],
)
def test_no_path_takes_the_name_of_a_file_of_the_format(tmp_path, path):
    """Saved and read back, because a file system may see names as one."""
    root: Any = nnx.Param(np.arange(BIG, dtype=np.float32))
    for key in reversed(path):
        root = {key: root}
    root["s"] = nnx.Param(jnp.ones(3))
    nnx.save(tmp_path, root, step=0)
    found: Any = nnx.load_state(tmp_path)
    for key in path:
        found = found[key]
    assert found.value[-1] == BIG - 1


def test_paths_are_integers_and_strings_and_others_are_text():
    path = ("a.b", 3, -1, "3", "", (1, 2), 1.5, True, None, np.int64(7), 2**70)
    found = encode_path(path)
    assert found[:5] == path[:5]
    assert found[5:9] == (
        "<tuple> (1, 2)",
        "<float> 1.5",
        "<bool> True",
        "<NoneType> None",
    )
    assert found[9] == "<int64> np.int64(7)"
    assert json.loads(json.dumps(found)) == list(found)
    assert len(set(found)) == len(path)


def test_odd_keys_small_and_large_come_back(tmp_path):
    keys: list[Any] = [
        "a/b",
        "a.b",
        "%2F",
        "",
        "0",
        0,
        -1,
        2**70,
        "ü\n\0",
        "\udc80",
        "k" * 5000,
    ]
    root = {k: nnx.Param(np.full(3, i)) for i, k in enumerate(keys)}
    nnx.save(tmp_path, root, step=0)
    into = {k: nnx.Param(np.zeros(3, int)) for k in reversed(keys)}
    nnx.restore(tmp_path, into)
    assert [into[k].value[0] for k in keys] == list(range(len(keys)))


def test_leaves_say_what_can_be_said_of_them_in_json():
    root = {
        "w": nnx.Param(jnp.ones(1), tag="t", n=3, f=lambda: 0, none=None),
        "l": Last(jnp.ones(1)),
    }
    last, first = laid(root).leaves
    assert first.metadata == {"tag": "t", "n": 3, "none": None}
    assert (first.passing, last.passing) == (False, True)
    found = laid(root)
    assert [k.bases for k in found.kinds] == [("sortal.Variable",)] * 2
    assert set(found.arrays) == {"Last/packed~last", "Param/packed"}
    assert [a.place.array for x in found.leaves for a in arrays(x.value)] == [
        "Last/packed~last",
        "Param/packed",
    ]


def test_the_fingerprint_is_of_paths_kinds_and_sharing_not_of_settings():
    def mark(root: Any) -> str:
        return laid(root).graphdef

    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    trained = mark(model)
    model.eval()
    assert mark(model) == trained
    one = nnx.Param(jnp.ones(1))
    apart = {"a": one, "b": nnx.Param(jnp.ones(1))}
    assert mark(apart) == mark({"a": nnx.Param(jnp.zeros(9)), "b": one})
    others = ({"a": one, "b": one}, {"a": one, "c": one}, {"a": one, "b": nnx.Cache(1)})
    assert len({mark(apart), *map(mark, others)}) == 4


# ------------------------------------------------------------------- as save says it
def test_metadata_comes_back_as_it_is_or_is_refused(tmp_path):
    about = {"epoch": 3, "big": 2**130, "x": [1.5, None, True, {"y": "ä"}]}
    nnx.save(tmp_path, nnx.Rngs(0), step=0, metadata=about)
    assert nnx.restore(tmp_path, nnx.Rngs(1)).metadata == about
    state = np.random.default_rng(0).bit_generator.state
    nnx.save(tmp_path, nnx.Rngs(0), step=1, metadata=state)
    assert nnx.restore(tmp_path, nnx.Rngs(1)).metadata == state
    bad = {"a": (1, 2), 3: np.float32(1), "n": [float("nan")]}
    with pytest.raises(SaveError) as caught:
        nnx.save(tmp_path, nnx.Rngs(0), step=2, metadata=bad)
    assert "metadata: the key 3" in str(caught.value)
    assert "metadata['a']: a tuple" in str(caught.value)
    assert "metadata['n'][0]: nan" in str(caught.value)


def test_names_that_file_systems_confuse_stay_apart(tmp_path):
    """Capitals, dots, slashes, names longer than a file's may be."""
    big = jnp.arange(1_100_000, dtype=jnp.float32)
    names = ["W", "w", "..", "a/b", "a b", "x" * 300, "x" * 299 + "y", "packed", "é"]
    root = {name: nnx.Param(big + i) for i, name in enumerate(names)}
    nnx.save(tmp_path, root, step=0)
    found = nnx.load_state(tmp_path)
    for name in names:
        assert jnp.array_equal(found[name].value, root[name].value), name
    inside = {p.resolve().parent.parent for p in tmp_path.rglob("c.*")}
    assert inside == {next(tmp_path.glob("0/arrays-*/Param")).resolve()}


def test_kinds_of_one_name_have_groups_of_their_own(tmp_path):
    class BatchStat(nnx.Variable):
        pass

    root = {"a": nnx.BatchStat(jnp.zeros(1)), "b": BatchStat(jnp.ones(1))}
    nnx.save(tmp_path, root, step=0)
    root = {"a": nnx.BatchStat(jnp.ones(1)), "b": BatchStat(jnp.zeros(1))}
    nnx.restore(tmp_path, root)
    assert root["a"].value == 0
    assert root["b"].value == 1
    assert {p.name for p in tmp_path.glob("0/arrays-*/B*")} == {
        "BatchStat",
        "BatchStat~2",
    }


def test_groups_have_names_that_any_system_takes(tmp_path):
    odd = type("Größe/..", (nnx.Variable,), {"__module__": "x"})
    nnx.save(tmp_path, {"x": odd(jnp.ones(1))}, step=0)
    (kind,) = read_manifest(tmp_path, 0).kinds
    assert kind.group == "Gr%C3%B6%C3%9Fe%2F.."
    assert math.isfinite(nnx.load_state(tmp_path)["x"].value[0])
