"""jit and eval_shape over modules."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from sortal._engine.foreign import to_native
from sortal._engine.variable import describe
from sortal._nnx_names import refuse_unknown
from sortal.errors import ArgumentError, listing
from sortal.functional import merge, split
from sortal.sharding.mesh_axes import unseen_rules
from sortal.transforms._adapter.binding import BoundArguments, write_back
from sortal.transforms._adapter.decorator import NO_FUNCTION, as_decorator
from sortal.transforms._adapter.effects import Result
from sortal.transforms._adapter.functions import by_position, named_positions, unbind
from sortal.transforms._adapter.lanes import unsorted
from sortal.transforms._adapter.tracing import (
    FlatModule,
    find_flat_modules,
    replace_roots,
    run,
)
from sortal.transforms.ahead import Lowered
from sortal.transforms.donate import Donation, rejoin, with_first
from sortal.transforms.refusals import explain_failure, note_lost, refuse_stale
from sortal.transforms.retrace import History
from sortal.transforms.shardings import Sharded, as_declared

_OF_JAX = frozenset(inspect.signature(jax.jit).parameters)
_OF_ARGUMENTS = (TypeError, ValueError)
"""What JAX raises where it refuses arguments for what they are."""
_WAYS = ("in", "out")


class Jitted:
    """A function compiled by ``jit``; call it as the function itself."""

    def __init__(
        self,
        fn: Callable[..., Any],
        options: dict[str, Any],
        donate: Any = None,
        on_retrace: str = "ignore",
    ):
        self._fn, self._first = unbind(fn)
        options = _shift(options, len(self._first))
        for name in {"in_shardings", "out_shardings"} & options.keys():
            options[name] = to_native(options[name])
        self._static = named_positions(
            self._fn, options.get("static_argnums"), options.get("static_argnames")
        )
        donated = named_positions(
            self._fn, options.get("donate_argnums"), options.get("donate_argnames")
        )
        # JAX takes shardings by position alone.
        self._placed = options.get("in_shardings") is not None
        self._history = History(self._fn, self._static, on_retrace)
        self._donation: Donation | None = None
        if donated or (donate is not None and donate is not False):
            mirrored = isinstance(options.get("in_shardings"), (tuple, list))
            self._donation = Donation(self._fn, donate, donated, self._static, mirrored)
        kept = {k: x for k, x in options.items() if not k.startswith("donate")}
        self._inner = self._history
        if self._donation is not None:
            # Inside of other transforms it is another program, so this is no retrace.
            self._inner = History(self._fn, self._static, on_retrace)
        self._plain: Any = _compiled(_traced(self._fn, self._inner), kept)
        self._jit = self._plain
        if self._donation is not None:
            traced = _donating(self._fn, self._history)
            options = with_first(self._fn, traced, options, self._donation)
            self._jit = _compiled(traced, options)
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (seen := unseen_rules()) is not None:
            with seen:
                return self(*args, **kwargs)
        if kwargs and self._placed:
            args, kwargs = by_position(self._fn, self._first, args, kwargs)
        first, donation = self._first, self._donation
        bound = BoundArguments((*first, *args) if first else args, kwargs, self._static)
        given, named, call = bound.args, bound.kwargs, self._plain
        try:
            if donation is not None and donation.acts(bound):
                given, named = donation.lend(bound)
                call = self._jit
            result = call(*given, **named)
        except BaseException as e:
            if isinstance(e, (RuntimeError, *_OF_ARGUMENTS)):
                explain_failure(self._fn, bound, self._static, e)
            if donation is not None:
                note_lost(self._fn, bound, e)
            raise
        out = write_back(bound, result)
        if type(call) is Sharded:
            call.place(bound, given, named, result.effects)
        return out

    def _without_running(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if kwargs and self._placed:
            args, kwargs = by_position(self._fn, self._first, args, kwargs)
        bound = BoundArguments((*self._first, *args), kwargs, self._static)
        if self._donation is None:
            return function(*bound.args, **bound.kwargs)
        args, kwargs = self._donation.lend(bound, runs=False)
        return function(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else JittedPartial(self, instance)

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """Lowers for these arguments, as ``jax.jit(f).lower``; nothing is run."""
        lowered = self._without_running(self._jit.lower, args, kwargs)
        return Lowered(lowered, self._caller(args, kwargs))

    def _caller(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What calls a program that was made for these arguments."""
        given = {**dict(enumerate((*self._first, *args))), **kwargs}
        static = {k: x for k, x in given.items() if k in self._static}
        return functools.partial(self._run, static)

    def _run(self, static: dict[Any, Any], program: Any, rest: Any, named: Any) -> Any:
        """Calls a program; ``static`` are the arguments that it is not given."""
        args, kwargs = [*self._first, *rest], dict(named)
        for key, x in static.items():
            if isinstance(key, int):
                args.insert(key, x)
            else:
                kwargs[key] = x
        bound = BoundArguments(tuple(args), kwargs, self._static)
        lent: list[Any] = []
        given, kwargs = bound.args, bound.kwargs
        if self._donation is not None:
            (first, *given), kwargs = self._donation.lend(bound)
            lent = [first]
        dynamic = [x for i, x in enumerate(given) if i not in self._static]
        kwargs = {k: x for k, x in kwargs.items() if k not in self._static}
        try:
            result = program(*lent, *dynamic, **kwargs)
        except BaseException as e:
            refuse_stale(self._fn, bound, e)
            note_lost(self._fn, bound, e)
            if not isinstance(e, _OF_ARGUMENTS) or "transformations" in str(e):
                raise
            said, *rows = (x.strip(" *") for x in str(e).strip().splitlines())
            rows = [
                f"{row.partition(', seen ')[0]}: a model of another structure"
                if row.count(FlatModule.__name__) > 1
                else row
                for row in rows
            ]
            raise ArgumentError(
                "this program was compiled for other arguments:\n"
                f"{listing(rows or [said])}\nCall the function that jit returned, "
                "which compiles for each form, or lower it for this one."
            ) from e
        if isinstance(self._jit, Sharded):
            result = unsorted(*result)
        return write_back(bound, result)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """Traces for these arguments, as ``jax.jit(f).trace``; nothing is run."""
        traced = self._without_running(self._jit.trace, args, kwargs)
        call = self._caller(args, kwargs)
        return Traced(traced, lambda lowered: Lowered(lowered, call))

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Shapes and dtypes of the output; nothing is run or changed."""
        return _shapes(self._fn, (*self._first, *args), kwargs, self._static)

    def clear_cache(self) -> None:
        """Forgets all compiled programs."""
        self._jit.clear_cache()
        self._plain.clear_cache()
        self._history.forget()
        self._inner.forget()
        if self._donation is not None:
            self._donation.forget()


class Traced:
    """What ``Jitted.trace`` returns: what ``jax.jit(f).trace`` does, but for export.

    Its inputs are the flat values that ``jit`` hands to JAX, so an exported function
    of them has no arguments that a caller could write.
    """

    def __init__(self, traced: Any, wrap: Callable[[Any], Lowered]):
        self._traced, self._wrap = traced, wrap

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
        """The same, whose program is not given its first arguments."""
        return Traced(self._traced, lambda x: self._wrap(x).bound(args, kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._traced, name)

    def lower(self, **options: Any) -> Any:
        """As the method of what ``jax.jit(f).trace`` returns."""
        # Only jax.export asks for more than the platforms.
        if options.keys() - {"lowering_platforms"}:
            raise ArgumentError(
                "jax.export.export takes functions compiled by jax.jit; this one was "
                "compiled by jit of Sortal, whose models JAX would not know again in a "
                "call. Write sortal.export(f)(...) for jax.export.export(f)(...)."
            )
        return self._wrap(self._traced.lower(**options))


class JittedPartial(functools.partial):
    """A Jitted with its first arguments given, such as the object of a method."""

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Jitted.lower``, for the remaining arguments."""
        lowered = self.func.lower(*self.args, *args, **{**self.keywords, **kwargs})
        return lowered.bound(self.args, self.keywords)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Jitted.trace``, for the remaining arguments."""
        traced = self.func.trace(*self.args, *args, **{**self.keywords, **kwargs})
        return traced.bound(self.args, self.keywords)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Jitted.eval_shape``, for the remaining arguments."""
        return self.func.eval_shape(*self.args, *args, **{**self.keywords, **kwargs})


