"""Flow matching of two experts in one run: a step's batch goes to the expert whose timesteps it is drawn from.

    share       = how much of the density of noise levels lies at the boundary or above
    step n goes to "dit", the expert for high noise, where floor((n + 1) share) > floor(n share), else to "dit_low"
    sigma       ~ the density on the expert's span, renormalised

So over a run the noise levels are those of one network's training, each expert has its share of the steps to one step,
and a step computes, differentiates and changes one network.

Source: Wan2.2's experts (its README, "MoE architecture"): one is trained from the boundary on upwards, one below.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sharding.mesh import MeshShape
from wanjax.conditioning.samples import Encoded
from wanjax.config import DiTConfig, TrainConfig
from wanjax.diffusion import flow, noise_levels
from wanjax.diffusion.solvers import Schedule
from wanjax.errors import InputError
from wanjax.training.objectives.base import Objective
from wanjax.training.objectives.dit import DiTObjective
from wanjax.training.objectives.flow_matching import FlowMatching, FlowMatchingBatch
from wanjax.training.optimizer import rate_at
from wanjax.training.state import TrainState
from wanjax.training.step import Metrics, train_step
from wanjax.weights.mapping import NetworkName

EXPERTS: dict[str, NetworkName] = {"high": "dit", "low": "dit_low"}
Model = dict[str, Any]
"""By name of the network."""


@dataclasses.dataclass(frozen=True)
class Experts(DiTObjective[Model, FlowMatchingBatch]):
    """The objective of two experts, or of adapters beside them.

    config: of the run.
    dit: of both networks.
    boundary: the least noise level of the expert for high noise.
    learns: whose turn `step` is.
    """

    config: TrainConfig
    dit: DiTConfig
    boundary: float
    learns: NetworkName = "dit"

    name: ClassVar = "two experts"

    @property
    def share(self) -> float:
        """Of the steps that go to the expert for high noise."""
        return noise_levels.share_of(self.config, (self.boundary, 1.0))

    @property
    def experts(self) -> dict[NetworkName, FlowMatching]:
        """The objective of each; its learning rate rises and falls over its own turns."""
        c, found, boundary = self.config, {}, self.boundary
        for expert, name in EXPERTS.items():
            share = self.share if expert == "high" else 1 - self.share
            steps, warmup, cooldown = (math.ceil(share * n) for n in (c.steps, c.warmup, c.cooldown))
            own = dataclasses.replace(c, steps=steps, warmup=min(warmup, steps), cooldown=min(cooldown, steps))
            span = (boundary, 1.0) if expert == "high" else (0.0, boundary)
            found[name] = FlowMatching(own, self.dit, expert, span)
        return found

    # ---- networks

    def make(self, rngs: nnx.Rngs) -> Model:
        """Two random DiTs."""
        return {name: expert.make(rngs) for name, expert in self.experts.items()}

    def load(self) -> Model:
        """Both of the checkpoint."""
        return {name: expert.load() for name, expert in self.experts.items()}

    @property
    def has_frozen(self) -> bool:
        """The networks beside adapters are."""
        return self.config.lora is not None

    def split(self, model: Model) -> tuple[Any, Any]:
        """See `Objective`."""
        parts = {name: expert.split(model[name]) for name, expert in self.experts.items()}
        trained, frozen = ({name: part[i] for name, part in parts.items()} for i in (0, 1))
        return trained, frozen if self.has_frozen else None

    def join(self, trained: Model, frozen: Model | None) -> Model:
        """See `Objective`."""
        return {
            name: expert.join(trained[name], None if frozen is None else frozen[name])
            for name, expert in self.experts.items()
        }

    # ---- a step

    def turns(self) -> dict[str, Objective]:
        """Of each expert."""
        return {name: dataclasses.replace(self, learns=name) for name in EXPERTS.values()}

    def turn(self, step: int) -> NetworkName:
        """See the module's docstring."""
        return "dit" if math.floor((step + 1) * self.share) > math.floor(step * self.share) else "dit_low"

    def init_optimizer(self, trained: Model) -> Model:
        """Each has its own."""
        return {name: expert.init_optimizer(trained[name]) for name, expert in self.experts.items()}

    def step(self, state: TrainState, batch: Encoded) -> tuple[TrainState, Metrics]:
        """The turn of `learns`: a step as of one network, and the other's state as it was."""
        name = self.learns

        def part(x: Model | None) -> Any:
            return None if x is None else x[name]

        mine = (part(x) for x in (state.model, state.optimizer, state.ema, state.frozen))
        new, metrics = train_step(self.experts[name], TrainState(state.step, state.seed, *mine), batch)
        changed = dataclasses.replace(
            state,
            step=new.step,
            model=state.model | {name: new.model},
            optimizer=state.optimizer | {name: new.optimizer},
            ema=None if state.ema is None else state.ema | {name: new.ema},
        )
        own, high = self.experts[name], jnp.floor(state.step * self.share)  # turns before
        rate = rate_at(own.config, high if name == "dit" else state.step - high)
        parts = {f"{own.expert}_loss": metrics.loss, f"{own.expert}_learning_rate": rate}
        return changed, metrics._replace(parts=parts)

    def prepare(self, batch: Encoded, key: jax.Array) -> FlowMatchingBatch:
        """Noise, and noise levels of the expert whose turn it is."""
        return self.experts[self.learns].prepare(batch, key)

    def loss(self, model: Model, prepared: FlowMatchingBatch) -> jax.Array:
        """That of the expert whose turn it is."""
        return self.experts[self.learns].loss(model[self.learns], prepared)

    def step_operations(self, batch: Encoded) -> int:
        """See `Objective`; both experts have the same."""
        return self.experts[self.learns].step_operations(batch)

    # ---- around it

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """Of both."""
        return tuple(part for expert in self.experts.values() for part in expert.loss_parts)

    def validation_losses(self, model: Model, batch: Encoded, seed: jax.Array | int = 0) -> jax.Array:
        """The losses of each expert at the noise levels that it learns."""
        losses = [expert.validation_losses(model[name], batch, seed) for name, expert in self.experts.items()]
        return jnp.concatenate(losses)

    def phases(self, model: Model, schedule: Schedule) -> list[tuple[Any, int]]:
        """Both, as a pipeline has them: each takes the steps on its side of the boundary."""
        steps = schedule.timesteps.astype(np.float64)
        high = int(np.sum(steps >= self.boundary * flow.NUM_TIMESTEPS))
        return [part for part in ((model["dit"], high), (model["dit_low"], len(steps))) if part[1]]

    def check(self, mesh: MeshShape) -> None:
        """See `Objective`."""
        super().check(mesh)
        files = [
            name for name in ("start", "merge") if self.config.lora is not None and getattr(self.config.lora, name)
        ]
        if files:
            raise InputError(
                f"lora with {files[0]} and --expert both; files are of one expert; train them one after the other with "
                "--expert high and --expert low"
            )

    def networks(self, model: Model) -> dict[NetworkName, Any]:
        """Both."""
        networks = (expert.networks(model[name]) for name, expert in self.experts.items())
        return dict(pair for network in networks for pair in network.items())

    def export(self, model: Model) -> Path:
        """See `Objective`; of adapters `WORKDIR/lora_high.safetensors` and `WORKDIR/lora_low.safetensors`."""
        if self.config.lora is None:
            return super().export(model)
        paths = [expert.export(model[name]) for name, expert in self.experts.items()]
        return paths[0].parent
