"""Copies of the golden checkpoints that a test may change: other spellings, other tasks, damage."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec
from tiny import GOLDEN, load

from wanjax.errors import InputError
from wanjax.weights.tensors import TensorInfo
from wanjax.weights.write import write_tensors

# Files of tensors without their suffix, by layout.
DIT_FILE = {"diffusers": "transformer/diffusion_pytorch_model", "official": "diffusion_pytorch_model"}
VAE_FILE = {"diffusers": "vae/diffusion_pytorch_model", "official": "Wan2.1_VAE"}
UMT5_FILE = {"diffusers": "text_encoder/model", "official": "models_t5_umt5-xxl-enc-bf16"}
CLIP_FILE = {
    "diffusers": "image_encoder/model",
    "official": "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
}
STEMS = {"dit": DIT_FILE, "vae": VAE_FILE, "umt5": UMT5_FILE, "clip": CLIP_FILE}
EXTRA = "wanjax_extra"


def copy_checkpoint(name, folder):
    """A writable copy of a golden checkpoint without its pictures and arrays."""
    for file in (GOLDEN / name).rglob("*"):
        if file.is_file() and file.suffix in (".json", ".safetensors") and file.name != "case.json":
            place = folder / file.relative_to(GOLDEN / name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    return folder


def edit(path, change):
    """Rewrites a file of tensors after `change` did what it likes to the dict of them."""
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def edit_json(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def shard(path, size):
    """Splits a file of tensors into shards and an index, as the large releases are."""
    tensors = safetensors.numpy.load_file(path)
    infos = {key: TensorInfo(x.shape, x.dtype) for key, x in tensors.items()}
    write_tensors(
        path.parent, path.name.removesuffix(".safetensors"), infos, tensors.__getitem__, size, lambda *_: None
    )
    path.unlink()
    return path.with_name(path.name + ".index.json")


def spell_as_published(tensors):
    for key in list(tensors):
        tensors[f"vision_model.{key}"] = tensors.pop(key)
    tensors["vision_model.embeddings.position_ids"] = np.arange(5, dtype=np.int64)[None]


def make_i2v(layout, folder):
    """A checkpoint with an image branch without positions."""
    copy_checkpoint(layout, folder)
    key = {"diffusers": "condition_embedder.image_embedder.pos_embed", "official": "img_emb.emb_pos"}[layout]
    edit(folder / f"{DIT_FILE[layout]}.safetensors", lambda tensors: tensors.pop(key))
    if layout == "diffusers":
        edit_json(folder / "transformer/config.json", pos_embed_seq_len=None)
    else:
        edit_json(folder / "config.json", model_type="i2v")
    return folder


def make_t2v(layout, folder):
    """A checkpoint without image encoder, image branch and image condition."""
    return without_images(layout, folder, 16, "t2v")


def make_i2v_by_latents(layout, folder):
    """As Wan2.2-I2V-A14B: 36 channels and no image branch."""
    return without_images(layout, folder, 36, "i2v")


def without_images(layout, folder, in_channels, model_type):
    """A checkpoint without image encoder and image branch; with 36 channels, frames come by mask and latents alone."""
    copy_checkpoint(layout, folder)
    branch = ("add_k_proj", "add_v_proj", "norm_added_k", "image_embedder", "k_img", "v_img", "img_emb")

    def cut(tensors):
        for key in [key for key in tensors if any(part in key for part in branch)]:
            del tensors[key]
        tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"][:, :in_channels].copy()

    edit(folder / f"{DIT_FILE[layout]}.safetensors", cut)
    (folder / f"{CLIP_FILE[layout]}.safetensors").unlink()
    if layout == "diffusers":
        shutil.rmtree(folder / "image_encoder")
        shutil.rmtree(folder / "image_processor")
        entries = {"image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None, "in_channels": in_channels}
        edit_json(folder / "transformer/config.json", **entries)
    else:
        edit_json(folder / "config.json", model_type=model_type, in_dim=in_channels)
    return folder


def fsdp(mesh):
    """Shards the first axis that can be, but never the layers."""

    def choose(path, leaf):
        first = leaf.ndim - len(leaf.get_metadata().get("axes", ())) if path[0] == "blocks" else 0
        axes = [None] * leaf.ndim
        for axis in range(first, leaf.ndim):
            if leaf.shape[axis] % mesh.shape["fsdp"] == 0:
                axes[axis] = "fsdp"
                break
        return NamedSharding(mesh, PartitionSpec(*axes))

    return choose


def load_refused(folder, network, match):
    """Loading is refused in one line that matches; the line."""
    with pytest.raises(InputError, match=match) as caught:
        load(folder, network)
    assert "\n" not in str(caught.value)
    return str(caught.value)
