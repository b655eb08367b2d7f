"""Two pictures and a sentence go in, a video comes out: `python sample_jax.py --help`.

The same as `wanjax sample`, for a clone that is not installed; see `wanjax/commands/sample.py`.
"""

from wanjax.cli import exit_codes
from wanjax.commands.sample import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    with exit_codes():
        main()
