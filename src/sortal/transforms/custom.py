"""custom_vjp and custom_jvp over modules: derivatives written by hand."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Never

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from sortal._engine.foreign import to_native
from sortal._engine.variable import Param
from sortal._nnx_names import refuse_unknown
from sortal.errors import ArgumentError, GradientError, listing
from sortal.filters import All
from sortal.transforms._adapter.binding import BoundArguments, write_back
from sortal.transforms._adapter.decorator import NO_FUNCTION, as_decorator
from sortal.transforms._adapter.effects import Effects, Result
from sortal.transforms._adapter.functions import unbind
from sortal.transforms._adapter.tracing import (
    Copies,
    find_flat_modules,
    replace_flat_modules,
    replace_roots,
)
from sortal.transforms.autodiff import (
    DiffState,
    FlatCall,
    differentiable,
    tangent_type,
)
from sortal.transforms.derivatives import bare, by_leaf


class _Saved:
    """Residuals: arrays, and all else; modules are taken apart, and rebuilt later."""

    __slots__ = ("arrays", "layout")

    def __init__(self, arrays: list[Any], layout: Any):
        self.arrays, self.layout = arrays, layout

    @classmethod
    def of(cls, tree: Any) -> _Saved:
        (tree,) = BoundArguments((tree,), {}).args
        leaves, treedef = jtu.tree_flatten(tree)
        arrays = [x for x in leaves if _is_array(x)]
        others = tuple(None if _is_array(x) else (x,) for x in leaves)
        return cls(arrays, (treedef, others))

    def load(self) -> Any:
        treedef, others = self.layout
        arrays = iter(self.arrays)
        tree = treedef.unflatten([next(arrays) if x is None else x[0] for x in others])
        roots = Copies(find_flat_modules(tree)).roots
        return replace_flat_modules(tree, lambda c: roots[c.definition.number])


jtu.register_pytree_node(
    _Saved,
    lambda s: (s.arrays, s.layout),
    lambda layout, arrays: _Saved(arrays, layout),
)


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


class _OneCall:
    """One call of a function with a derivative of its own, without its values.

    Every array goes in as an argument, because JAX forbids such functions to close
    over what is being traced. It keeps them with the program that they are part of, so
    what they close over must not hold values of the call, nor the model.
    """

    def __init__(self, custom: _Custom, bound: BoundArguments):
        self.custom, self.fn = custom, custom.fn
        n = len(bound.args)
        filters, self.fixed = custom.roles(n)
        self.moving = [i for i in range(n) if i not in self.fixed]
        self.call = FlatCall(
            bound, [DiffState(i, filters.get(i, INEXACT)) for i in self.moving]
        )
        self.alias_map = bound.alias_map if bound.roots else None
        self.schemas = [plan.graphdef.schema for plan in bound.plans]
        self.did: Effects | None = None

    def take_values(self) -> tuple[list[Any], dict[int, Any]]:
        """What is differentiated by, and the other arrays; none of them is kept."""
        leaves, inputs = self.call.leaves, self.call.inputs
        mine = set(self.call.chosen.order)
        rest = {k: x for k, x in enumerate(leaves) if k not in mine and _is_array(x)}
        for k in (*mine, *rest):
            leaves[k] = None
        return inputs, rest

    def primal(self, inputs: Any, rest: Any) -> Result:
        result = self.call.run(self.fn, inputs, rest)
        self.did = result.effects
        return result

    def ruled(self, rule: Any, name: str, inputs: Any, rest: Any) -> tuple[Any, Any]:
        """Runs a rule that returns a pair: the outcome, and the pair's other half."""
        if self.did is None and self.alias_map is not None:
            # JAX runs the rule alone; what the function would do is found out here. Of
            # one that reads values it cannot be.
            reads_values = jax.errors.JAXTypeError, jax.errors.JAXIndexError
            with contextlib.suppress(*reads_values):
                jax.eval_shape(self.primal, inputs, rest)
        result = self.call.run(rule, inputs, rest)
        result.out, other = result.out
        if self.did not in (None, result.effects):
            raise GradientError(self._differ(name, self.did, result.effects))
        return result, other

    def _differ(self, name: str, own: Effects, its: Effects) -> str:
        f = self.custom.__name__
        schema = self.alias_map.graphdef.schema if self.alias_map else None
        rows = [
            f"{schema.describe(k)}: only {name if k in its.written else f} changes it"
            for k in sorted(set(own.written) ^ set(its.written))
            if schema is not None
        ]
        rows = rows or ["objects that are returned, added or removed"]
        return (
            f"{f} and its {name} must change the same leaves and return the same "
            f"objects, because either may be run; they differ in:\n{listing(rows)}\n"
            f"Call {f} itself inside {name}, or make the same changes there."
        )

    def split(self, args: Sequence[Any]) -> tuple[list[Any], tuple[Any, ...]]:
        """The arguments that are not, and that are, differentiated by."""
        return [args[i] for i in self.fixed], tuple(args[i] for i in self.moving)


