"""From prompt to text features: cleaning, token ids, umT5 (Wan2.1 `wan/modules/tokenizers.py`, `wan/modules/t5.py`)."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import ftfy
import jax
import jax.numpy as jnp
import numpy as np

# Not transformers: its T5 tokenizer ignores the pre-tokenizer and most of the normalizer that tokenizer.json names,
# takes four seconds to import and may ask the network. This library reads the file as it is, and nothing else.
import tokenizers

from wanjax.errors import InputError
from wanjax.models.umt5 import UMT5Encoder

logger = logging.getLogger(__name__)

TEXT_LENGTH = 512

# What the official code guides away from when no negative prompt is given (Wan2.1 `wan/configs`), by task: bright
# colours, overexposure, stillness, blur, subtitles, ...; with a first frame also camera shake, with two also cuts.
_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_PROMPTS = {
    "t2v": _NEGATIVE_PROMPT,
    "i2v": "镜头晃动，" + _NEGATIVE_PROMPT,
    "flf2v": "镜头切换，镜头晃动，" + _NEGATIVE_PROMPT,
}


def clean(text: str) -> str:
    """Mend broken encodings, resolve HTML entities (also twice escaped ones), join runs of white space.

    Side effects the model was trained with: full-width letters and commas become ASCII, curly quotes straight.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """Text to ids, with the `tokenizer.json` of a checkpoint.

    Args:
      folder: `tokenizer/` of the Diffusers layout, `google/umt5-xxl/` of the official one. Only this folder is read.
      length: tokens a text is padded or cut to.

    Raises:
      InputError: the folder holds no usable `tokenizer.json`.
    """

    def __init__(self, folder: str | Path, length: int = TEXT_LENGTH):
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise InputError(
                f"{folder} holds no tokenizer.json; the tokenizer of a Wan2.1 release is needed; "
                "copy the release's tokenizer/ (Diffusers layout) or google/umt5-xxl/ (official layout) there"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            reason = str(error).splitlines()[0]
            raise InputError(f"{file} cannot be read ({reason}); expected a tokenizers file; copy it again") from error
        self._tokenizer.enable_truncation(length)
        pad = self._tokenizer.token_to_id("<pad>")
        if pad is None or self._tokenizer.encode("").tokens[-1:] != ["</s>"]:
            raise InputError(f"{file} has no <pad> or adds no </s>; umT5 needs both; copy the Wan2.1 release's file")
        self._tokenizer.enable_padding(length=length, pad_id=pad, pad_token="<pad>")
        self.length = length

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Clean and tokenise `texts`. A text that is too long is cut, with a warning in the log; it keeps its `</s>`.

        Returns:
          ids `[b, l]` int32, and mask `[b, l]` bool, True at the tokens of the text.
        """
        # One by one: encode_batch starts threads, after which a data loader cannot fork.
        encodings = [self._tokenizer.encode(clean(text)) for text in texts]
        for text, encoding in zip(texts, encodings, strict=True):
            if encoding.overflowing:
                logger.warning("text longer than %d tokens, the rest is ignored: %.60s...", self.length, clean(text))
        ids = np.array([encoding.ids for encoding in encodings], np.int32).reshape(-1, self.length)  # [b, l]
        mask = np.array([encoding.attention_mask for encoding in encodings], bool).reshape(-1, self.length)
        return ids, mask


def encode_text(encoder: UMT5Encoder, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Text features as the DiT takes them.

    Args:
      encoder: the text encoder.
      ids, mask: `[b, l]`, from a `Tokenizer`.

    Returns:
      `[b, l, e]`. Rows past the text are ZERO, and stay in: the DiT projects each to one and the same token and
      attends to it, so they must be neither the encoder's own padding rows nor masked out.
    """
    return jnp.where(mask[..., None], encoder(ids, mask), 0)  # [b, l, e]
