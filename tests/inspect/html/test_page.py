"""A page is one file that fetches nothing, is small, and does what no name says."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

import sortal
from page_scripts import SHARDING, embedded
from sortal.inspect.html.page import data_of, page
from sortal.inspect.html.source import source_of

EVIL = "</script><script>alert(1)</script>"


def write(model, other=None, values=True, title=None):
    source = source_of(model, "latest", SHARDING)
    against = None if other is None else source_of(other, "latest", SHARDING)
    data = data_of(source, against, values, title)
    return data, page(data)


class Elements(html.parser.HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_names_and_statics_of_a_model_are_data_and_never_markup():
    class Evil(sortal.Module):
        def __init__(self):
            self.note = EVIL
            setattr(self, EVIL, {EVIL: sortal.Param(1.0, tag=EVIL, unit="<img src=x>")})

    Evil.__name__ = EVIL
    data, text = write(Evil(), title=f"{EVIL} & \ud800")
    plain, empty = write({})
    tags = [tag for tag, _ in Elements(text).found]
    assert tags == [tag for tag, _ in Elements(empty).found]
    assert "alert(1)</script>" not in text
    assert json.loads(embedded(text, "data")) == json.loads(json.dumps(data))
    assert not set(embedded(text, "data")) & set("<>&")
    text.encode()  # half a character in the title is written as text
    assert plain["title"] == "dict"


def test_a_page_has_no_address_and_allows_its_own_scripts_alone():
    _, text = write(sortal.Linear(2, 3, rngs=sortal.Rngs(0)))
    without_names = text.replace("http://www.w3.org/2000/svg", "")
    assert "http" not in without_names.replace("http-equiv", "")
    for tag, attributes in Elements(text).found:
        assert tag not in {"link", "img", "iframe", "base"}
        assert not {"src", "href", "onclick", "style"} & attributes.keys()
    (policy,) = [a["content"] for t, a in Elements(text).found if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style
    parts = [style.group(1), embedded(text, "filters"), embedded(text, "script")]
    for part in parts:
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    script = parts[2]
    assert "innerHTML" not in script
    assert "outerHTML" not in script
    assert "insertAdjacentHTML" not in script


def test_the_numbers_of_a_leaf():
    data, _ = write({"a": sortal.Param(jnp.array([0.0, 1.0, jnp.nan, 3.0]))})
    low, high, mean, std, zeros, nans, infinities, count, most, code = data["numbers"][
        0
    ]
    assert (low, high, zeros, nans, infinities, count, most) == (0, 3, 1, 1, 0, 4, 1)
    assert (mean, std) == (pytest.approx(4 / 3, 1e-6), pytest.approx(1.247219, 1e-6))
    assert (len(code), code[:2], code[2:4]) == (64, "//", "AA")


def test_why_there_are_no_numbers():
    data, _ = write({"k": sortal.Rngs(0), "t": sortal.Variable("text")})
    assert data["numbers"][1] == "random keys are no numbers"
    assert data["numbers"][-1] == "no numbers"
    data, _ = write({"a": sortal.Param(1.0)}, values=False)
    assert data["numbers"] == ["values were not asked for"]


def test_numbers_that_javascript_has_not_are_written_as_text():
    big = (1 << 60) + 1
    data, text = write({"n": sortal.Variable(np.array([0, big]))})
    assert data["numbers"][0][1] == str(big)
    data, text = write({"x": sortal.Variable(np.array([1.7e308, -1.7e308]))})
    assert "NaN" not in embedded(text, "data")
    assert "Infinity" not in embedded(text, "data")


def test_ten_thousand_leaves_make_less_than_three_megabytes():
    def block(n):
        x = np.random.default_rng(n).normal(size=(4, 5)).astype(np.float32)
        kernel = {f"expert_{k}": sortal.Param(x + k) for k in range(4)}
        return {"attention": {"kernel": kernel}, "mean": sortal.BatchStat(x.mean(0))}

    data, text = write({"layers": [block(n) for n in range(2000)]})
    assert len(data["numbers"]) == 10_000
    assert len(text.encode()) < 3_000_000


def test_a_path_repeats_nothing_of_the_one_before():
    data, _ = write({"a": {"b": sortal.Param(1.0), "c": sortal.Param(1.0)}, "d": []})
    assert [row[0] for row in data["leaves"]["path"]] == [0, 1]
    assert [data["keys"][n] for n in data["leaves"]["path"][0][1:]] == ["a", "b"]


def test_keys_that_are_no_names_are_told_apart():
    model = {"0": sortal.Param(1.0), 0: sortal.Param(1.0), "a b": sortal.Param(1.0)}
    data, _ = write(model)
    assert data["keys"] == [
        0,
        {"s": "0", "r": "'0'", "t": "str"},
        {"s": "a b", "r": "'a b'", "t": "str"},
    ]
