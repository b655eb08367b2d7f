"""Data sets as TOML of musubi-tuner and diffusion-pipe, several sources, how often each comes."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
from tiny import TRAIN
from tiny_videos import encode, gray

from wanjax.config import MixedData, TaskMix, VideoData
from wanjax.data.datasets import read_datasets
from wanjax.data.samples import TaskSamples
from wanjax.data.sources import Source, whole_repeats
from wanjax.errors import InputError
from wanjax.training.data import open_clips

MUSUBI = """
[general]
resolution = [64, 48]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true
bucket_no_upscale = false

[[datasets]]
video_directory = "videos"
cache_directory = "cache/videos"
target_frames = [1, 9]
frame_extraction = "uniform"
frame_sample = 2
source_fps = 16.0

[[datasets]]
image_directory = "images"
cache_directory = "cache/images"
num_repeats = 3
"""
PIPE = """
resolutions = [[64, 48]]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 3
frame_buckets = [1, 9]

[[directory]]
path = "videos"
num_repeats = 2

[[directory]]
path = "images"
frame_buckets = [1]
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("videos", "images"):
        (tmp_path / name).mkdir()
    for name, frames in (("long", 20), ("short", 9)):
        encode(tmp_path / f"videos/{name}.mp4", gray(np.arange(frames) * 10))
        (tmp_path / f"videos/{name}.txt").write_text(name)
    for name in ("wide", "tall"):
        size = (96, 48) if name == "wide" else (48, 96)
        PIL.Image.new("RGB", size, "red").save(tmp_path / f"images/{name}.png")
        (tmp_path / f"images/{name}.txt").write_text(name)
    return tmp_path


def chosen(folder, text):
    (folder / "set.toml").write_text(text)
    return open_clips(dataclasses.replace(TRAIN, data=VideoData(str(folder / "set.toml")), batch=1))


def test_musubi_tuner(folder, capsys):
    """Of each video two pictures and two clips, as `uniform` with two samples says; pictures three times as often."""
    found = chosen(folder, MUSUBI)
    assert "set.toml: batch_size, cache_directory do nothing here" in capsys.readouterr().out
    names = {shape: [found.clips[int(i)].name for i in members] for shape, members in found.buckets.items()}
    assert {shape[0] for shape in names} == {1, 9}
    videos = names.pop((9, 48, 64))
    assert videos == ["long.mp4@0-0.5625", "long.mp4@0.6875-1.25", "short.mp4@0-0.562"]
    assert names[1, 48, 64][0] == "long.mp4@0-0.0625"
    assert sum(name.endswith(".png") for members in names.values() for name in members) == 2
    order = found.order(dataclasses.replace(TRAIN, batch=1))
    seen = [found.clips[order[k]].name for k in range(order.batches)]
    assert seen.count("wide.png") == seen.count("tall.png") == 3 * seen.count("long.mp4@0-0.5625") == 3


