"""Selection: scores say what they claim, criteria drop what they should, and the command leaves whole files or none."""

import json
import os
import shutil
import sys

import numpy as np
import PIL.Image
import pytest
from tiny import DIFFUSERS

from wanjax import commands
from wanjax.data.listing import read_manifest
from wanjax.data.manifest import write_manifest
from wanjax.data.videos import Videos
from wanjax.demo.shapes import ProceduralClips, caption
from wanjax.errors import InputError
from wanjax.media import write_video
from wanjax.selection import select
from wanjax.selection.score_log import ScoreLog
from wanjax.selection.scores import Distance, find_cuts, find_duplicates, score, video_fingerprint
from wanjax.selection.select import Criteria, Reason, judge


def texture(height=64, width=96, seed=0):
    """Smooth, colourful, without flat parts: [h, w, 3]."""
    grid = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    return np.asarray(PIL.Image.fromarray(grid).resize((width, height), PIL.Image.Resampling.BICUBIC))


def moving(step=2, frames=9, seed=0):
    wide = texture(width=200, seed=seed)
    return np.stack([wide[:, step * k : step * k + 96] for k in range(frames)])


# ------------------------------------------------------------------------------------------------------------ scores


def test_difference_is_that_of_the_ends():
    video = np.full((9, 32, 32, 3), 50, np.uint8)
    video[4] = 255
    video[-1] = 101
    assert score(video, 16)["difference"] == pytest.approx(0.2)


def test_motion_is_speed_in_heights():
    scores = {step: score(moving(step), 16)["motion"] for step in (0, 1, 3)}
    assert scores[0] == 0
    for step in (1, 3):
        assert scores[step] == pytest.approx(step / 64 * 16, rel=0.15)
    assert score(moving(1), 32)["motion"] == pytest.approx(2 * scores[1], rel=1e-3)


def test_sharpness_falls_with_blur():
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    picture = PIL.Image.fromarray(noise)
    blurred = np.asarray(picture.resize((48, 32), PIL.Image.Resampling.BOX).resize((96, 64)))
    sharp, soft = (score(np.stack([pixels] * 5), 16)["sharpness"] for pixels in (noise, blurred))
    assert soft < 0.2 * sharp
    assert score(np.full((5, 32, 32, 3), 90, np.uint8), 16)["sharpness"] == 0


def test_exposure():
    video = np.full((5, 32, 32, 3), 255, np.uint8)
    video[:, :8] = 0
    video[:, 8:16] = 128
    scores = score(video, 16)
    assert scores["exposure"] == pytest.approx(0.5 + 0.25 * 128 / 255, abs=0.01)
    assert scores["clipped"] == pytest.approx(0.75)


@pytest.mark.parametrize("place", [1, 5, 8])
def test_cuts_are_found_wherever_they_are(place):
    video = np.concatenate([moving(1)[:place], moving(1, seed=1)[place:]])
    assert find_cuts(video, 16) == [place]
    assert find_cuts(moving(3), 16) == []


def test_near_duplicates():
    first, other = moving(1), moving(1, seed=2)
    noisy = np.clip(first.astype(int) + np.random.default_rng(0).normal(0, 4, first.shape), 0, 255).astype(np.uint8)
    smaller = np.stack([np.asarray(PIL.Image.fromarray(frame).resize((72, 48))) for frame in first])
    ended = np.concatenate([first[:5], other[5:]])  # begins alike, but is no duplicate
    prints = [video_fingerprint(video) for video in (first, other, noisy, ended, smaller)]
    assert find_duplicates(prints, 6) == {2: 0, 4: 0}
    assert find_duplicates([prints[0]] * 3, 0) == {1: 0, 2: 0}
    assert find_duplicates([], 6) == {}


def test_clip_distance():
    distance = Distance(DIFFUSERS)
    still = np.repeat(moving(1, 1), 3, axis=0)
    changed = np.concatenate([still, moving(1, 1, seed=3)])
    assert distance(still) == pytest.approx(0, abs=1e-5)
    assert distance(changed) > 0.01


