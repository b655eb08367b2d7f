"""Published checkpoints, Diffusers and official layout: reading, writing, converting."""

from wanjax.convert.load import Checkpoint

__all__ = ["Checkpoint"]
