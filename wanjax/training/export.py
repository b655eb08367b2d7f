"""The trained network as a checkpoint that sampling reads: `WORKDIR/model`, in the Diffusers layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from wanjax.config import TrainConfig
from wanjax.weights import Checkpoint, save
from wanjax.weights.mapping import NetworkName


def write_checkpoint(config: TrainConfig, networks: dict[NetworkName, Any], *beside: Path) -> Path:
    """Write `WORKDIR/model`: networks, with everything else that `config.encoders` or `config.checkpoint` holds.

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
    folder = config.encoders or config.checkpoint
    if jax.process_index() == 0:  # only it writes
        shutil.rmtree(new, ignore_errors=True)
    save(new, "diffusers", networks, base=Checkpoint(folder) if folder else None)
    if jax.process_index() == 0:
        shutil.rmtree(path, ignore_errors=True)
        for source in beside:
            shutil.copytree(source, new / source.name, dirs_exist_ok=True)
        new.rename(path)
    return path


def rounded(model: Any) -> Any:
    """The network with its matrices in bfloat16: half the size, and what most of sampling computes in anyway."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, model)
