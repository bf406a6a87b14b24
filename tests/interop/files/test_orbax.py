"""Orbax checkpoints: every path goes out and comes back, or is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sortal import nnx
from sortal.errors import DamagedError, NoCheckpointError, RestoreError, SaveError
from sortal.inspect.stored import convert
from sortal.interop.files.exchange import (
    export,
    load_arrays,
    open_arrays,
    restore_from,
)

ocp = pytest.importorskip("orbax.checkpoint")
flax = pytest.importorskip("flax.nnx")
ts = pytest.importorskip("tensorstore")


def network(lib):
    """One architecture, of Flax's layers or of ours."""

    class Net(lib.Module):
        def __init__(self, rngs):
            self.layers = lib.List([lib.Linear(2, 3, rngs=rngs) for _ in range(2)])
            self.norm = lib.BatchNorm(3, rngs=rngs)
            self.drop = lib.Dropout(0.5, rngs=rngs)

    return Net


Theirs, Ours = network(flax), network(nnx)


def training(lib, net, seed):
    model = net(lib.Rngs(seed))
    optimizer = lib.Optimizer(model, optax.adam(1e-3), wrt=lib.Param)
    return {"model": model, "optimizer": optimizer}


def advanced(trained):
    """After a step of Flax's, so that no moment is zero."""
    grads = jax.tree.map(jnp.ones_like, flax.state(trained["model"], flax.Param))
    trained["optimizer"].update(trained["model"], grads)
    return trained


def words(x):
    x = x[...] if hasattr(x, "get_value") or hasattr(x, "value") else x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def numbers(root):
    """Arrays by path, read by the engine from objects of either library."""
    return {p: words(x) for p, x in nnx.state(root).flat_state()}


def equal(a, b):
    a, b = numbers(a), numbers(b)
    return a.keys() == b.keys() and all(np.array_equal(a[p], b[p]) for p in a)


def bytes_read():
    found = ts.experimental_collect_matching_metrics(
        "/tensorstore/kvstore/file/bytes_read"
    )
    return sum(x["values"][0]["value"] for x in found)


def test_leaves_of_one_name_are_refused_and_all_listed(tmp_path):
    root = {0: jnp.ones(1), "0": jnp.ones(2), "b": {1: jnp.ones(1), "1": jnp.ones(1)}}
    with pytest.raises(SaveError, match="several leaves have one name") as caught:
        export(tmp_path / "x", root)
    assert "0: 0, ['0']\n  b.1: b.1, b['1']" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "root",
    [
        {"value": jnp.ones(2)},
        {"a": {"value": jnp.ones(2)}},
        {"a": {"value": jnp.ones(2)}, "b": jnp.ones(1)},
        {"a": {"value": jnp.ones(2), "other": jnp.ones(1)}},
        {"a": [jnp.ones(2)], "01": jnp.ones(3), "²": jnp.ones(1)},
        {"a.b": jnp.ones(2), "c/d": jnp.ones(1)},
    ],
    ids=str,
)
def test_a_leaf_of_any_name_comes_back(tmp_path, root):
    from sortal import nnx

    export(tmp_path / "x", root)
    before = nnx.state(root).paths()
    assert load_arrays(tmp_path / "x").paths() == before
    assert restore_from(tmp_path / "x", root) == before


def test_a_string_leaves_the_arrays_readable(tmp_path):
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(tmp_path / "x", {"w": np.ones(2), "note": "text", "n": 3, "f": 0.5})
    into = {"w": np.zeros(2)}
    restore_from(tmp_path / "x", into, partial=True)
    assert into["w"].tolist() == [1.0, 1.0]


# --------------------------------------------------------------------- several items
def of_manager(folder, states):
    items = {k: ocp.args.StandardSave(x) for k, x in states.items()}
    with ocp.CheckpointManager(folder) as manager:
        for step in (9, 10):
            manager.save(step, args=ocp.args.Composite(
                **items, data=ocp.args.JsonSave({"epoch": step})))  # fmt: skip
        manager.wait_until_finished()


