"""Measures, on a few prompts, how a checkpoint's network changes from step to step; the caches' rules are made of it.

    python -m wanjax.sampling.calibrate --config configs/flf2v_14b_720p.py \\
        --checkpoint Wan2.1-FLF2V-14B-720P-diffusers --prompts prompts.jsonl --output flf2v.json
    python sample_jax.py ... --cache magcache:0.1 --calibration flf2v.json

A line of --prompts is a prompt, or a JSON object of settings such as {"prompt": "..", "first_frame": "a.png",
"last_frame": "b.png"}; without the file, the settings' own prompt is measured. Each is one plain run without a decoder.
Prints a table, for each cache the threshold that would have run the blocks in about half of the steps, and which these
are; and with guidance above 1 from which step on the CFG cache would do no harm, which it then goes by.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding.rules import replicate
from sharding.xla_options import TPU_OPTIONS, TPU_OPTIONS_8_BIT, use_tpu_options
from wanjax import media
from wanjax.cli import Parser, exit_codes
from wanjax.config import SampleConfig, load_config
from wanjax.diffusion import caching
from wanjax.diffusion.denoise import network_input
from wanjax.diffusion.guidance import guided
from wanjax.errors import InputError
from wanjax.models.dit import Context, DiT
from wanjax.sampling import cache_rules
from wanjax.sampling.calibration import Calibration, calibrated_for
from wanjax.sampling.compile_cache import cache_folder, use_persistent_cache
from wanjax.sampling.pipeline import Pipeline, Step
from wanjax.sampling.request import Request
from wanjax.weights.quantize import in_8_bits

DEGREE = 4  # of teacache's polynomial, as published

FLAGS: dict[str, type] = {
    **dict.fromkeys(("checkpoint", "first_frame", "last_frame", "prompt", "negative_prompt", "solver"), str),
    **dict.fromkeys(("dtype", "conventions", "quantize", "attention", "mesh", "compile_cache"), str),
    **dict.fromkeys(("height", "width", "frames", "steps", "seed"), int),
    **dict.fromkeys(("guidance", "shift"), float),
}


class Change(NamedTuple):
    """From a step to the next, scalars: relative L1 changes of the first block's modulated input and of the residual,
    the logarithm of the residual's growth, and with guidance the L1 change of the branches' difference, relative to the
    conditional velocity.
    """

    modulated_input: jax.Array
    residual: jax.Array
    growth: jax.Array
    cfg_delta: jax.Array | None


class Measurements(NamedTuple):
    """Of a step: the first block's modulated input `[1, l, e]`, the residual `[branches, l, e]` and, with guidance, the
    unconditional less the conditional velocity `[1, f, h, w, c]`; and what changed since the step before, which says
    nothing at the first.
    """

    modulated_input: jax.Array
    residual: jax.Array
    cfg_delta: jax.Array | None
    change: Change


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measured:
    """The plain predictor, which measures how the network changes from step to step; for one video.

    dit, context, control, guidance: as `wanjax.diffusion.denoise.Guided`'s, of batch 1.
    """

    dit: DiT
    context: Context
    control: jax.Array | None
    guidance: jax.Array | float

    def init(self, sample: jax.Array) -> Measurements:
        """Zeros."""
        branches = self.context.k.shape[1]
        x = self.dit.embed(network_input(sample, self.control), jnp.zeros(1)).x
        cfg_delta, none = (replicate(jnp.zeros(sample.shape)), jnp.zeros(())) if branches == 2 else (None, None)
        change = Change(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()), none)
        return Measurements(jnp.zeros_like(x), jnp.zeros_like(caching.per_branch(x, branches)), cfg_delta, change)

    def __call__(
        self, i: jax.Array, timestep: jax.Array, sample: jax.Array, memory: Measurements
    ) -> tuple[jax.Array, Measurements]:
        """See `wanjax.diffusion.denoise.Predictor`."""
        branches, dit = self.context.k.shape[1], self.dit
        tokens = dit.embed(network_input(sample, self.control), timestep[None])
        velocity, residual = caching.evaluate(dit, tokens, self.context, branches)
        modulated_input, length = dit.modulated_input(tokens), tokens.rotation.length
        cfg_delta = velocity[1:] - velocity[:1] if branches == 2 else None
        change = Change(
            caching.relative_change(modulated_input, memory.modulated_input, length),
            caching.relative_change(residual, memory.residual, length),
            growth(residual, memory.residual, length),
            moved(cfg_delta, memory.cfg_delta, velocity[:1]),
        )
        return guided(velocity, self.guidance, branches), Measurements(modulated_input, residual, cfg_delta, change)


def moved(x: jax.Array | None, before: jax.Array | None, velocity: jax.Array) -> jax.Array | None:
    """Mean of |x - before| over that of the conditional |velocity|, all `[1, f, h, w, c]`; None without guidance."""
    return None if x is None or before is None else jnp.abs(x - before).mean() / jnp.abs(velocity).mean()


def growth(x: jax.Array, before: jax.Array, length: int) -> jax.Array:
    """Logarithm of the mean, over branches and tokens before `length`, of |x| over |before|, `[b, l, e]` both."""
    sizes, sizes_before = (jnp.linalg.norm(y.astype(jnp.float32), axis=-1) for y in (x, before))  # [b, l]
    ratios = jnp.where(jnp.arange(x.shape[1]) < length, sizes / jnp.maximum(sizes_before, 1e-6), 0)
    return jnp.log(jnp.sum(ratios) / (len(x) * length))


def measure(pipe: Pipeline, request: Request) -> np.ndarray:
    """One plain run without decoding: `[steps - 1, k]`, those numbers of `Change` that there are, a row a step."""
    changes: list[list[float]] = []

    def keep(step: Step) -> None:
        changes.append([float(x) for x in jax.tree.leaves(step.memory.change)])

    pipe(request, on_step=keep, predictor=make_measured, decode=False)
    return np.asarray(changes[1:])


def make_measured(request: Request, dit: DiT, context: Context, control: jax.Array | None) -> Measured:
    """What measures a request."""
    return Measured(dit, context, control, request.config.guidance)


def calibrate(config: SampleConfig, prompts: Sequence[dict[str, Any]] = ({},)) -> Calibration:
    """Measurements of plain runs.

    Args:
      config: of the runs; its caches do not count.
      prompts: settings in which they differ: prompts, pictures, seeds.

    Raises:
      InputError: a configuration cannot be used, has fewer than three steps, or the network's output is not finite.
    """
    config = dataclasses.replace(config, cache=None, cfg_cache=None, calibration=None, fast=False)
    pipe = Pipeline(config)
    requests = [pipe.prepare(**settings) for settings in prompts]
    if config.steps < 3:
        raise InputError(f"{config.steps} steps to measure; 3 or more are needed; use those that you sample with")
    changes = np.mean([measure(pipe, request) for request in requests], axis=0)  # [steps - 1, k]
    if not np.isfinite(changes).all():
        raise InputError("the network's output became NaN or infinite; finite weights are needed; try --dtype float32")
    inputs, residuals, growths, *differences = changes.T
    first, networks = requests[0], pipe.networks
    calibration = Calibration(
        **calibrated_for(config, networks.checkpoint, networks.loras, first.task, first.shift),
        steps=config.steps,
        guidance=config.guidance,
        frames=config.frames,
        height=first.height,
        width=first.width,
        prompts=len(requests),
        sigmas=_floats(first.schedule.sigmas[:-1]),
        magnitude=_floats(np.cumsum([0, *growths])),
        input_change=_floats(inputs),
        residual_change=_floats(residuals),
        polynomial=_floats(fit(inputs, residuals)),
        thresholds={},
        difference_change=_floats(differences[0]) if differences else (),
    )
    return dataclasses.replace(calibration, thresholds=halving(calibration))


def fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Coefficients, highest first, of a polynomial of `DEGREE` that is near the points; of less where they are few."""
    degree = min(DEGREE, max(1, len(x) // 4))
    return np.polynomial.Polynomial.fit(x, y, degree).convert().coef[::-1]


def halving(calibration: Calibration) -> dict[str, float]:
    """For teacache and magcache: the least thresholds, to 1%, that run the blocks in no more than half of the steps."""
    tried = np.geomspace(1e-4, 1e2, 1400)
    found = {
        kind: next((t for t in tried if schedule(t).sum() <= calibration.steps / 2), None)
        for kind, schedule in schedules(calibration).items()
    }
    return {kind: float(f"{t:.5g}") for kind, t in found.items() if t is not None}


def schedules(calibration: Calibration) -> dict[str, Callable[[float], np.ndarray]]:
    """For teacache and magcache: given a threshold, at which of the steps measured the blocks would run, bool `[n]`."""
    foretold = np.maximum(np.polyval(calibration.polynomial, calibration.input_change), 0)
    ratios = calibration.ratios(np.asarray(calibration.sigmas))
    return {
        "teacache": functools.partial(change_schedule, foretold),
        "magcache": functools.partial(caching.magnitude_schedule, ratios),
    }


def change_schedule(changes: np.ndarray, threshold: float) -> np.ndarray:
    """teacache: at which steps the blocks are run, bool `[n]`, for changes `[n - 1]` foretold from step to step."""
    recompute, total = np.isin(np.arange(len(changes) + 1), (0, len(changes))), 0.0
    for i, change in enumerate(changes, start=1):
        total += change
        recompute[i] |= total >= threshold
        total = 0.0 if recompute[i] else total
    return recompute


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Each line's settings, or its prompt.

    Raises:
      InputError: the file cannot be read, is empty, or a line is not understood.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts {path} cannot be read ({error}); a text file is needed, a prompt a line") from error
    if not lines:
        raise InputError(f"prompts {path} is empty; a prompt a line is needed; give some")
    accepted = ("prompt", "negative_prompt", "first_frame", "last_frame", "seed")
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            settings: Any = json.loads(line) if line.startswith("{") else {"prompt": line}
        except ValueError as error:
            raise InputError(f"prompts {path} line {number} is not JSON ({error}); correct it") from error
        if unknown := settings.keys() - set(accepted):
            raise InputError(f"prompts {path} line {number} sets {', '.join(unknown)}; accepted: {', '.join(accepted)}")
        prompts.append(settings)
    return prompts


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(x) for x in values)


def report(calibration: Calibration) -> str:
    """A table of the measurements, and what to do with them."""
    ran = {kind: schedules(calibration)[kind](t) for kind, t in calibration.thresholds.items()}
    columns = {"input change": calibration.input_change, "residual change": calibration.residual_change}
    columns["growth"] = _floats(calibration.ratios(np.asarray(calibration.sigmas))[1:])
    if calibration.difference_change:
        columns["guided error"] = _floats(abs(calibration.guidance - 1) * np.asarray(calibration.difference_change))
    lines = [" ".join(["step   sigma", *columns, *ran])]
    for i, sigma in enumerate(calibration.sigmas):
        changes = [f"{f'{x[i - 1]:.4f}' if i else '-':>{len(name)}}" for name, x in columns.items()]
        marks = [f"{'runs' if recompute[i] else '-':>{len(kind)}}" for kind, recompute in ran.items()]
        lines.append(" ".join([f"{i:4} {sigma:7.4f}", *changes, *marks]))
    for kind, recompute in ran.items():
        steps = " ".join(map(str, np.flatnonzero(recompute)))
        lines.append(f"half of the steps: --cache {kind}:{calibration.thresholds[kind]:g} runs steps {steps}")
    if calibration.difference_change:
        lines += [start_of_cfg_cache(calibration, every) for every in (2, 4)]
    return "\n".join(lines)


def start_of_cfg_cache(calibration: Calibration, every: int) -> str:
    """What `--cfg-cache` would do with the steps and the guidance measured."""
    n = calibration.steps
    start = cache_rules.cfg_start(calibration, np.asarray(calibration.sigmas), calibration.guidance, every)
    where = f"from step {start} of {n} on ({start / n:.0%})" if start < n else "nowhere: leave it out"
    return f"guided error up to {cache_rules.MAX_CFG_ERROR:g}: --cfg-cache {every} {where}"


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(
        "python -m wanjax.sampling.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="configs/*.py with get_config() -> SampleConfig")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt, or a JSON object of settings, a line")
    parser.add_argument("--output", metavar="FILE", default="calibration.json", help="default: calibration.json")
    for name, kind in FLAGS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help="as of sample_jax.py")
    parser.add_argument("--lora", action="append", metavar="PATH[:STRENGTH]", help="as of sample_jax.py")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    given |= {"lora": tuple(given["lora"])} if "lora" in given else {}
    file, prompts, output = (given.pop(name, None) for name in ("config", "prompts", "output"))
    config = load_config(file, SampleConfig) if file else SampleConfig()
    config = dataclasses.replace(config, **given)
    media.check_output(output, accepted=(".json",))
    use_tpu_options(TPU_OPTIONS_8_BIT if in_8_bits(config) else TPU_OPTIONS)
    use_persistent_cache(cache_folder(config.compile_cache))
    calibration = calibrate(config, read_prompts(prompts) if prompts else [{}])
    calibration.write(output)
    print(report(calibration))
    print(output)


if __name__ == "__main__":
    with exit_codes():
        main()
