"""`nnx.tabulate`: the same programs under Flax and Sortal, and what is ours alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx

from sortal import nnx
from sortal.errors import ArgumentError

WIDE = {"width": 240, "force_terminal": False}


@pytest.fixture(autouse=True)
def classes_of_flax_as_they_were() -> Iterator[None]:
    """Its own tabulate leaves inherited methods in them, and its capture recurses."""
    found = [x for x in vars(flax_nnx).values() if isinstance(x, type)]
    before = {x: set(vars(x)) for x in found if issubclass(x, flax_nnx.Module)}
    yield
    for cls, names in before.items():
        for name in vars(cls).keys() - names:
            delattr(cls, name)


def model_of(lib: Any) -> Any:
    class Block(lib.Module):
        def __init__(self, features: int, out: int, rngs: Any):
            self.linear = lib.Linear(features, out, rngs=rngs)
            self.norm = lib.BatchNorm(out, rngs=rngs)

        def __call__(self, x: Any, *, double: bool = False) -> Any:
            return self.scaled(self.norm(self.linear(x)), 2 if double else 1)

        def scaled(self, x: Any, by: int) -> Any:
            return x * by

    class Net(lib.Module):
        def __init__(self, rngs: Any):
            self.first = Block(4, 8, rngs)
            self.second = Block(8, 2, rngs)

        def __call__(self, x: Any) -> Any:
            return self.second(self.first(x, double=True))

        def loss(self, batch: Any) -> Any:
            return {"loss": self(batch["x"]).sum(), "pair": (batch["x"], -batch["x"])}

    return Net(lib.Rngs(0))


def cells(text: str) -> list[list[str]]:
    """The texts of a table's cells, row by row."""
    rows, row = [], None
    for line in text.splitlines():
        if line[:1] not in "│┃":
            if row:
                rows.append([" ".join(x.split()) for x in row])
            row = None
            continue
        parts = re.split("[│┃]", line)[1:-1]
        row = parts if row is None else [f"{a} {b}" for a, b in zip(row, parts)]  # noqa: B905
    return rows


def last(text: str) -> str:
    return text.strip().splitlines()[-1].strip()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 1},
        {"depth": 0},
        {"compute_flops": True},
        {"row_filter": lambda row: row.type.__name__ == "Linear"},
        {"row_filter": lambda row: row.path[-1:] != ("norm",), "depth": 2},
    ],
    ids=["plain", "depth", "root", "flops", "filter", "both"],
)
def test_the_table_is_that_of_flax(options: Any) -> None:
    x = jnp.ones((3, 4))
    ours = nnx.tabulate(model_of(nnx), x, console_kwargs=WIDE, **options)
    theirs = flax_nnx.tabulate(model_of(flax_nnx), x, console_kwargs=WIDE, **options)
    assert cells(ours) == cells(theirs)
    assert last(ours) == last(theirs) == "Total Parameters: 98 (392 B)"


def test_another_method_with_a_dict_is_tabulated_as_by_flax() -> None:
    x = {"x": jnp.ones((3, 4))}
    ours = nnx.tabulate(model_of(nnx), x, method="loss", console_kwargs=WIDE)
    theirs = flax_nnx.tabulate(
        model_of(flax_nnx), x, method="loss", console_kwargs=WIDE
    )
    assert cells(ours) == cells(theirs)


def test_flops_of_the_derivative_are_those_of_flax() -> None:
    options: Any = {"compute_flops": True, "compute_vjp_flops": True}
    tables = []
    for lib in (nnx, flax_nnx):
        layer: Any = lib.Linear(4, 8, rngs=lib.Rngs(0))
        text = lib.tabulate(layer, jnp.ones((3, 4)), console_kwargs=WIDE, **options)
        tables.append(cells(text))
    assert tables[0] == tables[1]
    assert tables[0][0][4:6] == ["flops", "vjp_flops"]


