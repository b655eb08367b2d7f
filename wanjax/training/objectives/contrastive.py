"""Contrastive learning: what a small text encoder and CLIP tower learn from one another.

    u = unit(head(mean of the text's features)),  v = unit(head(features of pictures of the clip))
    loss = cross-entropy of u v / temperature, over captions for each clip and over clips for each caption
         + binary cross-entropy of linear(a token's features), over all words: whether they stand in the token's clause

The features are those that the DiT will see: umT5's output, CLIP's before its last block. The heads are thrown away.
The DiT reads tokens one by one, without their places. What tells it whose "clockwise" a token is, is in that token's
features or nowhere, and the contrastive part, which sees their mean, is slow to put it there: hence the second part.

Source: CLIP (arXiv 2103.00020, section 2.3), with one caption more for each clip, which is wrong and nearly right
(arXiv 2210.01936): else the encoder need not know which words belong together. The second part is a continuous bag of
words (arXiv 1301.3781) the other way round: from a word in its context to the words around.
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
from wanjax.data.samples import ContrastiveSample, ContrastiveSamples
from wanjax.demo.vocabulary import word_id, write_tokenizer
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
CLAUSE_END = word_id(";")


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
        self.word_head = Linear(
            config.umt5.dim, config.umt5.vocab_size, rngs, axes=("embed", "vocab"), param_dtype=jnp.float32
        )
        self.log_scale = nnx.Param(jnp.full((1,), math.log(10.0), jnp.float32), axes=(None,))

    def text_features(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Tokens `[b, l]` to `[b, l, e]`, 0 where there is none."""
        return jnp.where(mask[..., None], self.umt5(ids, mask), 0)

    def embed_text(self, features: jax.Array, mask: jax.Array) -> jax.Array:
        """`text_features` to `[b, width]`."""
        return self.text_head(features.sum(axis=1) / mask.sum(axis=1, keepdims=True))

    def embed_pictures(self, pictures: jax.Array) -> jax.Array:
        """`[b, PICTURES, s, s, 3]` to `[b, width]`."""
        # One token speaks for a picture, so that it has to gather what all of them know.
        features = [self.clip(pictures[:, i])[:, 0] for i in range(PICTURES)]  # [b, e] each
        return self.image_head(jnp.concatenate(features, axis=-1))


def clause_loss(logits: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """How badly tokens tell the words of their clauses.

    Args:
      logits: of every word of the vocabulary, for every token, `[b, l, v]`.
      ids: tokens `[b, l]`; a clause ends with a semicolon.
      mask: where there are tokens, bool `[b, l]`.

    Returns:
      Binary cross-entropy, summed over the vocabulary, mean over tokens and captions, float32.
    """
    clause = jnp.cumsum(ids == CLAUSE_END, axis=1) - (ids == CLAUSE_END)  # [b, l]
    together = (clause[:, :, None] == clause[:, None]) & mask[:, None]  # [b, l, l]
    words = jax.nn.one_hot(ids, logits.shape[-1])  # [b, l, v]
    there = jnp.einsum("bij,bjv->biv", together.astype(jnp.float32), words) > 0
    logits = logits.astype(jnp.float32)
    losses = jnp.sum(jax.nn.softplus(logits) - logits * there, axis=-1)  # [b, l]
    return jnp.mean(jnp.sum(losses * mask, axis=1) / jnp.sum(mask, axis=1))


@dataclasses.dataclass(frozen=True)
class Contrastive(Objective[Towers, ContrastiveSample, ContrastiveSample]):
    """The objective of `Towers`.

    config: of the run.
    towers: of the networks.
    """

    config: TrainConfig
    towers: TowersConfig

    unit: ClassVar = "clips"
    name: ClassVar = "towers"

    def units(self, batch: ContrastiveSample) -> int:
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

    def prepare(self, batch: ContrastiveSample, key: jax.Array) -> ContrastiveSample:
        """Nothing is random."""
        return batch

    def loss(self, model: Towers, batch: ContrastiveSample) -> jax.Array:
        """Both parts, float32. Every clip is compared with the captions of the whole batch."""
        captions = [(batch.ids[:, i], batch.mask[:, i]) for i in (0, 1)]  # right and wrong, [b, l] each
        features = [model.text_features(*caption) for caption in captions]  # [b, l, e] each
        texts = [model.embed_text(x, mask) for x, (_, mask) in zip(features, captions, strict=True)]  # [b, width] each
        return self.contrast(model, batch, texts) + clause_loss(model.word_head(features[0]), *captions[0])

    def contrast(self, model: Towers, batch: ContrastiveSample, texts: list[jax.Array]) -> jax.Array:
        """Mean of both cross-entropies."""
        b = len(batch.ids)
        clips = replicate(model.embed_pictures(batch.pictures))  # [b, width]
        texts = [replicate(text) for text in texts]
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
        return Data(
            ContrastiveSamples(chosen.clips, chosen.order(config), config, tokenizer, self.towers.clip.image_size)
        )

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
