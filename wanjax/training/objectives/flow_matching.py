"""Flow matching: what the DiT learns.

    sigma ~ shifted logit-normal,  noise ~ N(0, 1)
    x_t   = (1 - sigma) latents + sigma noise
    loss  = mean (DiT([x_t, image_condition], 1000 sigma, text, image) - (noise - latents))^2

Source: Wan (arXiv 2503.20314, section 4.2); see `wanjax.diffusion.flow`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sharding.mesh import MeshShape
from sharding.rules import activation_spec, constrain, parameter_sharding, replicate, shard_parameters
from wanjax.conditioning.samples import Encoded
from wanjax.config import DiTConfig, TrainConfig
from wanjax.diffusion import flow, noise_levels
from wanjax.errors import InputError
from wanjax.models.dit import DiT
from wanjax.training import speed
from wanjax.training.export import rounded
from wanjax.training.initialize import load_warm_start, networks_to_load, open_checkpoint, warm_start_config
from wanjax.training.objectives.dit import DiTObjective, predict
from wanjax.weights import lora
from wanjax.weights.load import BOUNDARIES
from wanjax.weights.lora_files import LoRAFile
from wanjax.weights.lora_training import start_from, with_dropout
from wanjax.weights.mapping import NetworkName
from wanjax.weights.quantize import requantized

SIGMAS = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Noise levels of the validation loss, as parts of the network's span."""
LEAST_SHARE = 1e-6
"""Of all noise levels, what an expert's span must have to learn from."""


class FlowMatchingBatch(NamedTuple):
    """A batch, or a part of one, with its noise; `sigma` is `[b]`.

    dropout: data of PRNG keys `[b, 2]`, of which the first is a part's, for adapters that drop some of what they see.
    """

    batch: Encoded
    noise: jax.Array
    sigma: jax.Array
    dropout: jax.Array | None = None


def in_dtypes(dit: DiTConfig, config: TrainConfig) -> DiTConfig:
    """The network with the run's dtypes: weights are float32, but those beside adapters never change, and are stored in
    what they are computed in, or in 8 bits.

    Raises:
      InputError: 8 bits for weights that learn; or as `requantized`.
    """
    dtype = jnp.dtype(config.dtype)
    if config.lora is None:
        if config.quantize in ("fp8", "int8"):
            raise InputError(
                f"--quantize {config.quantize} for weights that learn, which 8 bits cannot hold; adapters learn beside "
                "such weights; set lora=LoRAConfig(..), or leave --quantize out"
            )
        return dataclasses.replace(dit, dtype=dtype, param_dtype=jnp.float32)
    if dit.quantize == "off":
        dit = dataclasses.replace(requantized(dit, config.quantize), channel_scales=config.quantize in ("fp8", "int8"))
    else:
        dit = requantized(dit, config.quantize)
    return dataclasses.replace(dit, dtype=dtype, param_dtype=dtype, weight_only=dit.quantize != "off")


