"""Static values: hashable stand-ins, interned metadata, and the note of edits."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sortal
from models import Holder
from sortal._engine.statics import EMPTY, Edits, Metadata, edits, static_key
from strategies import Config, metadata, statics


@dataclasses.dataclass(frozen=True)
class Partial:
    """Leaves a field out of comparison, and hashes another that has no hash."""

    rate: float
    names: list
    note: str = dataclasses.field(default="", compare=False)

    def __hash__(self):
        return hash(self.rate)


SAME_TO_PYTHON = [
    (1, 1.0),
    (1, True),
    (0, False),
    (0.0, -0.0),
    (0.0, False),
    (1.0, np.float32(1)),
    (np.float32(1), np.float64(1)),
    (np.int32(1), 1),
    (1j, complex(0, 1.0) * 1),
    (complex(0.0, 1.0), complex(-0.0, 1.0)),
    ((1, 2), (1.0, 2)),
    (frozenset({1}), frozenset({True})),
    (Config(1), Config(1.0)),
    (Config(0.0), Config(-0.0)),
    (Config(Config(1)), Config(Config(True))),
    ((Config(1),), (Config(True),)),
]


@pytest.mark.parametrize(("a", "b"), SAME_TO_PYTHON)
def test_statics_that_python_takes_as_equal_differ_where_a_trace_would(a, b):
    """A compiled function must not be reused for another type or another zero."""
    assert a == b
    same_bits = type(a) is type(b) and repr(a) == repr(b)
    assert (static_key(a) == static_key(b)) == same_bits


@given(statics)
def test_a_static_has_the_key_of_its_copy_not_a_number_included(value):
    by_identity = {id(jax.nn.relu): jax.nn.relu}
    other = copy.deepcopy(value, by_identity)
    assert static_key(value) == static_key(other)
    assert hash(static_key(value)) == hash(static_key(other))


@given(st.lists(statics, max_size=4).map(tuple), st.lists(statics, max_size=4))
def test_keys_of_tuples_are_equal_as_their_elements_are(a, b):
    elementwise = [static_key(x) for x in a] == [static_key(x) for x in b]
    assert (static_key(a) == static_key(tuple(b))) == elementwise


def test_nan_is_itself_inside_any_static():
    for make in (float, np.float32, lambda x: Config(float(x)), lambda x: (float(x),)):
        assert static_key(make("nan")) == static_key(make("nan"))


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        set(),
        np.ones(2),
        ([],),
        (1, {}),
        Config([]),
        frozenset({Config(1)}),
        None,
    ],
)
def test_what_cannot_be_hashed_has_no_key(value):
    try:
        hash(value)
    except TypeError:
        with pytest.raises(TypeError, match="unhashable"):
            static_key(value)
    else:
        assert static_key(value) == static_key(value)


def test_an_array_has_no_key():
    with pytest.raises(TypeError, match="unhashable"):
        static_key(jnp.ones(2))


def test_a_dataclass_with_its_own_hash_is_taken_at_its_word():
    assert static_key(Partial(0.5, [1])) == static_key(Partial(0.5, [1]))
    assert static_key(Partial(0.5, [1])) != static_key(Partial(0.5, [2]))
    assert static_key(Config(1)) != static_key((1, None))


def test_fields_left_out_of_comparison_are_left_out_of_the_key():
    @dataclasses.dataclass(frozen=True)
    class Noted:
        rate: int
        note: str = dataclasses.field(default="", compare=False)

    assert static_key(Noted(1, "a")) == static_key(Noted(1, "b"))
    assert static_key(Noted(1)) != static_key(Noted(2))


def test_a_dataclass_compared_by_identity_is_its_own_key():
    @dataclasses.dataclass(eq=False)
    class Handle:
        name: str

    one = Handle("a")
    assert static_key(one) == static_key(one)
    assert static_key(one) != static_key(Handle("a"))


@pytest.mark.parametrize(
    "value",
    [
        jax.nn.relu,
        jnp.float32,
        jnp.dtype("bfloat16"),
        functools.partial(max, 1),
        Config,
    ],
)
def test_functions_types_and_dtypes_are_keys_of_themselves(value):
    assert static_key(value) == (type(value), value)


# ------------------------------------------------------------------ Metadata
@given(metadata)
def test_equal_metadata_is_one_object(items):
    made = Metadata.of(items)
    reverse = dict(reversed(items.items()))
    assert made is Metadata.of(reverse)
    assert made == Metadata.of(dict(items))
    assert hash(made) == hash(Metadata.of(items))
    assert dict(made).keys() == items.keys()
    assert len(made) == len(items)


@given(metadata, metadata)
def test_metadata_differs_where_an_entry_differs_to_a_trace(a, b):
    def key(items):
        return {name: static_key(value) for name, value in items.items()}

    assert (Metadata.of(a) is Metadata.of(b)) == (key(a) == key(b))


@given(metadata)
def test_metadata_survives_pickle_and_both_copies_as_the_same_object(items):
    made = Metadata.of(items)
    assert pickle.loads(pickle.dumps(made)) is made
    assert copy.copy(made) is made
    assert copy.deepcopy(made) is made


def test_a_deep_copy_of_metadata_keeps_values_compared_by_identity():
    made = Metadata.of({"init": object()})
    assert copy.deepcopy(made) is made


def test_no_metadata_is_one_empty_object():
    assert Metadata.of({}) is EMPTY
    assert len(EMPTY) == 0
    assert repr(EMPTY) == "Metadata({})"


def test_metadata_prints_reads_and_refuses_writing():
    made = Metadata.of({"tag": "dropout"})
    assert repr(made) == "Metadata({'tag': 'dropout'})"
    assert made["tag"] == "dropout"
    assert made.get("absent") is None
    assert "tag" in made
    with pytest.raises(KeyError, match="absent"):
        made["absent"]
    with pytest.raises(TypeError, match="item assignment"):
        made["tag"] = "x"


def test_metadata_does_not_change_with_the_dict_it_was_made_of():
    items = {"tag": "a"}
    made = Metadata.of(items)
    items["tag"] = "b"
    assert made["tag"] == "a"
    assert Metadata.of({"tag": "a"}) is made


def test_metadata_of_an_unhashable_value_is_a_type_error():
    with pytest.raises(TypeError, match="unhashable"):
        Metadata.of({"axes": ["data"]})


def test_metadata_that_nobody_holds_is_freed():
    marker = object()
    made = Metadata.of({"only here": (marker,)})
    before = len(Metadata._pool)
    del made
    gc.collect()
    assert len(Metadata._pool) < before


def test_threads_that_make_equal_metadata_get_one_object():
    made, barrier = [], threading.Barrier(8)

    def make():
        barrier.wait()
        made.extend(Metadata.of({"unit": i}) for i in range(200))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 200


# --------------------------------------------------------------------- Edits
def test_each_note_leaves_an_object_that_was_never_seen_before():
    notes, seen = Edits(), set()
    for _ in range(100):
        notes.note()
        assert notes.last not in seen
        seen.add(notes.last)


def test_the_process_wide_note_moves_on():
    before = edits.last
    edits.note()
    assert edits.last is not before


def test_a_subclass_of_a_dataclass_is_compared_by_its_own_equality():
    @dataclasses.dataclass(frozen=True)
    class Base:
        rate: float = 0.5

    class Sub(Base):
        def __init__(self, k):
            super().__init__()
            object.__setattr__(self, "k", k)

        def __eq__(self, other):
            return type(other) is Sub and self.k == other.k

        def __hash__(self):
            return hash(self.k)

    assert static_key(Sub(1)) == static_key(Sub(1))
    assert static_key(Sub(1)) != static_key(Sub(2))
    assert static_key(Base(1)) != static_key(Base(1.0))
    times = sortal.jit(lambda m: m.setting.k * m.w.sum())
    assert times(Holder(setting=Sub(1), w=sortal.Param(jnp.ones(2)))) == 2
    assert times(Holder(setting=Sub(3), w=sortal.Param(jnp.ones(2)))) == 6
