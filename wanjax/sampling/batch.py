"""Sampling a batch of clips that are encoded already: validation during training, and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sharding.rules import constrain, replicate, reshape
from wanjax.conditioning.samples import Encoded
from wanjax.diffusion import solvers
from wanjax.diffusion.denoise import Guided, denoise, enter, initial
from wanjax.models.dit import Context, DiT


def sample_latents(
    dit: DiT | Sequence[tuple[DiT, int]],
    batch: Encoded,
    empty_text: jax.Array,
    noise: jax.Array,
    schedule: solvers.Schedule,
    guidance: float,
    steps: int | None = None,
) -> jax.Array:
    """Latents `[b, f, h, w, c]`, float32, of a batch, with everything that it gives the network.

    Args:
      dit: the network, or experts one after the other, each with the step before which it ends.
      batch: encoded clips; their latents are not looked at.
      empty_text: features `[l, text_dim]` of the empty caption, from which guidance leads away.
      noise: `[b, f, h, w, c]`.
      schedule: from `solvers.make_schedule`.
      guidance: scale; 1: none.
      steps: of the schedule to take; None: all. Whatever it is, the program is the same.
    """
    experts = [(dit, len(schedule.timesteps))] if isinstance(dit, DiT) else dit
    state, first = initial(noise), 0
    for expert, stop in experts:
        context, image_condition = encode_context(expert, batch, None if guidance == 1 else empty_text)
        predictor = Guided(expert, context, image_condition, guidance)
        stop = stop if steps is None else min(stop, steps)
        state, first = denoise(predictor, schedule, enter(predictor, state), first, stop)[0], stop
    return state.sample


@jax.jit
def encode_context(dit: DiT, batch: Encoded, empty_text: jax.Array | None) -> tuple[Context, Any]:
    """What `Guided` takes of a batch: context of every sample and, if there is an empty text, of its other branch; and
    the image condition, whole on every device.
    """
    text, image = batch.text, batch.image
    if empty_text is not None:
        negative = jnp.broadcast_to(empty_text, text.shape).astype(text.dtype)
        text = interleave(text, negative)
        image = None if image is None else interleave(image, image)
    return dit.context(text, image), None if batch.image_condition is None else replicate(batch.image_condition)


def interleave(x: jax.Array, y: jax.Array) -> jax.Array:
    """`[b, ..]` twice -> `[2 b, ..]`: x0, y0, x1, y1, ..; each device keeps its own."""
    x, y = (constrain(z, "batch", *(None,) * (z.ndim - 1)) for z in (x, y))
    both = jnp.stack([x, y], axis=1)  # [b, 2, ..]
    return reshape(both, (2 * len(x), *x.shape[1:]))
