"""From a configuration's `data` to clips and samples of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sharding.distributed import is_main
from wanjax.conditioning.encoders import Encoders
from wanjax.config import WAN_VAE, CachedData, DiTConfig, ShapesData, SyntheticData, TrainConfig, VideoData
from wanjax.data.buckets import Order, Shape, Usable, describe, group
from wanjax.data.clip import Clips
from wanjax.data.samples import TaskSamples
from wanjax.data.videos import Videos
from wanjax.demo.shapes import ProceduralClips
from wanjax.errors import InputError


class ClipSet(NamedTuple):
    """Clips, and the indices of those that can be used, by shape."""

    clips: Clips
    buckets: dict[Shape, np.ndarray]

    def order(self, config: TrainConfig) -> Order:
        """Which clip is which sample of a run."""
        return Order(self.buckets, config.batch, config.seed)


def open_clips(config: TrainConfig) -> ClipSet:
    """The clips that `config.data` names, or that its cache was made of; names those that cannot be used.

    Raises:
      InputError: it names none, or they cannot be used.
    """
    data = config.data.of if isinstance(config.data, CachedData) else config.data
    if isinstance(data, ShapesData):
        if config.height != config.width:
            raise InputError(f"shapes of {config.width}x{config.height}; they are square; set width = height")
        clips = ProceduralClips(data.first_seed, data.count, config.frames, config.height, data.kind)
        return ClipSet(clips, {clips.shape(0): np.arange(data.count)})
    if isinstance(data, VideoData):
        vae, patch_size = config.vae or WAN_VAE, (config.dit or DiTConfig()).patch_size
        videos = Videos(
            data.path,
            config.frames,
            config.height * config.width,
            temporal_factor=vae.temporal_factor,
            size_multiple=vae.size_multiple(patch_size),
        )
        groups = group(videos, progress=is_main())
        if groups.unusable and is_main():
            for name, reason in groups.unusable.items():
                print(f"left out: {name}: {reason}")
            print(describe(groups.unusable, len(videos)))
        return ClipSet(Usable(videos, groups.buckets), groups.buckets)
    raise InputError(f"{type(data).__name__} has no clips to look at; ShapesData or VideoData is needed; change data")


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
