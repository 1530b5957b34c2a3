"""Linear attention: softmax's exponential gives way to a dot product of features, φ(q)·φ(k).

Query t then needs of its past two sums alone, of `φ(k) vᵀ` and of `φ(k)`: the `State`. The forms
are one function: `parallel` draws the T×S weights, `chunked` does so inside chunks and carries the
state from one to the next, `recurrent` carries it from token to token, as `step` does while
decoding. What the feature maps do and do not approximate is in `docs/linear_attention.md`.

    from jaxformer.ops.attention import linear

    y, state = linear.attend(q, k, v, return_state=True)
    y, state = linear.step(q_next, k_next, v_next, state)
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.ops.attention import _linear_chunked, _linear_gpu, _linear_tpu, masks
from jaxformer.ops.attention._xla_tiles import spread
from jaxformer.ops.attention.dense import check_arguments
from jaxformer.typing import Array, DTypeLike, Float, Int, Key

Features: TypeAlias = Callable[[Array], Array]  # from channels H to features F, in the last axis
Implementation: TypeAlias = Literal["tpu", "gpu", "chunked", "parallel", "recurrent"]

_CHUNK = 64  # fastest of 32 to 256 on CPU with heads of 64 channels
_NOTHING = 1e-30  # of weights that sum to less no mean is taken: gradients would overflow


class FeaturePair(NamedTuple):
    """One feature map for queries and another for keys."""

    queries: Features
    keys: Features


class State(NamedTuple):
    """What attention remembers of all keys so far: its size does not depend on how many."""

    matrix: Float[Array, "B K F Hv"]
    total: Float[Array, "B K F"]

    @classmethod
    def empty(
        cls,
        batch: int,
        num_kv_heads: int,
        num_features: int,
        value_dim: int,
        dtype: DTypeLike = jnp.float32,
    ) -> "State":
        """Makes the state before the first key."""
        shape = (batch, num_kv_heads, num_features)
        return cls(jnp.zeros((*shape, value_dim), dtype), jnp.zeros(shape, dtype))


def elu_plus_one(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """Maps x to `elu(x) + 1`: positive everywhere, and no approximation of softmax.

    References:
        Katharopoulos et al. 2020, "Transformers are RNNs", eq. 7. https://arxiv.org/abs/2006.16236
    """
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def relu(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """Maps x to `max(x, 0)`: a query whose features are all zero sees nothing, and gets zeros.

    References:
        Kasai et al. 2021, "Finetuning pretrained transformers into RNNs", section 2.2, without the
        learned matrix. https://arxiv.org/abs/2103.13076
    """
    return jnp.maximum(x, 0)


def taylor(x: Float[Array, "*B H"]) -> Float[Array, "*B F"]:
    """Maps x to features whose dot products are `1 + z + z²/2` with `z = q·k / √H`.

    That is softmax's exponential to second order: close to it for |z| below 1, never below 1/2, and
    far too flat for large z. There are F = (H + 1)(H + 2) / 2 features: meant for few channels.

    References:
        Arora et al. 2024, "Simple linear attention language models balance the recall-throughput
        tradeoff" (Based), section 4.1; they keep all H² products of pairs, we keep each pair once.
        https://arxiv.org/abs/2402.18668
    """
    channels = x.shape[-1]
    first, second = np.triu_indices(channels + 1)
    squares = (first == second) & (first > 0)  # z² has these once, other pairs twice
    # Factors are picked by products with zeros and ones: gathering them is far slower.
    pick = np.eye(channels + 1)
    left, right = pick[:, first] * np.where(squares, 0.5**0.5, 1.0), pick[:, second]
    x = jnp.concatenate([jnp.ones_like(x[..., :1]), x * channels**-0.25], axis=-1)
    one, other = (
        jnp.einsum("...h,hf->...f", x, jnp.asarray(m, x.dtype), precision="highest")
        for m in (left, right)
    )
    return one * other


def positive_random_features(key: Key[Array, ""], head_dim: int, num_features: int) -> FeaturePair:
    """Draws features whose dot products are on average proportional to `exp(q·k / √H)`.

    Feature i of x is `exp(w_i·x - |x|²/2)`, of channels scaled by H^-¼. The rows w_i are normal,
    those of each block of H made orthogonal. So that exponentials do not overflow, factors that the
    quotient of linear attention cancels are taken out:

    * of each query its own largest feature, as softmax does with its logits;
    * of all keys one constant, chosen by the w_i alone such that no key at all can have a feature
      above e⁶⁰. The largest feature of the keys at hand, which the paper's code takes, would let a
      query see keys of its future, and would differ between the parts of a sequence that share a
      state.

    Args:
        key: Of the draw; another one gives an independent approximation.
        head_dim: H of queries and keys.
        num_features: F; the error of a weight falls with its root.

    Raises:
        ValueError: If a size is not positive.

    References:
        Choromanski et al. 2021, "Rethinking attention with Performers", lemma 1 and theorem 2;
        without the paper's ε. https://arxiv.org/abs/2009.14794
    """
    if head_dim < 1 or num_features < 1:
        raise ValueError(f"no random features with {head_dim=} and {num_features=}.")
    for_directions, for_norms = jax.random.split(key)
    blocks = -(-num_features // head_dim)
    rows = jax.random.normal(for_directions, (blocks, head_dim, head_dim))
    turned, triangle = jnp.linalg.qr(rows)
    # With these signs every direction is as likely as any other, else the mean would be biased.
    turned = turned * jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[:, None, :]
    directions = turned.reshape(-1, head_dim)[:num_features]
    norms = jnp.linalg.norm(jax.random.normal(for_norms, directions.shape), axis=-1, keepdims=True)
    projection = directions * norms
    shift = 60 - jnp.square(norms).max() / 2  # w·x - |x|²/2 = |w|²/2 - |w - x|²/2

    def exponents(x: Array) -> Array:
        if x.shape[-1] != head_dim:
            raise ValueError(f"features drawn for H={head_dim} were given H={x.shape[-1]}.")
        x = x * head_dim**-0.25
        rows = jnp.asarray(projection, x.dtype)
        products = jnp.einsum("...h,fh->...f", x, rows, precision=jax.lax.Precision.HIGHEST)
        return products - jnp.square(x).sum(-1, keepdims=True) / 2

    def of_queries(x: Array) -> Array:
        y = exponents(x)
        return jnp.exp(y - jax.lax.stop_gradient(y.max(-1, keepdims=True)))

    def of_keys(x: Array) -> Array:
        return jnp.exp(exponents(x) + jnp.asarray(shift, x.dtype))

    return FeaturePair(of_queries, of_keys)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    feature_map: Features | FeaturePair = elu_plus_one,
    causal: bool = True,
    key_lengths: Int[Array, "B"] | None = None,
    state: State | None = None,
    return_state: bool = False,
    implementation: Implementation | None = None,
    chunk: int | None = None,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], State]:
    """Averages the values at the keys of each query, weighted by φ(q)·φ(k): no softmax, no 1/√H.

    Query head n reads key head `n // (N / K)`. Features, sums and state are float32 (float64 if `q`
    is); the kernels multiply narrow inputs in their own dtype and add in float32. Where the weights
    of a query sum to less than 1e-30 (no keys, or features of zero) it gets zeros, and sends zero
    gradients.

    Gradients reach q, k, v and the state. The chunked form and the kernels have a backward pass of
    their own, which keeps one state a chunk: memory grows with T + S. The other two are
    differentiated by JAX, and have a forward mode too.

    Args:
        q: Queries; N a multiple of K.
        k: Keys.
        v: Values.
        feature_map: φ, from H channels to any number of features; a `FeaturePair` has one of its
            own for queries and keys. Dot products of features must not be negative.
        causal: Whether query t sees keys 0 to t alone, which needs S = T, or all keys.
        key_lengths: Keys from there on are padding: they add nothing, to the state neither.
        state: Of the keys that came before, which every query sees; none if None.
        return_state: Whether to return the state after the last key too.
        implementation: Who computes: a Pallas kernel for TPU or GPU, or one of the plain forms. If
            None, the kernel on TPU where it honours the arguments, else "chunked".
        chunk: Tokens a chunk.

    Returns:
        An array with the dtype of `q`, and the state if asked for.

    Raises:
        ValueError: If shapes disagree, causal attention has other S than T, or `chunk` is below 1.
        NotImplementedError: If the named implementation cannot honour an argument.

    References:
        Katharopoulos et al. 2020, "Transformers are RNNs", eqs. 5, 9 and 12.
        https://arxiv.org/abs/2006.16236
        Sun et al. 2023, "RetNet", section 2.3: the chunked form. https://arxiv.org/abs/2307.08621
    """
    check_arguments(q, k, v)
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"causal linear attention: T={q.shape[1]} is not S={k.shape[1]}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear attention needs chunk >= 1, got {chunk=}.")
    if key_lengths is not None and key_lengths.shape != q.shape[:1]:
        raise ValueError(f"key_lengths have shape {key_lengths.shape}, expected B={q.shape[0]}.")

    form = _choose(implementation, causal, chunk)
    arguments = q, k, v, key_lengths, state
    if form in _KERNELS:
        y, state = _by_kernel(_KERNELS[form], arguments, feature_map, chunk)
    else:
        y, state = _plainly(form, arguments, feature_map, causal, chunk)
    return (y, state) if return_state else y


def step(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K Hv"],
    state: State,
    *,
    feature_map: Features | FeaturePair = elu_plus_one,
) -> tuple[Float[Array, "B N Hv"], State]:
    """Attends from one more token to itself and all before it, as `attend` would at its place.

    Time and memory are those of one pass over the state, wherever in the text the token stands.

    Args:
        q: The token's queries; N a multiple of K.
        k: Its keys.
        v: Its values.
        state: Of the keys before; `State.empty` if there are none.
        feature_map: As for `attend`.

    Returns:
        An array with the dtype of `q`, and the state with this token in it.

    Raises:
        ValueError: If shapes disagree.
    """
    check_arguments(*(x[:, None] for x in (q, k, v)))
    maps = _pair(feature_map)
    queries, keys = _features(maps.queries, q), _features(maps.keys, k)
    _check_state(state, keys.shape[-2:], v)
    state, y = _advance(state, (queries, keys, v.astype(queries.dtype)))
    return y.astype(q.dtype), state


def as_attend(
    feature_map: Features | FeaturePair = elu_plus_one,
    *,
    implementation: Implementation | None = None,
    chunk: int | None = None,
) -> Callable[..., Array]:
    """Makes a function with the signature of `ops.attention.attend`, for the layers' `attend=`.

    It honours no mask, `causal()`, `key_lengths(n)` and `causal() & key_lengths(n)`; anything else,
    and every option of softmax attention, it refuses with NotImplementedError.
    """

    options: Any = {"feature_map": feature_map, "implementation": implementation, "chunk": chunk}

    def mix(
        q: Array,
        k: Array,
        v: Array,
        mask: masks.Mask | None = None,
        *,
        bias: Array | None = None,
        scale: float | Array | None = None,
        softcap: float | None = None,
        sinks: Array | None = None,
    ) -> Array:
        unknown = {"bias": bias, "scale": scale, "softcap": softcap, "sinks": sinks}
        for name, value in unknown.items():
            if value is not None:
                raise NotImplementedError(f"linear attention does not honour {name}.")
        parts = [mask.left, mask.right] if isinstance(mask, masks.And) else [mask]
        causal = masks.causal() in [part for part in parts if isinstance(part, masks.Band)]
        lengths = [part.lengths for part in parts if isinstance(part, masks.FirstKeys)]
        if mask is not None and causal + len(lengths[:1]) != len(parts):
            raise NotImplementedError(
                f"linear attention honours causal() and key_lengths(n) alone, got {mask}."
            )
        lengths = lengths[0] if lengths else None
        y: Any = attend(q, k, v, causal=causal, key_lengths=lengths, **options)
        return y

    return mix


_KERNELS = {"tpu": _linear_tpu.attend, "gpu": _linear_gpu.attend}
_ELEMENTWISE = (elu_plus_one, relu)  # what the kernels compute themselves, to save a pass
_WITHOUT_ARRAYS = (*_ELEMENTWISE, taylor)  # what the loop over chunks computes itself


def _choose(implementation: str | None, causal: bool, chunk: int | None) -> str:
    """The implementation that is to run; refuses what it cannot honour."""
    if implementation is None:
        implementation = "tpu" if causal and jax.default_backend() == "tpu" else "chunked"
    if implementation not in (*_KERNELS, "chunked", "parallel", "recurrent"):
        raise ValueError(f"there is no {implementation=} of linear attention.")
    if not causal and implementation not in ("chunked", "parallel"):
        raise NotImplementedError(f"{implementation=} does not honour {causal=}.")
    if chunk is not None and (implementation in ("parallel", "recurrent") or not causal):
        raise NotImplementedError(f"{implementation=} with {causal=} does not honour {chunk=}.")
    return implementation


def _by_kernel(kernel, arguments: tuple, feature_map, chunk: int | None) -> tuple[Array, State]:
    """Maps the features here, unless the kernel can do so by itself without a pass over memory."""
    q, k, v, key_lengths, state = arguments
    dtype = q.dtype
    if feature_map not in _ELEMENTWISE:
        maps, narrow = _pair(feature_map), jnp.promote_types(dtype, jnp.bfloat16)
        q = _features(maps.queries, q).astype(narrow)
        k = _features(maps.keys, k).astype(narrow)
        feature_map = None
    if state is None:
        state = State.empty(v.shape[0], k.shape[2], k.shape[3], v.shape[3])
    _check_state(state, k.shape[-2:], v)
    lengths = jnp.full(q.shape[:1], k.shape[1]) if key_lengths is None else key_lengths
    y, *parts = kernel(q, k, v, lengths, *state, feature_map=feature_map, chunk=chunk)
    return y.astype(dtype), State(*parts)


def _plainly(
    form: str, arguments: tuple, feature_map, causal: bool, chunk: int | None
) -> tuple[Array, State]:
    if form == "chunked" and causal:
        return _by_chunks(arguments, feature_map, _CHUNK if chunk is None else chunk)
    q, k, v, key_lengths, state = arguments
    maps = _pair(feature_map)
    queries, keys = _features(maps.queries, q), _features(maps.keys, k)
    values = v.astype(queries.dtype)
    if key_lengths is not None:
        real = jnp.arange(k.shape[1])[None] < key_lengths[:, None]
        keys = jnp.where(real[:, :, None, None], keys, 0)
    state = _begun(state, keys.shape[2:], v, queries.dtype)
    if form == "recurrent":
        q_first, k_first, v_first = (x.swapaxes(0, 1) for x in (queries, keys, values))
        state, y = jax.lax.scan(_advance, state, (q_first, k_first, v_first))
        return y.swapaxes(0, 1).astype(q.dtype), state

    # The sum of the weights is one more channel, of values that are all 1.
    values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], -1)
    sums = jnp.concatenate([state.matrix, state.total[..., None]], -1)
    if form == "parallel":
        mixed, sums = _parallel(queries, keys, values, sums, causal)
    else:
        sums = sums + jnp.einsum("BSKF,BSKH->BKFH", keys, values)
        mixed = _read(queries, sums)
    y = _quotient(mixed[..., :-1], mixed[..., -1:])
    return y.astype(q.dtype), State(sums[..., :-1], sums[..., -1])


def _by_chunks(arguments: tuple, feature_map, chunk: int) -> tuple[Array, State]:
    """Pads to whole chunks; maps the features here, unless the loop over chunks can."""
    q, k, v, key_lengths, state = arguments
    dtype, length = q.dtype, q.shape[1]
    wide = jnp.promote_types(dtype, jnp.float32)
    if feature_map not in _WITHOUT_ARRAYS:
        maps = _pair(feature_map)
        q, k, feature_map = _features(maps.queries, q), _features(maps.keys, k), _as_is
    features = jax.eval_shape(feature_map, jax.ShapeDtypeStruct(k.shape[2:], wide))
    state = _begun(state, features.shape, v, wide)
    chunk = max(1, min(chunk, length))
    missing = -length % chunk
    if missing:
        q, k, v = (jnp.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)]) for x in (q, k, v))
        if key_lengths is None:
            key_lengths = jnp.full(q.shape[:1], length)
    options = _linear_chunked.Options(feature_map, chunk, _quotient)
    sums = jnp.concatenate([state.matrix, state.total[..., None]], -1)
    q, k, v, key_lengths, sums = spread((q, k, v, key_lengths, sums))
    found: Any = _linear_chunked.attend(options, q, k, v, key_lengths, sums)
    y, sums = found
    return y[:, :length].astype(dtype), State(sums[..., :-1], sums[..., -1])


def _begun(state: State | None, features: tuple[int, ...], v: Array, dtype) -> State:
    """The state given, or an empty one, for features of shape K F."""
    if state is None:
        kv_heads, num_features = features
        state = State.empty(v.shape[0], kv_heads, num_features, v.shape[3], dtype)
    _check_state(state, features, v)
    return State(*(x.astype(dtype) for x in state))


def _as_is(x: Array) -> Array:
    return x


def _parallel(queries, keys, values, sums, causal: bool) -> tuple[Array, Array]:
    groups = _grouped(queries, keys.shape[2])
    weights = jnp.einsum("BTKGF,BSKF->BKGTS", groups, keys)
    weights = jnp.tril(weights) if causal else weights
    mixed = jnp.einsum("BKGTS,BSKH->BTKGH", weights, values)
    mixed = mixed.reshape(*queries.shape[:3], -1) + _read(queries, sums)
    return mixed, sums + jnp.einsum("BSKF,BSKH->BKFH", keys, values)


def _advance(state: State, token: tuple[Array, Array, Array]) -> tuple[State, Array]:
    """Adds one token, of features B N F and B K F and values B K Hv, and looks from it."""
    q, k, v = token
    matrix = state.matrix + k[..., None] * v[..., None, :]
    total = state.total + k
    groups = q.reshape(*k.shape[:2], -1, k.shape[2])
    mixed = jnp.einsum("BKGF,BKFH->BKGH", groups, matrix)
    weight = jnp.einsum("BKGF,BKF->BKG", groups, total)[..., None]
    return State(matrix, total), _quotient(mixed, weight).reshape(*q.shape[:2], -1)


def _read(queries: Array, sums: Array) -> Array:
    groups = _grouped(queries, sums.shape[1])
    mixed = jnp.einsum("BTKGF,BKFH->BTKGH", groups, sums)
    return mixed.reshape(*queries.shape[:3], -1)


@jax.custom_jvp
def _quotient(mixed: Array, weight: Array) -> Array:
    """A mean from sums; zeros where there is nothing to average."""
    nothing = weight < _NOTHING
    return jnp.where(nothing, 0, mixed / jnp.where(nothing, 1, weight))


@_quotient.defjvp
def _quotient_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]):
    """That of `/`, without the square of a small weight that overflows there."""
    y = _quotient(*primals)
    # Transposed, this is a product; the sum that `y * tangents[1]` becomes takes XLA ten times as
    # long.
    change = jnp.einsum("...h,...->...h", y, tangents[1][..., 0], precision="highest")
    return y, _quotient(tangents[0] - change, primals[1])


def _grouped(queries: Array, kv_heads: int) -> Array:
    """B T K G F."""
    batch, length, heads, features = queries.shape
    return queries.reshape(batch, length, kv_heads, heads // kv_heads, features)


def _pair(feature_map: Features | FeaturePair) -> FeaturePair:
    if isinstance(feature_map, FeaturePair):
        return feature_map
    return FeaturePair(feature_map, feature_map)


def _features(of: Features, x: Array) -> Array:
    y = of(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"a feature map turned {x.shape} into {y.shape}: only H may change.")
    return y


def _check_state(state: State, features: tuple[int, ...], v: Array) -> None:
    expected = (v.shape[0], *features, v.shape[-1])
    for name, x, shape in (
        ("matrix", state.matrix, expected),
        ("total", state.total, expected[:3]),
    ):
        if x.shape != shape:
            raise ValueError(f"the state's {name} has shape {x.shape}, expected {shape}.")
