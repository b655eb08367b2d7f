"""A plan for a person to read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wanjax.config import SampleConfig, TrainConfig
from wanjax.report.hlo import KINDS
from wanjax.report.plan import GIB, Plan, Row, gib
from wanjax.report.programs import latent_shape
from wanjax.terminal import SHADES, bar, painted

PARTS = ("weights", "optimiser", "caches and inputs", "activations")
"""A bar's segments, in its order."""


def shown(plan: Plan) -> Iterable[str]:
    """The lines of a plan."""
    yield painted(title(plan), "bold")
    yield ""
    yield from memory_table(plan)
    yield ""
    yield from time_table(plan)
    yield ""
    yield verdict(plan)


def title(plan: Plan) -> str:
    """What is planned, in a line."""
    case, config = plan.case, plan.case.config
    _, height, width = latent_shape(config)
    video = f"{config.frames} frames of {width * 8}x{height * 8}"
    if isinstance(config, TrainConfig):
        what = f"training, {video}, remat {config.remat}"
    else:
        what = f"sampling, {video}, {config.steps} steps"
        what += "" if case.experts == 1 else f", {case.experts} experts"
    format = "" if case.dit.quantize == "off" else f", DiT in {case.dit.quantize}"
    return f"{what}{format} on {case.target}, mesh {case.mesh}"


def parts_of(row: Row) -> tuple[int, int, int, int]:
    """Bytes by `PARTS`; what the compiler rounds off counts as activations."""
    found = row.figures.parts
    weights, optimiser = found.get("weights", 0) + sum(row.beside.values()), found.get("optimiser", 0)
    rest = sum(found.values()) - found.get("weights", 0) - optimiser
    return weights, optimiser, rest, max(0, row.figures.peak - row.figures.arguments)


def memory_table(plan: Plan) -> Iterable[str]:
    """What each program holds on a device, and a bar of it."""
    shown = [i for i in range(len(PARTS)) if any(parts_of(row)[i] for row in plan.rows)]
    header = ["GiB on a device", *(PARTS[i] for i in shown), "in all", f"of {gib(plan.memory)}"]
    rows = []
    for row in plan.rows:
        parts = parts_of(row)
        share = row.total / plan.memory
        picture = painted(bar(parts, plan.memory), "green" if share <= 1 else "red") + f" {share:.0%}"
        cells = ["" if row.figures.refused else gib(parts[i]) for i in shown]
        rows.append([row.name, *cells, gib(row.total), picture])
    yield from columns([header, *rows])
    yield "  ".join(f"{SHADES[i]} {PARTS[i]}" for i in shown) + "  · free"
    for row in plan.rows:
        others = {name: size for name, size in row.beside.items() if size > GIB / 100}
        if others:
            names = " and ".join(f"{gib(size)} of the {name}" for name, size in others.items())
            peak = gib(row.figures.peak)
            yield f"{row.name}: weights include {names}, there all the time; the compiler's peak is {peak}"


def time_table(plan: Plan) -> Iterable[str]:
    """What each program takes, what bounds it, and what it sends."""
    kinds = [kind for kind in KINDS if any(row.figures.payload.get(kind, 0) > GIB / 100 for row in plan.rows)]
    header = ["seconds", "a call", "calls", "in all", "most of it", *(f"{kind}, GiB" for kind in kinds)]
    header += ["of it exposed"] if kinds else []
    rows = []
    for row in plan.rows:
        sent = [gib(row.figures.payload.get(kind, 0)) for kind in kinds] + ([gib(row.figures.exposed)] if kinds else [])
        times = [f"{row.seconds:.3f}", str(row.calls), f"{row.seconds * row.calls:.1f}"]
        rows.append([row.name, *times, row.bound, *sent])
    yield from columns([header, *rows])


def compared(plans: Sequence[Plan], best: Plan, counted: int) -> Iterable[str]:
    """What a search compiled, and which it recommends."""
    yield painted(f"{counted} ways counted, the best {len(plans)} compiled:", "bold")
    rows = [["", "mesh", "DiT", "remat", "batch", "GiB", "s a step", "most of it"]]
    for plan in sorted(plans, key=lambda plan: (not plan.fits, plan.main.seconds)):
        config, row = plan.case.config, plan.main
        training = [config.remat, str(config.batch)] if isinstance(config, TrainConfig) else ["", ""]
        mark = "->" if plan is best else "" if plan.fits else "too much"
        time = f"{row.seconds:.2f}" if row.seconds else ""
        rows.append([mark, plan.case.mesh, plan.case.dit.quantize, *training, gib(row.total), time, row.bound])
    yield from columns(rows)


def verdict(plan: Plan) -> str:
    """Whether it fits, and how long it takes."""
    largest = plan.largest
    need = f"{largest.name} needs {gib(largest.total)} of {gib(plan.memory)} GiB"
    fits = painted(f"It fits: {need}.", "green") if plan.fits else painted(f"It does not fit: {need}.", "red")
    what = "A video" if isinstance(plan.case.config, SampleConfig) else "A step"
    if any(row.figures.refused for row in plan.rows):
        return fits
    how = (
        "takes about {}, by the compiler's schedule" if plan.counted else "takes {} at least, a bound by nominal rates"
    )
    return f"{fits} {what} {how.format(duration(plan.seconds))}; nothing was run."


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def columns(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Cells under one another: words to the left, numbers to the right."""
    rows = [[*row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [
            f"{row[0]:<{widths[0]}}",
            *(f"{cell:>{width}}" for cell, width in zip(row[1:-1], widths[1:], strict=True)),
        ]
        yield "  ".join([*cells, row[-1]]).rstrip()
