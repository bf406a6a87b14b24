"""view: other settings around the same Variables."""

from __future__ import annotations

import pytest

from sortal import nnx
from sortal.errors import ArgumentError


def model() -> nnx.Sequential:
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))


def test_a_view_shares_variables_and_no_settings() -> None:
    old = model()
    new = nnx.view(old, only=nnx.Dropout, deterministic=True)
    assert new.layers[0].deterministic
    assert not old.layers[0].deterministic
    new.layers[1].mean[...] += 1
    assert old.layers[1].mean.value.tolist() == [1, 1]


def test_a_setting_that_no_module_has_is_refused_or_left_out() -> None:
    with pytest.raises(ArgumentError, match=r"\['use_running_average'\]. None"):
        nnx.view(model(), only=nnx.Dropout, use_running_average=True)
    nnx.view(model(), raise_if_not_found=False, nothing=1)


def test_a_clone_may_share_variables() -> None:
    old = model()
    assert nnx.clone(old, variables=False).layers[1].mean is old.layers[1].mean
    assert nnx.clone(old).layers[1].mean is not old.layers[1].mean
