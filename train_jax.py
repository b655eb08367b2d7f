"""Train on a mesh of any number of devices and hosts: `python train_jax.py --help`.

The same as `wanjax train`, for a clone that is not installed; see `wanjax/commands/train.py`.
"""

from wanjax.cli import exit_codes
from wanjax.commands.train import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    with exit_codes():
        main()
