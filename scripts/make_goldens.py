"""Makes tiny checkpoints with what transformers says of them: `tests/interop/goldens`.

    python scripts/make_goldens.py                  all
    python scripts/make_goldens.py bert esm2        some

Needs torch and transformers (`pip install torch transformers`). A folder has `config.json`,
`model.safetensors` and `io.npz`: the arguments of the model's forward by their names in
transformers (`input_ids`, `attention_mask`, `token_type_ids`, `decoder_input_ids`; of images
`pixel_values`, `noise`, `pixel_values_videos`, `context_mask`, `target_mask`) and `logits`, or of a
model that has none `last_hidden_state`, and what it predicts as `predicted`. Weights are drawn from
a seed, and every one of them matters. `tests/interop/test_goldens.py` reads whatever folders there
are, without torch.

For another family add a line to `GOLDENS`; what its model is given follows from its class.
"""

import pathlib
import sys
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "interop" / "goldens"
SIZES = {
    "vocab_size": 19,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
SPECIAL = {"pad_token_id": 1, "mask_token_id": 3}
NO_IDS = dict.fromkeys(f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep"))
T5 = {"vocab_size": 19, "d_model": 8, "d_kv": 3, "d_ff": 12, "num_heads": 2, "num_layers": 2}
T5 |= {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 7}
BART = {"vocab_size": 19, "d_model": 8, "max_position_embeddings": 16, "pad_token_id": 1}
BART |= {
    f"{half}_{part}": 2 for half in ("encoder", "decoder") for part in ("layers", "attention_heads")
}
BART |= {f"{half}_ffn_dim": 12 for half in ("encoder", "decoder")}
GPT2 = {"vocab_size": 19, "n_layer": 2, "n_head": 2} | NO_IDS
LLAMA = SIZES | NO_IDS | {"num_key_value_heads": 1}
LAYERS = ["sliding_attention", "full_attention"]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0, "truncate": False}
YARN |= {"original_max_position_embeddings": 8}
DEEPSEEK = LLAMA | {"num_key_value_heads": 2, "moe_intermediate_size": 8, "n_routed_experts": 4}
DEEPSEEK |= {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
DEEPSEEK |= {"q_lora_rank": 6, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
DEEPSEEK |= {"v_head_dim": 4}
VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_channels": 2}
VIT |= {"image_size": [6, 4], "patch_size": [3, 1]}
DINOV2 = VIT | {"mlp_ratio": 2, "image_size": 6, "patch_size": 2}
MAE = VIT | {"intermediate_size": 12, "image_size": 6, "patch_size": 2}
MAE |= {"decoder_hidden_size": 12, "decoder_intermediate_size": 10}
MAE |= {"decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 3}
JEPA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 1.5}
JEPA |= {"frames_per_clip": 6, "tubelet_size": 2, "crop_size": 4, "patch_size": 2, "in_chans": 1}
JEPA |= {"pred_hidden_size": 12, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}
JEPA |= {"pred_num_mask_tokens": 3, "pred_mlp_ratio": 2}
GOLDENS: list[tuple[str, str, dict[str, Any]]] = [
    ("bert", "BertForMaskedLM", SIZES),
    ("roberta", "RobertaForMaskedLM", SIZES | {"pad_token_id": 1, "type_vocab_size": 1}),
    ("albert", "AlbertForMaskedLM", SIZES | {"embedding_size": 5, "num_hidden_layers": 3}),
    (
        "modernbert",
        "ModernBertForMaskedLM",
        SIZES | NO_IDS | {"local_attention": 4, "global_attn_every_n_layers": 2},
    ),
    (
        "esm2",
        "EsmForMaskedLM",
        SIZES | SPECIAL | {"position_embedding_type": "rotary", "token_dropout": True},
    ),
    (
        "esm1b",
        "EsmForMaskedLM",
        SIZES | SPECIAL | {"emb_layer_norm_before": True, "token_dropout": True},
    ),
    ("t5", "T5ForConditionalGeneration", T5 | {"num_decoder_layers": 1}),
    (
        "t5_gated",
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    ("bart", "BartForConditionalGeneration", BART),
    ("marian", "MarianMTModel", BART | {"activation_function": "swish", "scale_embedding": True}),
    ("gpt2", "GPT2LMHeadModel", GPT2 | {"n_embd": 8, "n_positions": 16}),
    ("bloom", "BloomForCausalLM", GPT2 | {"hidden_size": 8}),
    ("gpt_neox", "GPTNeoXForCausalLM", SIZES | NO_IDS | {"rotary_pct": 0.5}),
    ("llama", "LlamaForCausalLM", LLAMA | {"rope_parameters": LLAMA3}),
    ("mistral", "MistralForCausalLM", LLAMA | {"sliding_window": 3}),
    ("qwen2", "Qwen2ForCausalLM", LLAMA),
    ("qwen3", "Qwen3ForCausalLM", LLAMA | {"head_dim": 6}),
    ("gemma", "GemmaForCausalLM", LLAMA | {"head_dim": 4}),
    ("gemma2", "Gemma2ForCausalLM", LLAMA | {"head_dim": 4, "sliding_window": 3}),
    (
        "gemma3_text",
        "Gemma3ForCausalLM",
        LLAMA | {"head_dim": 4, "sliding_window": 3, "layer_types": LAYERS},
    ),
    ("olmo2", "Olmo2ForCausalLM", LLAMA),
    ("apertus", "ApertusForCausalLM", LLAMA | {"rope_parameters": LLAMA3}),
    ("mixtral", "MixtralForCausalLM", LLAMA | {"num_local_experts": 3}),
    (
        "gpt_oss",
        "GptOssForCausalLM",
        LLAMA
        | {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 4}
        | {"sliding_window": 3, "rope_parameters": YARN},
    ),
    ("deepseek_v3", "DeepseekV3ForCausalLM", DEEPSEEK),
    ("vit", "ViTForImageClassification", VIT | {"intermediate_size": 12, "num_labels": 5}),
    ("ijepa", "IJepaForImageClassification", VIT | {"intermediate_size": 12, "num_labels": 5}),
    ("vit_mae", "ViTMAEForPreTraining", MAE),
    ("dinov2", "Dinov2ForImageClassification", DINOV2 | {"num_labels": 5}),
    (
        "dinov2_with_registers",
        "Dinov2WithRegistersModel",
        DINOV2 | {"use_swiglu_ffn": True, "num_register_tokens": 3},
    ),
    (
        "dinov3_vit",
        "DINOv3ViTModel",
        VIT
        | {"intermediate_size": 12, "use_gated_mlp": True, "hidden_act": "silu"}
        | {"num_register_tokens": 3},
    ),
    ("vjepa2", "VJEPA2Model", JEPA),
]


def scramble(model: Any, seed: int = 0) -> None:
    """Draws all of a model's parameters anew, norms and biases too; of a ViTMAE tables too."""
    import torch

    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if not (x.requires_grad or name.endswith(("position_embeddings", "pos_embed"))):
                continue
            size = 0.5 if x.ndim < 2 else x.shape[-1] ** -0.5
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            x.copy_(torch.tensor(size * random.standard_normal(x.shape) + centre, dtype=x.dtype))
        for name, x in model.named_buffers():
            if "correction" in name:
                x.copy_(torch.tensor(random.standard_normal(x.shape)))


def arguments(model: Any, seed: int = 1) -> dict[str, np.ndarray]:
    """What a model is given: two rows, of which an encoder's second is padded at the right."""
    random, config = np.random.default_rng(seed), model.config
    rows, length = 2, 9
    if not hasattr(config, "vocab_size"):
        return images(model, random)
    ids = random.integers(4, config.vocab_size, (rows, length))
    if config.is_encoder_decoder or type(model).__name__.endswith("ForMaskedLM"):
        real = np.arange(length)[None] < np.array([[length], [length - 3]])
        pad = 1 if config.pad_token_id is None else config.pad_token_id
        found = {"input_ids": np.where(real, ids, pad), "attention_mask": real.astype(np.int64)}
        if config.is_encoder_decoder:
            found["decoder_input_ids"] = random.integers(4, config.vocab_size, (rows, 5))
        elif getattr(config, "mask_token_id", None) is not None:
            found["input_ids"][:, 2] = config.mask_token_id
        if getattr(config, "type_vocab_size", 0) > 1:
            found["token_type_ids"] = random.integers(0, config.type_vocab_size, (rows, length))
        return found
    return {"input_ids": ids}


def images(model: Any, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Two images, or clips, and for some what is hidden of them."""
    config = model.config
    if model.main_input_name == "pixel_values_videos":
        shape = (2, config.frames_per_clip, config.in_chans, config.crop_size, config.crop_size)
        order = random.permuted(np.tile(np.arange(12), (2, 1)), axis=1)
        found = {"context_mask": order[:, :5], "target_mask": order[:, 5:10]}
        return found | {"pixel_values_videos": random.standard_normal(shape).astype(np.float32)}
    size = config.image_size
    size = [size, size] if isinstance(size, int) else size
    shape = (2, config.num_channels, *size)
    found = {"pixel_values": random.standard_normal(shape).astype(np.float32)}
    if hasattr(config, "mask_ratio"):
        found["noise"] = random.random((2, 9), np.float32)
    return found


def make(name: str, architecture: str, settings: dict[str, Any]) -> int:
    """Writes one folder and says how many bytes it has."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(attn_implementation="eager", **settings)).eval()
    scramble(model)
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    given = arguments(model)
    tensors: dict[str, Any] = {key: torch.tensor(x) for key, x in given.items()}
    for key in {"context_mask", "target_mask"} & {*tensors}:  # several of each could be given
        tensors[key] = [tensors[key]]
    with torch.no_grad():
        out = model(**tensors)
    kept: dict[str, Any] = {
        key: x.astype(np.int16) if x.dtype.kind in "bi" else x for key, x in given.items()
    }
    name = "logits" if "logits" in out else "last_hidden_state"
    kept[name] = out[name].numpy()
    if "predictor_output" in out:
        kept["predicted"] = out.predictor_output.last_hidden_state.numpy()
    np.savez_compressed(folder / "io.npz", **kept)
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    for golden_name, golden_class, golden_settings in GOLDENS:
        if golden_name in sys.argv[1:] or not sys.argv[1:]:
            print(golden_name, make(golden_name, golden_class, golden_settings), "bytes")
