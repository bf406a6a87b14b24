"""Pytree and its marks, by NNX's module name."""

from sortal._engine.marks import data as data
from sortal._engine.marks import static as static
from sortal.module import Pytree as Pytree
from sortal.module import dataclass as dataclass
