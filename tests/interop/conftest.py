"""Tiny models of transformers, scrambled, beside ours."""

import copy

import numpy as np
import pytest

from jaxformer.interop import checkpoint, families, tensors
from jaxformer.interop.settings import Settings


@pytest.fixture(scope="session")
def original():
    """Makes a model of transformers from the name of its class and settings, scrambled."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()

    def made(architecture, seed=0, scale=1.0, **settings):
        kind = getattr(transformers, architecture)
        settings = {"attn_implementation": "eager"} | settings
        config = kind.config_class(**settings)
        torch.manual_seed(seed)
        model = kind(config).eval()
        random = np.random.default_rng(seed)
        with torch.no_grad():
            for name, x in model.named_parameters():
                if not x.requires_grad:
                    continue
                size = scale * (0.5 if x.ndim < 2 else x.shape[-1] ** -0.5)
                noise = torch.tensor(size * random.standard_normal(x.shape), dtype=x.dtype)
                centre = 1.0 if "norm" in name and name.endswith("weight") and x.ndim == 1 else 0.0
                x.copy_(noise + centre)
            for name, x in model.named_buffers():
                if "correction" in name or name == "final_logits_bias":
                    x.copy_(torch.tensor(random.standard_normal(x.shape)))
                if name == "final_logits_bias":
                    x.requires_grad_()
        return model

    return made


@pytest.fixture(scope="session")
def loaded(tmp_path_factory, original):
    """The same model, ours by way of a folder: original, our model, our parameters, the folder."""

    def pair(architecture, change=lambda model: None, **settings):
        model = original(architecture, **settings)
        change(model)
        folder = tmp_path_factory.mktemp("hf")
        model.save_pretrained(folder)
        ours, params = checkpoint.load(folder)
        return model, ours, params, folder

    return pair


@pytest.fixture(scope="session")
def kind_of():
    """The architecture of a checkpoint's folder."""
    return lambda folder: families.family(Settings.read(folder).take("model_type"), "")


@pytest.fixture(scope="session")
def rules_of(kind_of):
    """The rules of a checkpoint's folder."""

    def rules(folder):
        kind, settings = kind_of(folder), Settings.read(folder)
        return list(kind.rules(kind.amend(kind.read(settings), tensors.Tensors(folder))))

    return rules


@pytest.fixture(scope="session")
def close():
    """Checks that numbers differ by at most 1e-5 of the largest."""

    def check(one, other, what, tolerance=1e-5):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert one.shape == other.shape, (what, one.shape, other.shape)
        error, size = np.abs(one - other).max(initial=0), np.abs(other).max(initial=0)
        assert error <= tolerance * size, (what, error / size)

    return check


@pytest.fixture(scope="session")
def gradients(kind_of, rules_of, tmp_path_factory):
    """The gradients of a model of transformers, in our layout."""

    def found(model, folder):
        import torch

        other = copy.deepcopy(model)
        with torch.no_grad():
            for x, y in zip(other.parameters(), model.parameters(), strict=True):
                if y.requires_grad:
                    x.copy_(torch.zeros_like(x) if y.grad is None else y.grad)
            for x, y in zip(other.buffers(), model.buffers(), strict=True):
                x.copy_(torch.zeros_like(x) if y.grad is None else y.grad)
        other.save_pretrained(again := tmp_path_factory.mktemp("gradients"))
        files = tensors.Tensors(again)
        rules = checkpoint.match(kind_of(folder), rules_of(folder), files)
        return {rule.ours: rule.take(list(map(files.read, rule.theirs))) for rule in rules}

    return found
