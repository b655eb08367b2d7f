"""Flow matching: what the DiT learns.

    sigma ~ shifted logit-normal,  noise ~ N(0, 1)
    x_t   = (1 - sigma) latents + sigma noise
    loss  = mean (DiT([x_t, control], 1000 sigma, text, image) - (noise - latents))^2

Source: Wan (arXiv 2503.20314, section 4.2); see `wanjax.diffusion.flow`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sharding.rules import activation_spec, constrain, parameter_sharding, shard_parameters
from wanjax.conditioning.samples import Encoded
from wanjax.config import DiTConfig, TrainConfig
from wanjax.diffusion import flow
from wanjax.models.dit import DiT
from wanjax.training.initialize import load_start
from wanjax.weights import Checkpoint, lora


class Noised(NamedTuple):
    """A batch, or a part of one, with its noise; `sigma` is `[b]`."""

    batch: Encoded
    noise: jax.Array
    sigma: jax.Array


def in_dtypes(dit: DiTConfig, config: TrainConfig) -> DiTConfig:
    """The network with the run's dtypes: weights are float32, but those beside adapters never change, and are stored in
    what they are computed in.
    """
    dtype = jnp.dtype(config.dtype)
    return dataclasses.replace(dit, dtype=dtype, param_dtype=jnp.float32 if config.lora is None else dtype)


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """The objective of the DiT; an `Objective`.

    config: of the run.
    dit: of the network.
    """

    config: TrainConfig
    dit: DiTConfig

    @property
    def unit(self) -> str:
        """What `units` counts."""
        return "tokens"

    def units(self, batch: Encoded) -> int:
        """Tokens of a batch."""
        b, *size, _ = batch.latents.shape
        return b * math.prod(n // p for n, p in zip(size, self.dit.patch_size, strict=True))

    def make(self, rngs: nnx.Rngs) -> DiT:
        """A random DiT."""
        return self._adapted(DiT(self.dit, rngs), rngs)

    def load(self) -> DiT:
        """The checkpoint's DiT, widened if it has fewer inputs; see `wanjax.training.initialize`."""
        c = self.config
        assert c.checkpoint is not None
        dit = load_start(Checkpoint(c.checkpoint), self.dit, parameter_sharding, c.seed)
        return shard_parameters(self._adapted(dit, nnx.Rngs(c.seed)))

    def _adapted(self, dit: DiT, rngs: nnx.Rngs) -> DiT:
        return dit if self.config.lora is None else lora.attach(dit, self.config.lora, rngs)

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
