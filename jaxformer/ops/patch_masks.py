"""Hiding patches from a model that is to guess them, and showing it the others alone.

Which patches are shown is an array of indices. One that is P or more stands for no patch, so that
images which are shown unequally many fit into one array: such a row is gathered as 0 and goes
nowhere when it is scattered, and `indices < P` tells attention which rows are patches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.typing import Array, Bool, Int, Key, Shaped


class Split(NamedTuple):
    """Patches of images, divided into shown and hidden ones.

    Attributes:
        shown: Their indices, ascending.
        hidden: The indices of the others, ascending.
        mask: True where a patch is hidden.
    """

    shown: Int[Array, "B S"]
    hidden: Int[Array, "B T"]
    mask: Bool[Array, "B P"]

    @property
    def order(self) -> Int[Array, "B P"]:
        """Where each patch lies among the shown ones with the hidden ones behind them.

        `gather_patches(jnp.concatenate([shown, hidden], axis=1), split.order)` restores an image.
        """
        return jnp.argsort(jnp.concatenate([self.shown, self.hidden], axis=1), axis=1)


def hide(key: Key[Array, ""], images: int, patches: int, *, rate: float = 0.75) -> Split:
    """Hides the same share of each image's patches, of all choices each with the same probability.

    Of a masked autoencoder, whose decoder sees a learned vector in place of each hidden patch:

        split = patch_masks.hide(key, *x.shape[:2])
        y = encode(patch_masks.gather_patches(x, split.shown))
        z = decode(patch_masks.scatter_patches(y, split.shown, fill, x.shape[1]))

    Args:
        key: The same gives the same.
        images: B.
        patches: P.
        rate: Share that is hidden; `floor(P * (1 - rate))` are shown.

    Raises:
        ValueError: If `rate` is no share, or none would be shown.

    References:
        He et al. 2022, "Masked autoencoders are scalable vision learners", section 3.
        https://arxiv.org/abs/2111.06377 Its code leaves the shown patches in random order.
    """
    count = int(patches * (1 - rate) + 1e-6)  # 0.1 is (1 - 0.9) in float and a little more
    if not 0 <= rate <= 1 or count < 1:
        raise ValueError(f"hide shows {count} of P={patches} patches at rate={rate}.")
    shuffled = jnp.argsort(jax.random.uniform(key, (images, patches)), axis=1)
    shown, hidden = (jnp.sort(x, axis=1) for x in (shuffled[:, :count], shuffled[:, count:]))
    rows = jnp.arange(images)[:, None]
    return Split(shown, hidden, jnp.zeros((images, patches), bool).at[rows, hidden].set(True))


def gather_patches(
    x: Shaped[Array, "B P *D"], indices: Int[Array, "B S"]
) -> Shaped[Array, "B S *D"]:
    """Takes the patches of each image that its indices name; 0 where an index names none."""
    return jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(x, indices)


def scatter_patches(
    x: Shaped[Array, "B S D"], indices: Int[Array, "B S"], fill: Shaped[Array, "D"], length: int
) -> Shaped[Array, "B {length} D"]:
    """Puts patches where `gather_patches` took them from, and `fill` everywhere else.

    Args:
        x: S patches of each image.
        indices: Where each goes, all different; one that names no patch is left out.
        fill: What stands in the other places, such as a learned vector; takes the dtype of `x`.
        length: P, the patches of the result.
    """
    blank = jnp.broadcast_to(fill.astype(x.dtype), (length, x.shape[-1]))
    return jax.vmap(lambda x, at: blank.at[at].set(x, mode="drop"))(x, indices)
