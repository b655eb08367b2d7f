"""The demo's clips: pure functions of their seeds, hard for a cross-fade, and told apart by their captions."""

import re

import numpy as np
import pytest

from wanjax.demo.shapes import SHAPES, VOCABULARY, ProceduralClips, caption, describe_scene, draw_scene, render
from wanjax.errors import InputError


def psnr(video, other):
    return float(10 * np.log10(255**2 / np.mean((video.astype(float) - other) ** 2)))


def test_a_clip_is_a_function_of_its_seed():
    clips, later = ProceduralClips(10, 20), ProceduralClips(15, 5)
    for i in (4, 0, 2):
        ours, theirs = later[i], clips[5 + i]
        assert ours.name == theirs.name
        assert ours.caption == theirs.caption == caption(15 + i)
        np.testing.assert_array_equal(ours.video, theirs.video)
    assert len({clips[i].video.tobytes() for i in range(20)}) == 20
    assert clips[0].video.shape == (*clips.shape(0), 3)
    assert clips[0].video.dtype == np.uint8


def test_captions_are_of_the_vocabulary():
    words = {word for seed in range(300) for word in re.findall(r"[a-z]+", caption(seed))}
    assert words <= set(VOCABULARY)
    assert len(VOCABULARY) <= 64


def test_ends_do_not_tell_what_lies_between():
    """A cross-fade of the ends and holding the nearer one are what a model has to beat."""
    fades, nearest = [], []
    time = np.linspace(0, 1, 17)[:, None, None, None]
    for i in range(16):
        video = ProceduralClips(0, 16, kind="different")[i].video
        first, last = video[0].astype(float), video[-1].astype(float)
        fades.append(psnr(video[1:-1], (first + (last - first) * time)[1:-1]))
        nearest.append(psnr(video[1:-1], np.where(time < 0.5, first, last)[1:-1]))
    assert np.mean(fades) < 20
    assert np.mean(nearest) < 20


def test_different_clips_differ_more_between_their_ends():
    def changes(kind):
        videos = [ProceduralClips(0, 32, frames=2, kind=kind)[i].video for i in range(32)]
        return np.array([np.mean(np.abs(v[0].astype(float) - v[-1])) for v in videos])

    assert np.sum(changes("different") < 6) == 0
    assert np.sum(changes("all") < 6) >= 4


def test_the_caption_tells_the_way():
    scene = next(s for s in map(draw_scene, range(100)) if s.figures[-1].bend == 1 and s.figures[-1].verb == "moves")
    bent = render(scene, 5, 64)
    straight = render(scene._replace(figures=(*scene.figures[:-1], scene.figures[-1]._replace(bend=0))), 5, 64)
    np.testing.assert_array_equal(bent[[0, -1]], straight[[0, -1]])
    assert psnr(bent[2], straight[2]) < 25


def test_fine_clips_are_the_different_ones_drawn_better():
    different, fine = ProceduralClips(3, 1, kind="different")[0], ProceduralClips(3, 1, kind="fine")[0]
    assert different.caption == fine.caption
    assert psnr(different.video, fine.video) > 30
    assert not np.array_equal(different.video, fine.video)


def test_only_the_words_for_the_way_differ():
    """The three ways between the same ends: every one its own caption, and its own middle frame."""
    scene = next(s for s in map(draw_scene, range(100)) if s.figures[0].verb == "moves")
    versions = [scene._replace(figures=(scene.figures[0]._replace(bend=bend),)) for bend in (-1, 0, 1)]
    assert len({describe_scene(version) for version in versions}) == 3
    middles = [render(version, 3, 64)[1] for version in versions]
    assert all(psnr(middles[i], middles[j]) < 25 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_centres_stay_inside_whichever_way_they_bend():
    figures = [figure for seed in range(60) for figure in draw_scene(seed, "different").figures]
    for figure in figures:
        ends = np.array([figure.start, figure.end])
        height = 0.32 * abs(ends[1, figure.axis] - ends[0, figure.axis])
        across = ends[:, 1 - figure.axis].mean()
        assert np.all((ends > 0.12) & (ends < 0.88))
        assert across - height > 0.1
        assert across + height < 0.9


def test_end_and_other_sizes():
    clips = ProceduralClips(0, 3, frames=5, size=48)
    assert len(clips) == 3
    assert clips[2].video.shape == (5, 48, 48, 3)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            clips[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kind": "best"}, "kind 'best'"), ({"size": 20}, "multiple of 16"), ({"frames": 1}, "2 frames or more")],
)
def test_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        ProceduralClips(0, 1, **arguments)


def test_a_new_shape_is_in_no_other_kind():
    for seed in range(40):
        hearts, others = (draw_scene(seed, kind) for kind in ("heart", "different"))
        assert {figure.shape for figure in hearts.figures} == {"heart"}
        assert {figure.shape for figure in others.figures} <= set(SHAPES)
        assert [f._replace(shape="", beat=0) for f in hearts.figures] == [f._replace(shape="") for f in others.figures]
        assert not np.array_equal(
            ProceduralClips(seed, 1, kind="heart")[0].video, ProceduralClips(seed, 1, kind="different")[0].video
        )


def test_a_heart_beats_between_the_end_frames():
    scene = draw_scene(3, "heart")
    beating, still = (
        render(scene._replace(figures=tuple(f._replace(beat=beat) for f in scene.figures)), 17, 64).astype(float)
        for beat in (scene.figures[0].beat, 0.0)
    )
    np.testing.assert_array_equal(beating[[0, -1]], still[[0, -1]])
    assert 10 < psnr(beating[8], still[8]) < 25
