"""How the page looks: its colours, and the pieces that are written as HTML."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from wanjax.conditioning.images import read_image
from wanjax.serving.jobs import Job
from wanjax.serving.previews import animation
from wanjax.serving.worker import Live

CSS = (Path(__file__).parent / "page.css").read_text()
THUMB = 96
STAGES = {
    "prepare": "Reading the pictures",
    "text": "Reading the prompt",
    "images": "Looking at the pictures",
    "VAE encode": "Encoding the pictures",
    "DiT": "Loading the network",
    "denoise": "Denoising",
    "VAE decode": "Decoding the video",
}
STATES = {"queued": "waits", "running": "runs", "completed": "done", "failed": "failed", "cancelled": "stopped"}


def header(model: str, about: str) -> str:
    """The line above all."""
    letter = '<path d="M7 10l4.5 13L16 12l4.5 11L25 10"/>'
    mark = f'<svg viewBox="0 0 32 32" aria-hidden="true"><rect width="32" height="32" rx="9"/>{letter}</svg>'
    return (
        f'<div class="top">{mark}<div><h1>wanjax</h1><p>A first frame, a last frame, and everything between</p></div>'
        f'<span class="chip">{html.escape(model)}<small>{html.escape(about)}</small></span></div>'
    )


def stage_empty() -> str:
    """Where the video will be, before there is one."""
    film = '<rect x="4" y="10" width="40" height="28" rx="5"/><path d="M20 18l10 6-10 6z"/>'
    mark = f'<svg viewBox="0 0 48 48" aria-hidden="true">{film}</svg>'
    return f'<div class="stage">{mark}<p>Your video appears here</p></div>'


def stage_preview(live: Live, fps: float) -> str:
    """What the latents show, or that they do not yet."""
    if live.preview is None:
        return '<div class="stage"><div class="pulse"></div><p>The first preview comes with the first step</p></div>'
    data = base64.b64encode(animation(live.preview, fps)).decode()
    height, width = live.preview.shape[1:3]
    picture = (
        f'<img class="preview" data-step="{live.steps}" alt="Preview after step {live.steps}" '
        f'style="aspect-ratio:{width}/{height}" src="data:image/webp;base64,{data}">'
    )
    return f'<div class="stage has-preview">{picture}<span class="tag">preview</span></div>'


def bar(percent: float, words: str, right: str = "", kind: str = "") -> str:
    """A bar with a line above it."""
    return (
        f'<div class="bar {kind}" role="status"><div class="words"><span>{html.escape(words)}</span>'
        f'<span class="right">{html.escape(right)}</span></div>'
        f'<div class="track"><i style="width:{max(0, min(100, percent)):.0f}%"></i></div></div>'
    )


def progress(job: Job, live: Live | None, ahead: int, decode: float) -> str:
    """How far a job is, and how long it still takes."""
    if job.state == "queued":
        return bar(0, "Waiting" if not ahead else f"Waiting behind {ahead}", "", "waits")
    if job.state == "failed":
        return bar(100, job.error or "It failed", "", "failed")
    if job.state == "cancelled":
        return bar(100, "Stopped", "", "stopped")
    if job.state == "completed":
        took = (job.finished or 0) - (job.started or 0)
        settings = job.settings
        what = f"{settings['frames']} frames of {settings['width']}x{settings['height']}, seed {settings['seed']}"
        return bar(100, f"Done: {what}", duration(took), "done")
    if live is None:
        return bar(0, "Starting")
    words = STAGES.get(live.stage, live.stage)
    words += f", step {live.done} of {live.total}" if live.stage == "denoise" and live.total else ""
    left = live.seconds_left(decode)
    return bar(live.percent, words, "" if left is None else f"about {duration(left)} left")


def duration(seconds: float) -> str:
    """Seconds in words."""
    seconds = max(0, round(seconds))
    minutes, hours = seconds // 60, seconds // 3600
    if seconds < 90:
        return f"{seconds} s"
    return f"{minutes} min {seconds % 60:02d} s" if not hours else f"{hours} h {minutes % 60} min"


def queue(jobs: list[Job], mine: list[str], live: Live | None) -> str:
    """Jobs that wait or run, and this visitor's last ones."""
    if not jobs:
        return '<p class="quiet">Nothing waits. What you generate is listed here.</p>'
    rows = []
    for job in jobs:
        is_mine = job.id in mine
        prompt = html.escape(job.settings["prompt"][:120]) or "no prompt"
        words = prompt if is_mine else "<em>another visitor's</em>"
        state = f"{live.percent} %" if live is not None and live.id == job.id else STATES[job.state]
        settings = job.settings
        size = f"{settings['width']}x{settings['height']}, {settings['frames']} frames"
        rows.append(
            f'<li class="{job.state}"><i></i><span class="what">{words}</span>'
            f'<span class="size">{size}</span><b>{state}</b></li>'
        )
    return f'<ul class="queue">{"".join(rows)}</ul>'


def time_line(pictures: list[tuple[float, Any]], frames: int, fps: float) -> str:
    """Given frames where they stand in the video.

    Args:
      pictures: share of the video in [0, 1], and a path.
      frames, fps: of the video.
    """
    marks = "".join(
        f'<span class="mark" style="left:{100 * share:.2f}%"><img alt="Picture at frame {round(share * (frames - 1))}" '
        f'src="{thumb(path)}"><small>{round(share * (frames - 1))}</small></span>'
        for share, path in pictures
    )
    ends = f"<span>0 s</span><span>{frames / max(fps, 0.01):.1f} s</span>"
    return f'<div class="time-line"><div class="line">{marks}</div><div class="ends">{ends}</div></div>'


def thumb(path: Any) -> str:
    """A small picture as an address."""
    picture = read_image(path)
    picture.thumbnail((THUMB, THUMB))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def problem(line: str) -> str:
    """What is wrong with the request."""
    return bar(100, line[:1].upper() + line[1:], "", "failed")
