"""Architectures, one a file: a frozen config with published sizes beside its module.

transformer       the config that the three skeletons share, and its block
decoder           tokens in, logits of the next token out, with a cache
encoder           tokens in, one vector for each out
esm               an encoder of proteins, and the contacts that its attention says
encoder_decoder   both, joined by cross-attention
image_gpt         a decoder of pictures as grids of small patches
vit               patches of images or clips in, a vector for each, for the image, or logits, out
predictor         what stands at hidden patches, from the vectors of the seen
mae               a vision Transformer and the predictor of pixels
jepa              a vision Transformer and the predictor of vectors
dino              a vision Transformer and the heads of DINOv2
vqvae             images to a grid of codes and back
"""
