"""Whether a run fits on hardware that is not there, and how long it takes there at least or by the compiler's count."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from wanjax.conditioning.frames import latent_frames
from wanjax.config import WAN_VAE, SampleConfig
from wanjax.report.compiled import GIB, MAIN, Case, Figures
from wanjax.report.cycles import CHIPS, KINDS
from wanjax.report.devices import GPUS, Device, count, device
from wanjax.sampling.memory import EXPERTS_SHARE

PREALLOCATED = 0.75
"""Of a GPU's memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""
GPU_SHARE = "0.95"


@dataclasses.dataclass(frozen=True)
class Row:
    """A program of the plan, bytes on one device.

    calls: in a run: a video, or a step of training.
    beside: of networks that lie on the device meanwhile, by name.
    seconds: of one call.
    bound: what takes most of it, in words.
    """

    name: str
    calls: int
    figures: Figures
    beside: dict[str, int]
    seconds: float
    bound: str

    @property
    def total(self) -> int:
        """Bytes in use at the worst moment."""
        return self.figures.peak + sum(self.beside.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """All programs of a run.

    memory: bytes that a program may have on a device.
    counted: whether the time is the compiler's schedule, counted; else a bound from operations and bytes.
    """

    case: Case
    rows: tuple[Row, ...]
    memory: int
    counted: bool

    @property
    def largest(self) -> Row:
        """The program that needs most."""
        return max(self.rows, key=lambda row: row.total)

    @property
    def fits(self) -> bool:
        """Whether all programs do."""
        return all(row.total <= self.memory and not row.figures.refused for row in self.rows)

    @property
    def main(self) -> Row:
        """The step."""
        return next(row for row in self.rows if row.name in MAIN)

    @property
    def seconds(self) -> float:
        """Of a video, or of a step of training."""
        return sum(row.calls * row.seconds for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Everything, for other programs."""
        programs = {
            row.name: {
                **{name: value for name, value in dataclasses.asdict(row.figures).items() if name != "refused"},
                **{"calls": row.calls, "beside": row.beside, "seconds": row.seconds, "bound": row.bound},
            }
            for row in self.rows
        }
        asked = {"target": self.case.target, "mesh": self.case.mesh, "quantize": self.case.dit.quantize}
        found = {"fits": self.fits, "memory": self.memory, "counted": self.counted, "seconds": self.seconds}
        return {**asked, **found, "programs": programs}


def make_plan(case: Case, figures: Mapping[str, Figures]) -> Plan:
    """The plan of a run.

    Args:
      case: what is planned.
      figures: of its programs, by name.
    """
    here = device(case.target)
    rows = []
    for name, found in figures.items():
        seconds, bound = time_of(case, found, here)
        rows.append(Row(name, calls(case, name), found, beside(case, name, figures, here), seconds, bound))
    counted = all(row.figures.cycles for row in rows if not row.figures.refused)
    return Plan(case, tuple(rows), here.memory, counted)


def calls(case: Case, name: str) -> int:
    """How often a run calls a program: the VAE once a latent frame, the DiT once a step."""
    config = case.config
    if not isinstance(config, SampleConfig):
        return 1
    chunks = latent_frames(config.frames, WAN_VAE)
    steps = len(config.sigmas) if config.sigmas else config.steps
    return {"VAE encode": chunks, "VAE decode": chunks, "DiT step": steps, "DiT context": case.experts}.get(name, 1)


def beside(case: Case, name: str, figures: Mapping[str, Figures], here: Device) -> dict[str, int]:
    """What lies on a device meanwhile: weights of the network that the program does not take, the VAE between encoding
    and decoding, the other of two experts.
    """
    found = {"rest of the network": figures[name].unused} if figures[name].unused else {}
    encoder = figures.get("VAE encode")
    if encoder is not None and name in ("DiT step", "DiT context"):
        found["VAE"] = encoder.parts["weights"]
    if case.experts == 2 and name == "DiT step" and both_stay(figures, here):
        step = figures["DiT step"].parts
        found["other expert"] = step["weights"] + step["context"]
    return found


def both_stay(figures: Mapping[str, Figures], here: Device) -> bool:
    """Whether `--experts auto` keeps two experts on the devices (`wanjax.sampling.memory`)."""
    found = figures.get("DiT context", figures["DiT step"])
    loaded = found.parts["weights"] + found.unused
    return 2 * loaded <= EXPERTS_SHARE * here.memory


def time_of(case: Case, figures: Figures, here: Device) -> tuple[float, str]:
    """Seconds of a call, and what takes most of it."""
    if figures.refused:
        return 0.0, "it does not compile"
    if figures.cycles:
        total = sum(figures.cycles.values())
        kind = max(KINDS, key=lambda kind: figures.cycles[kind])
        return total / CHIPS[case.target.partition(":")[0]].clock, f"{kind} {figures.cycles[kind] / total:.0%}"
    return lower_bound(case, figures, here)


def lower_bound(case: Case, figures: Figures, here: Device) -> tuple[float, str]:
    """Seconds that a call takes at least: nominal rates, and no device ever waits for its memory or another device but
    where the program has nothing to compute meanwhile.
    """
    eight = sum(n for kind, n in figures.operations.items() if kind.startswith(("int8", "float8")))
    sixteen = sum(figures.operations.values()) - eight
    if case.dit.attention == "int8fp8":  # traced as what it stands for
        eight, sixteen = eight + sixteen, 0
    devices = count(case.target) if case.mesh != "data=1" else 1
    computing = (sixteen / here.flops + eight / here.flops_8_bit) / devices
    exposed = figures.exposed / here.links
    limits = {
        "operations" if computing >= exposed else "collectives": computing + exposed,
        "bytes of weights and inputs": figures.arguments / here.bandwidth,
        "bytes between devices": sum(figures.payload.values()) / here.links,
    }
    bound = max(limits, key=lambda name: limits[name])
    return limits[bound], bound


def environment(plan: Plan) -> str:
    """What a run's command line begins with: on GPUs, more memory than JAX takes by itself, where it is needed."""
    if plan.case.target.partition(":")[0] in GPUS and plan.largest.total > PREALLOCATED * plan.memory:
        return f"XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_SHARE} "
    return ""


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.2f}"
