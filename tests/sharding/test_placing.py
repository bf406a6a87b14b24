"""Models on eight devices: what is declared is checked, is what happens, and stays."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal
from models import untouched
from sortal.errors import ArgumentError, PolicyError, ShardingError, TraceError
from sortal.sharding.placing import making, on_mesh


def mesh_of(kind=AxisType.Auto, **axes):
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes)
    )


MESH = mesh_of(d=8)
GRID = mesh_of(a=4, b=2)


class Stat(sortal.Variable, spec=P("d")):
    """A kind with a spec of its own."""


class Net(sortal.Module):
    def __init__(self, seed=0):
        rngs = sortal.Rngs(seed)
        self.linear = sortal.Linear(16, 8, rngs=rngs)
        self.stat = Stat(jnp.zeros(8))
        self.out = sortal.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        y = self.linear(x)
        self.stat[...] = 0.9 * self.stat + 0.1 * y.mean(0)
        return self.out(y)


def spec_at(model, path):
    return tuple(dict(sortal.state(model).flat_state())[path].value.sharding.spec)


def lying(model):
    leaves = jax.tree.leaves(sortal.state(model))
    return [_short(getattr(x.sharding, "spec", ())) for x in leaves]


def _short(spec):
    spec = list(spec)
    while spec and spec[-1] is None:
        spec.pop()
    return tuple(spec)


def same_numbers(a, b, rtol=0.0):
    pairs = zip(
        jax.tree.leaves(sortal.state(a)), jax.tree.leaves(sortal.state(b)), strict=True
    )
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=rtol)


ROWS = {sortal.At("**.kernel"): sortal.Rule(spec=P("d"))}


# ------------------------------------------------------------------------- who says so
def test_metadata_comes_before_a_row_before_the_kind_before_nothing():
    class Both(sortal.Module):
        def __init__(self):
            self.own = sortal.Param(jnp.ones((8, 8)), spec=P(None, "d"))
            self.named = sortal.Param(jnp.ones((8, 8)), out_sharding=("rows", None))
            self.row = sortal.Param(jnp.ones((8, 8)))
            self.kind = Stat(jnp.ones(8))
            self.rest = sortal.Variable(jnp.ones(8))

    found = on_mesh(
        Both(), MESH, {sortal.Param: sortal.Rule(spec=P("d"))}, [("rows", "d")]
    ).found
    assert [(tuple(spec), by) for spec, by in found] == [
        (("d",), "kind"),
        (("d", None), "metadata"),
        ((None, "d"), "metadata"),
        ((), "no rule"),
        (("d",), "row 1"),
    ]


def test_the_spec_of_a_kind_reaches_every_pipeline():
    model = Net()
    where = sortal.get_partition_spec(sortal.state(model))
    assert where["stat"].value == P("d")
    assert sortal.get_named_sharding(model, MESH).stat.value == NamedSharding(
        MESH, P("d")
    )
    _, state = sortal.get_abstract_model(Net, MESH)
    assert state["stat"].value.sharding.spec == P("d")
    assert sortal.specs(model)["stat"].value == P("d")
    with jax.set_mesh(MESH):
        abstract = sortal.as_abstract(sortal.eval_shape(Net))
    assert abstract.stat.value.sharding.spec == P("d")


def test_rules_for_names_of_axes_are_those_of_the_block_and_of_the_argument():
    names = {"out_sharding": ("embed", "mlp"), "eager_sharding": False}
    model = {"w": sortal.Param(jnp.ones((8, 2)), **names)}
    with sortal.logical_axis_rules([("embed", "a")]):
        assert sortal.specs(model, rules=[("mlp", "b")])["w"].value == P("a", "b")
        with pytest.raises(ArgumentError, match="different mesh axes"):
            sortal.specs(model, rules=[("embed", "b")])


def test_moments_follow_their_parameter_unless_a_row_speaks_of_them():
    model = Net()
    optimizer = sortal.Optimizer(model, optax.adam(1e-3), wrt=sortal.Param)
    both = {"model": model, "optimizer": optimizer}
    found = dict(sortal.specs(both, ROWS).flat_state())
    moments = [p for p in found if "mu" in p and p[-1] == "kernel"]
    assert len(moments) == 2
    assert all(found[p].value == P("d") for p in moments)
    zero = {sortal.OptVariable: sortal.Rule(spec=P(None, "d"))}
    found = dict(sortal.specs(both, {**zero, **ROWS}).flat_state())
    assert all(found[p].value == P(None, "d") for p in moments)
    assert found["model", "linear", "kernel"].value == P("d")


# --------------------------------------------------------------------- what cannot act
def bad(**metadata):
    return {"w": sortal.Param(jnp.ones((6, 8)), **metadata)}


@pytest.mark.parametrize(
    ("model", "mesh", "reason"),
    [
        (bad(spec=P("d")), MESH, "dimension 0, 6, cannot be divided by 8"),
        (bad(spec=P(None, None, "d")), MESH, "3 entries for 2 dimensions"),
        (bad(spec=P("x")), MESH, "the mesh has no axis 'x'"),
        (bad(spec=P("b", "b")), GRID, "the axis 'b' stands there twice"),
        (bad(spec=P(("a", "b"))), GRID, "dimension 0, 6, cannot be divided by 8"),
        (
            bad(out_sharding=("m", "n"), sharding_rules=(("m", "b"), ("n", "b"))),
            GRID,
            "the axis 'b' stands there twice",
        ),
    ],
)
def test_specs_that_cannot_act_are_refused_with_path_shape_and_reason(
    model, mesh, reason
):
    before = model["w"].value
    calls = [
        lambda: sortal.shard(model, mesh),
        lambda: sortal.named_shardings(model, mesh),
        lambda: sortal.init_sharded(lambda: model, mesh),
        lambda: sortal.abstract(lambda: model, mesh),
    ]
    for call in calls:
        with pytest.raises(ShardingError) as e:
            call()
        assert "w (Param) [6, 8]: P(" in str(e.value)
        assert reason in str(e.value)
        assert "Nothing was moved" in str(e.value)
    assert model["w"].value is before


def test_all_offenders_are_listed_at_once():
    model = Net()
    policy = {sortal.Param: sortal.Rule(spec=P(None, None, "d"))}
    with pytest.raises(ShardingError) as e:
        sortal.shard(model, MESH, policy)
    for name in ("linear.kernel", "linear.bias", "out.kernel", "out.bias"):
        assert f"{name} (Param)" in str(e.value)
    assert not any(lying(model))


def test_a_sharding_in_the_place_of_a_spec_is_refused_where_it_has_none():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(PolicyError, match="where a PartitionSpec is needed"):
        sortal.shard(Net(), MESH, {sortal.Param: sortal.Rule(spec=device)})


def test_jit_refuses_shardings_that_do_not_fit_by_path():
    model = Net()
    table = sortal.StateSharding(
        {sortal.At("**.bias"): NamedSharding(MESH, P(None, "d")), ...: None}
    )
    with pytest.raises(ShardingError, match=r"out\.bias \(Param\) \[16\]"):
        sortal.jit(lambda m: m(jnp.ones((2, 16))), in_shardings=(table,))(model)


def test_without_a_mesh_that_of_the_context_is_used_or_asked_for():
    verbs = [
        lambda: sortal.shard(Net()),
        lambda: sortal.init_sharded(Net),
        lambda: sortal.named_shardings(Net()),
        lambda: sortal.sharding_report(Net()),
    ]
    for verb in verbs:
        with pytest.raises(ShardingError, match="there is no mesh; pass mesh="):
            verb()
    with jax.set_mesh(MESH):
        model = sortal.shard(Net(), policy=ROWS)
        made = sortal.init_sharded(Net, policy=ROWS)
        found = sortal.named_shardings(Net(), policy=ROWS)
        assert sortal.sharding_report(model).mesh == MESH
    assert found["linear"]["kernel"].value == NamedSharding(MESH, P("d"))
    for x in (model, made):
        assert x.linear.kernel.value.sharding == NamedSharding(MESH, P("d"))


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        (ROWS, r"mesh is a jax.sharding.Mesh; found \{.*shard\(model, mesh, policy\)"),
        (MESH.abstract_mesh, "an AbstractMesh has no devices.*constrain"),
    ],
)
def test_what_is_no_mesh_of_devices_is_refused(mesh, text):
    for verb in (sortal.shard, lambda *x: sortal.init_sharded(Net, *x[1:])):
        with pytest.raises(ShardingError, match=f"(?s){text}"):
            verb(Net(), mesh)


# ------------------------------------------------------------------------------ moving
def test_shard_puts_each_leaf_where_it_belongs_and_keeps_the_numbers():
    model, same = Net(), Net()
    assert sortal.shard(model, MESH, ROWS) is model
    assert spec_at(model, ("linear", "kernel")) == ("d",)
    assert spec_at(model, ("linear", "bias")) == ()
    assert spec_at(model, ("stat",)) == ("d",)
    same_numbers(model, same)


def pieces(*models):
    """Where the parts of all arrays lie in memory."""
    arrays = jax.tree.leaves(list(map(sortal.state, models)))
    shards = [shard for x in arrays for shard in x.addressable_shards]
    return [shard.data.unsafe_buffer_pointer() for shard in shards]


def moved_by_jit(*models):
    everywhere = NamedSharding(MESH, P())
    sortal.jit(lambda *models: None, in_shardings=everywhere)(*models)


@pytest.mark.parametrize(
    "move",
    [
        lambda a, b: sortal.shard((a, b), MESH),
        lambda a, b: (sortal.shard(a, MESH), sortal.shard(b, MESH)),
        moved_by_jit,
    ],
    ids=["together", "one by one", "by jit"],
)
def test_what_shared_an_array_shares_no_memory_on_a_mesh(move):
    """Else a call that donates both would end the process, on several devices."""
    online = sortal.Linear(8, 8, rngs=sortal.Rngs(0))
    target, first = sortal.clone(online), sortal.clone(online)
    move(online, target)
    found = pieces(online, target, first)
    assert len(set(found)) == len(found)

    @sortal.jit(donate=sortal.Param)
    def add(a, b):
        a.kernel[...] = a.kernel + b.kernel

    add(online, target)
    np.testing.assert_array_equal(online.kernel.value, 2 * first.kernel.value)
    np.testing.assert_array_equal(target.kernel.value, first.kernel.value)


def test_what_lies_where_it_belongs_is_not_copied():
    model = sortal.shard(Net(), MESH, ROWS)
    before = [leaf.value for _, leaf in sortal.state(model).flat_state()]
    sortal.shard(model, MESH, ROWS)
    after = [leaf.value for _, leaf in sortal.state(model).flat_state()]
    assert all(x is y for x, y in zip(before, after, strict=True))


def test_another_policy_moves_a_model_again():
    model = sortal.shard(Net(), MESH, ROWS)
    columns = {sortal.At("**.kernel"): sortal.Rule(spec=P(None, "d"))}
    sortal.shard(model, MESH, columns)
    assert spec_at(model, ("linear", "kernel")) == (None, "d")
    sortal.shard(
        model,
        GRID,
        {
            sortal.At("**.kernel"): sortal.Rule(spec=P("a", "b")),
            Stat: sortal.Rule(spec=P("b")),
        },
    )
    assert spec_at(model, ("linear", "kernel")) == ("a", "b")
    assert spec_at(model, ("stat",)) == ("b",)


def test_another_policy_moves_the_moments_with_their_parameters():
    model = Net()
    both = model, sortal.Optimizer(model, optax.adam(1e-3), wrt=sortal.Param)
    for policy, spec in ((None, ()), (ROWS, ("d",)), ({}, ("d",))):
        sortal.shard(both, MESH, policy)
        moments = sortal.state(both[1], sortal.At("**.kernel")).leaves()
        assert len(moments) == 4
        assert {_short(x.value.sharding.spec) for x in moments} == {spec}


def test_without_a_policy_a_model_stays_as_it_was_put():
    model = sortal.shard(Net(), MESH, ROWS)
    assert sortal.specs(model)["linear"]["kernel"].value == P("d")


def test_init_sharded_makes_model_and_optimizer_where_they_belong():
    def make():
        model = Net()
        return model, sortal.Optimizer(model, optax.adam(1e-3), wrt=sortal.Param)

    model, optimizer = sortal.init_sharded(make, MESH, ROWS)
    expected, _ = make()
    assert spec_at(model, ("linear", "kernel")) == ("d",)
    moments = dict(sortal.state(optimizer).flat_state())
    at = next(p for p in moments if "mu" in p and p[-2:] == ("linear", "kernel"))
    assert tuple(moments[at].value.sharding.spec) == ("d",)
    for a, b in zip(
        jax.tree.leaves(sortal.state(model)),
        jax.tree.leaves(sortal.state(expected)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_no_device_holds_a_whole_array_while_a_model_is_made():
    """The program's own count of bytes on each device: far below the kernel's 16 MB."""

    def make():
        return sortal.Linear(2048, 2048, rngs=sortal.Rngs(0))

    shardings = on_mesh(sortal.abstract(make), MESH, ROWS, ()).shardings()
    memory = making(make, shardings).lower().compile().memory_analysis()
    most = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert most < 0.6 * 2048 * 2048 * 4


def test_an_abstract_model_has_shardings_and_no_arrays():
    model = sortal.abstract(Net, MESH, ROWS)
    assert isinstance(model.linear.kernel.value, jax.ShapeDtypeStruct)
    assert model.linear.kernel.value.sharding == NamedSharding(MESH, P("d"))


def test_a_sharded_model_can_be_pickled_and_comes_back_on_no_mesh():
    model = sortal.shard(Net(), MESH, ROWS)
    pickle.loads(pickle.dumps(sortal.split(model)))
    back = pickle.loads(pickle.dumps(model))
    same_numbers(back, model)
    assert "placement" not in back.linear.kernel.get_metadata()
    assert back.linear.kernel.value.sharding.device_set == {jax.devices()[0]}


def test_a_constraint_to_an_explicit_mesh_asks_for_the_mesh_or_the_model_on_it():
    mesh = mesh_of(AxisType.Explicit, d=8)

    @sortal.jit
    def step(x, model):
        sortal.constrain(model, ROWS, mesh=mesh)

    model = sortal.Linear(8, 8, rngs=sortal.Rngs(0))
    with untouched(model), pytest.raises(ShardingError) as e:
        step(1.0, model)
    assert str(e.value) == (
        "the function puts arrays on a mesh of Explicit axes, was called outside of "
        "jax.set_mesh(mesh), and uses none that lies there:\n"
        "  model: bias (Param): device 0\n"
        "  model: kernel (Param): device 0\n"
        "Call it within jax.set_mesh(mesh), or put the model there before: "
        "shard(model, mesh, policy)."
    )
    with jax.set_mesh(mesh):
        step(1.0, model)
    assert model.kernel.value.sharding.spec == P("d", None)
    step(1.0, model)  # which lies there now


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shard_is_refused_inside_a_transform(kind):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    model = Net()

    def step(model):
        sortal.shard(model, mesh, ROWS)

    for wrap in (sortal.jit, sortal.grad, sortal.eval_shape):
        with untouched(model), pytest.raises(TraceError) as e:
            wrap(step, model) if wrap is sortal.eval_shape else wrap(step)(model)
        assert str(e.value).startswith(
            "shard inside a transform has no arrays yet to put on devices. Write "
            "constrain(model, policy, mesh=mesh) there, or shard(model, mesh, policy) "
            "before the call; a model is built on a mesh by init_sharded(fn, mesh, "
            "policy)."
        )


def test_constrain_acts_inside_a_compiled_function():
    @sortal.jit
    def double(w):
        w[...] = w * 2
        sortal.constrain(w, {sortal.Param: sortal.Rule(spec=P("d"))}, mesh=MESH)

    w = sortal.Param(jnp.arange(8.0))
    double(w)
    assert w.value.sharding.spec == P("d")
    np.testing.assert_array_equal(w.value, 2 * np.arange(8.0))


# ------------------------------------------------------------------------- what stays
def train(model, optimizer, x, y):
    def loss(m):
        return ((m(x) - y) ** 2).mean()

    value, grads = sortal.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


ZERO = {
    sortal.Param: sortal.Rule(spec=P()),
    sortal.At("**.kernel"): sortal.Rule(
        spec=P("d")
    ),  # of moments alone: Param is above
}


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("donate", [None, True])
def test_zero_1_keeps_all_specs_at_every_step_and_the_numbers_of_one_device(
    axes, donate
):
    mesh = mesh_of(axes, d=8)

    def make():
        model = Net()
        return model, sortal.Optimizer(model, optax.adam(1e-2), wrt=sortal.Param)

    alone = make()
    both = sortal.shard(make(), mesh, ZERO)
    declared = lying(both)
    assert ("d",) in declared
    step, single = sortal.jit(train, donate=donate), sortal.jit(train)
    x, y = np.ones((4, 16), np.float32), np.zeros((4, 16), np.float32)
    for _ in range(20):
        found, expected = step(*both, x, y), single(*alone, x, y)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        jax.block_until_ready(sortal.state(both).values_list())
        assert lying(both) == declared


def test_an_optimizer_made_inside_jit_has_its_moments_with_the_parameters():
    model = sortal.shard(Net(), MESH, ROWS)
    make = sortal.jit(lambda m: sortal.Optimizer(m, optax.adam(1e-3), wrt=sortal.Param))
    optimizer = make(model)
    moments = dict(sortal.state(optimizer).flat_state())
    kernels = [x for p, x in moments.items() if p[-1] == "kernel"]
    assert len(kernels) == 4
    assert all(x.value.sharding == NamedSharding(MESH, P("d")) for x in kernels)


def test_moments_of_parameters_with_names_follow_inside_jit_within_a_mesh():
    with jax.set_mesh(GRID):
        w = sortal.Param(jnp.ones((8, 4)), out_sharding=("a", "b"))
        make = sortal.jit(
            lambda m: sortal.Optimizer(m, optax.adam(1e-3), wrt=sortal.Param)
        )
        optimizer = make({"w": w}["w"])
        moments = [x for x in sortal.state(optimizer).leaves() if x.value.ndim == 2]
    assert len(moments) == 2
    assert all(tuple(x.value.sharding.spec) == ("a", "b") for x in moments)


def test_out_shardings_move_what_is_returned_as_it_came():
    for given in (
        sortal.Policy(
            {
                sortal.Param: sortal.Rule(spec=NamedSharding(MESH, P("d"))),
                ...: sortal.Rule(spec=None),
            }
        ),
        sortal.StateSharding({sortal.Param: NamedSharding(MESH, P("d")), ...: None}),
        NamedSharding(MESH, P("d")),
    ):
        w = sortal.Param(jnp.arange(8.0))
        assert sortal.jit(lambda o: o, out_shardings=given)(w) is w
        assert w.value.sharding.spec == P("d")
        np.testing.assert_array_equal(w.value, np.arange(8.0))


def test_out_shardings_move_a_part_that_is_returned():
    model = Net()
    x = NamedSharding(MESH, P("d"))
    table = sortal.StateSharding({sortal.At("kernel"): x, ...: None})
    found = sortal.jit(lambda m: m.linear, out_shardings=table)(model)
    assert found is model.linear
    assert spec_at(model, ("linear", "kernel")) == ("d",)
    assert model.out.kernel.value.sharding.device_set == {jax.devices()[0]}


def test_a_model_that_is_on_no_mesh_has_nothing_added():
    model = sortal.Linear(4, 4, rngs=sortal.Rngs(0))

    def step(m):
        m.kernel[...] = m.kernel * 2

    text = sortal.jit(step).lower(model).as_text()
    assert "sharding" not in text.replace("mhlo.num_partitions", "")


# --------------------------------------------------------------------- models of Flax
def test_all_of_it_works_on_models_of_flax_as_they_are():
    from flax import nnx

    def make():
        return nnx.Linear(16, 8, rngs=nnx.Rngs(0))

    model, same = make(), make()
    policy = {sortal.At("kernel"): sortal.Rule(spec=P("d"))}
    assert sortal.specs(model, policy)["kernel"].get_value() == P("d")
    sortal.shard(model, MESH, policy)
    assert model.kernel.get_value().sharding.spec == P("d")
    np.testing.assert_array_equal(model.kernel.get_value(), same.kernel.get_value())

    @sortal.jit
    def double(m):
        m.kernel[...] = m.kernel[...] * 2
        m.bias[...] = m.kernel[...].sum(0)

    double(model)
    assert model.kernel.get_value().sharding.spec == P("d")
    assert model.bias.get_value().sharding.is_fully_replicated
    made = sortal.init_sharded(make, MESH, policy)
    assert made.kernel.get_value().sharding.spec == P("d")
    np.testing.assert_allclose(
        made.kernel.get_value(), same.kernel.get_value(), rtol=1e-6
    )


@pytest.mark.parametrize("written", [sortal.Cache, "parms", sortal.Under("head")])
def test_a_policy_that_takes_no_leaf_is_refused_and_moves_nothing(written):
    model = sortal.Linear(8, 8, rngs=sortal.Rngs(0))
    before = list(sortal.variables(model).values_list())
    with pytest.raises(
        ShardingError, match=r"no row of the Policy takes any of the \d+ leaves:\n"
    ):
        sortal.shard(model, MESH, {written: sortal.Rule(spec=P("d"))})
    after = sortal.variables(model).values_list()
    assert all(a is b for a, b in zip(before, after, strict=True))
    sortal.shard(model, MESH, {written: sortal.Rule(axis=0)})
    rest = sortal.Rule(spec=P())
    sortal.shard(model, MESH, {written: sortal.Rule(spec=P("d")), ...: rest})
