"""What passes between the selftest and the process of an attempt, as JSON in a folder of that attempt."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from darktrt.engine.bench import Timing
from darktrt.files import atomic_output
from darktrt.selftest.routes import Route, Stage

REQUEST, OUTCOME = "request.json", "outcome.json"


@dataclass(frozen=True)
class Request:
    """What to try, and with which files."""

    route: Route
    models: str
    """The folder of the ONNX files, where times of kernels are kept too."""
    plugins: str | None = None
    tactic_sources: str | None = None


@dataclass(frozen=True)
class Errors:
    """How far the outputs are from PyTorch's, over all images."""

    worst: float | None
    """The largest error of boxes, scores and raw heads, relative to the largest value of the reference; None for a model that
    outputs only detections, or where an output is no number."""
    expected: int
    """Detections of the reference."""
    matched: int
    extra: int
    """Detections that the reference lacks."""
    score: float | None
    """The largest difference of the scores of matched detections."""
    least_iou: float


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt so far."""

    done: tuple[Stage, ...] = ()
    error: str = ""
    """The sentence of the stage that failed."""
    version: str = ""
    """Of the TensorRT that was loaded."""
    build_seconds: float | None = None
    mebibytes: float | None = None
    """Of the engine."""
    int8: tuple[int, int] | None = None
    """Convolutions in INT8, and all."""
    not_run: str = ""
    """Why the engine cannot run on this machine."""
    errors: Errors | None = None
    beyond: str = ""
    """All differences, where some are beyond the tolerance."""
    timings: tuple[Timing, ...] = ()


def write(path: Path, values: Request | Outcome) -> None:
    """Write a record as JSON."""
    with atomic_output(path) as temporary:
        temporary.write_text(json.dumps(asdict(values)), encoding="utf-8")
