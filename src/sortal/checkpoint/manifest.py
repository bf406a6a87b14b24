"""The manifest: what a checkpoint holds and where; versioned, checksummed, strict."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import itertools
import json
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sortal._engine.paths import show
from sortal._engine.schema import Schema
from sortal.checkpoint.values import (
    DTYPES,
    Array,
    Key,
    Nest,
    Place,
    Plain,
    Tree,
    arrays,
    numpy_dtype,
)
from sortal.errors import DamagedError

FORMAT, VERSION = "sortal checkpoint", 1
NAME = "manifest.json"
LARGEST = 1 << 30
"""The most bytes of a manifest."""
_MOST_VALUES = 1 << 24
"""The most values in it, since each takes far more memory than its text."""
_HEAD, _MIDDLE, _TAIL = b'{"sha256":"', b'","manifest":', b"}\n"
_SEGMENT = re.compile(r"[A-Za-z0-9_%~+=@-][A-Za-z0-9_.%~+=@-]{0,199}")

Path = tuple[Any, ...]
_EMPTY: Mapping[str, Any] = types.MappingProxyType({})


class Kind(NamedTuple):
    """A kind by name: its class, the base classes, and its folder."""

    name: str | None
    bases: tuple[str, ...]
    group: str


METADATA = frozenset({str, int, bool, type(None)})
"""The types of metadata that a manifest holds."""


class Leaf(NamedTuple):
    """One leaf: its path, the number of its kind, its value and its metadata.

    ``passing`` leaves are deleted when a newer step is saved (policy ``keep-last``).
    """

    path: Path
    kind: int
    value: Tree
    metadata: Mapping[str, Any] = _EMPTY
    passing: bool = False


class Stored(NamedTuple):
    """One zarr array: dtype, shape, and chunk shape."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]


class File(NamedTuple):
    """The size of a file, and its checksum as ``name:hex``."""

    size: int
    checksum: str


class Manifest(NamedTuple):
    """Everything about one step except the bytes of its arrays."""

    step: int
    folder: str
    kinds: tuple[Kind, ...]
    leaves: tuple[Leaf, ...]
    aliases: tuple[tuple[Path, Path], ...]
    arrays: dict[str, Stored]
    files: dict[str, File]
    graphdef: str
    metadata: Any = None
    metrics: Mapping[str, float] = _EMPTY
    versions: Mapping[str, str] = _EMPTY
    created: str = ""

    def kind_of(self, leaf: Leaf) -> Kind:
        """The kind of a leaf."""
        return self.kinds[leaf.kind]

    def describe(self, leaf: Leaf) -> str:
        """``layers.0.kernel (Param)``."""
        return f"{show(leaf.path)} ({short(self.kind_of(leaf))})"


def short(kind: Kind) -> str:
    """The name of a kind without its module."""
    return "unlabelled array" if kind.name is None else kind.name.rpartition(".")[2]


def encode_path(path: Any) -> Path:
    """A path as JSON can hold it: integers, strings, and other keys as text."""
    return tuple(
        k if type(k) in (str, int) else f"<{type(k).__name__}> {k!r}" for k in path
    )


def encoded_paths(schema: Schema) -> Sequence[Path]:
    """The paths of all leaves so; where they are plain already, these themselves."""
    return schema.memo("checkpoint paths", lambda: _encoded_paths(schema.paths))


def _encoded_paths(paths: Sequence[Path]) -> Sequence[Path]:
    if all(type(k) in (str, int) for path in paths for k in path):
        return paths
    return list(map(encode_path, paths))


def now() -> str:
    """The current time as manifests write it."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


# ---------------------------------------------------------------------------- writing
def to_bytes(manifest: Manifest) -> bytes:
    """The content of the file: JSON of the body and of the body's sha256."""
    # What the user gives, the metadata of a step, was checked for circles before.
    form: dict[str, Any] = {"separators": (",", ":"), "check_circular": False}
    body = json.dumps(_to_json(manifest), **form).encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    return b"".join((_HEAD, digest, _MIDDLE, body, _TAIL))


