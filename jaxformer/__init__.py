"""The parts foundation models are made of, in JAX: see README.md for the rooms."""

__version__ = "0.1.0"
