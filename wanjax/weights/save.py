"""Writing checkpoints in a published layout, and converting one layout into the other."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental import multihost_utils

from wanjax.errors import InputError
from wanjax.files import check_name, replacing, try_place
from wanjax.untrusted import reason
from wanjax.weights import pipeline_files
from wanjax.weights.extra import FOLDER, Extra
from wanjax.weights.layouts import EXPERT_FOLDERS, PARTS, TOKENIZER, Settings, network_place
from wanjax.weights.load import BOUNDARIES, Checkpoint
from wanjax.weights.mapping import LayoutName, NetworkName
from wanjax.weights.tensor_source import ConvertSource, ModuleSource, TensorSource, make_sources
from wanjax.weights.write import write_json, write_pth, write_safetensors, write_tensors

Say = Callable[[str], None]
CHOICES = (
    "dtype",
    "param_dtype",
    "attention",
    "weight_only",
)  # of a configuration: not what a checkpoint is, but how it is used
# Files that are no tensors and no tokenizer, by layout: kept whole.
COMPANIONS = {
    "official": (
        "config.json",
        *(f"{folder}/config.json" for folder in EXPERT_FOLDERS.values()),
        "xlm-roberta-large",
    ),
    "diffusers": (
        "model_index.json",
        "scheduler",
        "image_processor",
        *(f"{network.folder}/config.json" for network in PARTS.values()),
    ),
}


def save(
    path: str | Path,
    layout: LayoutName,
    models: Mapping[NetworkName, Any],
    *,
    base: Checkpoint | None = None,
    flow_shift: float | None = None,
    max_shard_bytes: int = 5 * 10**9,
    pth: bool | None = None,
    say: Say = lambda line: None,
) -> None:
    """Writes a checkpoint that the library of the layout reads.

    Appears at `path` when it is complete, not before. On several hosts all have to call this; the first one writes.

    Args:
      path: folder to make; must not be there, or be empty.
      layout: "diffusers" or "official".
      models: modules to write, by network, in the dtypes that they have.
      base: checkpoint that gives everything else, tensors bit for bit, whatever its layout.
      flow_shift: the schedule's shift; None: that of `base`, or the official default for the task.
      max_shard_bytes: largest size of one file (the official layout shards only the DiT).
      pth: whether the official layout's .pth files are written as such, which needs torch, or as .safetensors with the
        same stem and names, which only wanjax reads. None: as .pth if torch is there.
      say: told one line for every file, and of every choice made.

    Raises:
      InputError: `path` cannot be written, torch is missing, or `base` is not sound. All of it before the work.
    """
    pth = _writes_pth(layout, pth)
    sources = make_sources(models, base, layout)
    if not models or jax.process_index() == 0:  # a conversion needs no devices, and does not wake them
        with _staging(Path(path), base, sum(i.size for s in sources.values() for i in s.infos.values())) as folder:
            _Writer(folder, layout, sources, base, say).write(flow_shift, max_shard_bytes, pth)
        say(f"{path} has the {layout} layout.")
    else:
        _take_part(sources)
    if models and jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {path}")


def convert(
    source: str | Path | None,
    target: str | Path,
    layout: LayoutName,
    files: Mapping[NetworkName, str | Path] = MappingProxyType({}),
    tokenizer: str | Path | None = None,
    **options: Any,
) -> None:
    """Writes a checkpoint in the other layout, or files of single networks in any; tensors bit for bit.

    Args:
      source: its folder; None: there are files alone.
      target, layout, options: as for `save`.
      files, tokenizer: as `Checkpoint` takes them.

    Raises:
      InputError: as `save`, or the source has this layout already.
    """
    base = Checkpoint(source, files, tokenizer)
    if base.layout == layout and not base.files:
        raise InputError(f"{source} has the {layout} layout already; nothing to convert.")
    save(target, layout, {}, base=base, **options)


def _writes_pth(layout: LayoutName, asked: bool | None) -> bool:
    """Whether .pth files are written as such: as asked, or if torch is there.

    Raises:
      InputError: asked for without torch.
    """
    has_torch = importlib.util.find_spec("torch") is not None
    if asked and not has_torch and layout == "official":
        raise InputError(
            "Writing .pth needs torch, which is not installed; pip install 'wanjax[torch]', or choose .safetensors"
        )
    return has_torch if asked is None else asked


def _take_part(sources: Mapping[NetworkName, TensorSource]) -> None:
    """On hosts that do not write: hands over this host's part of every array, in the order of writing."""
    for source in sources.values():
        if isinstance(source, ModuleSource):
            with source.open() as read:
                for key in source.infos:
                    read(key)


