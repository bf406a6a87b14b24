"""Files of others: read as their own libraries write them, and the other way round."""

from __future__ import annotations

import json
import pickle
import random
import struct
import sys
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sortal import nnx
from sortal.errors import (
    ArgumentError,
    DamagedError,
    NoCheckpointError,
    RestoreError,
    SaveError,
    UnsupportedError,
)
from sortal.interop.files.exchange import export, load_arrays, open_arrays, restore_from

ARRAYS = {
    "a.0.w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.1.w": np.arange(6.0).reshape(2, 3).T,
    "b": np.array(3, np.int64),
    "c": np.zeros((0, 2), np.float16),
    "d": np.array([True, False]),
}
TORCH = {
    "layers.*.kernel": ("model.*.fc.weight", (1, 0)),
    "layers.*.bias": "model.*.fc.bias",
}


class Two(nnx.Module):
    def __init__(self, seed: int):
        rngs = nnx.Rngs(seed)
        self.layers = [nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)]

    def __call__(self, x):
        return self.layers[1](self.layers[0](x))


def test_a_file_of_the_safetensors_library_is_read(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    given = {k: np.array(v, order="C") for k, v in ARRAYS.items()}
    numpy.save_file(given, tmp_path / "x.safetensors", metadata={"format": "np"})
    found = load_arrays(tmp_path / "x.safetensors")
    for name, value in ARRAYS.items():
        got = found.flat_state()
        (mine,) = [x for p, x in got if ".".join(map(str, p)) == name]
        assert mine.dtype == value.dtype
        assert np.array_equal(mine, value)


def test_what_is_exported_is_read_by_the_safetensors_library(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    export(tmp_path / "x.safetensors", dict(ARRAYS.items()))
    found = numpy.load_file(tmp_path / "x.safetensors")
    assert found.keys() == ARRAYS.keys()
    assert all(np.array_equal(found[k], v) for k, v in ARRAYS.items())


def test_dtypes_that_numpy_does_not_know_come_back(tmp_path):
    root = {
        "b": nnx.Param(jnp.ones(3, jnp.bfloat16)),
        "f": nnx.Param(jnp.ones(3, ml_dtypes.float8_e4m3fn)),
    }
    export(tmp_path / "x.safetensors", root)
    into = {k: nnx.Param(jnp.zeros_like(v.value)) for k, v in root.items()}
    assert restore_from(tmp_path / "x.safetensors", into) == (("b",), ("f",))
    assert all(jnp.array_equal(into[k].value, root[k].value) for k in root)


@pytest.mark.parametrize("ending", [".safetensors", ".npz", ""])
def test_a_model_goes_out_and_comes_back(tmp_path, ending):
    model, into = Two(0), Two(1)
    export(tmp_path / f"x{ending}", model, only=nnx.Param)
    restore_from(tmp_path / f"x{ending}", into)
    assert nnx.state(into) == nnx.state(model)


def test_weights_in_the_layout_of_pytorch_compute_the_same(tmp_path):
    """Names by globs, and kernels turned: checked by what the layers compute."""
    rng = np.random.default_rng(0)
    weights = {
        "model.0.fc.weight": rng.standard_normal((3, 2), np.float32),
        "model.0.fc.bias": rng.standard_normal(3, np.float32),
        "model.1.fc.weight": rng.standard_normal((1, 3), np.float32),
        "model.1.fc.bias": rng.standard_normal(1, np.float32),
    }
    np.savez(tmp_path / "x.npz", **weights)
    model = Two(0)
    restore_from(tmp_path / "x.npz", model, names=TORCH)
    x = rng.standard_normal((5, 2), np.float32)
    due = x @ weights["model.0.fc.weight"].T + weights["model.0.fc.bias"]
    due = due @ weights["model.1.fc.weight"].T + weights["model.1.fc.bias"]
    np.testing.assert_allclose(model(x), due, rtol=1e-5)
    export(tmp_path / "y.npz", model, names=TORCH)
    with np.load(tmp_path / "y.npz") as back:
        assert {k: v.tolist() for k, v in back.items()} == {
            k: v.tolist() for k, v in weights.items()
        }


def test_what_does_not_fit_is_listed_and_nothing_is_changed(tmp_path):
    np.savez(
        tmp_path / "x.npz", **{"layers.0.kernel": np.ones((2, 2)), "z": np.ones(1)}
    )
    model = Two(0)
    before = nnx.state(model)
    with pytest.raises(RestoreError) as caught:
        restore_from(tmp_path / "x.npz", model)
    text = str(caught.value)
    assert (
        "shape: layers.0.kernel (Param) is float32[2,3] in the model, float64[2,2]"
        in text
    )
    assert "missing: layers.1.bias (Param)" in text
    assert "unknown: z" in text
    with pytest.raises(RestoreError, match="patterns that fit nothing in"):
        restore_from(tmp_path / "x.npz", model, names={"a.**": "nothing.**"})
    with pytest.raises(RestoreError, match=r"\(2, 2\), of which \(0, 0\) are not the"):
        restore_from(tmp_path / "x.npz", model, names={"q.**": ("layers.**", (0, 0))})
    assert nnx.state(model) == before


@pytest.mark.parametrize(
    "names",
    [
        ["a"],
        "a",
        {"a": 3},
        {3: "a"},
        {"a": ("a", "b")},
        {"a": ("a", (0,), 1)},
        {"a": ()},
        ("a",),
        (),
    ],
)
def test_names_of_another_form_are_refused(tmp_path, names):
    root, file = {"a": nnx.Param(jnp.ones(2))}, tmp_path / "x.safetensors"
    export(file, root)
    for use in (
        lambda: restore_from(file, root, names=names),
        lambda: load_arrays(file, names=names),
        lambda: export(tmp_path / "y.npz", root, names=names),
    ):
        with pytest.raises(ArgumentError, match=r"names= is a mapping .*; found:\n  "):
            use()


def test_names_that_fit_no_leaf_are_refused_by_export(tmp_path):
    """As by ``restore_from``: else a leaf goes out by its own name, not turned."""
    root = {"kernel": nnx.Param(jnp.ones((2, 3))), "bias": nnx.Cache(jnp.ones(3))}
    names = {"kernal": ("fc.weight", (1, 0)), "bias": "fc.bias"}
    with pytest.raises(SaveError, match=r"fit no leaf:\n  'kernal': \('fc.weight'"):
        export(tmp_path / "x.safetensors", root, names=names)
    with pytest.raises(SaveError, match=r"of which \(0, 0\) are not the axes"):
        export(tmp_path / "x.npz", root, names={"kernel": ("w", (0, 0))})
    assert not list(tmp_path.iterdir())
    # A leaf that the filter leaves out is one all the same.
    export(tmp_path / "x.npz", root, names={"bias": "b"}, only=nnx.Param)


@pytest.mark.parametrize("ending", [".safetensors", ".npz", ""])
def test_leaves_without_values_are_not_exported(tmp_path, ending):
    kept, gone = [], jnp.ones(2)
    jax.jit(lambda x: kept.append(x))(jnp.ones(2))
    gone.delete()
    shape = jax.ShapeDtypeStruct((2,), "f4")
    root = {"a": nnx.Param(kept[0]), "b": nnx.Param(gone), "c": nnx.Param(shape)}
    with pytest.raises(SaveError) as caught:
        export(tmp_path / f"x{ending}", root, only=lambda path, _: path != ("c",))
    assert "a (Param): a tracer, which was kept when a transform ended" in str(
        caught.value
    )
    assert "b (Param): its buffer was donated to a call and is gone" in str(
        caught.value
    )
    with pytest.raises(SaveError, match=r"c \(Param\)"):
        export(tmp_path / f"x{ending}", root, only=nnx.At("c"))
    assert not list(tmp_path.iterdir())


def test_what_no_format_holds_is_refused(tmp_path):
    with pytest.raises(
        SaveError, match=r"only arrays can be exported.*\n  x \(Cache\)"
    ):
        export(tmp_path / "x.npz", {"x": nnx.Cache("text")})
    with pytest.raises(SaveError, match="no name for these dtypes:\n  x: bfloat16"):
        export(tmp_path / "x.npz", {"x": nnx.Cache(jnp.ones(1, jnp.bfloat16))})
    with pytest.raises(SaveError, match="safetensors has no dtype for:\n  x: int4"):
        export(tmp_path / "x.safetensors", {"x": nnx.Cache(jnp.ones(1, jnp.int4))})
    with pytest.raises(SaveError, match=r"x\.pkl: no format of this ending"):
        export(tmp_path / "x.pkl", Two(0))
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------- Flax, Orbax
def flax_model():
    from flax import nnx as flax

    class Model(flax.Module):
        def __init__(self, rngs):
            self.layers = flax.List([flax.Linear(2, 3, rngs=rngs)])
            self.norm = flax.BatchNorm(3, rngs=rngs)
            self.drop = flax.Dropout(0.1, rngs=rngs)

    return flax, Model


class Ours(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)


def test_a_checkpoint_by_the_recipe_of_flax_is_imported(tmp_path):
    """``nnx.split``, then ``StandardCheckpointer.save``, as Flax's guide has it."""
    import orbax.checkpoint as ocp

    flax, model = flax_model()
    theirs = model(flax.Rngs(7))
    _, state = flax.split(theirs)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    ours = Ours(nnx.Rngs(0))
    restored = restore_from(tmp_path / "state", ours)
    assert len(restored) == len(nnx.state(ours).paths()) == 8
    assert np.array_equal(ours.layers[0].kernel.value, theirs.layers[0].kernel[...])
    assert np.array_equal(ours.norm.var.value, theirs.norm.var[...])
    ours_key = jax.random.key_data(ours.drop.rngs.key.value)
    assert np.array_equal(ours_key, jax.random.key_data(theirs.drop.rngs.key[...]))


def test_pure_dicts_and_the_newer_orbax_are_imported_too(tmp_path):
    from orbax.checkpoint import v1

    flax, model = flax_model()
    theirs = model(flax.Rngs(7))
    pure = flax.to_pure_dict(flax.state(theirs, flax.Param))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        v1.save_pytree(tmp_path / "v1", pure)
    ours = Ours(nnx.Rngs(0))
    restore_from(tmp_path / "v1", ours, only=nnx.Param)
    assert np.array_equal(ours.layers[0].kernel.value, theirs.layers[0].kernel[...])


def test_what_is_exported_for_orbax_is_read_by_orbax(tmp_path):
    import orbax.checkpoint as ocp

    model = Two(3)
    export(tmp_path / "x", model)
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(
            tmp_path / "x",
            restore_args=jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                checkpointer.metadata(tmp_path / "x").item_metadata.tree,
            ),
        )
    found = found["layers"]["0"]["kernel"]["value"]  # as Flax NNX writes a Variable
    assert np.array_equal(found, model.layers[0].kernel.value)
    with pytest.raises(SaveError, match="exists, and Orbax cannot replace it safely"):
        export(tmp_path / "x", model)


def _takes_flax() -> bool:
    flax, model = flax_model()
    try:
        return ("norm", "var") in nnx.state(model(flax.Rngs(0))).paths()
    except Exception:  # noqa: BLE001 - whatever it is, Flax's objects are not taken
        return False


@pytest.mark.skipif(not _takes_flax(), reason="the engine does not take Flax's objects")
def test_a_model_and_optimizer_of_flax_are_saved_and_restored_directly(tmp_path):
    import optax

    flax, model = flax_model()
    saved, into = model(flax.Rngs(7)), model(flax.Rngs(0))
    roots = [
        {"model": m, "optimizer": flax.Optimizer(m, optax.adam(1e-3), wrt=flax.Param)}
        for m in (saved, into)
    ]
    nnx.save(tmp_path, roots[0], step=1)
    nnx.restore(tmp_path, roots[1])
    a, b = (jax.tree.leaves(flax.state((r["model"], r["optimizer"]))) for r in roots)
    for x, y in zip(a, b, strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.array_equal(x, y)


# ---------------------------------------------------------------- hostile files
def test_a_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("code was run",))

    np.savez(tmp_path / "x.npz", x=np.array([Evil()], dtype=object))
    with pytest.raises(DamagedError, match="holds Python objects, which are not read"):
        open_arrays(tmp_path / "x.npz")
    (tmp_path / "y.npz").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DamagedError, match="no archive of arrays"):
        open_arrays(tmp_path / "y.npz")


