"""display: text, or treescope in a notebook."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

import sortal as nnx
from sortal.inspect import display as module


def test_objects_are_printed_outside_a_notebook(capsys: Any) -> None:
    nnx.display("a", nnx.Param(1))
    assert capsys.readouterr().out == "a\nParam(1)\n"


def test_treescope_shows_them_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(module, "_in_notebook", lambda: True)
    fake: Any = types.ModuleType("treescope")
    fake.display = shown.append
    monkeypatch.setitem(sys.modules, "treescope", fake)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: fake)
    nnx.display(1, 2)
    assert shown == [1, 2]


def test_a_notebook_is_known_by_its_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = types.ModuleType("IPython")
    fake.get_ipython = lambda: None
    monkeypatch.setitem(sys.modules, "IPython", fake)
    assert not module._in_notebook()
    fake.get_ipython = lambda: object()
    assert module._in_notebook()