def check_target(path: Path, base: Checkpoint | None) -> None:
    """Raises `InputError` if `save` would refuse to write the folder."""
    check_name(path, "output")
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} exists and is not empty; give another folder or remove it.")
        if os.path.ismount(path):
            raise InputError(f"{path} is where a disk is mounted; give a folder on it.")
        if base and base.is_folder and path.resolve().is_relative_to(base.path.resolve()):
            raise InputError(f"{path} is inside {base.path}, which is being read; give a folder outside of it.")
        try_place(path.resolve())
    except (OSError, RuntimeError) as error:  # before Python 3.13 a loop of links is a RuntimeError
        raise InputError(f"{path} cannot be written ({reason(error)}); give another folder.") from error


@contextlib.contextmanager
def _staging(path: Path, base: Checkpoint | None, size: int) -> Iterator[Path]:
    """A folder beside the target that becomes the target when all went well, and vanishes otherwise."""
    check_target(path, base)
    try:
        with replacing(path.resolve()) as folder:
            folder.mkdir()
            free = shutil.disk_usage(folder).free
            if free < size:
                raise InputError(
                    f"{path} needs {size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; give another disk."
                )
            yield folder
            check_target(path, base)  # hours later: what was put there meanwhile is not replaced
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); make room or give another folder.") from error


