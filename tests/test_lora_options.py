"""Adapters as people train them: ranks by layer, exclusions, dropout, LoRA+, DoRA, from a file, over merged files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import DIT, TRAIN, assert_close, assert_same_model, on, random_dit, random_inputs, values, velocity

from sharding.mesh import MeshShape
from sharding.rules import shard_parameters
from wanjax.config import LoRAConfig, LoRATarget
from wanjax.data.batch import make_batch
from wanjax.data.synthetic import Synthetic
from wanjax.errors import InputError
from wanjax.models.layers import QuantizedLinear
from wanjax.training.objectives import make_objective
from wanjax.training.optimizer import make_optimizer
from wanjax.training.step import gradients
from wanjax.weights import Checkpoint, lora, save
from wanjax.weights.lora_files import LoRAFile
from wanjax.weights.lora_targets import chosen
from wanjax.weights.lora_training import start_from, with_dropout

DORA = LoRAConfig(rank=4, alpha=2.0, dora=True)


@pytest.fixture(scope="module")
def dit():
    return jax.tree.map(jnp.asarray, random_dit())


@pytest.fixture(scope="module")
def checkpoint(dit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save(folder, "official", {"dit": dit}, pth=False)
    return folder


def trained(dit, config, seed=3):
    """With adapters that do something."""
    dit, rng = lora.attach(dit, config, nnx.Rngs(0)), np.random.default_rng(seed)
    for layer in lora.linear_layers(dit).values():
        if layer.lora is not None:
            layer.lora.b = layer.lora.b.replace(jnp.asarray(rng.normal(0, 0.1, layer.lora.b.shape), jnp.float32))
            if layer.lora.magnitude is not None:
                m = layer.lora.magnitude
                layer.lora.magnitude = m.replace(m[...] * jnp.asarray(rng.uniform(0.5, 1.5, m.shape), jnp.float32))
    return dit


def seen(dit):
    noise, condition, text, image = random_inputs(1)
    latents = np.concatenate([noise, condition], axis=-1)
    return np.asarray(velocity(dit, latents, np.float32([500.0]), text, image))


# ------------------------------------------------------------------------------------------------------------- layers


def test_ranks_and_alphas_by_target(dit):
    config = LoRAConfig(
        rank=8,
        alpha=4.0,
        targets=("self_attention", LoRATarget("self_attention.v", rank=2), LoRATarget(r"blocks\.ffn\..*", 3, 1.5)),
        exclude=("k", r".*\.fc_out"),
    )
    layers = lora.linear_layers(lora.attach(dit, config, nnx.Rngs(0)))
    found = {path: (x.lora.rank, x.lora.alpha) for path, x in layers.items() if x.lora is not None}
    assert found == {
        "blocks.self_attention.q": (8, 4.0),
        "blocks.self_attention.v": (2, 2),
        "blocks.self_attention.o": (8, 4.0),
        "blocks.ffn.fc_in": (3, 1.5),
    }


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoRAConfig(targets=("q", "quite")), ["LoRA targets quite;", "regular expressions", "blocks.ffn.fc_in"]),
        (LoRAConfig(exclude=("nothing",)), ["LoRA targets nothing;"]),
        (LoRAConfig(targets=("ffn",), exclude=("blocks",)), ["LoRA targets of no layer"]),
        (LoRAConfig(targets=("(q",)), ["'(q' is no regular expression"]),
    ],
)
def test_targets_that_name_nothing_are_refused(dit, config, words):
    with pytest.raises(InputError) as error:
        chosen(config, lora.linear_layers(dit))
    assert all(word in str(error.value) for word in words), error.value


# --------------------------------------------------------------------------------------------------------------- DoRA


def test_dora_changes_nothing_at_first(dit):
    assert_close(seen(lora.attach(dit, DORA, nnx.Rngs(0))), seen(dit), 1e-5)


def test_dora_is_its_formula(dit):
    """magnitude * (w + s a b) / |w + s a b|, by columns."""
    adapted = trained(dit, DORA)
    layer, merged = adapted.blocks.ffn.fc_in, lora.merge(adapted).blocks.ffn.fc_in
    whole = np.asarray(layer.kernel[...]) + 0.5 * np.asarray(layer.lora.a[...]) @ np.asarray(layer.lora.b[...])
    unit = whole / np.linalg.norm(whole, axis=-2, keepdims=True)
    assert_close(merged.kernel[...], unit * np.asarray(layer.lora.magnitude[...])[:, None], 1e-5, least=0)
    assert not np.allclose(merged.kernel[...], whole, atol=1e-2)


def test_dora_beside_the_weights_is_dora_merged(dit):
    adapted = trained(dit, DORA)
    assert_close(seen(adapted), seen(lora.merge(adapted)), 1e-4)


def test_doras_file_is_read_as_it_was_trained(dit, checkpoint, tmp_path):
    adapted = trained(dit, DORA)
    lora.save(tmp_path / "dora.safetensors", adapted)
    read = lora.load(Checkpoint(checkpoint), DIT, lora.parse([str(tmp_path / "dora.safetensors")]), True)
    merged = values(lora.merge(adapted))
    for path, x in values(read).items():
        assert_close(x, merged[path], 1e-5, least=0)


def test_dora_stands_beside_8_bits(dit):
    linear = jax.tree.map(lambda x: x[0], trained(dit, DORA).blocks.ffn.fc_in)
    quantized = QuantizedLinear(linear, "int8")
    full = jax.tree.map(lambda x: x, linear)
    full.kernel = linear.kernel.replace(quantized.whole())
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, DIT.dim)), jnp.float32)
    apart = np.asarray(quantized(x)) - np.asarray(full(x))
    assert np.abs(apart).max() < 0.05 * np.abs(np.asarray(full(x))).max()  # tokens are in 8 bits too


# ----------------------------------------------------------------------------------------------------------- learning


def test_lora_plus_is_a_rate_of_the_second_factor(dit):
    adapters = lora.split(trained(dit, LoRAConfig(rank=4)))[0]
    gradient = jax.tree.map(jnp.ones_like, adapters)

    def update(ratio):
        config = dataclasses.replace(TRAIN, learning_rate=0.1, lora=LoRAConfig(rank=4, lr_ratio=ratio))
        optimizer = make_optimizer(config)
        return values(optimizer.update(gradient, optimizer.init(adapters), adapters)[0])

    plain, plus = update(1.0), update(16.0)
    for path, x in plain.items():
        np.testing.assert_allclose(plus[path], x * (16 if path.endswith(".b") else 1), rtol=1e-6, err_msg=path)


def test_magnitudes_do_not_decay(dit):
    adapters = lora.split(trained(dit, DORA))[0]
    optimizer = make_optimizer(dataclasses.replace(TRAIN, learning_rate=0.1, weight_decay=0.5, lora=DORA))
    still = jax.tree.map(jnp.zeros_like, adapters)
    for path, x in values(optimizer.update(still, optimizer.init(adapters), adapters)[0]).items():
        assert np.any(x) == ("magnitude" not in path), path


def test_dropout_drops_a_share_and_keeps_the_mean(dit):
    adapted = with_dropout(trained(dit, LoRAConfig(rank=4)), 0.25, jax.random.key(0))
    keys = adapted.blocks.ffn.fc_in.lora.key, adapted.blocks.self_attention.q.lora.key
    assert len({tuple(x) for key in keys for x in np.asarray(key).tolist()}) == 2 * DIT.num_layers  # each has its own
    adapter = jax.tree.map(lambda x: x[0], adapted.blocks.ffn.fc_in.lora)
    adapter.a = adapter.a.replace(jnp.eye(DIT.dim, dtype=jnp.float32))
    adapter.b = adapter.b.replace(jnp.eye(DIT.dim, dtype=jnp.float32))
    adapter.alpha = DIT.dim
    out = np.asarray(adapter(jnp.ones((4, 100, DIT.dim))))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / 0.75)}
    assert np.mean(out == 0) == pytest.approx(0.25, abs=0.01)


@pytest.mark.slow
def test_dora_and_dropout_on_a_mesh(checkpoint):
    """Losses and gradients are those of one device: what is dropped is drawn for the whole batch."""
    config = dataclasses.replace(
        TRAIN,
        checkpoint=str(checkpoint),
        lora=LoRAConfig(rank=4, dora=True, dropout=0.3, targets=("q", "ffn", "head")),
        accumulate=2,
    )
    results = []
    for shape in (MeshShape(), MeshShape(data=2, ring=2, ulysses=2)):
        with on(shape):
            objective = make_objective(config)
            adapters, frozen = lora.split(shard_parameters(trained(objective.load(), config.lora)))
            batch = make_batch(Synthetic(config, DIT), 0, config.batch)

            def run(adapters, frozen, batch, objective=objective):
                prepared = objective.prepare(batch, jax.random.key(0))

                def loss(weights, part):
                    return objective.loss(objective.join(weights, frozen), part)

                whole = objective.join(adapters, frozen)
                without = jnp.mean(objective.losses(whole, prepared))
                return gradients(loss, adapters, prepared, config.accumulate), without

            results.append(jax.device_get(jax.jit(run)(adapters, frozen, batch)))
    ((loss, grads), without), ((loss_mesh, grads_mesh), _) = results
    assert abs(loss - without) > 1e-3 * abs(loss)
    np.testing.assert_allclose(loss, loss_mesh, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_mesh), strict=True):
        assert np.abs(x).max() > 0
        np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(x).max())


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dora", [False, True])
def test_a_run_starts_from_a_file(dit, tmp_path, dora):
    before = trained(dit, LoRAConfig(rank=4, alpha=2.0, dora=dora))
    lora.save(tmp_path / "before.safetensors", before)
    fresh = lora.attach(dit, LoRAConfig(rank=4, alpha=8.0, dora=dora), nnx.Rngs(7))
    begun = start_from(fresh, LoRAFile(tmp_path / "before.safetensors"))
    ours, theirs = values(begun), values(before)
    for path in theirs:
        scale = 2.0 / 8.0 if path.endswith("lora.b") else 1.0  # the product counts the same
        np.testing.assert_allclose(ours[path], scale * theirs[path], rtol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoRAConfig(rank=8), ["has factors of shapes", "the run"]),
        (LoRAConfig(rank=4, targets=("ffn",)), ["where the run has no adapter"]),
        (LoRAConfig(rank=4, targets=(*LoRAConfig().targets, "head")), ["in 0 layers head.linear"]),
        (LoRAConfig(rank=4, dora=True), ["magnitudes are needed"]),
    ],
)
def test_a_start_that_does_not_fit_is_refused(dit, tmp_path, config, words):
    lora.save(tmp_path / "before.safetensors", trained(dit, LoRAConfig(rank=4)))
    with pytest.raises(InputError) as error:
        start_from(lora.attach(dit, config, nnx.Rngs(0)), LoRAFile(tmp_path / "before.safetensors"))
    assert all(word in str(error.value) for word in words), error.value


def test_files_are_merged_into_the_base_before(dit, checkpoint, tmp_path):
    file = str(tmp_path / "style.safetensors")
    lora.save(file, trained(dit, LoRAConfig(rank=4)))
    config = dataclasses.replace(TRAIN, checkpoint=str(checkpoint), lora=LoRAConfig(rank=2, merge=(f"{file}:0.5",)))
    with on():
        objective = make_objective(config)
        objective.check(MeshShape())
        loaded = objective.load()
    assert_same_model(
        lora.detach(loaded), lora.load(Checkpoint(checkpoint), objective.dit, lora.parse([f"{file}:0.5"]), True)
    )
    bad = dataclasses.replace(config, lora=LoRAConfig(merge=(str(tmp_path / "none.safetensors"),)))
    with pytest.raises(InputError, match=r"none.safetensors is not a .safetensors file"):
        make_objective(bad).check(MeshShape())