def of_checkpointables(folder, states):
    from orbax.checkpoint import v1

    v1.save_checkpointables(folder, states)


def of_training(folder, states):
    from orbax.checkpoint import v1

    with v1.training.Checkpointer(folder) as checkpointer:
        checkpointer.save_checkpointables(3, states)


RECIPES = [of_manager, of_checkpointables, of_training]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("pure", [False, True])
def test_a_training_of_flax_saved_as_several_items_goes_on_here(tmp_path, recipe, pure):
    theirs = advanced(training(flax, Theirs, 7))
    states = {k: flax.state(x) for k, x in theirs.items()}
    if pure:
        states = {k: flax.to_pure_dict(x) for k, x in states.items()}
    recipe(tmp_path / "run", states)
    ours = training(nnx, Ours, 0)
    restored = restore_from(tmp_path / "run", ours)
    assert set(restored) == set(nnx.state(ours).paths())
    assert equal(ours, theirs)
    again = training(flax, Theirs, 1)
    restore_from(tmp_path / "run", again)
    assert equal(again, theirs)


def test_an_item_is_read_alone_from_its_folder_and_json_is_shown(tmp_path):
    theirs = advanced(training(flax, Theirs, 7))
    of_manager(tmp_path / "run", {k: flax.state(x) for k, x in theirs.items()})
    model = Ours(nnx.Rngs(0))
    restore_from(tmp_path / "run" / "9" / "model", model)
    assert equal(model, theirs["model"])
    with pytest.raises(RestoreError, match=r"unknown: model\.layers\.0\.bias"):
        restore_from(tmp_path / "run", model)
    opened = open_arrays(tmp_path / "run")
    assert opened.path == tmp_path / "run" / "10"
    assert opened.about == {"metadata": {"data": {"epoch": 10}}}


def test_folders_of_steps_that_are_trees_are_no_items(tmp_path):
    for step in (2, 10):
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(tmp_path / str(step), {"w": np.full(2, step)})
    assert load_arrays(tmp_path)["w"].tolist() == [10, 10]


def test_a_folder_without_a_tree_is_nothing(tmp_path):
    (tmp_path / "3" / "data").mkdir(parents=True)
    with pytest.raises(NoCheckpointError):
        open_arrays(tmp_path)


# ---------------------------------------------------------------------- partial reads
def test_only_the_bytes_asked_for_are_read(tmp_path):
    """Counted by TensorStore, through which Orbax reads."""
    large, small = np.random.default_rng(0).standard_normal((2, 500_000)), np.ones(3)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        tree = {"large": list(large), "small": small}
        manager.save(1, args=ocp.args.Composite(
            a=ocp.args.StandardSave(tree), b=ocp.args.StandardSave(tree)))  # fmt: skip
        manager.wait_until_finished()
    before = bytes_read()
    found = load_arrays(tmp_path / "run", only=nnx.At("*.small"))
    assert found.paths() == (("a", "small"), ("b", "small"))
    assert found["a"]["small"].tolist() == [1, 1, 1]
    read = bytes_read() - before
    assert 0 < read < 100_000
    before = bytes_read()
    into = {"b": {"large": [None, np.zeros(500_000)]}}
    restore_from(tmp_path / "run", into, partial=True)
    assert np.array_equal(into["b"]["large"][1], large[1])
    assert 3_500_000 < bytes_read() - before < 4_500_000


def test_a_filter_that_takes_nothing_or_asks_for_kinds_is_refused(tmp_path):
    export(tmp_path / "x", {"w": nnx.Param(jnp.ones(2))})
    with pytest.raises(RestoreError, match=r"only=.* takes none of the arrays"):
        load_arrays(tmp_path / "x", only=nnx.At("v"))
    with pytest.raises(RestoreError, match="looks at values"):
        load_arrays(tmp_path / "x", only=lambda path, x: x.size > 1)


# ------------------------------------------------------------------- back to Flax NNX
def flax_reads(folder):
    """As Flax's guide has it: an abstract state, then a live model."""
    abstract = flax.eval_shape(lambda: Theirs(flax.Rngs(0)))
    graphdef, state = flax.split(abstract)
    with ocp.StandardCheckpointer() as checkpointer:
        return graphdef, checkpointer.restore(folder, state)


