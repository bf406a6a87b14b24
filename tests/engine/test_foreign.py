"""Variables of another library, invented here, are met, read, written and built."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

import sortal
from sortal._engine import foreign
from sortal._engine.statics import Metadata
from sortal.errors import UnsupportedError


class Box:
    """A Variable of a library that nobody knows."""

    def __init__(self, value: Any, **notes: Any):
        self.value, self.notes = value, notes


class Weight(Box):
    """A kind of that library."""


class Boxes(foreign.VariableHandler):
    """What the engine has to know of it."""

    def values(self, variables):
        return [x.value for x in variables]

    def write(self, variable, value):
        variable.value = value

    def entries(self, variables):
        return [x.notes for x in variables]

    def set_metadata(self, variable, metadata):
        variable.notes = metadata

    def is_ours(self, variable):
        return True

    def make(self, kind, value, metadata: Metadata):
        return kind(value, **metadata)


@pytest.fixture
def known(monkeypatch):
    for name in ("_handlers", "_found", "_twins", "_pending"):
        monkeypatch.setattr(foreign, name, dict(getattr(foreign, name)))
    foreign.register_variable(Box, Boxes())
    foreign.pair(sortal.Param, Weight)


def test_a_library_is_met_once_when_a_class_of_it_turns_up(monkeypatch):
    monkeypatch.setattr(foreign, "_pending", {})
    met = []
    foreign.register_lazily("some.library", lambda: met.append(1))
    theirs = type("Theirs", (), {"__module__": "some.library.parts"})
    near = type("Near", (), {"__module__": "some.library2"})
    foreign.register_library_of(near)
    assert not met
    foreign.register_library_of(type("Below", (theirs,), {}))
    foreign.register_library_of(theirs)
    assert met == [1]


def test_one_that_the_user_imported_is_met_when_asked_for(monkeypatch):
    monkeypatch.setattr(foreign, "_pending", {})
    met = []
    foreign.register_lazily("one", lambda: met.append("one"))
    foreign.register_lazily("two", lambda: met.append("two"))
    foreign.register_imported({"one": None})
    assert met == ["one"]


def test_a_library_that_is_refused_is_refused_each_time(monkeypatch):
    monkeypatch.setattr(foreign, "_pending", {})

    def teach():
        raise UnsupportedError("too old")

    foreign.register_lazily("some.library", teach)
    foreign.register_imported({"some.library": None})
    theirs = type("Theirs", (), {"__module__": "some.library"})
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="too old"):
            foreign.register_library_of(theirs)


def test_listeners_hear_of_new_classes(monkeypatch):
    monkeypatch.setattr(foreign, "_listeners", [])
    heard = []
    bases = sortal.Variable, sortal.Module  # whose files are read at the first look
    foreign.watch_classes(heard.append)

    class Kind(bases[0]):
        pass

    class Module(bases[1]):
        pass

    assert heard == [Kind, Module]


def test_pairs_are_one_kind_and_nothing_else_is(known):
    assert foreign.same_kind(sortal.Param, Weight)
    assert foreign.same_kind(Weight, sortal.Param)
    assert not foreign.same_kind(Weight, sortal.BatchStat)
    assert not foreign.same_kind(sortal.BatchStat, None)
    assert not foreign.same_kind(None, sortal.BatchStat)

    class Below(Weight):
        pass

    assert foreign.is_kind(Below, sortal.Param)
    assert foreign.is_kind(Below, Box)
    assert not foreign.is_kind(Below, sortal.BatchStat)
    assert not foreign.is_kind(None, sortal.Param)
    assert list(foreign.ancestry(Below))[:3] == [Below, Weight, sortal.Param]


def test_verbs_take_them(known):
    class Model(sortal.Module):
        def __init__(self) -> None:
            self.a = Weight(jnp.ones(2), unit="m")
            self.b = self.a

    model = Model()
    state = sortal.state(model, sortal.Param)
    assert state.paths() == (("a",),)
    sortal.update(model, {"a": jnp.zeros(2)})
    assert not model.a.value.any()
    copied = sortal.clone(model)
    assert type(copied.a) is Weight
    assert copied.a is copied.b
    assert copied.a.notes == {"unit": "m"}
    sortal.jit(lambda m: setattr(m.a, "value", m.a.value + 3))(model)
    assert model.a.value.tolist() == [3, 3]
    model.a.notes["unit"] = "km"
    assert sortal.graphdef(model) is not sortal.graphdef(copied)
