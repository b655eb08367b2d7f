"""The one exception that a person, not a programmer, is meant to read."""

LONGEST = 2000
"""Characters of a message; what comes out of a hostile file can be longer."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line, whatever was given, and has three parts: what was given, what is accepted, what to do. The
    commands print it after `error:` and exit with code 2, without a traceback.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: object) -> str:
    """Text as a line that a terminal shows as it is: breaks are spaces, other control characters are spelled out."""
    words = " ".join(str(text).split())
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST // 2]} ... {shown[-LONGEST // 2 :]}"
