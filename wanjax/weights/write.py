"""Writing files of named tensors, one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from wanjax.weights.tensors import CODES, TensorInfo

Read = Callable[[str], np.ndarray]
Report = Callable[[Path, int], None]  # told of every file written and its bytes


def write_tensors(
    folder: Path, stem: str, infos: Mapping[str, TensorInfo], read: Read, max_shard_bytes: int, report: Report
) -> None:
    """Writes `{stem}.safetensors`, or shards and their index where one file would be too large.

    Args:
      folder: where to, is made if it is not there.
      stem: name of the file without its ending.
      infos: what to write, in this order.
      read: gives each tensor when its turn comes.
      max_shard_bytes: largest size of a file; a tensor that is larger has a file to itself.
      report: told of every file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(infos, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", infos, read, report)
        return
    places = {}
    for i, keys in enumerate(shards):
        name = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, {key: infos[key] for key in keys}, read, report)
        places |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": sum(info.size for info in infos.values())}, "weight_map": places}
    write_json(folder / f"{stem}.safetensors.index.json", index, report)


def _split(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for key, info in infos.items():
        if shards[-1] and used + info.size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += info.size
    return shards


def write_safetensors(
    path: Path, infos: Mapping[str, TensorInfo], read: Read, report: Report, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}  # transformers wants a format
    end = 0
    for key, info in infos.items():
        offsets = [end, end + info.size]
        header[key] = {"dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        end += info.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned tensors
    with path.open("wb") as file, _progress(path, end) as progress:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, info in infos.items():
            file.write(np.ascontiguousarray(read(key)).reshape(-1).view(np.uint8).data)
            progress.update(info.size)
    report(path, end)


def write_pth(path: Path, infos: Mapping[str, TensorInfo], read: Read, report: Report) -> None:
    """Writes one PyTorch state dict; views into mapped files stay there until torch writes them."""
    import torch

    state = {}
    for key, info in infos.items():
        bits = np.ascontiguousarray(read(key)).view(f"i{info.dtype.itemsize}").reshape(info.shape)
        with warnings.catch_warnings():  # a mapped file is read-only, and nothing here writes to it
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            state[key] = torch.from_numpy(bits).view(getattr(torch, info.dtype.name))
    torch.save(state, path)
    report(path, sum(info.size for info in infos.values()))


def write_json(path: Path, value: object, report: Report) -> None:
    """Writes one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report(path, path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


@contextlib.contextmanager
def _progress(path: Path, size: int) -> Iterator[tqdm]:
    """Bytes written, on stderr if that is a terminal."""
    with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, leave=False, disable=None) as progress:
        yield progress
