"""What NNX code alone has is not in `sortal`, and the error says where it is."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sortal
from sortal import _nnx_names as names
from sortal import nnx
from sortal.errors import ArgumentError

ONLY = sorted(n for n in set(names.TABLE) if not hasattr(sortal, n))


@pytest.mark.parametrize("name", ONLY)
def test_a_name_of_nnx_asked_of_sortal_says_where_it_is(name: str) -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(sortal, name)
    assert str(caught.value) == (
        f"module 'sortal' has no attribute {name!r}, which exists for NNX code. "
        f"Write `from sortal import nnx`, and nnx.{name}."
    )


def test_names_of_both_are_the_same_objects() -> None:
    shared = {n for n in dir(sortal) if not n.startswith("_")}
    other = set(names.TABLE)
    assert {"Module", "Param", "Rngs", "state", "jit", "save"} <= shared
    assert all(getattr(nnx, n) is getattr(sortal, n) for n in shared - other)
    assert shared <= set(dir(nnx))


def test_an_error_reads_nothing_of_nnx() -> None:
    code = (
        "import sys, sortal\n"
        "assert not hasattr(sortal, 'List')\n"
        "assert 'sortal.nnx' not in sys.modules\n"
        "assert not hasattr(sortal.Param(1), 'raw_value')\n"
        "from sortal import nnx\n"
        "assert sortal.Param(1).raw_value == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


MODEL = sortal.Linear(2, 2, rngs=sortal.Rngs(0))
CALLS = {
    "state": lambda **k: sortal.state(MODEL, **k),
    "graphdef": lambda **k: sortal.graphdef(MODEL, **k),
    "split": lambda **k: sortal.split(MODEL, **k),
    "merge": lambda **k: sortal.merge(*sortal.split(MODEL), **k),
    "clone": lambda **k: sortal.clone(MODEL, **k),
    "variables": lambda **k: sortal.variables(MODEL, **k),
    "iter_graph": lambda **k: list(sortal.iter_graph(MODEL, **k)),
    "iter_modules": lambda **k: list(sortal.iter_modules(MODEL, **k)),
    "iter_children": lambda **k: list(sortal.iter_children(MODEL, **k)),
    "split_rngs": lambda **k: sortal.split_rngs(MODEL, splits=2, **k),
    "fork_rngs": lambda **k: sortal.fork_rngs(MODEL, **k),
    "as_abstract": lambda **k: sortal.as_abstract(MODEL, **k),
    "get_abstract_model": lambda **k: sortal.get_abstract_model(
        lambda: MODEL, None, **k
    ),
    "Optimizer": lambda **k: sortal.Optimizer(MODEL, None, **k),
    "EMA": lambda **k: sortal.EMA(MODEL, 0.5, **k),
    "jit": lambda **k: sortal.jit(abs, **k),
    "value_and_grad": lambda **k: sortal.grad(abs, **k),
    "vjp": lambda **k: sortal.vjp(abs, 1.0, **k),
    "jvp": lambda **k: sortal.jvp(abs, (1.0,), (1.0,), **k),
    "custom_vjp": lambda **k: sortal.custom_vjp(abs, **k),
    "remat": lambda **k: sortal.remat(abs, **k),
    "vmap": lambda **k: sortal.vmap(abs, **k),
    "shard_map": lambda **k: sortal.shard_map(
        abs, mesh=None, in_specs=None, out_specs=None, **k
    ),
    "scan": lambda **k: sortal.scan(abs, **k),
    "while_loop": lambda **k: sortal.while_loop(abs, abs, 1, **k),
    "fori_loop": lambda **k: sortal.fori_loop(0, 1, max, 1, **k),
    "cond": lambda **k: sortal.cond(True, abs, abs, 1, **k),
    "switch": lambda **k: sortal.switch(0, [abs], 1, **k),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_keyword_of_nnx_is_refused_and_the_error_says_where_it_is_taken(
    name: str,
) -> None:
    with pytest.raises(ArgumentError) as caught:
        CALLS[name](graph=True)
    assert str(caught.value) == (
        f"{name} has no option graph. For NNX code, which passes graph, write `from "
        f"sortal import nnx`, and nnx.{name}."
    )
    with pytest.raises(ArgumentError, match=f"{name} has no option grpah\\.$"):
        CALLS[name](grpah=True)


def test_several_unknown_keywords_are_all_listed() -> None:
    with pytest.raises(
        ArgumentError,
        match=r"merge has no option copy, fresh, graph\. For NNX code, which passes "
        r"copy and graph, write `from sortal import nnx`, and nnx\.merge\.",
    ):
        sortal.merge(*sortal.split(MODEL), graph=True, fresh=1, copy=False)


@pytest.mark.parametrize("name", ["value_and_grad", "vjp"])
def test_reduce_axes_must_be_empty(name: str) -> None:
    f = getattr(nnx, name)
    f(lambda x: x, *([1.0] if name == "vjp" else []), reduce_axes=())
    with pytest.raises(ArgumentError, match=f"{name} has no option reduce_axes\\.$"):
        f(lambda x: x, 1.0, reduce_axes=("batch",))
