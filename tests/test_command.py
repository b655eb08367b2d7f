"""Flags that cannot be used: every command ends with one line and exit code 2."""

import os
import runpy
import sys

import pytest

COUNT = "whole numbers from 1 are accepted"
NUMBER = "accepted: NAME=NUMBER, such as difference=0.1"
CASES = [
    ("wanjax.training.latent_cache", "--out o", "required: --config"),
    ("wanjax.training.latent_cache", "--config c.py --out o --batch 0", f"--batch 0; {COUNT}"),
    ("wanjax.training.latent_cache", "--config c.py --out o --batch many", "--batch: invalid int value: 'many'"),
    ("wanjax.training.latent_cache", "--config c.py --out o --processes 0", f"--processes 0; {COUNT}"),
    ("wanjax.training.latent_cache", "--config c.py --out o --process-id 1", "--process-id 1 of --processes 1"),
    ("wanjax.selection.select", "", "required: input"),
    ("wanjax.selection.select", ". --threads 0", f"--threads 0; {COUNT}"),
    ("wanjax.selection.select", ". --threads -2", f"--threads -2; {COUNT}"),
    ("wanjax.selection.select", ". --threads many", "--threads: invalid int value: 'many'"),
    ("wanjax.selection.select", ". --min motion", f"--min: 'motion'; {NUMBER}"),
    ("wanjax.selection.select", ". --top motion=nan", f"--top: 'motion=nan'; {NUMBER}"),
    ("wanjax.selection.select", ". --bottom motion=2", "the share 2 of motion; accepted: above 0, up to 1"),
    ("wanjax.selection.select", ". --duplicates -1", "duplicates of -1 bits; accepted: 0 to 64"),
    ("wanjax.selection.select", ". --frames 80", "clips of 80 frames; accepted: 4n + 1"),
    ("wanjax.selection.select", ". --frames -3", "clips of -3 frames; accepted: 4n + 1"),
    ("wanjax.selection.select", ". --area 0", "an area of 0 pixels"),
    ("wanjax.selection.select", ". --area 1000000000000", "an area of 1000000000000 pixels"),
    ("wanjax.selection.select", ". --fps nan", "nan frames a second; accepted: above 0"),
    ("wanjax.weights", "a b", "required: --layout"),
    ("wanjax.weights", "a b --layout official --max-shard-gb many", "--max-shard-gb: invalid float value: 'many'"),
    ("wanjax.weights", "a b --layout official --max-shard-gb inf", "--max-shard-gb is inf"),
    ("wanjax.weights", "a b --layout official --flow-shift -1", "--flow-shift is -1.0"),
    ("wanjax.sampling.calibrate", "--steps many", "--steps: invalid int value: 'many'"),
    ("wanjax.report.memory", "", "required: --config"),
    ("wanjax.report.memory", "--config configs/train_tiny.py --mesh", "--mesh: expected one argument"),
]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # other tests have imported it
@pytest.mark.parametrize(("command", "flags", "message"), CASES)
def test_bad_flags_end_with_one_line(tmp_path, monkeypatch, capsys, command, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").touch()
    monkeypatch.setattr(sys, "argv", [command, *flags.split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(command, run_name="__main__")
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert os.listdir(tmp_path) == ["a.mp4"]
