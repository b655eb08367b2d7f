"""What can be known to be wrong with a run before it begins."""

from __future__ import annotations

import math

from sharding.mesh import MeshShape
from sharding.ulysses import check_heads
from wanjax.conditioning.frames import latent_frames, latent_size
from wanjax.config import DiTConfig, TrainConfig
from wanjax.errors import InputError
from wanjax.training.initialize import start_config
from wanjax.training.objectives.base import Objective
from wanjax.training.objectives.contrastive import Contrastive
from wanjax.training.objectives.flow_matching import FlowMatching, in_dtypes
from wanjax.training.objectives.reconstruction import Reconstruction
from wanjax.weights import Checkpoint


def objective(config: TrainConfig) -> Objective:
    """What the run trains.

    Raises:
      InputError: it is none of what there is, or more than one; or as `network`.
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
    return FlowMatching(config, network(config))


def network(config: TrainConfig) -> DiTConfig:
    """The network to train: the checkpoint's or the configured one, which may have more inputs.

    Raises:
      InputError: there is neither, or they differ, or the checkpoint cannot be used.
    """
    if config.checkpoint is None:
        if config.lora is not None:
            raise InputError("lora without a checkpoint to train adapters for; give --checkpoint, or leave lora None")
        if config.dit is None:
            raise InputError("no network; a checkpoint or a config with `dit` is needed; give --checkpoint")
        return in_dtypes(config.dit, config)
    checkpoint = Checkpoint(config.checkpoint)
    dit = in_dtypes(config.dit or checkpoint.config("dit"), config)
    checkpoint.check("dit", start_config(checkpoint, dit))
    return dit


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
    check_validation(config, objective)
    if isinstance(objective, Contrastive) and config.accumulate > 1:
        raise InputError("--accumulate for contrastive learning; clips are compared with the whole batch; use 1")
    if isinstance(objective, FlowMatching):
        check_heads(objective.dit.num_heads, mesh.ulysses)
    check_batch(config, mesh)
    latent_frames(config.frames)
    latent_size(config.height, config.width)


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


def check_validation(config: TrainConfig, objective: Objective) -> None:
    """Whether what the run asks of held-out clips can be had.

    Raises:
      InputError: there are none, or the network cannot be sampled.
    """
    for name in ("validate_every", "sample_every"):
        flag, every = "--" + name.replace("_", "-"), getattr(config, name)
        if every < 0:
            raise InputError(f"{flag} {every}; whole numbers from 0 (never) are accepted; use {flag} 0")
        if every and config.validation is None:
            raise InputError(f"{flag} {every} without held-out clips; set validation in the config, or use {flag} 0")
    if config.sample_every and not isinstance(objective, FlowMatching):
        raise InputError("--sample-every for a VAE or for towers; the DiT alone can be sampled; use --sample-every 0")
    for name in ("validation_batches", "sample_clips", "sample_steps"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} {getattr(config, name)}; whole numbers from 1 are accepted; change the config")
