"""Pure functions of arrays: the arithmetic that every layer and model here is made of.

Import the subject, then call it: `from jaxformer.ops import rotary; rotary.rotate(q, positions)`.

Mixing      `attention` (`attend`, `Mask` and its constructors)
Positions   `rotary`, `positions` (sinusoids, learned tables, ALiBi, T5 buckets)
Channels    `norms`, `activations`
Data        `patches` (images to tokens and back), `masking` (of tokens), `losses`, `contacts`
"""
