"""Compiled functions of models as bytes, to be called without the model's class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.tree_util as jtu

from sortal._engine.leaves import Leaves, Slot, store_all
from sortal._engine.nested import nest
from sortal._engine.nodes import is_root
from sortal._engine.paths import Path, show
from sortal._engine.plan import bind
from sortal._engine.state import State
from sortal._engine.variable import describe, is_variable
from sortal.errors import ArgumentError, listing
from sortal.transforms._adapter.binding import BoundArguments
from sortal.transforms._adapter.tracing import FlatModule, is_flat_module, run
from sortal.transforms.refusals import explain_failure

_FORM = b"sortal export 2\n"
_DIGEST = hashlib.sha256().digest_size


class Exported:
    """A function as StableHLO, with the paths of the leaves that it reads and writes.

    Made by ``export`` and by ``Exported.deserialize``.

    Attributes:
      exported: the ``jax.export.Exported`` behind it: its MLIR, platforms, devices.
      layout: the arguments as text, with ``'model'`` and ``'*'`` for their leaves.
      paths: for each model, the paths of its leaves.
      written: for each model, the positions of the leaves that a call writes.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal
      >>> count = sortal.Variable(jnp.array(1))
      >>> def add(count, x):
      ...     count[...] += x
      >>> exported = sortal.export(add)(count, 2)
      >>> exported.call(count, 5)
      >>> int(count.value)
      6
    """

    def __init__(
        self,
        exported: Any,
        layout: str,
        paths: Sequence[Sequence[Path]],
        written: Sequence[Sequence[int]],
    ):
        self.exported, self.layout = exported, layout
        self.paths = tuple(tuple(map(tuple, x)) for x in paths)
        self.written = tuple(map(tuple, written))

    def call(self, *args: Any) -> Any:
        """Calls it; what it writes is written to the models or States passed in.

        Args:
          *args: as the function was exported for. A State with the paths of a model may
            stand for the model, so that its class is not needed.

        Returns:
          What the function returns.

        Raises:
          ArgumentError: arguments are built differently, models have other paths, some
            leaves other shapes or dtypes, or two models share a Variable; all are
            listed and nothing is changed.
          TraceError: a model belongs to another trace than the current one.
        """
        models, plain, layout = _divided(args)
        if layout != self.layout:
            raise ArgumentError(
                f"the function was exported for the arguments {self.layout}; found "
                f"{layout}."
            )
        self._check(models)
        values = [
            x.values_list() if isinstance(x, State) else bind(x).values()
            for x in models
        ]
        try:
            out, new = self.exported.call(values, plain)
        except (RuntimeError, TypeError, ValueError) as e:
            bound = BoundArguments(args, {})
            explain_failure(self.call, bound, (), e, option=None)
            self._refuse_types(values, plain, e)
            raise
        whole = list(zip(models, self.paths, self.written, new, strict=True))
        live = [x for x in whole if not isinstance(x[0], State)]
        mine = [Leaves(bind(x).leaves[i] for i in at) for x, _, at, _ in live]
        store_all(mine, [value for *_, found in live for value in found])
        for model, paths, at, found in whole:
            if isinstance(model, State):
                places = (paths[i] for i in at)
                model.replace_by_pure_dict(nest(zip(places, found, strict=True)))
        return out

    def _refuse_types(self, values: Any, plain: Any, cause: Exception) -> None:
        """Says which leaves have other shapes or dtypes, where JAX has refused some."""
        names = [
            f"model {n}: {show(path)}"
            for n, (paths, mine) in enumerate(zip(self.paths, values, strict=True))
            for path, value in zip(paths, mine, strict=True)
            for _ in jax.tree.leaves(value)
        ]
        names += [f"array {i}" for i in range(len(plain))]
        given = map(_typeof, jax.tree.leaves((values, plain)))
        each = zip(names, given, self.exported.in_avals, strict=True)
        rows = [
            f"{name}: {_shown(x)} for {describe(due)}"
            for name, x, due in each
            if not _fits(x, due)
        ]
        if rows:
            raise ArgumentError(
                "arguments must have the shapes and dtypes that the function was "
                f"exported for; found:\n{listing(rows)}"
            ) from cause

    def _check(self, models: Sequence[Any]) -> None:
        _refuse_shared(models)
        bad = []
        whole = zip(models, self.paths, self.written, strict=True)
        for n, (model, expected, written) in enumerate(whole):
            state, here = isinstance(model, State), f"model {n}: "
            schema = model.schema if state else bind(model).graphdef.schema
            if schema.paths == expected:
                leaves = _leaves(model)
                bad += [
                    f"{here}in a tuple, and so not to be written: {show(expected[i])}"
                    for i in written
                    if type(leaves[i]) is Slot and not leaves[i].writable
                ]
                continue
            known, found = set(expected), set(schema.paths)
            bad += [f"{here}missing: {show(p)}" for p in expected if p not in found]
            bad += [f"{here}unknown: {show(p)}" for p in schema.paths if p not in known]
        if bad:
            raise ArgumentError(
                "models must have the leaves that the function was exported for; "
                f"found:\n{listing(bad)}"
            )

    def serialize(self) -> bytes:
        """The function as bytes, for ``Exported.deserialize``.

        Returns:
          The bytes; JAX keeps them readable as its own ``jax.export`` says.

        Raises:
          ImportError: flatbuffers is not there; ``pip install sortal[export]``.
          ArgumentError: JAX has no form for a dtype or a pytree in it.
        """
        head = {"layout": self.layout, "paths": self.paths, "written": self.written}
        try:
            body = bytes(self.exported.serialize())
        except (KeyError, TypeError, ValueError) as e:
            raise ArgumentError(
                "JAX cannot write this function as bytes, for want of a form for what "
                f"is in its arguments or results: {e}"
            ) from e
        rest = json.dumps(head).encode() + b"\n" + body
        return _FORM + hashlib.sha256(rest).digest() + rest

    @classmethod
    def deserialize(cls, data: bytes) -> Exported:
        """Reads what ``serialize`` returned.

        Args:
          data: the bytes.

        Returns:
          The Exported; no class of the model is needed.

        Raises:
          ArgumentError: the bytes are something else, or some are missing or changed.
        """
        import jax.export

        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise ArgumentError(
                "deserialize takes the bytes that serialize returned; found "
                f"{data!r:.60}."
            )
        data = bytes(data)
        start, end = len(_FORM), len(_FORM) + _DIGEST
        form, digest, rest = data[:start], data[start:end], data[end:]
        if form != _FORM:
            raise ArgumentError(
                "these bytes are no function that sortal.export made; found "
                f"{form!r} at their beginning."
            )
        if hashlib.sha256(rest).digest() != digest:
            raise ArgumentError(
                f"these bytes are cut off or damaged; there are {len(data)}."
            )
        head, body = rest.split(b"\n", 1)
        found = json.loads(head)
        exported = jax.export.deserialize(bytearray(body))
        return cls(exported, found["layout"], found["paths"], found["written"])


def export(
    f: Callable[..., Any], *, platforms: Sequence[str] | None = None
) -> Callable[..., Exported]:
    """``jax.export`` for functions of models: StableHLO that outlives the classes.

    ``jax.export.export(sortal.jit(f))`` is refused: it would be of the flat values that
    ``jit`` hands to JAX, which no caller has.

    Args:
      f: the function, compiled by ``jit`` or not; it may write values, but not change
        structure or return models.
      platforms: for which it is lowered, such as ``("cpu", "cuda")``; the present one
        if absent.

    Returns:
      A function of the same arguments, real or abstract, that returns an Exported. A
      function of sharded arrays is exported for as many devices, and called with arrays
      sharded likewise.

    Raises:
      ArgumentError: at its call: the function changes structure or returns a model, two
        models share a Variable, or a key in a path is neither a string nor an integer.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal
      >>> model = sortal.Linear(2, 3, rngs=sortal.Rngs(0))
      >>> x = jnp.ones((1, 2))
      >>> data = sortal.export(lambda m, x: m(x))(model, x).serialize()
      >>> again = sortal.Exported.deserialize(data)
      >>> bool((again.call(sortal.state(model), x) == model(x)).all())
      True
    """
    import jax.export

    def exporting(*args: Any) -> Exported:
        models, _, layout = _divided(args)
        bound = BoundArguments(args, {})
        _check_models(models, bound)
        flat = bound.flat_modules
        leaves, tree = jtu.tree_flatten(bound.args, is_leaf=is_flat_module)
        plain = [x for x in leaves if not is_flat_module(x)]

        def call(values: Any, plain: Any) -> Any:
            roots = map(FlatModule, values, [x.definition for x in flat])
            rest = iter(plain)
            parts = [next(roots if is_flat_module(x) else rest) for x in leaves]
            return run(f, tree.unflatten(parts), {})

        values = [x.values for x in flat]
        try:
            effects = jax.eval_shape(call, values, plain).effects
        except (RuntimeError, TypeError, ValueError) as e:
            explain_failure(f, bound, (), e, option=None)
            raise
        if effects.edits is not None or effects.outputs:
            raise ArgumentError(
                "a function that is exported returns arrays and writes values; this "
                "one adds, removes or returns Modules or Variables. Return their "
                "values."
            )
        written: list[list[int]] = [[] for _ in flat]
        at = [bound.alias_map.leaf_at[k] for k in effects.written]
        for i, j in at:
            written[i].append(j)

        def pure(values: Any, plain: Any) -> Any:
            result = call(values, plain)
            found: list[list[Any]] = [[] for _ in flat]
            for (i, _), value in zip(at, result.values, strict=True):
                found[i].append(value)
            return result.out, found

        made = jax.export.export(jax.jit(pure), platforms=platforms)(values, plain)
        paths = [x.definition.paths for x in flat]
        return Exported(made, layout, paths, written)

    return exporting


def _is_model(x: Any) -> bool:
    return is_root(x) or isinstance(x, State)


def _divided(args: Any) -> tuple[list[Any], list[Any], str]:
    """The models and States among arguments, all other leaves, and the layout."""
    leaves, tree = jtu.tree_flatten(args, is_leaf=_is_model)
    models = [x for x in leaves if _is_model(x)]
    layout = jtu.tree_unflatten(
        tree, ["model" if _is_model(x) else "*" for x in leaves]
    )
    return models, [x for x in leaves if not _is_model(x)], repr(layout)


def _typeof(x: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)


def _shown(x: Any) -> str:
    without = isinstance(x, jax.ShapeDtypeStruct)
    return f"a shape without values, {describe(x)}," if without else describe(x)


def _fits(x: Any, due: Any) -> bool:
    """Whether an array has a dtype and shape, of which some sizes may be symbols."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return False
    sizes = zip(x.shape, due.shape, strict=False)
    same = x.dtype == due.dtype and x.ndim == due.ndim
    return same and all(a == b for a, b in sizes if isinstance(b, int))


