"""A pipeline that checks requests as the real one does and then draws videos at once.

`python tests/tiny_server.py --data DIR --port N` is `wanjax serve` with it, and with PAGE set `wanjax app`.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

from wanjax.commands import app, serve
from wanjax.sampling import pipeline
from wanjax.sampling.pipeline import Pipeline, Step
from wanjax.sampling.result import Result
from wanjax.sampling.stages import Progress


class QuickPipeline(Pipeline):
    """Fades from the first given frame to the last one; `pause` seconds a step."""

    pause = 0.0
    most_steps_at_once = 0

    def preview(self, decoder=None):
        return lambda x0: np.zeros((5, 8, 8, 3), np.uint8)

    def __call__(self, request, *, on_step, on_progress, progress):
        on_progress(Progress("text", 0, 1))
        on_progress(Progress("denoise", 0, request.config.steps))
        for i in range(request.config.steps):
            time.sleep(self.pause)
            on_step(Step(i + 1, request.config.steps, request.noise, None, request.noise))
        on_progress(Progress("VAE decode", 1, 1))
        ends = np.clip((request.frames[[0, -1]] + 1) * 127.5, 0, 255)
        share = np.linspace(0, 1, request.config.frames)[:, None, None, None]
        video = (ends[0] * (1 - share) + ends[1] * share).round().astype(np.uint8)
        return Result(request.noise, video, request.config.fps, {"denoise": 0.1, "VAE decode": 0.1}, 1.0)


if __name__ == "__main__":
    pipeline.Pipeline = QuickPipeline
    QuickPipeline.pause = float(os.environ.get("PAUSE", "0.05"))
    if "SEEN" in os.environ:  # each process of several says which jobs it computed
        import jax

        compute = QuickPipeline.__call__

        def told(self, request, **options):
            result = compute(self, request, **options)
            Path(os.environ["SEEN"], f"{jax.process_index()}-{request.config.seed}").touch()
            return result

        QuickPipeline.__call__ = told
    (app if "PAGE" in os.environ else serve).main(sys.argv[1:])
