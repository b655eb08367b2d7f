"""What is known of a clip on its way into the network: pixels, then features."""

from __future__ import annotations

from typing import Any, NamedTuple


class PixelSample(NamedTuple):
    """A clip and what is to be made of it; a batch of them is the same with a leading batch axis, on the mesh.

    video: uint8 `[F, H, W, 3]`.
    given: bool `[F]`, the frames that the model is given, see `wanjax.conditioning.frames`.
    ids, mask: tokens of the caption `[l]` and which of them are text, see `wanjax.conditioning.text.Tokenizer`.
    clip: the first and the last given frame as CLIP takes them, float32 `[2, s, s, 3]`; None for a network without
      images.
    has_image: bool `[2]`, whether each of the two is there.
    """

    video: Any
    given: Any
    ids: Any
    mask: Any
    clip: Any
    has_image: Any


class Encoded(NamedTuple):
    """An encoded clip; a batch of them is the same with a leading batch axis, on the mesh.

    latents: of the VAE, normalised, `[f, h, w, c]`.
    text: umT5 features `[l, text_dim]`, zero rows behind the caption.
    image: CLIP features of the given frames one after the other `[l, image_dim]`; None for a network without images.
    image_condition: mask and latents `[f, h, w, 4 + c]`, see `wanjax.conditioning.frames`, or None.
    """

    latents: Any
    text: Any
    image: Any
    image_condition: Any
