"""Kinds of one name are told apart."""

from __future__ import annotations

import sortal as nnx
from sortal.inspect.naming import full_name, labels


class BatchStat(nnx.Variable):
    """A kind with the name of a built-in one."""


def test_kinds_of_one_name_are_told_apart_by_module_and_else_by_number():
    def local():
        class BatchStat(nnx.Variable):
            pass

        return BatchStat

    one, two = local(), local()
    named = labels([nnx.BatchStat, BatchStat, nnx.Param])
    assert named[nnx.BatchStat] == "sortal.BatchStat"
    assert named[BatchStat] == "test_naming.BatchStat"
    assert named[nnx.Param] == "Param"
    assert labels([BatchStat, one])[one] == full_name(one)
    assert full_name(one).endswith("local.<locals>.BatchStat")
    assert labels([one, two])[two].endswith("BatchStat #2")
