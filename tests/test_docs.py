"""Every Python example in the README and under docs/ runs, and claims of it hold."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx
from jax.sharding import PartitionSpec as P

import sortal as nnx

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python *\n(.*?)^``` *$", re.MULTILINE | re.DOTALL)
# An example that cannot run here (another library, another machine) says why in a line
# of its own above the fence.
EXCUSE = re.compile(r"<!-- not run: \S.* -->\s*\Z")


def examples(text: str) -> list[tuple[int, str]]:
    """The line number and the code of each fenced Python block that is to run."""
    return [
        (text.count("\n", 0, fence.start(1)), fence.group(1))
        for fence in FENCE.finditer(text)
        if not EXCUSE.search(text, 0, fence.start())
    ]


def run(text: str, name: str) -> list[str]:
    """Runs the blocks of one document, in one namespace; the failures as text.

    A block with prompts is a doctest; one without is executed as it stands.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    parser = doctest.DocTestParser()
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    failures: list[str] = []
    for line, code in examples(text):
        if ">>>" in code:
            test = parser.get_doctest(code, names, name, name, line)
            runner.run(test, out=failures.append, clear_globs=False)
            names.update(test.globs)
        else:
            padded = "\n" * line + code
            try:
                exec(compile(padded, name, "exec"), names)  # noqa: S102 - our own text
            except Exception as error:  # noqa: BLE001 - any failure is reported
                failures.append(f"{name}:{line + 1}: {type(error).__name__}: {error}")
    return failures


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_example_in_a_document_runs(document: Path) -> None:
    failures = run(document.read_text(), document.name)
    assert not failures, "\n".join(failures)


def test_the_readme_has_examples() -> None:
    assert examples((ROOT / "README.md").read_text())


def test_blocks_of_a_document_share_their_names() -> None:
    text = "```python\nx = 1\n```\n\n```python\n>>> x + 1\n2\n>>> y = 3\n```\n"
    assert run(text + "```python\nassert y == 3\n```\n", "d") == []


def test_a_wrong_result_is_caught_with_its_line() -> None:
    (failure,) = run("one\n\n```python\n>>> 1 + 1\n3\n```\n", "d")
    assert 'File "d", line 4' in failure
    assert "Expected:\n    3\nGot:\n    2" in failure


def test_a_failing_block_without_prompts_is_caught() -> None:
    (failure,) = run("```python\nassert 1 == 2, 'no'\n```\n", "d")
    assert failure == "d:2: AssertionError: no"


def test_only_a_block_with_a_stated_reason_is_left_out() -> None:
    block = "```python\n1 / 0\n```\n"
    assert run("<!-- not run: needs two machines -->\n" + block, "d") == []
    assert len(run("<!-- not run: -->\n" + block, "d")) == 1
    assert len(run("<!-- not run: a reason -->\nThen:\n" + block, "d")) == 1


def test_blocks_in_other_languages_are_not_run() -> None:
    assert examples("```\n1 / 0\n```\n```sh\nfalse\n```\n```pycon\n1 / 0\n```\n") == []


# ------------------------------------------------------------ what the tutorial claims
X = jnp.ones((4, 2))
MESH = jax.make_mesh((1,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,))


def _loss(model: Any) -> Any:
    return (model(X) ** 2).sum()


VERBS = {
    "state": lambda m: nnx.state(m, nnx.Param),
    "split": nnx.split,
    "merge": lambda m: nnx.merge(*nnx.split(m)),
    "update": lambda m: nnx.update(m, nnx.state(m)),
    "pop": lambda m: nnx.pop(m, nnx.Intermediate),
    "clone": nnx.clone,
    "variables": nnx.variables,
    "explain": lambda m: nnx.explain(m, nnx.Param, ...),
    "tabulate": nnx.tabulate,
}
TRANSFORMS = {
    "jit": lambda m: nnx.jit(_loss)(m),
    "grad": lambda m: nnx.grad(_loss)(m),
    "value_and_grad": lambda m: nnx.value_and_grad(_loss)(m),
    "vjp": lambda m: nnx.vjp(_loss, m),
    "jvp": lambda m: nnx.jvp(_loss, (m,), (nnx.state(m, nnx.Param),)),
    "linearize": lambda m: nnx.linearize(_loss, m),
    "vmap": lambda m: nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, X),
    "shard_map": lambda m: nnx.shard_map(
        lambda m, x: m(x), mesh=MESH, in_specs=(P(), P()), out_specs=P()
    )(m, X),
    "remat": lambda m: nnx.remat(_loss)(m),
    "scan": lambda m: nnx.scan(
        lambda m, x: m(x), in_axes=(nnx.StateAxes({...: None}), 0), out_axes=0
    )(m, X),
    "cond": lambda m: nnx.cond(True, _loss, lambda m: 0.0, m),
    "switch": lambda m: nnx.switch(0, [_loss, _loss], m),
    "fori_loop": lambda m: nnx.fori_loop(0, 2, lambda i, m: m, m),
    "while_loop": lambda m: nnx.while_loop(lambda m: False, lambda m: m, m),
    "eval_shape": lambda m: nnx.eval_shape(_loss, m),
}


@pytest.mark.parametrize("name", [*VERBS, *TRANSFORMS])
def test_the_verbs_and_transforms_of_the_tutorial_take_flax_objects(
    name: str,
) -> None:
    def leaves(out: Any) -> list[Any]:
        return [x for x in jax.tree.leaves(out) if hasattr(x, "shape")]

    theirs: Any = flax_nnx.Linear(2, 1, rngs=flax_nnx.Rngs(0))
    before = theirs.kernel.get_value()
    ours = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    nnx.update(ours, {"kernel": before, "bias": theirs.bias.get_value()})
    call = {**VERBS, **TRANSFORMS}[name]
    found, wanted = leaves(call(theirs)), leaves(call(ours))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, wanted)
    for a, b in zip(found, wanted, strict=True):
        if not isinstance(a, jax.ShapeDtypeStruct):
            assert jnp.allclose(a, b)
    assert (theirs.kernel.get_value() == before).all()


def test_batch_stats_of_layers_are_written_in_training_and_read_in_evaluation() -> None:
    layers: list[Any] = [
        nnx.BatchNorm(2, rngs=nnx.Rngs(0)),
        nnx.SpectralNorm(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)),
    ]
    x = jnp.arange(8.0).reshape(4, 2)
    for layer in layers:
        before = jax.tree.leaves(nnx.state(layer, nnx.BatchStat))
        layer.eval()
        layer(x)
        now = jax.tree.leaves(nnx.state(layer, nnx.BatchStat))
        assert all((a == b).all() for a, b in zip(before, now, strict=True))
        layer.train()
        layer(x)
        now = jax.tree.leaves(nnx.state(layer, nnx.BatchStat))
        assert not all((a == b).all() for a, b in zip(before, now, strict=True))
