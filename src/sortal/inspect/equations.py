"""A traced program, evaluated one equation at a time, with who made what not finite.

Each value carries the culprit that its NaN or infinity follows from. An equation is a
culprit that makes NaN from inputs without NaN, or infinity from finite inputs; where it
makes NaN from infinity, the culprit is what made that infinity, unless the infinity is
a constant or an input, as in a mask. Of several culprits the one that ran first counts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from sortal._engine.jax_compat import scan_layout
from sortal._engine.paths import Path
from sortal.errors import UnsupportedError
from sortal.inspect.scopes import libraries, line_of

_CALLS = frozenset(
    "jit pjit closed_call core_call checkpoint remat remat2 custom_jvp_call "
    "custom_vjp_call custom_vjp_call_jaxpr".split()
)
# Of these an output element depends on the input elements in its place alone.
_ELEMENTWISE = frozenset(
    "abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil clamp "
    "convert_element_type copy cos cosh div erf erf_inv erfc exp exp2 expm1 floor "
    "integer_pow is_finite lgamma log log1p logistic max min mul neg pow "
    "reduce_precision rem round rsqrt select_n sign sin sinh sqrt square sub tan tanh "
    "digamma nextafter".split()
)
# Of these the output holds elements of the first input and no others.
_MOVES = frozenset(
    "broadcast_in_dim convert_element_type copy dynamic_slice gather pbroadcast pvary "
    "reduce_precision reshape rev sharding_constraint slice squeeze transpose".split()
)


class Leaf(NamedTuple):
    """An input of the program: in which argument, at which path, of which kind."""

    argument: str
    path: Path
    kind: str | None


class Operand(NamedTuple):
    """What is told of an array: its form and what its elements are."""

    dtype: str
    shape: tuple[int, ...]
    low: float | None
    high: float | None
    zeros: int
    nans: int
    infinities: int
    first: tuple[int, ...] | None
    leaf: Leaf | None


class Line(NamedTuple):
    """A line of the user's program."""

    file: str
    number: int
    function: str


class Where(NamedTuple):
    """What is around the equations of a nested program."""

    names: str = ""
    line: Line | None = None
    iterations: tuple[int, ...] = ()
    backward: bool = False


_OUTSIDE = Where()


@dataclass(eq=False, slots=True)
class Culprit:
    """Where NaN or infinity arose: an equation, a constant or an input."""

    order: int
    operation: str
    output: Operand
    inputs: tuple[Operand, ...] = ()
    where: Where = _OUTSIDE


@dataclass(eq=False, slots=True)
class Value:
    """An array, and the culprits that what is not finite in it follows from.

    ``meant`` is a constant or an input that is infinite; it counts where nothing else
    is the cause.
    """

    array: Any
    nan: bool = False
    inf: bool = False
    culprit: Culprit | None = None
    meant: Culprit | None = None
    leaf: Leaf | None = None

    @property
    def bad(self) -> bool:
        """Whether an element is NaN or infinite."""
        return self.nan or self.inf


class _Reads(NamedTuple):
    """Who reads the variables of a jaxpr.

    ``last`` is the number of the last equation that reads a variable; ``backward`` are
    the equations of which only a backward pass reads, ``forward`` the variables that
    anything else does.
    """

    last: dict[Any, int]
    backward: set[int]
    forward: set[Any]


def input_value(array: Any, leaf: Leaf | None, order: int) -> Value:
    """An input of the program.

    Args:
      array: its value.
      leaf: what it is called; None for a value that the program closed over.
      order: its number, below zero; inputs come before equations.

    Returns:
      The Value.
    """
    if not isinstance(array, (jax.Array, jax.Ref)):
        array = jnp.asarray(array)
    value = Value(array, *_flags(array), leaf=leaf)
    if value.bad:
        told = describe(array, leaf)
        found = Culprit(order, "input" if leaf else "closed over", told)
        value.culprit, value.meant = (found, None) if value.nan else (None, found)
    return value


def earliest(culprits: Iterable[Culprit | None]) -> Culprit | None:
    """The culprit that ran first, None if there is none."""
    found = [c for c in culprits if c is not None]
    return min(found, key=lambda c: c.order) if found else None


