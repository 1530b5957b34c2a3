"""Published configs have the published numbers of parameters, and say what `config.json` says."""

import dataclasses
import math

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

# Parameters in the published files, each tied table once (BART's bias of logits is among them);
# the class in transformers; what of `config.json` differs from that class's own defaults.
PUBLISHED = {
    "gpt2_124m": (124_439_808, "GPT2", gpt2(768, 12, 12)),
    "gpt2_355m": (354_823_168, "GPT2", gpt2(1024, 24, 16)),
    "gpt2_774m": (774_030_080, "GPT2", gpt2(1280, 36, 20)),
    "gpt2_1.5b": (1_557_611_200, "GPT2", gpt2(1600, 48, 25)),
    "llama2_7b": (6_738_415_616, "Llama", llama(4096, 32, 32, 32, 11008, **LLAMA2)),
    "llama2_13b": (13_015_864_320, "Llama", llama(5120, 40, 40, 40, 13824, **LLAMA2)),
    "llama2_70b": (68_976_648_192, "Llama", llama(8192, 80, 64, 8, 28672, **LLAMA2)),
    "llama3_8b": (8_030_261_248, "Llama", llama(4096, 32, 32, 8, 14336, **LLAMA3)),
    "llama3_70b": (70_553_706_496, "Llama", llama(8192, 80, 64, 8, 28672, **LLAMA3)),
    "llama3.1_8b": (8_030_261_248, "Llama", llama(4096, 32, 32, 8, 14336, **LLAMA31)),
    "llama3.1_70b": (70_553_706_496, "Llama", llama(8192, 80, 64, 8, 28672, **LLAMA31)),
    "llama3.1_405b": (405_853_388_800, "Llama", llama(16384, 126, 128, 8, 53248, **LLAMA31)),
    "mistral_7b": (7_241_732_096, "Mistral", MISTRAL | {"sliding_window": 4096}),
    "mixtral_8x7b": (46_702_792_704, "Mixtral", MISTRAL | {"rope_theta": 1e6}),
    "olmo2_7b": (7_298_617_344, "Olmo2", OLMO2 | {"max_position_embeddings": 4096}),
    "qwen3_0.6b": (596_049_920, "Qwen3", llama(1024, 28, 16, 8, 3072, **TIED)),
    "qwen3_1.7b": (1_720_574_976, "Qwen3", llama(2048, 28, 16, 8, 6144, **TIED)),
    "qwen3_4b": (4_022_468_096, "Qwen3", llama(2560, 36, 32, 8, 9728, **TIED)),
    "qwen3_8b": (8_190_735_360, "Qwen3", llama(4096, 36, 32, 8, 12288, **QWEN3)),
    "gemma2_2b": (2_614_341_888, "Gemma2", {}),
    "gemma2_9b": (9_241_705_984, "Gemma2", llama(3584, 42, 16, 8, 14336)),
    "gemma3_1b": (999_885_952, "Gemma3Text", llama(1152, 26, 4, 1, 6912, **GEMMA3)),
    "gpt_oss_20b": (20_914_757_184, "GptOss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt_oss_120b": (116_829_156_672, "GptOss", {}),
    "deepseek_v3": (
        671_026_419_200,
        "DeepseekV3",
        {"max_position_embeddings": 163840, "rope_scaling": YARN},
    ),
    "bert_base": (109_514_298, "Bert", {}),
    "bert_large": (335_174_458, "Bert", llama(1024, 24, 16, 16, 4096)),
    "roberta_base": (124_697_433, "Roberta", ROBERTA),
    "modernbert_base": (149_655_232, "ModernBert", {}),
    "t5_small": (60_506_624, "T5", {}),
    "t5_base": (222_903_552, "T5", T5),
    "bart_base": (139_470_681, "Bart", BART | {"d_model": 768}),
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
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(init)) == PUBLISHED[name][0]


@pytest.mark.parametrize("name", MODELS)
def test_a_config_is_what_its_published_config_json_is_read_as(name):
    transformers = pytest.importorskip("transformers")
    _, kind, settings = PUBLISHED[name]
    theirs = getattr(transformers, f"{kind}Config")(**settings)
    found = families.family(theirs.model_type, name).read(Settings(theirs.to_dict()))
    assert MODELS[name][0].config == found
