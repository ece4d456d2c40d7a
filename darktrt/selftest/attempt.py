"""One route, tried in a process of its own: whatever TensorRT does to that process, the others go on.

In a folder of its own it reads ``request.json``, and writes ``outcome.json`` after each stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from darktrt.check.agreement import VariantAgreement, compare
from darktrt.check.runs import Variant, load_results, onnx_variant, plan_variant, run, save_results
from darktrt.cuda import dotted_capability, first_gpu
from darktrt.engine.bench import measure
from darktrt.engine.build import build_file
from darktrt.engine.options import BuildOptions
from darktrt.engine.runtime import PlanRunner
from darktrt.engine.target import find_target
from darktrt.errors import DarktrtError
from darktrt.metadata import Thresholds
from darktrt.records import read_record
from darktrt.selftest import network
from darktrt.selftest.outcome import OUTCOME, REQUEST, Errors, Outcome, Request, write
from darktrt.selftest.routes import Route, Stage

OUTPUTS, PLAN = "outputs.json", "engine.plan"
BATCHES = 1, 4
"""That engines are timed with."""
_TURNS = 5


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


def _models(request: Request, folder: Path, outcome: Outcome) -> Outcome:
    network.write_models(Path(request.models))
    return outcome


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


def _compare(request: Request, folder: Path, outcome: Outcome) -> Outcome:
    """Compare with what PyTorch computed where the network was made."""
    (reference,), (results,) = load_results(network.OUTPUTS), load_results(folder / OUTPUTS)
    agreement = compare([], [], [replace(reference, name="recorded PyTorch"), results])
    beyond = "" if agreement.passed else agreement.to_table()
    return replace(outcome, errors=_errors(agreement.variants[0]), beyond=beyond)


def _time(request: Request, folder: Path, outcome: Outcome) -> Outcome:
    timings = measure({request.route.name: folder / PLAN}, BATCHES, _TURNS, request.plugins)
    return replace(outcome, timings=timings)


_STAGES: dict[Stage, Callable[[Request, Path, Outcome], Outcome]] = {
    "models": _models,
    "load": _load,
    "build": _build,
    "run": _run,
    "compare": _compare,
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


def _errors(found: VariantAgreement) -> Errors:
    matches = found.detections
    worst = max((error.worst for error in found.tensors.values()), default=math.nan)
    return Errors(
        worst=_finite(worst),
        expected=matches.expected if matches else 0,
        matched=matches.expected - len(matches.missing) if matches else 0,
        extra=len(matches.extra) if matches else 0,
        score=_finite(matches.score) if matches else None,
        least_iou=matches.iou if matches else 1.0,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
