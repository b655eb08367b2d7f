"""Where the published layouts keep what: finding out which one a folder has, and the files of each network."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wanjax.errors import InputError
from wanjax.untrusted import read_json
from wanjax.weights.gguf_file import GGUFFile
from wanjax.weights.mapping import LayoutName, Network, NetworkName, Shape
from wanjax.weights.spiece import json_of, tokenizer_json
from wanjax.weights.stored import SPIECE, readable, tensor_file
from wanjax.weights.tables import clip, dit, umt5, vae
from wanjax.weights.tensors import TensorFile, TensorInfo

NETWORKS: dict[NetworkName, Network] = {
    "dit": dit.NETWORK,
    "vae": vae.NETWORK,
    "umt5": umt5.NETWORK,
    "clip": clip.NETWORK,
}
EXPERTS: tuple[NetworkName, ...] = ("dit", "dit_low")
EXPERT_FOLDERS: dict[NetworkName, str] = {"dit": "high_noise_model", "dit_low": "low_noise_model"}
"""In the official layout, where there are two."""
PARTS: dict[NetworkName, Network] = {
    "dit": dit.NETWORK,
    "dit_low": dit.NETWORK._replace(folder="transformer_2"),
    **NETWORKS,
}
"""All that a checkpoint may hold."""
TOKENIZER = {"diffusers": "tokenizer", "official": "google/umt5-xxl"}


class Settings(dict[str, Any]):
    """A JSON object from a file; a missing entry raises an error that names the file.

    Raises:
      InputError: not there, not readable, not JSON, or not an object.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            value = read_json(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); download it again.") from error
        except ValueError as error:
            raise InputError(f"{path} is not JSON ({error}); download it again.") from error
        if not isinstance(value, dict):
            raise InputError(f"{path} holds no JSON object; download it again.")
        super().__init__(value)

    def __missing__(self, name: str) -> Any:
        raise InputError(f"{self.path} has no entry {name}; download it again.")


class TensorShapes(dict[str, Shape]):
    """Shapes by name; a missing tensor raises an error that names the file."""

    def __init__(self, shapes: dict[str, Shape], where: Path):
        super().__init__(shapes)
        self.where = where

    def __missing__(self, name: str) -> Shape:
        raise InputError(f"{self.where} lacks the tensor {name}; not a Wan2.1 checkpoint, or incomplete.")


def network_place(path: Path, layout: LayoutName, name: NetworkName, experts: int = 1) -> tuple[Path, str]:
    """Folder and stem of a network's tensor files, in a checkpoint of one DiT or of two experts."""
    network = PARTS[name]
    if layout == "diffusers":
        return path / network.folder, network.stems[layout]
    return (path / EXPERT_FOLDERS[name] if experts == 2 and name in EXPERTS else path), network.stems[layout]


def count_experts(path: Path, layout: LayoutName) -> int:
    """1 or 2, as the checkpoint's folders and its `model_index.json` say.

    Raises:
      InputError: one of two experts is not there.
    """
    places = [network_place(path, layout, name, 2)[0] for name in EXPERTS]
    index = path / "model_index.json"
    named = layout == "diffusers" and index.is_file() and names_a_network(Settings(index).get("transformer_2"))
    there = [place for place in places if place.is_dir()]
    if not named and not any(place.is_dir() for place in places[layout == "diffusers" :]):
        return 1
    if len(there) < 2:
        missing = next(place for place in places if place not in there)
        raise InputError(f"{path} has two experts, of which {missing.name}/ is missing; download it too.")
    return 2


