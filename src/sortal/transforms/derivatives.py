"""vjp, jvp, linearize and make_jaxpr over modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Never

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer

from sortal._engine.nested import equal
from sortal._engine.nodes import is_object
from sortal._engine.paths import show
from sortal._engine.state import FlatState, as_state
from sortal._engine.variable import Param, describe, value_of
from sortal._nnx_names import refuse_unknown
from sortal.errors import ArgumentError, GradientError, listing
from sortal.filters import to_filter
from sortal.functional import state
from sortal.transforms._adapter.binding import BoundArguments, write_back
from sortal.transforms._adapter.decorator import NO_FUNCTION, as_decorator
from sortal.transforms._adapter.effects import Ref, Result
from sortal.transforms._adapter.functions import named_positions, unbind
from sortal.transforms._adapter.tracing import replace_roots, run
from sortal.transforms.autodiff import (
    Chosen,
    DiffState,
    FlatCall,
    Taken,
    with_aux,
)
from sortal.transforms.compile import abstracted


@as_decorator
def vjp(
    f: Any = NO_FUNCTION,
    /,
    *primals: Any,
    has_aux: bool = False,
    wrt: Any = Param,
    **_unknown: Never,
) -> Any:
    """The value of a function of modules, and the function that pulls back.

    The cotangent of a module is a State with the paths and kinds of the leaves that
    ``wrt`` takes, empty where it takes none; of anything else, what ``jax.vjp`` gives.
    What else the function changes is changed in the live modules, once. Modules and
    Variables that it returns carry no cotangent: in the cotangent to pull back None
    (or the object) stands in their place. The object of a bound method is no primal: it
    is not differentiated by.

    Args:
      f: the function; without it, or without primals, a decorator is returned.
      *primals: its arguments.
      has_aux: whether ``f`` returns a pair whose second part is not differentiated.
      wrt: a filter that says which leaves of modules to differentiate by.

    Returns:
      ``(out, vjp_fn)`` or ``(out, vjp_fn, aux)``; ``vjp_fn`` takes a cotangent of
      ``out`` and returns a tuple with one cotangent for each primal.

    Raises:
      ArgumentError: ``has_aux`` is given and no pair returned.
      FilterError: ``wrt`` takes no leaf of any module.
      GradientError: a leaf taken is not of a floating or complex dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> y, pull = nnx.vjp(lambda m, x: m(x), model, jnp.ones((1, 2)))
      >>> by_model, by_x = pull(jnp.full((1, 1), 3.0))
      >>> by_model["kernel"].value.tolist()
      [[3.0], [3.0]]
    """
    refuse_unknown("vjp", _unknown)
    options = {"has_aux": has_aux, "wrt": wrt}
    if not primals:
        return _later(vjp, f, options)
    point = _Point(f, primals, **options)
    value, pull, rest = jax.vjp(point, point.call.inputs, has_aux=True)
    out, plain, aux = point.write_back(value, rest)
    fixed = functools.partial(_pull, point.call.chosen, jax.tree.structure(plain))
    vjp_fn = jtu.Partial(fixed, pull)
    return (out, vjp_fn, aux) if has_aux else (out, vjp_fn)


@as_decorator
def jvp(
    f: Any = NO_FUNCTION,
    /,
    primals: Any = None,
    tangents: Any = None,
    *,
    has_aux: bool = False,
    wrt: Any = Param,
    **_unknown: Never,
) -> Any:
    """The value of a function of modules, and its derivative in a direction.

    The tangent for a module is a State, nested dict or module with the leaves that
    ``wrt`` takes, and for anything else what ``jax.jvp`` takes. A Variable that two
    primals share has one tangent, given the same in both. What the function changes is
    changed in the live modules, once. Modules and Variables that it returns carry no
    tangent: None stands in their place.

    Args:
      f: the function; without it, or without primals, a decorator is returned.
      primals: a tuple of its arguments.
      tangents: a tuple with one tangent for each primal.
      has_aux: whether ``f`` returns a pair whose second part is not differentiated.
      wrt: a filter that says which leaves of modules to differentiate by.

    Returns:
      ``(out, tangent_out)`` or ``(out, tangent_out, aux)``.

    Raises:
      ArgumentError: ``has_aux`` is given and no pair returned; or there is not one
        tangent for each primal.
      FilterError: ``wrt`` takes no leaf of any module.
      GradientError: paths, shapes or dtypes of tangents do not fit, all of them
        listed; or a leaf taken is not of a floating or complex dtype.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
      >>> _, dot = nnx.jvp(lambda m: m(jnp.ones((1, 2))), (model,), (ones,))
      >>> dot.tolist()
      [[3.0]]
    """
    refuse_unknown("jvp", _unknown)
    options = {"has_aux": has_aux, "wrt": wrt}
    if primals is None:
        return _later(jvp, f, options)
    for name, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, (tuple, list)):
            raise ArgumentError(
                f"jvp takes {name} as a tuple; found a {type(given).__name__}."
            )
    point = _Point(f, primals, **options)
    inputs = point.call.inputs
    dots = _tangents(point.call.chosen, tangents)
    value, dot, rest = jax.jvp(point, (inputs,), (dots,), has_aux=True)
    out, _, aux = point.write_back(value, rest)
    return (out, dot, aux) if has_aux else (out, dot)


def linearize(
    f: Callable[..., Any], /, *primals: Any, has_aux: bool = False, wrt: Any = Param
) -> Any:
    """The value of a function of modules, and its derivative as a linear function.

    As ``jvp``, but the function is run once, for any number of directions.

    Args:
      f: the function.
      *primals: its arguments.
      has_aux: whether ``f`` returns a pair whose second part is not differentiated.
      wrt: a filter that says which leaves of modules to differentiate by.

    Returns:
      ``(out, f_jvp)`` or ``(out, f_jvp, aux)``; ``f_jvp`` takes one tangent for each
      primal and returns the tangent of ``out``.

    Raises:
      ArgumentError: ``has_aux`` is given and no pair returned.
      FilterError: ``wrt`` takes no leaf of any module.
      GradientError: a leaf taken is not of a floating or complex dtype; and, from
        ``f_jvp``, as ``jvp``.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> w = nnx.Param(jnp.array(3.0))
      >>> y, push = nnx.linearize(lambda w: w**2, w)
      >>> float(y), float(push(jnp.array(1.0)))
      (9.0, 6.0)
    """
    point = _Point(f, primals, has_aux, wrt)
    value, push, rest = jax.linearize(point, point.call.inputs, has_aux=True)
    out, _, aux = point.write_back(value, rest)
    f_jvp = jtu.Partial(functools.partial(_push, point.call.chosen), push)
    return (out, f_jvp, aux) if has_aux else (out, f_jvp)


# Their functions are Partials of these, as JAX's are, so that `jit` may return them.
def _pull(chosen: Chosen, shape: Any, pull: Any, cotangent: Any) -> tuple[Any, ...]:
    given = replace_roots(cotangent, lambda _: None)
    if jax.tree.structure(given) != shape:
        raise GradientError(
            f"the cotangent must have the structure of the output, {shape}, with None "
            f"for modules; found {jax.tree.structure(given)}."
        )
    (found,) = pull(given)
    return tuple(chosen.gradients(found))


def _push(chosen: Chosen, push: Any, *tangents: Any) -> Any:
    return push(_tangents(chosen, tangents))


def _later(transform: Any, f: Any, options: dict[str, Any]) -> Any:
    return functools.wraps(f)(functools.partial(transform, f, **options))


class _Point:
    """A function of live objects, at its primals, as a function of chosen leaves.

    Its output, objects left out, is what JAX differentiates; all else is auxiliary.
    """

    def __init__(self, f: Any, primals: Sequence[Any], has_aux: bool, wrt: Any):
        fn, first = unbind(f)
        self.fn = with_aux(fn, has_aux, "out")
        self.bound = BoundArguments((*first, *primals), {})
        taken = to_filter(wrt)
        at = range(len(first), len(self.bound.args))
        self.call = FlatCall(self.bound, [DiffState(i, taken) for i in at])
        self.call.refuse_untaken(each=False)

    def __call__(self, inputs: Any) -> tuple[Any, Result]:
        result = self.call.run(self.fn, inputs)
        out, aux = result.out
        # The structure only: the values come back as what is differentiated.
        result.out = (jtu.Partial(jax.tree.structure(out).unflatten), aux)
        return bare(out), result

    def write_back(self, value: Any, rest: Result) -> tuple[Any, Any, Any]:
        """Writes back; gives the output, the output without objects, and aux."""
        fill, aux = rest.out
        rest.out = (fill.func(jax.tree.leaves(value)), aux)
        out, aux = write_back(self.bound, rest)
        return out, value, aux


def bare(out: Any) -> Any:
    """An output with None in the place of each object."""
    return jax.tree.map(
        lambda x: None if isinstance(x, Ref) else x,
        out,
        is_leaf=lambda x: isinstance(x, Ref),
    )


def make_jaxpr(
    f: Callable[..., Any],
    static_argnums: int | Sequence[int] = (),
    return_shape: bool = False,
    *,
    axis_env: Any = None,
) -> Callable[..., Any]:
    """``jax.make_jaxpr`` for functions of modules: what is computed on bare values.

    Its inputs are the leaves of the arguments, named by path; its outputs those of the
    output, then the values that the function changed. Live objects are not touched.

    Args:
      f: the function.
      static_argnums: positions of arguments that are not traced.
      return_shape: whether to give the output's shapes too, as ``eval_shape`` does.
      axis_env: see ``jax.make_jaxpr``.

    Returns:
      A function that takes arguments of ``f`` and returns the jaxpr; or
      ``(jaxpr, shape)``.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> jaxpr = nnx.make_jaxpr(lambda m, x: m(x))(model, jnp.ones((1, 2)))
      >>> "dot_general" in str(jaxpr)
      True
    """
    fn, first = unbind(f)
    positions = named_positions(fn, static_argnums, None)
    static = {i + len(first) for i in positions if isinstance(i, int)}

    def traced(*args: Any, **kwargs: Any) -> Result:
        return run(fn, args, kwargs)

    if hasattr(fn, "__name__"):
        functools.update_wrapper(traced, fn)

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = abstracted((*first, *args), kwargs, static)
        bound = BoundArguments(args, kwargs, static)
        made = jax.make_jaxpr(
            traced, tuple(sorted(static)), axis_env=axis_env, return_shape=True
        )
        jaxpr, shape = made(*bound.args, **bound.kwargs)
        return (jaxpr, write_back(bound, shape)) if return_shape else jaxpr

    return wrapper


# ------------------------------------------------------------- what users give by leaf
def _tangents(chosen: Chosen, trees: Sequence[Any]) -> list[Any]:
    found = by_leaf(chosen, trees, "tangent")
    several = [
        " and ".join(name for name, _ in given)
        for given in found.values()
        if not all(_agree(given[0][1], x) for _, x in given[1:])
    ]
    if several:
        raise GradientError(
            "a Variable that several primals share has one tangent; found different "
            f"ones for:\n{listing(several)}\nGive the very same array for both."
        )
    return [found[k][0][1] for k in chosen.order]


def _agree(a: Any, b: Any) -> bool:
    if a is b:
        return True
    traced = isinstance(a, Tracer) or isinstance(b, Tracer)
    return not traced and equal(a, b)


def by_leaf(
    chosen: Chosen, trees: Sequence[Any], what: str, *, zeros: bool = False
) -> dict[int, list[tuple[str, Any]]]:
    """What is given for each chosen leaf, with the names of the places.

    With ``zeros``, None may stand in the place of anything and gives nothing; so does
    whatever is given for integers, which have no derivative.
    """
    if len(trees) != len(chosen.layouts):
        raise ArgumentError(
            f"one {what} is due for each of {len(chosen.layouts)} arguments to "
            f"differentiate by; found {len(trees)}."
        )
    found: dict[int, list[tuple[str, Any]]] = {k: [] for k in chosen.order}
    bad: list[str] = []
    for i, (layout, tree) in enumerate(zip(chosen.layouts, trees, strict=True)):
        for name, k, value in _places(layout, tree, f"{what} {i}", bad, zeros):
            want = chosen.types[k]
            if zeros and (value is None or want.dtype == jax.dtypes.float0):
                continue
            if not _fits(value, want):
                bad.append(f"{name}: expected {_text(want)}, found {_text(value)}")
            found[k].append((name, value))
    if bad:
        raise GradientError(
            f"{what}s must have the paths, shapes and dtypes of the leaves "
            f"differentiated by:\n{listing(bad)}"
        )
    return found


def _places(
    layout: Any, tree: Any, name: str, bad: list[str], zeros: bool
) -> Iterator[tuple[str, int, Any]]:
    """Pairs numbers with what a tree has in their places: name, number, value."""
    pairs, treedef = jtu.tree_flatten_with_path(
        layout, is_leaf=lambda x: isinstance(x, Taken)
    )
    try:
        if tree is None and zeros:
            parts: list[Any] = [None] * len(pairs)
        else:
            parts = treedef.flatten_up_to(tree)
    except (ValueError, TypeError) as e:
        bad.append(f"{name}: the argument has another structure: {e}")
        return
    for (path, x), part in zip(pairs, parts, strict=True):
        at = name + jtu.keystr(path)
        if isinstance(x, Taken):
            yield from _places_of_state(x, part, at, bad, zeros)
        else:
            yield at, x, part


def _places_of_state(
    taken: Taken, part: Any, name: str, bad: list[str], zeros: bool
) -> Iterator[tuple[str, int, Any]]:
    schema = taken.schema
    given = _flat(part, schema.paths, zeros)
    if given is None:
        bad.append(
            f"{name}: expected a State or nested dict of the module's leaves, found "
            f"a {type(part).__name__}"
        )
        return
    rows = {p: f"{name}: {schema.describe(i)}" for i, p in enumerate(schema.paths)}
    bad += [f"{row}: missing" for p, row in rows.items() if p not in given]
    bad += [f"{name}: {show(p)}: unknown" for p in given if p not in rows]
    for path, at in zip(schema.paths, taken.at, strict=True):
        if path in given:
            value = value_of(given[path])
            yield from _places(at, value, rows[path], bad, zeros)


def _flat(part: Any, paths: Sequence[Any], zeros: bool) -> Mapping[Any, Any] | None:
    """What is given for a module, by path; None where it is of no such form."""
    if part is None and zeros:
        return dict.fromkeys(paths)
    if is_object(part):
        every = dict(state(part).flat_state())
        return {path: every[path] for path in paths if path in every}
    if isinstance(part, (FlatState, Mapping)):
        return dict(as_state(part).flat_state())
    return {(): part} if tuple(paths) == ((),) else None


def _fits(value: Any, want: jax.ShapeDtypeStruct) -> bool:
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, float, complex)):
        return False
    return jnp.shape(value) == want.shape and _dtype(value) == want.dtype


def _dtype(value: Any) -> Any:
    dtype = getattr(value, "dtype", None)
    return dtype if dtype == jax.dtypes.float0 else jnp.result_type(value)


def _text(value: Any) -> str:
    if getattr(value, "dtype", None) == jax.dtypes.float0:
        return f"float0[{','.join(map(str, value.shape))}]"
    if isinstance(value, (bool, int, float, complex)):
        return f"{value!r} ({jnp.result_type(value)}[])"
    return describe(value)
