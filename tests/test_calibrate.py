"""The calibration command: what it measures, what its file is valid for, and the caches that use it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny import DIFFUSERS, DIT, GUIDANCE, SCHEDULE, flags, random_dit, random_inputs, refused

import sample_jax
from sharding.mesh import MeshShape, make_mesh
from wanjax.commands.calibrate import main, read_prompts
from wanjax.config import SampleConfig
from wanjax.diffusion.caching import Cached, Rules, magnitude_schedule
from wanjax.diffusion.denoise import denoise, network_input, start
from wanjax.diffusion.guidance import guided
from wanjax.errors import InputError
from wanjax.report import programs
from wanjax.sampling import calibrate, calibration
from wanjax.sampling.pipeline import Pipeline
from wanjax.weights import Checkpoint

STEPS = 6
RUN = {"steps": STEPS, "guidance": 2}


def command(**changes):
    """Flags of the golden case, as the command takes them."""
    return flags(DIFFUSERS, **RUN, **changes)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    (folder / "prompts").write_text('a red kite\n\n{"prompt": "a boat", "seed": 3}\n')
    main(command(prompts=folder / "prompts", prompt=None, output=folder / "c.json"))
    return folder / "c.json"


def test_measures_what_the_caches_need(measured):
    c = calibration.read(str(measured))
    assert (c.steps, c.prompts, c.task, c.shift, c.solver, c.conventions) == (
        STEPS,
        2,
        "flf2v",
        5,
        "unipc",
        "diffusers",
    )
    assert len(c.sigmas) == len(c.magnitude) == STEPS
    assert len(c.input_change) == len(c.residual_change) == STEPS - 1
    assert min(c.input_change + c.residual_change) > 0
    assert c.magnitude[0] == 0
    ratios = c.ratios(np.array(c.sigmas))
    np.testing.assert_allclose(np.log(ratios), np.diff(c.magnitude, prepend=0), atol=1e-12)
    foretold = np.polyval(c.polynomial, c.input_change)
    assert np.abs(foretold - c.residual_change).max() < np.ptp(c.residual_change) + 1e-6
    # The suggested thresholds do run the blocks in half of the steps, and lower ones in more.
    halves = {
        "teacache": lambda t: calibrate.change_schedule(np.maximum(foretold, 0), t),
        "magcache": lambda t: magnitude_schedule(ratios, t),
    }
    assert c.thresholds.keys() == halves.keys()
    for kind, threshold in c.thresholds.items():
        assert halves[kind](threshold).sum() <= STEPS / 2 < halves[kind](threshold * 0.97).sum()
    # With guidance also what the CFG cache needs.
    assert len(c.difference_change) == STEPS - 1
    assert min(c.difference_change) > 0


def test_the_report_says_which_steps_run(measured):
    c = calibration.read(str(measured))
    head, *rows = calibrate.report(c).splitlines()
    table, suggestions = rows[:STEPS], rows[STEPS:]
    assert [row.split()[0] for row in table] == [str(i) for i in range(STEPS)]
    assert head.split()[-3:] == ["error", "teacache", "magcache"]
    assert table[3].split()[5] == f"{(c.guidance - 1) * c.difference_change[2]:.4f}"
    for column, (kind, schedule) in enumerate(calibrate.schedules(c).items()):
        ran = np.flatnonzero(schedule(c.thresholds[kind])).tolist()
        assert [i for i, row in enumerate(table) if row.split()[column - 2] == "runs"] == ran
        steps = " ".join(map(str, ran))
        assert f"half of the steps: --cache {kind}:{c.thresholds[kind]:g} runs steps {steps}" in suggestions


@pytest.mark.parametrize(
    ("changes", "words"),
    [((0.2, 0.2, 0.01, 0.01, 0.01), "--cfg-cache 2 from step 3 of 6 on (50%)"), ((0.2,) * 5, "--cfg-cache 2 nowhere")],
)
def test_the_report_says_where_the_cfg_cache_starts(measured, changes, words):
    c = calibration.read(str(measured))
    assert words in calibrate.report(dataclasses.replace(c, difference_change=changes))


def test_without_guidance(tmp_path, capsys):
    """Nothing about the CFG cache; and files from before it was measured are read, as if there had been none."""
    main([*command(output=tmp_path / "c.json"), "--guidance", "1", "--steps", "3"])
    out = capsys.readouterr().out
    assert "guided error" not in out
    assert "runs steps 0" in out
    values = json.loads((tmp_path / "c.json").read_text())
    assert values["difference_change"] == []
    before = {name: x for name, x in values.items() if name != "difference_change"}
    (tmp_path / "before.json").write_text(json.dumps(before))
    assert calibration.read(str(tmp_path / "before.json")) == calibration.read(str(tmp_path / "c.json"))


def test_the_error_of_the_restored_branch_is_the_one_measured():
    """What the CFG cache does to the guided velocity, one step after both branches ran."""
    rules = Rules(None, None, None, uncond_interval=np.int32(2), may_skip_uncond=jnp.ones(STEPS, bool))
    dit = random_dit()
    noise, image_condition, text, image = random_inputs(2)
    context, schedule = dit.context(text, image), jax.tree.map(jnp.asarray, SCHEDULE)

    plain = (dit, context, image_condition, GUIDANCE)
    skips, never = Cached(*plain, rules), Cached(*plain, rules._replace(may_skip_uncond=~rules.may_skip_uncond))

    @jax.jit
    def velocities(i, sample, cache):
        tokens = dit.embed(network_input(sample, image_condition), schedule.timesteps[i][None])
        velocity, after = never.branch_velocities(i, tokens, cache)
        restored, _ = skips.branch_velocities(i, tokens, cache)
        return velocity, restored, after

    predictor, cache = calibrate.Measured(*plain), skips.init(noise)
    carry = start(predictor, noise)
    for i in range(4):
        velocity, restored, cache = velocities(i, carry[0].sample, cache)
        carry = denoise(predictor, SCHEDULE, carry, i, i + 1)
        if i:
            error = jnp.abs(guided(restored, GUIDANCE, 2) - guided(velocity, GUIDANCE, 2)).mean()
            foretold = (GUIDANCE - 1) * carry[1].change.cfg_delta * jnp.abs(velocity[0]).mean()
            np.testing.assert_allclose(error, foretold, rtol=1e-4)


def test_a_run_takes_the_file(measured, tmp_path, capsys):
    cache = f"teacache:{calibration.read(str(measured)).thresholds['teacache']}"
    run = RUN | {"output": tmp_path / "v.npy", "calibration": measured}
    sample_jax.main(flags(DIFFUSERS, **run, cache=cache))
    evaluations = float(capsys.readouterr().out.split("DiT evaluations: ")[1].split()[0])
    assert 2 <= evaluations < STEPS
    config = sample_jax.parse(flags(DIFFUSERS, **{**run, "steps": 9, "cache": "magcache:0.1"}))
    assert Pipeline(config).prepare().rules.recompute.shape == (9,)


def test_resampled_to_other_steps(measured):
    """Over the same range of sigmas the residual grows by the same, in however many steps."""
    c = calibration.read(str(measured))
    sigmas = np.interp(np.linspace(0, 1, 20), np.linspace(0, 1, STEPS), c.sigmas)
    np.testing.assert_allclose(np.prod(c.ratios(sigmas)), np.exp(c.magnitude[-1]), rtol=1e-9)


def test_refused_for_another_run(measured, tmp_path):
    run = {"cache": "magcache:0.1", "calibration": measured, "output": tmp_path / "v.npy"}
    for changes, words in (
        ({"shift": 3}, ["shift 5.0", "shift", "3.0", "wanjax calibrate"]),
        ({"solver": "euler"}, ["solver unipc", "euler"]),
        ({"conventions": "official"}, ["conventions diffusers", "official"]),
        ({"last_frame": None}, ["task flf2v", "i2v"]),
    ):
        refused(flags(DIFFUSERS, **{**RUN, **run, **changes}), words)
    other = tmp_path / "other"
    shutil.copytree(DIFFUSERS, other, ignore=shutil.ignore_patterns("expected.npz"))
    file = other / "transformer/diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({name: x * np.float32(1.01) for name, x in tensors.items()}, file)
    assert calibration.weights_fingerprint(Checkpoint(other)) != calibration.weights_fingerprint(Checkpoint(DIFFUSERS))
    refused(flags(DIFFUSERS, **RUN, **run, checkpoint=other), ["weights", "measure anew"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v | {"magnitude": v["magnitude"][1:]}, ["cannot be used", "wanjax calibrate"]),
        (lambda v: v | {"sigmas": v["sigmas"][::-1]}, ["cannot be used"]),
        (lambda v: v | {"polynomial": []}, ["cannot be used"]),
        (lambda v: v | {"input_change": [float("nan")] * (STEPS - 1)}, ["cannot be used"]),
        (lambda v: v | {"difference_change": [0.1]}, ["cannot be used"]),
        (lambda v: v | {"format": "2"}, ["cannot be used"]),
        (lambda v: {"format": v["format"]}, ["cannot be used"]),
        (lambda v: [1], ["cannot be used"]),
    ],
)
def test_damaged_files(measured, tmp_path, change, words):
    (tmp_path / "bad.json").write_text(json.dumps(change(json.loads(measured.read_text()))))
    with pytest.raises(InputError) as caught:
        calibration.read(str(tmp_path / "bad.json"))
    assert all(word in str(caught.value) for word in ["bad.json", *words])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match=r"bad\.json"):
        calibration.read(str(tmp_path / "bad.json"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 2}, ["2 steps", "3 or more"]),
        ({"prompts": "nowhere.txt"}, ["nowhere.txt", "a prompt a line"]),
        ({"output": "c.txt"}, ["c.txt", ".json"]),
        ({"checkpoint": "nowhere"}, ["nowhere"]),
        ({"cache": "fixed:2"}, ["--cache", "--help"]),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        main(flags(DIFFUSERS, **{**RUN, **changes}))
    assert all(word in str(caught.value) for word in words), caught.value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [("\n", ["empty"]), ('{"prompt"', ["line 1", "not JSON"]), ('a\n{"steps": 3}', ["line 2", "steps"])],
)
def test_bad_prompts(tmp_path, text, words):
    (tmp_path / "prompts").write_text(text)
    with pytest.raises(InputError) as caught:
        read_prompts(str(tmp_path / "prompts"))
    assert all(word in str(caught.value) for word in words)


def test_fits_on_a_mesh():
    """Traced with branches apart and tokens split, of which the last are padding."""
    config = SampleConfig(height=48, width=64, frames=9)
    mesh = make_mesh(MeshShape(data=2, ring=2, ulysses=2))
    with jax.set_mesh(mesh):
        stage = programs.denoise_step(config, DIT, programs.AbstractInputs(mesh))
        predictor, schedule, (state, _), *steps = stage.arguments
        measured = calibrate.Measured(*vars(predictor).values())
        carry = jax.eval_shape(start, measured, state.sample)
        after, memory = jax.eval_shape(denoise, measured, schedule, carry, *steps)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        assert memory.residual.shape == (2, 36, DIT.dim)
        assert [x.shape for x in memory.change] == [(), (), (), ()]
