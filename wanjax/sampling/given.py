"""Which pictures stand at which frames of a video: first, last, and keyframes between.

A keyframe is FRAME=PICTURE. FRAME is an index from 0, a share of the video (`50%`) or a time (`2.5s`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from wanjax.conditioning.frames import Task
from wanjax.config import DiTConfig, SampleConfig
from wanjax.data.decode import decode, probe
from wanjax.data.timing import TOLERANCE, Damaged
from wanjax.errors import InputError
from wanjax.untrusted import reason


def resolved(config: SampleConfig) -> SampleConfig:
    """The configuration with pictures in place of what says where they are: the last frames of a clip, both ends of a
    loop.

    Raises:
      InputError: the clip cannot be read or is too short, or there are other pictures in their places.
    """
    if config.loop:
        if config.first_frame is None or config.last_frame is not None:
            raise InputError(
                "--loop " + ("with --last-frame" if config.last_frame is not None else "without --first-frame") + "; "
                "a first frame is accepted, which is the last too; give that alone"
            )
        config = dataclasses.replace(config, last_frame=config.first_frame)
    if config.continue_ is None:
        return config
    if config.first_frame is not None:
        raise InputError(
            f"--continue {config.continue_} with --first-frame; the clip's last frames come first; leave one out"
        )
    frames = tuple(enumerate(last_frames(config.continue_, config.overlap, config.fps)))
    return dataclasses.replace(config, continue_=None, keyframe=(*frames, *config.keyframe))


def last_frames(path: str, count: int, fps: float) -> np.ndarray:
    """The last frames of a clip, at `fps` frames a second and of its own size: uint8 `[count, H, W, 3]`.

    Raises:
      InputError: it cannot be read, or is shorter.
    """
    try:
        facts = probe(path)
        times = [facts.seconds - (count - i) / fps for i in range(count)]
        if times[0] < -TOLERANCE:
            raise Damaged(f"{facts.seconds:.2f} s long, which is less than {count} frames at {fps:g} a second")
        return decode(path, [max(0.0, time) for time in times], facts.height, facts.width)
    except (Damaged, OSError) as error:
        raise InputError(
            f"--continue {path} ({reason(error)}); a video of at least --overlap frames is accepted; give another, or "
            "less --overlap"
        ) from error


def pictures_by_frame(config: SampleConfig) -> dict[int, Any]:
    """Paths, images or arrays by the index of their frame, in order.

    Raises:
      InputError: a keyframe cannot be read, is outside of the video, or at a frame that has a picture already.
    """
    last = config.frames - 1
    found = {} if config.first_frame is None else {0: config.first_frame}
    if config.last_frame is not None:
        if last in found:
            raise InputError("--first-frame and --last-frame of 1 frame; one of them is accepted; leave one out")
        found[last] = config.last_frame
    for keyframe in config.keyframe:
        place, picture = _split(keyframe)
        index = frame_index(place, config.frames, config.fps)
        if not 0 <= index <= last:
            raise InputError(
                f"keyframe {place}: frame {index} of a video of {config.frames}; 0 to {last} is accepted; change it"
            )
        if index in found:
            raise InputError(f"keyframe {place}: frame {index} has a picture already; one is accepted; leave one out")
        found[index] = picture
    return dict(sorted(found.items()))


def _split(keyframe: Any) -> tuple[str, Any]:
    """FRAME and PICTURE, of text or of a pair."""
    if isinstance(keyframe, tuple | list) and len(keyframe) == 2:
        return str(keyframe[0]), keyframe[1]
    place, mark, picture = str(keyframe).partition("=")
    if not mark or not picture:
        raise InputError(f"keyframe {keyframe}; FRAME=PICTURE is accepted, such as 40=b.png, 50%=b.png or 2.5s=b.png")
    return place, picture


def frame_index(place: str, frames: int, fps: float) -> int:
    """The frame that is meant.

    Args:
      place: an index, a share with %, or seconds with s.
      frames: of the video.
      fps: frames a second.

    Raises:
      InputError: it is none of these.
    """
    try:
        if place.endswith("%"):
            exact = float(place[:-1]) / 100 * (frames - 1)
        elif place.endswith("s"):
            exact = float(place[:-1]) * fps
        else:
            exact = int(place)
        if not math.isfinite(exact):
            raise ValueError
    except ValueError as error:
        raise InputError(
            f"keyframe {place}=..; an index from 0, a share (50%) or a time (2.5s) is accepted; change it"
        ) from error
    return round(exact)


def choose_task(dit: DiTConfig, config: SampleConfig) -> tuple[Task, tuple[str, ...]]:
    """The task that the given frames ask for, if the network can do it, and what the user should know of it.

    See `DiTConfig.tasks`. Further frames than these are told to any network that has mask and latents beside the noise,
    with its first frame if it sees that by CLIP too.

    Raises:
      InputError: it cannot.
    """
    frames, last = list(pictures_by_frame(config)), config.frames - 1
    ends: dict[tuple[int, ...], Task] = {(): "t2v", (0,): "i2v", (0, last): "flf2v", (last,): "last"}
    if last == 0 and config.last_frame is not None:
        ends[0,] = "flf2v" if config.first_frame is not None else "last"
    asked = ends.get(tuple(frames), "interpolation")
    if asked in dit.tasks:
        return asked, ()
    has_mask = dit.in_channels != dit.out_channels
    if has_mask and asked in ("flf2v", "interpolation") and (dit.image_dim is None or 0 in frames):
        what = "the last frame" if asked == "flf2v" else f"frames {', '.join(map(str, frames))}"
        return asked, (
            f"note: {what} given to a {dit.task} network by mask and latents alone; those that learned it reach it "
            "(Fun-InP, a LoRA for keyframes, training with TaskMix.interpolation), others may not",
        )
    raise InputError(_refusal(dit, config, frames))


def _refusal(dit: DiTConfig, config: SampleConfig, frames: list[int]) -> str:
    accepted = {
        ("t2v",): "no frames",
        ("i2v",): "--first-frame, alone or with --last-frame",
        ("i2v", "flf2v"): "--first-frame with or without --last-frame",
        ("i2v", "flf2v", "last"): "--first-frame, --last-frame or both",
    }
    named = [("--first-frame", config.first_frame), ("--last-frame", config.last_frame)]
    given = [flag for flag, picture in named if picture is not None] + ["--keyframe"] * bool(config.keyframe)
    return (
        f"{' and '.join(given) or 'no frame'} given to a {dit.task} checkpoint, which takes {accepted[dit.tasks]}; "
        "change the frames or give another --checkpoint"
    )
