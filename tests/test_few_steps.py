"""Lists of noise levels, the solver that renoises, and presets."""

import json

import jax
import numpy as np
import pytest
from tiny import DIFFUSERS, flags, refused, relative_error
from tiny_experts import SMALL, make_folders, pipeline

import sample_jax
from wanjax.config import SampleConfig
from wanjax.diffusion import solvers
from wanjax.errors import InputError
from wanjax.sampling import presets

LIST = (1.0, 0.9375, 0.8333, 0.625)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("a14b"))


@pytest.fixture(scope="module")
def pipe(folders):
    return pipeline(folders["t2v"], keep="all")


@pytest.mark.parametrize("conventions", ["official", "diffusers"])
def test_a_list_holds_under_both_conventions(conventions):
    schedule = solvers.make_schedule("euler", 50, 16.0, conventions, LIST)
    np.testing.assert_array_equal(schedule.sigmas, np.asarray([*LIST, 0], np.float32))
    np.testing.assert_allclose(schedule.timesteps, [1000, 937.5, 833.3, 625])
    truncated = solvers.make_schedule("euler", 50, 16.0, conventions, (*LIST, 0.0), "truncated")
    np.testing.assert_array_equal(truncated.timesteps, [1000, 937, 833, 625])
    exact = solvers.make_schedule("unipc", 4, 5.0, conventions, timesteps="exact")
    np.testing.assert_allclose(exact.timesteps, 1000 * exact.sigmas[:-1])


@pytest.mark.parametrize("solver", ["unipc", "dpmpp", "euler", "lcm"])
@pytest.mark.parametrize("sigmas", [LIST, (0.7, 0.2), (0.5,)])
def test_every_solver_takes_a_list(solver, sigmas):
    """A network that knows x0 gives it, whatever the levels."""
    schedule = solvers.make_schedule(solver, sigmas=sigmas)
    x0, noise = np.array([0.3, -2.0], np.float32), np.array([1.1, 0.6], np.float32)
    state = solvers.init((1 - sigmas[0]) * x0 + sigmas[0] * noise)
    for i in range(len(sigmas)):
        state = solvers.step(schedule, i, state, (state.sample - x0) / schedule.sigmas[i])
    np.testing.assert_allclose(state.sample, x0, atol=1e-6)


def fresh(schedule, i, shape):
    """The noise of an LCM step."""
    key = jax.random.fold_in(jax.random.wrap_key_data(schedule.key), i)
    return np.asarray(jax.random.normal(key, shape, np.float32))


def test_lcm_renoises():
    schedule = solvers.make_schedule("lcm", sigmas=LIST, seed=3)
    other = solvers.make_schedule("lcm", sigmas=LIST, seed=4)
    state, velocity = solvers.init(np.ones((2, 3), np.float32)), np.full((2, 3), 0.25, np.float32)
    noises = []
    for i, (sigma, to) in enumerate(zip(LIST, (*LIST[1:], 0.0), strict=True)):
        x0 = np.asarray(state.sample) - np.float32(sigma) * velocity
        state = solvers.step(schedule, i, state, velocity)
        noises.append(fresh(schedule, i, (2, 3)))
        np.testing.assert_allclose(state.sample, (1 - to) * x0 + to * noises[-1], atol=1e-6)
    assert len({float(x.sum()) for x in noises}) == 4
    assert np.abs(noises[0] - fresh(other, 0, (2, 3))).max() > 0.1


def test_the_noise_is_the_same_on_every_mesh(folders):
    run = SMALL | {"preset": "fastwan3", "decode": False}
    one = pipeline(folders["t2v"])(**run).latents
    eight = pipeline(folders["t2v"], mesh="data=1,fsdp=2,ring=2,ulysses=2")(**run).latents
    np.testing.assert_allclose(eight, one, atol=1e-4)


@pytest.mark.live
@pytest.mark.parametrize("solver", ["euler", "lcm"])
def test_equals_the_same_loop_of_diffusers_modules(pipe, solver):
    """Two experts of diffusers, its scheduler's step for Euler; x0 and our noise for LCM."""
    import diffusers
    import torch

    run = SMALL | {"solver": solver, "sigmas": LIST, "guidance": 1.0}
    ready = pipe.prepare(**run)
    ours = pipe(ready, decode=False).latents
    folder = pipe.networks.checkpoint.path
    experts = [
        diffusers.WanTransformer3DModel.from_pretrained(folder / part) for part in ("transformer", "transformer_2")
    ]
    with pipe.placed():
        text = np.array(pipe.encoders.text(*ready.tokens))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=list(LIST))
    sample = torch.from_numpy(np.moveaxis(ready.noise, -1, 1).copy())
    for i, (timestep, to) in enumerate(zip(scheduler.timesteps, (*LIST[1:], 0.0), strict=True)):
        with torch.no_grad():
            velocity = experts[timestep < 875](sample, timestep[None], torch.from_numpy(text)).sample
        if solver == "euler":
            sample = scheduler.step(velocity, timestep, sample).prev_sample
        else:
            noise = torch.from_numpy(np.moveaxis(fresh(ready.schedule, i, ready.noise.shape), -1, 1).copy())
            sample = (1 - to) * (sample - LIST[i] * velocity) + to * noise
    assert relative_error(np.moveaxis(ours, -1, 1), sample.numpy()) < 1e-5


