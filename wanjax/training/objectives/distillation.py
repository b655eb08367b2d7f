"""Distillation to a few steps: a student learns to say in n steps what its teacher says in many (DMD2).

    x    <- noise at sigma_1 = 1, or what the student makes of it in k - 1 steps, at sigma_k
    x0    = x - sigma_k student(x, sigma_k)                        k is drawn anew for each turn
    x_t   = (1 - t) x0 + t noise                                   t as the noise levels of flow matching
    real  = x_t - t teacher(x_t, t), guided                        what the teacher takes x_t to come from
    fake  = x_t - t critic(x_t, t)                                 the same among videos as the student makes them
    student: gradient (fake - real) / mean |x0 - real| by x0, nothing by real and fake
    critic:  flow matching on x0:  mean (critic(x_t, t) - (noise - x0))^2

Up to a positive factor the student's gradient is that of the divergence KL(student || teacher) of noised videos: the
difference of the two scores. The critic learns at every step, the student at every `student_every`-th, each by its own
optimiser. Conditions (frames, caption) come from the clips; the clips themselves are not looked at.

Source: DMD2 (arXiv 2405.14867: two time scales, sections 4.1 and 4.2; steps that begin where the student arrives,
4.4) without its adversarial loss, and DMD (arXiv 2311.18828: the gradient, equations 7 and 8). Both are about text to
image; that first and last frame are given changes nothing but the networks' input.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sharding.distributed import is_main
from sharding.mesh import MeshShape
from sharding.rules import activation_spec, constrain, parameter_sharding, shard_parameters
from wanjax.conditioning.encoders import Encoders
from wanjax.conditioning.samples import Encoded
from wanjax.conditioning.text import Tokenizer
from wanjax.config import DistillationConfig, DiTConfig, TrainConfig
from wanjax.diffusion import flow, solvers
from wanjax.errors import InputError
from wanjax.files import replacing
from wanjax.models.dit import DiT
from wanjax.training import speed
from wanjax.training.objectives.dit import DiTObjective, predict
from wanjax.training.objectives.flow_matching import FlowMatching
from wanjax.training.optimizer import make_optimizer, rate_at
from wanjax.training.state import TrainState
from wanjax.training.step import Learned, Metrics, average, keep_finite, learn
from wanjax.weights import Checkpoint, lora
from wanjax.weights.hub import checkpoint_folder
from wanjax.weights.networks import Networks

LEAST_SIGMA, MOST_SIGMA = 0.02, 0.98
"""Noise levels at which teacher and critic are compared, as DMD2's: beyond, one of the two scores says nothing."""
NETWORKS = ("student", "critic")

Model = dict[str, Any]
"""By name: "student" and "critic", networks or adapters, "teacher", what these stand beside, and "empty_text"."""


class DistillationBatch(NamedTuple):
    """A batch, or a part of one, with all noise of a turn.

    steps: what the student starts from, and what goes onto its x0 before each further step, `[b, n, f, h, w, c]`.
    noise: of x_t, `[b, f, h, w, c]`.
    sigma: of x_t, `[b]`.
    """

    batch: Encoded
    steps: jax.Array
    noise: jax.Array
    sigma: jax.Array


class Turn(NamedTuple):
    """What one network's turn leaves: all that is trained, all optimisers' states, and how it went."""

    trained: Model
    optimizers: dict[str, Any]
    loss: jax.Array
    grad_norm: jax.Array


