"""capture: returns what a call sows, instead of leaving it in the model."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sortal._engine.foreign import is_kind, twin
from sortal._engine.nodes import get_dict
from sortal._engine.paths import Path
from sortal._engine.state import State, as_state
from sortal._engine.variable import Variable, describe
from sortal.errors import ArgumentError, PathError, listing
from sortal.module import RECORDS, Module, is_module, iter_modules
from sortal.nnx.containers import Items

_METHODS = "methods"
"""Where records say that methods sow: another structure, so another program."""


def capture(
    fn: Any, *var_types: Any, init: Any = None, method_outputs: Any = None
) -> Callable[..., Any]:
    """A function that also returns what its module sows or perturbs in a call.

    While the function runs, modules keep what they sow apart from their attributes: a
    method ``features`` may sow ``'features'``.

    Args:
      fn: a Module, of Sortal or of Flax, a method of one, or a function whose first
        argument is one. A kind gives a decorator.
      *var_types: the kinds to return.
      init: a State of what has been sown before the call, such as perturbations.
      method_outputs: a kind; what each public method and ``__call__`` returns is sown
        as it, by the method's name. Those of base classes are left out.

    Returns:
      The function; it returns ``(output, state, ...)`` with a State for each kind, or
      the output alone if there are none. The module is left without them; what earlier
      calls have sown is there again afterwards.

    Raises:
      ArgumentError: at a call, the first argument is no Module.
      PathError: at a call, ``init`` has leaves of modules that are not there.

    Example:
      >>> import jax.numpy as jnp
      >>> from sortal import nnx
      >>> class Net(nnx.Module):
      ...     def __call__(self, x):
      ...         self.sow(nnx.Intermediate, "h", x)
      ...         return 2 * x
      >>> y, seen = nnx.capture(Net(), nnx.Intermediate)(jnp.array(3.0))
      >>> float(seen["h"].value[0]), float(y)
      (3.0, 6.0)
    """
    if isinstance(fn, type) and is_kind(fn, Variable):
        return lambda f: capture(
            f, fn, *var_types, init=init, method_outputs=method_outputs
        )
    owner = fn.__self__ if isinstance(fn, types.MethodType) else fn
    owner = owner if is_module(owner) else None

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        module: Any = owner if owner is not None or not args else args[0]
        if not is_module(module):
            found = describe(module) if hasattr(module, "dtype") else type(module)
            raise ArgumentError(
                "capture needs to know which module sows: a Module, a method of one, "
                "or a function whose first argument is one; found a "
                f"{getattr(found, '__name__', found)}."
            )
        given = [] if init is None else list(as_state(init).flat_state())
        asked = () if method_outputs is None else (method_outputs,)
        kinds = map(_of_ours, [*var_types, *(type(x) for _, x in given), *asked])
        recorded: dict[type, dict[Path, Any]] = {kind: {} for kind in kinds}
        theirs = [p for p, m in iter_modules(module) if not isinstance(m, Module)]
        here = [(p, x) for p, x in given if p[:-1] not in theirs]
        there = [(p, x) for p, x in given if p[:-1] in theirs]
        call: Any = functools.partial(fn, *args, **kwargs)
        if theirs:
            call = _captured_by_flax(call, module, there, recorded, method_outputs)
        with _recording(module, here, recorded, method_outputs):
            out = call()
        states = [State.from_flat_path(recorded[_of_ours(kind)]) for kind in var_types]
        return (out, *states) if states else out

    return wrapper


@contextlib.contextmanager
def _recording(
    module: Any,
    given: Sequence[tuple[Path, Any]],
    recorded: dict[type, dict[Path, Any]],
    method_outputs: Any,
) -> Iterator[None]:
    """Has modules record kinds apart; afterwards ``recorded`` has them by path."""
    modules = _modules(module)
    homes = {path: {kind: Items() for kind in recorded} for path, _ in modules}
    homeless = [path for path, _ in given if path[:-1] not in homes]
    if homeless:
        raise PathError(
            "init has leaves for modules that the model does not have:\n"
            + listing([str(path) for path in homeless])
        )
    for path, leaf in given:
        homes[path[:-1]][_of_ours(type(leaf))][path[-1]] = leaf.replace()
    before = [(m, get_dict(m).get(RECORDS)) for _, m in modules]
    for path, m in modules:
        records = Items({kind.__qualname__: x for kind, x in homes[path].items()})
        if method_outputs is not None:
            records[_METHODS] = method_outputs.__qualname__
        setattr(m, RECORDS, records)
    try:
        with _sowing_methods({type(m) for _, m in modules}, method_outputs):
            yield
    finally:
        for path, m in _modules(module):
            _collect(path, m, recorded)
        for m, old in before:
            if old is not None:
                setattr(m, RECORDS, old)
            elif RECORDS in get_dict(m):
                delattr(m, RECORDS)


def _of_ours(kind: Any) -> Any:
    return kind if issubclass(kind, Variable) else twin(kind)


def _of_flax(kind: Any) -> Any:
    return twin(kind) if issubclass(kind, Variable) else kind


def _captured_by_flax(
    call: Callable[[], Any],
    module: Any,
    given: Sequence[tuple[Path, Any]],
    recorded: dict[type, dict[Path, Any]],
    method_outputs: Any,
) -> Callable[[], Any]:
    """``call``, with what modules of Flax sow in it put among what is recorded."""
    from flax import nnx as flax

    # Flax's capture sees what it reaches from one module without leaving its own. It
    # wraps the methods of all classes there, which must not be those of flax.Module.
    everything = dict(iter_modules(module))
    holder, roots = type("Holder", (flax.Module,), {})(), {}
    for path, m in everything.items():
        above = (path[:n] for n in range(len(path) - 1, -1, -1))
        over = next((everything[p] for p in above if p in everything), None)
        if not isinstance(m, Module) and (over is None or isinstance(over, Module)):
            name = f"m{len(roots)}"
            roots[name] = path
            setattr(holder, name, m)

    kinds = {_of_flax(kind): kind for kind in recorded}
    kinds = {k: kind for k, kind in kinds.items() if issubclass(k, flax.Variable)}
    init = flax.State({})
    for path, x in given:
        name = max((n for n, p in roots.items() if path[: len(p)] == p), key=len)
        below = (name, *path[len(roots[name]) :])
        at = init
        for key in below[:-1]:
            at = at.setdefault(key, flax.State({}))
        at[below[-1]] = _of_flax(type(x))(x.get_value())
    outputs = method_outputs and _of_flax(method_outputs)

    def captured() -> Any:
        out: list[Any] = []
        capturing = flax.capture(
            lambda _: out.append(call()), *kinds, init=init, method_outputs=outputs
        )
        try:
            returned = capturing(holder)
        except BaseException:
            flax.capture(lambda _: None, *kinds)(holder)  # which ends the one above
            raise
        for state in returned[1:] if kinds else ():
            for (name, *rest), x in as_state(state).flat_state():
                recorded[kinds[type(x)]][(*roots[name], *rest)] = x
        return out[0]

    return captured


def _modules(module: Module) -> list[tuple[Path, Module]]:
    return [(path, m) for path, m in iter_modules(module) if isinstance(m, Module)]


def _collect(path: Path, module: Module, recorded: dict[type, Any]) -> None:
    """Takes what a module recorded; one that is new has it in its attributes."""
    records = get_dict(module).get(RECORDS)
    if records is not None:
        for kind, found in recorded.items():
            mine = records.get(kind.__qualname__, {})
            found.update({(*path, name): x for name, x in mine.items()})
        return
    for name, x in list(get_dict(module).items()):
        if _of_ours(type(x)) in recorded:
            recorded[_of_ours(type(x))][(*path, name)] = x
            delattr(module, name)


@contextlib.contextmanager
def _sowing_methods(classes: set[type], kind: Any) -> Iterator[None]:
    """Has the methods of classes sow what they return, if there is a kind for it."""
    replaced = []
    for cls in classes if kind is not None else ():
        for name, method in list(vars(cls).items()):
            public = not name.startswith("_") or name == "__call__"
            if public and isinstance(method, types.FunctionType):
                replaced.append((cls, name, method))
                setattr(cls, name, _sowing(method, name, kind))
    try:
        yield
    finally:
        for cls, name, method in replaced:
            setattr(cls, name, method)


def _sowing(method: Any, name: str, kind: Any) -> Any:
    @functools.wraps(method)
    def sowing(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = method(self, *args, **kwargs)
        self.sow(kind, name, out)
        return out

    return sowing
