"""Manifests: what is written is read back, paths are the manifest's, wrong rows are named."""

import json
import os
import sys
from pathlib import Path

import pytest

from wanjax.data.listing import read_manifest
from wanjax.data.manifest import Row, write_manifest
from wanjax.errors import InputError

LINES = [
    {"path": "a.mp4", "caption": "a cat, asleep", "sharpness": 0.5, "reason": "dark"},
    {"path": "more/b.mp4", "caption": 'says "hi"\nand goes', "start": 1.5, "end": 4},
    {"path": "more/b.mp4", "caption": "", "start": 7},
]


@pytest.fixture
def rows(tmp_path):
    return read_manifest(written(tmp_path, LINES))


def written(folder, lines, name="m.jsonl"):
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_rows(tmp_path, rows):
    assert rows[0] == Row(tmp_path / "a.mp4", "a.mp4", "a cat, asleep", columns={"sharpness": 0.5, "reason": "dark"})
    assert rows[1] == Row(tmp_path / "more/b.mp4", "more/b.mp4@1.5-4", 'says "hi"\nand goes', 1.5, 4.0)
    assert rows[2] == Row(tmp_path / "more/b.mp4", "more/b.mp4@7-", "", 7.0)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_format_keeps_clips_and_columns(tmp_path, rows, suffix):
    write_manifest(tmp_path / f"out{suffix}", rows)
    again = read_manifest(tmp_path / f"out{suffix}")
    for row, expected in zip(again, rows, strict=True):
        assert (row.path, row.name, row.caption, row.start, row.end) == (
            expected.path, expected.name, expected.caption, expected.start, expected.end,
        )  # fmt: skip
        kept = {name: value for name, value in row.columns.items() if value is not None}
        assert kept == expected.columns
    assert sorted(os.listdir(tmp_path)) == sorted(["m.jsonl", f"out{suffix}"])


def test_paths_follow_the_manifest(tmp_path, rows):
    write_manifest(tmp_path / "x/y/kept.jsonl", rows)
    first = json.loads((tmp_path / "x/y/kept.jsonl").read_text().splitlines()[0])
    assert first["path"] == "../../a.mp4"
    assert [row.path for row in read_manifest(tmp_path / "x/y/kept.jsonl")] == [row.path for row in rows]


def test_relative_to_the_working_folder_too(tmp_path, monkeypatch):
    written(tmp_path, LINES)
    monkeypatch.chdir(tmp_path)
    assert read_manifest("m.jsonl")[0].path == tmp_path / "a.mp4"


def test_absolute_paths_stay(tmp_path):
    row = read_manifest(written(tmp_path, [{"path": "/data/a.mp4"}]))[0]
    assert row.path == Path("/data/a.mp4")
    assert row.caption is None


def test_csv_reads_numbers_and_empty_cells(tmp_path):
    (tmp_path / "m.csv").write_text(
        "﻿path,caption,start,end,score,note\na.mp4,12,,3.5,0.25,\nb.mp4,,1,,7,x y\n", "utf-8"
    )
    first, second = read_manifest(tmp_path / "m.csv")
    assert (first.caption, first.start, first.end, first.columns) == ("12", 0, 3.5, {"score": 0.25, "note": None})
    assert (second.caption, second.start, second.end, second.columns) == ("", 1, None, {"score": 7, "note": "x y"})


