"""Several clips out of a long video."""

import numpy as np
import pytest
from tiny_videos import encode, gray

from wanjax.data.manifest import Row
from wanjax.data.parts import find_cuts, take_parts
from wanjax.data.videos import Videos


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    path = encode(tmp_path_factory.mktemp("parts") / "long.mp4", gray(np.arange(48) * 5))
    return Row(path, "long.mp4", "words")


def seen(rows, lengths):
    """Of each part, the first frame and how many."""
    clips = Videos(rows, lengths=lengths, area=48 * 64)
    videos = [clips[i].video for i in range(len(clips))]
    return [(round(float(video[0].mean()) / 5), len(video)) for video in videos]


@pytest.mark.parametrize(
    ("take", "expected"),
    [
        ("longest", [(0, 17)]),
        ("head", [(0, 17), (0, 9)]),
        ("chunk", [(0, 17), (17, 17), *((9 * i, 9) for i in range(5))]),
        ("slide", [(0, 17), (16, 17), (0, 9), (16, 9), (32, 9)]),
        ("uniform", [(0, 17), (16, 17), (31, 17), (0, 9), (20, 9), (39, 9)]),
    ],
)
def test_parts(row, take, expected):
    rows = take_parts([row], take, (17, 9), 16.0, stride=1.0, count=3)
    assert seen(rows, (17, 9)) == expected
    assert len({part.name for part in rows}) == len(rows)
    assert {part.caption for part in rows} == {"words"}


def test_parts_of_a_part_and_of_what_cannot_be_used(row, tmp_path):
    part = Row(row.path, "long.mp4@1-2", "", 1.0, 2.0)
    rows = take_parts([part, Row(tmp_path / "gone.mp4", "gone", "")], "chunk", (5,), 16.0)
    assert [x.name for x in rows] == ["long.mp4@1-1.3125", "long.mp4@1.3125-1.625", "long.mp4@1.625-1.9375", "gone"]
    assert seen(rows[:3], (5,)) == [(16, 5), (21, 5), (26, 5)]
    short = Row(row.path, "long.mp4@0-0.1", "", 0.0, 0.1)
    assert take_parts([short], "slide", (5,), 16.0) == [short]


def test_one_clip_a_scene(tmp_path):
    texture = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), np.uint8)
    path = encode(tmp_path / "a.mp4", np.repeat(texture, [12, 20, 9], axis=0))
    rows = take_parts([Row(path, "a.mp4", "")], "cuts", (9,), 16.0)
    assert [(round(x.start * 16, 1), round(x.end * 16, 1)) for x in rows] == [(0, 12), (12, 32), (32, 41)]
    clips = Videos(rows, lengths=(9,), area=48 * 64)
    for i in range(3):
        assert abs(clips[i].video.astype(int) - texture[i]).mean() < 6  # nothing of the next scene


def test_cuts_at_the_very_ends():
    video = np.zeros((12, 24, 32, 3), np.uint8)
    video[1:11] = 255
    assert find_cuts(iter(video), 16) == [1, 11]
