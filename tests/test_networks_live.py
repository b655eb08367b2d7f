"""Against diffusers and transformers running beside us: networks of other shapes than the golden ones, and their sizes.

    make parity        # = pytest -m live, with the golden extra installed

Every reference network is random, saved as its library saves it and loaded with `Checkpoint`, so that the mapping and
the arithmetic are compared together. Allowed: a difference of 1e-4 x max(1, the largest reference value).
"""

import jax
import numpy as np
import PIL.Image
import pytest
from tiny import assert_close, normal

from wanjax.config import SampleConfig
from wanjax.sampling.pipeline import Pipeline
from wanjax.weights import Checkpoint

pytestmark = pytest.mark.live


def load_both(reference, folder, network, tmp_path, **save):
    """Randomises `reference`, saves it into `folder` of a checkpoint, and loads our network from there."""
    import torch
    from golden.make_golden import randomize

    randomize(reference, torch.Generator().manual_seed(len(folder)))
    reference.eval().save_pretrained(tmp_path / folder, **save)
    checkpoint = Checkpoint(tmp_path)
    return checkpoint.load(network, checkpoint.config(network))


def last(x):
    return np.moveaxis(x, 1, -1)


DITS = {
    # heads, head dim, ffn, layers, and the latents [b, f, h, w]; patch grids of odd sizes
    "flf2v": ((3, 20, 100, 3), (1, 3, 6, 10), {"image_dim": 24, "pos_embed_seq_len": 14}),
    "i2v": ((2, 24, 64, 1), (2, 2, 2, 14), {"image_dim": 20}),
    "t2v": ((5, 12, 72, 2), (2, 5, 10, 6), {}),
    "shards": ((2, 32, 96, 4), (1, 1, 18, 2), {"image_dim": 16, "pos_embed_seq_len": 6}),
}


