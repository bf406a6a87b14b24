"""Benchmarks of Sortal beside Flax NNX, Equinox and plain JAX.

``python -m benchmarks`` from the repository root, with ``src`` on the path. Every
contender does the same work on an equal model, in one process, in turns.
"""
