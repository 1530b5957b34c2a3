"""Checks for your own functions, and the cases that every implementation of attention must pass.

For example:

    testing.assert_causal(lambda x: model.apply(params, x[None])[0], x)
    testing.assert_equivariant(norm, x, transform_in=shuffle, transform_out=shuffle)
    for case in testing.attention_cases():
        y = attend(**case.inputs())
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.ops import attention
from jaxformer.typing import Array, DTypeLike, Float


def assert_causal(
    f: Callable[[Array], Array], x: Float[Array, "T D"], *, strictly: bool = False
) -> None:
    """Checks by gradient that no output of a sequence function sees its future.

    The derivative of output t must be exactly zero with respect to every later input, and must not
    vanish with respect to input t itself: a function that ignores its input fails. One backward
    pass a position, so keep T small.

    Args:
        f: Maps `T D` to `T ...`.
        x: Where to differentiate.
        strictly: Output t must not see input t either, but must see input t - 1.

    Raises:
        AssertionError: Naming the output and the input at fault.
    """
    y, pull_back = jax.vjp(jax.jit(f), x)
    length = x.shape[0]
    if y.shape[0] != length:
        raise AssertionError(f"assert_causal: T={length} inputs gave T={y.shape[0]} outputs.")
    # Random weights, since a plain sum can hide an influence: softmax sums to 1 whatever it sees.
    probes = np.zeros((length, *y.shape))
    probes[np.arange(length), np.arange(length)] = np.random.default_rng(0).normal(size=y.shape)
    (gradients,) = jax.jit(jax.vmap(pull_back))(jnp.asarray(probes, y.dtype))
    influence = np.abs(np.asarray(gradients, np.float64)).max(axis=-1)  # of input s on output t

    lag = 1 if strictly else 0
    for t in range(length):
        for s in range(max(t + 1 - lag, 0), length):
            if influence[t, s] != 0:
                raise AssertionError(
                    f"output {t} sees input {s}: derivative {influence[t, s]:.3g}."
                )
        if t >= lag and not influence[t, t - lag] > 0:
            raise AssertionError(f"output {t} does not see input {t - lag}.")


def assert_equivariant(
    f: Callable[[Any], Any],
    x: Any,
    transform_in: Callable[[Any], Any],
    transform_out: Callable[[Any], Any],
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> None:
    """Checks that transforming the input transforms the output: `f(in(x)) = out(f(x))`.

    With the identity as `transform_out` it checks invariance.

    Args:
        f: From a tree of arrays to a tree of arrays.
        x: Input; `transform_in` must change it, or the check would check nothing.
        transform_in: What is done to the input.
        transform_out: What ought to happen to the output.
        rtol: Relative tolerance.
        atol: Absolute tolerance.

    Raises:
        AssertionError: If the two differ in structure or values, or `transform_in` changes nothing.
    """
    moved = transform_in(x)
    if jax.tree.all(jax.tree.map(np.array_equal, moved, x)):
        raise AssertionError("assert_equivariant: transform_in left the input as it was.")
    found, expected = f(moved), transform_out(f(x))
    if jax.tree.structure(found) != jax.tree.structure(expected):
        raise AssertionError("assert_equivariant: the outputs differ in structure.")
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(
            np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=rtol, atol=atol
        )


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Sizes and options of one call of `attend`; `dataclasses.replace` makes others of it.

    Attributes:
        name: For test names.
        mask: Makes the mask from the case, so that it follows the sizes; None is no mask.
        batch: B.
        query_length: T.
        key_length: S.
        num_heads: N.
        num_kv_heads: K.
        head_dim: H.
        value_dim: Head size of the values.
        bias: Axes of the bias, a 1 for each of size 1, such as "1NTS"; empty for none.
        scale: Factor of the logits.
        softcap: Bound of the logits.
        sinks: Whether each head has a sink.
        dtype: Of q, k, v and the bias.
    """

    name: str
    mask: "Callable[[AttentionCase], attention.Mask] | None" = None
    batch: int = 3
    query_length: int = 13
    key_length: int = 13
    num_heads: int = 5
    num_kv_heads: int = 5
    head_dim: int = 7
    value_dim: int = 7
    bias: str = ""
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: DTypeLike = jnp.float32

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """Draws the arguments, by name, of one call; the same seed gives the same numbers."""
        random = np.random.default_rng(seed)

        def normal(*shape: int, dtype: DTypeLike = self.dtype) -> Array:
            return jnp.asarray(random.standard_normal(shape, np.float32), dtype)

        keys_shape = (self.batch, self.key_length, self.num_kv_heads)
        sizes = {"1": 1, "B": self.batch, "N": self.num_heads}
        sizes |= {"T": self.query_length, "S": self.key_length}
        bias_shape = [sizes[axis] for axis in self.bias]
        return {
            "q": normal(self.batch, self.query_length, self.num_heads, self.head_dim),
            "k": normal(*keys_shape, self.head_dim),
            "v": normal(*keys_shape, self.value_dim),
            "mask": self.mask(self) if self.mask else None,
            "bias": normal(*bias_shape) if self.bias else None,
            "scale": self.scale,
            "softcap": self.softcap,
            "sinks": normal(self.num_heads, dtype=jnp.float32) if self.sinks else None,
        }


