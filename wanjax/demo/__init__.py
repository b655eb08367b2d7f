"""The demo: a small model in the Diffusers layout, trained by this project on procedural clips (docs/training.md).

It fills in 17 frames of 64x64 between two frames like `first.png` and `last.png`, told what happens in between in words
of `wanjax.demo.shapes.VOCABULARY`.
"""

from __future__ import annotations

from pathlib import Path

from wanjax.config import SampleConfig

FOLDER = Path(__file__).parent
SEED = 10_000_000
"""Of the clip whose end frames and caption are here. Trainings take seeds below 1,000,000."""


def get_config() -> SampleConfig:
    """The settings of `python sample_jax.py` without any: frames and caption of a clip that the model never saw."""
    return SampleConfig(
        checkpoint=str(FOLDER),
        first_frame=str(FOLDER / "first.png"),
        last_frame=str(FOLDER / "last.png"),
        prompt=(FOLDER / "caption.txt").read_text().strip(),
        negative_prompt="",
        height=64,
        width=64,
        frames=17,
        steps=4,
        shift=40.0,
        guidance=1.0,
        dtype="float32",
    )
