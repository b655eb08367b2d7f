"""From a configuration's `data` to clips and samples of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sharding.distributed import is_main
from wanjax.conditioning.encoders import Encoders
from wanjax.config import (
    WAN_VAE,
    CachedData,
    DiTConfig,
    MixedData,
    ShapesData,
    SyntheticData,
    TrainConfig,
    VideoData,
)
from wanjax.data.buckets import Groups, Order, Shape, Usable, describe_unusable, group, total
from wanjax.data.clip import Clips
from wanjax.data.samples import TaskSamples
from wanjax.data.sources import Geometry, Together, read_sources
from wanjax.demo.shapes import ProceduralClips
from wanjax.errors import InputError


class ClipSet(NamedTuple):
    """Clips, the indices of those that can be used, by shape, and how often each comes in a pass; None: once."""

    clips: Clips
    buckets: dict[Shape, np.ndarray]
    repeats: np.ndarray | None = None

    def order(self, config: TrainConfig) -> Order:
        """Which clip is which sample of a run."""
        return Order(self.buckets, config.batch, config.seed, self.repeats)


def open_clips(config: TrainConfig, stills: bool = True) -> ClipSet:
    """The clips that `config.data` names, or that its cache was made of; names those that cannot be used.

    Args:
      config: of the run.
      stills: whether pictures count; a VAE does not learn from them.

    Raises:
      InputError: it names none, or they cannot be used.
    """
    data = config.data.of if isinstance(config.data, CachedData) else config.data
    if isinstance(data, ShapesData):
        if config.height != config.width:
            raise InputError(f"shapes of {config.width}x{config.height}; they are square; set width = height")
        clips = ProceduralClips(data.first_seed, data.count, config.frames, config.height, data.kind)
        return ClipSet(clips, {clips.shape(0): np.arange(data.count)})
    if isinstance(data, (VideoData, MixedData)):
        return _open_videos(data, config, stills and config.vae is None)
    raise InputError(f"{type(data).__name__} has no clips to look at; ShapesData or VideoData is needed; change data")


def _open_videos(data: VideoData | MixedData, config: TrainConfig, stills: bool) -> ClipSet:
    vae, patch_size = config.vae or WAN_VAE, (config.dit or DiTConfig()).patch_size
    geometry = Geometry(
        config.frames,
        config.height * config.width,
        config.fps,
        config.lengths or None,
        config.ratios or None,
        vae.temporal_factor,
        vae.size_multiple(patch_size),
    )
    sources, lines = read_sources(data, geometry, config.caption_encoding, stills)
    clips = Together(sources)
    groups = group(clips, progress=is_main())
    if is_main():
        for line in lines:
            print(line)
        _tell(groups, clips, config.batch)
    return ClipSet(Usable(clips, groups.buckets), groups.buckets, clips.repeats)


def _tell(groups: Groups, clips: Together, batch: int) -> None:
    """Print what is left out, and which shapes are rare."""
    for name, reason in groups.unusable.items():
        print(f"left out: {name}: {reason}")
    if groups.unusable:
        print(describe_unusable(groups.unusable, total(clips)))
    small = {shape: len(found) for shape, found in groups.buckets.items() if clips.repeats[found].sum() < batch}
    if small and len(groups.buckets) > 1:
        named = ", ".join(f"{count} of {'x'.join(map(str, shape))}" for shape, count in list(small.items())[:5])
        print(f"fewer clips of a shape than a batch has, so that a batch holds some twice: {named}")


def clips_to_look_at(config: TrainConfig, learner: str) -> ClipSet:
    """The clips of `open_clips`, for one who learns from clips only.

    Raises:
      InputError: the configuration names encoded ones, or none.
    """
    if isinstance(config.data, (SyntheticData, CachedData)):
        raise InputError(f"{type(config.data).__name__} for {learner}; it learns from clips; change data")
    return open_clips(config)


def task_samples(config: TrainConfig, encoders: Encoders, chosen: ClipSet) -> TaskSamples:
    """Clips of a run, with what is given of them."""
    size = encoders.clip.image_size if encoders.clip else 0
    return TaskSamples(chosen.clips, chosen.order(config), config, encoders.tokenizer, encoders.image_count, size)
