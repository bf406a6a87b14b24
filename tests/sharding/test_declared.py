"""Declared specs where functions are nested, rules change, and specs do not fit."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal
from sortal import nnx
from sortal.errors import ShardingError

AUTO = AxisType.Auto
D8 = jax.make_mesh((8,), ("d",), axis_types=(AUTO,))
AB = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AUTO, AUTO))
EACH = sortal.Policy({...: sortal.Rule(spec=P())})
BA = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AUTO, AUTO))


@nnx.jit
def double(w):
    w[...] *= 2


def stacked(*shape):
    w = nnx.Param(jnp.ones(shape))
    return sortal.shard(w, D8, {nnx.Param: sortal.Rule(spec=P("d"))})


class PerDevice(nnx.Variable, spec=P("d")):
    """A kind that lies on the axis d."""


class Holder(nnx.Module):
    """Has an array that eight devices cannot divide."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones(6))


def named(*names, width=8):
    init = nnx.with_partitioning(nnx.initializers.ones_init(), names)
    return lambda: nnx.Linear(width, width, kernel_init=init, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shape", [(8, 4), (8, 8)])
def test_a_compiled_function_under_vmap_leaves_the_whole_as_declared(shape):
    w = stacked(*shape)
    nnx.vmap(double)(w)
    assert w.value.sharding.spec == P("d")
    assert (w.value == 2).all()


def test_a_compiled_function_under_vmap_with_a_mesh_axis_runs():
    w = stacked(8, 8, 8)
    with jax.set_mesh(D8):
        nnx.vmap(double, spmd_axis_name="d")(w)
    assert w.value.sharding.spec == P("d")


def test_a_compiled_function_under_scan_leaves_the_whole_as_declared():
    w = stacked(8, 8)

    @nnx.jit
    def each(w):
        nnx.scan(double, in_axes=0, out_axes=None)(w)

    each(w)
    assert w.value.sharding.spec == P("d")
    assert (w.value == 2).all()


@pytest.mark.parametrize("of", [PerDevice, nnx.Param])
def test_a_compiled_function_under_shard_map_sees_the_part_of_its_device(of):
    w = sortal.shard(of(jnp.ones((8, 8))), D8, {nnx.Param: sortal.Rule(spec=P("d"))})
    with jax.set_mesh(D8):
        nnx.shard_map(double, mesh=D8, in_specs=(P("d"),), out_specs=P())(w)
    assert w.value.sharding.spec == P("d")
    assert (w.value == 2).all()


@pytest.mark.parametrize("kind", [AUTO, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("d", None), (None, "d", None)])
def test_a_compiled_function_under_vmap_of_jax_leaves_its_part_alone(kind, spec):
    """JAX hands over parts with the metadata of wholes; their rank tells them apart."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    w, rule = nnx.Param(jnp.ones((8,) * len(spec))), sortal.Rule(spec=P(*spec))
    sortal.shard(w, mesh, {nnx.Param: rule})

    def both(w):
        double(w)
        return w.value

    for f in (jax.vmap(both), jax.jit(jax.vmap(both))):
        found = f(w)
        assert found.sharding.is_equivalent_to(w.value.sharding, len(spec))
        assert (found == 2).all()


def test_other_rules_for_names_of_axes_are_another_program():
    found = []
    with jax.set_mesh(AB):
        for axis in ("a", "b"):
            w = nnx.Param(jnp.ones((8, 8)), out_sharding=("x",), eager_sharding=False)
            with nnx.logical_axis_rules([("x", axis)]):
                double(w)
            found.append(w.value.sharding.spec)
    assert found == [P("a"), P("b")]


@pytest.mark.parametrize("given", [{}, {"in_shardings": (EACH,)}])
def test_other_rules_of_linen_are_another_program_too(given):
    found, ones = [], jnp.ones((8, 8))
    f = nnx.jit(lambda w: double(w), **given)
    with jax.set_mesh(AB):
        for axis in ("a", "b", "a"):
            w = nnx.Param(ones, out_sharding=("x",), eager_sharding=False)
            with linen.logical_axis_rules([("x", axis), ("y", ["a", "b"])]):
                f(w)
            found.append(w.value.sharding.spec)
    assert found == [P("a"), P("b"), P("a")]


@pytest.mark.parametrize(
    ("make", "rules", "fault"),
    [
        (named("no", None), (), "the mesh has no axis 'no'"),
        (named("a", "a"), (), "the axis 'a' stands there twice"),
        (named("x", "y"), [("x", "a"), ("y", "a")], "'a' stands there twice"),
        (named("a", None, width=6), (), "dimension 0, 6, cannot be divided by 4"),
    ],
)
@pytest.mark.parametrize("verb", [sortal.init_sharded, sortal.abstract])
def test_a_model_that_is_built_on_a_mesh_is_refused_by_path(verb, make, rules, fault):
    with pytest.raises(ShardingError, match=f"(?s)kernel \\(Param\\).*{fault}"):
        verb(make, AB, rules=rules)


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (("no", None), "the mesh has no axis 'no'"),
        (("a", "a"), "the axis 'a' stands there twice"),
    ],
)
@pytest.mark.parametrize("kind", [AUTO, AxisType.Explicit])
def test_what_a_compiled_function_writes_is_refused_by_path(kind, names, fault):
    model = Holder()
    model.w = nnx.Param(jnp.ones((8, 8)), out_sharding=names, eager_sharding=False)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    with (
        jax.set_mesh(mesh),
        pytest.raises(ShardingError, match=f"w \\(Param\\) \\[8, 8\\]: .*{fault}"),
    ):
        nnx.jit(lambda m: m.w.set_value(2 * m.w))(model)
    assert (model.w.value == 1).all()


@pytest.mark.parametrize("kind", [AUTO, AxisType.Explicit])
def test_a_value_from_outside_of_the_block_is_put_on_its_mesh(kind):
    value = jnp.ones((8, 8))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        w = nnx.Param(value, out_sharding=("a", "b"))
    assert w.value.sharding == NamedSharding(mesh, P("a", "b"))


def test_rules_that_are_an_argument_hold_while_the_model_is_built():
    model = sortal.init_sharded(named("x", None), AB, rules=[("x", "a")])
    assert model.kernel.value.sharding.spec == P("a", None)


@pytest.mark.parametrize("which", ["in_shardings", "out_shardings"])
def test_a_spec_that_depends_on_the_mesh_is_asked_for_each_mesh(which):
    def spec(shape, mesh):
        return P("a") if mesh.shape["a"] == 4 else P("b")

    policy = sortal.Policy({nnx.Param: sortal.Rule(spec=spec)})
    given = (policy,) if which == "in_shardings" else policy

    @nnx.jit(**{which: given})
    def twice(w):
        w[...] *= 2
        return w

    found = []
    for mesh in (AB, BA):
        w = nnx.Param(jnp.ones(8))
        with jax.set_mesh(mesh):
            assert twice(w) is w
        found.append(w.value.sharding.spec)
    assert found == [P("a"), P("b")]


def test_out_shardings_that_do_not_fit_are_refused_by_path():
    bad = sortal.Policy({nnx.Param: sortal.Rule(spec=NamedSharding(D8, P("d")))})
    for make in (lambda m: m, lambda m: Holder()):
        with pytest.raises(ShardingError, match=r"w \(Param\) \[6\]: P\('d'\), but"):
            nnx.jit(make, out_shardings=bad)(Holder())


def test_arguments_on_other_devices_are_named_by_path():
    model = sortal.shard(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), D8)
    late = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    late.kernel.value = jax.device_put(late.kernel.value, jax.devices()[2])
    x = jax.device_put(jnp.ones((8, 8)), jax.devices()[3])
    f = nnx.jit(lambda model, late, x: late(model(x)))
    with pytest.raises(ShardingError) as e:
        f(model, late, x)
    assert "2 arrays lie on 8 devices" in str(e.value)
    assert "late['kernel']: device 2" in str(e.value)
    assert "x: device 3" in str(e.value)
    assert "bias" not in str(e.value)  # of late: bound to no device
    sortal.shard(late, D8)
    f(model, late, jax.device_put(x, NamedSharding(D8, P("d"))))


def test_an_error_of_the_function_itself_is_passed_on():
    def fails(model, x):
        raise ValueError("of the user")

    with pytest.raises(ValueError, match="of the user"):
        nnx.jit(fails)(sortal.shard(Holder(), D8), jnp.ones(8))


def test_arguments_on_the_same_devices_in_another_order_are_named_by_path():
    model = sortal.shard(sortal.Linear(8, 8, rngs=sortal.Rngs(0)), D8)
    mesh = Mesh(D8.devices[::-1], ("d",))
    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P()))
    with pytest.raises(ShardingError) as e:
        sortal.jit(lambda model, x: model(x))(model, x)
    assert str(e.value).splitlines()[1] == "  x: 8 devices, the same in another order"


class Sum(nnx.Module):
    """Adds what is divided to what is to stay whole."""

    def __init__(self):
        self.whole = nnx.Param(jnp.ones(8))
        self.divided = nnx.Variable(jnp.arange(8.0))

    def add(self):
        self.whole[...] = self.whole + self.divided


@pytest.mark.parametrize("how", ["fori", "while", "cond", "switch", "remat"])
def test_loops_and_branches_called_eagerly_leave_what_they_write_where_it_was(how):
    """XLA would leave the sum where the greater part of it lies."""
    rows = {nnx.Param: sortal.Rule(spec=P()), ...: sortal.Rule(spec=P("d"))}
    m = sortal.shard(Sum(), D8, rows)
    one = jnp.ones(())  # closed over, so that the loop does not stay compiled

    def body(m):
        m.whole[...] = m.whole * one
        m.add()
        return m

    calls = {
        "fori": lambda: sortal.fori_loop(0, 1, lambda i, m: body(m), m),
        "while": lambda: sortal.while_loop(
            lambda v: v[1] < 1, lambda v: (body(v[0]), v[1] + 1), (m, 0)
        ),
        "cond": lambda: sortal.cond(jnp.array(True), Sum.add, lambda m: None, m),
        "switch": lambda: sortal.switch(1, [lambda m: None, Sum.add], m),
        "remat": lambda: sortal.remat(Sum.add)(m),
    }
    for n in (1, 2):
        calls[how]()
        assert m.whole.value.tolist() == [1.0 + n * i for i in range(8)]
        assert m.whole.value.sharding.is_fully_replicated


@pytest.mark.parametrize("mapped", [sortal.shard_map, jax.shard_map])
def test_inside_shard_map_no_part_is_put_where_the_whole_was(mapped):
    """Nor are moments that are made there."""
    model = sortal.shard(sortal.Linear(8, 8, rngs=sortal.Rngs(0)), D8)
    graphdef, state = sortal.split(model)

    def f(state):
        model = sortal.merge(graphdef, state)
        double(model.kernel)
        optimizer = sortal.Optimizer(model, optax.sgd(1.0, momentum=0.5))
        optimizer.update(model, sortal.grad(lambda m: m.kernel.sum())(model))
        return model.kernel.value

    out = jax.jit(mapped(f, mesh=D8, in_specs=P(), out_specs=P()))(state)
    expected = 2 * model.kernel.value - 1
    assert out.tolist() == expected.tolist()


def test_values_of_another_mesh_are_named_where_a_function_would_move_them_back():
    few = Mesh(D8.devices[:4], ("d",))
    source, model = (
        sortal.shard(sortal.Linear(8, 8, rngs=sortal.Rngs(i)), mesh)
        for i, mesh in enumerate((few, D8))
    )
    sortal.update(model, sortal.state(source))
    with pytest.raises(ShardingError) as e:
        nnx.jit(lambda m: double(m.kernel))(model)
    assert str(e.value) == (
        "these lie on other devices than shard put them on, where a compiled function "
        "is to leave them:\n"
        "  bias (Param): 4 devices; shard put it on 8 devices\n"
        "  kernel (Param): 4 devices; shard put it on 8 devices\n"
        "Copy values from one mesh to another by transfer(source, model), or call "
        "shard(model, mesh) again."
    )
    sortal.shard(model, D8)
    nnx.jit(lambda m: double(m.kernel))(model)
    assert model.kernel.value.tolist() == (2 * source.kernel.value).tolist()
