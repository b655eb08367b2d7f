"""From two pictures and a sentence to a video.

    pipe = Pipeline.from_pretrained("Wan2.1-FLF2V-14B-720P-diffusers", quantize="int8")
    result = pipe(first_frame="a.png", last_frame="b.png", prompt="...")
    result.save("video.mp4")

A pipeline holds a checkpoint's networks and the mesh that they lie on; a request is pictures, a prompt and how to
sample. `prepare` finds everything that is wrong with a request before any weights are read; calling the pipeline runs
it: encode, denoise, decode. Each stage is a compiled function that a loop on the host calls: once a chunk of frames for
the VAE, once a step for the DiT. So a stage compiles once, can show how far it is, and holds one chunk of frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sharding.distributed import is_main
from sharding.mesh import MeshShape, make_mesh, parse_mesh, sampling_mesh
from sharding.ulysses import check_heads
from wanjax.conditioning.encoders import Encoders, encoder_configs
from wanjax.conditioning.text import Tokenizer
from wanjax.config import NETWORK_FIELDS, DiTConfig, SampleConfig
from wanjax.diffusion import denoise as denoising
from wanjax.diffusion.caching import Cached, CacheState
from wanjax.diffusion.denoise import Guided, Predictor, denoise
from wanjax.errors import InputError
from wanjax.models.dit import Context, DiT
from wanjax.ops.attention import check_choice
from wanjax.sampling.cache_rules import switches
from wanjax.sampling.compile_cache import ExecutableCache, cache_folder
from wanjax.sampling.decoding import decode_video
from wanjax.sampling.memory import choose_keep
from wanjax.sampling.request import Request, make_request
from wanjax.sampling.result import Result
from wanjax.weights import Checkpoint, lora
from wanjax.weights.hub import checkpoint_folder
from wanjax.weights.lora_files import LoRAFile
from wanjax.weights.networks import Keep, Networks
from wanjax.weights.quantize import requantized


class Conditions(NamedTuple):
    """What guides the denoising: text features `[b, l, text_dim]`, CLIP features `[1, l, image_dim]` of the given
    frames, the control branch `[1, f, h, w, 20]`; None for what the network does not take.
    """

    text: jax.Array
    image: jax.Array | None
    control: jax.Array | None


class Step(NamedTuple):
    """What `on_step` is told: steps done, of how many, latents `[1, f, h, w, c]` and the predictor's memory.

    The next step takes the arrays' memory: copy what is to be kept.
    """

    done: int
    steps: int
    latents: jax.Array
    memory: Any


MakePredictor = Callable[[Request, DiT, Context, jax.Array | None], Predictor]


class Pipeline:
    """The networks of a checkpoint, ready for requests.

    Attributes:
      config: the settings that requests begin with.
      networks: see `wanjax.weights.networks.Networks`.
      encoders: of prompts and pictures.
      mesh: that everything runs on.

    Args:
      config: its fields in `wanjax.config.NETWORK_FIELDS` are the pipeline's, the others defaults of its requests.
      keep: "one": a network is on the devices only while it is needed, so that the largest, not the sum, has to fit;
        "all": networks stay, so that another request reads nothing; "auto": all, if half of the memory holds them.

    Raises:
      InputError: the checkpoint, or what is asked of it, cannot be used; nothing but headers has been read.
    """

    def __init__(self, config: SampleConfig, keep: Keep | str = "auto"):
        checkpoint = choose_checkpoint(config)
        dit, loras, merged = choose_dit(config, checkpoint)
        vae, umt5, clip = encoder_configs(checkpoint, dit, jnp.dtype(config.dtype))
        tokenizer = Tokenizer(checkpoint.tokenizer_dir, dit.text_len)
        self.config, self.dit, self.mesh = config, dit, choose_mesh(config, dit)
        self.networks = Networks(checkpoint, {"dit": dit, "umt5": umt5, "vae": vae, "clip": clip}, "one", loras, merged)
        self.networks.keep = choose_keep(keep, self.networks, self.mesh)
        self.programs = ExecutableCache(cache_folder(config.compile_cache))
        self.encoders = Encoders(self.networks, dit, tokenizer, self.programs)

    @classmethod
    def from_pretrained(cls, checkpoint: str, *, keep: Keep | str = "auto", **settings: Any) -> Pipeline:
        """The pipeline of a published checkpoint.

        Args:
          checkpoint: a folder in the Diffusers or the official layout, or the id of one on the Hugging Face hub.
          keep: as `Pipeline` takes it.
          settings: fields of `wanjax.config.SampleConfig`, such as `dtype`, `quantize`, `mesh`, `lora`.

        Raises:
          InputError: as `Pipeline`; or a setting is unknown, or the hub cannot be reached or lacks the checkpoint.
        """
        return cls(changed(SampleConfig(checkpoint=str(checkpoint)), settings, set(FIELDS)), keep)

    def prepare(self, **settings: Any) -> Request:
        """A request, checked and read; everything that is wrong with it is found here.

        Args:
          settings: fields of `SampleConfig` but those of the networks; `first_frame` and `last_frame` are paths, PIL
            images or uint8 arrays `[H, W, 3]`. What is not said is as the pipeline's configuration has it.

        Raises:
          InputError: a setting that is unknown or cannot be used.
        """
        config = changed(self.config, settings, set(FIELDS) - set(NETWORK_FIELDS))
        check_cfg_cache(config, self.mesh)
        return make_request(config, self.networks, self.encoders)

    def __call__(
        self,
        request: Request | None = None,
        *,
        on_step: Callable[[Step], Any] | None = None,
        predictor: MakePredictor | None = None,
        decode: bool = True,
        progress: bool = True,
        **settings: Any,
    ) -> Result:
        """Sample: encode, denoise, decode.

        Args:
          request: from `prepare`; or else settings for it.
          on_step: called after every step. What it raises ends the run.
          predictor: makes what says the velocities; None: as the request's switches say.
          decode: whether latents become a video.
          progress: whether to show a progress bar for each stage.

        Raises:
          InputError: as `prepare`; or the latents became NaN or infinite.
        """
        request = request or self.prepare(**settings)
        stages = Stages(progress)
        with self.placed():
            conditions = self.encode(request, stages)
            with stages("DiT", 1) as tick:
                dit, context = self.load_dit(conditions)
                tick()
            with stages("denoise", request.config.steps) as tick:
                velocity = (predictor or make_predictor)(request, dit, context, conditions.control)
                del dit, context  # the predictor has them
                carry = denoising.start(velocity, request.noise)
                for i in range(request.config.steps):
                    carry = self.programs(denoise, velocity, request.schedule, carry, i, i + 1)
                    jax.block_until_ready(carry)  # so that the progress bar tells the truth
                    tick()
                    if on_step is not None:
                        on_step(Step(i + 1, request.config.steps, carry[0].sample, carry[1]))
            (latents, *_), memory = carry
            del velocity, carry
            check_finite(latents)
            no_video = np.zeros((0, request.height, request.width, 3), np.uint8)
            video = self.decode(latents, stages) if decode else no_video
        evaluations = float(memory.evaluations) if isinstance(memory, CacheState) else float(request.config.steps)
        return Result(np.asarray(latents), video, request.config.fps, stages.seconds, evaluations)

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        """On the pipeline's mesh, with the precision of matrix products that its dtype means."""
        precision = "highest" if self.config.dtype == "float32" else None  # or accelerators multiply float32 in bf16
        exact = jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()
        with jax.set_mesh(self.mesh), exact:
            yield

    def encode(self, request: Request, stages: Stages) -> Conditions:
        """All that comes before the denoising. The VAE stays for decoding."""
        encoders, image, control = self.encoders, None, None
        with stages("text", 1) as tick:
            text = encoders.text(*request.tokens)
            tick()
        if request.clip_pixels is not None:
            with stages("images", 1) as tick:
                image = encoders.images(request.clip_pixels)
                tick()
        if encoders.has_control:
            with stages("VAE encode", request.noise.shape[1]) as tick:
                control = encoders.control(request.frames, request.given, (request.height, request.width), tick)
        return Conditions(text, image, control)

    def load_dit(self, conditions: Conditions) -> tuple[DiT, Context]:
        """The network without what only the context needs, a quarter of the weights; and the context."""
        dit, image = self.networks["dit"], conditions.image
        if image is not None:
            image = jnp.repeat(image, len(conditions.text), axis=0)  # both branches of guidance see the frames
        context = self.programs(make_context, dit, conditions.text, image)
        self.networks.release("dit")
        return dit.without_context(), jax.block_until_ready(context)

    def decode(self, latents: jax.Array, stages: Stages) -> np.ndarray:
        """Latents `[1, f, h, w, c]` to uint8 frames `[F, H, W, 3]`; the VAE has then done its part."""
        with stages("VAE decode", latents.shape[1]) as tick:
            video = decode_video(self.networks["vae"], latents, self.programs, tick)
        self.networks.release("vae")
        return video


