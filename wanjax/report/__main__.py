"""`python -m wanjax.report` is `wanjax report`."""

from wanjax.cli import exit_codes
from wanjax.commands.report import main

with exit_codes():
    main()