def safetensors_file(header, data=b"\0" * 8, length=None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        safetensors_file({"a": GOOD}, length=1 << 60),
        safetensors_file({"a": GOOD}, data=b"\0" * 7),
        safetensors_file({"a": GOOD}, data=b"\0" * 9),
        safetensors_file({"a": {**GOOD, "dtype": "PICKLE"}}),
        safetensors_file({"a": {**GOOD, "shape": [1 << 60]}}),
        safetensors_file({"a": {**GOOD, "shape": [-2]}}),
        safetensors_file({"a": {**GOOD, "data_offsets": [0, 1 << 60]}}),
        safetensors_file({"a": {**GOOD, "data_offsets": [4, 8]}}),
        safetensors_file({"a": GOOD, "b": GOOD}),
        safetensors_file([1]),
        safetensors_file({"a": 3}),
    ],
)
def test_a_safetensors_file_that_lies_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DamagedError, match="is not a safetensors file, or damaged"):
        open_arrays(tmp_path / "x.safetensors")


@pytest.mark.parametrize("ending", [".safetensors", ".npz", ".gguf"])
def test_noise_is_an_error_and_no_crash(tmp_path, ending):
    rng = random.Random(0)  # noqa: S311 - no secrets here
    export(tmp_path / "good.npz", Two(0))
    good = (tmp_path / "good.npz").read_bytes()
    file = tmp_path / f"x{ending}"
    for n in range(30):
        cut = good[: rng.randrange(len(good))]
        file.write_bytes(cut if n % 2 else rng.randbytes(n * 40))
        with pytest.raises(DamagedError):
            open_arrays(file)


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "_METADATA").write_text("{}")
    for name in ("gguf", "orbax", "orbax.checkpoint"):
        monkeypatch.setitem(sys.modules, name, None)
    for package, do in {
        "gguf": lambda: open_arrays(tmp_path / "x.gguf"),
        "orbax-checkpoint": lambda: open_arrays(tmp_path / "tree"),
    }.items():
        with pytest.raises(UnsupportedError, match=f"with: pip install {package}$"):
            do()
    with pytest.raises(UnsupportedError, match=r"pip install orbax-checkpoint$"):
        export(tmp_path / "new", Two(0))
    assert not (tmp_path / "new").exists()


