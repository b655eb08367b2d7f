"""Make solvers.npz: what diffusers' schedulers do with flow sigmas. Needs the `golden` extra (torch, diffusers).

    python tests/golden/make_golden_solvers.py

For every case (steps, shift): `{steps}_{shift}_x` the initial sample, `{steps}_{shift}_v` made-up velocities, and for
every solver `{solver}_{steps}_{shift}_timesteps`, `.._sigmas` and `.._samples` (the sample after each step).

The sigmas are the schedulers' own float32 ones; the samples are stepped in float64, because in float32 the weights of
their UniPC corrector lose digits as steps get short (2e-4 at 1000 steps).
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

CASES = [(1, 5.0), (2, 5.0), (3, 0.5), (8, 3.0), (14, 5.0), (15, 5.0), (50, 16.0), (100, 16.0), (1000, 1.0)]
SOLVERS = ("unipc", "dpmpp", "euler")


def scheduler(solver: str, shift: float):
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    return unipc if solver == "unipc" else DPMSolverMultistepScheduler.from_config(unipc.config)


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for steps, shift in CASES:
        case = f"{steps}_{shift:g}"
        x = arrays[f"{case}_x"] = rng.standard_normal(4, np.float32)
        v = arrays[f"{case}_v"] = rng.standard_normal((steps, 4), np.float32)
        for solver in SOLVERS:
            s = scheduler(solver, shift)
            s.set_timesteps(steps)
            s.set_begin_index(0)  # otherwise two equal timesteps make it skip the first step
            arrays[f"{solver}_{case}_timesteps"] = s.timesteps.numpy()
            arrays[f"{solver}_{case}_sigmas"] = s.sigmas.numpy()
            s.sigmas = s.sigmas.double()
            sample, samples = torch.from_numpy(x)[None].double(), []
            for t, velocity in zip(s.timesteps, torch.from_numpy(v)[:, None].double(), strict=True):
                sample = s.step(velocity, t, sample, return_dict=False)[0]
                samples.append(sample[0].numpy())
            arrays[f"{solver}_{case}_samples"] = np.stack(samples).astype(np.float32)
    np.savez_compressed(Path(__file__).with_name("solvers.npz"), **arrays)


if __name__ == "__main__":
    main()
