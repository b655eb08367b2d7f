"""Makes the golden data of the Diffusers layout: a tiny random checkpoint and what diffusers computes with it.

    pip install ".[golden]"
    python tests/golden/make_golden.py                        # writes diffusers/ and diffusers_t2v/ beside this file
    python tests/golden/make_golden.py --from-checkpoint DIR  # recomputes DIR/expected.npz, prints max differences

Every tensor is random, none is left at ones or zeros, so that a wrong mapping shows. All float32 on the CPU; the same
seed gives the same weights everywhere and the same outputs up to float32 rounding.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import diffusers
import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
CASE = {
    "prompt": "A red kite climbs over the hill, &amp; the camera   follows it into the clouds.",
    "negative_prompt": "镜头切换，镜头晃动，过曝，静态",
    "height": 48,
    "width": 64,
    "frames": 9,
    "steps": 5,
    "guidance": 5.5,
    "shift": 5.0,
    "solver": "unipc",
}
TIMESTEP = 717.0


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A unigram tokenizer of the umT5 kind: `<pad>` 0, `</s>` 1 appended, NFKC, `▁` before words, spaces kept."""
    words = ["▁", "▁the", "▁a", "▁A", "▁red", "▁kite", "▁hill", "▁camera", "▁it", "▁clouds", "ing", "er", "in", "镜头"]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()&-切换晃动过曝静态"
    pieces = ["<pad>", "</s>", "<unk>", *words, *letters]
    # All different, so that no two segmentations tie.
    scores = [0.0, 0.0, -20.0, *np.linspace(-3, -4, len(words)).tolist(), *np.linspace(-9, -10, len(letters)).tolist()]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=2))
    tokenizer.normalizer = tokenizers.normalizers.NFKC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def make_transformer(task: str) -> diffusers.WanTransformer3DModel:
    """A DiT of two layers for `task` ("flf2v" or "t2v")."""
    image = {"image_dim": 40, "added_kv_proj_dim": 64, "pos_embed_seq_len": 10} if task == "flf2v" else {}
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=36 if image else 16,
        out_channels=16, text_dim=32, freq_dim=32, ffn_dim=96, num_layers=2, **image,
    )  # fmt: skip


def make_vae(generator: torch.Generator) -> diffusers.AutoencoderKLWan:
    """A VAE with four base channels and latent statistics of its own, which only the config file tells."""
    mean = torch.randn(16, generator=generator) * 0.4
    std = torch.rand(16, generator=generator) + 1.0
    rounded = {"latents_mean": mean, "latents_std": std}
    return diffusers.AutoencoderKLWan(base_dim=4, **{k: [round(x, 4) for x in v.tolist()] for k, v in rounded.items()})


def make_text_encoder() -> transformers.UMT5EncoderModel:
    """An umT5 encoder whose inner width (4 x 12) differs from its outer one."""
    return transformers.UMT5EncoderModel(
        transformers.UMT5Config(vocab_size=128, d_model=32, d_kv=12, d_ff=80, num_layers=2, num_heads=4,
                                feed_forward_proj="gated-gelu")
    )  # fmt: skip


def make_image_encoder() -> transformers.CLIPVisionModel:
    """A CLIP vision tower: 28 pixels, 2 x 2 patches and the class token."""
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(hidden_size=40, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
                                      image_size=28, patch_size=14, hidden_act="gelu")
    )  # fmt: skip


def make_image_processor() -> transformers.CLIPImageProcessorPil:
    """Shortest edge to 28 pixels, centre crop."""
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


@torch.no_grad()
def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Fills every parameter: matrices keep the scale of their input, norm scales lie around 1, the rest around 0."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and not name.endswith("bias"):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.ndim == 1 or any(part in name for part in ("scale_shift", "position", "pos_embed")):
            parameter.copy_(0.2 * noise)
        elif any(part in name for part in ("shared", "embed_tokens", "relative_attention_bias")):
            parameter.copy_(noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)


