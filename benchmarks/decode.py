"""Decoding: time per token, memory, and ten thousand tokens in one process.

Run it as ``python -m benchmarks.decode [--quick]``. All contenders have the sizes of
SmolLM2-135M with random parameters; that they give the same tokens is checked first.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.decoders import NAMES, Contender, Params
from benchmarks.memory import MB, reset_peak, resident
from benchmarks.report import Row, Table
from benchmarks.sections import progress
from sortal.demo.llama import Config

SMALL = Config(vocabulary=512, features=48, hidden=64, layers=2, heads=3,
               key_value_heads=1)  # fmt: skip
SEQUENCES = 8


def parameters(config: Config) -> Params:
    """Random parameters under the paths of the Sortal model, the same each time."""
    rng = np.random.default_rng(0)
    narrow = config.features * config.key_value_heads // config.heads

    def kernel(inputs: int, outputs: int) -> np.ndarray:
        drawn = rng.standard_normal((inputs, outputs), np.float32)
        return drawn / np.sqrt(inputs, dtype=np.float32)

    features, hidden = config.features, config.hidden
    shapes = {
        ("attention", "query", "kernel"): (features, features),
        ("attention", "key", "kernel"): (features, narrow),
        ("attention", "value", "kernel"): (features, narrow),
        ("attention", "out", "kernel"): (features, features),
        ("feed", "gate", "kernel"): (features, hidden),
        ("feed", "up", "kernel"): (features, hidden),
        ("feed", "down", "kernel"): (hidden, features),
    }
    one = np.ones(features, np.float32)
    found: Params = {("embed", "embedding"): kernel(config.vocabulary, features)}
    found["norm", "scale"] = one
    for i in range(config.layers):
        found["blocks", i, "attention_norm", "scale"] = one
        found["blocks", i, "feed_norm", "scale"] = one
        found.update({("blocks", i, *p): kernel(*s) for p, s in shapes.items()})
    return found


def load(
    name: str, config: Config, batch: int, length: int, params: Params | None = None
) -> Contender:
    """One contender, ready to decode."""
    module = importlib.import_module(f"benchmarks.decoders.{name}_decoder")
    return module.prepare(config, params or parameters(config), batch, length)


def agree(contenders: dict[str, Contender], batch: int, steps: int = 8) -> None:
    """Refuses contenders that do not give the same tokens.

    Raises:
      AssertionError: two differ.
    """
    rows = {}
    for name, contender in contenders.items():
        token, row = jnp.arange(batch, dtype=jnp.int32), []
        for _ in range(steps):
            token = contender.step(token)
            row.append(np.asarray(token).tolist())
        contender.reset()
        if contender.loop is not None:
            last = contender.loop(jnp.arange(batch, dtype=jnp.int32), steps)
            assert np.asarray(last).tolist() == row[-1], f"{name}: its loop differs"
            contender.reset()
        rows[name] = row
    first, *others = rows.items()
    for name, row in others:
        assert row == first[1], f"{first[0]} and {name} give different tokens"


def speed(config: Config, length: int, batch: int, rounds: int, steps: int) -> Table:
    """Milliseconds a token, contenders in turns, caches emptied before each turn."""
    params = parameters(config)
    contenders = {name: load(name, config, batch, length, params) for name in NAMES}
    progress("decode: comparing tokens")
    agree(contenders, batch)
    token = jnp.zeros((batch,), jnp.int32)
    samples: dict[str, dict[str, list[float]]] = {"step": {}, "loop": {}}
    names = list(contenders)
    gc.collect()
    for turn in range(rounds + 1):  # the first warms up
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            progress(f"decode: round {turn}, {name}")
            c = contenders[name]
            c.reset()
            kinds = {"step": lambda c=c: _steps(c, token, steps)}
            if c.loop is not None:
                kinds["loop"] = lambda c=c: c.loop(token, steps)
            for kind, call in kinds.items():
                c.reset()
                start = time.perf_counter()
                jax.block_until_ready(call())
                taken = (time.perf_counter() - start) / steps * 1e3
                if turn:
                    samples[kind].setdefault(name, []).append(taken)
    table = Table(
        f"A token for {batch} sequence(s), cache of {length}",
        "ms",
        notes=[f"medians of {rounds} rounds of {steps} tokens, greedy, float32"],
    )
    for kind, row in (("step", "loop of compiled steps"), ("loop", "compiled loop")):
        table.rows.append(_ratio_row(row, samples[kind]))
    return table


def _ratio_row(name: str, samples: dict[str, list[float]]) -> Row:
    values: dict[str, float | None] = {
        k: statistics.median(v) for k, v in samples.items()
    }
    least = {k: min(v) for k, v in samples.items()}
    values["sortal/raw"] = values["sortal"] / values["raw"]
    values["sortal/raw, by minimums"] = least["sortal"] / least["raw"]
    if "flax" in values:
        values["flax/sortal"] = values["flax"] / values["sortal"]
    return Row(name, values, samples)


def _steps(contender: Contender, token: Any, steps: int) -> Any:
    for _ in range(steps):
        token = contender.step(token)
    return token


def flatness(config: Config, length: int, parts: int, rounds: int) -> Table:
    """Milliseconds a token by how many were generated before."""
    contender = load("sortal", config, 1, length)
    steps = length // parts
    found: list[list[float]] = [[] for _ in range(parts)]
    for turn in range(rounds + 1):
        progress(f"decode: flatness, round {turn}")
        contender.reset()
        token = jnp.zeros((1,), jnp.int32)
        for part in range(parts):
            start = time.perf_counter()
            token = jax.block_until_ready(_steps(contender, token, steps))
            if turn:
                found[part].append((time.perf_counter() - start) / steps * 1e3)
    values: dict[str, float | None] = {
        f"{i * steps}-{(i + 1) * steps}": statistics.median(x)
        for i, x in enumerate(found)
    }
    return Table(
        f"A token by the number generated before, cache of {length}", "ms",
        [Row("sortal", values)],
    )  # fmt: skip


def memory(config: Config, length: int) -> Table:
    """Peak memory of decoding, each contender in a process of its own."""
    table = Table(
        f"Memory of decoding, cache of {length}",
        "MB",
        notes=[
            (
                "needed: Params and cache. Peak: resident memory at its highest during "
                "decoding, over what it was after a narrow model of the same depth had "
                "been compiled, run and dropped. Temp, alias: what XLA says of the "
                "compiled step."
            ),
        ],
    )
    for name in NAMES:
        progress(f"decode: memory, {name}")
        found = _child("memory", name, config, length)
        found["peak/needed"] = found["peak"] / found["needed"]
        table.rows.append(Row(name, found))
    return table


def long(config: Config, tokens: int, length: int) -> Table:
    """Many tokens in one process: compiled programs and memory on the way."""
    found = _child("long", "sortal", config, length, str(tokens))
    rows = [Row(f"after {n:,} tokens", values) for n, values in found]
    note = (
        f"{SEQUENCES} sequences at once, of random prompts; caches of {length} slots "
        "are emptied and used again; programs are counted by JAX's compilation events"
    )
    return Table("Many tokens in one process", "MB", rows, [note])


def _child(task: str, name: str, config: Config, length: int, *rest: str) -> Any:
    small = str(int(config is SMALL))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.decode", "--child", task, name, small,
         str(length), *rest],
        stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def _measure_memory(name: str, config: Config, length: int) -> dict[str, float]:
    # What compiling leaves behind in the process does not depend on widths, so that
    # a narrow model of the same depth shows it.
    narrow = dataclasses.replace(config, vocabulary=64, features=4 * config.heads,
                                 hidden=8)  # fmt: skip
    _steps(load(name, narrow, 1, 16), jnp.zeros((1,), jnp.int32), 3)
    params = parameters(config)
    weights = sum(x.nbytes for x in params.values())
    shape = 2 * config.layers * config.key_value_heads * length
    needed = weights + 4 * shape * config.features // config.heads
    del params
    gc.collect()
    token = jnp.zeros((1,), jnp.int32)
    empty = resident("VmRSS")
    contender = load(name, config, 1, length)
    jax.block_until_ready(_steps(contender, token, 3))
    gc.collect()
    reset_peak()
    jax.block_until_ready(_steps(contender, token, 8))
    peak = resident("VmHWM") - empty
    found = {"needed": needed / MB, "peak": peak}
    try:
        analysis = contender.analysis(token)
        found["temp"] = analysis.temp_size_in_bytes / MB
        found["alias"] = analysis.alias_size_in_bytes / MB
    except Exception as e:  # noqa: BLE001 - not every library and version offers it
        progress(f"decode: no memory analysis of {name}: {e}")
    return found


def _measure_long(config: Config, length: int, tokens: int) -> list[Any]:
    import sortal
    from sortal.demo.smollm2 import build

    compiled = [0]

    def count(event: str, *_: Any, **__: Any) -> None:
        compiled[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    model = build(config, parameters(config).items())
    sortal.init_cache(model, SEQUENCES, length)
    rng, made, rows, marks = np.random.default_rng(0), 0, [], 0
    turn = 0
    while made < tokens:
        sizes = rng.integers(1, 17, SEQUENCES)
        prompts = [rng.integers(0, config.vocabulary, n) for n in sizes]
        choice: dict[str, Any] = {"max_new_tokens": length - 17}
        if turn % 2:
            heat = {"temperature": float(rng.uniform(0.5, 1.5)), "top_p": 0.9}
            choice |= {**heat, "rngs": sortal.Rngs(turn)}
        sortal.reset_cache(model)
        made += sum(map(len, sortal.decoding.stream(model, prompts, **choice)))
        turn += 1
        if made >= marks or made >= tokens:
            gc.collect()
            live = sum(x.nbytes for x in jax.live_arrays()) / MB
            values = {"programs": compiled[0], "resident": resident("VmRSS")}
            rows.append((made, {**values, "live arrays": live}))
            marks += tokens // 5
            progress(f"decode: {rows[-1]}")
    return rows


def child(arguments: Sequence[str]) -> None:
    """Measures in this process, a new one, and prints JSON."""
    task, name, small, length, *rest = arguments
    config = SMALL if small == "1" else Config()
    if task == "memory":
        found: Any = _measure_memory(name, config, int(length))
    else:
        found = _measure_long(config, int(length), int(rest[0]))
    print(json.dumps(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints.

    Args:
      arguments: the command line; the process's own if absent.

    Returns:
      The exit status, 0.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--child"]:
        child(arguments[1:])
        return 0
    parser = argparse.ArgumentParser("benchmarks.decode", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--only", default="speed,flat,memory,long", help="by comma")
    parser.add_argument(
        "--length", type=int, default=512, help="slots of a cache (512)"
    )
    parser.add_argument("--tokens", type=int, default=10_000, help="of the long run")
    options = parser.parse_args(arguments)
    wanted, quick = options.only.split(","), options.quick
    config = SMALL if quick else Config()
    length = 32 if quick else options.length
    print(report.facts_text(report.facts()), "", sep="\n")
    if "speed" in wanted:
        rounds, steps = (1, 4) if quick else (5, 16)
        print(speed(config, length, 1, rounds, steps).markdown(), flush=True)
    if "flat" in wanted:
        print(flatness(config, length, 4, 1 if quick else 2).markdown(), flush=True)
    if "memory" in wanted:
        print(memory(config, length).markdown(), flush=True)
    if "long" in wanted:
        tokens = 60 if quick else options.tokens
        print(long(config, tokens, min(length, 128)).markdown(), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
