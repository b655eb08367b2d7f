"""What a run learns: one file each, and here the choice."""

from __future__ import annotations

from typing import Any

from wanjax.config import TrainConfig
from wanjax.errors import InputError
from wanjax.training.objectives.base import Data, Objective
from wanjax.training.objectives.contrastive import Contrastive
from wanjax.training.objectives.flow_matching import FlowMatching, network_to_train
from wanjax.training.objectives.reconstruction import Reconstruction

__all__ = ["Contrastive", "Data", "FlowMatching", "Objective", "Reconstruction", "make_objective"]


def make_objective(config: TrainConfig) -> Objective[Any, Any, Any]:
    """What the run trains.

    Raises:
      InputError: it is none of what there is, or more than one; or as `network_to_train`.
    """
    given = [name for name in ("dit", "vae", "towers") if getattr(config, name) is not None]
    if len(given) > 1:
        raise InputError(f"networks {' and '.join(given)} to train; one is accepted; leave the others None")
    if config.lora is not None and {"vae", "towers"} & {*given}:
        raise InputError(f"lora with the network {given[0]}; adapters are for the DiT; leave lora None")
    if config.vae is not None:
        return Reconstruction(config, config.vae)
    if config.towers is not None:
        return Contrastive(config, config.towers)
    return FlowMatching(config, network_to_train(config))
