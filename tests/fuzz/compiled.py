"""Programs with transforms in them: each compiles a little."""

from __future__ import annotations

from . import edits
from . import reference as ref

_KEYS = (ref.RngKey, ref.RngCount)


class Drawn(edits.Drawn):
    """One random program of functions, transforms and edits.

    All that a function reads of a model it reads by ``digest``, or by paths that are
    there when the function is drawn; a structure that is stale shows in the number.
    """

    def array(self) -> str:
        return f"arr({self.number()})"

    def static(self) -> str:
        n = self.number() % 3
        return self.random.choice(
            (
                *(f"{n}", f"{n}.0", "True", "False", "None", "'s'", "nan", "relu"),
                *(f"({n}, 's')", f"FD({n}, 's')", f"FD({n}.0, None)", f"NT({n}, 's')"),
                *(f"OwnEq({n}, {self.number()})", f"SubEq({n}, {self.number()})"),
            )
        )

    def bad(self) -> str:
        if self.random.random() < 0.8:
            return self.variable()
        return self.random.choice(("Plain(P(arr(1)))", "Callable(P(arr(1)))"))

    # ----------------------------------------------------------- functions
    def body(self, m: str, x: str, depth: int = 1) -> list[str]:
        """Statements on a model and a number, for the inside of a function."""
        lines = []
        for _ in range(self.random.randrange(1, 4)):
            kind, draw = self.random.choice(_INSIDE)
            text = getattr(self, draw)(m, x)
            if text:
                self.counts[f"inside {kind}"] += 1
                lines += text.split("\n")
        if depth and self.random.random() < 0.5:
            lines += self.nested(m, x)
        return lines

    def steady(self, m: str, x: str) -> list[str]:
        """Statements that write values only."""
        lines = []
        for _ in range(self.random.randrange(1, 3)):
            text = self.write(m, x)
            if text:
                lines.append(text)
        return lines or ["pass"]

    def step(self, m: str, x: str) -> list[str]:
        """The same, or rarely an edit, which most branches and loops refuse."""
        chance = self.random.random()
        if chance < 0.7:
            return self.steady(m, x)
        if chance < 0.85 and (text := self.replace(m)):
            return self.random.sample([text, *self.steady(m, x)], k=2)
        return self.body(m, x, depth=0) or ["pass"]

    def root_object(self) -> ref.Module:
        return self.world.names[self.model]

    def inner(self, m: str, *kinds: type) -> list[str]:
        """Expressions for what is in the model, from inside of a function."""
        found = list(edits.places([(m, self.root_object())]))
        self.found = {p.text: p.obj for p in found}
        return [
            p.text
            for p in found
            if isinstance(p.obj, kinds) and not isinstance(p.obj, ref.FlaxModule)
        ]

    def some(self, m: str, *kinds: type) -> str | None:
        found = self.inner(m, *kinds)
        return self.random.choice(found) if found else None

    def write(self, m: str, x: str) -> str | None:
        if self.random.random() < 0.2 and (rngs := self.some(m, ref.Rngs)):
            return f"{rngs}.{self.random.choice(('default', 'dropout'))}()"
        own = self.world.names["K"], self.world.names["V"]
        v = self.some(m, ref.Param, ref.FlaxParam, ref.BatchStat, *own)
        if v is None or self.found[v]._value is None:
            return None
        if isinstance(self.found[v], _KEYS) or ref.is_key(self.found[v]._value):
            return None
        how = self.random.choice(
            (f"{x}", f"{v}.get_value() + {x}", f"{v}.get_value() * 2", f"{x} * 3 + 1")
        )
        return f"{v}.set_value({how})"

    def write_raw(self, m: str, x: str) -> str | None:
        owner = self.some(m, ref.Module)
        return f"{owner}.{self.random.choice(edits.NAMES)} = {x} + {self.number()}"

    def move_raw(self, m: str, x: str) -> str | None:
        """Raw arrays in each other's places, and a tuple of other ones beside them.

        The structure stays as it is, so that only values and places have changed.
        """
        raw = self.raw(m)
        ends = [t for t in raw if t.rpartition(".")[2].isidentifier()]
        if len(ends) < 2:
            return None
        a, b = self.random.sample(ends, 2)
        lines = [f"{a}, {b} = {b}, {self.random.choice((a, x))}"]
        tuples = [
            t
            for t in self.inner(m, tuple)
            if t.rpartition(".")[2].isidentifier()
            and all(isinstance(v, ref.Arr) for v in self.found[t])
        ]
        if tuples and self.random.random() < 0.6:
            t = self.random.choice(tuples)
            lines.append(f"{t} = tuple(v + {x} for v in {t})")
        return "\n".join(lines)

    def raw(self, m: str) -> list[str]:
        """Expressions for raw arrays that are numbers."""
        found = self.inner(m, ref.Arr)
        return [t for t in found if not isinstance(self.found[t], ref.Key)]

    def set_static(self, m: str, x: str) -> str | None:
        owner = self.some(m, ref.Module)
        name = self.random.choice(edits.NAMES)
        return f"{owner}.{name} = {self.static()}"

    def new_variable(self, m: str, x: str) -> str | None:
        owner = self.some(m, ref.Module)
        kind = self.random.choice(("P", "BS", "K"))
        return f"{owner}.{self.random.choice(edits.NAMES)} = {kind}({x} * 2)"

    def replace(self, m: str) -> str | None:
        """A new object of the same structure in the place of one that is there."""
        old = self.some(m, ref.Module, ref.Variable, list, dict)
        if old is None or old == m:
            return None
        self.counts["inside replaced"] += 1
        if isinstance(self.found[old], ref.Variable):
            return f"{old} = type({old})({old}.get_value() * 2)"
        plain = type(self.found[old]) in (list, dict)
        how = f"type({old})" if plain and self.random.random() < 0.5 else "nnx.clone"
        return f"{old} = {how}({old})"

    def new_module(self, m: str, x: str) -> str | None:
        owner = self.some(m, ref.Module)
        items = f"[K({x} + 1), nnx.static(2), nnx.data(0.5)]"
        inside = (f"[K({x} + 1)]", f"nnx.List({items})", f"nnx.Dict(c=K({x}), a={x})")
        b = self.random.choice(inside)
        made = f"{self.random.choice('ABC')}(a=P({x}), b={b})"
        return f"{owner}.{self.random.choice(edits.NAMES)} = {made}"

    def role_inside(self, m: str, x: str) -> str | None:
        owner = self.some(m, ref.Module)
        value = self.random.choice(
            ("nnx.data(0.25)", "nnx.static(3)", "nnx.data([0.5, 0.25])", "0.75")
        )
        return f"{owner}.{self.random.choice('qr')} = {value}"

    def delete_inside(self, m: str, x: str) -> str | None:
        owner = self.some(m, ref.Module)
        name = self.random.choice((*edits.NAMES, "q", "r"))
        return f"if hasattr({owner}, {name!r}):\n    del {owner}.{name}"

    def link(self, m: str, x: str) -> str | None:
        owner = self.some(m, ref.Module)
        target = self.some(m, ref.Module, ref.Variable)
        target = self.random.choice((m, target))
        return f"{owner}.{self.random.choice(edits.NAMES)} = {target}"

    def link_to_root(self, m: str, x: str) -> str | None:
        """A model becomes part of itself, where it had None if it had that."""
        known = [k for k, v in self.root_object().__dict__.items() if v is None]
        name = self.random.choice(known or edits.NAMES)
        return f"{m}.{name} = {m}"

    def list_inside(self, m: str, x: str) -> str | None:
        owner = self.some(m, list, ref.List)
        if owner is None:
            return None
        change = (
            *(f"{owner}.append(P({x}))", f"{owner}.reverse()", f"{owner}.clear()"),
            *(f"{owner}.insert(0, {x})", f"if len({owner}):\n    {owner}.pop(0)"),
            f"if len({owner}):\n    {owner}[0] = {owner}[-1]",
            f"{owner}.extend([{x}, K({x})])",
        )
        return self.random.choice(change)

    def marked_inside(self, m: str, x: str) -> str | None:
        owner = self.some(m, ref.List, ref.Dict)
        if owner is None:
            return None
        mark = self.random.choice(("nnx.data(0.5)", "nnx.static(3)", f"nnx.data({x})"))
        change = (f"{owner}.append({mark})", f"{owner}.insert(0, {mark})")
        if isinstance(self.found[owner], ref.Dict):
            change = (f"{owner}['a'] = {mark}", f"{owner}.x = {mark}")
        return self.random.choice(change)

    def dict_inside(self, m: str, x: str) -> str | None:
        owner = self.some(m, dict, ref.Dict)
        if owner is None:
            return None
        items = isinstance(self.found[owner], ref.Dict)
        key = self.random.choice(edits.NAMED if items else edits.KEYS)
        change = (
            *(f"{owner}[{key}] = K({x})", f"{owner}[{key}] = K({x})"),
            *(f"if {key} in {owner}:\n    del {owner}[{key}]", f"{owner}.clear()"),
        )
        return self.random.choice(change)

    def metadata_inside(self, m: str, x: str) -> str | None:
        v = self.some(m, ref.Variable)
        if v is None or isinstance(self.found[v], ref.FlaxVariable):
            return None
        return f"{v}.set_metadata('m', {self.number()})"

    def class_inside(self, m: str, x: str) -> str | None:
        owner = self.some(m, ref.Module)
        cls = ("A", "B", "C")
        if isinstance(self.found[owner], ref.List):
            cls = ("nnx.List", "L")
        elif isinstance(self.found[owner], ref.Dict):
            cls = ("nnx.Dict", "M")
        elif isinstance(self.found[owner], (ref.Rngs, ref.RngStream)):
            return None
        return f"{owner}.__class__ = {self.random.choice(cls)}"

    def verb_inside(self, m: str, x: str) -> str | None:
        owner = self.some(m, ref.Module)
        target = self.some(m, ref.Module, ref.Variable)
        return self.random.choice(
            (
                f"{m}.d = nnx.clone({target})",
                f"nnx.update({owner}, nnx.state({owner}, P).map(lambda p, v: {x}))",
                f"nnx.pop({owner}, K2)",
                f"{m}.c = nnx.merge(*nnx.split({owner}))",
            )
        )

    def fail(self, m: str, x: str) -> str | None:
        return "raise KeyError('meant')" if self.random.random() < 0.3 else None

    def foreign(self, m: str, x: str) -> str | None:
        """A write to a model that was not passed in."""
        return f"_other.w.set_value({x})" if self.random.random() < 0.3 else None

    def nested(self, m: str, x: str) -> list[str]:
        """A transform called inside of a function; binds ``y``."""
        kind, draw = self.random.choice(_NESTED)
        self.counts[f"inside {kind}"] += 1
        return getattr(self, draw)(m, x)

    def function(self, name: str, lines: list[str], out: str, args: str) -> list[str]:
        return [
            f"def {name}({args}):",
            *(f"    {s}" for s in lines),
            f"    return {out}",
        ]

    def n_cond(self, m: str, x: str) -> list[str]:
        return [
            *self.function("f1", self.step("m1", "x1"), "digest(m1) + x1", "m1, x1"),
            *self.function("f2", self.step("m1", "x1"), "x1 * 2.0", "m1, x1"),
            f"y = nnx.cond({x} > {self.number()}, f1, f2, {m}, {x})",
        ]

    def n_switch(self, m: str, x: str) -> list[str]:
        return [
            *self.function("f1", self.step("m1", "x1"), "digest(m1) + x1", "m1, x1"),
            *self.function("f2", self.step("m1", "x1"), "x1 * 2.0", "m1, x1"),
            f"y = nnx.switch({self.random.randrange(2)}, [f1, f2], {m}, {x})",
        ]

    def n_fori(self, m: str, x: str) -> list[str]:
        steps = self.random.randrange(1, 3)
        return [
            *self.function(
                "f1", ["m1, x1 = c", *self.step("m1", "x1")], "(m1, x1 + 1.0)", "i, c"
            ),
            f"_, y = nnx.fori_loop(0, {steps}, f1, ({m}, {x}))",
        ]

    def n_while(self, m: str, x: str) -> list[str]:
        return [
            *self.function(
                "f1", ["m1, x1 = c", *self.step("m1", "x1")], "(m1, x1 + 4.0)", "c"
            ),
            f"_, y = nnx.while_loop(lambda c: 9.0 > c[1], f1, ({m}, {x}))",
        ]

    def n_scan(self, m: str, x: str) -> list[str]:
        return [
            *self.function(
                "f1",
                ["m1, x1 = c", *self.steady("m1", "x1")],
                "((m1, x1 + 1.0), digest(m1) + x2)",
                "c, x2",
            ),
            f"(_, y), ys = nnx.scan(f1, length=2)(({m}, {x}), arr([1, 2]) + {x})",
            "y = y + ys.sum()",
        ]

    def n_remat(self, m: str, x: str) -> list[str]:
        lines = self.body("m1", "x1", depth=0)
        return [
            *self.function("f1", lines, "digest(m1) + x1", "m1, x1"),
            f"y = nnx.remat(f1)({m}, {x})",
        ]

    def n_jit(self, m: str, x: str) -> list[str]:
        lines = self.body("m1", "x1", depth=0)
        return [
            *self.function("f1", lines, "digest(m1) + x1", "m1, x1"),
            f"y = nnx.jit(f1)({m}, {x})",
        ]

    def n_grad(self, m: str, x: str) -> list[str]:
        lines = self.body("m1", "x1", depth=0)
        return [
            *self.function("f1", lines, "digest(m1) * x1 + x1", "m1, x1"),
            f"y, g = nnx.value_and_grad(f1)({m}, {x})",
            f"{m}.g = g",
        ]

    def n_vmap(self, m: str, x: str) -> list[str]:
        return [
            *self.function("f1", ["pass"], "digest(m1) * x1 + x1", "m1, x1"),
            f"y = nnx.vmap(f1, in_axes=(None, 0))({m}, arr([1, 2, 3]) + {x}).sum()",
        ]

    # ------------------------------------------------------------ top level
    def define(self) -> str:
        """A function of a model and a number, as one statement; its name."""
        name = self.name("f")
        start = ["y = x"]
        raw = self.raw("m")
        lines = self.body("m", "x", depth=1)
        out = self.random.choice(
            (
                *("digest(m) + y", "digest(m) + y", "(m, digest(m) + y)", "m"),
                *("(digest(m), A(a=P(y), b=m))", "(y, [m, {'k': y}])", "first(m)"),
            )
        )
        if len(raw) > 1 and self.random.random() < 0.3:
            a, b = self.random.choices(raw, k=2)
            start.append(f"new = A(a={a}, b=[{b}], c=({a},))")
            out = "(digest(m), new)"
        self.do("\n".join(self.function(name, start + lines, out, "m, x")))
        return name

    def call_jit(self) -> None:
        """A compiled function, called several times with edits in between."""
        f = self.define()
        j = self.name("j")
        how = self.random.random()
        model, x = self.model, f"arr({self.number()})"
        if how < 0.15:
            p = self.name("p")
            self.do(f"{p} = functools.partial({f}, {model})")
            self.do(f"{j} = nnx.jit({p})")
            call = f"{j}({x})"
        elif how < 0.3:
            p = self.name("p")
            self.do(f"{p} = functools.partial({f}, {model}, x={x})")
            self.do(f"{j} = nnx.jit({p})")
            call = f"{j}()"
        else:
            self.do(f"{j} = nnx.jit({f})")
            call = f"{j}({model}, {x})"
        self.counts["verb jit"] += 1
        for _ in range(self.random.randrange(1, 4)):
            self.do(f"{self.name('r')} = {call}")
            for _ in range(self.random.randrange(3)):
                self.edit()

    def call_eager(self) -> None:
        """A transform called outside of any trace, its function new at each call."""
        kind, draw = self.random.choice(_NESTED)
        for _ in range(self.random.randrange(1, 3)):
            self.counts[f"eager {kind}"] += 1
            lines = getattr(self, draw)(self.model, f"arr({self.number()})")
            lines = [s for s in lines if not s.startswith(f"{self.model}.g")]
            # Each statement at the top is one of its own.
            self.do_block(lines)
            self.maybe_edit()

    def do_block(self, lines: list[str]) -> None:
        self.do("\n".join(lines))

    def maybe_edit(self) -> None:
        if self.random.random() < 0.5:
            self.edit()

    def call_with_settings(self) -> None:
        """What a function reads besides its arguments changes between calls.

        Each call has a function of its own, so nothing may be remembered.
        """
        setting, change = self.random.choice(
            (
                ("_m9.scale", "_m9.scale = {}"),
                ("getattr(_m9, 'scale')", "_m9.scale = {}"),
                ("_K9", "_K9 = {}"),
                ("globals()['_K9']", "_K9 = {}"),
                ("helper.k", "helper.k = {}"),
                ("read(_m9)", "_m9.scale = {}"),
                ("_m9.box[0]", "_m9.box[0] = {}"),
                ("read_var(_m9)", "_m9.w.set_value(arr({}))"),
            )
        )
        self.counts["settings"] += 1
        n = self.number()
        self.do(f"_m9 = A(scale={n}, box=[{n}], w=P(arr({n})))")
        self.do(f"_K9 = {n}")
        self.do("def read(cfg):\n    return cfg.scale")
        self.do("def read_var(cfg):\n    return cfg.w.get_value()")
        self.do(f"def helper(x):\n    return x * ({setting})")
        self.do(f"helper.k = {n}")
        kind, call = self.random.choice(
            (
                ("jit", "nnx.jit({f})({m}, {x})"),
                ("remat", "nnx.remat({f})({m}, {x})"),
                ("cond", "nnx.cond(True, {f}, lambda m, x: x, {m}, {x})"),
                ("switch", "nnx.switch(0, [{f}, lambda m, x: x], {m}, {x})"),
                (
                    "scan",
                    "nnx.scan(lambda c, x: (c, helper(x)), length=2)({m}, arr([1, 2]))",
                ),
                (
                    "fori_loop",
                    "nnx.fori_loop(0, 2, lambda i, c: (c[0], helper(c[1])),({m}, {x}))",
                ),
                (
                    "while_loop",
                    (
                        "nnx.while_loop(lambda c: 9.0 > c[1], "
                        "lambda c: (c[0], helper(c[1]) + 5.0), ({m}, {x}))"
                    ),
                ),
            )
        )
        self.counts[f"eager {kind}"] += 1
        for _ in range(3):
            f = "(lambda m, x: helper(x))"
            text = call.format(f=f, m=self.model, x="arr(2)")
            self.do(f"{self.name('r')} = {text}")
            self.do(change.format(self.number()))

    def call_optimizer(self) -> None:
        """Steps of training, compiled or not, with edits in between."""
        o, f = self.name("_o"), self.name("f")
        self.counts["verb Optimizer"] += 1
        self.do(f"{o} = nnx.Optimizer({self.model}, (0.5, 0.5), wrt=P)")
        inner = self.function(
            "loss", self.body("m1", "x1", 0), "digest(m1) * x1", "m1, x1"
        )
        lines = [*inner, "y, g = nnx.value_and_grad(loss)(m, x)", "o.update(m, g)"]
        self.do("\n".join(self.function(f, lines, "y", "m, o, x")))
        if self.random.random() < 0.7:
            self.do(f"{f} = nnx.jit({f})")
        for _ in range(self.random.randrange(1, 4)):
            self.do(f"{self.name('r')} = {f}({self.model}, {o}, arr({self.number()}))")
            self.maybe_edit()

    def call_lanes(self) -> None:
        """A function of a model whose every leaf has an axis, mapped over."""
        outside = self.model
        self.model = self.name("m")
        a, b, c, d = (f"arr([{self.number()}, {self.number()}])" for _ in range(4))
        items = f"[K({b}), nnx.static(2), nnx.data({c})]"
        inside = self.random.choice(
            (f"nnx.List({items})", f"[K({b}), {c}]", f"nnx.Dict(c=K({b}), a={c})")
        )
        self.do(f"{self.model} = A(w=P({a}), c={inside}, d=B(a={d}), n=None)")
        f = self.name("f")
        lines = []
        for _ in range(self.random.randrange(1, 4)):
            kind, draw = self.random.choice(_MAPPED)
            text = getattr(self, draw)("m", "x")
            if text:
                self.counts[f"inside {kind}"] += 1
                lines += text.split("\n")
        self.do("\n".join(self.function(f, lines, "digest(m) * x", "m, x")))
        call = f"nnx.vmap({f}, in_axes=(0, 0))({self.model}, arr([1, 2]))"
        for _ in range(self.random.randrange(1, 3)):
            self.counts["eager vmap of models"] += 1
            self.do(f"{self.name('r')} = {call}")
        self.model = outside

    def call_grad(self) -> None:
        f = self.name("f")
        lines = self.body("m", "x", depth=1)
        self.do(
            "\n".join(self.function(f, ["y = x", *lines], "digest(m) * x + y", "m, x"))
        )
        wrt = self.random.choice(("", "", ", wrt=K", ", wrt=(P, BS)"))
        for _ in range(self.random.randrange(1, 3)):
            self.counts["eager grad"] += 1
            text = f"nnx.value_and_grad({f}{wrt})({self.model}, arr({self.number()}))"
            self.do(f"{self.name('r')} = {text}")
            self.maybe_edit()

    def program(self) -> Drawn:
        """Draws the whole program."""
        self.model = self.focus = self.name("m")
        first = f"w=P(arr({self.number()}))"
        if self.random.random() < 0.3:
            one, two = self.array(), self.array()
            first += f", s={one}, t={two}, u=({one}, {two})"
        if self.random.random() < 0.4:
            first += self.random.choice((", n=None", ", n=nnx.data(None)"))
        made = self.module(2)
        self.do(f"{self.model} = {made[:2]}{first}, {made[2:]}")
        self.do("_other = A(w=P(arr(1)))")
        if self.model not in self.world.names:
            return self
        if self.random.random() < 0.3:
            self.do(f"{self.name('m')} = {self.module(1)}")
        for _ in range(self.random.randrange(1, 3)):
            if self.random.random() < 0.5:
                self.edit()
            self.random.choice(
                (
                    *(self.call_jit, self.call_jit, self.call_eager),
                    *(self.call_with_settings, self.call_grad, self.call_optimizer),
                    self.call_lanes,
                )
            )()
            if self.model not in self.world.names:
                break
        for _ in range(2):
            self.edit() if self.random.random() < 0.5 else self.verb()
        return self

    def forget(self) -> str | None:
        return None

    def numpy_item(self) -> str | None:
        return None


