"""What a run learns: one file each, and here the choice."""

from __future__ import annotations

from typing import Any

from wanjax.config import DiTConfig, TrainConfig
from wanjax.errors import InputError
from wanjax.training.objectives.base import Data, Objective
from wanjax.training.objectives.contrastive import Contrastive
from wanjax.training.objectives.distillation import Distillation
from wanjax.training.objectives.experts import Experts
from wanjax.training.objectives.flow_matching import FlowMatching, network_to_train, span_of
from wanjax.training.objectives.reconstruction import Reconstruction

__all__ = [
    "Contrastive",
    "Data",
    "Distillation",
    "Experts",
    "FlowMatching",
    "Objective",
    "Reconstruction",
    "make_objective",
]


def make_objective(config: TrainConfig) -> Objective[Any, Any, Any]:
    """What the run trains.

    Raises:
      InputError: it is none of what there is, or more than one; or as `network_to_train`.
    """
    if config.distillation is not None and config.checkpoint is None:
        raise InputError("distillation without a checkpoint, which is the teacher; one is needed; give --checkpoint")
    given = [name for name in ("dit", "vae", "towers") if getattr(config, name) is not None]
    if config.boundary is not None and config.expert is None:
        raise InputError(
            f"--boundary {config.boundary:g} without an expert that learns; give --expert, or leave it out"
        )
    for name in ("distillation", "vae", "towers"):
        if config.expert is not None and getattr(config, name) is not None:
            raise InputError(f"--expert {config.expert} with {name}; flow matching has experts; leave --expert out")
    if len(given) > 1:
        raise InputError(f"networks {' and '.join(given)} to train; one is accepted; leave the others None")
    if config.lora is not None and {"vae", "towers"} & {*given}:
        raise InputError(f"lora with the network {given[0]}; adapters are for the DiT; leave lora None")
    if config.distillation is not None and {"vae", "towers"} & {*given}:
        raise InputError(f"distillation with the network {given[0]}; students are DiTs; leave distillation None")
    if config.vae is not None:
        return Reconstruction(config, config.vae)
    if config.towers is not None:
        return Contrastive(config, config.towers)
    return dit_objective(config, network_to_train(config))


def dit_objective(config: TrainConfig, dit: DiTConfig) -> FlowMatching | Experts | Distillation:
    """What a run that trains this DiT, or experts like it, learns.

    Raises:
      InputError: as `span_of`.
    """
    if config.distillation is not None:
        return Distillation(config, dit)
    if config.expert == "both":
        (boundary, _), _ = (span_of(config, dit, expert) for expert in ("high", "low"))
        return Experts(config, dit, boundary)
    expert = config.expert or ""
    return FlowMatching(config, dit, expert, span_of(config, dit, expert))
