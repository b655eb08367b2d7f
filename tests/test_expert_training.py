"""Training of Wan2.2's two experts: each on its timesteps, one alone or both in one run; and every bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GOLDEN, TRAIN, assert_same_model, on, relative_error, values, write_config
from tiny_experts import make_folders

import train_jax
from sharding.mesh import MeshShape
from wanjax.config import LoRAConfig, ShapesData, TaskMix
from wanjax.data.batch import make_batch
from wanjax.diffusion import flow
from wanjax.errors import InputError
from wanjax.training.loop import make_step
from wanjax.training.objectives import make_objective
from wanjax.training.state import init_state
from wanjax.weights import Checkpoint, convert, lora

SHIFTED = {"mean": 0.3, "std": 0.8, "shift": 5.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("a14b"))


@pytest.fixture(scope="module")
def config(folders):
    return dataclasses.replace(
        TRAIN, checkpoint=str(folders["flf2v"]), lora=LoRAConfig(rank=2), learning_rate=1e-3, shift=5.0, batch=2
    )


@pytest.mark.parametrize("span", [(0.9, 1.0), (0.0, 0.9), (0.2, 0.6)])
def test_the_density_on_a_span_is_the_whole_one_cut_and_renormalised(span):
    """Against rejection: of what is drawn from all noise levels, those in the span."""
    everything = np.asarray(flow.sample_sigmas(jax.random.key(0), 200_000, **SHIFTED))
    kept = everything[(everything >= span[0]) & (everything <= span[1])]
    drawn = np.asarray(flow.sample_sigmas(jax.random.key(1), 100_000, span=span, **SHIFTED))
    assert span[0] <= drawn.min()
    assert drawn.max() <= np.float32(span[1])
    assert abs(len(kept) / len(everything) - flow.share_of(span, **SHIFTED)) < 0.005
    levels = np.linspace(*span, 20)[1:-1]
    ours, theirs = (np.searchsorted(np.sort(x), levels) / len(x) for x in (drawn, kept))
    assert np.abs(ours - theirs).max() < 0.02  # Kolmogorov and Smirnov's bound for the smallest of these samples


def first_step(config, mesh=None):
    with on(mesh):
        objective = make_objective(config)
        state = init_state(config, objective)
        batch = make_batch(objective.open_data(config).source, 0, config.batch)
        before = jax.device_get(state.model)
        results = {}
        for name, turn in objective.turns().items():
            new, metrics = make_step(turn)(jax.tree.map(jnp.copy, state), batch)
            results[name] = jax.device_get((new, metrics))
        return objective, before, results


def test_a_turn_is_a_step_of_that_expert_alone(config):
    """The same adapters, moments, loss; the other expert is as it was."""
    both, before, turns = first_step(dataclasses.replace(config, expert="both"), MeshShape(fsdp=2, ulysses=2))
    assert both.boundary == 0.9
    for expert, name, other in (("high", "dit", "dit_low"), ("low", "dit_low", "dit")):
        state, metrics = turns[name]
        objective, _, alone = first_step(dataclasses.replace(config, expert=expert))
        assert objective.span == {"high": (0.9, 1.0), "low": (0.0, 0.9)}[expert]
        (own, own_metrics) = alone[""]
        assert metrics.parts[f"{expert}_loss"] == metrics.loss
        np.testing.assert_allclose(metrics.loss, own_metrics.loss, rtol=1e-5)
        np.testing.assert_allclose(metrics.grad_norm, own_metrics.grad_norm, rtol=1e-4)
        assert_same_model(state.model[other], before[other])
        assert int(state.step) == 1
        frozen, theirs = values(state.frozen[name]), values(own.frozen)
        assert frozen.keys() == theirs.keys()
        assert all(np.array_equal(frozen[path], theirs[path]) for path in frozen)


def test_steps_are_shared_as_the_density_is(config):
    objective = make_objective(dataclasses.replace(config, expert="both"))
    turns = [objective.turn(step) for step in range(1000)]
    assert abs(turns.count("dit") - 1000 * objective.share) <= 1
    assert 0.2 < objective.share < 0.5  # shift 5: some of everything
    assert [x.config.steps for x in objective.experts.values()] == pytest.approx(
        [turns.count("dit"), turns.count("dit_low")], abs=1
    )


@pytest.mark.slow
def test_command_line(config, folders, tmp_path):
    """On clips, all tasks mixed, without CLIP; the adapters are read by the expert that they are of."""
    held_out = ShapesData("all", first_seed=90, count=2)
    run = dataclasses.replace(
        config,
        expert="both",
        shift=12.0,  # each has a turn
        steps=3,
        data=ShapesData("all", first_seed=0, count=8),
        tasks=TaskMix(t2v=1, i2v=1, flf2v=1, last=1, continuation=1, interpolation=1, max_count=3, max_given=3),
        mesh="fsdp=2,ulysses=4",
        validation=held_out, validate_every=3, validation_batches=1, sample_every=3, sample_steps=3, sample_clips=1,
    )  # fmt: skip
    train_jax.main(["--config", write_config(tmp_path / "config.py", run), "--workdir", str(tmp_path / "run")])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert {name for line in lines for name in line if name in ("high_loss", "low_loss")} == {"high_loss", "low_loss"}
    levels = [float(name.rpartition("_")[2]) for name in lines[-1] if name.startswith("validation/loss_at")]
    assert [sum(x >= 0.9 for x in levels), len(levels)] == [5, 10]
    checkpoint = Checkpoint(folders["flf2v"])
    for name, network in {"high": "dit", "low": "dit_low"}.items():
        path = tmp_path / f"run/lora_{name}.safetensors"
        lora.load(checkpoint, checkpoint.config(network), lora.parse([str(path)]), False, network=network)
    assert (tmp_path / "run/samples/000003.mp4").is_file()


def test_all_weights_of_one_expert_from_the_official_layout(config, folders, tmp_path):
    """The exported checkpoint has the trained expert, and the other and the boundary as they were."""
    convert(folders["flf2v"], tmp_path / "official", "official", pth=False)
    run = dataclasses.replace(
        config, checkpoint=str(tmp_path / "official"), lora=None, expert="low", steps=1, mesh="fsdp=2,ulysses=4"
    )
    train_jax.main(["--config", write_config(tmp_path / "config.py", run), "--workdir", str(tmp_path / "run")])
    before, after = Checkpoint(folders["flf2v"]), Checkpoint(tmp_path / "run/model")
    assert (after.experts, after.boundary) == (2, before.boundary)
    loaded = {name: [c.load(name, c.config(name)) for c in (before, after)] for name in ("dit", "dit_low")}
    assert_same_model(*loaded["dit"])
    (old, new) = (values(model)["blocks.ffn.fc_in.kernel"] for model in loaded["dit_low"])
    assert 0 < relative_error(new, old) < 0.05


def test_an_expert_in_a_file_of_its_own(config, folders, tmp_path):
    """Its config.json beside it says its heads; the boundary is that of Wan2.2's configurations."""
    file = str(next((folders["flf2v"] / "transformer_2").glob("*.safetensors")))
    run = write_config(
        tmp_path / "config.py", dataclasses.replace(config, checkpoint=None, steps=1, mesh="fsdp=2,ulysses=4")
    )
    train_jax.main(["--config", run, "--workdir", str(tmp_path / "run"), "--expert", "low", "--dit-low", file])
    assert (tmp_path / "run/lora_low.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert": None}, ["has two experts", "--expert high, low or both"]),
        ({"checkpoint": str(GOLDEN / "diffusers_t2v"), "expert": "low"}, ["--expert low", "one DiT", "leave --expert"]),
        ({"expert": "low", "boundary": 0.0}, ["--boundary 0", "low noise no timestep"]),
        ({"expert": "both", "boundary": 1.0}, ["--boundary 1", "high noise no timestep"]),
        ({"expert": None, "boundary": 0.5}, ["--boundary 0.5 without an expert"]),
        ({"checkpoint": None, "dit_file": "a.safetensors", "expert": "high"}, ["--dit a.safetensors is no file"]),
    ],
)  # fmt: skip
def test_what_is_refused(config, changes, words):
    with pytest.raises(InputError) as caught:
        make_objective(dataclasses.replace(config, **changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_boundary_outside_of_all_timesteps_is_refused(config):
    with pytest.raises(InputError, match=r"boundary 1\.5.*0 to 1"):
        dataclasses.replace(config, boundary=1.5)


def test_an_expert_that_is_missing_is_refused(config, folders, tmp_path):
    (tmp_path / "half").mkdir()
    for part in ("model_index.json", "transformer", "vae"):
        (tmp_path / "half" / part).symlink_to(folders["flf2v"] / part)
    with pytest.raises(InputError, match="transformer_2/ is missing"):
        make_objective(dataclasses.replace(config, checkpoint=str(tmp_path / "half"), expert="low"))
