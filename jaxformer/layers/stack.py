"""Many blocks, one after the other."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.layers.attention import BlockCache, CrossCache, KVCache, StackCache
from jaxformer.layers.block import Make
from jaxformer.typing import Array, DTypeLike, Float, PyTree


class Stack(nn.Module):
    """`num_layers` blocks, either one by one or as one block scanned over its stacked parameters.

    Scanning keeps compile time and program size the same at any depth. Unrolled, a short stack is
    faster on CPU, where XLA runs the body of a loop on one thread. `stack_parameters` and
    `unstack_parameters` turn the parameters of one form into those of the other. The `depth` that
    blocks are told runs from 0 to 1; an only block is told 1.

    Attributes:
        block: Makes a block, called with the arguments of `layers.block.Block`; or a maker for each
            layer, which cannot be scanned.
        num_layers: Blocks.
        scan: Scans; parameters and caches then have a leading axis of `num_layers`.
        remat: Keeps only what enters each block for the backward pass, and computes the rest again.
        policy: What remat may keep besides, from `jax.checkpoint_policies`.
        distinct: How many blocks have parameters of their own, each of which stands for an equal
            run of layers, as in ALBERT; `num_layers` if None.

    References:
        Lan et al. 2020, "ALBERT", section 3.1. https://arxiv.org/abs/1909.11942
    """

    block: Make | tuple[Make, ...]
    num_layers: int
    scan: bool = False
    remat: bool = False
    policy: Callable[..., bool] | None = None
    distinct: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *args: Any,
        cache: StackCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Passes the stream through all blocks.

        Args:
            x: The stream.
            *args: Passed on to every block, as are other keywords.
            cache: From `empty_cache`; with it the new cache is returned too.

        Raises:
            ValueError: If the cache is that of another number of layers, or of the other form, or
                the layers cannot share blocks as they should.
        """
        distinct = self.num_layers if self.distinct is None else self.distinct
        shared = distinct < self.num_layers
        if distinct < 1 or self.num_layers % distinct:
            raise ValueError(f"{self.num_layers} layers cannot share {distinct} blocks equally.")
        if shared and (isinstance(self.block, tuple) or (self.scan and distinct > 1)):
            raise ValueError(f"layers of one kind may share, and scanned ones one block: {self}.")
        if cache is not None:
            _check_cache(cache, self.num_layers, self.scan)
        makers = self.block if isinstance(self.block, tuple) else (self.block,) * self.num_layers
        if len(makers) != self.num_layers or (self.scan and isinstance(self.block, tuple)):
            raise ValueError(
                f"{len(makers)} kinds of blocks for {self.num_layers} layers, {self.scan=}: a maker"
                " for each layer is needed, or one for all; only that one can be scanned."
            )

        def body(block: nn.Module, x: Array, layer: tuple) -> tuple[Array, BlockCache | None]:
            depth, cache = layer
            y = block(x, *args, cache=cache, depth=depth, **kwargs)
            y, cache = y if cache is not None else (y, None)
            block.sow("intermediates", "stream", y)
            return y, cache

        if self.remat:
            body = nn.remat(body, prevent_cse=not self.scan, policy=self.policy)
        depths = np.linspace(1.0, 0.0, self.num_layers, dtype=np.float32)[::-1]
        if self.scan:
            axes: Any = {"intermediates": 0, "attention": 0}
            scanned = nn.scan(
                body,
                variable_axes=axes if shared else axes | {"params": 0},
                variable_broadcast="params" if shared else False,
                split_rngs={"params": not shared, "dropout": True},
                length=self.num_layers,
            )
            x, caches = scanned(makers[0](name="layers"), x, (jnp.asarray(depths), cache))
        else:
            each = [None] * self.num_layers if cache is None else cache
            blocks = [makers[i](name=f"layers_{i}") for i in range(distinct)]
            new = []
            for i, layer in enumerate(zip(depths.tolist(), each)):
                x, updated = body(blocks[i * distinct // self.num_layers], x, layer)
                new.append(updated)
            caches = tuple(new)
        return x if cache is None else (x, caches)


def empty_cache(
    num_layers: int,
    scan: bool,
    batch: int,
    num_kv_heads: int,
    max_length: int | Sequence[int],
    head_dim: int,
    dtype: DTypeLike = jnp.float32,
    *,
    value_dim: int | None = None,
    by_row: bool = False,
) -> StackCache:
    """Makes an empty cache for every block of a Stack; the later sizes are those of one KVCache.

    Raises:
        ValueError: If layers that are scanned have caches of several lengths.
    """
    rooms = [max_length] * num_layers if isinstance(max_length, int) else list(max_length)
    one = functools.partial(KVCache.empty, value_dim=value_dim, by_row=by_row)
    made = tuple(one(batch, num_kv_heads, room, head_dim, dtype) for room in rooms)
    if not scan:
        return made
    if len(set(rooms)) > 1:
        raise ValueError(f"scanned layers have caches of one length, got {rooms}.")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)


def stack_parameters(parameters: PyTree) -> PyTree:
    """Turns parameters `layers_0`, `layers_1`, ... of a Stack into those of a scanned one.

    Raises:
        ValueError: If there is no `layers_0`.
    """
    count = sum(name.startswith("layers_") for name in parameters)
    if not count:
        raise ValueError(f"no layers_0 among {sorted(parameters)}.")
    layers = [parameters[f"layers_{i}"] for i in range(count)]
    return {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_parameters(parameters: PyTree) -> PyTree:
    """Turns the parameters `layers` of a scanned Stack into `layers_0`, `layers_1`, ...

    Raises:
        ValueError: If there is no `layers`.
    """
    if "layers" not in parameters:
        raise ValueError(f"no layers among {sorted(parameters)}.")
    stacked = parameters["layers"]
    count = jax.tree.leaves(stacked)[0].shape[0]
    return {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)}


def _check_cache(cache: StackCache, num_layers: int, scan: bool) -> None:
    stacked = isinstance(cache, (KVCache, CrossCache))
    count = len(cache.length) if stacked else len(cache)
    if stacked != scan or count != num_layers:
        raise ValueError(
            f"a stack with {num_layers=} and {scan=} was given the cache of one with "
            f"num_layers={count} and scan={stacked}."
        )
