"""Programs of verbs and edits: nothing in them compiles."""

from __future__ import annotations

import collections
import functools
import random
from collections.abc import Iterator
from typing import Any

from . import reference as ref
from . import zoo
from .world import World

NAMES = ("a", "b", "c", "d")
NAMED = ("'b'", "'a'", "'x'", "'a b'", "'10'")
KEYS = ("'x'", "'y'", "'a b'", "0", "False", "7", "('t', 1)", "('t', True)")
_DEEPEST = 6


_CALLED = (ref.Module, zoo.Plain, functools.partial)


class Place:
    """An object that a program can name."""

    __slots__ = ("depth", "obj", "text")

    def __init__(self, text: str, obj: Any, depth: int):
        self.text, self.obj, self.depth = text, obj, depth


def places(bound: list[tuple[str, Any]]) -> Iterator[Place]:
    """Every object with a short expression for it, each once."""
    seen: set[int] = set()
    # No edit makes what has a name with an underscore part of another model.
    named = ((name, x) for name, x in bound if name[0] != "_")
    todo = collections.deque(Place(name, x, 0) for name, x in named)
    while todo:
        place = todo.popleft()
        x = place.obj
        if callable(x) and not isinstance(x, _CALLED):
            continue
        if isinstance(x, (ref.GraphDef, int, str, float)):
            continue
        if id(x) in seen or x is None:
            continue
        seen.add(id(x))
        yield place
        if place.depth >= _DEEPEST:
            continue
        todo.extend(
            Place(place.text + how, child, place.depth + 1) for how, child in _below(x)
        )


def _below(x: Any) -> list[tuple[str, Any]]:
    if isinstance(x, (ref.Module, zoo.D, zoo.FD)):
        return [(part(x, k), x.__dict__[k]) for k in attributes(x)]
    if isinstance(x, dict):
        return [(f"[{k!r}]", v) for k, v in x.items()]
    if isinstance(x, (list, tuple)):
        return [(f"[{i}]", v) for i, v in enumerate(x)]
    if isinstance(x, ref.State):
        return [(f"[{k!r}]", x[k]) for k in x]
    if isinstance(x, functools.partial):
        named = [(f".keywords[{k!r}]", v) for k, v in x.keywords.items()]
        return [(f".args[{i}]", v) for i, v in enumerate(x.args)] + named
    return []


def attributes(x: Any) -> list[str]:
    """The names of what an object holds that a program can write."""
    names = [k for k in x.__dict__ if k[0] != "_"]
    if isinstance(x, ref.LISTS):
        return [k for k in names if not k.isdigit() or int(k) < len(x)]
    free = isinstance(x, (ref.Dict, ref.FlaxDict))
    return [k for k in names if free or k.isidentifier()]


def part(x: Any, name: str) -> str:
    """How a program writes an attribute after the object that it is of."""
    if name.isdigit() and isinstance(x, ref.LISTS):
        return f"[{name}]"
    items = isinstance(x, (ref.Dict, ref.FlaxDict))
    return f"[{name!r}]" if items else f".{name}"


