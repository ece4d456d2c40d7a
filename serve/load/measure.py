"""A server under load: throughput and latency by the number of concurrent requests, and the time of their parts."""

from __future__ import annotations

import io
import os
import shutil
import statistics
import subprocess
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from functools import reduce
from itertools import groupby
from operator import add
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from darktrt.errors import DarktrtError
from darktrt.metadata import Thresholds
from darktrt.progress import LOGGER, progress
from darktrt.serve.client.client import Client, read_encoded
from darktrt.serve.client.requests import file_request, pixel_request
from darktrt.serve.client.slots import SharedMemory
from darktrt.serve.client.statistics import ModelStatistics
from darktrt.serve.client.transport import Endpoint
from darktrt.serve.load.worker import Latency, Task, Workers, workers
from darktrt.serve.model_info import ModelInfo
from darktrt.serve.repository import find_model, models_of
from darktrt.serve.rows import MOST_PIXELS
from darktrt.serve.server import StartOptions, running_on_free_ports
from darktrt.vision.detector import Arrays, fit
from darktrt.vision.images import decode_image

_Image = TypeVar("_Image")

CONCURRENCY = (1, 2, 4, 8, 16)
_MADE_SIZE = (480, 640)
_MADE_IMAGES = 4
_SAMPLE_SECONDS = 0.5
_MOST_PROCESSES = 8
_LONG = 0.2
"""Part of a level's time: longer requests are counted too rarely, because those under way at its end do not count."""


@dataclass(frozen=True)
class LoadOptions:
    """The load to make.

    Raises:
        DarktrtError: a number is out of range.
    """

    concurrency: tuple[int, ...] = CONCURRENCY
    """Concurrent requests, a level of load each."""
    batch: int = 1
    """Images a request."""
    seconds: float = 5.0
    """Of each level, after a fifth of that to warm up."""
    processes: int = 0
    """That send requests; 0 for half of the processors, at most 8."""
    shared_memory: SharedMemory = "none"
    timeout: float = 60.0
    """Seconds that a request may last."""
    images: tuple[Path, ...] = ()
    """Files to send; made images where there are none."""
    metrics: tuple[str, ...] = ()
    """URL of each server's metrics (default: port 8002 of its host)."""

    def __post_init__(self) -> None:
        if not self.concurrency or min(*self.concurrency, self.batch) < 1 or self.processes < 0 or not 0 < self.seconds <= 3600:
            raise DarktrtError("load needs concurrencies and a batch of 1 or more, and up to 3600 seconds a level")


@dataclass(frozen=True)
class ServerLevel:
    """What one of several servers did in a level; the fields are those of :class:`Level`."""

    server: str
    infer_per_second: float
    latency: Latency | None
    """None where it answered no request."""
    queue_ms: float
    compute_ms: float
    mean_batch: float
    gpu_percent: float | None
    failures: int


@dataclass(frozen=True)
class Level:
    """The measurements with one number of concurrent requests."""

    concurrency: int
    """At all servers together."""
    infer_per_second: float
    """Images, whatever the batch."""
    latency: Latency
    queue_ms: float
    """Mean of a request's wait inside the server."""
    compute_ms: float
    """Mean of copying inputs, running the model and copying outputs."""
    mean_batch: float
    """Images that the server batched for one run of the network."""
    gpu_percent: float | None
    """Mean utilization; None where it is unknown."""
    failures: int = 0
    servers: tuple[ServerLevel, ...] = ()
    """Each server, where there are several."""


@dataclass(frozen=True)
class LoadReport:
    """The levels of one model."""

    server: str
    """Several are separated by commas."""
    model: str
    processes: int
    """That sent the requests."""
    batch: int
    shared_memory: str
    levels: tuple[Level, ...]

    @property
    def best(self) -> Level:
        """The level of the highest throughput."""
        return max(self.levels, key=lambda level: level.infer_per_second)

    def to_markdown(self) -> str:
        """A line of facts, and a table with a row a level."""
        processes = f"{self.processes} process{'es' * (self.processes > 1)}"
        shared = "by the socket" if self.shared_memory == "none" else f"in {self.shared_memory} shared memory"
        several = any(level.servers for level in self.levels)
        columns = ["infer/s", "p50 ms", "p90", "p95", "p99", "queue ms", "compute ms", "batch in the server", "GPU", "failed"]
        columns = ["concurrency", *["server"] * several, *columns]
        rows = [
            f"{self.model} at {self.server}, {self.batch} a request, {shared}; sent by {processes}",
            "",
            f"| {' | '.join(columns)} |",
            "|---" * len(columns) + "|",
        ]
        for level in self.levels:
            rows.append(_row(level, str(level.concurrency), *["all"] * several))
            rows += [_row(one, "", one.server) for one in level.servers]
        return "\n".join(rows) + "\n"


