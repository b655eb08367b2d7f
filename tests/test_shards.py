"""Archives of clips: read where they lie, named as if they were folders."""

import io
import json
import tarfile

import numpy as np
import PIL.Image
import pytest
from tiny_videos import encode, gray

from wanjax.data.listing import list_clips
from wanjax.data.videos import Videos
from wanjax.errors import InputError


def pack(path, **files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path):
    clip = encode(tmp_path / "a.mp4", gray(np.linspace(20, 230, 9))).read_bytes()
    late = encode(tmp_path / "b.gif", gray([200] * 9), codec="gif", pix_fmt="rgb8").read_bytes()
    picture = io.BytesIO()
    PIL.Image.new("RGB", (64, 48), (100, 100, 100)).save(picture, "PNG")
    (tmp_path / "set").mkdir()
    pack(tmp_path / "set/s-000.tar", **{"0__mp4": clip, "0__txt": b"first", "1__gif": late, "1__txt": b"second"})
    pack(
        tmp_path / "set/s-001.tar",
        **{"2__png": picture.getvalue(), "2__json": json.dumps({"prompt": "third"}).encode()},
    )
    return tmp_path / "set"


@pytest.mark.parametrize("name", ["", "s-*.tar", "s-{000..001}.tar"])
def test_clips_of_shards(shards, name):
    found = list_clips(shards / name)
    assert [(row.name, row.caption) for row in found.rows] == [
        ("s-000.tar/0.mp4", "first"),
        ("s-000.tar/1.gif", "second"),
        ("s-001.tar/2.png", "third"),
    ]
    clips = Videos(found.rows, frames=9, area=48 * 64)
    assert [clips.shape(i) for i in range(3)] == [(9, 48, 64), (9, 48, 64), (1, 48, 64)]
    np.testing.assert_allclose(clips[0].video.mean((1, 2, 3)), np.linspace(20, 230, 9), atol=2.5)
    np.testing.assert_allclose([clips[i].video.mean() for i in (1, 2)], [200, 100], atol=20)


def test_shards_that_cannot_be_read(shards, tmp_path):
    with pytest.raises(InputError, match=r"s-002\.tar does not exist"):
        list_clips(shards / "s-{000..002}.tar")
    (shards / "bad.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(InputError, match=r"bad\.tar is no \.tar file"):
        list_clips(shards / "bad.tar")
    whole = (shards / "s-000.tar").read_bytes()
    (shards / "cut.tar").write_bytes(whole[:900])
    with pytest.raises(InputError, match=r"cut\.tar is (cut off|no \.tar)"):
        list_clips(shards / "cut.tar")
    with pytest.raises(InputError, match=r"1 of 2 clips have no caption, the first n\.tar/1\.mp4"):
        list_clips(pack(shards / "n.tar", **{"0__mp4": b"", "0__txt": b"", "1__mp4": b""}))