class _Custom:
    """A function with a derivative of its own; call it as the function itself."""

    kind = ""

    def __init__(self, fn: Any, nondiff_argnums: Any):
        if unbind(fn)[1]:
            raise ArgumentError(
                f"{self.kind} takes a plain function, because its rules take the same "
                f"arguments; found {fn!r:.60}. Pass the object as an argument."
            )
        self.fn, self.nondiff = fn, nondiff_argnums
        single = isinstance(self.nondiff, (int, DiffState))
        self.nondiff = (self.nondiff,) if single else tuple(self.nondiff)
        self.__name__ = getattr(fn, "__name__", repr(fn))
        functools.update_wrapper(self, fn, updated=())

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def roles(self, n: int) -> tuple[dict[int, Any], list[int]]:
        """Filters by position, and the positions not differentiated by."""
        filters: dict[int, Any] = {}
        fixed: list[int] = []
        for x in map(to_native, self.nondiff):
            i = x.argnum if isinstance(x, DiffState) else x
            at = i + n if i < 0 else i
            if not 0 <= at < n:
                raise ArgumentError(
                    f"nondiff_argnums has {i}, but {self.__name__} was called with {n} "
                    "arguments."
                )
            if isinstance(x, DiffState):
                filters[at] = All(x.filter, _inexact)
            else:
                fixed.append(at)
        return filters, sorted(fixed)

    def rule(self) -> Any:
        """What ``defvjp`` or ``defjvp`` was given."""
        rule = vars(self).get("_rule")
        if rule is None:
            raise ArgumentError(
                f"{self.__name__} has no derivative yet; give it one with "
                f"{self.__name__}.def{self.kind.removeprefix('custom_')}(...)."
            )
        return rule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.rule()
        bound = BoundArguments(_positional(self, args, kwargs), {})
        call = _OneCall(self, bound)
        fn = self._differentiable(call, bound)
        return write_back(bound, fn(*call.take_values()))

    def _differentiable(
        self, call: _OneCall, bound: BoundArguments
    ) -> Callable[..., Any]:
        raise NotImplementedError


def _inexact(path: Any, leaf: Any) -> bool:
    return differentiable(leaf)


INEXACT = All(Param, _inexact)


def _positional(custom: _Custom, args: Any, kwargs: Any) -> tuple[Any, ...]:
    try:
        bound = inspect.signature(custom.fn).bind(*args, **kwargs)
    except ValueError:  # a builtin without a signature
        return tuple(args)
    bound.apply_defaults()
    if bound.kwargs:
        raise ArgumentError(
            f"{custom.kind} takes functions whose arguments can all go by position; "
            f"{custom.__name__} has the keywords {', '.join(bound.kwargs)}."
        )
    return bound.args


def _pair(given: Any, name: str, form: str) -> tuple[Any, Any]:
    if not (isinstance(given, (tuple, list)) and len(given) == 2):
        raise ArgumentError(
            f"{name} must return {form}; found a {type(given).__name__}."
        )
    return given[0], given[1]


