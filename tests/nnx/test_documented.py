"""What Flax's docstrings say, under either library: equal output, the same refusals."""

from __future__ import annotations

import abc
import pickle
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx
from jax.sharding import PartitionSpec
from tests.nnx.test_guides import plain

from sortal import nnx
from sortal.errors import TraceError

PROGRAMS: list[Any] = []
MISUSES: list[Any] = []


def alike(program: Any) -> Any:
    """A program that must have equal output under either library."""
    PROGRAMS.append(program)
    return program


def refused(error: type[Exception], text: str | None = None) -> Any:
    """A program that must be refused by either library with this error and text."""

    def mark(program: Any) -> Any:
        MISUSES.append(pytest.param(program, error, text, id=program.__name__))
        return program

    return mark


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_a_program_has_the_output_that_it_has_in_flax(program: Any) -> None:
    assert plain(program(nnx)) == plain(program(flax_nnx))


@pytest.mark.parametrize("lib", [nnx, flax_nnx], ids=["sortal", "flax"])
@pytest.mark.parametrize(("program", "error", "text"), MISUSES)
def test_a_misuse_is_refused_as_in_flax(
    program: Any, error: Any, text: str | None, lib: Any
) -> None:
    with pytest.raises(error, match=text):
        program(lib)


def linear(lib: Any) -> Any:
    return lib.Linear(2, 3, rngs=lib.Rngs(0))


# -------------------------------------------------------------------------- Variables
@alike
def the_kind_of_a_variable(lib: Any) -> Any:
    v = lib.BatchStat(1)
    return v.var_type is lib.BatchStat, v.hijax, v.ref


@alike
def a_variable_from_its_metadata(lib: Any) -> Any:
    v = lib.Param(jnp.ones(2), a=1)
    new = lib.Param.from_metadata(jnp.zeros(3), v.get_metadata())
    return type(new) is lib.Param, new.a, new[...]


@alike
def a_variable_takes_over_another(lib: Any) -> Any:
    v, other = lib.Param(jnp.ones(2), x=1), lib.Param(jnp.zeros(2), y=2)
    v.update_from_state(other)
    return v[...], v.y, v.has_metadata("x")


@alike
def an_entry_of_a_dict_is_deleted(lib: Any) -> Any:
    v = lib.Variable({"a": 1, "b": 2})
    v["a"] = 5
    del v["b"]
    return v.get_value()


@alike
def a_kind_makes_its_values(lib: Any) -> Any:
    class Shifted(lib.Variable):
        def create_value(self, value: Any) -> Any:
            return value + 100

    class Twice(Shifted):
        def create_value(self, value: Any) -> Any:
            return super().create_value(value) * 2

    v = Twice(jnp.array(2.0), a=1)
    return Shifted(jnp.array(2.0))[...], v[...], v.replace(jnp.array(1.0))[...], v.a


@alike
def what_every_variable_has_is_no_metadata_of_its_own(lib: Any) -> Any:
    plain, said = lib.Param(1), lib.Param(1, hijax=False, ref=False)
    v = lib.Param(1, a=1)
    v.set_metadata({"b": 2, "hijax": False, "ref": False, "eager_sharding": True})
    return (
        lib.graphdef({"v": plain}) == lib.graphdef({"v": said}),
        v.get_metadata(exclude_required=True),
        lib.Param(1, eager_sharding=False, c=3).get_metadata(exclude_required=True),
    )


@alike
def variables_that_are_plain_already_are_kept(lib: Any) -> Any:
    model = linear(lib)
    same = lib.with_vars(model, ref=False)
    return same is model, same.kernel is model.kernel


@refused(ValueError, "Cannot pass a Ref directly into Variable constructor")
def a_reference_in_a_variable(lib: Any) -> Any:
    lib.Param(jax.new_ref(jnp.ones(2)))


@refused(KeyError, "zz")
def metadata_that_is_not_there(lib: Any) -> Any:
    lib.Param(1).get_metadata("zz")


@refused(TypeError, "default")
def a_default_for_all_metadata(lib: Any) -> Any:
    lib.Param(1).get_metadata(default=3)


@refused(NotImplementedError, r"variable\[\.\.\.\] \+= x")
def an_operator_in_place(lib: Any) -> Any:
    v = lib.Param(jnp.ones(2))
    v += 1


@refused(ValueError, "BatchStat")
def a_copy_of_another_kind(lib: Any) -> Any:
    lib.Param(1).copy_from(lib.BatchStat(1))


@refused(ValueError, "ref")
def a_variable_made_a_reference(lib: Any) -> Any:
    lib.Param(jnp.ones(1)).set_metadata(ref=True)


