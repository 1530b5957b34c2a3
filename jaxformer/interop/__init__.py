"""Checkpoints of Hugging Face, in and out.

    from jaxformer import interop

    model, params = interop.load("folder")
    interop.save(model, params, "other_folder")

settings    config.json, read so that nothing in it is passed over
tensors     safetensors files
rules       which tensors make which parameter
families    the architectures that are known
"""

from jaxformer.interop.checkpoint import load as load
from jaxformer.interop.checkpoint import save as save
