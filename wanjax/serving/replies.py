"""What the server answers, as the field's clients expect it."""

from __future__ import annotations

import importlib.metadata
from typing import Any, Literal

from pydantic import BaseModel

from wanjax.sampling.recorded import lora_name
from wanjax.serving.jobs import Job
from wanjax.serving.worker import Worker

STATUS = {"running": "in_progress"}
"""Our states by the field's words, where they differ."""


class Fault(BaseModel):
    """What is wrong: one line."""

    message: str
    type: str
    code: str


class Problem(BaseModel):
    """An answer that is no success."""

    error: Fault


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class Video(BaseModel):
    """A job and its video."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    progress: int
    """Percent."""
    created_at: int
    started_at: int | None
    completed_at: int | None
    queue_position: int | None
    """Jobs before it; None: it does not wait."""
    stage: str | None
    """Of a running job: text, images, VAE encode, DiT, denoise, VAE decode."""
    step: int | None
    seconds_left: float | None
    prompt: str
    size: str
    seconds: str
    """Length of the video."""
    settings: dict[str, Any]
    lora: list[str]
    """Names of adapters, with their strengths."""
    runs: int
    """How often it was begun: more than once, where the server ended meanwhile."""
    timings: dict[str, float]
    """Seconds by stage, and from its begin to its first step; of a cancelled job, steps that it did."""
    notes: list[str]
    error: JobError | None


class VideoList(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A job that is no more."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Model(BaseModel):
    """A checkpoint."""

    id: str
    object: Literal["model"] = "model"
    owned_by: str = "wanjax"


class Models(BaseModel):
    """All checkpoints: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether requests are worked on."""

    status: Literal["ok", "starting"]
    queued: int
    running: int
    version: str = importlib.metadata.version("wanjax")


def video(job: Job, worker: Worker, model: str) -> Video:
    """A job as it is now."""
    live, values = worker.live, job.settings
    live = live if live is not None and live.id == job.id and job.state == "running" else None
    left = live.seconds_left(worker.decode_seconds) if live else None
    return Video(
        id=job.id,
        model=model,
        status=STATUS.get(job.state, job.state),  # pyright: ignore[reportArgumentType]
        progress=100 if job.state == "completed" else live.percent if live else 0,
        created_at=int(job.created),
        started_at=None if job.started is None else int(job.started),
        completed_at=None if job.finished is None else int(job.finished),
        queue_position=worker.jobs.ahead(job) if job.state == "queued" and worker.jobs else None,
        stage=live.stage if live else None,
        step=live.steps if live else None,
        seconds_left=None if left is None else round(left, 1),
        prompt=values["prompt"],
        size=f"{values['width']}x{values['height']}",
        seconds=f"{values['frames'] / values['fps']:g}",
        settings={name: value for name, value in values.items() if value is not None and name != "prompt"},
        lora=[lora_name(x) for x in job.loras],
        runs=job.runs,
        timings=job.timings,
        notes=list(job.notes),
        error=JobError(code="failed", message=job.error) if job.error else None,
    )
