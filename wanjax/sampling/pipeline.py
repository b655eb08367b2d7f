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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sharding.mesh import MeshShape, make_mesh, parse_mesh, sampling_mesh
from sharding.ulysses import check_heads
from wanjax.conditioning.encoders import Encoders, encoder_configs
from wanjax.conditioning.text import Tokenizer
from wanjax.config import NETWORK_FIELDS, DiTConfig, SampleConfig, VAEConfig
from wanjax.diffusion import denoise as denoising
from wanjax.diffusion.caching import Cached, CacheState
from wanjax.diffusion.denoise import Guided, Predictor, denoise
from wanjax.errors import InputError
from wanjax.models.dit import Context, DiT
from wanjax.sampling import presets
from wanjax.sampling.cache_rules import switches
from wanjax.sampling.choices import choose_checkpoint, choose_dit
from wanjax.sampling.compile_cache import ExecutableCache, cache_folder
from wanjax.sampling.decoding import decode_video
from wanjax.sampling.extend_prompt import write_out
from wanjax.sampling.given import resolved
from wanjax.sampling.memory import choose_keep, choose_resident
from wanjax.sampling.preview import Linear, Preview, Tiny, fit
from wanjax.sampling.request import Request, make_request
from wanjax.sampling.result import Result
from wanjax.sampling.stages import Progress, Stages
from wanjax.sampling.steps import Phase, is_guided
from wanjax.weights.mapping import NetworkName
from wanjax.weights.networks import Keep, Networks


class Conditions(NamedTuple):
    """What guides the denoising: text features `[b, l, text_dim]`, CLIP features `[1, l, image_dim]` of the given
    frames, the image condition `[1, f, h, w, 20]`; None for what the network does not take.
    """

    text: jax.Array
    image: jax.Array | None
    image_condition: jax.Array | None


class Step(NamedTuple):
    """What `on_step` is told: steps done, of how many, latents `[1, f, h, w, c]` and the predictor's memory; and `x0`,
    what the network expects of the latents, noise taken out: `Pipeline.preview` makes pictures of it.

    The next step takes the arrays' memory: copy what is to be kept.
    """

    done: int
    steps: int
    latents: jax.Array
    memory: Any
    x0: jax.Array


class Expert(NamedTuple):
    """A DiT that steps are taken with, without what only contexts need, and its contexts by number of branches."""

    dit: DiT
    contexts: dict[int, Context]


MakePredictor = Callable[[Request, DiT, Context, jax.Array | None, float], Predictor]


