"""The loop around the step: what is printed, written, saved, and what ends it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from sharding.distributed import is_main
from wanjax.checkpoint import Checkpoints
from wanjax.config import TrainConfig
from wanjax.data.batch import Batches
from wanjax.training.objective import Objective
from wanjax.training.state import TrainState
from wanjax.training.step import make_step


class NonFiniteError(RuntimeError):
    """Loss or gradients of a step were infinite or not a number; one line, as `InputError`'s."""


def train(
    config: TrainConfig, objective: Objective, state: TrainState, batches: Batches, checkpoints: Checkpoints
) -> tuple[TrainState, bool]:
    """Train until `config.steps`, or until the run is told to stop; the state is on disk when this returns.

    Args:
      config: of the run.
      objective: what it trains.
      state: to go on from; its memory is reused.
      batches: at the state's position.
      checkpoints: of the run.

    Returns:
      The state, and whether the last step was reached; False after SIGTERM.

    Raises:
      NonFiniteError: loss or gradients are not finite; checkpoints stay as they were.
    """
    step, position = int(state.step), batches.position
    train_step = make_step(config, objective)
    metrics_file = MetricsFile(Path(config.workdir or "."), step)
    bar = tqdm(total=config.steps, initial=step, unit="step", dynamic_ncols=True, disable=not is_main())
    with bar, stop_requested() as stop:
        batch = next(batches) if step < config.steps else None
        stopped = False
        while step < config.steps and not (stopped := stop(step)):
            start = time.perf_counter()
            state, metrics = train_step(state, batch)
            position, step = batches.position, step + 1
            batch = next(batches) if step < config.steps else None  # while the devices compute
            values = jax.device_get(metrics)
            seconds = time.perf_counter() - start
            if not values.finite:
                raise NonFiniteError(_non_finite(step, values, checkpoints.latest))
            metrics_file.write(step, loss=values.loss, grad_norm=values.grad_norm, seconds=seconds)
            bar.set_postfix_str(
                f"loss {values.loss:.4f}, {seconds:.2f} s/step, {objective.units / seconds:,.0f} units/s"
            )
            bar.update()
            if step % config.save_every == 0:
                checkpoints.save(state, position)
        checkpoints.save(state, position)
        checkpoints.wait()
    return state, not stopped


def _non_finite(step: int, values: Any, saved: int | None) -> str:
    kept = f"the checkpoint of step {saved} is whole" if saved is not None else "there is no checkpoint yet"
    return (
        f"step {step}: loss {values.loss}, gradient norm {values.grad_norm}; both must be finite; {kept}: "
        "lower the learning rate, or look at the data of this step"
    )


class MetricsFile:
    """`WORKDIR/metrics.jsonl`, a line a step; floats are written so that reading gives the same bits.

    Args:
      workdir: folder of the run.
      step: of the state that the run goes on from; lines of later steps are of a run that was lost, and are dropped.
    """

    def __init__(self, workdir: Path, step: int):
        self.path = workdir / "metrics.jsonl"
        if not is_main():
            return
        workdir.mkdir(parents=True, exist_ok=True)
        # The last line of a killed run may be half a line.
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        new = self.path.with_suffix(".new")
        new.write_text("".join(kept))
        os.replace(new, self.path)

    def write(self, step: int, **values: float | np.floating) -> None:
        """Append the values of a step, on the main process."""
        if is_main():
            line = json.dumps({"step": step} | {name: float(x) for name, x in values.items()})
            with self.path.open("a") as file:
                file.write(line + "\n")


@contextmanager
def stop_requested() -> Iterator[Any]:
    """Gives a function of the step: whether SIGTERM came, the same answer on every process for the same step."""
    if jax.process_count() > 1:  # JAX listens for the signal and agrees with the other processes on a step
        yield multihost_utils.reached_preemption_sync_point
        return
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
