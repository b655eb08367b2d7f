"""The worker: takes one job after the other, runs it on the pipeline, and says how far it is.

    worker = Worker(pipe, jobs)
    worker.start()              # a thread; on further hosts `follow` instead, in the main thread
    worker.live                 # what runs now; None: nothing

A job's video is on disk, whole, before the job is said to be completed.
"""

from __future__ import annotations

import base64
import dataclasses
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from wanjax import media
from wanjax.conditioning.images import read_image
from wanjax.errors import InputError, one_line
from wanjax.sampling import recorded
from wanjax.sampling.extend_prompt import Extend
from wanjax.sampling.pipeline import Pipeline, Step
from wanjax.sampling.stages import Progress
from wanjax.serving.hosts import Hosts
from wanjax.serving.jobs import Job, Jobs
from wanjax.serving.metrics import Metrics
from wanjax.serving.requests import Upload, as_settings

BEFORE, AFTER = 5, 95
"""Percent of a job before its first step, and after its last one."""


@dataclasses.dataclass(frozen=True)
class Live:
    """How far the running job is.

    id: of the job.
    begun: when, by `time.monotonic`.
    stage, done, total: of the stage, see `Progress`; `denoise` counts the steps of all experts.
    steps, denoised: steps done, and when the denoising began and its last step ended.
    preview: what the latents show, uint8 `[f, h, w, 3]`, and how often there was one.
    """

    id: str
    begun: float
    stage: str = "prepare"
    done: int = 0
    total: int = 1
    steps: int = 0
    denoised: tuple[float, float] | None = None
    preview: np.ndarray | None = None
    previews: int = 0

    @property
    def percent(self) -> int:
        """Of the whole job."""
        share = self.done / max(1, self.total)
        if self.stage == "denoise":
            return round(BEFORE + share * (AFTER - BEFORE))
        return round(AFTER + share * (99 - AFTER)) if self.stage == "VAE decode" else min(BEFORE, self.done)

    def seconds_left(self, decode: float) -> float | None:
        """As far as steps so far tell; None: none is done yet.

        Args:
          decode: what decoding took last time.
        """
        if self.stage == "VAE decode":
            return decode * (1 - self.done / max(1, self.total))
        if self.denoised is None or not self.steps:
            return None
        begun, last = self.denoised
        return (last - begun) / self.steps * (self.total - self.done) + decode


class CancelledError(Exception):
    """Somebody wants the running job to end."""