def make_pictures(folder: pathlib.Path, height: int, width: int) -> None:
    """Two smooth colour fields with a disc that moves, of the case's size: no resizing is involved."""
    y, x = np.mgrid[0:height, 0:width] / (height - 1)
    for name, cx, cy, phase in (("first", 0.3, 0.7, 0.0), ("last", 0.9, 0.3, 1.0)):
        waves = [np.sin(3 * x + k + phase) * np.cos(2 * y - 0.5 * k) for k in range(3)]
        picture = 0.5 + 0.35 * np.stack(waves, axis=-1)  # [H, W, 3]
        picture[np.hypot(x - cx, y - cy) < 0.18] = (0.9, 0.25, 0.1)
        Image.fromarray(np.round(picture * 255).astype(np.uint8)).save(folder / f"{name}.png", optimize=True)


def make_video(height: int, width: int, frames: int) -> np.ndarray:
    """A smooth moving pattern, `[1, 3, F, H, W]` in [-1, 1], on the uint8 grid so that the file compresses."""
    c, t, y, x = np.meshgrid(*(np.arange(n) for n in (3, frames, height, width)), indexing="ij")
    wave = np.sin(0.31 * x + 0.5 * t + c) * np.cos(0.23 * y - 0.3 * t + 2 * c) + 0.3 * np.sin(0.11 * (x + y) * (c + 1))
    return (np.round((wave / 1.3 + 1) * 127.5) / 127.5 - 1).astype(np.float32)[None]


def make_checkpoint(folder: pathlib.Path, t2v_folder: pathlib.Path, seed: int) -> None:
    """Writes the FLF2V checkpoint with pictures and case, and beside it a t2v transformer that shares the rest."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the constructors draw too
    vae, text_encoder, image_encoder = make_vae(generator), make_text_encoder(), make_image_encoder()
    transformer, t2v = make_transformer("flf2v"), make_transformer("t2v")
    for model in (transformer, vae, text_encoder, image_encoder, t2v):
        randomize(model, generator)
    vae.decoder.conv_out.weight.data *= 0.5  # few pixels at the clamp, where a difference would not show
    tokenizer = make_tokenizer()
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=CASE["shift"]
    )
    diffusers.WanImageToVideoPipeline(
        tokenizer, text_encoder, vae, scheduler, make_image_processor(), image_encoder, transformer
    ).save_pretrained(folder)
    t2v.save_pretrained(t2v_folder / "transformer")
    diffusers.WanPipeline(tokenizer, text_encoder, vae, scheduler, t2v).save_config(t2v_folder)
    make_pictures(folder, CASE["height"], CASE["width"])
    (folder / "case.json").write_text(json.dumps(CASE, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def make_inputs(case: dict, seed: int) -> dict[str, np.ndarray]:
    """The arrays that are given rather than computed."""
    shape = (1, 16, (case["frames"] - 1) // 4 + 1, case["height"] // 8, case["width"] // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return {
        "init_noise": noise.numpy(),
        "dit_timestep": np.array([TIMESTEP], np.float32),
        "vae_video": make_video(case["height"], case["width"], case["frames"]),
    }


def run_pipeline(pipe, case: dict, noise: torch.Tensor, **images) -> dict[str, np.ndarray]:
    """Final latents and decoded video of a diffusers pipeline called as a user would."""
    last = {}

    def keep(_pipe, _step, _timestep, tensors):
        last.update(tensors)
        return tensors

    video = pipe(
        prompt=case["prompt"], negative_prompt=case["negative_prompt"], height=case["height"], width=case["width"],
        num_frames=case["frames"], num_inference_steps=case["steps"], guidance_scale=case["guidance"],
        latents=noise.clone(), callback_on_step_end=keep, output_type="np", **images,
    ).frames  # fmt: skip
    return {"pipeline_latents": last["latents"].numpy(), "pipeline_video": np.asarray(video)}


@torch.no_grad()
def compute(folder: pathlib.Path, case: dict, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array of expected.npz for the FLF2V checkpoint in `folder`."""
    pipe = diffusers.WanImageToVideoPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    first, last = (Image.open(folder / f"{name}.png").convert("RGB") for name in ("first", "last"))
    noise = torch.from_numpy(inputs["init_noise"])
    prompt, negative = pipe.encode_prompt(case["prompt"], case["negative_prompt"], max_sequence_length=512)
    features = pipe.encode_image([first, last])
    size = {"height": case["height"], "width": case["width"]}
    pixels = [pipe.video_processor.preprocess(image, **size) for image in (first, last)]
    _, condition = pipe.prepare_latents(
        pixels[0], 1, num_frames=case["frames"], dtype=torch.float32, latents=noise, last_image=pixels[1], **size
    )
    velocity = pipe.transformer(
        torch.cat([noise, condition], dim=1), torch.from_numpy(inputs["dit_timestep"]), prompt, features
    ).sample
    latent = pipe.vae.encode(torch.from_numpy(inputs["vae_video"])).latent_dist.mode()
    tensors = {
        "prompt_embeds": prompt, "negative_embeds": negative, "clip_features": features, "condition": condition,
        "dit_velocity": velocity, "vae_latent": latent, "vae_recon": pipe.vae.decode(latent).sample,
    }  # fmt: skip
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return inputs | arrays | run_pipeline(pipe, case, noise, image=first, last_image=last)


