"""Pytree and its marks, where NNX code looks for them."""

from sortal.module import Pytree as Pytree
from sortal.module import dataclass as dataclass
from sortal.nodes import data as data
from sortal.nodes import static as static
