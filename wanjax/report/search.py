"""Which mesh, format, rematerialisation and batch to run with: counted for all that there are, compiled for the best.

Time is guessed from operations alone, memory as `wanjax.report.memory` counts it; both decide only what is compiled.
What is recommended is compiled and fits. Networks as they are come before 8 bits, whatever the time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sharding.mesh import MeshShape, parse_mesh
from wanjax.config import SampleConfig, TrainConfig
from wanjax.report import memory, programs
from wanjax.report.compiled import Case, Figures
from wanjax.report.devices import count, device
from wanjax.report.plan import Plan, lower_bound
from wanjax.sampling.steps import is_guided
from wanjax.weights.quantize import requantized

REMATS = ("none", "dots", "attention", "block")
"""From the quickest to that of the least memory."""
SAMPLES = (1, 2, 4)
"""In each part of the batch's axes."""
TRIED = 3
"""Cases of one kind that are compiled."""


class Guess(NamedTuple):
    """A case, bytes of its step on a device, and seconds: of a step of sampling, or of a sample of training."""

    case: Case
    size: float
    seconds: float


def meshes(case: Case) -> Iterator[MeshShape]:
    """Every mesh of all devices that a run can have: branches of guidance apart or not, or samples over any part."""
    devices, heads = count(case.target), case.dit.num_heads
    if isinstance(case.config, SampleConfig):
        batches = [MeshShape(data=n) for n in ((1, 2) if is_guided(case.config) else (1,)) if devices % n == 0]
    else:
        batches = [MeshShape(fsdp=n) for n in divisors(devices)]
    for batch in batches:
        sequence = devices // batch.batch
        for ulysses in divisors(sequence):
            if heads % ulysses == 0:
                yield batch._replace(ring=sequence // ulysses, ulysses=ulysses)


def divisors(n: int) -> list[int]:
    """Of a whole number, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def variants(case: Case) -> Iterator[Case]:
    """The case as it can be changed beside its mesh, for the batch of a mesh of one."""
    if isinstance(case.config, TrainConfig):
        for remat in REMATS:
            yield dataclasses.replace(case, config=dataclasses.replace(case.config, remat=remat, batch=1, accumulate=1))
        return
    yield case
    if case.dit.quantize == "off":
        eight = requantized(case.dit, "fp8" if device(case.target).format == "fp8" else "int8")
        yield dataclasses.replace(case, dit=eight)


def guesses(case: Case) -> list[Guess]:
    """All cases, the quickest first; of equal ones those that send least."""
    found = []
    for variant in variants(case):
        operations = programs.operations(variant.config, variant.dit, main_program(variant))
        for shape in meshes(variant):
            found += list(guessed(variant, shape, operations))
    return sorted(found, key=lambda guess: (guess.seconds, *order(guess.case)))


def main_program(case: Case) -> str:
    """Its step's name."""
    return "DiT step" if isinstance(case.config, SampleConfig) else "training step"


def order(case: Case) -> tuple[float, ...]:
    """Of cases that compute the same: small batches, few hops of a ring, few devices that exchange everything."""
    shape = parse_mesh(case.mesh, count(case.target))
    batch = case.config.batch if isinstance(case.config, TrainConfig) else 1
    return (batch, shape.ring, shape.ulysses)


def guessed(variant: Case, shape: MeshShape, operations: dict[str, int]) -> Iterator[Guess]:
    """A variant on a mesh, by the samples of each part of a batch."""
    row = memory.count(variant.config, variant.dit, shape, variant.experts)
    activations = sum(size for name, size in row.items() if name in ("kept~", "activations~", "batch"))
    case = dataclasses.replace(variant, mesh=named(shape))
    here = device(case.target)
    for samples in SAMPLES if isinstance(variant.config, TrainConfig) else (1,):
        if isinstance(variant.config, TrainConfig):
            batch = samples * shape.batch
            case = dataclasses.replace(case, config=dataclasses.replace(variant.config, batch=batch))
        seconds, _ = lower_bound(case, Figures(0, {}, {}, 0, operations, {}), here)
        yield Guess(case, row["step~"] + (samples - 1) * activations, seconds)


def training_mesh(devices: int, heads: int) -> MeshShape:
    """A mesh to begin with: each sample over up to eight devices, samples over the rest."""
    ulysses = max(n for n in divisors(math.gcd(devices, heads)) if n <= 8)
    return MeshShape(fsdp=devices // ulysses, ulysses=ulysses)


def named(shape: MeshShape) -> str:
    """A mesh as it is written: the axes that are not 1."""
    return ",".join(f"{name}={n}" for name, n in shape._asdict().items() if n > 1) or "data=1"


def shortlist(found: Iterable[Guess], limit: int) -> list[Case]:
    """What to compile: of those that should fit, and of each format, the first few; if none should, the smallest."""
    found = list(found)
    fitting = [guess for guess in found if guess.size <= limit]
    if not fitting:
        return [min(found, key=lambda guess: guess.size).case]
    formats = dict.fromkeys(guess.case.dit.quantize for guess in fitting)
    chosen = []
    for format in formats:
        chosen += [guess.case for guess in fitting if guess.case.dit.quantize == format][:TRIED]
    return chosen


def best(plans: Iterable[Plan], asked: Case) -> Plan:
    """Of compiled plans the one to run: one that fits, as the network is if it can be so, the quickest of these."""

    def key(plan: Plan) -> tuple[bool, bool, float]:
        return (not plan.fits, plan.case.dit.quantize != asked.dit.quantize, seconds_a_sample(plan))

    return min(plans, key=key)


def seconds_a_sample(plan: Plan) -> float:
    """Of a step."""
    config = plan.case.config
    if plan.main.figures.refused:
        return math.inf
    return plan.main.seconds / (config.batch if isinstance(config, TrainConfig) else 1)
