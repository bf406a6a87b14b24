"""Arrays on disk: what any reader of zarr finds there, and what is noticed of damage.

The Writer is judged by what TensorStore, opened by hand, and bare bytes say of its
files; the Reader by files that were written, or damaged, without it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sortal as nnx
from sortal._engine.host import host_memory
from sortal.checkpoint.files import on, read_manifest
from sortal.checkpoint.manifest import Manifest, Stored
from sortal.checkpoint.store import (
    ALIGN,
    CHUNK,
    Piece,
    Reader,
    Writer,
    as_bytes,
    chunk_slices,
    on_host,
    packed,
    stored_array,
    zarr_json,
)
from sortal.checkpoint.values import DTYPES, Array, numpy_dtype
from sortal.errors import DamagedError


def crc32c(data: bytes) -> int:
    """The checksum of Castagnoli, bit by bit from its polynomial."""
    found = 0xFFFFFFFF
    for byte in data:
        found ^= byte
        for _ in range(8):
            found = (found >> 1) ^ (0x82F63B78 if found & 1 else 0)
    return found ^ 0xFFFFFFFF


def test_the_checksum_of_these_tests_is_that_of_the_standard():
    """RFC 3720, B.4."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes(range(32))) == 0x46DD794E


def made(root: Path, name: str, stored: Stored) -> Path:
    """A folder with metadata, as a save makes it before the Writer comes."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_text(json.dumps(zarr_json(stored)))
    return folder


def read_alone(folder: Path) -> np.ndarray:
    """The array, by TensorStore and by what lies in the folder."""
    import tensorstore as ts

    spec = {"driver": "zarr3", "kvstore": on(folder).spec(folder)}
    return ts.open(spec).result().read().result()


def reader_of(root: Path, **arrays: Stored) -> Reader:
    """A Reader of these arrays, with a manifest that knows of no file."""
    return Reader(root, Manifest(0, "x", (), (), (), arrays, {}, ""))


# ------------------------------------------------------------------------ by themselves
ODD = {
    "transposed": np.arange(35, dtype="f4").reshape(5, 7).T,
    "backwards": np.arange(24, dtype="i8").reshape(4, 6)[::-1, ::-2],
    "big endian": np.arange(20, dtype=">u2").reshape(4, 5),
    "big endian and strided": np.arange(40, dtype=">c8").reshape(4, 10)[:, 1::3],
    "broadcast": np.broadcast_to(np.arange(3, dtype="i4"), (5, 3)),
    "read only": np.frombuffer(bytes(range(12)), np.uint8).reshape(3, 4),
    "longlong": np.arange(6, dtype=np.longlong).reshape(2, 3),
    "one": np.full((1, 1), 7, np.int16),
    "zeros": np.zeros((4, 4), np.float32),
    "bool": np.arange(9).reshape(3, 3) % 2 == 0,
    "jax": jnp.arange(6.0).reshape(2, 3),
    "nan": np.array([[np.nan, -0.0, np.inf, -np.nan]], np.float16),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("chunks", [(1, 1), (2, 3), (9, 9)])
def test_any_memory_is_written_in_any_chunks(tmp_path, name, chunks):
    value = np.asarray(ODD[name])
    cut = tuple(min(c, n) for c, n in zip(chunks, value.shape, strict=True))
    stored = Stored(value.dtype.name, value.shape, cut)
    folder = made(tmp_path, "x", stored)
    with Writer(tmp_path) as writer:
        writer.write("x", stored, [Piece((0, 0), ODD[name])])
    found = read_alone(folder)
    native = value.astype(value.dtype.newbyteorder("="))
    assert found.dtype == native.dtype
    assert found.tobytes() == native.tobytes()
    # A chunk of zeros is a file too: one that is not there is damage.
    count = math.prod(-(-n // c) for n, c in zip(value.shape, cut, strict=True))
    assert len(list(folder.glob("c.*"))) == count


def test_every_dtype_is_stored_as_its_bytes_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    for name in sorted(DTYPES):
        dtype = numpy_dtype(name)
        if name.startswith(("int2", "int4", "uint2", "uint4", "bool")):
            value = rng.integers(0, 2, (3, 5)).astype(dtype)
        else:
            value = rng.standard_normal((3, 5)).astype(np.float32).astype(dtype)
        stored = stored_array(Array((3, 5), name))._replace(chunks=(2, 4))
        folder = made(tmp_path, name, stored)
        with Writer(tmp_path) as writer:
            writer.write(name, stored, [Piece((0, 0), value)])
        assert read_alone(folder).tobytes() == value.tobytes(), name
        # And back, by the Reader.
        into = host_memory((3, 5), np.dtype(numpy_dtype(stored.dtype)))
        reader = reader_of(tmp_path, **{name: stored})
        reader.wait(reader.read(name, (slice(0, 3), slice(0, 5)), into))
        assert into.tobytes() == value.tobytes(), name


def test_a_chunk_is_its_numbers_and_their_checksum_and_nothing_else(tmp_path):
    """Little-endian, row after row, so that a dozen lines in any language read it."""
    value = np.arange(15, dtype=">u2").reshape(3, 5)
    stored = Stored("uint16", (3, 5), (2, 3))
    folder = made(tmp_path, "x", stored)
    with Writer(tmp_path) as writer:
        writer.write("x", stored, [Piece((0, 0), value)])
    for i, row in enumerate((0, 2)):
        for j, column in enumerate((0, 3)):
            whole = np.zeros((2, 3), "<u2")  # chunks at the end are filled up
            part = value[row : row + 2, column : column + 3]
            whole[: part.shape[0], : part.shape[1]] = part
            data = (folder / f"c.{i}.{j}").read_bytes()
            assert data[:-4] == whole.tobytes()
            assert int.from_bytes(data[-4:], "little") == crc32c(data[:-4])


def test_pieces_of_several_owners_make_one_array(tmp_path):
    """As two processes write their shards: neither touches the other's chunks."""
    value = np.arange(48, dtype=np.int32).reshape(8, 6)
    stored = Stored("int32", (8, 6), (2, 3))
    folder = made(tmp_path, "x", stored)
    for rows in (slice(4, 8), slice(0, 4)):
        with Writer(tmp_path) as writer:
            pieces = [Piece((rows.start, c), value[rows, c : c + 3]) for c in (3, 0)]
            writer.write("x", stored, pieces)
    assert np.array_equal(read_alone(folder), value)