def _to_json(m: Manifest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": m.step,
        "created": m.created,
        "versions": dict(m.versions),
        "graphdef": m.graphdef,
        "metadata": m.metadata,
        "metrics": {k: float(v).hex() for k, v in m.metrics.items()},
        "folder": m.folder,
        "kinds": [
            {"name": k.name, "bases": list(k.bases), "group": k.group} for k in m.kinds
        ],
        "leaves": [_leaf_to_json(x) for x in m.leaves],
        "aliases": [[list(a), list(b)] for a, b in m.aliases],
        "arrays": {
            name: {"dtype": a.dtype, "shape": list(a.shape), "chunks": list(a.chunks)}
            for name, a in m.arrays.items()
        },
        "files": {name: list(f) for name, f in m.files.items()},
    }


def _leaf_to_json(leaf: Leaf) -> dict[str, Any]:
    found = {
        "path": list(leaf.path),
        "kind": leaf.kind,
        "value": _tree_to_json(leaf.value),
    }
    if leaf.metadata:
        found["metadata"] = dict(leaf.metadata)
    if leaf.passing:
        found["keep"] = "last"
    return found


def _tree_to_json(tree: Tree) -> dict[str, Any]:
    if isinstance(tree, Plain):
        return {"plain": _PLAIN[type(tree.value)][0](tree.value)}
    if isinstance(tree, Nest):
        found: dict[str, Any] = {"nest": tree.what}
        if tree.children:
            found["children"] = list(map(_tree_to_json, tree.children))
        if tree.what in ("dict", "node") and tree.keys:
            found["keys"] = list(tree.keys)
        if tree.name is not None:
            found["name"] = tree.name
        return found
    found = {"shape": list(tree.shape), "dtype": tree.dtype}
    if tree.form != "jax":
        found["form"] = tree.form
    if tree.weak:
        found["weak"] = True
    if tree.key is not None:
        found["key"] = list(tree.key)
    if tree.sharding is not None:
        found["sharding"] = tree.sharding
    if tree.place is not None:
        found["in"] = tree.place.array
        if tree.place.offset is not None:
            found["at"] = tree.place.offset
    return found


def _read_complex(text: Any) -> complex:
    real, imaginary = text
    return complex(float.fromhex(real), float.fromhex(imaginary))


# To and from JSON, exactly; JSON numbers have no NaN, infinity or large integers.
_PLAIN: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    bool: (lambda x: ["bool", x], lambda x: {True: True, False: False}[x]),
    int: (lambda x: ["int", hex(x)], lambda x: int(x, 16)),
    float: (lambda x: ["float", x.hex()], float.fromhex),
    complex: (lambda x: ["complex", [x.real.hex(), x.imag.hex()]], _read_complex),
    str: (lambda x: ["str", x], lambda x: _a(str, x)),
    bytes: (
        lambda x: ["bytes", base64.b64encode(x).decode()],
        lambda x: base64.b64decode(x, validate=True),
    ),
}
_READ_PLAIN = {cls.__name__: read for cls, (_, read) in _PLAIN.items()}


# ---------------------------------------------------------------------------- reading
class _FormError(Exception):
    """What is wrong with a manifest, and where."""


def from_bytes(data: bytes, where: str) -> Manifest:
    """Reads a manifest, and refuses one that is not exactly as written.

    Raises:
      DamagedError: it is damaged, of a newer version, or contradicts itself.
    """
    with _as_damage(where):
        return _read(_body(data))


def body(data: bytes, where: str) -> dict[str, Any]:
    """The JSON of a manifest whose bytes are as written; few of its parts are checked.

    Raises:
      DamagedError: it is damaged or of a newer version.
    """
    with _as_damage(where):
        found = _of_this_version(_body(data))
        _natural(found["step"])
        _segment(found["folder"])
        _a(dict, found["files"])
        found["metrics"] = _read_metrics(found["metrics"])
        return found


