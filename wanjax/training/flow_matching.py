"""Flow matching: what the DiT learns.

    sigma ~ shifted logit-normal,  noise ~ N(0, 1)
    x_t   = (1 - sigma) latents + sigma noise
    loss  = mean (DiT([x_t, control], 1000 sigma, text, image) - (noise - latents))^2

Source: Wan (arXiv 2503.20314, section 4.2); see `wanjax.flow`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sharding.rules import activation_spec, constrain, parameter_sharding
from wanjax import conditioning, flow
from wanjax.config import DiTConfig, TrainConfig
from wanjax.convert import Checkpoint
from wanjax.data.batch import Encoded
from wanjax.models.dit import DiT


class Noised(NamedTuple):
    """A batch, or a part of one, with its noise; `sigma` is `[b]`."""

    batch: Encoded
    noise: jax.Array
    sigma: jax.Array


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """The objective of the DiT; an `Objective`.

    config: of the run.
    dit: of the network.
    """

    config: TrainConfig
    dit: DiTConfig

    @property
    def units(self) -> int:
        """Tokens of a batch."""
        c = self.config
        frames, (height, width) = conditioning.latent_frames(c.frames), conditioning.latent_size(c.height, c.width)
        patch_frames, patch_height, patch_width = self.dit.patch_size
        return c.batch * (frames // patch_frames) * (height // patch_height) * (width // patch_width)

    def make(self, rngs: nnx.Rngs) -> DiT:
        """A random DiT."""
        return DiT(self.dit, rngs)

    def load(self) -> DiT:
        """The checkpoint's DiT."""
        assert self.config.checkpoint is not None
        return Checkpoint(self.config.checkpoint).load("dit", self.dit, parameter_sharding)

    def prepare(self, batch: Encoded, key: jax.Array) -> Noised:
        """Draw noise and noise levels."""
        c, shape = self.config, batch.latents.shape
        key_sigma, key_noise = jax.random.split(key)
        noise = jax.random.normal(
            key_noise, shape, jnp.float32, out_sharding=activation_spec(shape, "batch", None, None, None, None)
        )
        sigma = flow.sample_sigmas(key_sigma, shape[0], mean=c.sigma_mean, std=c.sigma_std, shift=c.shift)
        return Noised(batch, noise, constrain(sigma, "batch"))

    def loss(self, model: DiT, noised: Noised) -> jax.Array:
        """Mean squared error of the velocity, float32."""
        return jnp.mean(self.losses(model, noised))

    def losses(self, model: DiT, noised: Noised) -> jax.Array:
        """The same of each sample, `[b]`."""
        batch, noise, sigma = noised
        x = flow.interpolate(batch.latents, noise, sigma)  # [b, f, h, w, c]
        if batch.control is not None:
            x = jnp.concatenate([x, batch.control.astype(x.dtype)], axis=-1)  # [b, f, h, w, c_in]
        context = model.context(batch.text, batch.image, self.config.remat)
        velocity = model(x, flow.timestep(sigma), context, self.config.remat)  # [b, f, h, w, c]
        return flow.loss(velocity, flow.velocity(batch.latents, noise))
