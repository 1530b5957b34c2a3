"""Published models of images have the published numbers of parameters and settings."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from jaxformer.interop import families
from jaxformer.interop.settings import Settings
from jaxformer.models import published_vision
from jaxformer.models.jepa import JEPA
from jaxformer.models.mae import MAE
from jaxformer.models.vit import ViT

MODELS = {name: ViT(x) for name, x in published_vision.ENCODERS.items()}
MODELS |= {name: MAE(x) for name, x in published_vision.AUTOENCODERS.items()}
MODELS |= {name: JEPA(x) for name, x in published_vision.PREDICTIVE.items()}
NUMBERS = pathlib.Path(__file__).with_name("published.txt").read_text(encoding="utf-8")


def sizes(width, layers, heads, hidden=None, **more):
    found = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return found | ({} if hidden is None else {"intermediate_size": hidden}) | more


def ijepa(*args, **more):
    return "IJepaModel", sizes(*args, layer_norm_eps=1e-6, **more)


def dinov2(*args, **more):
    return "Dinov2Model", sizes(*args, image_size=518, patch_size=14, **more)


def registers(*args, **more):
    return "Dinov2WithRegistersModel", dinov2(*args, **more)[1]


def dinov3(*args, **more):
    return "DINOv3ViTModel", sizes(*args, num_register_tokens=4, **more)


GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
GIANT = {"use_swiglu_ffn": True}
LARGE, HUGE = (1024, 24, 16, 4096), (1280, 32, 16, 5120)
# The class in transformers; what of `config.json` differs from that class's own defaults.
PUBLISHED = {
    "vit_b16": ("ViTForImageClassification", {"num_labels": 1000}),
    "vit_l16": ("ViTForImageClassification", sizes(*LARGE, num_labels=1000)),
    "i_jepa_h14": ijepa(*HUGE, patch_size=14, mlp_ratio=4),
    "i_jepa_h16_448": ijepa(*HUGE, image_size=448, mlp_ratio=4),
    "i_jepa_g16": ijepa(1408, 40, 16, 6144, mlp_ratio=48 / 11),
    "dinov2_s14": dinov2(384, 12, 6),
    "dinov2_b14": dinov2(768, 12, 12),
    "dinov2_l14": dinov2(1024, 24, 16),
    "dinov2_g14": dinov2(1536, 40, 24, **GIANT),
    "dinov2_s14_registers": registers(384, 12, 6),
    "dinov2_b14_registers": registers(768, 12, 12),
    "dinov2_l14_registers": registers(1024, 24, 16),
    "dinov2_g14_registers": registers(1536, 40, 24, **GIANT),
    "dinov3_s16": dinov3(384, 12, 6, 1536),
    "dinov3_s16_plus": dinov3(384, 12, 6, 1536, **GATED),
    "dinov3_b16": dinov3(768, 12, 12, 3072),
    "dinov3_l16": dinov3(*LARGE),
    "dinov3_h16_plus": dinov3(1280, 32, 20, 5120, **GATED),
    "dinov3_7b16": dinov3(4096, 40, 32, 8192, query_bias=False, value_bias=False, **GATED),
    "mae_b16": ("ViTMAEForPreTraining", {}),
    "mae_l16": ("ViTMAEForPreTraining", sizes(*LARGE)),
    "mae_h14": ("ViTMAEForPreTraining", sizes(*HUGE, patch_size=14)),
    "v_jepa_2_l16": ("VJEPA2Model", {}),
    "v_jepa_2_h16": ("VJEPA2Model", sizes(1280, 32, 16)),
    "v_jepa_2_g16": ("VJEPA2Model", sizes(1408, 40, 22, mlp_ratio=48 / 11)),
}


@pytest.fixture(params=MODELS)
def theirs(request):
    """A name, the class in transformers and its config."""
    transformers = pytest.importorskip("transformers")
    kind, settings = PUBLISHED[request.param]
    kind = getattr(transformers, kind)
    return request.param, kind, kind.config_class(**settings)


def scanned(config):
    """The same with layers that are traced once."""
    if not dataclasses.is_dataclass(config):
        return config
    changed = {x.name: scanned(getattr(config, x.name)) for x in dataclasses.fields(config)}
    return type(config)(**changed | ({"scan": True} if "scan" in changed else {}))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_as_many_as_are_published(name):
    config = scanned(MODELS[name].config)
    model, encoder = MODELS[name].clone(config=config), getattr(config, "encoder", config)
    images, numbers = jnp.zeros((1, *encoder.size, encoder.channels)), jnp.zeros((1, 1), int)
    args = (images,) if isinstance(model, ViT) else (images, numbers, numbers)
    method = "logits" if isinstance(model, ViT) and config.num_classes else "__call__"
    init = jax.eval_shape(lambda key: model.init(key, *args, method=method), jax.random.key(0))
    number = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(init))
    assert f"{name}: {number:,}" in NUMBERS.splitlines()


def test_transformers_counts_as_many(theirs):
    torch = pytest.importorskip("torch")
    name, kind, config = theirs
    with torch.device("meta"):
        model = kind(config)
    number = sum(x.numel() for x in model.parameters() if x.requires_grad)
    assert f"{name}: {number:,}" in NUMBERS.splitlines()


def test_a_config_is_what_its_published_config_json_is_read_as(theirs):
    name, kind, config = theirs
    config.architectures = [kind.__name__]
    settings = Settings(json.loads(config.to_json_string()))
    found = families.family(settings.take("model_type"), name).read(settings)
    settings.finish()
    assert MODELS[name].config == found