@contextlib.contextmanager
def _as_damage(where: str) -> Iterator[None]:
    try:
        yield
    except _FormError as e:
        raise DamagedError(f"{where}: {e}") from None
    except (
        AttributeError, KeyError, TypeError, ValueError, RecursionError, OverflowError
    ) as e:  # fmt: skip
        raise DamagedError(
            f"{where}: not a manifest as Sortal writes it ({type(e).__name__}: {e})"
        ) from None


def _body(data: bytes) -> Any:
    values = sum(map(data.count, (b",", b"[", b"{")))
    if len(data) > LARGEST or values > _MOST_VALUES:
        raise _FormError(
            f"larger than any manifest: {len(data):,} bytes, {values:,} values"
        )
    start = len(_HEAD) + 64 + len(_MIDDLE)
    digest, body = data[len(_HEAD) : len(_HEAD) + 64], data[start : -len(_TAIL)]
    framed = data[:start] == _HEAD + digest + _MIDDLE and data.endswith(_TAIL)
    if not framed or len(data) < start + len(_TAIL):
        raise _FormError(
            "not a manifest of Sortal, or its first or last bytes are damaged"
        )
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise _FormError("damaged: its bytes do not have the checksum it states")
    return json.loads(body)


def _of_this_version(x: Any) -> dict[str, Any]:
    if type(x) is not dict or x.get("format") != FORMAT:
        raise _FormError("not a manifest of Sortal")
    if x["version"] != VERSION:
        raise _FormError(
            f"written in version {x['version']!r} of the format, this Sortal reads "
            f"{VERSION}; install a newer Sortal"
        )
    return x


def _read(x: Any) -> Manifest:
    x = _of_this_version(x)
    kinds = tuple(_read_kind(k) for k in _a(list, x["kinds"]))
    stored = {_name(n): _read_stored(a) for n, a in _a(dict, x["arrays"]).items()}
    files = {_name(n): _read_file(f) for n, f in _a(dict, x["files"]).items()}
    leaves = tuple(_read_leaf(i, len(kinds)) for i in _a(list, x["leaves"]))
    manifest = Manifest(
        _natural(x["step"]),
        _segment(x["folder"]),
        kinds,
        leaves,
        tuple((_read_path(a), _read_path(b)) for a, b in _a(list, x["aliases"])),
        stored,
        files,
        _a(str, x["graphdef"]),
        x["metadata"],
        _read_metrics(x["metrics"]),
        {_a(str, k): _a(str, v) for k, v in _a(dict, x["versions"]).items()},
        _a(str, x["created"]),
    )
    _check_whole(manifest)
    return manifest


def _read_metrics(x: Any) -> dict[str, float]:
    return {_a(str, k): float.fromhex(v) for k, v in _a(dict, x).items()}


def _check_whole(m: Manifest) -> None:
    """Checks that arrays lie inside stored arrays, and that the files are theirs."""
    paths = [x.path for x in m.leaves]
    known = set(paths)
    if len(known) != len(paths):
        raise _FormError("two leaves have one path")
    for path in paths:
        if any(path[:n] in known for n in range(len(path))):
            raise _FormError(f"the path {show(path)} runs through a leaf")
    for leaf in m.leaves:
        for a in arrays(leaf.value):
            _check_place(m, leaf, a)
    # Counted first, so that no small file can ask for a long list.
    if sum(math.prod(chunk_counts(a)) for a in m.arrays.values()) > len(m.files):
        raise _FormError("the arrays have more chunks than there are files")
    expected = set()
    for name, stored in m.arrays.items():
        chunks = chunk_files(name, stored)
        expected.update(chunks)
        size = chunk_size(stored)
        if any(c in m.files and m.files[c].size != size for c in chunks):
            raise _FormError(f"the files of {name} do not have the size of its chunks")
    groups = {k.group for k in m.kinds} | {name.partition("/")[0] for name in m.arrays}
    expected |= {"zarr.json", *(f"{group}/zarr.json" for group in groups)}
    expected |= {f"{name}/zarr.json" for name in m.arrays}
    if expected != set(m.files):
        odd = min(expected ^ set(m.files))
        raise _FormError(f"the files are not those of the arrays: {odd}")


