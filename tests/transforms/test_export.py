"""Exported functions give the numbers of the live ones, without the model's class."""

from __future__ import annotations

import pickle
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal
from models import Holder, Net, untouched
from sortal.errors import ArgumentError, StaleBufferError

X = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)
DEVICE = jax.devices()[0]


def again(exported):
    return sortal.Exported.deserialize(exported.serialize())


def test_a_round_trip_gives_the_numbers_and_the_writes_of_the_function():
    f = sortal.jit(lambda m, x: m(x))
    exported = again(sortal.export(f)(Net(), X))
    live, other = Net(), Net()
    for _ in range(2):
        np.testing.assert_allclose(exported.call(live, X), f(other, X), rtol=1e-6)
        assert int(live.calls) == int(other.calls)
        np.testing.assert_allclose(live.norm.mean, other.norm.mean, rtol=1e-6)


def test_a_state_may_stand_for_the_model_and_is_written_likewise():
    exported = again(sortal.export(lambda m, x: m(x))(Net(), X))
    state, model = sortal.state(Net()), Net()
    np.testing.assert_allclose(exported.call(state, X), model(X), rtol=1e-6)
    np.testing.assert_allclose(state["norm"]["mean"].value, model.norm.mean, rtol=1e-6)
    assert isinstance(state["norm"]["mean"], sortal.BatchStat)


CALL = """
import pickle, sys, numpy as np
import jax
jax.config.update("jax_num_cpu_devices", 8)
import sortal
data, values, x = pickle.load(open(sys.argv[1], "rb"))
exported = sortal.Exported.deserialize(data)
state = sortal.State.from_flat_path((p, sortal.Param(v)) for p, v in values)
out = exported.call(state, x)
pickle.dump(np.asarray(out), open(sys.argv[2], "wb"))
assert "models" not in sys.modules
"""


