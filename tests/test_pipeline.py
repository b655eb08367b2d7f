"""The Python API: networks and requests apart, one result, and nothing done twice."""

import dataclasses

import huggingface_hub
import jax
import numpy as np
import PIL.Image
import pytest
from tiny import DIFFUSERS, flags
from tiny_checkpoints import without_images

import sample_jax
import wanjax
from wanjax import demo
from wanjax.config import NETWORK_FIELDS, DiTConfig, SampleConfig
from wanjax.errors import InputError
from wanjax.sampling.memory import choose_keep
from wanjax.weights import hub

CALL = {
    "prompt": "a red kite",
    "first_frame": "docs/pictures/first.png",
    "last_frame": "docs/pictures/last.png",
    "height": 32,
    "width": 48,
    "frames": 5,
    "steps": 2,
    "guidance": 2.0,
}


@pytest.fixture(scope="module")
def pipe():
    return wanjax.Pipeline.from_pretrained(DIFFUSERS, keep="all", dtype="float32", compile_cache="off")


@pytest.fixture(scope="module")
def result(pipe):
    return pipe(**CALL)


@pytest.fixture
def compiled():
    """Functions that JAX compiles, by name."""
    names = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: names.append(event) if event.endswith("backend_compile_duration") else None
    )
    yield names
    jax.monitoring.clear_event_listeners()


def test_a_second_request_compiles_and_loads_nothing(pipe, result, compiled):
    loads = pipe.networks.loads
    assert loads == 4
    again = pipe(**CALL | {"prompt": "a boat", "seed": 1, "guidance": 3.0})
    assert compiled == []
    assert pipe.networks.loads == loads
    assert np.abs(again.latents - result.latents).max() > 0.1
    pipe(**CALL | {"frames": 9})  # what is counted does happen for another shape
    assert compiled


def test_one_network_at_a_time_gives_the_same(result):
    pipe = wanjax.Pipeline.from_pretrained(DIFFUSERS, keep="one", dtype="float32", compile_cache="off")
    for loads in (4, 8):
        np.testing.assert_array_equal(pipe(**CALL).latents, result.latents)
        assert pipe.networks.loads == loads
    assert pipe.networks.loaded == ()


def test_the_command_line_is_a_user_of_it(result, tmp_path):
    paths = {"output": tmp_path / "v.npy", "save_latents": tmp_path / "l.npy"}
    other = {"negative_prompt": None, "conventions": None, "solver": None, "initial_noise": None, "shift": None}
    sample_jax.main(flags(DIFFUSERS, **other, **CALL | paths))
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), result.video)
    np.testing.assert_array_equal(np.moveaxis(np.load(tmp_path / "l.npy"), 1, -1), result.latents)


def test_pictures_are_paths_images_or_arrays(pipe, result):
    first = PIL.Image.open(CALL["first_frame"])
    last = np.asarray(PIL.Image.open(CALL["last_frame"]).convert("RGB"))
    np.testing.assert_array_equal(pipe(**CALL | {"first_frame": first, "last_frame": last}).latents, result.latents)


def test_every_step_is_told(pipe, result):
    told = []
    pipe(**CALL, on_step=lambda step: told.append((step.done, step.steps, np.asarray(step.latents))))
    assert [x[:2] for x in told] == [(1, 2), (2, 2)]
    np.testing.assert_array_equal(told[-1][2], result.latents)

    class StopError(Exception):
        pass

    def stop(step):
        raise StopError

    with pytest.raises(StopError):
        pipe(**CALL, on_step=stop)
    np.testing.assert_array_equal(pipe(**CALL).latents, result.latents)  # the pipeline can go on


def test_a_result_shows_and_saves_itself(result, tmp_path):
    assert result.video.shape == (5, 32, 48, 3)
    assert result.video.dtype == np.uint8
    assert set(result.seconds) == {"text", "images", "VAE encode", "DiT", "denoise", "VAE decode"}
    assert result.evaluations == 2
    assert repr(result).startswith("Result(5 frames of 48x32 at 16 fps, ")
    assert "<video" in result._repr_html_()
    path = result.save(tmp_path / "v.npy")
    np.testing.assert_array_equal(np.load(path), result.video)
    assert result.save(tmp_path / "v.mp4").stat().st_size > 500