def _compiled(traced: Any, options: dict[str, Any]) -> Any:
    if any(options.get(f"{way}_shardings") is not None for way in _WAYS):
        return Sharded(traced, options)
    return jax.jit(traced, **options)


def _traced(fn: Callable[..., Any], history: History) -> Callable[..., Any]:
    """What JAX traces: it runs once for each compile, which is recorded."""

    def traced(*args: Any, **kwargs: Any) -> Result:
        return _recorded(history, fn, args, kwargs)

    return _named_as(fn, traced)


def _donating(fn: Callable[..., Any], history: History) -> Callable[..., Any]:
    """``_traced`` for arguments that were divided by ``Donation.lend``."""

    def traced(lent: Any, /, *args: Any, **kwargs: Any) -> Result:
        whole, named = rejoin(lent, args, kwargs)
        returned = {k for c in find_flat_modules(lent) for k in c.definition.leaves}
        return _recorded(history, fn, whole, named, returned)

    return _named_as(fn, traced)


def _recorded(
    history: History, fn: Any, args: Any, kwargs: Any, keep: Collection[int] = ()
) -> Result:
    seen = history.see(args, kwargs)
    result = as_declared(run(fn, args, kwargs, keep), (args, kwargs))
    history.add(seen)
    return result


def _named_as(fn: Callable[..., Any], traced: Callable[..., Any]) -> Callable[..., Any]:
    return functools.update_wrapper(traced, fn) if hasattr(fn, "__name__") else traced


