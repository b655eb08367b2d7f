"""What objectives of the DiT share: how it is asked, its data, checks, validation and export."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp

from sharding.mesh import MeshShape
from sharding.ulysses import check_heads
from wanjax.conditioning.encoders import Encoders, open_encoders
from wanjax.conditioning.samples import Encoded
from wanjax.config import CachedData, DiTConfig, Remat, SyntheticData, TrainConfig
from wanjax.data.synthetic import Synthetic
from wanjax.diffusion import flow
from wanjax.diffusion.solvers import Schedule
from wanjax.models.dit import Context, DiT
from wanjax.training.data import open_clips, task_samples
from wanjax.training.export import rounded
from wanjax.training.latent_cache import CachedSamples
from wanjax.training.objectives.base import Data, Objective
from wanjax.training.prompt_samples import PromptSampler, check_prompts
from wanjax.training.validation import Sampler, sample_schedule
from wanjax.weights import lora
from wanjax.weights.mapping import NetworkName

Model = TypeVar("Model")
Prepared = TypeVar("Prepared")


class DiTObjective(Objective[Model, Encoded, Prepared]):
    """An objective whose result is a DiT, or adapters for one.

    config: of the run.
    dit: of the network.
    """

    config: TrainConfig
    dit: DiTConfig

    unit: ClassVar = "tokens"
    name: ClassVar = "the DiT"

    def units(self, batch: Encoded) -> int:
        """Tokens of a batch."""
        b, *size, _ = batch.latents.shape
        return b * math.prod(n // p for n, p in zip(size, self.dit.patch_size, strict=True))

    def check(self, mesh: MeshShape) -> None:
        """See `Objective`."""
        check_heads(self.dit.num_heads, mesh.ulysses)
        if self.config.sample_prompts is not None:
            check_prompts(self.config, self.dit)

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

    def open_sampler(self, config: TrainConfig, encoders: Encoders | None) -> Sampler:
        """See `Objective`."""
        assert encoders is not None  # see validation_encoders
        config, schedule = self.sampled_as(config)
        return Sampler(config, self.dit, encoders, schedule, self.phases)

    def open_prompts(self, config: TrainConfig, encoders: Encoders | None) -> PromptSampler:
        """See `Objective`."""
        assert encoders is not None  # see validation_encoders
        config, schedule = self.sampled_as(config)
        return PromptSampler(config, self.dit, encoders, schedule, self.phases)

    def phases(self, model: Any, schedule: Schedule) -> Any:
        """The model as `sample_latents` takes it."""
        return model

    def sampled_as(self, config: TrainConfig) -> tuple[TrainConfig, Schedule]:
        """How the network is sampled during training: the run's settings and its schedule."""
        return config, sample_schedule(config, self.dit)

    def networks(self, model: Any) -> dict[NetworkName, Any]:
        """The DiT."""
        return {"dit": rounded(model)}

    expert: str = ""

    def export(self, model: Any) -> Path:
        """See `Objective`; of adapters `WORKDIR/lora.safetensors`, of an expert's `WORKDIR/lora_high.safetensors`."""
        if self.config.lora is None:
            return super().export(model)
        assert self.config.workdir is not None
        path = Path(self.config.workdir) / f"lora{'_' * bool(self.expert)}{self.expert}.safetensors"
        lora.save(path, model)
        return path


def predict(
    dit: DiT, batch: Encoded, x: jax.Array, sigma: jax.Array, remat: Remat = "none", context: Context | None = None
) -> jax.Array:
    """The velocity `[b, f, h, w, c]` that a network says of noised latents.

    Args:
      dit: the network.
      batch: what else it sees; its latents are not looked at.
      x: `[b, f, h, w, c]`.
      sigma: noise levels `[b]`.
      remat: see `TrainConfig`.
      context: of the batch, where it is known already.
    """
    if batch.image_condition is not None:
        x = jnp.concatenate([x, batch.image_condition.astype(x.dtype)], axis=-1)  # [b, f, h, w, c_in]
    context = dit.context(batch.text, batch.image, remat) if context is None else context
    return dit(x, flow.timestep(sigma), context, remat)
