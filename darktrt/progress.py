"""Progress of long work and warnings, which a program may show, redirect or silence.

Warnings and notes go to Python's logger ``darktrt``: ``logging.getLogger("darktrt").setLevel(logging.ERROR)`` silences them,
and a handler catches them. Progress goes nowhere until :func:`set_progress` says where; the command line shows bars on stderr.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from darktrt.errors import quote

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

LOGGER = logging.getLogger("darktrt")
"""Where warnings and notes go; messages are sentences without a trailing stop."""

Callback = Callable[[str, int, "int | None"], None]
"""Takes a description, how much is done, and the total, which is None where it is not known."""

_CLOCK = "{desc}, {elapsed}"
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
"""tqdm's own, but for slow work, whose rate tqdm turns round: ``4.9s/ images``."""

_shown: Literal["bar"] | Callback | None = None


def set_progress(how: Literal["bar"] | Callback | None) -> None:
    """Choose where the progress of long work goes.

    Args:
        how: ``"bar"`` for a progress bar on stderr, a function ``(description, done, total)`` that is called at every step, or
            None, the default, for nowhere.
    """
    global _shown  # noqa: PLW0603  # one setting of the process, as that of a logger
    _shown = how


class _Stderr(logging.Handler):
    """Prints a line a record on what is stderr at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(f"{prefix}{record.getMessage()}", file=sys.stderr)


def show_on_stderr() -> None:
    """Show progress bars, warnings and notes on stderr, as the command line does."""
    set_progress("bar")
    if not any(isinstance(handler, _Stderr) for handler in LOGGER.handlers):
        LOGGER.addHandler(_Stderr())
    LOGGER.setLevel(logging.INFO)


class Progress:
    """The progress of one piece of work."""

    def __init__(self, total: int | None, description: str, bar: Any) -> None:
        self.total = total
        """May be lowered while the work is under way."""
        self.done = 0
        self._description, self._bar = description, bar
        self._started, self._by_node = time.monotonic(), Counter[str]()

    def update(self, steps: int = 1, node: str = "") -> None:
        """Count steps that are done; where machines share the work, the bar has the rate of each ``node``."""
        self.done += steps
        self._by_node[node] += steps
        if self._bar is not None:
            self._bar.total = self.total
            if node:
                self._bar.set_postfix_str(self.rates(), refresh=False)
            self._bar.update(steps)
        elif callable(_shown):
            _shown(self._description, self.done, self.total)

    def rates(self) -> str:
        """The steps a second of each node since the beginning, such as ``gpu1 41.5/s, gpu2 40.8/s``."""
        seconds = max(time.monotonic() - self._started, 1e-3)
        return ", ".join(f"{node} {steps / seconds:.1f}/s" for node, steps in sorted(self._by_node.items()) if node)

    def aside(self) -> AbstractContextManager[None]:
        """Around output of the caller: a bar on a terminal steps aside for it."""
        if self._bar is None or not sys.stderr.isatty():
            return nullcontext()
        return type(self._bar).external_write_mode(_terminal())  # type: ignore[no-any-return]


@contextmanager
def progress(total: int | None, unit: str, description: str = "", *, least: int = 1, scale: bool = False) -> Iterator[Progress]:
    """Show the progress of the work in the block.

    A terminal sees a bar that goes away when the work is done; a log file gets a line every ten seconds.

    Args:
        total: how many steps there are; None where that is not known, which shows a clock.
        unit: what a step is, in the plural.
        least: a total below this shows no bar.
        scale: count in thousands and millions, as for bytes.
    """
    if _shown != "bar" or (total is not None and total < least):
        yield Progress(total, description, None)
        return
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=quote(description) or None,
        unit=f" {unit}",
        unit_scale=scale,
        file=_terminal(),
        mininterval=0.1 if terminal else 10,
        delay=0 if terminal else 10,
        leave=not terminal,
        bar_format=_CLOCK if total is None and not scale else (_BAR if total else None),
    ) as bar:
        yield Progress(total, description, bar)


def _terminal() -> Any:
    """stderr under what the command line puts over it to escape control characters: a bar moves the cursor."""
    return getattr(sys.stderr, "unescaped", sys.stderr)
