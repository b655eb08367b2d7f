"""The loop around the step: what is measured, written, saved, and what ends it."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from sharding.distributed import is_main
from wanjax.config import TrainConfig
from wanjax.data.batch import Batches
from wanjax.training import speed
from wanjax.training.checkpoint import TrainCheckpoints
from wanjax.training.log import Log
from wanjax.training.state import TrainState
from wanjax.training.step import Metrics, make_step
from wanjax.training.validation import Validation

if TYPE_CHECKING:
    from wanjax.training.objectives.base import Objective


class NonFiniteError(RuntimeError):
    """Loss or gradients of a step were infinite or not a number; one line, as `InputError`'s."""


def train(
    config: TrainConfig,
    objective: Objective,
    state: TrainState,
    batches: Batches,
    checkpoints: TrainCheckpoints,
    validation: Validation | None = None,
) -> tuple[TrainState, bool]:
    """Train until `config.steps` or SIGTERM: the state, which is then on disk, and whether the last step was reached.

    Args:
      config, objective, checkpoints: of the run.
      state, batches: to go on from, at the same position; the state's memory is reused.
      validation: on held-out clips, from time to time; None: never.

    Raises:
      NonFiniteError: loss or gradients are not finite; checkpoints stay as they were.
    """
    step, position = int(state.step), batches.position
    train_step, meter = make_step(objective), Meter(objective)
    bar = tqdm(total=config.steps, initial=step, unit="step", dynamic_ncols=True, disable=not is_main())
    with bar, Log(Path(config.workdir or "."), step) as log, meter, stop_requested() as stop:
        coming = itertools.islice(batches, max(config.steps - step, 0))
        batch = next(coming, None)
        while step < config.steps and not stop(step):
            position, step = batches.position, step + 1  # before the next batch is made
            state, values, measured, batch = _measured_step(train_step, meter, state, batch, coming)
            if not values.finite:
                raise NonFiniteError(_non_finite(step, values, checkpoints.latest, batches.names(position - 1)))
            bar.set_postfix_str(f"loss {values.loss:.4f}, {meter}")
            bar.update()
            measured |= validation(step, objective.eval_model(state), log) if validation else {}
            log.write(step, {"loss": values.loss, "grad_norm": values.grad_norm} | measured)
            if step % config.save_every == 0:
                checkpoints.save(state, position)
        checkpoints.save(state, position)
        checkpoints.wait()
    return state, step >= config.steps


def _measured_step(
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    meter: Meter,
    state: TrainState,
    batch: Any,
    coming: Iterator[Any],
) -> tuple[TrainState, Any, dict[str, float], Any]:
    """A step on `batch`: state, metrics on the host, what was measured, and the next of the coming batches, if any."""
    meter.start(batch)
    state, metrics = train_step(state, batch)
    meter.computing(metrics)
    batch = next(coming, None)  # while the devices compute
    meter.fetched()
    values = jax.device_get(metrics)
    return state, values, meter.stop(), batch


def _non_finite(step: int, values: Any, saved: int | None, names: list[str]) -> str:
    kept = f"the checkpoint of step {saved} is whole" if saved is not None else "there is no checkpoint yet"
    return (
        f"step {step}: loss {values.loss}, gradient norm {values.grad_norm}; both must be finite; {kept}: "
        f"lower the learning rate, or look at the clips of this step: {', '.join(names)}"
    )


class Meter:
    """Times the steps; a context manager. `str()` of it is the last step in words.

    A step waits for data from when the devices have done it until the next batch is there. That the loop itself waits
    for a batch while they compute costs nothing.
    """

    def __init__(self, objective: Objective):
        self.objective = objective
        self.peak = speed.peak(jax.devices()[0].device_kind)
        self._operations: dict[Any, int] = {}  # by the batch's shapes, of which there are a few
        self._watcher = ThreadPoolExecutor(1)
        self._text = ""

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self._watcher.shutdown()

    def __str__(self) -> str:
        return self._text

    def start(self, batch: Any) -> None:
        """A step on this batch begins."""
        self._units = self.objective.units(batch)
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in self._operations:
            self._operations[shapes] = speed.step_operations(self.objective, batch)
        self._now, self._start = self._operations[shapes], time.perf_counter()

    def computing(self, metrics: Metrics) -> None:
        """The step has been given to the devices."""
        self._done = self._watcher.submit(lambda: (jax.block_until_ready(metrics), time.perf_counter())[1])

    def fetched(self) -> None:
        """The next batch is there."""
        self._fetched = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """The step is over; what was measured, by name."""
        done = self._done.result()
        seconds = max(done, self._fetched) - self._start
        rate, waited = self._units / seconds, max(0.0, self._fetched - done) / seconds
        flops = self._now / seconds
        measured = {
            "seconds": seconds,
            f"{self.objective.unit}_per_second": rate,
            "tflops": flops / 1e12,
            "data_wait": waited,
        }
        share = f"{flops / 1e12:.3g} TFLOP/s"
        if self.peak is not None:
            measured["utilisation"] = flops / (self.peak * jax.device_count())
            share = f"{100 * measured['utilisation']:.1f}% MFU"
        self._text = (
            f"{seconds:.2f} s/step, {rate:,.0f} {self.objective.unit}/s, {share}, {100 * waited:.0f}% data wait"
        )
        return measured


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
