"""A tiny RANDOM checkpoint on two pictures of ours: shows that everything runs, not what the model can do.

    python sample_jax.py --config configs/tiny_random.py

Seconds on a CPU. The video is coloured noise, because the weights were never trained.
"""

from pathlib import Path

from wanjax.config import SampleConfig

ROOT = Path(__file__).parent.parent


def get_config() -> SampleConfig:
    """The settings."""
    return SampleConfig(
        checkpoint=str(ROOT / "tests/golden/diffusers"),
        first_frame=str(ROOT / "docs/pictures/first.png"),
        last_frame=str(ROOT / "docs/pictures/last.png"),
        prompt="a sailing boat crosses the bay while the sun goes down",
        output="out/video.mp4",
        area=96 * 160,
        frames=17,
        steps=8,
        dtype="float32",
        note="This checkpoint has RANDOM weights: expect noise. Give --checkpoint for a trained model.",
    )