_INSIDE: list[tuple[str, str]] = [
    ("write", "write"),
    ("write", "write"),
    ("write", "write"),
    ("raw array", "write_raw"),
    ("moved array", "move_raw"),
    ("moved array", "move_raw"),
    ("static", "set_static"),
    ("new Variable", "new_variable"),
    ("new module", "new_module"),
    ("role", "role_inside"),
    ("role", "role_inside"),
    ("delete", "delete_inside"),
    ("link", "link"),
    ("link to the root", "link_to_root"),
    ("link to the root", "link_to_root"),
    ("list", "list_inside"),
    ("dict", "dict_inside"),
    ("marked item", "marked_inside"),
    ("metadata", "metadata_inside"),
    ("other class", "class_inside"),
    ("verb", "verb_inside"),
    ("error", "fail"),
    ("write to another model", "foreign"),
]
# Those that mean the same for each element of a batch.
_MAPPED = [x for x in _INSIDE if x[1] not in ("verb_inside", "foreign")]
_NESTED: list[tuple[str, str]] = [
    ("cond", "n_cond"),
    ("switch", "n_switch"),
    ("fori_loop", "n_fori"),
    ("while_loop", "n_while"),
    ("scan", "n_scan"),
    ("remat", "n_remat"),
    ("jit", "n_jit"),
    ("grad", "n_grad"),
    ("vmap", "n_vmap"),
]
