"""Flax modules that own parameters and call `jaxformer.ops`; fields are explicit, never a config.

linear      Dense, with the product passed in
norms       RMSNorm, LayerNorm, GroupNorm, BatchNorm
mlp         MLP and GatedMLP (SwiGLU and its family)
embed       Embed, LearnedPositions, GridPositions, RelativeBias, NeighbourEmbed
attention   SelfAttention and CrossAttention: grouped queries, QK-norm, rotary, key-value cache
block       PreNorm, PostNorm, SandwichNorm and NoNorm residuals; Block
stack       Stack of blocks, unrolled or scanned, with or without remat, shared or not
"""
