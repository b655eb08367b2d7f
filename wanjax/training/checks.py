"""Validates a TrainConfig before anything is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sharding.mesh import MeshShape
from wanjax.conditioning.frames import latent_frames, latent_size
from wanjax.config import WAN_VAE, DiTConfig, TrainConfig
from wanjax.errors import InputError

if TYPE_CHECKING:
    from wanjax.training.objectives.base import Objective


def check(config: TrainConfig, objective: Objective, mesh: MeshShape) -> None:
    """Whether the run can be made.

    Raises:
      InputError: a number is out of range, or does not divide by another.
    """
    if config.workdir is None:
        raise InputError("no workdir; a folder for checkpoints and metrics is needed; give --workdir")
    for name in ("batch", "accumulate", "steps", "save_every", "keep"):
        if getattr(config, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {getattr(config, name)}; whole numbers from 1 are accepted; use {flag} 1")
    if not 0 < config.learning_rate < math.inf:
        raise InputError(f"--learning-rate {config.learning_rate}; a number above 0 is accepted; 1e-4 is the paper's")
    if not 0 <= config.seed < 2**31:  # part of the state, as an int32
        raise InputError(f"--seed {config.seed}; whole numbers from 0 to 2147483647 are accepted; use --seed 0")
    if config.cooldown and config.warmup + config.cooldown > config.steps:
        needed = config.warmup + config.cooldown
        raise InputError(
            f"--steps {config.steps} with warmup {config.warmup} and cooldown {config.cooldown}; the learning rate has "
            f"to rise before it falls; use --steps {needed} or more, or change the config"
        )
    check_validation(config)
    objective.check(mesh)
    check_batch(config, mesh)
    vae, patch_size = config.vae or WAN_VAE, (config.dit or DiTConfig()).patch_size
    latent_frames(config.frames, vae)
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
    for name in ("validate_every", "sample_every"):
        flag, every = "--" + name.replace("_", "-"), getattr(config, name)
        if every < 0:
            raise InputError(f"{flag} {every}; whole numbers from 0 (never) are accepted; use {flag} 0")
        if every and config.validation is None:
            raise InputError(f"{flag} {every} without held-out clips; set validation in the config, or use {flag} 0")
    for name in ("validation_batches", "sample_clips", "sample_steps"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} {getattr(config, name)}; whole numbers from 1 are accepted; change the config")