class CustomVJP(_Custom):
    """A function whose pull-back is written by hand; see ``custom_vjp``."""

    kind = "custom_vjp"

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        """Sets the rules; see ``custom_vjp``.

        Args:
          fwd: takes what the function takes; returns ``(out, residuals)``.
          bwd: takes the arguments not differentiated by, residuals and the cotangent.
        """
        self._rule = (fwd, bwd)

    def pull_back(
        self, call: _OneCall, bound: BoundArguments, bwd: Callable[..., Any]
    ) -> Callable[[Any, Result], Any]:
        """What calls ``bwd``, here with the cotangent of the output alone.

        Args:
          call: the call of the function.
          bound: its arguments, of which nothing may be kept but structure.
          bwd: the rule.

        Returns:
          A function of the arguments not differentiated by, with the residuals, and of
          the cotangents of what the call returned and wrote; it returns what ``bwd``
          does.
        """
        return lambda before, result: bwd(*before, bare(result.out))

    def _differentiable(
        self, call: _OneCall, bound: BoundArguments
    ) -> Callable[..., Any]:
        fwd_rule, bwd_rule = self.rule()
        chosen = call.call.chosen
        pull_back = self.pull_back(call, bound, bwd_rule)

        def saving(*args: Any) -> tuple[Any, Any]:
            fixed, _ = call.split(args)
            out, residuals = _pair(fwd_rule(*args), "fwd", "(out, residuals)")
            return out, _Saved.of((fixed, residuals))

        def fwd(inputs: Any, rest: Any) -> tuple[Any, Any]:
            return call.ruled(saving, "fwd", inputs, rest)

        def bwd(saved: _Saved, cotangent: Result) -> tuple[Any, Any]:
            fixed, residuals = saved.load()
            given = pull_back((*fixed, residuals), cotangent)
            if not isinstance(given, (tuple, list)):
                raise ArgumentError(
                    "bwd must return a tuple with one cotangent for each argument "
                    f"differentiated by; found a {type(given).__name__}."
                )
            found = by_leaf(chosen, given, "cotangent", zeros=True)
            sums = [[x for _, x in found[k]] for k in chosen.order]
            return [sum(xs[1:], xs[0]) if xs else None for xs in sums], None

        fn = jax.custom_vjp(call.primal)
        fn.defvjp(fwd, bwd)
        return fn


class CustomJVP(_Custom):
    """A function whose derivative is written by hand; see ``custom_jvp``."""

    kind = "custom_jvp"

    def defjvp(self, jvp: Callable[..., Any]) -> Callable[..., Any]:
        """Sets the rule; see ``custom_jvp``. May be used as a decorator.

        Args:
          jvp: takes the arguments not differentiated by, primals and tangents;
            returns ``(out, tangent_out)``.

        Returns:
          The rule itself.
        """
        self._rule = jvp
        return jvp

    def _differentiable(
        self, call: _OneCall, bound: BoundArguments
    ) -> Callable[..., Any]:
        user_rule = self.rule()
        chosen = call.call.chosen

        def rule(primals: Any, tangents: Any) -> tuple[Any, Any]:
            dots = tuple(chosen.trees(tangents[0]))

            def both(*args: Any) -> tuple[Any, Any]:
                fixed, moving = call.split(args)
                found = user_rule(*fixed, moving, dots)
                out, dot = _pair(found, "the jvp rule", "(out, tangent_out)")
                return out, replace_roots(dot, lambda _: None)

            outcome, dot = call.ruled(both, "jvp rule", *primals)
            shape = jax.tree.structure(bare(outcome.out))
            if jax.tree.structure(dot) != shape:
                raise GradientError(
                    f"the tangent_out of {self.__name__}'s jvp rule must have the "
                    f"structure of its output, {shape}, with None for modules; found "
                    f"{jax.tree.structure(dot)}."
                )
            effects = jax.tree.leaves((outcome.values, outcome.fresh))
            zeros = [_zero(x) for x in effects]
            leaves = [*jax.tree.leaves(dot), *zeros]
            return outcome, jax.tree.structure(outcome).unflatten(leaves)

        fn = jax.custom_jvp(call.primal)
        fn.defjvp(rule)
        return fn


def _zero(x: Any) -> Any:
    like = tangent_type(x)
    make = np.zeros if like.dtype == jax.dtypes.float0 else jnp.zeros
    return make(like.shape, like.dtype)


