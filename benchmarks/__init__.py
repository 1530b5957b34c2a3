"""Measurements: numbers are checked against a reference before anything is timed."""
