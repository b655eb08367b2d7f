"""`sample_jax.py --mesh ..` on eight devices, of one process and of two, against the reference's stored outputs."""

import socket
import subprocess
import sys

import numpy as np
import pytest
from tiny import DIFFUSERS, PATIENCE, ROOT, environment, flags, golden_arrays

import sample_jax
from wanjax.errors import InputError


@pytest.fixture
def files(tmp_path):
    """The reference's noise, and where the outputs go; both outputs are compared afterwards."""
    expected = golden_arrays("diffusers")
    np.save(tmp_path / "noise.npy", expected["init_noise"])
    yield {"initial_noise": tmp_path / "noise.npy", "save_latents": tmp_path / "l.npy", "output": tmp_path / "v.npy"}
    latents, frames = (np.load(tmp_path / name) for name in ("l.npy", "v.npy"))
    assert np.abs(latents - expected["pipeline_latents"]).max() <= 2e-3
    reference = expected["pipeline_video"].astype(np.float32)
    assert np.abs(frames / 255 - reference.reshape(frames.shape)).max() <= 2 / 255


@pytest.mark.slow
def test_eight_devices_that_do_not_divide_the_tokens(files):
    sample_jax.main(flags(DIFFUSERS, mesh="ring=-1", **files))  # 36 tokens


@pytest.mark.slow
def test_two_processes_of_four_devices(files):
    """Guidance, the ring and Ulysses at once; printed and written once."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    cluster = [{"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": i} for i in "01"]
    command = [sys.executable, "sample_jax.py", *flags(DIFFUSERS, mesh="data=2,ring=2,ulysses=2", **files)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = [subprocess.Popen(command, cwd=ROOT, env=environment(4, **x), **pipes) for x in cluster]
    try:
        (out, _), (silent, _) = (process.communicate(timeout=PATIENCE) for process in run)
    finally:
        for process in run:
            process.kill()
    assert [process.returncode for process in run] == [0, 0]
    assert out.splitlines()[-1].startswith(str(files["output"]))
    assert "VAE decode" in out.splitlines()[-2]
    assert "VAE decode" not in silent
    assert "v.npy" not in silent


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=3", r"is 3 devices .* there are 8; .* use data=1,fsdp=8"),
        ("ulysses=8", r"ulysses=8 cannot split 4 attention heads; the factors that work are 1, 2, 4; "),
    ],
)
def test_meshes_that_do_not_fit(mesh, message):
    with pytest.raises(InputError, match=message) as error:
        sample_jax.main(flags(DIFFUSERS, mesh=mesh))
    assert "\n" not in str(error.value)
