"""Long videos as windows: each begins with the last frames of the one before, and is told what else is given within it.

    result = windows.sample(pipe, frames=241, window=81, overlap=5, first_frame="a.png", last_frame="b.png")

All windows have one length, so that their programs compile once. A loop is two windows: the first is free to go where
it likes, the second comes back; told both ends at once, networks stand still.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from wanjax import media
from wanjax.conditioning.images import video_pixels
from wanjax.config import SampleConfig
from wanjax.errors import InputError
from wanjax.sampling.extend_prompt import write_out
from wanjax.sampling.given import choose_task, pictures_by_frame
from wanjax.sampling.pipeline import Pipeline
from wanjax.sampling.request import Request, read_pictures
from wanjax.sampling.result import Result


def is_needed(config: SampleConfig) -> bool:
    """Whether a video is to be made as windows."""
    return config.loop or (config.window is not None and config.window < config.frames)


def plan(frames: int, window: int, overlap: int, factor: int = 4) -> list[int]:
    """Where windows begin, the length of all of them last: as few as can be, and no longer than they have to.

    Args:
      frames: of the whole video.
      window: frames of a window, at most.
      overlap: frames that a window has of the one before, at least.
      factor: lengths are `factor` n + 1.

    Raises:
      InputError: windows are too short for that.
    """
    window = (window - 1) // factor * factor + 1
    if not 0 < overlap < window:
        raise InputError(
            f"--window {window} with --overlap {overlap}; windows longer than what they have in common are accepted; "
            "use --window 81 --overlap 5"
        )
    count = -(-(frames - overlap) // (window - overlap))
    length = -(-(frames + (count - 1) * overlap) // count)  # if each does its share
    length = min(-(-(length - 1) // factor) * factor + 1, frames)
    starts = [round(i * (frames - length) / (count - 1)) for i in range(count)] if count > 1 else [0]
    return [*starts, length]


class Plan(NamedTuple):
    """A long video, checked.

    config: of the whole.
    request: of the first window.
    starts: where windows begin.
    length: of each.
    """

    config: SampleConfig
    request: Request
    starts: list[int]
    length: int

    @property
    def seams(self) -> list[int]:
        """The first frames that are not of the window before; 0 is where a loop begins anew."""
        return [start + self.length for start in self.starts[:-1]] + [0] * self.config.loop


def prepare(pipe: Pipeline, **settings: Any) -> Plan:
    """A long video's plan; what is wrong with it is found here.

    Args:
      pipe: with the networks.
      settings: as `Pipeline.prepare` takes them.

    Raises:
      InputError: as `plan` and `Pipeline.prepare`.
    """
    config, notes = write_out(pipe.resolved(**settings))
    if config.save_latents is not None or config.initial_noise is not None:
        flag = "--save-latents" if config.save_latents is not None else "--initial-noise"
        raise InputError(f"{flag} for a video of windows, each of which has its own; leave it or --window out")
    window = config.window or config.frames // 2 + config.overlap
    *starts, length = plan(config.frames, window, config.overlap)
    if len(starts) > 1:  # whether the network takes what the second will begin with
        blank = np.zeros((config.overlap, 1, 1, 3), np.uint8)
        try:
            choose_task(pipe.dit, of_window(config, starts[1], length, blank))
        except InputError as error:
            raise InputError(
                f"windows or a loop with a {pipe.dit.task} checkpoint, which does not take the frames that each begins "
                "with; one that takes first frames is accepted; give another --checkpoint, or leave them out"
            ) from error
    request = pipe.request(of_window(config, 0, length, np.zeros((0, 1, 1, 3), np.uint8)))
    return Plan(config, dataclasses.replace(request, notes=(*notes, *request.notes)), starts, length)


def of_window(config: SampleConfig, start: int, length: int, before: np.ndarray) -> SampleConfig:
    """What is asked of the window of `length` frames from `start` on, which begins with `before` `[k, H, W, 3]`."""
    pictures: dict[int, Any] = dict(enumerate(before))
    for i, picture in pictures_by_frame(config).items():
        if len(before) <= i - start < length:
            pictures[i - start] = picture
    alone = dataclasses.replace(config, window=None, loop=False, first_frame=None, last_frame=None)
    seed = (config.seed + start + 2**63) % 2**64 - 2**63  # another noise for each, within what seeds can be
    return dataclasses.replace(alone, frames=length, keyframe=tuple(pictures.items()), seed=seed)


def at_size(pipe: Pipeline, config: SampleConfig) -> SampleConfig:
    """The configuration with pictures as the video shows them: later windows' are of the first one's field too."""
    height, width, matched = read_pictures(config, pipe.networks.configs["vae"], pipe.dit)
    shown = [media.to_uint8(video_pixels(x, height, width, config.conventions)[None])[0] for x in matched]
    keyframes = tuple(zip(pictures_by_frame(config), shown, strict=True))
    alone = dataclasses.replace(config, first_frame=None, last_frame=None, keyframe=keyframes)
    return dataclasses.replace(alone, height=height, width=width)


def sample(pipe: Pipeline, **settings: Any) -> Result:
    """A long video; `prepare` and `run`.

    Raises:
      InputError: as these.
    """
    return run(pipe, prepare(pipe, **settings))


def run(
    pipe: Pipeline,
    plan: Plan,
    say: Callable[[Request], Any] = lambda request: None,
    on_window: Callable[[np.ndarray], Any] = lambda video: None,
    **callbacks: Any,
) -> Result:
    """The video of a plan. `Result.latents` are the last window's.

    Args:
      pipe: with the networks.
      plan: from `prepare`.
      say: called with every window's request before its work.
      on_window: called with the frames so far, uint8 `[F, H, W, 3]`, before every window but the first.
      callbacks: `on_step`, `progress` and the like, as `Pipeline.__call__` takes them.

    Raises:
      InputError: as `Pipeline.__call__`.
    """
    whole, starts, length = at_size(pipe, plan.config), plan.starts, plan.length
    results: list[Result] = []
    parts: list[np.ndarray] = []
    for i, start in enumerate(starts):
        common, request = 0, plan.request
        if i:
            common, begun = starts[i - 1] + length - start, np.concatenate(parts)
            on_window(begun)
            request = pipe.request(of_window(whole, start, length, begun[-common:]))
        say(request)
        results.append(pipe(request, **callbacks))
        parts.append(results[-1].video[common:])
    seconds = {stage: sum(x.seconds.get(stage, 0.0) for x in results) for stage in results[0].seconds}
    video = np.concatenate(parts)[: -1 if plan.config.loop else None]  # of a loop the last frame is the first once more
    evaluations = sum(x.evaluations for x in results)
    return dataclasses.replace(results[-1], video=video, seconds=seconds, evaluations=evaluations)


def seams(video: np.ndarray, starts: list[int]) -> dict[int, float]:
    """How much changes from the frame before a seam to it, over the median of such changes: 1 is not to be seen.

    Args:
      video: uint8 `[F, H, W, 3]`.
      starts: first frames behind seams; 0 is that of a loop.
    """
    frames = video.astype(np.float32)
    changes = np.abs(frames - np.roll(frames, 1, axis=0)).mean(axis=(1, 2, 3))  # [F], from the one before
    usual = max(float(np.median(changes[1:])), 1e-6)
    return {start: float(changes[start]) / usual for start in starts}
