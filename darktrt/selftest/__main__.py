"""``python -m darktrt.selftest FOLDER PARENT``: the process of one attempt, which the process PARENT has started."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl


def end_with(parent: int) -> None:
    """See that this process is killed as soon as the one that started it has ended, in whatever way."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended already
        sys.exit()


if __name__ == "__main__":
    end_with(int(sys.argv[2]))

    from darktrt.selftest.attempt import main

    main(Path(sys.argv[1]))
