"""Two experts (Wan2.2-A14B): against diffusers, in both layouts, resident and in turn; and every bad input."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny import GOLDEN, relative_error
from tiny_experts import CASES, SMALL, make_folders, pipeline

from sharding.mesh import MeshShape, make_mesh
from wanjax.config import SampleConfig
from wanjax.diffusion import solvers
from wanjax.errors import InputError
from wanjax.sampling import steps
from wanjax.sampling.memory import EXPERTS_SHARE, choose_resident
from wanjax.weights import Checkpoint, convert, networks


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("a14b"))


@pytest.fixture(scope="module")
def official(folders, tmp_path_factory):
    """The first case in the official layout."""
    path = tmp_path_factory.mktemp("official") / "checkpoint"
    convert(folders["flf2v"], path, "official", pth=False)
    return path


@functools.cache
def expected(case):
    with np.load(GOLDEN / f"a14b_{case}/expected.npz") as file:
        return dict(file)


def request(case, folder, **changes):
    """The settings of a case's run."""
    said = json.loads((GOLDEN / f"a14b_{case}/case.json").read_text())
    taken = ("prompt", "negative_prompt", "height", "width", "frames", "steps", "guidance", "guidance_low", "shift")
    np.save(folder.parent / f"{case}.npy", expected(case)["init_noise"])
    pictures = {"first_frame": GOLDEN / "a14b_flf2v/first.png", "last_frame": GOLDEN / "a14b_flf2v/last.png"}
    return {
        **{name: said[name] for name in taken},
        **({} if case == "t2v" else {name: str(path) for name, path in pictures.items()}),
        "conventions": "diffusers",
        "initial_noise": str(folder.parent / f"{case}.npy"),
        **changes,
    }


def assert_equal_to_reference(result, case):
    latents = np.moveaxis(result.latents, -1, 1)
    assert np.abs(latents - expected(case)["pipeline_latents"]).max() <= 2e-3
    video = expected(case)["pipeline_video_f16"].astype(np.float32)[0]
    assert np.abs(result.video / 255 - video).max() <= 2 / 255


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(folders, case):
    pipe = pipeline(folders[case], experts="swap")
    said = json.loads((GOLDEN / f"a14b_{case}/case.json").read_text())
    ready = pipe.prepare(**request(case, folders[case]))
    assert [(p.expert, p.first, p.stop, p.branches) for p in ready.phases] == [
        ("dit", 0, said["steps_high"], 2),
        ("dit_low", said["steps_high"], said["steps"], 2),
    ]
    result = pipe(ready)
    assert_equal_to_reference(result, case)
    assert pipe.networks.loaded == ()
    assert result.evaluations == said["steps"]


@pytest.mark.parametrize("experts", ["resident", "swap"])
def test_the_official_layout_equals_diffusers(official, experts):
    checkpoint = Checkpoint(official)
    assert (checkpoint.experts, checkpoint.boundary, checkpoint.layout) == (2, 0.9, "official")
    pipe = pipeline(official, experts=experts)
    assert pipe.resident == (experts == "resident")
    assert_equal_to_reference(pipe(**request("flf2v", official)), "flf2v")


@pytest.mark.parametrize("mesh", [pytest.param("data=2,ulysses=4", marks=pytest.mark.slow), "fsdp=2,ring=2,ulysses=2"])
def test_eight_devices_equal_diffusers(folders, mesh):
    for experts in ("resident", "swap"):
        pipe = pipeline(folders["flf2v"], mesh=mesh, experts=experts)
        result = pipe(**request("flf2v", folders["flf2v"]), decode=experts == "swap")
        latents = np.moveaxis(result.latents, -1, 1)
        assert np.abs(latents - expected("flf2v")["pipeline_latents"]).max() <= 2e-3


# ------------------------------------------------------------------------------------------------------------ features


@pytest.fixture(scope="module")
def t2v(folders):
    return pipeline(folders["t2v"], keep="all")