def test_the_demo():
    config = demo.get_config()
    given = {field: getattr(config, field) for field in ("dtype", "height", "width", "frames")}
    pipe = wanjax.Pipeline.from_pretrained(str(demo.FOLDER), **given)
    assert pipe.networks.keep == "all"  # it is small
    request = pipe.prepare(first_frame=config.first_frame, last_frame=config.last_frame, prompt=config.prompt)
    assert request.task == "flf2v"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantize": "int8"}, ["setting quantize='int8'", "Pipeline.from_pretrained", "accepted: ", "prompt"]),
        ({"promt": "x"}, ["setting promt='x'", "accepted: ", "prompt"]),
        ({"frames": 18}, ["18 frames", "4n+1"]),
        ({"first_frame": None, "last_frame": None}, ["no frame", "flf2v"]),
        ({"first_frame": np.zeros((4, 4))}, ["array float64 [4, 4]", "uint8 [H, W, 3]"]),
    ],
)
def test_bad_requests_are_one_line(pipe, settings, words):
    with pytest.raises(InputError) as caught:
        pipe(**CALL | settings)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_bad_pipelines_are_one_line():
    with pytest.raises(InputError, match="setting promt='x'; accepted: "):
        wanjax.Pipeline.from_pretrained(DIFFUSERS, promt="x")
    with pytest.raises(InputError, match="keep 'some'; one, all and auto are accepted"):
        wanjax.Pipeline.from_pretrained(DIFFUSERS, keep="some")
    with pytest.raises(InputError, match="no checkpoint"):
        wanjax.Pipeline(SampleConfig())


def test_network_fields_are_fields():
    assert set(NETWORK_FIELDS) < {field.name for field in dataclasses.fields(SampleConfig)}


def test_what_does_not_fit_is_not_kept(pipe, monkeypatch):
    for fits, keep in ((2, "all"), (1.9, "one")):
        monkeypatch.setattr("wanjax.sampling.memory.memory_bytes", lambda _, n=fits: n * pipe.networks.bytes())
        assert choose_keep("auto", pipe.networks, pipe.mesh) == keep


@pytest.mark.parametrize("layout", ["diffusers", "official"])
def test_frames_without_an_image_branch(layout, tmp_path):
    """36 channels and no CLIP, as Wan2.2's: mask and latents alone say what is given, first and last frame too."""
    without_images(layout, tmp_path / "c", 36, "i2v")
    pipe = wanjax.Pipeline.from_pretrained(tmp_path / "c", dtype="float32", compile_cache="off")
    assert (pipe.dit.task, pipe.dit.tasks) == ("i2v", ("i2v", "flf2v", "last"))
    both, first = pipe(**CALL), pipe(**CALL | {"last_frame": None})
    assert np.abs(both.latents - first.latents).max() > 0.01
    assert set(both.seconds) == {"text", "VAE encode", "DiT", "denoise", "VAE decode"}
    with pytest.raises(
        InputError, match="no frame given to a i2v checkpoint, which takes --first-frame, --last-frame or"
    ):
        pipe(**CALL | {"first_frame": None, "last_frame": None})


@pytest.mark.parametrize(("model_type", "shifts"), [("i2v", (5, 5)), ("flf2v", (16, 5))])
def test_the_shift_is_the_networks(model_type, shifts, tmp_path):
    """A last frame makes no first-last-frame network of Wan2.2's, in either layout of one checkpoint."""
    without_images("official", tmp_path / "c", 36, model_type)
    pipe = wanjax.Pipeline.from_pretrained(tmp_path / "c", dtype="float32", compile_cache="off")
    assert (pipe.prepare(**CALL).shift, pipe.prepare(**CALL | {"last_frame": None}).shift) == shifts


def test_what_a_network_can_be_asked_for():
    t2v = DiTConfig(in_channels=16, image_dim=None, image_positions=0)
    tasks = {
        t2v: ("t2v",),
        dataclasses.replace(t2v, in_channels=36): ("i2v", "flf2v", "last"),
        DiTConfig(image_positions=0): ("i2v",),
        DiTConfig(): ("i2v", "flf2v"),
        DiTConfig(model_type="i2v"): ("i2v",),
        DiTConfig(in_channels=16): ("i2v", "flf2v"),  # by CLIP alone
    }
    assert {config: config.tasks for config in tasks} == tasks


# ------------------------------------------------------------------------------------------------------------- the hub


def test_a_name_of_the_hub(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or DIFFUSERS)
    assert wanjax.Pipeline.from_pretrained("Some-One/a.checkpoint").networks.checkpoint.layout == "diffusers"
    assert asked == ["Some-One/a.checkpoint"]
    hub.checkpoint_folder(DIFFUSERS)  # a folder is a folder
    hub.checkpoint_folder("nowhere/at/all")
    assert asked == ["Some-One/a.checkpoint"]


def test_the_hub_is_out_of_reach(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"Some-One/nothing is no folder here, and the Hugging Face hub does not give"):
        hub.checkpoint_folder("Some-One/nothing")


def test_without_the_hubs_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'wanjax\[hub\]'"):
        hub.checkpoint_folder("Some-One/nothing")
