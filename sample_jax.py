"""Two pictures and a sentence go in, a video comes out.

    python sample_jax.py --checkpoint Wan2.1-FLF2V-14B-720P --first-frame a.png --last-frame b.png --prompt "..."

Defaults come from --config (configs/*.py) and from the checkpoint; flags override them. Without either, the small model
that ships with the package fills in between two frames of its own.
On several hosts run it on each: TPU pods and Slurm need no more, others JAX_COORDINATOR_ADDRESS=HOST:PORT,
JAX_NUM_PROCESSES and JAX_PROCESS_ID. The first one prints and writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from wanjax import demo
from wanjax.cli import Parser, exit_codes
from wanjax.config import SampleConfig, load_config
from wanjax.errors import InputError

if TYPE_CHECKING:
    from wanjax.sampling.pipeline import Pipeline
    from wanjax.sampling.request import Request
    from wanjax.sampling.result import Result

HELP = {
    "checkpoint": "folder in the Diffusers or the official layout",
    "first_frame": "picture the video begins with (without: text to video)",
    "last_frame": "picture the video ends with (without: image to video)",
    "prompt": "what happens",
    "negative_prompt": "what to avoid (default: the official list)",
    "output": ".mp4, .gif, .npy (uint8 [f, h, w, 3]) or a folder for .png",
    "height": "pixels, a multiple of 16 (default: the first frame's aspect ratio at the configured area)",
    "width": "pixels, a multiple of 16",
    "frames": "4n+1",
    "fps": "frames per second of the output file",
    "steps": "solver steps",
    "guidance": "classifier-free guidance scale; 1 turns it off and halves the time",
    "shift": "timestep shift (default: the checkpoint's)",
    "solver": "solver",
    "seed": "of the initial noise",
    "dtype": "of weights and activations",
    "conventions": "whose schedule and preprocessing; the published models were trained with the official ones",
    "initial_noise": ".npy [1, 16, f, h, w] instead of the seed's noise",
    "save_latents": ".npy [1, 16, f, h, w]: also write the normalised latents",
    "quantize": "format of the weights and products of the DiT's blocks (default: as the checkpoint is)",
    "attention": "kernel of self-attention; auto: the best exact one; int8fp8: in 8 bits (on GPUs cuDNN's bfloat16)",
    "cache": "run the DiT's blocks at some steps only: off, fixed:K, teacache:T or magcache:T",
    "cfg_cache": "run the unconditional branch at every K-th step of the later part only: off or K",
    "calibration": "file made by python -m wanjax.sampling.calibrate, for teacache, magcache and cfg-cache",
    "compile_cache": "folder of compiled programs, or off (default: WANJAX_COMPILE_CACHE, or the user's cache)",
    "mesh": "devices along data, fsdp, ring, ulysses, such as data=2,ulysses=-1 (-1: what is left)",
}
CHOICES = {
    "solver": ("unipc", "dpmpp", "euler"),
    "dtype": ("bfloat16", "float32"),
    "conventions": ("official", "diffusers"),
    "quantize": ("off", "fp8", "int8"),
    "attention": ("auto", "reference", "flash", "int8fp8"),
}
TYPES: dict[str, type] = {
    **dict.fromkeys(("height", "width", "frames", "steps", "seed"), int),
    **dict.fromkeys(("fps", "guidance", "shift"), float),
}


def parse(argv: list[str] | None = None) -> SampleConfig:
    """Flags over configuration file over defaults."""
    parser = Parser("sample_jax.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="configs/*.py with get_config() -> SampleConfig")
    for name, text in HELP.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=TYPES.get(name, str), choices=CHOICES.get(name), help=text)
    parser.add_argument("--fast", action="store_true", default=None, help="the best of the caches together")
    parser.add_argument("--lora", action="append", metavar="PATH[:STRENGTH]", help="adapters; may be given repeatedly")
    text = "adapters into the weights, or beside them (default: merged, but not into a checkpoint in 8 bits)"
    parser.add_argument("--lora-merge", action=argparse.BooleanOptionalAction, help=text)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    given |= {"lora": tuple(given["lora"])} if "lora" in given else {}
    file = given.pop("config", None)
    default = SampleConfig if "checkpoint" in given else demo.get_config
    return dataclasses.replace(load_config(file, SampleConfig) if file else default(), **given)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    config = parse(argv)

    from sharding import distributed  # here: --help and bad flags need none of these
    from sharding.xla_options import TPU_OPTIONS, TPU_OPTIONS_8_BIT, use_tpu_options
    from wanjax.sampling import compile_cache
    from wanjax.sampling.pipeline import Pipeline
    from wanjax.weights import quantize

    # ---- the other hosts, before anything asks for a device
    use_tpu_options(TPU_OPTIONS_8_BIT if quantize.in_8_bits(config) else TPU_OPTIONS)
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
        distributed.leave(1)

    # ---- files appear once, and whole or not at all
    if distributed.is_main():
        write(request, result)


def announce(pipe: Pipeline, request: Request) -> None:
    """Print what will be done, if its outputs can be written."""
    from wanjax import media
    from wanjax.weights import lora

    config = request.config
    media.check_output(config.output)
    if config.save_latents:
        media.check_output(config.save_latents, accepted=(".npy",))
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


if __name__ == "__main__":
    with exit_codes():
        main()
