"""Contrastive learning: what a small text encoder and CLIP tower learn from one another.

    u = unit(head(mean of the text's features)),  v = unit(head(features of pictures of the clip))
    loss = cross-entropy of u v / temperature, over captions for each clip and over clips for each caption

The features are those that the DiT will see: umT5's output, CLIP's before its last block. The heads are thrown away.

Source: CLIP (arXiv 2103.00020, section 2.3), with one caption more for each clip, which is wrong and nearly right
(arXiv 2210.01936): else the encoder need not know which words belong together.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sharding.mesh import MeshShape
from sharding.rules import gather, replicate
from wanjax.conditioning.encoders import Encoders
from wanjax.conditioning.text import Tokenizer
from wanjax.config import TowersConfig, TrainConfig
from wanjax.data.samples import Pair, Pairs
from wanjax.demo.vocabulary import write_tokenizer
from wanjax.errors import InputError
from wanjax.models.clip import CLIPVision
from wanjax.models.layers import Linear
from wanjax.models.umt5 import UMT5Encoder
from wanjax.training.data import clips_to_look_at
from wanjax.training.export import rounded, write_checkpoint
from wanjax.training.objectives.base import Data, Objective
from wanjax.weights.mapping import NetworkName

PICTURES = 3
"""Of a clip: first, middle and last frame."""


class Head(nnx.Module):
    """Features to the space that text and pictures share: two linear layers, then unit length."""

    def __init__(self, dim: int, width: int, rngs: nnx.Rngs):
        self.fc_in = Linear(dim, 2 * width, rngs, axes=("embed", "mlp"), param_dtype=jnp.float32)
        self.fc_out = Linear(2 * width, width, rngs, axes=("mlp", "embed"), param_dtype=jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, dim]` -> `[b, width]`, float32."""
        x = self.fc_out(jax.nn.gelu(self.fc_in(x.astype(jnp.float32))))  # cosines close to 1 need the digits
        return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


class Towers(nnx.Module):
    """Text encoder, CLIP tower, and what brings them together."""

    def __init__(self, config: TowersConfig, rngs: nnx.Rngs):
        self.umt5 = UMT5Encoder(config.umt5, rngs)
        self.clip = CLIPVision(config.clip, rngs)
        self.text_head = Head(config.umt5.dim, config.width, rngs)
        self.image_head = Head(PICTURES * config.clip.dim, config.width, rngs)
        self.log_scale = nnx.Param(jnp.full((1,), math.log(10.0), jnp.float32), axes=(None,))

    def embed_text(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Tokens `[b, l]` to `[b, width]`."""
        features = jnp.where(mask[..., None], self.umt5(ids, mask), 0)  # [b, l, e]
        return self.text_head(features.sum(axis=1) / mask.sum(axis=1, keepdims=True))

    def embed_pictures(self, pictures: jax.Array) -> jax.Array:
        """`[b, PICTURES, s, s, 3]` to `[b, width]`."""
        # One token speaks for a picture, so that it has to gather what all of them know.
        features = [self.clip(pictures[:, i])[:, 0] for i in range(PICTURES)]  # [b, e] each
        return self.image_head(jnp.concatenate(features, axis=-1))


@dataclasses.dataclass(frozen=True)
class Contrastive(Objective[Towers, Pair, Pair]):
    """The objective of `Towers`.

    config: of the run.
    towers: of the networks.
    """

    config: TrainConfig
    towers: TowersConfig

    unit: ClassVar = "clips"
    name: ClassVar = "towers"

    def units(self, batch: Pair) -> int:
        """Clips of a batch."""
        return len(batch.ids)

    def make(self, rngs: nnx.Rngs) -> Towers:
        """Random towers."""
        return Towers(self.towers, rngs)

    def load(self) -> Towers:
        """There are no checkpoints of both.

        Raises:
          InputError: always.
        """
        raise InputError("towers from a checkpoint; they are accepted from scratch only; leave checkpoint None")

    def prepare(self, batch: Pair, key: jax.Array) -> Pair:
        """Nothing is random."""
        return batch

    def loss(self, model: Towers, batch: Pair) -> jax.Array:
        """Mean of both cross-entropies, float32. Every clip is compared with the captions of the whole batch."""
        b = len(batch.ids)
        clips = replicate(model.embed_pictures(batch.pictures))  # [b, width]
        texts = [replicate(model.embed_text(batch.ids[:, i], batch.mask[:, i])) for i in (0, 1)]  # [b, width] each
        scale = jnp.exp(jnp.clip(gather(model.log_scale[...]), 0, math.log(100.0)))[0]
        right, wrong = (scale * clips @ text.T for text in texts)  # [b, b] each: clip, caption
        # A clip without a wrong caption has the right one twice.
        same = replicate(jnp.all(batch.ids[:, 0] == batch.ids[:, 1], axis=-1))  # [b]
        wrong = jnp.where(same[None], -jnp.inf, wrong)
        numbers = jnp.arange(b)
        of_clips = jax.nn.log_softmax(jnp.concatenate([right, wrong], axis=1))[numbers, numbers]
        of_texts = jax.nn.log_softmax(right, axis=0)[numbers, numbers]
        return -(jnp.mean(of_clips) + jnp.mean(of_texts)) / 2

    def check(self, mesh: MeshShape) -> None:
        """See `Objective`."""
        super().check(mesh)
        if self.config.accumulate > 1:
            raise InputError("--accumulate for contrastive learning; clips are compared with the whole batch; use 1")

    def open_data(self, config: TrainConfig, encoders: Encoders | None = None) -> Data:
        """Clips with captions; their tokenizer is written into the workdir."""
        chosen = clips_to_look_at(config, self.name)
        write_tokenizer(self.tokenizer_folder, self.towers.words)
        tokenizer = Tokenizer(self.tokenizer_folder, self.towers.text_len)
        return Data(Pairs(chosen.clips, chosen.order(config), config, tokenizer, self.towers.clip.image_size))

    @property
    def tokenizer_folder(self) -> Path:
        """Where the run's tokenizer is."""
        assert self.config.workdir is not None
        return Path(self.config.workdir) / "tokenizer"

    def networks(self, model: Towers) -> dict[NetworkName, Any]:
        """Text encoder and CLIP tower; the heads are thrown away."""
        return {"umt5": rounded(model.umt5), "clip": rounded(model.clip)}

    def export(self, model: Towers) -> Path:
        """See `Objective`; with the tokenizer."""
        return write_checkpoint(self.config, self.networks(model), self.tokenizer_folder)
