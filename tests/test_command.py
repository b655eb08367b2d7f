"""Flags that cannot be used: every command ends with one line and exit code 2."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

import sample_jax
import train_jax
from wanjax import commands
from wanjax.commands import sample, train
from wanjax.config import SampleConfig, TrainConfig

COUNT = "whole numbers from 1 are accepted"
NUMBER = "accepted: NAME=NUMBER, such as difference=0.1"
CASES = [
    ("cache", "--out o", "required: --config"),
    ("cache", "--config c.py --out o --batch 0", f"--batch 0; {COUNT}"),
    ("cache", "--config c.py --out o --batch many", "--batch: invalid int value: 'many'"),
    ("cache", "--config c.py --out o --processes 0", f"--processes 0; {COUNT}"),
    ("cache", "--config c.py --out o --process-id 1", "--process-id 1 of --processes 1"),
    ("select", "", "required: input"),
    ("select", ". --threads 0", f"--threads 0; {COUNT}"),
    ("select", ". --threads -2", f"--threads -2; {COUNT}"),
    ("select", ". --threads many", "--threads: invalid int value: 'many'"),
    ("select", ". --min motion", f"--min: 'motion'; {NUMBER}"),
    ("select", ". --top motion=nan", f"--top: 'motion=nan'; {NUMBER}"),
    ("select", ". --bottom motion=2", "the share 2 of motion; accepted: above 0, up to 1"),
    ("select", ". --duplicates -1", "duplicates of -1 bits; accepted: 0 to 64"),
    ("select", ". --frames 80", "clips of 80 frames; accepted: 4n + 1"),
    ("select", ". --frames -3", "clips of -3 frames; accepted: 4n + 1"),
    ("select", ". --area 0", "an area of 0 pixels"),
    ("select", ". --area 1000000000000", "an area of 1000000000000 pixels"),
    ("select", ". --fps nan", "nan frames a second; accepted: above 0"),
    ("convert", "a b", "required: --layout"),
    ("convert", "a b --layout official --max-shard-gb many", "--max-shard-gb: invalid float value: 'many'"),
    ("convert", "a b --layout official --max-shard-gb inf", "--max-shard-gb is inf"),
    ("convert", "a b --layout official --flow-shift -1", "--flow-shift is -1.0"),
    ("calibrate", "--steps many", "--steps: invalid int value: 'many'"),
    ("report", "", "required: --config"),
    ("report", "--config configs/train_tiny.py --mesh", "--mesh: expected one argument"),
]


@pytest.mark.parametrize(("command", "flags", "message"), CASES)
def test_bad_flags_end_with_one_line(tmp_path, monkeypatch, capsys, command, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(SystemExit) as end:
        commands.main([command, *flags.split()])
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("argv", [["flirt"], ["--flirt"], ["sample", "--flirt"], ["sample", "--solver", "flirt"]])
def test_unknown_words_end_with_one_line(argv, capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(argv)
    assert end.value.code == 2
    assert re.fullmatch(r"error: .*flirt.*; see --help\n", capsys.readouterr().err)


def test_help_is_grouped_and_shows_defaults():
    text = sample.make_parser().format_help()
    assert re.search(r"^inputs:\n  --checkpoint DIR", text, re.MULTILINE)
    assert re.search(r"--seed N +of the initial noise \(default: 0\)", text)
    assert re.search(r"--steps N +solver steps \(default: 50\)", text)
    assert "whose schedule" in text


def test_help_needs_neither_jax_nor_time():
    """Commands whose flags are not a configuration's; the others' help imports JAX for its dtypes, and nothing else."""
    program = "import sys\nfrom wanjax.commands import COMMANDS, module\nfor c in COMMANDS: module(c).make_parser()\n"
    program += "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"import json\n{program}"], capture_output=True, text=True, check=True)
    assert not {"flax", "optax", "orbax", "grain", "av", "PIL", "transformers", "qwix"} & set(json.loads(done.stdout))


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, capsys):
    commands.main(["--completion", shell])
    script = capsys.readouterr().out
    assert "--first-frame" in script
    assert "calibrate" in script


@pytest.mark.parametrize("kind", [SampleConfig, TrainConfig])
def test_every_field_has_a_sentence(kind):
    assert all(field.metadata["help"] for field in dataclasses.fields(kind))


def test_values_of_every_kind_reach_the_configuration():
    config = sample.parse([
        *("--checkpoint", "c", "--steps", "7", "--shift", "2.5", "--lora", "a", "--lora", "b:0.5"),
        *("--no-lora-merge", "--fast", "--solver", "euler"),
    ])  # fmt: skip
    assert config == SampleConfig(
        checkpoint="c", steps=7, shift=2.5, lora=("a", "b:0.5"), lora_merge=False, fast=True, solver="euler"
    )
    assert sample.parse(["--checkpoint", "c"]) == SampleConfig(checkpoint="c")


def test_the_readme_has_the_flags_of_the_source():
    done = subprocess.run([sys.executable, "docs/flags.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_and_the_scripts_are_one():
    assert sample_jax.main is sample.main
    assert train_jax.main is train.main
