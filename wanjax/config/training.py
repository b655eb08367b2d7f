"""What a training run is told: networks, data, tasks, optimiser, validation, devices."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from wanjax.config.networks import (
    WIDEST,
    CLIPConfig,
    DiTConfig,
    UMT5Config,
    VAEConfig,
    file_of_dit,
    file_of_low_dit,
)
from wanjax.settings import Config, SettingError, setting


@dataclasses.dataclass(frozen=True)
class LoRATarget(Config):
    """Layers whose adapters have a rank of their own; `name` is as `LoRAConfig.targets`."""

    name: str = setting(help="part of names, or pattern", empty=False)
    rank: int = setting(help="of the product that is added", least=1, most=WIDEST)
    alpha: float | None = setting(None, "as `LoRAConfig.alpha`", above=0, most=1e6)


@dataclasses.dataclass(frozen=True)
class LoRAConfig(Config):
    """Low-rank adapters to train; see `wanjax.weights.lora`.

    `targets` are parts of layers' names: "self_attention" is its q, k, v and o, "q" the queries of both attentions,
    "cross_attention.k_image" one layer, "text_embedding" two; or regular expressions for whole names, such as
    r"blocks.*[qv]"; or, for a rank and an alpha of their own, `LoRATarget`s. Of several that name a layer the last one
    counts. The default is every matrix of the blocks. `exclude` takes layers out again.
    """

    rank: int = setting(16, "of the product that is added", least=1, most=WIDEST)
    alpha: float | None = setting(
        None, "the adapters count alpha / rank; None: 1, as every program reads a file without alpha", above=0, most=1e6
    )
    targets: tuple[str | LoRATarget, ...] = setting(
        ("self_attention", "cross_attention", "ffn"), "parts of names, or patterns", empty=False
    )
    exclude: tuple[str, ...] = setting((), "parts of names, or patterns, of layers that get no adapter")
    dropout: float = setting(
        0.0, "share of the numbers that an adapter sees as zero in a step of training", least=0, most=0.99
    )
    lr_ratio: float = setting(
        1.0, "LoRA+: learning rate of the second factor, as a multiple of the first's", above=0, most=1e6
    )
    dora: bool = setting(False, "DoRA: lengths of the weights' columns, trained apart from their directions")
    start: str | None = setting(None, "file of adapters to go on from, of the same layers and ranks", metavar="FILE")
    merge: tuple[str, ...] = setting(
        (), "files of adapters to add to the checkpoint's weights before", metavar="FILE[:STRENGTH]"
    )


@dataclasses.dataclass(frozen=True)
class DistillationConfig(Config):
    """A student of few steps to train, see `wanjax.training.objectives.distillation`; the checkpoint is its teacher.

    The steps are those of the self-forcing weights (shift 5 of 1, 0.75, 0.5, 0.25), `student_every` is DMD2's.
    """

    sigmas: tuple[float, ...] = setting(
        (1.0, 0.9375, 0.8333333, 0.625),
        "noise levels of the student's steps, falling from 1",
        above=0,
        most=1,
        empty=False,
    )
    guidance: float = setting(5.0, "of the teacher; 1: none", least=-1000, most=1000)
    student_every: int = setting(5, "steps of the critic to one of the student", least=1, most=2**16)
    critic_learning_rate: float | None = setting(None, "None: the student's", above=0, most=1e3)

    def check_together(self) -> None:
        """See `Config.check_together`."""
        if self.sigmas[0] != 1 or any(after >= before for before, after in itertools.pairwise(self.sigmas)):
            raise SettingError(
                f"sigmas {self.sigmas}; numbers that fall from 1 are accepted; use (1.0, 0.75, 0.5, 0.25)"
            )


Remat = Literal["none", "block", "attention", "dots", "offload"]
"""What the backward pass of the DiT computes again instead of keeping; see `wanjax.models.layers.rematerialised`."""


Density = Literal["logit_normal", "uniform", "mode"]
Weighting = Literal["none", "sigma_sqrt", "cosmap"]


@dataclasses.dataclass(frozen=True)
class SyntheticData(Config):
    """Noise that stands for encoded clips: for tests and measurements, see `wanjax.data.synthetic`."""


@dataclasses.dataclass(frozen=True)
class ShapesData(Config):
    """The demo's procedural clips of the seeds from `first_seed` on, see `wanjax.demo.shapes`."""

    kind: Literal["all", "different", "fine", "heart"] = setting(help="which of them")
    first_seed: int = setting(help="of the first clip", least=0, most=2**62)
    count: int = setting(help="how many", least=1, most=2**31)


