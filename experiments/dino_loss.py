"""What a student learns from its teacher, for `experiments/dino.py`."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments import dino_views, vision
from jaxformer.models.dino import DINO
from jaxformer.ops import distillation, losses, spreading
from jaxformer.training.state import TrainState
from jaxformer.training.step import StatefulLossFn
from jaxformer.typing import Array, Bool, DTypeLike, Float, PyTree


@dataclasses.dataclass(frozen=True)
class Objective:
    """Targets, and the weights of the terms beside that of class tokens.

    Attributes:
        targets: How the teacher's logits become targets: balanced over the batch ("sinkhorn"), or
            less their running mean ("centre").
        momentum: Share of itself that the centre keeps at each step.
        temperatures: Of the teacher, at first and from a third of the steps on.
        ibot: Weight of the loss of hidden patches.
        koleo: Weight of the term that keeps class tokens of different images apart.
    """

    targets: Literal["sinkhorn", "centre"] = "sinkhorn"
    momentum: float = 0.9
    temperatures: tuple[float, float] = (0.02, 0.03)
    ibot: float = 0.2
    koleo: float = 0.3

    def centres(self, prototypes: int) -> dict[str, Float[Array, "E"]] | None:
        """What the loss keeps from step to step, at first; None if that is nothing."""
        start = jnp.zeros(prototypes)
        return {"tokens": start, "patches": start} if self.targets == "centre" else None

    def taught(
        self,
        logits: Float[Array, "rows E"],
        counted: Bool[Array, "rows"],
        centre: Float[Array, "E"] | None,
        temperature: Array,
    ) -> tuple[Float[Array, "rows E"], Float[Array, "E"] | None]:
        """Makes targets of a teacher's logits, and the next centre if there is one."""
        if centre is None:
            return distillation.sinkhorn(logits, temperature, where=counted), None
        mean = jax.vmap(losses.masked_mean, (1, None))(logits, counted)
        targets = distillation.centred_softmax(logits, centre, temperature)
        return targets, distillation.update_centre(centre, mean, momentum=self.momentum)


def make_loss(
    objective: Objective, views: dino_views.Views, model: DINO, steps: int, dtype: DTypeLike
) -> StatefulLossFn:
    """Cross-entropies of class tokens of different crops and of hidden patches, and KoLeo.

    A metric `entropy` tells how sharp the targets of class tokens are: near the logarithm of the
    number of prototypes they say nothing yet, or no more.
    """
    schedule = optax.linear_schedule(*objective.temperatures, max(1, steps // 3))

    def by_view(x: Float[Array, "rows *D"], images: int) -> Float[Array, "views {images} *D"]:
        return jnp.moveaxis(x.reshape(images, -1, *x.shape[1:]), 1, 0)

    def apply(*args: Any, **kwargs: Any) -> Any:
        return model.apply(*args, **kwargs)

    def loss(params: PyTree, batch: PyTree, key: Array, state: TrainState) -> tuple[Array, Any]:
        crop, *drop = jax.random.split(key, 3)
        images = len(batch["images"])
        large, small = (
            vision.centred(x).astype(dtype).reshape(-1, *x.shape[2:])
            for x in dino_views.crops(views, crop, vision.light(batch["images"]))
        )
        hidden, places = (batch[name].reshape(len(large), -1) for name in ("hidden", "places"))
        counted, places = places < hidden.shape[1], jnp.minimum(places, hidden.shape[1] - 1)

        old = apply(state.ema, large, places)
        rngs = {"dropout": drop[0]}
        new = apply(params, large, places, hidden=hidden, train=True, rngs=rngs)
        logits = by_view(new.tokens, images)
        if views.small:
            more = apply(params, small, train=True, rngs={"dropout": drop[1]})
            logits = jnp.concatenate([logits, by_view(more.tokens, images)])

        centres, temperature = state.extra or {}, jnp.asarray(schedule(state.step))
        rows = old.patches.reshape(-1, old.patches.shape[-1])
        asked = {"tokens": (old.tokens, jnp.ones(len(large), bool))}
        asked["patches"] = (rows, counted.reshape(-1))
        told = {
            name: objective.taught(*what, centres.get(name), temperature)
            for name, what in asked.items()
        }
        classes, hints = (told[name][0] for name in ("tokens", "patches"))
        terms = {
            "dino": distillation.dino_loss(logits, by_view(classes, images)),
            "ibot": distillation.ibot_loss(new.patches, hints.reshape(old.patches.shape), counted),
            "koleo": jax.vmap(spreading.koleo)(by_view(new.features, images)).mean(),
        }
        total = terms["dino"] + objective.ibot * terms["ibot"] + objective.koleo * terms["koleo"]
        terms["entropy"] = -jax.scipy.special.xlogy(classes, classes).sum(axis=1).mean()
        return total, (terms, state.extra and {name: told[name][1] for name in told})

    return loss
