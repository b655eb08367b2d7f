"""Programs compiled before the first request: a run of each size with one step of each kind."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import time
from collections.abc import Callable

import numpy as np

from sharding.distributed import is_main
from wanjax.errors import InputError
from wanjax.sampling.pipeline import Pipeline
from wanjax.sampling.request import Request

SIZES = {"480p": (832, 480), "720p": (1280, 720)}
"""Width and height by name."""


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Width and height of each size of a list.

    Raises:
      InputError: one is no size.
    """
    found = []
    for name in (part.strip() for part in text.split(",") if part.strip()):
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", name)
        if name in SIZES:
            found.append(SIZES[name])
        elif match is not None:
            found.append((int(match[1]), int(match[2])))
        else:
            raise InputError(f"--warm {name}; {', '.join(SIZES)} or WIDTHxHEIGHT is accepted; change it")
    if not found:
        raise InputError(f"--warm {text}; {', '.join(SIZES)} or WIDTHxHEIGHT is accepted; leave it out, or say some")
    return tuple(found)


def make_warm(text: str) -> Callable[[Pipeline], None]:
    """What compiles the sizes of a list.

    Raises:
      InputError: as `sizes`.
    """
    return functools.partial(warm, sizes=sizes(text))


def gray(pipe: Pipeline, **size: int) -> Request:
    """A request with gray pictures, as many as the networks take, and all else as the pipeline has it.

    Raises:
      InputError: it cannot be.
    """
    given = () if pipe.dit.task == "t2v" else ("first_frame", "last_frame")
    given = given if "flf2v" in pipe.dit.tasks else given[:1]
    picture = np.full((72, 128, 3), 128, np.uint8)
    frames = {name: picture if name in given else None for name in ("first_frame", "last_frame")}
    return pipe.prepare(keyframe=(), **frames, **size)


def check(pipe: Pipeline, text: str, most_pixels: int) -> None:
    """Whether requests can be as the pipeline has it, and at the sizes of a list.

    Raises:
      InputError: they cannot, and no client could change that.
    """
    gray(pipe)
    for width, height in sizes(text) if text else ():
        if width * height > most_pixels:
            raise InputError(
                f"--warm {width}x{height}; up to {most_pixels} pixels are accepted, of which --max-pixels is; "
                "leave it out, or give a larger --max-pixels"
            )
        gray(pipe, height=height, width=width)
    if pipe.config.preview_decoder is not None:
        pipe.preview(pipe.config.preview_decoder)


def warm(pipe: Pipeline, sizes: tuple[tuple[int, int], ...]) -> None:
    """Run gray pictures through all stages, at each size with the pipeline's own settings; one line for each.

    Raises:
      InputError: a size is none that the networks take.
    """
    for width, height in sizes:
        begun = time.monotonic()
        request = gray(pipe, height=height, width=width)
        phases = tuple(phase._replace(stop=phase.first + 1) for phase in request.phases)
        pipe(dataclasses.replace(request, phases=phases), progress=False)
        if is_main():
            print(f"compiled for {width}x{height} ({time.monotonic() - begun:.0f} s)", file=sys.stderr)
