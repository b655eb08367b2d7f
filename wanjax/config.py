"""Frozen dataclasses: one per network, one for sampling, one for training. Settings, and nothing that they do.

A field of `SampleConfig` and `TrainConfig` carries its own sentence, and the heading under which `--help` and the
README show its flag: `setting` is the one place for all of that.

`dtype` is what activations are computed in, `param_dtype` what the large weights are stored in. Norms, modulation,
RoPE, softmax statistics and solvers are float32 whatever these say.
"""

from __future__ import annotations

import dataclasses
import math
import runpy
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from wanjax.errors import InputError

T = TypeVar("T")
Attention = Literal["auto", "reference", "flash", "int8fp8"]
"""Which kernel self-attention takes; see `wanjax.ops.attention.kernel`."""


def setting(default: Any, help: str, group: str | None = None, *, metavar: str | None = None, shown: str = "") -> Any:
    """A field of a configuration.

    Args:
      default: its value where nothing is said.
      help: a sentence that says what it is.
      group: heading under which its flag stands; None: it has no flag, a configuration file sets it.
      metavar: how the flag's value is called.
      shown: what help says of a default that does not speak for itself.
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "group": group, "metavar": metavar, "shown": shown}
    )


# Statistics of the 16 latent channels of the published Wan2.1 VAE (Wan2.1 `wan/modules/vae.py`).
# fmt: off
LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Wan2.1 diffusion transformer. The defaults are FLF2V-14B.

    `image_dim` is the width of the CLIP features (None: no image branch, t2v); `image_positions` the length of the
    learned position embedding over the image tokens of both frames (0: none, i2v). `model_type` is what the network was
    built for, as checkpoints say it; None: told from its inputs (see `task`). `quantize` is the format that the
    blocks' matrices are stored and multiplied in: of all blocks, or of those from `quantized_layers[0]` to before
    `quantized_layers[1]`.
    """

    dim: int = 5120
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    in_channels: int = 36
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int | None = 1280
    image_positions: int = 514
    eps: float = 1e-6
    attention: Attention = "auto"
    quantize: Literal["off", "fp8", "int8"] = "off"
    quantized_layers: tuple[int, int] | None = None
    model_type: Literal["t2v", "i2v", "flf2v"] | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def stacks(self) -> tuple[tuple[int, int, bool], ...]:
        """Runs of blocks of one kind: the first, the one behind the last, and whether they are quantised."""
        first, stop = self.quantized_layers or (0, self.num_layers)
        runs = ((0, first, False), (first, stop, True), (stop, self.num_layers, False))
        return (
            tuple(run for run in runs if run[0] < run[1]) if self.quantize != "off" else ((0, self.num_layers, False),)
        )

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.num_heads

    @property
    def task(self) -> Literal["t2v", "i2v", "flf2v"]:
        """What the network was built for.

        Where it is not said: without control and image branch t2v, with positions for two frames flf2v, else i2v.
        """
        if self.model_type is not None:
            return self.model_type
        if self.in_channels == self.out_channels and self.image_dim is None:
            return "t2v"
        return "flf2v" if self.image_dim is not None and self.image_positions else "i2v"

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the network can be asked for.

        An flf2v network takes a first frame alone too, as it learned in its first stage. An i2v network without an
        image branch (Wan2.2) takes a last frame too: mask and latents say all that it is told of the frames.
        """
        if self.task == "i2v" and self.image_dim is None:
            return ("i2v", "flf2v")
        return {"t2v": ("t2v",), "i2v": ("i2v",), "flf2v": ("i2v", "flf2v")}[self.task]


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Wan-VAE: causal 3D convolutional autoencoder, 8x8x4 compression. The defaults are the published one.

    `temporal_downsample[i]` says whether the i-th spatial halving also halves time.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def spatial_factor(self) -> int:
        """Pixels along the side of a latent cell."""
        return 2 ** len(self.temporal_downsample)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames in a latent frame, but for the first; also the number of mask channels."""
        return 2 ** sum(self.temporal_downsample)

    def size_multiple(self, patch_size: tuple[int, int, int]) -> int:
        """What height and width in pixels are multiples of: latent cells that the DiT's patches cover."""
        return self.spatial_factor * math.lcm(*patch_size[1:])