def describe(array: Any, leaf: Leaf | None = None) -> Operand:
    """Form and extremes of an array."""
    dtype, shape = _dtype(array), np.shape(array)
    form = (str(dtype), tuple(shape))
    if not jnp.issubdtype(dtype, jnp.inexact):
        return Operand(*form, None, None, 0, 0, 0, None, leaf)
    host = np.asarray(array)
    finite, nan = np.isfinite(host), np.isnan(host)
    where = np.argwhere(~finite)
    kept = np.abs(host[finite]) if np.iscomplexobj(host) else host[finite]
    return Operand(
        *form,
        float(kept.min()) if kept.size else None,
        float(kept.max()) if kept.size else None,
        int((host == 0).sum()),
        int(nan.sum()),
        int((~finite & ~nan).sum()),
        tuple(map(int, where[0])) if len(where) else None,
        leaf,
    )


class Evaluation:
    """Evaluates a program equation by equation."""

    def __init__(self) -> None:
        self._count = itertools.count()
        self._known_reads: dict[Any, tuple[Any, _Reads]] = {}
        self._libraries = libraries()
        self._bind = _bind
        self._stepwise: dict[str, Callable[..., list[Value]]] = {
            "scan": self._scan,
            "while": self._while,
            "shard_map": self._shard_map,
        }

    def run(
        self,
        program: Any,
        given: Sequence[Value],
        where: Where = _OUTSIDE,
        behind: frozenset[int] = frozenset(),
    ) -> list[Value]:
        """The outputs of a jaxpr.

        Args:
          program: the jaxpr, with or without its constants.
          given: its inputs.
          where: what is around it.
          behind: the numbers of outputs that only a backward pass reads.

        Returns:
          The outputs.
        """
        jaxpr = getattr(program, "jaxpr", program)
        consts = [input_value(c, None, -1) for c in getattr(program, "consts", ())]
        known: dict[Any, Value] = {}
        known.update(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, given, strict=True))
        reads = self._reads(jaxpr, where, behind)
        for n, equation in enumerate(jaxpr.eqns):
            inputs = [_read(v, known) for v in equation.invars]
            for v in equation.invars:
                if not _is_literal(v) and reads.last[v] == n:
                    known.pop(v, None)
            here = self._within(equation, where)
            if n in reads.backward:
                here = here._replace(backward=True)
            only = frozenset(
                k
                for k, v in enumerate(equation.outvars)
                if v in reads.last and v not in reads.forward
            )
            outputs = self._evaluate(equation, inputs, here, only)
            pairs = zip(equation.outvars, outputs, strict=True)
            known.update((v, x) for v, x in pairs if v in reads.last)
        return [_read(v, known) for v in jaxpr.outvars]

    def _reads(self, jaxpr: Any, where: Where, behind: frozenset[int]) -> _Reads:
        derived = "jvp(" in where.names
        key = (id(jaxpr), behind, derived, where.backward)
        if key not in self._known_reads:
            found = _reads_of(jaxpr, behind, derived, where.backward)
            self._known_reads[key] = (jaxpr, found)
        return self._known_reads[key][1]

    def _within(self, equation: Any, where: Where) -> Where:
        info = equation.source_info
        own = str(info.name_stack)
        names = "/".join(filter(None, [where.names, own]))
        if (told := line_of(own)) is not None:
            return where._replace(names=names, line=Line(*told))
        line = where.line
        for frame in info.traceback.frames if info.traceback else ():
            if not frame.file_name.startswith(self._libraries):
                line = Line(frame.file_name, frame.line_num, frame.function_name)
                break
        return where._replace(names=names, line=line)

    def _evaluate(
        self, equation: Any, inputs: list[Value], where: Where, only: frozenset[int]
    ) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            return self.run(_inside(equation), inputs, where, only)
        if name == "cond" and self._stepwise:
            branches = params["branches"]
            chosen = min(max(int(inputs[0].array), 0), len(branches) - 1)
            return self.run(branches[chosen], inputs[1:], where, only)
        outputs = self._compute(equation, inputs, where)
        steps = self._stepwise.get(name)
        if steps is not None and any(x.bad for x in outputs):
            # The same once more by single steps; what they do not show is the whole's.
            found = steps(equation, inputs, where, only)
            for whole, stepped in zip(outputs, found, strict=True):
                if whole.bad and stepped.bad:
                    whole.culprit, whole.meant = stepped.culprit, stepped.meant
        return outputs

    def _compute(self, equation: Any, inputs: list[Value], where: Where) -> list[Value]:
        if not equation.outvars:
            return []  # such as jax.debug.print, which has printed already
        order = next(self._count)
        moved = equation.primitive.name in _MOVES and inputs
        leaf = inputs[0].leaf if moved else None
        outputs = []
        for array in self._bind(equation, [x.array for x in inputs]):
            value = Value(array, *_flags(array), leaf=leaf)
            if value.bad:
                self._blame(value, equation, inputs, where, order)
            outputs.append(value)
        return outputs

    def _blame(
        self, value: Value, equation: Any, inputs: list[Value], where: Where, order: int
    ) -> None:
        reached = [x for x in inputs if x.bad and _reaches(x, value, equation)]
        nans = [x for x in reached if x.nan]
        causes = nans if value.nan and nans else reached
        value.culprit = earliest(x.culprit for x in causes)
        value.meant = earliest(x.meant for x in causes)
        if value.culprit is not None:
            return
        fresh = (value.nan and not nans) or not causes
        if fresh or value.meant is None:
            told = [describe(x.array, x.leaf) for x in inputs if _is_inexact(x.array)]
            name = equation.primitive.name if fresh else "constant"
            found = Culprit(order, name, describe(value.array), tuple(told), where)
            if fresh or nans:
                value.culprit = found
            else:
                value.meant = found

    def _scan(
        self, equation: Any, inputs: list[Value], where: Where, only: frozenset[int]
    ) -> list[Value]:
        consts, carried = scan_layout(equation)
        fixed, carry = inputs[:consts], inputs[consts : consts + carried]
        stacked = inputs[consts + carried :]
        length = equation.params["length"]
        steps: list[list[Value]] = [[] for _ in range(length)]
        for i in range(length)[:: -1 if equation.params["reverse"] else 1]:
            given = [*fixed, *carry, *(_part(x, i) for x in stacked)]
            here = where._replace(iterations=(*where.iterations, i))
            out = self.run(equation.params["jaxpr"], given, here, only)
            carry, steps[i] = out[:carried], out[carried:]
        return [*carry, *map(_joined, zip(*steps, strict=True))]

    def _while(
        self, equation: Any, inputs: list[Value], where: Where, only: frozenset[int]
    ) -> list[Value]:
        params = equation.params
        n, m = params["cond_nconsts"], params["body_nconsts"]
        asked, fixed, carry = inputs[:n], inputs[n : n + m], inputs[n + m :]
        i = 0
        while True:
            here = where._replace(iterations=(*where.iterations, i))
            (goes_on,) = self.run(params["cond_jaxpr"], [*asked, *carry], here)
            if not bool(goes_on.array):
                return carry
            carry = self.run(params["body_jaxpr"], [*fixed, *carry], here, only)
            i += 1

    def _shard_map(
        self, equation: Any, inputs: list[Value], where: Where, only: frozenset[int]
    ) -> list[Value]:
        """Computes every value on every device, and then looks at all of them."""
        params = equation.params
        axes = params.get("newly_manual_axes", params.get("manual_axes"))

        def everything(*arrays: Any) -> Any:
            made: list[list[Any]] = []
            _traced(params["jaxpr"], arrays, made)
            return jax.tree.map(lambda x: x[None], (arrays, made))

        arrays, made = jax.jit(
            jax.shard_map(
                everything,
                mesh=params["mesh"],
                in_specs=tuple(params["in_specs"]),
                out_specs=PartitionSpec(tuple(axes)),
                axis_names=set(axes),
                check_vma=params["check_vma"],
            )
        )(*(x.array for x in inputs))
        ready = iter(made)
        replay = Evaluation()
        replay._count, replay._stepwise = self._count, {}
        replay._bind = lambda equation, arrays: next(ready)
        given = [
            dataclasses.replace(x, array=array)
            for x, array in zip(inputs, arrays, strict=True)
        ]
        return replay.run(params["jaxpr"], given, where, only)


