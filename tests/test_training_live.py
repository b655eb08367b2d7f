"""Training against torch: loss, every gradient and 20 AdamW steps, of two experts and beside a base in 8 bits.

    make parity        # = pytest -m live, with the golden extra installed

The reference is diffusers' network, torch's autograd and torch's AdamW, and here the loss, the clipping and the
adapters as a few lines of torch. Noise and noise levels are drawn by us and given to both. Allowed: a relative
difference of 1e-4, of every loss, every gradient and, after the last step, every weight.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import GOLDEN, TRAIN, on, relative_error

from wanjax.config import LoRAConfig
from wanjax.data.batch import make_batch
from wanjax.training.objectives import make_objective
from wanjax.training.state import init_state
from wanjax.training.step import gradients, make_step
from wanjax.weights import Checkpoint, lora
from wanjax.weights.tensor_source import ModuleSource

pytestmark = pytest.mark.live

STEPS, TOLERANCE = 20, 1e-4
FOLDERS = {"dit": "transformer", "dit_low": "transformer_2"}
CONFIG = dataclasses.replace(
    TRAIN, checkpoint=str(GOLDEN / "a14b_flf2v"), expert="both", batch=2, steps=STEPS, shift=12.0, learning_rate=1e-3,
    weight_decay=0.1,
)  # fmt: skip


class Reference:
    """A network of diffusers with torch's AdamW, or, beside it as it is, adapters.

    Args:
      config: of the run.
      folder: of the network.
      adapters: by the key that a LoRA file gives them, each pair of factors; None: all weights learn.
      weights: in place of the folder's, by name.
    """

    def __init__(self, config, folder, adapters=None, weights=None):
        import diffusers
        import torch

        self.network = diffusers.WanTransformer3DModel.from_pretrained(folder)
        if weights is not None:
            self.network.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in weights.items()})
        self.trained = dict(self.network.named_parameters())
        if adapters is not None:
            self.network.requires_grad_(False)
            self.trained = {key: torch.nn.Parameter(torch.from_numpy(np.array(x))) for key, x in adapters.items()}
            for key in adapters:
                if ".lora_A." in key:
                    self._attach(key)
        c = self.config = config
        decays = [x for name, x in self.trained.items() if x.ndim > 1 and name.endswith("weight")]
        others = [x for name, x in self.trained.items() if not (x.ndim > 1 and name.endswith("weight"))]
        groups = [{"params": decays, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=1e-8)

    def _attach(self, key):
        layer = self.network.get_submodule(key.removeprefix("transformer.").partition(".lora_A.")[0])
        a, b = self.trained[key], self.trained[key.replace("lora_A", "lora_B")]  # [r, in], [out, r]
        layer.register_forward_hook(lambda module, inputs, output: output + inputs[0] @ a.T @ b.T)

    def loss(self, batch, noise, sigma):
        """Mean squared error of the velocity; channels first."""
        import torch

        latents, text, condition, noise, sigma = (
            torch.from_numpy(np.array(x)) for x in (batch.latents, batch.text, batch.image_condition, noise, sigma)
        )
        first = functools.partial(torch.movedim, source=-1, destination=1)
        latents, condition, noise = first(latents), first(condition), first(noise)
        s = sigma[:, None, None, None, None]
        x = torch.cat([(1 - s) * latents + s * noise, condition], dim=1)
        velocity = self.network(x, 1000 * sigma, text).sample
        return ((velocity - (noise - latents)) ** 2).mean()

    def step(self, *inputs):
        """The loss before an update, and the gradients of it, not clipped."""
        import torch

        self.optimizer.zero_grad()
        loss = self.loss(*inputs)
        loss.backward()
        grads = {name: x.grad.numpy().copy() for name, x in self.trained.items()}
        norm = torch.sqrt(sum((x.grad**2).sum() for x in self.trained.values()))
        for x in self.trained.values():
            x.grad *= min(1.0, self.config.clip_norm / float(norm))
        self.optimizer.step()
        return loss.item(), grads


def by_name(model):
    """A network's tensors, or gradients of them, by diffusers' names."""
    source = ModuleSource("dit", model, "diffusers")
    with source.open() as read:
        return {key: np.asarray(read(key)) for key in source.infos}


def adapters_by_name(model, path):
    """The adapters of a network, or gradients of them, as a file has them."""
    import safetensors.numpy

    lora.save(path, model)
    return safetensors.numpy.load_file(path)


def in_full(dit):
    """The network with the numbers that its 8 bits stand for."""
    dit = nnx.merge(*nnx.split(lora.detach(dit)))
    for layer in lora.linear_layers(dit).values():
        if hasattr(layer, "kernel_scale"):
            scale = layer.kernel_scale[...][:, None]  # [layers, 1, out]
            layer.kernel = layer.kernel.replace(layer.kernel[...].astype(jnp.float32) * scale)
            layer.kernel_scale = None
    dit.config = dataclasses.replace(dit.config, quantize="off")
    return by_name(dit)


def assert_all_close(ours, theirs, least=1e-6):
    """Every array by itself; what is `least` of the largest is rounding."""
    assert ours.keys() == theirs.keys()
    largest = max(np.linalg.norm(x) for x in theirs.values())
    for name, expected in theirs.items():
        assert np.linalg.norm(expected) > 0, name
        difference = np.linalg.norm(ours[name] - expected)
        assert difference <= TOLERANCE * max(np.linalg.norm(expected), least * largest), (
            name, difference / np.linalg.norm(expected), np.linalg.norm(expected) / largest,
        )  # fmt: skip


def run_both(config, make_reference, named):
    """Trains ours and the references side by side; losses, every gradient of the first turns, all weights at the end.

    Args:
      config: of the run.
      make_reference: of an expert, from its network as it starts.
      named: what of a network, or of gradients of it, has which name.
    """
    with on():
        objective = make_objective(config)
        state = init_state(config, objective)
        rng = np.random.default_rng(0)  # adapters begin at zero, where half of the gradients are zero
        if config.lora is not None:
            model = jax.tree.map(
                lambda x: jax.device_put(rng.standard_normal(x.shape, np.float32) / 8, x.sharding), state.model
            )
            state = dataclasses.replace(state, model=model)
        turns = objective.turns()
        steps = {name: make_step(turn) for name, turn in turns.items()}
        whole = objective.join(state.model, state.frozen)
        references = {name: make_reference(FOLDERS[name], whole[name]) for name in turns}
        source, seen = objective.open_data(config).source, set()
        for number in range(STEPS):
            name = objective.turn(number)
            batch = make_batch(source, number * config.batch, config.batch)
            prepared = turns[name].prepare(batch, state.key())
            expert = objective.experts[name]
            frozen = None if state.frozen is None else state.frozen[name]
            expected, theirs = references[name].step(batch, prepared.noise, prepared.sigma)
            if name not in seen:
                seen.add(name)
                differentiate = jax.jit(
                    lambda weights, frozen, part, expert=expert: gradients(
                        lambda w, p: expert.loss(expert.join(w, frozen), p), weights, part
                    )
                )
                loss, grads = differentiate(state.model[name], frozen, prepared)
                assert_all_close(named(expert.join(grads, frozen)), theirs)
                assert float(loss) == pytest.approx(expected, rel=TOLERANCE)
            state, metrics = steps[name](state, batch)
            assert float(metrics.loss) == pytest.approx(expected, rel=TOLERANCE)
        assert seen == {"dit", "dit_low"}
        whole = objective.join(state.model, state.frozen)
        for name, reference in references.items():
            theirs = {key: x.detach().numpy() for key, x in reference.trained.items()}
            assert_all_close(named(whole[name]), theirs)


def test_two_experts_in_one_run():
    run_both(CONFIG, lambda folder, _: Reference(CONFIG, GOLDEN / "a14b_flf2v" / folder), by_name)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_adapters_beside_a_base_in_8_bits(format, tmp_path):
    """The reference's base is what the 8 bits stand for, in float32: near the checkpoint's, and not the same."""
    config = dataclasses.replace(CONFIG, lora=LoRAConfig(rank=4), quantize=format, learning_rate=2e-4)
    named = functools.partial(adapters_by_name, path=tmp_path / "adapters.safetensors")

    def reference(folder, dit):
        weights = in_full(dit)
        name = {folder: name for name, folder in FOLDERS.items()}[folder]
        checkpoint = Checkpoint(config.checkpoint)
        stored = by_name(checkpoint.load(name, checkpoint.config(name)))
        key = "blocks.1.attn1.to_q.weight"
        assert 1e-3 < relative_error(weights[key], stored[key]) < (0.01 if format == "int8" else 0.04)
        return Reference(config, GOLDEN / "a14b_flf2v" / folder, named(dit), weights)

    run_both(config, reference, named)
