"""How much a server takes: throughput and latency by the number of requests at once, and where their time goes."""

from __future__ import annotations

import io
import os
import shutil
import statistics
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from darktrt.errors import DarktrtError
from darktrt.serve.backend import MOST_PIXELS
from darktrt.serve.client.client import Client, read_encoded
from darktrt.serve.client.model_info import ENCODED, ModelInfo
from darktrt.serve.client.slots import SharedMemory
from darktrt.serve.client.statistics import ModelStatistics
from darktrt.serve.client.transport import Endpoint
from darktrt.serve.load import perf_analyzer
from darktrt.serve.load.worker import Ask, Latency, Task, workers
from darktrt.vision.detector import Arrays, fit
from darktrt.vision.images import decode_image

CONCURRENCY = (1, 2, 4, 8, 16)
SCORE_THRESHOLD, IOU_THRESHOLD = 0.25, 0.45
_MADE_SIZE = (480, 640)
_MADE_IMAGES = 4
_SAMPLE_SECONDS = 0.5
_MOST_PROCESSES = 8
_LONG = 0.2
"""Of a level's time: requests that take longer count too little, for those under way at its end are left out."""

Tool = Literal["auto", "perf_analyzer", "own"]


@dataclass(frozen=True)
class LoadOptions:
    """How to make load."""

    concurrency: tuple[int, ...] = CONCURRENCY
    batch: int = 1
    """Images a request."""
    seconds: float = 5.0
    """Of each level, after a fifth of that to warm up."""
    processes: int = 0
    """That ask; 0 for as many as the machine bears."""
    shared_memory: SharedMemory = "none"
    timeout: float = 60.0
    images: tuple[Path, ...] = ()
    """What to ask about; made images where there is none."""
    tool: Tool = "auto"
    metrics: str | None = None
    """URL of the server's metrics; its host's port 8002 where there is none."""

    def __post_init__(self) -> None:
        if not self.concurrency or min(*self.concurrency, self.batch) < 1 or self.processes < 0 or not 0 < self.seconds <= 3600:
            raise DarktrtError("load needs concurrencies and a batch of at least 1, and some seconds for each level")


@dataclass(frozen=True)
class Level:
    """What so many requests at once came to."""

    concurrency: int
    infer_per_second: float
    """Images, whatever the batch."""
    latency: Latency
    queue_ms: float
    """Mean of a request's wait inside the server."""
    compute_ms: float
    """Mean of taking inputs in, running the model and giving outputs out."""
    mean_batch: float
    """Images that the server put together for one run of the network."""
    gpu_percent: float | None
    """Mean utilisation; None where nothing tells it."""
    failures: int = 0


