"""How far a run is: bars on a terminal, lines elsewhere, and whoever else wants to be told."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

from sharding import stalls
from sharding.distributed import is_main
from wanjax.terminal import bar_width

LINE_EVERY = 60
"""Seconds between the lines that stand for a bar where nobody watches: in a file or a pipe."""


class Progress(NamedTuple):
    """What `on_progress` is told: the stage, what of it is done, of how much; 0 when it begins."""

    stage: str
    done: int
    total: int


class Stages:
    """Shows, tells and times the stages of a run: `with stages(name, total) as tick`. `seconds` are by stage."""

    def __init__(self, progress: bool = True, on_progress: Callable[[Progress], Any] | None = None):
        self.progress, self.on_progress, self.seconds = progress and is_main(), on_progress or (lambda _: None), {}

    @contextlib.contextmanager
    def __call__(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar with time left on a terminal, a line now and then elsewhere; yields what moves it on."""
        start = said = time.perf_counter()
        done, is_watched = 0, sys.stderr.isatty()
        self.on_progress(Progress(name, 0, total))

        def tick() -> None:
            nonlocal done, said
            stalls.tick()
            done, now = done + 1, time.perf_counter()
            bar.update()
            self.on_progress(Progress(name, done, total))
            if self.progress and not is_watched and now - said > LINE_EVERY:
                said = now
                left = (now - start) / done * (total - done)
                print(f"{name}: {done} of {total}, {now - start:.0f} s, about {left:.0f} s left", file=sys.stderr)

        shown = self.progress and is_watched
        with tqdm(total=total, desc=f"{name:10s}", disable=not shown, **bar_width()) as bar:
            yield tick
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start  # experts take turns
