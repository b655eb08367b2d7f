"""From a configuration's `data` to the samples that its objective learns from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from wanjax.config import CachedData, ShapesData, SyntheticData, TrainConfig
from wanjax.data.batch import Source
from wanjax.data.cache import CachedSamples
from wanjax.data.clip import Clips
from wanjax.data.encode import Encoders
from wanjax.data.samples import Pairs, Snippets, TaskSamples
from wanjax.data.shapes import Shapes
from wanjax.data.synthetic import Synthetic
from wanjax.data.vocabulary import write_tokenizer
from wanjax.errors import InputError
from wanjax.text import Tokenizer
from wanjax.training.contrastive import Contrastive
from wanjax.training.flow_matching import FlowMatching
from wanjax.training.objective import Objective


class Data(NamedTuple):
    """Samples, and what makes of a batch of them on the mesh what the objective takes; None: nothing is to be made."""

    source: Source
    encode: Callable[[Any], Any] | None = None


def open_clips(config: TrainConfig) -> Clips:
    """The clips that `config.data` names.

    Raises:
      InputError: it names none, or they cannot be used.
    """
    data = config.data
    if isinstance(data, ShapesData):
        if config.height != config.width:
            raise InputError(f"shapes of {config.width}x{config.height}; they are square; set width = height")
        return Shapes(data.first_seed, data.count, config.frames, config.height, data.kind)
    raise InputError(f"{type(data).__name__} has no clips to look at; ShapesData or VideoData is needed; change data")


def open_data(config: TrainConfig, objective: Objective) -> Data:
    """Data for `objective`; the DiT's encoders are loaded onto the ambient mesh.

    Raises:
      InputError: the objective does not learn from such data, or the data cannot be used.
    """
    if isinstance(objective, FlowMatching):
        return _for_dit(config, objective)
    if isinstance(config.data, (SyntheticData, CachedData)):
        raise InputError(f"{type(config.data).__name__} for a VAE or for towers; they learn from clips; change data")
    clips = open_clips(config)
    if not isinstance(objective, Contrastive):
        return Data(Snippets(clips, config))
    assert config.workdir is not None
    folder, towers = Path(config.workdir) / "tokenizer", objective.towers
    write_tokenizer(folder, towers.words)
    return Data(Pairs(clips, config, Tokenizer(folder, towers.text_len), towers.clip.image_size))


def _for_dit(config: TrainConfig, objective: FlowMatching) -> Data:
    if isinstance(config.data, SyntheticData):
        return Data(Synthetic(config, objective.dit))
    if isinstance(config.data, CachedData):
        return Data(CachedSamples(config.data.path, config, objective.dit))
    encoders = Encoders(config, objective.dit)
    size = encoders.clip.image_size if encoders.clip else 0
    return Data(TaskSamples(open_clips(config), config, encoders.tokenizer, encoders.images, size), encoders)