def test_what_is_nothing_known_says_what_is(tmp_path):
    with pytest.raises(NoCheckpointError, match="there is no"):
        open_arrays(tmp_path / "no")
    with pytest.raises(NoCheckpointError, match="is nothing that Sortal can read: a"):
        open_arrays(tmp_path)


def test_arrays_of_gguf_are_those_that_were_written_and_quantised_ones_refused(
    tmp_path,
):
    gguf = pytest.importorskip("gguf")
    x = np.linspace(-1, 1, 64).reshape(2, 32)
    given = {
        "f64": x,
        "f32": x.astype(np.float32),
        "f16": x.astype(np.float16),
        "bf16": x.astype(ml_dtypes.bfloat16),
        "i32": np.arange(6, dtype=np.int32).reshape(1, 2, 3),
    }
    path, writer = tmp_path / "x.gguf", gguf.GGUFWriter(tmp_path / "x.gguf", "test")
    for name, value in given.items():
        if name == "bf16":
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, value.view(np.uint8), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    kind = gguf.GGMLQuantizationType.Q8_0
    quantised = gguf.quantize(given["f32"], kind)
    writer.add_tensor("blk.0.q", quantised, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = load_arrays(path, only=~nnx.At("blk.**"))
    assert set(found) == set(given)
    for name, value in given.items():
        assert found[name].dtype == value.dtype
        assert np.array_equal(found[name], value)
    with pytest.raises(RestoreError, match=r"quantised.*\n.*blk\.0\.q: q8_0"):
        load_arrays(path)
    model = {"bf16": nnx.Param(jnp.zeros((2, 32), jnp.bfloat16))}
    assert restore_from(path, model, partial=True) == (("bf16",),)
    assert np.array_equal(model["bf16"].value, given["bf16"])
    blk = {"blk": [{"q": nnx.Param(jnp.zeros((2, 68), jnp.uint8))}]}
    with pytest.raises(RestoreError, match=r"q8_0"):
        restore_from(path, blk, partial=True)


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int16"]
)
def test_a_gguf_file_of_big_endian_numbers_has_the_same_numbers(tmp_path, dtype):
    gguf = pytest.importorskip("gguf")
    x = np.array([[1, -2.5, 3], [0, 5, 600]]).astype(dtype)
    path, big = tmp_path / "x.gguf", gguf.GGUFEndian.BIG
    writer = gguf.GGUFWriter(path, "test", endianess=big)
    if dtype == "bfloat16":
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor("x", x.byteswap().view(np.uint8), raw_dtype=kind)
    else:
        writer.add_tensor("x", x.copy())  # it is swapped in place
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = load_arrays(path)["x"]
    assert found.dtype == x.dtype
    assert np.array_equal(found, x)


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_a_name_in_names_is_written_with_its_leading_zeros(tmp_path, ending):
    file, names = tmp_path / f"x{ending}", {"w": "blk.007.w"}
    export(file, {"w": nnx.Param(jnp.ones(2))}, names=names)
    assert [e.name for e in open_arrays(file).entries] == [("blk", "007", "w")]
    model = {"w": nnx.Param(jnp.zeros(2))}
    assert restore_from(file, model, names=names) == (("w",),)
    assert np.array_equal(model["w"].value, jnp.ones(2))


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_no_keys_at_all_are_read_back_as_keys(tmp_path, ending):
    root = {"k": nnx.Param(jax.random.split(jax.random.key(0, impl="rbg"), (0, 2)))}
    export(tmp_path / f"x{ending}", root)
    assert restore_from(tmp_path / f"x{ending}", root) == (("k",),)
    assert load_arrays(tmp_path / f"x{ending}")["k"].shape == (0, 2, 4)
