"""Places in buckets, by fsspec's own storages in memory and on disk."""

import sys

import fsspec
import pytest

from wanjax import remote
from wanjax.config import TrainConfig
from wanjax.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WANJAX_REMOTE_CACHE", str(tmp_path / "copies"))
    remote._fetched.cache_clear()
    yield
    fsspec.filesystem("memory").store.clear()
    remote._fetched.cache_clear()


def put(**files):
    fs = fsspec.filesystem("memory")
    for name, text in files.items():
        fs.pipe_file(f"/b/{name.replace('__', '/')}", text.encode())


def there():
    fs = fsspec.filesystem("memory")
    return {name.removeprefix("/b/"): fs.cat_file(name).decode() for name in fs.find("/b")}


def here(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_and_what_changes_in_it():
    put(a="1", more__b="2", gone="3")
    folder = remote.fetch("memory://b")
    assert here(folder) == {"a": "1", "more/b": "2", "gone": "3"}
    untouched = (folder / "a").stat().st_mtime_ns
    put(more__b="4")
    fsspec.filesystem("memory").rm_file("/b/gone")
    assert remote.fetch("memory://b") == folder  # once a process
    assert here(folder)["more/b"] == "2"
    remote._fetched.cache_clear()
    assert here(remote.fetch("memory://b")) == {"a": "1", "more/b": "4"}
    assert (folder / "a").stat().st_mtime_ns == untouched


def test_a_file():
    put(more__list="words")
    assert remote.fetch("memory://b/more/list").read_text() == "words"
    assert remote.fetch("memory://b/more/list").name.endswith("list")
    assert remote.fetch("/a/path") == remote.Path("/a/path")


def test_what_is_written_goes_there(monkeypatch):
    put(metrics="old")
    monkeypatch.setattr(remote, "_SECONDS", 0.01)
    with remote.mirrored("memory://b", "--workdir") as folder:
        assert here(folder) == {"metrics": "old"}
        (folder / "metrics").write_text("new")
        for name in (
            "checkpoints/1/state",
            "checkpoints/1/checksums.json",
            ".hidden",
            "checkpoints/2.orbax-checkpoint-tmp/x",
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    assert there() == {
        "metrics": "new",
        "checkpoints/1/state": "checkpoints/1/state",
        "checkpoints/1/checksums.json": "checkpoints/1/checksums.json",
    }


def test_a_checkpoint_that_was_cut_off_is_not_there():
    put(checkpoints__1__state="1", checkpoints__1__checksums__json="1", checkpoints__2__state="2")
    fs = fsspec.filesystem("memory")
    fs.mv("/b/checkpoints/1/checksums/json", "/b/checkpoints/1/checksums.json")
    with remote.mirrored("memory://b", "--workdir") as folder:
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["1"]


def test_checksums_go_last_and_leave_first(monkeypatch, tmp_path):
    """So a kill at any moment leaves no checkpoint that looks whole and is not."""
    put(metrics="0")
    done = []
    with remote.mirrored("memory://b", "--workdir") as folder:
        mirror = remote._Mirror(*remote._open("memory://b"), folder)
        send, remove = mirror._send, mirror.fs.rm_file
        monkeypatch.setattr(mirror, "_send", lambda name: (done.append(name), send(name)))
        for name in ("checkpoints/1/checksums.json", "checkpoints/1/state/a", "checkpoints/1/b", "metrics"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("1")
        mirror.push()
        assert (done[0], done[-1]) == ("metrics", "checkpoints/1/checksums.json")
        done.clear()
        (folder / "checkpoints/2").mkdir()
        (folder / "checkpoints/2/checksums.json").write_text("2")
        for name in ("checksums.json", "state/a", "b"):
            (folder / "checkpoints/1" / name).unlink()
        monkeypatch.setattr(mirror.fs, "rm_file", lambda name: (done.append(name), remove(name)), raising=False)
        mirror.push()
        assert done[:2] == ["checkpoints/2/checksums.json", "/b/checkpoints/1/checksums.json"]
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://nothing", "memory://nothing holds nothing"),
        ("ftp://b/a", r"ftp:// is not read; accepted: a path, or gs://, s3://, hf://"),
    ],
)
def test_what_cannot_be_read(address, message):
    with pytest.raises(InputError, match=message):
        remote.fetch(address)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        InputError, match=r'gs://b/a needs gcsfs, which is not installed; pip install "wanjax\[cloud\]"'
    ):
        remote.fetch("gs://b/a")
    with pytest.raises(InputError, match="--workdir 'ftp://b/run'; a path, or an address of gs://, s3://, hf://"):
        TrainConfig(workdir="ftp://b/run")
    with (
        pytest.raises(InputError, match="--workdir memory://b with 2 processes; they need a folder"),
        remote.place_for("memory://b", "--workdir", 2),
    ):
        pass


def test_what_cannot_be_written_is_kept(monkeypatch):
    put(a="1")

    def fail(*args):
        raise PermissionError("forbidden")

    context = remote.mirrored("memory://b", "--workdir")
    folder = context.__enter__()
    monkeypatch.setattr(remote._Mirror, "_send", fail)
    (folder / "new").write_text("2")
    with pytest.raises(InputError, match=r"--workdir memory://b cannot be written \(forbidden\); what was to go there"):
        context.__exit__(None, None, None)
    assert (folder / "new").read_text() == "2"


@pytest.mark.parametrize("name", ["v.mp4", "pictures"])
def test_an_output(name):
    with remote.sent(f"memory://b/{name}", "--output") as path:
        place = remote.Path(path)
        if place.suffix:
            place.write_text("video")
        else:
            place.mkdir(parents=True)
            (place / "0.png").write_text("picture")
    assert there() == ({"v.mp4": "video"} if place.suffix else {"pictures/0.png": "picture"})
    with remote.sent("out/v.mp4", "--output") as path:
        assert path == "out/v.mp4"
