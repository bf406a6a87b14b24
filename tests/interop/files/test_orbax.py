"""Orbax checkpoints: every path goes out and comes back, or is refused."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from sortal.errors import SaveError
from sortal.interop.files.exchange import export, load_arrays, restore_from

ocp = pytest.importorskip("orbax.checkpoint")


def test_leaves_of_one_name_are_refused_and_all_listed(tmp_path):
    root = {0: jnp.ones(1), "0": jnp.ones(2), "b": {1: jnp.ones(1), "1": jnp.ones(1)}}
    with pytest.raises(SaveError, match="several leaves have one name") as caught:
        export(tmp_path / "x", root)
    assert "0: 0, ['0']\n  b.1: b.1, b['1']" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "root",
    [
        {"value": jnp.ones(2)},
        {"a": {"value": jnp.ones(2)}},
        {"a": {"value": jnp.ones(2)}, "b": jnp.ones(1)},
        {"a": {"value": jnp.ones(2), "other": jnp.ones(1)}},
        {"a": [jnp.ones(2)], "01": jnp.ones(3), "²": jnp.ones(1)},
        {"a.b": jnp.ones(2), "c/d": jnp.ones(1)},
    ],
    ids=str,
)
def test_a_leaf_of_any_name_comes_back(tmp_path, root):
    from sortal import nnx

    export(tmp_path / "x", root)
    before = nnx.state(root).paths()
    assert load_arrays(tmp_path / "x").paths() == before
    assert restore_from(tmp_path / "x", root) == before


def test_a_string_leaves_the_arrays_readable(tmp_path):
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(tmp_path / "x", {"w": np.ones(2), "note": "text", "n": 3, "f": 0.5})
    into = {"w": np.zeros(2)}
    restore_from(tmp_path / "x", into, partial=True)
    assert into["w"].tolist() == [1.0, 1.0]
