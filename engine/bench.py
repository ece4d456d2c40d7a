"""How fast engines are: latency and throughput side by side, the rivals taking turns in one run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

import numpy as np
from tqdm import tqdm

from darktrt import __version__
from darktrt.engine.manifest import read_plan_manifest
from darktrt.engine.runtime import OnnxRunner, PlanRunner
from darktrt.engine.target import gpu_name
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo

SCORE_THRESHOLD, IOU_THRESHOLD = 0.25, 0.45
_CALLS = 20
"""In one turn of one rival."""
_STATE = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit"
"""What nvidia-smi is asked for; nothing is ever set."""


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
    """One rival at one batch size."""

    name: str
    batch: int
    cuda_graph: bool
    network: Spread
    """On the GPU, inputs there already: from the first kernel to the last."""
    end_to_end: Spread
    """From images in host memory to results in host memory, by the host's clock."""
    images_per_second: float
    """End to end, one batch after the other."""
    tflops: float
    """Operations of the convolutions by the network's median time, 10^12 a second."""
    plan_sha256: str = ""
    """Of an engine."""


class Rival(Protocol):
    """Something that takes images and can be timed; both give the milliseconds of each call, on the same random images."""

    def network(self, batch: int, calls: int) -> list[float]:
        """On the GPU, images there already."""

    def end_to_end(self, batch: int, calls: int) -> list[float]:
        """From host memory to host memory."""


class PlanRival:
    """An engine."""

    def __init__(self, runner: PlanRunner, cuda_graph: bool) -> None:
        self._runner, self._graph = runner, cuda_graph

    def network(self, batch: int, calls: int) -> list[float]:
        self._runner.run(made_inputs(self._runner.info, batch))
        return self._runner.time_network(calls, self._graph)

    def end_to_end(self, batch: int, calls: int) -> list[float]:
        return _timed_calls(self._runner.run, made_inputs(self._runner.info, batch), calls)


class OnnxRival:
    """An ONNX file in ONNX Runtime on the GPU; what it does there cannot be told from the copies, so both times are the same.

    Raises:
        DarktrtError: this ONNX Runtime cannot use a GPU, or as :class:`OnnxRunner`.
    """

    def __init__(self, path: str | Path) -> None:
        self._runner = OnnxRunner(path, gpu=0)

    def network(self, batch: int, calls: int) -> list[float]:
        return self.end_to_end(batch, calls)

    def end_to_end(self, batch: int, calls: int) -> list[float]:
        return _timed_calls(self._runner.run, made_inputs(self._runner.info, batch), calls)


def _timed_calls(run: Callable[[Any], object], inputs: Mapping[str, Any], calls: int) -> list[float]:
    found = []
    for _ in range(calls):
        started = time.perf_counter()
        run(inputs)
        found.append(1e3 * (time.perf_counter() - started))
    return found


class RivalError(DarktrtError):
    """A rival has come to its end, in its own words; the others may go on."""


