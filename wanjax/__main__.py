"""`python -m wanjax` is the command `wanjax`."""

from wanjax.commands import main

main()
