"""What a run leaves to look at: how it was started, trackers, and the page of it."""

import dataclasses
import html.parser
import importlib.util
import json
import sys
import types

import numpy as np
import pytest
from tiny import DIT, TRAIN, on

from wanjax import commands
from wanjax.commands import runs, train
from wanjax.config import LoRAConfig
from wanjax.errors import InputError
from wanjax.runs.page import thinned, write_page
from wanjax.runs.read import read_run
from wanjax.training import provenance, trackers
from wanjax.training.log import Log
from wanjax.training.trackers import Trackers, check_trackers


def workdir(folder, steps=400, **settings):
    """Of a run that never was."""
    config = dataclasses.replace(TRAIN, workdir=str(folder), dit=DIT, steps=1000, **settings)
    folder.mkdir(parents=True, exist_ok=True)
    with on():
        provenance.write_start(config, ["wanjax", "train", "--config", "<b>.py"], 0)
    with Log(folder, 0) as log:
        for step in range(1, steps + 1):
            held_out = {"validation/loss": 2 / step, "samples/between_psnr": 20.0} if step % 100 == 0 else {}
            log.write(step, {"loss": 3 / step, "learning_rate": 1e-4, "seconds": 2.0} | held_out)
    (folder / "samples").mkdir(exist_ok=True)
    for name in ("000100.mp4", "000200.mp4", "000200-prompt-1.mp4"):
        (folder / "samples" / name).write_bytes(name.encode() * 100)
    (folder / "checkpoints/400").mkdir(parents=True, exist_ok=True)
    return folder


class Page(html.parser.HTMLParser):
    """Sources and text of a page; every element that is opened is closed."""

    EMPTY = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open += [tag] if tag not in self.EMPTY else []
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "script" not in self.open and "style" not in self.open else ""


def test_a_start_is_written_down(tmp_path):
    folder = workdir(tmp_path / "run", steps=1, lora=LoRAConfig(rank=7))
    with on():
        provenance.write_start(dataclasses.replace(TRAIN, workdir=str(folder)), ["again"], 5)
    first, second = (json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines())
    assert first["command"] == ["wanjax", "train", "--config", "<b>.py"]
    assert first["config"]["lora"] == {"type": "LoRAConfig"} | first["config"]["lora"]
    assert first["config"]["lora"]["rank"] == 7
    assert first["config"]["dit"]["num_heads"] == DIT.num_heads
    assert first["versions"]["jax"] == importlib.import_module("jax").__version__
    assert first["devices"].endswith("cpu")
    assert (second["command"], second["step"]) == (["again"], 5)


def test_the_commit_of_a_checkout(tmp_path, monkeypatch):
    said = {"rev-parse": "abc123", "status": ""}
    monkeypatch.setattr(provenance, "_git", lambda root, *words: said[words[0]])
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "wanjax/training/provenance.py"))
    assert provenance.commit() == "abc123"
    said["status"] = " M wanjax/cli.py"
    assert provenance.commit() == "abc123, changed"
    (tmp_path / ".git").rmdir()
    assert provenance.commit() is None


# ----------------------------------------------------------------------------------------------------------- trackers


class FakeRun:
    """Of both libraries: notes what is told."""

    def __init__(self):
        self.told = []
        self.info = types.SimpleNamespace(run_id="mlflow-id")

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.told.append((name, args, kwargs)) or self


@pytest.fixture
def libraries(monkeypatch):
    found = {name: FakeRun() for name in ("wandb", "mlflow")}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found.get(name))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///somewhere.db")
    return found


