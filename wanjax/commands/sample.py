"""Two pictures and a sentence go in, a video comes out.

    wanjax sample --checkpoint Wan2.1-FLF2V-14B-720P --first-frame a.png --last-frame b.png --prompt "..."

Defaults come from --config (configs/*.py) and from the checkpoint; flags override them. Without either, the small model
that ships with the package fills in between two frames of its own.
On several hosts run it on each: TPU pods and Slurm need no more, others JAX_COORDINATOR_ADDRESS=HOST:PORT,
JAX_NUM_PROCESSES and JAX_PROCESS_ID. The first one prints and writes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from wanjax import demo
from wanjax.cli import Parser, add_settings, given_settings, printable
from wanjax.config import SampleConfig, load_config
from wanjax.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from wanjax.sampling.pipeline import Pipeline, Step
    from wanjax.sampling.request import Request
    from wanjax.sampling.result import Result
    from wanjax.sampling.windows import Plan


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax sample", description=__doc__)
    parser.add_argument(
        "--config", type=printable, metavar="FILE", help="configs/*.py with get_config() -> SampleConfig"
    )
    add_settings(parser, SampleConfig)
    screen = parser.add_argument_group("screen")
    screen.add_argument("--quiet", action="store_true", help="print the path of the video, and nothing else")
    screen.add_argument("--json", action="store_true", help="print what was made as a line of JSON, and nothing else")
    return parser


def parse(argv: list[str] | None = None) -> SampleConfig:
    """Flags over the preset that they name over configuration file over defaults."""
    return configured(make_parser().parse_args(argv))


def configured(flags: argparse.Namespace) -> SampleConfig:
    """The configuration of flags that were read."""
    given = given_settings(flags, SampleConfig)
    default = SampleConfig if {"checkpoint", "dit"} & given.keys() else demo.get_config
    config = load_config(flags.config, SampleConfig) if flags.config else default()
    if "preset" in given:
        from wanjax.sampling import presets

        config = presets.apply(config, given.pop("preset"))
    if given.get("loop"):  # its last frame is the first, whatever a configuration has
        given = {"last_frame": None, **given}
    if "continue_" in given:
        given = {"first_frame": None, **given}
    return dataclasses.replace(config, **given)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    flags = make_parser().parse_args(argv)
    try:
        config = configured(flags)
        from wanjax.weights import quantize  # here: --help and bad flags need none of these

        is_8_bit = quantize.is_quantized(config)
    except InputError as error:
        if "JAX_COORDINATOR_ADDRESS" in os.environ:  # the others are told
            from sharding import distributed

            distributed.fail_together(error, None, None, None)
        raise

    from sharding import distributed
    from sharding.xla_options import TPU_OPTIONS, TPU_OPTIONS_8_BIT, use_tpu_options
    from wanjax.remote import sent
    from wanjax.sampling import compile_cache

    # ---- the other hosts, before anything asks for a device
    use_tpu_options(TPU_OPTIONS_8_BIT if is_8_bit else TPU_OPTIONS)
    distributed.initialize(saves_on_sigterm=False)
    with distributed.ending_together():
        distributed.check_same(version=compile_cache.code_version(), **vars(config))
        with sent(config.output, "--output") as output:
            made = run(dataclasses.replace(config, output=output), is_silent=flags.quiet or flags.json)
        if made is not None:
            conclude(*made, config.output, flags)


def run(config: SampleConfig, is_silent: bool) -> tuple[Request, Result, Plan | None] | None:
    """Make a video, and write it to this disk, on the processes that are there; None on hosts but the first."""
    from sharding import distributed
    from wanjax.sampling import compile_cache, windows
    from wanjax.sampling.pipeline import Pipeline

    compile_cache.use_persistent_cache(compile_cache.cache_folder(config.compile_cache))

    # ---- everything that can be wrong, before hours of work
    check_outputs(config)
    is_long = windows.is_needed(config)
    pipe = Pipeline(config, keep="auto" if is_long else "one")  # of what is not long there is one request only
    plan = windows.prepare(pipe) if is_long else None
    request = plan.request if plan else pipe.prepare()
    if distributed.is_main() and not is_silent:
        announce(pipe, request, plan)

    # ---- the work; files appear once, and whole or not at all
    work = Work(request, make_preview(pipe, config))
    try:
        with work.keeping(), distributed.notice_lost_hosts():
            told = {"on_step": work.on_step, "on_latents": work.on_latents, "progress": not is_silent}
            result = windows.run(pipe, plan, on_window=work.on_window, **told) if plan else pipe(request, **told)
            if distributed.is_main():
                work.write(result, plan)
    except distributed.LostHostError as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.exit_immediately(1)
    return (request, result, plan) if distributed.is_main() else None


def check_outputs(config: SampleConfig) -> None:
    """Whether what will be made can be written, and not over what it is made of.

    Raises:
      InputError: it cannot.
    """
    from wanjax.files import ARRAY, check_apart, check_output
    from wanjax.media import check_fps
    from wanjax.sampling.preview import PICTURES

    pictures = {f"--{name}-frame": getattr(config, f"{name}_frame") for name in ("first", "last")}
    inputs = {flag: path for flag, path in pictures.items() if isinstance(path, str)}
    inputs |= {"--initial-noise": config.initial_noise, "--calibration": config.calibration}
    inputs["--continue"] = config.continue_
    loras = (*config.lora, *config.lora_high, *config.lora_low)
    inputs |= {f"--lora {path}": path.rpartition(":")[0] or path for path in loras}
    inputs |= {f"--keyframe {x}": x.partition("=")[2] for x in config.keyframe if isinstance(x, str)}
    files = ("dit", "dit_low", "vae", "text_encoder", "image_encoder", "tokenizer")
    inputs |= {f"--{name.replace('_', '-')}": getattr(config, name) for name in files}
    inputs["--preview-decoder"] = config.preview_decoder
    outputs = {"--output": config.output, "--save-latents": config.save_latents, "--preview": config.preview}
    check_apart(outputs, inputs)
    check_output(config.output)
    if config.preview is not None:
        check_output(config.preview, PICTURES)
    elif config.preview_decoder is not None:
        raise InputError(
            f"--preview-decoder {config.preview_decoder} without --preview; give the file to write as that"
        )
    check_fps(config.output, config.fps)
    if config.save_latents is not None:
        check_output(config.save_latents, ARRAY)


def announce(pipe: Pipeline, request: Request, plan: Plan | None) -> None:
    """Print what will be done; of a long video the plan, and the first window's request."""
    from wanjax.sampling.summary import memory, summary
    from wanjax.terminal import painted
    from wanjax.weights import lora

    config = request.config
    for line in request.notes:
        print(line, file=sys.stderr)
    if config.note:
        print(config.note)
    if plan:
        places = ", ".join(map(str, plan.starts))
        print(f"{len(plan.starts)} windows of {plan.length} frames, from frames {places}; the first:")
    first, *others = summary(pipe, request)
    print(painted(first, "bold"))
    for line in others[:-1]:
        print(line)
    for name, files in pipe.networks.loras.items():
        expert = {1: "", 2: {"dit": "high noise: ", "dit_low": "low noise: "}.get(name, "")}[len(pipe.networks.loras)]
        for file in files:
            print(f"  {expert}{lora.describe_adapters(file, pipe.dit)}")
    print(painted(others[-1], "yellow") if memory(pipe, request)[1] else others[-1], flush=True)


