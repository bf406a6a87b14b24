"""Flax Linen modules in Sortal models, and the other way round."""
