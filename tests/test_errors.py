"""What the exceptions promise to those who catch and read them."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

import sortal
from sortal import errors, nnx

CLASSES = [
    thing
    for _, thing in inspect.getmembers(errors, inspect.isclass)
    if thing.__module__ == "sortal.errors"
]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_is_a_sortal_error_and_survives_pickling(cls):
    error = cls("layers.0.kernel (Param)\n  is lost")
    assert isinstance(error, sortal.SortalError)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)  # TraceError is Flax's too where it is loaded
    assert str(copy) == str(error)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_prints_its_text_as_it_is(cls):
    """Key errors too, which Python prints as the repr of their argument."""
    assert str(cls("one\ntwo")) == "one\ntwo"


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.ArgumentError, ValueError),
        (errors.ArgumentError, TypeError),
        (errors.VariableError, TypeError),
        (errors.VariableError, ValueError),
        (errors.InPlaceError, NotImplementedError),
        (errors.VariableAttributeError, AttributeError),
        (errors.VariableAttributeError, KeyError),
        (errors.TraceError, ValueError),
        (errors.StructureError, ValueError),
        (errors.StructureError, TypeError),
        (errors.FilterError, ValueError),
        (errors.MergeError, ValueError),
        (errors.UpdateError, ValueError),
        (errors.PathError, KeyError),
        (errors.PathError, ValueError),
        (errors.PathAttributeError, AttributeError),
        (errors.PathAttributeError, KeyError),
        (errors.GradientError, TypeError),
        (errors.OptimizerError, ValueError),
        (errors.PolicyError, ValueError),
        (errors.RngError, ValueError),
        (errors.RngAttributeError, AttributeError),
        (errors.RngAttributeError, KeyError),
    ],
)
def test_each_error_is_also_the_builtin_that_plain_code_catches(cls, builtin):
    assert issubclass(cls, builtin)


def test_a_path_error_without_arguments_prints_nothing():
    assert str(errors.PathError()) == ""


def test_the_trace_error_has_the_name_that_nnx_code_catches():
    assert nnx.TraceContextError is sortal.TraceError


def test_listing_indents_one_row_a_line():
    assert errors.listing(["a", "b"]) == "  a\n  b"
    assert errors.listing([]) == ""


def test_listing_shows_the_first_two_hundred_rows_and_counts_the_others():
    text = errors.listing(str(i) for i in range(205)).splitlines()
    assert text[:200] == [f"  {i}" for i in range(200)]
    assert text[200:] == ["  ... and 5 more"]
    assert len(errors.listing(map(str, range(200))).splitlines()) == 200


def test_no_source_file_raises_a_bare_builtin_exception():
    """All but ``NotImplementedError`` and what Python's own protocols ask for."""
    from pathlib import Path

    allowed = {"NotImplementedError", "AttributeError(name)", "foreign_write"}
    engine = Path(errors.__file__).parent / "_engine"
    for file in [*engine.glob("*.py"), engine.parent / "functional.py"]:
        raised = re.findall(r"raise (\w+(?:\(name\))?)", file.read_text())
        assert set(raised) - allowed <= {c.__name__ for c in CLASSES}, file.name
