"""How fast engines are: latency and throughput side by side, the rivals taking turns in one run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from darktrt import DarktrtError, DetectorInfo
from engine.manifest import read_plan_manifest
from engine.runtime import PlanRunner
from engine.target import gpu_name

SCORE_THRESHOLD, IOU_THRESHOLD = 0.25, 0.45
_CALLS = 20
"""In one turn of one rival."""


@dataclass(frozen=True)
class Spread:
    """Milliseconds of one call: of half of the calls, of 90 and of 99 in a hundred not more."""

    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Spread:
        return cls(*(round(float(value), 4) for value in np.percentile(milliseconds, (50, 90, 99))))


@dataclass(frozen=True)
class Timing:
    """One engine at one batch size."""

    name: str
    batch: int
    cuda_graph: bool
    network: Spread
    """On the GPU, inputs there already: from the first kernel to the last."""
    end_to_end: Spread
    """From pictures in host memory to results in host memory, by the host's clock."""
    images_per_second: float
    """End to end, one batch after the other."""


def measure(
    plans: Mapping[str, str | Path],
    batches: Sequence[int],
    graphs: Sequence[bool] = (False, True),
    turns: int = 20,
    plugins: str | Path | None = None,
    progress: Callable[[], object] = lambda: None,
) -> list[Timing]:
    """Time every plan at every batch size, with and without CUDA graph; plans take turns of 20 calls, after a warm-up turn.

    Args:
        progress: called after each of the ``2 * turns`` turns of each plan, batch and kind.

    Raises:
        DarktrtError: a plan cannot be run, or not with one of the batch sizes.
    """
    timings = []
    for graph in graphs:
        with ExitStack() as stack:
            runners = {name: stack.enter_context(PlanRunner(path, plugins, graph)) for name, path in plans.items()}
            for batch in batches:
                timings += _measure_batch(runners, batch, graph, turns, progress)
    return timings


def _measure_batch(
    runners: Mapping[str, PlanRunner], batch: int, graph: bool, turns: int, progress: Callable[[], object]
) -> list[Timing]:
    inputs = {name: made_inputs(runner.info, batch) for name, runner in runners.items()}
    whole: dict[str, list[float]] = {name: [] for name in runners}
    alone: dict[str, list[float]] = {name: [] for name in runners}
    for times, take in ((whole, _end_to_end), (alone, _network)):
        for turn in range(turns + 1):
            for name, runner in runners.items():
                found = take(runner, inputs[name], graph)
                if turn:  # the first is the warm-up
                    times[name] += found
                    progress()
    return [
        Timing(name, batch, graph, Spread.of(alone[name]), Spread.of(whole[name]), round(1e3 * batch / np.mean(whole[name]), 1))
        for name in runners
    ]


def _end_to_end(runner: PlanRunner, inputs: Mapping[str, Any], _: bool) -> list[float]:
    found = []
    for _call in range(_CALLS):
        started = time.perf_counter()
        runner.run(inputs)
        found.append(1e3 * (time.perf_counter() - started))
    return found


def _network(runner: PlanRunner, inputs: Mapping[str, Any], graph: bool) -> list[float]:
    runner.run(inputs)
    return runner.time_network(_CALLS, graph)


@dataclass(frozen=True)
class BenchReport:
    """Timings, and where they were taken."""

    gpu: str | None
    tensorrt: tuple[str, ...]
    """What built the engines."""
    timings: tuple[Timing, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def to_markdown(self) -> str:
        """A line of facts, and a table with a row a timing."""
        return f"{self.gpu}; {', '.join(self.tensorrt)}\n\n{to_markdown(self.timings)}"


def bench_files(
    plans: Sequence[str], batches: Sequence[int], turns: int = 20, plugins: str | Path | None = None
) -> BenchReport:
    """Time plans given as ``PLAN`` or ``NAME=PLAN``, under a progress bar; the whole of ``darktrt bench``.

    Raises:
        DarktrtError: two have one name, there is nothing to do, or as :func:`measure`.
    """
    named = [(name or Path(path).stem, path) for name, _, path in (plan.rpartition("=") for plan in plans)]
    if twice := [name for i, (name, _) in enumerate(named) if name in dict(named[:i])]:
        raise DarktrtError(f"two engines are called '{twice[0]}'; give them names: a={named[0][1]}")
    if turns < 1 or min(batches) < 1:
        raise DarktrtError("--turns and --batch must be 1 or more")
    manifests = [read_plan_manifest(path) for _, path in named]
    with tqdm(total=4 * turns * len(named) * len(batches), unit=" turns", leave=False, disable=not sys.stderr.isatty()) as bar:
        timings = measure(dict(named), batches, turns=turns, plugins=plugins, progress=bar.update)
    return BenchReport(gpu_name(), tuple(dict.fromkeys(one.target for one in manifests)), tuple(timings))


def made_inputs(info: DetectorInfo, batch: int) -> dict[str, Any]:
    """Inputs of random pictures, the same at every call."""
    random = np.random.default_rng(0)
    shape = (batch, info.height, info.width, info.channels)
    images: Any = random.integers(0, 256, shape, np.uint8)
    if info.input == "float":
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    inputs = {"images": images}
    if info.takes_thresholds:
        inputs["score_threshold"] = np.array([SCORE_THRESHOLD], np.float32)
        inputs["iou_threshold"] = np.array([IOU_THRESHOLD], np.float32)
    if info.takes_image_size:
        inputs["image_size"] = np.full((batch, 2), (info.width, info.height), np.float32)
    return inputs


def to_markdown(timings: Sequence[Timing]) -> str:
    """A table, a row a timing."""
    rows = [
        "| engine | batch | CUDA graph | network, ms (median) | p90 | p99 | end to end, ms (median) | p90 | p99 | images/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in timings:
        spreads = [f"{value:.3f}" for spread in (one.network, one.end_to_end) for value in asdict(spread).values()]
        graph = "yes" if one.cuda_graph else "no"
        rows.append(f"| {one.name} | {one.batch} | {graph} | {' | '.join(spreads)} | {one.images_per_second:.0f} |")
    return "\n".join(rows) + "\n"
