"""The error that every part of darktrt raises for a mistake of the user."""

from __future__ import annotations


class DarktrtError(Exception):
    """A mistake in the user's input.

    The message is one sentence that names the file, argument or tensor and says what to do. The command line prints it
    without a trace and exits with status 2.

    Args:
        message: the sentence; it speaks of arguments by their Python names, never of command-line options.
        argument: the argument that would mend it, by its Python name; the command line adds the option of that name.
    """

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


def quote(value: object, most: int = 80) -> str:
    """A value as it stands in a sentence: at most a line, without control characters.

    Args:
        most: the largest number of characters; a longer value ends in an ellipsis.
    """
    text = value if isinstance(value, str) else repr(value)
    short = text if len(text) <= most else f"{text[: most - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