def test_folder(tmp_path):
    for name in ("b.mp4", "a.MKV", "sub/c.webm", ".hidden.mp4", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(f" of {name}\n")
    rows = read_manifest(tmp_path)
    assert [(row.name, row.caption) for row in rows] == [
        ("a.MKV", "of a.txt"),
        ("b.mp4", "of b.txt"),
        ("sub/c.webm", "of sub/c.txt"),
    ]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError, match=r"1 of 3 videos have no caption, the first a\.MKV"):
        read_manifest(tmp_path)
    (tmp_path / "b.txt").unlink()
    (tmp_path / "sub/c.txt").unlink()
    assert [row.caption for row in read_manifest(tmp_path)] == [None] * 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "video,prompt,input_image\na.mp4,words,b.png\n"),  # DiffSynth
        ("metadata.json", '[{"file_path": "a.mp4", "text": "words", "type": "video", "width": 64, "height": 48}]'),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "words"}'),  # datasets of the hub
        ("m.jsonl", '{"video_path": "a.mp4", "caption": "words"}'),  # musubi-tuner
    ],
)
def test_what_other_programs_write(tmp_path, name, content):
    (tmp_path / "a.mp4").touch()
    (tmp_path / name).write_text(content)
    (row,) = read_manifest(tmp_path / name)
    assert (row.path, row.name, row.caption) == (tmp_path / "a.mp4", "a.mp4", "words")
    if name.startswith("metadata"):  # the folder that it is of will do
        assert read_manifest(tmp_path) == [row]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"caption": "x"}, r"row 2: no column names the clip's file, there are caption; accepted: path, video, "),
        ({"path": 3}, r"row 2: path 3"),
        ({"path": "b.mp4", "caption": 3}, r"row 2: caption 3; accepted: text"),
        ({"file_path": "b.mp4", "text": 3}, r"row 2: text 3; accepted: text"),
        ({"path": "b.mp4", "start": "soon"}, r"row 2: start 'soon'; accepted: seconds"),
        ({"path": "b.mp4", "start": -1}, r"row 2: start -1"),
        ({"path": "b.mp4", "start": 2, "end": 2}, r"row 2: start 2, end 2; accepted: an end behind the start"),
        ({"path": "b.mp4", "tags": ["x"]}, r"row 2: tags is a list"),
        ({"path": "./a.mp4"}, r"rows 1 and 2 are both"),
        ("{path}", r"row 2: no JSON"),
        ("[1]", r"row 2: \[1\]; accepted: one object a line"),
    ],
)
def test_wrong_rows_are_named(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        read_manifest(written(tmp_path, [{"path": "a.mp4"}, line]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", b"\n\n", "lists no clips"),
        ("m.csv", b"path,caption\na.mp4\n", "row 1: more or fewer cells"),
        ("m.csv", b"path\na.mp4,x\n", "row 1: more or fewer cells"),
        ("m.csv", b"path\n\xff\xfe\n", "cannot be read"),
        ("m.parquet", b"no parquet", "cannot be read"),
        ("m.json", b'{"path": "a.mp4"}', "no list of objects"),
        ("m.json", b'[{"path": "a.mp4"}', "cannot be read"),
        ("m.txt", b"a.mp4", "is not a manifest; accepted: a .jsonl, .json, .csv or .parquet"),
    ],
)
def test_wrong_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path / name)


def test_missing_and_empty(tmp_path, rows):
    with pytest.raises(InputError, match=r"gone\.jsonl does not exist"):
        read_manifest(tmp_path / "gone.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="lists no clips"):
        read_manifest(tmp_path / "empty")
    with pytest.raises(InputError, match="no clips are left"):
        write_manifest(tmp_path / "out.jsonl", [])
    with pytest.raises(InputError, match=r"cannot write \.txt; accepted: \.jsonl, \.csv, \.parquet"):
        write_manifest(tmp_path / "out.txt", rows)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install \"wanjax\[data\]\""):
        write_manifest(tmp_path / "out.parquet", rows)
    assert not (tmp_path / "out.parquet").exists()


def test_failed_writing_leaves_the_old_manifest(tmp_path, rows, monkeypatch):
    write_manifest(tmp_path / "out.jsonl", rows[:1])
    before = (tmp_path / "out.jsonl").read_text()

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("wanjax.data.manifest.json.dumps", fail)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(tmp_path / "out.jsonl", rows)
    assert (tmp_path / "out.jsonl").read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["m.jsonl", "out.jsonl"]