@dataclass(frozen=True)
class LoadReport:
    """The levels of one model."""

    server: str
    model: str
    tool: str
    batch: int
    shared_memory: str
    levels: tuple[Level, ...]

    @property
    def best(self) -> Level:
        """The level of the highest throughput."""
        return max(self.levels, key=lambda level: level.infer_per_second)

    def to_markdown(self) -> str:
        """A line of facts, and a table with a row a level."""
        shared = "by the socket" if self.shared_memory == "none" else f"in {self.shared_memory} shared memory"
        rows = [
            f"{self.model} at {self.server}, {self.batch} a request, {shared}; asked by {self.tool}",
            "",
            "| concurrency | infer/s | p50 ms | p90 | p95 | p99 | queue ms | compute ms | batch in the server | GPU | failed |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for one in self.levels:
            latency = " | ".join(f"{value:.2f}" for value in asdict(one.latency).values())
            gpu = "-" if one.gpu_percent is None else f"{one.gpu_percent:.0f} %"
            rows.append(
                f"| {one.concurrency} | {one.infer_per_second:.1f} | {latency} | {one.queue_ms:.2f} | {one.compute_ms:.2f} | "
                f"{one.mean_batch:.2f} | {gpu} | {one.failures} |"
            )
        return "\n".join(rows) + "\n"


def side_by_side(reports: Sequence[LoadReport]) -> str:
    """A table with a row a concurrency and a column a model: throughput, and the latency of half of the requests."""
    rows = [f"| concurrency | {' | '.join(report.model for report in reports)} |", "|---" * (len(reports) + 1) + "|"]
    for levels in zip(*(report.levels for report in reports), strict=True):
        cells = [f"{level.infer_per_second:.1f} infer/sec, latency {1e3 * level.latency.p50:.0f} usec" for level in levels]
        rows.append(f"| {levels[0].concurrency} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def measure_load(
    server: str | Endpoint, model: str | None = None, version: str = "", options: LoadOptions = LoadOptions()
) -> LoadReport:
    """Load one model of a server, level by level, under a progress bar.

    Raises:
        DarktrtError: the server or the model is not there, it refuses every request of a level, or an image cannot be read.
    """
    with Client(server, model, version, batch=options.batch, timeout=options.timeout, shared_memory=options.shared_memory) as c:
        requests = make_requests(c.model, options)
        task = Task(c.endpoint, c.model, requests, options.batch, options.shared_memory, options.timeout)
        with _asking(task, options) as (ask, tool):
            bar = tqdm(options.concurrency, unit=" levels", file=sys.stderr, leave=False, disable=not sys.stderr.isatty())
            levels = tuple(_level(c, concurrency, ask, options) for concurrency in bar)
    slowest = max(level.latency.p99 for level in levels) / 1e3
    if slowest > options.seconds * _LONG:
        hint = f"levels of {options.seconds:g} s are short for that; take --seconds {slowest / _LONG:.0f}"
        print(f"{c.model.name}: requests take up to {slowest:.1f} s; {hint}", file=sys.stderr)
    return LoadReport(str(c.endpoint), c.model.name, tool, options.batch, options.shared_memory, levels)


@contextmanager
def _asking(task: Task, options: LoadOptions) -> Iterator[tuple[Ask, str]]:
    """Who asks, and its name."""
    program = perf_analyzer.find() if options.tool != "own" else None
    if program:
        with perf_analyzer.asking(program, task, options.seconds) as ask:
            yield ask, perf_analyzer.NAME
    elif options.tool == "perf_analyzer":
        raise DarktrtError(
            "perf_analyzer is not installed, or does not start here: pip install perf-analyzer (glibc 2.38 or later)"
        )
    else:
        count = options.processes or min(max(options.concurrency), max(1, (os.cpu_count() or 1) // 2), _MOST_PROCESSES)
        with workers(task, count) as made:
            yield (
                lambda concurrency: made.ask(concurrency, options.seconds),
                f"darktrt load, {count} process{'es' * (count > 1)}",
            )


def _level(client: Client, concurrency: int, ask: Ask, options: LoadOptions) -> Level:
    before = _totals(client)
    with _Utilisation(client.endpoint.host, options.metrics) as utilisation:
        asked = ask(concurrency)
    change = _totals(client) - before
    compute = sum(getattr(change, part).mean_ms for part in ("compute_input", "compute_infer", "compute_output"))
    return Level(
        concurrency,
        asked.infer_per_second,
        asked.latency,
        round(change.queue.mean_ms, 3),
        round(compute, 3),
        round(change.mean_batch * (1 if client.model.max_batch else options.batch), 2),  # else Triton counts requests
        utilisation.percent(),
        asked.failures,
    )


def _totals(client: Client) -> ModelStatistics:
    """The statistics of the version that is loaded, or of that which answers most."""
    return max(client.statistics(), key=lambda one: one.inferences)


# --- what is asked ---


def make_requests(model: ModelInfo, options: LoadOptions) -> tuple[Arrays, ...]:
    """Inputs of a few different requests, as the client would send them.

    Raises:
        DarktrtError: an image cannot be read.
    """
    groups = _groups(options)
    make = _encoded_request if model.takes_files else _pixel_request
    requests = tuple(make(model, group) for group in groups)
    if "score_threshold" not in model.inputs:
        return requests
    thresholds = {"score_threshold": SCORE_THRESHOLD, "iou_threshold": IOU_THRESHOLD}
    return tuple({**one, **{name: np.array([value], np.float32) for name, value in thresholds.items()}} for one in requests)


def _groups(options: LoadOptions) -> list[list[bytes]]:
    """Encoded images, a batch of them for each of a few requests."""
    files = [read_encoded(path) for path in options.images] or [_made_image(seed) for seed in range(_MADE_IMAGES)]
    return [[files[(i + j) % len(files)] for j in range(options.batch)] for i in range(len(files))]


def _made_image(seed: int) -> bytes:
    """Smooth shades with blocks on them as JPEG: as large as a photograph of that size is, which noise is not."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0 : _MADE_SIZE[0], 0 : _MADE_SIZE[1]]
    image = np.stack([128 + 80 * np.sin(rows / (31 + 7 * i) + columns / (43 - 5 * i) + seed) for i in range(3)], 2)
    image += random.normal(0, 6, image.shape)
    for _ in range(12):
        y, x = random.integers(0, _MADE_SIZE[0] - 60), random.integers(0, _MADE_SIZE[1] - 60)
        image[y : y + random.integers(20, 120), x : x + random.integers(20, 120)] = random.integers(0, 256, 3)
    encoded = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def _encoded_request(_: ModelInfo, images: Sequence[bytes]) -> Arrays:
    return {ENCODED: np.array(images, object)[:, np.newaxis]}


def _pixel_request(model: ModelInfo, images: Sequence[bytes]) -> Arrays:
    fitted = [fit(decode_image(one, "an image to ask about", MOST_PIXELS), model.info) for one in images]
    inputs: Arrays = {"images": np.stack([array for array, _ in fitted])}
    if model.info.takes_image_size:
        inputs["image_size"] = np.array([placement.inner_size for _, placement in fitted], np.float32)
    return inputs


# --- the GPU ---


class _Utilisation:
    """Samples of how busy the GPUs are while a block runs."""

    def __init__(self, host: str, metrics: str | None) -> None:
        self._read = _nvidia_smi if host in ("localhost", "127.0.0.1", "::1") and shutil.which("nvidia-smi") else None
        self._metrics = metrics or f"http://{host}:8002/metrics"
        self._samples: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Utilisation:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            value = self._read() if self._read else _triton_metrics(self._metrics)
            if value is None:
                return
            self._samples.append(value)

    def percent(self) -> float | None:
        return round(statistics.fmean(self._samples), 1) if self._samples else None


def _nvidia_smi() -> float | None:
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    values = [float(line) for line in done.stdout.split() if line.replace(".", "").isdigit()]
    return max(values) if values else None


def _triton_metrics(url: str) -> float | None:
    """Of the busiest GPU, by what the server tells Prometheus."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2) as answer:
            text = answer.read().decode()
    except (OSError, ValueError):
        return None
    values = [100 * float(line.split()[-1]) for line in text.splitlines() if line.startswith("nv_gpu_utilization{")]
    return max(values) if values else None
