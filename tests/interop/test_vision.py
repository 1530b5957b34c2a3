"""Models of images are those of transformers: outputs, gradients, other sizes, hidden patches."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from jaxformer import interop
from jaxformer.interop import families
from jaxformer.interop.settings import Settings
from jaxformer.models.jepa import JEPAConfig
from jaxformer.models.vit import ViT, ViTConfig
from jaxformer.ops import losses, patches, reconstruction
from jaxformer.ops.rope import GridRope

SIZE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_channels": 2}
WIDE = {"image_size": (6, 4), "patch_size": (3, 1)}
SQUARE = {"image_size": 6, "patch_size": 2}
VIT = SIZE | {"intermediate_size": 12}
DINOV2 = SIZE | {"mlp_ratio": 2}
DINOV3 = VIT | WIDE | {"num_register_tokens": 3}
CASES = {
    "vit": ("ViTForImageClassification", VIT | WIDE | {"num_labels": 5}),
    "vit_bare": ("ViTModel", VIT | SQUARE | {"qkv_bias": False, "hidden_act": "gelu_new"}),
    "ijepa": ("IJepaForImageClassification", VIT | WIDE | {"num_labels": 5}),
    "ijepa_bare": ("IJepaModel", VIT | SQUARE | {"num_channels": 1}),
    "dinov2": ("Dinov2ForImageClassification", DINOV2 | SQUARE | {"num_labels": 5}),
    "dinov2_bare": ("Dinov2Model", DINOV2 | SQUARE),
    "dinov2_gated": (
        "Dinov2Model",
        DINOV2 | SQUARE | {"use_swiglu_ffn": True, "use_mask_token": False, "num_channels": 1},
    ),
    "registers": (
        "Dinov2WithRegistersForImageClassification",
        DINOV2 | SQUARE | {"num_labels": 5, "num_register_tokens": 3},
    ),
    "registers_gated": (
        "Dinov2WithRegistersModel",
        DINOV2 | SQUARE | {"use_swiglu_ffn": True, "num_register_tokens": 0},
    ),
    "dinov3": ("DINOv3ViTModel", DINOV3),
    "dinov3_gated": (
        "DINOv3ViTModel",
        DINOV3
        | {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False}
        | {"value_bias": False, "num_register_tokens": 0, "rope_theta": 50.0},
    ),
    "dinov3_keys": ("DINOv3ViTModel", DINOV3 | {"key_bias": True, "num_channels": 1}),
}
MAE = VIT | SQUARE | {f"decoder_{x}": 2 for x in ("num_hidden_layers", "num_attention_heads")}
MAE |= {"decoder_hidden_size": 12, "decoder_intermediate_size": 20}
JEPA = {f"pred_{x}": 2 for x in ("num_hidden_layers", "num_attention_heads", "mlp_ratio")}
JEPA |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 1.5}
JEPA |= {"pred_hidden_size": 12, "pred_num_mask_tokens": 3, "in_chans": 2, "tubelet_size": 2}
JEPA |= {"frames_per_clip": 6, "crop_size": 4, "patch_size": 2}
B, MASKED = 2, ("dinov2_bare", "registers_gated", "dinov3", "dinov3_gated", "dinov3_keys")


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def first(images):
    """Channels before the two axes of an image, as torch has them."""
    import torch

    return torch.tensor(np.moveaxis(np.asarray(images), -1, -3))


def expect_same_gradients(grads, expected, close):
    grads = traverse_util.flatten_dict(grads["params"], sep="/")
    assert {*grads} == {*expected}
    for name, grad in grads.items():
        close(grad, expected[name], name)


def outputs(model, images, **given):
    """What a model of transformers says of tokens and of images, each None if it says nothing."""
    out = model(first(images), **given)
    if "logits" in out:
        return None, out.logits
    return out.last_hidden_state, out.pooler_output


def ours_says(ours, params, images, hidden=None):
    """The same of ours."""
    if ours.config.num_classes:
        return None, ours.apply(params, images, hidden=hidden, method="logits")
    tokens = ours.apply(params, images, hidden=hidden)
    return tokens, ours.apply(params, images, hidden=hidden, method="pooled")


@pytest.fixture(scope="module", params=CASES)
def case(request, loaded):
    """Name, model of transformers, ours, parameters, folder and a compiled function of ours."""
    architecture, settings = CASES[request.param]
    model, ours, params, folder = loaded(architecture, **settings)

    @jax.jit
    def run(params, images, hidden, d):
        def loss(params):
            found = ours_says(ours, params, images, hidden)
            return sum((x * y).sum() for x, y in zip(d, found) if x is not None), found

        (_, found), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return found, grads

    return request.param, model, ours, params, folder, run


def test_outputs_and_gradients(case, close, gradients):
    import torch

    name, model, ours, params, folder, run = case
    images, given, hidden = drawn(B, *ours.config.size, ours.config.channels), {}, None
    if name in MASKED:
        hidden = drawn(B, np.prod(ours.config.grid), seed=1) > 0.3
        given["bool_masked_pos"] = torch.tensor(hidden)
    model.zero_grad()
    expected = outputs(model, images, **given)
    d = [None if x is None else drawn(*x.shape, seed=2) for x in expected]
    sum((x * torch.tensor(y)).sum() for x, y in zip(expected, d) if x is not None).backward()
    found, grads = run(params, images, hidden, d)
    for x, y in zip(found, expected):
        if y is not None:
            close(x, y.detach(), name)
    expect_same_gradients(grads, gradients(model, folder), close)


# transformers interpolates tables of squares alone.
@pytest.mark.parametrize("case", [x for x in CASES if x not in ("vit", "ijepa")], indirect=True)
def test_other_sizes_have_other_positions(case, close):
    import torch

    name, model, ours, params, *_ = case
    rows, columns = ours.config.patch
    images = drawn(B, 5 * rows, 2 * columns, ours.config.channels)
    given = {"interpolate_pos_encoding": True} if name[:3] in ("vit", "ije") else {}
    with torch.no_grad():
        expected = outputs(model, images, **given)
    found = jax.jit(lambda params, images: ours_says(ours, params, images))(params, images)
    for x, y in zip(found, expected):
        if y is not None:
            close(x, y, name)


def read_again(kind, folder):
    """A model of transformers from a folder of ours, which has just what it needs."""
    model, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def expect_same_parameters(one, other):
    for (name, x), y in zip(one.named_parameters(), other.parameters(), strict=True):
        np.testing.assert_array_equal(x.detach().numpy(), y.detach().numpy(), err_msg=name)


def test_a_round_trip_is_bit_identical(case, close, tmp_path):
    import torch

    name, model, ours, params, *_ = case
    interop.save(ours, params, tmp_path / "again", shard_bytes=3000)
    again, other = interop.load(tmp_path / "again")
    assert again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, params, other)
    theirs = read_again(type(model), tmp_path / "again")
    expect_same_parameters(model, theirs)
    images = drawn(B, *ours.config.size, ours.config.channels)
    with torch.no_grad():
        for x, y in zip(outputs(model, images), outputs(theirs, images)):
            if x is not None:
                close(y, x, name)


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "mae"])
def test_names_of_modules_are_read_too(loaded, tmp_path, name):
    architecture, settings = CASES.get(name, ("ViTMAEForPreTraining", MAE))
    model, _, params, folder = loaded(architecture, **settings)
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    names = [{*load_file(x / "model.safetensors")} for x in (folder, tmp_path / "new")]
    assert names[0] != names[1]
    jax.tree.map(np.testing.assert_array_equal, interop.load(tmp_path / "new")[1], params)


def test_a_vit_without_a_pooler_is_a_classifier_of_no_classes(loaded, close, tmp_path):
    import torch

    architecture, settings = CASES["vit_bare"]
    model, ours, params, _ = loaded(architecture, lambda x: setattr(x, "pooler", None), **settings)
    assert not ours.config.pooler
    interop.save(ours, params, tmp_path / "again")
    import transformers

    theirs = read_again(transformers.ViTForImageClassification, tmp_path / "again")
    images = drawn(B, 6, 6, 2)
    with torch.no_grad():
        close(jax.jit(ours.apply)(params, images)[:, 0], theirs(first(images)).logits, "features")
        close(theirs(first(images)).logits, model(first(images)).last_hidden_state[:, 0], "theirs")
    assert interop.load(tmp_path / "again")[0].config == ours.config


def test_a_pooler_beside_a_head_says_nothing(loaded, tmp_path):
    architecture, settings = CASES["vit"]
    *_, params, folder = loaded(architecture, **settings)
    shutil.copytree(folder, tmp_path / "more")
    held = load_file(folder / "model.safetensors")
    held |= {"vit.pooler.dense.weight": drawn(8, 8), "vit.pooler.dense.bias": drawn(8)}
    save_file(held, tmp_path / "more" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, interop.load(tmp_path / "more")[1], params)


def learned(model):
    """Gives a ViTMAE tables of its own, to be trained."""
    import torch

    for seed, (name, x) in enumerate(model.named_parameters()):
        if name.endswith(("position_embeddings", "pos_embed")):
            x.requires_grad_()
            with torch.no_grad():
                x.copy_(torch.tensor(drawn(*x.shape, seed=seed)))


def waves(model):
    """Gives a ViTMAE the tables of the published ones, by transformers' own formula."""
    import torch
    from transformers.models.vit_mae import modeling_vit_mae

    for name, x in model.named_parameters():
        if name.endswith(("position_embeddings", "pos_embed")):
            table = modeling_vit_mae.build_2d_sinusoidal_position_embedding(
                3, 3, x.shape[-1], cls_token=True
            )
            rows, columns = table.chunk(2, dim=-1)
            with torch.no_grad():
                x.copy_(torch.cat([columns, rows], dim=-1)[None])


