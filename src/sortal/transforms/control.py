"""while_loop, fori_loop, cond and switch over modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Never

import jax
import jax.tree_util as jtu

from sortal._engine.jax_compat import varying_axes
from sortal._engine.nodes import is_root
from sortal._engine.variable import describe, value_of
from sortal._nnx_names import refuse_unknown
from sortal.errors import ArgumentError, LoopError, listing
from sortal.policy.rule import format_answer
from sortal.sharding.mesh_axes import varying_along
from sortal.transforms._adapter.binding import write_back
from sortal.transforms._adapter.effects import Effects, Result
from sortal.transforms._adapter.functions import unbind
from sortal.transforms._adapter.operands import Operands, check_types, steady
from sortal.transforms._adapter.tracing import is_flat_module
from sortal.transforms.eager import kept
from sortal.transforms.refusals import refuse_arguments
from sortal.transforms.shardings import as_declared


def while_loop(
    cond_fun: Callable[[Any], Any],
    body_fun: Callable[[Any], Any],
    init_val: Any,
    **_unknown: Never,
) -> Any:
    """``jax.lax.while_loop`` with modules among what goes from step to step.

    Leaves that the body writes, such as a KV cache, are loop state; leaves that it only
    reads stay outside the loop.

    Called eagerly, it stays compiled for the same function objects, as in JAX: what
    is read besides the arguments, such as a global number, is read when it is traced.
    What closes over arrays, also those of live Variables, is traced at each call. A
    setting of an object that is closed over, and a Python or NumPy number in a Variable
    of it, are read as a global number is: pass the object as an argument.

    Args:
      cond_fun: takes the value, returns a boolean scalar; writes nothing.
      body_fun: takes the value, returns the next one, with the same modules in the same
        places.
      init_val: any pytree, with Modules and Variables anywhere in it.

    Returns:
      The last value; modules in it are the live ones, updated.

    Raises:
      LoopError: a step changes structure, shape, dtype or which objects the value
        holds, or the condition writes; the live objects are left as they were.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> counter = nnx.Variable(jnp.array(0))
      >>> def body(counter):
      ...     counter[...] += 1
      ...     return counter
      >>> nnx.while_loop(lambda counter: counter < 3, body, counter) is counter
      True
      >>> int(counter.value)
      3
    """
    refuse_unknown("while_loop", _unknown)
    _, held = unbind(body_fun)
    if unbind(cond_fun)[1]:
        raise ArgumentError(
            "the condition of while_loop is a method of a module; pass the module in "
            "init_val, and write cond_fun=lambda value: ..."
        )
    return _run(_while, (body_fun, cond_fun), (), held, init_val)


def _while(functions: Sequence[Any], _: Any) -> Callable[..., Any]:
    body, condition = (unbind(f)[0] for f in functions)

    def call(held: Any, init: Any) -> Any:
        loop = _Loop("the body of while_loop", body, held, init)
        goes_on = functools.partial(loop.goes_on, condition)
        return loop.finish(jax.lax.while_loop(goes_on, loop.step, loop.start()))

    return call


def fori_loop(
    lower: Any,
    upper: Any,
    body_fun: Callable[[Any, Any], Any],
    init_val: Any,
    *,
    unroll: int | bool | None = None,
    **_unknown: Never,
) -> Any:
    """``jax.lax.fori_loop`` with modules among what goes from step to step.

    Called eagerly, it stays compiled for the same function object, as in JAX: what
    is read besides the arguments, such as a global number, is read when it is traced.
    What closes over arrays, also those of live Variables, is traced at each call. A
    setting of an object that is closed over, and a Python or NumPy number in a Variable
    of it, are read as a global number is: pass the object as an argument.

    Args:
      lower: the first index.
      upper: the index to stop before.
      body_fun: takes the index and the value, returns the next value, with the same
        modules in the same places.
      init_val: any pytree, with Modules and Variables anywhere in it.
      unroll: see ``jax.lax.fori_loop``.

    Returns:
      The last value; modules in it are the live ones, updated.

    Raises:
      LoopError: a step changes structure, shape, dtype or which objects the value
        holds; the live objects are left as they were.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> total = nnx.Variable(jnp.array(0))
      >>> def body(i, total):
      ...     total[...] += i
      ...     return total
      >>> int(nnx.fori_loop(0, 5, body, total).value)
      10
    """
    refuse_unknown("fori_loop", _unknown)
    _, held = unbind(body_fun)
    return _run(_fori, (body_fun,), (lower, upper, unroll), held, init_val)


def _fori(functions: Sequence[Any], options: Any) -> Callable[..., Any]:
    body, _ = unbind(functions[0])
    lower, upper, unroll = options

    def call(held: Any, init: Any) -> Any:
        loop = _Loop("the body of fori_loop", body, held, init)
        step = loop.numbered_step
        return loop.finish(
            jax.lax.fori_loop(lower, upper, step, loop.start(), unroll=unroll)
        )

    return call


def _run(
    make: Callable[..., Any],
    functions: Sequence[Any],
    options: Any,
    held: Any,
    *args: Any,
) -> Any:
    """Calls with what functions were bound to; kept if that is live objects alone."""
    # What functools.partial holds besides may be no array at all.
    live = all(map(is_root, jtu.tree_leaves(held, is_leaf=is_root)))
    call = kept(make, functions, options) if live else make(functions, options)
    return call(held, *args)


class _Loop:
    """The state of a loop: the user's value without its modules, and all their leaves.

    JAX keeps what a step hands on unchanged outside the loop, so that read-only leaves
    cost nothing.
    """

    def __init__(self, where: str, body: Callable[..., Any], held: Any, init: Any):
        self.where, self.body = where, body
        self.operands = Operands((*held, init))
        self.init = self.operands.skeleton(self.operands.bound.args[-1])
        plain = self.operands.plain
        self.fixed = plain[: len(plain) - len(jax.tree.leaves(self.init))]
        self.written: set[int] = set()

    def start(self) -> Any:
        """The state before the first step."""
        return self.init, self.operands.values

    def args(self, state: Any) -> tuple[Any, ...]:
        """The arguments of one step: what the body was bound to, and the value."""
        tree, values = state
        return self.operands.rebuild([*self.fixed, *jax.tree.leaves(tree)], values)

    def goes_on(self, condition: Callable[[Any], Any], state: Any) -> Any:
        """What ``condition`` says of the value; it must not write."""

        def call(*args: Any) -> Any:
            return value_of(condition(args[-1]))

        where = "the condition of while_loop"
        result = steady(where, self.operands, call, self.args(state))
        if result.effects.written:
            rows = map(self.operands.describe, result.effects.written)
            raise LoopError(
                f"{where} must not write; it wrote to:\n{listing(rows)}\nWrite in the "
                "body."
            )
        return result.out

    def numbered_step(self, i: Any, state: Any) -> Any:
        """One step of a loop whose body takes the number of the step first."""
        return self.step(state, i)

    def step(self, state: Any, *first: Any) -> Any:
        """One step of the loop; ``first`` comes before the value."""

        def body(*args: Any) -> Any:
            return self.body(*args[:-1], *first, args[-1])

        result = steady(self.where, self.operands, body, self.args(state))
        out = self.operands.same_objects(result.out, result.effects)
        self._check(out, state, result)
        # Under jax.disable_jit each step is run, and they may write different leaves.
        self.written.update(result.effects.written)
        return out, self.operands.written(result.effects, state[1], result.values)

    def _check(self, out: Any, state: Any, result: Result) -> None:
        if jax.tree.structure(out) != jax.tree.structure(self.init):
            raise LoopError(
                f"{self.where} must return a value of the same structure with the same "
                f"objects in the same places; it was given "
                f"{self.operands.outline(self.init)}, and returned "
                f"{self.operands.outline(result.out, result.effects)}."
            )
        rows = [
            (self.operands.describe(k), state[1][k], new)
            for k, new in zip(result.effects.written, result.values, strict=True)
        ]
        olds, news = jtu.tree_leaves_with_path(state[0]), jax.tree.leaves(out)
        rows += [
            (f"value{jtu.keystr(path)}", old, new)
            for (path, old), new in zip(olds, news, strict=True)
        ]
        check_types(self.where, rows)

    def finish(self, state: Any) -> Any:
        """Brings the last state to the live objects."""
        tree, values = state
        effects = Effects(tuple(sorted(self.written)), (), None)
        return self.operands.write_back(effects, values, tree)


def cond(
    pred: Any,
    true_fun: Callable[..., Any],
    false_fun: Callable[..., Any],
    *operands: Any,
    **_unknown: Never,
) -> Any:
    """``jax.lax.cond`` with modules among the operands.

    What either branch writes is written back: the new value where that branch ran, the
    old one where the other did. Leaves that no branch writes are not outputs.

    Called eagerly, it stays compiled for the same function objects, as in JAX: what
    is read besides the arguments, such as a global number, is read when it is traced.
    What closes over arrays, also those of live Variables, is traced at each call. A
    setting of an object that is closed over, and a Python or NumPy number in a Variable
    of it, are read as a global number is: pass the object as an argument.

    Args:
      pred: a boolean scalar.
      true_fun: called on the operands where ``pred`` holds; a function, a module, or a
        method of one.
      false_fun: called on them where it does not.
      *operands: any pytrees, with Modules and Variables anywhere in them.

    Returns:
      What the branch returned; modules in it are the live ones.

    Raises:
      LoopError: a branch changes structure, or the branches write or return values of
        different shapes, dtypes, objects or, on an explicit mesh, places; the message
        says which.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> count = nnx.Variable(jnp.array(0))
      >>> def add(count):
      ...     count[...] += 1
      >>> nnx.cond(jnp.array(True), add, lambda count: None, count)
      >>> int(count.value)
      1
    """
    refuse_unknown("cond", _unknown)
    where = ("the true branch of cond", "the false branch of cond")
    return _choose(jax.lax.cond, where, pred, (true_fun, false_fun), operands)


def switch(
    index: Any,
    branches: Sequence[Callable[..., Any]],
    *operands: Any,
    **_unknown: Never,
) -> Any:
    """``jax.lax.switch`` with modules among the operands.

    Called eagerly, it stays compiled for the same function objects, as in JAX: what
    is read besides the arguments, such as a global number, is read when it is traced.
    What closes over arrays, also those of live Variables, is traced at each call. A
    setting of an object that is closed over, and a Python or NumPy number in a Variable
    of it, are read as a global number is: pass the object as an argument.

    Args:
      index: an integer scalar, clamped to the branches there are.
      branches: functions, modules, or methods of modules, all called alike.
      *operands: any pytrees, with Modules and Variables anywhere in them.

    Returns:
      What the branch returned; modules in it are the live ones.

    Raises:
      ArgumentError: there are no branches.
      LoopError: a branch changes structure, or the branches write or return values of
        different shapes, dtypes, objects or, on an explicit mesh, places; the message
        says which.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layers = [nnx.Linear(2, 3, rngs=nnx.Rngs(i)) for i in range(4)]
      >>> nnx.switch(jnp.array(2), layers, jnp.ones(2)).shape
      (3,)
    """
    refuse_unknown("switch", _unknown)
    if not branches:
        raise ArgumentError("switch needs at least one branch.")
    where = tuple(f"branch {i} of switch" for i in range(len(branches)))
    return _choose(_switch, where, index, branches, operands)


def _switch(index: Any, *functions: Any) -> Any:
    """``jax.lax.switch`` with its arguments in the order of ``cond``'s."""
    *branches, plain, values = functions
    return jax.lax.switch(index, branches, plain, values)


