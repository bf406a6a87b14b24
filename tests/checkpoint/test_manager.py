"""Checkpoints: which steps stay, which is the best, and who may write."""

from __future__ import annotations

import gc
import math

import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sortal as nnx
from sortal.errors import ArgumentError, NoCheckpointError, SaveError, WriterError


def model(x: float = 0.0):
    return {"w": nnx.Param(jnp.full(2, float(x)))}


def test_the_newest_the_regular_and_the_best_stay(tmp_path):
    kept = nnx.Checkpoints(tmp_path, keep=2, keep_every=4, best="accuracy")
    scores = [0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6, math.nan]
    for step, score in enumerate(scores):
        kept.save(model(step), step=step, metrics={"accuracy": score, "loss": 1})
    assert kept.steps() == (0, 2, 4, 6, 7)
    assert (kept.latest(), kept.best()) == (7, 2)
    into = model()
    found = kept.restore(into, step="best")
    assert found.step == 2
    assert found.metrics == {"accuracy": 0.9, "loss": 1.0}
    assert into["w"].value[0] == 2
    assert kept.restore(into).step == 7


@settings(max_examples=10, suppress_health_check=[*HealthCheck], deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(1, 5)),
)
def test_what_stays_is_what_the_rules_say(tmp_path_factory, saved, keep, every):
    """A model of the rules, told in one line, kept beside the files."""
    with nnx.Checkpoints(
        tmp_path_factory.mktemp("k"), keep=keep, keep_every=every
    ) as kept:
        due: list[int] = []
        for step in saved:
            kept.save(model(step), step=step)
            due = sorted({*due, step})
            due = [n for n in due if n in due[-keep:] or (every and n % every == 0)]
            assert kept.steps() == tuple(due)


def test_less_may_be_better(tmp_path):
    with nnx.Checkpoints(tmp_path, keep=1, best="loss", mode="min") as kept:
        for step, loss in enumerate([3.0, 1.0, 2.0]):
            kept.save(model(), step=step, metrics={"loss": loss}, wait=False)
        kept.restore(model())
        assert kept.steps() == (1, 2)


def test_a_save_without_the_metric_of_the_best_is_refused(tmp_path):
    kept = nnx.Checkpoints(tmp_path, best="accuracy")
    with pytest.raises(SaveError, match=r"'accuracy', which is not among .*\['loss'\]"):
        kept.save(model(), step=0, metrics={"loss": 1.0})
    with pytest.raises(NoCheckpointError, match="has the metric 'accuracy'"):
        kept.restore(model(), step="best")


def test_numbers_that_keep_nothing_are_refused(tmp_path):
    for wrong in ({"keep": 0}, {"keep_every": -1}, {"keep": 1.5}, {"mode": "most"}):
        with pytest.raises(
            ArgumentError, match="keep and keep_every are numbers from 1"
        ):
            nnx.Checkpoints(tmp_path, **wrong)


def test_a_second_writer_is_refused_until_the_first_has_closed(tmp_path):
    first, second = nnx.Checkpoints(tmp_path), nnx.Checkpoints(tmp_path)
    first.save(model(), step=0)
    first.save(model(), step=1)
    with pytest.raises(WriterError):
        second.save(model(), step=2)
    assert second.restore(model()).step == 1
    first.close()
    second.save(model(), step=2)
    with pytest.raises(WriterError):
        first.delete(2)
    del second
    gc.collect()
    first.delete("latest")
    assert first.steps() == (0, 1)


def test_a_step_that_is_not_there_cannot_be_deleted(tmp_path):
    kept = nnx.Checkpoints(tmp_path)
    with pytest.raises(NoCheckpointError, match="no checkpoint in"):
        kept.delete("latest")
    kept.save(model(), step=1)
    with pytest.raises(NoCheckpointError, match="no step 3 in"):
        kept.delete(3)
    assert kept.latest() == 1


def test_the_policy_of_the_manager_holds_for_saving_and_restoring(tmp_path):
    policy = nnx.Policy({nnx.Cache: nnx.Rule(checkpoint="drop")})
    kept = nnx.Checkpoints(tmp_path, policy=policy)
    root = {"w": nnx.Param(jnp.ones(1)), "c": nnx.Cache(jnp.ones(1))}
    kept.save(root, step=0, only=nnx.Not(nnx.RngState))
    root["c"].value = root["w"].value = jnp.zeros(1)
    kept.restore(root)
    assert root["w"].value == 1
    assert root["c"].value == 0
