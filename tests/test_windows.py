"""Videos that one run is too short for: windows, clips that go on, loops."""

import dataclasses
import itertools

import numpy as np
import pytest
from tiny import DIFFUSERS, flags, refused
from tiny_experts import SMALL, make_folders, pipeline

from wanjax import media
from wanjax.config import SampleConfig
from wanjax.errors import InputError
from wanjax.sampling import windows
from wanjax.sampling.given import resolved

FIRST, LAST = "docs/pictures/first.png", "docs/pictures/last.png"
RUN = SMALL | {"steps": 1, "guidance": 1.0, "window": 9, "overlap": 3}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return pipeline(make_folders(tmp_path_factory.mktemp("a14b"))["flf2v"], keep="all")


@pytest.mark.parametrize("frames", range(17, 400, 44))
@pytest.mark.parametrize(("window", "overlap"), [(81, 5), (80, 5), (17, 1), (49, 16)])
def test_plans(frames, window, overlap):
    """Windows cover the video, have enough in common, are no longer than asked for, and as few as can be."""
    *starts, length = windows.plan(frames, window, overlap)
    assert length <= min(window, frames)
    assert length % 4 == 1 or length == frames
    assert (starts[0], starts[-1] + length) == (0, frames)
    assert all(b - a <= length - overlap for a, b in itertools.pairwise(starts))
    assert len(starts) == max(1, -(-(frames - overlap) // ((window - 1) // 4 * 4 + 1 - overlap)))


def test_the_plan_of_the_documents():
    assert windows.plan(241, 81, 5) == [0, 59, 117, 176, 65]
    assert windows.plan(233, 81, 5) == [0, 76, 152, 81]


def record(pipe, **settings):
    asked = []
    result = windows.run(pipe, windows.prepare(pipe, **settings), asked.append, progress=False)
    return result, asked


def test_windows_begin_with_what_came_before_and_end_on_the_last_frame(pipe):
    settings = RUN | {"frames": 17, "first_frame": FIRST, "last_frame": LAST, "keyframe": (f"7={LAST}",)}
    result, asked = record(pipe, **settings)
    assert len(result.video) == 17
    assert [tuple(np.flatnonzero(x.given)) for x in asked] == [(0, 7), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 8)]
    assert len({x.config.seed for x in asked}) == len(asked)
    *starts, length = windows.plan(17, 9, 3)
    for request, start, before in zip(asked[1:], starts[1:], starts, strict=False):
        common = before + length - start
        shown = np.round((np.clip(request.frames[:common], -1, 1) + 1) * 127.5)
        np.testing.assert_array_equal(shown, result.video[start : start + common])
    same = np.clip(asked[0].frames[-1], -1, 1)  # the same picture, of the same field
    np.testing.assert_allclose(asked[-1].frames[-1], same, atol=0.51 / 127.5)
    assert result.evaluations == len(asked)


def test_one_window_is_the_plain_run(pipe):
    settings = RUN | {"frames": 9, "first_frame": FIRST, "last_frame": LAST}
    result, _ = record(pipe, **settings)
    np.testing.assert_array_equal(result.video, pipe(**settings, progress=False).video)


def test_a_clip_goes_on(pipe, tmp_path):
    """Its last frames are the first, at the size that the clip has."""
    clip = np.random.default_rng(0).integers(60, 200, (12, 1, 1, 3), np.uint8).repeat(32, 1).repeat(48, 2)
    media.write_video(tmp_path / "clip.mp4", clip, 16)
    plain = {k: x for k, x in RUN.items() if k not in ("window", "height", "width")}
    request = pipe.prepare(**plain | {"frames": 9, "area": 32 * 48}, continue_=str(tmp_path / "clip.mp4"))
    assert (request.height, request.width) == (32, 48)
    assert list(np.flatnonzero(request.given)) == [0, 1, 2]
    assert np.abs((request.frames + 1) * 127.5 - clip[-3:]).max() < 8  # through the codec
    assert "frames 0, 1, 2 given to a i2v network by mask and latents alone" in request.notes[0]


def test_a_loop_comes_back_by_two_windows(pipe):
    result, asked = record(pipe, **RUN | {"frames": 13, "window": None, "first_frame": FIRST, "loop": True})
    assert len(result.video) == 12
    assert [request.given[0] and request.given[-1] for request in asked] == [False, True]
    np.testing.assert_allclose(asked[1].frames[-1], np.clip(asked[0].frames[0], -1, 1), atol=0.51 / 127.5)


def test_seams():
    video = np.zeros((9, 2, 2, 3), np.uint8) + 10 * np.arange(9, dtype=np.uint8)[:, None, None, None]
    video[5:] += 20
    assert windows.seams(video, [3, 5]) == pytest.approx({3: 1.0, 5: 3.0})
    assert windows.seams(video, [0]) == pytest.approx({0: 10.0})


def test_bad_input(pipe, tmp_path):
    with pytest.raises(InputError, match="--window 5 with --overlap 5; windows longer than"):
        windows.sample(pipe, **RUN | {"frames": 17, "window": 5, "overlap": 5, "first_frame": FIRST})
    with pytest.raises(InputError, match="a loop, or a window shorter than the video, which one request cannot make"):
        pipe.prepare(**RUN | {"frames": 17, "first_frame": FIRST})
    for extra, words in (
        ({}, "without --first-frame"),
        ({"first_frame": FIRST, "last_frame": LAST}, "with --last-frame"),
    ):
        with pytest.raises(InputError, match=f"--loop {words}; a first frame is accepted"):
            resolved(SampleConfig(loop=True, **extra))
    media.write_video(tmp_path / "clip.mp4", np.zeros((3, 16, 16, 3), np.uint8), 16)
    short = SampleConfig(continue_=str(tmp_path / "clip.mp4"), overlap=9)
    with pytest.raises(InputError, match=r"--continue .*clip.mp4 \(0.19 s long, which is less than 9 frames at 16"):
        resolved(short)
    with pytest.raises(InputError, match=r"--continue nowhere.mp4 \(.*; a video of at least --overlap frames"):
        resolved(dataclasses.replace(short, continue_="nowhere.mp4"))
    with pytest.raises(InputError, match="with --first-frame; the clip's last frames come first"):
        resolved(dataclasses.replace(short, first_frame=FIRST))
    refused(
        flags(DIFFUSERS, frames=17, window=9, save_latents=tmp_path / "a.npy"), ["--save-latents for a video of wi"]
    )


def test_networks_that_take_no_frames_say_so(tmp_path):
    folder = make_folders(tmp_path)["t2v"]
    t2v = pipeline(folder)
    with pytest.raises(InputError, match="windows or a loop with a t2v checkpoint, which does not take the frames"):
        windows.sample(t2v, **RUN | {"frames": 17})
