"""`sample_jax.py --mesh ..` on eight devices, against the stored outputs of the reference."""

import numpy as np
import pytest
from test_sample import DIFFUSERS, flags

import sample_jax


@pytest.mark.parametrize("mesh", ["data=2,ring=2,ulysses=2", "ring=-1"])
def test_whole_run_on_a_mesh_equals_reference(tmp_path, mesh):
    """36 tokens: four and eight devices in the sequence, of which eight do not divide them."""
    expected = np.load(DIFFUSERS / "expected.npz")
    np.save(tmp_path / "noise.npy", expected["init_noise"])
    files = {"initial_noise": tmp_path / "noise.npy", "save_latents": tmp_path / "l.npy", "output": tmp_path / "v.npy"}
    sample_jax.main(flags(DIFFUSERS, mesh=mesh, **files))

    latents, frames = (np.load(tmp_path / name) for name in ("l.npy", "v.npy"))
    assert np.abs(latents - expected["pipeline_latents"]).max() <= 2e-3
    reference = expected["pipeline_video"].astype(np.float32)
    assert np.abs(frames / 255 - reference.reshape(frames.shape)).max() <= 2 / 255