def _choose(
    choice: Callable[..., Any],
    where: tuple[str, ...],
    which: Any,
    branches: Sequence[Any],
    operands: Sequence[Any],
) -> Any:
    held = [unbind(branch)[1] for branch in branches]
    return _run(_choice, branches, (choice, where), held, which, tuple(operands))


def _choice(branches: Sequence[Any], options: Any) -> Callable[..., Any]:
    choice, where = options
    fns = [unbind(branch)[0] for branch in branches]

    def call(held: Any, which: Any, operands: Any) -> Any:
        several = _Branches(where, fns, held, operands)
        return several.finish(
            lambda *state: choice(which, *several.functions(), *state)
        )

    return call


class _Branches:
    """Several functions of the same operands, made to return the same leaves.

    Which leaves a branch writes is known only when it has run, and all branches must
    return what any of them writes; so each is first traced for its shapes alone.
    """

    def __init__(
        self,
        where: Sequence[str],
        branches: Sequence[Any],
        held: Sequence[Any],
        operands: Sequence[Any],
    ):
        self.where, self.n = where, len(operands)
        self.operands = Operands((*operands, *(x for first in held for x in first)))
        self.calls: list[tuple[Any, range]] = []
        at = self.n
        for fn, first in zip(branches, held, strict=True):
            self.calls.append((fn, range(at, at + len(first))))
            at += len(first)
        # What functools.partial holds besides modules may be no array at all.
        mine = jtu.tree_leaves(
            self.operands.bound.args[: self.n], is_leaf=is_flat_module
        )
        plain, m = self.operands.plain, sum(not is_flat_module(x) for x in mine)
        self.start, self.fixed = (plain[:m], self.operands.values), plain[m:]
        # JAX keeps what it traced, so that the user's function is run once.
        runs = [functools.partial(self._run, b) for b in range(len(branches))]
        self.runs = [jax.jit(run, inline=True) for run in runs]
        try:
            self.seen = [run.eval_shape(*self.start) for run in self.runs]
        except TypeError as e:
            refuse_arguments(branches[0], self.operands.bound, (), e, option=None)
            raise
        self._check()
        all_effects = [result.effects for result in self.seen]
        written = tuple(sorted({k for effects in all_effects for k in effects.written}))
        self.effects = Effects(written, all_effects[0].outputs, None)
        rows = self._each()
        self._check_places(rows)
        # What one branch leaves alone may differ between devices after another one.
        self.varying = [
            frozenset[Any]().union(*map(varying_axes, each)) for _, each in rows
        ]

    def _run(self, b: int, plain: Any, values: Any) -> Result:
        fn, first = self.calls[b]
        args = self.operands.rebuild([*plain, *self.fixed], values)

        def call(*args: Any) -> Any:
            return fn(*(args[i] for i in first), *args[: self.n])

        return steady(self.where[b], self.operands, call, args)

    def functions(self) -> list[Callable[..., Any]]:
        """The branches as JAX takes them; not kept, for they hold this object."""
        return [self._function(b) for b in range(len(self.calls))]

    def _function(self, b: int) -> Callable[..., Any]:
        def branch(plain: Any, values: Any) -> Any:
            result = self.runs[b](plain, values)
            now = self.operands.written(result.effects, values, result.values)
            leaves = result.out, [now[k] for k in self.effects.written]
            leaves, treedef = jax.tree.flatten(leaves)
            return treedef.unflatten(map(varying_along, self.varying, leaves))

        return branch

    def _check(self) -> None:
        for where, result in zip(self.where, self.seen, strict=True):
            rows = [
                (self.operands.describe(k), self.operands.values[k], new)
                for k, new in zip(result.effects.written, result.values, strict=True)
            ]
            check_types(where, rows, stays=False)
        first = self.seen[0]
        for where, result in zip(self.where[1:], self.seen[1:], strict=True):
            same = jax.tree.structure(result.out) == jax.tree.structure(first.out)
            if not same or result.effects.outputs != first.effects.outputs:
                outline = self.operands.outline
                raise LoopError(
                    "all branches must return the same structure with the same "
                    f"objects in it; {self.where[0]} returns "
                    f"{outline(first.out, first.effects)}, {where} returns "
                    f"{outline(result.out, result.effects)}."
                )
        self._check_outputs()

    def _outputs(self) -> list[tuple[str, list[Any]]]:
        """For each array of the output its name, and what each branch returns there."""
        outs = [jtu.tree_leaves_with_path(result.out) for result in self.seen]
        return [
            (f"output{jtu.keystr(same[0][0])}", [x for _, x in same])
            for same in zip(*outs, strict=True)
        ]

    def _by(self, name: str, found: Sequence[str]) -> str:
        pairs = zip(found, self.where, strict=True)
        return f"{name}: {', '.join(f'{text} by {where}' for text, where in pairs)}"

    def _check_outputs(self) -> None:
        rows = [
            self._by(name, list(map(describe, each)))
            for name, each in self._outputs()
            if len({(x.shape, x.dtype) for x in each}) > 1
        ]
        if rows:
            raise LoopError(
                "all branches must return the same shapes and dtypes; they returned:\n"
                f"{listing(rows)}\nCast or reshape what is returned."
            )

    def _each(self) -> list[tuple[str, list[Any]]]:
        """For each array that leaves a branch its name, and what each branch has."""
        after = [
            self.operands.written(result.effects, self.operands.values, result.values)
            for result in self.seen
        ]
        values = [
            (self.operands.describe(k), same)
            for k in self.effects.written
            for same in zip(*(jax.tree.leaves(x[k]) for x in after), strict=True)
        ]
        return [*self._outputs(), *((name, list(same)) for name, same in values)]

    def _check_places(self, values: Sequence[tuple[str, list[Any]]]) -> None:
        """On an explicit mesh all branches must leave each value at one place."""
        rows = []
        for name, each in values:
            specs = [jax.typeof(x).sharding.spec for x in each]
            if len(set(specs)) > 1:
                found = [format_answer("spec", spec) for spec in specs]
                rows.append(self._by(name, found))
        if rows:
            raise LoopError(
                "all branches must leave at one place of the mesh what any of them "
                f"writes or returns; it lies at:\n{listing(rows)}\nWrite "
                "jax.sharding.reshard(x, spec) with one spec in all of them."
            )

    def finish(self, call: Callable[..., Any]) -> Any:
        """Runs the branches and brings what they wrote to the live objects."""
        out, values = call(*self.start)
        result, bound = Result(self.effects, (out, values, [])), self.operands.bound
        return write_back(bound, as_declared(result, bound.args))
