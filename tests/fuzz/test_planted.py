"""Faults that Sortal once had are put back one at a time, and each is found."""

from __future__ import annotations

import functools
import itertools
import operator

import pytest

from fuzz import live, runs
from sortal import functional
from sortal._engine import handlers, leaves, marks, nodes, plan, state, statics
from sortal.nnx import Dict, List
from sortal.transforms import eager
from sortal.transforms._adapter import functions, tracing


def first_found(kind, most, *, matching=""):
    """How many programs it takes until one differs, and how it differs.

    Args:
      kind: ``edits`` or ``compiled``.
      most: the number of programs after which none is expected any more.
      matching: only programs with this in them are run.

    Returns:
      The Failure.
    """
    from collections import Counter

    labels = (f"{kind}:{n}" for n in itertools.count())
    if matching:
        labels = (
            label
            for label in labels
            if (found := runs.draw(label, Counter())) and matching in found[0].text()
        )
    outcome = runs.run(itertools.islice(labels, most), most=1, shrunk=False)
    assert outcome.failures, f"none of {most} programs of {kind} noticed the fault"
    return outcome.failures[0]


def test_a_root_that_is_recorded_as_none_is_found(monkeypatch):
    def same(self, root):
        nodes = [root, *self._nodes] if self._has_root else self._nodes
        equal, now = self.handler.contents(nodes)
        now = [_none_for_root(plan._marked(x, root)) for x in now]
        then = list(map(_none_for_root, self.held))
        kept = list(map(type, nodes)) == self._types and equal == self._equal
        return kept and len(now) == len(then) and all(map(operator.is_, now, then))

    monkeypatch.setattr(plan.Record, "same", same)
    failure = first_found("edits", 4000)
    assert failure.kept
    assert not failure.afresh


def _none_for_root(x):
    return None if x is plan._ROOT else x


def test_eager_programs_that_are_known_by_code_are_found(monkeypatch):
    known = {}
    kept = eager.kept

    def by_code(make, functions, *args, **kwargs):
        same = [known.setdefault(getattr(f, "__code__", f), f) for f in functions]
        return kept(make, same, *args, **kwargs)

    for name in ("remat", "scan", "control"):
        module = __import__(f"sortal.transforms.{name}", fromlist=[name])
        monkeypatch.setattr(module, "kept", by_code)
    first_found("compiled", 40, matching="helper")


def test_callable_objects_with_state_taken_for_statics_are_found(monkeypatch):
    hidden = nodes.hidden_state
    monkeypatch.setattr(
        nodes, "hidden_state", lambda x: "" if callable(x) else hidden(x)
    )
    first_found("edits", 300)


def test_state_in_a_list_of_a_plain_object_taken_for_static_is_found(monkeypatch):
    hidden = nodes.hidden_state
    monkeypatch.setattr(
        nodes, "hidden_state", lambda x: "" if " in a list" in hidden(x) else hidden(x)
    )
    first_found("edits", 40, matching="Plain([P(")


def test_partials_with_state_taken_for_statics_are_found(monkeypatch):
    static = nodes.is_static_value
    monkeypatch.setattr(
        nodes,
        "is_static_value",
        lambda x: isinstance(x, functools.partial) or static(x),
    )
    first_found("edits", 40, matching="functools.partial(")


def test_statics_compared_by_inherited_fields_alone_are_found(monkeypatch):
    monkeypatch.setattr(statics, "_compares_fields", lambda kind: hasattr(kind, "a"))
    first_found("edits", 4000)


def test_states_that_share_variables_are_found(monkeypatch):
    monkeypatch.setattr(state.State, "__copy__", lambda self: self)
    first_found("edits", 1000)


@pytest.mark.parametrize(("kind", "most"), [("edits", 2000), ("compiled", 40)])
@pytest.mark.parametrize("handler", [nodes.ObjectHandler, handlers.DictHandler])
def test_copies_in_the_order_of_names_are_found(kind, most, handler, monkeypatch):
    monkeypatch.setattr(handler, "order", handlers.Handler.order)
    first_found(kind, most)


