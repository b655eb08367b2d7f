"""Published checkpoints, Diffusers and official layout: reading, writing, converting."""

from wanjax.convert.load import Checkpoint
from wanjax.convert.save import convert, save

__all__ = ["Checkpoint", "convert", "save"]