def _check_place(m: Manifest, leaf: Leaf, a: Array) -> None:
    if a.place is None:
        if a.nbytes:
            raise _FormError(f"{show(leaf.path)} has no stored array")
        return
    stored = m.arrays[a.place.array]
    if a.place.offset is None:
        fits = (stored.dtype, stored.shape) == (storage_dtype(a.dtype), a.stored_shape)
    else:
        end = a.place.offset + a.nbytes
        fits = stored.dtype == "uint8" and stored.shape and end <= stored.shape[0]
    if not fits:
        raise _FormError(f"{show(leaf.path)} does not lie inside {a.place.array}")


def chunk_files(name: str, stored: Stored) -> list[str]:
    """The chunk files of an array, in row-major order."""
    places = itertools.product(*map(range, chunk_counts(stored)))
    return [chunk_file(name, at) for at in places]


def chunk_file(name: str, at: Iterable[int]) -> str:
    """The file of one chunk, from its index along each axis."""
    return f"{name}/c" + "".join(f".{i}" for i in at)


def chunk_size(stored: Stored) -> int:
    """The bytes of the file of each chunk, of which the last four are its checksum."""
    return math.prod(stored.chunks) * numpy_dtype(stored.dtype).itemsize + 4


def is_chunk(file: str) -> bool:
    """Whether a file of a step is a chunk, not metadata of an array or a group."""
    return not file.endswith("zarr.json")