class Pipeline:
    """The networks of a checkpoint, ready for requests.

    Attributes:
      config: the settings that requests begin with.
      networks: see `wanjax.weights.networks.Networks`.
      encoders: of prompts and pictures.
      mesh: that everything runs on.
      resident: whether two experts are on the devices together.

    Args:
      config: its fields in `wanjax.config.NETWORK_FIELDS` are the pipeline's, the others defaults of its requests.
      keep: "one": a network is on the devices only while it is needed, so that the largest, not the sum, has to fit;
        "all": networks stay, so that another request reads nothing; "auto": all, if half of the memory holds them.

    Raises:
      InputError: the checkpoint, or what is asked of it, cannot be used; nothing but headers has been read.
    """

    def __init__(self, config: SampleConfig, keep: Keep | str = "auto"):
        config = presets.fill(config)
        checkpoint = choose_checkpoint(config)
        dit, loras, merged = choose_dit(config, checkpoint)
        vae, umt5, clip = encoder_configs(checkpoint, dit, jnp.dtype(config.dtype))
        tokenizer = Tokenizer(checkpoint.tokenizer, dit.text_len)
        self.config, self.dit, self.mesh = config, dit, choose_mesh(config, dit)
        configs: dict[NetworkName, Any] = {"dit": dit, "umt5": umt5, "vae": vae, "clip": clip}
        if checkpoint.experts == 2:
            configs["dit_low"] = dit
        self.networks = Networks(checkpoint, configs, "one", loras, merged)
        self.networks.keep = choose_keep(keep, self.networks, self.mesh)
        self.resident = choose_resident(config.experts, self.networks, self.mesh)
        self.programs = ExecutableCache(cache_folder(config.compile_cache))
        self.encoders = Encoders(self.networks, dit, tokenizer, self.programs)
        self._linear: Linear | None = None

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
        return self.request(self.resolved(**settings))

    def resolved(self, **settings: Any) -> SampleConfig:
        """The pipeline's configuration with these settings, and with the pictures that `--continue` and `--loop` mean.

        Raises:
          InputError: as `prepare`.
        """
        return resolved(changed(self.config, settings, set(FIELDS) - set(NETWORK_FIELDS)))

    def request(self, config: SampleConfig) -> Request:
        """As `prepare`, of a configuration that is `resolved`."""
        if config.loop or (config.window or config.frames) < config.frames:
            raise InputError(
                "a loop, or a window shorter than the video, which one request cannot make; "
                "wanjax.sampling.windows.sample is for these; leave them out, or use it"
            )
        check_cfg_cache(config, self.mesh)
        config, notes = write_out(config)
        request = make_request(config, self.networks, self.encoders)
        return dataclasses.replace(request, notes=(*notes, *request.notes))

    def __call__(
        self,
        request: Request | None = None,
        *,
        on_step: Callable[[Step], Any] | None = None,
        on_latents: Callable[[np.ndarray], Any] | None = None,
        on_progress: Callable[[Progress], Any] | None = None,
        predictor: MakePredictor | None = None,
        decode: bool = True,
        progress: bool = True,
        **settings: Any,
    ) -> Result:
        """Sample: encode, denoise, decode.

        Args:
          request: from `prepare`; or else settings for it.
          on_step: called after every step. What it raises ends the run.
          on_latents: called with the final latents, `[1, f, h, w, c]`, before they are decoded, which may fail.
          on_progress: called when a stage begins, and as it goes on. What it raises ends the run.
          predictor: makes what says the velocities; None: as the request's switches say.
          decode: whether latents become a video.
          progress: whether to show a progress bar for each stage.

        Raises:
          InputError: as `prepare`; or the latents became NaN or infinite.
        """
        request = request or self.prepare(**settings)
        stages = Stages(progress, on_progress)
        with self.placed():
            conditions = self.encode(request, stages)
            latents, evaluations = self.denoise(request, conditions, predictor or make_predictor, stages, on_step)
            check_finite(latents)
            if on_latents is not None:
                on_latents(np.asarray(latents))
            no_video = np.zeros((0, request.height, request.width, 3), np.uint8)
            video = self.decode(latents, stages) if decode else no_video
        return Result(np.asarray(latents), video, request.config.fps, stages.seconds, evaluations)

    def preview(self, decoder: str | Path | None = None) -> Preview:
        """What makes small pictures of latents, for `on_step`; see `wanjax.sampling.preview`.

        Args:
          decoder: TAEHV's file; None: a linear map, fitted to the VAE when it is first asked for.

        Raises:
          InputError: as `preview.Tiny`, or the VAE cannot be loaded.
        """
        vae: VAEConfig = self.networks.configs["vae"]
        if decoder is not None:
            return Tiny(decoder, vae.z_dim)
        if self._linear is None:
            with self.placed():
                self._linear = fit(lambda clip: self.encoders.latents(clip), vae)
            self.networks.release("vae")
        return self._linear

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        """On the pipeline's mesh, with the precision of matrix products that its dtype means."""
        precision = "highest" if self.config.dtype == "float32" else None  # or accelerators multiply float32 in bf16
        exact = jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()
        with jax.set_mesh(self.mesh), exact:
            yield

    def encode(self, request: Request, stages: Stages) -> Conditions:
        """All that comes before the denoising. The VAE stays for decoding."""
        encoders, image, image_condition = self.encoders, None, None
        with stages("text", 1) as tick:
            text = encoders.text(*request.tokens)
            tick()
        if request.clip_pixels is not None:
            with stages("images", 1) as tick:
                image = encoders.images(request.clip_pixels)
                tick()
        if encoders.has_image_condition:
            with stages("VAE encode", request.noise.shape[1]) as tick:
                image_condition = encoders.image_condition(
                    request.frames, request.given, (request.height, request.width), tick
                )
        return Conditions(text, image, image_condition)

    def denoise(
        self,
        request: Request,
        conditions: Conditions,
        predictor: MakePredictor,
        stages: Stages,
        on_step: Callable[[Step], Any] | None,
    ) -> tuple[jax.Array, float]:
        """Latents `[1, f, h, w, c]`, and the DiT's forward passes: one solver's state through all phases."""
        experts: dict[NetworkName, Expert] = {}
        state, evaluations = denoising.initial(request.noise), 0.0
        for phase in request.phases:
            if phase.expert not in experts:
                experts.clear()  # first: there may be no room for two
                experts |= self.load_experts(request, phase, conditions, stages)
            with stages("denoise", phase.stop - phase.first) as tick:
                dit, contexts = experts[phase.expert]
                scale = request.guidance[phase.first]
                velocity = predictor(request, dit, contexts[phase.branches], conditions.image_condition, scale)
                del dit, contexts  # the predictor has them
                carry = denoising.enter(velocity, state)
                for i in range(phase.first, phase.stop):
                    if request.guidance[i] != scale:
                        scale = request.guidance[i]
                        velocity = velocity.with_guidance(scale)
                    carry = self.programs(denoise, velocity, request.schedule, carry, i, i + 1)
                    jax.block_until_ready(carry)  # so that the progress bar tells the truth
                    tick()
                    if on_step is not None:
                        on_step(Step(i + 1, request.config.steps, carry[0].sample, carry[1], carry[0].x0))
            state, memory = carry
            evaluations += memory.evaluations if isinstance(memory, CacheState) else phase.stop - phase.first
            del velocity, carry, memory
        return state.sample, float(evaluations)

    def load_experts(
        self, request: Request, phase: Phase, conditions: Conditions, stages: Stages
    ) -> dict[NetworkName, Expert]:
        """The network of a phase, or those of all, without what only contexts need, a quarter of the weights; and the
        contexts by number of branches. If another network is to come, its files are read meanwhile.
        """
        names: list[NetworkName] = list(dict.fromkeys(p.expert for p in request.phases))
        later = [] if self.resident else names[names.index(phase.expert) + 1 :]
        wanted: list[NetworkName] = names if self.resident else [phase.expert]
        experts: dict[NetworkName, Expert] = {}
        with stages("DiT", len(wanted)) as tick:
            for name in wanted:
                dit, contexts = self.networks[name], {}
                for branches in {p.branches for p in request.phases if p.expert == name}:
                    text, image = conditions.text, conditions.image
                    text = text if len(text) == branches else text[:branches]
                    if image is not None:
                        image = jnp.repeat(image, branches, axis=0)  # both branches of guidance see the frames
                    contexts[branches] = jax.block_until_ready(self.programs(make_context, dit, text, image))
                self.networks.release(name)
                experts[name] = Expert(dit.without_context(), contexts)
                tick()
        if later:
            self.networks.read_ahead(later[0])
        return experts

    def decode(self, latents: jax.Array, stages: Stages) -> np.ndarray:
        """Latents `[1, f, h, w, c]` to uint8 frames `[F, H, W, 3]`; the VAE has then done its part."""
        with stages("VAE decode", latents.shape[1]) as tick:
            video = decode_video(self.networks["vae"], latents, self.programs, tick)
        self.networks.release("vae")
        return video


