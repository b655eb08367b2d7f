"""Train on a mesh of any number of devices and hosts.

    python train_jax.py --config configs/train_tiny.py --workdir out/train

The same command again goes on from the newest checkpoint in --workdir. SIGTERM saves and ends the run with exit code 0.
On several hosts run it on each: TPU pods and Slurm need no more, others --coordinator, --processes and --process-id.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from wanjax.cli import Parser, exit_codes
from wanjax.config import TrainConfig, load_config

if TYPE_CHECKING:
    from sharding.mesh import MeshShape
    from wanjax.training.checkpoint import Checkpoints
    from wanjax.training.objectives.base import Objective
    from wanjax.training.state import TrainState

HELP = {
    "workdir": "folder for checkpoints, metrics and samples",
    "checkpoint": "weights to start from: a folder in the Diffusers or the official layout",
    "encoders": "checkpoint whose VAE, umT5 and CLIP encode the clips (default: --checkpoint)",
    "mesh": "devices along data, fsdp, ring, ulysses, such as data=2,ulysses=-1 (-1: what is left)",
    "batch": "samples in a step, over all hosts",
    "accumulate": "parts of a batch, computed one after the other",
    "steps": "last step",
    "seed": "of data order, noise and random weights",
    "learning_rate": "after the warm-up",
    "save_every": "steps between checkpoints",
    "keep": "newest checkpoints that stay",
    "validate_every": "steps between losses on held-out clips, 0: never",
    "sample_every": "steps between samples of held-out clips, 0: never",
    "remat": "what the backward pass computes again",
    "dtype": "of activations",
}
CHOICES = {
    "remat": ("none", "block", "attention", "dots", "offload"),
    "dtype": ("bfloat16", "float32"),
}
TYPES: dict[str, type] = {
    **dict.fromkeys(("batch", "accumulate", "steps", "seed", "save_every", "keep"), int),
    **dict.fromkeys(("validate_every", "sample_every"), int),
    "learning_rate": float,
}


def parse(argv: list[str] | None = None) -> tuple[TrainConfig, argparse.Namespace]:
    """Flags over configuration file over defaults; and where the other processes are."""
    parser = Parser("train_jax.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", required=True, help="configs/*.py with get_config() -> TrainConfig")
    for name, text in HELP.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=TYPES.get(name, str), choices=CHOICES.get(name), help=text)
    hosts = parser.add_argument_group("several hosts without a cluster manager")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    hosts.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    hosts.add_argument("--process-id", type=int, metavar="I", help="which this is, from 0")
    flags = parser.parse_args(argv)
    given = {name: value for name in HELP if (value := getattr(flags, name)) is not None}
    return dataclasses.replace(load_config(flags.config, TrainConfig), **given), flags


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    config, flags = parse(argv)

    import jax  # here: --help and bad flags need none of these

    from sharding import distributed
    from sharding.mesh import make_mesh, parse_mesh
    from sharding.xla_options import use_tpu_options
    from wanjax.data.batch import Batches
    from wanjax.training import checks, loop, validation
    from wanjax.training.data import open_data
    from wanjax.training.export import export

    # ---- processes, before anything asks for a device
    use_tpu_options()
    distributed.initialize(flags.coordinator, flags.processes, flags.process_id)

    # ---- everything that can be wrong, before hours of work
    shape = parse_mesh(config.mesh, jax.device_count())
    objective = checks.objective(config)
    checks.check(config, objective, shape)
    with jax.set_mesh(make_mesh(shape)):
        # ---- state: of the newest checkpoint, or of the beginning
        checkpoints, state, position = open_state(config, objective)
        announce(config, objective, shape, state)

        # ---- data, at the state's position
        data = open_data(config, objective)
        batches = Batches(data.source, config.batch, position, encode=data.encode)

        # ---- the work
        with failures_in_one_line():
            held_out = validation.open_validation(config, objective, data)
            state, finished = loop.train(config, objective, state, batches, checkpoints, held_out)
        weights = export(config, objective, state.best) if finished else None
        conclude(checkpoints, weights, finished)
        checkpoints.close()


def open_state(config: TrainConfig, objective: Objective) -> tuple[Checkpoints, TrainState, int]:
    """The run's checkpoints, the state to go on from, and how many batches it has seen."""
    from wanjax.training.checkpoint import Checkpoints
    from wanjax.training.state import abstract_state, init_state, resumed

    assert config.workdir is not None
    checkpoints = Checkpoints(config.workdir, config.keep)
    if checkpoints.latest is None:
        return checkpoints, init_state(config, objective), 0
    state, position = checkpoints.restore(abstract_state(config, objective))
    return checkpoints, resumed(config, objective, state), position


def announce(config: TrainConfig, objective: Objective, shape: MeshShape, state: TrainState) -> None:
    """Print what will be trained, on what, from where."""
    import jax

    from sharding.distributed import is_main

    if is_main():
        size = sum(x.size for x in jax.tree.leaves(state.model))
        what = type(objective).__name__
        print(f"{what}, {size:,} parameters on {jax.device_count()} devices ({shape}), step {int(state.step)}")
        print(f"{config.data}; {config.batch} samples a step")


@contextlib.contextmanager
def failures_in_one_line() -> Iterator[None]:
    """A lost host, or a loss that is not finite, ends the process with one line and exit code 1."""
    from sharding import distributed
    from wanjax.training import loop

    try:
        with distributed.notice_lost_hosts():
            yield
    except distributed.LostHostError as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.leave(1)
    except loop.NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def conclude(checkpoints: Checkpoints, weights: Path | None, finished: bool) -> None:
    """Print how the run ended, and where what it made is."""
    from sharding.distributed import is_main

    if is_main():
        if weights is not None:
            print(f"weights: {weights}")
        how = "done" if finished else "stopped by SIGTERM; the same command goes on"
        print(f"{how}: step {checkpoints.latest} in {checkpoints.path}")


if __name__ == "__main__":
    with exit_codes():
        main()
