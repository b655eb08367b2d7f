"""Published checkpoints, Diffusers and official layout: reading, writing, converting."""

from wanjax.weights.load import Checkpoint
from wanjax.weights.save import convert, save

__all__ = ["Checkpoint", "convert", "save"]
