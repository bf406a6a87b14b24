"""Models to and from files of other libraries."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sortal._engine.leaves import Leaves, store_all
from sortal._engine.paths import Path as ModelPath
from sortal._engine.paths import show
from sortal._engine.plan import bind
from sortal._engine.schema import Schema, kind_name, select
from sortal._engine.state import State
from sortal._engine.statics import EMPTY
from sortal.checkpoint import files
from sortal.checkpoint import manifest as _manifest
from sortal.checkpoint.bucket import Address
from sortal.checkpoint.fitting import (
    ANY_KIND,
    Candidate,
    Options,
    fit,
    listing_of,
    odd_items,
    translate,
)
from sortal.checkpoint.loading import Want, check_shardings, host_value, wanted
from sortal.checkpoint.manifest import encode_path, encoded_paths
from sortal.checkpoint.restoring import shardings
from sortal.checkpoint.values import (
    Array,
    Plain,
    UnsavableError,
    arrays,
    describe,
    without_values,
)
from sortal.checkpoint.verifying import open_step
from sortal.errors import (
    ArgumentError,
    NoCheckpointError,
    PathError,
    RestoreError,
    SaveError,
    SortalError,
    listing,
)
from sortal.filters import to_filter
from sortal.interop.files import gguf, huggingface, npz, orbax, safetensors, steps
from sortal.interop.files.entries import (
    Entry,
    Opened,
    as_array,
    dotted,
    in_batches,
    words_of,
)

Names = Mapping[str, str | tuple[str, tuple[int, ...]]]
_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9_]*")
_SUFFIXES: dict[str, Callable[[Path], Opened]] = {
    ".safetensors": safetensors.read,
    ".npz": npz.read,
    ".gguf": gguf.read,
}


def open_arrays(path: str | os.PathLike[str], step: int | str = "latest") -> Opened:
    """Opens a file or folder of arrays: Sortal, Orbax, safetensors, NumPy or GGUF.

    ``step`` is used where the path is a folder of steps. Arrays are read when asked
    for. In an object store there are steps of Sortal only.

    Raises:
      NoCheckpointError: there is nothing of a known format.
      DamagedError: it is damaged.
    """
    at = files.located(path)
    if isinstance(at, Address) and Path(at.name).suffix not in _SUFFIXES:
        return steps.read(open_step(at, step))
    path = files.local(path)
    try:
        return _opened(path, step)
    # Python's own errors for paths that are too long or hold NUL.
    except (OSError, ValueError) as e:
        if isinstance(e, SortalError):
            raise
        raise NoCheckpointError(f"{str(path)!r:.200} cannot be read: {e}") from e


def _opened(path: Path, step: int | str) -> Opened:
    if not path.exists():
        raise NoCheckpointError(f"there is no {path}.")
    if path.suffix in _SUFFIXES and path.is_file():
        return _SUFFIXES[path.suffix](path)
    if (path / _manifest.NAME).is_file() or files.steps(path):
        return steps.read(open_step(path, step))
    if huggingface.is_folder(path):
        return huggingface.read(path)
    if orbax.items(path).trees:
        return orbax.read(path)
    raise NoCheckpointError(
        f"{path} is nothing that Sortal can read: a checkpoint of Sortal or Orbax, a "
        "folder of Hugging Face, or a file .safetensors, .npz or .gguf."
    )


# ----------------------------------------------------------------------------- import
def load_arrays(
    path: str | os.PathLike[str], *, names: Names | None = None, only: Any = None
) -> State:
    """Reads the arrays of a file of another library as a State.

    Args:
      path: a file ``.safetensors``, ``.npz`` or ``.gguf``, a checkpoint of Orbax, or a
        folder of Hugging Face. The name of one of several items of Orbax comes first
        in paths.
      names: globs of paths in the model to globs of names in the file; see
        ``restore_from``.
      only: a filter of paths; other arrays are not read.

    Returns:
      A State of raw NumPy arrays.

    Raises:
      ArgumentError: it is no path; or the address of something else than steps of
        Sortal; or ``names`` has another form.
      NoCheckpointError: there is nothing of a known format.
      DamagedError: it is damaged.
      RestoreError: ``only`` takes nothing, looks at values, or takes arrays that are
        quantised; or no State has paths like those of the arrays.

    Example:
      >>> import tempfile, numpy as np
      >>> import sortal as nnx
      >>> file = tempfile.mkdtemp() + "/weights.npz"
      >>> np.savez(file, **{"layers.0.kernel": np.ones((2, 3)), "other": np.ones(2)})
      >>> load_arrays(file, only=nnx.At("layers.**")).paths()
      (('layers', 0, 'kernel'),)
    """
    names = _checked(names)
    opened = open_arrays(path)
    renamed = list(_renamed(opened.entries, names, str(path)))
    chosen = _taken(only, renamed, str(path))
    taken = [renamed[i] for i in chosen]
    if opened.format == "gguf" and (odd := list(filter(gguf.is_quantised, taken))):
        raise RestoreError(
            f"arrays of {path} are quantised, and are not read:\n"
            f"{listing(f'{dotted(e.name)}: {e.dtype}' for e in odd)}\n"
            "Leave them out with only=."
        )
    values = _values(opened, chosen, names)
    pairs = [(renamed[i].name, x) for i, x in zip(chosen, values, strict=True)]
    try:
        return State.from_flat_path(pairs)
    except PathError as e:
        raise RestoreError(f"{path}: {e}\nGive others with names=.") from None


def _taken(only: Any, entries: Sequence[Entry], where: str) -> list[int]:
    """The numbers of the entries that a filter takes."""
    if only is None:
        return list(range(len(entries)))
    chosen = to_filter(only)
    if not chosen.structural:
        raise RestoreError(
            f"only={chosen!r} looks at values, which are not read yet; use paths."
        )
    found = [i for i, e in enumerate(entries) if chosen.test(e.name, None, EMPTY, None)]
    if not found:
        raise RestoreError(
            f"only={chosen!r} takes none of the arrays of {where}, of which only paths "
            f"are known; they are:\n{listing(dotted(e.name) for e in entries)}"
        )
    return found


def _values(opened: Opened, at: Sequence[int], names: Names) -> Iterator[Any]:
    """The values of some entries by number, as ``names`` has them."""
    for e in in_batches(opened, [opened.entries[i] for i in at]):
        yield _as_named(e, names)[0].read()


def restore_from(
    path: str | os.PathLike[str],
    root: Any,
    /,
    *,
    names: Names | None = None,
    only: Any = None,
    partial: bool = False,
    cast: bool = False,
    fill: Any = None,
    sharding: Any = None,
) -> tuple[ModelPath, ...]:
    """Reads a file of another library into a live model: all of it, or nothing.

    As strict as ``restore``. Kinds are those of the model; other formats have none.

    Args:
      path: a file ``.safetensors``, ``.npz`` or ``.gguf``, or a checkpoint of Orbax.
      root: a Module, or a container of Modules, Variables and arrays.
      names: globs of paths in the model to globs of names in the file, such as
        ``{"layers.*.kernel": ("model.layers.*.weight", (1, 0))}``; the numbers are the
        axes for ``numpy.transpose`` of the file's array.
      only: a filter; other leaves do not change.
      partial: True allows leaves that only one side has.
      cast: True converts floats to floats, and integers to integers that can hold them.
      fill: gives leaves that the file lacks, as in ``restore``.
      sharding: the shardings of the arrays, as in ``restore``.

    Returns:
      The paths that were restored.

    Raises:
      ArgumentError: it is no path; or the address of something else than steps of
        Sortal; or ``names`` has another form.
      NoCheckpointError: there is nothing of a known format.
      DamagedError: it is damaged.
      RestoreError: it does not fit the model; every difference is listed.

    Example:
      >>> import tempfile
      >>> import sortal as nnx
      >>> file = tempfile.mkdtemp() + "/weights.safetensors"
      >>> layout = {"kernel": ("fc.weight", (1, 0)), "bias": "fc.bias"}
      >>> export(file, nnx.Linear(2, 3, rngs=nnx.Rngs(0)), names=layout)
      >>> restore_from(file, nnx.Linear(2, 3, rngs=nnx.Rngs(1)), names=layout)
      (('bias',), ('kernel',))
    """
    names = _checked(names)
    opened = open_arrays(path)
    plan = bind(root)
    schema = plan.graphdef.schema
    # Formats with string keys lose which entries of a path were integers.
    by_text = _by_text(schema.paths)
    values = dict(zip(encoded_paths(schema), plan.values(), strict=True))
    sources: dict[Any, int] = {}
    given = []
    for n, e in enumerate(_renamed(opened.entries, names, str(path))):
        at = by_text.get(dotted(e.name), encode_path(e.name))
        if opened.format == "orbax" and at not in values:
            # A leaf named ``value`` looks like Flax NNX's last level of that name.
            at = by_text.get(dotted((*e.name, "value")), at)
        sources[at] = n
        given.append(Candidate(at, ANY_KIND, _record(e, values.get(at))))
    options = Options(only, None, partial, None, cast, fill)
    found = fit(plan, given, None, options, str(opened.path))
    places = shardings(sharding, schema, plan)
    wants: list[Want | None] = []
    for pair in found.pairs:
        if isinstance(pair.stored, Plain):
            wants.append(None)
            continue
        (stored,), (live,) = arrays(pair.stored), arrays(pair.live)
        path_here = schema.paths[pair.at]
        wants.append(wanted(path_here, stored, pair.like[0], live, places[pair.at]))
    check_shardings(w for w in wants if w is not None)
    encoded = encoded_paths(schema)
    numbers = [sources[encoded[pair.at]] for pair in found.pairs]
    values = _values(opened, numbers, names)
    new = [
        x if want is None else host_value(want, x)
        for want, x in zip(wants, values, strict=True)
    ]
    at = [p.at for p in found.pairs] + list(found.filled)
    store_all([Leaves(plan.leaves[i] for i in at)], [*new, *found.filled.values()])
    return tuple(schema.paths[p.at] for p in found.pairs)


def _by_text(paths: Iterable[Any]) -> dict[str, Any]:
    """The model's paths by their names in a file; refuses two of one name."""
    found: dict[str, list[Any]] = {}
    for path in paths:
        found.setdefault(dotted(path), []).append(path)
    if twice := [", ".join(map(show, same)) for same in found.values() if same[1:]]:
        raise RestoreError(
            "several leaves of the model have one name in files of other libraries; "
            f"the model was left as it was:\n{listing(twice)}"
        )
    return {text: encode_path(path) for text, (path,) in found.items()}


