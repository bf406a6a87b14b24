"""Policy: who answers for a leaf, who does not, and what a pipeline makes of it."""

from __future__ import annotations

import copy
import io
import pickle

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

import sortal as nnx
from sortal._engine.plan import bind
from sortal.errors import FilterError, PolicyError
from sortal.policy.policy import TrainedBy, answers
from sortal.policy.rule import UNSET

Rule, Policy = nnx.Rule, nnx.Policy


class Stat(nnx.Variable, axis=0, reduce="mean"):
    pass


class Narrow(Stat, reduce="max"):
    pass


class Mute(Stat, axis=UNSET):
    pass


SGD = optax.sgd(0.1)
ADAM = optax.adam(0.01)


def column(policy, name, model, default=UNSET):
    """Path, printed, to answer."""
    plan = bind(model)
    found = policy.column(name, plan.graphdef.schema, plan.view, default)
    paths = (".".join(map(str, path)) for path in plan.graphdef.schema.paths)
    return dict(zip(paths, found, strict=True))


# ------------------------------------------------------------------------ who answers
def test_a_row_comes_before_the_option_of_the_kind():
    model = {"a": Stat(1.0), "b": Stat(2.0)}
    found = column(Policy({nnx.At("a"): Rule(axis=3)}), "axis", model)
    assert found == {"a": 3, "b": 0}


def test_the_metadata_of_the_variable_comes_before_rows_and_kinds():
    model = {"a": Stat(1.0, axis=5), "b": Stat(2.0), "c": Stat(3.0, axis=None)}
    assert column(Policy({...: Rule(axis=3)}), "axis", model) == {
        "a": 5,
        "b": 3,
        "c": None,
    }
    assert column(Policy({}), "axis", model) == {"a": 5, "b": 0, "c": None}


def test_an_option_of_the_kind_answers_where_nothing_else_does():
    assert column(Policy({nnx.Param: Rule(axis=1)}), "axis", [Stat(1.0)]) == {"0": 0}


def test_a_subclass_has_its_own_option_before_that_of_its_base():
    model = {"base": Stat(1.0), "sub": Narrow(1.0)}
    assert column(Policy({}), "reduce", model) == {"base": "mean", "sub": "max"}
    assert column(Policy({}), "axis", model) == {"base": 0, "sub": 0}


def test_unset_takes_an_answer_back():
    model = {"kind": Mute(1.0), "own": Stat(1.0, axis=UNSET)}
    assert column(Policy({}), "axis", model, "none") == {"kind": "none", "own": 0}


def test_the_first_row_that_has_an_answer_counts_in_each_column_alone():
    policy = Policy(
        {
            nnx.At("head.**"): Rule(spec=P("head")),
            nnx.Param: Rule(axis=1),
            ...: Rule(axis=2, spec=P("rest")),
        }
    )
    model = {"head": {"w": nnx.Param(1.0)}, "w": nnx.Param(1.0), "s": nnx.Cache(1.0)}
    assert column(policy, "axis", model) == {"head.w": 1, "s": 2, "w": 1}
    assert column(policy, "spec", model) == {
        "head.w": P("head"),
        "s": P("rest"),
        "w": P("rest"),
    }


def test_a_wide_row_may_come_first_and_a_narrow_one_after_it():
    policy = Policy({...: Rule(axis=0), nnx.Param: Rule(axis=1, spec=P())})
    assert column(policy, "axis", [nnx.Param(1.0)]) == {"0": 0}
    assert column(policy, "spec", [nnx.Param(1.0)]) == {"0": P()}


def test_none_and_false_are_answers_and_not_the_lack_of_one():
    policy = Policy({nnx.Param: Rule(axis=None, donate=False), ...: Rule(axis=0)})
    assert column(policy, "axis", [nnx.Param(1.0)]) == {"0": None}
    assert column(policy, "donate", [nnx.Param(1.0)], True) == {"0": False}


def test_every_sort_of_filter_can_be_a_row():
    policy = Policy(
        {
            "dropout": Rule(axis=1),
            nnx.Shaped(ndim=2): Rule(axis=2),
            (nnx.Cache, nnx.BatchStat): Rule(axis=3),
            nnx.Param | nnx.OptState: Rule(axis=4),
            lambda path, leaf: path == ("late",): Rule(axis=5),
        }
    )
    model = {
        "key": nnx.RngKey(0, tag="dropout"),
        "late": nnx.Variable(0),
        "matrix": nnx.Param(jnp.ones((2, 2))),
        "seen": nnx.BatchStat(0.0),
        "vector": nnx.Param(jnp.ones(2)),
    }
    assert list(column(policy, "axis", model).values()) == [1, 5, 2, 3, 4]


