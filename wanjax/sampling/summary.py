"""A request in a few lines, before the work: what is made, by what, and whether it should fit."""

from __future__ import annotations

from collections.abc import Iterator

from sharding.mesh import MeshShape
from wanjax.sampling.memory import expected_bytes, memory_bytes
from wanjax.sampling.pipeline import Pipeline
from wanjax.sampling.request import Request
from wanjax.sampling.steps import describe_guidance

TASKS = {
    "t2v": "text to video",
    "i2v": "first frame to video",
    "flf2v": "first and last frame to video",
    "last": "last frame to video",
    "continuation": "first frames to video",
    "interpolation": "keyframes to video",
}
GIB = 2**30


def summary(pipe: Pipeline, request: Request) -> Iterator[str]:
    """Lines: the video; how it is sampled; by which network on what; memory expected against what there is."""
    config = request.config
    seconds = f"{config.frames / config.fps:.1f} s at {config.fps:g} fps"
    task = TASKS.get(request.task, request.task)
    yield f"{task}: {config.frames} frames of {request.width}x{request.height}, {seconds}"
    yield f"  {sampled(pipe, request)}"
    yield f"  {network(pipe)}"
    yield f"  {memory(pipe, request)[0]}"


def sampled(pipe: Pipeline, request: Request) -> str:
    """Solver, steps, guidance, shift, caches, seed."""
    config = request.config
    steps = f"{config.solver} {config.steps} steps"
    if len(pipe.networks.loras) == 2:
        high = sum(phase.stop - phase.first for phase in request.phases if phase.expert == "dit")
        way = "both experts resident" if pipe.resident else "one expert at a time"
        steps += f" ({high} for high noise, {way})"
    cached = ", some of them from caches" if request.rules is not None else ""
    return f"{steps}{cached}, guidance {describe_guidance(config)}, shift {request.shift:g}, seed {config.seed}"


def network(pipe: Pipeline) -> str:
    """The DiT's layers, format and attention, and the devices."""
    dit, mesh = pipe.dit, pipe.mesh
    format = pipe.config.dtype if dit.quantize == "off" else f"{pipe.config.dtype}, blocks in {dit.quantize}"
    device, count = mesh.devices.flat[0], mesh.size
    shape = MeshShape(**dict(mesh.shape))
    axes = ",".join(f"{name}={n}" for name, n in shape._asdict().items() if n > 1)
    where = f"{count} x {device.device_kind}, mesh {axes}" if count > 1 else f"one {device.device_kind} device"
    return f"DiT of {dit.num_layers} blocks in {format}, attention {dit.attention}, on {where}"


def memory(pipe: Pipeline, request: Request) -> tuple[str, bool]:
    """What a device is expected to hold against what it has, and whether that is too much."""
    expected = expected_bytes(pipe.networks, pipe.dit, request.noise.shape, branches(request), pipe.mesh, pipe.resident)
    there = memory_bytes(list(pipe.mesh.devices.flat)) / pipe.mesh.size
    each = " on each device" if pipe.mesh.size > 1 else ""
    if not there:
        return f"memory{each}: about {amount(expected)} expected; how much there is, is not known", False
    line = f"memory{each}: about {amount(expected)} expected of {amount(there)}"
    if expected <= there:
        return line, False
    return f"{line}: too much; --quantize or more devices take less, and wanjax plan --search finds which", True


def branches(request: Request) -> int:
    """The most that are computed at a step."""
    return max(phase.branches for phase in request.phases)


def amount(size: float) -> str:
    """Bytes in a unit that suits them."""
    unit = "GiB" if size >= GIB / 10 else "MiB"
    number = size / (GIB if unit == "GiB" else 2**20)
    return f"{number:.{1 if number < 100 else 0}f} {unit}"
