"""The laws of the source tree: who may import whom, how long things may grow.

Each law is a function from a folder to a list of offences. It is run on the real tree,
where it must find nothing, and on small trees written by the tests, where it must find
what was planted there.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

import pytest

import sortal

PACKAGE = Path(__file__).parents[1] / "src" / "sortal"

# A file imports only files of earlier rows. `x.*` is every file of the package x, which
# may import one another as long as no circle arises; a package's own contents table
# (its `__init__`) has the package's name.
ORDER = (
    "sortal.errors",
    "sortal._late",
    "sortal._nnx_names",
    "sortal._engine.host",
    "sortal._engine.promotion",
    "sortal._engine.jax_compat",
    "sortal._engine.bounded",
    "sortal._engine.tables",
    "sortal._engine.paths",
    "sortal._engine.stale",
    "sortal._engine.printing",
    "sortal._engine.statics",
    "sortal._engine.handlers",
    "sortal._engine.foreign",
    "sortal.sharding.mesh_axes",
    "sortal.sharding",
    "sortal._engine.annotations",
    "sortal._engine.operators",
    "sortal._engine.variable",
    "sortal._engine.kind_names",
    "sortal._engine.marks",
    "sortal._engine.nodes",
    "sortal.filters",
    "sortal._engine.schema",
    "sortal._engine.difference",
    "sortal._engine.graphdef",
    "sortal._engine.leaves",
    "sortal._engine.walk",
    "sortal._engine.plan",
    "sortal._engine.nested",
    "sortal._engine.state",
    "sortal._engine",
    "sortal.functional",
    "sortal.module",
    "sortal.random",
    "sortal.policy.rule",
    "sortal.policy.table",
    "sortal.policy.policy",
    "sortal.policy",
    "sortal.sharding.resolution",
    "sortal.transforms._adapter.effects",
    "sortal.transforms._adapter.decorator",
    "sortal.transforms._adapter.tracing",
    "sortal.transforms._adapter.functions",
    "sortal.transforms._adapter.lanes",
    "sortal.transforms._adapter.binding",
    "sortal.transforms._adapter.prefixes",
    "sortal.transforms.axis_names",
    "sortal.transforms.shardings",
    "sortal.transforms.donate",
    "sortal.transforms.retrace",
    "sortal.transforms.axes",
    "sortal.transforms.ahead",
    "sortal.transforms.refusals",
    "sortal.transforms.compile",
    "sortal.transforms.export",
    "sortal.transforms.eager",
    "sortal.transforms.remat",
    "sortal.transforms.autodiff",
    "sortal.transforms.derivatives",
    "sortal.transforms.custom",
    "sortal.transforms.sizes",
    "sortal.transforms.dividing",
    "sortal.transforms.mapping",
    "sortal.transforms._adapter.operands",
    "sortal.transforms._adapter",
    "sortal.transforms.scan",
    "sortal.transforms.control",
    "sortal.transforms",
    "sortal.sharding.placing",
    "sortal.sharding.presets",
    "sortal.sharding.report",
    "sortal.sharding.specs",
    "sortal.sharding.transfer",
    "sortal.distributed.meeting",
    "sortal.distributed.failures",
    "sortal.distributed.starting",
    "sortal.distributed.batches",
    "sortal.distributed.same",
    "sortal.distributed.launch",
    "sortal.distributed",
    "sortal.training.fitting",
    "sortal.training.groups",
    "sortal.training.optimizer",
    "sortal.training.ema",
    "sortal.training.metrics",
    "sortal.training.train_state",
    "sortal.training",
    "sortal.checkpoint.values",
    "sortal.checkpoint.manifest",
    "sortal.checkpoint.forks",
    "sortal.checkpoint.disk",
    "sortal.checkpoint.bucket",
    "sortal.checkpoint.files",
    "sortal.checkpoint.store",
    "sortal.checkpoint.processes",
    "sortal.checkpoint.pending",
    "sortal.checkpoint.taking",
    "sortal.checkpoint.layout",
    "sortal.checkpoint.saving",
    "sortal.checkpoint.fitting",
    "sortal.checkpoint.loading",
    "sortal.checkpoint.restoring",
    "sortal.checkpoint.planning",
    "sortal.checkpoint.manager",
    "sortal.checkpoint.verifying",
    "sortal.checkpoint.copying",
    "sortal.checkpoint",
    "sortal.inspect.naming",
    "sortal.inspect.rows",
    "sortal.inspect.text",
    "sortal.inspect.scopes",
    "sortal.inspect.equations",
    "sortal.inspect.remedies",
    "sortal.inspect.nans",
    "sortal.inspect.display",
    "sortal.inspect.cli",
    "sortal.inspect",
    "sortal.nn.*",
    "sortal.nn",
    "sortal.decoding.sampling",
    "sortal.decoding.generation",
    "sortal.decoding",
    "sortal.interop.flax",
    "sortal.interop.files.*",
    "sortal.interop.files",
    "sortal.interop.linen.*",
    "sortal.interop.linen",
    "sortal.interop",
    "sortal.inspect.stored",
    "sortal.inspect.html.*",
    "sortal.inspect.html",
    "sortal",
    "sortal.__main__",
    "sortal.demo.*",
    "sortal.demo",
    "sortal.learn.lesson",
    "sortal.learn.answer",
    "sortal.learn.problems.*",
    "sortal.learn.problems",
    "sortal.learn.judging",
    "sortal.learn.process",
    "sortal.learn.progress",
    "sortal.learn.cli",
    "sortal.learn",
    "sortal.nnx.*",
    "sortal.nnx.nn.*",
    "sortal.nnx.nn",
    "sortal.nnx.training.*",
    "sortal.nnx.training",
    "sortal.nnx",
)
# Rows whose files the design names and nobody has written yet. Who writes one strikes
# it out here.
UNWRITTEN: set[str] = set()
# A command is an entry point: what it runs is above it only for as long as it runs.
MAY_IMPORT_ANYTHING_LATE = {"sortal.inspect.cli"}
# The contents table says to type checkers what is read when first asked for.
FOR_TYPE_CHECKERS = {("sortal", "sortal.nnx")}
MAY_USE_PRIVATE_JAX = {"sortal._engine.jax_compat"}
# `import sortal` costs what `import jax` costs: each of these takes from a tenth of a
# second to a second, and is imported by the function that needs it.
HEAVY = frozenset(
    "equinox flax gguf grain hypothesis jinja2 matplotlib optax orbax pytest rich "
    "safetensors scipy sklearn tensorstore tokenizers".split()
)
FILE_LINES = 600
FUNCTION_LINES = 60


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, for every file of the package."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = (package.name, *file.relative_to(package).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = file
    return found


def row_of(name: str, order: tuple[str, ...]) -> int | None:
    """Which row of the order a module is in; a row with its own name comes first."""
    if name in order:
        return order.index(name)
    rows = (i for i, row in enumerate(order) if row == name.rpartition(".")[0] + ".*")
    return next(rows, None)


def imports(name: str, file: Path) -> Iterator[tuple[list[str], int, bool]]:
    """Each import: its possible dotted targets, longest first, its line, if it is late.

    `from a import b` may mean the module `a.b` or a name in the module `a`.
    """
    tree = ast.parse(file.read_text())
    late = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(outer)
    }
    parts = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield [alias.name], node.lineno, id(node) in late
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                targets = [f"{source}.{alias.name}", source]
                yield targets, node.lineno, id(node) in late
        elif isinstance(node, ast.Call) and _imports_by_name(node):
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield [target.value], node.lineno, id(node) in late


def _imports_by_name(call: ast.Call) -> bool:
    called = ast.unparse(call.func).rpartition(".")[2]
    return called in {"import_module", "__import__"} and bool(call.args)


def edges(package: Path) -> Iterator[tuple[str, str, int, bool]]:
    """Each import between files of the package: from, to, line, whether it is late."""
    known = modules(package)
    for name, file in known.items():
        for targets, line, late in imports(name, file):
            target = next((t for t in targets if t in known), None)
            if target is not None and target != name:
                yield name, target, line, late


def upward_imports(package: Path, order: tuple[str, ...] = ORDER) -> list[str]:
    """Law: a file imports only files above it."""
    offences = []
    inside: dict[str, set[str]] = {}
    for name, target, line, late in edges(package):
        if late and name in MAY_IMPORT_ANYTHING_LATE:
            continue
        if (name, target) in FOR_TYPE_CHECKERS:
            continue
        mine, other = row_of(name, order), row_of(target, order)
        if mine is None or other is None:
            continue
        if mine == other:
            inside.setdefault(name, set()).add(target)
        elif other > mine:
            offences.append(f"{name}:{line} imports {target}, which is below it")
    try:
        graphlib.TopologicalSorter(inside).prepare()
    except graphlib.CycleError as error:
        offences.append("a circle of imports: " + " -> ".join(error.args[1]))
    return offences


def files_without_a_row(package: Path, order: tuple[str, ...] = ORDER) -> list[str]:
    """Law: every file has its place in the order."""
    return [n for n in modules(package) if row_of(n, order) is None]


def stale_rows(
    package: Path,
    order: tuple[str, ...] = ORDER,
    unwritten: AbstractSet[str] = frozenset(UNWRITTEN),
) -> list[str]:
    """Law: a row has files, or is among the unwritten, and never both."""
    used = {row_of(name, order) for name in modules(package)}
    return [r for i, r in enumerate(order) if (i in used) == (r in unwritten)]


def folders_without_contents(package: Path) -> list[str]:
    """Law: every folder of the package has a contents table."""
    folders = {file.parent for file in package.rglob("*.py")}
    return [str(f) for f in sorted(folders) if not (f / "__init__.py").exists()]


def private_jax(package: Path) -> list[str]:
    """Law: one file knows JAX's private names."""
    return [
        f"{name}:{line} mentions jax._src"
        for name, file in modules(package).items()
        if name not in MAY_USE_PRIVATE_JAX
        for line, text in enumerate(file.read_text().splitlines(), 1)
        if "jax._src" in text
    ]


