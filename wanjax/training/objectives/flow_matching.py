"""Flow matching: what the DiT learns.

    sigma ~ shifted logit-normal,  noise ~ N(0, 1)
    x_t   = (1 - sigma) latents + sigma noise
    loss  = mean (DiT([x_t, control], 1000 sigma, text, image) - (noise - latents))^2

Source: Wan (arXiv 2503.20314, section 4.2); see `wanjax.diffusion.flow`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sharding.mesh import MeshShape
from sharding.rules import activation_spec, constrain, parameter_sharding, shard_parameters
from sharding.ulysses import check_heads
from wanjax.conditioning.encoders import Encoders, open_encoders
from wanjax.conditioning.samples import Encoded
from wanjax.config import CachedData, DiTConfig, SyntheticData, TrainConfig
from wanjax.data.synthetic import Synthetic
from wanjax.diffusion import flow
from wanjax.errors import InputError
from wanjax.models.dit import DiT
from wanjax.training.data import open_clips, task_samples
from wanjax.training.export import rounded
from wanjax.training.initialize import load_start, start_config
from wanjax.training.latent_cache import CachedSamples
from wanjax.training.objectives.base import Data, Objective
from wanjax.training.validation import Sampler
from wanjax.weights import Checkpoint, lora
from wanjax.weights.mapping import NetworkName

SIGMAS = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Noise levels of the validation loss."""


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
class FlowMatching(Objective[DiT, Encoded, Noised]):
    """The objective of the DiT, or of adapters beside it.

    config: of the run.
    dit: of the network.
    """

    config: TrainConfig
    dit: DiTConfig

    unit: ClassVar = "tokens"
    name: ClassVar = "the DiT"
    loss_parts: ClassVar = tuple(f"loss_at_{sigma}" for sigma in SIGMAS)

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

    @property
    def has_frozen(self) -> bool:
        """The network beside adapters is."""
        return self.config.lora is not None

    def split(self, model: DiT) -> tuple[Any, Any]:
        """Adapters, and the network that they stand beside."""
        return lora.split(model) if self.has_frozen else (model, None)

    def join(self, trained: Any, frozen: Any) -> DiT:
        """See `Objective`."""
        return trained if frozen is None else lora.join(trained, frozen)

    def check(self, mesh: MeshShape) -> None:
        """See `Objective`."""
        check_heads(self.dit.num_heads, mesh.ulysses)

    def open_data(self, config: TrainConfig, encoders: Encoders | None = None) -> Data:
        """Clips, encoded as they come; or from a cache; or noise."""
        if isinstance(config.data, SyntheticData):
            return Data(Synthetic(config, self.dit))
        if isinstance(config.data, CachedData):
            return Data(CachedSamples(config.data.path, config, self.dit))
        chosen = open_clips(config)
        encoders = encoders or open_encoders(config, self.dit)
        return Data(task_samples(config, encoders, chosen), encoders)

    def validation_encoders(self, config: TrainConfig, data: Data) -> Encoders | None:
        """See `Objective`: for clips in pixels, and for all that are sampled."""
        if isinstance(data.encode, Encoders):
            return data.encode
        cached = isinstance(config.data, CachedData)
        return open_encoders(config, self.dit) if config.sample_every or not cached else None

    def validation_losses(self, model: DiT, batch: Encoded, seed: jax.Array | int = 0) -> jax.Array:
        """Mean loss of a batch at each of `SIGMAS`, `[len(SIGMAS)]`, with the same noise whenever it is called."""
        noise = self.prepare(batch, jax.random.key(seed)).noise

        def at(sigma: jax.Array) -> jax.Array:
            sigmas = constrain(jnp.full(batch.latents.shape[0], sigma), "batch")
            return self.loss(model, Noised(batch, noise, sigmas))

        return jax.lax.map(at, jnp.asarray(SIGMAS))

    def open_sampler(self, config: TrainConfig, encoders: Encoders | None) -> Sampler:
        """See `Objective`."""
        assert encoders is not None  # see validation_encoders
        return Sampler(config, self.dit, encoders)

    def networks(self, model: DiT) -> dict[NetworkName, Any]:
        """The DiT."""
        return {"dit": rounded(model)}

    def export(self, model: DiT) -> Path:
        """See `Objective`; of adapters `WORKDIR/lora.safetensors`."""
        if not self.has_frozen:
            return super().export(model)
        assert self.config.workdir is not None
        path = Path(self.config.workdir) / "lora.safetensors"
        lora.save(path, model)
        return path


def network_to_train(config: TrainConfig) -> DiTConfig:
    """The network to train: the checkpoint's or the configured one, which may have more inputs.

    Raises:
      InputError: there is neither, or they differ, or the checkpoint cannot be used.
    """
    if config.checkpoint is None:
        if config.lora is not None:
            raise InputError("lora without a checkpoint to train adapters for; give --checkpoint, or leave lora None")
        if config.dit is None:
            raise InputError("no network; a checkpoint or a config with `dit` is needed; give --checkpoint")
        return in_dtypes(config.dit, config)
    checkpoint = Checkpoint(config.checkpoint)
    dit = in_dtypes(config.dit or checkpoint.config("dit"), config)
    checkpoint.check("dit", start_config(checkpoint, dit))
    return dit
