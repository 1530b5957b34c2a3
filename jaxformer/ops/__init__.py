"""Pure functions of arrays: the arithmetic that every layer and model here is made of.

Import the subject, then call it: `from jaxformer.ops import rotary; rotary.rotate(q, positions)`.

Mixing      `attention` (`attend`, `Mask` and its constructors)
Positions   `rotary`, `rope` (recipes, grids), `positions` (sinusoids, tables, ALiBi, T5 buckets)
Channels    `norms`, `activations`
Data        `patches` (images to tokens and back), `augment` (random changes of images)
Hiding      `masking` (tokens), `patch_masks` and `block_masks` (patches)
Codes       `codebook` (nearest codes, FSQ, Gumbel-softmax)
Losses      `losses`, `reconstruction` (of patches), `distillation` (teachers), `spreading` (against
            collapse)
Proteins    `contacts`
"""
