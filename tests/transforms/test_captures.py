"""captures: a key while nothing can change unseen, None where something may."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import pytest

import sortal
from sortal.transforms.captures import captures

RATE = 0.5
MODEL = sortal.Linear(2, 2, rngs=sortal.Rngs(0))
ARRAY = jnp.ones(2)


def helper(x):
    return x * RATE


def uses_helper(x):
    return helper(jnp.sin(x))


def reads_model(x):
    return MODEL(x)


def test_a_function_of_its_arguments_and_of_libraries_has_a_key():
    assert captures(lambda layer, x: sortal.relu(layer(jnp.sin(x)))) is not None
    assert captures(uses_helper) == captures(uses_helper)


def test_a_number_that_a_called_function_uses_changes_the_key(monkeypatch):
    before = captures(uses_helper)
    monkeypatch.setattr(f"{__name__}.RATE", 0.25)
    assert captures(uses_helper) != before


def test_numbers_of_equal_value_and_other_type_differ(monkeypatch):
    monkeypatch.setattr(f"{__name__}.RATE", 1)
    before = captures(helper)
    monkeypatch.setattr(f"{__name__}.RATE", True)
    assert captures(helper) != before


def test_numbers_in_closures_lists_and_defaults_are_part_of_the_key():
    rates = [1.0]

    def closes(x):
        return x * rates[0]

    def defaults(x, rate=2.0):
        return x * rate

    before = captures(closes), captures(defaults)
    rates[0] = 3.0
    defaults.__defaults__ = (4.0,)
    assert captures(closes) != before[0]
    assert captures(defaults) != before[1]
    assert None not in before


def test_arrays_modules_and_objects_have_no_key():
    holder = types.SimpleNamespace(rate=1.0)
    for fn in (
        reads_model,
        lambda x: reads_model(x),
        lambda x: x * ARRAY,
        lambda x: x * holder.rate,
        functools.partial(lambda m, x: m(x), MODEL),
    ):
        assert captures(fn) is None


def test_a_module_of_the_users_is_looked_into_and_a_library_is_not(monkeypatch):
    config = types.ModuleType("config")
    vars(config)["rate"] = 1.0
    before = captures(lambda x: x * config.rate)
    assert before is not None

    def scaled(x):
        return x * config.rate

    first = captures(scaled)
    vars(config)["rate"] = 2.0
    assert captures(scaled) != first
    vars(config)["rate"] = ARRAY
    assert captures(scaled) is None


def test_what_a_transform_wraps_is_looked_into():
    assert captures(sortal.remat(lambda layer, x: layer(x))) is not None
    assert captures(sortal.remat(lambda layer, x: layer(x) * ARRAY)) is None


@pytest.mark.parametrize("what", ["model", "array", "number", "axes"])
def test_an_eager_scan_sees_what_changed_between_calls(what):
    """It is kept compiled, but never with values of an earlier call."""
    model = sortal.Linear(2, 2, use_bias=False, rngs=sortal.Rngs(0))
    values = {"array": jnp.ones(2), "number": 1.0}
    scale = [1.0]
    axes = {"y": 0}

    def by_model(carry, x):
        return carry, {"y": model(x)}

    def by_array(carry, x):
        return carry, {"y": values["array"] * x}

    def by_number(carry, x):
        return carry, {"y": scale[0] * x}

    step = {"model": by_model, "array": by_array}.get(what, by_number)
    call = sortal.scan(step, out_axes=(sortal.Carry, axes))
    xs = jnp.arange(6.0).reshape(3, 2)

    def expected():
        if what == "model":
            found = xs @ model.kernel.value
        else:
            found = xs * (values["array"] if what == "array" else scale[0])
        return found.T if axes["y"] else found

    for _ in range(2):
        assert jnp.array_equal(call(0, xs)[1]["y"], expected())
        model.kernel.value = model.kernel.value + 1
        values["array"] = values["array"] + 1
        scale[0] += 1
        axes["y"] = 1 if what == "axes" else 0
    assert jnp.array_equal(call(0, xs)[1]["y"], expected())


def test_a_compiled_function_is_what_it_wraps():
    known, unknown = jax.jit(helper), jax.jit(lambda x: x * ARRAY)
    assert captures(lambda x: known(x)) is not None
    assert captures(lambda x: unknown(x)) is None


def test_what_cannot_be_looked_through_is_unknown():
    """A list in itself, and a dataclass one of whose fields was never set."""
    endless = []
    endless.append(endless)
    half = dataclasses.make_dataclass("Half", [("rate", float)])
    unset = half.__new__(half)
    assert captures(lambda x: x * endless) is None
    assert captures(lambda x: x * unset) is None
