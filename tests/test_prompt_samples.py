"""A user's own prompts and pictures, sampled while a run trains."""

import dataclasses

import av
import numpy as np
import PIL.Image
import pytest
from tiny import DIFFUSERS, TRAIN, on

from wanjax.config import DiTConfig, ShapesData
from wanjax.data.prompts import Prompt, read_prompts
from wanjax.errors import InputError
from wanjax.training import checks, prompt_samples
from wanjax.training.log import Log
from wanjax.training.objectives import make_objective
from wanjax.training.prompt_samples import check_prompts
from wanjax.training.validation import open_validation


@pytest.fixture
def pictures(tmp_path):
    for name, colour in (("a.png", (200, 30, 30)), ("b.png", (30, 30, 200))):
        PIL.Image.new("RGB", (64, 48), colour).save(tmp_path / name)
    return tmp_path


def test_files_of_prompts(pictures):
    (pictures / "p.jsonl").write_text(
        '{"prompt": "a cat", "first_frame": "a.png", "last_frame": "b.png", "seed": 7}\n{"prompt": ""}\n'
    )
    (pictures / "p.csv").write_text("prompt,first_frame,last_frame,seed\na cat,a.png,b.png,7\n,,,\n")
    (pictures / "p.txt").write_text("# musubi-tuner's\na cat --i a.png --ei b.png --d 7\n")
    cat = Prompt("a cat", pictures / "a.png", pictures / "b.png", 7)
    assert read_prompts(str(pictures / "p.jsonl")) == [cat, Prompt("", None, None, 0)]
    assert read_prompts(str(pictures / "p.csv")) == [cat, Prompt("", None, None, 0)]
    assert read_prompts(str(pictures / "p.txt")) == [cat]
    assert [x.task for x in read_prompts(str(pictures / "p.jsonl"))] == ["flf2v", "t2v"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.jsonl", '{"prompt": "x", "image": "a.png"}', ["row 1", "image is no column", "first_frame"]),
        ("p.jsonl", '{"first_frame": "a.png"}', ["row 1", "no prompt"]),
        ("p.jsonl", '{"prompt": "x", "last_frame": "c.png"}', ["row 1", "last_frame 'c.png', which is not there"]),
        ("p.jsonl", '{"prompt": "x", "seed": -1}', ["seed -1"]),
        ("p.txt", "x --w 832", ["line 1", "--w; accepted: --i, --ei, --d"]),
        ("p.txt", "# nothing", ["has 0 prompts"]),
        ("p.mp4", "", [".jsonl, .csv, .parquet, .json or .txt"]),
    ],
)
def test_prompts_that_are_none_are_refused(pictures, name, text, words):
    (pictures / name).write_text(text + "\n")
    with pytest.raises(InputError) as error:
        read_prompts(str(pictures / name))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_what_the_network_is_not_built_for_is_refused(pictures):
    (pictures / "p.txt").write_text("x --i a.png\ny --ei b.png\n")
    config = dataclasses.replace(TRAIN, sample_prompts=str(pictures / "p.txt"), sample_every=1)
    with pytest.raises(InputError, match=r"prompt 2 gives last_frame, .* it takes i2v, flf2v; change"):
        check_prompts(config, DiTConfig())
    with pytest.raises(InputError, match="--sample-prompts without --sample-every"):
        checks.check_validation(dataclasses.replace(config, sample_every=0))
    checks.check_validation(config)  # no held-out clips are needed


def test_prompts_are_sampled_with_their_pictures(pictures, monkeypatch):
    """Three prompts two at a time; the same noise whenever they are sampled, so that only the network differs."""
    (pictures / "p.txt").write_text(
        "a red ball --i a.png --ei b.png --d 1\na ball --i a.png --d 1\na --i b.png --d 2\n"
    )
    config = dataclasses.replace(
        TRAIN, workdir=str(pictures), checkpoint=str(DIFFUSERS), data=ShapesData("all", first_seed=0, count=6),
        sample_prompts=str(pictures / "p.txt"), sample_every=4, sample_clips=2, sample_steps=2,
    )  # fmt: skip
    asked = []
    sample = prompt_samples.sample_latents
    monkeypatch.setattr(
        prompt_samples, "sample_latents", lambda model, batch, *a: asked.append((batch, a)) or sample(model, batch, *a)
    )
    with on():
        objective = make_objective(config)
        validation = open_validation(config, objective, objective.open_data(config))
        model = objective.load()
        validation.compile(model)
        assert [a[-1] for _, a in asked] == [0, 0]  # no step is taken to compile
        with Log(pictures, 0) as log:
            assert validation(3, model, log) == {}
            assert validation(4, model, log) == {}
    (first, noise), (second, other) = ((batch, np.asarray(a[1])) for batch, a in asked[2:])
    mask = np.asarray(first.image_condition)[..., :4]
    np.testing.assert_array_equal(mask[:, 0].min((1, 2)), np.ones((2, 4)))  # both are given the first frame
    assert mask[0, -1].max() == 1 > mask[1, -1].max() == 0  # one of them the last, too
    np.testing.assert_array_equal(noise[0], noise[1])
    assert not np.array_equal(noise[0], other[0])
    assert len(second.latents) == 2  # filled up, for the same program
    written = sorted(path.name for path in (pictures / "samples").iterdir())
    assert written == [f"000004-prompt-{i}.mp4" for i in (1, 2, 3)]
    with av.open(str(pictures / "samples/000004-prompt-1.mp4")) as file:
        assert [(f.height, f.width) for f in file.decode(video=0)] == [(32, 32)] * 5