def test_diffusion_pipe(folder):
    found = chosen(folder, PIPE)
    shapes = {shape: [found.clips[int(i)].name for i in members] for shape, members in found.buckets.items()}
    assert shapes == {
        (1, 32, 64): ["wide.png"],
        (1, 64, 32): ["tall.png"],
        (9, 48, 48): ["long.mp4", "short.mp4"],
    }
    assert list(found.repeats) == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[datasets]", "cannot be read"),
        ("a = 1", "describes no data set"),
        ("[[datasets]]\n[other]\n", "'other' is not read beside"),
        ("datasets = 3", "describes no data set"),
        ("datasets = [3]", "describes no data set"),
        (
            "[[datasets]]\nimage_directory = 'a'\ncontrol_directory = 'b'",
            "datasets 1: 'control_directory' is not read; acc",
        ),
        ("[[directory]]\npath = 'a'\nmask_path = 'b'", "directory 1: 'mask_path' is not read"),
        ("[[datasets]]\nbatch_size = 1", "datasets 1: no place; accepted: one of video_directory"),
        ("[[datasets]]\nvideo_directory = 'a'\nbucket_no_upscale = true", "bucket_no_upscale = True; accepted: false"),
        ("[[datasets]]\nvideo_directory = 'a'\nframe_extraction = 'tail'", "frame_extraction = tail; accepted: head, "),
        ("[[datasets]]\nvideo_directory = 'a'\ntarget_frames = ['1']", r"target_frames = \['1'\]; accepted: numbers"),
        ("[[datasets]]\nvideo_directory = 3", "video_directory = 3; accepted: text"),
        ("[[datasets]]\nvideo_directory = 'a'\nnum_repeats = 0", "num_repeats = 0; accepted: whole numbers from 1"),
        (
            "[[directory]]\npath = 'a'\nresolutions = [512, 1024]",
            r"resolutions = \[512, 1024\]; accepted: a list",
        ),
        ("[[directory]]\nnum_repeats = 2", "no path"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, text, message):
    (tmp_path / "set.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_datasets(tmp_path / "set.toml")


def test_several_sources_with_shares(folder):
    videos, images = (VideoData(str(folder / name)) for name in ("videos", "images"))
    mixed = MixedData((dataclasses.replace(videos, share=3.0), dataclasses.replace(images, share=1.0)))
    config = dataclasses.replace(TRAIN, data=mixed, batch=1, frames=9, height=48, width=64)
    found = open_clips(config)
    assert list(found.repeats) == [3, 3, 1, 1]
    with pytest.raises(InputError, match="some sources have a share and others none"):
        open_clips(dataclasses.replace(config, data=MixedData((mixed.of[0], images))))


@pytest.mark.parametrize(
    ("repeats", "expected"),
    [((1, 1), [1, 1]), ((2, 3), [2, 3]), ((0.5, 1), [1, 2]), ((1, 1.5), [2, 3]), ((0.1, 1), [1, 10])],
)
def test_repeats_are_whole(repeats, expected):
    assert whole_repeats([Source([0], x) for x in repeats]) == expected


def test_names_that_sources_share(folder):
    """Two files of one name are two clips, and both are named where they are left out."""
    for name in ("videos", "images"):
        (folder / name / "bad.mp4").write_bytes(b"no video")
        (folder / name / "bad.txt").write_text("bad")
    mixed = MixedData((VideoData(str(folder / "videos")), VideoData(str(folder / "images"))))
    found = open_clips(dataclasses.replace(TRAIN, data=mixed, batch=1, frames=9, height=48, width=64))
    names = {found.clips[int(i)].name for members in found.buckets.values() for i in members}
    assert names == {"1: long.mp4", "1: short.mp4", "2: tall.png", "2: wide.png"}
    without = open_clips(dataclasses.replace(TRAIN, data=mixed, batch=1, frames=9, height=48, width=64), stills=False)
    assert {shape[0] for shape in without.buckets} == {9}


def test_settings_of_the_run_reach_the_clips(folder):
    config = dataclasses.replace(
        TRAIN, data=VideoData(str(folder / "videos")), fps=8.0, lengths=(5, 9), ratios=(1.0,), height=48, width=64
    )
    assert {shape[1:] for shape in open_clips(config).buckets} == {(48, 48)}
    assert sorted(shape[0] for shape in open_clips(config).buckets) == [5, 9]  # 20 and 9 frames at 16 fps


def test_samples_of_clips_and_pictures(folder):
    """Of a picture nothing is given to the network: it would be all there is."""
    found = chosen(folder, MUSUBI)
    config = dataclasses.replace(TRAIN, batch=1, tasks=TaskMix(flf2v=1.0, caption_dropout=0.0))

    def tokens(captions):
        return np.ones((1, 3), np.int32), np.ones((1, 3), np.int32)

    samples = TaskSamples(found.clips, found.order(config), config, tokens, 2, 8)
    for k in range(12):
        sample = samples[k]
        assert list(np.flatnonzero(sample.given)) == ([] if len(sample.video) == 1 else [0, 8])
        assert list(sample.has_image) == [len(sample.video) > 1] * 2