@as_decorator
def jit(
    fun: Any = NO_FUNCTION,
    *,
    donate: Any = None,
    on_retrace: str = "ignore",
    **options: Any,
) -> Any:
    """``jax.jit`` for functions of modules: what they change is changed afterwards.

    Modules and Variables may stand anywhere among the arguments and in what is
    returned. Only values that the function changed leave the compiled program. Objects
    that are returned are the very objects passed in; Variables shared by several
    arguments are one inside; new attributes and replaced modules are carried over. An
    exception leaves everything as it was. As in JAX, what the function closes over is a
    constant, and so is a model that is a static argument: pass each as an argument that
    is not static, or later values of it are not seen.

    Args:
      fun: the function; without it a decorator is returned.
      donate: a filter, or a Policy, whose ``donate`` column is read; the leaves that
        it takes, of all Modules and Variables among the arguments, give their buffers
        to the call and get new ones back. True
        donates the leaves that the function overwrites; to find them, the first call
        of a structure traces twice. Inside of another transform no Module or Variable
        gives anything away.
      on_retrace: ``"warn"`` gives a RetraceWarning and ``"raise"`` a RetraceError, with
        the text of ``explain_retrace``, whenever it is traced again.
      **options: all of ``jax.jit``'s: ``static_argnums``, ``static_argnames``,
        ``donate_argnums``, ``donate_argnames`` and so on. All leaves of a donated
        module get new buffers. In ``in_shardings`` and ``out_shardings`` a
        ``StateSharding`` or ``Policy`` may stand for a module; what is written to a
        leaf keeps the sharding that the leaf came with.

    Returns:
      A Jitted, or the decorator.

    Raises:
      TraceError: at a call: the function writes to a live object that was not passed
        to it.
      FilterError: at a call: ``donate`` takes no leaf of any argument.
      StaleBufferError: at a call: a leaf holds a buffer that was donated before.
      ShardingError: at a call: arrays are bound to different devices, or go to an
        Explicit mesh on which none lies, outside of ``jax.set_mesh``.
      RetraceError: at a call: it traces again, and ``on_retrace`` is ``"raise"``.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> class Counter(nnx.Module):
      ...     def __init__(self):
      ...         self.n = nnx.Variable(jnp.array(0))
      >>> @nnx.jit
      ... def count(counter):
      ...     counter.n[...] += 1
      >>> counter = Counter()
      >>> count(counter)
      >>> before = counter.n.value
      >>> nnx.jit(lambda c: count(c), donate=nnx.Variable)(counter)
      >>> before.is_deleted(), int(counter.n.value)
      (True, 2)
    """
    refuse_unknown("jit", options, _OF_JAX)
    if not callable(fun):
        raise ArgumentError(
            f"jit takes a function or a callable Module; found {describe(fun)}. Pass "
            "the function itself, not what a call of it returned; options go by "
            "keyword: jit(f, static_argnums=...)."
        )
    return Jitted(fun, options, donate, on_retrace)


