"""wanjax: Wan first-last-frame-to-video in JAX.

import wanjax
pipe = wanjax.Pipeline.from_pretrained("Wan2.1-FLF2V-14B-720P-diffusers")
pipe(first_frame="a.png", last_frame="b.png", prompt="...").save("video.mp4")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanjax.config import SampleConfig, TrainConfig
    from wanjax.errors import InputError
    from wanjax.sampling.pipeline import Pipeline
    from wanjax.sampling.result import Result
    from wanjax.weights import Checkpoint

__all__ = ["Checkpoint", "InputError", "Pipeline", "Result", "SampleConfig", "TrainConfig"]

_PLACES = {
    "Checkpoint": "wanjax.weights",
    "InputError": "wanjax.errors",
    "Pipeline": "wanjax.sampling.pipeline",
    "Result": "wanjax.sampling.result",
    "SampleConfig": "wanjax.config",
    "TrainConfig": "wanjax.config",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: commands that need none of them start at once."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