def test_a_raw_array_is_answered_by_rows_alone():
    model = {"raw": jnp.ones(2), "w": nnx.Param(1.0)}
    assert column(Policy({...: Rule(axis=1)}), "axis", model) == {"raw": 1, "w": 1}
    rows = Policy({jax.Array: Rule(axis=2), nnx.Param: Rule(axis=0)})
    assert column(rows, "axis", model) == {"raw": 2, "w": 0}


def test_tied_weights_are_one_leaf_with_one_answer_at_their_first_path():
    w = nnx.Param(1.0)
    policy = Policy({nnx.At("tied"): Rule(axis=1), nnx.Param: Rule(axis=0)})
    assert column(policy, "axis", {"embed": w, "tied": w}) == {"embed": 0}


def test_answers_needs_no_policy():
    schema = bind({"a": Stat(1.0), "b": nnx.Param(1.0)}).graphdef.schema
    assert answers("axis", schema, default=None) == [0, None]
    assert answers("reduce", schema, None, None, None) == ["mean", None]
    policy = Policy({nnx.Param: Rule(axis=7)})
    assert answers("axis", schema, policy, lambda: [None, None]) == [0, 7]


def test_structural_columns_are_kept_with_the_schema_and_lists_are_not_shared():
    plan = bind({"w": nnx.Param(jnp.ones(2))})
    seen = []

    def view():
        seen.append(1)
        return plan.view()

    policy = Policy(
        {nnx.Param: Rule(axis=0), nnx.Shaped(ndim=1): Rule(donate=True), "t": Rule()}
    )
    schema = plan.graphdef.schema
    first = policy.column("axis", schema, view)
    first[0] = "spoiled"
    assert policy.column("axis", schema, view) == [0]
    assert not seen
    for _ in range(2):
        assert policy.column("donate", schema, view) == [True]
    assert len(seen) == 2


# -------------------------------------------------------------------- who does not
def test_all_leaves_without_an_answer_are_listed_with_what_to_write():
    model = {
        "a": nnx.Param(1.0),
        "b": [nnx.Cache(1.0)],
        "c": Stat(1.0),
        "d": np.ones(1),
    }
    with pytest.raises(PolicyError) as caught:
        column(Policy({nnx.At("a"): Rule(axis=0)}), "axis", model)
    assert str(caught.value) == (
        "nothing says what 'axis' is of 2 leaves:\n"
        "  b.0 (Cache)\n"
        "  d (unlabelled array)\n"
        "Write a row of the Policy, such as Cache: Rule(axis=0); or an option of the "
        "kind, class Cache(Variable, axis=0); or metadata of the Variable, "
        "Cache(x, axis=0). Unlabelled arrays are answered by rows alone."
    )


def test_only_a_row_is_proposed_where_only_raw_arrays_have_no_answer():
    with pytest.raises(PolicyError) as caught:
        column(Policy({}), "spec", {"d": np.ones(1)})
    assert str(caught.value) == (
        "nothing says what 'spec' is of 1 leaf:\n  d (unlabelled array)\n"
        "Write a row of the Policy, such as ...: Rule(spec=PartitionSpec('data')). "
        "Unlabelled arrays are answered by rows alone."
    )


def test_a_column_that_is_none_is_refused():
    with pytest.raises(PolicyError, match="'axes' is no column; the columns are"):
        column(Policy({}), "axes", [])


def test_bad_answers_of_kinds_and_variables_are_refused_when_read():
    class Wrong(nnx.Variable, reduce="avg", axis=0):
        pass

    model = {"a": Wrong(1.0), "b": Stat(1.0, reduce=3), "c": Wrong(1.0, reduce="sum")}
    with pytest.raises(PolicyError) as caught:
        column(Policy({}), "reduce", model)
    lines = str(caught.value).splitlines()
    assert lines[0] == "kinds and Variables have answers that no pipeline understands:"
    assert lines[1].startswith("  a (Wrong): reduce='avg', where 'mean', 'sum', ")
    assert lines[1].endswith("(from its kind)")
    assert lines[2].startswith("  b (Stat): reduce=3, where 'mean', 'sum', ")
    assert lines[2].endswith("(from its metadata)")
    assert lines[3:] == [
        "Change the class keyword of the kind, or the metadata of the Variable."
    ]
    assert set(column(Policy({}), "axis", model).values()) == {0}