@dataclasses.dataclass(frozen=True)
class VideoData(Config):
    """Videos and pictures: `path` is a folder of them, a manifest, `.tar` shards, or a `.toml` that musubi-tuner or
    diffusion-pipe takes, see docs/data.md.
    """

    path: str = setting(help="folder, manifest, shards or TOML", metavar="PATH", remote=True)
    repeats: float = setting(1.0, "how often each clip comes in a pass over the data", above=0, most=1e6)
    share: float | None = setting(
        None, "of all samples, relative to other sources' shares; in place of repeats", above=0, most=1e6
    )
    take: Literal["longest", "head", "chunk", "slide", "uniform", "cuts"] = setting(
        "longest", "which parts of a video are clips, see wanjax.data.parts"
    )
    stride: float = setting(1.0, "seconds between the parts of slide", above=0, most=1e6)
    count: int = setting(4, "parts of uniform, for each length", least=1, most=2**16)


@dataclasses.dataclass(frozen=True)
class MixedData(Config):
    """Several sources in one run."""

    of: tuple[VideoData, ...] = setting(help="the sources", empty=False)


@dataclasses.dataclass(frozen=True)
class CachedData(Config):
    """Clips encoded before the run: a folder that `wanjax.training.latent_cache` wrote from the clips `of`."""

    path: str = setting(help="folder", metavar="DIR", remote=True)
    of: ShapesData | VideoData | MixedData = setting(help="the clips that it was made of")


Data = SyntheticData | ShapesData | VideoData | MixedData | CachedData


TASKS = ("t2v", "i2v", "flf2v", "last", "continuation", "interpolation")
"""Those of `wanjax.conditioning.frames` that a run can mix."""


@dataclasses.dataclass(frozen=True)
class TaskMix(Config):
    """What a sample's model is given, drawn for each one: weights of the tasks (see `wanjax.conditioning.frames`),
    which need not sum to one.

    Continuation is given 2 to `max_count` of the first frames; interpolation, 2 to `max_given` frames anywhere.
    `caption_dropout` is the share of samples whose caption is empty, for guidance; `image_dropout`, of those whose CLIP
    features are zero. `variants` is how many draws of a task each clip has: the n-th time round, draw n modulo
    `variants` (a cache holds all of them).
    """

    t2v: float = setting(0.0, "weight of no given frame", least=0, most=1e6)
    i2v: float = setting(0.0, "weight of the first frame given", least=0, most=1e6)
    flf2v: float = setting(0.0, "weight of first and last frame given", least=0, most=1e6)
    last: float = setting(0.0, "weight of the last frame given", least=0, most=1e6)
    continuation: float = setting(0.0, "weight of several first frames given", least=0, most=1e6)
    interpolation: float = setting(0.0, "weight of frames anywhere given", least=0, most=1e6)
    max_count: int = setting(25, "most frames of a continuation", least=2, most=2**16)
    max_given: int = setting(4, "most frames of an interpolation", least=2, most=2**16)
    caption_dropout: float = setting(0.1, "share of samples without caption", least=0, most=1)
    image_dropout: float = setting(0.0, "share of samples without CLIP features", least=0, most=1)
    variants: int = setting(1, "draws of a task for each clip", least=1, most=2**16)

    def check_together(self) -> None:
        """See `Config.check_together`."""
        if not any(self.weights.values()):
            raise SettingError(f"tasks {self.weights}: all weights are 0; one above 0 is needed; set flf2v=1.0")

    @property
    def weights(self) -> dict[str, float]:
        """By task."""
        return {name: getattr(self, name) for name in TASKS}


