"""A tool that selects clips for training by what can be measured of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

SCORES: Mapping[str, str] = MappingProxyType(
    {
        "difference": "of first and last frame: mean distance of their pixels, 0 to 1",
        "clip_difference": "of first and last frame to CLIP: 1 - cosine of their features, 0 to 2",
        "motion": "speed of the picture's points, mean, in frame heights a second",
        "sharpness": "variance of the Laplacian of the gray frame, levels of 255, median of three frames",
        "exposure": "mean brightness, 0 to 1",
        "clipped": "share of pixels that are nearly black or white, 0 to 1",
        "cuts": "scene changes inside the clip",
        "resolution": "shorter side of the file's picture, pixels",
        "height": "of the file's picture as shown, pixels",
        "width": "of the file's picture as shown, pixels",
        "seconds": "of the clip in the file",
    }
)