def test_a_row_that_looks_at_values_needs_values():
    schema = bind([nnx.Param(1.0)]).graphdef.schema
    policy = Policy({nnx.Shaped(ndim=0): Rule(axis=0), nnx.Param: Rule(spec=P())})
    with pytest.raises(PolicyError, match="'axis' has rows that look at values"):
        policy.column("axis", schema, None)
    assert policy.column("spec", schema, None) == [P()]


# ---------------------------------------------------------------------- as an object
def test_what_is_no_policy_is_refused():
    with pytest.raises(PolicyError, match=r"takes a mapping.*found a list"):
        Policy([(nnx.Param, Rule())])  # type: ignore[arg-type]
    with pytest.raises(PolicyError) as caught:
        Policy({nnx.Param: 0, nnx.Cache: Rule(), nnx.At("x"): SGD})  # type: ignore[dict-item]
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("each value of a Policy is a Rule, such as Rule(axis=0)")
    assert [line.split(":")[0] for line in lines[1:]] == ["  Param", "  At('x')"]
    with pytest.raises(FilterError, match="is not a filter"):
        Policy({3: Rule()})
    with pytest.raises(TypeError):
        Policy({}) | 3  # type: ignore[operator]
    with pytest.raises(TypeError):
        3 | Policy({})  # type: ignore[operator]


def test_joined_policies_have_the_rows_of_both_and_the_left_ones_first():
    mine = Policy({nnx.Param: Rule(axis=1)})
    base = Policy({nnx.Param: Rule(axis=2, spec=P("base"))})
    for joined in (mine | base, mine | {nnx.Param: Rule(axis=2, spec=P("base"))}):
        assert column(joined, "axis", [nnx.Param(1.0)]) == {"0": 1}
        assert column(joined, "spec", [nnx.Param(1.0)]) == {"0": P("base")}
    other_way = {nnx.Param: Rule(axis=9)} | mine
    assert column(other_way, "axis", [nnx.Param(1.0)]) == {"0": 9}
    assert Policy(mine) == mine
    assert len((mine | mine).rows) == 2


def test_a_policy_never_changes_and_is_equal_by_its_rows():
    rows = {nnx.Param: Rule(optimizer=SGD), ...: Rule(axis=0)}
    policy = Policy(rows)
    assert policy == Policy(rows)
    assert hash(policy) == hash(Policy(rows))
    assert policy != Policy({...: Rule(axis=0), nnx.Param: Rule(optimizer=SGD)})
    assert policy != rows
    with pytest.raises(PolicyError, match="cannot set 'rows': a Policy never changes"):
        policy.rows = ()  # type: ignore[misc]
    rows[nnx.Cache] = Rule(axis=1)
    assert len(policy.rows) == 2


def test_a_policy_can_be_copied_and_pickled():
    policy = Policy({nnx.Param: Rule(axis=0), nnx.At("x"): Rule(spec=P("d"))})
    for same in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert same == policy
        assert hash(same) == hash(policy)
        assert same.rows[1][1].axis is UNSET


def test_a_policy_prints_as_it_was_written():
    policy = Policy(
        {
            nnx.Param: Rule(optimizer=optax.set_to_zero(), spec=P(None, "model")),
            nnx.At("head.**"): Rule(axis=None),
            ...: Rule(checkpoint="keep"),
        }
    )
    assert repr(policy) == (
        "Policy({Param: Rule(spec=P(None, 'model'), "
        "optimizer=<GradientTransformation>), "
        "At('head.**'): Rule(axis=None), ...: Rule(checkpoint='keep')})"
    )


# ------------------------------------------------------------------------- the table
class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(params=0, dropout=1)
        self.embed = nnx.Embed(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)
        self.tied = self.embed.embedding
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.raw = jnp.zeros(2)


