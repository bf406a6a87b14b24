"""The one way into and out of a JAX trace."""
