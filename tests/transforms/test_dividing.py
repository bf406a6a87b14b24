"""What shard_map cannot divide is refused by path, with what to write."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal
from models import Holder, untouched
from sortal import Cache, Param, StateSharding
from sortal.errors import ShardingError
from sortal.sharding import presets

MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
EXPLICIT = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
FEW = Mesh(np.array(jax.devices()[2:4]), ("data",))


def total(model, x):
    return jax.lax.psum(model.w.value.sum() + x["x"].sum(), "data")


def mapped(specs, x=None, mesh=MESH, **options):
    given = {"mesh": mesh, **options}
    return sortal.shard_map(total, in_specs=(specs, x), out_specs=P(), **given)


def model():
    return Holder(w=Param(jnp.ones((6, 8))), c=Cache(jnp.ones(8)))


X = {"x": jnp.ones((13, 2))}


@pytest.mark.parametrize(
    ("specs", "x", "rows"),
    [
        (
            P("data"),
            P("data"),
            """
  w (Param) [6, 8]: P('data'), but dimension 0, 6, cannot be divided by 4
  argument 1['x'] [13, 2]: P('data'), but dimension 0, 13, cannot be divided by 4""",
        ),
        (
            StateSharding({Param: P(None, "modle"), ...: P()}),
            P(),
            """
  w (Param) [6, 8]: P(None, 'modle'), but the mesh has no axis 'modle'""",
        ),
        (
            P(None, "data"),
            {"x": P("x", "x")},
            """
  c (Cache) [8]: P(None, 'data'), but the spec has 2 entries for 1 dimensions
  argument 1['x'] [13, 2]: P('x', 'x'), but the mesh has no axis 'x'""",
        ),
    ],
)
@pytest.mark.parametrize("wrap", [sortal.jit, lambda f: f], ids=["jit", "eager"])
def test_specs_that_do_not_fit_are_all_listed(wrap, specs, x, rows):
    m = model()
    with untouched(m), pytest.raises(ShardingError) as e:
        wrap(mapped(specs, x))(m, X)
    assert str(e.value) == (
        "shard_map cannot divide these over the mesh ('data': 4, 'model': 2) by their "
        f"in_specs:{rows}\nGive them another spec there, or another shape, such as a "
        "batch that is padded to a multiple."
    )


@pytest.mark.parametrize("by", [presets.fsdp("data", min_size=0), StateSharding({})])
def test_what_shard_divided_by_shape_is_divided_so_with_its_moments(by):
    """FSDP by hand, against one device; a preset speaks of no optimizer state."""
    policy = presets.fsdp("data", min_size=0)
    x, w = jnp.arange(16.0).reshape(8, 2) / 9, jnp.ones((2, 8))
    m, tx = Holder(w=Param(w)), optax.sgd(0.1, momentum=0.9)
    both = sortal.shard((m, sortal.Optimizer(m, tx, wrt=Param)), MESH, policy)

    def loss(m, x):
        w = jax.lax.all_gather(m.w.value, "data", axis=1, tiled=True)
        return jax.lax.pmean((x @ w).mean(), "data") ** 2

    def step(m, optimizer, x):
        optimizer.update(m, sortal.grad(loss)(m, x))

    specs = (by, by, P("data"))
    f = sortal.jit(sortal.shard_map(step, mesh=MESH, in_specs=specs, out_specs=P()))
    state = tx.init(w)
    for _ in range(2):
        f(*both, x)
        updates, state = tx.update(jax.grad(lambda w: (x @ w).mean() ** 2)(w), state)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(m.w.value, w, rtol=1e-6)
    assert m.w.value.sharding.spec == P(None, "data")
    assert both[1].opt_state[0].trace["w"].value.sharding.spec == P(None, "data")


def test_an_axis_that_is_not_mapped_over_is_named():
    f = sortal.jit(mapped(P(None, "model"), axis_names={"data"}))
    with pytest.raises(ShardingError, match=r"P\(None, 'model'\), but 'model' is not"):
        f(Holder(w=Param(jnp.ones((6, 8)))), X)


def test_without_a_mesh_one_is_asked_for():
    with pytest.raises(ShardingError, match=r"^shard_map has no mesh\. Pass mesh="):
        mapped(P(), mesh=None)(model(), X)


def test_arrays_that_lie_otherwise_on_an_explicit_mesh_are_named():
    with jax.set_mesh(EXPLICIT):
        m = sortal.shard(model(), EXPLICIT, {Param: sortal.Rule(spec=P(None, "model"))})
        x = {"x": jax.device_put(jnp.ones((8, 2)), NamedSharding(EXPLICIT, P("data")))}
        for wrap in (sortal.jit, lambda f: f):
            with pytest.raises(ShardingError) as e:
                wrap(mapped(P(), P(), mesh=EXPLICIT))(m, x)
            assert str(e.value) == (
                "on a mesh of Explicit axes shard_map takes arrays that lie as "
                "in_specs says; these lie otherwise:\n"
                "  w (Param): P(None, 'model'); in_specs: P()\n"
                "  argument 1['x']: P('data'); in_specs: P()\n"
                "Write in in_specs how they lie, or put models there by shard(model, "
                "mesh, policy), and other arrays by jax.sharding.reshard(x, spec)."
            )
        specs = StateSharding({Param: P(None, "model"), ...: P()})
        out = sortal.shard_map(
            lambda m, x: jax.lax.psum(m.w.value.sum(), "model") + x["x"] * 0,
            mesh=EXPLICIT,
            in_specs=(specs, P("data")),
            out_specs=P("data"),
        )(m, x)
        assert out.tolist() == [[48.0, 48.0]] * 8


def test_arrays_that_are_bound_to_other_devices_are_named():
    m = sortal.shard(model(), FEW)
    with pytest.raises(ShardingError) as e:
        mapped(P())(m, X)
    assert str(e.value) == (
        "the mesh of shard_map has 8 devices, and these arrays are bound to others:\n"
        "  c (Cache): 2 devices\n"
        "  w (Param): 2 devices\n"
        "Put models there by shard(model, mesh), and other arrays by "
        "jax.device_put(x, NamedSharding(mesh, P()))."
    )


def test_the_same_devices_in_another_order_are_named_in_jit_and_outside():
    mesh = Mesh(MESH.devices[::-1], MESH.axis_names)
    m = sortal.shard(model(), mesh)
    with pytest.raises(ShardingError, match="8 devices, the same in another order"):
        mapped(P())(m, X)
    with pytest.raises(ShardingError) as e:
        sortal.jit(mapped(P()))(m, X)
    assert str(e.value) == (
        "a mesh inside the function, as of a shard_map or constraint, has other "
        "devices, or in another order, than the 8 devices of these:\n"
        "  model['c']\n"
        "  model['w']\n"
        "Put models there by shard(model, mesh, policy), and other arrays by "
        "jax.device_put(x, NamedSharding(mesh, P()))."
    )


def test_an_error_of_the_function_is_passed_on():
    def wrong(m, x):
        raise ValueError("a fault of its own")

    f = sortal.shard_map(wrong, mesh=MESH, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match=r"^a fault of its own"):
        f(model(), X)
