"""Hugging Face folders: names, axes, fused matrices and shards, both ways."""

from __future__ import annotations

import json
import re
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from models import untouched
from sortal import nnx
from sortal.errors import ArgumentError, DamagedError, RestoreError, SaveError
from sortal.interop.files import pretrained, safetensors
from sortal.interop.files.exchange import load_arrays
from sortal.interop.files.pretrained import Fused, load_pretrained, save_pretrained

numpy = pytest.importorskip("safetensors.numpy")


def folder_of(path, tensors, shards=1):
    """A folder as ``transformers`` writes it, by the library safetensors."""
    path.mkdir()
    if shards == 1:
        numpy.save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path
    places = {}
    for n in range(shards):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        mine = dict(list(tensors.items())[n::shards])
        numpy.save_file(mine, path / file, {"format": "pt"})
        places.update(dict.fromkeys(mine, file))
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": places})
    )
    return path


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


E, H, D = 6, 2, 4
TENSORS = {
    "embed.weight": random(5, E),
    **{f"h.{i}.q.weight": random(H * D, E) + i for i in range(3)},
    **{f"h.{i}.qkv": random(E, 12) + i for i in range(3)},
    **{f"h.{i}.gate.weight": random(8, E) + i for i in range(3)},
    **{f"h.{i}.up.weight": random(8, E) - i for i in range(3)},
    "scalar": np.array(2.5, np.float32),
}
NAMES = {
    "embed.weight": "embed",
    "h.{i}.q.weight": ("blocks.{i}.q", "(h d) e -> e h d"),
    "h.{i}.qkv": Fused(("blocks.{i}.a", ("blocks.{i}.b", "e o -> o e")), axis=1),
    ("h.{i}.gate.weight", "h.{i}.up.weight"): ("blocks.{i}.both", "o e -> e o"),
    "scalar": "scalar",
}


def model():
    def zeros(*shape):
        return nnx.Param(jnp.zeros(shape))

    return {
        "embed": zeros(5, E),
        "blocks": [
            {
                "q": zeros(E, H, D),
                "a": zeros(E, 8),
                "b": zeros(4, E),
                "both": zeros(E, 16),
            }
            for _ in range(3)
        ],
        "scalar": zeros(),
    }