WAN_VAE = VAEConfig()
"""The published VAE: what geometry is taken from where no checkpoint is at hand yet."""


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """umT5 encoder. The defaults are umT5-XXL."""

    vocab_size: int = 256384
    dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    head_dim: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """CLIP vision tower. The defaults are ViT-H/14 at 224 pixels."""

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    mlp_dim: int = 5120
    num_heads: int = 16
    num_layers: int = 32
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def num_tokens(self) -> int:
        """Class token and patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class SampleConfig:
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
    )
    first_frame: str | Any | None = setting(
        None, "picture that the video begins with", "inputs", metavar="FILE", shown="none: text to video"
    )
    last_frame: str | Any | None = setting(
        None, "picture that the video ends with", "inputs", metavar="FILE", shown="none: image to video"
    )
    prompt: str = setting("", "what happens", "inputs", metavar="TEXT")
    negative_prompt: str | None = setting(
        None, "what to avoid", "inputs", metavar="TEXT", shown="the official list of the task"
    )
    lora: tuple[str, ...] = setting(
        (),
        "adapters in diffusers', ComfyUI's or kohya's format, as often as you like",
        "inputs",
        metavar="FILE[:STRENGTH]",
    )
    lora_merge: bool | None = setting(
        None, "adapters into the weights, or beside them", "inputs", shown="into them, unless they are stored in 8 bits"
    )
    output: str = setting(
        "out/video.mp4", ".mp4, .gif, .npy (uint8 [f, h, w, 3]) or a folder for .png files", "output", metavar="PATH"
    )
    save_latents: str | None = setting(
        None, "also write the final latents, normalised: .npy [1, 16, f, h, w]", "output", metavar="FILE"
    )
    fps: float = setting(16, "frames a second of the file", "output")
    height: int | None = setting(
        None, "pixels, a multiple of 16", "video", shown="the first frame's aspect ratio at the configured area"
    )
    width: int | None = setting(None, "pixels, a multiple of 16", "video", shown="likewise")
    area: int = setting(720 * 1280, "pixels of a frame, where height or width are not given")
    frames: int = setting(81, "number of frames, 4n + 1", "video")
    steps: int = setting(50, "solver steps", "sampling")
    solver: Literal["unipc", "dpmpp", "euler"] = setting("unipc", "UniPC, DPM-Solver++ or Euler", "sampling")
    guidance: float = setting(5.0, "classifier-free guidance scale; 1 turns it off and halves the time", "sampling")
    shift: float | None = setting(
        None, "timestep shift", "sampling", shown="the checkpoint's, or 16 with both frames and 5 else"
    )
    seed: int = setting(0, "of the initial noise", "sampling")
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
    )
    cfg_cache: str | None = setting(
        None,
        "run the unconditional branch at every K-th step of the later part only",
        "speed",
        metavar="K",
        shown="off",
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
    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16", "of weights and activations; the VAE is float32", "devices"
    )
    mesh: str | Any | None = setting(
        None,
        "devices along data, fsdp, ring, ulysses, such as fsdp=4,ulysses=2 (-1: what is left)",
        "devices",
        metavar="AXES",
        shown="chosen for the devices that there are",
    )
    compile_cache: str | None = setting(
        None,
        "folder of compiled programs, or off",
        "devices",
        metavar="DIR",
        shown="WANJAX_COMPILE_CACHE, or ~/.cache/wanjax",
    )
    note: str | None = setting(None, "printed before sampling")


NETWORK_FIELDS = ("checkpoint", "dtype", "quantize", "attention", "mesh", "lora", "lora_merge", "compile_cache")
"""Of `SampleConfig`: what the networks are; the others are what is asked of them."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters to train; see `wanjax.weights.lora`.

    `targets` are parts of layers' names: "self_attention" is its q, k, v and o, "q" the queries of both attentions,
    "cross_attention.k_image" one layer, "text_embedding" two. The default is every matrix of the blocks.
    """

    rank: int = 16
    alpha: float | None = None  # the adapters count alpha / rank; None: 1, as every program reads a file without alpha
    targets: tuple[str, ...] = ("self_attention", "cross_attention", "ffn")


Remat = Literal["none", "block", "attention", "dots", "offload"]
"""What the backward pass of the DiT computes again instead of keeping; see `wanjax.models.layers.rematerialised`."""


@dataclasses.dataclass(frozen=True)
class SyntheticData:
    """Noise that stands for encoded clips: for tests and measurements, see `wanjax.data.synthetic`."""


@dataclasses.dataclass(frozen=True)
class ShapesData:
    """The demo's procedural clips of the seeds from `first_seed` on, see `wanjax.demo.shapes`."""

    kind: Literal["all", "different", "fine", "heart"]
    first_seed: int
    count: int