def _row(one: Level | ServerLevel, *first: str) -> str:
    latency = [f"{value:.2f}" for value in asdict(one.latency).values()] if one.latency else ["-"] * len(fields(Latency))
    gpu = "-" if one.gpu_percent is None else f"{one.gpu_percent:.0f} %"
    inside = [f"{value:.2f}" for value in (one.queue_ms, one.compute_ms, one.mean_batch)]
    return f"| {' | '.join([*first, f'{one.infer_per_second:.1f}', *latency, *inside, gpu, str(one.failures)])} |"


def side_by_side(reports: Sequence[LoadReport]) -> str:
    """A table with a row a concurrency and a column a model: throughput and median latency."""
    rows = [f"| concurrency | {' | '.join(report.model for report in reports)} |", "|---" * (len(reports) + 1) + "|"]
    for levels in zip(*(report.levels for report in reports), strict=True):
        cells = [f"{level.infer_per_second:.1f} infer/sec, latency {1e3 * level.latency.p50:.0f} usec" for level in levels]
        rows.append(f"| {levels[0].concurrency} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def measure_load(
    server: str | Endpoint | Sequence[str | Endpoint],
    model: str | None = None,
    version: str = "",
    options: LoadOptions = LoadOptions(),
) -> LoadReport:
    """Load one model of a server, level by level; or of several servers, as :class:`darktrt.Client` shares its requests.

    Raises:
        DarktrtError: the server or the model is not there, it refuses every request of a level, or an image cannot be read.
    """
    memory, count = options.shared_memory, options.processes or _default_processes(max(options.concurrency))
    with Client(server, model, version, batch=options.batch, timeout=options.timeout, shared_memory=memory) as client:
        requests = make_requests(replace(client.model, info=client.info), options)
        if len(options.metrics) not in (0, len(client.endpoints)):
            raise DarktrtError(f"there are {len(client.endpoints)} servers, and metrics of {len(options.metrics)}", "metrics")
        task = Task(tuple(client.endpoints), client.model, requests, options.batch, memory, options.timeout)
        levels = []
        with workers(task, count) as running, progress(len(options.concurrency), "levels") as bar:
            for concurrency in options.concurrency:
                levels.append(_level(client, concurrency, running, options))
                bar.update()
    _warn_of_long_requests(client.model.name, levels, options.seconds)
    servers = ", ".join(map(str, client.endpoints))
    return LoadReport(servers, client.model.name, count, options.batch, memory, tuple(levels))


def measure_repository(
    repository: str | Path, models: Sequence[str] = (), options: LoadOptions = LoadOptions()
) -> list[LoadReport]:
    """Load models of a repository, by default all, on a server that is started for it.

    Raises:
        DarktrtError: as :func:`darktrt.serve.server.running` and :func:`measure_load`.
    """
    folders = [find_model(repository, name) for name in models] or models_of(repository)
    with running_on_free_ports(repository, StartOptions(shared_memory=options.shared_memory != "none")) as server:
        options = replace(options, metrics=(f"http://{server.metrics}/metrics",))
        return [measure_load(server.grpc, folder.name, "", options) for folder in folders]


