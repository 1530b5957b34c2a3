"""Architectures, one a file: a frozen config with published sizes beside its module.

transformer       the config that the three skeletons share, and its block
decoder           tokens in, logits of the next token out, with a cache
encoder           tokens in, one vector for each out
esm               an encoder of proteins, and the contacts that its attention says
encoder_decoder   both, joined by cross-attention
image_gpt         a decoder of pictures as grids of small patches
"""