POLICY = Policy(
    {
        nnx.At("head.**"): Rule(optimizer=SGD),
        nnx.Param: Rule(optimizer=ADAM, axis=None),
        nnx.BatchStat: Rule(axis=0, reduce="mean", spec=P("data")),
        nnx.Cache: Rule(checkpoint="drop"),
        nnx.At("tied"): Rule(spec=P()),
        nnx.At("head.kernel"): Rule(axis=1, spec=P("model")),
        nnx.RngState: Rule(checkpoint="keep"),
        nnx.At("norm.**"): Rule(),
    }
)
TABLE = """\
Policy
#  kind              leaves  optimizer  axis  reduce  spec        checkpoint
----------------------------------------------------------------------------
1  RngCount               1  -          -     -       -           keep
2  RngKey                 1  -          -     -       -           keep
3  Param                  3  tx 1       None  -       -           -
4  Param                  1  tx 2       None  -       -           -
5  Param                  1  tx 2       None  -       P('model')  -
6  BatchStat              2  -          0     mean    P('data')   -
7  unlabelled array       1  -          -     -       -           -

! Nothing says what 'axis' is of drop.rngs.count (RngCount), drop.rngs.key
  (RngKey), raw (unlabelled array).
! Nothing says what 'spec' is of drop.rngs.count (RngCount), drop.rngs.key
  (RngKey), embed.embedding (Param), head.bias (Param), norm.bias (Param),
  norm.scale (Param), raw (unlabelled array).
! Row 4, Cache, takes no leaf.
! Row 5, At('tied'), takes no leaf. A shared leaf has its first path: tied is
  embed.embedding.
! Row 6, At('head.kernel'), decides no axis: earlier rows or metadata come first
  for all its leaves.
! Row 8, At('norm.**'), has no answer.

Leaves
#  paths
-------------------------------------------------
1  drop.rngs.count
2  drop.rngs.key
3  embed.embedding = tied, norm.bias, norm.scale
4  head.bias
5  head.kernel
6  norm.mean, norm.var
7  raw

Optimizers
name  given by
-------------------
tx 1  Param
tx 2  At('head.**')"""


def rules_out(text):
    """The lines without those of dashes, whose length is a matter of columns."""
    return [line for line in text.splitlines() if set(line) != {"-"}]


def test_the_table_says_what_happens_to_every_leaf_before_anything_runs():
    assert rules_out(str(POLICY.table(Net()))) == rules_out(TABLE)


def test_the_table_carries_its_facts_as_data():
    found = POLICY.table(Net())
    assert found.columns == ("optimizer", "axis", "reduce", "spec", "checkpoint")
    row = found.rows[5]
    assert row.kind is nnx.BatchStat
    assert row.paths == (("norm", "mean"), ("norm", "var"))
    assert row.answers == {"axis": 0, "reduce": "mean", "spec": P("data")}
    assert found.unanswered["axis"] == (
        ("drop", "rngs", "count"),
        ("drop", "rngs", "key"),
        ("raw",),
    )
    assert set(found.unanswered) == {"axis", "spec"}
    assert found.idle == {4: ("checkpoint",), 5: ("spec",), 6: ("axis",), 8: ()}


def test_params_alone_need_an_optimizer_and_only_where_they_are_trainable():
    model = {
        "a": nnx.Param(1.0),
        "b": nnx.Param(1.0, trainable=False),
        "c": nnx.Param(1.0, optimizer=None),
        "d": nnx.Param(1.0, optimizer=SGD),
        "e": nnx.BatchStat(1.0),
    }
    found = Policy({}).table(model)
    assert found.unanswered == {"optimizer": (("a",),)}
    assert found.notes == ("Nothing says what 'optimizer' is of a (Param).",)
    shown = [line.split()[3:] for line in str(found).splitlines()[3:8]]
    assert shown == [
        ["-", "-"],
        ["frozen", "False"],
        ["frozen", "-"],
        ["tx", "1", "-"],
        ["-", "-"],
    ]


def test_flax_params_need_an_optimizer_as_well():
    model = {"a": flax.nnx.Param(jnp.ones(2)), "b": flax.nnx.BatchStat(jnp.ones(2))}
    found = Policy({nnx.BatchStat: Rule(optimizer=SGD)}).table(model)
    assert found.unanswered == {"optimizer": (("a",),)}


def test_the_table_says_who_gives_each_transformation():
    class Own(nnx.Param, optimizer=ADAM): ...

    model = {
        "a": nnx.Param(1.0),
        "b": nnx.Param(1.0, optimizer=SGD),
        "c": Own(1.0),
        "d": nnx.BatchStat(1.0),
    }
    rules = {nnx.At("a"): Rule(optimizer=SGD), nnx.At("d"): Rule(optimizer=SGD)}
    found = Policy(rules).table(model)
    assert found.optimizers == {
        "tx 1": ("At('a')", "metadata", "At('d')"),
        "tx 2": ("kind",),
    }


def test_two_kinds_of_one_name_are_two_rows_with_their_modules():
    mine = type("Param", (nnx.Variable,), {"__module__": "my.kinds"})
    found = Policy({...: Rule(axis=0)}).table([nnx.Param(1.0), mine(1.0)])
    labels = [row.label for row in found.rows]
    assert labels == ["sortal.Param", "my.kinds.Param"]