@dataclasses.dataclass(frozen=True)
class VideoData:
    """Video files: `path` is a folder of them or a manifest, see `wanjax.data.manifest`."""

    path: str


@dataclasses.dataclass(frozen=True)
class CachedData:
    """Clips encoded before the run: a folder that `wanjax.training.latent_cache` wrote from the clips `of`."""

    path: str
    of: ShapesData | VideoData


Data = SyntheticData | ShapesData | VideoData | CachedData


@dataclasses.dataclass(frozen=True)
class TaskMix:
    """What a sample's model is given, drawn for each one: weights of the tasks (see `wanjax.conditioning.frames`),
    which need not sum to one.

    Continuation is given 2 to `max_count` of the first frames; interpolation, 2 to `max_given` frames anywhere.
    `caption_dropout` is the share of samples whose caption is empty, for guidance; `image_dropout`, of those whose CLIP
    features are zero. `variants` is how many draws of a task each clip has: the n-th time round, draw n modulo
    `variants` (a cache holds all of them).
    """

    t2v: float = 0.0
    i2v: float = 0.0
    flf2v: float = 0.0
    continuation: float = 0.0
    interpolation: float = 0.0
    max_count: int = 25
    max_given: int = 4
    caption_dropout: float = 0.1
    image_dropout: float = 0.0
    variants: int = 1

    @property
    def weights(self) -> dict[str, float]:
        """By task."""
        return {name: getattr(self, name) for name in ("t2v", "i2v", "flf2v", "continuation", "interpolation")}


