"""What one run of sampling is told: inputs, output, video, solver, speed, devices."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from wanjax.config.networks import Attention, file_of_dit, file_of_low_dit
from wanjax.settings import Config, setting


@dataclasses.dataclass(frozen=True)
class SampleConfig(Config):
    """Everything that sampling needs; `wanjax sample`'s flags are these fields.

    `first_frame` and `last_frame` are paths; from Python also PIL images or uint8 arrays `[H, W, 3]`. `mesh` is text
    for `sharding.mesh.parse_mesh`, or a mesh.
    """

    checkpoint: str | None = setting(
        None,
        "folder in the Diffusers or the official layout, or a name on the Hugging Face hub",
        "inputs",
        metavar="DIR",
        shown="the small model that ships with the package",
        remote=True,
    )
    dit: str | None = file_of_dit("inputs")
    dit_low: str | None = file_of_low_dit("inputs")
    vae: str | None = setting(None, "the VAE in one file", "inputs", metavar="FILE")
    text_encoder: str | None = setting(None, "umT5 in one file", "inputs", metavar="FILE")
    image_encoder: str | None = setting(None, "CLIP's vision tower in one file", "inputs", metavar="FILE")
    tokenizer: str | None = setting(None, "umT5's tokenizer.json", "inputs", metavar="FILE")
    first_frame: str | Any | None = setting(
        None, "picture that the video begins with", "inputs", metavar="FILE", shown="none: text to video"
    )
    last_frame: str | Any | None = setting(
        None, "picture that the video ends with", "inputs", metavar="FILE", shown="none: image to video"
    )
    keyframe: tuple[str | Any, ...] = setting(
        (),
        "picture at a frame, by index, share or time: 40=b.png, 50%=b.png, 2.5s=b.png; as often as you like",
        "inputs",
        metavar="FRAME=FILE",
    )
    continue_: str | None = setting(
        None,
        "clip to go on from: the video begins with its last frames, as many as --overlap",
        "inputs",
        metavar="FILE",
    )
    loop: bool = setting(
        False, "come back to the first frame at the end, by way of two windows; it is not written twice", "inputs"
    )
    prompt: str = setting("", "what happens", "inputs", metavar="TEXT")
    negative_prompt: str | None = setting(
        None, "what to avoid", "inputs", metavar="TEXT", shown="the official list of the task"
    )
    extend_prompt: str | None = setting(
        None,
        "let a language model that sees the pictures write the prompt out: an OpenAI-compatible server, such as "
        "http://localhost:8000/v1",
        "inputs",
        metavar="URL",
        empty=False,
    )
    extend_model: str | None = setting(
        None, "its name there", "inputs", metavar="NAME", shown="the first that the server lists", empty=False
    )
    lora: tuple[str, ...] = setting(
        (),
        "adapters in diffusers', ComfyUI's or kohya's format, as often as you like",
        "inputs",
        metavar="FILE[:STRENGTH]",
    )
    lora_high: tuple[str, ...] = setting(
        (),
        "adapters of the expert for high noise alone (Wan2.2-A14B); --lora is both's",
        "inputs",
        metavar="FILE[:STRENGTH]",
    )
    lora_low: tuple[str, ...] = setting(
        (), "adapters of the expert for low noise alone", "inputs", metavar="FILE[:STRENGTH]"
    )
    lora_merge: bool | None = setting(
        None, "adapters into the weights, or beside them", "inputs", shown="into them, unless they are stored in 8 bits"
    )
    output: str = setting(
        "out/video.mp4",
        ".mp4, .gif, .npy (uint8 [f, h, w, 3]) or a folder for .png files",
        "output",
        metavar="PATH",
        remote=True,
    )
    save_latents: str | None = setting(
        None, "also write the final latents, normalised: .npy [1, 16, f, h, w]", "output", metavar="FILE"
    )
    preview: str | None = setting(
        None,
        "small pictures of the latents, written up to ten times in sampling: .png, .jpg, .webp or, moving, .gif",
        "output",
        metavar="FILE",
    )
    preview_decoder: str | None = setting(
        None,
        "TAEHV's decoder for the preview: taew2_1.safetensors",
        "output",
        metavar="FILE",
        shown="a linear map, fitted to the VAE",
    )
    fps: float = setting(16, "frames a second of the file", "output", above=0, most=1000)
    height: int | None = setting(
        None,
        "pixels, a multiple of 16",
        "video",
        shown="the first frame's aspect ratio at the configured area",
        least=1,
        most=2**14,
    )
    width: int | None = setting(None, "pixels, a multiple of 16", "video", shown="likewise", least=1, most=2**14)
    area: int = setting(720 * 1280, "pixels of a frame, where height or width are not given", least=1, most=2**28)
    frames: int = setting(81, "number of frames, 4n + 1", "video", least=1, most=2**16)
    window: int | None = setting(
        None,
        "make a longer video of windows of at most so many frames, 4n + 1, each from the last frames of the one before",
        "video",
        metavar="N",
        shown="the whole at once",
        least=5,
        most=2**16,
    )
    overlap: int = setting(5, "frames that windows have in common, at least", "video", metavar="N", least=1, most=2**16)
    steps: int = setting(50, "solver steps", "sampling", least=1, most=10_000)
    preset: str | None = setting(
        None,
        "settings of few-step weights: lightning4, lightning4-flf2v, fastwan3, selfforcing4, rcm4, rcm4-a14b, or a "
        ".json or .py file; other flags hold over it",
        "sampling",
        metavar="NAME",
    )
    solver: Literal["unipc", "dpmpp", "euler", "lcm"] = setting(
        "unipc", "UniPC, DPM-Solver++, Euler, or LCM, which puts fresh noise on what it predicts", "sampling"
    )
    sigmas: tuple[float, ...] | None = setting(
        None,
        "noise levels of the steps, such as 1,0.9375,0.8333,0.625, in place of --steps, --shift and the conventions'",
        "sampling",
        metavar="LIST",
        above=0,
        most=1,
    )
    timesteps: Literal["exact", "truncated"] | None = setting(
        None,
        "what the network is told of a noise level: 1000 times it, or without the fraction",
        "sampling",
        shown="exact for --sigmas, else as the conventions have it",
    )
    guidance: float | tuple[float, ...] = setting(
        5.0,
        "classifier-free guidance scale; 1 turns it off and halves the time; or one for each step, such as 3.5,1,1,1",
        "sampling",
        least=-1000,
        most=1000,
    )
    guidance_low: float | None = setting(
        None, "the same of the expert for low noise", "sampling", shown="that of --guidance", least=-1000, most=1000
    )
    boundary: float | None = setting(
        None,
        "timestep / 1000 from which on upwards the expert for high noise works",
        "sampling",
        shown="the checkpoint's",
        least=0,
        most=1,
    )
    boundary_step: int | None = setting(
        None, "or how many steps the expert for high noise takes", "sampling", metavar="N", least=0, most=10_000
    )
    shift: float | None = setting(
        None,
        "timestep shift",
        "sampling",
        shown="the checkpoint's, or 16 with both frames, 12 of two experts' text to video and 5 else",
        above=0,
        most=1000,
    )
    seed: int = setting(0, "of the initial noise", "sampling", least=-(2**63), most=2**63 - 1)
    initial_noise: str | None = setting(
        None, "noise in place of the seed's: .npy [1, 16, f, h, w]", "sampling", metavar="FILE"
    )
    conventions: Literal["official", "diffusers"] = setting(
        "official",
        "whose schedule and preprocessing; the published models were trained with the official ones",
        "sampling",
    )
    fast: bool = setting(
        False, "the caches that lose nothing visible: fixed:2 and, with guidance, cfg-cache 2", "speed"
    )
    cache: str | None = setting(
        None,
        "run the DiT's blocks at some steps only: off, fixed:K, teacache:T or magcache:T",
        "speed",
        metavar="KIND",
        shown="off",
        empty=False,
    )
    cfg_cache: str | None = setting(
        None,
        "run the unconditional branch at every K-th step of the later part only",
        "speed",
        metavar="K",
        shown="off",
        empty=False,
    )
    calibration: str | None = setting(
        None,
        "what wanjax calibrate measured of this checkpoint; teacache and magcache need it, cfg-cache starts by it",
        "speed",
        metavar="FILE",
    )
    quantize: Literal["off", "fp8", "int8"] | None = setting(
        None,
        "format of the weights and products of the DiT's blocks; int8 is for chips without fp8",
        "speed",
        shown="as the checkpoint is",
    )
    attention: Attention = setting(
        "auto",
        "kernel of the DiT's self-attention; auto: the best exact one; int8fp8: in 8 bits",
        "speed",
    )
    experts: Literal["auto", "resident", "swap"] = setting(
        "auto",
        "of two experts: both on the devices, or one at a time, with the second's files read ahead; auto: as they fit",
        "devices",
    )
    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16", "of weights and activations; the VAE is float32", "devices"
    )
    mesh: str | Any | None = setting(
        None,
        "devices along data, fsdp, ring, ulysses, such as fsdp=4,ulysses=2 (-1: what is left)",
        "devices",
        metavar="AXES",
        shown="chosen for the devices that there are",
        empty=False,
    )
    compile_cache: str | None = setting(
        None,
        "folder of compiled programs, or off",
        "devices",
        metavar="DIR",
        shown="WANJAX_COMPILE_CACHE, or ~/.cache/wanjax",
    )
    note: str | None = setting(None, "printed before sampling")


NETWORK_FIELDS = (
    *("checkpoint", "dtype", "quantize", "attention", "mesh", "experts", "compile_cache"),
    *("lora", "lora_high", "lora_low", "lora_merge"),
    *("dit", "dit_low", "vae", "text_encoder", "image_encoder", "tokenizer"),
)
"""Of `SampleConfig`: what the networks are; the others are what is asked of them."""
