"""The pages of the reference: a page a subject, and a section for each public name.

The names are read from the contents tables and from source text, so that neither JAX
nor Sortal is imported.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parents[2] / "src"
FIRST = "---\nsearch:\n  boost: 4\n---\n\n"
"""Who searches for a name wants to see its own section first."""


class Subject(NamedTuple):
    """A page: the files of which it has the public names, and modules of more names."""

    slug: str
    title: str
    what: str
    files: tuple[str, ...]
    modules: tuple[str, ...] = ()


SUBJECTS = (
    Subject(
        "kinds",
        "Variables and kinds",
        "The box around an array, and the classes that say what the array is.",
        ("sortal._engine.variable", "sortal._engine.annotations"),
    ),
    Subject(
        "verbs",
        "State, split, merge, update",
        "What takes a model apart by kind and puts it together again.",
        (
            "sortal.functional",
            "sortal._engine.state",
            "sortal._engine.graphdef",
            "sortal._engine.nodes",
        ),
    ),
    Subject(
        "filters",
        "Filters",
        "Which leaves: by kind, path, shape, dtype or tag.",
        ("sortal.filters",),
    ),
    Subject(
        "modules",
        "Modules and random streams",
        "The base classes of models, and where their random keys come from.",
        ("sortal.module", "sortal.random"),
    ),
    Subject(
        "transforms",
        "Transforms",
        "JAX's transforms over live models.",
        ("sortal.transforms",),
    ),
    Subject(
        "policies",
        "Policies",
        "One table of what happens to each kind in every pipeline.",
        ("sortal.policy",),
    ),
    Subject(
        "training",
        "Optimizers, averages, metrics",
        "What a training loop holds besides the model.",
        ("sortal.training",),
        ("sortal.training.metrics",),
    ),
    Subject(
        "layers",
        "Layers",
        "The layers of Flax NNX, under their names and with their arguments.",
        ("sortal.nn",),
    ),
    Subject(
        "functions",
        "Activations and initializers",
        "Most are JAX's own functions, found here under the same names.",
        ("sortal.nn.activations", "sortal.nn.initializers"),
        ("sortal.nn.initializers",),
    ),
    Subject(
        "decoding",
        "Generation",
        "Choosing tokens, and generation as a loop of steps or as one program.",
        ("sortal.decoding",),
        ("sortal.decoding",),
    ),
    Subject(
        "sharding",
        "Sharding",
        "Models on a mesh of devices, by kind.",
        ("sortal.sharding",),
        ("sortal.sharding.presets",),
    ),
    Subject(
        "checkpoints",
        "Checkpoints",
        "Saving and restoring by kind.",
        ("sortal.checkpoint",),
    ),
    Subject(
        "inspect",
        "Looking at models",
        "A model as tables and text, before anything runs.",
        ("sortal.inspect",),
    ),
    Subject(
        "interop",
        "Files and modules of others",
        "safetensors, GGUF, Orbax, folders of Hugging Face, and Flax Linen.",
        ("sortal.interop",),
        (
            "sortal.interop.files.exchange",
            "sortal.interop.files.pretrained",
            "sortal.interop.linen",
        ),
    ),
    Subject(
        "errors",
        "Errors",
        "What Sortal raises; each is also the built-in exception that fits.",
        ("sortal.errors",),
        ("sortal.errors",),
    ),
    Subject(
        "nnx",
        "Names for NNX code",
        "What `from sortal import nnx` has besides the names of `sortal`.",
        ("sortal.nnx",),
    ),
)


class Name(NamedTuple):
    """A public name, the file that defines it, and what it is there."""

    public: str
    file: str
    attribute: str


def pages() -> dict[str, str]:
    """The Markdown of each page by its file name, the overview first."""
    subjects = _sorted_by_subject()
    rest = {f"{s.slug}.md": _page(s, names) for s, names in subjects.items()}
    return {"index.md": _overview(subjects)} | rest


def names() -> list[Name]:
    """Every public name: of the contents tables, and of the modules on the pages."""
    found = [*_of_table("sortal", "_late"), *_of_table("sortal.nnx", "_nnx_names")]
    known = {(n.file, n.attribute) for n in found}
    for subject in SUBJECTS:
        for module in subject.modules:
            more = [n for n in _of_module(module) if (n.file, n.attribute) not in known]
            found += more
            known |= {(n.file, n.attribute) for n in more}
    return found


def _of_table(package: str, table: str) -> Iterator[Name]:
    """The names of a contents table that are no modules."""
    path = SOURCE / "sortal" / f"{table}.py"
    if table == "_late":
        spec = importlib.util.spec_from_file_location(table, path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        rows = module.TABLE
    else:
        rows = _literal_table(path)
    for name, target in rows.items():
        file, _, attribute = target.rpartition(".")
        if not _path(target).exists():
            yield Name(f"{package}.{name}", file, attribute)


def _literal_table(path: Path) -> dict[str, str]:
    """The table of a file whose imports need JAX: the dict in `contents({...})`."""
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "contents":
            files = ast.literal_eval(node.args[0])
            return {n: f"{f}.{n}" for f, names in files.items() for n in names.split()}
    raise ValueError(f"{path} has no table `contents({{...}})`.")


def _of_module(module: str) -> Iterator[Name]:
    """The public names of a module: what it exports by `as`, or else defines."""
    tree = _parsed(_path(module))
    exported = [
        (alias.asname, node.module)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if alias.asname == alias.name
    ]
    for name, file in exported:
        yield Name(f"{module}.{name}", file, name)
    for node in tree.body:
        defines = isinstance(node, (ast.ClassDef, ast.FunctionDef))
        if defines and not node.name.startswith("_") and ast.get_docstring(node):
            yield Name(f"{module}.{node.name}", module, node.name)


def _path(module: str) -> Path:
    """The file of a dotted name; one that does not exist if it is no module."""
    folder = SOURCE / Path(*module.split("."))
    package = folder / "__init__.py"
    return package if package.exists() else folder.with_suffix(".py")


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _subject(name: Name) -> Subject:
    """The page of a name: that of the nearest file or folder above it."""
    if name.public.startswith("sortal.nnx."):
        return SUBJECTS[-1]
    file = name.public.rpartition(".")[0] if name.file.startswith("jax") else name.file
    fits = [
        (len(prefix), subject)
        for subject in SUBJECTS
        for prefix in subject.files
        if f"{file}.".startswith(f"{prefix}.")
    ]
    if not fits:
        raise ValueError(
            f"{name.public} is of {name.file}, which no subject in {__file__} has."
        )
    return max(fits, key=lambda fit: fit[0])[1]


def _sorted_by_subject() -> dict[Subject, list[Name]]:
    found: dict[Subject, list[Name]] = {subject: [] for subject in SUBJECTS}
    for name in names():
        found[_subject(name)].append(name)
    return found


def _is_jax(name: Name) -> str:
    """The full name in JAX of what a file only passes on; empty where it is ours."""
    if name.file.startswith("jax"):
        return f"{name.file}.{name.attribute}"
    for node in _parsed(_path(name.file)).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax"):
            for alias in node.names:
                if name.attribute in (alias.asname, alias.name):
                    return f"{node.module}.{alias.name}"
    return ""


def _page(subject: Subject, names: Iterable[Name]) -> str:
    ours = [n for n in names if not _is_jax(n)]
    theirs = [(n, _is_jax(n)) for n in names if _is_jax(n)]
    parts = [f"{FIRST}# {subject.title}\n\n{subject.what}\n"]
    if theirs:
        rows = "\n".join(f"| `{n.public}` | `{jax}` |" for n, jax in theirs)
        parts.append(f"| name | what it is |\n|---|---|\n{rows}\n")
    parts += [f"::: {n.public}\n" for n in ours]
    return "\n".join(parts)


def _overview(subjects: dict[Subject, list[Name]]) -> str:
    parts = [
        "# Reference\n",
        "Every public name, from the docstrings, with an example that the tests run.",
        "`import sortal` has the names below; `from sortal import nnx` has those",
        "[for NNX code](nnx.md) too.\n",
    ]
    for subject, found in subjects.items():
        listed = ", ".join(
            f"`{_short(n)}`" if _is_jax(n) else f"[`{_short(n)}`][{n.public}]"
            for n in sorted(found, key=lambda n: n.public.rpartition(".")[2].lower())
        )
        parts.append(
            f"## [{subject.title}]({subject.slug}.md)\n\n{subject.what}\n\n{listed}\n"
        )
    return "\n".join(parts)


def _short(name: Name) -> str:
    return name.public.rpartition(".")[2]
