"""Where the published layouts keep what: finding out which one a folder has, and the files of each network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from wanjax.convert.tensors import TensorFile, TensorInfo, tensor_file
from wanjax.errors import InputError

LayoutName = Literal["diffusers", "official"]
NetworkName = Literal["dit", "vae", "umt5", "clip"]

DIFFUSERS_FOLDERS = {"dit": "transformer", "vae": "vae", "umt5": "text_encoder", "clip": "image_encoder"}
OFFICIAL_STEMS = {
    "dit": "diffusion_pytorch_model",
    "vae": "Wan2.1_VAE",
    "umt5": "models_t5_umt5-xxl-enc-bf16",
    "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
}
DIFFUSERS_STEMS = {"dit": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "umt5": "model", "clip": "model"}


class Settings(dict[str, Any]):
    """A JSON object whose missing entries raise an error that names the file."""

    def __init__(self, path: Path):
        super().__init__(read_json(path))
        self.path = path

    def __missing__(self, name: str) -> Any:
        raise InputError(f"{self.path} has no {name!r}; download it again.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      InputError: not there, not readable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); download it again.") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; download it again.")
    return value


def detect(path: Path) -> LayoutName:
    """Which layout the folder has.

    Raises:
      InputError: the folder is not there, or has neither layout, or both.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give the folder of a downloaded Wan2.1 checkpoint.")
    folders = [path / folder / "config.json" for folder in DIFFUSERS_FOLDERS.values()]
    diffusers = (path / "model_index.json").is_file() or any(file.is_file() for file in folders)
    official = any(_candidates(path, stem) for stem in OFFICIAL_STEMS.values())
    if diffusers == official:
        what = "has both layouts" if diffusers else "is no Wan2.1 checkpoint"
        raise InputError(
            f"{path} {what}; give a folder with either model_index.json and transformer/, vae/, .. (Diffusers) "
            f"or config.json, diffusion_pytorch_model*.safetensors and Wan2.1_VAE.pth (official)."
        )
    return "diffusers" if diffusers else "official"


def _candidates(folder: Path, stem: str) -> list[Path]:
    names = (f"{stem}.safetensors.index.json", f"{stem}.safetensors", f"{stem}.pth")
    return [folder / name for name in names if (folder / name).is_file()]


class Weights:
    """The tensor files of one network: one file, or shards named by an index.

    Attributes:
      where: the file or index, for messages.
      files: the files, in order.

    Raises:
      InputError: a file is missing, damaged, or disagrees with the index.
    """

    def __init__(self, folder: Path, stem: str):
        found = _candidates(folder, stem)
        if not found:
            raise InputError(f"{folder} has no {stem}.safetensors or {stem}.safetensors.index.json; download it again.")
        if len(found) > 1 and found[1].suffix == ".safetensors":
            raise InputError(f"{folder} has both {found[0].name} and {found[1].name}; remove the one that is old.")
        self.where = found[0]  # of a .pth and its twin, the twin: it needs no torch
        if self.where.suffix == ".json":
            self.files = _indexed_files(self.where)
        else:
            self.files: list[TensorFile] = [tensor_file(self.where)]

    def items(self) -> Iterator[tuple[str, TensorInfo]]:
        """Name, shape and dtype of every tensor."""
        for file in self.files:
            yield from file.infos.items()


def _indexed_files(index: Path) -> list[TensorFile]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and "/" not in name for name in places.values()):
        raise InputError(f"{index} has no valid weight_map; download it again.")
    names = sorted(set(places.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(f"{index} names {len(missing)} missing file(s): {', '.join(missing[:5])}; download them.")
    files = [tensor_file(index.parent / name) for name in names]
    inside = {key: file.path.name for file in files for key in file.infos}
    count = sum(len(file.infos) for file in files)
    if inside != places or count != len(places):
        wrong = sorted(key for key in {**inside, **places} if inside.get(key) != places.get(key))
        wrong = wrong or sorted(k for f in files for k in f.infos if inside[k] != f.path.name)
        raise InputError(f"{index} and its files disagree about {len(wrong)} tensor(s): {', '.join(wrong[:5])}.")
    return files
