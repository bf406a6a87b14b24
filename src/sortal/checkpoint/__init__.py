"""Checkpoints by kind; the names are at the top level, and read when asked for."""