def _default_processes(concurrency: int) -> int:
    return min(concurrency, max(1, (os.cpu_count() or 1) // 2), _MOST_PROCESSES)


def _warn_of_long_requests(model: str, levels: Sequence[Level], seconds: float) -> None:
    slowest = max(level.latency.p99 for level in levels) / 1e3
    if slowest > seconds * _LONG:
        needed = f"levels of {seconds:g} s are too short for that; measure {slowest / _LONG:.0f} s"
        LOGGER.warning(f"{model}: requests last up to {slowest:.1f} s; {needed}")


def _level(client: Client, concurrency: int, running: Workers, options: LoadOptions) -> Level:
    before = _totals(client)
    metrics = options.metrics or [None] * len(client.endpoints)
    with ExitStack() as stack:
        pairs = zip(client.endpoints, metrics, strict=True)
        gpus = [stack.enter_context(_Utilization(endpoint.host, url)) for endpoint, url in pairs]
        load, by_server = running.send(concurrency, options.seconds)
    changes = _changes(before, _totals(client))
    busy = [gpu.percent() for gpu in gpus]
    servers = [
        ServerLevel(
            str(endpoint),
            one.infer_per_second,
            one.latency,
            *_inside(client, changes.get(str(endpoint)), options),
            percent,
            one.failures,
        )
        for endpoint, one, percent in zip(client.endpoints, by_server, busy, strict=True)
    ]
    assert load.latency
    return Level(
        concurrency,
        load.infer_per_second,
        load.latency,
        *_inside(client, reduce(add, changes.values()) if changes else None, options),
        _mean([percent for percent in busy if percent is not None]),
        load.failures,
        tuple(servers) if len(servers) > 1 else (),
    )


def _inside(client: Client, change: ModelStatistics | None, options: LoadOptions) -> tuple[float, float, float]:
    """Milliseconds in the queue, milliseconds of computing, and the mean batch in the server; zeros where it did nothing."""
    if change is None:
        return 0.0, 0.0, 0.0
    compute = sum(getattr(change, part).mean_ms for part in ("compute_input", "compute_infer", "compute_output"))
    batch = change.mean_batch * (1 if client.model.max_batch else options.batch)  # else Triton counts requests
    return round(change.queue.mean_ms, 3), round(compute, 3), round(batch, 2)


def _totals(client: Client) -> dict[str, ModelStatistics]:
    """By server, the statistics of the version with the most inferences."""
    totals: dict[str, ModelStatistics] = {}
    for one in sorted(client.statistics(), key=lambda version: version.inferences):
        totals[one.server] = one
    return totals


def _changes(before: Mapping[str, ModelStatistics], after: Mapping[str, ModelStatistics]) -> dict[str, ModelStatistics]:
    """By server; one that was started again counts anew."""
    kept = {server for server, one in after.items() if server in before and before[server].success.count <= one.success.count}
    return {server: one - before[server] if server in kept else one for server, one in after.items()}


# --- requests ---


def make_requests(model: ModelInfo, options: LoadOptions) -> tuple[Arrays, ...]:
    """Inputs of a few different requests, as the client sends them.

    Args:
        model: with the batches of requests in its metadata, as :attr:`darktrt.serve.client.client.Client.info` has them.

    Raises:
        DarktrtError: an image cannot be read.
    """
    files = [read_encoded(path) for path in options.images] or [_made_image(seed) for seed in range(_MADE_IMAGES)]
    if model.encoded:
        return tuple(file_request(model.info, group, Thresholds()) for group in _groups(files, options.batch))
    fitted = [fit(decode_image(file, "an image to send", MOST_PIXELS), model.info) for file in files]
    fitted.sort(key=lambda one: one[0].shape)
    sizes = [list(same) for _, same in groupby(fitted, key=lambda one: one[0].shape)]  # a request has images of one size
    return tuple(pixel_request(model.info, group, Thresholds()) for size in sizes for group in _groups(size, options.batch))


def _groups(images: Sequence[_Image], size: int) -> list[list[_Image]]:
    """A batch of this size for each of a few requests."""
    return [[images[(i + j) % len(images)] for j in range(size)] for i in range(len(images))]


def _made_image(seed: int) -> bytes:
    """A JPEG of smooth shades and blocks, which is as large as that of a photograph; one of noise would be larger."""
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


# --- the GPU ---


class _Utilization:
    """Samples of the utilization of a server's GPUs while a block runs."""

    def __init__(self, host: str, metrics: str | None) -> None:
        self._read = _nvidia_smi if host in ("localhost", "127.0.0.1", "::1") and shutil.which("nvidia-smi") else None
        self._metrics = metrics or f"http://{host}:8002/metrics"
        self._samples: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Utilization:
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
        return _mean(self._samples)


def _mean(percents: Sequence[float]) -> float | None:
    return round(statistics.fmean(percents), 1) if percents else None


def _nvidia_smi() -> float | None:
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    values = [float(line) for line in done.stdout.split() if line.replace(".", "").isdigit()]
    return max(values) if values else None


def _triton_metrics(url: str) -> float | None:
    """Utilization of the busiest GPU by the server's metrics for Prometheus."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2) as answer:
            text = answer.read().decode()
    except (OSError, ValueError):
        return None
    values = [100 * float(line.split()[-1]) for line in text.splitlines() if line.startswith("nv_gpu_utilization{")]
    return max(values) if values else None
