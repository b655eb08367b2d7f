"""From clips to training samples: which clip, which part of it, what is given, drawn from the seed and the number.

A sample is a pure function of the configuration and its number. The clips are shuffled anew each time round; what else
is random comes from numpy generators seeded with all that it may depend on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from wanjax.conditioning import images
from wanjax.conditioning.frames import given_frames
from wanjax.conditioning.samples import PixelSample
from wanjax.conditioning.text import Tokenizer
from wanjax.config import TaskMix, TrainConfig
from wanjax.data.buckets import Order
from wanjax.data.clip import Clips


class ReconstructionSample(NamedTuple):
    """A part of a clip, for the VAE: `video` uint8 `[F, H, W, 3]`, and which of its frames are to be seen, `[F]`."""

    video: Any
    given: Any


class ReconstructionSamples:
    """`SampleSource` of what a VAE learns: parts of clips.

    The VAE also encodes condition videos, of which few frames are given and the rest is grey; `hidden` is their share.

    Args:
      clips: to take them from.
      order: of the clips.
      config: `snippet` and `seed` are used.
      hidden: share of the samples of which only some frames are given.
    """

    def __init__(self, clips: Clips, order: Order, config: TrainConfig, hidden: float = 0.2):
        self.clips, self.order, self.config, self.hidden = clips, order, config, hidden

    def __getitem__(self, index: int) -> ReconstructionSample:
        """Sample `index`, from 0."""
        rng = np.random.default_rng((self.config.seed, index))
        video, size = self.clips[self.order[index]].video, self.config.snippet
        starts = [int(rng.integers(have - wanted + 1)) for have, wanted in zip(video.shape, size, strict=False)]
        part = video[tuple(slice(start, start + n) for start, n in zip(starts, size, strict=True))]
        given = np.ones(size[0], bool)  # [F]
        if rng.random() < self.hidden:
            given = rng.random(size[0]) < 0.2
            given[rng.choice([0, -1])] = True
        return ReconstructionSample(part, given)

    def name(self, index: int) -> str:
        """Which clip it is of."""
        return self.clips[self.order[index]].name


def draw_given(tasks: TaskMix, frames: int, rng: np.random.Generator) -> np.ndarray:
    """The given frames of a task drawn by its weight: bool `[F]`. Of a picture none: it would be all there is.

    Raises:
      InputError: no task has a weight.
    """
    if frames == 1:
        return np.zeros(1, bool)
    weights = {task: weight for task, weight in tasks.weights.items() if weight > 0}
    shares = np.array(list(weights.values()))
    task: Any = list(weights)[int(rng.choice(len(weights), p=shares / shares.sum()))]
    count = int(rng.integers(2, max(3, min(tasks.max_count, frames - 1) + 1))) if task == "continuation" else 1
    indices: list[int] = []
    if task == "interpolation":
        most = min(tasks.max_given, frames)
        indices = rng.choice(frames, size=int(rng.integers(min(2, most), most + 1)), replace=False).tolist()
    return given_frames(task, frames, count=min(count, frames - 1), indices=indices)


class TaskSamples:
    """`SampleSource` of what the DiT learns, in pixels: clips with what is given of them.

    Sample n is clip `order[n]`. What is given of it depends on the clip and on how often it came before, modulo
    `config.tasks.variants`, and on nothing else: so a cache can hold it.

    Args:
      clips: to learn from.
      order: of the clips.
      config: of the run; tasks and seed are used.
      tokenizer: of the encoders.
      images: how many images' features the network takes.
      image_size: that CLIP takes.
    """

    def __init__(
        self, clips: Clips, order: Order, config: TrainConfig, tokenizer: Tokenizer, images: int, image_size: int
    ):
        self.clips, self.order, self.config, self.tokenizer = clips, order, config, tokenizer
        self.images, self.image_size = images, image_size

    def __getitem__(self, index: int) -> PixelSample:
        """Sample `index`, from 0."""
        return self.sample(*locate(index, self.order, self.config), *dropped(self.config, index))

    def sample(self, number: int, variant: int, no_caption: bool = False, no_images: bool = False) -> PixelSample:
        """A clip with a draw of what is given of it."""
        return self.named_sample(number, variant, no_caption, no_images)[1]

    def named_sample(
        self, number: int, variant: int, no_caption: bool = False, no_images: bool = False
    ) -> tuple[str, PixelSample]:
        """The same with the clip's name before it."""
        clip = self.clips[number]
        rng = np.random.default_rng((self.config.seed, number, variant))
        given = draw_given(self.config.tasks, len(clip.video), rng)
        ids, mask = self.tokenizer(["" if no_caption else clip.caption])
        ends = (0, -1)[: self.images]
        pixels = [images.clip_pixels(clip.video[i], self.image_size, "official") for i in ends]
        has_image = np.array([given[i] and not no_images for i in ends], bool)
        sample = PixelSample(clip.video, given, ids[0], mask[0], np.stack(pixels) if pixels else None, has_image)
        return clip.name, sample

    def name(self, index: int) -> str:
        """Which clip it is of."""
        return self.clips[self.order[index]].name


def locate(index: int, order: Order, config: TrainConfig) -> tuple[int, int]:
    """Which clip sample `index` is, and which draw of what is given."""
    return order[index], order.times(index) % config.tasks.variants


def dropped(config: TrainConfig, index: int) -> tuple[bool, bool]:
    """Whether sample `index` goes without its caption, and without its images."""
    rng = np.random.default_rng((config.seed, index, 1))
    no_caption, no_images = rng.random(2) < (config.tasks.caption_dropout, config.tasks.image_dropout)
    return bool(no_caption), bool(no_images)


class ContrastiveSample(NamedTuple):
    """Pictures of a clip as CLIP takes them `[k, s, s, 3]`, its caption, and a wrong one: tokens `[2, l]`, mask."""

    pictures: Any
    ids: Any
    mask: Any


class ContrastiveSamples:
    """`SampleSource` of what umT5 and CLIP learn from one another: clips and captions.

    Beside the captions of other clips, there is a wrong one for each clip that is nearly right, where the clips can
    tell one (`other_caption`); else it is the right one again, which teaches nothing.

    Args:
      clips: to learn from.
      order: of the clips.
      config: seed is used.
      tokenizer: for the captions.
      image_size: that CLIP takes.
    """

    def __init__(self, clips: Clips, order: Order, config: TrainConfig, tokenizer: Tokenizer, image_size: int):
        self.clips, self.order, self.config = clips, order, config
        self.tokenizer, self.image_size = tokenizer, image_size

    def __getitem__(self, index: int) -> ContrastiveSample:
        """Sample `index`, from 0."""
        number = self.order[index]
        clip = self.clips[number]
        rng = np.random.default_rng((self.config.seed, index))
        other = getattr(self.clips, "other_caption", lambda number, rng: clip.caption)(number, rng)
        frames = [clip.video[i] for i in (0, len(clip.video) // 2, -1)]
        pictures = np.stack([images.clip_pixels(frame, self.image_size, "official") for frame in frames])
        return ContrastiveSample(pictures, *self.tokenizer([clip.caption, other]))

    def name(self, index: int) -> str:
        """Which clip it is of."""
        return self.clips[self.order[index]].name
