"""Latency and throughput of engines, measured in turns in one run."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from darktrt import __version__
from darktrt.engine.manifest import read_plan_manifest
from darktrt.engine.runtime import PlanRunner
from darktrt.engine.target import gpu_name
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo, Thresholds
from darktrt.progress import progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from darktrt.progress import Progress

_CALLS = 20
"""In one turn of one engine."""
_STATE = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit"
"""The fields that nvidia-smi is asked for; nothing is ever set."""


@dataclass(frozen=True)
class Spread:
    """Milliseconds of one call: the median, and what 90 and 99 in a hundred calls do not exceed."""

    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Spread:
        """The spread of measured calls, to four decimals."""
        return cls(*(round(float(value), 4) for value in np.percentile(milliseconds, (50, 90, 99))))


@dataclass(frozen=True)
class Timing:
    """One engine at one batch size."""

    name: str
    batch: int
    cuda_graph: bool
    network: Spread
    """On the GPU, with the inputs there already: from the first kernel to the last."""
    end_to_end: Spread
    """From images in host memory to results in host memory, by the host's clock."""
    images_per_second: float
    """End to end, one batch after the other."""
    tflops: float
    """Operations of the convolutions divided by the network's median time, 10^12 a second."""
    plan_sha256: str = ""


def measure(
    plans: Mapping[str, str | Path], batches: Sequence[int], turns: int = 20, plugins: str | Path | None = None
) -> tuple[Timing, ...]:
    """Time every engine at every batch size, with and without CUDA graph, in turns of 20 calls, after a warm-up turn.

    Args:
        plans: engines by name.
        plugins: their plugin library, as :func:`darktrt.plugins.library.find_library` has it.

    Raises:
        DarktrtError: an engine cannot be run, or not with one of the batch sizes.
    """
    timings: list[Timing] = []
    with progress(4 * turns * len(plans) * len(batches), "turns") as bar:
        for graph in (False, True):
            with ExitStack() as stack:
                runners = {name: stack.enter_context(PlanRunner(path, plugins, graph)) for name, path in plans.items()}
                for batch in batches:
                    timings += _measure_batch(runners, batch, graph, turns, bar)
    return tuple(timings)


def _measure_batch(runners: Mapping[str, PlanRunner], batch: int, graph: bool, turns: int, bar: Progress) -> list[Timing]:
    inputs = {name: random_inputs(runner.info, batch) for name, runner in runners.items()}
    end_to_end: dict[str, list[float]] = {name: [] for name in runners}
    network: dict[str, list[float]] = {name: [] for name in runners}
    for times, time_calls in ((end_to_end, _time_end_to_end), (network, _time_network)):
        for turn in range(turns + 1):
            for name, runner in runners.items():
                milliseconds = time_calls(runner, inputs[name], graph)
                if turn:  # the first is the warm-up
                    times[name] += milliseconds
                    bar.update()
    return [_timing(name, runners[name].info, batch, graph, network[name], end_to_end[name]) for name in runners]


def _time_end_to_end(runner: PlanRunner, inputs: Mapping[str, Any], _: bool) -> list[float]:
    milliseconds = []
    for _call in range(_CALLS):
        started = time.perf_counter()
        runner.run(inputs)
        milliseconds.append(1e3 * (time.perf_counter() - started))
    return milliseconds


def _time_network(runner: PlanRunner, inputs: Mapping[str, Any], graph: bool) -> list[float]:
    runner.run(inputs)
    return runner.time_network(_CALLS, graph)


def _timing(
    name: str, info: DetectorInfo, batch: int, graph: bool, network: Sequence[float], end_to_end: Sequence[float]
) -> Timing:
    spread = Spread.of(network)
    rate = round(1e3 * batch / float(np.mean(end_to_end)), 1)
    return Timing(name, batch, graph, spread, Spread.of(end_to_end), rate, round(info.gflops * batch / spread.median, 1))