@torch.no_grad()
def compute_t2v(folder: pathlib.Path, t2v_folder: pathlib.Path, case: dict, known: dict) -> dict[str, np.ndarray]:
    """The t2v transformer on the same noise, timestep and prompt, alone and in diffusers' t2v pipeline."""
    transformer = diffusers.WanTransformer3DModel.from_pretrained(t2v_folder / "transformer")
    pipe = diffusers.WanPipeline.from_pretrained(folder, transformer=transformer, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise, timestep, prompt = (torch.from_numpy(known[k]) for k in ("init_noise", "dit_timestep", "prompt_embeds"))
    velocity = {"dit_velocity": transformer(noise, timestep, prompt).sample.numpy()}
    return velocity | run_pipeline(pipe, case, noise)


def compare(folder: pathlib.Path) -> None:
    """Recomputes `folder`/expected.npz from its checkpoint, case and given arrays; prints the largest differences."""
    expected = dict(np.load(folder / "expected.npz"))
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    given = {name: expected[name] for name in ("init_noise", "dit_timestep", "vae_video")}
    computed = compute(folder, case, given)
    for name in sorted(expected.keys() | computed.keys()):
        if name not in expected or name not in computed or expected[name].shape != computed[name].shape:
            print(f"{name:18s} missing or misshapen")
        else:
            difference = np.max(np.abs(expected[name] - computed[name]))
            print(f"{name:18s} {computed[name].shape!s:24s} max difference {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=pathlib.Path, default=HERE, help="folder to write diffusers and diffusers_t2v into"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--from-checkpoint", type=pathlib.Path, metavar="DIR", help="compare with DIR instead of writing"
    )
    args = parser.parse_args()
    if args.from_checkpoint:
        compare(args.from_checkpoint)
        return
    folder, t2v_folder = args.output / "diffusers", args.output / "diffusers_t2v"
    make_checkpoint(folder, t2v_folder, args.seed)
    arrays = compute(folder, CASE, make_inputs(CASE, args.seed + 1))
    np.savez_compressed(folder / "expected.npz", **arrays)
    np.savez_compressed(t2v_folder / "expected.npz", **compute_t2v(folder, t2v_folder, CASE, arrays))
    clamped = np.mean(np.abs(arrays["vae_recon"]) >= 1)
    print(f"wrote {folder} and {t2v_folder}; {clamped:.1%} of vae_recon is clamped")


if __name__ == "__main__":
    main()
