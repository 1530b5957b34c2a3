"""Random changes of images that leave their meaning: pure functions of a key and a batch.

Images are floats in [0, 1], channels last, and stay so (bytes are refused where they would be cut:
divide them by 255); every image gets draws of its own, and the
same key the same draws. Shapes do not depend on what is drawn, so all may stand under `jax.jit`.
For example, two views of every image:

    from jaxformer.ops import augment

    def view(key, images):
        crop, flip, colours = jax.random.split(key, 3)
        images, _ = augment.random_resized_crop(crop, images, (32, 32))
        images = augment.random_flip(flip, images)
        return augment.colour_jitter(colours, images, brightness=0.4, contrast=0.4)

    first, second = (view(key, images) for key in jax.random.split(key))
"""

from jaxformer.ops.augment.chance import sometimes
from jaxformer.ops.augment.colour import (
    colour_jitter,
    gaussian_blur,
    random_grayscale,
    scale_brightness,
    scale_contrast,
    scale_saturation,
    solarize,
    turn_hue,
)
from jaxformer.ops.augment.geometry import (
    affine,
    random_boxes,
    random_crop,
    random_flip,
    random_resized_crop,
    resized_crop,
)
from jaxformer.ops.augment.mixing import cutmix, mixup, random_erase

__all__ = [
    "affine",
    "colour_jitter",
    "cutmix",
    "gaussian_blur",
    "mixup",
    "random_boxes",
    "random_crop",
    "random_erase",
    "random_flip",
    "random_grayscale",
    "random_resized_crop",
    "resized_crop",
    "scale_brightness",
    "scale_contrast",
    "scale_saturation",
    "solarize",
    "sometimes",
    "turn_hue",
]
