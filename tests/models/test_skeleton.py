"""What trains fastest computes the same, and the means of a model reach all of its parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.models import skeleton
from jaxformer.models.decoder import Decoder
from jaxformer.models.encoder import Encoder
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.transformer import ExpertsConfig, LatentConfig, TransformerConfig
from jaxformer.ops import attention, linear
from jaxformer.ops.attention import blocked, flash

CONFIG = TransformerConfig(7, 6, 2, num_heads=4, num_kv_heads=2, head_dim=2, hidden=5)
TOKENS = jnp.arange(14).reshape(2, 7) % 7


@pytest.mark.parametrize(
    ("changes", "causal"),
    [
        ({}, True),
        ({}, False),
        ({"positions": "alibi"}, True),
        ({"positions": "buckets"}, True),
        ({"positions": "buckets"}, False),
        ({"windows": (2, None)}, True),
        ({"windows": (2, None)}, False),
        ({"softcap": 3.0}, True),
        ({"sinks": True}, True),
        ({"sinks": True}, False),
        ({"latent": LatentConfig(4, 3, 3, 5)}, True),
    ],
    ids=str,
)
def test_the_fastest_means_compute_the_same(draw, changes, causal):
    config = dataclasses.replace(CONFIG, **changes)
    kind, means = Decoder if causal else Encoder, skeleton.fastest(config, causal=causal)
    params = draw(kind(config), TOKENS)
    values, fast = (
        jax.jit(jax.value_and_grad(lambda p, m=model: jnp.sin(m.apply(p, TOKENS)).mean()))(params)
        for model in (kind(config), kind(config, *means))
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(y, x, atol=1e-7 + 1e-5 * np.abs(x).max()),
        values,
        fast,
    )
    assert means.project is linear.project_input_first
    in_blocks = causal and not changes
    assert means.attend is (skeleton.attend_causal if in_blocks else flash.attend)


@pytest.mark.parametrize(("length", "way"), [(1024, blocked), (1025, flash)])
def test_a_long_text_is_attended_to_in_memory_linear_in_its_length(length, way):
    q = jax.ShapeDtypeStruct((1, length, 1, 2), jnp.float32)
    whole = getattr(way, "attend_causal" if way is blocked else "attend")
    found, expected = (
        str(jax.make_jaxpr(lambda q, f=f: f(q, q, q, attention.causal()))(q))
        for f in (skeleton.attend_causal, whole)
    )
    assert found == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gated": False},
        {"latent": LatentConfig(4, 3, 3, 5)},
        {"experts": ExpertsConfig(3, 2, 5, shared=4, first=1)},
    ],
    ids=str,
)
def test_all_maps_of_the_blocks_are_projected_but_those_of_routers(changes):
    config, seen = dataclasses.replace(CONFIG, **changes), []

    def project(x, kernel):
        seen.append(kernel.shape)
        return linear.project(x, kernel)

    for kind, count in ((Decoder, 1), (Encoder, 1), (EncoderDecoder, 2)):
        seen.clear()
        model, texts = kind(config, project=project), [TOKENS] * count
        tree = jax.eval_shape(model.init, jax.random.key(0), *texts)["params"]
        kernels = [
            leaf.shape
            for path, leaf in jax.tree.leaves_with_path(tree)
            if path[-1].key == "kernel" and path[-2].key != "router"
        ]
        assert sorted(seen) == sorted(kernels)
        assert seen
