"""What inspection returns prints as tables: in a terminal, a pipe or a notebook."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import sortal as nnx
from sortal.inspect import changes, size


class BatchStat(nnx.Variable):
    pass


@pytest.fixture
def model():
    shared = nnx.Param(jnp.ones((300, 40)))
    return {
        "a_rather_long_name": {"that_goes_on": [{"and_on_and_on_and_on": shared}]},
        "abstract": nnx.Cache(jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)),
        "bn": nnx.BatchStat(jnp.zeros(3)),
        "mine": BatchStat(jnp.zeros(3)),
        "raw": np.zeros((3, 4), np.float32),
        "rngs": nnx.Rngs(0),
        "tied": shared,
        "tree": nnx.Intermediate((jnp.ones(2), {"a": jnp.zeros(3), "b": 1})),
        "odd [bold]key[/bold]": nnx.Variable(jnp.array(1)),
    }


def reports(model):
    before = nnx.state(model)
    model["bn"][...] += 1
    return {
        "explain": nnx.explain(model, nnx.Param, nnx.BatchStat, "bn"),
        "explain without filters": nnx.explain(model),
        "tabulate": nnx.tabulate(model),
        "changes": changes(before, model),
    }


def test_every_line_fits_in_80_columns_without_colour(model):
    for name, report in reports(model).items():
        text = str(report)
        assert repr(report) == text
        assert "\x1b" not in text, name
        assert max(map(len, text.splitlines())) <= 80, name
        assert text.isascii(), name


def test_the_text_does_not_depend_on_the_terminal(model, monkeypatch):
    before = str(nnx.tabulate(model))
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    assert str(nnx.tabulate(model)) == before


def test_keys_abstract_leaves_pytrees_raw_arrays_and_aliases_are_all_shown(model):
    text = str(nnx.tabulate(model))
    for part in (
        "key<fry>[]",
        "bfloat16[2,3], abstract",
        "tuple of float32[2]",
        "unlabelled array",
        "= tied",
        "48.0 kB",
        "12,000",
    ):
        assert part in text


def test_a_key_that_looks_like_markup_is_printed_as_it_is(model):
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(nnx.tabulate(model))
    assert "['odd [bold]key[/bold]']" in console.file.getvalue()


def test_explain_prints_filters_leaves_and_notes(model):
    lines = str(nnx.explain(model, nnx.Param, nnx.Variable, nnx.Cache)).splitlines()
    found = [" ".join(line.split()) for line in lines]
    assert found[3:8] == [
        "1 Param 1 12,000",
        "2 Variable 7 of 8 21",
        "3 Cache 0 of 1 0",
        "left over 1 12",
        "all leaves 9 12,033",
    ]
    notes = [line for line in lines if line.startswith("!")]
    assert notes[0].startswith("! Filter 3, Cache, takes nothing: all 1 of its leaves")


def test_an_explanation_carries_its_facts_as_data(model):
    found = nnx.explain(model, nnx.Param)
    assert [row.leaf.path for row in found.rows if row.by == 1] == [
        ("a_rather_long_name", "that_goes_on", 0, "and_on_and_on_and_on")
    ]
    assert found.filters[0].takes == 1
    assert len(found.left_over) == len(found.rows) - 1
    assert nnx.explain(model).left_over == ()
    assert any("called BatchStat" in note for note in found.notes)


def test_changes_list_what_changed_and_how_much_more(model):
    many = {f"v{i}": nnx.Param(jnp.array(0)) for i in range(5)}
    before = nnx.state(many)
    for variable in many.values():
        variable[...] += 1
    assert "v0, v1, v2, 2 more" in str(changes(before, many))
    assert changes(before, many).rows[0].changed == 5


def test_a_model_without_leaves_prints():
    assert "all" in str(nnx.tabulate({}))
    assert "all leaves" in str(nnx.explain({}, nnx.Param))


def test_rich_draws_in_colour_and_to_the_width_of_the_terminal(model):
    file = io.StringIO()
    console = Console(
        file=file, width=160, force_terminal=True, color_system="standard"
    )
    console.print(nnx.explain(model))
    text = file.getvalue()
    assert "\x1b[1mLeaves" in text
    assert "a_rather_long_name.that_goes_on.0.and_on_and_on_and_on" in text


def test_a_notebook_gets_one_element_of_html(model):
    text = nnx.explain(model)._repr_html_()
    assert text.startswith("<pre")
    assert text.rstrip().endswith("</pre>")
    assert "unlabelled array" in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_940, "999.9 kB"),
        (999_960, "1.0 MB"),
        (2 * 10**12, "2.0 TB"),
        (5 * 10**21, "5000.0 EB"),
    ],
)
def test_sizes_read_as_people_write_them(count, text):
    assert size(count) == text
