"""safetensors files: nothing lost, nothing believed, every refusal one of ours."""

from __future__ import annotations

import itertools
import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from sortal.errors import DamagedError, RestoreError, SaveError
from sortal.interop.files.exchange import export, load_arrays, open_arrays, restore_from


def file_of(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_leaves_of_one_name_are_refused_and_all_listed(tmp_path):
    root = {
        "a.b": jnp.ones(1),
        "a": {"b": jnp.zeros(1)},
        0: jnp.ones(1),
        "0": jnp.ones(2),
    }
    with pytest.raises(SaveError, match="several leaves have one name") as caught:
        export(tmp_path / "x.safetensors", root)
    assert "0: 0, ['0']\n  a.b: a.b, ['a.b']" in str(caught.value)


def test_arrays_in_another_byte_order_keep_their_values(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    root = {"f": np.arange(3, dtype=">f4"), "i": np.arange(4, dtype=">u8")[::-2]}
    export(tmp_path / "x.safetensors", root)
    found = library.load_file(tmp_path / "x.safetensors")
    assert {k: x.tolist() for k, x in found.items()} == {"f": [0, 1, 2], "i": [3, 1]}


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_a_name_that_the_format_cannot_hold_is_refused(tmp_path, name):
    with pytest.raises(SaveError, match="names that safetensors cannot hold"):
        export(tmp_path / "x.safetensors", {name: jnp.ones(1)})
    assert not list(tmp_path.iterdir())


ODD = [
    None, True, 5, -1, 1.5, 1e400, "x", [], [1], {}, [[]], {"a": 1}, 1 << 70, [0, 8.0],
    [True, 8], [-8, 0], [0, 1 << 62], ["0", "8"], [0, 8, 8], [0], float("nan"),
]  # fmt: skip


@pytest.mark.parametrize("header", ODD, ids=repr)
def test_a_header_of_another_form_is_refused(tmp_path, header):
    (tmp_path / "x.safetensors").write_bytes(file_of(header))
    with pytest.raises(DamagedError, match="is not a safetensors file, or damaged"):
        open_arrays(tmp_path / "x.safetensors")


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets", None])
def test_an_entry_of_another_form_is_refused(tmp_path, key):
    for odd in ODD:
        entry = odd if key is None else {**GOOD, key: odd}
        (tmp_path / "x.safetensors").write_bytes(file_of({"a": entry}))
        with pytest.raises(DamagedError, match="is not a safetensors file, or damaged"):
            open_arrays(tmp_path / "x.safetensors")


def test_metadata_of_another_form_is_refused(tmp_path):
    for odd in ODD:
        if odd != {}:
            (tmp_path / "x.safetensors").write_bytes(
                file_of({"a": GOOD, "__metadata__": odd})
            )
            with pytest.raises(DamagedError, match="is not a safetensors file, or dam"):
                open_arrays(tmp_path / "x.safetensors")


def test_headers_that_json_takes_and_others_do_not_are_refused(tmp_path):
    one = json.dumps(GOOD)
    for text in (
        b'{"a":%s,"a":%s}' % (one.encode(), one.encode()),  # a name given twice
        b"[" * 100_000,
        b"9" * 5_000,
        b'{"a":' * 2_000,
        b"\xff\xfe",
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
    ):
        (tmp_path / "x.safetensors").write_bytes(file_of(text))
        with pytest.raises(DamagedError, match="is not a safetensors file, or damaged"):
            open_arrays(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [("F8_E8M0", 2), ("F4", 1), ("NEW9_X2", 8)]
)
def test_a_dtype_that_is_not_known_leaves_the_others_readable(tmp_path, dtype, nbytes):
    header = {
        "odd": {"dtype": dtype, "shape": [2], "data_offsets": [0, nbytes]},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [nbytes, nbytes + 8]},
    }
    data = b"\x01" * nbytes + np.array([1.0, 2.0], np.float32).tobytes()
    file = tmp_path / "x.safetensors"
    file.write_bytes(file_of(header, data))
    odd, w = open_arrays(file).entries
    assert w.read().tolist() == [1.0, 2.0]
    into = {"w": jnp.zeros(2)}
    restore_from(file, into, partial=True)
    assert into["w"].tolist() == [1.0, 2.0]
    if dtype == "F8_E8M0":
        assert odd.read().dtype == jnp.float8_e8m0fnu
    else:
        with pytest.raises(RestoreError, match=f"odd has the dtype {dtype}, which"):
            load_arrays(file)


def test_shapes_without_elements_are_read_and_absurd_ones_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    for shape, fine in (([0, 3], True), ([0, 1 << 62], False), ([1] * 40 + [0], False)):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        file.write_bytes(file_of({"a": entry}, b""))
        if fine:
            assert load_arrays(file)["a"].shape == tuple(shape)
        else:
            with pytest.raises(DamagedError):
                load_arrays(file)


def test_names_and_orders_do_not_matter(tmp_path):
    """Every order of the entries in the header reads the same."""
    ends = [(0, 8), (8, 16), (16, 16)]
    entries = {
        n: {"dtype": "F32", "shape": [(b - a) // 4], "data_offsets": [a, b]}
        for n, (a, b) in zip("abc", ends, strict=True)
    }
    for order in itertools.permutations("abc"):
        (tmp_path / "x.safetensors").write_bytes(
            file_of({n: entries[n] for n in order}, bytes(16))
        )
        assert load_arrays(tmp_path / "x.safetensors").paths() == (
            ("a",),
            ("b",),
            ("c",),
        )
