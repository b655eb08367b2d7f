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


class Clips(Protocol):
    """Random access: clip `index` is the same whenever and on whichever host it is read."""

    def __len__(self) -> int:
        """How many clips there are."""
        ...

    def __getitem__(self, index: int) -> Clip:
        """Clip `index`, from 0."""
        ...

    def shape(self, index: int) -> tuple[int, int, int]:
        """Frames, height and width of clip `index`, without decoding it."""
        ...
