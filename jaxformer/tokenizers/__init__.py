"""Text and sequences to integers and back, without JAX."""