@pytest.mark.parametrize(("tables", "normalised"), [(learned, True), (waves, False)])
def test_masked_autoencoders(loaded, close, gradients, tmp_path, tables, normalised):
    import torch

    settings = MAE | {"norm_pix_loss": normalised}
    model, ours, params, folder = loaded("ViTMAEForPreTraining", tables, **settings)
    positions = "learned" if tables is learned else "sinusoidal"
    assert {ours.config.encoder.positions, ours.config.decoder.positions} == {positions}
    images, noise = drawn(B, 6, 6, 2), drawn(B, 9, seed=1)
    out = model(first(images), noise=torch.tensor(noise))
    out.loss.backward()
    keep, hide = np.split(noise.argsort(axis=1), [2], axis=1)

    @jax.jit
    def run(params, images, keep, hide, hidden):
        def loss(params):
            told = ours.apply(params, images, keep, hide)
            wanted = patches.patchify(images, (2, 2))
            if normalised:
                wanted = reconstruction.normalised_patches(wanted)
            return losses.masked_mean(reconstruction.squared_error(told, wanted), hidden), told

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, told), grads = run(params, images, keep, hide, out.mask.numpy() > 0)
    close(told, out.logits.detach(), "pixels")
    close(loss, out.loss.detach(), "loss")
    expect_same_gradients(grads, gradients(model, folder), close)
    interop.save(ours, params, tmp_path / "again")
    assert interop.load(tmp_path / "again")[0].config == ours.config
    theirs = read_again(type(model), tmp_path / "again")
    with torch.no_grad():
        again = theirs(first(images), noise=torch.tensor(noise)).logits
    close(again, out.logits.detach(), "again")