@dataclasses.dataclass(frozen=True)
class TowersConfig(Config):
    """A text encoder and a CLIP vision tower that learn from one another, see `wanjax.training.objectives.contrastive`.

    `words` are all that the text encoder knows, `text_len` the length it is trained at, `width` that of the space that
    both are projected to.
    """

    umt5: UMT5Config = setting(help="the text encoder")
    clip: CLIPConfig = setting(help="the vision tower")
    words: tuple[str, ...] = setting(help="all that the text encoder knows", empty=False)
    text_len: int = setting(80, "tokens of a text", least=1, most=2**16)
    width: int = setting(128, "of the space of both", least=1, most=WIDEST)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Config):
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
        remote=True,
    )
    checkpoint: str | None = setting(
        None,
        "weights to start from: a folder in the Diffusers or the official layout, or a name on the Hugging Face hub",
        "run",
        metavar="DIR",
        shown="random",
        remote=True,
    )
    dit_file: str | None = file_of_dit("run")
    dit_low_file: str | None = file_of_low_dit("run")
    expert: Literal["high", "low", "both"] | None = setting(
        None,
        "of a checkpoint with two experts (Wan2.2-A14B): which learns, on its timesteps",
        "run",
        shown="there is one DiT",
    )
    boundary: float | None = setting(
        None,
        "timestep / 1000 from which on upwards the expert for high noise learns",
        "run",
        shown="the checkpoint's",
        least=0,
        most=1,
    )
    encoders: str | None = setting(
        None,
        "checkpoint whose VAE, umT5 and CLIP encode the clips",
        "run",
        metavar="DIR",
        shown="that of --checkpoint",
        remote=True,
    )
    dit: DiTConfig | None = setting(
        None, "the DiT to train: with random weights, or, of a checkpoint with fewer inputs, widened"
    )
    lora: LoRAConfig | None = setting(None, "train adapters beside the checkpoint's DiT, which stays as it is")
    distillation: DistillationConfig | None = setting(
        None, "train a student of few steps: the checkpoint's DiT, or with `lora` adapters beside it"
    )
    vae: VAEConfig | None = setting(None, "the VAE to train")
    towers: TowersConfig | None = setting(None, "the text encoder and CLIP tower to train")
    mesh: str = setting(
        "fsdp=-1",
        "devices along data, fsdp, ring, ulysses, such as data=2,ulysses=-1 (-1: what is left)",
        "devices",
        metavar="AXES",
        empty=False,
    )
    data: Data = setting(SyntheticData(), "the clips to learn from")
    tasks: TaskMix = setting(TaskMix(flf2v=1.0), "which frames of a clip the network is given, by weight")
    height: int = setting(480, "pixels of the clips, a multiple of 16", least=1, most=2**14)
    width: int = setting(832, "pixels of the clips, a multiple of 16", least=1, most=2**14)
    frames: int = setting(81, "frames of the clips, 4n + 1", least=1, most=2**16)
    fps: float = setting(16.0, "frames a second of the clips; 16 is the model's", "data", above=0, most=240)
    lengths: tuple[int, ...] = setting(
        (),
        "frames of the clips' lengths, each 4n + 1",
        "data",
        metavar="N,N,..",
        shown="frames and about 3/4, 2/4 and 1/4 of it",
        least=1,
        most=2**16,
    )
    ratios: tuple[float, ...] = setting(
        (),
        "width / height of the clips' sizes",
        "data",
        metavar="X,X,..",
        shown="16:9, 4:3, 1:1, 3:4, 9:16",
        above=0,
        most=100,
    )
    caption_encoding: str = setting(
        "",
        "of caption files, such as cp1252 or gb18030; guess: what fits",
        "data",
        metavar="NAME",
        shown="UTF-8, UTF-16 with its mark",
    )
    batch: int = setting(1, "samples in an optimiser step, over all hosts", "steps", least=1, most=2**24)
    accumulate: int = setting(1, "parts that a batch is computed in, one after the other", "steps", least=1, most=2**24)
    steps: int = setting(1000, "last step", "steps", least=1, most=2**31 - 1)
    seed: int = setting(0, "of data order, noise and random weights", "steps", least=0, most=2**31 - 1)
    learning_rate: float = setting(1e-4, "after the warm-up", "steps", above=0, most=1e3)
    lr_scheduler: Literal["constant", "linear", "cosine"] = setting(
        "constant", "way of the learning rate between warm-up and cool-down", "steps"
    )
    min_lr_ratio: float = setting(
        0.0, "share of the learning rate to which linear and cosine fall", "steps", least=0, most=1
    )
    warmup: int = setting(100, "steps over which the learning rate rises from 0", least=0, most=2**31 - 1)
    cooldown: int = setting(0, "last steps, over which the learning rate falls to 0", least=0, most=2**31 - 1)
    optimizer: Literal["adamw", "adamw8bit", "muon"] = setting(
        "adamw", "AdamW, the same with moments in 8 bits, or Muon; see wanjax.training.optimizer", "steps"
    )
    beta1: float = setting(0.9, "decay of Adam's first moment", least=0, most=0.9999999)
    beta2: float = setting(0.999, "decay of Adam's second moment", least=0, most=0.9999999)
    weight_decay: float = setting(1e-3, "of kernels only", least=0, most=1e3)
    clip_norm: float = setting(1.0, "largest norm of all gradients together", above=0, most=1e9)
    ema_decay: float | None = setting(
        None, "of the moving average of the weights; None: there is none", least=0, most=1
    )
    snippet: tuple[int, int, int] = setting(
        (17, 256, 256), "frames (4n + 1), height and width that a VAE learns from at a time", least=1, most=2**14
    )
    kl_weight: float = setting(
        1e-4, "of the divergence of a VAE's latents from N(0, 1), per latent number", least=0, most=1e6
    )
    sigma_mean: float = setting(
        0.0, "of the normal under the sigmoid of noise levels, see wanjax.diffusion.flow", least=-100, most=100
    )
    sigma_std: float = setting(1.0, "of the same, its deviation", above=0, most=100)
    timesteps: Density = setting("logit_normal", "density of noise levels, see wanjax.diffusion.noise_levels", "steps")
    mode_scale: float = setting(1.29, "of the density mode", least=-1, most=1.75)
    stratified: bool = setting(
        False, "spread the noise levels of a batch: one out of each of as many parts of the density", "steps"
    )
    weighting: Weighting = setting("none", "of the loss by noise level, see wanjax.diffusion.noise_levels", "steps")
    shift: float = setting(3.0, "timestep shift of noise levels, in training and samples", above=0, most=1000)
    shift_tokens: int | None = setting(
        None,
        "tokens of the clips that the shift is for; others get shift sqrt(tokens / shift_tokens)",
        least=1,
        most=2**31 - 1,
    )
    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16", "of activations; weights and optimiser are float32", "devices"
    )
    quantize: Literal["off", "fp8", "int8"] | None = setting(
        None, "format of the weights beside adapters, in the DiT's blocks", "devices", shown="as the checkpoint is"
    )
    offload_optimizer: bool = setting(
        False, "keep the optimiser's moments in the hosts' memory between its updates", "devices"
    )
    remat: Remat = setting("block", "what the backward pass computes again instead of keeping it", "devices")
    compile_cache: str | None = setting(
        None,
        "folder of compiled programs, or off",
        "devices",
        metavar="DIR",
        shown="WANJAX_COMPILE_CACHE, or ~/.cache/wanjax",
    )
    save_every: int = setting(500, "steps between checkpoints", "run", least=1, most=2**31 - 1)
    keep: int = setting(2, "newest checkpoints that stay", "run", least=1, most=2**31 - 1)
    resume_from: int | None = setting(
        None,
        "step of the checkpoint to go on from; later ones are put aside",
        "run",
        shown="the newest whole one",
        least=0,
        most=2**31 - 1,
    )
    track: tuple[Literal["wandb", "mlflow"], ...] = setting(
        (), "tell Weights & Biases (wandb) or MLflow (mlflow) too; repeat it for both", "run", metavar="NAME"
    )
    project: str = setting("wanjax", "W&B's project, MLflow's experiment", "run", empty=False)
    run_name: str | None = setting(None, "the run's name there", "run", shown="the folder's")
    validation: Data | None = setting(None, "held-out clips")
    validate_every: int = setting(0, "steps between losses on held-out clips; 0: never", "run", least=0, most=2**31 - 1)
    validation_batches: int = setting(
        2, "batches of held-out clips, of batch / accumulate samples each", least=1, most=2**24
    )
    sample_every: int = setting(
        0, "steps between samples of held-out clips and of prompts; 0: never", "run", least=0, most=2**31 - 1
    )
    sample_prompts: str | None = setting(
        None, "prompts with pictures to sample too: .jsonl, .csv or .txt, see docs/training.md", "run", metavar="FILE"
    )
    validate_first: bool = setting(False, "losses and samples before the first step too", "run")
    sample_clips: int = setting(4, "held-out clips that are sampled", least=1, most=2**16)
    sample_steps: int = setting(20, "solver steps of these samples", least=1, most=10_000)
    guidance: float = setting(5.0, "of these samples; 1: none", least=-1000, most=1000)

    @property
    def is_loaded(self) -> bool:
        """Whether the weights to start from are read, and not random."""
        return any(place is not None for place in (self.checkpoint, self.dit_file, self.dit_low_file))