@refused(ValueError, "Intermediate")
def what_is_sown_where_a_parameter_is(lib: Any) -> Any:
    class Sower(lib.Module):
        def __init__(self) -> None:
            self.a = lib.Param(jnp.ones(1))

    Sower().sow(lib.Intermediate, "a", 1)


@refused(AttributeError, "Cannot set attribute unit")
def an_attribute_set_on_a_variable(lib: Any) -> Any:
    lib.Param(1).unit = "m"


@refused(AttributeError, "Cannot delete attribute unit")
def an_attribute_deleted_from_a_variable(lib: Any) -> Any:
    del lib.Param(1, unit="m").unit


@refused(
    flax.errors.TraceContextError, "^Cannot mutate Variable from a different trace"
)
def a_variable_of_another_trace(lib: Any) -> Any:
    v = lib.Variable(jnp.array(0.0))
    jax.jit(v.set_value if lib is nnx else v.set_raw_value)(1.0)


@refused(
    flax.errors.TraceContextError, "^Cannot mutate 'Linear' from different trace level"
)
def an_attribute_from_another_trace(lib: Any) -> Any:
    model = linear(lib)
    jax.jit(lambda x: setattr(model, "new", x))(1.0)


def test_an_error_of_traces_is_pickled_as_ours() -> None:
    with pytest.raises(flax.errors.TraceContextError) as caught:
        jax.jit(nnx.Variable(0.0).set_value)(1.0)
    assert isinstance(caught.value, TraceError)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(copy, TraceError)
    assert str(copy) == str(caught.value)


# -------------------------------------------------------------------- Pytrees and marks
@refused(ValueError, "pytree")
def an_object_that_would_be_a_pytree(lib: Any) -> Any:
    class Mine(lib.Object, pytree=True):
        pass


@refused(TypeError, "__slots__")
def a_class_with_slots(lib: Any) -> Any:
    class Mine(lib.Pytree):
        __slots__ = ("a",)


@refused(TypeError)
def check_of_what_is_no_pytree(lib: Any) -> Any:
    lib.check_pytree(3)


@refused(TypeError, "not both")
def data_with_a_value_and_a_default(lib: Any) -> Any:
    lib.data(1, default=2)


@refused(TypeError, "not both")
def static_with_a_value_and_options(lib: Any) -> Any:
    lib.static(1, init=False)


@refused(ValueError, "static")
def data_whose_metadata_says_static(lib: Any) -> Any:
    lib.data(default=1, metadata={"static": True})


@refused(ValueError, "arrays")
def a_clone_that_shares_variables_but_not_arrays(lib: Any) -> Any:
    lib.clone(linear(lib), variables=False, arrays=True)


@refused(TypeError, "abstract")
def a_module_with_an_abstract_method(lib: Any) -> Any:
    class Shape(lib.Module):
        @abc.abstractmethod
        def area(self) -> Any: ...

    class Named(Shape):
        pass

    Named()


@alike
def a_module_whose_abstract_methods_are_there(lib: Any) -> Any:
    class Shape(lib.Module):
        @property
        @abc.abstractmethod
        def area(self) -> Any: ...

    class Square(Shape):
        area = 4

    return Square().area


@refused(ValueError, r"Unused keys found in nnx.view: \['zzz'\]")
def a_view_with_an_unknown_setting(lib: Any) -> Any:
    lib.view(lib.Dropout(0.5), zzz=True)


@alike
def static_values_are_met_in_a_graph(lib: Any) -> Any:
    class Own(lib.Module):
        def __init__(self) -> None:
            self.din = 3
            self.w = lib.Param(jnp.ones(2))
            self.name = "own"
            self.sub = lib.data({"n": 2, "b": lib.BatchStat(1)})

    own = Own()
    found = lib.iter_graph([own, own], graph=True)
    return [
        (path, type(x).__name__) for path, x in found if "_pytree__" not in str(path)
    ]


# ------------------------------------------------------------------------------ States
def state(lib: Any) -> Any:
    return lib.state(lib.BatchNorm(2, rngs=lib.Rngs(0)))


@alike
def filters_read_in_order(lib: Any) -> Any:
    filters = lib.filterlib.filters_to_predicates((lib.BatchStat, "tag", ..., True))
    return [f((), lib.Param(1)) for f in filters]


@refused(ValueError, "can only be used as the last filters")
def a_filter_after_all_is_taken(lib: Any) -> Any:
    lib.filterlib.filters_to_predicates((..., lib.Param))


@alike
def a_flat_state_is_divided(lib: Any) -> Any:
    flat = lib.to_flat_state(state(lib))
    params, rest = flat.split(lib.Param, ...)
    both = flat.filter(lib.BatchStat, lib.Param)
    again = lib.FlatState.merge(rest, params)
    return [[p for p, _ in x] for x in (params, rest, *both, again)], len(
        flat.filter(lib.Param)
    )