@pytest.mark.parametrize("name", DITS)
def test_dit(name, tmp_path):
    import diffusers
    import torch

    (heads, head_dim, ffn_dim, layers), (b, f, h, w), image = DITS[name]
    c = 36 if image else 16
    reference = diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, ffn_dim=ffn_dim, num_layers=layers, in_channels=c,
        text_dim=28, freq_dim=48, added_kv_proj_dim=heads * head_dim if image else None, **image,
    )  # fmt: skip
    dit = load_both(reference, "transformer", "dit", tmp_path, max_shard_size="60KB" if name == "shards" else "1GB")
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (name == "shards")
    latents, text, timestep = normal(0, b, c, f, h, w), normal(1, b, 512, 28), np.array([999.0, 37.0][:b], np.float32)
    clip = normal(2, b, image.get("pos_embed_seq_len", 9), image["image_dim"]) if image else None
    pairs = clip
    if "pos_embed_seq_len" in image:  # diffusers takes the two frames of a video as rows of the batch
        pairs = clip.reshape(2 * b, -1, image["image_dim"])
    with torch.no_grad():
        arrays = [None if x is None else torch.from_numpy(x) for x in (latents, timestep, text, pairs)]
        velocity = reference(*arrays).sample.numpy()
    ours = jax.jit(lambda m, x, t, text, clip: m(x, t, m.context(text, clip)))
    assert_close(ours(dit, last(latents), timestep, text, clip), last(velocity))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"base_dim": 4}, (1, 1, 8, 24)),
        ({"base_dim": 6}, (2, 13, 24, 40)),
        ({"base_dim": 4, "num_res_blocks": 1, "dim_mult": [1, 3, 2, 2]}, (1, 5, 40, 8)),
    ],
)
def test_vae(sizes, shape, tmp_path):
    import diffusers
    import torch

    statistics = {"latents_mean": normal(3, 16).tolist(), "latents_std": (1 + normal(4, 16) ** 2).tolist()}
    reference = diffusers.AutoencoderKLWan(**sizes, **statistics)
    vae = load_both(reference, "vae", "vae", tmp_path)
    b, frames, height, width = shape
    video = np.tanh(normal(5, b, 3, frames, height, width))
    mean, std = (np.asarray(statistics[name], np.float32) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        latents = reference.encode(torch.from_numpy(video)).latent_dist.mode()
        decoded = reference.decode(latents).sample.numpy()
    normalised = (last(latents.numpy()) - mean) / std
    assert_close(jax.jit(lambda m, x: m.encode(x))(vae, last(video)), normalised)
    assert_close(jax.jit(lambda m, x: m.decode(x))(vae, normalised), last(decoded))


@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        ({"d_model": 24, "num_heads": 3, "d_kv": 16, "d_ff": 40, "num_layers": 3}, 300),
        ({"d_model": 40, "num_heads": 2, "d_kv": 8, "d_ff": 56, "num_layers": 1,
          "relative_attention_num_buckets": 16, "relative_attention_max_distance": 40}, 64),
    ],
)  # fmt: skip
def test_umt5(sizes, length, tmp_path):
    import torch
    import transformers

    config = transformers.UMT5Config(vocab_size=99, feed_forward_proj="gated-gelu", **sizes)
    reference = transformers.UMT5EncoderModel(config)
    encoder = load_both(reference, "text_encoder", "umt5", tmp_path)
    ids = np.random.default_rng(6).integers(0, 99, (2, length)).astype(np.int32)
    lengths = np.array([length, length // 3])
    mask = np.arange(length) < lengths[:, None]  # [b, l]
    with torch.no_grad():
        features = reference(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    ours = np.asarray(jax.jit(lambda m, ids, mask: m(ids, mask))(encoder, ids, mask))
    for row, real in enumerate(lengths):
        assert_close(ours[row, :real], features[row, :real])


@pytest.mark.parametrize(("heads", "width", "layers", "patch", "batch"), [(3, 36, 4, 8, 1), (8, 32, 2, 14, 3)])
def test_clip(heads, width, layers, patch, batch, tmp_path):
    import torch
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=50, num_hidden_layers=layers,
        image_size=5 * patch, patch_size=patch, hidden_act="gelu",
    )  # fmt: skip
    reference = transformers.CLIPVisionModel(config)
    clip = load_both(reference, "image_encoder", "clip", tmp_path)
    pixels = normal(7, batch, 3, 5 * patch, 5 * patch)
    with torch.no_grad():
        features = reference(torch.from_numpy(pixels), output_hidden_states=True).hidden_states[-2].numpy()
    assert_close(jax.jit(lambda m, x: m(x))(clip, last(pixels)), features)


def random_pipeline(task, folder):
    """One of diffusers' pipelines with random networks, saved in `folder`."""
    import diffusers
    import torch
    from golden import make_golden as make

    image = {"in_channels": 36, "image_dim": 40, "added_kv_proj_dim": 32}
    image = {"t2v": {}, "i2v": image, "flf2v": image | {"pos_embed_seq_len": 10}}[task]
    dit = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, ffn_dim=40, num_layers=2, text_dim=32, freq_dim=32, **image
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    generator = torch.Generator().manual_seed(len(task))
    networks = {"text_encoder": make.make_text_encoder(), "vae": make.make_vae(generator), "transformer": dit}
    parts = {"tokenizer": make.make_tokenizer(), "scheduler": scheduler}
    if task != "t2v":
        networks["image_encoder"], parts["image_processor"] = make.make_image_encoder(), make.make_image_processor()
    for network in networks.values():
        make.randomize(network.eval(), generator)
    kind = diffusers.WanPipeline if task == "t2v" else diffusers.WanImageToVideoPipeline
    pipe = kind(**networks, **parts)
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PICTURES = {"t2v": {}, "i2v": {"first": (100, 70)}, "flf2v": {"first": (57, 83), "last": (90, 110)}}


@pytest.mark.parametrize("task", PICTURES)
def test_pipeline(task, tmp_path):
    """From a prompt, and pictures of other sizes than the video's, to latents."""
    import torch
    from golden.make_golden import run_pipeline

    pipe = random_pipeline(task, tmp_path)
    size = {"height": 64, "width": 48, "frames": 9}
    case = size | {"prompt": "a kite", "negative_prompt": "", "steps": 4, "guidance": 4.0}
    noise = normal(8, 1, 16, 3, 8, 6)
    np.save(tmp_path / "noise.npy", noise)
    files, pictures = {}, {}
    for name, size in PICTURES[task].items():
        coarse = np.tanh(normal(len(name), 8, 8, 3)) * 127.5 + 127.5
        files[name] = str(tmp_path / f"{name}.png")
        pictures[name] = PIL.Image.fromarray(coarse.astype(np.uint8)).resize(size)
        pictures[name].save(files[name])
    given = {"image" if name == "first" else "last_image": picture for name, picture in pictures.items()}
    reference = run_pipeline(pipe, case, torch.from_numpy(noise), **given)["pipeline_latents"]
    config = SampleConfig(
        checkpoint=str(tmp_path), conventions="diffusers", dtype="float32", initial_noise=str(tmp_path / "noise.npy"),
        first_frame=files.get("first"), last_frame=files.get("last"), **case,
    )  # fmt: skip
    assert_close(Pipeline(config)().latents, last(reference))