class Drawn:
    """One random program of verbs and edits, drawn while the reference runs it.

    Args:
      seed: all randomness comes from it.
      flax: whether objects of Flax may occur.
      counts: what was drawn is counted here.
    """

    def __init__(self, seed: Any, *, flax: bool, counts: collections.Counter[str]):
        self.random = random.Random(seed)  # noqa: S311 - to be drawn again
        self.counts = counts
        self.flax = flax
        self.world = World(ref)
        self.lines: list[str] = []
        self.codes: list[Any] = []
        self.outcomes: list[str] = []
        self._fresh = 0
        self.focus = ""  # the model that most edits and verbs are about

    # ------------------------------------------------------------- running
    def do(self, text: str) -> str:
        """Adds a statement, and runs it in the reference."""
        code = compile(text, "<program>", "exec")
        self.lines.append(text)
        self.codes.append(code)
        outcome = self.world.run(code)
        self.outcomes.append(outcome)
        if outcome:
            self.counts[f"error {outcome}"] += 1
        return outcome

    def name(self, prefix: str) -> str:
        self._fresh += 1
        return f"{prefix}{self._fresh}"

    def places(self, *kinds: type) -> list[Place]:
        """What there is of some kinds: most often in the one model."""
        names = self.world.names
        if self.focus in names and self.random.random() < 0.6:
            near = places([(self.focus, names[self.focus])])
            found = [p for p in near if not kinds or isinstance(p.obj, kinds)]
            if found:
                return found
        every = places(self.world.bound())
        return [p for p in every if not kinds or isinstance(p.obj, kinds)]

    def pick(self, *kinds: type) -> Place | None:
        found = self.places(*kinds)
        return self.random.choice(found) if found else None

    def roots(self, *kinds: type) -> list[str]:
        return [
            k for k, v in self.world.bound() if isinstance(v, kinds) and k[0] != "_"
        ]

    # ------------------------------------------------------- expressions
    def number(self) -> int:
        return self.random.randrange(1, 9)

    def array(self) -> str:
        r = self.random.random()
        if r < 0.8:
            return f"arr({self.number()})"
        if r < 0.9:
            return f"arr([{self.number()}, {self.number()}])"
        return f"np.array({self.number()}, np.float32)"

    def variable(self) -> str:
        kind = self.random.choice(("P", "P", "P", "BS", "K", "K2", "V", "RK"))
        self.counts[f"node {kind}"] += 1
        if kind == "RK":
            return f"RK(key({self.number()}))"
        tag = (
            f", tag='t{self.random.randrange(2)}'" if self.random.random() < 0.2 else ""
        )
        return f"{kind}({self.array()}{tag})"

    def static(self) -> str:
        n = self.number() % 3
        return self.random.choice(
            (
                *(f"{n}", f"{n}.0", "True", "False", "None", "'s'", "nan", "-0.0"),
                *("relu", "double", f"({n}, 's')", f"({n}, {n}.0)", f"(None, {n})"),
                *(f"FD({n}, 's')", f"FD({n}.0, None)", f"OwnEq({n}, {self.number()})"),
                *(f"SubEq({n}, {self.number()})", f"frozenset([{n}])"),
                *(f"np.float32({n})", f"NT({n}, 's')", f"Plain({n})", f"Callable({n})"),
                *(f"1j * {n}", "np.float64(0.5)", "lambda x: x"),
            )
        )

    def bad(self) -> str:
        """What no model may hold."""
        return self.random.choice(
            (
                *("{1, 2}", "Plain(P(arr(1)))", "Callable(P(arr(1)))"),
                *("Callable(A(w=P(arr(1))))", "[nnx.data(0.5)]", "bytearray(3)"),
                *("nnx.List([nnx.static(P(arr(1)))])", "nnx.List([{1, 2}])"),
                *("Plain([P(arr(1))])", "Plain({'a': A(w=P(arr(1)))})"),
                *("Callable(functools.partial(relu, P(arr(1))))", "{P(arr(1))}"),
            )
        )

    def expression(self, depth: int = 2) -> str:
        """Something to put into a model."""
        r = self.random.random()
        if r < 0.22:
            return self.variable()
        if r < 0.32:
            self.counts["node raw array"] += 1
            return (
                f"key({self.number()})" if self.random.random() < 0.1 else self.array()
            )
        if r < 0.5:
            return self.static()
        if r < 0.66:
            found = self.pick()
            if found is not None and not isinstance(found.obj, ref.Marked):
                self.counts["shared or cyclic"] += 1
                return found.text
        if 0.66 <= r < 0.665:
            self.counts["bad value"] += 1
            return self.bad()
        if depth == 0:
            return self.variable()
        return self.holder(depth - 1)

    def holder(self, depth: int) -> str:
        kind = self.random.choice(
            (
                *("module", "module", "module", "list", "list", "dict", "dict"),
                *("tuple", "tuple", "D", "FD", "NT", "Ordered"),
                *("List", "List", "Dict", "Dict", "Rngs", "DM"),
                *("method", "partial", "defaultdict", "State"),
                *(("flax",) * 8 if self.flax else ()),
            )
        )
        self.counts[f"node {kind}"] += 1
        n = self.random.randrange(3)
        some = [self.expression(depth) for _ in range(n)]
        if kind == "module":
            return self.module(depth)
        if kind == "flax":
            return self.flax_module()
        if kind == "list":
            return f"[{', '.join(some)}]"
        if kind in ("List", "Dict"):
            return self.container(kind, depth)
        if kind == "Rngs":
            more = f", dropout={self.number()}" if self.random.random() < 0.5 else ""
            return f"nnx.Rngs({self.number()}{more})"
        if kind == "DM":
            names = self.random.sample(("a", "r", "s"), n)
            fields = ", ".join(f"{k}={v}" for k, v in zip(names, some, strict=True))
            return f"DM({fields})"
        if kind == "partial":
            named = (
                [f"k={self.expression(depth)}"] if self.random.random() < 0.5 else ()
            )
            return f"functools.partial({', '.join(('relu', *some, *named))})"
        if kind in ("dict", "Ordered"):
            keys = self.random.sample(KEYS, n)
            inside = ", ".join(f"{k}: {v}" for k, v in zip(keys, some, strict=True))
            return f"Ordered({{{inside}}})" if kind == "Ordered" else f"{{{inside}}}"
        if kind == "tuple":
            return f"({', '.join(some)}{',' if n == 1 else ''})"
        if kind in ("D", "FD"):
            fields = zip(("a", "b"), some, strict=False)
            return f"{kind}({', '.join(f'{k}={v}' for k, v in fields)})"
        if kind == "NT":
            return f"NT({self.expression(depth)}, {self.expression(depth)})"
        if kind == "method":
            found = self.pick(ref.Module)
            if isinstance(found and found.obj, ref.List):
                return f"{found.text}.append"
            if isinstance(found and found.obj, ref.Dict):
                return f"{found.text}.pop"
            if found is not None and hasattr(type(found.obj), "method"):
                return f"{found.text}.method"
        if kind == "State":
            return (
                f"nnx.State({{'p': {self.variable()}, 'q': {{'r': {self.array()}}}}})"
            )
        return self.variable()

    def item(self, depth: int = 1) -> str:
        """Something to put into a List or Dict of NNX: there it may be marked."""
        if self.random.random() < 0.75:
            return self.expression(depth)
        self.counts["node marked item"] += 1
        n = self.number()
        return self.random.choice(
            (
                *(f"nnx.data({n})", f"nnx.data({n}.5)", f"nnx.data({self.array()})"),
                *(f"nnx.static({n})", f"nnx.static(({n}, 's'))", "nnx.static(relu)"),
                *(f"nnx.data([{n}.5, 2.0])", f"nnx.data({self.variable()})"),
            )
        )

    def container(self, kind: str, depth: int) -> str:
        """A List or Dict of NNX, or of a class derived from it."""
        items = [self.item(depth) for _ in range(self.random.randrange(4))]
        own = self.random.random() < 0.3
        if kind == "List":
            return f"{'L' if own else 'nnx.List'}([{', '.join(items)}])"
        pairs = zip(self.random.sample(NAMED, len(items)), items, strict=True)
        inside = ", ".join(f"{k}: {x}" for k, x in pairs)
        return f"{'M' if own else 'nnx.Dict'}({{{inside}}})"

    def module(self, depth: int) -> str:
        names = self.random.sample(NAMES, self.random.randrange(1, 4))
        inside = [f"{n}={self.expression(depth)}" for n in names]
        if self.random.random() < 0.3:
            inside.append("deterministic=False")
        return f"{self.random.choice(('A', 'A', 'B', 'C'))}({', '.join(inside)})"

    def flax_module(self) -> str:
        names = self.random.sample(NAMES, self.random.randrange(1, 3))
        inside = [f"{n}={self.flax_value()}" for n in names]
        return f"{self.random.choice(('F', 'F2'))}({', '.join(inside)})"

    def flax_data(self) -> str:
        """What Flax takes for data, in whose place only such may stand."""
        n = self.number()
        some = (f"FP(arr({n}))", f"FP2(arr({n}), tag='t0')", f"F(a=FP(arr({n})))")
        found = self.pick(ref.FlaxModule, ref.FlaxVariable)
        return self.random.choice((*some, found.text) if found else some)

    def flax_value(self) -> str:
        found = self.pick(ref.FlaxModule, ref.FlaxVariable)
        inside = [self.flax_data() for _ in range(self.random.randrange(3))]
        keys = self.random.sample(NAMED, len(inside))
        items = ", ".join(f"{k}: {x}" for k, x in zip(keys, inside, strict=True))
        return self.random.choice(
            (
                *(f"FL([{', '.join(inside)}])", f"FM({{{items}}})"),
                *(f"FP(arr({self.number()}))", f"FP2(arr({self.number()}))"),
                *(f"FP(arr({self.number()}), tag='t0')", "'s'", f"{self.number()}"),
                *(f"F(a=FP(arr({self.number()})))", "None"),
                *((found.text, found.text) if found else ()),
            )
        )

    # --------------------------------------------------------------- edits
    def edit(self) -> None:
        """One random edit of what there is."""
        kind, draw = self.random.choice(_EDITS)
        text = getattr(self, draw)()
        if text:
            self.counts[f"edit {kind}"] += 1
            self.do(text)

    def attribute(self) -> tuple[Place, str] | None:
        """A module and one of its attributes."""
        found = self.pick(ref.Module)
        names = attributes(found.obj) if found else []
        return (found, self.random.choice(names)) if found and names else None

    def set_attribute(self) -> str | None:
        found = self.pick(ref.Module, zoo.D)
        if found is None:
            return None
        name = self.random.choice(NAMES)
        if isinstance(found.obj, (ref.FlaxList, ref.FlaxDict)):
            return None
        if isinstance(found.obj, ref.FlaxModule):
            # Flax refuses data in the place of a static, and takes what stands in the
            # place of data for that.
            old = found.obj.__dict__.get(name)
            data = not isinstance(old, (str, int, type(None), zoo.Attributed))
            value = (
                self.flax_value()
                if name not in found.obj.__dict__
                else (f"FP(arr({self.number()}))" if data else "'u'")
            )
            return f"{found.text}.{name} = {value}"
        return f"{found.text}.{name} = {self.expression()}"

    def replace_array(self) -> str | None:
        """A raw array in the place of another."""
        found = [
            f"{p.text}{part(p.obj, k)}"
            for p in self.places(ref.Module)
            for k in attributes(p.obj)
            if ref.is_array(p.obj.__dict__[k]) and not isinstance(p.obj, ref.FlaxModule)
        ]
        return f"{self.random.choice(found)} = {self.array()}" if found else None

    def similar_static(self) -> str | None:
        """A static in the place of one that is all but equal."""
        found = [
            (f"{p.text}{part(p.obj, k)}", similar)
            for p in self.places(ref.Module)
            for k in attributes(p.obj)
            if (similar := _similar(p.obj.__dict__[k]))
            and not isinstance(p.obj, ref.FlaxModule)
        ]
        if not found:
            return None
        place, similar = self.random.choice(found)
        return f"{place} = {self.random.choice(similar)}"

    def delete_attribute(self) -> str | None:
        found = self.attribute()
        return found and f"del {found[0].text}{part(found[0].obj, found[1])}"

    def back_reference(self) -> str | None:
        roots = self.roots(ref.Module)
        found = self.pick(ref.Module, list, dict)
        if found is None or not roots:
            return None
        # A cycle through the very object that is asked about is a case of its own.
        near = self.focus in roots and self.random.random() < 0.6
        root = self.focus if near else self.random.choice(roots)
        if near and self.random.random() < 0.4:
            found = Place(root, self.world.names[root], 0)
        theirs = isinstance(self.world.names[root], ref.FlaxModule)
        if isinstance(found.obj, (ref.FlaxList, ref.FlaxDict)) and not theirs:
            return None
        if isinstance(found.obj, (list, *ref.LISTS)):
            return f"{found.text}.append({root})"
        if isinstance(found.obj, (dict, ref.Dict, ref.FlaxDict)):
            keys = KEYS if isinstance(found.obj, dict) else NAMED
            return f"{found.text}[{self.random.choice(keys)}] = {root}"
        name = self.random.choice(NAMES)
        if isinstance(found.obj, ref.FlaxModule):
            old = found.obj.__dict__.get(name, root)
            data = old is root or isinstance(old, (ref.Module, ref.Variable))
            return f"{found.text}.{name} = {root}" if theirs and data else None
        # Where there was None or the root, more often than chance would have it.
        known = [
            k
            for k, v in found.obj.__dict__.items()
            if (v is None or v is found.obj) and k.isidentifier()
        ]
        name = self.random.choice(known) if known else name
        old = found.obj.__dict__.get(name)
        return f"{found.text}.{name} = {root if old is None else 'None'}"

    def swap(self) -> str | None:
        found = self.pick(ref.Module)
        if found is None or isinstance(found.obj, ref.FlaxModule):
            return None
        names = attributes(found.obj)
        if len(names) < 2:
            return None
        both = [f"{found.text}{part(found.obj, k)}" for k in names]
        a, b = self.random.sample(both, 2)
        return f"{a}, {b} = {b}, {a}"

    def edit_list(self) -> str | None:
        found = self.pick(list, *ref.LISTS)
        if found is None:
            return None
        m, n = found.text, len(found.obj)
        theirs = isinstance(found.obj, ref.FlaxList)
        new = self.item if isinstance(found.obj, ref.List) else self.expression
        new = self.flax_data if theirs else new
        options = [f"{m}.append({new()})"]
        if n:
            i = self.random.randrange(n)
            options += [f"{m}[{i}] = {new()}", f"del {m}[{i}]"]
            options += [f"{m}.insert({i}, {new()})", f"{m}.append({m}[{i}])"]
            if not theirs:
                options += [f"{m}.reverse()", f"{m}[{i}:] = [{new()}, {new()}]"]
                options += [f"{m}.append({m}.pop({i}))", f"{m}.clear()"]
                options += [
                    f"{m}.extend([{new()}, {new()}])",
                    f"{m}[0], {m}[{i}] = {m}[{i}], {m}[0]",
                ]
        return self.random.choice(options)

    def edit_dict(self) -> str | None:
        found = self.pick(dict, ref.Dict, ref.FlaxDict)
        if found is None:
            return None
        m = found.text
        plain, theirs = isinstance(found.obj, dict), isinstance(found.obj, ref.FlaxDict)
        new = self.flax_data if theirs else self.expression if plain else self.item
        keys = KEYS if plain or (self.random.random() < 0.05 and not theirs) else NAMED
        options = [f"{m}[{self.random.choice(keys)}] = {new()}"]
        inside = list(found.obj) if plain else attributes(found.obj)
        if inside:
            key = self.random.choice(inside)
            options += [f"del {m}[{key!r}]", f"{m}[{key!r}] = {new()}"]
            if not theirs:
                options += [f"{m}[{key!r}] = {m}.pop({key!r})", f"{m}.clear()"]
                options += [f"{m}.update({{'a': {new()}, 'x': {new()}}})"]
        return self.random.choice(options)

    def set_value(self) -> str | None:
        found = self.pick(ref.Variable)
        return found and f"{found.text}.set_value(arr({self.number()}))"

    def metadata(self) -> str | None:
        found = self.pick(ref.Variable)
        if found is None or isinstance(found.obj, ref.FlaxVariable):
            return None
        name = self.random.choice(("tag", "m"))
        value = self.random.choice(("'t0'", "'t1'", "1", "1.0", "True", "(1, 's')"))
        if self.random.random() < 0.2:
            return f"{found.text}.del_metadata({name!r})"
        return f"{found.text}.set_metadata({name!r}, {value})"

    def role(self) -> str | None:
        found = self.pick(ref.Module)
        if found is None or isinstance(found.obj, ref.FlaxModule):
            return None
        value = self.random.choice(
            (
                *("nnx.data(0.5)", "nnx.data(3)", "nnx.static(0.5)", "0.25", "0.75"),
                *(
                    "nnx.static((1, 2))",
                    "nnx.data((0.5, 0.25))",
                    "nnx.data([0.5, 2.0])",
                ),
                *(f"nnx.data({self.array()})", "nnx.static('s')"),
            )
        )
        return f"{found.text}.{self.random.choice('qr')} = {value}"

    def mode(self) -> str | None:
        found = self.pick(ref.Module)
        if found is None or isinstance(found.obj, (ref.FlaxModule, ref.Rngs)):
            return None
        if isinstance(found.obj, ref.RngStream):
            return f"{found.text}()"
        return f"{found.text}.{self.random.choice(('train', 'eval'))}()"

    def next_key(self) -> str | None:
        found = self.pick(ref.Rngs, ref.RngStream)
        if found is None or isinstance(found.obj, ref.RngStream):
            return found and f"{found.text}()"
        return f"{found.text}.{self.random.choice(('default', 'dropout'))}()"

    def through_vars(self) -> str | None:
        found = self.pick(ref.Module)
        if found is None or isinstance(found.obj, ref.FlaxModule):
            return None
        return f"vars({found.text})['v{self.name('')}'] = {self.expression(1)}"

    def other_class(self) -> str | None:
        found = self.pick(ref.Module, ref.FlaxVariable)
        if found is None:
            return None
        others = {
            **dict.fromkeys("ABC", "ABC"),
            **dict.fromkeys(("F", "F2"), ("F", "F2")),
            **dict.fromkeys(("FP", "FP2"), ("FP", "FP2")),
            **dict.fromkeys(("List", "L"), ("nnx.List", "L")),
            **dict.fromkeys(("Dict", "M"), ("nnx.Dict", "M", "A")),
            "FL": ("FL",),
            "FM": ("FM",),
            "DM": ("DM", "A"),
        }
        known = others.get(type(found.obj).__name__)
        if known is None:
            return None
        other = self.random.choice(known)
        if isinstance(found.obj, (ref.FlaxModule, ref.FlaxVariable)):
            return f"object.__setattr__({found.text}, '__class__', {other})"
        return f"{found.text}.__class__ = {other}"

    def other_dict(self) -> str | None:
        found = self.pick(ref.Module)
        if found is None:
            return None
        m = found.text
        if isinstance(found.obj, ref.FlaxModule):
            return f"object.__setattr__({m}, '__dict__', {{**vars({m})}})"
        value = self.expression(1)
        return f"{m}.__dict__ = {{**vars({m}), {self.random.choice(NAMES)!r}: {value}}}"

    def numpy_item(self) -> str | None:
        found = []
        for p in self.places():
            if type(p.obj) is ref.np.ndarray:
                found.append(p.text)
            boxed = p.obj.get_value() if isinstance(p.obj, ref.Variable) else None
            if type(boxed) is ref.np.ndarray:
                found.append(f"{p.text}.get_value()")
        if not found:
            return None
        return f"{self.random.choice(found)}[...] = {self.number()}"

    def attributes_on_list(self) -> str | None:
        found = self.pick(ref.Module)
        if found is None or self.random.random() < 0.9:
            return None
        return f"{found.text}.a = Attributed([{self.variable()}]); {found.text}.a.z = 1"

    # --------------------------------------------------------------- verbs
    def verb(self) -> None:
        """One random verb on what there is."""
        kind, draw = self.random.choice(_VERBS)
        text = getattr(self, draw)()
        if text:
            self.counts[f"verb {kind}"] += 1
            self.do(text)

    def root(self) -> str | None:
        """Most often a whole model, so that kept plans are asked for."""
        if self.focus in self.world.names and self.random.random() < 0.6:
            return self.focus
        if self.random.random() < 0.75:
            found = self.roots(ref.Module)
            if found:
                return self.random.choice(found)
        found = self.pick(ref.Module, ref.Module, list, dict, zoo.D, ref.Variable)
        return found and found.text

    def filter(self) -> str:
        kinds = ("P", "BS", "K", "K2", "V", "...", "None", "'t0'", "'t1'", "()")
        one = self.random.choice(kinds)
        r = self.random.random()
        if r < 0.1:
            return f"nnx.Not({one})"
        if r < 0.2:
            return f"nnx.Under({self.random.choice(NAMES)!r})"
        if r < 0.3:
            return f"({one}, {self.random.choice(kinds)})"
        if r < 0.35:
            return f"nnx.All({one}, {self.random.choice(kinds)})"
        return "FP" if self.flax and r < 0.4 else one

    def filters(self) -> str:
        return ", ".join(self.filter() for _ in range(self.random.randrange(3)))

    def state(self) -> str | None:
        root = self.root()
        return root and f"{self.name('s')} = nnx.state({_call(root, self.filters())})"

    def split(self) -> str | None:
        root = self.root()
        if root is None:
            return None
        filters = [self.filter() for _ in range(self.random.randrange(3))]
        if filters and self.random.random() < 0.7:
            filters[-1] = "..."
        names = [self.name("g"), *(self.name("s") for _ in filters or (0,))]
        return f"{', '.join(names)} = nnx.split({_call(root, ', '.join(filters))})"

    def merge(self) -> str | None:
        splits = [t for t in self.lines if " = nnx.split(" in t]
        if splits and self.random.random() < 0.7:
            names = self.random.choice(splits).split(" = ")[0].split(", ")
            if all(n in self.world.names for n in names):
                return f"{self.name('m')} = nnx.merge({', '.join(names)})"
        definitions, states = self.roots(ref.GraphDef), self.roots(ref.State)
        if not definitions or not states:
            return None
        some = [self.random.choice(states) for _ in range(self.random.randrange(1, 3))]
        definition = self.random.choice(definitions)
        return f"{self.name('m')} = nnx.merge({definition}, {', '.join(some)})"

    def update(self) -> str | None:
        root = self.root()
        states = self.roots(ref.State)
        if root is None or not states:
            return None
        some = [self.random.choice(states) for _ in range(self.random.randrange(1, 3))]
        strict = self.random.choice(("", "", ", strict=False"))
        return f"nnx.update({root}, {', '.join(some)}{strict})"

    def update_own(self) -> str | None:
        """With what the model's own state says, changed a little."""
        root = self.root()
        if root is None:
            return None
        change = self.random.choice(("arr(7)", "x", "1.0", "3", "np.float32(2)"))
        return (
            f"nnx.update({root}, nnx.state({_call(root, self.filters())})"
            f".map(lambda p, x: {change}))"
        )

    def update_one(self) -> str | None:
        """One leaf of one module by a nested dict."""
        found = self.attribute()
        if found is None:
            return None
        value = self.random.choice(
            ("arr(5)", "1.0", "2", "arr([1, 2])", self.variable(), "np.float32(3)")
        )
        items = isinstance(found[0].obj, ref.LISTS) and found[1].isdigit()
        own = int(found[1]) if items else found[1]
        name = self.random.choice((own, own, "zz"))
        return f"nnx.update({found[0].text}, {{{name!r}: {value}}})"

    def pop(self) -> str | None:
        root = self.root()
        filters = self.random.choice((self.filter(), self.filters()))
        return root and f"{self.name('s')} = nnx.pop({_call(root, filters)})"

    def clone(self) -> str | None:
        root = self.root()
        how = self.random.choice(("", "", ", variables=False"))
        return root and f"{self.name('m')} = nnx.clone({root}{how})"

    def mapped(self) -> str | None:
        roots = [
            k
            for k in self.roots(ref.Module)
            if not isinstance(self.world.names[k], ref.FlaxModule)
        ]
        root = self.random.choice(roots) if roots else None
        return root and f"{self.name('m')} = nnx.mapped({root})"

    def deepcopy(self) -> str | None:
        roots = self.roots(ref.Module)
        root = self.random.choice(roots) if roots else None
        if root is None or self.flax:
            return None
        return f"{self.name('m')} = copy.deepcopy({root})"

    def variables(self) -> str | None:
        root = self.root()
        return (
            root and f"{self.name('s')} = nnx.variables({_call(root, self.filters())})"
        )

    def iter_graph(self) -> str | None:
        root = self.root()
        return root and f"{self.name('r')} = nnx.iter_graph({root})"

    def same_graphdef(self) -> str | None:
        a, b = self.root(), self.root()
        if a is None or b is None or self.flax:
            return None
        return f"{self.name('r')} = nnx.graphdef({a}) == nnx.graphdef({b})"

    def state_operation(self) -> str | None:
        states = [p.text for p in self.places(ref.State)]
        if not states:
            return None
        a, b = self.random.choice(states), self.random.choice(states)
        new = self.name("s")
        return self.random.choice(
            (
                *(f"{new} = {a} | {b}", f"{new} = {a} - {b}"),
                f"{new} = {a}.map(lambda p, x: x)",
                f"{new} = nnx.State.merge({a}, {b})",
                f"{new} = nnx.State({{'q': {a}}})",
                f"{new} = {a}.filter({self.filter()})",
                f"{new} = {a}.split({self.filter()}, ...)",
                f"{new} = {a}.to_pure_dict()",
            )
        )

    def edit_state(self) -> str | None:
        found = self.pick(ref.State)
        if found is None:
            return None
        keys = list(found.obj)
        options = [f"{found.text}['n'] = {self.array()}"]
        if keys:
            key = self.random.choice(keys)
            at = f"{found.text}[{key!r}]"
            options += [
                f"{at} = {self.array()}",
                f"del {at}",
                f"{at} = {self.variable()}",
            ]
        return self.random.choice(options)

    def forget(self) -> str | None:
        names = [k for k, v in self.world.bound() if not isinstance(v, ref.GraphDef)]
        if len(names) < 4:
            return None
        return f"del {self.random.choice(names)}"

    # ------------------------------------------------------------- program
    def program(self) -> Drawn:
        """Draws the whole program."""
        for _ in range(self.random.randrange(1, 3)):
            theirs = self.flax and self.random.random() < 0.5
            made = self.flax_module() if theirs else self.module(2)
            self.focus = self.name("m")
            self.do(f"{self.focus} = {made}")
        if self.random.random() < 0.02:
            self.counts["deep"] += 1
            self.do(f"{self.name('m')} = A(a={'[A(a=' * 30}P(arr(2)){')]' * 30})")
        for _ in range(self.random.randrange(2, 7)):
            if self.random.random() < 0.3:
                self.scene()
            else:
                self.edit() if self.random.random() < 0.5 else self.verb()
        return self

    def scene(self) -> None:
        """The same question before and after an edit."""
        if self.focus not in self.world.names:
            return
        self.counts["scene"] += 1
        how, ask = self.random.choice(
            (("s", "state"), ("m", "clone"), ("g", "graphdef"))
        )
        self.do(f"{self.name(how)} = nnx.{ask}({self.focus})")
        self.edit()
        self.do(f"{self.name(how)} = nnx.{ask}({self.focus})")