class _Writer:
    """Fills the staged folder."""

    def __init__(
        self,
        folder: Path,
        layout: LayoutName,
        sources: Mapping[NetworkName, TensorSource],
        base: Checkpoint | None,
        say: Say,
    ):
        self.folder, self.sources, self.base, self.say = folder, sources, base, say
        self.layout: LayoutName = layout
        self.origin: LayoutName = "official" if layout == "diffusers" else "diffusers"
        self.extra = Extra(self.origin)
        self.experts = 2 if "dit_low" in sources else 1

    def write(self, flow_shift: float | None, max_shard_bytes: int, pth: bool) -> None:
        if self.base:
            self._copy_files(self.base)
        for name, source in self.sources.items():
            self._write_network(name, source, max_shard_bytes, pth)
        self._set_shift(flow_shift)
        boundary = self._boundary() if self.experts == 2 else None
        if self.layout == "diffusers":
            self._write_pipeline(boundary)
        else:
            self._tell_what_official_code_misses()
        self._write_extra()
        self._check()

    def report(self, path: Path, size: int) -> None:
        self.say(f"wrote {path.relative_to(self.folder)} ({size:,} bytes)")

    def _copy_files(self, base: Checkpoint) -> None:
        """Tokenizer, and configurations as they are: at their places, or kept for the way back."""
        place = self.folder / TOKENIZER[self.layout]
        tokenizer = base.tokenizer
        if isinstance(tokenizer, bytes):
            place.mkdir(parents=True)
            (place / "tokenizer.json").write_bytes(tokenizer)
            self.report(place / "tokenizer.json", len(tokenizer))
        else:
            self._copy(tokenizer, place / "tokenizer.json" if tokenizer.is_file() else place)
        if not base.is_folder:
            return
        kept = base.path / FOLDER
        if base.layout == self.layout:
            companions = self.folder
            if base.extra:
                self.extra = dataclasses.replace(base.extra, numbers={})
                self._copy(kept, self.folder / FOLDER)
        elif base.extra:  # it was converted from the layout to be written
            self._copy(kept / "files", self.folder)
            return
        else:
            companions = self.folder / FOLDER / "files"
        for name in COMPANIONS[base.layout]:
            self._copy(base.path / name, companions / name)

    def _copy(self, source: Path, target: Path) -> None:
        """Copies a file or the files of a folder, if it is there, without their permissions."""
        for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if file.is_file():
                place = target / file.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
                self.say(f"copied {place.relative_to(self.folder)}")

    def _write_network(self, name: NetworkName, source: TensorSource, max_shard_bytes: int, pth: bool) -> None:
        folder, stem = network_place(self.folder, self.layout, name, self.experts)
        with source.open() as read:
            if self.layout == "diffusers" or name in EXPERT_FOLDERS:
                write_tensors(folder, stem, source.infos, read, max_shard_bytes, self.report)
            elif pth:
                write_pth(folder / f"{stem}.pth", source.infos, read, self.report)
            else:
                write_safetensors(folder / f"{stem}.safetensors", source.infos, read, self.report)
                self.say(f"{stem} is written as .safetensors, which wanjax reads, not as .pth, which needs torch.")
        config = folder / "config.json"
        if self.layout in PARTS[name].write and (isinstance(source, ModuleSource) or not config.exists()):
            write_json(config, PARTS[name].write[self.layout](source.config), self.report)
        if isinstance(source, ConvertSource):
            self._keep(name, source)

    def _keep(self, name: NetworkName, source: ConvertSource) -> None:
        """Puts aside what the layout has no place for."""
        self.extra.names |= {name: source.names} if source.names else {}
        self.extra.copies |= {name: source.copies} if source.copies else {}
        if source.leftovers:
            folder = self.folder / FOLDER
            folder.mkdir(exist_ok=True)
            with source.open_leftovers() as read:
                write_safetensors(folder / f"{name}.safetensors", source.leftovers, read, self.report)
            self.say(f"{FOLDER}/ keeps {len(source.leftovers)} tensors of the {name} that have no place in the layout.")

    def _boundary(self) -> float:
        """The boundary of two experts, kept where the layout cannot say another than the official one."""
        usual = BOUNDARIES[self.sources["dit"].config.task]
        boundary = self.base.boundary if self.base else None
        boundary = usual if boundary is None else boundary
        self.extra.boundary = boundary if self.layout == "official" and boundary != usual else None
        return boundary

    def _set_shift(self, shift: float | None) -> None:
        base = self.base
        if shift is None and base and not (base.extra and base.extra.assumed_flow_shift == base.flow_shift):
            shift = base.flow_shift
        if self.layout == "official":
            self.extra.flow_shift = shift
            return
        path = self.folder / "scheduler/scheduler_config.json"
        if path.exists():
            settings = Settings(path)
            if shift is not None and settings.get("flow_shift") != shift:
                write_json(path, {**settings, "flow_shift": shift}, self.report)
        elif "dit" in self.sources:
            if shift is None:
                shift = pipeline_files.default_flow_shift(self.sources["dit"].config, self.experts)
                self.extra.assumed_flow_shift = shift
                self.say(f"The schedule's shift is not in the source: {shift} is taken, the official default.")
            write_json(path, pipeline_files.scheduler_config(shift), self.report)

    def _write_pipeline(self, boundary: float | None) -> None:
        configs = {name: source.config for name, source in self.sources.items()}
        clip = configs.get("clip")
        processor = self.folder / "image_processor/preprocessor_config.json"
        if clip and not processor.exists():
            write_json(processor, pipeline_files.image_processor_config(clip), self.report)
        needed = {"dit", "vae", "umt5"} | ({"clip"} if "dit" in configs and configs["dit"].image_dim else set())
        missing = sorted(needed - set(configs))
        if not (self.folder / "tokenizer").is_dir():
            missing.append("tokenizer")
        path = self.folder / "model_index.json"
        if missing:
            self.say(f"There is no model_index.json, because this is missing: {', '.join(missing)}.")
        elif not path.exists():
            index = pipeline_files.model_index(configs["dit"], clip, self.folder / "tokenizer", boundary)
            write_json(path, index, self.report)

    def _tell_what_official_code_misses(self) -> None:
        clip = self.sources.get("clip")
        missing = [] if (self.folder / "xlm-roberta-large").is_dir() else ["xlm-roberta-large/"]
        missing += [] if clip and "log_scale" in clip.infos else ["CLIP's text half (textual.*)"]
        if clip and missing:
            self.say(f"The official code, not wanjax, also wants {' and '.join(missing)}: not in the source.")

    def _write_extra(self) -> None:
        """Numbers that a reader of the folder would get wrong; written only if there is something to keep."""
        folder = self.folder / FOLDER
        if folder.is_dir():
            self.extra.write(self.folder)
        written = Checkpoint(self.folder)
        for name, source in self.sources.items():
            there, given = (dataclasses.asdict(config) for config in (written.config(name), source.config))
            wrong = {key: x for key, x in given.items() if x != there[key] and key not in CHOICES}
            self.extra.numbers |= {name: wrong} if wrong else {}
        if folder.is_dir() or self.extra != Extra(self.origin):
            self.extra.write(self.folder)
            self.say(f"{FOLDER}/ keeps what the {self.layout} layout cannot say; other libraries ignore it.")

    def _check(self) -> None:
        """Reads the headers of what was written back."""
        written = Checkpoint(self.folder)
        for name in self.sources:
            written.check(name, written.config(name))
