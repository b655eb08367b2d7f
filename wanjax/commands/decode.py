"""The video of latents that `wanjax sample --save-latents` wrote, or kept where its own decoding failed.

    wanjax decode latents.npy --checkpoint Wan2.1-FLF2V-14B-720P --output video.mp4

Of the checkpoint only the VAE is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanjax.cli import Parser, add_settings, given_settings, printable
from wanjax.config import SampleConfig

if TYPE_CHECKING:
    import numpy as np

FLAGS = ("checkpoint", "output", "fps", "dtype", "mesh", "compile_cache")
"""Those of `wanjax sample` that say how latents become a video."""


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax decode", description=__doc__)
    parser.add_argument("latents", type=printable, metavar="LATENTS", help=".npy [1, 16, f, h, w]")
    add_settings(parser, SampleConfig, FLAGS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    flags = make_parser().parse_args(argv)
    given = given_settings(flags, SampleConfig, FLAGS)

    from wanjax import demo, media
    from wanjax.files import check_apart, check_output, write_all

    config = SampleConfig(**{"checkpoint": demo.get_config().checkpoint, **given})
    check_apart({"--output": config.output}, {"LATENTS": flags.latents})
    check_output(config.output)
    media.check_fps(config.output, config.fps)
    video = decode(config, flags.latents)
    write_all(media.video_output(config.output, video, config.fps))
    print(config.output)


def decode(config: SampleConfig, path: str) -> np.ndarray:
    """Frames uint8 `[F, H, W, 3]` of a file of latents.

    Raises:
      InputError: the latents, the checkpoint or the mesh cannot be used.
    """
    import jax

    from sharding.mesh import MeshShape, make_mesh, parse_mesh
    from wanjax import media
    from wanjax.sampling.compile_cache import ExecutableCache, cache_folder, use_persistent_cache
    from wanjax.sampling.decoding import decode_video
    from wanjax.sampling.pipeline import choose_checkpoint
    from wanjax.sampling.stages import Stages
    from wanjax.weights.networks import Networks

    use_persistent_cache(cache_folder(config.compile_cache))
    checkpoint = choose_checkpoint(config)
    vae = checkpoint.config("vae")
    networks = Networks(checkpoint, {"vae": vae}, "one")
    latents = media.load_latents(path, vae.z_dim)
    devices = jax.devices() if config.mesh or jax.devices()[0].platform != "cpu" else jax.devices()[:1]
    shape = parse_mesh(config.mesh, len(devices)) if config.mesh else MeshShape(ring=len(devices))
    programs, stages = ExecutableCache(cache_folder(config.compile_cache)), Stages()
    precision = jax.default_matmul_precision("highest" if config.dtype == "float32" else "default")
    with jax.set_mesh(make_mesh(shape, devices)), precision, stages("VAE decode", latents.shape[1]) as tick:
        return decode_video(networks["vae"], jax.numpy.asarray(latents), programs, tick)
