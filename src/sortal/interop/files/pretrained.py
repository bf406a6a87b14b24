"""Pretrained models: tensors of Hugging Face folders to leaves, and back."""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

from sortal._engine.leaves import Leaves, store_all
from sortal._engine.paths import Path, show
from sortal._engine.plan import bind
from sortal._engine.schema import Schema, select
from sortal.checkpoint import files
from sortal.checkpoint.fitting import listing_of, odd_items
from sortal.checkpoint.loading import Want, check_shardings, host_value, wanted
from sortal.checkpoint.restoring import shardings
from sortal.checkpoint.values import (
    Array,
    UnsavableError,
    describe,
    dtype_name,
    without_values,
)
from sortal.errors import (
    ArgumentError,
    NoCheckpointError,
    RestoreError,
    SaveError,
    listing,
)
from sortal.interop.files import huggingface
from sortal.interop.files.entries import Entry, dotted, parts
from sortal.interop.files.landing import land

Names = Mapping[Any, Any]
_TWICE = "several leaves have one name in names=; choose with only=. Found:"


class Fused(NamedTuple):
    """Leaves that lie one after the other in one tensor, as fused matrices do.

    Attributes:
      leaves: the leaves in order, each as a value of ``names``.
      axis: the axis of the tensor.

    Example:
      >>> Fused(("{i}.query.kernel", "{i}.key.kernel"), axis=1).axis
      1
    """

    leaves: tuple[Any, ...]
    axis: int = 0


class Loaded(NamedTuple):
    """What ``load_pretrained`` did.

    Attributes:
      leaves: the paths that were loaded.
      missing: the paths for which the folder has no tensor.
      unused: the tensors that the model has no leaf for.
    """

    leaves: tuple[Path, ...]
    missing: tuple[Path, ...]
    unused: tuple[str, ...]


def load_pretrained(
    folder: str | os.PathLike[str],
    root: Any,
    /,
    names: Names,
    *,
    only: Any = None,
    partial: bool = False,
    cast: bool = False,
    sharding: Any = None,
) -> Loaded:
    """Reads a Hugging Face folder into a live model: all of it, or nothing.

    Each device's part of each array is read from the file straight to that device, a
    large one a few MiB at a time.

    Args:
      folder: with ``model.safetensors``, or shards and their index.
      root: a Module, or a container of Modules, Variables and arrays; abstract ones
        become real.
      names: from names of tensors to paths of leaves, such as
        ``{"model.layers.{i}.mlp.up_proj.weight": ("blocks.{i}.up.kernel", "o i -> i
        o")}``. ``{i}`` stands for one entry of a name. The second text says which axes
        of the tensor become which of the leaf; in parentheses are those that lie in one
        axis: ``"(h d) e -> e h d"``. A ``Fused`` splits one tensor into several leaves;
        a tuple of names joins several tensors along their first axis, or that of a
        ``Fused``.
      only: a filter; other leaves do not change.
      partial: True allows missing leaves and unused tensors, which are returned.
      cast: True converts floats to floats, and integers to integers.
      sharding: the shardings of the arrays, as in ``restore``.

    Returns:
      What was loaded, missing and unused.

    Raises:
      NoCheckpointError: the folder has no such model.
      DamagedError: it is damaged.
      RestoreError: it does not fit the model; every difference is listed.
      ArgumentError: a pattern or axes are malformed.

    Example:
      >>> import tempfile
      >>> import sortal as nnx
      >>> names = {"fc.weight": ("kernel", "o i -> i o"), "fc.bias": "bias"}
      >>> folder = tempfile.mkdtemp()
      >>> save_pretrained(folder, nnx.Linear(2, 3, rngs=nnx.Rngs(0)), names)
      >>> load_pretrained(folder, nnx.Linear(2, 3, rngs=nnx.Rngs(1)), names).leaves
      (('bias',), ('kernel',))
    """
    _check(names)
    path = files.local(folder)
    if not huggingface.is_folder(path):
        raise NoCheckpointError(f"{path} has no model.safetensors and no index of one.")
    tensors = {dotted(e.name): e for e in huggingface.read(path).entries}
    plan = bind(root)
    schema, values = plan.graphdef.schema, plan.values()
    chosen = _chosen(plan, only)
    if twice := _namesakes(schema, chosen):
        raise RestoreError(f"{_TWICE}\n{twice}")
    # Leaves that the filter leaves out are known, so that their tensors are not unused.
    at_all = (*range(len(schema)), *chosen)
    known = {dotted(schema.paths[i]): i for i in at_all}
    used: set[str] = set()
    faults: list[str] = []
    sources: dict[int, _Source] = {}
    for group in _groups(names, tensors, by_tensor=True):
        if not all(leaf.path in known for leaf in group.leaves):
            continue
        used.update(group.tensors)
        at = [known[leaf.path] for leaf in group.leaves]
        try:
            found = _sources(group, tensors, [np.shape(values[i]) for i in at])
        except _UnfitError as e:
            faults.append(str(e))
            continue
        for i, source in zip(at, found, strict=True):
            if i in sources:
                faults.append(f"given twice: {schema.describe(i)}")
            sources[i] = source
    wants = _wants(
        plan, chosen, sources, shardings(sharding, schema, plan), faults, cast
    )
    missing = tuple(schema.paths[i] for i in chosen if i not in sources)
    unused = tuple(name for name in tensors if name not in used)
    if not partial:
        faults += [f"missing: {show(p)}" for p in missing]
        faults += [f"unused: {name}" for name in unused]
    if faults:
        raise RestoreError(
            f"{path} does not fit the model, which was left as it was; it differs in:\n"
            f"{listing(faults)}\npartial=True allows missing and unused ones."
        )
    check_shardings(wants.values())
    new = [_read(want, sources[i]) for i, want in wants.items()]
    store_all([Leaves(plan.leaves[i] for i in wants)], new)
    return Loaded(tuple(schema.paths[i] for i in wants), missing, unused)


