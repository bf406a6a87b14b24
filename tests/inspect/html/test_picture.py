"""``show`` gives a page that a notebook shows and that can be written."""

from __future__ import annotations

import builtins
import html
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sortal
from page_scripts import embedded
from sortal import nnx
from sortal.errors import ArgumentError, NoCheckpointError, UnsupportedError


@pytest.fixture
def model():
    return sortal.Linear(2, 3, rngs=sortal.Rngs(0))


def test_a_picture_is_written_as_it_is(model, tmp_path):
    picture = sortal.show(model, title="Mine")
    picture.save(tmp_path / "m.html")
    assert (tmp_path / "m.html").read_text(encoding="utf-8") == picture.html
    assert picture.summary == "Mine: 2 leaves, 36 B"
    assert repr(picture) == (
        "Picture(Mine: 2 leaves, 36 B; write it with .save('model.html'))"
    )


def test_a_notebook_gets_a_document_of_its_own(model):
    frame = sortal.show(model)._repr_html_()
    found = re.match(r'<iframe srcdoc="([^"]*)" sandbox="allow-scripts" ', frame)
    assert found
    assert html.unescape(found.group(1)) == sortal.show(model).html


def test_two_models_are_compared(model):
    other = sortal.Linear(2, 3, rngs=sortal.Rngs(1))
    assert '"changes":' in embedded(sortal.show(model, other).html, "data")
    assert '"changes":' not in embedded(sortal.show(model).html, "data")


def test_specs_are_those_of_the_mesh_that_is_given_or_set(model):
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    policy = {...: sortal.Rule(spec=lambda shape, mesh: P())}
    text = embedded(sortal.show(model, mesh=mesh, policy=policy).html, "data")
    assert '"P()"' in text
    real = jax.make_mesh((2,), ("data",))
    with jax.set_mesh(real):
        assert '"P()"' in embedded(sortal.show(model).html, "data")
    assert '"P()"' not in embedded(sortal.show(model).html, "data")


def test_a_path_is_that_of_a_file(tmp_path):
    np.savez(tmp_path / "m.npz", w=np.ones(3))
    for path in (tmp_path / "m.npz", str(tmp_path / "m.npz")):
        assert sortal.show(path).summary == "m.npz: 1 leaf, 24 B"
    with pytest.raises(NoCheckpointError, match="there is no"):
        sortal.show(tmp_path / "n.npz")


def test_the_name_is_also_that_of_nnx():
    assert nnx.show is sortal.show


def test_without_jinja2_the_error_says_what_to_install(model, monkeypatch):
    real = builtins.__import__

    def no_jinja(name, *rest, **more):
        if name == "jinja2":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_jinja)
    with pytest.raises(UnsupportedError) as caught:
        sortal.show(model)
    assert str(caught.value) == (
        "a picture is drawn with Jinja2, which is not installed. Install it with: pip "
        "install jinja2, or pip install 'sortal[show]'"
    )


def test_a_policy_without_a_mesh_is_refused(model):
    with pytest.raises((ArgumentError, sortal.SortalError), match="mesh"):
        sortal.show(model, policy={...: sortal.Rule(spec=P())})
