"""One route, tried in a process of its own: whatever TensorRT does to that process, the others go on.

``python -m darktrt.selftest.attempt FOLDER`` reads ``request.json`` there. It writes ``outcome.json`` after each stage, and the
outputs of the network in Polygraphy's format as ``outputs.json``.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from darktrt.check.runs import Variant, onnx_variant, plan_variant, run, save_results
from darktrt.cuda import dotted_capability, first_gpu
from darktrt.engine.bench import Timing, measure
from darktrt.engine.build import build_file
from darktrt.engine.options import BuildOptions
from darktrt.engine.runtime import PlanRunner
from darktrt.engine.target import find_target
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output
from darktrt.metadata import Thresholds
from darktrt.records import read_record
from darktrt.selftest import network
from darktrt.selftest.routes import Route, Stage

REQUEST, OUTCOME, OUTPUTS, PLAN = "request.json", "outcome.json", "outputs.json", "engine.plan"
BATCHES = 1, 4
"""That engines are timed with."""
_TURNS = 5
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl


@dataclass(frozen=True)
class Request:
    """What to try, and with which files."""

    route: Route
    models: str
    """The folder of the ONNX files, where times of kernels are kept too."""
    plugins: str | None = None
    tactic_sources: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of it so far."""

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
    timings: tuple[Timing, ...] = ()


def main(folder: Path) -> None:
    """Try the route of a folder, stage after stage."""
    request = read_record(Request, folder / REQUEST, "start the selftest again")
    outcome = Outcome()
    try:
        for stage in request.route.stages:
            if not outcome.not_run:
                outcome = _STAGES[stage](request, folder, outcome)
                outcome = replace(outcome, done=(*outcome.done, stage))
                write(folder / OUTCOME, outcome)
    except DarktrtError as error:
        write(folder / OUTCOME, replace(outcome, error=str(error)))


def write(path: Path, values: Request | Outcome) -> None:
    """Write a record as JSON."""
    with atomic_output(path) as temporary:
        temporary.write_text(json.dumps(asdict(values)), encoding="utf-8")


def _load(request: Request, folder: Path, outcome: Outcome) -> Outcome:
    assert request.route.flavour
    return replace(outcome, version=find_target(request.route.flavour).version_text)


def _build(request: Request, folder: Path, outcome: Outcome) -> Outcome:
    route, plan = request.route, folder / PLAN
    assert route.flavour
    measures = find_target(route.flavour).has_timing_cache
    options = BuildOptions(
        route.precision,
        route.flavour,
        route.plugins or (request.plugins if route.nodes == "plugins" else None),
        request.tactic_sources if measures else None,
        1 if measures else None,
        Path(request.models) / "timing.cache" if measures else None,
        strongly_typed=route.strongly_typed,
    )
    with network.calibration(route.scales, Path(request.models) / route.model) as scales:
        manifest = build_file(Path(request.models) / route.model, plan, options, scales)
    int8 = len(manifest.int8_convolutions)
    return replace(
        outcome,
        build_seconds=manifest.build_seconds,
        mebibytes=round(plan.stat().st_size / 2**20, 2),
        int8=(int8, int8 + len(manifest.other_convolutions)) if route.precision == "int8" else None,
    )


def _run(request: Request, folder: Path, outcome: Outcome) -> Outcome:
    if request.route.flavour and (reason := _cannot_run(request.route)):
        return replace(outcome, not_run=reason)
    with _variant(request, folder) as variant:
        images = network.images(variant.info)
        results = [run([variant], image, Thresholds(), layers=False)[0] for image in images]
    save_results({variant.name: results}, folder / OUTPUTS)
    return outcome


def _time(request: Request, folder: Path, outcome: Outcome) -> Outcome:
    timings = measure({request.route.name: folder / PLAN}, BATCHES, _TURNS, request.plugins)
    return replace(outcome, timings=timings)


_STAGES: dict[Stage, Callable[[Request, Path, Outcome], Outcome]] = {
    "load": _load,
    "build": _build,
    "run": _run,
    "time": _time,
}


def _cannot_run(route: Route) -> str:
    """Why engines of this TensorRT cannot run here; empty if they can."""
    gpu = first_gpu()
    assert route.flavour
    target = find_target(route.flavour)
    if gpu is None:
        return "no NVIDIA GPU is usable here"
    if not target.runs_on(gpu[1]):
        return f"engines of {target} do not run on compute capability {dotted_capability(gpu[1])}"
    return ""


@contextmanager
def _variant(request: Request, folder: Path) -> Iterator[Variant]:
    route = request.route
    if route.flavour:
        with PlanRunner(folder / PLAN, request.plugins, cuda_graph=True) as runner:
            yield plan_variant(runner, route.name)
    elif route.runs_in == "PyTorch":
        from darktrt.convert.reference import TorchReference

        reference = TorchReference(network.CFG, network.WEIGHTS)
        yield Variant(route.name, reference.info, route.precision, reference.run)
    else:
        yield onnx_variant(Path(request.models) / route.model, name=route.name)


def end_with_parent() -> None:
    """See that the kernel kills this process as soon as the one that started it has ended, in whatever way."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]))
