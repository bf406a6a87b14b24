"""Optimizers, averages and metrics, as objects whose arrays have kinds."""