class Worker(threading.Thread):
    """Runs jobs.

    Args:
      pipe: for all of them; where one asks for other adapters, another is made like it.
      jobs: where they come from; None on hosts but the first.
      extend: writes prompts out.
      most_kept: jobs that are over and are kept.
      warm: called before the first job.
    """

    def __init__(
        self,
        pipe: Pipeline,
        jobs: Jobs | None,
        extend: Extend | None = None,
        most_kept: int = 1000,
        warm: Callable[[Pipeline], None] | None = None,
    ):
        super().__init__(name="worker", daemon=True)
        self.pipe, self.started_with, self.jobs = pipe, pipe.config, jobs
        self.extend, self.most_kept, self.warm = extend, most_kept, warm
        self.hosts, self.metrics = Hosts(), Metrics(jobs)
        self.live: Live | None = None
        self.is_ready = False
        self.failure: str | None = None
        self.decode_seconds = 1.0
        self._stopping = threading.Event()
        self._cancelled: dict[str, int] = {}  # jobs that are to end, by the steps that they had done

    # ------------------------------------------------------------------------------------------------ the first host

    def run(self) -> None:
        """Until `stop`: the longest waiting job."""
        assert self.jobs is not None
        try:
            self.prepare()
            self.is_ready = True
            while not self._stopping.is_set():
                job = self.jobs.take()
                if job is None:
                    self.jobs.wait(1.0)
                else:
                    self.serve(job)
            self.hosts.send(None)
        except BaseException as error:  # what is wrong with the machine or the weights, not with a job: /health says so
            self.failure, self.is_ready = one_line(error) or type(error).__name__, False
            print(f"error: {self.failure}; no further job is begun", file=sys.stderr)
            if not isinstance(error, InputError):
                traceback.print_exc()
            self.jobs.notify()

    def serve(self, job: Job) -> None:
        """A job, from taking it to its end, whatever that is."""
        assert self.jobs is not None
        self.live = Live(job.id, time.monotonic())
        self.jobs.notify()
        pictures, started = self.jobs.pictures(job.id), time.monotonic()
        try:
            job = self.described(job, pictures)
            self.hosts.send({"job": dataclasses.asdict(job), "pictures": [(p, as_text(data)) for p, data in pictures]})
            video, timings = self.compute(job, pictures)
            text = recorded.to_text(job.settings, job.loras)
            media.write_video(self.jobs.video(job.id), video, job.settings["fps"], text)
            self.jobs.finish(job.id, timings)
            self.metrics.completed(timings, time.monotonic() - started)
        except CancelledError:
            if job.id not in self._cancelled:  # the server ends: the next one does it
                self.jobs.put_back(job.id)
            elif self.jobs.cancel(job.id, "running", self.steps_of_cancelled(job.id)):
                self.metrics.ended("cancelled")
        except (InputError, OSError) as error:
            self.jobs.fail(job.id, one_line(error))
            self.metrics.ended("failed")
        except Exception as error:  # ours or a library's; the next job may be well
            traceback.print_exc()
            self.jobs.fail(job.id, one_line(f"{type(error).__name__}: {error}"))
            self.metrics.ended("failed")
            if self.hosts.count > 1:
                raise  # the others may be in the middle of a collective
        finally:
            self._cancelled.pop(job.id, None)
            self.live = None
            self.jobs.prune(self.most_kept)
            self.jobs.notify()

    def described(self, job: Job, pictures: tuple[tuple[str, bytes], ...]) -> Job:
        """The job with its prompt written out, if that is asked for; on disk, so that a second run has the same."""
        if not job.extend_prompt or self.extend is None or self.jobs is None:
            return job
        prompt, note = self.extend(job.settings["prompt"], [read_image(Upload(data)) for _, data in pictures])
        settings, notes = job.settings | {"prompt": prompt}, (note,) if note else ()
        self.jobs.describe(job.id, settings, notes)
        return dataclasses.replace(job, settings=settings, notes=notes)

    def cancel(self, id: str) -> bool:
        """End a job that is not over: at once, or within a step; whether there was something to end."""
        assert self.jobs is not None
        if self.jobs.cancel(id, "queued"):
            self.metrics.ended("cancelled")
            return True
        job = self.jobs.get(id)
        if job is not None and job.state == "running":
            self._cancelled[id] = self.steps_of(id)
            return True
        return False

    def steps_of(self, id: str) -> int:
        """How many the running job has done."""
        live = self.live
        return live.steps if live is not None and live.id == id else 0

    def steps_of_cancelled(self, id: str) -> dict[str, float]:
        """Done when the job was to end, and when it ended."""
        return {"steps when cancelled": self._cancelled[id], "steps": self.steps_of(id)}

    def stop(self) -> None:
        """Begin no job any more; the running one ends within a step, and waits again in its place."""
        self._stopping.set()
        if self.jobs is not None:
            self.jobs.notify()

    # ------------------------------------------------------------------------------------------------- the other hosts

    def follow(self) -> None:
        """On a host that is not the first: compute what that one sends, until it says that this was all."""
        self.prepare()
        for message in self.hosts.receive():
            if message is None:
                return
            job = Job(**message["job"] | {"loras": tuple(message["job"]["loras"])})
            self.live = Live(job.id, time.monotonic())
            try:
                self.compute(job, tuple((place, as_bytes(text)) for place, text in message["pictures"]))
            except (CancelledError, InputError) as error:  # the first one met it too, and tells who asked
                print(one_line(error), file=sys.stderr)

    # ------------------------------------------------------------------------------------------------------- all hosts

    def prepare(self) -> None:
        """What the first request should not have to wait for."""
        self._preview = self.pipe.preview(self.pipe.config.preview_decoder)
        if self.warm is not None:
            self.warm(self.pipe)

    def compute(self, job: Job, pictures: tuple[tuple[str, bytes], ...]) -> tuple[np.ndarray, dict[str, float]]:
        """The video of a job, uint8 `[F, H, W, 3]`, and seconds by stage."""
        failure, request, begun = None, None, time.monotonic()
        try:
            self.use(job.loras)
            request = self.pipe.prepare(**job.settings | as_settings(pictures))
        except InputError as error:
            failure = error
        if self.hosts.any(failure is not None) or request is None:
            raise failure or InputError("another host cannot prepare it; see what that one prints")
        result = self.pipe(request, on_step=self.on_step, on_progress=self.on_progress, progress=False)
        self.decode_seconds = result.seconds["VAE decode"]
        timings = {name: round(seconds, 3) for name, seconds in result.seconds.items()}
        if self.live is not None and self.live.denoised is not None:
            timings["before denoising"] = round(self.live.denoised[0] - begun, 3)
        return result.video, timings

    def use(self, loras: tuple[str, ...]) -> None:
        """A pipeline with these adapters beside those that it was started with."""
        config = dataclasses.replace(self.started_with, lora=(*self.started_with.lora, *loras))
        if self.pipe.config.lora == config.lora:
            return
        other = Pipeline(config)  # only headers are read
        self.pipe.networks.keep = "one"
        self.pipe.networks.release(*self.pipe.networks.loaded)  # first: there may be no room for two
        self.pipe = other

    def on_progress(self, progress: Progress) -> None:
        """Between parts of a stage."""
        self.check_cancelled()
        if progress.stage == "denoise" and self.live is not None and self.live.denoised is None:
            self.update(denoised=(time.monotonic(), time.monotonic()))
        if progress.stage != "denoise":  # `on_step` counts those of all experts
            self.update(stage=progress.stage, done=progress.done, total=progress.total)

    def on_step(self, step: Step) -> None:
        """After a step."""
        assert self.live is not None
        assert self.live.denoised is not None
        preview, begun = np.asarray(self._preview(step.x0)), self.live.denoised[0]
        self.update(
            stage="denoise", done=step.done, total=step.steps, steps=step.done, preview=preview,
            denoised=(begun, time.monotonic()), previews=self.live.previews + 1,
        )  # fmt: skip
        self.check_cancelled()

    def update(self, **changes: Any) -> None:
        """Tell what changed."""
        if self.live is not None:
            self.live = dataclasses.replace(self.live, **changes)
        if self.jobs is not None:
            self.jobs.notify()

    def check_cancelled(self) -> None:
        """Raises `CancelledError`, on all hosts at the same point, if the running job is to end."""
        assert self.live is not None
        if self.hosts.any(self.live.id in self._cancelled or self._stopping.is_set()):
            raise CancelledError(f"{self.live.id} is cancelled")


def as_text(data: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(data).decode()


def as_bytes(text: str) -> bytes:
    """The bytes of such a text."""
    return base64.b64decode(text)