def test_a_failure_to_write_is_raised_at_the_latest_at_the_end(tmp_path):
    stored = Stored("int32", (8,), (2,))
    made(tmp_path, "x", stored)
    (tmp_path / "x" / "c.1").mkdir()
    with pytest.raises((ValueError, OSError)), Writer(tmp_path) as writer:
        writer.write("x", stored, [Piece((0,), np.arange(8, dtype=np.int32))])


def test_an_error_among_the_writing_is_not_hidden(tmp_path):
    with pytest.raises(ZeroDivisionError), Writer(tmp_path):
        raise ZeroDivisionError


# ------------------------------------------------------------------------------ packs
gap = st.integers(0, ALIGN - 1)
lengths = st.lists(st.tuples(st.integers(1, 200), gap), min_size=1, max_size=8)


@settings(max_examples=25)
@given(lengths, st.integers(20, 300))
def test_a_pack_is_its_arrays_where_they_are_said_to_be(tmp_path_factory, parts, chunk):
    """Zeros lie between them; wherever chunks end."""
    tmp_path = tmp_path_factory.mktemp("p")
    rng = np.random.default_rng(len(parts))
    due, given = bytearray(), []
    for size, gap in parts:
        due += bytes(gap if due else 0)
        data = rng.integers(1, 255, size, np.uint8)
        given.append((len(due), data))
        due += data.tobytes()
    stored = Stored("uint8", (len(due),), (min(chunk, len(due)),))
    folder = made(tmp_path, "p", stored)
    with Writer(tmp_path) as writer:
        writer.pack("p", stored, iter(given))
    assert read_alone(folder).tobytes() == bytes(due)
    assert len(list(folder.glob("c.*"))) == -(-len(due) // stored.chunks[0])


def test_a_pack_takes_arrays_of_any_sort(tmp_path):
    values: list[Any] = [*ODD.values(), np.float64(1.5), np.array(3, "i2")]
    values += [np.arange(5).astype(ml_dtypes.int4), np.ones(3, ml_dtypes.bfloat16)]
    given, end = [], 0
    for value in values:
        at = -(-end // ALIGN) * ALIGN
        given.append((at, value))
        end = at + value.nbytes
    folder = made(tmp_path, "p", packed(end))
    with Writer(tmp_path) as writer:
        writer.pack("p", packed(end), given)
    found = read_alone(folder).tobytes()
    for at, value in given:
        host = np.asarray(value)
        due = host.astype(host.dtype.newbyteorder("=")).tobytes()
        assert found[at : at + len(due)] == due


def test_several_packs_and_arrays_share_one_writer(tmp_path):
    """Buffers go round between packs of different sizes."""
    rng = np.random.default_rng(0)
    due = {f"p{n}": rng.integers(0, 255, n, np.uint8) for n in (9, 4000, 70, 900, 1)}
    with Writer(tmp_path) as writer:
        for name, data in due.items():
            stored = Stored("uint8", data.shape, (min(7, data.size),))
            made(tmp_path, name, stored)
            half = data.size // 2
            parts = [(at, x) for at, x in ((0, data[:half]), (half, data[half:]))]
            writer.pack(name, stored, [(at, x) for at, x in parts if x.size])
            alone = f"{name}-alone"
            made(tmp_path, alone, stored)
            writer.write(alone, stored, [Piece((0,), data)])
    for name, data in due.items():
        assert np.array_equal(read_alone(tmp_path / name), data)
        assert np.array_equal(read_alone(tmp_path / f"{name}-alone"), data)


# ---------------------------------------------------------------------------- reading
def test_reading_a_part_touches_only_its_chunks(tmp_path):
    """All others are gone, and nobody minds."""
    value = np.arange(60, dtype=np.int32).reshape(6, 10)
    stored = Stored("int32", (6, 10), (2, 4))
    folder = made(tmp_path, "x", stored)
    with Writer(tmp_path) as writer:
        writer.write("x", stored, [Piece((0, 0), value)])
    for chunk in set(folder.glob("c.*")) - {folder / "c.1.0", folder / "c.1.1"}:
        chunk.unlink()
    reader = reader_of(tmp_path, x=stored)
    into = host_memory((2, 6), np.dtype("i4"))
    reader.wait(reader.read("x", (slice(2, 4), slice(2, 8)), into))
    assert np.array_equal(into, value[2:4, 2:8])
    for at in (slice(1, 3), slice(4, 6)):
        into = host_memory((2, 6), np.dtype("i4"))
        with pytest.raises(DamagedError, match="x is damaged; nothing was restored"):
            reader.wait(reader.read("x", (at, slice(2, 8)), into))


def test_metadata_on_disk_is_not_believed_where_the_manifest_says_otherwise(tmp_path):
    value = np.arange(6, dtype=np.int32)
    stored = Stored("int32", (6,), (4,))
    folder = made(tmp_path, "x", stored)
    with Writer(tmp_path) as writer:
        writer.write("x", stored, [Piece((0,), value)])
    (folder / "zarr.json").write_text(
        json.dumps(zarr_json(Stored("int16", (9,), (4,))))
    )
    into = host_memory((6,), np.dtype("i4"))
    reader = reader_of(tmp_path, x=stored)
    reader.wait(reader.read("x", (slice(0, 6),), into))
    assert np.array_equal(into, value)


@given(st.integers(0, 1000), st.integers(0, 7))
def test_every_flipped_bit_of_a_chunk_is_noticed_when_it_is_read(
    tmp_path_factory, at, bit
):
    tmp_path = tmp_path_factory.mktemp("f")
    stored = Stored("uint8", (40,), (40,))
    folder = made(tmp_path, "x", stored)
    data = bytearray(range(40))
    data += crc32c(data).to_bytes(4, "little")
    (folder / "c.0").write_bytes(data)
    reader, into = reader_of(tmp_path, x=stored), host_memory((40,), np.dtype("u1"))
    reader.wait(reader.read("x", (slice(0, 40),), into))
    assert into.tolist() == list(range(40))
    data[at % 44] ^= 1 << bit
    (folder / "c.0").write_bytes(data)
    with pytest.raises(DamagedError):
        reader.wait(reader.read("x", (slice(3, 5),), into[:2]))


def test_every_sort_of_damage_shows_with_its_file_and_what_is_wrong(tmp_path):
    """Without reading what is in the chunks."""
    root = {"w": nnx.Param(np.arange(3)), "b": nnx.Cache(np.arange(CHUNK // 4))}
    nnx.save(tmp_path, root, step=0)
    manifest = read_manifest(tmp_path, 0)
    folder = tmp_path / "0" / manifest.folder
    reader = Reader(folder, manifest)
    parts = [(n, [slice(0, *a.shape)]) for n, a in manifest.arrays.items()]
    assert {n for n, _ in parts} == {"Param/packed", "Cache/b"}
    assert reader.check(parts) == []

    def damaged(name: str, change: Any) -> list[str]:
        file = folder / name
        data = file.read_bytes()
        change(file, data)
        found = reader.check(parts)
        if file.is_dir():
            file.rmdir()
        file.write_bytes(data)
        return found

    chunk, size = "Cache/b/c.0", CHUNK + 4
    assert damaged(chunk, lambda f, d: f.unlink()) == [f"{chunk}: missing"]
    assert damaged(chunk, lambda f, d: f.write_bytes(d[:-1])) == [
        f"{chunk}: {size - 1:,} bytes, not {size:,}"
    ]
    assert damaged(chunk, lambda f, d: f.write_bytes(b"")) == [
        f"{chunk}: 0 bytes, not {size:,}"
    ]
    assert damaged(chunk, lambda f, d: f.write_bytes(d[:-1] + b"~")) == [
        f"{chunk}: not what was written: another checksum"
    ]
    assert damaged(chunk, lambda f, d: (f.unlink(), f.mkdir())) == [
        f"{chunk}: cannot be read (not a regular file)"
    ]
    for meta in ("zarr.json", "Param/zarr.json", "Cache/b/zarr.json"):
        assert damaged(meta, lambda f, d: f.write_bytes(d.swapcase())) == [
            f"{meta}: not what was written: another checksum"
        ]
        assert damaged(meta, lambda f, d: f.write_bytes(d + b" "))[0].startswith(meta)
    # Of parts that nobody asks for, nothing is looked at.
    (folder / chunk).unlink()
    assert reader.check([("Param/packed", [slice(0, 24)])]) == []


# ------------------------------------------------------------------------------ parts
def test_the_files_of_chunks_are_where_their_slices_say():
    found = dict(chunk_slices("x", Stored("uint8", (5, 3), (2, 3))))
    assert found == {
        "x/c.0.0": (slice(0, 2), slice(0, 3)),
        "x/c.1.0": (slice(2, 4), slice(0, 3)),
        "x/c.2.0": (slice(4, 5), slice(0, 3)),
    }


@given(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(sorted(DTYPES)))
def test_memory_to_read_into_is_never_aligned_as_jax_would_keep_it(shape, name):
    found = host_memory(shape, numpy_dtype(name))
    assert (found.shape, found.dtype) == (tuple(shape), numpy_dtype(name))
    assert found.flags.c_contiguous
    assert found.flags.writeable
    if found.size:
        assert found.ctypes.data % ALIGN == 16


def test_what_is_in_host_memory_in_this_byte_order_is_not_copied():
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert on_host(value) is value
    assert np.shares_memory(as_bytes(value), value)
    small = value.astype(ml_dtypes.float8_e5m2)
    assert np.shares_memory(on_host(small), small)
    assert on_host(small).dtype == np.uint8
    swapped = on_host(value.astype(">f4"))
    assert swapped.dtype.isnative
    assert np.array_equal(swapped, value)


# ---------------------------------------------------------------- as a save writes them
def test_any_zarr_reader_opens_the_arrays(tmp_path):
    """The files say for themselves what they are; read by TensorStore alone."""
    import tensorstore as ts

    value = np.arange(2_100_000, dtype=np.float32).reshape(2100, 1000)
    nnx.save(tmp_path, {"w": nnx.Param(jnp.asarray(value))}, step=0)
    (array,) = tmp_path.glob("0/arrays-*/Param/w")
    spec = {"driver": "zarr3", "kvstore": on(array).spec(array)}
    assert len(list(array.glob("c.*"))) > 1
    assert np.array_equal(ts.open(spec).result().read().result(), value)


def test_large_leaves_that_do_not_end_with_a_chunk_come_back(tmp_path):
    """A pack over several chunks, and arrays whose last chunk is a part of one."""
    rng = np.random.default_rng(0)
    sizes = [1_500_000, 7, 1_234_567, 1_100_003, 300_001]
    root = {
        f"x{i}": nnx.Param(jnp.asarray(rng.integers(0, 255, n, np.uint8)))
        for i, n in enumerate(sizes)
    }
    root["y"] = nnx.Param(jnp.asarray(rng.standard_normal((1049, 1021, 2), np.float32)))
    nnx.save(tmp_path, root, step=0)
    found = nnx.load_state(tmp_path)
    for name, variable in root.items():
        assert np.array_equal(found[name].value, variable.value), name


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1025, 1024), "float64"),
        ((50257, 768), "float32"),
        ((1024, 768), "float32"),
        ((768, 2304), "float32"),
        ((3072, 768), "float32"),
        ((97, 43_690), "int8"),
        ((3, 5, 1_000_003), "uint8"),
        ((7, 2_500_000), "float32"),
        ((1_048_577,), "float32"),
        ((2, 2, 2, 600_001), "float32"),
        ((40_000_001,), "bfloat16"),
    ],
)
def test_padding_of_the_last_chunks_is_at_most_two_percent(shape, dtype):
    stored = stored_array(Array(shape, dtype))
    padded = math.prod(
        -(-n // c) * c for n, c in zip(shape, stored.chunks, strict=True)
    )
    assert padded <= 1.02 * math.prod(shape)
    size = math.prod(stored.chunks) * numpy_dtype(dtype).itemsize
    most = max(CHUNK, math.prod(shape) * numpy_dtype(dtype).itemsize // 32)
    assert most / 8 <= size <= 2 * most


@pytest.mark.parametrize("size", [1, 63, CHUNK, CHUNK + 1, 5 << 20, (9 << 20) + 17])
def test_padding_of_a_pack_is_at_most_two_percent(size):
    (chunk,) = packed(size).chunks
    assert chunk <= CHUNK
    assert -(-size // chunk) * chunk <= 1.02 * size


def test_a_step_takes_at_most_two_percent_more_than_its_values(tmp_path):
    root = {
        "a": nnx.Param(jnp.ones((1025, 1024))),
        "b": nnx.Param(jnp.ones((1537, 1024))),
        "c": [nnx.Param(jnp.ones((1000, 350))) for _ in range(4)],
    }
    values = 4 * (1025 * 1024 + 1537 * 1024 + 4 * 350_000)
    path = nnx.save(tmp_path, root, step=0).path
    assert sum(p.stat().st_size for p in path.rglob("*")) <= 1.02 * values
    for leaf in (root["a"], root["c"][3]):
        leaf.value = jnp.zeros(leaf.shape)
    nnx.restore(tmp_path, root)
    assert (root["a"].value == 1).all()
    assert (root["c"][3].value == 1).all()
