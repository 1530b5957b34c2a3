"""A tokenizer of images that was learned: a trained VQVAE as a value.

tokenizer = vq.VQTokenizer(model, variables)
ids = tokenizer.encode(images)                  # B P
tokenizer.decode(ids)                           # B height width C, from 0 to 1
tokenizer.save("runs/vqvae/tokenizer")
vq.load("runs/vqvae/tokenizer")
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxformer.layers import quantize
from jaxformer.models import vqvae
from jaxformer.models.vqvae import VQVAE, VQVAEConfig
from jaxformer.tokenizers.image import ImageTokenizer, read_folder, write_folder
from jaxformer.typing import Array, PyTree

_KIND = "vqvae"
_CODERS = {"conv": vqvae.ConvCoder, "vit": vqvae.ViTCoder}
_QUANTIZERS: dict[str, type[nn.Module]] = {
    "vq": quantize.VectorQuantizer,
    "vq_ema": quantize.EMAVectorQuantizer,
    "fsq": quantize.FSQ,
    "gumbel": quantize.GumbelQuantizer,
}


@dataclasses.dataclass(frozen=True, eq=False)
class VQTokenizer(ImageTokenizer):
    """A VQVAE with its parameters.

    Attributes:
        model: Of any quantiser; `save` knows those of `layers.quantize`.
        variables: Its parameters, and the codebook where it is none of them.
    """

    model: VQVAE
    variables: PyTree

    @property
    def vocab_size(self) -> int:
        return self.model.quantizer.vocab_size

    @property
    def size(self) -> tuple[int, int, int]:
        return (*self.model.config.size, self.model.config.channels)

    @property
    def grid(self) -> tuple[int, int]:
        return self.model.config.grid

    def _encode(self, images: Array) -> Array:
        return self._apply(self.variables, images, method="encode")

    def _decode(self, ids: Array) -> Array:
        return self._apply(self.variables, ids, method="decode")

    @functools.cached_property
    def _apply(self) -> Callable[..., Any]:
        return jax.jit(self.model.apply, static_argnames="method")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a folder with a JSON file and a safetensors file; parameters become float32.

        Raises:
            ValueError: If the quantiser is none of `layers.quantize`, or the folder holds something
                else.
        """
        config = {"kind": _KIND, "model": _plain(self.model.config, ("coder",))}
        config["coder"] = _described(self.model.config.coder, _CODERS)
        config["quantizer"] = _described(self.model.quantizer, _QUANTIZERS)
        tensors = _named(jax.device_get(self.variables))
        write_folder(path, config, {name: x.astype(np.float32) for name, x in tensors.items()})


def load(path: str | os.PathLike[str]) -> VQTokenizer:
    """Reads what `save` wrote.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, or holds another tokenizer or other parameters.
    """
    config, tensors = read_folder(path, _KIND)
    try:
        coder = _made(config["coder"], _CODERS)
        model = VQVAE(
            VQVAEConfig(**_tuples(config["model"]), coder=coder),
            _made(config["quantizer"], _QUANTIZERS),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} describes no VQVAE: {error!r}.") from None
    images = jnp.zeros((1, *model.config.size, model.config.channels))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    expected = {name: (x.shape, x.dtype) for name, x in _named(shapes).items()}
    found = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    if found != expected:
        odd = sorted(name for name, _ in found.items() ^ expected.items())
        raise ValueError(f"{path}: parameters are not those of the model described: {odd[0]}.")
    tree = traverse_util.unflatten_dict(tensors, sep="/")
    return VQTokenizer(model, jax.tree.map(jnp.asarray, tree))


def _named(variables: PyTree) -> dict[str, Any]:
    return traverse_util.flatten_dict(variables, sep="/")


def _plain(value: Any, leave_out: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a dataclass, of which none is one itself."""
    fields = [field.name for field in dataclasses.fields(value) if field.init]
    return {name: getattr(value, name) for name in fields if name not in leave_out}


def _described(value: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    for kind, cls in kinds.items():
        if type(value) is cls:
            return {"kind": kind, **_plain(value, ("parent", "name"))}
    raise ValueError(f"a tokenizer of {type(value).__name__} cannot be saved.")


def _made(described: Mapping[str, Any], kinds: Mapping[str, type]) -> Any:
    settings = _tuples(described)
    return kinds[settings.pop("kind")](**settings)


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
