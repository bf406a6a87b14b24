"""Counterparts of Flax's guides: the same calls in the same order."""
