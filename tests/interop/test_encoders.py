"""Encoders are those of transformers: logits, hidden states, gradients, padded rows, contacts."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from jaxformer import interop
from jaxformer.models import esm
from jaxformer.models.encoder import attention_maps
from jaxformer.ops import attention

V, PAD, MASK = 61, 1, 3
SMALL = {
    "vocab_size": V,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": None,  # torch gives its embedding no gradient
}
ESM = SMALL | {"pad_token_id": PAD, "mask_token_id": MASK}
MODERN = SMALL | dict.fromkeys(
    ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), None
)
LOCAL = {"layer_types": ["full_attention", "sliding_attention"]}
CASES = {
    "bert": ("BertForMaskedLM", SMALL),
    "bert_untied": (
        "BertForMaskedLM",
        SMALL | {"tie_word_embeddings": False, "hidden_act": "gelu_new", "type_vocab_size": 3},
    ),
    "roberta": (
        "RobertaForMaskedLM",
        SMALL | {"pad_token_id": PAD, "type_vocab_size": 1, "hidden_act": "relu"},
    ),
    "roberta_untied": (
        "RobertaForMaskedLM",
        SMALL | {"pad_token_id": PAD, "tie_word_embeddings": False},
    ),
    "albert": (
        "AlbertForMaskedLM",
        SMALL | {"embedding_size": 7},
    ),
    "albert_groups": (
        "AlbertForMaskedLM",
        SMALL
        | {"embedding_size": 24, "num_hidden_layers": 4, "num_hidden_groups": 2}
        | {"tie_word_embeddings": False},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        MODERN | {"local_attention": 6, "num_hidden_layers": 3, "global_attn_every_n_layers": 2},
    ),
    "modernbert_wide": (
        "ModernBertForMaskedLM",
        MODERN
        | LOCAL
        | {"local_attention": 51, "norm_bias": True, "attention_bias": True, "mlp_bias": True}
        | {"classifier_bias": True, "tie_word_embeddings": False, "hidden_activation": "silu"},
    ),
    "esm2": (
        "EsmForMaskedLM",
        ESM | {"position_embedding_type": "rotary", "token_dropout": True},
    ),
    "esm1b": (
        "EsmForMaskedLM",
        ESM | {"emb_layer_norm_before": True, "token_dropout": True, "tie_word_embeddings": False},
    ),
}
ONE = {"num_hidden_layers": 1}
BARE = {
    "bert": ("BertModel", SMALL | ONE),
    "roberta": ("RobertaModel", SMALL | ONE | {"pad_token_id": PAD}),
    "albert": ("AlbertModel", SMALL | ONE | {"embedding_size": 7}),
    "modernbert": ("ModernBertModel", MODERN | LOCAL | {"local_attention": 6}),
    "esm": ("EsmModel", ESM | ONE | {"position_embedding_type": "rotary", "token_dropout": True}),
}
B, S = 3, 13


def tokens():
    return np.random.default_rng(0).integers(PAD + 1, V, (B, S))


def kinds(model):
    """Kinds of tokens, for a model that knows several, as its arguments and ours."""
    import torch

    if getattr(model.config, "type_vocab_size", 1) < 2:
        return {}, {}
    given = np.random.default_rng(1).integers(0, model.config.type_vocab_size, (B, S))
    return {"token_type_ids": torch.tensor(given)}, {"token_types": jnp.asarray(given)}


@pytest.fixture(scope="module", params=CASES)
def case(request, loaded):
    """Model of transformers, ours, parameters, folder, and one compiled function for all of it."""
    architecture, settings = CASES[request.param]
    model, ours, params, folder = loaded(architecture, **settings)
    _, also = kinds(model)

    @jax.jit
    def run(params, ids, mask, d_logits):
        def loss(params):
            options = {"method": "logits", "mutable": ["intermediates"]}
            logits, state = ours.apply(params, ids, mask, **also, **options)
            blocks = state["intermediates"]["blocks"]
            stream = [x for i in range(len(blocks)) for x in blocks[f"layers_{i}"]["stream"]]
            if ours.config.final_norm:  # transformers shows the last one normalised
                stream[-1] = state["intermediates"]["normed"][0]
            return (logits * d_logits).sum(), (logits, stream)

        (_, (logits, stream)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return logits, stream, traverse_util.flatten_dict(grads["params"], sep="/")

    return model, ours, params, folder, run


def gradients(model, rules):
    """The gradients of a model of transformers, in our layout."""
    grads = {
        name: np.zeros(x.shape) if x.grad is None else x.grad.numpy()
        for name, x in model.named_parameters()
    }
    return {rule.ours: rule.take([grads[name] for name in rule.theirs]) for rule in rules}


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_logits_hidden_states_and_gradients(case, close, rules_of, side):
    import torch

    model, ours, params, folder, run = case
    theirs, _ = kinds(model)
    lengths = np.array([S, S - 4, 1] if side else [S] * B)
    real = np.arange(S)[None] < lengths[:, None]
    if side == "left":
        real = real[:, ::-1].copy()
    ids = np.where(real, tokens(), PAD)
    d_logits = np.random.default_rng(2).standard_normal((B, S, V)).astype(np.float32)
    d_logits *= real[..., None]
    given = {"attention_mask": torch.tensor(real.astype(int))} if side else {}
    out = model(torch.tensor(ids), output_hidden_states=True, **given, **theirs)
    # Sums over tokens round by more than what is allowed, but ModernBERT's windows on padding alone
    # give NaN in float64.
    exact = copy.deepcopy(model)
    exact = exact if "ModernBert" in type(model).__name__ else exact.double()
    (exact(torch.tensor(ids), **given, **theirs).logits * torch.tensor(d_logits)).sum().backward()
    mask = attention.explicit(jnp.asarray(real)[:, None, None])
    logits, stream, grads = run(params, jnp.asarray(ids), mask, d_logits)
    close(np.asarray(logits)[real], out.logits.detach().numpy()[real], "logits")
    states = [x.detach().numpy() for x in out.hidden_states[1:]]
    assert len(stream) == len(states) == ours.config.num_layers
    for i, (x, state) in enumerate(zip(stream, states)):
        close(np.asarray(x)[real], state[real], f"hidden {i}")
    expected = gradients(exact, rules_of(folder))
    assert {*grads} == {*expected}
    for name, grad in grads.items():
        close(grad, expected[name], name)


@pytest.mark.parametrize("case", ["bert", "roberta", "modernbert", "esm1b"], indirect=True)
def test_positions_may_be_given(case, close):
    import torch

    model, ours, params, *_ = case
    ids = tokens()
    places = np.random.default_rng(3).permutation(40)[:S] + ours.config.position_offset
    with torch.no_grad():
        expected = model(torch.tensor(ids), position_ids=torch.tensor(places)[None]).logits
    positions = jnp.asarray(places - ours.config.position_offset)
    found = jax.jit(
        lambda p: ours.apply(p, jnp.asarray(ids), positions=positions, method="logits")
    )(params)
    close(found, expected, "positions")


def same_parameters(one, other):
    """Whether two models of transformers are one, but for a bias beside the one that is used."""
    unread = set() if one.config.tie_word_embeddings else {"bias"}
    for (name, x), y in zip(one.named_parameters(), other.parameters(), strict=True):
        if not any(name.endswith(f"{head}.bias") for head in ("predictions", "lm_head") if unread):
            np.testing.assert_array_equal(x.detach().numpy(), y.detach().numpy(), err_msg=name)


def test_a_round_trip_is_bit_identical(case, tmp_path):
    model, ours, params, *_ = case
    interop.save(ours, params, tmp_path / "again", shard_bytes=9000)
    again, other = interop.load(tmp_path / "again")
    assert again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, params, other)
    same_parameters(model, type(model).from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize("name", BARE)
def test_vectors_and_pooled_vectors_of_models_without_a_head(loaded, close, tmp_path, name):
    import torch

    architecture, settings = BARE[name]
    model, ours, params, _ = loaded(architecture, **settings)
    ids, (theirs, also) = tokens(), kinds(model)
    with torch.no_grad():
        out = model(torch.tensor(ids), **theirs)

    @jax.jit
    def run(params):
        vectors = ours.apply(params, jnp.asarray(ids), **also)
        if not ours.config.pooler:
            return vectors, None
        return vectors, ours.apply(params, jnp.asarray(ids), **also, method="pooled")

    vectors, pooled = run(params)
    close(vectors, out.last_hidden_state, name)
    assert (pooled is None) == (name == "modernbert")
    if pooled is not None:
        close(pooled, out.pooler_output, name)
    interop.save(ours, params, tmp_path / "again")
    same_parameters(model, type(model).from_pretrained(tmp_path / "again"))


def test_contacts_and_attention_maps_of_esm(loaded, close):
    import torch

    architecture, settings = CASES["esm2"]
    model, ours, params, _ = loaded(architecture, **settings)
    lengths, ids = np.array([S, S - 4, 7]), tokens()
    ids[ids == 2] = 4
    ids[np.arange(B), lengths - 1] = 2
    real = np.arange(S)[None] < lengths[:, None]
    ids = np.where(real, ids, PAD)
    with torch.no_grad():
        given = torch.tensor(real.astype(int))
        expected = model.predict_contacts(torch.tensor(ids), given).numpy()
        maps = model(torch.tensor(ids), given, output_attentions=True).attentions

    @jax.jit
    def run(params):
        mask = attention.key_lengths(jnp.asarray(lengths))
        found = esm.predict_contacts(ours, params, jnp.asarray(ids), jnp.asarray(lengths))
        return found, attention_maps(ours, params, jnp.asarray(ids), mask)

    found, drawn = run(params)
    close(found, expected, "contacts")
    for i, x in enumerate(maps):
        rows = np.broadcast_to(real[:, None, :, None], x.shape)
        close(np.asarray(drawn)[:, i][rows], x.numpy()[rows], f"maps {i}")


def test_old_names_and_heads_that_nobody_asks_for_change_nothing(loaded, tmp_path):
    architecture, settings = CASES["bert"]
    *_, params, folder = loaded(architecture, **settings | ONE)
    held = load_file(folder / "model.safetensors")
    held = {
        x.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): y
        for x, y in held.items()
    }
    held["bert.embeddings.position_ids"] = np.arange(64)[None]
    held["bert.pooler.dense.weight"] = held["cls.seq_relationship.weight"] = np.zeros((24, 24))
    held["cls.predictions.decoder.weight"] = held["bert.embeddings.word_embeddings.weight"]
    shutil.copytree(folder, tmp_path / "old")
    save_file(held, tmp_path / "old" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, interop.load(tmp_path / "old")[1], params)
    held["cls.predictions.decoder.weight"] = held["cls.predictions.decoder.weight"] + 1
    save_file(held, tmp_path / "old" / "model.safetensors")
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder\.weight is not"):
        interop.load(tmp_path / "old")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder=True"),
        ("bert", {"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        ("bert", {"layer_scale": 0.1}, "layer_scale=0.1"),
        ("bert", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("albert", {"inner_group_num": 2}, "inner_group_num=2"),
        ("modernbert", {"classifier_bias": True}, "classifier_bias=True"),
        ("esm2", {"is_folding_model": True}, "is_folding_model=True"),
    ],
)
def test_what_is_not_supported_is_named(loaded, tmp_path, name, change, message):
    architecture, settings = CASES[name]
    *_, folder = loaded(architecture, **settings | ONE)
    shutil.copytree(folder, tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        interop.load(tmp_path / "changed")