@pytest.mark.parametrize("settings", [{"cache": "fixed:2"}, {"cfg_cache": "2"}, {"fast": True}])
def test_a_cache_begins_anew_with_the_second_expert(t2v, settings):
    """What the first expert left is never added to what the second one computes."""
    run = SMALL | {"steps": 8, "guidance": 4.0, "boundary_step": 3}
    rules = t2v.prepare(**run, **settings).rules
    if rules.recompute is not None:
        assert list(rules.recompute) == [True, False, True, True, False, True, False, True]
    if rules.may_skip_uncond is not None:
        assert not rules.may_skip_uncond[[0, 3]].any()
        assert rules.may_skip_uncond[4:].all()
    plain, cached = t2v(**run, decode=False), t2v(**run, **settings, decode=False)
    assert cached.evaluations < plain.evaluations == 8
    assert 0 < relative_error(cached.latents, plain.latents) < 0.5


def test_guidance_by_step(t2v):
    """Steps of scale 1 run one branch; they equal a run of which no step has another."""
    run = SMALL | {"steps": 4, "boundary_step": 2}
    ready = t2v.prepare(**run, guidance=(4.0, 1.0, 1.0, 1.0))
    assert [(p.expert, p.first, p.stop, p.branches) for p in ready.phases] == [
        ("dit", 0, 1, 2), ("dit", 1, 2, 1), ("dit_low", 2, 4, 1)
    ]  # fmt: skip
    result = t2v(ready, decode=False)
    assert np.abs(result.latents - t2v(**run, guidance=1.0, decode=False).latents).max() > 1e-3
    close = t2v(**run, guidance=(4.0, 1.0 + 1e-6, 1.0, 1.0), decode=False)
    np.testing.assert_allclose(result.latents, close.latents, atol=1e-3)
    by_expert = t2v(**run, guidance=4.0, guidance_low=2.0, decode=False)
    by_step = t2v(**run, guidance=(4.0, 4.0, 2.0, 2.0), decode=False)
    np.testing.assert_array_equal(by_expert.latents, by_step.latents)


@pytest.mark.parametrize(("experts", "frames"), [("resident", 9), ("swap", 13)])
def test_a_change_of_expert_compiles_nothing(folders, experts, frames):
    compiled = []
    pipe = pipeline(folders["t2v"], experts=experts)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    try:
        counts = []
        run = SMALL | {"steps": 4, "frames": frames, "guidance": 3.0, "boundary_step": 2}
        pipe(**run, decode=False, on_step=lambda step: counts.append(len(compiled)))
    finally:
        jax.monitoring.clear_event_listeners()
    assert counts[0] > 0
    assert counts == counts[:1] * 4


def test_calibration_knows_the_experts(folders, tmp_path):
    from wanjax.sampling.calibrate import calibrate, report

    file = str(tmp_path / "c.json")
    config = SampleConfig(checkpoint=str(folders["t2v"]), dtype="float32", compile_cache="off", **SMALL, steps=6)
    measured = calibrate(dataclasses.replace(config, boundary_step=3))
    assert (measured.starts, measured.boundary) == ((0, 3), "step 3")
    assert measured.residual_change[2] == 0  # between the experts nothing is compared
    assert min(measured.residual_change[:2] + measured.residual_change[3:]) > 0
    assert "magcache" in report(measured)
    measured.write(file)
    pipe = pipeline(folders["t2v"], keep="all")
    run = SMALL | {"steps": 6, "calibration": file, "boundary_step": 3}
    for kind in ("teacache:1e9", "magcache:1e9"):
        recompute = pipe.prepare(**run, cache=kind).rules.recompute
        assert recompute[[0, 3]].all()
        assert not recompute[[2, 4]].any()
    with pytest.raises(InputError, match=r"is for boundary step 3, this run has 0\.875"):
        pipe.prepare(**run | {"boundary_step": None}, cache="magcache:1")