@pytest.mark.parametrize("tables", [learned, waves])
def test_the_encoder_of_a_masked_autoencoder(loaded, close, tmp_path, tables):
    import torch

    model, ours, params, _ = loaded("ViTMAEModel", tables, **MAE)
    assert isinstance(ours, ViT)
    images, noise = drawn(B, 6, 6, 2), drawn(B, 9, seed=1)
    with torch.no_grad():
        expected = model(first(images), noise=torch.tensor(noise)).last_hidden_state
    keep = noise.argsort(axis=1)[:, :2]
    found = jax.jit(lambda params, images, keep: ours.apply(params, images, keep=keep))
    close(found(params, images, keep), expected, "tokens")
    interop.save(ours, params, tmp_path / "again", model_type="vit_mae")
    theirs = read_again(type(model), tmp_path / "again")
    with torch.no_grad():
        again = theirs(first(images), noise=torch.tensor(noise)).last_hidden_state
    close(again, expected, "again")


def test_a_jepa_of_clips(loaded, close, gradients, tmp_path):
    import torch

    model, ours, params, folder = loaded("VJEPA2Model", **JEPA)
    clips = drawn(B, 6, 4, 4, 2)
    order = drawn(B, 12, seed=1).argsort(axis=1)
    keep, targets = order[:, :5], order[:, 5:10]
    given = {"context_mask": [torch.tensor(keep)], "target_mask": [torch.tensor(targets)]}
    out = model(first(clips), **given)
    expected = out.last_hidden_state, out.predictor_output.last_hidden_state
    d = [drawn(*x.shape, seed=2) for x in expected]
    sum((x * torch.tensor(y)).sum() for x, y in zip(expected, d)).backward()

    @jax.jit
    def run(params, clips, keep, targets):
        def loss(params):
            seen = ours.apply(params, clips, method="encode")
            chosen = jnp.take_along_axis(seen, keep[..., None], axis=1)
            told = ours.apply(params, chosen, keep, targets, which=1, method="predict")
            return (seen * d[0]).sum() + (told * d[1]).sum(), (seen, told)

        (_, found), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return found, grads

    found, grads = run(params, clips, keep, targets)
    for name, x, y in zip(("encoder", "predictor"), found, expected):
        close(x, y.detach(), name)
    expect_same_gradients(grads, gradients(model, folder), close)
    interop.save(ours, params, tmp_path / "again")
    assert interop.load(tmp_path / "again")[0].config == ours.config
    expect_same_parameters(model, read_again(type(model), tmp_path / "again"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vit", {"architectures": ["ViTForMaskedImageModeling"]}, "ViTForMaskedImageModeling"),
        ("vit", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("vit", {"pooler_act": "relu"}, "pooler_act='relu'"),
        ("vit", {"head_dim": 3}, "head_dim=3"),
        ("vit", {"image_size": [6, 5], "patch_size": 4}, "4×4 do not divide an image of 6×5"),
        ("vit", {"patch_size": [1, 1]}, r"windows of \(2, 3, 1\), expected \(2, 1, 1\)"),
        ("vit", {"num_channels": 3}, r"windows of \(2, 3, 1\), expected \(3, 3, 1\)"),
        ("vit", {"image_size": [3, 4]}, r"position_embeddings has shape \(1, 9, 8\), expected"),
        ("vit", {"id2label": {"0": "cat"}}, r"classifier.weight makes \(8, 5\), not \(8, 1\)"),
        ("vit", {"num_hidden_layers": 3}, r"missing: .*encoder\.layer\.2"),
        ("dinov2", {"use_mask_token": False}, r"surplus: .*mask_token"),
        ("dinov2_gated", {"use_swiglu_ffn": False}, r"missing: .*mlp\.fc1"),
        ("registers_gated", {"num_register_tokens": 2}, r"register_tokens has shape \(1, 0, 8\)"),
        ("dinov3", {"key_bias": True, "query_bias": False, "value_bias": False}, "key_bias=True"),
        ("dinov3", {"value_bias": False}, "value_bias=False"),
        ("dinov3", {"proj_bias": False}, "proj_bias=False"),
        ("dinov3", {"num_register_tokens": 0}, r"register_tokens is not"),
        ("mae", {"patch_size": [2, 3]}, r"a ViTMAE is of squares alone, got \(2, 3\)"),
        ("jepa", {"use_SiLU": True}, "use_SiLU=True"),
        ("jepa", {"architectures": ["VJEPA2ForVideoClassification"]}, "VideoClassification"),
    ],
)
def test_what_does_not_fit_is_named(loaded, tmp_path, name, change, message):
    more = {"mae": ("ViTMAEForPreTraining", MAE), "jepa": ("VJEPA2Model", JEPA)}
    architecture, settings = (CASES | more)[name]
    *_, folder = loaded(architecture, **settings)
    shutil.copytree(folder, tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        interop.load(tmp_path / "changed")


def test_a_sinusoid_that_is_none_is_a_parameter(loaded, tmp_path):
    _, ours, params, folder = loaded("ViTMAEForPreTraining", waves, **MAE)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    interop.save(ours, narrow, tmp_path / "narrow")
    again, found = interop.load(tmp_path / "narrow")
    assert again == ours
    jax.tree.map(np.testing.assert_array_equal, narrow, found)
    shutil.copytree(folder, tmp_path / "changed")
    path = tmp_path / "changed" / "model.safetensors"
    held = load_file(path)
    held["decoder.decoder_pos_embed"][0, 4, 5] += 1e-3
    save_file(held, path)
    ours, params = interop.load(tmp_path / "changed")
    assert ours.config.encoder.positions == "sinusoidal"
    assert ours.config.decoder.positions == "learned"
    assert params["params"]["decoder"]["places"]["table"].shape == (10, 12)


def test_a_ratio_that_is_no_binary_fraction_comes_back():
    rope = GridRope(10_000.0, unit=1.0, interleaved=True)
    choices = {"class_token": False, "pool": "mean", "positions": "rotary", "rope": rope}
    encoder = ViTConfig((2, 4, 4), (2, 2, 2), 1, 88, 1, 2, 120, **choices)
    config = JEPAConfig.of(encoder, 24, 1, 2, positions="rotary")
    assert int(88 * (120 / 88)) == 119
    kind = families.family("vjepa2", "")
    assert kind.read(Settings(kind.write(config))) == config


@pytest.mark.parametrize(
    "choices",
    [
        {"pooler": True, "num_classes": 3},
        {"positions": "none"},
        {"layer_scale": 1.0, "hidden": 13, "mask_token": True},
        {"class_token": False, "pool": "mean", "registers": 1},
    ],
)
def test_what_no_architecture_says_is_not_written(draw, tmp_path, choices):
    config = ViTConfig((4, 4), (2, 2), 1, 8, 1, 2, choices.pop("hidden", 8), **choices)
    model = ViT(config)
    params = draw(model, jnp.zeros((1, 4, 4, 1)), method="pooled")
    with pytest.raises(ValueError, match="cannot say what the model's config says"):
        interop.save(model, params, tmp_path / "odd")