def _similar(x: Any) -> tuple[str, ...]:
    """Expressions for statics that are easily taken for this one."""
    if isinstance(x, (zoo.OwnEq, zoo.SubEq)):
        return tuple(f"{type(x).__name__}({x.a!r}, {n})" for n in (x.extra, 1, 8))
    if type(x) is zoo.FD and _is_small(x.a) and (x.b is None or type(x.b) is str):
        return tuple(f"FD({kind(x.a)!r}, {x.b!r})" for kind in (int, float))
    if _is_small(x):
        return f"{int(x)}", f"{float(x)}", f"{bool(x)}", f"-{float(x)}"
    if x is None or type(x) is str:
        return "None", "'s'", "''.join(['s'])"
    if type(x) is tuple and x and _is_small(x[0]):
        return f"({int(x[0])}, 's')", f"({float(x[0])}, 's')", "(True, 's')"
    return ()


def _is_small(x: Any) -> bool:
    return type(x) in (int, float, bool) and x in (0, 1, 2)


def _call(root: str, filters: str) -> str:
    return f"{root}, {filters}" if filters else root


# Names for the table, and methods of ``Drawn`` that give a statement or None.
_EDITS: list[tuple[str, str]] = [
    ("set attribute", "set_attribute"),
    ("set attribute", "set_attribute"),
    ("replace raw array", "replace_array"),
    ("similar static", "similar_static"),
    ("similar static", "similar_static"),
    ("delete attribute", "delete_attribute"),
    ("back reference", "back_reference"),
    ("back reference", "back_reference"),
    ("back reference", "back_reference"),
    ("swap", "swap"),
    ("list", "edit_list"),
    ("list", "edit_list"),
    ("dict", "edit_dict"),
    ("dict", "edit_dict"),
    ("set value", "set_value"),
    ("metadata", "metadata"),
    ("role", "role"),
    ("role", "role"),
    ("train or eval", "mode"),
    ("next key", "next_key"),
    ("through vars()", "through_vars"),
    ("other __class__", "other_class"),
    ("other __dict__", "other_dict"),
    ("numpy item", "numpy_item"),
    ("numpy item", "numpy_item"),
    ("attributes on a list", "attributes_on_list"),
    ("state", "edit_state"),
    ("forget a name", "forget"),
]
_VERBS: list[tuple[str, str]] = [
    ("state", "state"),
    ("state", "state"),
    ("split", "split"),
    ("split", "split"),
    ("merge", "merge"),
    ("merge", "merge"),
    ("update", "update"),
    ("update own", "update_own"),
    ("update one", "update_one"),
    ("pop", "pop"),
    ("clone", "clone"),
    ("clone", "clone"),
    ("tree map", "mapped"),
    ("deepcopy", "deepcopy"),
    ("variables", "variables"),
    ("iter_graph", "iter_graph"),
    ("graphdef ==", "same_graphdef"),
    ("State operation", "state_operation"),
    ("State operation", "state_operation"),
]