def _traced(program: Any, given: Sequence[Any], made: list[Any]) -> Any:
    """Computes a jaxpr inside a trace, and notes what each equation made."""
    jaxpr = getattr(program, "jaxpr", program)
    known = dict(zip(jaxpr.constvars, getattr(program, "consts", ()), strict=True))
    known.update(zip(jaxpr.invars, given, strict=True))

    def read(v: Any) -> Any:
        return v.val if _is_literal(v) else known[v]

    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        if equation.primitive.name in _CALLS:
            outputs = _traced(_inside(equation), inputs, made)
        elif equation.outvars:
            outputs = _bind(equation, inputs)
            made.append(outputs)
        else:
            outputs = []
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _inside(equation: Any) -> Any:
    parts = map(equation.params.get, ("jaxpr", "call_jaxpr", "fun_jaxpr"))
    return next(filter(None, parts))


def _reads_of(
    jaxpr: Any, behind: frozenset[int], derived: bool, backward: bool
) -> _Reads:
    reads = _Reads({}, set(), set())
    for k, v in enumerate(jaxpr.outvars):
        if not _is_literal(v):
            reads.last[v] = len(jaxpr.eqns)
            if k not in behind:
                reads.forward.add(v)
    for n, equation in reversed(list(enumerate(jaxpr.eqns))):
        names = str(equation.source_info.name_stack)
        read = [v for v in equation.outvars if v in reads.last]
        # What a forward pass computes for the derivative alone belongs to that.
        alone = (derived or "jvp(" in names) and read
        alone = alone and not any(v in reads.forward for v in read)
        if backward or alone or "transpose(" in names:
            reads.backward.add(n)
        for v in equation.invars:
            if not _is_literal(v):
                reads.last.setdefault(v, n)
                if n not in reads.backward:
                    reads.forward.add(v)
    return reads


