"""restore and load_state: exact, strict, all or nothing, only what was asked for."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal as nnx
from benchmarks import faults
from models import Holder, Net, models, portrait, untouched
from sortal._engine.plan import bind
from sortal.checkpoint import files, restoring
from sortal.checkpoint.manifest import is_chunk
from sortal.checkpoint.store import SMALL, Reader
from sortal.errors import (
    ArgumentError,
    CheckpointError,
    DamagedError,
    NoCheckpointError,
    PolicyError,
    RestoreError,
    SaveError,
)


class Moment(NamedTuple):
    mean: Any
    count: Any


def emptied(value: Any) -> Any:
    """The same structure with other numbers."""

    def other(x: Any) -> Any:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jnp.zeros_like(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        if isinstance(x, jax.Array):
            return jnp.zeros_like(x) if not x.weak_type else jnp.asarray(0.0)
        if isinstance(x, (np.ndarray, np.generic)):
            zero = np.zeros(x.shape, x.dtype)
            return zero if isinstance(x, np.ndarray) else zero[()]
        return type(x)()

    if type(value) is dict:  # JAX would have its keys be of one type
        return {k: emptied(v) for k, v in value.items()}
    return jax.tree.map(other, value)


F8 = ml_dtypes.float8_e4m3fn
VALUES = {
    "float32": np.linspace(-1, 1, 7, dtype=np.float32).reshape(7, 1),
    "nan": np.array([np.nan, np.inf, -np.inf, -0.0], np.float32),
    "float64": np.array([1 / 3]),
    "bfloat16": np.arange(5).astype(ml_dtypes.bfloat16),
    "float8": np.arange(5).astype(F8),
    "int4": np.arange(-8, 8).astype(ml_dtypes.int4),
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j], np.complex64),
    "uint8": np.arange(255, dtype=np.uint8),
    "big endian": np.arange(5, dtype=">i4"),
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "strided": np.arange(10)[::-2],
    "0-d": np.array(3, np.int16),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.float32(2.5),
    "jax": jnp.arange(3),
    "weak": jnp.asarray(1.5),
    "jax bfloat16": jnp.ones((2, 2), jnp.bfloat16),
    "jax int4": jnp.arange(4, dtype=jnp.int4),
    "jax empty": jnp.zeros((3, 0)),
    "key": jax.random.key(7),
    "keys": jax.random.split(jax.random.key(7, impl="rbg"), 3),
    "int": 2**100,
    "negative": -5,
    "float": -0.1,
    "bool scalar": True,
    "complex scalar": complex(1, -0.0),
    "str": "ünï\0",
    "bytes": b"\x00\xff",
    "none": None,
    "nested": {"b": [jnp.ones(2), (None, 3)], "a": {1: np.ones(1), "1": "x"}},
    "tuple": Moment(jnp.ones(2), 3),
    "optax": optax.EmptyState(),
}


@pytest.mark.parametrize("name", VALUES)
def test_every_sort_of_value_comes_back_exactly(tmp_path, name):
    value = VALUES[name]
    saved = {"x": nnx.Cache(value)}
    nnx.save(tmp_path, saved, step=0)
    into = {"x": nnx.Cache(emptied(value))}
    nnx.restore(tmp_path, into)
    assert same(into["x"].value, value)
    if name not in ("tuple", "optax", "float64"):
        assert same(nnx.load_state(tmp_path)["x"].value, value)


def same(a: Any, b: Any) -> bool:
    if type(a) is dict:
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(_same(x, y) for x, y in pairs)


def _same(x: Any, y: Any) -> bool:
    if type(x) is not type(y) or repr(getattr(x, "shape", 0)) != repr(
        getattr(y, "shape", 0)
    ):
        return False
    if isinstance(x, jax.Array):
        about = [(jax.typeof(v), v.committed, v.sharding) for v in (x, y)]
        if about[0] != about[1]:
            return False
    elif isinstance(x, (np.ndarray, np.generic)):
        # Byte order is a matter of memory, not of numbers.
        y = y.astype(y.dtype.newbyteorder("="))
        if x.dtype != y.dtype:
            return False
    else:
        return repr(x) == repr(y)
    return _bytes(x) == _bytes(y)


def _bytes(x: Any) -> bytes:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def test_the_comparison_of_these_tests_sees_a_difference():
    assert not same(jnp.ones(2), jnp.ones(2, jnp.int32))
    assert not same(jnp.asarray(1.5), jnp.array([1.5])[0].astype(jnp.float32))
    assert not same(np.float32(1), np.ones((), np.float32))
    assert not same(0.0, -0.0)


@settings(max_examples=15, suppress_health_check=[*HealthCheck], deadline=None)
@given(models(), st.booleans())
def test_a_model_of_anything_comes_back_as_it_was(tmp_path_factory, model, wait):
    """With shared Variables and modules, containers, raw arrays and statics."""
    where = tmp_path_factory.mktemp("m")
    plan = bind(model)
    fixed = any(not getattr(leaf, "writable", True) for leaf in plan.leaves)
    before = portrait(model)
    nnx.save(where, model, step=0, wait=wait).wait()
    for leaf in plan.leaves:
        if isinstance(leaf, nnx.Variable):
            leaf.value = emptied(leaf.value)
    if fixed:
        with pytest.raises(RestoreError, match="cannot be written"):
            nnx.restore(where, model)
        return
    nnx.restore(where, model)
    assert portrait(model) == before


def alike(a: Any, b: Any) -> bool:
    """The same paths and kinds, and values that are the same to the bit."""
    a, b = nnx.state(a), nnx.state(b)
    return a.schema is b.schema and same(a.values_list(), b.values_list())


def trained() -> dict[str, Any]:
    found = fresh()
    kept = nnx.state(found, nnx.Not(nnx.RngState))
    nnx.update(found, jax.tree.map(lambda x: x + 3, kept))
    return {**found, "rngs": nnx.Rngs(3, dropout=4)}


def fresh() -> dict[str, Any]:
    model = Net(9)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    return {"model": model, "optimizer": optimizer, "rngs": nnx.Rngs(0, dropout=0)}


def test_several_objects_at_once_come_back(tmp_path):
    saved, into = trained(), fresh()
    nnx.save(tmp_path, saved, step=2, metadata={"position": 8})
    found = nnx.restore(tmp_path, into)
    assert found.metadata == {"position": 8}
    assert found.path == tmp_path / "2"
    assert not alike(fresh(), saved)
    assert alike(into, saved)


def test_an_abstract_model_becomes_a_real_one(tmp_path):
    nnx.save(tmp_path, Net(0), step=0)
    abstract = nnx.eval_shape(lambda: Net(1))
    nnx.restore(tmp_path, abstract)
    assert portrait(abstract) == portrait(Net(0))


def test_restoring_one_kind_reads_the_bytes_of_that_kind_only(tmp_path):
    """Counted by the system: what this process read, in bytes."""
    root = {
        "w": nnx.Param(jnp.ones((1100, 1000))),
        "b": nnx.Param(jnp.ones(1000)),
        "s": nnx.BatchStat(jnp.ones((5, 1000))),
        "c": nnx.Cache(jnp.ones((2200, 1000))),
    }
    nnx.save(tmp_path, root, step=0)
    nnx.restore(tmp_path, root, only=nnx.BatchStat)  # what a first call brings in
    into = {k: type(v)(v.value * 0) for k, v in root.items()}
    before = _bytes_read()
    nnx.restore(tmp_path, into, only=nnx.BatchStat)
    read = _bytes_read() - before
    assert 20_000 <= read < 40_000
    assert into["s"].value.sum() == 5000
    assert into["w"].value.sum() == 0


def _bytes_read() -> int:
    text = Path("/proc/self/io").read_text()
    return int(text.split("rchar: ")[1].split()[0])


def test_a_model_that_was_set_to_evaluation_takes_what_was_saved_in_training(tmp_path):
    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    nnx.save(tmp_path, model, step=0)
    model.eval()
    assert nnx.restore(tmp_path, model).step == 0


def test_a_kind_that_moved_is_named(tmp_path):
    class New(nnx.Variable):
        pass

    nnx.save(tmp_path, {"x": nnx.Cache(jnp.ones(1))}, step=0)
    into = {"x": New(jnp.zeros(1))}
    with pytest.raises(RestoreError, match=r"kinds=\{"):
        nnx.restore(tmp_path, into)
    nnx.restore(tmp_path, into, kinds={"sortal.Cache": New})
    assert into["x"].value == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rename": [("a", "b")]}, r"rename= .*found:\n  \[\('a', 'b'\)\]"),
        ({"rename": {"a": 3, 4: "b", "c": "d"}}, r"found:\n  'a': 3\n  4: 'b'"),
        ({"rename": ("a", "b")}, r"rename= .*found:\n  'a': 'b'"),
        ({"kinds": ("x",)}, r"kinds= .*found:\n  'x'"),
        ({"kinds": nnx.Param}, r"kinds= .*found:\n  <class 'sortal.Param'>"),
        ({"kinds": {"x": int, "sortal.Cache": nnx.Cache}}, r"found:\n  'x': <class"),
    ],
)
def test_options_of_another_type_are_refused(tmp_path, options, told):
    nnx.save(tmp_path, {"x": nnx.Cache(jnp.ones(1))}, step=0)
    into = {"x": nnx.Cache(jnp.zeros(1))}
    for do in (nnx.restore, nnx.restore_plan):
        with pytest.raises(ArgumentError, match=told):
            do(tmp_path, into, **options)
    if "kinds" in options:
        with pytest.raises(ArgumentError, match=told):
            nnx.load_state(tmp_path, **options)
    for do in (nnx.restore, lambda *a, **k: nnx.save(*a, step=1, **k)):
        with pytest.raises(PolicyError, match=r"is a Policy, .* found 'keep'"):
            do(tmp_path, into, policy="keep")
    assert into["x"].value == 0


def test_built_in_kinds_are_known_by_the_file_that_0_1_0_named(tmp_path):
    nnx.save(tmp_path, {"x": nnx.Cache(jnp.ones(1))}, step=0)
    file = tmp_path / "0" / "manifest.json"
    body = file.read_bytes().partition(b'"manifest":')[2].removesuffix(b"}\n")
    body = body.replace(b'"sortal.', b'"sortal.variable.')
    digest = hashlib.sha256(body).hexdigest().encode()
    file.write_bytes(b'{"sha256":"%b","manifest":%b}\n' % (digest, body))
    into = {"x": nnx.Cache(jnp.zeros(1))}
    nnx.restore(tmp_path, into)
    assert into["x"].value == 1
    assert type(nnx.load_state(tmp_path)["x"]) is nnx.Cache


def test_a_kind_of_a_script_is_that_of_the_module_it_is_imported_as(tmp_path):
    kind = type("Kind", (nnx.Param,), {"__module__": "__main__"})
    nnx.save(tmp_path, {"x": kind(jnp.ones(1))}, step=0)
    kind.__module__ = "train"
    into = {"x": kind(jnp.zeros(1))}
    nnx.restore(tmp_path, into)
    assert into["x"].value == 1


def test_only_that_takes_nothing_is_refused(tmp_path):
    nnx.save(tmp_path, {"a": nnx.Param(jnp.ones(1))}, step=0)
    into = {"a": nnx.Param(jnp.zeros(1))}
    with pytest.raises(RestoreError, match="takes no leaf, neither of the model nor"):
        nnx.restore(tmp_path, into, only=nnx.Cache)
    with pytest.raises(RestoreError, match="takes none of the leaves of step 0"):
        nnx.load_state(tmp_path, only=nnx.Cache)


def test_only_may_look_at_shapes_when_there_is_a_model(tmp_path):
    root = {"a": nnx.Param(jnp.ones((1, 1))), "b": nnx.Param(jnp.ones(1))}
    nnx.save(tmp_path, root, step=0)
    into = {"a": nnx.Param(jnp.zeros((1, 1))), "b": nnx.Param(jnp.zeros(1))}
    nnx.restore(tmp_path, into, only=nnx.Shaped(ndim=2))
    assert into["a"].value == 1
    assert into["b"].value == 0
    with pytest.raises(RestoreError, match="looks at values, which are not read yet"):
        nnx.load_state(tmp_path, only=nnx.Shaped(ndim=2))


def test_a_step_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with pytest.raises(NoCheckpointError, match="which is no folder"):
        nnx.restore(tmp_path / "no", nnx.Rngs(0))
    with pytest.raises(NoCheckpointError, match=r"no checkpoint in .*\.$"):
        nnx.restore(tmp_path, nnx.Rngs(0))
    nnx.save(tmp_path, nnx.Rngs(0), step=3)
    with pytest.raises(NoCheckpointError, match=r"no step 4 .*: 3"):
        nnx.restore(tmp_path, nnx.Rngs(0), step=4)
    with pytest.raises(FileNotFoundError):
        nnx.load_state(tmp_path, step=4)


def test_a_step_under_another_name_is_refused(tmp_path):
    nnx.save(tmp_path, nnx.Rngs(0), step=3)
    (tmp_path / "3").rename(tmp_path / "4")
    with pytest.raises(DamagedError, match="holds step 3: it was renamed or copied"):
        nnx.restore(tmp_path, nnx.Rngs(0))


def test_64_bit_numbers_of_jax_are_not_cut_short(tmp_path):
    with jax.enable_x64(True):
        nnx.save(tmp_path, {"x": nnx.Param(jnp.array(1 / 3, jnp.float64))}, step=0)
    with pytest.raises(RestoreError, match="x: float64\nSet jax_enable_x64"):
        nnx.load_state(tmp_path)
    into = {"x": nnx.Param(jnp.zeros((), jnp.float32))}
    nnx.restore(tmp_path, into, cast=True)
    assert into["x"].value == jnp.float32(1 / 3)
    with jax.enable_x64(True):
        assert nnx.load_state(tmp_path)["x"].value == 1 / 3


def test_a_value_that_needs_a_model_is_refused_without_one(tmp_path):
    partial = jax.tree_util.Partial(jnp.add, jnp.ones(1))
    nnx.save(tmp_path, {"x": nnx.Cache(partial)}, step=0)
    with pytest.raises(RestoreError, match=r"x \(Cache\): .*Partial"):
        nnx.load_state(tmp_path)


def test_kinds_whose_class_is_not_loaded_get_a_stand_in(tmp_path):
    gone = type("Gone", (nnx.Param,), {"__module__": "vanished"})
    nnx.save(tmp_path, {"x": gone(jnp.ones(1), tag="t")}, step=0)
    manifest = next(tmp_path.glob("0/manifest.json")).read_text()
    assert "vanished.Gone" in manifest
    gone.__qualname__ = "Forgotten"
    found = nnx.load_state(tmp_path, only=nnx.Param)["x"]
    assert type(found).__name__ == "Gone"
    assert type(found) is not gone
    assert isinstance(found, nnx.Param)
    assert found.get_metadata("tag") == "t"


# ---------------------------------------------------------------------- elsewhere
def mesh(*shape: int) -> Mesh:
    names = ("x", "y")[: len(shape)]
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, names)


SPECS = [
    (mesh(1), P()),
    (mesh(2), P("x")),
    (mesh(2), P(None, "x")),
    (mesh(4), P("x")),
    (mesh(2, 2), P("y", "x")),
    (mesh(2, 4), P(("x", "y"))),
    (mesh(2, 4), P(None, "x")),
]


def test_a_checkpoint_of_8_devices_is_restored_on_others_with_other_specs(tmp_path):
    rng = np.random.default_rng(0)
    big = rng.standard_normal((1600, 800), np.float32)
    small = rng.integers(0, 9, (8, 8))
    placed = NamedSharding(mesh(4, 2), P("x", "y"))
    keys = jax.random.split(jax.random.key(0), 8)
    saved = {
        "big": nnx.Param(jax.device_put(big, placed)),
        "small": nnx.Param(jax.device_put(small, placed)),
        "keys": nnx.Cache(jax.device_put(keys, NamedSharding(mesh(8), P("x")))),
    }
    nnx.save(tmp_path, saved, step=0)
    chunks = list(tmp_path.glob("0/arrays-*/Param/big/c.*"))
    assert len(chunks) == 8  # one for each shard, so that processes need not share
    for where, spec in SPECS:
        to = NamedSharding(where, spec)
        into = {k: nnx.Param(jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=to))
                for k, v in saved.items() if k != "keys"}  # fmt: skip
        nnx.restore(tmp_path, into, only=nnx.Param)
        for name, value in (("big", big), ("small", small)):
            found = into[name].value
            assert found.sharding == to
            assert found.committed
            assert np.array_equal(found, value), (where, spec)
    found = nnx.load_state(tmp_path, sharding=NamedSharding(mesh(4), P("x")))
    assert np.array_equal(found["big"].value, big)
    assert jnp.array_equal(
        jax.random.key_data(found["keys"].value), jax.random.key_data(keys)
    )
    assert found["keys"].value.sharding.device_set == set(jax.devices()[:4])


def test_each_process_reads_only_the_shards_that_it_is_to_have(tmp_path):
    """Of an array in eight chunks one device that has an eighth reads an eighth."""
    value = np.arange(8 * 200_000, dtype=np.float32).reshape(8, -1)
    whole = jax.device_put(value, NamedSharding(mesh(8), P("x")))
    nnx.save(tmp_path, {"w": nnx.Param(whole)}, step=0)
    from sortal._engine.host import host_memory

    manifest = files.read_manifest(tmp_path, 0)
    reader = Reader(tmp_path / "0" / manifest.folder, manifest)
    at = (slice(3, 4), slice(0, 200_000))
    reader.wait(reader.read("Param/w", at, host_memory((1, 200_000), np.dtype("f4"))))
    before = _bytes_read()
    memory = host_memory((1, 200_000), np.dtype("f4"))
    reader.wait(reader.read("Param/w", at, memory))
    assert 800_000 <= _bytes_read() - before < 900_000
    assert np.array_equal(memory[0], value[3])


def test_only_the_files_that_are_read_are_looked_at(tmp_path, monkeypatch):
    """So that many processes do not each look at the files of all."""
    value = np.arange(8 * 200_000, dtype=np.float32).reshape(8, -1)
    whole = jax.device_put(value, NamedSharding(mesh(8), P("x")))
    apart = {f"s{i}": nnx.Cache(np.zeros(SMALL // 4 - 1, "f4")) for i in range(4)}
    nnx.save(tmp_path, {"w": nnx.Param(whole), **apart}, step=0)
    looked, real = [], files.on(tmp_path).fingerprints
    monkeypatch.setattr(
        files.on(tmp_path), "fingerprints",
        lambda root, sizes: (looked.extend(sizes), real(root, sizes))[1],
    )  # fmt: skip
    manifest = files.read_manifest(tmp_path, 0)
    reader = Reader(tmp_path / "0" / manifest.folder, manifest)
    assert reader.check([("Param/w", (slice(3, 4), slice(0, 200_000)))]) == []
    meta = ["zarr.json", "Param/zarr.json", "Param/w/zarr.json"]
    assert looked == [*meta, "Param/w/c.3.0"]
    looked.clear()
    one = {"s2": nnx.Cache(np.ones(SMALL // 4 - 1, "f4"))}
    nnx.restore(tmp_path, one, partial=True)
    assert [x for x in looked if is_chunk(x)] == ["Cache/packed/c.2"]
    assert not one["s2"].value.any()


def test_shardings_by_kind_or_policy_say_where_arrays_go(tmp_path):
    root = {"w": nnx.Param(jnp.ones((8, 2))), "s": nnx.BatchStat(jnp.ones(8))}
    nnx.save(tmp_path, root, step=0)
    where = mesh(8)
    table = {nnx.Param: NamedSharding(where, P("x")), ...: None}
    nnx.restore(tmp_path, root, sharding=nnx.StateSharding(table))
    assert root["w"].value.sharding.spec == P("x")
    assert len(root["s"].value.devices()) == 1
    policy = nnx.Policy({...: nnx.Rule(spec=P("x"))})
    with jax.set_mesh(where):
        nnx.restore(tmp_path, root, sharding=policy)
    assert root["s"].value.sharding.spec == P("x")
    with pytest.raises(RestoreError, match="is a spec, and no mesh is set"):
        nnx.restore(tmp_path, root, sharding=P("x"))


# -------------------------------------------------------------------------- damage
@pytest.mark.parametrize("how", [faults.flip, faults.truncate])
def test_damage_is_noticed_and_nothing_is_restored(tmp_path, how):
    """In small; ``python -m benchmarks.faults`` does it thousands of times."""
    found = faults.damage(tmp_path, how, 40, seed=1)
    assert found == {"noticed": 40, "unverified": 0}


@pytest.mark.parametrize("how", [faults.remove, faults.foreign])
def test_missing_and_foreign_files_are_noticed(tmp_path, how):
    found = faults.damage(tmp_path, how, 10, seed=1)
    assert found == {"noticed": 10, "unverified": 0}


def test_a_chunk_of_another_checkpoint_is_noticed(tmp_path):
    """Its own checksum is right: only the manifest knows that it belongs elsewhere."""
    for step in (1, 2):
        nnx.save(tmp_path, {"w": nnx.Param(jnp.full(4, step))}, step=step)
    mine, other = (
        next(tmp_path.glob(f"{n}/arrays-*/Param/packed/c.0")) for n in (1, 2)
    )
    other.replace(mine)
    with pytest.raises(DamagedError, match="not what was written: another checksum"):
        nnx.restore(tmp_path, {"w": nnx.Param(jnp.zeros(4, int))}, step=1)


def test_all_damaged_files_are_listed(tmp_path):
    root = {"w": nnx.Param(jnp.ones(3)), "s": nnx.BatchStat(jnp.ones(3))}
    nnx.save(tmp_path, root, step=0)
    for chunk in tmp_path.glob("0/arrays-*/*/packed/c.0"):
        chunk.unlink()
    with untouched(root), pytest.raises(DamagedError) as caught:
        nnx.restore(tmp_path, root)
    assert "Param/packed/c.0: missing" in str(caught.value)
    assert "BatchStat/packed/c.0: missing" in str(caught.value)


def test_a_restore_in_a_trace_changes_nothing(tmp_path):
    model = Holder(w=nnx.Param(jnp.ones(2)))
    nnx.save(tmp_path, model, step=0)
    model.w.value = jnp.zeros(2)
    with pytest.raises(nnx.TraceError, match="restore inside a transform"):
        jax.jit(lambda: nnx.restore(tmp_path, model))()
    assert model.w.value.sum() == 0


def test_errors_of_checkpoints_are_of_one_family():
    for error in (SaveError, RestoreError, DamagedError, NoCheckpointError):
        assert issubclass(error, CheckpointError)


@pytest.mark.parametrize("where", ["chunk", "manifest", "metadata"])
def test_a_pipe_in_the_place_of_a_file_is_damage_and_does_not_hang(tmp_path, where):
    path = nnx.save(tmp_path, nnx.Rngs(0), step=0).path
    name = {"chunk": "*/*/*/c.0", "manifest": "manifest.json",
            "metadata": "*/zarr.json"}[where]  # fmt: skip
    file = next(path.glob(name))
    file.unlink()
    os.mkfifo(file)
    for read in (lambda: nnx.restore(tmp_path, nnx.Rngs(0), step=0),
                 lambda: nnx.load_state(tmp_path, step=0)):  # fmt: skip
        with pytest.raises(CheckpointError):
            read()


def test_the_folder_of_a_step_is_answered_with_what_to_write(tmp_path):
    saving = nnx.save(tmp_path, nnx.Rngs(0), step=7)
    with pytest.raises(NoCheckpointError, match=r"It is a step itself: write .*step=7"):
        nnx.restore(saving.path, nnx.Rngs(0))


@pytest.mark.parametrize("step", ["latest", 0])
@pytest.mark.parametrize("when", ["opened", "checked"])
def test_a_step_replaced_or_deleted_while_it_is_read_is_read_again(
    tmp_path, monkeypatch, step, when
):
    def model(x):
        return {"w": nnx.Param(jnp.full(3, float(x)))}

    nnx.save(tmp_path, model(0), step=0)
    changes = iter(range(1, 4))

    def change():
        if (new := next(changes, None)) is not None:
            number = 0 if step == 0 else new
            nnx.save(tmp_path, model(new), step=number)
            if number:
                files.forget(tmp_path, number - 1)

    class Changing(Reader):
        def check(self, parts):
            if when == "opened":
                change()
            found = super().check(parts)
            if when == "checked":
                change()
            return found

    monkeypatch.setattr(restoring, "Reader", Changing)
    into = model(9)
    assert nnx.restore(tmp_path, into, step=step).step == (0 if step == 0 else 3)
    assert into["w"].value[0] == 3
    changes = iter(range(4, 6))
    assert nnx.load_state(tmp_path, step=step)["w"].value[0] == 5


@pytest.mark.parametrize("load", [False, True])
def test_a_newest_step_that_is_overtaken_gives_no_leaves_of_before(
    tmp_path, monkeypatch, load
):
    def model(x):
        return {"t": nnx.Cache(jnp.full(3, float(x)), checkpoint="keep-last")}

    nnx.save(tmp_path, model(0), step=0)
    read, newer = files.read_manifest, iter([1])

    def overtaken(directory, number):
        if (new := next(newer, None)) is not None:
            nnx.save(tmp_path, model(new), step=new)
        return read(directory, number)

    monkeypatch.setattr(files, "read_manifest", overtaken)
    into = model(9)
    if load:
        into = nnx.load_state(tmp_path)
    else:
        assert nnx.restore(tmp_path, into).step == 1
    assert into["t"].value[0] == 1


def test_a_listing_that_sees_only_what_goes_meanwhile_is_made_again(
    tmp_path, monkeypatch
):
    nnx.save(tmp_path, {"w": nnx.Param(jnp.ones(3))}, step=1)
    by_age, empty = files.by_age, iter([[]])
    monkeypatch.setattr(files, "by_age", lambda where: next(empty, by_age(where)))
    assert nnx.load_state(tmp_path)["w"].value[0] == 1


def test_a_step_that_is_always_replaced_is_an_error_in_the_end(tmp_path, monkeypatch):
    nnx.save(tmp_path, nnx.Rngs(0), step=0)

    class Changing(Reader):
        def check(self, parts):
            nnx.save(tmp_path, nnx.Rngs(0), step=0)
            return super().check(parts)

    monkeypatch.setattr(restoring, "Reader", Changing)
    with pytest.raises(nnx.errors.DamagedError, match="damaged"):
        nnx.load_state(tmp_path)


# -------------------------------------------------------------- a damaged newest step
def three_steps(directory):
    """Saved in the order 1, 3, 2, so that step 2 is the newest."""
    for step in (1, 3, 2):
        root = {"w": nnx.Param(jnp.full(3, float(step)))}
        nnx.save(directory, root, step=step)


def _no_chunk(step):
    next(step.glob("arrays-*/Param/packed/c.0")).unlink()


def _no_arrays(step):
    folder = next(step.glob("arrays-*"))
    files.on(folder).remove(folder)


def _flipped(step):
    file = next(step.glob("arrays-*/Param/packed/c.0"))
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


def _foreign(step):
    (step / "manifest.json").write_bytes(b"{}")


DAMAGES = [_no_chunk, _no_arrays, _flipped, _foreign]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_step_is_named_with_what_to_do(tmp_path, damage):
    three_steps(tmp_path)
    damage(tmp_path / "2")
    into = {"w": nnx.Param(jnp.zeros(3))}
    with untouched(into), pytest.raises(DamagedError) as caught:
        nnx.restore(tmp_path, into)
    told = str(caught.value)
    assert told.startswith(f"step 2, the newest in {tmp_path}, cannot be read: ")
    assert told.endswith("fallback=True takes the newest step that is whole instead.")
    with pytest.raises(DamagedError) as caught:
        nnx.restore(tmp_path, into, step=2)
    assert "fallback" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_step_is_taken_with_a_warning_of_both(tmp_path, damage):
    three_steps(tmp_path)
    damage(tmp_path / "2")
    into = {"w": nnx.Param(jnp.zeros(3))}
    with pytest.warns(RuntimeWarning, match=r"step 3 .* instead of step 2") as told:
        found = nnx.restore(tmp_path, into, fallback=True)
    assert found.step == 3
    assert into["w"].value.tolist() == [3.0] * 3
    assert len(told) == 1
    assert told[0].filename == __file__
    damage(tmp_path / "3")
    with pytest.warns(RuntimeWarning, match=r"(?s)step 1 .* of steps 2, 3, .*2: .*3: "):
        assert nnx.restore(tmp_path, into, fallback=True).step == 1
    with nnx.Checkpoints(tmp_path) as kept, pytest.warns(RuntimeWarning) as told:
        assert kept.restore(into, fallback=True).step == 1
    damage(tmp_path / "1")
    with pytest.raises(DamagedError, match=r"(?s)no step .* is whole:.*2: .*3: .*1: "):
        nnx.restore(tmp_path, into, fallback=True)
    assert into["w"].value.tolist() == [1.0] * 3


def test_a_whole_newest_step_is_taken_without_a_word(tmp_path):
    three_steps(tmp_path)
    into = {"w": nnx.Param(jnp.zeros(3))}
    assert nnx.restore(tmp_path, into, fallback=True).step == 2


def test_what_does_not_fit_the_model_is_no_damage_to_fall_back_from(tmp_path):
    three_steps(tmp_path)
    with pytest.raises(RestoreError, match="w"):
        nnx.restore(tmp_path, {"w": nnx.Param(jnp.zeros(4))}, fallback=True)


def test_a_fallback_is_from_the_newest_step_only(tmp_path):
    three_steps(tmp_path)
    with pytest.raises(ArgumentError, match=r"fallback=True .* step='latest'; found 2"):
        nnx.restore(tmp_path, {"w": nnx.Param(jnp.zeros(3))}, step=2, fallback=True)


@pytest.mark.parametrize(
    ("shape", "spec"), [((), P()), ((8,), P()), ((8,), P("x")), ((2, 4), P(None, "x"))]
)
def test_keys_that_lie_on_a_mesh_are_restored_onto_it(tmp_path, shape, spec):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    there = NamedSharding(mesh, spec)

    def placed(seed):
        return jax.device_put(jax.random.split(jax.random.key(seed), shape), there)

    saved = {"key": nnx.RngKey(placed(3))}
    nnx.save(tmp_path, saved, step=1)
    into = {"key": nnx.RngKey(placed(4))}
    nnx.restore(tmp_path, into)
    found = into["key"].value
    assert found.sharding.is_equivalent_to(there, found.ndim)
    assert np.array_equal(
        jax.random.key_data(found), jax.random.key_data(saved["key"].value)
    )
