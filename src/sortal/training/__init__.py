"""Optimizers, averages and metrics that know kinds."""