def save_pretrained(
    folder: str | os.PathLike[str],
    root: Any,
    /,
    names: Names,
    *,
    only: Any = None,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a model as a Hugging Face folder, the inverse of ``load_pretrained``.

    Args:
      folder: a folder without a model.
      root: a Module, or a container of Modules, Variables and arrays.
      names: as for ``load_pretrained``. A tuple of names splits a leaf into equal
        parts.
      only: a filter; all leaves if absent.
      config: becomes ``config.json``, which ``transformers`` needs.
      shard_bytes: the most bytes of one file.

    Raises:
      SaveError: a leaf has no name, is no array, or no part of one tensor with others;
        or the folder has a model.
      ArgumentError: ``names`` or another argument is malformed.

    Example:
      >>> import tempfile
      >>> import sortal as nnx
      >>> folder = tempfile.mkdtemp()
      >>> save_pretrained(folder, {"w": nnx.Param(jnp.ones(2))}, {"weight": "w"})
    """
    _check(names)
    plan = bind(root)
    schema, values = plan.graphdef.schema, plan.values()
    chosen = _chosen(plan, only)
    if twice := _namesakes(schema, chosen):
        raise SaveError(f"{_TWICE}\n{twice}")
    at = {dotted(schema.paths[i]): i for i in chosen}
    entries: list[Entry] = []
    done: set[str] = set()
    for group in _groups(names, at, by_tensor=False):
        if not all(leaf.path in at for leaf in group.leaves):
            continue
        done.update(leaf.path for leaf in group.leaves)
        entries += _tensors(group, [values[at[leaf.path]] for leaf in group.leaves])
    if odd := [schema.describe(i) for text, i in at.items() if text not in done]:
        raise SaveError(
            f"names= has no name for these leaves; leave them out with only=:\n"
            f"{listing(odd)}"
        )
    huggingface.write(files.local(folder), entries, config, shard_bytes)


def _chosen(plan: Any, only: Any) -> Sequence[int]:
    schema = plan.graphdef.schema
    if only is None:
        return range(len(schema))
    return select(schema, (only,), plan.view).parts[0][1]


def _namesakes(schema: Schema, at: Iterable[int]) -> str:
    """The names in ``names=`` that several leaves have."""
    found = Counter(dotted(schema.paths[i]) for i in at)
    return listing(name for name, n in found.items() if n > 1)


# ----------------------------------------------------------------------------- names
def _check(names: Any) -> None:
    if odd := odd_items(names, _is_rule):
        raise ArgumentError(
            "names= is a mapping from names of tensors to paths of leaves, as in "
            "names={'fc.weight': ('kernel', 'o i -> i o')}, with a Fused for several "
            f"leaves, whose axis counts from 0; found:\n{listing_of(odd)}"
        )


def _is_rule(keys: Any, value: Any) -> bool:
    keys = keys if type(keys) is tuple else (keys,)
    fused = value if isinstance(value, Fused) else Fused((value,))
    if type(fused.leaves) is not tuple or type(fused.axis) is not int or fused.axis < 0:
        return False
    leaves = [x if type(x) is tuple else (x, "") for x in fused.leaves]
    texts = itertools.chain(keys, *leaves)
    pairs = all(len(x) == 2 for x in leaves)
    return bool(keys and leaves and pairs) and all(type(x) is str for x in texts)


class _Leaf(NamedTuple):
    path: str
    axes: _Axes | None


class _Group(NamedTuple):
    """Tensors and leaves that hold the same numbers along one axis of the tensors."""

    tensors: tuple[str, ...]
    leaves: tuple[_Leaf, ...]
    axis: int


def _groups(names: Names, given: Iterable[str], by_tensor: bool) -> Iterator[_Group]:
    """The rules of ``names`` for each of the tensors or leaves that are there."""
    given = list(given)
    for key, value in names.items():
        keys = key if type(key) is tuple else (key,)
        fused = value if isinstance(value, Fused) else Fused((value,))
        leaves = [x if type(x) is tuple else (x, None) for x in fused.leaves]
        pattern = _pattern(keys[0] if by_tensor else leaves[0][0])
        for text in given:
            if (match := pattern.fullmatch(text)) is None:
                continue
            fill = functools.partial(_filled, match.groupdict())
            yield _Group(
                tuple(map(fill, keys)),
                tuple(_Leaf(fill(p), a and _axes(a)) for p, a in leaves),
                fused.axis,
            )


@functools.lru_cache(maxsize=4096)
def _pattern(text: str) -> re.Pattern[str]:
    found = re.split(r"\{([a-z]\w*)\}", text)
    return re.compile(
        "".join(
            f"(?P<{x}>[^.]+)" if n % 2 and x not in found[:n] else
            f"(?P={x})" if n % 2 else re.escape(x)
            for n, x in enumerate(found)
        )
    )  # fmt: skip


def _filled(values: Mapping[str, str], text: str) -> str:
    try:
        return re.sub(r"\{([a-z]\w*)\}", lambda m: values[m[1]], text)
    except KeyError as e:
        raise ArgumentError(
            f"names=: {text!r} has {{{e.args[0]}}}, which the other side lacks."
        ) from None


# ------------------------------------------------------------------------------ axes
class _Axes(NamedTuple):
    """Which axes of a tensor become which of a leaf, ``(h d) e -> e h d``."""

    tensor: tuple[tuple[str, ...], ...]
    leaf: tuple[str, ...]

    def sizes(self, leaf: Sequence[int]) -> dict[str, int]:
        if len(leaf) != len(self.leaf):
            raise _UnfitError(f"has {len(leaf)} axes, and names= says {len(self.leaf)}")
        return dict(zip(self.leaf, leaf, strict=True))

    def tensor_shape(self, leaf: Sequence[int]) -> tuple[int, ...]:
        size = self.sizes(leaf)
        return tuple(math.prod(size[x] for x in group) for group in self.tensor)

    def to_leaf(self, tensor: np.ndarray, leaf: Sequence[int]) -> np.ndarray:
        """A view: axes are only split and reordered."""
        size, flat = self.sizes(leaf), [x for group in self.tensor for x in group]
        apart = tensor.reshape([size[x] for x in flat])
        return apart.transpose([flat.index(x) for x in self.leaf])

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        flat = [x for group in self.tensor for x in group]
        apart = leaf.transpose([self.leaf.index(x) for x in flat])
        return apart.reshape(self.tensor_shape(leaf.shape))

    def joined(self, axis: int, leaf: Sequence[int]) -> tuple[int, int]:
        """The leaf's axis along an axis of the tensor, and how many go in one of it."""
        size, inside = self.sizes(leaf), self.tensor[axis]
        return self.leaf.index(inside[0]), math.prod(size[x] for x in inside[1:])


@functools.lru_cache(maxsize=4096)
def _axes(text: str) -> _Axes:
    left, arrow, right = text.partition("->")
    groups = re.findall(r"\(([a-z0-9_ ]+)\)|([a-z]\w*)", left)
    tensor = tuple(tuple((many or one).split()) for many, one in groups)
    leaf = tuple(right.split())
    flat = [x for group in tensor for x in group]
    said = " ".join(f"({' '.join(g)})" if g[1:] else "".join(g) for g in tensor)
    same = sorted(flat) == sorted(leaf) and len(set(leaf)) == len(leaf)
    if not arrow or not same or said.split() != left.split():
        raise ArgumentError(
            f"names=: {text!r} does not say which axes become which; write for example "
            "'o i -> i o' or '(h d) e -> e h d'."
        )
    return _Axes(tensor, leaf)


def _plain(n: int) -> _Axes:
    names = tuple(f"a{i}" for i in range(n))
    return _Axes(tuple((x,) for x in names), names)


# --------------------------------------------------------------------------- reading
class _UnfitError(Exception):
    """Tensors do not have the shapes that their leaves need."""


class _Part(NamedTuple):
    """What of a leaf lies in one tensor: a range of its axis there."""

    tensor: Entry
    start: int
    stop: int


class _Source(NamedTuple):
    """Where a leaf is: parts of tensors, one after the other along an axis."""

    shape: tuple[int, ...]
    parts: tuple[_Part, ...]
    axis: int
    axes: _Axes

    @property
    def dtype(self) -> str:
        return self.parts[0].tensor.dtype

    @property
    def along(self) -> int:
        """The leaf's axis along which it lies in the file, row after row."""
        return self.axes.joined(0, self.shape)[0] if self.shape else 0

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of the leaf; of the files, only its bytes are read."""
        if not self.shape:
            return np.array(_mapped(self.parts[0].tensor))
        at, each = self.axes.joined(self.axis, self.shape)
        first, last, _ = index[at].indices(self.shape[at])
        done, found = 0, []
        for part in self.parts:
            n = (part.stop - part.start) // each
            low, high = max(first - done, 0), min(last - done, n)
            if low < high or (first == last and not found):
                cut = (slice(None),) * self.axis + (slice(part.start, part.stop),)
                shape = (*self.shape[:at], n, *self.shape[at + 1 :])
                view = self.axes.to_leaf(_mapped(part.tensor)[cut], shape)
                inside = (*index[:at], slice(low, max(low, high)), *index[at + 1 :])
                found.append(np.ascontiguousarray(view[inside]))
            done += n
        return found[0] if len(found) == 1 else np.concatenate(found, at)


def _mapped(e: Entry) -> np.ndarray:
    return e.read() if e.mapped is None else e.mapped()


def _sources(
    group: _Group, tensors: Mapping[str, Entry], shapes: Sequence[tuple[int, ...]]
) -> list[_Source]:
    if absent := [x for x in group.tensors if x not in tensors]:
        raise _UnfitError(f"missing: the tensors {', '.join(absent)}")
    given = [tensors[x] for x in group.tensors]
    axis = group.axis
    found, at = [], 0
    ends = [0]
    for e in given:
        if e.shape and axis >= len(e.shape):
            raise _UnfitError(
                f"shape: {dotted(e.name)} is {e.shape}, without axis {axis}"
            )
        ends.append(ends[-1] + (e.shape[axis] if e.shape else 1))
    for leaf, shape in zip(group.leaves, shapes, strict=True):
        axes = leaf.axes or _plain(len(shape))
        try:
            due = axes.tensor_shape(shape)
        except _UnfitError as e:
            raise _UnfitError(f"shape: {leaf.path} {e}") from None
        size = due[axis] if due else 1
        whole = []
        for e, start in zip(given, ends, strict=False):
            low, high = max(at, start), min(at + size, start + _length(e, axis))
            if low < high or (size == 0 and not whole):
                whole.append(_Part(e, low - start, max(low, high) - start))
        for part in whole:
            theirs = list(part.tensor.shape)
            each = axes.joined(axis, shape)[1] if due else 1
            same = theirs[:axis] + theirs[axis + 1 :] == [*due[:axis], *due[axis + 1 :]]
            if not same or len(theirs) != len(due) or (part.stop - part.start) % each:
                raise _UnfitError(_unlike(group, leaf, shape, given))
        at += size
        found.append(_Source(shape, tuple(whole), axis, axes))
    if at != ends[-1] or len({e.dtype for e in given}) > 1:
        raise _UnfitError(_unlike(group, group.leaves[0], shapes[0], given))
    return found


def _length(e: Entry, axis: int) -> int:
    return e.shape[axis] if e.shape else 1


def _unlike(
    group: _Group, leaf: _Leaf, shape: tuple[int, ...], given: Sequence[Entry]
) -> str:
    theirs = ", ".join(f"{dotted(e.name)} {e.dtype}{list(e.shape)}" for e in given)
    others = f" and {len(group.leaves) - 1} more" if len(group.leaves) > 1 else ""
    return f"shape: {leaf.path} is {list(shape)} in the model{others}; found {theirs}"


def _wants(
    plan: Any,
    chosen: Iterable[int],
    sources: Mapping[int, _Source],
    places: Sequence[Any],
    faults: list[str],
    may_cast: bool,
) -> dict[int, Want]:
    """What each leaf is to become; those that cannot be are faults."""
    schema, values = plan.graphdef.schema, plan.values()
    found = {}
    for i in chosen:
        if i not in sources:
            continue
        live = describe(values[i], [])
        theirs = sources[i].dtype
        if not isinstance(live, Array) or live.key is not None:
            faults.append(f"type: {schema.describe(i)} is {live.shown} in the model")
            continue
        kinds = (jnp.floating, jnp.integer)
        alike = may_cast and any(
            jnp.issubdtype(theirs, k) and jnp.issubdtype(live.dtype, k) for k in kinds
        )
        if theirs != live.dtype and not alike:
            faults.append(
                f"dtype: {schema.describe(i)} is {live.dtype} in the model, {theirs} "
                "in the folder; cast=True converts"
            )
            continue
        if live.form == "jax" and dtypes.canonicalize_dtype(live.dtype) != live.dtype:
            faults.append(
                f"dtype: {schema.describe(i)} is {live.dtype}, which JAX holds only "
                "with jax_enable_x64"
            )
            continue
        stored = Array(live.shape, theirs, "numpy")
        found[i] = wanted(schema.paths[i], stored, values[i], live, places[i])
    return found


def _read(want: Want, source: _Source) -> Any:
    if want.form == "jax":
        return land(want, source.along, source.read)
    return host_value(want, source.read(tuple(slice(0, n) for n in source.shape)))


# --------------------------------------------------------------------------- writing
def _tensors(group: _Group, values: Sequence[Any]) -> Iterator[Entry]:
    """The tensors of a group, whose values are fetched when they are read."""
    for leaf, x in zip(group.leaves, values, strict=True):
        if not isinstance(x, (jax.Array, np.ndarray)):
            raise SaveError(f"{leaf.path} is no array, but a {type(x).__name__}.")
        if why := without_values(x):
            raise SaveError(f"{leaf.path}: {why}.")
        try:
            record: Any = describe(x, [])
        except UnsavableError as e:
            raise SaveError(f"{leaf.path}: {e}.") from None
        if record.key is not None:
            raise SaveError(
                f"{leaf.path} is PRNG keys, which no tensor holds; store their words, "
                "jax.random.key_data(keys), or leave it out with only=."
            )

    def whole() -> np.ndarray:
        each = [
            (leaf.axes or _plain(np.ndim(x))).to_tensor(np.asarray(x))
            for leaf, x in zip(group.leaves, values, strict=True)
        ]
        return each[0] if len(each) == 1 else np.concatenate(each, group.axis)

    axis, count = group.axis, len(group.tensors)
    shape = list(_joined_shape(group, values))
    if count > 1:
        if shape[axis] % count:
            raise SaveError(
                f"{group.leaves[0].path} has {shape[axis]} rows, which are not "
                f"{count} equal tensors."
            )
        shape[axis] //= count
    dtype = dtype_name(np.dtype(values[0].dtype))
    nbytes = math.prod(shape) * np.dtype(values[0].dtype).itemsize
    for n, name in enumerate(group.tensors):
        yield Entry(
            parts(name),
            dtype,
            tuple(shape),
            nbytes,
            whole if count == 1 else lambda n=n: np.split(whole(), count, axis)[n],
        )


def _joined_shape(group: _Group, values: Sequence[Any]) -> tuple[int, ...]:
    """The shape of the leaves as one; refuses those that are no parts of one array."""
    shapes = []
    for leaf, x in zip(group.leaves, values, strict=True):
        try:
            shapes.append((leaf.axes or _plain(x.ndim)).tensor_shape(x.shape))
        except _UnfitError as e:
            raise SaveError(f"shape: {leaf.path} {e}.") from None
    if len(group.tensors) == len(shapes) == 1:
        return shapes[0]
    axis = group.axis
    others = {(*x[:axis], None, *x[axis + 1 :]) for x in shapes}
    if len({x.dtype for x in values}) > 1 or len(others) > 1 or axis >= len(shapes[0]):
        found = ", ".join(
            f"{leaf.path} {dtype_name(x.dtype)}[{','.join(map(str, x.shape))}]"
            for leaf, x in zip(group.leaves, values, strict=True)
        )
        raise SaveError(
            f"leaves of other dtypes or shapes than one tensor has along axis {axis}, "
            f"{', '.join(group.tensors)}: {found}"
        )
    size = sum(x[axis] for x in shapes)
    return (*shapes[0][:axis], size, *shapes[0][axis + 1 :])