@alike
def a_flat_state_is_sorted(lib: Any) -> Any:
    pairs = [(("b",), 1), (("a", 1), 2), (("a", 0), 3)]
    return [list(lib.FlatState(pairs, sort=s)) for s in (True, False)]


@alike
def a_part_of_a_flat_state(lib: Any) -> Any:
    flat = lib.to_flat_state(state(lib))
    part = flat[1:3]
    return type(part) is lib.FlatState, part.paths, flat[0][0], flat[-1][0]


@alike
def what_one_state_has_and_another_has_not(lib: Any) -> Any:
    from_state = lib.State({"a": {"b": 1, "c": 2}, "d": 3})
    taken = lib.State({"a": {"b": 5}, "d": 0})
    return lib.to_pure_dict(lib.statelib.diff(from_state, taken))


@refused(ValueError, "[Nn]on-exhaustive")
def a_flat_state_divided_without_a_rest(lib: Any) -> Any:
    lib.to_flat_state(state(lib)).split(lib.Param)


@refused(ValueError, "[Nn]on-exhaustive")
def a_model_divided_without_a_rest(lib: Any) -> Any:
    lib.split(lib.BatchNorm(2, rngs=lib.Rngs(0)), lib.Param)


@alike
def the_mapping_under_a_state(lib: Any) -> Any:
    nested = lib.State({"a": {"b": 1}}).raw_mapping
    return sorted(nested), nested["a"]["b"]


@refused(ValueError, "zzz")
def a_pure_dict_with_an_unknown_path(lib: Any) -> Any:
    lib.replace_by_pure_dict(state(lib), {"zzz": 1})


@refused(AttributeError, "No RngStream named 'unknown'")
def a_stream_that_is_not_there(lib: Any) -> Any:
    lib.Rngs(params=0).unknown()


@pytest.mark.parametrize("mode", ["set_graph_mode", "set_graph_updates"])
def test_the_modes_decide_whether_streams_are_copied(mode: str) -> None:
    def program(lib: Any) -> Any:
        rngs, found = lib.Rngs(params=0, dropout=1), []
        with getattr(lib, mode)(False):
            found.append(lib.split_rngs(rngs, splits=2, only="params").params.key.shape)
            found.append(lib.fork_rngs(rngs).dropout.normal())
            split = lib.split_rngs(splits=4)(lambda r: r.params.key.shape)
            fork = lib.fork_rngs()(lambda r: r.params.normal())
            whole = lib.split_rngs(rngs, splits=2, graph=True, graph_updates=True)
            found.append(rngs.params.key.shape)
            lib.restore_rngs(whole)
        found += [split(rngs), fork(rngs), rngs.params.key.shape]
        return found, rngs.params.normal()

    assert plain(program(nnx)) == plain(program(flax_nnx))


# -------------------------------------------------------------------------- transforms
@alike
def axes_given_as_a_state(lib: Any) -> Any:
    class Two(lib.Module):
        def __init__(self) -> None:
            self.a = lib.Param(jnp.arange(3.0))
            self.b = lib.Param(jnp.array(2.0))

    axes = lib.StateAxes(lib.State({"a": 0, "b": None}))
    assert axes == lib.StateAxes(lib.State({"b": None, "a": 0}))
    answers = [axes.map_prefix((k,), lib.Param(1)) for k in "ab"]
    out = lib.vmap(lambda m: m.a * m.b, in_axes=(axes,))(Two())
    return answers, out


@alike
def axes_read_as_a_mapping(lib: Any) -> Any:
    axes = lib.StateAxes({lib.Param: 0, "tag": None, ...: 1})
    return (
        len(axes), axes[lib.Param], axes["tag"], axes.get("tag", 7),
        [k in axes for k in (lib.Param, "tag", ...)],
        [x for _, x in axes.items()], isinstance(axes, Mapping), list(axes.values()),
        list(axes) == [lib.Param, "tag", ...] == [f for f, _ in axes.items()],
        axes.filters == (lib.Param, "tag", ...),
    )  # fmt: skip


def test_axes_read_as_a_mapping_are_pickled() -> None:
    axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    assert pickle.loads(pickle.dumps(axes)) == axes


