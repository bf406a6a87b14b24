"""Layers are tested by what they compute, not by how fast."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(compiled_quickly):
    return