@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
@pytest.mark.parametrize("net", [Theirs, Ours])
@pytest.mark.parametrize("how", ["export", "convert"])
def test_flax_restores_our_export_into_its_state_and_a_live_model(tmp_path, net, how):
    model = net((flax if net is Theirs else nnx).Rngs(7))
    if how == "export":
        export(tmp_path / "x", model)
    else:
        nnx.save(tmp_path / "steps", model, step=1)
        convert(str(tmp_path / "steps"), f"orbax:{tmp_path / 'x'}")
    graphdef, state = flax_reads(tmp_path / "x")
    assert isinstance(state, flax.State)
    assert equal(flax.merge(graphdef, state), model)
    live = Theirs(flax.Rngs(1))
    flax.update(live, state)
    assert equal(live, model)
    from orbax.checkpoint import v1

    # Abstract arrays without a sharding lie where the file says, which Orbax warns of.
    abstract = flax.state(flax.eval_shape(lambda: Theirs(flax.Rngs(0))))
    if how == "convert":  # from host memory
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract
        )
    flax.update(live := Theirs(flax.Rngs(1)), v1.load(tmp_path / "x", abstract))
    assert equal(live, model)
    again = net((flax if net is Theirs else nnx).Rngs(1))
    restore_from(tmp_path / "x", again)
    assert equal(again, model)


@pytest.mark.parametrize(
    "root",
    [
        {"value": nnx.Param(jnp.ones(2))},
        {"a": {"value": nnx.Param(jnp.ones(2))}, "b": jnp.ones(1)},
        {"a": {"value": jnp.ones(1)}, "b": {"value": nnx.Param(jnp.ones(1))}},
        {"a": {"value": jnp.ones(1), "w": nnx.Param(jnp.ones(1))}},
        {"key": nnx.RngKey(jax.random.key(3)), "raw": jax.random.key(4)},
        {"keys": nnx.RngKey(jax.random.split(jax.random.key(3, impl="rbg"), 2))},
    ],
    ids=str,
)
def test_variables_and_raw_arrays_of_any_name_come_back(tmp_path, root):
    export(tmp_path / "x", root)
    assert load_arrays(tmp_path / "x").paths() == nnx.state(root).paths()
    before = numbers(root)
    assert restore_from(tmp_path / "x", root) == nnx.state(root).paths()
    assert all(np.array_equal(x, before[p]) for p, x in numbers(root).items())


def test_nested_values_have_the_level_where_flax_has_it(tmp_path):
    nested = {"n": nnx.Cache({"a": jnp.ones(2), "b": jnp.ones(3)})}
    nnx.save(tmp_path / "steps", nested, step=1)
    convert(str(tmp_path / "steps"), f"orbax:{tmp_path / 'x'}")
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(tmp_path / "x").item_metadata.tree
    assert set(tree["n"]["value"]) == {"a", "b"}
    assert load_arrays(tmp_path / "x").paths() == (("n", "a"), ("n", "b"))


def test_an_export_of_the_first_version_keeps_its_names(tmp_path):
    tree = {"a": {"value": np.ones(2)}, "b": np.ones(1)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        given = ocp.args.PyTreeSave(tree, custom_metadata={"sortal": 1})
        writer.save(tmp_path / "x", given)
    assert load_arrays(tmp_path / "x").paths() == (("a", "value"), ("b",))


@pytest.mark.parametrize(
    "names",
    [5, [5], [[["a"], 3]], [[["a"], [None]]], [[["a"], [{}]]], [[["a"], ["b"]]]],
    ids=str,
)
def test_names_in_a_file_that_make_no_sense_are_damage(tmp_path, names):
    tree = {"a": np.ones(2), "b": np.ones(1)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        about = {"sortal": 2, "names": names}
        writer.save(tmp_path / "x", ocp.args.PyTreeSave(tree, custom_metadata=about))
    with pytest.raises(DamagedError, match="names"):
        open_arrays(tmp_path / "x")