@as_decorator
def custom_vjp(
    fun: Any = NO_FUNCTION,
    nondiff_argnums: Any = (),
    **_unknown: Never,
) -> Any:
    """A function of modules whose pull-back is written by hand, as ``jax.custom_vjp``.

    ``fwd(*args)`` returns ``(out, residuals)``; residuals may hold arrays, modules
    (their values are kept) and anything else. ``bwd(*fixed, residuals, cotangent)``
    gets the arguments of ``nondiff_argnums`` first and returns a tuple with one
    cotangent for each other argument. For a module that is a State, nested dict or
    module of its Params; None, also for a single leaf, means zeros. Leaves of other
    kinds and integers have no cotangent. A Variable that two arguments share gets the
    sum of what both are given.

    What ``fun`` or ``fwd`` changes is changed in the live modules, and must be the same
    in both. Values so changed, and modules returned, carry no cotangent: ``bwd`` finds
    None in the place of modules in ``cotangent``.

    In Flax NNX the form of ``bwd`` depends on a mode: its cotangent may be a pair of
    updates and output, and what it returns for a module a module. Here the cotangent is
    that of the output alone, and ``updates_g`` is never passed.

    Args:
      fun: the function; its arguments can all go by position. Without it a decorator is
        returned.
      nondiff_argnums: positions not differentiated by; a ``DiffState`` among them says
        instead which leaves of a module are differentiated by, in the place of Param.

    Returns:
      A function with a method ``defvjp(fwd, bwd)``.

    Raises:
      ArgumentError: ``fun`` is a bound method or module; at a call: no rules are set,
        or one returns something of another form.
      GradientError: when differentiated: paths, shapes or dtypes of cotangents do not
        fit, all of them listed; or ``fun`` and ``fwd`` change different leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> @nnx.custom_vjp
      ... def scaled(m, x):
      ...     return m.w * x
      >>> def fwd(m, x):
      ...     return scaled(m, x), (m, x)
      >>> def bwd(residuals, cotangent):
      ...     m, x = residuals
      ...     return {"w": 10 * cotangent * x}, cotangent * m.w
      >>> scaled.defvjp(fwd, bwd)
      >>> class Scale(nnx.Module):
      ...     def __init__(self):
      ...         self.w = nnx.Param(jnp.array(2.0))
      >>> float(nnx.grad(scaled)(Scale(), 3.0)["w"].value)
      30.0
    """
    refuse_unknown("custom_vjp", _unknown)
    return CustomVJP(fun, nondiff_argnums)


@as_decorator
def custom_jvp(f: Any = NO_FUNCTION, /, nondiff_argnums: Any = ()) -> Any:
    """A function of modules whose derivative is written by hand, as ``jax.custom_jvp``.

    The rule, ``rule(*fixed, primals, tangents)``, gets the arguments of
    ``nondiff_argnums`` first and returns ``(out, tangent_out)``. The tangent of a
    module is a State of its Params of floating or complex dtype. What ``f`` or the rule
    changes is changed in the live modules, and must be the same in both. Values so
    changed, and modules returned, carry no tangent: None stands for modules in
    ``tangent_out``.

    Args:
      f: the function; its arguments can all go by position. Without it a decorator is
        returned.
      nondiff_argnums: positions not differentiated by; a ``DiffState`` among them says
        instead which leaves of a module are differentiated by, in the place of Param.

    Returns:
      A function with a method ``defjvp(rule)``.

    Raises:
      ArgumentError: ``f`` is a bound method or module; at a call: no rule is set, or it
        returns something of another form.
      GradientError: when differentiated: ``tangent_out`` has another structure than
        the output; or ``f`` and the rule change different leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> @nnx.custom_jvp
      ... def total(m):
      ...     return m.kernel.sum()
      >>> @total.defjvp
      ... def rule(primals, tangents):
      ...     (m,), (dot,) = primals, tangents
      ...     return total(m), 100 * dot["kernel"].sum()
      >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> nnx.grad(total)(model)["kernel"].value.tolist()
      [[100.0], [100.0]]
    """
    return CustomJVP(f, nondiff_argnums)
