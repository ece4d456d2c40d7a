"""The command ``darktrt``. This module is all that is imported before Ctrl-C and kill are heeded, so it is small."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Timer
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals of Ctrl-C, of kill and of a terminal that is closed: each ends a command so that no half-written file stays."""

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; users' errors become one sentence on stderr and exit status 2.

    Args:
        arguments: the words behind ``darktrt``. None are those of the process, which ends with the command: a signal after its
            work is done ends it at once.
    """
    _fill_standard_descriptors()
    with _interruptible(of_process=arguments is None) as came:
        try:
            from darktrt.cli.commands import run

            return run(sys.argv[1:] if arguments is None else arguments)
        except KeyboardInterrupt:
            pass
        except Exception:  # an import of C code answers a signal with an ImportError
            if not came:
                raise
        return interrupted("darktrt")


def interrupted(command: str) -> int:
    """Say that a command was interrupted; its exit status."""
    with suppress(OSError):
        print(f"{command}: interrupted", file=sys.stderr)
    exec("")  # CPython ends by SIGINT, not with this status, after one in an exec (of dataclasses, say) until the next
    return INTERRUPTED


def _fill_standard_descriptors() -> None:
    """Open what the shell closed (``>&-``) on the null device; else the first file that is opened would get what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)


@contextmanager
def _interruptible(of_process: bool) -> Iterator[list[int]]:
    """Let the signals that end a command raise KeyboardInterrupt in the block; yields the list of those that came.

    Those that were ignored before, as nohup and a shell's background jobs have them, stay ignored.
    """
    came: list[int] = []

    def interrupt(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def send_again(unraisable: Any) -> None:  # Python has swallowed it in a destructor or a callback
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            hook(unraisable)

    try:
        before = {number: signal.signal(number, interrupt) for number in ENDING if signal.getsignal(number) != signal.SIG_IGN}
    except ValueError:  # not the main thread, which signals go to
        yield came
        return
    hook, sys.unraisablehook = sys.unraisablehook, send_again
    try:
        yield came
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if of_process else handler)
