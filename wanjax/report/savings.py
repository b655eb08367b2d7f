"""Which ways to save memory a training needs: what each leaves of a step, and the fewest that make it fit.

The parts of a step are counted or estimated as `wanjax.report.memory` does; a way changes one of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

from sharding.mesh import MeshShape
from wanjax.config import DiTConfig, TrainConfig
from wanjax.report.memory import GIB, Row, count

Ways = tuple[str, ...]


def parts_saved(config: TrainConfig, dit: DiTConfig, shape: MeshShape) -> tuple[Row, dict[str, Row]]:
    """The parts of a step on a device, and by flag those that a way changes; the ways that the run can still go.

    The order is that in which they are to be taken: those that cost least time first.
    """
    row = count(config, dit, shape)
    ways: dict[str, Row] = {}
    if config.lora is not None and dit.quantize == "off" and config.quantize in (None, "off"):
        eight = count(dataclasses.replace(config, quantize="int8"), dit, shape)
        ways["--quantize int8"] = {"weights": eight["weights"]}
    if config.optimizer == "adamw":
        eight = count(dataclasses.replace(config, optimizer="adamw8bit"), dit, shape)
        ways["--optimizer adamw8bit"] = {"optimiser": eight["optimiser"]}
    if config.distillation is None and not config.offload_optimizer:
        ways["--offload-optimizer"] = {"optimiser": 0}
    if config.remat != "offload":
        ways["--remat offload"] = {"kept~": 0}
    return {name: size for name, size in row.items() if name != "step~"}, ways


def totals(row: Row, ways: dict[str, Row]) -> dict[Ways, float]:
    """Bytes of a step for every choice of ways, the fewest and first ones first."""
    choices = itertools.chain.from_iterable(itertools.combinations(ways, n) for n in range(len(ways) + 1))
    found = {}
    for chosen in choices:
        parts = dict(row)
        for way in chosen:
            parts |= {name: min(size, parts[name]) for name, size in ways[way].items()}
        found[chosen] = sum(parts.values())
    return found


def needed(sizes: dict[Ways, float], memory: float) -> Ways | None:
    """The first choice that fits; None: none does."""
    return next((chosen for chosen, size in sizes.items() if size <= memory), None)


def describe(config: TrainConfig, dit: DiTConfig, shape: MeshShape, memory: float | None = None) -> Iterable[str]:
    """Lines: a step as it is, with each way alone, with all; and, where a device's memory is known, what is needed."""
    sizes = totals(*parts_saved(config, dit, shape))
    shown = [chosen for chosen in sizes if len(chosen) < 2] + [max(sizes, key=len)]
    yield "A step on a device, GiB, estimated: " + "; ".join(
        f"{' '.join(chosen) or 'as it is'} {sizes[chosen] / GIB:.1f}" for chosen in dict.fromkeys(shown)
    )
    if memory is None:
        return
    found = needed(sizes, memory)
    if found is None:
        yield f"None of these fits {memory / GIB:.1f} GiB; more devices do."
    else:
        yield f"Of these {memory / GIB:.1f} GiB need {' '.join(found) or 'none'}."