def _record(e: Entry, live: Any) -> Array | Plain:
    """The record of an entry; uint32 words are keys where the model has keys."""
    if e.plain:
        return Plain(e.read())
    if isinstance(live, (jax.Array, jax.ShapeDtypeStruct)):
        mine = describe(live, [])
        if isinstance(mine, Array) and mine.key is not None:
            whole = (f"key<{mine.key.impl}>", mine.shape)
            if (e.dtype, e.shape) in (("uint32", mine.stored_shape), whole):
                return mine
    if e.dtype.startswith("key<"):
        return Array((*e.shape, words_of(e)), "uint32", "numpy")
    return Array(e.shape, e.dtype, "numpy")


def _checked(names: Any) -> Names:
    """``names`` as given, none if it is absent; refuses another form."""
    given = {} if names is None else names
    if odd := odd_items(given, _is_naming):
        raise ArgumentError(
            "names= is a mapping from globs of paths to globs of names, or to such a "
            "glob and the order of axes, as in names={'kernel': ('fc.weight', (1, "
            f"0))}}; found:\n{listing_of(odd)}"
        )
    return given


def _is_naming(ours: Any, theirs: Any) -> bool:
    if type(ours) is not str:
        return False
    if type(theirs) is tuple and len(theirs) == 2:
        theirs, axes = theirs
        if type(axes) is not tuple or any(type(n) is not int for n in axes):
            return False
    return type(theirs) is str