def make_preview(pipe: Pipeline, config: SampleConfig) -> Callable[[Step], None] | None:
    """What writes a preview after steps, on the first host; None: it is not asked for."""
    from sharding.distributed import is_main
    from wanjax.sampling.preview import Writer

    if config.preview is None:
        return None
    preview = pipe.preview(config.preview_decoder)
    writer = Writer(preview, config.preview, config.fps)
    return lambda step: writer(step.done, step.steps, step.x0) if is_main() else None


class Work:
    """What a run has come to, for when it does not end well: hours are in it.

    Args:
      request: what runs.
      preview: is shown every step; None: nobody asked for it.
    """

    def __init__(self, request: Request, preview: Callable[[Step], None] | None):
        self.request, self.preview, self.steps, self.latents = request, preview, 0, None
        self.begun: np.ndarray | None = None

    def on_step(self, step: Step) -> None:
        """As `Pipeline.__call__` tells."""
        self.steps = step.done
        if self.preview is not None:
            self.preview(step)

    def on_latents(self, latents: np.ndarray) -> None:
        """Likewise."""
        self.latents = latents

    def on_window(self, begun: np.ndarray) -> None:
        """As `windows.run` tells."""
        self.begun, self.steps, self.latents = begun, 0, None

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """If the work fails or is interrupted, the frames of whole windows and latents that are denoised are written.

        Raises:
          InputError: it failed; where they are, and how latents become a video.
          KeyboardInterrupt: it was interrupted, which is said before.
        """
        from sharding.distributed import is_main
        from wanjax.untrusted import reason

        try:
            yield
        except KeyboardInterrupt:
            if is_main():
                print(f"\n{self.interrupted()}", file=sys.stderr, flush=True)
            raise
        except Exception as error:
            has_nothing = self.latents is None and self.begun is None
            if has_nothing or isinstance(error, InputError) or not is_main():
                raise
            failed = "a later window failed" if self.latents is None else "the latents could not be decoded"
            raise InputError(f"{failed} ({reason(error)}); {self.keep()}") from error

    def interrupted(self) -> str:
        """What an interrupt leaves behind, in words."""
        when = f"after {self.steps} of {self.request.config.steps} steps"
        if self.latents is not None:
            when = "after the denoising"
        elif self.begun is None:
            return f"interrupted {when}: nothing was written"
        try:
            return f"interrupted {when}: {self.keep()}"
        except InputError as error:
            return f"interrupted {when}: {error}"

    def keep(self) -> str:
        """Write the frames of whole windows, and the latents; where they are, and what to do, in words.

        Raises:
          InputError: they are elsewhere, or nowhere.
        """
        from wanjax import media
        from wanjax.files import Output, write_all

        config, latents, begun = self.request.config, self.latents, self.begun
        place, outputs, words = Path(config.output), [], []
        if begun is not None:
            path = place.with_name(f"{place.stem}-begun{place.suffix}")
            outputs.append(media.video_output(path, begun, config.fps))
            words.append(f"the first {len(begun)} frames are in {path}")
        if latents is not None:
            path = Path(config.save_latents or place.with_suffix(".latents.npy"))
            outputs.append(Output("latents", path, lambda place: write_latents(place, latents)))
            words.append(f"the latents are in {path}; make the video of them with wanjax decode {path}")
        try:
            write_all(*outputs)
        except InputError as error:
            raise InputError(f"{error}; make the video of latents with wanjax decode") from error
        return "; ".join(words)

    def write(self, result: Result, plan: Plan | None) -> None:
        """Write what was made, with the settings that made it."""
        from wanjax import media
        from wanjax.files import Output, write_all
        from wanjax.sampling import recorded

        request, kept = self.request, self.request.config.save_latents
        config = plan.config if plan else request.config
        settings = recorded.settings(dataclasses.replace(request, config=config))
        text = recorded.to_text(settings, (*config.lora, *config.lora_high, *config.lora_low))
        latents = [Output("latents", kept, lambda place: write_latents(place, result.latents))] if kept else []
        write_all(*latents, media.video_output(config.output, result.video, config.fps, text))


