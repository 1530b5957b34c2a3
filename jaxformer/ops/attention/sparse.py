"""Attention under the patterns of Child et al. 2019 at a cost of n√n instead of n².

A pattern touches almost every tile that a kernel would compute: each of them holds a column of
summaries, or a multiple of the stride. So it is cut into parts whose keys are disjoint and which
are full once their rows are put together. `flash.attend` computes them, where that is less work,
as if they were the whole: forward each for itself, joined by `merge`; backward each from the
logarithmic sum of the whole, so that nothing but their gradients has to be added up.

    from jaxformer.ops import attention
    from jaxformer.ops.attention import flash

    y = flash.attend(q, k, v, attention.local_global(64) & attention.causal())
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer.ops.attention import _flash_rules, blocks, masks
from jaxformer.ops.attention.masks import Mask
from jaxformer.typing import Array, Float

_MOVED = 96  # pairs computed in the time of copying a position into a part and back, on CPU
_STEP = {"tpu": 1 << 17, "gpu": 1 << 14}  # pairs computed in the time that an empty tile takes


class Split(NamedTuple):
    """A pattern that can be cut.

    Attributes:
        block: Length of a block, or the stride.
        summary: Summaries at the end of each block; 0 if the pattern is strided.
        causal: Whether no query looks ahead.
        lengths: Arrays of the keys of each row of the batch; the least holds.
    """

    block: int
    summary: int
    causal: bool
    lengths: tuple[Any, ...] = ()


class Part(NamedTuple):
    """Some of the keys of each query, as a smaller attention.

    Attributes:
        rows: Rows of its batch for each row of the whole batch.
        queries: Queries in a row.
        keys: Keys in a row.
        mask: Who may look where in a row, as far as it holds no arrays.
    """

    rows: int
    queries: int
    keys: int
    mask: Mask | None


def splits(mask: Mask | None) -> Split | None:
    """Recognises `local_global` and `strided`, and either joined by `&` to causal and key lengths.

    Returns:
        None for every other mask, and for those with an offset; so it serves as a condition.
    """
    atoms = _atoms(mask)
    lengths = tuple(atom.lengths for atom in atoms if isinstance(atom, masks.FirstKeys))
    atoms = [atom for atom in atoms if not isinstance(atom, masks.FirstKeys)]
    if jax.tree.leaves(atoms):
        return None
    patterns = [atom for atom in atoms if atom != masks.causal()]
    if len(patterns) != 1 or not isinstance(patterns[0], masks.Or):
        return None
    causal, rest = len(atoms) > 1, patterns[0].right
    if isinstance(rest, masks.Summaries):
        expected = masks.local_global(rest.block, rest.count)
        found = Split(rest.block, rest.count, causal, lengths)
    elif isinstance(rest, masks.Stride):
        expected, found = masks.strided(rest.stride), Split(rest.stride, 0, causal, lengths)
    else:
        return None
    return found if patterns[0] == expected else None


def _atoms(mask: Any) -> list[Any]:
    """What `&` joins."""
    return [*_atoms(mask.left), *_atoms(mask.right)] if isinstance(mask, masks.And) else [mask]


def refuses(q: Any, k: Any, mask: Mask | None, bias: Any) -> str | None:
    """Says why an attention cannot be computed in parts, or None if it can."""
    if splits(mask) is None:
        return (
            "only local_global and strided without offset have parts, alone or joined by & with "
            "causal() and key_lengths"
        )
    if q.shape[1] != k.shape[1]:
        return f"parts need S=T, got T={q.shape[1]}, S={k.shape[1]}"
    return None if bias is None else "parts have no bias"


def parts(mask: Mask | None, length: int) -> dict[str, Part]:
    """Cuts a pattern over `length` positions into attentions that share no pair.

    "own" is each block by itself. Then there are the "summaries" of other blocks; or what the band
    reaches of the blocks "before" and "after", and the "columns" of positions that are equal modulo
    the stride. A mask that does not split is one part, the "whole".
    """
    split = splits(mask)
    if split is None:
        return {"whole": Part(1, length, length, mask)}
    count, block = -(-length // split.block), min(split.block, length)
    plan = {"own": Part(count, block, block, masks.causal() if split.causal else None)}
    if count < 2:
        return plan
    past, future = masks.window(None, -1), masks.window(-1, None)
    others = past if split.causal else past | future
    if split.summary:
        keys = (count - 1) * split.summary
        if not split.causal:
            keys += max(length - count * block + split.summary, 0)
        seen = masks.coarse(others, block, split.summary)
        return plan | {"summaries": Part(1, length, keys, seen)}
    # Position i of a block lies less than a stride behind position j of the next if j < i.
    plan["before"] = Part(count - 1, block, block, future)
    if not split.causal:
        plan["after"] = Part(count - 1, block, block, past)
    return plan | {"columns": Part(block, count, count, others)}


def calls(q: Any, k: Any, v: Any, mask: Mask | None) -> list[tuple[Any, Any, Any, Mask | None]]:
    """The shapes of q, k and v, and the static mask, of each part."""

    def like(x: Any, rows: int, length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((x.shape[0] * rows, length, *x.shape[2:]), x.dtype)

    return [
        (like(q, rows, queries), like(k, rows, keys), like(v, rows, keys), mask)
        for rows, queries, keys, mask in parts(mask, q.shape[1]).values()
    ]


def flops(mask: Mask | None, length: int, head_dim: int, *, block: int = 512) -> int:
    """Counts what both products of one head take, forward, in the tiles that are not empty.

    A tile is `block` queries by `block` keys, or what there is of them; all of it is computed, at
    4·H operations a pair. A mask that does not split is counted as a whole.

    Args:
        mask: Who may look where; what its arrays say is disregarded.
        length: T and S.
        head_dim: H of keys and of values.
        block: Side of a tile.
    """
    tiles = (_tiles(part, block) for part in parts(mask, length).values())
    return 4 * head_dim * sum(count * pairs for count, pairs in tiles)


def pays(mask: Mask | None, length: int, platform: str) -> bool:
    """Says whether the parts of a mask that splits count as less work than the whole.

    Args:
        mask: Who may look where.
        length: T and S.
        platform: "cpu", "gpu" or "tpu".
    """
    plan = parts(mask, length)
    if len(plan) < 2:
        return False

    def work(part: Part) -> int:
        count, pairs = _tiles(part, 512)
        return count * (pairs + _STEP.get(platform, 0))

    moved = _MOVED * length * len(plan)
    return sum(map(work, plan.values())) + moved < work(Part(1, length, length, mask))


def _tiles(part: Part, block: int) -> tuple[int, int]:
    """Tiles that are not empty, and pairs in a tile."""
    queries, keys = min(block, part.queries), min(block, part.keys)
    kinds = blocks.kinds(part.mask, part.queries, part.keys, queries, keys, static=True)
    return part.rows * int((kinds[0, 0] != blocks.SKIP).sum()), queries * keys


@dataclasses.dataclass(frozen=True)
class Call(_flash_rules.Call):
    """A call in parts: itself an implementation, by means of that which it names."""

    @property
    def module(self) -> Any:
        return self

    def forward(
        self, q: Array, k: Array, v: Array, mask: Mask, *, sinks: Array | None, **options: Any
    ) -> tuple[Array, Array]:
        """Attends; also gives the logarithm of the sum of exponentials of each row, B T N."""
        cut = _Cut(mask, *q.shape[:2])
        found = []
        for name in cut.plan:
            options["sinks"] = sinks if name == "own" else None
            keys, values = cut.keys(name, k), cut.keys(name, v)
            out, lse = super().module.forward(
                cut.queries(name, q), keys, values, cut.mask(name), **options
            )
            found.append((cut.joined(name, out), cut.joined(name, lse, -jnp.inf)))
        return merge(*found)

    def backward(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Mask,
        out: Array,
        lse: Array,
        d_out: Array,
        d_lse: Array,
        **options: Any,
    ) -> tuple[Array, Array, Array, None]:
        """Pulls cotangents of `out` and `lse` back to q, k and v; they are summed in float32."""
        cut = _Cut(mask, *q.shape[:2])
        sums = [jnp.zeros(x.shape, lse.dtype) for x in (q, k, v)]
        for name in cut.plan:
            taken = [jax.vjp(functools.partial(cut.keys, name), x) for x in (k, v)]
            (keys, pull_keys), (values, pull_values) = taken
            rows = [cut.queries(name, x) for x in (out, lse, d_out, d_lse)]
            d_q, d_k, d_v, *_ = super().module.backward(
                cut.queries(name, q), keys, values, cut.mask(name), *rows, **options
            )
            more = cut.joined(name, d_q), *pull_keys(d_k), *pull_values(d_v)
            sums = [x + y.astype(x.dtype) for x, y in zip(sums, more)]
        d_q, d_k, d_v = (x.astype(y.dtype) for x, y in zip(sums, (q, k, v)))
        return d_q, d_k, d_v, None


class _Cut:
    """Takes the rows of a part out of arrays B T ..., and puts them back."""

    def __init__(self, mask: Mask, batch: int, length: int) -> None:
        split = splits(mask)
        assert split is not None
        self.split, self.plan = split, parts(mask, length)
        self.batch, self.length = batch, length
        self.count, self.block = self.plan["own"][:2]

    def _blocks(self, x: Array) -> Array:
        x = _padded(x, 0, self.count * self.block - self.length)
        return x.reshape(self.batch, self.count, self.block, *x.shape[2:])

    def queries(self, name: str, x: Array) -> Array:
        """B T ... to B·(rows) (queries) ...; what there is not is 0."""
        if name == "summaries":
            return x
        x = self._blocks(x)[:, _QUERIES.get(name, slice(None))]
        x = x.swapaxes(1, 2) if name == "columns" else x
        return x.reshape(-1, *x.shape[2:])

    def keys(self, name: str, x: Array) -> Array:
        """B S ... to B·(rows) (keys) ...; what there is not is 0."""
        x = self._blocks(x)[:, _KEYS.get(name, slice(None))]
        if name == "summaries":
            x = x[:, :, self.block - self.split.summary :]
            x = x.reshape(self.batch, 1, -1, *x.shape[3:])[:, :, : self.plan[name].keys]
        x = x.swapaxes(1, 2) if name == "columns" else x
        return x.reshape(-1, *x.shape[2:])

    def joined(self, name: str, x: Array, missing: float = 0.0) -> Array:
        """The converse of `queries`; queries that the part lacks get `missing`."""
        x = x.reshape(self.batch, -1, *x.shape[1:])
        x = x.swapaxes(1, 2) if name == "columns" else x
        x = _padded(x, int(name == "before"), int(name == "after"), missing)
        return x.reshape(self.batch, -1, *x.shape[3:])[:, : self.length]

    def mask(self, name: str) -> Mask | None:
        """Who may look where in a part, which hides keys that are padding."""
        mask, split = self.plan[name].mask, self.split
        if not split.lengths and (split.causal or self.length == self.count * self.block):
            return mask
        real = jnp.ones((self.batch, self.length), bool)
        for lengths in split.lengths:
            real = real & (jnp.arange(self.length)[None] < lengths.reshape(-1, 1))
        real = masks.key_lengths(self.keys(name, real).sum(1))
        mask = real if mask is None else mask & real
        return mask.canonical(*self.plan[name][1:3])


# The blocks that have another before or after them, and these others.
_QUERIES = {"before": slice(1, None), "after": slice(-1)}
_KEYS = {"before": slice(-1), "after": slice(1, None)}


def _padded(x: Array, before: int, after: int, value: float = 0.0) -> Array:
    """Lengthens the second axis."""
    widths = [(before, after) if axis == 1 else (0, 0) for axis in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if before or after else x


def merge(*parts: tuple[Array, Array]) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Joins results over disjoint sets of keys, each with its `lse`, to that over all of them.

    Args:
        *parts: Pairs (out, lse) as `flash.attend(..., return_lse=True)` returns them.

    Returns:
        Such a pair.
    """
    outs, lses = zip(*parts)
    top = lses[0]
    for lse in lses[1:]:
        top = jnp.maximum(top, lse)
    top = lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    shares = [jnp.exp(lse - top) for lse in lses]
    total = sum(shares[1:], shares[0])
    divisor = jnp.where(total == 0, 1, total)
    mixed = sum(share[..., None] * out.astype(share.dtype) for share, out in zip(shares, outs))
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(divisor))
    return (mixed / divisor[..., None]).astype(outs[0].dtype), lse