def nnx_outside_its_room(package: Path) -> list[str]:
    """Law: no file outside of `nnx/` imports it or takes a keyword of its two modes."""
    room = f"{package.name}.nnx"

    def in_room(name: str) -> bool:
        return name == room or name.startswith(f"{room}.")

    offences = [
        f"{name}:{line} imports {target}"
        for name, target, line, _ in edges(package)
        if in_room(target) and not in_room(name)
        if (name, target) not in FOR_TYPE_CHECKERS
    ]
    offences += [
        f"{name}:{node.lineno} takes {node.arg}="
        for name, file in modules(package).items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.arg) and node.arg in {"graph", "graph_updates"}
        if not in_room(name)
    ]
    return offences


def hidden_modules(package: Path) -> list[str]:
    """Law: no name in a contents table hides a file of the folder."""
    known = modules(package)
    return [
        f"{name}:{node.lineno} {alias.asname or alias.name} hides the file"
        for name, file in known.items()
        if file.name == "__init__.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if f"{name}.{alias.asname or alias.name}" in known
        if (node.module, alias.name) != (name, alias.asname or alias.name)
    ]


def long_files(package: Path) -> list[str]:
    """Law: a file is read in one sitting."""
    lengths = {
        name: len(file.read_text().splitlines())
        for name, file in modules(package).items()
    }
    return [f"{n} has {k} lines" for n, k in lengths.items() if k > FILE_LINES]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, from `def` to its end, without its docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def long_functions(package: Path) -> list[str]:
    """Law: a function fits on a screen."""
    return [
        f"{name}:{node.lineno} {node.name} has {length(node)} lines"
        for name, file in modules(package).items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and length(node) > FUNCTION_LINES
    ]


