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
from wanjax.cli import exit_codes
from wanjax.commands import cache, sample, select, train
from wanjax.config import SampleConfig, TrainConfig
from wanjax.sampling import compile_cache
from wanjax.settings import ON_DISK

COUNT = "whole numbers from 1 to 1000000 are accepted"
NUMBER = "accepted: NAME=NUMBER, such as difference=0.1"
CASES = [
    ("cache", "--out o", "required: --config"),
    ("cache", "--config c.py --out o --batch 0", f"--batch 0; {COUNT}"),
    ("cache", "--config c.py --out o --batch many", "--batch: 'many'; whole numbers are accepted"),
    ("cache", "--config c.py --out o --processes 0", f"--processes 0; {COUNT}"),
    ("cache", "--config c.py --out o --process-id 1", "--process-id 1 of --processes 1"),
    ("cache", "--config s3://b/c.py --out o", f"--config 's3://b/c.py'; {ON_DISK}"),
    ("select", "gs://b/clips", f"input 'gs://b/clips'; {ON_DISK}"),
    ("convert", "hf://a b --layout official", f"source 'hf://a'; {ON_DISK}"),
    ("decode", "https://b/a.npy", f"latents 'https://b/a.npy'; {ON_DISK}"),
    ("select", "", "required: input"),
    ("select", ". --threads 0", f"--threads 0; {COUNT}"),
    ("select", ". --threads -2", f"--threads -2; {COUNT}"),
    ("select", ". --threads many", "--threads: 'many'; whole numbers are accepted"),
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
    ("convert", "a b --layout official --max-shard-gb many", "--max-shard-gb: 'many'; numbers are accepted"),
    ("convert", "a b --layout official --max-shard-gb inf", "--max-shard-gb inf; a number above 0"),
    ("convert", "a b --layout official --flow-shift -1", "--flow-shift -1; a number above 0"),
    ("calibrate", "--steps many", "--steps 'many'; whole numbers from 1"),
    ("report", "", "required: --config"),
    ("plan", "", "required: --config"),
    ("plan", "--config configs/train_tiny.py --mesh", "--mesh: expected one argument"),
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


@pytest.mark.parametrize(("closed", "left"), [("", {0, 1, 2}), (">&-", {0, 2}), (">&- 2>&- <&-", set())])
def test_closed_streams_are_no_files_that_are_written(tmp_path, closed, left):
    program = (
        "import sys; from wanjax.cli import exit_codes\n"
        "with exit_codes(), open(sys.argv[1], 'w') as file:\n"
        "    print('\u00fc'); print('\u00fc', file=sys.stderr); file.write(str(file.fileno()))"
    )
    command = f'exec "$0" -c "$1" "$2" {closed}'
    argv = ["sh", "-c", command, sys.executable, program, str(tmp_path / "file")]
    done = subprocess.run(argv, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / "file").read_text()) > 2
    assert done.stdout == "\\xfc\n" * (1 in left)
    assert done.stderr == "\\xfc\n" * (2 in left)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 9 TiB"), "more memory than there is (Unable to allocate 9 TiB)"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "more memory than there is"),
        (RuntimeError("Unable to initialize backend 'foo': ..."), "JAX finds no devices (Unable to initialize"),
        (
            ValueError("invalid truth value 'foo' for environment 'JAX_LOG_COMPILES'"),
            "variable of the environment that JAX",
        ),
        (ValueError('Invalid value "foo" for JAX flag jax_num_cpu_devices'), "variable of the environment that JAX"),
    ],
)
def test_what_a_machine_lacks_is_one_line(error, said, capsys):
    with pytest.raises(SystemExit) as end, exit_codes():
        raise error
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert line.count(";") == 2
    with pytest.raises(ValueError, match="another"), exit_codes():
        raise ValueError("another")


def test_numbers_of_64_bits_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("JAX_ENABLE_X64", "true")
    with pytest.raises(SystemExit, match="2"):
        commands.main(["decode", "latents.npy"])
    assert (
        capsys.readouterr().err == "error: JAX_ENABLE_X64=true; numbers of 32 bits and fewer are accepted; unset it\n"
    )


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


def test_training_caching_and_selecting_keep_their_programs(tmp_path, monkeypatch):
    class KeptError(Exception):
        pass

    def keep(folder):
        raise KeptError(str(folder))

    monkeypatch.setattr(compile_cache, "use_persistent_cache", keep)
    place = str(tmp_path / "programs")
    flags = ["--compile-cache", place]
    for run in (
        lambda: train.train(dataclasses.replace(TrainConfig(), compile_cache=place)),
        lambda: cache.main(["--config", "configs/train_tiny.py", "--out", str(tmp_path / "out"), *flags]),
        lambda: select.main([str(tmp_path), *flags]),
    ):
        with pytest.raises(KeptError) as kept:
            run()
        assert str(kept.value) == place
