"""The scripts of a page, run by Node outside of a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest

from sortal.inspect.html.page import data_of, page
from sortal.inspect.html.source import source_of

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed here")

# It answers each line: data of a page with nothing, a filter with the numbers of the
# leaves that it takes, or with why it cannot be read.
_DRIVER = """
let leaves = [], read = null;
require("readline").createInterface({ input: process.stdin }).on("line", (line) => {
  const asked = JSON.parse(line);
  let answer = null;
  if (asked.data) {
    leaves = sortal.leaves(asked.data);
    read = sortal.filters(asked.data);
    answer = leaves.map((x) => [sortal.show(x.path), sortal.at(x.path)]);
  } else {
    const { test, error } = read(asked.text);
    answer = error ?? leaves.filter(test).map((x) => x.number);
  }
  process.stdout.write(JSON.stringify(answer) + "\\n");
});
"""


def embedded(html: str, name: str) -> str:
    """What a page has in the script element of a name."""
    found = re.search(rf'<script id="{name}"[^>]*>(.*?)</script>', html, re.DOTALL)
    assert found, name
    return found.group(1)


class Page:
    """Leaves and filters of pages, as a page's own script reads them."""

    def __init__(self) -> None:
        assert NODE is not None
        html = page(data_of(source_of({}, "latest", SHARDING), None, False, None))
        self._process = subprocess.Popen(
            [NODE, "-e", embedded(html, "filters") + _DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def open(self, thing: Any, values: bool = False) -> list[list[Any]]:
        """Reads the page of a model: for each leaf its path as text, and its glob."""
        data = data_of(source_of(thing, "latest", SHARDING), None, values, None)
        return self._ask({"data": data})

    def takes(self, text: str) -> list[int] | str:
        """The numbers of the leaves that a filter takes, or why it cannot be read."""
        return self._ask({"text": text})

    def close(self) -> None:
        """Ends Node."""
        self._process.communicate(timeout=10)


SHARDING = {"mesh": None, "policy": None, "rules": ()}
