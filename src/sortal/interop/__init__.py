"""Other libraries' objects, taken as they are; each is met when its classes turn up."""

from sortal.interop import flax as flax