def assert_attention(
    case: AttentionCase,
    attend: Callable[..., tuple[Array, Array]],
    *,
    forward_mode: bool = True,
    slack: float = 1.25,
) -> None:
    """Checks an implementation on a case, outputs and all derivatives, against float64.

    The errors must be at most `slack` times those of `attention.attend` in the same dtype or, where
    those happen to be smaller, one unit in the last place of the largest element (2e-6 of it in
    float32, as sums of some hundred roundings).

    Args:
        case: Sizes and options.
        attend: Takes the arguments of `attention.attend` and `return_lse=True`.
        forward_mode: Whether to check the tangents too.
        slack: How many times the errors of the plain form are allowed.

    Raises:
        AssertionError: Naming the output at fault.
    """
    inputs = case.inputs()
    arrays = {name: x for name, x in inputs.items() if isinstance(x, Array)}
    if case.scale is not None:
        arrays["scale"] = jnp.asarray(case.scale, jnp.float32)
    random = np.random.default_rng(1)
    shape = (*inputs["q"].shape[:3], case.value_dim)

    def drawn(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Numbers that the narrow dtype holds, so that all begin with the same."""
        return np.asarray(jnp.asarray(random.standard_normal(shape), dtype), np.float64)

    d_out, d_lse = drawn(shape, case.dtype), drawn(shape[:3], jnp.float32)
    moves = {name: drawn(x.shape, x.dtype) for name, x in arrays.items()}

    def results(attend: Callable[..., Any], arrays: dict[str, Array]) -> dict[str, Any]:
        def finite(arrays: dict[str, Array]) -> tuple[Array, Array]:
            out, lse = attend(**inputs | arrays, return_lse=True)
            return out, jnp.where(jnp.isinf(lse), 0, lse)

        (out, lse), pull = jax.vjp(finite, arrays)
        (grads,) = pull((jnp.asarray(d_out, out.dtype), jnp.asarray(d_lse, lse.dtype)))
        found = {"out": out, "lse": lse} | {f"d {name}": x for name, x in grads.items()}
        if forward_mode:
            tangents = {name: jnp.asarray(moves[name], x.dtype) for name, x in arrays.items()}
            found["out'"], found["lse'"] = jax.jvp(finite, (arrays,), (tangents,))[1]
        return found

    @jax.jit
    def narrow(arrays: dict[str, Array]) -> Any:
        return results(attend, arrays), results(attention.attend, arrays)

    found, plain = narrow(arrays)
    with jax.enable_x64():
        wide = {name: jnp.asarray(np.float64(x)) for name, x in arrays.items()}
        exact = jax.jit(functools.partial(results, attention.attend))(wide)
    # The slope of a logit is a difference of products as large as this; 1/32 of 2e-6 is a rounding.
    slope = _longest(d_out) * _longest(wide["v"]) / 32 if case.dtype == jnp.float32 else 0.0
    scale = abs(case.head_dim**-0.5 if case.scale is None else case.scale)
    for name, x in found.items():
        if x.dtype != plain[name].dtype:
            raise AssertionError(f"{name} has dtype {x.dtype}, expected {plain[name].dtype}.")
        one, other, truth = (np.asarray(y, np.float64) for y in (x, plain[name], exact[name]))
        size = np.abs(truth).max(initial=1e-2)
        # Sums of terms of both signs, whose roundings do not cancel.
        if name in ("d q", "d k"):
            size += scale * slope * np.abs(wide["k" if name == "d q" else "q"]).max(initial=0)
        if name == "d scale":
            terms = np.asarray(wide["q"]) * np.asarray(exact["d q"]) / scale
            size = max(size, float(np.linalg.norm(terms)))
            size += slope * float(np.linalg.norm(wide["q"]) * np.abs(wide["k"]).max(initial=0))
        if name == "d sinks":
            shares = np.exp(np.asarray(wide["sinks"]) - np.asarray(exact["lse"]))
            terms = shares * ((d_out * np.asarray(exact["out"])).sum(-1) - d_lse)
            size = max(size, float(np.linalg.norm(terms, axis=(0, 1)).max()))
        error, allowed = np.abs(one - truth).max(initial=0), np.abs(other - truth).max(initial=0)
        unit = jnp.finfo(jnp.float32 if name.startswith("lse") else case.dtype).eps
        allowed = max(slack * allowed, size * max(float(unit), 2e-6))
        if not error <= allowed:
            raise AssertionError(f"{name} is off by {error:.3g}, allowed are {allowed:.3g}.")


def attention_cases() -> list[AttentionCase]:
    """Lists what an implementation of attention must get right or refuse.

    Every kind of mask, alone and combined; queries grouped and not; T other than S; every option;
    ragged lengths; rows that may look nowhere; narrow dtypes. Sizes are odd and mostly primes, so
    that neither a swapped axis nor a length that is no multiple of a block goes unnoticed.
    """
    causal, window = attention.causal, attention.window
    case = AttentionCase
    return [
        case("everyone"),
        case("causal", lambda c: causal()),
        case("causal_offset", lambda c: causal(c.key_length - c.query_length), query_length=5),
        case("causal_traced_offset", lambda c: causal(jnp.array(3)), query_length=5),
        case("causal_offset_by_row", lambda c: causal(3 * jnp.arange(c.batch)), query_length=5),
        case("causal_before_the_keys", lambda c: causal(-4)),
        case("window", lambda c: window(3)),
        case("window_both_sides", lambda c: window(3, 1, c.key_length // 3), query_length=7),
        case("window_strict_past", lambda c: window(None, -1)),
        case("window_ahead", lambda c: window(0, None)),
        case("prefix", lambda c: causal() | attention.prefix(_ragged(c))),
        case("key_lengths", lambda c: attention.key_lengths(_ragged(c)), query_length=7),
        case("causal_key_lengths", lambda c: causal() & attention.key_lengths(_ragged(c))),
        case("segments", lambda c: causal() & attention.segments(_ids(c, c.query_length))),
        case("segments_cross", _segments_cross, query_length=7),
        case("local_global", lambda c: causal() & attention.local_global(4)),
        case("local_global_wide", lambda c: attention.local_global(5, 2, 3), query_length=7),
        case("strided", lambda c: causal() & attention.strided(4)),
        case("explicit", lambda c: attention.explicit(_holes(c, "BNTS"))),
        case("explicit_broadcast", lambda c: attention.explicit(_holes(c, "TS"))),
        case("explicit_empty", lambda c: attention.explicit(jnp.zeros((1, 1), bool))),
        case("cross", query_length=7, key_length=17, value_dim=11),
        case("grouped", lambda c: causal(), num_heads=15),
        case("one_key_head", lambda c: window(3), num_kv_heads=1),
        case("one_query", lambda c: attention.key_lengths(_ragged(c)), query_length=1),
        case("one_key", key_length=1),
        case("bias", bias="BNTS"),
        case("bias_by_head", lambda c: causal(), bias="NTS", num_heads=15),
        case("bias_by_key", bias="B11S"),
        case("scale", scale=0.3),
        case("softcap", lambda c: causal(), softcap=1.5),
        case("sinks", lambda c: window(3), sinks=True),
        case("sinks_over_nothing", lambda c: attention.key_lengths(_ragged(c)), sinks=True),
        case("everything_at_once", _everything_at_once, **_EVERYTHING),
        case("bfloat16", lambda c: causal(), dtype=jnp.bfloat16),
        case("float16", _everything_at_once, **_EVERYTHING, dtype=jnp.float16),
    ]


def attention_length_cases() -> list[AttentionCase]:
    """Lists lengths around the sizes of blocks, T and S alike and not."""
    lengths = [(n, n) for n in (1, 7, 63, 64, 65, 127, 1000)] + [(7, 127), (127, 64), (1, 1000)]
    sizes: dict[str, Any] = {"batch": 2, "num_heads": 2, "num_kv_heads": 1}
    sizes |= {"head_dim": 16, "value_dim": 16}
    return [
        AttentionCase(
            f"length_{t}_{s}",
            lambda c: attention.causal(c.key_length - c.query_length),
            query_length=t,
            key_length=s,
            **sizes,
        )
        for t, s in lengths
    ]


def draw_attention_case(seed: int) -> AttentionCase:
    """Draws sizes, options and a formula of up to three masks; a seed always gives the same."""
    random = np.random.default_rng(seed)

    def pick(*choices: Any) -> Any:
        return choices[random.integers(len(choices))]

    t, s = (int(pick(1, 2, 5, 7, 13, 31, 63, 64, 65, 127)) for _ in "ts")
    kv_heads, group = pick(1, 2, 3), pick(1, 1, 2, 5)
    atoms: dict[str, Callable[[AttentionCase], attention.Mask]] = {
        "causal": lambda c: attention.causal(int(c.key_length - c.query_length)),
        "causal by row": lambda c: attention.causal(c.key_length // 3 * jnp.arange(c.batch)),
        "window": lambda c: attention.window(9, 4, c.key_length // 2),
        "past": lambda c: attention.window(None, -1, jnp.array(c.key_length // 4)),
        "ahead": lambda c: attention.window(2, None),
        "lengths": lambda c: attention.key_lengths(_ragged(c)),
        "segments": _segments_cross,
        "blocks": lambda c: attention.local_global(6, 2, 1),
        "strided": lambda c: attention.strided(5),
        "coarse": lambda c: attention.coarse(attention.causal(1), 8, 4),
        "explicit": lambda c: attention.explicit(_holes(c, "BNTS")),
        "explicit by key": lambda c: attention.explicit(_holes(c, "TS")[:1]),
    }
    chosen = [str(name) for name in random.choice(list(atoms), int(pick(0, 1, 1, 2, 2, 3)))]
    joins = [pick("&", "&", "|") for _ in chosen[1:]]

    def mask(case: AttentionCase) -> attention.Mask:
        joined = atoms[chosen[0]](case)
        for join, name in zip(joins, chosen[1:]):
            other = atoms[name](case)
            joined = joined & other if join == "&" else joined | other
        return joined

    words = [chosen[0], *(w for pair in zip(joins, chosen[1:]) for w in pair)] if chosen else []
    head_dim = int(pick(1, 7, 16, 32))
    return AttentionCase(
        f"{seed}: {' '.join(words)}",
        mask if chosen else None,
        batch=int(pick(1, 2, 3)),
        query_length=t,
        key_length=s,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=int(pick(head_dim, head_dim, 5)),
        bias=pick("", "", "", "BNTS", "NTS", "TS", "B11S", "1N1S"),
        scale=pick(None, None, 0.3),
        softcap=pick(None, None, 2.0),
        sinks=bool(pick(False, False, True)),
        dtype=pick(jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16),
    )


_EVERYTHING = {
    "query_length": 7,
    "num_heads": 15,
    "value_dim": 11,
    "bias": "1NTS",
    "scale": 0.5,
    "softcap": 3.0,
    "sinks": True,
}


def _longest(x: Any) -> float:
    return float(np.linalg.norm(x, axis=-1).max(initial=0))


def _everything_at_once(case: AttentionCase) -> attention.Mask:
    seen = attention.causal(case.key_length - case.query_length) & attention.key_lengths(
        _ragged(case)
    )
    return seen & attention.explicit(_holes(case, "TS")) | attention.window(1, 1)


def _segments_cross(case: AttentionCase) -> attention.Mask:
    return attention.segments(_ids(case, case.query_length), _ids(case, case.key_length))


def _ragged(case: AttentionCase) -> Array:
    """One length for each row, from none of the keys to all of them."""
    return jnp.asarray(np.linspace(0, case.key_length, case.batch, dtype=np.int32))


def _ids(case: AttentionCase, length: int) -> Array:
    """Segments of three lengths, different in each row."""
    return jnp.asarray((np.arange(length)[None] + 2 * np.arange(case.batch)[:, None]) // 5)


def _holes(case: AttentionCase, axes: str) -> Array:
    """Booleans at random, with nothing at all for the last query."""
    sizes = {"B": case.batch, "N": case.num_heads, "T": case.query_length, "S": case.key_length}
    holes = np.random.default_rng(7).random([sizes[axis] for axis in axes]) < 0.5
    holes[..., -1, :] = False
    return jnp.asarray(holes)
