"""Checkpoints are trusted only when they are whole; a run's folder belongs to one run; what is damaged is told."""

import json
import random
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_checkpoint import CONFIG, OBJECTIVE, state_of
from tiny import on

from sharding.mesh import MeshShape
from wanjax.errors import InputError
from wanjax.files import hold
from wanjax.training.checkpoint import TrainCheckpoints
from wanjax.training.log import Log
from wanjax.training.state import abstract_state
from wanjax.training.whole import AFTERWARDS, CHECKSUMS, damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder after steps 1, 2 and 3."""
    path = tmp_path_factory.mktemp("run")
    with on(MeshShape()):
        checkpoints = TrainCheckpoints(path, keep=3)
        for step in (1, 2, 3):
            checkpoints.save(state_of(step), 10 * step)
        checkpoints.close()
    return path


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def resumed(run, resume_from=None):
    """Step and data position that a run goes on from, and whether its numbers are those that were saved."""
    with on(MeshShape()):
        checkpoints = TrainCheckpoints(run, keep=3)
        found = checkpoints.resume(abstract_state(CONFIG, OBJECTIVE), resume_from)
        checkpoints.close()
        if found is None:
            return None
        state, position = jax.device_get(found[0]), found[1]
        jax.tree.map(np.testing.assert_array_equal, state, jax.device_get(state_of(int(state.step))))
    return int(state.step), position


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def damage_one(folder, seed):
    """One fault of a disk, another for each seed."""
    rng = random.Random(seed)
    file = rng.choice([path for path in files(folder) if path.name not in AFTERWARDS])
    data = bytearray(file.read_bytes())
    kind = rng.choice(["bit", "cut", "zeros", "gone", "more", "stranger"])
    if kind == "bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "zeros":
        data = bytearray(len(data))
    elif kind == "more":
        data += b"\0"
    file.write_bytes(data)
    if kind == "gone":
        file.unlink()
    if kind == "stranger":
        (folder / "state" / "stranger").touch()
    return kind, file.relative_to(folder).as_posix()


def test_whole_ones_are_taken(run):
    assert resumed(run) == (3, 30)
    assert not (run / "set_aside").exists()


@pytest.mark.parametrize("seed", range(24))
def test_a_damaged_one_is_named_and_the_one_before_is_taken(run, seed, capsys):
    kind, file = damage_one(run / "checkpoints/3", seed)
    assert resumed(run) == (2, 20), (kind, file)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"checkpoint {run}/checkpoints/3 is not taken (")
    (aside,) = (run / "set_aside").iterdir()
    assert str(aside) in line


@pytest.mark.parametrize("how", ["file", "empty", "no checksums", "metadata"])
def test_what_is_no_checkpoint(run, how, capsys):
    newest = run / "checkpoints/3"
    if how in ("file", "empty"):
        shutil.rmtree(newest)
        newest.touch() if how == "file" else newest.mkdir()
    elif how == "no checksums":
        (newest / CHECKSUMS).unlink()
    else:
        (newest / "_CHECKPOINT_METADATA").write_bytes(b"\0" * 100)
    assert resumed(run) == (2, 20)
    assert "checkpoints/3 is not taken" in capsys.readouterr().err


def test_all_are_damaged(run, tmp_path, capsys):
    for step in (1, 2, 3):
        (run / f"checkpoints/{step}/state/manifest.ocdbt").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"checkpoints in .* none of them is whole; .*set_aside.*; bring one back, or give another"
    ):
        resumed(run)
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert resumed(tmp_path / "new") is None


def test_a_step_that_is_asked_for(run, capsys):
    assert resumed(run, 2) == (2, 20)
    assert "3 is not taken (a later one than --resume-from)" in capsys.readouterr().err
    (run / f"checkpoints/2/{CHECKSUMS}").unlink()  # of a version that wrote none: the user says so
    assert resumed(run, 2) == (2, 20)
    with pytest.raises(InputError, match=r"--resume-from 7, which is not in .*; there are: 2, 1; choose one"):
        resumed(run, 7)
    (run / "checkpoints/1/data/metadata").write_text('{"position":11}')
    with pytest.raises(InputError, match=r"--resume-from 1: .*data/metadata has changed"):
        resumed(run, 1)


def test_processes_share_the_work(saved):
    folder = saved / "checkpoints/3"
    assert [damage(folder, (i, 3)) for i in range(3)] == [None] * 3
    names = json.loads((folder / CHECKSUMS).read_text())
    assert {path.relative_to(folder).as_posix() for path in files(folder)} - set(names) == {
        CHECKSUMS,
        "_CHECKPOINT_METADATA",
        *(path.relative_to(folder).as_posix() for path in folder.rglob("commit_success.txt")),
    }


# ---- metrics


def test_lines_that_a_disk_has_damaged_are_left_out(tmp_path, capsys):
    good = [json.dumps({"step": step, "loss": 0.1}) for step in range(1, 6)]
    lines = [good[0], "\0" * 50, good[1], good[2][:9], '{"step": "x"}', "[1]", good[3], good[4]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n" + good[3][:7])
    with Log(tmp_path, step=4) as log:
        log.write(5, {"loss": float("nan")})
    kept = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [1, 2, 4, 5]
    assert "metrics.jsonl: 4 damaged line(s) are left out" in capsys.readouterr().err


# ---- one run a folder


def test_a_folder_is_one_run_s(tmp_path):
    code = (
        "import sys; from pathlib import Path; from wanjax.cli import exit_codes; from wanjax.files import hold\n"
        "with exit_codes(), hold(Path(sys.argv[1]), '--workdir'): print('held')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with hold(tmp_path / "run", "--workdir"):
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "run is another running process's; one at a time is accepted; wait for it" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    third = subprocess.run(command, capture_output=True, text=True, check=False)
    assert third.stdout == "held\n"
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("path", ["gs://bucket/run", "a\0b", "file/run"])
def test_a_folder_that_cannot_be(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^--workdir .*accepted"), hold(path, "--workdir"):
        pass
