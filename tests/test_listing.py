"""What there is in a folder: links, folders named like videos, pictures, captions; what is left out is said."""

import codecs
import os

import pytest

from wanjax.data.captions import decode_caption
from wanjax.data.listing import list_clips
from wanjax.errors import InputError


def put(folder, *names, caption="words"):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)


def test_links_are_followed_once(tmp_path):
    put(tmp_path / "far", "more/a.mp4", "c.mp4")
    put(tmp_path / "set", "b.mp4")
    os.symlink(tmp_path / "far/more", tmp_path / "set/more")
    os.symlink(tmp_path / "set", tmp_path / "set/more/loop")
    os.symlink(tmp_path / "far/c.mp4", tmp_path / "set/c.mp4")
    os.symlink(tmp_path / "far/c.txt", tmp_path / "set/c.txt")
    os.symlink(tmp_path / "gone.mp4", tmp_path / "set/gone.mp4")
    found = list_clips(tmp_path / "set")
    assert [row.name for row in found.rows] == ["b.mp4", "c.mp4", "more/a.mp4"]
    assert found.left_out == {"gone.mp4": "a link to nothing"}


def test_pictures_and_what_is_left_out(tmp_path):
    put(tmp_path, "a.mp4", "still.png", "more/still.JPG")
    put(tmp_path, "a.png", "thumbnail.webp", ".b.mp4", "@eaDir/b.mp4/c.jpg", caption=None)
    found = list_clips(tmp_path)
    assert [row.name for row in found.rows] == ["a.mp4", "more/still.JPG", "still.png"]
    assert found.left_out == {
        ".b.mp4": "hidden",
        "@eaDir/b.mp4/c.jpg": "a picture without a caption",
        "a.png": "a picture beside the video of that name",
        "thumbnail.webp": "a picture without a caption",
    }
    for path in tmp_path.rglob("*.txt"):
        path.unlink()
    assert [row.name for row in list_clips(tmp_path).rows] == ["a.mp4"]


def test_nothing_but_what_is_left_out(tmp_path):
    put(tmp_path, "a.png", caption=None)
    with pytest.raises(InputError, match=r"lists no clips; 1 left out, such as a\.png: a picture without a caption;"):
        list_clips(tmp_path)


WORDS = "a café, 猫"


@pytest.mark.parametrize(
    "data",
    [
        WORDS.encode(),
        codecs.BOM_UTF8 + WORDS.encode(),
        codecs.BOM_UTF16_LE + WORDS.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + WORDS.encode("utf-16-be"),
    ],
)
def test_encodings_that_say_what_they_are(tmp_path, data):
    put(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_bytes(data + b"" if b"\0" in data else data + b"\r\n")
    assert list_clips(tmp_path).rows[0].caption == WORDS


def test_other_encodings_are_named_or_refused(tmp_path):
    put(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_bytes("un café crème à la terrasse".encode("cp1252"))
    with pytest.raises(InputError, match=r"caption .*a\.txt is not UTF-8 .*--caption-encoding"):
        list_clips(tmp_path)
    assert list_clips(tmp_path, "cp1252").rows[0].caption == "un café crème à la terrasse"
    assert "terrasse" in str(list_clips(tmp_path, "guess").rows[0].caption)
    with pytest.raises(InputError, match="--caption-encoding 'klingon'; an encoding's name"):
        list_clips(tmp_path, "klingon")
    with pytest.raises(InputError, match=r"caption a is not UTF-8 \(it holds NULs"):
        decode_caption("cat".encode("utf-16-le"), "a")
    assert decode_caption(codecs.BOM_UTF16_LE + "猫".encode("utf-16-le"), "a", "cp1252") == "猫"
