"""The ball flies as mechanics says, and a frame shows exactly where it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ball
from experiments.ball import RADIUS, Box

BOX = Box(side=13, slowest=0.5, fastest=1.7, push=0.6)
draw = jax.jit(ball.sequences, static_argnums=(1, 2), static_argnames=("actions", "box"))
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def free():
    return jax.device_get(draw(KEY, 5, 41, box=BOX))


@pytest.fixture(scope="module")
def pushed():
    return jax.device_get(draw(KEY, 5, 41, actions=ball.pushing, box=BOX))


def bounced(x, v, left, low, high):
    """Flies to the next wall, turns round, and goes on until the time is up."""
    bounces = 0
    while True:
        wall = high if v > 0 else low
        needed = (wall - x) / v if v else np.inf
        if needed > left:
            return x + v * left, v, bounces
        x, v, left, bounces = wall, -v, left - needed, bounces + 1


def test_reflection_is_that_of_a_simulation_from_wall_to_wall():
    rng = np.random.default_rng(0)
    low, high = RADIUS, 13 - RADIUS
    places, speeds = rng.uniform(low, high, 97), rng.normal(0, 23, 97)
    told = [bounced(x, v, 1.0, low, high) for x, v in zip(places, speeds)]
    want_places, want_speeds, bounces = map(np.array, zip(*told))
    assert {0, 1, 2, 3, 4, 5} <= set(bounces)
    got_places, got_speeds = ball.reflect(jnp.asarray(places + speeds), jnp.asarray(speeds), 13)
    np.testing.assert_allclose(got_places, want_places, atol=1e-4)
    np.testing.assert_allclose(got_speeds, want_speeds, rtol=1e-6)


def test_a_long_flight_is_that_of_the_simulation(free):
    for track in free.states.swapaxes(1, 2):
        for x, v in (track[[0, 2]], track[[1, 3]]):
            want = [bounced(x[0], v[0], t, RADIUS, 13 - RADIUS)[0] for t in range(41)]
            np.testing.assert_allclose(x, want, atol=1e-3)


def test_without_pushes_the_energy_stays(free):
    speed = np.hypot(*free.states[..., 2:].T)
    np.testing.assert_allclose(speed, np.broadcast_to(speed[:1], speed.shape), rtol=1e-5)
    assert ((speed >= BOX.slowest - 1e-6) & (speed <= BOX.fastest + 1e-6)).all()
    assert not free.actions.any()


def test_a_push_changes_the_velocity_its_way_and_up_to_the_bound():
    middle = jnp.array([6.5, 6.5, 0.2, -1.5])
    after = ball.step(BOX, jnp.tile(middle[None], (5, 1)), jnp.arange(5))
    want = [[0.2, -1.5], [-0.4, -1.5], [0.8, -1.5], [0.2, -1.7], [0.2, -0.9]]
    np.testing.assert_allclose(after[:, 2:], want, rtol=1e-6)
    np.testing.assert_allclose(after[:, :2], 6.5 + np.array(want), rtol=1e-6)
    fast = ball.step(BOX, jnp.array([6.5, 6.5, 3.0, 0.0]), jnp.array(2))
    np.testing.assert_allclose(fast[2:], [3.0, 0.0])


def test_an_action_leads_from_its_own_frame_to_the_next(pushed):
    states, actions = pushed.states, pushed.actions
    assert set(actions.flat) == set(range(len(ball.PUSHES)))
    after = ball.step(BOX, jnp.asarray(states[:, :-1]), jnp.asarray(actions[:, :-1]))
    np.testing.assert_allclose(states[:, 1:], after, atol=1e-5)
    assert (np.abs(states[..., 2:]) <= BOX.fastest).all()


@pytest.mark.parametrize("motion", ["free", "pushed"])
def test_the_centre_of_mass_of_a_frame_is_the_position(motion, request):
    frames, states, _ = request.getfixturevalue(motion)
    ink, pixels = frames[..., 0], np.arange(13) + 0.5
    total = ink.sum((-2, -1))
    across = (ink.sum(-2) * pixels).sum(-1) / total
    down = (ink.sum(-1) * pixels).sum(-1) / total
    np.testing.assert_allclose(np.stack([across, down], -1), states[..., :2], atol=1e-4)
    np.testing.assert_allclose(total, total.mean(), rtol=1e-5)
    assert frames.shape == (5, 41, 13, 13, 1)
    assert frames.min() >= 0
    assert frames.max() <= 1


def test_the_ball_is_brightest_in_its_middle_and_ends_at_its_radius():
    frame = ball.render(BOX, jnp.array([6.5, 4.5]))[..., 0]
    assert frame[4, 6] == 1.0
    rows, columns = np.nonzero(frame)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 6, 4, 8)


def test_the_gradient_of_a_pixel_is_its_slope():
    pixel = lambda x: ball.render(BOX, jnp.stack([x, jnp.float32(6.1)]))[6, 4, 0]  # noqa: E731
    x, h = jnp.float32(6.2), 0.01
    slope = (pixel(x + h) - pixel(x - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(pixel)(x), slope, rtol=1e-3)
    assert slope < -0.1


def test_the_same_key_gives_the_same_motion_and_another_key_another(free, pushed):
    again = draw(KEY, 5, 41, box=BOX)
    jax.tree.map(np.testing.assert_array_equal, again, free)
    other = draw(jax.random.key(4), 5, 41, box=BOX)
    assert not np.allclose(other.states[:, 0], free.states[:, 0])
    np.testing.assert_array_equal(free.states[:, 0], pushed.states[:, 0])
    assert len(np.unique(free.states[:, 0, 0])) == 5


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (functools.partial(Box, side=6), "side=6"),
        (functools.partial(Box, slowest=2.0), "slowest=2.0"),
        (functools.partial(ball.sequences, KEY, 0, 3), "B=0"),
        (functools.partial(ball.sequences, KEY, 2, 0), "T=0"),
    ],
)
def test_what_cannot_be_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()
