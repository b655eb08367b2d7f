"""The trained network as a checkpoint that sampling reads: `WORKDIR/model`, in the Diffusers layout.

Of adapters, `WORKDIR/lora.safetensors`.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wanjax.conditioning.frames import to_pixels
from wanjax.config import TrainConfig
from wanjax.data.clip import Clips
from wanjax.models.vae import VAE
from wanjax.training.data import open_clips
from wanjax.training.objectives.base import Objective
from wanjax.training.objectives.contrastive import Contrastive
from wanjax.training.objectives.reconstruction import Reconstruction
from wanjax.weights import Checkpoint, lora, save
from wanjax.weights.mapping import NetworkName

CLIPS = 256
"""That the statistics of a VAE's latents are taken from."""


def export(config: TrainConfig, objective: Objective, model: Any) -> Path:
    """Write the network, with everything else that `config.encoders` or `config.checkpoint` holds.

    Matrices are written in bfloat16, as most published ones are. All processes have to call this.

    Returns:
      The folder or the file; it appears when it is complete.

    Raises:
      InputError: as `wanjax.weights.save`.
    """
    assert config.workdir is not None
    if config.lora is not None:
        lora.save(Path(config.workdir) / "lora.safetensors", model)
        return Path(config.workdir) / "lora.safetensors"
    path, new = Path(config.workdir) / "model", Path(config.workdir) / "model.new"
    folder = config.encoders or config.checkpoint
    if jax.process_index() == 0:  # only it writes
        shutil.rmtree(new, ignore_errors=True)
    save(new, "diffusers", networks(config, objective, model), base=Checkpoint(folder) if folder else None)
    if jax.process_index() == 0:
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(objective, Contrastive):
            shutil.copytree(Path(config.workdir) / "tokenizer", new / "tokenizer", dirs_exist_ok=True)
        new.rename(path)
    return path


def networks(config: TrainConfig, objective: Objective, model: Any) -> dict[NetworkName, Any]:
    """What the checkpoint gets from the run."""
    if isinstance(objective, Reconstruction):
        return {"vae": with_statistics(rounded(model), open_clips(config).clips)}
    if isinstance(objective, Contrastive):
        return {"umt5": rounded(model.umt5), "clip": rounded(model.clip)}
    return {"dit": rounded(model)}


def rounded(model: Any) -> Any:
    """The network with its matrices in bfloat16: half the size, and what most of sampling computes in anyway."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, model)


def with_statistics(vae: VAE, clips: Clips) -> VAE:
    """The VAE with the mean and deviation of each channel of its latents over some clips, in place of 0 and 1."""
    encode = jax.jit(lambda vae, video: vae.encode(to_pixels(video)))
    numbers = np.linspace(0, len(clips) - 1, CLIPS).astype(int)
    latents = np.concatenate([np.asarray(encode(vae, clips[int(i)].video[None])) for i in numbers])
    mean, std = latents.mean((0, 1, 2, 3)), latents.std((0, 1, 2, 3))
    raw_mean, raw_std = (np.array(x) for x in (vae.config.latents_mean, vae.config.latents_std))
    mean, std = mean * raw_std + raw_mean, std * raw_std  # those that it had are taken back
    result: VAE = nnx.merge(*nnx.split(vae))  # another tree of the same arrays
    result.config = dataclasses.replace(
        vae.config, latents_mean=tuple(map(float, mean)), latents_std=tuple(map(float, std))
    )
    return result
