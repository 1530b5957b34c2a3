"""Experiments: one file each, run as `python -m experiments.NAME`; the docstring says the rest."""