def chunk_counts(stored: Stored) -> list[int]:
    """The number of chunks along each axis."""
    return [-(-n // c) for n, c in zip(stored.shape, stored.chunks, strict=True)]


def storage_dtype(name: str) -> str:
    """The zarr data type for a dtype; dtypes that zarr lacks are stored as bytes."""
    return name if name in _ZARR else "uint8"


_ZARR = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 "
    "float64 complex64 complex128".split()
)


def _read_kind(x: Any) -> Kind:
    name = None if x["name"] is None else _class_name(x["name"])
    bases = tuple(_a(str, b) for b in _a(list, x["bases"]))
    return Kind(name, bases, _segment(x["group"]))


def _class_name(x: Any) -> str:
    """A name that Python can give to a class."""
    _a(str, x).encode()
    if "\0" in x:
        raise _FormError(f"{x!r:.60} where the name of a class is expected")
    return x


def _read_leaf(x: Any, kinds: int) -> Leaf:
    kind = _natural(x["kind"])
    if kind >= kinds:
        raise _FormError(f"a leaf of kind {kind}, of {kinds}")
    if x.get("keep", "last") != "last":
        raise _FormError(f"a leaf that is kept {x['keep']!r}")
    path, value = _read_path(x["path"]), _read_tree(x["value"], 0)
    metadata = _a(dict, x.get("metadata", {}))
    if any(type(v) not in METADATA for v in metadata.values()):
        raise _FormError(f"a leaf with the metadata {metadata!r:.60}")
    return Leaf(path, kind, value, metadata, "keep" in x)


def _read_path(x: Any) -> Path:
    path = tuple(_a(list, x))
    for key in path:
        if type(key) not in (str, int):
            raise _FormError(f"a path with the entry {key!r}")
    return path


def _read_stored(x: Any) -> Stored:
    shape, chunks = _shape(x["shape"]), _shape(x["chunks"])
    if len(shape) != len(chunks) or 0 in chunks or 0 in shape:
        raise _FormError(f"an array of shape {shape} in chunks of {chunks}")
    if x["dtype"] not in _ZARR:
        raise _FormError(f"an array of dtype {x['dtype']!r}")
    return Stored(x["dtype"], shape, chunks)


def _read_file(x: Any) -> File:
    size, checksum = x
    if not re.fullmatch(r"crc32c:[0-9a-f]{8}|sha256:[0-9a-f]{64}", checksum):
        raise _FormError(f"a checksum {checksum!r}")
    return File(_natural(size), checksum)


def _read_tree(x: Any, depth: int) -> Tree:
    if "shape" in x:
        return _read_array(x)
    if "plain" in x:
        what, value = x["plain"]
        return Plain(_READ_PLAIN[_a(str, what)](value))
    what = x["nest"]
    if what not in ("dict", "list", "tuple", "none", "node"):
        raise _FormError(f"a value nested in a {what!r}")
    if depth > 200:
        raise _FormError("values nested too deep")
    children = tuple(_read_tree(c, depth + 1) for c in _a(list, x.get("children", [])))
    keys = tuple(_a(list, x.get("keys", [None] * len(children))))
    if any(type(key) not in (str, int, type(None)) for key in keys):
        raise _FormError("a value with keys that are neither texts nor numbers")
    many = len(set(keys)) < len(keys) and (what == "dict" or any(keys))
    bare = what in ("list", "tuple", "none") and any(k is not None for k in keys)
    if len(keys) != len(children) or many or bare or (what == "none" and children):
        raise _FormError("a value whose keys are not those of its children")
    name = x.get("name")
    if (name is None) is (what == "node"):
        raise _FormError(f"a {what} of the class {name!r:.60}")
    return Nest(what, name if name is None else _class_name(name), keys, children)


def _read_array(x: Any) -> Array:
    if x["dtype"] not in DTYPES:
        raise _FormError(f"an array of dtype {x['dtype']!r}")
    form = x.get("form", "jax")
    if form not in ("jax", "numpy", "scalar"):
        raise _FormError(f"an array of the form {form!r}")
    key = x.get("key")
    if key is not None:
        impl, words = key
        key = Key(_a(str, impl), _natural(words))
        if x["dtype"] != "uint32":
            raise _FormError("keys that are not made of uint32")
    place = None
    if "in" in x:
        offset = x.get("at")
        place = Place(_name(x["in"]), None if offset is None else _natural(offset))
    shape, weak = _shape(x["shape"]), _a(bool, x.get("weak", False))
    found = Array(shape, x["dtype"], form, weak, key, _spec(x.get("sharding")), place)
    # NumPy's limit, which holds for arrays without elements too.
    sizes = [n for n in found.stored_shape if n]
    if math.prod(sizes) * numpy_dtype(found.dtype).itemsize >= 1 << 63:
        raise _FormError(f"a shape {shape!r:.60}")
    return found


def _spec(x: Any) -> Any:
    """A sharding, of the form that ``spec_of`` gives."""
    if x is None or (type(x) is dict and x.keys() == {"text"}):
        return x if x is None else {"text": _a(str, x["text"])}
    mesh = {_a(str, k): _natural(n) for k, n in _a(dict, x["mesh"]).items()}
    for axes in _a(list, x["spec"]):
        for axis in axes if type(axes) is list else (axes,):
            if axis is not None:
                _a(str, axis)
    return {"mesh": mesh, "spec": x["spec"]}


def _a(kind: type, x: Any) -> Any:
    if type(x) is not kind:
        raise _FormError(f"{x!r:.60} where a {kind.__name__} is expected")
    return x


def _natural(x: Any) -> int:
    if type(x) is not int or not 0 <= x < 1 << 63:
        raise _FormError(f"{x!r:.60} where a size or number is expected")
    return x


def _shape(x: Any) -> tuple[int, ...]:
    shape = tuple(map(_natural, _a(list, x)))
    if len(shape) > 32 or math.prod(shape) >= 1 << 63:
        raise _FormError(f"a shape {shape!r:.60}")
    return shape


def _segment(x: Any) -> str:
    if not _SEGMENT.fullmatch(_a(str, x)):
        raise _FormError(f"a file name {x!r:.60}")
    return x


def _name(x: Any) -> str:
    for part in _a(str, x).split("/"):
        _segment(part)
    return x