def test_long_lists_of_leaves_are_cut_in_text_and_whole_as_data():
    model = [nnx.Param(1.0) for _ in range(40)]
    found = Policy({nnx.At("0"): Rule(spec=P())}).table(model)
    assert "11, 12, and 27 more" in str(found)
    assert "12 (Param), and 27 more." in found.notes[0]
    assert len(found.unanswered["spec"]) == 39


def test_a_table_prints_in_a_notebook_in_rich_and_without_leaves():
    found = POLICY.table(Net())
    assert "unlabelled array" in found._repr_html_()
    file = io.StringIO()
    Console(file=file, width=200).print(found)
    assert "embed.embedding = tied" in file.getvalue()
    empty = Policy({nnx.Param: Rule(axis=0)}).table({})
    assert empty.rows == empty.columns == ()
    assert "! Row 1, Param, takes no leaf." in str(empty)


def test_a_state_has_a_table_too():
    found = POLICY.table(nnx.state(Net(), nnx.BatchStat))
    assert [row.answers["axis"] for row in found.rows] == [0]


# ------------------------------------------------------------------ optimizer groups
def test_groups_are_the_distinct_transformations_and_their_leaves():
    model = Net()
    groups = POLICY.optimizer_groups(model)
    assert list(groups.values()) == [ADAM, SGD]
    taken = [nnx.state(model, f).paths() for f in groups]
    assert taken == [
        (("embed", "embedding"), ("norm", "bias"), ("norm", "scale")),
        (("head", "bias"), ("head", "kernel")),
    ]
    assert list(map(repr, groups)) == [
        "TrainedBy(Param)",
        "TrainedBy(At('head.**'))",
    ]


def test_two_rows_with_one_transformation_are_one_group():
    policy = Policy(
        {nnx.At("a"): Rule(optimizer=SGD), nnx.At("b"): Rule(optimizer=SGD)}
    )
    groups = policy.optimizer_groups({"a": nnx.Param(1.0), "b": nnx.Param(1.0)})
    assert list(groups.values()) == [SGD]


def test_wrt_narrows_what_needs_an_answer_and_what_is_trained():
    model = {"a": nnx.Param(1.0), "b": nnx.Param(1.0), "c": nnx.Cache(1.0)}
    policy = Policy({(nnx.At("a"), nnx.Cache): Rule(optimizer=SGD)})
    (only,) = policy.optimizer_groups(model, nnx.At("a"))
    assert nnx.state(model, only).paths() == (("a",),)
    with pytest.raises(PolicyError, match=r"'optimizer' is of 1 leaf:\n  b \(Param\)"):
        policy.optimizer_groups(model)


def test_a_transformation_that_trains_nothing_is_refused():
    policy = Policy(
        {nnx.Param: Rule(optimizer=ADAM), nnx.At("head.**"): Rule(optimizer=SGD)}
    )
    with pytest.raises(PolicyError) as caught:
        policy.optimizer_groups({"head": {"w": nnx.Param(1.0)}})
    assert str(caught.value) == (
        "rows with an optimizer train no leaf:\n"
        "  row 2, At('head.**')\n"
        "In each column the first row that takes a leaf counts: write the narrower one "
        "first, or mend its filter. The leaves are:\n"
        "  head.w (Param)"
    )


def test_a_transformation_whose_leaves_are_all_frozen_makes_no_group():
    model = {"a": nnx.Param(1.0, trainable=False), "b": nnx.Param(1.0)}
    policy = Policy(
        {nnx.At("a"): Rule(optimizer=ADAM), nnx.At("b"): Rule(optimizer=SGD)}
    )
    assert list(policy.optimizer_groups(model).values()) == [SGD]


def test_a_model_that_is_wholly_frozen_is_refused():
    with pytest.raises(PolicyError) as caught:
        Policy({...: Rule(trainable=False)}).optimizer_groups([nnx.Param(1.0)])
    assert str(caught.value) == (
        "the Policy trains none of the 1 leaves of the model; each is frozen or has no "
        "optimizer:\n  0 (Param)\n"
        "Write a row such as Param: Rule(optimizer=optax.adam(1e-3))."
    )


def test_trained_by_looks_at_values_where_the_rows_do():
    structural = TrainedBy(Policy({nnx.Param: Rule(optimizer=SGD)}), SGD)
    assert structural.structural
    rows = {nnx.Shaped(ndim=1): Rule(trainable=False), nnx.Param: Rule(optimizer=SGD)}
    by_value = TrainedBy(Policy(rows), SGD)
    assert not by_value.structural
    assert by_value(("w",), nnx.Param(jnp.ones((2, 2))))
    assert not by_value(("w",), nnx.Param(jnp.ones(2)))