def test_roles_lost_in_write_back_are_found(monkeypatch):
    fill = nodes.ObjectHandler.fill

    def without_roles(self, obj, spec, items):
        before = obj._roles
        fill(self, obj, spec, items)
        if obj._version > 0:
            nodes._set_roles(obj, before)

    monkeypatch.setattr(nodes.ObjectHandler, "fill", without_roles)
    first_found("compiled", 60, matching="nnx.data(0.25)")


def test_models_in_a_partial_with_keywords_baked_in_are_found(monkeypatch):
    unbind = functions.unbind

    def as_it_was(fn):
        if isinstance(fn, functools.partial) and fn.keywords:
            return fn, ()
        return unbind(fn)

    from sortal.transforms import compile as compiling

    monkeypatch.setattr(compiling, "unbind", as_it_was)
    first_found("compiled", 40, matching=", x=arr(")


def test_numbers_written_over_raw_arrays_are_found(monkeypatch):
    monkeypatch.setattr(functional, "ARRAYS", object)
    first_found("edits", 1500)


def test_a_class_that_is_not_compared_is_found(monkeypatch):
    same = plan.Record.same

    def whatever_class(self, root):
        now = [root, *self._nodes] if self._has_root else self._nodes
        self._types = list(map(type, now))
        return same(self, root)

    monkeypatch.setattr(plan.Record, "same", whatever_class)
    failure = first_found("edits", 3000)
    assert not failure.afresh


def test_a_plan_that_is_always_valid_is_found(monkeypatch):
    monkeypatch.setattr(plan.Plan, "valid", lambda self, root: True)
    assert not first_found("edits", 100).afresh


def test_an_update_that_loses_a_leaf_is_found(monkeypatch):
    put = leaves.Leaves.put

    def all_but_the_last(self, values):
        old = self.values()
        kept = list(itertools.islice(values, len(old)))
        put(self, iter([*kept[:-1], *old[-1:]]))

    monkeypatch.setattr(leaves.Leaves, "put", all_but_the_last)
    first_found("edits", 300)


def test_a_snapshot_that_shares_numpy_arrays_is_found(monkeypatch):
    monkeypatch.setattr(leaves.Leaves, "snapshot", leaves.Leaves.values)
    first_found("edits", 6000)


def test_a_mark_that_is_ignored_is_found(monkeypatch):
    monkeypatch.setattr(live.names, "data", lambda x: x)
    assert marks.data is not live.names.data
    first_found("edits", 300)


def test_edits_of_a_list_that_note_nothing_are_found(monkeypatch):
    def refill(self, rows):
        made = List(rows)
        for i in range(len(self)):
            del vars(self)[str(i)]
        vars(self).update(vars(made))
        kept = {k: r for k, r in (self._roles or {}).items() if not k.isdigit()}
        nodes._set_roles(self, {**kept, **(made._roles or {})} or None)

    monkeypatch.setattr(List, "_refill", refill)
    assert not first_found("edits", 400, matching=".reverse()").afresh


def test_edits_of_a_dict_that_note_nothing_are_found(monkeypatch):
    def put(self, key, value):
        marked = isinstance(value, marks.Marked) or key in (self._roles or ())
        if marked or not isinstance(key, str):
            kept(self, key, value)
        else:
            vars(self)[key] = value

    kept = Dict.__setitem__
    monkeypatch.setattr(Dict, "__setitem__", put)
    assert not first_found("edits", 1000, matching="nnx.Dict").afresh


@pytest.fixture(autouse=True)
def _ours_alone(monkeypatch):
    """No objects of Flax, with whose staleness the faults have nothing to do."""
    monkeypatch.setattr(live, "flax_nnx", None)
    yield
    live.throw_away([], [])


def test_moved_arrays_that_are_read_after_others_are_written_are_found(monkeypatch):
    found = tracing._changed

    def first(copies, now, kept):
        return vars(copies).setdefault("first", found(copies, now, kept))

    monkeypatch.setattr(tracing, "_changed", first)
    first_found("compiled", 60, matching=" = tuple(v + ")


def test_new_objects_that_get_the_arrays_of_now_are_found(monkeypatch):
    edits_of = tracing.edits_of

    def none_lost(copies, outputs, unedited, lost, entered):
        return edits_of(copies, outputs, unedited, () if unedited else lost, entered)

    monkeypatch.setattr(tracing, "edits_of", none_lost)
    first_found("compiled", 60, matching="new = A(")