def _renamed(entries: list[Entry], names: Names, where: str) -> Iterator[Entry]:
    """Entries under the names that they have in the model."""
    used = set()
    for e in entries:
        found, pattern = _as_named(e, names)
        used.add(pattern)
        yield found
    if unused := [f"{ours!r}: {names[ours]!r}" for ours in names if ours not in used]:
        raise RestoreError(
            f"names= has patterns that fit nothing in {where}:\n{listing(unused)}\n"
            f"Its names are:\n{listing(dotted(e.name) for e in entries)}"
        )


def _as_named(e: Entry, names: Names) -> tuple[Entry, str | None]:
    """An entry as the first pattern that fits has it, and the pattern."""
    for ours, theirs, axes in _patterns(names):
        new = translate(theirs, ours, e.name)
        if new is not None:
            return _transposed(e._replace(name=new), axes), ours
    return e, None


def _patterns(names: Names) -> Iterator[tuple[str, str, tuple[int, ...] | None]]:
    for ours, theirs in names.items():
        yield (ours, *theirs) if isinstance(theirs, tuple) else (ours, theirs, None)


def _transposed(e: Entry, axes: tuple[int, ...] | None, back: bool = False) -> Entry:
    """An entry with its axes in another order; ``back`` in the order before."""
    if axes is None:
        return e
    if sorted(axes) != list(range(len(e.shape))):
        raise (SaveError if back else RestoreError)(
            f"{dotted(e.name)} has the shape {e.shape}, of which {axes} are not the "
            "axes."
        )
    order = tuple(map(axes.index, range(len(axes)))) if back else axes
    return e._replace(
        shape=tuple(e.shape[i] for i in order),
        read=lambda: np.transpose(e.read(), order),
    )


