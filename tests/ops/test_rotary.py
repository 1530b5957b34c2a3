"""Rotary positions: products know distances only; layouts convert; axes are independent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import testing
from jaxformer.ops import rotary

RANDOM = np.random.default_rng(0)
B, T, N, H = 2, 5, 3, 14
Q = jnp.asarray(RANDOM.standard_normal((B, T, N, H)), jnp.float32)
K = jnp.asarray(RANDOM.standard_normal((B, T, N, H)), jnp.float32)
ROTATE = jax.jit(rotary.rotate, static_argnames=("theta", "interleaved"))
AXIAL = jax.jit(rotary.rotate_axial, static_argnames="theta")


def scores(q, k):
    return np.einsum("BTNH,BSNH->BNTS", np.float64(q), np.float64(k))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_scores_depend_only_on_distance(theta, interleaved):
    def at(start):
        turn = functools.partial(
            ROTATE, positions=start + jnp.arange(T), theta=theta, interleaved=interleaved
        )
        return scores(turn(Q), turn(K))

    # An angle of 1000 radians is known to 2**-24 * 1000 = 6e-5, times |q||k| of about 14.
    np.testing.assert_allclose(at(0), at(1000), atol=2e-3)
    assert np.abs(at(0) - scores(Q, K)).max() > 0.1


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_pair_is_a_complex_number_that_turns(interleaved):
    positions = np.array([[0, 1, 2, 3, 50], [7, 5, 3, 2, 2]])
    pairs = (
        np.float64(Q).reshape(B, T, N, -1, 2)
        if interleaved
        else np.stack(np.split(np.float64(Q), 2, axis=-1), axis=-1)
    )
    angle = positions[..., None, None] * 1000.0 ** (-2 * np.arange(H // 2) / H)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
    parts = [turned.real, turned.imag]
    expected = (
        np.stack(parts, axis=-1).reshape(Q.shape) if interleaved else np.concatenate(parts, axis=-1)
    )
    found = ROTATE(Q, jnp.asarray(positions), theta=1000.0, interleaved=interleaved)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_position_zero_is_left_alone_and_lengths_are_kept():
    turned = ROTATE(Q, jnp.arange(T))
    assert (turned[:, 0] == Q[:, 0]).all()
    norms = [np.linalg.norm(np.asarray(x), axis=-1) for x in (turned, Q)]
    np.testing.assert_allclose(*norms, rtol=1e-6)


def test_agrees_with_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch = pytest.importorskip("torch")
    angle = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)
    angle = torch.tensor(np.concatenate([angle, angle], axis=-1))[None]
    q, k = (torch.tensor(np.float64(x)).transpose(1, 2) for x in (Q, K))
    expected, _ = llama.apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    np.testing.assert_allclose(ROTATE(Q, jnp.arange(T)), expected.transpose(1, 2), atol=1e-5)


def test_layouts_convert_both_ways_and_give_the_same_scores():
    x = jnp.arange(6)
    assert rotary.to_interleaved(x).tolist() == [0, 3, 1, 4, 2, 5]
    assert rotary.to_half_split(x).tolist() == [0, 2, 4, 1, 3, 5]
    assert (rotary.to_half_split(rotary.to_interleaved(Q)) == Q).all()

    half = [ROTATE(x, jnp.arange(T)) for x in (Q, K)]
    neighbours = [ROTATE(rotary.to_interleaved(x), jnp.arange(T), interleaved=True) for x in (Q, K)]
    np.testing.assert_allclose(scores(*half), scores(*neighbours), atol=1e-5)
    np.testing.assert_array_equal(rotary.to_half_split(neighbours[0]), half[0])


def test_converting_the_projection_converts_its_output():
    x = jnp.asarray(RANDOM.standard_normal((T, 4)), jnp.float32)
    weight = jnp.asarray(RANDOM.standard_normal((4, N, H)), jnp.float32)
    project = functools.partial(jnp.einsum, "TD,DNH->TNH", x)
    np.testing.assert_allclose(
        rotary.to_interleaved(project(weight)), project(rotary.to_interleaved(weight)), rtol=1e-6
    )


def test_axial_scores_depend_on_the_offset_along_each_axis():
    x, y = Q[..., :12], K[..., :12]
    grid = jnp.stack(jnp.divmod(jnp.arange(T), 2), axis=-1)
    turned = [
        scores(*(AXIAL(z, grid + jnp.array(shift)[None]) for z in (x, y)))
        for shift in ((0, 0), (11, 3))
    ]
    np.testing.assert_allclose(*turned, atol=1e-4)
    assert np.abs(turned[0] - scores(x, y)).max() > 0.1


def test_each_axis_turns_its_own_share():
    x, grid = Q[..., :12], jnp.asarray(RANDOM.integers(0, 9, (B, T, 3)))
    shares = [ROTATE(x[..., 4 * a : 4 * a + 4], grid[..., a], theta=50.0) for a in range(3)]
    np.testing.assert_allclose(
        AXIAL(x, grid, theta=50.0), jnp.concatenate(shares, axis=-1), atol=1e-6
    )
    one = AXIAL(x, grid[..., :1])
    np.testing.assert_allclose(one, ROTATE(x, grid[..., 0]), atol=1e-6)


@pytest.mark.parametrize("turn", [ROTATE, lambda x, at: AXIAL(x, at[:, None])])
def test_gradients_turn_back(turn):
    _, pull_back = jax.vjp(lambda x: turn(x, jnp.arange(T)), Q)
    np.testing.assert_allclose(pull_back(K)[0], turn(K, -jnp.arange(T)), atol=1e-6)


def test_angles_stay_exact_in_bfloat16():
    turned = ROTATE(Q.astype(jnp.bfloat16), 1000 + jnp.arange(T))
    assert turned.dtype == jnp.bfloat16
    wide = ROTATE(Q.astype(jnp.bfloat16).astype(jnp.float32), 1000 + jnp.arange(T))
    np.testing.assert_allclose(np.float32(turned), wide, rtol=2**-8)


def test_rows_commute_with_reordering():
    positions = jnp.asarray(RANDOM.integers(0, 99, (B, T)))

    def flip(tree):
        return jax.tree.map(lambda a: a[::-1], tree)

    testing.assert_equivariant(lambda a: ROTATE(*a), (Q, positions), flip, flip, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotary.rotate(Q[..., :7], jnp.arange(T)), "H=7"),
        (lambda: rotary.rotate(Q, jnp.arange(T), theta=0.0), "theta=0"),
        (lambda: rotary.rotate(Q, jnp.arange(T + 1)), "T=6.*T=5"),
        (lambda: rotary.rotate(Q, jnp.zeros((3, T), int)), "B=3.*B=2"),
        (lambda: rotary.rotate_axial(Q, jnp.zeros((T, 2), int)), "H=14, A=2"),
        (lambda: rotary.rotate_axial(Q, jnp.zeros((4, 1), int)), "T=4.*T=5"),
        (lambda: rotary.to_half_split(Q[..., :7]), "H=7"),
    ],
)
def test_sizes_that_do_not_fit_are_named_in_the_error(untyped, call, message):
    with pytest.raises(ValueError, match=message):
        call()
