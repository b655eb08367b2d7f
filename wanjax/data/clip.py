"""A captioned video clip, and what every set of them offers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class Clip(NamedTuple):
    """A decoded clip.

    video: uint8 `[F, H, W, 3]`, RGB.
    caption: what is to be seen, in words.
    name: says which clip it is, for messages and manifests; unique within its set.
    """

    video: np.ndarray
    caption: str
    name: str


class UnusableClip(Exception):  # noqa: N818  # what it is, not what went wrong
    """A clip of the set that nothing can be learned from: its file is missing, damaged, without pictures or too short.

    Attributes:
      name: of the clip.
      reason: why, in words.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that it can be pickled
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Clips(Protocol):
    """Random access: clip `index` is the same whenever and on whichever host it is read.

    A set of files may raise `UnusableClip` for some; `wanjax.data.buckets.Usable` puts others in their place.
    """

    def __len__(self) -> int:
        """How many clips there are."""
        ...

    def __getitem__(self, index: int) -> Clip:
        """Clip `index`, from 0."""
        ...

    def shape(self, index: int) -> tuple[int, int, int]:
        """Frames, height and width of clip `index`, without decoding it."""
        ...
