"""Validates a TrainConfig before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharding.mesh import MeshShape
from wanjax.conditioning.frames import latent_frames, latent_size
from wanjax.config import WAN_VAE, DiTConfig, TrainConfig, check_network
from wanjax.data.captions import check_encoding
from wanjax.errors import InputError
from wanjax.training.trackers import check_trackers
from wanjax.weights import Checkpoint
from wanjax.weights.hub import checkpoint_folder

if TYPE_CHECKING:
    from wanjax.training.objectives.base import Objective


def check(config: TrainConfig, objective: Objective, mesh: MeshShape) -> None:
    """Whether the run can be made.

    Raises:
      InputError: numbers do not fit one another. That each is in its range is known, see `wanjax.settings`.
    """
    if config.workdir is None:
        raise InputError("no workdir; a folder for checkpoints and metrics is needed; give --workdir")
    falls = config.cooldown or config.lr_scheduler != "constant"
    if falls and config.warmup + config.cooldown > config.steps:
        needed = config.warmup + config.cooldown
        raise InputError(
            f"--steps {config.steps} with warmup {config.warmup} and cooldown {config.cooldown}; the learning rate has "
            f"to rise before it falls; use --steps {needed} or more, or change the config"
        )
    check_validation(config)
    check_trackers(config)
    check_encoding(config.caption_encoding)
    if config.encoders is not None:
        Checkpoint(checkpoint_folder(config.encoders))
    objective.check(mesh)
    for network in (config.dit, config.vae):
        if network is not None:
            check_network(network)
    check_batch(config, mesh)
    vae, patch_size = config.vae or WAN_VAE, (config.dit or DiTConfig()).patch_size
    for frames in (config.frames, *config.lengths):
        latent_frames(frames, vae)
    latent_size(config.height, config.width, vae, patch_size)


def check_batch(config: TrainConfig, mesh: MeshShape) -> None:
    """Whether the batch divides into parts, and these among the devices.

    Raises:
      InputError: it does not.
    """
    if config.batch % config.accumulate:
        raise InputError(
            f"batch {config.batch} in {config.accumulate} parts; the parts must be of the same size; "
            f"use --batch {-(-config.batch // config.accumulate) * config.accumulate}"
        )
    part = config.batch // config.accumulate
    if part % mesh.batch and part != 1:
        fits = config.accumulate * -(-part // mesh.batch) * mesh.batch
        raise InputError(
            f"batch {config.batch} in {config.accumulate} part(s) of {part} on data={mesh.data} x fsdp={mesh.fsdp}; "
            f"a part must be 1 or a multiple of {mesh.batch}; use --batch {fits}, "
            "or give devices to ring and ulysses"
        )


def check_validation(config: TrainConfig) -> None:
    """Whether what the run asks of held-out clips can be had.

    Raises:
      InputError: there are none.
    """
    if config.sample_prompts is not None and not config.sample_every:
        raise InputError("--sample-prompts without --sample-every; give that too, such as --sample-every 500")
    for name in ("validate_every", "sample_every"):
        flag, every = "--" + name.replace("_", "-"), getattr(config, name)
        has_other = name == "sample_every" and config.sample_prompts is not None
        if every and config.validation is None and not has_other:
            raise InputError(f"{flag} {every} without held-out clips; set validation in the config, or use {flag} 0")
