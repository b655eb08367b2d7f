"""Files of named tensors: safetensors, and PyTorch's .pth where torch is installed. Reading without a second copy."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from wanjax.errors import InputError
from wanjax.untrusted import open_file, parse_json

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
PICKLED = (".pth", ".pt", ".bin")
CHUNK_BYTES = 8 * 2**20
MOST_HEADER_BYTES = 100_000_000
"""Of a safetensors file; the format's own limit."""
MOST_NAME = 1000
"""Letters of a tensor's name; published ones have up to a hundred."""


class TensorInfo(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Reader(Protocol):
    """An open file of tensors."""

    def view(self, key: str) -> np.ndarray:
        """The tensor, still in the file: read-only, and valid only while the file is open."""
        ...

    def release(self) -> None:
        """Gives the memory of what was read so far back to the system; views stay valid."""
        ...


class TensorFile(Protocol):
    """A closed file of tensors, of which the names, shapes and dtypes are known, in the order of the file."""

    path: Path
    infos: dict[str, TensorInfo]

    def open(self) -> contextlib.AbstractContextManager[Reader]:
        """Opens the file for reading."""
        ...


def copy(view: np.ndarray, dtype: np.typing.DTypeLike, reader: Reader) -> np.ndarray:
    """A contiguous copy in `dtype` of a view into an open file.

    Goes through the file front to back and hands its pages back on the way, so that no tensor is in memory twice. A
    transposed one goes a few rows at a time, cast first and moved as integers, which is two to five times as fast as
    numpy's own way. The copy's address is a multiple of 64: JAX adopts such an array on the CPU and copies no more.
    """
    out = aligned(view.shape, dtype)
    if view.ndim == 0:
        out[...] = view
        return out
    outer = int(np.argmax(view.strides))
    step = 16 if outer else max(1, 2**20 * len(view) // max(1, view.nbytes))
    bits, read = f"u{out.itemsize}", 0
    for start in range(0, view.shape[outer], step):
        chunk = (*[slice(None)] * outer, slice(start, start + step))
        part = view[chunk].astype(dtype)
        out.view(bits)[chunk] = part.view(bits)
        read += step * view.strides[outer]  # of a sharded tensor whole rows come into memory, not only our part
        if read > CHUNK_BYTES:
            reader.release()
            read = 0
    reader.release()
    return out


def is_finite(array: np.ndarray) -> bool:
    """Whether all numbers of an array of floats are finite; told by their exponents, a few at a time.

    Several times as fast as `numpy.isfinite`, which has no loops of its own for bfloat16 and 8 bits.
    """
    info = ml_dtypes.finfo(array.dtype)
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    top = np.array((2**info.nexp - 1) << info.nmant, bits.dtype)  # the exponent of NaN and infinity
    if array.dtype == ml_dtypes.float8_e4m3fn:  # it has no infinity, and one NaN
        top = bits.dtype.type(0x7F)
    step = 2**20
    return not any(np.any(bits[i : i + step] & top == top) for i in range(0, len(bits), step))


def aligned(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """An uninitialised array whose address is a multiple of 64."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


class SafetensorsFile:
    """A safetensors file (format: github huggingface/safetensors, README).

    Read here and not by the library because its numpy reader copies every tensor and keeps what it read in memory
    until the file is closed: twice the file while loading.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open_file(path) as file:
                size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
                whole = 8 + length <= size and length <= MOST_HEADER_BYTES
                header = parse_json(file.read(length)) if whole else None
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); check that it is there.") from error
        except ValueError as error:
            raise InputError(f"{path} is not a safetensors file ({error}); download it again.") from error
        if not isinstance(header, dict):
            raise InputError(f"{path} is truncated or not a safetensors file; download it again.")
        try:
            self._read_header(header, 8 + length, size)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} has a header that cannot be read ({error!r}); download it again.") from error

    def _read_header(self, header: dict[str, Any], base: int, size: int) -> None:
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        if not all(isinstance(text, str) for text in self.metadata.values()):
            raise ValueError("__metadata__")
        self.infos, self._start = {}, {}
        end = base
        for key, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
            if len(key) > MOST_NAME:
                raise ValueError(f"a name of {len(key):,} letters")
            if not all(type(n) is int and n >= 0 for n in (*item["shape"], *item["data_offsets"])):
                raise ValueError(f"numbers of {key}")
            info = TensorInfo(tuple(item["shape"]), np.dtype(DTYPES[item["dtype"]]))
            start, stop = (base + offset for offset in item["data_offsets"])
            if start != end or stop - start != info.size:
                raise ValueError(f"offsets of {key}")
            self.infos[key], self._start[key], end = info, start, stop
        if end != size:
            raise InputError(f"{self.path} has {size} bytes instead of {end}: truncated; download it again.")

    @contextlib.contextmanager
    def open(self) -> Iterator[Reader]:
        """Maps the file into memory; it is unmapped with the last view."""
        with open_file(self.path) as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield _MappedReader(self.infos, self._start, mapping)


class _MappedReader:
    def __init__(self, infos: dict[str, TensorInfo], start: dict[str, int], mapping: mmap.mmap):
        self._infos, self._start, self._mapping = infos, start, mapping

    def view(self, key: str) -> np.ndarray:
        shape, dtype = self._infos[key]
        flat = np.frombuffer(self._mapping, dtype, math.prod(shape), self._start[key])
        return flat.reshape(shape)

    def release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # mapped pages count as ours until they are unmapped or given back
            self._mapping.madvise(mmap.MADV_DONTNEED)


class PthFile:
    """A state dict written by `torch.save`."""

    def __init__(self, path: Path):
        self.path = path
        tensors = _torch_load(path)
        self.infos = {key: TensorInfo(x.shape, x.dtype) for key, x in tensors.items()}
        for key, info in self.infos.items():
            if info.dtype not in CODES:
                raise InputError(f"{path} has {key} as {info.dtype}; accepted are {', '.join(map(str, CODES))}.")

    @contextlib.contextmanager
    def open(self) -> Iterator[Reader]:
        """Maps the file into memory; it is unmapped with the last view."""
        yield _TorchReader(_torch_load(self.path))


class _TorchReader:
    def __init__(self, tensors: dict[str, np.ndarray]):
        self._tensors = tensors

    def view(self, key: str) -> np.ndarray:
        return self._tensors[key]

    def release(self) -> None:
        """The mapping belongs to torch, which gives it back as a whole."""


def _torch_load(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a state dict as a view into the mapped file."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path.name} needs torch, which is not installed; pip install 'wanjax[torch]', "
            f"or put {path.stem}.safetensors with the same names beside it"
        ) from error
    if not path.is_file():
        raise InputError(f"{path} is not there.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file raises whatever the damaged part leads to
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path} is not a PyTorch state dict or is damaged ({reason}); download it again.") from error
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise InputError(f"{path} holds something else than a dict of tensors; give the state dict.")
    return {key: _numpy(x) for key, x in state.items()}


def _numpy(x: Any) -> np.ndarray:
    """A torch tensor as numpy, bits passed as integers: numpy knows bfloat16 and float8 only through ml_dtypes."""
    import torch

    name = str(x.dtype).removeprefix("torch.")
    bits = x.view(getattr(torch, f"int{8 * x.element_size()}")).numpy()
    return bits.view(getattr(ml_dtypes, name, name))
