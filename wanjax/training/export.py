"""The trained network as a checkpoint that sampling reads: `WORKDIR/model`, in the Diffusers layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from wanjax.config import DiTConfig, TrainConfig
from wanjax.files import put
from wanjax.weights import Checkpoint, save
from wanjax.weights.hub import checkpoint_folder
from wanjax.weights.mapping import NetworkName


def write_checkpoint(config: TrainConfig, networks: dict[NetworkName, Any], *beside: Path) -> Path:
    """Write `WORKDIR/model`: networks, with everything else that `base_of` holds.

    All processes have to call this.

    Args:
      config: of the run.
      networks: by name.
      beside: folders that are copied into it.

    Returns:
      The folder; it appears when it is complete.

    Raises:
      InputError: as `wanjax.weights.save`.
    """
    assert config.workdir is not None
    path, new = Path(config.workdir) / "model", Path(config.workdir) / "model.new"
    base = base_of(config)
    if base is None and [*networks] == ["dit_low"]:  # of one alone, nothing says which it is
        networks = {"dit": networks["dit_low"]}
    if jax.process_index() == 0:  # only it writes
        shutil.rmtree(new, ignore_errors=True)
    save(new, "diffusers", networks, base=base)
    if jax.process_index() == 0:
        _say_what_diffusers_does(networks)
        for source in beside:
            shutil.copytree(source, new / source.name, dirs_exist_ok=True)
        put(new, path)
    return path


def base_of(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint that gives what a run does not train: the encoders', or, of one expert, one that has the other.

    None: there is none, and the network stands alone.
    """
    of_one_expert = config.expert in ("high", "low")
    places = (config.checkpoint, config.encoders) if of_one_expert else (config.encoders, config.checkpoint)
    found = [Checkpoint(checkpoint_folder(place)) for place in places if place is not None]
    return next((base for base in found if not of_one_expert or base.experts == 2), None)


def _say_what_diffusers_does(networks: dict[NetworkName, Any]) -> None:
    """Of a network whose texts are not as long as published ones', for which diffusers has no setting."""
    dit = networks.get("dit")
    usual = DiTConfig().text_len
    if dit is not None and dit.config.text_len != usual and dit.config.image_dim is not None:
        print(
            f"text_len {dit.config.text_len}: diffusers takes {usual} tokens of text before those of images; give "
            f"max_sequence_length={usual} there, to whose longer padding this network is not used"
        )


def rounded(model: Any) -> Any:
    """The network with its matrices in bfloat16: half the size, and what most of sampling computes in anyway."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, model)
