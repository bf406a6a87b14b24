"""Leaves of models and files as items: what they are, and what is known of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx as flax_nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal
from page_scripts import SHARDING
from sortal.inspect.html.source import Class, Source, read_arrays, shown, source_of


def look(thing, **sharding) -> Source:
    return source_of(thing, "latest", SHARDING | sharding)


def by_path(source: Source):
    return {item.path: item for item in source.items}


def test_leaves_and_modules_of_a_model():
    norm = sortal.BatchNorm(2, rngs=sortal.Rngs(0))
    source = look({"norm": norm, "again": norm.scale, "raw": np.ones(3, np.int8)})
    items = by_path(source)
    scale = items["again",]
    assert (scale.kind.label, scale.kind.full) == ("Param", "sortal.Param")
    assert Class("Variable", "sortal.Variable") in scale.kind.classes
    assert (scale.shape, str(scale.dtype), scale.bytes) == ((2,), "float32", 8)
    assert scale.aliases == (("norm", "scale"),)
    raw = items["raw",]
    assert (raw.kind.label, raw.kind.full) == ("unlabelled array", None)
    assert raw.kind.classes == (Class("ndarray", "numpy.ndarray"),)
    node = source.nodes["norm",]
    assert node.cls == "BatchNorm"
    assert ("momentum", "0.99") in node.statics
    assert source.labelled


def test_the_title_names_the_classes_of_what_a_plain_container_holds():
    model = sortal.Linear(2, 2, rngs=sortal.Rngs(0))
    assert look(model).title == "Linear"
    assert look((model, sortal.BatchNorm(2, rngs=sortal.Rngs(0)))).title == (
        "Linear and BatchNorm"
    )
    assert look(sortal.Param(1.0)).title == "One leaf"


def test_models_of_flax_and_abstract_ones_are_read_as_they_are():
    theirs = by_path(look(flax_nnx.Linear(2, 3, rngs=flax_nnx.Rngs(0))))
    assert theirs["kernel",].kind.label == "Param"
    assert Class("Param", "sortal.Param") in theirs["kernel",].kind.classes
    make = lambda: sortal.Linear(2, 3, rngs=sortal.Rngs(0))  # noqa: E731
    abstract = by_path(look(sortal.abstract(make)))["kernel",]
    assert (abstract.shape, abstract.bytes) == ((2, 3), 24)
    assert read_arrays(abstract) == ([], "abstract: it has no values")
    again = by_path(look(flax_nnx.eval_shape(lambda: flax_nnx.Linear(
        2, 3, rngs=flax_nnx.Rngs(0)))))["kernel",]  # fmt: skip
    assert read_arrays(again)[1] == "abstract: it has no values"


def test_an_optimizer_and_a_state_have_leaves_too():
    import optax

    model = sortal.Linear(2, 3, rngs=sortal.Rngs(0))
    optimizer = sortal.Optimizer(model, optax.adam(0.1), wrt=sortal.Param)
    found = look(optimizer)
    assert found.title == "Optimizer"
    assert {p[:1] for p in by_path(found)} == {("opt_state",), ("step",)}
    state = look(sortal.state(model, sortal.Param))
    assert list(by_path(state)) == [("bias",), ("kernel",)]


def test_why_a_value_cannot_be_read_is_said():
    key = by_path(look({"k": sortal.RngKey(jax.random.key(0))}))["k",]
    assert key.unread == "random keys are no numbers"
    given = jnp.ones(3)
    source = look({"gone": sortal.Param(given)})
    given.delete()
    assert source.items[0].unread == ""
    assert look({"gone": sortal.Param(given)}).items[0].unread == (
        "its memory was given away (donated)"
    )


def test_where_arrays_lie_and_where_a_policy_puts_them():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.zeros((16, 2)), NamedSharding(mesh, P("data")))
    lying = look({"x": sortal.Param(x)}).items[0]
    assert (lying.spec, lying.on_device, lying.bytes) == ("P('data')", 16, 128)
    policy = {sortal.Param: sortal.Rule(spec=P(None))}
    given = look({"x": sortal.Param(x)}, mesh=mesh, policy=policy).items[0]
    assert (given.spec, given.on_device, given.lies) == ("P(None)", 128, "P('data')")
    assert given.by == "row 1"


def test_metadata_and_tags_are_shown_and_cannot_break_the_page():
    class Odd:
        def __repr__(self):
            raise ValueError("no")

        def __hash__(self):
            return 1

        def __eq__(self, other):
            return self is other

    item = look([sortal.Param(1.0, tag="t", odd=Odd())]).items[0]
    assert item.tag == "t"
    assert ("odd", "<Odd, whose repr raises ValueError>") in item.metadata
    assert shown(jnp.tanh) == "tanh"


@pytest.fixture
def model():
    shared = sortal.Param(jnp.arange(6.0).reshape(2, 3))
    return {
        "a": shared,
        "b": {"again": shared},
        "rngs": sortal.Rngs(0),
        "s": sortal.BatchStat({"mean": jnp.zeros(2), "n": 3}),
    }


def test_a_checkpoint_keeps_kinds_their_bases_tags_and_sharing(model, tmp_path):
    sortal.save(tmp_path / "steps", model, step=7)
    source = look(tmp_path / "steps")
    live, stored = by_path(look(model)), by_path(source)
    assert stored.keys() == live.keys()
    assert source.title == "steps, step 7"
    for path, item in live.items():
        assert stored[path].kind.full == item.kind.full
        assert stored[path].aliases == item.aliases
        assert stored[path].tag == item.tag
    bases = {c.full for c in stored["rngs", "default", "key"].kind.classes}
    assert {"sortal.RngKey", "sortal.RngState", "sortal.Variable"} <= bases
    assert (read_arrays(stored["a",])[0][0] == np.arange(6.0).reshape(2, 3)).all()
    assert stored["s",].text == "float32[2], int"


def test_files_of_others_have_arrays_alone(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    safetensors.numpy.save_file({"layers.0.w": x}, tmp_path / "m.safetensors")
    np.savez(tmp_path / "m.npz", **{"layers.0.w": x})
    sortal.save(tmp_path / "s", {"layers": [{"w": sortal.Param(x)}]}, step=0)
    from sortal.inspect import stored

    stored.convert(str(tmp_path / "s"), f"orbax:{tmp_path / 'o'}")
    for name in ("m.safetensors", "m.npz", "o"):
        source = look(str(tmp_path / name))
        assert not source.labelled
        item = by_path(source)["layers", 0, "w"]
        assert (item.shape, item.bytes) == ((2, 3), 24)
        assert (read_arrays(item)[0][0] == x).all()


def test_quantised_numbers_of_gguf_are_those_they_stand_for(tmp_path):
    gguf = pytest.importorskip("gguf")
    x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    packed = gguf.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("w", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    item = look(tmp_path / "m.gguf").items[0]
    assert (item.shape, item.bytes, item.dtype) == ((2, 32), 68, "q8_0")
    (found,), why = read_arrays(item)
    assert why == ""
    assert np.abs(found - x).max() < 0.01


def test_an_array_that_cannot_be_read_takes_no_other_with_it(tmp_path):
    import json
    import struct

    header = {
        "ok": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "new": {"dtype": "F7_X", "shape": [4], "data_offsets": [4, 8]},
    }
    text = json.dumps(header).encode()
    whole = struct.pack("<Q", len(text)) + text + struct.pack("<f", 2.5) + b"\0" * 4
    (tmp_path / "m.safetensors").write_bytes(whole)
    items = by_path(look(tmp_path / "m.safetensors"))
    assert read_arrays(items["ok",])[0][0].tolist() == [2.5]
    assert read_arrays(items["new",])[1].startswith("it cannot be read: ")
