"""Names of collections, and the kinds that they stand for."""

from __future__ import annotations

import pytest

from sortal import nnx
from sortal._engine import kind_names
from sortal.errors import ArgumentError


@pytest.fixture(autouse=True)
def _own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind_names, "_kinds", dict(kind_names._kinds))


def test_a_name_is_given_once_unless_it_may_be_overwritten() -> None:
    class Table(nnx.Variable):
        pass

    assert nnx.register_variable_name("shelves", Table) is Table
    assert nnx.register_variable_name("shelves", Table) is Table
    with pytest.raises(
        ArgumentError, match="the name 'shelves' is that of the kind Tab"
    ):
        nnx.register_variable_name("shelves", nnx.Param)
    nnx.register_variable_name("shelves", nnx.Cache, overwrite=True)
    assert nnx.variable_type_from_name("shelves") is nnx.Cache


def test_an_unknown_name_is_refused_or_makes_a_kind() -> None:
    with pytest.raises(
        ArgumentError, match=r"no kind has the name 'news'; there are par"
    ):
        nnx.variable_type_from_name("news")
    made = nnx.variable_type_from_name("news", base=nnx.Cache, allow_register=True)
    assert issubclass(made, nnx.Cache)
    assert nnx.variable_type_from_name("news") is made
    assert nnx.variable_name_from_type(made) == "news"


def test_an_unknown_kind_is_refused_or_has_the_name_of_its_class() -> None:
    class News(nnx.Variable):
        pass

    with pytest.raises(
        ArgumentError, match="the kind News has no name; write register"
    ):
        nnx.variable_name_from_type(News)
    assert nnx.variable_name_from_type(News, allow_register=True) == "News"
    assert nnx.variable_type_from_name("News") is News


def test_sow_and_perturb_take_the_name_of_a_kind() -> None:
    model = nnx.Module()
    model.sow("intermediates", "y", 1)
    model.perturb("z", 1.0, "perturbations")
    assert type(model.y) is nnx.Intermediate  # type: ignore[attr-defined]
    assert type(model.z) is nnx.Perturbation  # type: ignore[attr-defined]
