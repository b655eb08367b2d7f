"""Two pictures and a sentence go in, a video comes out.

    wanjax sample --checkpoint Wan2.1-FLF2V-14B-720P --first-frame a.png --last-frame b.png --prompt "..."

Defaults come from --config (configs/*.py) and from the checkpoint; flags override them. Without either, the small model
that ships with the package fills in between two frames of its own.
On several hosts run it on each: TPU pods and Slurm need no more, others JAX_COORDINATOR_ADDRESS=HOST:PORT,
JAX_NUM_PROCESSES and JAX_PROCESS_ID. The first one prints and writes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from wanjax import demo
from wanjax.cli import Parser, add_settings, given_settings
from wanjax.config import SampleConfig, load_config
from wanjax.errors import InputError

if TYPE_CHECKING:
    from wanjax.sampling.pipeline import Pipeline
    from wanjax.sampling.request import Request
    from wanjax.sampling.result import Result


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax sample", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="configs/*.py with get_config() -> SampleConfig")
    add_settings(parser, SampleConfig)
    return parser


def parse(argv: list[str] | None = None) -> SampleConfig:
    """Flags over configuration file over defaults."""
    flags = make_parser().parse_args(argv)
    given = given_settings(flags, SampleConfig)
    default = SampleConfig if "checkpoint" in given else demo.get_config
    return dataclasses.replace(load_config(flags.config, SampleConfig) if flags.config else default(), **given)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    config = parse(argv)

    from sharding import distributed  # here: --help and bad flags need none of these
    from sharding.xla_options import TPU_OPTIONS, TPU_OPTIONS_8_BIT, use_tpu_options
    from wanjax.sampling import compile_cache
    from wanjax.sampling.pipeline import Pipeline
    from wanjax.weights import quantize

    # ---- the other hosts, before anything asks for a device
    use_tpu_options(TPU_OPTIONS_8_BIT if quantize.is_quantized(config) else TPU_OPTIONS)
    distributed.initialize(saves_on_sigterm=False)

    compile_cache.use_persistent_cache(compile_cache.cache_folder(config.compile_cache))

    # ---- everything that can be wrong, before hours of work
    pipe = Pipeline(config, keep="one")  # there is one request only
    request = pipe.prepare()
    if distributed.is_main():
        announce(pipe, request)

    # ---- the work
    try:
        with distributed.notice_lost_hosts():
            result = pipe(request)
    except distributed.LostHostError as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.exit_immediately(1)

    # ---- files appear once, and whole or not at all
    if distributed.is_main():
        write(request, result)


def announce(pipe: Pipeline, request: Request) -> None:
    """Print what will be done, if its outputs can be written."""
    from wanjax.files import check_output
    from wanjax.weights import lora

    config = request.config
    check_output(config.output)
    if config.save_latents:
        check_output(config.save_latents, accepted=(".npy",))
    for file in pipe.networks.loras:
        print(lora.describe(file, pipe.dit))
    if config.note:
        print(config.note)
    frames, size = config.frames, f"{request.width}x{request.height}"
    print(
        f"{request.task}, {frames} frames of {size}, {config.solver} {config.steps} steps, guidance {config.guidance}"
    )


def write(request: Request, result: Result) -> None:
    """Write what was made, and print what it took."""
    import numpy as np

    from wanjax import media

    config = request.config
    if request.rules is not None:
        share = result.evaluations / config.steps
        print(f"DiT evaluations: {result.evaluations:g} of {config.steps} ({share:.0%})")
    if config.save_latents:
        media.save_array(config.save_latents, np.moveaxis(result.latents, -1, 1))
    try:
        media.write_video(config.output, result.video, config.fps)
    except OSError as error:  # the disk filled up during the hours of work: they shall not be lost
        rescued = Path(tempfile.gettempdir()) / f"wanjax-{os.getpid()}.npy"
        media.save_array(rescued, result.video)
        raise InputError(f"{config.output} cannot be written ({error}); the video is in {rescued} instead") from error
    print(f"{config.output}  ({', '.join(f'{stage} {s:.1f} s' for stage, s in result.seconds.items())})")
