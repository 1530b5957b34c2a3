"""Published configs have the published numbers of parameters, and say what `config.json` says."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from jaxformer.interop import families
from jaxformer.interop.settings import Settings
from jaxformer.models import published
from jaxformer.models.decoder import Decoder
from jaxformer.models.encoder import Encoder
from jaxformer.models.encoder_decoder import EncoderDecoder

MODELS = (
    {name: (Decoder(x), 1, "__call__") for name, x in published.DECODERS.items()}
    | {name: (Encoder(x), 1, "logits") for name, x in published.ENCODERS.items()}
    | {name: (EncoderDecoder(x), 2, "__call__") for name, x in published.ENCODER_DECODERS.items()}
)


def gpt2(width, layers, heads):
    return {"n_embd": width, "n_layer": layers, "n_head": heads}


def llama(width, layers, heads, kv_heads, hidden, **more):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": hidden}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads} | more


LLAMA2 = {"vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
LLAMA3 = LLAMA2 | {"vocab_size": 128256, "rope_theta": 5e5, "max_position_embeddings": 8192}
STRETCH = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCH |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
LLAMA31 = LLAMA3 | {"max_position_embeddings": 131072, "rope_scaling": STRETCH}
MISTRAL = LLAMA2 | {"max_position_embeddings": 32768}
OLMO2 = {"vocab_size": 100352, "rms_norm_eps": 1e-6, "rope_theta": 5e5}
QWEN3 = {"rope_theta": 1e6, "max_position_embeddings": 40960, "head_dim": 128}
TIED = QWEN3 | {"tie_word_embeddings": True}
GEMMA3 = {"vocab_size": 262144, "sliding_window": 512, "max_position_embeddings": 32768}
GEMMA3 |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
YARN |= {"mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
ROBERTA = {"layer_norm_eps": 1e-5, "max_position_embeddings": 514, "type_vocab_size": 1}
T5 = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
HALF = {"layers": 6, "attention_heads": 12, "ffn_dim": 3072}
BART = {f"{half}_{x}": size for half in ("encoder", "decoder") for x, size in HALF.items()}

# Parameters in the published files, each tied table once (BART's bias of logits is among them).
NUMBERS = pathlib.Path(__file__).with_name("published.txt").read_text(encoding="utf-8")
# The class in transformers; what of `config.json` differs from that class's own defaults.
PUBLISHED = {
    "gpt2_124m": ("GPT2", gpt2(768, 12, 12)),
    "gpt2_355m": ("GPT2", gpt2(1024, 24, 16)),
    "gpt2_774m": ("GPT2", gpt2(1280, 36, 20)),
    "gpt2_1.5b": ("GPT2", gpt2(1600, 48, 25)),
    "llama2_7b": ("Llama", llama(4096, 32, 32, 32, 11008, **LLAMA2)),
    "llama2_13b": ("Llama", llama(5120, 40, 40, 40, 13824, **LLAMA2)),
    "llama2_70b": ("Llama", llama(8192, 80, 64, 8, 28672, **LLAMA2)),
    "llama3_8b": ("Llama", llama(4096, 32, 32, 8, 14336, **LLAMA3)),
    "llama3_70b": ("Llama", llama(8192, 80, 64, 8, 28672, **LLAMA3)),
    "llama3.1_8b": ("Llama", llama(4096, 32, 32, 8, 14336, **LLAMA31)),
    "llama3.1_70b": ("Llama", llama(8192, 80, 64, 8, 28672, **LLAMA31)),
    "llama3.1_405b": ("Llama", llama(16384, 126, 128, 8, 53248, **LLAMA31)),
    "mistral_7b": ("Mistral", MISTRAL | {"sliding_window": 4096}),
    "mixtral_8x7b": ("Mixtral", MISTRAL | {"rope_theta": 1e6}),
    "olmo2_7b": ("Olmo2", OLMO2 | {"max_position_embeddings": 4096}),
    "qwen3_0.6b": ("Qwen3", llama(1024, 28, 16, 8, 3072, **TIED)),
    "qwen3_1.7b": ("Qwen3", llama(2048, 28, 16, 8, 6144, **TIED)),
    "qwen3_4b": ("Qwen3", llama(2560, 36, 32, 8, 9728, **TIED)),
    "qwen3_8b": ("Qwen3", llama(4096, 36, 32, 8, 12288, **QWEN3)),
    "gemma2_2b": ("Gemma2", {}),
    "gemma2_9b": ("Gemma2", llama(3584, 42, 16, 8, 14336)),
    "gemma3_1b": ("Gemma3Text", llama(1152, 26, 4, 1, 6912, **GEMMA3)),
    "gpt_oss_20b": ("GptOss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt_oss_120b": ("GptOss", {}),
    "deepseek_v3": (
        "DeepseekV3",
        {"max_position_embeddings": 163840, "rope_scaling": YARN},
    ),
    "bert_base": ("Bert", {}),
    "bert_large": ("Bert", llama(1024, 24, 16, 16, 4096)),
    "roberta_base": ("Roberta", ROBERTA),
    "modernbert_base": ("ModernBert", {}),
    "t5_small": ("T5", {}),
    "t5_base": ("T5", T5),
    "bart_base": ("Bart", BART | {"d_model": 768}),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_as_many_as_are_published(name):
    model, texts, method = MODELS[name]
    config, tokens = model.config, jnp.zeros((1, 1), int)
    experts = config.experts is not None and config.experts.first
    # Windows have no parameters, and layers of one kind are traced once.
    alike = {"windows": (), "ahead": 0, "scan": config.first_norm and not experts}
    model = model.clone(config=dataclasses.replace(config, **alike))
    init = jax.eval_shape(
        lambda key: model.init(key, *[tokens] * texts, method=method), jax.random.key(0)
    )
    number = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(init))
    assert f"{name}: {number:,}" in NUMBERS.splitlines()


@pytest.mark.parametrize("name", MODELS)
def test_a_config_is_what_its_published_config_json_is_read_as(name):
    transformers = pytest.importorskip("transformers")
    kind, settings = PUBLISHED[name]
    theirs = getattr(transformers, f"{kind}Config")(**settings)
    found = families.family(theirs.model_type, name).read(Settings(theirs.to_dict()))
    assert MODELS[name][0].config == found
