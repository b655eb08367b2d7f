"""A failure of one process of four ends all of them within seconds, each with its reason as the last line."""

import dataclasses
import os
import subprocess
import sys

import pytest
from test_distributed import free_port
from tiny import DIT, PATIENCE, ROOT, TRAIN, environment, write_config

from wanjax.config import VideoData

T2V = dataclasses.replace(DIT, num_layers=1, in_channels=16, image_dim=None, image_positions=0)
CONFIG = dataclasses.replace(TRAIN, dit=T2V, width=48, frames=9, batch=4, steps=3, warmup=1)


def start(tmp_path, config, change):
    """Four processes, of which number 2 is started otherwise: what each printed, and its exit code."""
    file = write_config(tmp_path / "config.py", config)
    command = [sys.executable, str(ROOT / "train_jax.py"), "--config", file, "--workdir", str(tmp_path / "run")]
    command += ["--mesh", "data=4", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "4", "--process-id"]
    processes = []
    for index in range(4):
        argv, folder, variables = [*command, str(index)], ROOT, environment(1) | {"PYTHONPATH": str(ROOT)}
        if index == 2:
            argv, folder = change(argv, tmp_path)
        processes.append(
            subprocess.Popen(
                argv, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    return outcomes(processes)


def outcomes(processes):
    """What each process printed, and its exit code."""
    try:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    return outputs, [process.returncode for process in processes]


def other_flag(argv, tmp_path):
    return [*argv, "--batch", "8"], ROOT


def missing_config(argv, tmp_path):
    return [x.replace("config.py", "gone.py") for x in argv], ROOT


def other_folder(argv, tmp_path):
    """Where the clips are not."""
    (tmp_path / "elsewhere").mkdir()
    return argv, tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_flag, "process 2 has batch 8, process 0 has 4; the same command"),
        (missing_config, "gone.py does not exist; a Python file with get_config() is needed"),
        (other_folder, "does not exist; accepted: a .jsonl"),
    ],
    ids=["flag", "config", "clips"],
)
def test_all_end_with_the_reason(change, reason, tmp_path):
    config = CONFIG
    if change is other_folder:
        name = os.path.relpath(tmp_path / "clips", ROOT)
        (tmp_path / "clips").mkdir()
        make_clips(tmp_path / "clips")
        config = dataclasses.replace(CONFIG, data=VideoData(name), checkpoint="tests/golden/diffusers", dit=None)
        config = dataclasses.replace(config, checkpoint=str(ROOT / config.checkpoint))
    outputs, codes = start(tmp_path, config, change)
    assert codes == [2] * 4, outputs
    for output in outputs:
        assert reason in output.splitlines()[-1], outputs
        assert "Traceback" not in output


def make_clips(folder):
    import numpy as np

    from wanjax.media import write_video

    for number in range(4):
        write_video(folder / f"{number}.mp4", np.zeros((9, 32, 48, 3), np.uint8), 16)
        (folder / f"{number}.txt").write_text("grey")


STANDS_STILL = """
import sys, threading
from sharding import distributed, stalls

index = int(sys.argv[2])
distributed.initialize("127.0.0.1:" + sys.argv[1], 2, index)
from jax.experimental.multihost_utils import sync_global_devices

with distributed.ending_together(stall_seconds=2):
    for step in range(3):
        if index == 1 and step == 2:
            threading.Event().wait()  # alive, and its heart beats
        stalls.tick()
        sync_global_devices("a step")
"""


def test_a_process_that_lives_and_stands_still_is_found():
    command = [sys.executable, "-c", STANDS_STILL, str(free_port())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, i], cwd=ROOT, env=environment(1), **pipes) for i in "01"]
    outputs, codes = outcomes(processes)
    assert codes == [2, 2], outputs
    for output in outputs:
        assert output.splitlines()[-1].startswith("error: process 1: stands still since "), outputs
        assert "at piece 2 of the work, of which others have come to 3" in output.splitlines()[-1]
