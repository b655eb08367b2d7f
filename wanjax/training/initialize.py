"""Warm start: from a checkpoint of the network, or of one with fewer inputs, to which the others are added.

t2v -> i2v, flf2v   The patch embedding's weights for the image condition are zero, as in Wan's own training (arXiv
                    2503.20314, image to video). The image branch is new: its values are zero, like the last layer of a
                    ControlNet (arXiv 2302.05543), so that it adds nothing; its keys and their norm start as the text's,
                    like those of an IP-Adapter (arXiv 2308.06721), so that attention is neither flat nor peaked; the
                    image embedding is random. The values learn from the first step on, the rest from the second.
i2v -> flf2v        The position embedding of both frames' image tokens is zero.

So the velocity is at first that of the checkpoint, whatever the new inputs are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wanjax.config import DiTConfig, TrainConfig
from wanjax.errors import InputError
from wanjax.models.dit import DiT
from wanjax.models.embeddings import ImageEmbedding
from wanjax.weights import Checkpoint, lora
from wanjax.weights.hub import checkpoint_folder
from wanjax.weights.load import abstract_model, is_param, parameters, replicated
from wanjax.weights.lora_files import LoRAFile
from wanjax.weights.mapping import NetworkName
from wanjax.weights.placing import ChooseSharding, zeros

QUANTIZED = ("quantize", "quantized_layers", "channel_scales")
WIDENED = ("in_channels", "image_dim", "image_positions")


def open_checkpoint(config: TrainConfig) -> Checkpoint:
    """The weights that a run starts from: a folder, one of the Hugging Face hub, files of DiTs, or both.

    Raises:
      InputError: as `checkpoint_folder` and `Checkpoint`.
    """
    given: dict[NetworkName, str | None] = {"dit": config.dit_file, "dit_low": config.dit_low_file}
    files: dict[NetworkName, str | Path] = {name: file for name, file in given.items() if file is not None}
    if config.checkpoint is None and config.expert == "low" and [*files] == ["dit_low"]:
        files = {"dit": files["dit_low"]}  # nothing is asked of the other expert
    return Checkpoint(None if config.checkpoint is None else checkpoint_folder(config.checkpoint), files)


def networks_to_load(config: TrainConfig, checkpoint: Checkpoint) -> dict[str, NetworkName]:
    """Which networks of a checkpoint learn, by the expert that each is; "" where there is one DiT.

    Raises:
      InputError: an expert is missing, or which of two learns is not said.
    """
    files = [path for path in (config.dit_file, config.dit_low_file) if path is not None]
    if config.expert is None:
        if checkpoint.experts == 2:
            raise InputError(
                f"checkpoint {checkpoint.path} has two experts; which of them learns has to be said; "
                "give --expert high, low or both"
            )
        return {"": "dit"}
    is_file = config.checkpoint is None and len(files) == 1
    asked = ("high", "low") if config.expert == "both" else (config.expert,)
    if checkpoint.experts == 1 and not (is_file and config.expert != "both"):
        raise InputError(
            f"--expert {config.expert} with {checkpoint.path}, which has one DiT; two experts are needed "
            "(Wan2.2-A14B); give their checkpoint, or leave --expert out"
        )
    if is_file and (config.expert == "high") != (config.dit_file is not None):
        raise InputError(f"--expert {config.expert} with the file of the other; that expert is needed; give its file")
    low: NetworkName = "dit_low" if checkpoint.experts == 2 else "dit"
    return {expert: low if expert == "low" else "dit" for expert in asked}


def warm_start_config(checkpoint: Checkpoint, config: DiTConfig, network: NetworkName = "dit") -> DiTConfig:
    """The configuration that the checkpoint is to be loaded with, if a network as configured can start from it.

    Raises:
      InputError: it cannot.
    """
    given = checkpoint.config(network, dtype=config.dtype, param_dtype=config.param_dtype)
    given = dataclasses.replace(given, attention=config.attention, weight_only=config.weight_only)
    if given.quantize == "off":  # it becomes what is asked for while it is read
        given = dataclasses.replace(given, **{name: getattr(config, name) for name in QUANTIZED})
    elif not config.weight_only:
        raise InputError(
            f"checkpoint {checkpoint.path} is quantised to {given.quantize}, which has no gradient; full weights are "
            "needed; give the checkpoint that it was made of, or set lora: adapters learn beside it"
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


def load_warm_start(
    checkpoint: Checkpoint,
    config: DiTConfig,
    sharding: ChooseSharding | None = None,
    seed: int = 0,
    network: NetworkName = "dit",
    merge: Sequence[LoRAFile] = (),
) -> DiT:
    """A network as configured with the checkpoint's weights; see the module's docstring for inputs that it lacks.

    Args:
      checkpoint: of the same network, or of one with fewer inputs.
      config: of the network to train.
      sharding: as `Checkpoint.load` takes it.
      seed: of the image embedding, if that is new.
      network: "dit" or "dit_low".
      merge: adapters that are added to the checkpoint's weights before anything else.

    Raises:
      InputError: as `warm_start_config` and `Checkpoint.load`.
    """
    given = warm_start_config(checkpoint, config, network)
    if merge:
        dit = lora.load(checkpoint, given, merge, True, sharding, network)
    else:
        dit = checkpoint.load(network, given, sharding)
    if given == config:
        return dit
    loaded, abstract = parameters(dit), abstract_model(network, config)
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