def random_inputs(info: DetectorInfo, batch: int) -> dict[str, NDArray[Any]]:
    """All inputs of a model by name, with random images, the same at every call; of the usual size where they may have any.

    Raises:
        DarktrtError: the model does not accept such a batch.
    """
    low, _, high = info.batch
    if not low <= batch <= high:
        raise DarktrtError(f"{info.name}: a batch of {batch} images; the model accepts {low} to {high}", "batch")
    random = np.random.default_rng(0)
    if info.image_sizes:
        width, height = info.image_sizes[1]
        images: NDArray[Any] = random.integers(0, 256, (batch, height, width, 3), np.uint8)
    else:
        images = info.images_of_bytes(random.integers(0, 256, (batch, info.height, info.width, info.channels), np.uint8))
    return info.model_inputs(images, [(info.width, info.height)], Thresholds())


@dataclass(frozen=True)
class BenchReport:
    """Timings, and where they were taken."""

    gpu: str | None
    tensorrt: tuple[str, ...]
    """The versions that built the engines."""
    timings: tuple[Timing, ...]
    darktrt: str = __version__
    state: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Driver, clocks and power as nvidia-smi reports them, ``before`` and ``after``."""

    def to_json(self) -> str:
        """Everything, for ``darktrt check report``."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def to_markdown(self) -> str:
        """A line of facts, and a table with a row a timing."""
        facts = [f"{self.gpu}", *self.tensorrt, f"darktrt {self.darktrt}"]
        for when, state in self.state.items():
            facts.append(f"{when}: {', '.join(f'{name} {value}' for name, value in state.items())}")
        return f"{'; '.join(facts)}\n\n{to_markdown(self.timings)}"


def bench_files(
    plans: Sequence[str], batches: Sequence[int], turns: int = 20, plugins: str | Path | None = None
) -> BenchReport:
    """Time engines; the whole of ``darktrt bench``.

    Args:
        plans: files, as ``PLAN`` or ``NAME=PLAN``.

    Raises:
        DarktrtError: two engines have one name, there is nothing to measure, or as :func:`measure`.
    """
    engines = [(name or Path(path).stem, path) for name, _, path in (entry.rpartition("=") for entry in plans)]
    names = [name for name, _ in engines]
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise DarktrtError(f"two engines are called '{repeated[0]}'; give them names: a={engines[0][1]}", "plans")
    for argument, numbers in (("turns", [turns]), ("batch", batches)):
        if min(numbers) < 1:
            raise DarktrtError(f"{min(numbers)} is below 1", argument)
    manifests = [read_plan_manifest(path) for _, path in engines]
    before = gpu_state()
    timings = measure(dict(engines), batches, turns, plugins)
    state = {"before": before, "after": gpu_state()} if before else {}
    hashes = {name: manifest.plan_sha256 for name, manifest in zip(names, manifests, strict=True)}
    timings = tuple(replace(timing, plan_sha256=hashes[timing.name]) for timing in timings)
    return BenchReport(gpu_name(), tuple(dict.fromkeys(manifest.target for manifest in manifests)), timings, state=state)


def gpu_state() -> dict[str, str]:
    """Driver, clocks and power of the first GPU, as nvidia-smi reports them; empty where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_STATE}", "--format=csv,noheader", f"--id={visible}"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_STATE.split(","), (value.strip() for value in done.stdout.strip().split(",")), strict=False))


def to_markdown(timings: Sequence[Timing]) -> str:
    """A table, a row a timing; with several engines, how fast each one's network is as against that of the first."""
    first = {(t.batch, t.cuda_graph): t.network.median for t in timings if t.name == timings[0].name}
    several = len({timing.name for timing in timings}) > 1
    ratio = [f"times as fast as {timings[0].name}"] if several else []
    names = ["engine", "batch", "CUDA graph", "network, ms (median)", "p90", "p99", *ratio, "TFLOP/s"]
    names += ["end to end, ms (median)", "p90", "p99", "images/s"]
    rows = [names, ["---"] * len(names)]
    for timing in timings:
        network, whole = ([f"{value:.3f}" for value in asdict(part).values()] for part in (timing.network, timing.end_to_end))
        speed = first.get((timing.batch, timing.cuda_graph), nan) / timing.network.median
        cells = [timing.name, f"{timing.batch}", "yes" if timing.cuda_graph else "no", *network]
        cells += [f"{speed:.2f}"] if several else []
        rows.append([*cells, f"{timing.tflops:.1f}", *whole, f"{timing.images_per_second:.0f}"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