@dataclasses.dataclass(frozen=True)
class TowersConfig:
    """A text encoder and a CLIP vision tower that learn from one another, see `wanjax.training.objectives.contrastive`.

    `words` are all that the text encoder knows, `text_len` the length it is trained at, `width` that of the space that
    both are projected to.
    """

    umt5: UMT5Config
    clip: CLIPConfig
    words: tuple[str, ...]
    text_len: int = 80
    width: int = 128


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that training needs; `wanjax train`'s flags are some of these fields.

    The learning rate and the weight decay are the paper's (arXiv 2503.20314); mean, standard deviation and shift of the
    timesteps were not published.

    What is trained is the one of `dit`, `vae` and `towers` that is given; without any, the checkpoint's DiT.
    """

    workdir: str | None = setting(
        None,
        "folder of checkpoints, metrics and samples; a run that finds some there goes on from them",
        "run",
        metavar="DIR",
    )
    checkpoint: str | None = setting(
        None,
        "weights to start from: a folder in the Diffusers or the official layout",
        "run",
        metavar="DIR",
        shown="random",
    )
    encoders: str | None = setting(
        None, "checkpoint whose VAE, umT5 and CLIP encode the clips", "run", metavar="DIR", shown="that of --checkpoint"
    )
    dit: DiTConfig | None = setting(
        None, "the DiT to train: with random weights, or, of a checkpoint with fewer inputs, widened"
    )
    lora: LoRAConfig | None = setting(None, "train adapters beside the checkpoint's DiT, which stays as it is")
    vae: VAEConfig | None = setting(None, "the VAE to train")
    towers: TowersConfig | None = setting(None, "the text encoder and CLIP tower to train")
    mesh: str = setting(
        "fsdp=-1",
        "devices along data, fsdp, ring, ulysses, such as data=2,ulysses=-1 (-1: what is left)",
        "devices",
        metavar="AXES",
    )
    data: Data = setting(SyntheticData(), "the clips to learn from")
    tasks: TaskMix = setting(TaskMix(flf2v=1.0), "which frames of a clip the network is given, by weight")
    height: int = setting(480, "pixels of the clips, a multiple of 16")
    width: int = setting(832, "pixels of the clips, a multiple of 16")
    frames: int = setting(81, "frames of the clips, 4n + 1")
    batch: int = setting(1, "samples in an optimiser step, over all hosts", "steps")
    accumulate: int = setting(1, "parts that a batch is computed in, one after the other", "steps")
    steps: int = setting(1000, "last step", "steps")
    seed: int = setting(0, "of data order, noise and random weights", "steps")
    learning_rate: float = setting(1e-4, "after the warm-up", "steps")
    warmup: int = setting(100, "steps over which the learning rate rises from 0")
    cooldown: int = setting(0, "last steps, over which the learning rate falls to 0")
    optimizer: Literal["adamw", "muon"] = setting("adamw", "AdamW or Muon, see wanjax.training.state.make_optimizer")
    beta1: float = setting(0.9, "decay of Adam's first moment")
    beta2: float = setting(0.999, "decay of Adam's second moment")
    weight_decay: float = setting(1e-3, "of kernels only")
    clip_norm: float = setting(1.0, "largest norm of all gradients together")
    ema_decay: float | None = setting(None, "of the moving average of the weights; None: there is none")
    snippet: tuple[int, int, int] = setting(
        (17, 256, 256), "frames (4n + 1), height and width that a VAE learns from at a time"
    )
    kl_weight: float = setting(1e-4, "of the divergence of a VAE's latents from N(0, 1), per latent number")
    sigma_mean: float = setting(0.0, "of the normal under the sigmoid of noise levels, see wanjax.diffusion.flow")
    sigma_std: float = setting(1.0, "of the same, its deviation")
    shift: float = setting(3.0, "timestep shift of noise levels, in training and samples")
    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16", "of activations; weights and optimiser are float32", "devices"
    )
    remat: Remat = setting("block", "what the backward pass computes again instead of keeping it", "devices")
    save_every: int = setting(500, "steps between checkpoints", "run")
    keep: int = setting(2, "newest checkpoints that stay", "run")
    validation: Data | None = setting(None, "held-out clips")
    validate_every: int = setting(0, "steps between losses on held-out clips; 0: never", "run")
    validation_batches: int = setting(2, "batches of held-out clips, of batch / accumulate samples each")
    sample_every: int = setting(0, "steps between samples of held-out clips; 0: never", "run")
    sample_clips: int = setting(4, "held-out clips that are sampled")
    sample_steps: int = setting(20, "solver steps of these samples")
    guidance: float = setting(5.0, "of these samples; 1: none")


def load_config(path: str, kind: type[T]) -> T:
    """What `get_config()` of a configuration file returns.

    Raises:
      InputError: the file is missing or fails, has no `get_config()`, or that returns something else than `kind`.
    """
    if not Path(path).is_file():
        raise InputError(f"config {path} does not exist; a Python file with get_config() is needed; see configs/")
    try:
        get_config = runpy.run_path(path)["get_config"]
        config = get_config()
    except KeyError as error:
        raise InputError(f"config {path} has no {error}; it must define get_config(); see configs/") from error
    except Exception as error:  # the file is the user's code: whatever it raises is theirs to read
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"config {path} cannot be read ({reason}); correct the file") from error
    if not isinstance(config, kind):
        raise InputError(
            f"config {path} returns {type(config).__name__}; {kind.__name__} is needed; give the config of this script"
        )
    return config
