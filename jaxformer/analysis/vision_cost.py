"""What a `ViT` costs: its blocks as `analysis.cost` counts them, and what is before and after them.

An image becomes T tokens: a class token, registers and a vector for each of its P patches. The part
`embedding` of operations is the map from pixels to these vectors; `head` is that to logits, after a
pooler if there is one.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

from jaxformer.analysis import cost
from jaxformer.analysis.cost import Parts

if TYPE_CHECKING:
    from jaxformer.models.vit import ViTConfig


def tokens(config: "ViTConfig", size: tuple[int, ...] = (), seen: int | None = None) -> int:
    """T of an image.

    Args:
        config: The model's.
        size: Of the image in pixels; that of the config by default.
        seen: Patches that are encoded, of which a masked autoencoder leaves out most; all by
            default.

    Raises:
        ValueError: If patches do not divide the image.
    """
    if seen is None:
        seen = math.prod(dataclasses.replace(config, size=size or config.size).grid)
    return config.prefix + seen


def parameters(config: "ViTConfig") -> Parts:
    """Counts the numbers that are learned, with pooler and head if the config has them."""
    rows = config.prefix + config.mask_token + 1  # the bias of the patches' map is one
    if config.positions == "learned":
        rows += math.prod(config.grid) + config.placed_class
    return dataclasses.replace(
        cost.parameters(config.trunk()),
        embedding=(rows + _pixels(config)) * config.width,
        head=sum((inputs + 1) * outputs for inputs, outputs in _maps(config)),
    )


def forward(
    config: "ViTConfig", batch: int = 1, *, size: tuple[int, ...] = (), seen: int | None = None
) -> Parts:
    """Counts the operations of the vectors of images, and of their logits if there is a head.

    Args:
        config: The model's.
        batch: Images.
        size: As for `tokens`.
        seen: As for `tokens`.
    """
    length = tokens(config, size, seen)
    patches = batch * (length - config.prefix)
    return dataclasses.replace(
        cost.forward(config.trunk(), length, batch),
        embedding=2 * patches * _pixels(config) * config.width,
        head=2 * batch * sum(inputs * outputs for inputs, outputs in _maps(config)),
    )


def backward(
    config: "ViTConfig", batch: int = 1, *, size: tuple[int, ...] = (), seen: int | None = None
) -> Parts:
    """Counts the operations that gradients of all parameters take after that.

    As `cost.backward` does; of the first map only the weights have a gradient, not the pixels.
    """
    length, before = tokens(config, size, seen), forward(config, batch, size=size, seen=seen)
    blocks = cost.backward(config.trunk(), length, batch)
    return dataclasses.replace(blocks, embedding=before.embedding, head=2 * before.head)


def activation_bytes(
    config: "ViTConfig",
    batch: int = 1,
    *,
    size: tuple[int, ...] = (),
    seen: int | None = None,
    dtype: str = "float32",
) -> Parts:
    """Bytes that the backward pass needs of the forward pass, as `cost.activation_bytes` does."""
    length, number = tokens(config, size, seen), cost.BYTES[dtype]
    patches = batch * (length - config.prefix)
    kept = sum(inputs for inputs, _ in _maps(config)) + config.num_classes
    return dataclasses.replace(
        cost.activation_bytes(config.trunk(), length, batch, dtype=dtype),
        embedding=number * patches * _pixels(config),
        head=number * batch * kept,
    )


def _pixels(config: "ViTConfig") -> int:
    """Numbers in a patch."""
    return math.prod(config.patch) * config.channels


def _maps(config: "ViTConfig") -> list[tuple[int, int]]:
    """Inputs and outputs of pooler and head, as far as there are any."""
    features, found = config.width * (1 + (config.pool == "both")), []
    if config.pooler:
        found.append((features, config.width))
        features = config.width
    return found + [(features, config.num_classes)] * bool(config.num_classes)
