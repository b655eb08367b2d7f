"""The one exception that a person, not a programmer, is meant to read."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line and has three parts: what was given, what is accepted, what to do. The scripts print it
    after `error:` and exit with code 2, without a traceback.
    """