# -------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_runs(pipe, name):
    ready = pipe.prepare(**SMALL, preset=name)
    levels = presets.read(name)["sigmas"]
    np.testing.assert_allclose(ready.schedule.sigmas[:-1], levels, rtol=1e-6)
    np.testing.assert_allclose(ready.schedule.timesteps, 1000 * np.asarray(levels), rtol=1e-6)
    assert ready.config.steps == len(levels)
    assert [(p.expert, p.stop - p.first, p.branches) for p in ready.phases] == [
        ("dit", 2 if len(levels) == 4 else 1, 1), ("dit_low", 2, 1)
    ]  # fmt: skip
    help = SampleConfig.__dataclass_fields__["preset"].metadata["help"]
    assert name in help


def test_rcm_starts_at_its_first_level(pipe):
    """Its noise is scaled with that, as NVIDIA's code does; all others begin with noise as it is."""
    plain = pipe.prepare(**SMALL).noise
    np.testing.assert_allclose(pipe.prepare(**SMALL, preset="rcm4").noise, plain * np.float32(0.9876543))
    for name in ("fastwan3", "lightning4", "selfforcing4"):
        np.testing.assert_array_equal(pipe.prepare(**SMALL, preset=name).noise, plain)


def test_what_is_said_holds_over_a_preset(pipe, tmp_path):
    ready = pipe.prepare(**SMALL, preset="lightning4", guidance=(3.0, 1.0, 1.0, 1.0))
    assert [p.branches for p in ready.phases] == [2, 1, 1]
    config = sample_jax.parse(["--checkpoint", "x", "--preset", "lightning4", "--guidance", "5"])
    assert (config.guidance, config.sigmas, config.preset) == (5.0, presets.read("lightning4")["sigmas"], None)
    (tmp_path / "mine.json").write_text(json.dumps({"about": "mine", "steps": 3, "solver": "dpmpp"}))
    (tmp_path / "mine.py").write_text("def get_preset():\n    return {'steps': 3, 'solver': 'dpmpp'}\n")
    for file in ("mine.json", "mine.py"):
        config = presets.apply(SampleConfig(shift=7.0), str(tmp_path / file))
        assert config == SampleConfig(shift=7.0, steps=3, solver="dpmpp")
    config = presets.fill(SampleConfig(preset="lightning4", solver="lcm"))
    assert (config.solver, config.guidance, config.preset) == ("lcm", 1.0, None)


BAD = {
    "unknown": ("nothing", None, ["preset nothing; accepted: fastwan3, lightning4"]),
    "not json": ("a.json", "{", ["a.json cannot be read ("]),
    "fails": ("a.py", "1 / 0", ["a.py cannot be read (ZeroDivisionError"]),
    "ends the program": ("a.py", "raise SystemExit(0)", ["a.py cannot be read (SystemExit: 0)"]),
    "no function": ("a.py", "", ["a.py cannot be read (KeyError: 'get_preset')"]),
    "field": ("a.json", '{"prompt": "x"}', ["sets prompt; accepted: solver, steps"]),
    "value": ("a.json", '{"sigmas": 1}', ["sets sigmas = 1, which it cannot be"]),
    "choice": ("a.json", '{"solver": "heun"}', ["solver 'heun'"]),
}


@pytest.mark.parametrize(("name", "text", "words"), BAD.values(), ids=BAD)
def test_bad_presets(pipe, tmp_path, name, text, words):
    path = name if text is None else str(tmp_path / name)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        pipe.prepare(**SMALL, preset=path)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sigmas", [(), (0.5, 0.5), (0.5, 0.7), (1.1, 0.5), (0.5, -0.1), (float("nan"),), (0.0,)])
def test_bad_lists(pipe, sigmas):
    fits = r"sigmas .*(: accepted are numbers that fall, from at most 1 to above 0|numbers above 0 to 1 is accepted)"
    with pytest.raises(InputError, match=fits):
        pipe.prepare(**SMALL, sigmas=sigmas)


def test_bad_flags():
    refused(["--checkpoint", "x", "--sigmas", "1,a"], ["--sigmas", "1,a"])
    refused(flags(DIFFUSERS, sigmas="0.5,0.7"), ["sigmas 0.5,0.7: accepted"])
    refused(flags(DIFFUSERS, preset="lightning4-flf2v"), ["--boundary-step 2 with a checkpoint of one DiT"])


def test_few_step_weights_under_euler_sigmas_that_ruin_them(pipe, folders, tmp_path):
    run = SMALL | {"conventions": "diffusers", "solver": "euler"}
    assert pipe.prepare(**run).notes == ()
    (tmp_path / "Wan2.2-Lightning").symlink_to(folders["t2v"])
    distilled = pipeline(tmp_path / "Wan2.2-Lightning")
    (note,) = distilled.prepare(**run).notes
    assert note.startswith("warning: Wan2.2-Lightning looks like few-step weights")
    for changes in ({"sigmas": LIST}, {"conventions": "official"}, {"preset": "lightning4"}):
        assert distilled.prepare(**run | changes).notes == ()
