"""Scripts of docs/launch, with stand-ins for the programs that they call: what these are asked, and in which words."""

import os
import subprocess

import pytest
from tiny import ROOT

LAUNCH = ROOT / "docs/launch"
PROMPT = 'a bird\'s "flight" & $HOME'
COMMAND = ["wanjax", "sample", "--prompt", PROMPT]
STAND_IN = """#!/bin/sh
[ "$4" = describe ] && exit 1
for word in {name} "$@"; do printf '%s\\0' "$word"; done >> {folder}/calls
printf '\\n\\0' >> {folder}/calls
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script; gives back its exit code and the calls that it made, as lists of words."""
    for name in ("gcloud", "xpk", "srun"):
        program = tmp_path / name
        program.write_text(STAND_IN.format(name=name, folder=tmp_path))
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}

    def run(script, *words, **more):
        done = subprocess.run([LAUNCH / script, *words], env=environment | more, capture_output=True, text=True)
        calls = tmp_path / "calls"
        text = calls.read_text() if calls.exists() else ""
        return done, [call.split("\0")[:-1] for call in text.split("\n\0") if call]

    return run


def words_of(shell):
    """What a shell makes of a line, in a place where $HOME would be seen."""
    done = subprocess.run(["bash", "-c", f'printf "%s\\0" {shell}'], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh", "slurm.sh"])
def test_without_words_the_usage(run, script):
    done, calls = run(script)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert not calls


def test_a_tpu_vm_is_made_given_the_files_and_the_command(run):
    done, calls = run("tpu_vm.sh", "mine", "us-east5-b", "--", *COMMAND, DELETE="1")
    assert done.returncode == 0, done.stderr
    assert [call[4] for call in calls] == ["create", "scp", "ssh", "delete"]
    create, scp, ssh, _ = calls
    assert create[5:] == ["mine", "--accelerator-type", "v6e-8", "--version", "v2-alpha-tpuv6e", "--zone", "us-east5-b"]
    assert scp[-4:] == ["--worker", "all", "--zone", "us-east5-b"]
    last = ssh[ssh.index("--command") + 1].strip().splitlines()[-1].strip()
    assert words_of(last.split(" ", 1)[1]) == COMMAND


def test_xpk_gets_the_command_in_one_word(run):
    done, calls = run("xpk.sh", "cluster", "v6e-8", "image", "--", *COMMAND, ZONE="z", SLICES="2")
    assert done.returncode == 0, done.stderr
    (call,) = calls
    assert call[call.index("--num-slices") + 1] == "2"
    assert words_of(call[call.index("--command") + 1]) == COMMAND


def test_slurm_runs_one_process_a_node(run):
    done, calls = run("slurm.sh", *COMMAND[1:], VENV="/venv")
    assert done.returncode == 0, done.stderr
    assert calls == [["srun", "--kill-on-bad-exit=1", "/venv/bin/wanjax", *COMMAND[1:]]]
