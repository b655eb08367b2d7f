"""Adapters learn, and nothing else changes or is saved."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import DIT, TRAIN, assert_same_model, on, values, write_config
from tiny_adapters import NAMES

import train_jax
from sharding.mesh import MeshShape
from wanjax.config import LoRAConfig, VAEConfig
from wanjax.data.batch import make_batch
from wanjax.data.synthetic import Synthetic
from wanjax.errors import InputError
from wanjax.models.dit import DiT
from wanjax.training.checkpoint import TrainCheckpoints
from wanjax.training.objectives import make_objective
from wanjax.training.objectives.flow_matching import network_to_train
from wanjax.training.state import abstract_state, init_state, resumed
from wanjax.training.step import gradients, train_step
from wanjax.weights import Checkpoint, lora, save
from wanjax.weights.load import parameters

TARGETS = (*LoRAConfig().targets, "head")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run on a checkpoint whose head, unlike a new one's, is not zero: what the blocks do counts."""
    folder = tmp_path_factory.mktemp("run")
    dit = DiT(DIT, nnx.Rngs(0))
    kernel = dit.head.linear.kernel
    dit.head.linear.kernel = kernel.replace(jax.random.normal(jax.random.key(0), kernel.shape) / 8)
    save(folder / "checkpoint", "official", {"dit": dit}, pth=False)
    return dataclasses.replace(
        TRAIN, workdir=str(folder), checkpoint=str(folder / "checkpoint"), lora=LoRAConfig(rank=8, targets=TARGETS),
        accumulate=2, learning_rate=1e-2, ema_decay=0.9, dtype="bfloat16",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config):
    """On a mesh: the compiled step, the batch, the state of step 0 and that after 60 steps, with their losses."""
    with on(MeshShape(fsdp=2, ring=2, ulysses=2)):
        objective = make_objective(config)
        step = jax.jit(functools.partial(train_step, objective), donate_argnums=0)
        batch = make_batch(Synthetic(config, objective.dit, distinct=1), 0, config.batch)
        state = init_state(config, objective)
        first, losses = jax.device_get(state), []
        for _ in range(60):
            state, metrics = step(state, batch)
            losses.append(float(metrics.loss))
        yield step, batch, first, state, losses


def test_only_adapters_are_trained(config, run):
    _, _, first, state, _ = run
    count = 2 * (len(NAMES) + 1)  # a and b of every linear layer of the blocks, and of the head
    assert len(jax.tree.leaves(state.model)) == count
    assert all(lora.is_adapter(x) and x.dtype == jnp.float32 for x in parameters(state.model).values())
    assert len([x for x in jax.tree.leaves(state.optimizer) if x.ndim]) == 2 * count
    assert len(jax.tree.leaves(state.ema)) == count
    assert state.frozen.blocks.ffn.fc_in.kernel.dtype == jnp.bfloat16  # what it is computed in
    assert len({str(x.index) for x in state.frozen.blocks.ffn.fc_in.kernel[...].addressable_shards}) == 8
    assert len({str(x.index) for x in state.model.blocks.ffn.fc_in.lora.a[...].addressable_shards}) == 8
    assert not np.any(first.model.blocks.ffn.fc_in.lora.b[...])


def test_overfits_one_sample_and_leaves_the_base_as_it_is(config, run):
    _, _, first, state, losses = run
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5]), losses
    assert_same_model(state.frozen, first.frozen)
    c = dataclasses.replace(network_to_train(config))
    assert_same_model(state.frozen, Checkpoint(config.checkpoint).load("dit", c))


def test_the_file_has_what_was_learned(config, run):
    """Read beside the checkpoint's weights, it is the trained network to the bit."""
    *_, state, _ = run
    path = make_objective(config).export(make_objective(config).eval_model(state))
    assert path.name == "lora.safetensors"
    c = network_to_train(config)
    read = lora.load(
        Checkpoint(config.checkpoint), dataclasses.replace(c, param_dtype=jnp.float32), lora.parse([str(path)]), False
    )
    wanted = values(state.ema)
    assert all(np.array_equal(x, values(read)[path]) for path, x in wanted.items())
    assert wanted.keys() == {path for path in values(read) if ".lora." in path}


