"""Encode clips once, before training, with the VAE, umT5 and CLIP.

    wanjax cache --config configs/train_flf2v_14b_stage1.py --out clips-encoded

The same command goes on where an earlier one was stopped; several processes on the same folder share the work. Training
reads the folder as `CachedData`.
"""

from __future__ import annotations

import dataclasses

from wanjax.cli import Parser, add_settings, check_counts, given_settings, printable, whole_number
from wanjax.config import TrainConfig, load_config
from wanjax.errors import InputError


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser("wanjax cache", description=__doc__)
    parser.add_argument("--config", type=printable, required=True, metavar="FILE", help="of the training to come")
    out = parser.add_argument(
        "--out", type=printable, required=True, metavar="DIR", help="folder to write, perhaps in a bucket"
    )
    out.remote = True  # pyright: ignore[reportAttributeAccessIssue]  # for `Parser`
    parser.add_argument("--validation", action="store_true", help="encode the held-out clips, `validation`, instead")
    parser.add_argument(
        "--encoders", type=printable, metavar="DIR", help="checkpoint whose VAE, umT5 and CLIP encode the clips"
    )
    parser.add_argument(
        "--batch", type=whole_number, default=8, metavar="N", help="clips encoded at a time (default: 8)"
    )
    parser.add_argument(
        "--processes", type=whole_number, default=1, metavar="N", help="that write the same folder (default: 1)"
    )
    add_settings(parser, TrainConfig, ["compile_cache"])
    parser.add_argument("--process-id", type=whole_number, default=0, metavar="I", help="which of them this is, from 0")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    flags = make_parser().parse_args(argv)
    check_counts(batch=flags.batch, processes=flags.processes)
    if not 0 <= flags.process_id < flags.processes:
        raise InputError(
            f"--process-id {flags.process_id} of --processes {flags.processes}; accepted: 0 to processes - 1; change it"
        )

    import jax

    from sharding.mesh import MeshShape, make_mesh
    from wanjax.conditioning.encoders import open_encoders
    from wanjax.remote import place_for
    from wanjax.sampling.compile_cache import cache_folder, use_persistent_cache
    from wanjax.training.data import open_clips, task_samples
    from wanjax.training.latent_cache import write_cache
    from wanjax.training.objectives.flow_matching import network_to_train

    config = dataclasses.replace(
        load_config(flags.config, TrainConfig), **given_settings(flags, TrainConfig, ["compile_cache"])
    )
    use_persistent_cache(cache_folder(config.compile_cache))
    if flags.validation:
        if config.validation is None:
            raise InputError(f"--validation, but {flags.config} has no validation; held-out clips are needed; set it")
        config = dataclasses.replace(config, data=config.validation)
    config = dataclasses.replace(config, batch=flags.batch, encoders=flags.encoders or config.encoders)
    # The model that training starts from may not be there yet: often it is still being trained.
    dit = config.dit or network_to_train(config)
    devices = jax.local_devices()
    with jax.set_mesh(make_mesh(MeshShape(fsdp=len(devices)), devices)):
        chosen, encoders = open_clips(config), open_encoders(config, dit)
        samples, share = task_samples(config, encoders, chosen), (flags.process_id, flags.processes)
        with place_for(flags.out, "--out", flags.processes) as out:
            write_cache(config, samples, chosen.buckets, encoders, out, share, chosen.repeats)