def test_8_bits_and_adapters(folders, tmp_path):
    """Quantised within the format's own error; adapters reach the expert that they are for."""
    run = SMALL | {"steps": 2, "guidance": 1.0, "boundary_step": 1, "decode": False}
    plain = pipeline(folders["t2v"])(**run).latents
    for settings in ({"quantize": "int8"}, {"quantize": "fp8"}, {"attention": "int8fp8"}):
        assert 0 < relative_error(pipeline(folders["t2v"], **settings)(**run).latents, plain) < 0.05
    file = adapter(tmp_path / "lora.safetensors")
    results = {}
    for flag in ("lora", "lora_high", "lora_low"):
        stored = [np.asarray(pipeline(folders["t2v"], **{flag: (f"{file}:2",)})(**run).latents)]
        stored.append(pipeline(folders["t2v"], **{flag: (f"{file}:2",)}, lora_merge=False)(**run).latents)
        np.testing.assert_allclose(*stored, atol=1e-4)
        results[flag] = stored[0]
    both = pipeline(folders["t2v"], lora_high=(f"{file}:2",), lora_low=(f"{file}:2",))(**run).latents
    np.testing.assert_array_equal(both, results["lora"])
    assert len({float(np.abs(x - plain).sum()) for x in results.values()}) == 3
    assert all(relative_error(x, plain) > 1e-3 for x in results.values())


def adapter(path):
    """A LoRA of one layer of the tiny experts."""
    rng = np.random.default_rng(0)
    tensors = {
        f"diffusion_model.blocks.1.ffn.0.lora_{x}.weight": rng.standard_normal(shape).astype(np.float32) / 4
        for x, shape in (("A", (4, 128)), ("B", (160, 4)))
    }
    safetensors.numpy.save_file(tensors, path)
    return path


def test_last_frame_alone(folders):
    settings = request("flf2v", folders["flf2v"], first_frame=None)
    ready = pipeline(folders["flf2v"]).prepare(**settings)
    assert ready.task == "last"
    assert list(np.flatnonzero(ready.given)) == [16]


def test_there_and_back(folders, official, tmp_path):
    """Conversion is to the bit, and keeps the boundary that the official layout cannot say."""
    for folder in ("high_noise_model", "low_noise_model"):
        assert json.loads((official / folder / "config.json").read_text())["model_type"] == "i2v"
    convert(official, tmp_path / "back", "diffusers")
    for file in (f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "transformer_2")):
        assert (tmp_path / "back" / file).read_bytes() == (folders["flf2v"] / file).read_bytes()
    assert (tmp_path / "back/model_index.json").read_text() == (folders["flf2v"] / "model_index.json").read_text()

    shutil.copytree(official, tmp_path / "official", ignore=shutil.ignore_patterns("wanjax_extra"))
    convert(tmp_path / "official", tmp_path / "made", "diffusers")
    assert json.loads((tmp_path / "made/model_index.json").read_text())["boundary_ratio"] == 0.9
    index = tmp_path / "made/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"boundary_ratio": 0.7}))
    convert(tmp_path / "made", tmp_path / "again", "official", pth=False)
    assert Checkpoint(tmp_path / "again").boundary == 0.7


def test_quantize_writes_both(folders, tmp_path):
    from wanjax.commands import quantize

    quantize.main(["--checkpoint", str(folders["t2v"]), "--output", str(tmp_path / "q"), "--format", "int8"])
    written = Checkpoint(tmp_path / "q")
    assert [written.config(name).quantize for name in ("dit", "dit_low")] == ["int8", "int8"]
    assert written.boundary == 0.875


# ------------------------------------------------------------------------------------------------------------- choices


def test_both_stay_where_they_fit(folders, monkeypatch):
    pipe = pipeline(folders["t2v"])
    both = pipe.networks.bytes_of("dit") + pipe.networks.bytes_of("dit_low")
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    for memory, resident in ((1.01 * both / EXPERTS_SHARE, True), (0.99 * both / EXPERTS_SHARE, False)):
        monkeypatch.setattr("wanjax.sampling.memory.memory_bytes", lambda _, n=memory: n)
        assert choose_resident("auto", pipe.networks, mesh) == resident
        assert choose_resident("resident", pipe.networks, mesh)
        assert not choose_resident("swap", pipe.networks, mesh)


