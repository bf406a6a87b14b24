"""Schema and GraphDef: interned, compared by identity, divided by filters, diffed."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import subprocess
import sys
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sortal
from sortal import nnx
from sortal._engine.difference import ABSENT
from sortal._engine.graphdef import GraphDef
from sortal._engine.paths import show
from sortal._engine.schema import Schema, check_exhaustive, select
from sortal._engine.statics import EMPTY, Interned, Metadata, Static
from sortal.errors import FilterError
from strategies import (
    BatchStat,
    Box,
    Cell,
    OtherBox,
    Pair,
    filters,
    models,
    states,
    statics,
    variables,
)

Param = sortal.Param


def schema_of(*rows: Any) -> Schema:
    """A schema from (path text, kind) or (path text, kind, tag)."""
    paths = [tuple(row[0].split(".")) for row in rows]
    metadata = [Metadata.of({"tag": r[2]}) if len(r) > 2 else EMPTY for r in rows]
    return Schema.of(paths, [r[1] for r in rows], metadata)


ROWS = (
    ("encoder.bias", Param),
    ("encoder.kernel", Param, "big"),
    ("head.kernel", Param),
    ("head.mean", sortal.BatchStat),
    ("table", None),
)
SCHEMA = schema_of(*ROWS)


# ----------------------------------------------------------------- interning
@given(models(cycles=False))
def test_equal_structures_have_one_graphdef(model):
    found = sortal.graphdef(model)
    assert sortal.graphdef(sortal.clone(model)) is found
    assert found == sortal.graphdef(model)
    assert hash(found) == hash(sortal.graphdef(model))


@given(models(), models())
def test_graphdefs_are_one_object_exactly_where_nothing_differs(a, b):
    """So that the diff, which explains recompilation, never comes back empty."""
    x, y = sortal.graphdef(a), sortal.graphdef(b)
    assert (x is y) == (x == y) == (x.diff(y) == [])
    assert [d.path for d in x.diff(y)].sort(key=show) == [
        d.path for d in y.diff(x)
    ].sort(key=show)


@given(models())
def test_graphdefs_and_schemas_survive_pickle_and_copies_as_the_same_object(model):
    found = sortal.graphdef(model)
    for thing in (found, found.schema):
        assert copy.copy(thing) is thing
        assert copy.deepcopy(thing) is thing
        assert pickle.loads(pickle.dumps(thing)) is thing


SCRIPT = """
import pickle, sys
import sortal
from strategies import Box, Cell, Pair
found = pickle.loads(sys.stdin.buffer.read())
rebuilt = found.build(found.build_leaves(range(len(found.schema))))[0]
assert sortal.graphdef(rebuilt) is found, (sortal.graphdef(rebuilt).diff(found))
assert rebuilt.cell.weight.value == 0
print(found)
"""


def test_a_graphdef_pickled_here_is_that_of_equal_models_elsewhere():
    model = Box(cell=Cell(Param(1)), pair=Pair(Param(2), [1]), table={"a": {1: (2, 3)}})
    found = sortal.graphdef(model)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=pickle.dumps(found),
        capture_output=True,
        check=False,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout.decode().strip() == repr(found), done.stderr.decode()


def test_a_graphdef_that_nobody_holds_is_freed():
    model = Box(only_here=Box(w=Param(1), note="freed with its graphdef"))
    refs = [
        weakref.ref(sortal.graphdef(model)),
        weakref.ref(sortal.state(model).schema),
    ]
    assert all(ref() is not None for ref in refs)
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Box(n=1), Box(n=1.0)),
        (Box(n=1), Box(n=True)),
        (Box(n=0.0), Box(n=-0.0)),
        (Box(n=1), Box(m=1)),
        (Box(), OtherBox()),
        (Box(w=Param(1)), Box(w=sortal.Cache(1))),
        (Box(w=BatchStat(1)), Box(w=sortal.BatchStat(1))),
        (Box(w=Param(1)), Box(w=Param(1, tag="a"))),
        (Box(w=Param(1, tag=1)), Box(w=Param(1, tag=True))),
        (Box(w=Param(1)), Box(w=jnp.ones(1))),
        (Box(w=[Param(1)]), Box(w=(Param(1),))),
        (Box(w={"a": 1, "b": 2}), Box(w={"b": 2, "a": 1})),
        (Box(w=Pair(Param(1))), Box(w=(Param(1), None))),
        (Box(n=nnx.data(1)), Box(n=1)),
        (Box(n=nnx.static("a")), Box(n="a")),
    ],
)
def test_structures_that_a_trace_could_tell_apart_are_two(a, b):
    assert sortal.graphdef(a) is not sortal.graphdef(b)
    assert sortal.graphdef(a).diff(sortal.graphdef(b))


def test_sharing_is_part_of_the_structure():
    w, inner = Param(1), Box()
    shared, apart = Box(a=w, b=w), Box(a=Param(1), b=Param(1))
    assert sortal.graphdef(shared) is not sortal.graphdef(apart)
    assert sortal.graphdef(shared).aliases == ((("b",), 0),)
    same_box, two_boxes = Box(a=inner, b=inner), Box(a=Box(), b=Box())
    assert sortal.graphdef(same_box) is not sortal.graphdef(two_boxes)


def test_values_are_no_part_of_the_structure():
    found = sortal.graphdef(Box(w=Param(jnp.ones(2)), x=jnp.ones(3)))
    assert sortal.graphdef(Box(w=Param(jnp.zeros((5, 5))), x=jnp.zeros(()))) is found


def test_a_graphdef_is_a_static_pytree():
    found = sortal.graphdef(Box(w=Param(1)))
    assert jax.tree.leaves(found) == []
    assert jax.tree.map(lambda x: x, found) is found
    seen = []
    jax.jit(lambda g, x: (seen.append(g), x)[1])(found, 1)
    assert seen == [found]


def test_a_graphdef_prints_its_size():
    w = Param(1)
    model = Box(a=w, b=w, inner=[Box()])
    assert repr(sortal.graphdef(model)) == "GraphDef(Box: 3 nodes, 1 leaves, 1 aliases)"
    assert repr(sortal.graphdef(w)) == "GraphDef(leaf: 0 nodes, 1 leaves, 0 aliases)"


def test_the_base_of_interned_classes_needs_a_setup():
    class Bare(Interned):
        __slots__ = ()

    with pytest.raises(NotImplementedError):
        Bare._intern(1)


# -------------------------------------------------------------------- Static
@given(statics, statics)
def test_statics_are_equal_as_their_keys_are(a, b):
    x, y = Static(a), Static(b)
    assert (x == y) == (x.key == y.key)
    assert x != a
    assert repr(x) == repr(a)
    if x == y:
        assert hash(x) == hash(y)


# -------------------------------------------------------------------- Schema
@given(states())
def test_a_schema_lists_paths_kinds_and_metadata_in_order(state):
    schema = state.schema
    assert len(schema) == len(schema.paths) == len(schema.kinds) == len(schema.metadata)
    assert [schema.paths[i] for i in schema.index.values()] == list(schema.paths)
    rows = list(schema.rows(state.leaves()))
    for path, kind, metadata, leaf in rows:
        assert kind is (type(leaf) if isinstance(leaf, sortal.Variable) else None)
        assert metadata is getattr(leaf, "_metadata", EMPTY) or kind is None
        assert state.schema.index[path] is not None
    assert [r[3] for r in schema.rows(None)] == [None] * len(schema)


@given(states(), st.data())
def test_picking_leaves_keeps_their_rows(state, data):
    schema = state.schema
    some = data.draw(st.lists(st.sampled_from(range(len(schema) or 1)), unique=True))
    some = sorted(i for i in some if i < len(schema))
    rows = list(schema.rows(None))
    assert list(schema.pick(some).rows(None)) == [rows[i] for i in some]
    assert schema.pick(range(len(schema))) is schema


def test_the_part_below_a_prefix_has_paths_from_there():
    part, at = SCHEMA.below(("head",))
    assert part.paths == (("kernel",), ("mean",))
    assert part.kinds == (Param, sortal.BatchStat)
    assert at == (2, 3)
    assert SCHEMA.below(("head",))[0] is part
    assert SCHEMA.below(("table",))[1] == ()
    assert SCHEMA.below(()) == (SCHEMA, (0, 1, 2, 3, 4))
    assert SCHEMA.children(()) == ("encoder", "head", "table")
    assert SCHEMA.children(("head",)) == ("kernel", "mean")
    assert SCHEMA.children(("absent",)) == ()


def test_a_schema_of_another_kind_keeps_the_paths():
    found = SCHEMA.of_kind(sortal.Cache)
    assert found.paths == SCHEMA.paths
    assert set(found.kinds) == {sortal.Cache}
    assert found.metadata == SCHEMA.metadata
    assert SCHEMA.of_kind(sortal.Cache) is found


def test_a_schema_prints_paths_and_kinds():
    assert SCHEMA.describe(1) == "encoder.kernel (Param)"
    assert SCHEMA.describe(4) == "table (unlabelled array)"
    assert repr(schema_of(*ROWS[3:])) == (
        "Schema(head.mean (BatchStat), table (unlabelled array))"
    )


def test_what_is_remembered_is_computed_once_and_bounded():
    schema, calls = schema_of(("only.here", Param)), []

    def compute():
        calls.append(1)
        return "answer"

    assert schema.memo("question", compute) == schema.memo("question", compute)
    assert len(calls) == 1
    for i in range(1000):
        schema.memo(("many", i), lambda i=i: i)
    assert len(schema._memo) <= 300


# -------------------------------------------------------------------- select
def plain_select(
    rows: list[Any], chosen: list[Any]
) -> tuple[list[list[int]], list[int]]:
    """The first filter that takes a leaf has it, by the book."""
    parts: list[list[int]] = [[] for _ in chosen]
    rest = []
    for i, row in enumerate(rows):
        for part, f in zip(parts, chosen, strict=True):
            if f.test(*row):
                part.append(i)
                break
        else:
            rest.append(i)
    return parts, rest


def swallowed(rows: list[Any], chosen: list[Any]) -> bool:
    """Whether an earlier filter takes all that a later one does, and more."""
    takes = [{i for i, row in enumerate(rows) if f.test(*row)} for f in chosen]
    pairs = [(a, b) for j, b in enumerate(takes) for a in takes[:j]]
    return any(b and b < a for a, b in pairs)


@given(states(), st.lists(filters, min_size=1, max_size=3))
def test_filters_divide_leaves_as_a_plain_loop_does(state, chosen):
    schema, rows = state.schema, list(state.schema.rows(state.leaves()))
    try:
        found = select(schema, tuple(chosen), state.leaves)
    except FilterError:
        found = None
    if found is None:
        implied = any(a.covers(b) for j, b in enumerate(chosen) for a in chosen[:j])
        assert swallowed(rows, chosen) or implied
        return
    assert not swallowed(rows, chosen)
    parts, rest = plain_select(rows, chosen)
    assert [list(at) for _, at in found.parts] == parts
    assert list(found.rest) == rest
    for part, at in found.parts:
        assert part is schema.pick(at)


@given(states(), st.lists(filters, min_size=1, max_size=3))
def test_a_division_is_the_same_when_it_is_asked_for_again(state, chosen):
    def ask() -> Any:
        try:
            return select(state.schema, tuple(chosen), state.leaves)
        except FilterError as e:
            return str(e)

    assert ask() == ask()


SWALLOWED = [
    (sortal.Variable, Param),
    (..., Param),
    (Param, Param),
    (..., ...),
    (Param, sortal.At("head.kernel")),
    ((Param, sortal.BatchStat), sortal.BatchStat, ...),
    (sortal.Under("head"), sortal.Under("head.mean")),
    (lambda path, leaf: path[0] == "head", sortal.At("head.mean")),
]


@pytest.mark.parametrize("literals", SWALLOWED)
def test_a_filter_that_an_earlier_one_swallows_is_an_error_that_shows_both(literals):
    """``split(m, Variable, Param)`` is a mistake, not an empty State."""
    first, second = map(sortal.to_filter, literals[-2:])
    if len(literals) == 3:
        first, second = map(sortal.to_filter, literals[:2])
    with pytest.raises(FilterError) as caught:
        select(SCHEMA, literals, lambda: [None] * len(SCHEMA))
    text = str(caught.value)
    assert f"filter 2, {second!r}, can take nothing" in text
    assert f"filter 1, {first!r}, comes first and takes all of it" in text
    order = f"Write the narrower one first: {second!r}, {first!r}."
    assert ("Write it once." if first == second else order) in text


@pytest.mark.parametrize(
    "literals",
    [
        (Param, ...),
        (sortal.Variable, ...),
        (Param, sortal.BatchStat, None, ...),
        ((Param, sortal.BatchStat), sortal.Variable, ...),
        (sortal.At("head.kernel"), Param, ...),
        (Param, "big", ...),
        (Param, sortal.Cache),
    ],
)
def test_narrow_before_wide_and_dots_last_are_fine(literals):
    if "big" in literals:
        with pytest.raises(FilterError, match="filter 2, 'big', can take nothing"):
            select(SCHEMA, literals, list)
    else:
        select(SCHEMA, literals, list)


def test_a_literal_that_is_no_filter_is_an_error_also_when_it_cannot_be_hashed():
    for literal in (1, {}, {"a": 1}):
        with pytest.raises(FilterError, match="is not a filter"):
            select(SCHEMA, (literal,), list)


# ---------------------------------------------------------- check_exhaustive
def leftover(*literals: Any) -> str:
    found = select(SCHEMA, literals, lambda: [None] * len(SCHEMA))
    with pytest.raises(FilterError) as caught:
        check_exhaustive(SCHEMA, literals, found.rest)
    return str(caught.value)


def test_leaves_left_over_are_all_listed_with_kinds_and_the_remedy():
    assert leftover(Param) == (
        "Non-exhaustive filters: Param leave 2 leaves over:\n"
        "  head.mean (BatchStat)\n"
        "  table (unlabelled array)\n"
        "Add a filter for them, or ... as the last one."
    )
    assert "Non-exhaustive filters: Variable leave 1 leaf over:\n  table" in leftover(
        sortal.Variable
    )
    check_exhaustive(SCHEMA, (...,), ())


@pytest.mark.parametrize("prefix", ["head", "encoder.kernel", "encoder"])
def test_a_string_that_is_a_path_and_no_tag_earns_a_hint_that_works(prefix):
    text = leftover(prefix)
    assert f"{prefix!r} is read as a tag; for the path write Under({prefix!r})." in text
    assert select(SCHEMA, (sortal.Under(prefix),), list).parts[0][1]


@pytest.mark.parametrize("tag", ["big", "hea", "kernel", "", "."])
def test_a_string_that_is_a_tag_or_no_path_earns_no_hint(tag):
    assert "is read as a tag" not in leftover(tag)


# ---------------------------------------------------------------------- diff
def difference(a: Any, b: Any) -> list[str]:
    return list(map(str, sortal.graphdef(a).diff(sortal.graphdef(b))))


def test_a_diff_names_the_path_and_both_sides():
    a = Box(layers=[Box(rate=0.1, w=Param(1), n=1)])
    b = Box(layers=[Box(rate=0.0, w=Param(1, tag="x"), m=1)])
    assert difference(a, b) == [
        "layers.0.n: 1 -> absent",
        "layers.0.rate: 0.1 -> 0.0",
        "layers.0.w: Param -> Param {'tag': 'x'}",
        "layers.0.m: absent -> 1",
    ]
    assert difference(a, a) == []


def test_a_diff_tells_look_alikes_apart():
    """Two classes of one name are told at length, two orders by what moved."""
    (kinds,) = difference(Box(w=BatchStat(1)), Box(w=sortal.BatchStat(1)))
    assert kinds == (
        "w: strategies.BatchStat Metadata({}) -> sortal.BatchStat Metadata({})"
    )
    old = Box(t={"a": 1, "b": 2, "c": 3, 4: 5})
    new = Box(t={"a": 1, "b": 2, 4: 5, "d": 0, "c": 3})
    assert difference(old, new) == [
        "t: dict with c, 4 in this order -> dict with 4, c in this order",
        "t.d: absent -> 0",
    ]
    assert difference(Box(t={1: 2}), Box(t={True: 2})) == [
        "t: dict with 1 in this order -> dict with True in this order"
    ]
    old, new = Box(b=1, a=2), Box(a=2, b=1)
    assert difference(old, new) == [
        "<root>: Box with b, a in this order -> Box with a, b in this order"
    ]


def test_a_diff_shows_sharing_by_path():
    w, inner = Param(1), Box()
    assert difference(Box(a=w, b=w), Box(a=Param(1), b=Param(1))) == [
        "b: alias of a -> Param"
    ]
    assert difference(Box(a=Box(), b=Box()), Box(a=inner, b=inner)) == [
        "b: Box -> alias of a"
    ]


def test_a_node_met_again_does_not_differ_because_others_were_added():
    a, b = Box(), Box(aa=Box())
    for model in (a, b):
        model.x = [Box()]
        model.y = model.x[0]
    assert difference(a, b) == ["aa: absent -> Box"]


def test_a_difference_is_found_at_any_depth():
    def deep(rate: float) -> Any:
        box = Box(rate=rate)
        for _ in range(2000):
            box = Box(a=box)
        return box

    (found,) = sortal.graphdef(deep(0.1)).diff(sortal.graphdef(deep(0.2)))
    assert found.path == ("a",) * 2000 + ("rate",)


def test_a_difference_is_data():
    (found,) = sortal.graphdef(Box(n=1)).diff(sortal.graphdef(Box()))
    assert found.path == ("n",)
    assert repr(found.old) == "1"
    assert found.new is ABSENT
    assert repr(ABSENT) == "absent"


def test_leaves_of_a_pytree_type_differ_by_its_tree_definition():
    def model(n: int) -> Any:
        return Box(p=jax.tree_util.Partial(max, *[jnp.ones(1)] * n))

    assert difference(model(1), model(1)) == []
    assert difference(model(1), model(2))


# --------------------------------------------------------------------- build
@given(models())
def test_building_gives_new_objects_around_the_given_leaves(model):
    found = sortal.graphdef(model)
    leaves = found.build_leaves(list(range(len(found.schema))))
    kinds = [type(x) if isinstance(x, sortal.Variable) else None for x in leaves]
    assert kinds == list(found.schema.kinds)
    built, nodes = found.build(leaves)
    assert built is nodes[0]
    assert len(nodes) == len(found.records)
    again, _ = found.build(leaves)
    assert again is not built


@given(variables())
def test_a_lone_variable_has_a_graphdef_too(variable):
    found = sortal.graphdef(variable)
    assert found.schema.paths == ((),)
    assert found.schema.kinds == (type(variable),)
    assert (
        found.build([variable]) == (variable, [])
        or found.build([variable])[0] is variable
    )


def test_a_lone_static_builds_itself():
    found = sortal.graphdef("text")
    assert found.build([]) == ("text", [])
    assert isinstance(found, GraphDef)


def test_building_leaves_takes_other_metadata():
    found = sortal.graphdef(Box(w=Param(1, tag="a")))
    (leaf,) = found.build_leaves([2], [EMPTY])
    assert leaf.get_metadata() == {}
    (leaf,) = found.build_leaves([2])
    assert leaf.get_metadata() == {"tag": "a"}


def test_frozen_dataclasses_inside_the_structure_differ_by_type_of_number():
    @dataclasses.dataclass(frozen=True)
    class Settings:
        scale: Any

    assert difference(Box(s=Settings(1)), Box(s=Settings(1.0)))
