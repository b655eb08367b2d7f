"""Train on a mesh of any number of devices and hosts.

    wanjax train --config configs/train_tiny.py --workdir out/train

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

from wanjax.cli import Parser, add_settings, given_settings
from wanjax.config import TrainConfig, load_config

if TYPE_CHECKING:
    from sharding.mesh import MeshShape
    from wanjax.training.checkpoint import TrainCheckpoints
    from wanjax.training.objectives import Objective
    from wanjax.training.state import TrainState


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax train", description=__doc__)
    parser.add_argument("--config", metavar="FILE", required=True, help="configs/*.py with get_config() -> TrainConfig")
    add_settings(parser, TrainConfig)
    hosts = parser.add_argument_group("several hosts without a cluster manager")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    hosts.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    hosts.add_argument("--process-id", type=int, metavar="I", help="which this is, from 0")
    return parser


def parse(argv: list[str] | None = None) -> tuple[TrainConfig, argparse.Namespace]:
    """Flags over configuration file over defaults; and where the other processes are."""
    flags = make_parser().parse_args(argv)
    given = given_settings(flags, TrainConfig)
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
    from wanjax.training.objectives import make_objective

    # ---- processes, before anything asks for a device
    use_tpu_options()
    distributed.initialize(flags.coordinator, flags.processes, flags.process_id)

    # ---- everything that can be wrong, before hours of work
    shape = parse_mesh(config.mesh, jax.device_count())
    objective = make_objective(config)
    checks.check(config, objective, shape)
    with jax.set_mesh(make_mesh(shape)):
        # ---- state: of the newest checkpoint, or of the beginning
        checkpoints, state, position = open_state(config, objective)
        announce(config, objective, shape, state)

        # ---- data, at the state's position
        data = objective.open_data(config)
        batches = Batches(data.source, config.batch, position, encode=data.encode)

        # ---- the work
        with failures_in_one_line():
            held_out = validation.open_validation(config, objective, data)
            state, finished = loop.train(config, objective, state, batches, checkpoints, held_out)
        weights = objective.export(objective.eval_model(state)) if finished else None
        conclude(checkpoints, weights, finished)
        checkpoints.close()


def open_state(config: TrainConfig, objective: Objective) -> tuple[TrainCheckpoints, TrainState, int]:
    """The run's checkpoints, the state to go on from, and how many batches it has seen."""
    from wanjax.training.checkpoint import TrainCheckpoints
    from wanjax.training.state import abstract_state, init_state, resumed

    assert config.workdir is not None
    checkpoints = TrainCheckpoints(config.workdir, config.keep)
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
        distributed.exit_immediately(1)
    except loop.NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def conclude(checkpoints: TrainCheckpoints, weights: Path | None, finished: bool) -> None:
    """Print how the run ended, and where what it made is."""
    from sharding.distributed import is_main

    if is_main():
        if weights is not None:
            print(f"weights: {weights}")
        how = "done" if finished else "stopped by SIGTERM; the same command goes on"
        print(f"{how}: step {checkpoints.latest} in {checkpoints.path}")