def test_a_process_without_the_class_calls_it(tmp_path):
    model = Net()
    exported = sortal.export(lambda m, x: m(x))(model, X)
    values = [(p, np.asarray(v.value)) for p, v in sortal.state(model).flat_state()]
    (tmp_path / "in").write_bytes(pickle.dumps((exported.serialize(), values, X)))
    command = [sys.executable, "-c", CALL, str(tmp_path / "in"), str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = pickle.loads((tmp_path / "out").read_bytes())
    np.testing.assert_allclose(found, model(X), rtol=1e-6)


def test_a_sharded_function_is_called_with_what_is_sharded_likewise():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    policy = {sortal.At("kernel"): sortal.Rule(spec=P("d"))}

    def make():
        return sortal.shard(sortal.Linear(16, 8, rngs=sortal.Rngs(0)), mesh, policy)

    def double(m, x):
        m.kernel[...] = m.kernel * 2
        return m(x)

    x = jax.device_put(np.ones((8, 16), np.float32), NamedSharding(mesh, P("d")))
    exported = again(sortal.export(double)(make(), x))
    model, other = make(), make()
    expected = sortal.jit(double)(other, x)
    np.testing.assert_allclose(exported.call(model, x), expected, rtol=1e-6)
    np.testing.assert_array_equal(model.kernel, other.kernel)
    assert exported.exported.nr_devices == 8


def test_functions_of_arrays_and_containers_of_models_are_exported_too():
    exported = again(sortal.export(lambda x: {"twice": x * 2})(X))
    np.testing.assert_array_equal(exported.call(X)["twice"], 2 * X)
    pair = (Net(0), {"m": Net(1)})
    exported = again(sortal.export(lambda p, x: p[0](x) + p[1]["m"](x))(pair, X))
    expected = Net(0)(X) + Net(1)(X)
    np.testing.assert_allclose(exported.call(pair, X), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("f", "args", "text"),
    [
        (lambda m: m, (Net(),), "adds, removes or returns Modules"),
        (
            lambda m: setattr(m, "n", sortal.Param(X)),
            (Net(),),
            "adds, removes",
        ),
        (lambda s: s, (sortal.state(Net()),), "export takes live models, not States"),
    ],
)
def test_what_cannot_be_exported_is_refused(f, args, text):
    with pytest.raises(ArgumentError, match=text):
        sortal.export(f)(*args)


def test_models_that_share_a_variable_are_refused():
    a, b = Net(), Net()
    b.norm.scale = a.norm.scale
    with pytest.raises(ArgumentError, match="cannot share Variables"):
        sortal.export(lambda a, b: a(X) + b(X))(a, b)


def test_another_model_or_layout_is_refused_before_anything_is_written():
    exported = sortal.export(lambda m, x: m(x))(Net(), X)
    other = sortal.Linear(3, 2, rngs=sortal.Rngs(0))
    with pytest.raises(ArgumentError) as e:
        exported.call(other, X)
    assert "model 0: missing: calls" in str(e.value)
    assert "model 0: unknown: kernel" in str(e.value)
    with pytest.raises(ArgumentError, match="was exported for the arguments"):
        exported.call(Net(), X, X)
    with pytest.raises(ArgumentError, match="no function that"):
        sortal.Exported.deserialize(b"something else")
    with pytest.raises(ArgumentError, match="takes the bytes that serialize ret"):
        sortal.Exported.deserialize(None)


def test_models_that_share_a_variable_cannot_be_called_with():
    def module():
        return Holder(n=sortal.Variable(np.float32(0)))

    def add_to(a, b):
        a.n[...] += 1
        b.n[...] += 2

    exported, one, two = sortal.export(add_to)(module(), module()), module(), module()
    two.n = one.n
    state = sortal.state(module())
    holds = [sortal.State({"n": one.n}) for _ in range(2)]
    for pair in ((one, one), (one, two), (state, state), holds, (one, holds[0])):
        with pytest.raises(ArgumentError, match="cannot share Variables"):
            exported.call(*pair)
    assert float(one.n.value) == 0
    exported.call(one, module())
    assert float(one.n.value) == 1


def test_other_shapes_and_dtypes_are_refused_by_path():
    exported = sortal.export(lambda m, x: m(x))(Net(), X)
    other = Net()
    bias = other.layers[0].bias
    bias.value = bias.value.astype("bfloat16")
    with untouched(other), pytest.raises(ArgumentError) as e:
        exported.call(other, X[:, :2])
    assert "model 0: layers.0.bias: bfloat16[4] for float32[4]" in str(e.value)
    assert "array 0: float32[2,2] for float32[2,3]" in str(e.value)
    assert "kernel" not in str(e.value)


def test_what_no_program_takes_is_refused_by_path():
    def zero(n):
        return Holder(n=sortal.Variable(np.zeros(2, "f4")), s=sortal.Variable(n))

    with pytest.raises(ArgumentError, match=r"found:\n  model\['s'\]: 'x'\n"):
        sortal.export(lambda model: model.n * 1)(zero("x"))
    with pytest.raises(ArgumentError, match=r"found:\n  model\['s'\]: >f4\[2\]\n"):
        sortal.export(lambda model: model.n * 1)(zero(np.ones(2, ">f4")))
    exported = sortal.export(lambda model: model.n * 1)(zero(np.ones(2, "f4")))
    with pytest.raises(ArgumentError, match=r"argument 0\['s'\]: 'x'"):
        exported.call(zero("x"))
    abstract = jax.ShapeDtypeStruct((2,), "f4")
    with pytest.raises(ArgumentError) as e:
        exported.call(zero(abstract))
    assert "model 0: s: a shape without values, float32[2]," in str(e.value)
    gone = jax.numpy.ones(2)
    gone.delete()
    with pytest.raises(StaleBufferError, match=r"argument 0: s \(Variable\)"):
        exported.call(zero(gone))


def test_a_model_that_cannot_be_written_is_refused_before_another_is_written():
    def add(a, b):
        a.n[0][...] += 1
        b.n[0][...] += 1

    def module(n):
        return Holder(n=n)

    a, b = (module([sortal.Variable(np.zeros(2, "f4"))]) for _ in range(2))
    exported = sortal.export(add)(a, b)
    fixed = module((np.zeros(2, "f4"),))
    with untouched(a, fixed), pytest.raises(ArgumentError) as e:
        exported.call(a, fixed)
    assert "model 1: in a tuple, and so not to be written: n.0" in str(e.value)


def test_what_jax_has_no_form_for_is_refused_when_it_is_written():
    exported = sortal.export(lambda x: x)(jax.numpy.ones(2, "int2"))
    with pytest.raises(ArgumentError, match=r"for want of a form .*int2"):
        exported.serialize()


def test_bytes_that_are_missing_or_changed_are_refused():
    data = sortal.export(lambda x: x * 2)(X).serialize()
    cut = [data[:n] for n in (20, len(data) // 2, len(data) - 1)]
    for i in range(16, len(data), len(data) // 40):
        changed = bytearray(data)
        changed[i] ^= 1 << i % 8
        cut.append(bytes(changed))
    for bad in cut:
        with pytest.raises(ArgumentError, match=r"cut off or damaged"):
            sortal.Exported.deserialize(bad)
    assert float(sortal.Exported.deserialize(data).call(X)[0, 0]) == 2 * X[0, 0]


@pytest.mark.parametrize("args", [(Net(), X), (X,)])
def test_jaxs_own_export_of_a_jitted_function_is_refused_with_what_to_write(args):
    f = sortal.jit(lambda *args: args[-1] * 2)
    with pytest.raises(ArgumentError, match=r"(?s)sortal\.export\(f\)\(\.\.\.\)"):
        jax.export.export(f)(*args)
    placed = sortal.jit(f, out_shardings=jax.sharding.SingleDeviceSharding(DEVICE))
    with pytest.raises(ArgumentError, match=r"sortal\.export"):
        jax.export.export(placed)(*args)
    with pytest.raises(ArgumentError, match=r"sortal\.export"):
        jax.export.export(sortal.jit(Net.__call__).__get__(Net()))(X)


def test_jaxs_own_export_of_a_jax_function_of_models_goes_on_working():
    model = sortal.Linear(3, 2, rngs=sortal.Rngs(0))
    made = jax.export.export(jax.jit(lambda m, x: sortal.jit(lambda m: m(x))(m)))
    np.testing.assert_allclose(made(model, X).call(model, X), model(X), rtol=1e-6)


def test_a_traced_function_is_lowered_and_compiled_as_of_jax():
    traced = sortal.jit(lambda x: x * 2).trace(X)
    assert traced.fun_name == "<lambda>"
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.multiply" in text


def test_what_was_traced_is_compiled_and_called_as_the_function() -> None:
    def call(m, x, n):
        m.kernel[...] = m.kernel[...] * n
        return m(x)

    model = sortal.Linear(3, 2, rngs=sortal.Rngs(0))
    x, kernel = X[:1], model.kernel.value
    traced = sortal.jit(call, static_argnums=2).trace(model, x, 2)
    out = traced.lower().compile()(model, x)
    np.testing.assert_allclose(model.kernel.value, kernel * 2, rtol=1e-6)
    np.testing.assert_allclose(out, model(x), rtol=1e-6)
    bound = sortal.jit(sortal.Linear.__call__).__get__(model).trace(x)
    np.testing.assert_allclose(bound.lower().compile()(x), out, rtol=1e-6)
