"""Where training starts: a checkpoint of the network, or of one with fewer inputs, to which the others are added.

t2v -> i2v, flf2v   The patch embedding's weights for the control branch are zero, as in Wan's own training (arXiv
                    2503.20314, image to video). The image branch is new: its values are zero, like the last layer of a
                    ControlNet (arXiv 2302.05543), so that it adds nothing; its keys and their norm start as the text's,
                    like those of an IP-Adapter (arXiv 2308.06721), so that attention is neither flat nor peaked; the
                    image embedding is random. The values learn from the first step on, the rest from the second.
i2v -> flf2v        The position embedding of both frames' image tokens is zero.

So the velocity is at first that of the checkpoint, whatever the new inputs are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wanjax.config import DiTConfig
from wanjax.errors import InputError
from wanjax.models.dit import DiT, ImageEmbedding
from wanjax.weights import Checkpoint
from wanjax.weights.load import ChooseSharding, abstract_model, is_param, parameters, replicated, zeros

WIDENED = ("in_channels", "image_dim", "image_positions")


def start_config(checkpoint: Checkpoint, config: DiTConfig) -> DiTConfig:
    """The configuration that the checkpoint is to be loaded with, if a network as configured can start from it.

    Raises:
      InputError: it cannot.
    """
    given = checkpoint.config("dit", dtype=config.dtype, param_dtype=config.param_dtype)
    given = dataclasses.replace(given, attention=config.attention)
    if given.quantize != "off":
        raise InputError(
            f"checkpoint {checkpoint.path} is quantised to {given.quantize}, which has no gradient; full weights are "
            "needed; give the checkpoint that it was made of"
        )
    for field in dataclasses.fields(config):
        if field.name == "model_type":  # what the run trains it for, not what the weights are
            continue
        theirs, ours = getattr(given, field.name), getattr(config, field.name)
        added = field.name in WIDENED and (not theirs or (field.name == "in_channels" and theirs < ours))
        if theirs != ours and not added:
            raise InputError(
                f"checkpoint {checkpoint.path} has {field.name} {theirs}, the config's dit {ours}; the same network, "
                "or one with fewer inputs, is needed; give another --checkpoint, or a config without dit"
            )
    return given


def load_start(checkpoint: Checkpoint, config: DiTConfig, sharding: ChooseSharding | None = None, seed: int = 0) -> DiT:
    """A network as configured with the checkpoint's weights, and what the checkpoint lacks as said above.

    Args:
      checkpoint: of the same network, or of one with fewer inputs.
      config: of the network to train.
      sharding: as `Checkpoint.load` takes it.
      seed: of the image embedding, if that is new.

    Raises:
      InputError: as `start_config` and `Checkpoint.load`.
    """
    given = start_config(checkpoint, config)
    dit = checkpoint.load("dit", given, sharding)
    if given == config:
        return dit
    loaded, abstract = parameters(dit), abstract_model("dit", config)
    fresh = {}
    if given.image_dim is None and config.image_dim is not None:
        embedding = ImageEmbedding(config, nnx.Rngs(seed))
        fresh = {f"image_embedding.{path}": leaf for path, leaf in parameters(embedding).items()}

    def make(path: str, leaf: Any) -> jax.Array:
        split = (sharding or replicated)(tuple(path.split(".")), leaf)
        if path in loaded and loaded[path].shape == leaf.shape:
            return loaded[path][...]
        if path == "patch_embedding.kernel":
            kernel = loaded[path][...]  # [pt, ph, pw, c, e]; the noise comes first, then what is new
            kernel = jnp.pad(kernel, ((0, 0),) * 3 + ((0, leaf.shape[3] - kernel.shape[3]), (0, 0)))
            return jax.device_put(kernel, split)
        if path in fresh:
            host = np.asarray(fresh[path][...])
            return jax.make_array_from_callback(leaf.shape, split, lambda index: host[index])
        if "k_image" in path:
            return jnp.copy(loaded[path.replace("k_image", "k")][...])  # no array twice: training reuses their memory
        assert "v_image" in path or path == "image_embedding.positions"
        return zeros(leaf.shape, leaf.dtype, split)

    values = [leaf.replace(make(path, leaf)) for path, leaf in parameters(abstract).items()]
    return jax.tree.unflatten(jax.tree.structure(abstract, is_leaf=is_param), values)
