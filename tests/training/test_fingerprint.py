import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer.training import fingerprint

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "bool", "int8", "uint16", "int32"]


def numbers(tree):
    return np.asarray(fingerprint.fingerprints(tree))


def by_hand(array):
    """The weighted sum in Python's exact integers, over the words of the array's bytes."""
    width = min(array.dtype.itemsize, 4)
    words = np.frombuffer(array.tobytes(), f"<u{width}")
    return sum((2 * i + 1) * int(word) for i, word in enumerate(words)) % 2**32


def noise(dtype, *shape):
    bits = np.random.default_rng(7).integers(256, size=(*shape, np.dtype(dtype).itemsize))
    if dtype == "bool":
        return bits[..., 0] > 127
    return bits.astype(np.uint8).view(dtype)[..., 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_weighted_sum_of_the_words(dtype):
    array = noise(jnp.dtype(dtype), 3, 5, 7)
    assert numbers(jnp.asarray(array)) == [by_hand(array)]


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64", "complex128", "complex64"])
def test_numpy_arrays_of_wide_elements_keep_all_their_bits(dtype):
    array = noise(dtype, 3, 5)
    assert numbers(array) == [by_hand(array)]
    assert numbers(array[0, 0]) == [by_hand(array[0, 0])]


def test_jax_arrays_of_64_bits_give_the_number_of_the_numpy_array():
    array = noise("float64", 3, 5)
    with jax.enable_x64(True):
        assert numbers(jnp.asarray(array)) == numbers(array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_is_noticed(dtype):
    array = noise(jnp.dtype(dtype), 2, 3)
    good, content = numbers(array), array.tobytes()
    for bit in range(0, 8 * len(content), 8 if dtype == "bool" else 1):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        changed = np.frombuffer(bytes(flipped), array.dtype).reshape(array.shape)
        assert numbers(changed) != good, f"bit {bit}"


def test_exchanged_elements_and_exchanged_leaves_are_noticed():
    a, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 5.0, 6.0])
    assert numbers(a) != numbers(a[::-1])
    assert (numbers([a, b]) == numbers([b, a])[::-1]).all()
    assert (numbers({"w": a, "b": b}) == numbers([b, a])).all()


def test_minus_zero_and_the_payload_of_a_nan_count():
    assert numbers(jnp.array([0.0])) != numbers(jnp.array([-0.0]))
    nan, other = (np.array([bits], np.uint32).view(np.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert numbers(nan) != numbers(other)


def test_random_keys_are_read_as_their_data():
    key = jax.random.key(3)
    assert numbers(key) == numbers(jax.random.key_data(key))
    assert numbers(key) != numbers(jax.random.key(4))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_no_sharding_changes_it(axis_type):
    array = noise("float32", 8, 24)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    for spec in [P(), P("a"), P("b", "a"), P(("a", "b")), P(None, "b")]:
        assert numbers(jax.device_put(array, NamedSharding(mesh, spec))) == [by_hand(array)]


def test_leaves_without_elements_give_zero_and_empty_trees_nothing():
    assert (numbers([jnp.zeros((0, 3)), jnp.ones(1)]) == [0, 0x3F800000]).all()
    assert numbers({}).shape == (0,)