def _shift(options: dict[str, Any], by: int) -> dict[str, Any]:
    """Moves positions in options past the arguments that ``unbind`` put first."""
    if not by:
        return options
    moved = dict(options)
    for name in ("static_argnums", "donate_argnums"):
        nums = moved.get(name)
        if nums is not None:
            several = (nums,) if isinstance(nums, int) else nums
            moved[name] = tuple(i + by if i >= 0 else i for i in several)
    if isinstance(moved.get("in_shardings"), (tuple, list)):
        moved["in_shardings"] = ((None,) * by) + tuple(moved["in_shardings"])
    return moved


def eval_shape(f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """What a function would return, with shapes and dtypes for arrays.

    Live objects among the arguments are never touched; where the function returns
    one, it is an abstract copy.

    Args:
      f: the function, such as one that builds a model.
      *args: its arguments.
      **kwargs: its keyword arguments.

    Returns:
      The output with ``jax.ShapeDtypeStruct`` in the place of arrays.

    Example:
      >>> import sortal as nnx
      >>> model = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> model.kernel.value
      ShapeDtypeStruct(shape=(2, 3), dtype=float32)
    """
    fn, first = unbind(f)
    return _shapes(fn, (*first, *args), kwargs, ())


def _shapes(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    static: Collection[Any],
) -> Any:
    args, kwargs = abstracted(args, kwargs, static)
    bound = BoundArguments(args, kwargs, static)
    jitted = jax.jit(
        lambda *args, **kwargs: run(fn, args, kwargs),
        static_argnums=tuple(i for i in static if isinstance(i, int)),
        static_argnames=tuple(k for k in static if isinstance(k, str)),
    )
    return write_back(bound, jitted.eval_shape(*bound.args, **bound.kwargs))


def abstracted(
    args: Sequence[Any], kwargs: dict[str, Any], skip: Collection[Any] = ()
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with abstract copies in the place of live objects.

    Args:
      args: positional arguments.
      kwargs: keyword arguments.
      skip: positions that are left as they are.

    Returns:
      The same, with shapes and dtypes for the arrays of live objects.
    """
    roots = tuple(BoundArguments(args, kwargs, skip).roots)
    if not roots:
        return tuple(args), kwargs
    graphdef, state = split(roots)
    copies = iter(merge(graphdef, jax.eval_shape(lambda s: s, state)))
    args = tuple(
        x if i in skip else replace_roots(x, lambda _: next(copies))
        for i, x in enumerate(args)
    )
    return args, {
        k: x if k in skip else replace_roots(x, lambda _: next(copies))
        for k, x in kwargs.items()
    }
