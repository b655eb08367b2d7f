"""Flags that cannot be used: every command ends with one line and exit code 2."""

import os
import runpy
import sys

import pytest

COUNT = "whole numbers from 1 are accepted"
NUMBER = "accepted: NAME=NUMBER, such as difference=0.1"
CASES = [
    ("wanjax.data.cache", "--out o", "required: --config"),
    ("wanjax.data.cache", "--config c.py --out o --batch 0", f"--batch 0; {COUNT}"),
    ("wanjax.data.cache", "--config c.py --out o --batch many", "--batch: invalid int value: 'many'"),
    ("wanjax.data.cache", "--config c.py --out o --processes 0", f"--processes 0; {COUNT}"),
    ("wanjax.data.cache", "--config c.py --out o --process-id 1", "--process-id 1 of --processes 1"),
    ("wanjax.data.select", "", "required: input"),
    ("wanjax.data.select", ". --threads 0", f"--threads 0; {COUNT}"),
    ("wanjax.data.select", ". --threads -2", f"--threads -2; {COUNT}"),
    ("wanjax.data.select", ". --threads many", "--threads: invalid int value: 'many'"),
    ("wanjax.data.select", ". --min motion", f"--min: 'motion'; {NUMBER}"),
    ("wanjax.data.select", ". --top motion=nan", f"--top: 'motion=nan'; {NUMBER}"),
    ("wanjax.data.select", ". --bottom motion=2", "the share 2 of motion; accepted: above 0, up to 1"),
    ("wanjax.data.select", ". --duplicates -1", "duplicates of -1 bits; accepted: 0 to 64"),
    ("wanjax.data.select", ". --frames 80", "clips of 80 frames; accepted: 4n + 1"),
    ("wanjax.data.select", ". --frames -3", "clips of -3 frames; accepted: 4n + 1"),
    ("wanjax.data.select", ". --area 0", "an area of 0 pixels"),
    ("wanjax.data.select", ". --area 1000000000000", "an area of 1000000000000 pixels"),
    ("wanjax.data.select", ". --fps nan", "nan frames a second; accepted: above 0"),
    ("wanjax.convert", "a b", "required: --layout"),
    ("wanjax.convert", "a b --layout official --max-shard-gb many", "--max-shard-gb: invalid float value: 'many'"),
    ("wanjax.convert", "a b --layout official --max-shard-gb inf", "--max-shard-gb is inf"),
    ("wanjax.convert", "a b --layout official --flow-shift -1", "--flow-shift is -1.0"),
    ("wanjax.calibrate", "--steps many", "--steps: invalid int value: 'many'"),
    ("sharding.report", "", "required: --config"),
    ("sharding.report", "--config configs/train_tiny.py --mesh", "--mesh: expected one argument"),
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