def _refuse_shared(models: Sequence[Any]) -> None:
    live = [x for x in models if not isinstance(x, State)]
    bound = BoundArguments(live, {})
    shared = len(set(map(id, models))) < len(models)
    if bound.roots:
        shared |= any(x is not None for x in bound.alias_map.picks)
    if not shared and len(live) < len(models) > 1:
        held = [{id(leaf) for leaf in _leaves(x) if is_variable(leaf)} for x in models]
        shared = len(set().union(*held)) < sum(map(len, held))
    if shared:
        raise ArgumentError(
            "models that are exported together cannot share Variables. Put them into "
            "one Module, as one model."
        )


def _leaves(model: Any) -> Sequence[Any]:
    return model.leaves() if isinstance(model, State) else bind(model).leaves


def _check_models(models: Sequence[Any], bound: BoundArguments) -> None:
    if any(isinstance(x, State) for x in models):
        raise ArgumentError(
            "export takes live models, not States; merge(graphdef, state) makes one. "
            "What it returns can be called with States."
        )
    _refuse_shared(models)
    bad = [
        show(path)
        for x in bound.flat_modules
        for path in x.definition.paths
        if not all(isinstance(key, (str, int)) for key in path)
    ]
    if bad:
        raise ArgumentError(
            "paths of what is exported consist of strings and integers; found others "
            f"in:\n{listing(bad)}"
        )