def check(found):
    for i, block in enumerate(found["blocks"]):
        q = TENSORS[f"h.{i}.q.weight"]
        due = np.stack([q[h * D : (h + 1) * D].T for h in range(H)], 1)
        assert np.array_equal(block["q"].value, due)
        assert np.array_equal(block["a"].value, TENSORS[f"h.{i}.qkv"][:, :8])
        assert np.array_equal(block["b"].value, TENSORS[f"h.{i}.qkv"][:, 8:].T)
        both = [TENSORS[f"h.{i}.{x}.weight"].T for x in ("gate", "up")]
        assert np.array_equal(block["both"].value, np.concatenate(both, 1))
    assert np.array_equal(found["embed"].value, TENSORS["embed.weight"])
    assert found["scalar"].value == 2.5


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_split_joined_turned_and_reshaped_both_ways(tmp_path, shards):
    into = model()
    found = load_pretrained(folder_of(tmp_path / "x", TENSORS, shards), into, NAMES)
    assert (found.missing, found.unused, len(found.leaves)) == ((), (), 14)
    check(into)
    save_pretrained(tmp_path / "y", into, NAMES, shard_bytes=300, config={"a": 1})
    files = sorted(p.name for p in (tmp_path / "y").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    written = {}
    for name in files:
        written |= numpy.load_file(tmp_path / "y" / name)
    assert written.keys() == TENSORS.keys()
    assert all(np.array_equal(written[x], TENSORS[x]) for x in TENSORS)
    again = model()
    load_pretrained(tmp_path / "y", again, NAMES)
    check(again)
    assert json.loads((tmp_path / "y" / "config.json").read_text()) == {"a": 1}


def test_a_folder_in_shards_is_read_as_one_by_every_reader(tmp_path):
    found = load_arrays(folder_of(tmp_path / "x", TENSORS, 3))
    assert np.array_equal(found["h"][1]["qkv"], TENSORS["h.1.qkv"])
    assert len(found.paths()) == len(TENSORS)


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P()])
def test_each_device_reads_only_its_part(tmp_path, monkeypatch, spec):
    """An abstract model on a mesh becomes real; nothing is read whole."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    into = jax.tree.map(lambda x: x, model())
    spec_of = {"embed": P(None, "x"), "scalar": P()}
    sharded = {}
    for path, v in nnx.state(into).flat_state():
        used = spec_of.get(path[0], spec if v.value.ndim >= 2 else P())
        if path[-1] == "q" and spec == P("x"):
            used = P(None, "x")  # over heads, inside an axis of the tensor
        sharded[path] = used
        shape = jax.ShapeDtypeStruct(
            v.value.shape, v.value.dtype, sharding=NamedSharding(mesh, used)
        )
        nnx.update(into, nnx.State.from_flat_path({path: v.replace(value=shape)}))
    read = []
    source = pretrained._Source.read

    def counted(self, index):
        found = source(self, index)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(pretrained._Source, "read", counted)
    load_pretrained(folder_of(tmp_path / "x", TENSORS, 3), into, NAMES)
    check(into)
    for path, v in nnx.state(into).flat_state():
        assert v.value.sharding.spec == sharded[path]
    if spec != P():
        total = sum(x.nbytes for x in TENSORS.values())
        assert sum(read) <= total + 2 * 4


def test_what_does_not_fit_is_listed_and_nothing_is_changed(tmp_path):
    odd = {**TENSORS, "more": random(2), "embed.weight": random(4, E)}
    del odd["h.1.qkv"], odd["scalar"]
    into = model()
    folder = folder_of(tmp_path / "x", odd)
    with pytest.raises(RestoreError) as caught:
        load_pretrained(folder, into, NAMES)
    text = str(caught.value)
    for part in (
        "shape: embed is [5, 6] in the model; found embed.weight float32[4, 6]",
        "missing: blocks.1.a",
        "missing: blocks.1.b",
        "missing: scalar",
        "unused: more",
    ):
        assert part in text
    assert not any(x.any() for x in jax.tree.leaves(nnx.state(into)))
    numpy.save_file({**odd, "embed.weight": TENSORS["embed.weight"]},
                    folder / "model.safetensors")  # fmt: skip
    found = load_pretrained(folder, into, NAMES, partial=True)
    assert found.unused == ("more",)
    assert found.missing == (("blocks", 1, "a"), ("blocks", 1, "b"), ("scalar",))
    half = {"w": nnx.Param(jnp.zeros(2, jnp.bfloat16))}
    one = folder_of(tmp_path / "one", {"w": np.ones(2, np.float32)})
    with pytest.raises(RestoreError, match=r"dtype: w .* is bfloat16 in the model"):
        load_pretrained(one, half, {"w": "w"})
    load_pretrained(one, half, {"w": "w"}, cast=True)
    assert half["w"].value.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.pop("weight_map"),
        lambda x: x.update(weight_map=[1]),
        lambda x: x["weight_map"].update(a="../x.safetensors"),
        lambda x: x["weight_map"].update(a="/etc/passwd"),
        lambda x: x["weight_map"].update(a=5),
        lambda x: x["weight_map"].update(a="gone.safetensors"),
        lambda x: x["weight_map"].update(a="model-00001-of-00003.safetensors"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, change):
    folder = folder_of(tmp_path / "x", TENSORS, 3)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(DamagedError):
        load_arrays(folder)


def test_names_that_are_malformed_or_not_enough_are_refused(tmp_path):
    folder = folder_of(tmp_path / "x", {"a.0": random(2, 2)})
    into = {"w": [nnx.Param(jnp.zeros((2, 2)))]}
    for axes in ("o i", "o i -> i", "o o -> o o", "(o i -> i o", "o, i -> i o"):
        with pytest.raises(ArgumentError, match="does not say which axes become"):
            load_pretrained(folder, into, {"a.{i}": ("w.{i}", axes)})
    with pytest.raises(ArgumentError, match="which the other side lacks"):
        load_pretrained(folder, into, {"a.{i}": "w.{j}"})
    with pytest.raises(SaveError, match=r"no name for these leaves.*\n  w.0 \(Param\)"):
        save_pretrained(tmp_path / "y", into, {})
    with pytest.raises(SaveError, match="has a model already, which is not replaced"):
        save_pretrained(folder, into, {"a.{i}": "w.{i}"})


def test_tensors_that_are_not_aligned_are_mapped(tmp_path):
    """The format promises no alignment of the numbers."""
    header = {
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(header).encode()
    data = b"\x07" + np.array([1.5, 2.5], np.float32).tobytes()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    (_, w) = safetensors.read(file).entries
    assert w.mapped().tolist() == [1.5, 2.5]


# ------------------------------------------------------------------------------- memory
def aligned(folder, tensors):
    """A file whose tensors begin where JAX would keep the mapped memory, uncopied."""
    header, data = {}, b""
    for name, x in tensors.items():
        span = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": span}
        data += x.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 4096)
    folder.mkdir()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file, 8 + len(text)


@pytest.mark.parametrize("placed", ["uncommitted", "one device", "mesh", "replicated"])
@pytest.mark.parametrize("large", [False, True])
def test_a_loaded_model_does_not_change_with_its_file(tmp_path, placed, large):
    rows = 16_384 if large else 64
    x = np.random.default_rng(0).standard_normal((rows, 1024), np.float32)
    file, at = aligned(tmp_path / "x", {"w": x})
    mesh = jax.make_mesh((8,), ("d",))
    sharding = {
        "uncommitted": None, "one device": SingleDeviceSharding(jax.devices()[3]),
        "mesh": NamedSharding(mesh, P("d")), "replicated": NamedSharding(mesh, P()),
    }[placed]  # fmt: skip
    model = {"w": nnx.Param(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding))}
    load_pretrained(tmp_path / "x", model, {"w": "w"})
    value = model["w"].value
    assert value.committed == (placed != "uncommitted")
    assert sharding is None or value.sharding == sharding
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(b"\0" * x.nbytes)
    assert jnp.array_equal(value, x)  # by NumPy, JAX 0.11 would keep it from donation
    twice = jax.jit(lambda x: 2 * x, donate_argnums=0)(value)
    assert value.is_deleted()
    assert np.array_equal(twice, 2 * x)


def test_dtypes_that_jax_does_not_hold_are_refused(tmp_path):
    folder = folder_of(tmp_path / "x", {"w": np.ones(3)})
    model = {"w": nnx.Param(jax.ShapeDtypeStruct((3,), np.dtype(np.float64)))}
    with pytest.raises(RestoreError, match=r"w \(Param\) is float64, which JAX holds"):
        load_pretrained(folder, model, {"w": "w"})
    host = {"w": nnx.Param(np.zeros(3))}
    load_pretrained(folder, host, {"w": "w"})
    assert host["w"].value.tolist() == [1, 1, 1]


# --------------------------------------------------------------- what is refused
ONE = {"w": Fused(("a", "b"))}


@pytest.mark.parametrize(
    ("leaves", "names", "said"),
    [
        # Written with the dtype of the first, the others' numbers would be others.
        (("f4 2 4", "f2 2 4"), ONE, "w: a float32[2,4], b float16[2,4]"),
        (("i4 2 4", "f4 2 4"), ONE, "w: a int32[2,4], b float32[2,4]"),
        (("f4 2 4", "f4 2 5"), ONE, "w: a float32[2,4], b float32[2,5]"),
        (("f4 2 4", "f4 2"), ONE, "w: a float32[2,4], b float32[2]"),
        (("f4 2", "f4 3"), {"w": Fused(("a", "b"), axis=1)}, "a float32[2], b float32"),
        (("f4 2 4 1",), {"w": ("a", "o i -> i o")}, "a has 3 axes, and names= says 2"),
        (("f4",), {("u", "v"): "a"}, "u, v: a float32[]"),
        (("f4 3",), {("u", "v"): "a"}, "a has 3 rows, which are not 2 equal tensors"),
    ],
)  # fmt: skip
def test_leaves_that_are_no_parts_of_one_tensor_are_not_written(
    tmp_path, leaves, names, said
):
    root = {}
    for name, text in zip("ab", leaves, strict=False):
        dtype, *shape = text.split()
        root[name] = nnx.Param(jnp.full(tuple(map(int, shape)), 1.5).astype(dtype))
    with pytest.raises(SaveError, match=re.escape(said)):
        save_pretrained(tmp_path / "new", root, names)
    assert not (tmp_path / "new").exists()


def leaked():
    kept: list[Any] = []
    jax.jit(lambda x: kept.append(x))(jnp.ones(2))
    return kept[0]


def gone():
    value = jnp.ones(2)
    value.delete()
    return value


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: jax.random.key(0), r"a is PRNG keys, .*jax\.random\.key_data"),
        (gone, "a: its buffer was donated to a call and is gone"),
        (leaked, "a: a tracer, which was kept when a transform ended"),
        (lambda: "text", "a is no array, but a str"),
        (lambda: np.array(["text"]), "a: an array of dtype <U4"),
    ],
)
def test_leaves_that_have_no_numbers_are_not_written(tmp_path, made, said):
    root = {"a": nnx.Param(made())}
    with pytest.raises(SaveError, match=said):
        save_pretrained(tmp_path / "new", root, {"a": "a"})
    assert not (tmp_path / "new").exists()


def test_leaves_of_one_name_are_not_taken_for_one_another(tmp_path):
    """Of the key "a.b" and the key "b" in "a" one was silently not written."""
    root = {"a.b": nnx.Param(jnp.ones(2)), "a": {"b": nnx.Param(jnp.zeros(2))}}
    with pytest.raises(SaveError, match=r"one name in names=.*\n  a\.b"):
        save_pretrained(tmp_path / "new", root, {"w": "a.b"})
    save_pretrained(tmp_path, {"w": nnx.Param(jnp.ones(2))}, {"w": "w"})
    with (
        untouched(root),
        pytest.raises(RestoreError, match=r"one name in names=.*\n  a\.b"),
    ):
        load_pretrained(tmp_path, root, {"w": "a.b"}, partial=True)


WRONG = [
    ["w"], None, ("w",), ("w", "w"),
    {"w": 3}, {3: "w"}, {"w": ("w", 3)}, {("u", 3): "w"}, {(): "w"},
    {"w": ("w", "a -> a", "b")}, {"w": Fused(())}, {"w": Fused(("w",), axis=-1)},
    {"w": Fused("w")}, {"w": Fused((("w", "a -> a", 3),))},
]  # fmt: skip


@pytest.mark.parametrize("names", WRONG)
def test_names_of_another_form_are_refused(tmp_path, names):
    root = {"w": nnx.Param(jnp.ones(2))}
    save_pretrained(tmp_path, root, {"w": "w"})
    with pytest.raises(ArgumentError, match=r"names= is a mapping .*; found:\n  "):
        load_pretrained(tmp_path, root, names)
    with pytest.raises(ArgumentError, match=r"names= is a mapping .*; found:\n  "):
        save_pretrained(tmp_path / "new", root, names)


@pytest.mark.parametrize(
    "options",
    [
        {"shard_bytes": "5GB"},
        {"shard_bytes": 0},
        {"config": [1]},
        {"config": {"a": {1}}},
    ],
)
def test_options_of_another_form_are_refused_before_anything_is_written(
    tmp_path, options
):
    root = {"w": nnx.Param(jnp.ones(2))}
    with pytest.raises(ArgumentError, match=next(iter(options))):
        save_pretrained(tmp_path / "new", root, {"w": "w"}, **options)
    assert not (tmp_path / "new").exists()