def _bind(equation: Any, arrays: list[Any]) -> list[Any]:
    primitive = equation.primitive
    params = primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
        try:
            out = primitive.bind(*arrays, **params)
        except NotImplementedError:  # some are known to the compiler alone
            out = jax.jit(lambda *xs: primitive.bind(*xs, **params))(*arrays)
    return list(out) if primitive.multiple_results else [out]


def _read(v: Any, known: dict[Any, Value]) -> Value:
    return Value(v.val, *_flags(v.val)) if _is_literal(v) else known[v]


def _is_literal(v: Any) -> bool:
    return hasattr(v, "val")


def _is_inexact(array: Any) -> bool:
    return jnp.issubdtype(_dtype(array), jnp.inexact)


def _dtype(array: Any) -> Any:
    return array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype


def _flags(array: Any) -> tuple[bool, bool]:
    """Whether there is NaN, and whether there is infinity, in an array."""
    if isinstance(array, jax.Ref):
        raise UnsupportedError(
            "find_nan does not follow what is written to a jax.Ref. Pass the values "
            "that it holds, and return the new ones."
        )
    if not _is_inexact(array):
        return False, False
    host = np.asarray(array)
    if np.isfinite(host).all():
        return False, False
    return bool(np.isnan(host).any()), bool(np.isinf(host).any())


def _reaches(x: Value, out: Value, equation: Any) -> bool:
    """Whether what is not finite in an input can be why an output is not."""
    a, b = np.asarray(x.array), np.asarray(out.array)
    if equation.primitive.name not in _ELEMENTWISE or a.shape != b.shape:
        return True
    return bool((~np.isfinite(a) & ~np.isfinite(b)).any())


def _part(x: Value, i: int) -> Value:
    value = Value(x.array[i], leaf=x.leaf)
    if x.bad:
        value.nan, value.inf = _flags(value.array)
        value.culprit, value.meant = x.culprit, x.meant
    return value


def _joined(parts: Sequence[Value]) -> Value:
    bad = [x for x in parts if x.bad]
    return Value(
        None,
        any(x.nan for x in bad),
        any(x.inf for x in bad),
        earliest(x.culprit for x in bad),
        earliest(x.meant for x in bad),
    )