class ProcessRival:
    """A rival in a process of its own, maybe of another Python; :func:`answer` is its other end. To be used as a context.

    Raises:
        DarktrtError: the process cannot start.
        RivalError: it ends.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._name = name
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise DarktrtError(f"{name}: cannot start {command[0]}: {error.strerror}") from error

    def network(self, batch: int, calls: int) -> list[float]:
        return self._ask("network", batch, calls)

    def end_to_end(self, batch: int, calls: int) -> list[float]:
        return self._ask("end_to_end", batch, calls)

    def _ask(self, what: str, batch: int, calls: int) -> list[float]:
        assert self._process.stdin and self._process.stdout and self._process.stderr
        try:
            self._process.stdin.write(json.dumps({"what": what, "batch": batch, "calls": calls}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RivalError(f"{self._name}: its process ended: {_reason(self._process.stderr.read())}")
        times: list[float] = json.loads(line)
        return times

    def __enter__(self) -> ProcessRival:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def _reason(text: str) -> str:
    """The exception in what a process wrote before it ended, or else its last words."""
    lines = text.strip().splitlines()
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Unsupported)\b", line)]
    return (named or lines or ["it gave no reason"])[-1]


def answer(rival: Rival, requests: TextIO, answers: TextIO) -> None:
    """Time a rival as the :class:`ProcessRival` at the other end asks, until it has no more to ask."""
    for line in requests:
        asked = json.loads(line)
        ask = {"network": rival.network, "end_to_end": rival.end_to_end}[asked["what"]]
        print(json.dumps(ask(asked["batch"], asked["calls"])), file=answers, flush=True)


@dataclass(frozen=True)
class Contest:
    """What takes part: engines by name, ONNX files for ONNX Runtime's CUDA provider, and the network in PyTorch."""

    plans: Mapping[str, str | Path]
    plugins: str | Path | None = None
    onnx: Mapping[str, str | Path] = field(default_factory=dict)
    torch: tuple[str, str] | None = None
    """cfg and weights."""
    python: str = sys.executable
    """That runs ONNX Runtime and PyTorch."""

    @contextmanager
    def rivals(self, info: DetectorInfo, graph: bool) -> Iterator[dict[str, Rival]]:
        """Everything that runs with, or without, CUDA graphs."""
        with ExitStack() as stack:
            found: dict[str, Rival] = {
                name: PlanRival(stack.enter_context(PlanRunner(path, self.plugins, graph)), graph)
                for name, path in self.plans.items()
            }
            for name, words in self.processes(info, graph).items():
                found[name] = stack.enter_context(ProcessRival(name, [self.python, "-m", "darktrt", "rival", *words]))
            yield found

    def processes(self, info: DetectorInfo, graph: bool) -> dict[str, list[str]]:
        """The words of ``darktrt rival`` for each that has a process of its own."""
        words = {} if graph else {name: ["onnx", str(path)] for name, path in self.onnx.items()}
        if self.torch:
            network = [*self.torch, f"{info.width}x{info.height}"]
            words |= {} if graph else {"PyTorch eager FP16": ["eager", *network]}
            words["torch.compile FP16"] = ["graph" if graph else "compile", *network]
        return words


class Measured(NamedTuple):
    """Timings, and why there are none of some rivals, a sentence each."""

    timings: tuple[Timing, ...]
    failures: tuple[str, ...]


def measure(
    contest: Contest,
    info: DetectorInfo,
    batches: Sequence[int],
    graphs: Sequence[bool] = (False, True),
    turns: int = 20,
    progress: Callable[[], object] = lambda: None,
) -> Measured:
    """Time everything at every batch size, with and without CUDA graph, in turns of 20 calls, after a warm-up turn.

    A rival whose process ends takes no further part, and the batch at which it ended does not count.

    Args:
        info: of the network.
        progress: called after each of the ``2 * turns`` turns of each rival, batch and kind.

    Raises:
        DarktrtError: an engine cannot be run, or not with one of the batch sizes; or a rival cannot be started.
    """
    timings: list[Timing] = []
    failures: list[str] = []
    for graph in graphs:
        with contest.rivals(info, graph) as rivals:
            for batch in batches:
                timings += _measure_batch(rivals, info, batch, graph, turns, progress, failures)
    return Measured(tuple(timings), tuple(failures))


def _measure_batch(
    rivals: dict[str, Rival],
    info: DetectorInfo,
    batch: int,
    graph: bool,
    turns: int,
    progress: Callable[[], object],
    failures: list[str],
) -> list[Timing]:
    """Those that fail are taken out of ``rivals``."""
    whole: dict[str, list[float]] = {name: [] for name in rivals}
    alone: dict[str, list[float]] = {name: [] for name in rivals}
    for times, what in ((whole, "end_to_end"), (alone, "network")):
        for turn in range(turns + 1):
            for name, rival in list(rivals.items()):
                try:
                    found = getattr(rival, what)(batch, _CALLS)
                except RivalError as error:
                    failures.append(f"batch {batch}, {'CUDA graph' if graph else 'no CUDA graph'}: {error}")
                    del rivals[name]
                    continue
                if turn:  # the first is the warm-up
                    times[name] += found
                    progress()
    return [_timing(name, info, batch, graph, alone[name], whole[name]) for name in rivals]


