"""From prompt to text features: cleaning, token ids, umT5 (Wan2.1 `wan/modules/tokenizers.py`, `wan/modules/t5.py`)."""

from __future__ import annotations

import contextlib
import html
import logging
import os
import re
from collections.abc import Iterator, Sequence
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
from wanjax.untrusted import read_bytes, reason

logger = logging.getLogger(__name__)

TEXT_LENGTH = 512
SPARE_WORDS = 256
"""That an encoder may have beyond its tokenizer's, and a hundredth of all: published tables are rounded up."""

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
    "last": "镜头晃动，" + _NEGATIVE_PROMPT,
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
      folder: `tokenizer/` of the Diffusers layout, `google/umt5-xxl/` of the official one; or the file itself; or what
        would be in it. Nothing else is read.
      length: tokens a text is padded or cut to.

    Raises:
      InputError: the folder holds no usable `tokenizer.json`.
    """

    def __init__(self, folder: str | Path | bytes, length: int = TEXT_LENGTH):
        file = "the tokenizer inside umT5's file" if isinstance(folder, bytes) else _tokenizer_file(Path(folder))
        self.file, self.length = file, length
        with self._usable(), _without_panics():
            content = folder if isinstance(folder, bytes) else read_bytes(file)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            self._tokenizer.no_padding()  # a file that was saved after use may ask for some
            self._tokenizer.enable_truncation(length)
            pad = self._tokenizer.token_to_id("<pad>")
            ends = [self._tokenizer.encode(text).tokens[-1:] for text in ("", "a word")]
        if pad is None or ends != [["</s>"]] * 2:
            raise InputError(f"{file} has no <pad> or adds no </s>; umT5 needs both; copy the Wan2.1 release's file")
        self._tokenizer.enable_padding(length=length, pad_id=pad, pad_token="<pad>")

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        """Says in one line what the library makes of a bad file: bare `Exception`, or a panic, which is none.

        Raises:
          InputError: in place of these.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise InputError(
                f"{self.file} cannot be read ({reason(error)}); expected a tokenizers file; copy it again"
            ) from error

    def check(self, vocab_size: int) -> None:
        """Whether a text encoder of so many words knows those of this tokenizer, and about no others.

        Raises:
          InputError: it is of another one: its words would be others.
        """
        size = 1 + max(self._tokenizer.get_vocab().values())
        if not 0 <= vocab_size - size < SPARE_WORDS + vocab_size // 100:
            raise InputError(
                f"{self.file} has {size:,} words, the text encoder {vocab_size:,}; the tokenizer that it was trained "
                "with is needed; copy the tokenizer of the same release"
            )

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Clean and tokenise `texts`. A text that is too long is cut, with a warning in the log; it keeps its `</s>`.

        Returns:
          ids `[b, l]` int32, and mask `[b, l]` bool, True at the tokens of the text.
        """
        with self._usable():
            # One by one: encode_batch starts threads, after which a data loader cannot fork.
            encodings = [self._tokenizer.encode(clean(text)) for text in texts]
        for text, encoding in zip(texts, encodings, strict=True):
            if encoding.overflowing:
                logger.warning("text longer than %d tokens, the rest is ignored: %.60s...", self.length, clean(text))
        ids = np.array([encoding.ids for encoding in encodings], np.int32).reshape(-1, self.length)  # [b, l]
        mask = np.array([encoding.attention_mask for encoding in encodings], bool).reshape(-1, self.length)
        return ids, mask


def _tokenizer_file(folder: Path) -> Path:
    file = folder if folder.is_file() else folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(
            f"{folder} holds no tokenizer.json; the tokenizer of a Wan2.1 release is needed; "
            "copy the release's tokenizer/ (Diffusers layout) or google/umt5-xxl/ (official layout) there, "
            "or give the file as --tokenizer"
        )
    return file


@contextlib.contextmanager
def _without_panics() -> Iterator[None]:
    """Rust's own report of a panic, some forty lines, goes nowhere: it is written past Python. In one thread only."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


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