def test_resumes_exactly_and_saves_nothing_frozen(config, run, tmp_path):
    step, batch, _, state, _ = run
    with on(MeshShape(fsdp=2, ring=2, ulysses=2)):
        checkpoints, objective = TrainCheckpoints(tmp_path), make_objective(config)
        checkpoints.save(state, 60)
        checkpoints.wait()
        abstract = abstract_state(config, objective)
        again, position = checkpoints.restore(abstract)
        assert position == 60
        assert again.frozen is None
        stored = (tmp_path / "checkpoints/60/state/_METADATA").read_text()
        assert "model.blocks.ffn.fc_in.lora.a" in stored
        assert "kernel" not in stored
        again = resumed(config, objective, again)
        copy = jax.tree.map(jnp.copy, state)
        results = [step(x, batch) for x in (copy, again)]
        for x, y in zip(*(jax.tree.leaves(jax.device_get(x)) for x in results), strict=True):
            np.testing.assert_array_equal(x, y)
        checkpoints.close()


def loss_and_gradients(config, shape):
    """Of adapters none of which is zero."""
    with on(shape):
        objective = make_objective(config)
        state = init_state(config, objective)
        assert state.frozen.blocks.ffn.fc_in.kernel.dtype == (jnp.int8 if config.quantize else jnp.float32)
        rng = np.random.default_rng(0)
        model = jax.tree.map(
            lambda x, rng=rng: jax.device_put(rng.standard_normal(x.shape, np.float32) / 8, x.sharding), state.model
        )
        batch = make_batch(Synthetic(config, objective.dit), 0, config.batch)

        def run(state, batch, objective=objective):
            def loss(weights, part):
                return objective.loss(objective.join(weights, state.frozen), part)

            return gradients(loss, state.model, objective.prepare(batch, state.key()), config.accumulate)

        return jax.device_get(jax.jit(run)(dataclasses.replace(state, model=model), batch))


@pytest.fixture(scope="module")
def on_one_device(config):
    """By format of the weights beside the adapters, with everything kept for the backward pass."""
    plain = dataclasses.replace(config, dtype="float32", remat="none")
    return functools.cache(lambda format: loss_and_gradients(dataclasses.replace(plain, quantize=format), MeshShape()))


@pytest.mark.parametrize(("remat", "format"), [("none", None), ("attention", None), ("dots", "int8")])
def test_gradients_are_those_of_one_device(config, on_one_device, remat, format):
    config = dataclasses.replace(config, dtype="float32", remat=remat, quantize=format)
    loss, grads = on_one_device(format)
    loss_mesh, grads_mesh = loss_and_gradients(config, MeshShape(data=2, ring=2, ulysses=2))
    np.testing.assert_allclose(loss, loss_mesh, rtol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(grads))
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_mesh), strict=True):
        assert np.abs(x).max() > 0
        # Where attention is nearly flat, gradients are what rounding leaves of zero.
        np.testing.assert_allclose(x, y, atol=1e-4 * max(np.abs(x).max(), 1e-3 * largest))


@pytest.mark.slow
def test_command_line(config, tmp_path, capsys):
    config_file = write_config(tmp_path / "config.py", dataclasses.replace(config, steps=2))
    argv = ["--config", config_file, "--workdir", str(tmp_path / "run"), "--mesh", "ulysses=8"]
    train_jax.main([*argv, "--steps", "1"])
    first = (tmp_path / "run/lora.safetensors").read_bytes()
    train_jax.main(argv)
    assert f"weights: {tmp_path / 'run/lora.safetensors'}" in capsys.readouterr().out
    assert (tmp_path / "run/lora.safetensors").read_bytes() != first
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint": None, "dit": DIT}, ["lora without a checkpoint", "--checkpoint"]),
        ({"vae": VAEConfig()}, ["lora with the network vae"]),
        ({"lora": None, "quantize": "int8"}, ["--quantize int8 for weights that learn", "set lora"]),
        ({"dit": dataclasses.replace(DIT, num_layers=3)}, ["num_layers 2, the config's dit 3"]),
    ],
)
def test_what_is_refused(config, changes, words):
    with pytest.raises(InputError) as caught:
        make_objective(dataclasses.replace(config, **changes))
    assert all(word in str(caught.value) for word in words)


def test_a_wider_network_starts_from_a_checkpoint(config, tmp_path):
    """And full training of it, too."""
    t2v = dataclasses.replace(DIT, in_channels=16, image_dim=None, image_positions=0)
    save(tmp_path / "t2v", "official", {"dit": DiT(t2v, nnx.Rngs(0))}, pth=False)
    for adapters in (None, config.lora):
        wider = dataclasses.replace(config, checkpoint=str(tmp_path / "t2v"), dit=DIT, lora=adapters)
        with on(MeshShape()):
            objective = make_objective(wider)
            state = init_state(wider, objective)
            assert objective.eval_model(state).patch_embedding.kernel.shape[3] == 36
            assert not np.any(np.asarray(objective.eval_model(state).blocks.cross_attention.v_image.kernel[...]))
        assert (state.frozen is None) == (adapters is None)
