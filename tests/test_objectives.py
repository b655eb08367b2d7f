"""What the VAE and the towers learn from: losses against their formulas, and that both learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TRAIN, VAE, on

from sharding.mesh import MeshShape
from sharding.rules import parameter_sharding
from wanjax.conditioning.frames import to_pixels
from wanjax.conditioning.text import Tokenizer
from wanjax.config import CLIPConfig, DiTConfig, ShapesData, TowersConfig, UMT5Config
from wanjax.data.batch import make_batch
from wanjax.data.samples import ContrastiveSample
from wanjax.demo.shapes import VOCABULARY
from wanjax.demo.vocabulary import vocabulary_size, word_id
from wanjax.errors import InputError
from wanjax.training import checks
from wanjax.training.data import open_clips
from wanjax.training.objectives import make_objective, reconstruction
from wanjax.training.objectives.contrastive import Contrastive, clause_loss
from wanjax.training.state import init_state
from wanjax.training.step import train_step
from wanjax.weights import Checkpoint

TOWERS = TowersConfig(
    umt5=UMT5Config(vocab_size=vocabulary_size(VOCABULARY), dim=16, ffn_dim=24, num_heads=2, head_dim=8, num_layers=2),
    clip=CLIPConfig(image_size=16, patch_size=8, dim=16, mlp_dim=24, num_heads=2, num_layers=2),
    words=VOCABULARY,
    width=8,
)
BASE = dataclasses.replace(
    TRAIN, data=ShapesData("all", first_seed=0, count=300), height=16, width=16, learning_rate=3e-3
)


@pytest.fixture(scope="module")
def mesh():
    with on(MeshShape(data=2, fsdp=2)) as mesh:
        yield mesh


def learn(config, steps):
    """Losses of `steps` steps on one and the same batch, and the state behind them."""
    objective = make_objective(config)
    batch = make_batch(objective.open_data(config).source, 0, config.batch)
    state = init_state(config, objective)
    step = jax.jit(functools.partial(train_step, objective), donate_argnums=0)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    return losses, objective, batch, state


def test_vae_learns_and_is_exported_with_its_statistics(mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruction, "STATISTICS_CLIPS", 8)
    config = dataclasses.replace(BASE, vae=VAE, snippet=(5, 16, 16), workdir=str(tmp_path))
    losses, objective, _, state = learn(config, 30)
    assert losses[-1] < 0.7 * losses[0]
    path = objective.export(objective.eval_model(state))
    checkpoint = Checkpoint(path)
    loaded = checkpoint.config("vae")
    assert loaded.dim_mult == VAE.dim_mult
    vae = checkpoint.load("vae", loaded, parameter_sharding)
    clips = open_clips(config).clips
    numbers = np.linspace(0, 299, 8).astype(int)
    video = jnp.stack([to_pixels(jnp.asarray(clips[int(i)].video)) for i in numbers])
    latents = np.asarray(jax.jit(lambda vae, x: vae.encode(x))(vae, video))
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(latents.std((0, 1, 2, 3)), 1, atol=1e-3)


def test_towers_learn_and_are_exported(mesh, tmp_path):
    config = dataclasses.replace(BASE, towers=TOWERS, workdir=str(tmp_path))
    losses, objective, _batch, state = learn(config, 60)
    assert losses[-1] < 0.5 * losses[0]
    path = objective.export(objective.eval_model(state))
    assert Checkpoint(path).config("umt5").vocab_size == vocabulary_size(VOCABULARY)
    _ids, mask = Tokenizer(path / "tokenizer", 80)(["A red circle, zebra"])
    np.testing.assert_array_equal(mask.sum(), 6)  # with the comma and </s>


def test_contrastive_loss_is_two_cross_entropies(mesh):
    config = dataclasses.replace(BASE, towers=TOWERS, workdir="unused")
    objective = Contrastive(config, TOWERS)
    rng = np.random.default_rng(0)
    clips, right, wrong = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rng.standard_normal((3, 4, 8)))
    ids = rng.integers(3, 9, (4, 2, 80))
    ids[1, 1] = ids[1, 0]  # has no wrong caption

    class Model:
        log_scale = jnp.log(jnp.full((1,), 5.0))

        def embed_pictures(self, pictures):
            return jnp.asarray(clips, jnp.float32)

    texts = [jnp.asarray(x, jnp.float32) for x in (right, wrong)]
    sample = ContrastiveSample(np.zeros((4, 3, 16, 16, 3)), jnp.asarray(ids), jnp.ones((4, 2, 80)))
    loss = float(objective.contrast(Model(), sample, texts))
    of_clips, of_texts = [], []
    for i in range(4):
        candidates = [5 * clips[i] @ right[j] for j in range(4)] + [5 * clips[i] @ wrong[j] for j in (0, 2, 3)]
        of_clips.append(np.log(np.sum(np.exp(candidates))) - 5 * clips[i] @ right[i])
        of_texts.append(np.log(np.sum(np.exp([5 * clips[j] @ right[i] for j in range(4)]))) - 5 * clips[i] @ right[i])
    np.testing.assert_allclose(loss, (np.mean(of_clips) + np.mean(of_texts)) / 2, rtol=1e-5)


def test_tokens_are_to_tell_the_words_of_their_clauses():
    a, b, end = 6, 7, word_id(";")
    ids, mask = jnp.array([[a, a, end, b, 0]]), jnp.array([[True, True, True, True, False]])
    clauses = [{a, end}, {a, end}, {a, end}, {b}, set()]
    right = np.array([[[20.0 if word in clause else -20.0 for word in range(9)] for clause in clauses]])
    assert float(clause_loss(jnp.asarray(right), ids, mask)) < 1e-6
    other = right.copy()
    other[0, 3, a] = 20  # one of four tokens takes a word of another clause for one of its own
    np.testing.assert_allclose(float(clause_loss(jnp.asarray(other), ids, mask)), 20 / 4, rtol=1e-5)
    other[0, 4] = 20  # where there is no token, nothing counts
    np.testing.assert_allclose(float(clause_loss(jnp.asarray(other), ids, mask)), 20 / 4, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae": VAE, "towers": TOWERS}, "networks vae and towers"),
        ({"towers": TOWERS, "accumulate": 2}, "--accumulate for contrastive"),
        ({"vae": VAE, "dit": DiTConfig()}, "networks dit and vae"),
    ],
)
def test_refused(change, message):
    config = dataclasses.replace(BASE, workdir="unused", **change)
    with pytest.raises(InputError, match=message):
        checks.check(config, make_objective(config), MeshShape())
