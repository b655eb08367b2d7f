"""Programs of all shapes, before the first step: none is compiled between two steps, where a preemption would wait."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sharding.distributed import is_main
from sharding.stalls import tick
from wanjax.data.batch import Batches
from wanjax.training.state import TrainState

if TYPE_CHECKING:
    from wanjax.training.loop import Meter


def compile_ahead(steps: Iterable[Any], state: TrainState, batches: Batches, meter: Meter) -> None:
    """Compile the step for every shape of the data, and before it what encodes a batch of that shape.

    JAX keeps the programs: the same calls later find them. All processes have to call this.

    Args:
      steps: from `wanjax.training.step.make_step`; several where networks take turns.
      state: of the run; stays as it is.
      batches: of the run; their position stays.
      meter: counts the operations of a step, for which it is traced.
    """
    order = getattr(batches.source, "order", None)  # without one all samples are of one shape
    numbers = [0] if order is None else list(order.first_batches().values())
    for number in tqdm(numbers, desc="compiling", unit="shape", leave=False, disable=not is_main()):
        batch = batches.example(number)
        for step in steps:
            step.lower(state, batch).compile()
        meter.operations(batch)
        tick()
