"""Derivatives and batching of `flash.attend`, the same for all implementations.

An implementation brings `forward` and `backward`, and need know of no transformation. Here they
become a function with a custom tangent. The tangent is one linear primitive: evaluated (forward
mode) it is `_flash_xla.tangent`, transposed (reverse mode) it is the `backward` of the
implementation. Under `vmap` the mapped axis is folded into the batch.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxformer.ops.attention import _flash_xla
from jaxformer.ops.attention._xla_tiles import finite, row_delta
from jaxformer.typing import Array

Tree = Any


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static of a call.

    Attributes:
        implementation: The last word of the name of a module `_flash_...`.
        scale: Factor of the logits; None if it is an operand.
        softcap: Bound of the logits.
    """

    implementation: str
    scale: float | None
    softcap: float | None

    @property
    def module(self) -> ModuleType:
        """The implementation."""
        return importlib.import_module(f"jaxformer.ops.attention._flash_{self.implementation}")

    def options(self, operands: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of an implementation."""
        return {
            "bias": operands["bias"],
            "scale": operands["scale"] if self.scale is None else self.scale,
            "softcap": self.softcap,
            "sinks": operands["sinks"],
        }


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend(call: Call, operands: dict[str, Array | None], mask: Tree) -> tuple[Array, Array]:
    """Attends; gives the result and the logarithm of the sum of exponentials, B T N.

    Args:
        call: What is static.
        operands: "q", "k", "v", "bias", "scale" and "sinks"; None where there is none.
        mask: A canonical mask or None.
    """

    def forward(operands: dict[str, Array | None], mask: Tree) -> tuple[Array, Array]:
        q, k, v = map(operands.__getitem__, "qkv")
        return call.module.forward(q, k, v, mask, **call.options(operands))

    return _folding(forward)(operands, mask)


@functools.partial(attend.defjvp, symbolic_zeros=True)
def _attend_jvp(call: Call, primals: Any, tangents: Any) -> tuple[Any, Any]:
    operands, mask = primals
    out, lse = attend(call, operands, mask)
    moving = {
        name: tangent
        for name, tangent in tangents[0].items()
        if tangent is not None and not isinstance(tangent, SymbolicZero)
    }
    if not moving:
        return (out, lse), (jnp.zeros_like(out), jnp.zeros_like(lse))
    leaves, tree = jax.tree.flatten((operands, mask, out, lse))
    names = tuple(sorted(moving))
    d_out, d_lse = _tangent_p.bind(
        *leaves, *(jnp.asarray(moving[name]) for name in names), call=call, names=names, tree=tree
    )
    return (out, lse), (d_out, d_lse)


# The tangent as a primitive. Operands: the leaves of (operands, mask, out, lse), which it is not
# linear in, then the tangents of `names`.

_tangent_p = Primitive("flash_attention_tangent")
_tangent_p.multiple_results = True


@functools.partial(jax.jit, static_argnames=("call", "names", "tree"))
def _tangent(*flat: Array, call: Call, names: tuple[str, ...], tree: Any) -> list[Array]:
    given, moving = flat[: tree.num_leaves], flat[tree.num_leaves :]
    operands, mask, out, lse = jax.tree.unflatten(tree, given)
    tangents = dict.fromkeys(operands) | dict(zip(names, moving))
    q, k, v = map(operands.__getitem__, "qkv")
    options = call.options(operands)
    return list(_flash_xla.tangent(q, k, v, mask, out, lse, tangents, **options))


def _tangent_shapes(*flat: Any, call: Call, names: tuple[str, ...], tree: Any) -> list[Any]:
    return list(flat[tree.num_leaves - 2 : tree.num_leaves])


def _tangent_transposed(cotangents: Any, *flat: Any, call: Call, names: Any, tree: Any) -> Any:
    given = flat[: tree.num_leaves]
    operands, mask, out, lse = jax.tree.unflatten(tree, given)
    d_out, d_lse = (
        jnp.zeros(x.shape, x.dtype) if isinstance(ct, ad.Zero) else jnp.asarray(ct)
        for ct, x in zip(cotangents, (out, lse))
    )
    found = _pulled(call, names, operands, mask, out, lse, d_out, d_lse)
    return [None] * tree.num_leaves + [found[name] for name in names]


def _tangent_jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    moves = [ad.instantiate_zeros(t) if isinstance(t, ad.Zero) else t for t in tangents]
    plain = functools.partial(_tangent, **params)
    return _tangent_p.bind(*primals, **params), jax.jvp(plain, tuple(primals), tuple(moves))[1]


def _tangent_batched(flat: Any, axes: Any, *, call: Call, names: Any, tree: Any) -> Any:
    size = next(x.shape[axis] for x, axis in zip(flat, axes) if axis is not None)
    batched = [axis is not None for axis in axes]
    flat = [jnp.moveaxis(x, axis, 0) if b else x for x, axis, b in zip(flat, axes, batched)]

    def split(flat: Any) -> tuple[Any, Any]:
        given, moving = flat[: tree.num_leaves], flat[tree.num_leaves :]
        operands, mask, out, lse = jax.tree.unflatten(tree, given)
        tangents = dict(zip(names, moving))
        return {**operands, "out": out, "lse": lse, **_renamed(tangents)}, mask

    def bind(operands: Any, mask: Any) -> tuple[Array, ...]:
        given = {name: operands[name] for name in ("q", "k", "v", "bias", "scale", "sinks")}
        given = jax.tree.leaves((given, mask, operands["out"], operands["lse"]))
        moving = [operands["d_" + name] for name in names]
        return tuple(_tangent_p.bind(*given, *moving, call=call, names=names, tree=tree))

    found = _folded(bind, size, split(batched), *split(flat))
    return found, [0] * len(found)


def _renamed(tangents: dict[str, Any]) -> dict[str, Any]:
    return {"d_" + name: tangent for name, tangent in tangents.items()}


_tangent_p.def_impl(_tangent)
_tangent_p.def_abstract_eval(_tangent_shapes)
mlir.register_lowering(_tangent_p, mlir.lower_fun(_tangent, multiple_results=True))
ad.primitive_transposes[_tangent_p] = _tangent_transposed
ad.primitive_jvps[_tangent_p] = _tangent_jvp
batching.primitive_batchers[_tangent_p] = _tangent_batched


def _pulled(
    call: Call,
    names: tuple[str, ...],
    operands: dict[str, Array | None],
    mask: Tree,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array,
) -> dict[str, Array]:
    """The cotangents of the operands in `names`."""
    demands = {"bias_gradient": "bias" in names, "scale_gradient": "scale" in names}
    # A kernel has no gradient towards the bias or a learned scale: there the loops of XLA do all.
    module = _flash_xla if any(demands.values()) else call.module
    demands = demands if module is _flash_xla else {"bias_gradient": False}

    def backward(run: Callable[..., Any], arrays: dict[str, Any], mask: Tree) -> dict[str, Array]:
        q, k, v, out, lse, d_out, d_lse = (
            arrays[name] for name in ("q", "k", "v", "out", "lse", "d_out", "d_lse")
        )
        options = call.options(arrays)
        found = run(q, k, v, mask, out, lse, d_out, d_lse, **options, **demands)
        named = zip(("q", "k", "v", "bias", "scale"), found)
        return {name: x for name, x in named if x is not None}

    arrays = {**operands, "out": out, "lse": lse, "d_out": d_out, "d_lse": d_lse}
    run = functools.partial(backward, module.backward)
    plain = functools.partial(backward, _flash_xla.backward)
    found = _twice(_folding(run, whole=any(demands.values())), plain)(arrays, mask)
    wanted = {name: x for name, x in operands.items() if name in names and x is not None}
    if "sinks" in wanted:
        delta = row_delta(out, d_out, d_lse, lse.dtype)
        share = jnp.exp(wanted["sinks"].astype(lse.dtype)[None, None] - finite(lse))
        found["sinks"] = -(share * delta).sum((0, 1))
    return {name: found[name].astype(x.dtype).reshape(x.shape) for name, x in wanted.items()}


def _twice(run: Callable[[Any, Any], Any], plain: Callable[[Any, Any], Any]) -> Any:
    """Gives a gradient the derivative of the loops of XLA, `plain`, for second derivatives."""
    f = jax.custom_jvp(lambda arrays, mask: run(arrays, mask))

    @f.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return f(*primals), jax.jvp(plain, primals, tangents)[1]

    return f


# Folding a mapped axis into the batch.

_SIDE = ("bias", "d_bias")
_FIXED = ("scale", "sinks", "d_scale", "d_sinks")


def _folding(f: Callable[[Any, Any], Any], whole: bool = False) -> Callable[[Any, Any], Any]:
    """Gives `f(arrays, mask)` a rule for `vmap`; element by element if `whole`."""
    run = custom_vmap(f)

    @run.def_vmap
    def _(size: int, batched: Any, arrays: Any, mask: Tree) -> Any:
        found = (_one_by_one if whole else _folded)(run, size, batched, arrays, mask)
        return found, jax.tree.map(lambda _: True, found)

    return run


def _folded(
    run: Callable[[Any, Any], Any], size: int, batched: Any, arrays: Any, mask: Tree
) -> Any:
    """Calls `run` once on arrays whose mapped axis, in front, has been joined with the batch."""
    batch = arrays["q"].shape[int(batched[0]["q"])]

    def lead(x: Array, mapped: bool) -> int:
        return x.shape[int(mapped)]

    def simple(x: Any, mapped: Any) -> bool:
        return not mapped or lead(x, mapped) == batch

    side = [(arrays.get(n), batched[0].get(n)) for n in _SIDE if arrays.get(n) is not None]
    side += list(zip(jax.tree.leaves(mask), jax.tree.leaves(batched[1])))
    fixed = any(batched[0].get(name) for name in _FIXED)
    if fixed or not all(simple(x, mapped) for x, mapped in side):
        return _one_by_one(run, size, batched, arrays, mask)

    def fold(x: Array, mapped: bool, may_broadcast: bool) -> Array:
        if not mapped:
            if may_broadcast and lead(x, mapped) == 1:
                return x
            x = jnp.broadcast_to(x[None], (size, *x.shape))
        return x.reshape(size * x.shape[1], *x.shape[2:])

    joined = {
        name: x if x is None or name in _FIXED else fold(x, batched[0][name], name in _SIDE)
        for name, x in arrays.items()
    }
    mask = jax.tree.map(lambda x, mapped: fold(x, mapped, True), mask, batched[1])
    return jax.tree.map(lambda x: x.reshape(size, batch, *x.shape[1:]), run(joined, mask))


def _one_by_one(run: Callable[[Any, Any], Any], size: int, batched: Any, *arrays: Any) -> Any:
    leaves, tree = jax.tree.flatten(arrays)
    mapped = jax.tree.leaves(batched)

    def one(moving: list[Array]) -> Any:
        rest = iter(moving)
        return run(
            *jax.tree.unflatten(tree, [next(rest) if m else x for x, m in zip(leaves, mapped)])
        )

    return lax.map(one, [x for x, m in zip(leaves, mapped) if m])