# ----------------------------------------------------------------------------- export
def export(
    path: str | os.PathLike[str],
    root: Any,
    /,
    *,
    names: Names | None = None,
    only: Any = None,
) -> None:
    """Writes a model as a file of another library.

    Only arrays are written, without kinds and sharing; PRNG keys as uint32 words.

    Args:
      path: a file ``.safetensors`` or ``.npz``, or a new folder for Orbax.
      root: a Module, or a container of Modules, Variables and arrays.
      names: as in ``restore_from``.
      only: a filter; all leaves if absent.

    Raises:
      ArgumentError: it is no path; or the address of something else than steps of
        Sortal; or ``names`` has another form.
      SaveError: a leaf is not an array, or the format cannot hold it; or a pattern fits
        no leaf.
      FilterError: ``only`` is not a filter.

    Example:
      >>> import tempfile
      >>> import sortal as nnx
      >>> file = tempfile.mkdtemp() + "/weights.safetensors"
      >>> export(file, nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> load_arrays(file)["kernel"].shape
      (2, 3)
    """
    names = _checked(names)
    plan = bind(root)
    schema = plan.graphdef.schema
    at = range(len(schema))
    if only is not None:
        at = select(schema, (only,), plan.view).parts[0][1]
    if idle := [
        f"{ours!r}: {names[ours]!r}"
        for ours, theirs, _ in _patterns(names)
        if all(translate(ours, theirs, path) is None for path in schema.paths)
    ]:
        raise SaveError(
            f"names= has patterns that fit no leaf:\n{listing(idle)}\n"
            f"The leaves are:\n{listing(map(show, schema.paths))}"
        )
    values = plan.values()
    types = (jax.Array, np.ndarray, np.generic)
    odd = [schema.describe(i) for i in at if not isinstance(values[i], types)]
    if odd or not at:
        raise SaveError(
            "only arrays can be exported; leave other leaves out with only=. Found:\n"
            + (listing(odd) or "  no leaf at all")
        )
    if empty := [
        f"{schema.describe(i)}: {why}" for i in at if (why := without_values(values[i]))
    ]:
        raise SaveError(f"these leaves have nothing to export:\n{listing(empty)}")
    path = files.local(path)
    entries = [_live(schema, i, values[i]) for i in at]
    if is_file(path):
        entries = [as_array(e) or e for e in entries]
    write_arrays(path, [_exported(e, names) for e in entries])


def _live(schema: Schema, i: int, x: Any) -> Entry:
    """The entry of a leaf that is an array."""
    live: list[Any] = []
    try:
        record = describe(x, live)
    except UnsavableError as e:
        raise SaveError(f"{schema.describe(i)}: {e}") from None
    kind = schema.kinds[i]
    name = None if kind is None else kind_name(kind)
    return steps.entry(schema.paths[i], record, name, lambda: live[0])


def _exported(e: Entry, names: Names) -> Entry:
    """An entry under the name that it has in the file."""
    for ours, theirs, axes in _patterns(names):
        new = translate(ours, theirs, e.name)
        if new is not None:
            return _transposed(e._replace(name=new), axes, back=True)
    return e


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path has the ending of a file; that of ``run-v1.5`` is none."""
    return bool(_ENDING.fullmatch(Path(path).suffix))


def write_arrays(path: Path, entries: list[Entry], folder: bool = False) -> None:
    """Writes entries in the format of the path's ending, or in a folder as Orbax."""
    if folder or not is_file(path):
        orbax.write(path, entries)
    elif path.suffix == ".safetensors":
        safetensors.write(path, entries)
    elif path.suffix == ".npz":
        npz.write(path, entries)
    else:
        raise SaveError(
            f"{path.name}: no format of this ending is written; use .safetensors, "
            ".npz, or a folder for Orbax."
        )
