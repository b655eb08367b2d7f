"""Measures, on a few prompts, how a checkpoint's network changes from step to step; the caches' rules are made of it.

    wanjax calibrate --config configs/flf2v_14b_720p.py --checkpoint Wan2.1-FLF2V-14B-720P-diffusers \\
        --prompts prompts.jsonl --output flf2v.json
    wanjax sample ... --cache magcache:0.1 --calibration flf2v.json

A line of --prompts is a prompt, or a JSON object of settings such as {"prompt": "..", "first_frame": "a.png",
"last_frame": "b.png"}; without the file, the settings' own prompt is measured. Each is one plain run without a decoder.
Prints a table, for each cache the threshold that would have run the blocks in about half of the steps, and which these
are; and with guidance above 1 from which step on the CFG cache would do no harm, which it then goes by.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from wanjax.cli import Parser, add_settings, given_settings, printable
from wanjax.config import SampleConfig, load_config
from wanjax.errors import InputError
from wanjax.untrusted import parse_json, read_text, reason

FLAGS = (
    *("checkpoint", "first_frame", "last_frame", "keyframe", "prompt", "negative_prompt", "height", "width", "frames"),
    *("lora", "lora_high", "lora_low", "guidance_low", "boundary", "boundary_step", "experts"),
    *(
        "steps",
        "solver",
        "sigmas",
        "timesteps",
        "guidance",
        "shift",
        "seed",
        "conventions",
        "quantize",
        "attention",
        "dtype",
        "mesh",
    ),
    *("dit", "dit_low", "vae", "text_encoder", "image_encoder", "tokenizer", "compile_cache"),
)
"""Those of `wanjax sample` that say what is measured."""
OF_A_PROMPT = ("prompt", "negative_prompt", "first_frame", "last_frame", "seed")
"""Settings that a line of --prompts may have."""


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax calibrate", description=__doc__)
    parser.add_argument(
        "--config", type=printable, metavar="FILE", help="configs/*.py with get_config() -> SampleConfig"
    )
    parser.add_argument(
        "--prompts", type=printable, metavar="FILE", help="a prompt, or a JSON object of settings, a line"
    )
    parser.add_argument(
        "--output", type=printable, metavar="FILE", default="calibration.json", help="(default: calibration.json)"
    )
    add_settings(parser, SampleConfig, FLAGS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    flags = make_parser().parse_args(argv)
    config = load_config(flags.config, SampleConfig) if flags.config else SampleConfig()
    config = dataclasses.replace(config, **given_settings(flags, SampleConfig, FLAGS))

    from sharding.xla_options import TPU_OPTIONS, TPU_OPTIONS_8_BIT, use_tpu_options
    from wanjax.files import check_apart, check_output
    from wanjax.sampling.calibrate import calibrate, report
    from wanjax.sampling.compile_cache import cache_folder, use_persistent_cache
    from wanjax.weights.quantize import is_quantized

    check_apart({"--output": flags.output}, {"--prompts": flags.prompts})
    check_output(flags.output, accepted=(".json",))
    use_tpu_options(TPU_OPTIONS_8_BIT if is_quantized(config) else TPU_OPTIONS)
    use_persistent_cache(cache_folder(config.compile_cache))
    calibration = calibrate(config, read_prompts(flags.prompts) if flags.prompts else [{}])
    calibration.write(flags.output)
    print(report(calibration))
    print(flags.output)


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Each line's settings, or its prompt.

    Raises:
      InputError: the file cannot be read, is empty, or a line is not understood.
    """
    try:
        lines = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(
            f"prompts {path} cannot be read ({reason(error)}); a text file is needed, a prompt a line"
        ) from error
    if not lines:
        raise InputError(f"prompts {path} is empty; a prompt a line is needed; give some")
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            settings: Any = parse_json(line) if line.startswith("{") else {"prompt": line}
        except ValueError as error:
            raise InputError(f"prompts {path} line {number} is not JSON ({error}); correct it") from error
        if unknown := settings.keys() - set(OF_A_PROMPT):
            raise InputError(
                f"prompts {path} line {number} sets {', '.join(unknown)}; accepted: {', '.join(OF_A_PROMPT)}"
            )
        prompts.append(settings)
    return prompts