class Stages:
    """Shows and times the stages of a run: `with stages(name, total) as tick`. `seconds` are by stage."""

    def __init__(self, progress: bool = True):
        self.progress, self.seconds = progress, {}

    @contextlib.contextmanager
    def __call__(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar with time left; yields what moves it on."""
        start = time.perf_counter()
        with tqdm(
            total=total, desc=f"{name:10s}", dynamic_ncols=True, disable=not (self.progress and is_main())
        ) as bar:
            yield lambda: (bar.update(), None)[1]
        self.seconds[name] = time.perf_counter() - start


@jax.jit
def make_context(dit: DiT, text: jax.Array, image: jax.Array | None) -> Context:
    """`DiT.context`."""
    return dit.context(text, image)


def make_predictor(request: Request, dit: DiT, context: Context, control: jax.Array | None) -> Predictor:
    """What says the velocities of a request: the whole network, or what its caches leave of it."""
    plain = (dit, context, control, request.config.guidance)
    return Guided(*plain) if request.rules is None else Cached(*plain, request.rules)


def check_finite(latents: jax.Array) -> None:
    """Raises `InputError` unless all numbers are finite."""
    if not jnp.isfinite(latents).all():
        raise InputError("the latents became NaN or infinite; finite weights and noise are needed; try --dtype float32")


FIELDS = tuple(field.name for field in dataclasses.fields(SampleConfig))


def changed(config: SampleConfig, settings: dict[str, Any], accepted: set[str]) -> SampleConfig:
    """The configuration with some fields replaced.

    Raises:
      InputError: a setting is not one of those accepted.
    """
    if unknown := settings.keys() - accepted:
        name = sorted(unknown)[0]
        where = "; it belongs to the networks: give it to Pipeline.from_pretrained" if name in FIELDS else ""
        raise InputError(f"setting {name}={settings[name]!r}{where}; accepted: {', '.join(sorted(accepted))}")
    return dataclasses.replace(config, **settings)


def choose_checkpoint(config: SampleConfig) -> Checkpoint:
    """The checkpoint that is asked for: a folder, or one of the Hugging Face hub.

    Raises:
      InputError: none is, or as `checkpoint_folder` and `Checkpoint`.
    """
    if config.checkpoint is None:
        raise InputError("no checkpoint; a folder in the Diffusers or the official layout is needed; give --checkpoint")
    return Checkpoint(checkpoint_folder(config.checkpoint))


def choose_dit(config: SampleConfig, checkpoint: Checkpoint) -> tuple[DiTConfig, tuple[LoRAFile, ...], bool]:
    """The DiT with the dtype, format and attention that are asked for; its adapters, and whether to merge them.

    Raises:
      InputError: the checkpoint has none, has it in another format, or there is no such attention on this device; or as
        `lora.parse` and `lora.check`.
    """
    dtype = jnp.dtype(config.dtype)
    dit = checkpoint.config("dit", dtype=dtype, param_dtype=dtype)
    is_quantized = dit.quantize != "off"
    dit = dataclasses.replace(requantized(dit, config.quantize), attention=config.attention)
    loras = lora.parse(config.lora)
    lora_merged = lora.check(loras, dit, is_quantized, config.lora_merge)
    check_choice(config.attention, dtype, jax.devices()[0].platform)
    return dit, loras, lora_merged


def choose_mesh(config: SampleConfig, dit: DiTConfig) -> Mesh:
    """The mesh that is asked for, of all devices; by default a good one, on CPUs of one device.

    Raises:
      InputError: the mesh does not fit the devices, the heads, or the CFG cache.
    """
    if isinstance(config.mesh, Mesh):
        return config.mesh
    devices = jax.devices()
    _, _, uncond_interval = switches(config)
    if config.mesh is not None:
        shape = parse_mesh(config.mesh, len(devices))
    else:
        devices = devices[:1] if devices[0].platform == "cpu" else devices
        # With guidance, its branches go to different devices.
        shape = sampling_mesh(len(devices), dit.num_heads, config.guidance != 1 and uncond_interval == 1)
    check_heads(dit.num_heads, shape.ulysses)
    return make_mesh(shape, devices)


def check_cfg_cache(config: SampleConfig, mesh: Mesh) -> None:
    """Raises `InputError` where the CFG cache would let devices wait."""
    _, _, uncond_interval = switches(config)
    shape = MeshShape(**dict(mesh.shape))
    if config.guidance != 1 and uncond_interval > 1 and shape.batch == 2:
        raise InputError(
            f"cfg-cache {uncond_interval} on mesh {shape}, where the unconditional branch's own devices would wait; "
            "data * fsdp other than 2 is accepted; give those devices to ring or ulysses, or leave --cfg-cache out"
        )
