"""Pictures at frames: ends, keyframes, and every bad one."""

import types

import numpy as np
import pytest
from tiny import DIFFUSERS, flags, refused
from tiny_checkpoints import make_i2v
from tiny_experts import SMALL, make_folders, pipeline

import sample_jax
from wanjax.config import DiTConfig, SampleConfig
from wanjax.errors import InputError
from wanjax.sampling.given import choose_task, frame_index, pictures_by_frame
from wanjax.sampling.result import given_psnr

FIRST, LAST = "docs/pictures/first.png", "docs/pictures/last.png"
RUN = SMALL | {"frames": 9, "steps": 1, "guidance": 1.0}


@pytest.fixture(scope="module")
def a14b(tmp_path_factory):
    return pipeline(make_folders(tmp_path_factory.mktemp("a14b"))["flf2v"], keep="all")


@pytest.fixture(scope="module")
def flf2v():
    return pipeline(DIFFUSERS, keep="all")


def test_places():
    assert [frame_index(x, 81, 16) for x in ("0", "40", "-1", "50%", "100%", "0%", "2.5s", "0s")] == [
        0, 40, -1, 40, 80, 0, 40, 0
    ]  # fmt: skip
    config = SampleConfig(frames=9, fps=4, last_frame="z", first_frame="a", keyframe=("1s=b", "75%=c", (2, "d=e")))
    assert list(pictures_by_frame(config).items()) == [(0, "a"), (2, "d=e"), (4, "b"), (6, "c"), (8, "z")]


def test_keyframes_are_given_by_mask_and_latents(a14b):
    """A picture at each end by --keyframe is what the other flags give; one between changes the video."""
    ends = a14b(**RUN, first_frame=FIRST, last_frame=LAST, decode=False)
    same = a14b(**RUN, keyframe=(f"0={FIRST}", f"100%={LAST}"), decode=False)
    np.testing.assert_array_equal(ends.latents, same.latents)
    ready = a14b.prepare(**RUN, first_frame=FIRST, last_frame=LAST, keyframe=(f"4={LAST}",))
    assert (ready.task, list(np.flatnonzero(ready.given)), len(ready.frames)) == ("interpolation", [0, 4, 8], 3)
    np.testing.assert_array_equal(ready.frames[1], ready.frames[2])
    assert ready.notes[0].startswith("note: frames 0, 4, 8 given to a i2v network by mask and latents alone")
    assert np.abs(a14b(ready, decode=False).latents - ends.latents).max() > 0.01


def test_one_frame_has_one_picture():
    with pytest.raises(InputError, match="--first-frame and --last-frame of 1 frame; one of them is accepted"):
        pictures_by_frame(SampleConfig(frames=1, first_frame="a.png", last_frame="b.png"))


def test_clip_sees_the_ends_alone(flf2v):
    ends = flf2v.prepare(**RUN, first_frame=FIRST, last_frame=LAST)
    between = flf2v.prepare(**RUN, first_frame=FIRST, last_frame=LAST, keyframe=(f"4={FIRST}",))
    np.testing.assert_array_equal(between.clip_pixels, ends.clip_pixels)
    assert between.shift == ends.shift
    assert np.isfinite(flf2v(between, decode=False).latents).all()


@pytest.mark.parametrize("layout", ["diffusers", "official"])
def test_a_last_frame_for_an_image_to_video_network(layout, tmp_path):
    """Fun-InP: CLIP of the first frame, mask and latents of both, and a line that says so."""
    pipe = pipeline(make_i2v(layout, tmp_path / "c"))
    ready = pipe.prepare(**RUN, first_frame=FIRST, last_frame=LAST)
    assert (ready.task, len(ready.clip_pixels), len(ready.frames)) == ("flf2v", 1, 2)
    assert ready.notes == (
        "note: the last frame given to a i2v network by mask and latents alone; those that learned it reach it "
        "(Fun-InP, a LoRA for keyframes, training with TaskMix.interpolation), others may not",
    )
    alone = pipe.prepare(**RUN, first_frame=FIRST)
    assert alone.notes == ()
    assert np.abs(pipe(ready, decode=False).latents - pipe(alone, decode=False).latents).max() > 0.01
    with pytest.raises(InputError, match="--last-frame given to a i2v checkpoint, which takes --first-frame, alone or"):
        pipe.prepare(**RUN, last_frame=LAST)


BAD = {
    "outside": (f"9={LAST}", "keyframe 9: frame 9 of a video of 9; 0 to 8 is accepted"),
    "negative": (f"-1={LAST}", "keyframe -1: frame -1 of a video of 9"),
    "late": (f"9s={LAST}", "keyframe 9s: frame 144 of a video of 9"),
    "at the first frame": (f"0={LAST}", "keyframe 0: frame 0 has a picture already"),
    "no picture": ("4", "keyframe 4; FRAME=PICTURE is accepted"),
    "no frame": (f"x={LAST}", "keyframe x=..; an index from 0"),
    "nowhere": (f"nan%={LAST}", "keyframe nan%=..; an index from 0"),
}


@pytest.mark.parametrize(("keyframe", "words"), BAD.values(), ids=BAD)
def test_bad_keyframes(a14b, keyframe, words):
    with pytest.raises(InputError) as caught:
        a14b.prepare(**RUN, first_frame=FIRST, keyframe=(keyframe,))
    assert str(caught.value).startswith(words)


def test_twice_and_by_flags(a14b):
    with pytest.raises(InputError, match="frame 4 has a picture already"):
        a14b.prepare(**RUN, keyframe=(f"4={FIRST}", f"50%={LAST}"))
    refused(flags(DIFFUSERS, keyframe="90=x.png"), ["keyframe 90", "0 to 8"])
    config = sample_jax.parse(["--checkpoint", "x", "--keyframe", "4=a.png", "--keyframe", "50%=b.png"])
    assert config.keyframe == ("4=a.png", "50%=b.png")


def test_networks_that_take_none():
    t2v = DiTConfig(in_channels=16, image_dim=None, image_positions=0)
    for settings in ({"keyframe": ("4=a",)}, {"last_frame": "a"}, {"first_frame": "a"}):
        with pytest.raises(InputError, match="given to a t2v checkpoint, which takes no frames"):
            choose_task(t2v, SampleConfig(frames=9, **settings))
    with pytest.raises(InputError, match="--keyframe given to a flf2v checkpoint"):  # CLIP wants the first
        choose_task(DiTConfig(), SampleConfig(frames=9, keyframe=("4=a",)))


def test_how_well_given_frames_come_out(capsys, tmp_path):
    """The demo model shows both ends, and the command says how well."""
    sample_jax.main(["--output", str(tmp_path / "v.npy"), "--compile-cache", "off"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("given frames")]
    first, last = (float(part.split()[2]) for part in line.removeprefix("given frames, decoded: ").split(", "))
    assert min(first, last) >= 31
    assert line == f"given frames, decoded: frame 0 {first} dB, frame 16 {last} dB"
    video, given = np.zeros((2, 4, 4, 3), np.uint8), np.array([True, False])
    ready = types.SimpleNamespace(given=given, frames=np.full((1, 4, 4, 3), -0.8, np.float32))
    assert given_psnr(ready, types.SimpleNamespace(video=video)) == pytest.approx({0: 20.0}, abs=1e-4)
