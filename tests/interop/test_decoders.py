"""Decoders are those of transformers: logits, hidden states, gradients; cached and uncached."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxformer import interop
from jaxformer.ops import attention

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": None,  # torch gives its embedding no gradient
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def rope(theta=10_000.0, **scaling):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}


NEOX = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
CASES = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "gpt2_untied": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 61,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 50,
            "n_positions": 64,
            "tie_word_embeddings": False,
        },
    ),
    "llama": ("LlamaForCausalLM", SMALL),
    "llama_tied_heads": (
        "LlamaForCausalLM",
        SMALL
        | {"tie_word_embeddings": True, "head_dim": 10, "attention_bias": True, "mlp_bias": True},
    ),
    "llama_linear": ("LlamaForCausalLM", SMALL | rope(rope_type="linear", factor=3.0)),
    "llama_dynamic": (
        "LlamaForCausalLM",
        SMALL | {"max_position_embeddings": 8} | rope(rope_type="dynamic", factor=3.0),
    ),
    "llama_yarn": ("LlamaForCausalLM", SMALL | rope(**YARN)),
    "llama_llama3": ("LlamaForCausalLM", SMALL | rope(500_000.0, **LLAMA3)),
    "mistral": ("MistralForCausalLM", SMALL | {"sliding_window": 5}),
    "mistral_wide": ("MistralForCausalLM", SMALL | {"sliding_window": 50}),
    "mistral_unbounded": ("MistralForCausalLM", SMALL | {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", SMALL),
    "qwen2_windows": (
        "Qwen2ForCausalLM",
        SMALL | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", SMALL | {"head_dim": 10}),
    "gemma": ("GemmaForCausalLM", SMALL | {"head_dim": 8}),
    "gemma2": (
        "Gemma2ForCausalLM",
        SMALL | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 11},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        SMALL
        | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 11}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "olmo2": ("Olmo2ForCausalLM", SMALL),
    "apertus": ("ApertusForCausalLM", SMALL | rope(12_000_000.0, **LLAMA3)),
    "mixtral": (
        "MixtralForCausalLM",
        SMALL | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        SMALL
        | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6}
        | {"head_dim": 6}
        | rope(150_000.0, **YARN, truncate=False),
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        SMALL
        | {"num_key_value_heads": 4, "moe_intermediate_size": 12, "n_routed_experts": 8}
        | {"num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
        | {"q_lora_rank": 10, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6}
        | {"v_head_dim": 7},
    ),
    "deepseek_v3_direct": (
        "DeepseekV3ForCausalLM",
        SMALL
        | {"num_key_value_heads": 4, "moe_intermediate_size": 12, "n_routed_experts": 4}
        | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        | {"q_lora_rank": None, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6}
        | {"v_head_dim": 7, "attention_bias": True},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", NEOX | {"rotary_pct": 0.5, "hidden_size": 32}),
    "gpt_neox_sequential": ("GPTNeoXForCausalLM", NEOX | {"use_parallel_residual": False}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 61, "hidden_size": 24, "n_layer": 2, "n_head": 3}),
}
B, T = 3, 13


def tokens(length=T, seed=0):
    return np.random.default_rng(seed).integers(0, 61, (B, length))


# What differs from another case in little is left to `-m slow`.
SLOW = {"gpt2_untied", "llama_linear", "mistral_wide", "mistral_unbounded", "qwen2_windows"}
SLOW |= {"gpt_neox_sequential", "deepseek_v3_direct"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in CASES],
)
def case(request, loaded):
    architecture, settings = CASES[request.param]
    return loaded(architecture, **settings)


def test_logits_hidden_states_and_gradients(case, close, gradients):
    import torch

    model, ours, params, folder = case
    ids = tokens()
    d_logits = np.random.default_rng(1).standard_normal((B, T, 61)).astype(np.float32)
    model.zero_grad()
    out = model(torch.tensor(ids), output_hidden_states=True)
    (out.logits * torch.tensor(d_logits)).sum().backward()

    @jax.jit
    def run(params):
        logits, state = ours.apply(params, jnp.asarray(ids), mutable=["intermediates"])
        return (logits * d_logits).sum(), (logits, state["intermediates"])

    (_, (logits, seen)), grads = jax.value_and_grad(run, has_aux=True)(params)
    close(logits, out.logits.detach(), "logits")
    states = [x.detach() for x in out.hidden_states]
    layers = len(states) - 1
    for i, state in enumerate(states[1:-1]):
        close(seen["blocks"][f"layers_{i}"]["stream"][0], state, f"hidden {i}")
    close(seen["normed"][0], states[-1], "last hidden")
    assert layers == ours.config.num_layers
    flat = traverse_util.flatten_dict(grads["params"], sep="/")
    expected = gradients(model, folder)
    assert {*flat} == {*expected}
    for name, grad in flat.items():
        if grad.ndim:
            close(grad, expected[name], name)
        else:  # a sum over everything, whose terms cancel
            assert abs(grad - expected[name]) <= 1e-4 * abs(expected[name])


def test_padded_rows(case, close):
    import torch

    model, ours, params, _ = case
    ids, lengths = tokens(), np.array([T, T - 4, 1])
    right = np.arange(T)[None] < lengths[:, None]

    @jax.jit
    def run(params, real, positions):
        mask = attention.explicit(real[:, None, None])
        return ours.apply(params, jnp.asarray(ids), mask=mask, positions=positions)

    for side, real in (("right", right), ("left", right[:, ::-1].copy())):
        positions = np.maximum(real.cumsum(1) - 1, 0)
        with torch.no_grad():
            given = {"attention_mask": torch.tensor(real.astype(int))}
            if "position_ids" in inspect.signature(model.forward).parameters:
                given["position_ids"] = torch.tensor(positions)
            expected = model(torch.tensor(ids), **given).logits.numpy()
        found = np.asarray(run(params, jnp.asarray(real), jnp.asarray(positions)))
        close(found[real], expected[real], side)


def test_cached_is_uncached(case, close):
    _, ours, params, _ = case
    if ours.config.rope.kind == "dynamic":
        pytest.skip("the frequencies of a text change as it grows")
    ids, counts = tokens(40), jnp.array([9, 4, 1])
    whole = jax.jit(ours.apply)(params, jnp.asarray(ids))
    step = jax.jit(lambda params, new, cache, counts: ours.apply(params, new, cache, counts=counts))
    cache = ours.empty_cache(B, 40)
    logits, cache = step(params, jnp.asarray(ids[:, :9]), cache, counts)
    for row, count in enumerate(counts):
        close(logits[row, :count], whole[row, :count], "prefill")
    one = jax.jit(lambda params, new, cache: ours.apply(params, new, cache))
    for _ in range(31):
        places = np.asarray(cache.length)
        new = jnp.asarray(ids[np.arange(B), places][:, None])
        logits, cache = one(params, new, cache)
        close(logits[:, 0], np.asarray(whole)[np.arange(B), places], places)


def test_a_round_trip_is_bit_identical(case, tmp_path):
    import transformers

    model, ours, params, _ = case
    interop.save(ours, params, tmp_path / "again", shard_bytes=9000)
    again, other = interop.load(tmp_path / "again")
    assert again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, params, other)
    theirs = type(model).from_pretrained(tmp_path / "again")
    for (name, x), y in zip(model.named_parameters(), theirs.parameters(), strict=True):
        np.testing.assert_array_equal(x.detach().numpy(), y.detach().numpy(), err_msg=name)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "again").model_type