def _timing(name: str, info: DetectorInfo, batch: int, graph: bool, alone: Sequence[float], whole: Sequence[float]) -> Timing:
    network = Spread.of(alone)
    rate = round(1e3 * batch / float(np.mean(whole)), 1)
    return Timing(name, batch, graph, network, Spread.of(whole), rate, round(info.gflops * batch / network.median, 1))


@dataclass(frozen=True)
class BenchReport:
    """Timings, and where they were taken."""

    gpu: str | None
    tensorrt: tuple[str, ...]
    """What built the engines."""
    timings: tuple[Timing, ...]
    darktrt: str = __version__
    state: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Driver, clocks and power as nvidia-smi told them, ``before`` and ``after``."""
    failures: tuple[str, ...] = ()
    """Of rivals that came to an end, a sentence each."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def to_markdown(self) -> str:
        """A line of facts, and a table with a row a timing."""
        facts = [f"{self.gpu}", *self.tensorrt, f"darktrt {self.darktrt}"]
        for when, state in self.state.items():
            facts.append(f"{when}: {', '.join(f'{name} {value}' for name, value in state.items())}")
        return f"{'; '.join(facts)}\n\n{to_markdown(self.timings)}"


def bench_files(
    plans: Sequence[str],
    batches: Sequence[int],
    turns: int = 20,
    plugins: str | Path | None = None,
    onnx: Sequence[str] = (),
    torch: tuple[str, str] | None = None,
    python: str | None = None,
) -> BenchReport:
    """Time plans given as ``PLAN`` or ``NAME=PLAN``, under a progress bar; the whole of ``darktrt bench``.

    Args:
        onnx: rivals in ONNX Runtime, likewise.
        torch: cfg and weights of a rival in PyTorch.
        python: the Python that runs these; this one by default.

    Raises:
        DarktrtError: two have one name, there is nothing to do, or as :func:`measure`.
    """
    engines, models = _named(plans), _named(onnx)
    names = [name for name, _ in (*engines, *models)]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise DarktrtError(f"two engines are called '{twice[0]}'; give them names: a={engines[0][1]}")
    if turns < 1 or min(batches) < 1:
        raise DarktrtError("--turns and --batch must be 1 or more")
    manifests = [read_plan_manifest(path) for _, path in engines]
    info = manifests[0].info
    contest = Contest(dict(engines), plugins, dict(models), torch, python or sys.executable)
    count = sum(len(contest.plans) + len(contest.processes(info, graph)) for graph in (False, True))
    before = gpu_state()
    with tqdm(total=2 * turns * count * len(batches), unit=" turns", leave=False, disable=not sys.stderr.isatty()) as bar:
        timings, failures = measure(contest, info, batches, turns=turns, progress=bar.update)
    state = {"before": before, "after": gpu_state()} if before else {}
    hashes = {name: one.plan_sha256 for (name, _), one in zip(engines, manifests, strict=True)}
    told = tuple(replace(one, plan_sha256=hashes.get(one.name, "")) for one in timings)
    return BenchReport(gpu_name(), tuple(dict.fromkeys(one.target for one in manifests)), told, state=state, failures=failures)


def _named(entries: Sequence[str]) -> list[tuple[str, str]]:
    return [(name or Path(path).stem, path) for name, _, path in (entry.rpartition("=") for entry in entries)]


def gpu_state() -> dict[str, str]:
    """Driver, clocks and power of the first GPU, as nvidia-smi tells them; empty where there is none."""
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


def made_inputs(info: DetectorInfo, batch: int) -> dict[str, Any]:
    """Inputs of random images, the same at every call."""
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
        "| engine | batch | CUDA graph | network, ms (median) | p90 | p99 | TFLOP/s "
        "| end to end, ms (median) | p90 | p99 | images/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in timings:
        network, whole = (" | ".join(f"{value:.3f}" for value in asdict(one).values()) for one in (one.network, one.end_to_end))
        graph = "yes" if one.cuda_graph else "no"
        rows.append(
            f"| {one.name} | {one.batch} | {graph} | {network} | {one.tflops:.1f} | {whole} | {one.images_per_second:.0f} |"
        )
    return "\n".join(rows) + "\n"