def detect(path: Path) -> LayoutName:
    """Which layout the folder has.

    Raises:
      InputError: the folder is not there, or has neither layout, or both.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give the folder of a downloaded Wan checkpoint.")
    _refuse_network_folder(path)
    folders = [path / network.folder / "config.json" for network in NETWORKS.values()]
    diffusers = (path / "model_index.json").is_file() or any(file.is_file() for file in folders)
    official = any(tensor_files(path, network.stems["official"]) for network in NETWORKS.values())
    official = official or any((path / folder).is_dir() for folder in EXPERT_FOLDERS.values())
    if diffusers == official:
        what = "has both layouts" if diffusers else "is no Wan checkpoint"
        raise InputError(
            f"{path} {what}; give a folder with either model_index.json, transformer/, vae/ and so on (Diffusers) "
            "or config.json, diffusion_pytorch_model*.safetensors, Wan2.1_VAE.pth and so on (official)."
        )
    return "diffusers" if diffusers else "official"


def _refuse_network_folder(path: Path) -> None:
    """`transformer/` and `vae/` of the Diffusers layout have files named like those of the official one."""
    config = path / "config.json"
    kind = Settings(config).get("_class_name", "WanModel") if config.is_file() else "WanModel"
    if kind != "WanModel":
        raise InputError(f"{path} holds a {kind} alone; give the checkpoint's folder, the one above.")


def tensor_files(folder: Path, stem: str) -> list[Path]:
    """The files that may hold a network's tensors, or say where they are, as far as they are there.

    Where those of the usual names are missing, a variant (`.fp16.safetensors`) or PyTorch's `.bin` is taken.
    """
    names = (f"{stem}.safetensors.index.json", f"{stem}.safetensors", f"{stem}.pth")
    if usual := [folder / name for name in names if (folder / name).is_file()]:
        return usual
    variants = [*folder.glob(f"{stem}.safetensors.index.*.json"), *folder.glob(f"{stem}.*.safetensors")]
    pickled = [*folder.glob(f"{stem}.bin.index.json"), *folder.glob(f"{stem}.bin"), *folder.glob(f"pytorch_{stem}.bin")]
    return [min(variants)] if variants else pickled[:1]


class Weights:
    """The tensor files of one network: one file, or shards named by an index.

    Attributes:
      where: the file or index, for messages.
      files: the files, in order.

    Raises:
      InputError: a file is missing or damaged, or disagrees with the index.
    """

    files: list[TensorFile]

    @classmethod
    def of_file(cls, path: Path) -> Weights:
        """The tensors of one file, or of the shards of an index, whatever it is called."""
        weights = cls.__new__(cls)
        weights._open(path)
        return weights

    def __init__(self, folder: Path, stem: str):
        found = tensor_files(folder, stem)
        if not found:
            raise InputError(f"{folder} has no {stem}.safetensors or {stem}.safetensors.index.json; download it again.")
        if len(found) > 1 and found[1].suffix == ".safetensors":
            raise InputError(f"{folder} has both {found[0].name} and {found[1].name}; remove the one that is old.")
        self._open(found[0])  # of a .pth and its twin the twin: it needs no torch

    def _open(self, where: Path) -> None:
        self.where = where
        files = _indexed_files(self.where) if self.where.suffix == ".json" else [tensor_file(self.where)]
        self._stored = files
        self.files = [readable(file) for file in files]

    def tokenizer(self) -> bytes | None:
        """What a `tokenizer.json` would hold of the SentencePiece model that files of umT5 may have inside.

        As ComfyUI's have, or in the way of GGUF.

        Raises:
          ValueError: it is damaged.
        """
        for file in self._stored:
            if SPIECE in file.infos:
                with file.open() as reader:
                    return tokenizer_json(reader.view(SPIECE).tobytes())
            if isinstance(file, GGUFFile) and (found := file.pieces()) is not None:
                return json_of(*found)
        return None

    def items(self) -> Iterator[tuple[str, TensorInfo]]:
        """Name, shape and dtype of every tensor."""
        for file in self.files:
            yield from file.infos.items()

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[str], np.ndarray]]:
        """Opens all files; gives a function that views a tensor by its name, until the next one is asked for."""
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(file.open()) for file in self.files]
            places = {key: reader for file, reader in zip(self.files, readers, strict=True) for key in file.infos}

            def view(key: str) -> np.ndarray:
                for reader in readers:
                    reader.release()
                return places[key].view(key)

            yield view


def _indexed_files(index: Path) -> list[TensorFile]:
    places = Settings(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and "/" not in name for name in places.values()):
        raise InputError(f"{index} has no valid weight_map; download it again.")
    names = sorted(set(places.values()))
    missing = [name for name in names if not os.path.isfile(index.parent / name)]  # a name can be too long
    if missing:
        raise InputError(f"{index} names {len(missing)} missing file(s): {', '.join(missing[:5])}; download them.")
    files = [tensor_file(index.parent / name) for name in names]
    pairs = {(key, file.path.name) for file in files for key in file.infos}
    wrong = sorted({key for key, _ in pairs ^ set(places.items())})
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(
            f"{index} and its files disagree about {len(wrong)} tensor(s): {', '.join(wrong[:5])}{more}; "
            "download all of them again."
        )
    return files


def names_a_network(entry: object) -> bool:
    """Whether an entry of `model_index.json`, which is [library, class], or [null, null] for none, names a network."""
    return isinstance(entry, list) and entry[:1] not in ([], [None])
