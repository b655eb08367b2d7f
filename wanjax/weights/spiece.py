"""SentencePiece models of the unigram kind, as files of umT5 have one inside (`spiece_model`), as a `tokenizer.json`.

Source: github google/sentencepiece `src/sentencepiece_model.proto`; the result is what transformers makes of T5's.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""Kinds of pieces; the usual ones are 1."""
SPACE = "▁"
MOST_PIECES = 2**20


class Piece(NamedTuple):
    """A word or part of one."""

    text: str
    score: float
    kind: int


def tokenizer_json(model: bytes) -> bytes:
    """The `tokenizer.json` of a SentencePiece model.

    Raises:
      ValueError: it is damaged, or none of umT5's kind.
    """
    return json_of(*read_model(model))


def read_model(model: bytes) -> tuple[list[Piece], bytes]:
    """The pieces of a SentencePiece model, and its map of characters.

    Raises:
      ValueError: it is damaged.
    """
    pieces, charsmap = [], b""
    try:
        for field, value in fields(model):
            if field == 1:
                parts = dict(fields(value))
                (score,) = struct.unpack("<f", parts.get(2, bytes(4)))
                pieces.append(Piece(parts[1].decode(), score, parts.get(3, 1)))
            elif field == 3:
                charsmap = dict(fields(value)).get(2, b"")
    except (IndexError, KeyError, TypeError, AttributeError, struct.error, ValueError) as error:
        raise ValueError(f"no SentencePiece model, or a damaged one ({error!r})") from error
    return pieces, charsmap


def json_of(pieces: list[Piece], charsmap: bytes) -> bytes:
    """The `tokenizer.json` of pieces, and a map of characters.

    Raises:
      ValueError: they are none of umT5's kind.
    """
    unknown = [i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN]
    end = [i for i, piece in enumerate(pieces) if piece.text == "</s>"]
    if len(unknown) != 1 or len(end) != 1 or len(pieces) > MOST_PIECES:
        raise ValueError(f"a model of {len(pieces)} pieces, {len(unknown)} for the unknown and {len(end)} ends")
    return json.dumps(_tokenizer(pieces, charsmap, unknown[0], end[0]), ensure_ascii=False).encode()


def _tokenizer(pieces: list[Piece], charsmap: bytes, unknown: int, end: int) -> dict[str, Any]:
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    normalizers: list[dict[str, Any]] = [
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE},
    ]
    if charsmap:
        precompiled = base64.b64encode(charsmap).decode()
        normalizers.insert(0, {"type": "Precompiled", "precompiled_charsmap": precompiled})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    a, end_token = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}
    b = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece.text, **flags, "special": piece.kind == CONTROL}
            for i, piece in enumerate(pieces)
            if piece.kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [a, end_token],
            "pair": [a, end_token, b, end_token],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [end], "tokens": ["</s>"]}},
        },
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [[piece.text, piece.score] for piece in pieces],
            "byte_fallback": any(piece.kind == BYTE for piece in pieces),
        },
    }


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer: whole numbers, or bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        size, at = {1: (8, at), 5: (4, at)}.get(kind) or _varint(message, at)
        if kind not in (1, 2, 5) or at + size > len(message):
            raise ValueError(f"a field of kind {kind} at byte {at}")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than 64 bits at byte {at}")
