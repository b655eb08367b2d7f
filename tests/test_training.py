"""The step's optimiser, what makes a step fail, and every run that cannot be made."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DIT, TRAIN, on

import train_jax
from sharding.mesh import MeshShape
from wanjax.data.batch import Batches, make_batch
from wanjax.data.synthetic import Synthetic
from wanjax.errors import InputError
from wanjax.training import checks
from wanjax.training.objectives import make_objective
from wanjax.training.objectives.flow_matching import FlowMatching
from wanjax.training.optimizer import learning_rate
from wanjax.training.state import abstract_state, init_state
from wanjax.training.step import train_step

CONFIG = dataclasses.replace(TRAIN, dit=DIT, accumulate=2, learning_rate=1e-2, ema_decay=0.9, dtype="bfloat16")


@pytest.fixture(scope="module")
def mesh():
    with on(MeshShape(data=1, fsdp=2, ring=2, ulysses=2)) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def run(mesh):
    """A compiled step in bfloat16, and the state of step 0 on the host, as the step overwrites what it is given."""
    objective = make_objective(CONFIG)
    assert objective.dit.dtype == jnp.bfloat16
    state = init_state(CONFIG, objective)
    batch = make_batch(Synthetic(CONFIG, objective.dit, distinct=1), 0, CONFIG.batch)
    train = functools.partial(train_step, objective)
    step = jax.jit(train, donate_argnums=0)
    return step, state, jax.device_get(state), batch


def place(host, like):
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), host, like)


def test_state_is_sharded_from_the_start(mesh, run):
    _, _, host, _ = run
    abstract = abstract_state(CONFIG, make_objective(CONFIG))
    arrays = [leaf for leaf in jax.tree.leaves(abstract) if leaf.ndim]
    assert all(leaf.dtype == jnp.float32 for leaf in arrays)
    assert len(arrays) == 4 * len(jax.tree.leaves(host.model))  # weights, their average and two moments
    whole = [leaf for leaf in arrays if leaf.sharding.is_fully_replicated]
    assert sum(leaf.size for leaf in whole) < 0.03 * sum(leaf.size for leaf in arrays)  # vectors
    for leaf in arrays:
        here = np.prod(leaf.sharding.shard_shape(leaf.shape))
        assert leaf.sharding.is_fully_replicated or here == leaf.size / 8


@pytest.mark.slow
def test_overfits_one_sample(mesh, run):
    step, _, host, batch = run
    state = place(host, abstract_state(CONFIG, make_objective(CONFIG)))
    losses = []
    for _ in range(60):
        before = state
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
        assert metrics.finite
    assert all(x.is_deleted() for x in jax.tree.leaves(before.model))  # donated
    assert int(state.step) == 60
    for new, old in zip(
        jax.tree.leaves(state), jax.tree.leaves(abstract_state(CONFIG, make_objective(CONFIG))), strict=True
    ):
        assert new.sharding == old.sharding
        assert new.dtype == old.dtype
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5]), losses


def test_a_step_that_is_not_finite_changes_nothing(mesh, run):
    step, _, host, batch = run
    state = place(host, abstract_state(CONFIG, make_objective(CONFIG)))
    state, metrics = step(state, batch._replace(text=batch.text * jnp.nan))
    assert not metrics.finite
    for new, old in zip(jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(host), strict=True):
        np.testing.assert_array_equal(new, old)


def test_batches_do_not_depend_on_the_mesh_and_continue(mesh):
    source = Synthetic(CONFIG, DIT)
    batches = Batches(source, 4)
    next(batches)
    second = jax.device_get(next(batches))
    assert batches.position == 2
    resumed = jax.device_get(next(Batches(source, 4, position=1)))
    jax.tree.map(np.testing.assert_array_equal, second, resumed)
    for i in range(4):
        for ours, sample in zip(second, source[4 + i], strict=True):
            np.testing.assert_array_equal(ours[i], sample)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mesh fsdp=3", "use data=1,fsdp=8,ring=1,ulysses=1"),
        ("--mesh fsdp=2,tensor=4", "cannot read 'tensor=4'"),
        ("--mesh fsdp=8 --batch 12", "use --batch 16"),
        ("--mesh fsdp=8 --batch 8 --accumulate 2", "use --batch 16"),
        ("--mesh ring=8 --batch 3 --accumulate 2", "use --batch 4"),
        ("--mesh ring=8 --steps 0", "--steps 0"),
        ("--mesh ring=8 --learning-rate nan", "--learning-rate nan"),
        ("--mesh ring=8 --seed -1", "--seed -1"),
        ("--mesh ring=8 --seed 99999999999", "--seed 99999999999"),
        ("--mesh ring=8 --remat all", "invalid choice"),
        ("--mesh ring=8 --checkpoint tests/golden/diffusers", "one with fewer inputs, is needed"),
        ("--mesh ring=8 --processes 2", "--processes 2 without --coordinator, --process-id"),
        ("--coordinator here --processes 2 --process-id 2", "--process-id 0..N-1"),
    ],
)
def test_bad_input(monkeypatch, flags, message):
    def no_cluster(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", no_cluster)
    with pytest.raises(InputError) as error:
        train_jax.main(["--config", "configs/train_tiny.py", *flags.split()])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_heads_that_ulysses_does_not_divide():
    with pytest.raises(InputError, match="ulysses=8 cannot split 12"):
        checks.check(CONFIG, FlowMatching(CONFIG, dataclasses.replace(DIT, num_heads=12)), MeshShape(ulysses=8))


def test_too_few_steps_for_the_learning_rate_to_rise_and_fall():
    config = dataclasses.replace(CONFIG, steps=8, warmup=4, cooldown=5)
    with pytest.raises(InputError, match="use --steps 9 or more"):
        checks.check(config, FlowMatching(config, DIT), MeshShape())


@pytest.mark.parametrize("cooldown", [0, 5])
def test_learning_rate_rises_and_falls(cooldown):
    config = dataclasses.replace(CONFIG, steps=20, warmup=4, cooldown=cooldown, learning_rate=1.0)
    rates = [float(learning_rate(config)(step)) for step in (0, 2, 4, 14, 20)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 1, 0 if cooldown else 1], rtol=1e-6)


@pytest.mark.parametrize("start", [0, 100])  # while it forgets faster, and when it does as configured
def test_the_average_follows_its_formula(mesh, run, start):
    """ema' = d ema + (1 - d) model', d = min(ema_decay, (1 + n) / (10 + n)) in step n; both begin as one."""
    step, _, host, batch = run
    average = [np.float64(x) for x in jax.tree.leaves(host.model)]
    for ours, wanted in zip(jax.tree.leaves(host.ema), average, strict=True):
        np.testing.assert_array_equal(ours, wanted)
    state = place(host, abstract_state(CONFIG, make_objective(CONFIG)))
    state = dataclasses.replace(state, step=jax.device_put(np.int32(start), state.step.sharding))
    for n in range(start, start + 4):
        state, _ = step(state, batch)
        decay = min(0.9, (1 + n) / (10 + n))
        weights = jax.tree.leaves(jax.device_get(state.model))
        average = [decay * old + (1 - decay) * np.float64(new) for old, new in zip(average, weights, strict=True)]
        ours = jax.tree.leaves(jax.device_get(state.ema))
        for x, wanted in zip(ours, average, strict=True):
            np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=1e-6)
        assert max(np.abs(x - new).max() for x, new in zip(ours, weights, strict=True)) > 5e-4  # steps are of 1e-2
    assert decay == (0.9 if start else 4 / 13)
    objective = make_objective(CONFIG)
    assert objective.eval_model(state) is state.ema
    assert objective.eval_model(dataclasses.replace(state, ema=None)) is state.model


def test_muon_updates_kernels_and_leaves_the_mesh_alone(mesh, run):
    """Every kernel's update is orthogonal: its singular values are about as large as one another."""
    _, _, _host, batch = run
    config = dataclasses.replace(CONFIG, optimizer="muon", learning_rate=0.02, weight_decay=0.0)
    objective = make_objective(config)
    state = init_state(config, objective)
    step = jax.jit(functools.partial(train_step, objective))
    new, metrics = step(state, batch)
    assert metrics.finite
    assert [x.sharding for x in jax.tree.leaves(new)] == [x.sharding for x in jax.tree.leaves(state)]
    change = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), new.model, state.model)
    singular = np.linalg.svd(change.head.linear.kernel[...], compute_uv=False)
    # The learning rate, but for the roughness of Newton and Schulz's iteration, where there is any gradient.
    np.testing.assert_allclose(singular[:10], 0.02, rtol=0.4)
