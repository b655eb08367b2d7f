"""The model that ships with the package: whole, small, and better than what needs no model."""

import numpy as np
import pytest

import sample_jax
from wanjax import demo
from wanjax.conditioning.images import read_image
from wanjax.demo.shapes import ProceduralClips
from wanjax.training.metrics import crossfade, nearest, psnr
from wanjax.weights import Checkpoint


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """What `python sample_jax.py` makes without any settings."""
    path = tmp_path_factory.mktemp("out") / "video.npy"
    sample_jax.main(["--output", str(path)])
    return np.load(path)


@pytest.fixture(scope="module")
def truth():
    return ProceduralClips(demo.SEED, 1, 17, 64, "different")[0]


def test_the_package_is_small_and_complete():
    files = [file for file in demo.FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25e6
    checkpoint = Checkpoint(demo.FOLDER)
    for network in ("dit", "vae", "umt5", "clip"):
        checkpoint.check(network, checkpoint.config(network))


def test_frames_and_caption_are_of_a_held_out_clip(truth):
    config = demo.get_config()
    assert config.prompt == truth.caption
    for path, frame in ((config.first_frame, truth.video[0]), (config.last_frame, truth.video[-1])):
        np.testing.assert_array_equal(np.asarray(read_image(path)), frame)


def test_in_between_is_better_than_without_a_model(video, truth):
    assert video.shape == truth.video.shape
    ours = psnr(video[1:-1], truth.video[1:-1])
    assert ours > psnr(crossfade(truth.video)[1:-1], truth.video[1:-1]) + 5
    assert ours > psnr(nearest(truth.video)[1:-1], truth.video[1:-1]) + 5
    assert psnr(video[[0, -1]], truth.video[[0, -1]]) > 30