def test_an_abstract_model_has_the_same_table() -> None:
    model = model_of(nnx)
    abstract = nnx.eval_shape(lambda: model_of(nnx))
    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    assert nnx.tabulate(abstract, x) == nnx.tabulate(model, jnp.ones((3, 4)))


def test_a_model_of_flax_is_read_in_place() -> None:
    x = jnp.ones((3, 4))
    theirs = model_of(flax_nnx)
    before = set(vars(theirs.first))
    table = nnx.tabulate(theirs, x, console_kwargs=WIDE)
    assert cells(table) == cells(
        flax_nnx.tabulate(model_of(flax_nnx), x, console_kwargs=WIDE)
    )
    assert set(vars(theirs.first)) == before


def test_nothing_is_changed_and_methods_are_put_back_after_an_error() -> None:
    model = model_of(nnx)
    classes = [type(model), type(model.first), nnx.BatchNorm]
    before = [dict(vars(cls)) for cls in classes]
    mean = model.first.norm.mean.get_value()
    nnx.tabulate(model, jnp.ones((3, 4)))
    with pytest.raises(ArgumentError, match="features"):
        nnx.tabulate(model, jnp.ones((3, 5)))
    assert [dict(vars(cls)) for cls in classes] == before
    assert model.first.norm.mean.get_value() is mean


def test_without_inputs_every_module_has_a_row_and_nothing_is_called() -> None:
    rows = cells(nnx.tabulate(model_of(nnx), console_kwargs=WIDE))
    assert rows[0] == ["path", "type", "BatchStat", "Param"]
    assert [row[0] for row in rows[1:-1]] == [
        "",
        "first",
        "first/linear",
        "first/norm",
        "second",
        "second/linear",
        "second/norm",
    ]
    assert rows[1][1:] == ["Net", "20 (80 B)", "78 (312 B)"]


def test_a_method_that_is_missing_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"Linear has no method 'embed'"):
        nnx.tabulate(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones(2), method="embed")


def test_shared_modules_are_counted_once() -> None:
    for lib in (nnx, flax_nnx):
        layer: Any = lib.Linear(2, 2, rngs=lib.Rngs(0))

        class Twice(lib.Module):  # type: ignore[name-defined]
            def __init__(self, layer: Any):
                self.a, self.b = layer, layer

            def __call__(self, x: Any) -> Any:
                return self.b(self.a(x))

        text = lib.tabulate(Twice(layer), jnp.ones(2), console_kwargs=WIDE)
        assert last(text) == "Total Parameters: 6 (24 B)"
        assert [row[0] for row in cells(text)[1:-1]] == ["", "a"]


def test_metadata_and_tables_options_are_shown() -> None:
    init = nnx.with_partitioning(nnx.initializers.ones_init(), ("in", "out"))
    layer = nnx.Linear(2, 3, kernel_init=init, rngs=nnx.Rngs(0))
    text = nnx.tabulate(
        layer,
        jnp.ones(2),
        table_kwargs={"caption_justify": "left", "title_justify": "left"},
        column_kwargs={"justify": "right"},
        console_kwargs=WIDE,
    )
    assert text.splitlines()[0].strip() == "Linear Summary"
    assert "out_sharding:" in text
    assert "- out" in text


def test_a_model_is_tabulated_inside_of_a_loop_over_layers() -> None:
    class Stack(nnx.Module):
        def __init__(self, rngs: Any):
            make = nnx.vmap(lambda r: nnx.Linear(2, 2, rngs=r), in_axes=0)
            self.layers = make(rngs.fork(split=3))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any, scale: float = 1.0, *, flag: bool = False) -> Any:
            step = nnx.scan(
                lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            return self.dropout(step(x, self.layers)) * scale

    text = nnx.tabulate(
        Stack(nnx.Rngs(0)), jnp.ones(2), 2.0, flag=True, console_kwargs=WIDE
    )
    rows = cells(text)
    assert [row[0] for row in rows[1:-1]] == ["", "layers", "dropout"]
    assert rows[1][2] == "- float32[2] - 2.0 flag: True"
    assert rows[2][2:4] == ["float32[2]", "float32[2]"]
