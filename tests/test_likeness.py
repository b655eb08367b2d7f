"""The measures of drawn clips see what they are for: whole shapes, corners, and which way round figures turn."""

import numpy as np
import pytest

from wanjax.demo import likeness
from wanjax.demo.shapes import ProceduralClips
from wanjax.training import metrics

CLIPS = ProceduralClips(500, 400, kind="different")


def clip_with(choose):
    """Number and scene of the first clip of one figure that is so."""
    scenes = ((i, CLIPS.scene(i)) for i in range(len(CLIPS)))
    return next((i, scene) for i, scene in scenes if len(scene.figures) == 1 and choose(scene.figures[0]))


def changed(scene, **changes):
    return scene._replace(figures=(scene.figures[0]._replace(**changes),))


def silhouettes(scene, *others):
    background = CLIPS.draw(scene._replace(figures=()))
    return [likeness.silhouette(CLIPS.draw(x), background) for x in (scene, *others)]


def test_a_clip_is_like_itself_and_the_background_is_not():
    _, scene = clip_with(lambda f: f.shape == "star")
    truth, nothing = silhouettes(scene, scene._replace(figures=()))
    for measure in (likeness.iou, likeness.edges, likeness.corners):
        assert measure(truth, truth) == pytest.approx(1)
        assert measure(nothing, truth) == 0
    assert likeness.iou(nothing, nothing) == 1


def test_iou_is_that_of_the_areas():
    a, b = np.zeros((2, 1, 8, 8), np.float32)
    a[:, :4], b[:, 2:6] = 1, 1
    assert likeness.iou(a, b) == pytest.approx(16 / 48)


def test_a_triangle_drawn_as_a_disc_loses_its_corners():
    _, scene = clip_with(lambda f: f.shape == "triangle")
    disc = changed(scene, shape="circle", radius=0.8 * scene.figures[0].radius)
    truth, ours = silhouettes(scene, disc)
    assert likeness.iou(ours, truth) > 0.55
    assert likeness.corners(ours, truth) < 0.5
    blurred = likeness._blur(truth, 1.5)
    assert likeness.corners(blurred, truth) < likeness.corners(truth, truth) - 0.1
    assert likeness.edges(blurred, truth) < 0.95


def test_neither_colours_nor_stripes_count():
    _, scene = clip_with(lambda f: f.shape == "square")
    figure = scene.figures[0]
    truth, ours = silhouettes(scene, changed(scene, colours=("white", "white"), striped=not figure.striped))
    assert likeness.iou(ours, truth) > 0.9
    assert likeness.corners(ours, truth) > 0.9


@pytest.mark.parametrize("shape", ["square", "triangle", "star"])
def test_which_way_a_figure_turns(shape):
    i, scene = clip_with(lambda f: f.turn and f.shape == shape)
    turn = scene.figures[0].turn
    video = CLIPS[i].video
    assert likeness.turns_right(video, CLIPS, i)
    noisy = video + np.random.default_rng(0).normal(0, 20, video.shape)
    assert likeness.turns_right(noisy, CLIPS, i)
    for wrong in (-turn, 0):
        for other in likeness._turning(CLIPS, scene, 0, wrong):
            assert not likeness.turns_right(other, CLIPS, i)


def test_round_and_still_figures_have_no_turn_to_see():
    for choose in (lambda f: f.shape == "circle", lambda f: not f.turn):
        i, _ = clip_with(choose)
        assert likeness.turns_right(CLIPS[i].video, CLIPS, i) is None


def test_a_cross_fade_is_not_whole():
    i, scene = clip_with(lambda f: f.shape == "square")
    background = CLIPS.draw(scene._replace(figures=()))
    fade = likeness.silhouette(metrics.crossfade(CLIPS[i].video), background)
    assert likeness.iou(fade, likeness.silhouette(CLIPS[i].video, background)) < 0.5
