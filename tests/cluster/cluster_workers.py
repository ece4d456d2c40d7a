"""Workers of the tests: what a node imports."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from darktrt.check.model import EngineModel
from darktrt.engine import runtime
from darktrt.engine.manifest import read_plan_manifest
from darktrt.errors import DarktrtError
from darktrt.files import read_bytes
from darktrt.onnx_session import OnnxSession
from darktrt.parallel import Worker
from darktrt.progress import LOGGER
from darktrt.vision.boxes import Detections
from darktrt.vision.detector import Arrays

Squares = list[tuple[int, int]]
"""The square of each item, and the worker's process."""


def node() -> str:
    """The name of the node that this process is on, as the tests give it in the environment."""
    return os.environ.get("TEST_NODE", "")


def squares(pause: float = 0.0) -> Worker[int, Squares]:
    return partial(_squares, pause)


def _squares(pause: float, group: Sequence[int]) -> Squares:
    time.sleep(pause)
    return [(item * item, os.getpid()) for item in group]


def hungry(home: str) -> Worker[int, Squares]:
    """Takes all the memory that its node allows at its first group there; at others it takes none."""
    return partial(_hungry, home)


def _hungry(home: str, group: Sequence[int]) -> Squares:
    time.sleep(0.1)
    mark, taken = Path(home, f"{node()}.took"), []
    if node() == "small" and not mark.exists():
        mark.touch()
        for _ in range(200):
            taken.append(b"\1" * (64 << 20))
            time.sleep(0.02)
        time.sleep(60)
    return _squares(0, group)


def deadly(number: int) -> Worker[int, Squares]:
    """Ends its process at this number."""
    return partial(_deadly, number)


def _deadly(number: int, group: Sequence[int]) -> Squares:
    if number in group:
        os._exit(1)
    return _squares(0.02, group)


def wrong() -> Worker[int, Squares]:
    return _wrong


def _wrong(group: Sequence[int]) -> Squares:
    raise DarktrtError(f"{group[0]}: is wrong", "skip_bad")


def warning() -> Worker[int, Squares]:
    return _warning


def _warning(group: Sequence[int]) -> Squares:
    LOGGER.warning("item %d is odd", group[0])
    return _squares(0, group)


def contents(files: Sequence[Path]) -> Worker[Path, list[bytes]]:
    """The content of images and of ``files``, which it deletes before it reads them."""
    return partial(_contents, files)


def _contents(files: Sequence[Path], group: Sequence[Path]) -> list[bytes]:
    for path in (*group, *files):
        path.unlink(missing_ok=True)
    return [read_bytes(path, 1 << 20) for path in (*group, *files)]


def bug() -> Worker[int, Squares]:
    return _bug


def _bug(group: Sequence[int]) -> Squares:
    raise ZeroDivisionError("a bug")


def with_process(make_worker: Callable[[], Worker[Any, Any]]) -> Worker[Any, tuple[Any, int]]:
    """Another worker, whose results come with its process."""
    worker = make_worker()
    return lambda group: (worker(group), os.getpid())


class StandInRunner:
    """What :class:`darktrt.engine.runtime.PlanRunner` is to a detector, for a plan that is an ONNX file."""

    def __init__(self, path: Path, plugins: object) -> None:
        if os.environ["CUDA_VISIBLE_DEVICES"] not in ("0", "1"):
            raise DarktrtError("Ray gives this worker no GPU of its own")
        self.info = read_plan_manifest(path).info
        self.run = OnnxSession(read_bytes(path, 1 << 30), "plan", threads=1).run

    def __enter__(self) -> StandInRunner:
        return self

    def __call__(self, inputs: Arrays) -> Arrays:
        return self.run(inputs)


class StandInEngine(EngineModel):
    """An engine without TensorRT."""

    def make_worker(self) -> Worker[Path, list[Detections]]:
        runtime.PlanRunner = StandInRunner  # type: ignore[assignment, misc]
        return super().make_worker()