def test_trackers_are_told_what_is_written(tmp_path, libraries):
    config = dataclasses.replace(TRAIN, workdir=str(tmp_path), track=("wandb", "mlflow"), project="cats")
    for step in (1, 2):
        with Log(tmp_path, step - 1, Trackers(config)) as log:
            log.write(step, {"loss": np.float32(0.5), "validation/loss": 1.0})
            log.show(step, "samples/clips", np.zeros((4, 6, 3), np.uint8))
            log.play(step, "samples/clips", tmp_path / "x.mp4")
    told = {name: [call[0] for call in fake.told] for name, fake in libraries.items()}
    assert told["wandb"] == ["init", "log", "Image", "log", "Video", "log", "finish"] * 2
    begin = ["set_experiment", "start_run"]
    figures = ["log_metrics", "log_image", "log_artifact", "end_run"]
    assert told["mlflow"] == [*begin, "log_params", *figures, *begin, *figures]
    init, *calls = libraries["wandb"].told
    assert (init[2]["project"], init[2]["name"], init[2]["resume"]) == ("cats", tmp_path.name, "allow")
    assert calls[0] == ("log", ({"train/loss": 0.5, "validation/loss": 1.0},), {"step": 1})
    again = next(call for call in calls if call[0] == "init")
    assert again[2]["id"] == init[2]["id"]  # the run goes on there
    assert [call[2]["run_id"] for call in libraries["mlflow"].told if call[0] == "start_run"] == [None, "mlflow-id"]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, libraries, monkeypatch, capsys):
    config = dataclasses.replace(TRAIN, workdir=str(tmp_path), track=("wandb",))

    def gone(self, step, values):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(trackers.WandB, "write", gone)
    with Log(tmp_path, 0, Trackers(config)) as log:
        log.write(1, {"loss": 0.5})
        log.write(2, {"loss": 0.5})
    assert capsys.readouterr().err == "wandb is told nothing more (no route to host)\n"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_trackers_that_cannot_begin_are_refused(tmp_path, libraries, monkeypatch):
    config = dataclasses.replace(TRAIN, workdir=str(tmp_path), track=("wandb", "mlflow"))
    check_trackers(config)
    monkeypatch.setattr(libraries["wandb"], "init", lambda **_: 1 / 0, raising=False)
    with pytest.raises(InputError, match=r"--track wandb cannot begin \(division by zero\)"):
        Trackers(config)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(InputError, match="--track mlflow without MLFLOW_TRACKING_URI"):
        check_trackers(config)
    libraries.clear()
    with pytest.raises(InputError, match=r'--track wandb .* pip install "wanjax\[wandb\]"'):
        check_trackers(config)
    with pytest.raises(InputError, match=r"track.*one of wandb, mlflow"):
        dataclasses.replace(TRAIN, track=("tensorboard",))
    assert train.parse(["--config", "configs/train_tiny.py", "--track", "wandb", "--track", "mlflow"])[0].track == (
        "wandb", "mlflow",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- page


def test_the_page_has_everything_and_needs_nothing(tmp_path, capsys):
    folder = workdir(tmp_path / "run", learning_rate=0.0123)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 401, "lo')  # killed here
    runs.main([str(folder)])
    assert capsys.readouterr().out == f"{folder / 'run.html'}\n"
    text = (folder / "run.html").read_text()
    page = Page(text)
    assert all(source.startswith("data:video/mp4;base64,") for source in page.sources)
    assert len(page.sources) == 3
    assert "<b>.py" in page.text  # escaped
    for word in (
        "400 of 1,000",
        "Held-out loss",
        "PSNR of samples",
        "prompt-1",
        "step 200",
        "0.0123",
        "checkpoints: 400",
    ):
        assert word in page.text, word
    assert "Utilisation" not in page.text  # there are no such figures
    assert text.count("Plotly.newPlot(") >= 5


def test_pages_of_several_runs_say_in_what_they_differ(tmp_path):
    folders = [workdir(tmp_path / name / "run", learning_rate=rate) for name, rate in (("a", 0.1), ("b", 0.2))]
    runs.main([*map(str, folders), "--out", str(tmp_path / "both.html"), "--most-mb", "0.0025"])
    text = (tmp_path / "both.html").read_text()
    page = Page(text)
    assert runs.names(folders) == ["a/run", "b/run"]
    assert "a/run" in page.text
    assert '<tr class="differs"><td>learning_rate</td>' in text
    assert len(page.sources) == 2  # of six samples, the newest that there is room for
    assert page.text.count("is not in this page") == 4


def test_curves_are_thinned_to_means():
    steps, values = thinned((list(range(1, 1001)), [float(i % 2) for i in range(1000)]), 100)
    assert steps == list(range(10, 1001, 10))
    np.testing.assert_allclose(values, 0.5)
    assert thinned(([1, 2], [3.0, 4.0]), 100) == ([1, 2], [3.0, 4.0])


def test_pages_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    for flags, words in (
        ([str(tmp_path)], "has no metrics.jsonl"),
        ([str(tmp_path), "--out", "page.pdf"], "a name that ends in .html"),
        ([str(tmp_path), "--most-mb", "-1"], "--most-mb -1"),
    ):
        with pytest.raises(SystemExit) as end:
            commands.main(["runs", *flags])
        assert end.value.code == 2
        assert words in capsys.readouterr().err
    run = read_run(workdir(tmp_path / "run", steps=2), "run")
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(InputError, match=r'pip install "wanjax\[runs\]"'):
        write_page([run], tmp_path / "x.html")