@alike
def shardings_given_as_a_state(lib: Any) -> Any:
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("model",))
    layer = lib.Linear(2, 8, rngs=lib.Rngs(0))
    specs = lib.StateSharding(
        lib.State({"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec()})
    )
    out = lib.shard_map(
        lambda m, x: x @ m.kernel,
        mesh=mesh,
        in_specs=(specs, PartitionSpec()),
        out_specs=PartitionSpec(None, "model"),
    )(layer, jnp.ones((1, 2)))
    return [list(out.sharding.spec), out]


class Changes:
    """A function that changes a statistic, with a pull-back that hands its part on."""

    @staticmethod
    def model(lib: Any) -> Any:
        class Model(lib.Module):
            def __init__(self) -> None:
                self.x = lib.Param(jnp.array(1.0))
                self.z = lib.BatchStat(jnp.array(3.0))

        return Model()

    @staticmethod
    def change(m: Any) -> Any:
        m.z[...] = m.z[...] * m.x[...]
        if hasattr(m, "n"):
            m.n[...] += 1
        return jnp.sin(m.x[...])


@alike
def what_is_changed_has_a_part_in_the_gradients_of_inputs(lib: Any) -> Any:
    f = lib.custom_vjp(Changes.change)

    def bwd(residuals: Any, g: Any) -> Any:
        cos, z = residuals
        (m_g,), out_g = g
        m_g["x"][...] = cos * out_g + m_g["z"][...] * z
        return (m_g,)

    f.defvjp(lambda m: (f(m), (jnp.cos(m.x[...]), m.z[...] / m.x[...])), bwd)

    def loss(m: Any) -> Any:
        return f(m) + 5 * m.z[...]

    m = Changes.model(lib)
    m.n = lib.BatchStat(jnp.array(0))
    return lib.to_pure_dict(lib.grad(loss)(m)), m.z[...], m.n[...]


@alike
def what_is_changed_in_a_dict_has_a_part_too(lib: Any) -> Any:
    f = lib.custom_vjp(lambda d, x: Changes.change(d["m"]) * x)

    def bwd(residuals: Any, g: Any) -> Any:
        cos, z = residuals
        (d_g, x_g), out_g = g
        assert x_g is None
        m_g = d_g["m"]
        m_g["x"][...] = cos * out_g + m_g["z"][...] * z
        return d_g, out_g

    def fwd(d: Any, x: Any) -> Any:
        out = f(d, x)
        m = d["m"]
        return out, (jnp.cos(m.x[...]), m.z[...] / m.x[...])

    f.defvjp(fwd, bwd)

    def loss(m: Any) -> Any:
        return f({"m": m}, jnp.array(2.0)) + 5 * m.z[...]

    m = Changes.model(lib)
    return lib.to_pure_dict(lib.grad(loss)(m)), m.z[...]


@alike
def what_is_changed_has_a_part_in_updates_g(lib: Any) -> Any:
    f = lib.custom_vjp(Changes.change, graph_updates=False)

    def bwd(residuals: Any, g: Any, *, updates_g: Any) -> Any:
        cos, m = residuals
        (m_g,) = updates_g
        found = m_g.z[...]
        m_g = lib.clone(m)
        m_g.x[...] = cos * g + found
        return (m_g,)

    f.defvjp(lambda m: (f(m), (jnp.cos(m.x[...]), m)), bwd)

    def loss(m: Any) -> Any:
        return f(m) + 5 * m.z[...]

    m = Changes.model(lib)
    return lib.grad(loss, graph_updates=False)(m).x[...], m.z[...]


# ---------------------------------------------------------------------------- training
@refused(TypeError, "loss")
def a_metric_without_its_argument(lib: Any) -> Any:
    lib.metrics.Average("loss").update(values=1.0)


@refused(NotImplementedError, "__init__")
def a_metric_without_a_constructor(lib: Any) -> Any:
    lib.Metric()


@alike
def a_metric_with_a_constructor_of_its_own(lib: Any) -> Any:
    class Count(lib.Metric):
        def __init__(self) -> None:
            self.n = lib.metrics.MetricState(jnp.array(0))

    class Named(Count):
        pass

    return Named().n[...]


@alike
def a_sequence_of_nothing(lib: Any) -> Any:
    empty = lib.Sequential()
    return empty(1), empty(1, 2), empty(a=1), empty()


@refused(TypeError)
def a_sequence_of_what_cannot_be_called(lib: Any) -> Any:
    lib.Sequential(3)(1.0)


# -------------------------------------------------------------------------- the bridge
@alike
def the_bridge_by_the_name_of_its_file(lib: Any) -> Any:
    class Linear(lib.bridge.wrappers.to_linen_class(lib.Linear)):
        pass

    layer = Linear(args=(3, 4))
    variables = layer.init(jax.random.key(0), jnp.ones((1, 3)))
    return layer.apply(variables, jnp.ones((1, 3))).shape


@alike
def the_arguments_and_methods_of_what_is_made_linen(lib: Any) -> Any:
    layer = lib.bridge.to_linen(lib.Embed, 5, features=4)
    variables = layer.init(jax.random.key(0), jnp.array([1]))
    table = variables["params"]["embedding"]
    out = layer.apply(variables, table, method=lambda m, x: m.attend(x))
    return layer.features, out.shape
