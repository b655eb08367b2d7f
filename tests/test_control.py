"""Training gives the network what sampling gives it: mask, control latents and image features of the same pictures."""

import dataclasses

import numpy as np
import PIL.Image
import pytest

from sharding.rules import parameter_sharding
from wanjax.conditioning.frames import TEMPORAL_FACTOR
from wanjax.config import SampleConfig, ShapesData, TaskMix, TrainConfig
from wanjax.data.batch import make_batch
from wanjax.demo.shapes import Shapes
from wanjax.sampling import pipeline
from wanjax.training import checks
from wanjax.training.data import open_data

CHECKPOINT = "tests/golden/diffusers"
FRAMES, SIZE = 9, 32


@pytest.mark.parametrize(("task", "ends"), [("i2v", {"first": 0}), ("flf2v", {"first": 0, "last": -1})])
def test_the_conditions_are_those_of_sampling(tmp_path, task, ends):
    """The mask to the bit; what VAE and CLIP say up to float32 rounding, as sampling encodes chunk by chunk."""
    tasks = dataclasses.replace(TaskMix(caption_dropout=0.0), **{task: 1.0})
    size = {"frames": FRAMES, "height": SIZE, "width": SIZE, "dtype": "float32"}
    config = TrainConfig(checkpoint=CHECKPOINT, data=ShapesData("all", 0, 1), tasks=tasks, batch=1, **size)
    video, files = Shapes(0, 1, FRAMES, SIZE)[0].video, {}
    for name, i in ends.items():
        files[f"{name}_frame"] = str(tmp_path / f"{name}.png")
        PIL.Image.fromarray(video[i]).save(files[f"{name}_frame"])
    request = pipeline.prepare(SampleConfig(checkpoint=CHECKPOINT, **files, **size))
    assert request.task == task
    with pipeline.placed(request):
        data = open_data(config, checks.objective(config))
        batch = data.encode(make_batch(data.source, 0, 1))
        vae = request.checkpoint.load("vae", request.vae, parameter_sharding)
        control, image = np.asarray(pipeline.encode_control(request, vae)), np.asarray(pipeline.encode_images(request))
    ours, theirs = np.split(np.asarray(batch.control), [TEMPORAL_FACTOR], -1), np.split(control, [TEMPORAL_FACTOR], -1)
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5 * np.abs(control).max())
    np.testing.assert_allclose(batch.image, image, atol=1e-5 * np.abs(image).max())
