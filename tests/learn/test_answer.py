"""What a check is told of the learner's code: names, errors, results as text."""

from __future__ import annotations

import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

import sortal
from sortal.learn.answer import Answer, Wrong, cut, expect, kind_of, same, shown, values


def answer(source: str) -> Answer:
    return Answer(source, "file.py")


def refused(source: str) -> Wrong:
    with pytest.raises(Wrong) as caught:
        answer(source)
    return caught.value


def test_the_library_is_the_one_that_was_imported() -> None:
    assert answer("import sortal as nnx").nnx is sortal
    assert answer("from sortal import nnx").nnx is sortal.nnx
    assert answer("from flax import nnx").nnx is flax_nnx
    assert answer("import sortal\nfrom flax import nnx").nnx is flax_nnx
    assert answer("import sortal").nnx is sortal
    assert answer("x = 1").nnx is sortal


def test_code_that_cannot_be_compiled_is_shown_with_its_line() -> None:
    error = refused("x = 1\ny = = 2\n").error
    assert "file.py" in error
    assert "line 2" in error
    assert "invalid syntax" in error


def test_an_exception_shows_the_lines_of_the_learner_only() -> None:
    wrong = refused(
        "import jax.numpy as jnp\ndef f(x):\n    return jnp.zeros(x)\nf('a')\n"
    )
    assert re.findall(r"line (\d+)", wrong.error) == ["4", "3"]
    assert "return jnp.zeros(x)" in wrong.error
    assert "TypeError" in wrong.error
    assert "site-packages" not in wrong.error
    assert "sortal" not in wrong.error


def test_the_end_of_the_program_in_an_answer_is_an_exception_of_it() -> None:
    assert "SystemExit: 3" in refused("import sys\nsys.exit(3)").error


def test_flax_that_is_not_installed_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flax", None)
    error = refused("from flax import nnx").error
    assert error.endswith(
        "Flax is not installed here. `import sortal as nnx` works as well."
    )


def test_a_name_that_flax_lacks_is_in_the_text() -> None:
    error = refused("from flax import nnx\nnnx.At('a')").error
    assert error.endswith("The text of the problem says what to write with Flax.")


def test_a_name_that_is_not_there_is_said() -> None:
    with pytest.raises(Wrong, match="The file defines no `g`"):
        answer("f = 1").get("g")


def test_a_kind_has_to_be_one_and_of_the_right_base() -> None:
    source = "import sortal as nnx\nclass A(nnx.Param): pass\nclass B: pass\n"
    found = answer(source)
    assert issubclass(found.kind("A", {}), sortal.Param)
    with pytest.raises(Wrong, match="`B` is not a class derived from"):
        found.kind("B", {})
    with pytest.raises(Wrong) as caught:
        found.kind("A", {"Param": "trained"})
    assert caught.value.pitfall == "trained"


def test_a_call_that_raises_is_told_by_its_message() -> None:
    found = answer("def f(x): raise ValueError(f'no {x}')")
    signs = {"nothing": "first", "no 3": "second"}
    with pytest.raises(Wrong) as caught:
        found.run("x=3", found.get("f"), 3, pitfalls=signs)
    assert (caught.value.pitfall, caught.value.case) == ("second", "x=3")
    assert "ValueError: no 3" in caught.value.error


def test_calls_are_found_by_their_last_name() -> None:
    found = answer("import os\ndef f(): os.path.join('a'); len([])")
    assert found.called() == {"join", "len"}


def test_results_are_compared_by_structure_shape_and_value() -> None:
    assert same(jnp.ones(2), np.ones(2))
    assert same({"a": 1.0}, {"a": 1.0 + 1e-6})
    assert not same(jnp.ones(2), jnp.ones((2, 1)))
    assert not same({"a": 1.0}, {"b": 1.0})
    assert not same([1.0], 1.0)
    assert not same(None, 1.0)
    assert not same("a", 1.0)
    assert same(np.array([np.nan]), np.array([np.nan]))


def test_a_difference_names_the_first_pitfall_with_that_result() -> None:
    pitfalls = [("a", 2.0), ("b", 3.0), ("c", 3.0)]
    expect(1.0, 1.0, "case", pitfalls)
    with pytest.raises(Wrong) as caught:
        expect(3.0, 1.0, "case", pitfalls, "It differs.")
    wrong = caught.value
    assert (wrong.pitfall, wrong.message, wrong.case) == ("b", "It differs.", "case")
    assert (wrong.expected, wrong.found) == ("1.0", "3.0")


def test_a_function_without_a_result_is_said_to_be() -> None:
    with pytest.raises(Wrong, match=r"^Nothing was returned\.$"):
        expect(None, 1.0, "case", what="It differs.")


def test_of_dicts_that_differ_the_parts_that_differ_are_shown() -> None:
    with pytest.raises(Wrong) as caught:
        expect({"a": 1.0, "b": 3.0}, {"a": 1.0, "b": 2.0}, "case")
    assert (caught.value.expected, caught.value.found) == ("b: 2.0", "b: 3.0")
    with pytest.raises(Wrong) as caught:
        expect({"a": 1.0}, {"a": 1.0, "b": 2.0}, "case")
    assert caught.value.expected == "a: 1.0\nb: 2.0"


def test_a_kind_is_named_as_one_says_it() -> None:
    assert kind_of(jnp.ones(1)) == "array"
    assert kind_of(sortal.Param(jnp.ones(1))) == "Param"


def test_results_are_shown_with_dtype_and_shape_and_cut() -> None:
    assert shown(jnp.array([1.0, 2.0])) == "[1. 2.]  float32[2]"
    assert shown(None) == "None"
    assert shown({"a": 1.0, "b": None}) == "a: 1.0\nb: None"
    assert cut("abcdef", 4) == "abcd ... (2 more characters)"
    assert len(shown("x" * 9999)) < 700


@pytest.mark.parametrize("nnx", [sortal, flax_nnx])
def test_values_are_those_of_either_library_as_they_are_now(nnx) -> None:
    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    before = values(model, nnx.BatchStat)
    model.mean[...] = jnp.ones(2)
    assert sorted(before) == ["mean", "var"]
    assert before["mean"].tolist() == [0.0, 0.0]
    assert values(model)["mean"].tolist() == [1.0, 1.0]
    assert "params.key" in values(nnx.Rngs(0)) or "default.key" in values(nnx.Rngs(0))