def test_the_procedural_set_can_be_scored():
    count = 12
    clips = ProceduralClips(0, count, frames=9, size=48)
    still = [i for i in range(count) if "drifts" in caption(i)]
    assert still
    scores = [score(clips[i].video, 16) for i in range(count)]
    reasons = judge([str(i) for i in range(count)], scores, Criteria(top=[("motion", 1 - len(still) / count)]))
    assert {i for i, reason in enumerate(reasons) if reason} == set(still)


def test_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match=r"pip install \"wanjax\[data\]\""):
        score(moving(), 16)


# ---------------------------------------------------------------------------------------------------------- criteria

RECORDS = [
    {"a": 1.0, "b": 5, "height": 10, "width": 10, "fingerprint": "0" * 48},
    {"a": 2.0, "b": 4, "height": 20, "width": 20, "fingerprint": "0" * 47 + "1"},
    {"a": 3.0, "b": 3, "height": 10, "width": 10, "fingerprint": "f" * 48},
    {"a": 4.0, "height": 10, "width": 10, "fingerprint": "0f" * 24},
    {"unusable": "holds sound alone"},
]


def kept(**criteria):
    reasons = judge(list("vwxyz"), RECORDS, Criteria(**criteria))
    assert reasons[4] == Reason("unusable", "holds sound alone")
    return [i for i, reason in enumerate(reasons) if reason is None], [str(reason) for reason in reasons if reason]


def test_criteria():
    assert kept()[0] == [0, 1, 2, 3]
    assert kept(minimum=[("a", 2)])[0] == [1, 2, 3]
    assert kept(maximum=[("a", 2)])[0] == [0, 1]
    assert kept(minimum=[("a", 2), ("b", 4)]) == (
        [1],
        ["a below 2: 1", "b below 4: 3", "b below 4: nan", "unusable: holds sound alone"],
    )
    assert kept(top=[("a", 0.5)])[0] == [2, 3]
    assert kept(bottom=[("a", 0.5)])[0] == [0, 1]
    assert kept(top=[("a", 0.75)], bottom=[("a", 0.75)])[0] == [1, 2]
    names, reasons = kept(top=[("b", 0.5)])
    assert names == [0, 1]
    assert reasons[:2] == ["b not in the top 50%: 3", "b not in the top 50%: nan"]


def test_of_duplicates_the_larger_is_kept_if_it_is_good_enough():
    assert kept(duplicates=2) == ([1, 2, 3], ["near duplicate: w", "unusable: holds sound alone"])
    assert kept(duplicates=2, maximum=[("a", 1.5)])[0] == [0]
    assert kept(duplicates=0)[0] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        ({"minimum": [("c", 1)]}, r"no clip has the score 'c'; accepted: a, b, height, width;"),
        ({"top": [("a", 0)]}, r"the share 0 of a; accepted: above 0, up to 1"),
        ({"duplicates": 65}, r"duplicates of 65 bits; accepted: 0 to 64"),
    ],
)
def test_criteria_are_checked(criteria, message):
    with pytest.raises(InputError, match=message):
        kept(**criteria)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    write_video(clips / "fast.mp4", moving(3), 16)
    write_video(clips / "slow.mp4", moving(1, seed=1), 16)
    shutil.copy(clips / "slow.mp4", clips / "slow again.mp4")
    write_video(clips / "still.mp4", np.repeat(moving(1, 1, seed=2), 9, axis=0), 16)
    (clips / "broken.mp4").write_bytes(b"no video" * 100)
    for path in clips.glob("*.mp4"):
        path.with_suffix(".txt").write_text(path.stem)
    return clips


def run(*arguments):
    commands.main(["select", "--frames", "9", "--area", str(64 * 96), "--threads", "2", *map(str, arguments)])


