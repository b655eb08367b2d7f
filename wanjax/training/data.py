"""From a configuration's `data` to the samples that its objective learns from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sharding.distributed import is_main
from wanjax.conditioning.encoders import Encoders, open_encoders
from wanjax.conditioning.text import Tokenizer
from wanjax.config import CachedData, ShapesData, SyntheticData, TrainConfig, VideoData
from wanjax.data.batch import Source
from wanjax.data.buckets import Order, Shape, Usable, describe, group
from wanjax.data.clip import Clips
from wanjax.data.samples import Pairs, Snippets, TaskSamples
from wanjax.data.synthetic import Synthetic
from wanjax.data.videos import Videos
from wanjax.demo.shapes import Shapes
from wanjax.demo.vocabulary import write_tokenizer
from wanjax.errors import InputError
from wanjax.training.latent_cache import CachedSamples
from wanjax.training.objectives.base import Objective
from wanjax.training.objectives.contrastive import Contrastive
from wanjax.training.objectives.flow_matching import FlowMatching


class Data(NamedTuple):
    """Samples, and what makes of a batch of them on the mesh what the objective takes; None: nothing is to be made."""

    source: Source
    encode: Callable[[Any], Any] | None = None


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
        clips = Shapes(data.first_seed, data.count, config.frames, config.height, data.kind)
        return ClipSet(clips, {clips.shape(0): np.arange(data.count)})
    if isinstance(data, VideoData):
        videos = Videos(data.path, config.frames, config.height * config.width)
        groups = group(videos, progress=is_main())
        if groups.unusable and is_main():
            for name, reason in groups.unusable.items():
                print(f"left out: {name}: {reason}")
            print(describe(groups.unusable, len(videos)))
        return ClipSet(Usable(videos, groups.buckets), groups.buckets)
    raise InputError(f"{type(data).__name__} has no clips to look at; ShapesData or VideoData is needed; change data")


def open_data(config: TrainConfig, objective: Objective, encoders: Encoders | None = None) -> Data:
    """Data for `objective`; the DiT's encoders are loaded onto the ambient mesh, unless they are given.

    Raises:
      InputError: the objective does not learn from such data, or the data cannot be used.
    """
    if isinstance(objective, FlowMatching):
        return _for_dit(config, objective, encoders)
    if isinstance(config.data, (SyntheticData, CachedData)):
        raise InputError(f"{type(config.data).__name__} for a VAE or for towers; they learn from clips; change data")
    chosen = open_clips(config)
    if not isinstance(objective, Contrastive):
        return Data(Snippets(chosen.clips, chosen.order(config), config))
    assert config.workdir is not None
    folder, towers = Path(config.workdir) / "tokenizer", objective.towers
    write_tokenizer(folder, towers.words)
    tokenizer = Tokenizer(folder, towers.text_len)
    return Data(Pairs(chosen.clips, chosen.order(config), config, tokenizer, towers.clip.image_size))


def _for_dit(config: TrainConfig, objective: FlowMatching, encoders: Encoders | None) -> Data:
    if isinstance(config.data, SyntheticData):
        return Data(Synthetic(config, objective.dit))
    if isinstance(config.data, CachedData):
        return Data(CachedSamples(config.data.path, config, objective.dit))
    chosen = open_clips(config)
    encoders = encoders or open_encoders(config, objective.dit)
    return Data(task_samples(config, encoders, chosen), encoders)


def task_samples(config: TrainConfig, encoders: Encoders, chosen: ClipSet) -> TaskSamples:
    """Clips of a run, with what is given of them."""
    size = encoders.clip.image_size if encoders.clip else 0
    return TaskSamples(chosen.clips, chosen.order(config), config, encoders.tokenizer, encoders.image_count, size)