LAWS: tuple[Callable[[Path], list[str]], ...] = (
    upward_imports,
    files_without_a_row,
    stale_rows,
    folders_without_contents,
    private_jax,
    nnx_outside_its_room,
    hidden_modules,
    long_files,
    long_functions,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_source_tree_obeys_every_law(law: Callable[[Path], list[str]]) -> None:
    offences = law(PACKAGE)
    assert not offences, f"{law.__doc__}\n  " + "\n  ".join(offences)


def test_every_file_is_found_under_its_name_whatever_was_asked_for_before() -> None:
    """No name that a package gives out later hides a file of its folder."""
    for package in (sortal, sortal.nnx):
        for name in dir(package):
            getattr(package, name)
    for name in modules(PACKAGE):
        module = importlib.import_module(name)
        found = functools.reduce(getattr, name.split(".")[1:], sortal)
        assert found is module, name


def newly_imported(statement: str) -> set[str]:
    """Top-level packages that a statement loads and JAX alone does not."""
    program = (
        "import sys, jax, jax.numpy; before = set(sys.modules)\n"
        f"{statement}\n"
        "print(*{m.partition('.')[0] for m in set(sys.modules) - before})"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_sortal_loads_no_heavy_package_and_warns_of_nothing() -> None:
    loaded = newly_imported("import sortal")
    assert "sortal" in loaded
    assert not loaded & HEAVY


def test_no_name_of_sortal_loads_a_heavy_package() -> None:
    code = "import sortal; [getattr(sortal, name) for name in dir(sortal)]"
    assert not newly_imported(code) & HEAVY
    # JAX's own kernels, which `jax.extend.core` loads, take as long as all of Sortal.
    program = f"import sys; {code}; assert 'jax._src.pallas.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_heavy_package_would_be_seen() -> None:
    assert "rich" in newly_imported("import rich") & HEAVY


# Trees with something planted in them. ------------------------------------------------

SMALL_ORDER = ("p.low", "p.mid.*", "p.mid", "p.high", "p")


@pytest.fixture
def plant(tmp_path: Path) -> Callable[[Mapping[str, str]], Path]:
    """Writes a package `p` in good order, plus the given files."""

    def write(files: Mapping[str, str]) -> Path:
        lawful = {
            "__init__.py": "from p.high import h",
            "low.py": "import os",
            "mid/__init__.py": "from p.mid.a import f",
            "mid/a.py": "from p import low",
            "mid/b.py": "from p.mid.a import f",
            "high.py": "import p.mid.b",
        }
        for name, text in {**lawful, **files}.items():
            file = tmp_path / "p" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        return tmp_path / "p"

    return write


Plant = Callable[[Mapping[str, str]], Path]


def test_a_tree_in_good_order_has_no_offence(plant: Plant) -> None:
    tree = plant({})
    assert upward_imports(tree, SMALL_ORDER) == []
    assert files_without_a_row(tree, SMALL_ORDER) == []
    assert stale_rows(tree, SMALL_ORDER, set()) == []
    assert folders_without_contents(tree) == []
    assert private_jax(tree) == []
    assert long_files(tree) == []
    assert long_functions(tree) == []


@pytest.mark.parametrize(
    "text",
    [
        "import p.high",
        "from p.high import h",
        "from p import high",
        "from . import high",
        "from .high import h",
        "from .mid.a import f",
        "import p",
        "def f():\n    from p.high import h",
        "if TYPE_CHECKING:\n    from p.high import h",
        "try:\n    import p.high\nexcept ImportError:\n    pass",
        "import importlib\nhigh = importlib.import_module('p.high')",
    ],
)
def test_an_upward_import_is_caught_in_every_spelling(plant: Plant, text: str) -> None:
    (offence,) = upward_imports(plant({"low.py": text}), SMALL_ORDER)
    assert offence.startswith("p.low:")
    assert offence.endswith("which is below it")


def test_a_circle_inside_one_row_is_caught(plant: Plant) -> None:
    tree = plant({"mid/a.py": "from . import b"})
    (offence,) = upward_imports(tree, SMALL_ORDER)
    assert "p.mid.a -> p.mid.b" in offence or "p.mid.b -> p.mid.a" in offence


def test_only_a_late_import_of_a_command_is_free(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.MAY_IMPORT_ANYTHING_LATE", {"p.low"})
    late = plant({"low.py": "def main():\n    import p.high"})
    assert upward_imports(late, SMALL_ORDER) == []
    early = plant({"low.py": "import p.high"})
    assert len(upward_imports(early, SMALL_ORDER)) == 1


def test_files_rows_and_folders_out_of_place_are_caught(plant: Plant) -> None:
    tree = plant({"stray.py": "", "bare/c.py": ""})
    assert files_without_a_row(tree, SMALL_ORDER) == ["p.bare.c", "p.stray"]
    more = (*SMALL_ORDER, "p.gone", "p.planned", "p.stray")
    planned = {"p.planned", "p.stray"}
    assert stale_rows(tree, more, planned) == ["p.gone", "p.stray"]
    assert folders_without_contents(tree) == [str(tree / "bare")]


def test_private_jax_is_caught_even_in_a_string(plant: Plant) -> None:
    tree = plant({"low.py": "x = 1\nname = 'jax._src.core'"})
    assert private_jax(tree) == ["p.low:2 mentions jax._src"]


def test_nnx_is_caught_outside_of_its_room(plant: Plant) -> None:
    tree = plant(
        {
            "nnx/__init__.py": "from p.nnx.face import f",
            "nnx/face.py": "def f(x, *, graph=None): ...",
            "low.py": "def g(x, *, graph_updates=None):\n    from p import nnx",
            "high.py": "from p.nnx.face import f as h",
        }
    )
    assert nnx_outside_its_room(tree) == [
        "p.high:1 imports p.nnx.face",
        "p.low:2 imports p.nnx",
        "p.low:1 takes graph_updates=",
    ]


def test_a_file_hidden_by_a_name_of_its_folder_is_caught(plant: Plant) -> None:
    tree = plant({"mid/__init__.py": "from p.mid import b as b\nfrom p.mid.b import a"})
    assert hidden_modules(tree) == ["p.mid:2 a hides the file"]


def test_a_file_is_too_long_one_line_beyond_the_limit(plant: Plant) -> None:
    tree = plant({"low.py": "x = 1\n" * (FILE_LINES - 1) + "x = 1"})
    assert long_files(tree) == []
    tree = plant({"low.py": "x = 1\n" * FILE_LINES + "x = 1"})
    assert long_files(tree) == [f"p.low has {FILE_LINES + 1} lines"]


def test_a_function_is_too_long_one_line_beyond_the_limit_less_its_docstring(
    plant: Plant,
) -> None:
    head = 'class C:\n    def f(self):\n        """One.\n\n        Two.\n        """\n'
    fits = head + "        x = 1\n" * (FUNCTION_LINES - 1)
    assert long_functions(plant({"low.py": fits})) == []
    beyond = plant({"low.py": fits + "        x = 1"})
    assert long_functions(beyond) == [f"p.low:2 f has {FUNCTION_LINES + 1} lines"]
