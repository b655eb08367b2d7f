"""Train on a mesh of any number of devices and hosts.

    wanjax train --config configs/train_tiny.py --workdir out/train

The same command again goes on from the newest checkpoint in --workdir. SIGTERM and
Ctrl-C save and end the run with exit code 0; a second Ctrl-C ends it at once.
On several hosts run it on each: TPU pods and Slurm need no more, others --coordinator, --processes and --process-id.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wanjax.cli import Parser, add_settings, check_counts, given_settings, printable, whole_number
from wanjax.config import TrainConfig, load_config
from wanjax.errors import InputError

if TYPE_CHECKING:
    from sharding.mesh import MeshShape
    from wanjax.training.checkpoint import TrainCheckpoints
    from wanjax.training.objectives import Objective
    from wanjax.training.state import TrainState


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax train", description=__doc__)
    parser.add_argument(
        "--config", type=printable, metavar="FILE", required=True, help="configs/*.py with get_config() -> TrainConfig"
    )
    add_settings(parser, TrainConfig)
    hosts = parser.add_argument_group("several hosts without a cluster manager")
    hosts.add_argument("--coordinator", type=printable, metavar="HOST:PORT", help="where process 0 listens")
    hosts.add_argument("--processes", type=whole_number, metavar="N", help="how many processes there are")
    hosts.add_argument("--process-id", type=whole_number, metavar="I", help="which this is, from 0")
    hosts.add_argument(
        "--host-timeout",
        type=whole_number,
        default=60,
        metavar="SECONDS",
        help="after which a process that is silent is lost, and the others end (default: 60)",
    )
    hosts.add_argument(
        "--stall-timeout",
        type=whole_number,
        default=600,
        metavar="SECONDS",
        help="after which a process that lives, but stands still while the others wait for it, ends all (default: 600)",
    )
    return parser


def load(flags: argparse.Namespace) -> TrainConfig:
    """Flags over configuration file over defaults."""
    return dataclasses.replace(load_config(flags.config, TrainConfig), **given_settings(flags, TrainConfig))


def parse(argv: list[str] | None = None) -> tuple[TrainConfig, argparse.Namespace]:
    """Flags over configuration file over defaults; and where the other processes are."""
    flags = make_parser().parse_args(argv)
    return load(flags), flags


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    flags = make_parser().parse_args(argv)
    check_counts(host_timeout=flags.host_timeout, stall_timeout=flags.stall_timeout)
    place = (flags.coordinator, flags.processes, flags.process_id)
    try:
        config = load(flags)
    except InputError as error:
        from sharding import distributed  # here: --help and bad flags need none of these

        distributed.fail_together(error, *place)
        raise

    from sharding import distributed
    from sharding.xla_options import use_tpu_options

    # ---- processes, before anything asks for a device
    use_tpu_options()
    distributed.initialize(*place, heartbeat_seconds=flags.host_timeout)
    with distributed.ending_together(flags.stall_timeout):
        distributed.check_same(version=code_version(), **vars(config))
        run(config, sys.argv if argv is None else ["wanjax", "train", *argv])


def run(config: TrainConfig, command: Sequence[str] = ()) -> None:
    """Train, on the processes that are there; `command` is written down as what began it."""
    import jax

    from wanjax.remote import place_for

    if config.workdir is None:
        train(config, command)  # which says so
        return
    with place_for(config.workdir, "--workdir", jax.process_count()) as workdir:
        train(dataclasses.replace(config, workdir=str(workdir)), command)


def train(config: TrainConfig, command: Sequence[str] = ()) -> None:
    """Train in a folder of this disk."""
    import jax

    from sharding.distributed import is_main
    from sharding.mesh import make_mesh, parse_mesh
    from wanjax.data.batch import Batches
    from wanjax.sampling.compile_cache import cache_folder, use_persistent_cache
    from wanjax.training import checks, loop, validation
    from wanjax.training.objectives import make_objective
    from wanjax.training.provenance import write_start

    # ---- everything that can be wrong, before hours of work
    use_persistent_cache(cache_folder(config.compile_cache))
    shape = parse_mesh(config.mesh, jax.device_count())
    objective = make_objective(config)
    checks.check(config, objective, shape)
    with hold_workdir(config), jax.set_mesh(make_mesh(shape)):
        # ---- state: of the newest checkpoint, or of the beginning
        checkpoints, state, position = open_state(config, objective)
        announce(config, objective, shape, state)
        if is_main():
            write_start(config, command, int(state.step))

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


def code_version() -> str:
    """Hash of the sources, which have to be the same on all hosts."""
    from wanjax.sampling import compile_cache

    return compile_cache.code_version()


def hold_workdir(config: TrainConfig) -> contextlib.AbstractContextManager[None]:
    """The run's folder for this run alone, held by the process that writes into it.

    Raises:
      InputError: another run has it, or it cannot be written to.
    """
    from sharding.distributed import is_main
    from wanjax.files import hold

    assert config.workdir is not None
    return hold(config.workdir, "--workdir") if is_main() else contextlib.nullcontext()


def open_state(config: TrainConfig, objective: Objective) -> tuple[TrainCheckpoints, TrainState, int]:
    """The run's checkpoints, the state to go on from, and how many batches it has seen."""
    from wanjax.training.checkpoint import TrainCheckpoints
    from wanjax.training.state import abstract_state, init_state, resumed

    assert config.workdir is not None
    checkpoints = TrainCheckpoints(config.workdir, config.keep)
    found = checkpoints.resume(abstract_state(config, objective), config.resume_from)
    if found is None:
        return checkpoints, init_state(config, objective), 0
    state, position = found
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
    import jax

    from sharding import distributed
    from wanjax.training import checkpoint, loop

    try:
        with distributed.notice_lost_hosts():
            yield
    except checkpoint.UnwritableError as error:
        if jax.process_count() > 1:  # the others are told
            raise
        print(f"error: {error}", file=sys.stderr)
        distributed.exit_immediately(2)  # the usual way out waits for what cannot be written, and fails at that
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
        how = "done" if finished else "stopped by SIGTERM or Ctrl-C; the same command goes on"
        print(f"{how}: step {checkpoints.latest} in {checkpoints.path}")