@dataclasses.dataclass(frozen=True)
class FlowMatching(DiTObjective[DiT, FlowMatchingBatch]):
    """The objective of the DiT, or of adapters beside it.

    config: of the run.
    dit: of the network.
    expert: "high" or "low", which of two it is; "": there is one.
    span: the noise levels that it learns, from the least to the largest.
    """

    config: TrainConfig
    dit: DiTConfig
    expert: str = ""
    span: tuple[float, float] = flow.WHOLE

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the validation loss."""
        least, most = self.span
        return tuple(round(least + part * (most - least), 4) for part in SIGMAS)

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """See `Objective`."""
        return tuple(f"loss_at_{sigma}" for sigma in self.sigmas)

    def make(self, rngs: nnx.Rngs) -> DiT:
        """A random DiT."""
        return self._adapted(DiT(self.dit, rngs), rngs)

    def load(self) -> DiT:
        """The checkpoint's DiT, widened if it has fewer inputs; see `wanjax.training.initialize`."""
        c, checkpoint = self.config, open_checkpoint(self.config)
        network = networks_to_load(c, checkpoint)[self.expert]
        merge = lora.parse(() if c.lora is None else c.lora.merge)
        dit = load_warm_start(checkpoint, self.dit, parameter_sharding, c.seed, network, merge)
        dit = self._adapted(dit, nnx.Rngs(c.seed))
        if c.lora is not None and c.lora.start is not None:
            dit = start_from(dit, LoRAFile(c.lora.start))
        return shard_parameters(dit)

    def _adapted(self, dit: DiT, rngs: nnx.Rngs) -> DiT:
        return dit if self.config.lora is None else lora.attach(dit, self.config.lora, rngs)

    def prepare(self, batch: Encoded, key: jax.Array) -> FlowMatchingBatch:
        """Draw noise and noise levels."""
        shape = batch.latents.shape
        key_sigma, key_noise = jax.random.split(key)
        noise = jax.random.normal(
            key_noise, shape, jnp.float32, out_sharding=activation_spec(shape, "batch", None, None, None, None)
        )
        sigma = noise_levels.of(self.config, self.units(batch) // shape[0]).draw(key_sigma, shape[0], self.span)
        return FlowMatchingBatch(batch, noise, constrain(sigma, "batch"), self._dropout_keys(key, shape[0]))

    def _dropout_keys(self, key: jax.Array, batch: int) -> jax.Array | None:
        if self.config.lora is None or not self.config.lora.dropout:
            return None
        keys = jax.random.key_data(jax.random.split(jax.random.fold_in(key, 2), batch))  # [b, 2]
        return constrain(keys, "batch", None)

    def loss(self, model: DiT, prepared: FlowMatchingBatch) -> jax.Array:
        """Mean squared error of the velocity, float32, weighted by noise level as the run says."""
        if prepared.dropout is not None and self.config.lora is not None:
            key = jax.random.wrap_key_data(replicate(prepared.dropout)[0])
            model = with_dropout(model, self.config.lora.dropout, key)
        losses, weight = self.losses(model, prepared), noise_levels.weight(prepared.sigma, self.config.weighting)
        return jnp.mean(losses if weight is None else weight * losses)

    def losses(self, model: DiT, prepared: FlowMatchingBatch) -> jax.Array:
        """The error of each sample, `[b]`."""
        batch, noise, sigma, _ = prepared
        x = flow.interpolate(batch.latents, noise, sigma)  # [b, f, h, w, c]
        velocity = predict(model, batch, x, sigma, self.config.remat)  # [b, f, h, w, c]
        return flow.loss(velocity, flow.velocity(batch.latents, noise))

    def check(self, mesh: MeshShape) -> None:
        """See `Objective`; adapters' files are read as far as their headers."""
        super().check(mesh)
        if self.expert and self.config.sample_every:
            raise InputError(
                f"--sample-every {self.config.sample_every} with one of two experts, which sample together; "
                "use --expert both, or --sample-every 0"
            )
        if self.config.lora is not None:
            lora.check(lora.parse(self.config.lora.merge), self.dit, False, True)
            if self.config.lora.start is not None:
                LoRAFile(self.config.lora.start).terms(self.dit)

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

    def step_operations(self, batch: Encoded) -> int:
        """See `Objective`; the weights beside adapters have no gradient."""
        return (2 if self.has_frozen else 3) * speed.forward_operations(self, batch, self.loss)

    def validation_losses(self, model: DiT, batch: Encoded, seed: jax.Array | int = 0) -> jax.Array:
        """Mean loss of a batch at each of `sigmas`, `[len(SIGMAS)]`, with the same noise whenever it is called."""
        noise = self.prepare(batch, jax.random.key(seed)).noise

        def at(sigma: jax.Array) -> jax.Array:
            sigmas = constrain(jnp.full(batch.latents.shape[0], sigma), "batch")
            return jnp.mean(self.losses(model, FlowMatchingBatch(batch, noise, sigmas)))

        return jax.lax.map(at, jnp.asarray(self.sigmas))

    def networks(self, model: DiT) -> dict[NetworkName, Any]:
        """The DiT, by the name of the expert that it is."""
        return {"dit_low" if self.expert == "low" else "dit": rounded(model)}


def span_of(config: TrainConfig, dit: DiTConfig, expert: str) -> tuple[float, float]:
    """The noise levels that an expert learns: from the boundary on upwards, or below it; all, where there is one DiT.

    Raises:
      InputError: none of what is drawn lies there; or as `open_checkpoint`.
    """
    if not expert:
        return flow.WHOLE
    boundary = config.boundary
    if boundary is None and config.is_loaded:
        boundary = open_checkpoint(config).boundary
    boundary = BOUNDARIES[dit.task] if boundary is None else boundary
    span = (boundary, 1.0) if expert == "high" else (0.0, boundary)
    if not noise_levels.share_of(config, span) > LEAST_SHARE:
        raise InputError(
            f"--boundary {boundary:g} leaves the expert for {expert} noise no timestep to learn; one that does is "
            "accepted; use 0.9 for i2v, 0.875 for t2v"
        )
    return span


def network_to_train(config: TrainConfig) -> DiTConfig:
    """The network to train: the checkpoint's or the configured one, which may have more inputs.

    Raises:
      InputError: there is neither, or they differ, or the checkpoint cannot be used.
    """
    if not config.is_loaded:
        if config.lora is not None:
            raise InputError("lora without a checkpoint to train adapters for; give --checkpoint, or leave lora None")
        if config.dit is None:
            raise InputError("no network; a checkpoint or a config with `dit` is needed; give --checkpoint")
        return in_dtypes(config.dit, config)
    checkpoint = open_checkpoint(config)
    networks: list[NetworkName] = [*networks_to_load(config, checkpoint).values()]
    dit = in_dtypes(config.dit or checkpoint.config(networks[0]), config)
    for name in networks:
        checkpoint.check(name, warm_start_config(checkpoint, dit, name))
    return dit
