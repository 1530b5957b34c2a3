"""Encoder-decoders are those of transformers: logits, hidden states, gradients; cached as uncached.

One compiled function a case gives all of the first, for whole sources and for padded ones.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from jaxformer import interop
from jaxformer.ops import attention

V, B, S, T = 61, 3, 13, 7
T5 = {
    "vocab_size": V,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 40,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 11,
}
BART = {
    "vocab_size": V,
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "max_position_embeddings": 17,
    "pad_token_id": None,  # torch gives its embedding no gradient
    "scale": 0.7,  # of the weights: the terms of gradients through softmax cancel more with larger
}
BART |= {f"{half}_attention_heads": 4 for half in ("encoder", "decoder")}
BART |= {f"{half}_ffn_dim": 40 for half in ("encoder", "decoder")}
MARIAN = BART | {"activation_function": "swish", "scale_embedding": True}
MARIAN |= {"encoder_layers": 2, "decoder_layers": 1}
ONE = {"encoder_layers": 1, "decoder_layers": 1}


def untie(model):
    """T5 1.1 has a head of its own, which transformers 5 makes only of a checkpoint."""
    import torch

    values = np.random.default_rng(5).standard_normal((V, 24)) * 24**-0.5
    model.lm_head.weight = torch.nn.Parameter(torch.tensor(values, dtype=torch.float32))


CASES = {
    "t5": ("T5ForConditionalGeneration", T5, {}),
    "t5_1_1": (
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        | {"num_layers": 1, "num_decoder_layers": 2},
        {"change": untie},
    ),
    "bart": ("BartForConditionalGeneration", BART, {}),
    "bart_untied": (
        "BartForConditionalGeneration",
        BART | ONE | {"scale_embedding": True, "tie_word_embeddings": False},
        {},
    ),
    "marian": ("MarianMTModel", MARIAN, {}),
    "marian_two_tables": (
        "MarianMTModel",
        MARIAN | ONE | {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 53},
        {},
    ),
}  # fmt: skip


@dataclasses.dataclass
class Case:
    """A model of transformers, ours, and what they are asked."""

    theirs: object
    ours: object
    params: dict
    folder: pathlib.Path

    def __post_init__(self):
        random = np.random.default_rng(0)
        words = self.ours.config.decoder_vocab_size or V
        self.source = jnp.asarray(random.integers(0, V, (B, S)))
        self.target = jnp.asarray(random.integers(0, words, (B, T)))
        self.d_logits = random.standard_normal((B, T, words)).astype(np.float32)
        self.run = jax.jit(jax.value_and_grad(self._run, has_aux=True))

    def _run(self, params, real):
        mask = attention.explicit(real[:, None, None])
        seen = {"mutable": ["intermediates"]}
        context, read = self.ours.apply(params, self.source, mask, method="encode", **seen)
        given = (self.target, context, mask)
        logits, written = self.ours.apply(params, *given, method="decode", **seen)
        states = (read["intermediates"]["encoder"]["blocks"], written["intermediates"]["blocks"])
        last = written["intermediates"].get("normed")
        return (logits * self.d_logits).sum(), (logits, context, states, last)


def padding(side):
    """Which tokens of the source exist."""
    if side == "none":
        return np.ones((B, S), bool)
    real = np.arange(S)[None] < np.array([S, S - 4, 1])[:, None]
    return real if side == "right" else real[:, ::-1].copy()


@pytest.fixture(scope="module", params=CASES)
def case(request, loaded):
    architecture, settings, options = CASES[request.param]
    return Case(*loaded(architecture, **options, **settings))


@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_logits_hidden_states_and_gradients(case, close, gradients, side):
    import torch

    model, real = case.theirs, padding(side)
    model.zero_grad()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.grad = None
    out = model(
        torch.tensor(np.asarray(case.source)),
        attention_mask=torch.tensor(real.astype(int)),
        decoder_input_ids=torch.tensor(np.asarray(case.target)),
        output_hidden_states=True,
    )
    (out.logits * torch.tensor(case.d_logits)).sum().backward()
    (_, (logits, context, states, last)), grads = case.run(case.params, real)
    close(logits, out.logits.detach(), "logits")
    close(context, out.encoder_last_hidden_state.detach(), "context")
    for found, theirs in zip(states, (out.encoder_hidden_states, out.decoder_hidden_states)):
        assert len(found) == len(theirs) - 1
        inner = range(len(found) if last is None else len(found) - 1)
        for i in inner:
            close(found[f"layers_{i}"]["stream"][0], theirs[i + 1].detach(), f"hidden {i}")
    if last is not None:
        close(last[0], out.decoder_hidden_states[-1].detach(), "last hidden")
    flat = traverse_util.flatten_dict(grads["params"], sep="/")
    expected = gradients(model, case.folder)
    assert {*flat} == {*expected}
    for name, grad in flat.items():
        close(grad, expected[name], name)


def test_cached_is_uncached(case, close):
    real = padding("left")
    whole = np.asarray(case.run(case.params, real)[0][1][0])
    begin = functools.partial(case.ours.apply, max_length=T, method="begin")
    cache = jax.jit(begin)(
        case.params, case.source, attention.explicit(jnp.asarray(real)[:, None, None])
    )
    step = jax.jit(functools.partial(case.ours.apply, method="step"))
    for counts in ([2, 1, 0], [2, 2, 2], [1, 2, 2], [2, 2, 2], [0, 0, 1]):
        places = np.asarray(cache.length)[:, None] + np.arange(2)
        new = jnp.take_along_axis(case.target, np.minimum(places, T - 1), axis=1)
        logits, cache = step(case.params, new, cache, jnp.array(counts))
        for row, count in enumerate(counts):
            if count:
                close(logits[row, :count], whole[row, places[row, :count]], (row, places[row]))
    assert cache.length.tolist() == [T, T, T]


def test_a_round_trip_is_bit_identical(case, tmp_path):
    interop.save(case.ours, case.params, tmp_path / "again", shard_bytes=9000)
    again, other = interop.load(tmp_path / "again")
    assert again.config == case.ours.config
    jax.tree.map(np.testing.assert_array_equal, case.params, other)
    theirs = type(case.theirs).from_pretrained(tmp_path / "again").state_dict()
    expected = case.theirs.state_dict()
    assert {*theirs} == {*expected}
    unused = {"model.shared.weight"} if case.ours.config.decoder_vocab_size else set()
    for name in {*expected} - unused:
        np.testing.assert_array_equal(theirs[name], expected[name].detach(), err_msg=name)


@pytest.mark.parametrize("bare", ["bart", "marian"])
def test_a_model_without_its_head_has_logits_without_bias(bare, original, tmp_path):
    architecture, settings, _ = CASES[bare]
    model = original(architecture, **settings).model
    model.save_pretrained(tmp_path)
    ours, params = interop.load(tmp_path)
    assert not np.asarray(params["params"]["head_bias"]).any()
    table = dict(model.named_parameters())["shared.weight"]
    np.testing.assert_array_equal(params["params"]["encoder"]["embed"]["table"], table.detach())
    assert ours.config.head_bias


def rewritten(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("t5", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj='tanh' is not supported"),
        ("t5", {"dense_act_fn": "gelu"}, "dense_act_fn='gelu' is not supported"),
        ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder=False is not supported"),
        ("t5", {"wings": 2}, "not supported: wings=2"),
        ("bart", {"decoder_ffn_dim": 41}, "decoder_ffn_dim=41 is not supported"),
        ("bart", {"normalize_before": True}, "normalize_before=True is not supported"),
        ("bart", {"encoder_attention_heads": 5, "decoder_attention_heads": 5}, "multiple of 5"),
        ("marian", {"normalize_embedding": True}, "normalize_embedding=True is not supported"),
        ("marian", {"decoder_vocab_size": 53}, "decoder_vocab_size=53 is not supported"),
    ],
)
def test_settings_that_are_not_supported_are_named(name, changes, message, original, tmp_path):
    architecture, settings, _ = CASES[name]
    original(architecture, **settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        interop.load(rewritten(tmp_path, **changes))


def test_positions_of_marian_that_are_other_waves_are_refused(original, tmp_path):
    architecture, settings, _ = CASES["marian"]
    model = original(architecture, **settings)
    model.save_pretrained(tmp_path)
    name, file = "model.encoder.embed_positions.weight", tmp_path / "model.safetensors"
    waves = model.model.encoder.embed_positions.weight.detach().numpy()
    save_file(load_file(file) | {name: waves}, file)
    interop.load(tmp_path)
    save_file(load_file(file) | {name: waves[:, ::-1].copy()}, file)
    with pytest.raises(ValueError, match=f"{name} holds no sines"):
        interop.load(tmp_path)


def test_a_golden_checkpoint_gives_its_numbers(real_data, close):
    folder = real_data / "hf_tiny" / "t5"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    model, params = interop.load(folder)
    golden = {name: jnp.asarray(x) for name, x in np.load(folder / "io.npz").items()}
    mask = attention.explicit(golden["attention_mask"][:, None, None] > 0)

    @jax.jit
    def run(params):
        context = model.apply(params, golden["input_ids"], mask, method="encode")
        given = (golden["decoder_input_ids"], context, mask)
        logits, seen = model.apply(params, *given, method="decode", mutable=["intermediates"])
        return context, logits, seen["intermediates"]

    context, logits, seen = run(params)
    close(context, golden["encoder_last"], "context")
    close(logits, golden["logits"], "logits")
    close(seen["normed"][0], golden["dec_hidden3"], "last hidden")
    for i in range(2):
        close(seen["blocks"][f"layers_{i}"]["stream"][0], golden[f"dec_hidden{i + 1}"], i)