@jax.jit
def make_context(dit: DiT, text: jax.Array, image: jax.Array | None) -> Context:
    """`DiT.context`."""
    return dit.context(text, image)


def make_predictor(
    request: Request, dit: DiT, context: Context, image_condition: jax.Array | None, guidance: float
) -> Predictor:
    """What says the velocities of a request: the whole network, or what its caches leave of it."""
    plain, rules = (dit, context, image_condition, guidance), request.rules
    if rules is not None and context.k.shape[1] == 1:  # steps without guidance have no branch to leave out
        rules = rules._replace(uncond_interval=None, may_skip_uncond=None)
    return Guided(*plain) if rules is None or all(rule is None for rule in rules) else Cached(*plain, rules)


def check_finite(latents: jax.Array) -> None:
    """Raises `InputError` unless all numbers are finite."""
    if not jnp.isfinite(latents).all():
        raise InputError("the latents became NaN or infinite; finite weights and noise are needed; try --dtype float32")


FIELDS = tuple(field.name for field in dataclasses.fields(SampleConfig))


def changed(config: SampleConfig, settings: dict[str, Any], accepted: set[str]) -> SampleConfig:
    """The configuration with some fields replaced; of a preset among them those that are not said beside it.

    Raises:
      InputError: a setting is not one of those accepted.
    """
    if unknown := settings.keys() - accepted:
        name = sorted(unknown)[0]
        where = "; it belongs to the networks: give it to Pipeline.from_pretrained" if name in FIELDS else ""
        raise InputError(f"setting {name}={settings[name]!r}{where}; accepted: {', '.join(sorted(accepted))}")
    if settings.get("preset"):
        config = presets.apply(config, settings["preset"])
    return dataclasses.replace(config, **settings | {"preset": None})


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
        shape = sampling_mesh(len(devices), dit.num_heads, is_guided(config) and uncond_interval == 1)
    check_heads(dit.num_heads, shape.ulysses)
    return make_mesh(shape, devices)


def check_cfg_cache(config: SampleConfig, mesh: Mesh) -> None:
    """Raises `InputError` where the CFG cache would let devices wait."""
    _, _, uncond_interval = switches(config)
    shape = MeshShape(**dict(mesh.shape))
    if is_guided(config) and uncond_interval > 1 and shape.batch == 2:
        raise InputError(
            f"cfg-cache {uncond_interval} on mesh {shape}, where the unconditional branch's own devices would wait; "
            "data * fsdp other than 2 is accepted; give those devices to ring or ulysses, or leave --cfg-cache out"
        )