def test_the_second_is_read_while_the_first_works(folders, monkeypatch):
    read = []
    monkeypatch.setattr(networks, "read_through", lambda files: read.append(networks_read(files)))
    networks_read = lambda files: [file.parent.name for file in files]  # noqa: E731
    pipe = pipeline(folders["t2v"], experts="swap")
    pipe(**SMALL, steps=2, guidance=1.0, boundary_step=1, decode=False)
    assert read == [["transformer_2"]]
    file = folders["t2v"] / "transformer_2/diffusion_pytorch_model.safetensors"
    monkeypatch.undo()
    assert networks.read_through([file, file.with_name("nothing")], chunk=1000) == file.stat().st_size


def test_defaults_of_the_official_layout(folders, tmp_path):
    """Neither boundary nor shift is in its files: Wan2.2's own are taken."""
    convert(folders["t2v"], tmp_path / "c", "official", pth=False)
    shutil.rmtree(tmp_path / "c/wanjax_extra")
    pipe = pipeline(tmp_path / "c")
    assert pipe.networks.checkpoint.boundary == 0.875
    ready = pipe.prepare(**SMALL | {"shift": None, "negative_prompt": None})
    assert ready.shift == 12
    given = pipeline(folders["flf2v"]).prepare(**request("flf2v", folders["flf2v"], negative_prompt=None))
    np.testing.assert_array_equal(given.tokens[0][1], ready.tokens[0][1])  # one negative prompt for all tasks


def test_steps_of_high():
    schedule = solvers.make_schedule("euler", 4, 5.0, "official")
    assert list(schedule.timesteps) == [1000, 937, 833, 625]
    high = functools.partial(steps.steps_of_high, schedule=schedule)
    assert high(SampleConfig(), boundary=0.9) == 2
    assert high(SampleConfig(), boundary=0.937) == 2
    assert high(SampleConfig(boundary=1.0), boundary=0.9) == 1
    assert high(SampleConfig(boundary_step=0), boundary=0.9) == 0
    assert high(SampleConfig(), boundary=None) == 4


BAD = {
    "boundary": ({"boundary": 1.2}, r"--boundary 1\.2; a number from 0 to 1 is accepted"),
    "step": ({"boundary_step": 9, "steps": 4}, r"--boundary-step 9 of 4 steps; 0 to 4 is accepted"),
    "two boundaries": ({"boundary": 0.5, "boundary_step": 1}, "one of them is accepted"),
    "too few scales": ({"guidance": (3.0, 1.0), "steps": 4}, "--guidance 3,1 for 4 steps"),
    "no number": ({"guidance": (3.0, float("nan"))}, "guidance .3.0, nan.; a number"),
    "two lists": ({"guidance": (3.0, 1.0), "guidance_low": 2.0}, "leave --guidance-low out"),
}


@pytest.mark.parametrize(("settings", "words"), BAD.values(), ids=BAD)
def test_bad_requests(t2v, settings, words):
    with pytest.raises(InputError, match=words) as caught:
        t2v.prepare(**SMALL | settings)
    assert "\n" not in str(caught.value)


def test_one_dit_has_no_second_expert():
    folder, run = GOLDEN / "diffusers", {**SMALL, "first_frame": "docs/pictures/first.png"}
    for name, value in (("boundary", 0.9), ("boundary_step", 1), ("guidance_low", 2.0)):
        with pytest.raises(InputError, match=r"with a checkpoint of one DiT; two experts are needed"):
            pipeline(folder).prepare(**run, **{name: value})
    with pytest.raises(InputError, match=r"--lora-low x with a checkpoint of one DiT.*give it as --lora"):
        pipeline(folder, lora_low=("x",))
    with pytest.raises(InputError, match=r"--experts swap with a checkpoint of one DiT; two experts are needed"):
        pipeline(folder, experts="swap")


def test_experts_that_do_not_belong_together(folders, tmp_path):
    shutil.copytree(folders["t2v"], tmp_path / "c")
    file = tmp_path / "c/transformer_2/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ffn_dim": 96}))
    with pytest.raises(InputError, match="experts of ffn_dim 160 for high noise and 96 for low; two of the same sizes"):
        pipeline(tmp_path / "c")
    shutil.rmtree(file.parent)
    with pytest.raises(InputError, match="transformer_2/ is missing"):
        pipeline(tmp_path / "c")
