"""Axis letters and array aliases: one alphabet for annotations, einsum strings and error texts.

Letter   Axis                             Letter   Axis
------   ------------------------------   ------   ------------------------------
`B`      batch (`*B`: any leading axes)   `D`      model width
`T`      target or query positions        `F`      hidden width of the MLP
`S`      source or key positions          `V`      vocabulary
`N`      query heads                      `P`      patches
`K`      key-value heads (N = K·G)        `E`      codebook entries
`G`      query heads per key head         `M`      sequences of an alignment
`H`      channels of one head             `R`      residues; `C` pair channels
"""

from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Key, PyTree, Shaped, UInt8, UInt32

__all__ = [
    "Array",
    "Bool",
    "DTypeLike",
    "Float",
    "Int",
    "Key",
    "PyTree",
    "Shaped",
    "UInt8",
    "UInt32",
]