def write_latents(path: Path, latents: np.ndarray | None) -> None:
    """Latents `[1, f, h, w, c]` as `.npy`, channels first."""
    from wanjax import media

    assert latents is not None
    media.save_array(path, latents.swapaxes(-1, -2).swapaxes(-2, -3).swapaxes(-3, -4))  # [1, c, f, h, w]


def conclude(request: Request, result: Result, plan: Plan | None, place: str, flags: argparse.Namespace) -> None:
    """Print what was made and what it took, as the flags ask for it; the video's place is last."""
    from wanjax.sampling import windows
    from wanjax.sampling.result import given_psnr

    config = request.config
    given = given_psnr(request, result) if len(request.frames) and len(result.video) and not plan else {}
    seams = windows.seams(result.video, plan.seams) if plan else {}
    if flags.json:
        made = {"video": place, "latents": config.save_latents, "task": request.task}
        made |= {"frames": len(result.video), "width": request.width, "height": request.height, "fps": config.fps}
        made |= {"steps": config.steps, "seed": config.seed, "evaluations": result.evaluations}
        made |= {"seconds": {stage: round(s, 3) for stage, s in result.seconds.items()}}
        print(json.dumps(made | {"given_frames_psnr": {str(i): round(psnr, 2) for i, psnr in given.items()}}))
        return
    if not flags.quiet:
        if seams:
            print(f"change at seams, of the usual one: {', '.join(f'frame {i} {x:.2f}' for i, x in seams.items())}")
        if given:
            print(f"given frames, decoded: {', '.join(f'frame {i} {psnr:.1f} dB' for i, psnr in given.items())}")
        if request.rules is not None:
            share = result.evaluations / config.steps
            print(f"DiT evaluations: {result.evaluations:g} of {config.steps} ({share:.0%})")
        stages = ", ".join(f"{stage} {s:.1f} s" for stage, s in result.seconds.items())
        print(f"{sum(result.seconds.values()):.1f} s: {stages}")
    print(place)
