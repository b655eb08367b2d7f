"""GGUF files of diffusion transformers and of umT5, whose quantised tensors the `gguf` package multiplies out.

Names and shapes are those of the network that was converted, but for umT5, which has llama.cpp's. Sources: github
city96/ComfyUI-GGUF `loader.py`, `tools/convert.py`; ggml-org/llama.cpp `gguf-py`.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from wanjax.errors import InputError, one_line
from wanjax.untrusted import open_file, reason
from wanjax.weights.gguf_header import Array, Header, Tensor, read_array, read_header
from wanjax.weights.spiece import MOST_PIECES, Piece
from wanjax.weights.tensors import Reader, TensorInfo

ARCHITECTURES = ("wan", "t5", "t5encoder", "pig", "cow", "none", "")
"""Of `general.architecture`: those that may be one of Wan's networks; their tensors tell the rest."""
PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
UMT5 = (
    (r"token_embd\.weight", "shared.weight"),
    (r"enc\.output_norm\.weight", "encoder.final_layer_norm.weight"),
    (r"enc\.blk\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"enc\.blk\.(\d+)\.attn_rel_b\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"enc\.blk\.(\d+)\.attn_([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"enc\.blk\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"enc\.blk\.(\d+)\.ffn_gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"enc\.blk\.(\d+)\.ffn_up\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"enc\.blk\.(\d+)\.ffn_down\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)
"""llama.cpp's names of an encoder's tensors, and those of transformers."""
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
TOKENIZER = "tokenizer.ggml."
MOST_CHARSMAP = 16 * 2**20
UNUSED = 5
"""Kind of a tokenizer's piece that no text has."""


def umt5_name(key: str) -> str:
    """The name by which transformers knows a tensor; others stay."""
    for pattern, name in UMT5:
        if found := re.match(pattern, key):
            return found.expand(name) + key[found.end() :]
    return key


class GGUFFile:
    """A GGUF file.

    Raises:
      InputError: the `gguf` package is missing, the file cannot be read, or is of another architecture.
    """

    def __init__(self, path: Path):
        self.path = path
        gguf = self._import()
        try:
            with self._mapped() as data:
                header = read_header(data)
                self._settings = header.settings
                self._places = {name: self._place(gguf, x, len(data)) for name, x in header.tensors.items()}
            self.infos = {umt5_name(name): self._info(header, name) for name in header.tensors}
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} is no GGUF file or is damaged ({one_line(reason(error))}); download it again"
            ) from error
        self._places = {umt5_name(name): place for name, place in self._places.items()}
        architecture = header.settings.get("general.architecture", "")
        if architecture not in ARCHITECTURES:
            raise InputError(
                f"{path} is a GGUF of a {architecture} network; accepted: wan, and t5 for the text encoder; give one"
            )

    def pieces(self) -> tuple[list[Piece], bytes] | None:
        """The tokenizer's pieces and its map of characters; None: there is none inside.

        Raises:
          ValueError: it is of another kind than umT5's, or damaged.
        """
        kind = self._settings.get(f"{TOKENIZER}model")
        if kind is None:
            return None
        if kind != "t5":
            raise ValueError(f"one of the kind {kind!r}, not t5")
        names = ("tokens", "scores", "token_type")
        with self._mapped() as data:
            words, scores, kinds = (self._array(data, name, MOST_PIECES) for name in names)
            charsmap = self._array(data, "precompiled_charsmap", MOST_CHARSMAP)
        if not len(words) == len(scores) == len(kinds) or not isinstance(words, list):
            raise ValueError(f"one of {len(words):,} words, {len(scores):,} scores and {len(kinds):,} kinds")
        with np.errstate(invalid="ignore"):  # where kinds are no whole numbers
            scores, kinds = np.asarray(scores, np.float32).tolist(), np.asarray(kinds).astype(np.int64).tolist()
        if not np.isfinite(scores).all():
            raise ValueError("one with scores that are no numbers")
        pieces = [Piece(*x) for x in zip(words, scores, kinds, strict=True)]
        while pieces and pieces[-1].kind == UNUSED:  # up to the size of the network's table
            pieces.pop()
        return pieces, np.asarray(charsmap).astype(np.uint8).tobytes()

    def _array(self, data: mmap.mmap, name: str, most: int) -> Any:
        said = self._settings.get(TOKENIZER + name, ())
        if isinstance(said, Array):
            if said.count > most:
                raise ValueError(f"one of {said.count:,} {name}")
            return read_array(data, said)
        if not isinstance(said, tuple):
            raise ValueError(f"one whose {name} are {said!r}")
        return said

    def _import(self) -> Any:
        try:
            import gguf
        except ImportError as error:
            raise InputError(
                f"{self.path.name} needs the gguf package, which is not installed; pip install 'wanjax[gguf]'"
            ) from error
        return gguf

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[mmap.mmap]:
        """The file in memory; it is unmapped with the last view."""
        with open_file(self.path) as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield mapping

    def _place(self, gguf: Any, tensor: Tensor, size: int) -> _Place:
        """Where a tensor's rows lie in a file of so many bytes."""
        kind = gguf.GGMLQuantizationType(tensor.kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row = tensor.shape[-1] if tensor.shape else 1
        if row % block:
            raise ValueError(f"rows of {row} numbers in blocks of {block}")
        rows = (*tensor.shape[:-1], row // block * block_bytes)
        if tensor.start + math.prod(rows) > size:
            raise ValueError(f"{size:,} bytes, but a tensor ends at {tensor.start + math.prod(rows):,}")
        return _Place(kind, tensor.start, rows)

    def _info(self, header: Header, name: str) -> TensorInfo:
        """What a tensor is when it is multiplied out; one of more axes than the format holds says its shape apart."""
        shape, kind = header.tensors[name].shape, self._places[name].kind
        said: Any = header.settings.get(ORIGINAL_SHAPE + name, shape)
        whole = isinstance(said, tuple) and all(type(n) is int and n >= 0 for n in said)
        if not whole or math.prod(said) != math.prod(shape):
            raise ValueError(f"{name} of shape {said} in place of {list(shape)}")
        return TensorInfo(said, np.dtype(PLAIN.get(kind.name, np.float32)))

    @contextlib.contextmanager
    def open(self) -> Iterator[Reader]:
        """Maps the file into memory; it is unmapped with the last view."""
        with self._mapped() as data:
            yield _GGUFReader(self, data)


class _Place(NamedTuple):
    """kind: of the `gguf` package's. start: in the file. rows: shape in bytes."""

    kind: Any
    start: int
    rows: tuple[int, ...]


class _GGUFReader:
    def __init__(self, file: GGUFFile, data: mmap.mmap):
        self._file, self._data = file, data

    def view(self, key: str) -> np.ndarray:
        import gguf

        (kind, start, rows), info = self._file._places[key], self._file.infos[key]
        data = np.frombuffer(self._data, np.uint8, math.prod(rows), start).reshape(rows)
        if kind.name in PLAIN:
            return data.view(info.dtype).reshape(info.shape)
        try:
            with np.errstate(all="ignore"):  # NaN of a damaged file is found by who takes the numbers
                return gguf.quants.dequantize(data, kind).astype(np.float32, copy=False).reshape(info.shape)
        except NotImplementedError as error:
            raise InputError(
                f"{self._file.path} has {key} as {kind.name}, which the gguf package cannot read; "
                "Q2_K to Q8_0, F16 and BF16 are accepted; give another file"
            ) from error

    def release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)