@dataclasses.dataclass(frozen=True)
class Distillation(DiTObjective[Model, DistillationBatch]):
    """The objective of a student of few steps: a whole network, or adapters beside the teacher.

    config: of the run; its checkpoint is the teacher.
    dit: of all three networks.
    """

    config: TrainConfig
    dit: DiTConfig

    name: ClassVar = "a student of few steps"

    @property
    def distillation(self) -> DistillationConfig:
        """Its settings."""
        assert self.config.distillation is not None
        return self.config.distillation

    # ---- networks

    def make(self, rngs: nnx.Rngs) -> Model:
        """Random networks; the student and its critic are equal."""
        empty_text = jnp.zeros((self.dit.text_len, self.dit.text_dim), jnp.float32)
        return self._around(DiT(self.dit, rngs), DiT(self._frozen_dit, rngs), rngs) | {"empty_text": empty_text}

    def load(self) -> Model:
        """All three from the checkpoint."""
        c = self.config
        assert c.checkpoint is not None
        checkpoint, empty_text = Checkpoint(checkpoint_folder(c.checkpoint)), self._encode_empty_text()
        teacher = checkpoint.load("dit", self._frozen_dit, parameter_sharding)
        student = teacher if c.lora is not None else checkpoint.load("dit", self.dit, parameter_sharding)
        return shard_parameters(self._around(student, teacher, nnx.Rngs(c.seed))) | {"empty_text": empty_text}

    @property
    def _frozen_dit(self) -> DiTConfig:
        """What never changes is stored in what it is computed in."""
        return dataclasses.replace(self.dit, param_dtype=jnp.dtype(self.config.dtype))

    def _around(self, student: DiT, teacher: DiT, rngs: nnx.Rngs) -> Model:
        if self.config.lora is None:
            return {"student": student, "critic": jax.tree.map(jnp.copy, student), "teacher": teacher}
        (adapters, base), (others, _) = (lora.split(lora.attach(teacher, self.config.lora, rngs)) for _ in NETWORKS)
        return {"student": adapters, "critic": others, "teacher": base}

    def _encode_empty_text(self) -> jax.Array:
        """Features `[l, text_dim]` that guidance leads away from; whole on every device."""
        folder = self.config.encoders or self.config.checkpoint
        assert folder is not None
        files, dtype = Checkpoint(checkpoint_folder(folder)), jnp.dtype(self.config.dtype)
        umt5 = files.config("umt5", dtype=dtype, param_dtype=dtype)
        tokenizer = Tokenizer(files.tokenizer, self.dit.text_len)
        encoders = Encoders(Networks(files, {"umt5": umt5}), self.dit, tokenizer)
        return encoders.text(*tokenizer([""]))[0].astype(jnp.float32)  # as a batch's

    @property
    def has_frozen(self) -> bool:
        """The teacher is."""
        return True

    def split(self, model: Model) -> tuple[Any, Any]:
        """Student and critic; teacher and empty text."""
        trained = {name: model[name] for name in NETWORKS}
        return trained, {name: x for name, x in model.items() if name not in trained}

    def join(self, trained: Model, frozen: Model) -> Model:
        """See `Objective`."""
        return trained | frozen

    def network(self, model: Model, name: str) -> DiT:
        """One of the three, ready to be called."""
        if self.config.lora is None:
            return model[name]
        dit = lora.join(model["student" if name == "teacher" else name], model["teacher"])
        return lora.detach(dit) if name == "teacher" else dit

    def averaged(self, trained: Model) -> Any:
        """The student."""
        return trained["student"]

    def eval_model(self, state: TrainState) -> DiT:
        """The student."""
        student = state.model["student"] if state.ema is None else state.ema
        return self.network(state.frozen | {"student": student}, "student")

    # ---- losses

    def prepare(self, batch: Encoded, key: jax.Array) -> DistillationBatch:
        """Draw the noise of a turn."""
        key_steps, key = jax.random.split(key)
        _, noise, sigma, _ = FlowMatching(self.config, self.dit).prepare(batch, key)
        b, *size = batch.latents.shape
        shape = (b, len(self.distillation.sigmas), *size)
        spec = activation_spec(shape, "batch", *(None,) * (len(shape) - 1))
        steps = jax.random.normal(key_steps, shape, jnp.float32, out_sharding=spec)
        return DistillationBatch(batch, steps, noise, jnp.clip(sigma, LEAST_SIGMA, MOST_SIGMA))

    def generate(self, student: DiT, prepared: DistillationBatch, last: jax.Array | int) -> jax.Array:
        """The student's x0 `[b, f, h, w, c]` at step `last`, from 0; only that step has a gradient."""
        batch, remat = prepared.batch, self.config.remat
        sigmas = jnp.asarray(self.distillation.sigmas, jnp.float32)  # [n]

        def x0(dit: DiT, context: Any, i: jax.Array | int, x: jax.Array) -> jax.Array:
            sigma = constrain(jnp.broadcast_to(sigmas[i], len(x)), "batch")
            return flow.denoised(x, predict(dit, batch, x, sigma, remat, context), sigma)

        fixed = jax.lax.stop_gradient(student)
        context = fixed.context(batch.text, batch.image, remat)

        def step(i: jax.Array, x: jax.Array) -> jax.Array:
            noise = jax.lax.dynamic_index_in_dim(prepared.steps, i + 1, axis=1, keepdims=False)
            sigma = constrain(jnp.broadcast_to(sigmas[i + 1], len(x)), "batch")
            return flow.interpolate(x0(fixed, context, i, x), noise, sigma)  # as the LCM solver

        x = jax.lax.stop_gradient(jax.lax.fori_loop(0, last, step, prepared.steps[:, 0]))
        return x0(student, student.context(batch.text, batch.image, remat), last, x)

    def student_gradient(self, model: Model, prepared: DistillationBatch, x0: jax.Array) -> jax.Array:
        """What the student's x0 is moved against, `[b, f, h, w, c]`: see the module's docstring."""
        batch, sigma, remat = prepared.batch, prepared.sigma, self.config.remat
        x = flow.interpolate(x0, prepared.noise, sigma)
        teacher, guidance = self.network(model, "teacher"), self.distillation.guidance
        velocity = predict(teacher, batch, x, sigma, remat)
        if guidance != 1:
            text = jnp.broadcast_to(model["empty_text"], batch.text.shape).astype(batch.text.dtype)
            empty = batch._replace(text=constrain(text, "batch", None, None))
            negative = predict(teacher, empty, x, sigma, remat)
            velocity = negative + guidance * (velocity - negative)
        real = flow.denoised(x, velocity, sigma)
        fake = flow.denoised(x, predict(self.network(model, "critic"), batch, x, sigma, remat), sigma)
        scale = jnp.mean(jnp.abs(x0 - real), axis=tuple(range(1, x.ndim)), keepdims=True)
        return (fake - real) / jnp.maximum(scale, 1e-6)

    def student_loss(self, model: Model, prepared: DistillationBatch, last: jax.Array | int) -> jax.Array:
        """Half the mean square of `student_gradient`, and with that gradient by the student's x0 but for the mean."""
        x0 = self.generate(self.network(model, "student"), prepared, last)
        fixed, x0_fixed = jax.lax.stop_gradient((model, x0))
        target = x0_fixed - self.student_gradient(fixed, prepared, x0_fixed)
        return 0.5 * jnp.mean(jnp.square(x0 - jax.lax.stop_gradient(target)))

    def critic_loss(self, model: Model, prepared: DistillationBatch, last: jax.Array | int) -> jax.Array:
        """Flow matching on what the student makes."""
        batch, noise, sigma = prepared.batch, prepared.noise, prepared.sigma
        x0 = jax.lax.stop_gradient(self.generate(self.network(model, "student"), prepared, last))
        x = flow.interpolate(x0, noise, sigma)
        velocity = predict(self.network(model, "critic"), batch, x, sigma, self.config.remat)
        return jnp.mean(flow.loss(velocity, flow.velocity(x0, noise)))

    def loss(self, model: Model, prepared: DistillationBatch) -> jax.Array:
        """The student's, at its last step."""
        return self.student_loss(model, prepared, len(self.distillation.sigmas) - 1)

    def validation_losses(self, model: DiT, batch: Encoded, seed: jax.Array | int = 0) -> jax.Array:
        """Mean squared error of the latents that the student makes of held-out clips in all its steps."""
        prepared = self.prepare(batch, jax.random.key(seed))
        x0 = self.generate(model, prepared, len(self.distillation.sigmas) - 1)
        return jnp.mean(jnp.square(x0 - batch.latents))

    # ---- a step

    def learner_configs(self) -> dict[str, TrainConfig]:
        """By network, the run as its optimiser sees it: the student's rate rises and falls over its own turns."""
        c, every = self.config, self.distillation.student_every
        student = dataclasses.replace(
            c, steps=max(c.steps // every, 1), warmup=c.warmup // every, cooldown=c.cooldown // every
        )
        critic = dataclasses.replace(c, learning_rate=self.distillation.critic_learning_rate or c.learning_rate)
        return {"student": student, "critic": critic}

    def optimizers(self) -> dict[str, optax.GradientTransformation]:
        """By network."""
        return {name: make_optimizer(config) for name, config in self.learner_configs().items()}

    def init_optimizer(self, trained: Model) -> dict[str, Any]:
        """See `Objective`."""
        return {name: optimizer.init(trained[name]) for name, optimizer in self.optimizers().items()}

    def step(self, state: TrainState, batch: Encoded) -> tuple[TrainState, Metrics]:
        """The critic's turn, and at every `student_every`-th step the student's."""
        critic_key, student_key = jax.random.split(state.key())
        critic = self._turn("critic", state, state.model, state.optimizer, batch, critic_key)

        def student_turn() -> tuple[Turn, Any]:
            turn = self._turn("student", state, critic.trained, critic.optimizers, batch, student_key)
            return turn, average(self.config, state, turn.trained["student"])

        def no_turn() -> tuple[Turn, Any]:
            zero = jnp.zeros((), jnp.float32)
            return Turn(critic.trained, critic.optimizers, zero, zero), state.ema

        is_turn = (state.step + 1) % self.distillation.student_every == 0
        student, ema = jax.lax.cond(is_turn, student_turn, no_turn)
        new = TrainState(state.step + 1, state.seed, student.trained, student.optimizers, ema, state.frozen)
        grad_norm = jnp.hypot(critic.grad_norm, student.grad_norm)
        kept, metrics = keep_finite(state, new, critic.loss + student.loss, grad_norm)
        losses = {"critic_loss": critic.loss, "student_loss": student.loss}
        norms = {"critic_grad_norm": critic.grad_norm, "student_grad_norm": student.grad_norm}
        counts = {"critic": state.step, "student": state.step // self.distillation.student_every}
        rates = {f"{name}_learning_rate": rate_at(c, counts[name]) for name, c in self.learner_configs().items()}
        parts = {
            name: x if "critic" in name else jnp.where(is_turn, x, jnp.nan)
            for name, x in (losses | norms | rates).items()
        }
        return kept, metrics._replace(parts=parts)

    def _turn(
        self, name: str, state: TrainState, trained: Model, optimizers: Any, batch: Encoded, key: jax.Array
    ) -> Turn:
        key_last, key = jax.random.split(key)
        last = jax.random.randint(key_last, (), 0, len(self.distillation.sigmas))
        loss = {"student": self.student_loss, "critic": self.critic_loss}[name]

        def of(network: Any, part: DistillationBatch) -> jax.Array:
            return loss(self.join(trained | {name: network}, state.frozen), part, last)

        learned: Learned = learn(
            self.config, self.optimizers()[name], of, trained[name], optimizers[name], self.prepare(batch, key)
        )
        return Turn(
            trained | {name: learned.weights},
            optimizers | {name: learned.optimizer},
            learned.loss,
            learned.grad_norm,
        )

    def step_operations(self, batch: Encoded) -> int:
        """See `Objective`; of the steps before the last, their mean number."""

        def once(model: Model, prepared: DistillationBatch) -> jax.Array:
            return predict(self.network(model, "teacher"), prepared.batch, prepared.noise, prepared.sigma)

        before, learning = (len(self.distillation.sigmas) - 1) / 2, 3 if self.config.lora is None else 2
        critic = before + 1 + learning
        student = before + learning + (1 if self.distillation.guidance == 1 else 2) + 1
        turns = critic + student / self.distillation.student_every
        return int(turns * speed.forward_operations(self, batch, once))

    # ---- around it

    def check(self, mesh: MeshShape) -> None:
        """See `Objective`."""
        super().check(mesh)
        if self.config.offload_optimizer:
            raise InputError("--offload-optimizer with distillation, whose two optimisers stay; leave it out")
        of_flow_matching = ("dropout", "start", "merge")
        given = [name for name in of_flow_matching if self.config.lora is not None and getattr(self.config.lora, name)]
        if given:
            raise InputError(f"lora with {given[0]} in distillation, which has none; leave it out")
        if self.config.checkpoint is not None:
            task = Checkpoint(checkpoint_folder(self.config.checkpoint)).config("dit").task
            if task != self.dit.task:
                raise InputError(
                    f"checkpoint {self.config.checkpoint} is made for {task}, the student for {self.dit.task}; a "
                    "teacher that knows the same is needed; give another --checkpoint, or a config without dit"
                )

    def sampled_as(self, config: TrainConfig) -> tuple[TrainConfig, solvers.Schedule]:
        """As the student is sampled."""
        schedule = solvers.make_schedule("lcm", sigmas=self.distillation.sigmas)
        return dataclasses.replace(config, guidance=1.0), schedule

    def export(self, model: DiT) -> Path:
        """As of flow matching, and `WORKDIR/preset.json`, with which `wanjax sample --preset` samples it."""
        path = super().export(model)
        if is_main():
            write_preset(path.parent / "preset.json", self.distillation.sigmas)
        return path


def write_preset(path: Path, sigmas: tuple[float, ...]) -> None:
    """A file for `--preset` of a student with these steps."""
    preset = {
        "about": f"a student of {len(sigmas)} steps: fresh noise between them, no guidance",
        "solver": "lcm",
        "sigmas": list(sigmas),
        "timesteps": "exact",
        "guidance": 1.0,
    }
    with replacing(path) as new:
        new.write_text(json.dumps(preset, indent=2) + "\n")
