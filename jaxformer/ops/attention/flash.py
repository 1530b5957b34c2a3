"""Attention without the T×S matrix: one function for every argument on every platform.

For example, in place of `attention.attend`:

    from jaxformer.ops.attention import flash

    y = flash.attend(q, k, v, attention.causal() & attention.key_lengths(lengths))
    print(flash.choose(q, k, v))  # what would compute it here, and why not something else
"""

import dataclasses
from typing import Any, Literal, overload

import jax

from jaxformer.ops.attention import _flash_rules, dense, sparse
from jaxformer.ops.attention._xla_tiles import spread
from jaxformer.ops.attention.dense import check_arguments
from jaxformer.ops.attention.masks import Mask, check_joined
from jaxformer.ops.attention.sparse import merge as merge
from jaxformer.typing import Array, Float

IMPLEMENTATIONS = ("tpu", "gpu", "triton", "xla", "dense")

_HOPPER = ("H100", "H200", "GH200", "H20", "H800")
_BY_PLATFORM = {
    "tpu": ("tpu", "xla"),
    "gpu": ("gpu", "triton", "xla"),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What computes a call of `attend`.

    Attributes:
        implementation: One of `IMPLEMENTATIONS`.
        passed_over: Faster ones that were passed over, each with the reason.
        split: Whether it computes the parts of a sparse pattern.
    """

    implementation: str
    passed_over: dict[str, str]
    split: bool = False

    def __str__(self) -> str:
        name = f"{self.implementation} in parts" if self.split else self.implementation
        reasons = "; ".join(f"not {name}: {why}" for name, why in self.passed_over.items())
        return f"{name} ({reasons})" if reasons else name


@overload
def attend(*args: Any, return_lse: Literal[False] = False, **kwargs: Any) -> Array: ...
@overload
def attend(*args: Any, return_lse: Literal[True], **kwargs: Any) -> tuple[Array, Array]: ...
def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    mask: Mask | None = None,
    *,
    bias: Float[Array, "..."] | None = None,
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    implementation: str | None = None,
    split: bool | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Means what `attention.attend` means, in memory linear in T and S, and faster.

    Differentiable in both modes and twice; under `vmap` the mapped axis joins the batch; under
    `shard_map` each device attends to its own. Rows that may look nowhere give zeros and send zero
    gradients. Softmax and sums are in float32 (float64 if `q` is).

    Args:
        q: Queries; N a multiple of K.
        k: Keys.
        v: Values.
        mask: Who may look where; blocks that it empties cost nothing.
        bias: Added to the logits; of rank up to 4, broadcast to B N T S. It has a gradient.
        scale: Factor of the dot products; H**-0.5 if None. An array has a gradient.
        softcap: Bound on the magnitude of logits before `bias`; none if None.
        sinks: A logit for each head of a key without a value.
        implementation: One of `IMPLEMENTATIONS`; the fastest that `choose` finds if None.
        split: Whether to compute a pattern of `sparse` in parts. None does so where it counts as
            less work, if no implementation is asked for.
        return_lse: Also return the logarithm of each row's sum of exponentials (of the sink too),
            -inf for a row that may look nowhere, so that results over several sets of keys can be
            joined by `merge`. It has a gradient.

    Raises:
        ValueError: If shapes disagree, or there is no such implementation.
        NotImplementedError: If the implementation asked for cannot do this call, or the mask cannot
            be split as asked; the text says why.

    References:
        Dao et al. 2022, "FlashAttention". https://arxiv.org/abs/2205.14135
        Dao 2023, "FlashAttention-2": the gradient from the row's logarithm. https://arxiv.org/abs/2307.08691
    """
    check_arguments(q, k, v, bias=bias, softcap=softcap, sinks=sinks)
    options = {"bias": bias, "scale": scale, "softcap": softcap, "sinks": sinks}
    choice = choose(q, k, v, mask, **options, implementation=implementation, split=split)
    if choice.implementation == "dense" or 0 in (*q.shape, *k.shape, v.shape[3]):
        return dense.attend(q, k, v, mask, **options, return_lse=return_lse)
    operands, mask, fixed = _canonical(q, k, v, mask, bias, scale, sinks)
    kind = sparse.Call if choice.split else _flash_rules.Call
    call = kind(choice.implementation, fixed, softcap)
    out, lse = _flash_rules.attend(call, operands, mask)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def choose(
    q: Any,
    k: Any,
    v: Any,
    mask: Mask | None = None,
    *,
    bias: Any = None,
    scale: Any = None,
    softcap: float | None = None,
    sinks: Any = None,
    implementation: str | None = None,
    split: bool | None = None,
) -> Choice:
    """Says which implementation `attend` takes for these arguments here, and why.

    Args:
        q: Queries, an array or anything with its shape and dtype; the others as in `attend`.
        k: Keys.
        v: Values.
        mask: Who may look where.
        bias: Added to the logits.
        scale: Factor of the dot products.
        softcap: Bound of the logits.
        sinks: A logit for each head.
        implementation: What is asked for, or None.
        split: Whether parts are asked for, or None.

    Raises:
        ValueError: If there is no such implementation.
        NotImplementedError: If the one asked for cannot do this, or there are no parts.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"there is no implementation {implementation!r}; there are {names}.")
    reason = "dense has none" if implementation == "dense" else sparse.refuses(q, k, mask, bias)
    if split is None:
        possible = implementation is None and reason is None
        split = possible and sparse.pays(mask, q.shape[1], platform())
    elif split and reason is not None:
        raise NotImplementedError(f"attend cannot compute parts: {reason}.")
    calls = sparse.calls(q, k, v, mask) if split else [(q, k, v, mask)]
    options = {"bias": bias, "scale": scale, "softcap": softcap, "sinks": sinks}
    passed_over: dict[str, str] = {}
    names = _BY_PLATFORM.get(platform(), ("xla",)) if implementation is None else (implementation,)
    for name in names:
        reasons = [_refusal(name, *call, options) for call in calls]
        reason = next(filter(None, reasons), None)
        if reason is None:
            return Choice(name, passed_over, split)
        passed_over[name] = reason
    raise NotImplementedError(f"attend: {implementation!r} cannot: {reason}.")


def platform() -> str:
    """What is computed on, "cpu", "gpu" or "tpu"; while compiling for other devices, those."""
    kind = _abstract_kind()
    if kind is not None:
        return "tpu" if kind.startswith("TPU") else "gpu" if "NVIDIA" in kind else "cpu"
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is not None:
        return default if isinstance(default, str) else default.platform
    return jax.default_backend()


def _abstract_kind() -> str | None:
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return None if device is None else device.device_kind


def _device_kind() -> str:
    return _abstract_kind() or jax.devices()[0].device_kind


def _refusal(name: str, q: Any, k: Any, v: Any, mask: Any, options: dict[str, Any]) -> str | None:
    if name in ("dense", "xla"):
        return None
    needed, found = "tpu" if name == "tpu" else "gpu", platform()
    if found != needed:
        return f"it needs a {needed.upper()}, this is a {found.upper()}"
    if name == "gpu" and not any(word in _device_kind() for word in _HOPPER):
        return f"it needs a Hopper GPU, this is {_device_kind()!r}"
    try:
        module = _flash_rules.Call(name, None, None).module
    except ImportError as error:
        return str(error)
    return module.refuses(q, k, v, mask, **options)


def _canonical(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | None,
    bias: Array | None,
    scale: float | Array | None,
    sinks: Array | None,
) -> tuple[dict[str, Array | None], Mask | None, float | None]:
    """The operands, all varying over the same axes of `shard_map`; the mask; a static scale."""
    factor = q.shape[3] ** -0.5 if scale is None else scale
    fixed = None if isinstance(factor, jax.Array) else float(factor)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    if mask is not None:
        mask = mask.canonical(q.shape[1], k.shape[1])
        check_joined(mask)
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        for leaf in jax.tree.leaves(mask):
            dense.check_broadcast("mask", leaf.shape, shape)
    operands = {
        "q": q,
        "k": k,
        "v": v,
        "bias": bias,
        "scale": factor if isinstance(factor, jax.Array) else None,
        "sinks": sinks,
    }
    operands, mask = spread((operands, mask))
    return operands, mask, fixed
