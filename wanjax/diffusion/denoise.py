"""The denoising loop, the only one: at every step a predictor says the velocity, and the solver takes the step.

    predictor = Guided(dit, context, image_condition, guidance)  # or Cached, or what a calibration measures with
    carry = start(predictor, noise)
    for i in range(steps):
        carry = denoise(predictor, schedule, carry, i, i + 1)    # or denoise(.., 0, steps) in one program
    latents = carry[0].sample

What a predictor keeps from step to step is its memory, an explicit part of the carry.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sharding.rules import replicate
from wanjax.diffusion import solvers
from wanjax.diffusion.guidance import guided
from wanjax.models.dit import Context, DiT

Carry = tuple[solvers.SolverState, Any]
"""The solver's state, and the predictor's memory: any tree of arrays."""


class Predictor(Protocol):
    """A pytree: an argument of the compiled loop, with networks and conditions as its leaves."""

    def with_guidance(self, guidance: float) -> Predictor:
        """The same with another scale."""
        ...

    def init(self, sample: jax.Array) -> Any:
        """The memory before the first step, for latents `[b, f, h, w, c]`."""
        ...

    def __call__(self, i: jax.Array, timestep: jax.Array, sample: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """The velocity at a step, guidance included, and the memory for the next.

        Args:
          i: which step.
          timestep: of the step, a float32 scalar.
          sample: latents `[b, f, h, w, c]`, float32, whole on every device.
          memory: from `init` or the step before.

        Returns:
          velocity `[b, f, h, w, c]`, whole on every device; memory.
        """
        ...


@jax.jit
def start(predictor: Predictor, noise: jax.Array | np.ndarray) -> Carry:
    """What the first step takes.

    Args:
      predictor: of the run.
      noise: standard normal `[b, f, h, w, c]`.
    """
    state = initial(noise)
    return state, predictor.init(state.sample)


@jax.jit
def initial(noise: jax.Array | np.ndarray) -> solvers.SolverState:
    """The solver's state before the first step, whole on every device; `noise` as `start` takes it."""
    return solvers.init(replicate(jnp.asarray(noise)))


def enter(predictor: Predictor, state: solvers.SolverState) -> Carry:
    """What the first step of a predictor takes where others have taken steps: their state, and no memory yet."""
    return state, _first_memory(predictor, state.sample)


@jax.jit
def _first_memory(predictor: Predictor, sample: jax.Array) -> Any:
    return predictor.init(sample)


@functools.partial(jax.jit, donate_argnames="carry")
def denoise(
    predictor: Predictor, schedule: solvers.Schedule, carry: Carry, first: jax.Array | int, stop: jax.Array | int
) -> Carry:
    """The solver's steps `first` to `stop - 1`: one compiled loop for any part of the schedule.

    Args:
      predictor: says the velocities.
      schedule: from `solvers.make_schedule`.
      carry: from `start` or the steps before; its memory is reused.
      first, stop: steps.
    """

    def body(i: jax.Array, carry: Carry) -> Carry:
        state, memory = carry
        velocity, memory = predictor(i, schedule.timesteps[i], state.sample, memory)
        return solvers.step(schedule, i, state, velocity), memory

    schedule = jax.tree.map(jnp.asarray, schedule)
    return jax.lax.fori_loop(first, stop, body, carry)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guided:
    """The plain predictor: the whole network at every step, both branches of guidance in one batch.

    dit: the network; what only `DiT.context` needs may be missing.
    context: from `DiT.context`, of a batch `[b * branches]`: of each sample the prompt and, with guidance, the negative
      prompt.
    image_condition: mask and latents `[b, f, h, w, 20]`, whole on every device; None for a network without one.
    guidance: scale of the difference between the branches.
    """

    dit: DiT
    context: Context
    image_condition: jax.Array | None
    guidance: jax.Array | float

    def with_guidance(self, guidance: float) -> Guided:
        """See `Predictor`."""
        return dataclasses.replace(self, guidance=guidance)

    def init(self, sample: jax.Array) -> None:
        """Nothing is kept."""
        return None

    def __call__(self, i: jax.Array, timestep: jax.Array, sample: jax.Array, memory: None) -> tuple[jax.Array, None]:
        """See `Predictor`."""
        branches = self.context.k.shape[1] // len(sample)
        x = jnp.repeat(network_input(sample, self.image_condition), branches, axis=0)  # [b * branches, f, h, w, c_in]
        velocity = self.dit(x, jnp.broadcast_to(timestep, len(x)), self.context)
        velocity = replicate(velocity)  # samples and branches may be on different devices
        return guided(velocity, self.guidance, branches), memory


def network_input(sample: jax.Array, image_condition: jax.Array | None) -> jax.Array:
    """What the network sees: latents `[b, f, h, w, 16]` and, where there is an image condition, its 20 channels."""
    return sample if image_condition is None else jnp.concatenate([sample, image_condition], axis=-1)
