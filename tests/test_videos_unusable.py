"""Video files that cannot be used: named, counted, and replaced by others."""

import av
import numpy as np
import pytest
from tiny_videos import encode, gray, sound, videos

from wanjax.data.buckets import Usable, describe_unusable, group
from wanjax.data.clip import UnusableClip
from wanjax.data.decode import Damaged, decode, probe
from wanjax.data.manifest import Row
from wanjax.data.videos import Videos
from wanjax.errors import InputError


def mixed(folder):
    """A folder of good and bad files, the good ones 3 and 6 .. 9 by name."""
    good = encode(folder / "3 good.mp4", gray(np.linspace(20, 230, 9)))
    encode(folder / "0 one frame.mp4", gray([100]))
    (folder / "1 garbage.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    sound(folder / "2 sound.mp4")
    (folder / "4 empty.mp4").touch()
    (folder / "5 no index.mp4").write_bytes(good.read_bytes()[:200])
    for k in range(6, 10):
        encode(folder / f"{k} good.mp4", gray(np.full(9, 20 * k)))
    noise = np.random.default_rng(0).integers(0, 255, (9, 48, 64, 3), np.uint8)
    whole = encode(folder / "7 damaged.mp4", noise).read_bytes()
    half = len(whole) // 2  # its index is in front, and promises 9 frames
    (folder / "7 damaged.mp4").write_bytes(whole[:half] + np.random.default_rng(1).bytes(len(whole) - half))
    for path in folder.glob("*.mp4"):
        path.with_suffix(".txt").write_text(f"caption of {path.stem}\n")
    return Videos(folder, frames=9, area=48 * 64)


def test_unusable_files_are_named_at_probing(tmp_path):
    clips = mixed(tmp_path)
    groups = group(clips)
    undecodable = "cannot be decoded (Invalid data found when processing input)"
    assert groups.unusable == {
        "0 one frame.mp4": "1 frames at 16 fps, the shortest bucket takes 5",
        "1 garbage.mp4": undecodable,
        "2 sound.mp4": "holds sound alone",
        "4 empty.mp4": undecodable,
        "5 no index.mp4": "holds no video",
    }
    assert {shape: [clips.rows[i].name for i in bucket] for shape, bucket in groups.buckets.items()} == {
        (9, 48, 64): ["3 good.mp4", "6 good.mp4", "7 damaged.mp4", "7 good.mp4", "8 good.mp4", "9 good.mp4"]
    }
    line = describe_unusable(groups.unusable, len(clips))
    assert line.startswith("5 of 11 clips cannot be used: 2 x cannot be decoded (Invalid")
    with pytest.raises(UnusableClip, match=r"2 sound\.mp4: holds sound alone"):
        clips[2]


def test_unusable_when_decoded_is_replaced_by_the_next(tmp_path, caplog):
    clips = mixed(tmp_path)
    bad = next(i for i, row in enumerate(clips.rows) if row.name == "7 damaged.mp4")
    with pytest.raises(UnusableClip, match=r"7 damaged\.mp4: (damaged at|cannot be decoded)"):
        clips[bad]
    usable = Usable(clips, group(clips).buckets)
    assert usable.shape(bad) == (9, 48, 64)
    assert usable[bad].name == "7 good.mp4"
    assert usable[bad].caption == "caption of 7 good"
    assert list(usable.skipped) == ["7 damaged.mp4"]
    assert caplog.text.count("7 damaged.mp4") == 1  # once, though read twice
    assert usable[len(clips) - 1].name == "9 good.mp4"


def test_of_a_file_that_is_cut_off_the_whole_pictures_count(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), np.uint8)
    path = encode(tmp_path / "a.mp4", frames)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    clips = videos(path)
    assert clips.shape(0) == (9, 48, 64)
    assert clips[0].video.shape == (9, 48, 64, 3)
    assert clips.facts(0).seconds * 16 == pytest.approx(9, abs=1)


def test_damage_inside_is_found(tmp_path):
    """What comes before it may be used, what is predicted from it may not."""
    frames = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), np.uint8)
    path = encode(tmp_path / "a.mp4", frames, options={"g": "20"})
    content = bytearray(path.read_bytes())
    place = (content.find(b"mdat") + len(content)) // 2
    content[place : place + 20_000] = np.random.default_rng(1).bytes(20_000)  # H.264 would not notice a few bytes
    path.write_bytes(content)
    with pytest.raises(Damaged, match=r"damaged at|cannot be decoded"):
        decode(path, [k / 16 for k in range(20)], 48, 64)
    with pytest.raises(Damaged, match=r"damaged at|cannot be decoded"):
        decode(path, [19 / 16], 48, 64)
    assert decode(path, [0, 1 / 16], 48, 64).shape == (2, 48, 64, 3)


def failing(*args, **kwargs):
    raise OSError(5, "Input/output error")


def test_a_failing_disk_is_no_reason_to_skip(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", gray([100] * 8))
    monkeypatch.setattr("wanjax.data.timing.av.open", lambda *args, **kwargs: av.error.err_check(-5))
    with pytest.raises(Damaged, match="Input/output error"):  # libav says so of broken files too
        probe(path)
    monkeypatch.setattr("wanjax.data.timing.open_file", failing)
    with pytest.raises(OSError, match="Input/output error"):
        group(videos(path))


def test_nothing_usable_is_said(tmp_path):
    sound(tmp_path / "a.mp4")
    clips = Videos([Row(tmp_path / "a.mp4", "a", ""), Row(tmp_path / "gone.mp4", "gone", "")])
    with pytest.raises(InputError, match=r"2 of 2 clips cannot be used: .*sound alone \(a\).*does not exist \(gone\)"):
        group(clips)


def test_columns_of_a_selection_spare_the_probing(tmp_path):
    columns = {"height": 1080, "width": 1920, "seconds": 3.1}
    clips = Videos([Row(tmp_path / "not there.mp4", "a", "", columns=columns)])
    assert clips.shape(0) == (41, 480, 832)
    with pytest.raises(UnusableClip, match="does not exist"):
        clips[0]


def test_a_stream_of_a_codec_unknown_here(tmp_path):
    """PyAV 18.0 ends the process where it is asked to decode one."""
    path = encode(tmp_path / "a.mp4", gray([100, 100]))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"none"))
    for read in (probe, lambda path: decode(path, [0.0], 48, 64)):
        with pytest.raises(Damaged, match="no decoder"):
            read(path)
