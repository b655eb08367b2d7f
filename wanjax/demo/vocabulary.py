"""A tokenizer of whole words, for encoders that are trained from scratch on captions of few words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

SPECIAL = ("<pad>", "</s>", "<unk>")

PUNCTUATION = (";", ",", ".")


def word_id(mark: str) -> int:
    """The id of a mark of `SPECIAL` or `PUNCTUATION`, whatever the words are."""
    return _ids(())[mark]


def vocabulary_size(words: Iterable[str]) -> int:
    """How many ids there are: the words', and those of `SPECIAL` and `PUNCTUATION`."""
    return len(_ids(words))


def write_tokenizer(folder: str | Path, words: Iterable[str]) -> None:
    """Write `tokenizer.json` and the `tokenizer_config.json` that transformers wants beside it.

    Text is lower-cased and split at white space and punctuation; other words than `words` become `<unk>`.
    """
    tokenizer = tokenizers.Tokenizer(models.WordLevel(_ids(words), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    end = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))])
    tokenizer.post_processor = end  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(list(SPECIAL))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _ids(words: Iterable[str]) -> dict[str, int]:
    return {word: i for i, word in enumerate((*SPECIAL, *PUNCTUATION, *sorted(set(words))))}
