"""The error that every part of darktrt raises for a mistake of the user."""

from __future__ import annotations


class DarktrtError(Exception):
    """A mistake in the user's input.

    The message is one sentence that names the file, argument or tensor and says what to do. The command line prints it
    without a trace and exits with status 2.
    """
