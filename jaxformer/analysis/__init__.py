"""Measures what tokenizers and models do: nothing here is needed to run them."""