def test_command(folder, capsys):
    run(folder, "--min", "motion=0.1", "--duplicates", "--max", "cuts=0")
    rows = read_manifest(folder / "selected.jsonl")
    assert [(row.name, row.caption) for row in rows] == [("fast.mp4", "fast"), ("slow again.mp4", "slow again")]
    columns = rows[0].columns
    assert (columns["height"], columns["width"], columns["resolution"], columns["cuts"]) == (64, 96, 64, 0)
    assert columns["motion"] > 0.5
    report = capsys.readouterr().out
    for line in (
        "2 of 5 clips kept",
        "1 dropped: motion below 0.1",
        "1 dropped: near duplicate",
        "1 dropped: unusable",
    ):
        assert line in report
    assert str(folder / "selected.png") in report
    with PIL.Image.open(folder / "selected.png") as sheet:
        assert sheet.width > 1000
        assert len(set(sheet.convert("L").getdata())) > 100  # shows pictures
    clips = Videos(folder / "selected.jsonl", frames=9, area=64 * 96)
    assert clips.shape(0)[0] == 9
    assert clips[0].video.shape == (*clips.shape(0), 3)


def test_scores_are_made_once(folder, monkeypatch):
    run(folder, "--out", folder / "all.jsonl")

    def fail(*args):
        raise AssertionError("scored again")

    monkeypatch.setattr(select, "score", fail)
    run(folder, "--top", "motion=0.5", "--out", folder / "some.csv")
    names = [row.name for row in read_manifest(folder / "some.csv")]
    assert names == ["fast.mp4", "slow again.mp4", "slow.mp4"]  # equal values stay together
    write_video(folder / "still.mp4", moving(2, seed=5), 16)  # another file, another score
    with pytest.raises(AssertionError, match="scored again"):
        run(folder)


def test_interrupted_scoring_goes_on(folder, monkeypatch, capsys):
    real, calls = select.score, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(select, "score", interrupted)
    with pytest.raises(SystemExit) as end:
        run(folder, "--threads", "1")
    assert end.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    log = folder / ".scores.jsonl"
    log.write_text(log.read_text() + '{"name": "cut o')  # as a power cut would leave it
    assert 2 <= log.read_text().count("\n") <= 4
    assert not (folder / "selected.jsonl").exists()
    run(folder)
    assert len(read_manifest(folder / "selected.jsonl")) == 4
    names = [json.loads(line)["name"] for line in log.read_text().splitlines()]
    assert sorted(names) == ["broken.mp4", "fast.mp4", "slow again.mp4", "slow.mp4", "still.mp4"]  # none twice
    assert [name for name in os.listdir(folder) if name.startswith(".")] == [".scores.jsonl"]


def test_a_foreign_log_is_refused(folder, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"path": "a.mp4"}\n')
    with pytest.raises(InputError, match=r"line 1 is no record of scores"):
        ScoreLog(tmp_path / "x.jsonl", "")


def test_columns_and_parts_of_a_manifest_are_kept(folder, tmp_path):
    lines = [{"path": "clips/fast.mp4", "start": 0.1, "aesthetic": 4.5}, {"path": "clips/slow.mp4", "aesthetic": 6.5}]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(tmp_path / "all.jsonl", "--max", "aesthetic=5", "--out", tmp_path / "out/kept.jsonl", "--clip", DIFFUSERS)
    (row,) = read_manifest(tmp_path / "out/kept.jsonl")
    assert (row.name, row.start, row.caption, row.columns["aesthetic"]) == ("../clips/fast.mp4@0.1-", 0.1, None, 4.5)
    assert row.columns["clip_difference"] > 0
    assert row.columns["seconds"] == pytest.approx(9 / 16 - 0.1, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "gone does not exist"),
        (["clips", "--min", "sharp=1"], "no clip has the score 'sharp'"),
        (["clips", "--min", "motion=99"], "no clips are left"),
        (["clips", "--out", "kept.txt"], "cannot write .txt"),
        (["clips", "--sheet", "sheet.mp4"], "cannot write .mp4"),
        (["clips", "--clip", "clips"], "clips"),
    ],
)
def test_wrong_arguments_end_with_one_line(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (folder / "selected.png").exists()


def test_the_input_is_not_overwritten(folder, capsys):
    write_manifest(folder / "m.jsonl", read_manifest(folder))
    before = (folder / "m.jsonl").read_text()
    with pytest.raises(SystemExit):
        run(folder / "m.jsonl", "--out", folder / "m.jsonl")
    assert "is the input" in capsys.readouterr().err
    assert (folder / "m.jsonl").read_text() == before
