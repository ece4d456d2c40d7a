"""Requests, measurements and reports of load, without a server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import pytest
from PIL import Image
from test_detect import made_info

from darktrt.errors import DarktrtError
from darktrt.serve.client import servers
from darktrt.serve.client.statistics import ModelStatistics, Spent, to_table
from darktrt.serve.client.transport import Endpoint
from darktrt.serve.load import measure as load
from darktrt.serve.load import worker
from darktrt.serve.load.measure import Level, LoadOptions, LoadReport, make_requests, side_by_side
from darktrt.serve.load.worker import Counts, Latency, LoadResult, Window, Workers
from darktrt.serve.model_info import ModelInfo, TensorInfo
from darktrt.vision.images import decode_image

FLOATS, TEXT = np.dtype(np.float32), np.dtype(object)


def remote_model(*, files: bool = False, max_batch: int = 8) -> ModelInfo:
    front = () if max_batch else (-1,)
    image = TensorInfo("image", TEXT, (1,)) if files else TensorInfo("images", np.dtype(np.uint8), (*front, 128, 160, 3))
    inputs = [image, TensorInfo("score_threshold", FLOATS, (1,)), TensorInfo("iou_threshold", FLOATS, (1,))]
    outputs = [TensorInfo("boxes", FLOATS, (*front, 300, 4)), TensorInfo("scores", FLOATS, (*front, 300))]
    info = made_info(input="uint8", head="nms", max_detections=300)
    return ModelInfo("made", "", "python", info, max_batch, *({one.name: one for one in ones} for ones in (inputs, outputs)))


def level(concurrency: int, rate: float, p99: float, failures: int = 0) -> Level:
    return Level(concurrency, rate, Latency(p99 / 4, p99 / 3, p99 / 2, p99), 0.5, 2.25, 1.5, None, failures)


def report(*levels: Level, model: str = "made") -> LoadReport:
    return LoadReport("grpc://a:1", model, 2, 1, "system", levels)


def test_latencies_are_percentiles() -> None:
    assert Latency.of([float(i) for i in range(1, 102)]) == Latency(51, 91, 96, 100)


def test_a_row_a_level() -> None:
    text = report(level(1, 100.04, 8), replace(level(16, 900, 40, failures=3), gpu_percent=93.4)).to_markdown()
    assert "made at grpc://a:1, 1 a request, in system shared memory; sent by 2 processes" in text
    assert "| 1 | 100.0 | 2.00 | 2.67 | 4.00 | 8.00 | 0.50 | 2.25 | 1.50 | - | 0 |" in text
    assert "| 16 | 900.0 | 10.00 | 13.33 | 20.00 | 40.00 | 0.50 | 2.25 | 1.50 | 93 % | 3 |" in text


def test_the_best_level_is_that_of_the_most_images() -> None:
    levels = level(1, 44, 8), level(2, 90, 9), level(4, 60, 7)
    assert report(*levels).best is levels[1]
    text = replace(report(*levels), processes=1, batch=4, shared_memory="none").to_markdown()
    assert "made at grpc://a:1, 4 a request, by the socket; sent by 1 process\n\n| concurrency |" in text


def test_requests_too_long_for_their_level_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Longer than a fifth of it, those at its end do not count; the slowest of all levels counts."""
    load._warn_of_long_requests("made", [level(1, 9, 400), level(2, 9, 1000)], 5.0)
    assert caplog.records == []
    load._warn_of_long_requests("made", [level(1, 9, 2000), level(2, 9, 400)], 5.0)
    (record,) = caplog.records
    assert record.getMessage() == "made: requests last up to 2.0 s; levels of 5 s are too short for that; measure 10 s"


@pytest.mark.parametrize(("cores", "concurrency", "processes"), [(1, 16, 1), (4, 16, 2), (64, 16, 8), (64, 3, 3), (None, 9, 1)])
def test_half_of_the_processors_send(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, concurrency: int, processes: int
) -> None:
    """And no more processes than requests, nor than eight."""
    monkeypatch.setattr(load.os, "cpu_count", lambda: cores)
    assert load._default_processes(concurrency) == processes


def test_models_side_by_side() -> None:
    text = side_by_side([report(level(1, 44, 8)), report(level(1, 62.4, 4), model="other")])
    assert text.splitlines() == [
        "| concurrency | made | other |",
        "|---|---|---|",
        "| 1 | 44.0 infer/sec, latency 2000 usec | 62.4 infer/sec, latency 1000 usec |",
    ]


def test_numbers_that_are_refused() -> None:
    for wrong in (
        {"concurrency": (0,)},
        {"concurrency": (4, 0)},
        {"concurrency": ()},
        {"batch": 0},
        {"seconds": 0},
        {"seconds": 3600.1},
        {"processes": -1},
    ):
        with pytest.raises(DarktrtError, match="load needs"):
            LoadOptions(**wrong)
    LoadOptions((1,), batch=1, seconds=3600, processes=0)
    usual = LoadOptions()
    assert (usual.concurrency, usual.batch, usual.seconds, usual.timeout) == ((1, 2, 4, 8, 16), 1, 5, 60)


def test_images_are_not_reported_where_triton_counts_requests() -> None:
    record = {"version": "1", "inference_count": "6", "execution_count": "2", "inference_stats": {"success": {"count": "3"}}}
    one = ModelStatistics.of(record)
    assert to_table([one]).splitlines()[1].split()[:5] == ["1", "3", "0", "6", "3.00"]
    assert to_table([one], batches=False).splitlines()[1].split()[:5] == ["1", "3", "0", "-", "-"]


def test_counts_between_two_moments() -> None:
    """Times are means over what happened; nothing took no time."""
    assert Spent(5, 10_000_000) - Spent(1, 2_000_000) == Spent(4, 8_000_000)
    assert Spent(4, 8_000_000).mean_ms == 2 and Spent() == Spent(0, 0) and Spent().mean_ms == 0
    first, second = (
        ModelStatistics.of({"version": "3", "inference_count": count, "execution_count": count // 2, "inference_stats": {}})
        for count in (4, 10)
    )
    change = second - first
    assert (change.version, change.inferences, change.executions, change.mean_batch) == ("3", 6, 3, 2)
    assert (second - second).mean_batch == 0
    heading, row = to_table([second]).splitlines()
    assert len(heading) == len(row) and heading.split()[-4:] == ["queue", *COMPUTE]


@pytest.mark.parametrize("stats", [[], {"success": 3}, {"queue": {"ns": "1.5"}}, {"fail": {"count": True}}])
def test_statistics_that_are_none(stats: Any) -> None:
    with pytest.raises(ValueError, match=r" is |invalid literal"):
        ModelStatistics.of({"inference_stats": stats})


def test_requests_are_what_the_client_would_send(tmp_path: Path) -> None:
    requests = make_requests(remote_model(), LoadOptions(batch=3))
    assert {name: array.shape for name, array in requests[0].items()} == {
        "images": (3, 128, 160, 3),
        "score_threshold": (1,),
        "iou_threshold": (1,),
    }
    assert not np.array_equal(requests[0]["images"], requests[1]["images"])
    (tmp_path / "a.jpg").write_bytes(b"no image, but sent as it is")
    (request,) = make_requests(remote_model(files=True), LoadOptions(batch=2, images=(tmp_path / "a.jpg",)))
    assert request["image"].tolist() == [[b"no image, but sent as it is"]] * 2


def test_a_request_has_images_of_one_size(tmp_path: Path) -> None:
    """Where the model takes any; each image begins a request, as for other models."""
    model = remote_model()
    model = replace(model, info=replace(model.info, input="image", image_sizes=((4, 4), (20, 20), (400, 400))))
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        Image.new("RGB", (30, 40) if i % 2 else (50, 60), (i, i, i)).save(path)
    requests = make_requests(model, LoadOptions(batch=3, images=tuple(paths)))
    assert sorted(request["images"].shape for request in requests) == [(3, 40, 30, 3)] * 2 + [(3, 60, 50, 3)] * 3
    assert sorted(request["images"][:, 0, 0, 0].tolist() for request in requests) == [
        [0, 2, 4],
        [1, 3, 1],
        [2, 4, 0],
        [3, 1, 3],
        [4, 0, 2],
    ]


def test_made_images_are_like_photographs() -> None:
    """In size and in how well they compress."""
    files = make_requests(remote_model(files=True), LoadOptions(batch=4))[0]["image"][:, 0]
    assert len(set(files)) == 4
    for file in files:
        assert decode_image(file, "made", 10**6).shape == (480, 640, 3)
        assert 60_000 < len(file) < 90_000


def test_images_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match=r"none\.jpg: cannot be read"):
        make_requests(remote_model(), LoadOptions(images=(tmp_path / "none.jpg",)))
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(DarktrtError, match="an image to send"):
        make_requests(remote_model(), LoadOptions(images=(tmp_path / "a.jpg",)))


# The processes that send


class Pipe:
    """Stands for a process that sends: what it is sent, and what it answers, in turn."""

    def __init__(self, *answers: Any) -> None:
        self.sent: list[Any] = []
        self._answers = list(answers)

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def recv(self) -> Any:
        if not self._answers:
            raise EOFError
        return self._answers.pop(0)


def test_requests_are_shared_between_processes() -> None:
    """All begin together, after a fifth of the time to warm up; the rate is of images."""
    first, second = Pipe("ready", [Counts([10.0, 20.0], 1, "refused")]), Pipe("ready", [Counts([30.0])])
    before = time.monotonic()
    result, by_server = Workers([first, second], 4).send(5, 10.0)  # type: ignore[list-item]
    assert result == LoadResult(1.2, Latency.of([10, 20, 30]), 1)
    assert by_server == [result]
    assert [first.sent[0], second.sent[0]] == [3, 2] and first.sent[1:] == second.sent[1:]
    (window,) = first.sent[1:]
    assert 1.9 < window.start - before < 5 and window.end - window.start == 10


def test_a_process_that_is_not_needed_rests() -> None:
    busy, idle = Pipe("ready", [Counts([10.0])]), Pipe()
    assert Workers([busy, idle], 1).send(1, 10.0)[0].infer_per_second == 0.1  # type: ignore[list-item]
    assert idle.sent == []


def test_requests_are_counted_by_server() -> None:
    pipes = Pipe("ready", [Counts([10.0]), Counts([], 2, "away")]), Pipe("ready", [Counts([20.0, 30.0]), Counts()])
    together, by_server = Workers(pipes, 2).send(2, 1.0)  # type: ignore[arg-type]
    assert together == LoadResult(6.0, Latency.of([10, 20, 30]), 2)
    assert by_server == [LoadResult(6.0, Latency.of([10, 20, 30]), 0), LoadResult(0.0, None, 2)]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (("ready", [Counts([], 3, "refused")]), r"no request was answered within 2 s \(refused\)"),
        (("ready", [Counts()]), r"no request was answered within 2 s \(each lasts longer\)"),
        (("ready",), "a process that made load ended early; is there enough memory"),
        ((DarktrtError("no shared memory"),), "no shared memory"),
    ],
)
def test_load_that_cannot_be_made(answers: tuple[Any, ...], said: str) -> None:
    with pytest.raises(DarktrtError, match=said):
        Workers([Pipe(*answers)], 1).send(1, 2.0)  # type: ignore[list-item]


class Slot:
    """Stands for a place of requests: each lasts a sixteenth of a second of its own clock, and the second and third fail."""

    def __init__(self) -> None:
        self.prepared = self.sent = 0
        self.now = 0.0

    async def prepare(self, *_: object) -> int:
        self.prepared += 1
        return self.prepared

    async def send(self, transport: object, prepared: int) -> None:
        assert prepared == self.prepared
        self.sent += 1
        self.now += 0.0625
        await asyncio.sleep(0)
        if self.sent in (2, 3):
            raise DarktrtError(f"refused {self.sent}")


class Single:
    """Stands for a server, and for the servers that are this one, with one slot."""

    transport = None

    def __init__(self, slot: Slot) -> None:
        self.all, self.slot = [self], slot

    async def take(self) -> tuple[Single, Slot]:
        return self, self.slot

    async def attempt(self, server: Single, slot: Slot, send: Callable[[], Awaitable[None]]) -> None:
        await send()


def test_answers_in_the_window_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before it belong to the warm-up; a request that fails is prepared anew, and the first error is kept."""
    slot = Slot()
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: slot.now))
    (counts,) = asyncio.run(worker._Sender(Single(slot)).send([{}], Window(0.5, 0.75)))  # type: ignore[arg-type]
    assert counts == Counts([62.5] * 4, 2, "refused 2") and slot.prepared == 3
    assert (slot.sent, slot.now) == (12, 0.75), "until the window ends"


class Place:
    """Stands for a place of requests in a process that sends."""

    lacks_memory = True

    def __init__(self, log: list[tuple[str, int]], *made_of: object) -> None:
        self.made_of, self._log = made_of, log
        self._number = sum(what == "made" for what, _ in log)
        self._note("made")

    def _note(self, what: str) -> None:
        self._log.append((what, self._number))

    async def allocate(self, _: object) -> None:
        self.lacks_memory = False
        self._note("allocated")

    async def run(self, _: object, inputs: str) -> None:
        self._note(f"tried {inputs}")
        await asyncio.sleep(0.01)
        raise DarktrtError("slow at first")

    async def prepare(self, _: object, inputs: str) -> str:
        self._note(f"prepared {inputs}")
        return inputs

    async def send(self, _: object, prepared: str) -> None:
        await asyncio.sleep(0.01)

    async def close(self, _: object) -> None:
        self._note("closed")


def test_a_process_sends_as_many_requests_at_once_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places stay for the next level; requests are used in turns; a first one that fails is no failure."""
    log: list[tuple[str, int]] = []
    closed: list[bool] = []

    async def close() -> None:
        closed.append(True)

    monkeypatch.setattr(servers, "Slot", lambda *made_of: Place(log, *made_of))
    monkeypatch.setattr(servers, "Transport", lambda *_: SimpleNamespace(close=close))
    monkeypatch.setattr(servers, "free_abandoned", AsyncMock())
    task = SimpleNamespace(endpoints=[None], timeout=1.0, model=None, batch=1, shared_memory="none", requests=("a", "b"))
    now = time.monotonic()
    pipe = Pipe(2, Window(now, now + 0.2), 3, Window(now, now + 0.4))
    worker._work(task, pipe)  # type: ignore[arg-type]  # ends when the other end of the pipe does
    kinds = [one if one == "ready" else type(one) for one in pipe.sent]
    assert kinds == ["ready", list, "ready", list]
    assert all(one.latencies and not one.failures for (one,) in pipe.sent[1::2])
    tried, prepared = ([(what[-1], n) for what, n in log if what.startswith(word)] for word in ("tried", "prepared"))
    for used in (tried, prepared):
        assert [inputs for inputs, _ in used] == ["a", "b", "a", "b", "a"]
        assert [sorted(n for _, n in level) for level in (used[:2], used[2:])] == [[0, 1], [0, 1, 2]]
    assert [n for what, n in log if what == "allocated"] == [n for what, n in log if what == "closed"] == [0, 1, 2]
    assert closed == [True]


def test_what_a_process_cannot_begin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object) -> None:
        raise DarktrtError("no shared memory")

    monkeypatch.setattr(worker, "_windows", refuse)
    pipe = Pipe()
    worker._work(None, pipe)  # type: ignore[arg-type]
    assert [str(one) for one in pipe.sent] == ["no shared memory"]


@pytest.mark.parametrize(("max_batch", "batch"), [(8, 2.5), (0, 7.5)])
def test_a_level_is_the_change_of_the_server_s_counts(monkeypatch: pytest.MonkeyPatch, max_batch: int, batch: float) -> None:
    """Of the version that answers; where Triton does not batch, it counts requests."""

    def counted(version: str, count: int, executions: int) -> ModelStatistics:
        times = {name: {"count": count, "ns": count * ms * 10**6} for ms, name in enumerate(("queue", *COMPUTE), 1)}
        record = {"version": version, "inference_count": count, "execution_count": executions, "inference_stats": times}
        return ModelStatistics.of(record, "grpc://gpu-box:8001")

    counts = [[counted("1", 5, 5), counted("2", 10, 10)], [counted("1", 5, 5), counted("2", 110, 50)]]
    result = LoadResult(123.0, Latency(1, 2, 3, 4), 6)
    endpoints = [Endpoint.parse("gpu-box")]
    client = SimpleNamespace(statistics=lambda: counts.pop(0), model=remote_model(max_batch=max_batch), endpoints=endpoints)
    running = SimpleNamespace(send=lambda *asked: (result, [result]) if asked == (4, 5.0) else None)
    found = load._level(client, 4, running, LoadOptions(batch=3, metrics=("http://127.0.0.1:9",)))  # type: ignore[arg-type]
    assert found == Level(4, 123.0, result.latency, 1.0, 2.0 + 3 + 4, batch, None, 6)


def test_a_level_of_several_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One was started again, and one does not answer at the end: each for itself, and all together."""
    endpoints = [Endpoint.parse(f"gpu-{name}") for name in "abc"]

    def counted(server: str, count: int, ms: int) -> ModelStatistics:
        times = {name: {"count": count, "ns": count * ms * 10**6} for name in ("success", "queue", "compute_infer")}
        record = {"version": "1", "inference_count": 2 * count, "execution_count": count, "inference_stats": times}
        return ModelStatistics.of(record, f"grpc://gpu-{server}:8001")

    counts = [[counted("a", 10, 2), counted("b", 100, 2), counted("c", 5, 2)], [counted("a", 20, 3), counted("b", 30, 4)]]
    client = SimpleNamespace(statistics=lambda: counts.pop(0), model=remote_model(), endpoints=endpoints)
    one, none = LoadResult(10.0, Latency(1, 2, 3, 4), 0), LoadResult(0.0, None, 7)
    running = SimpleNamespace(send=lambda *_: (LoadResult(20.0, Latency(1, 2, 3, 4), 7), [one, one, none]))
    monkeypatch.setattr(load, "_Utilization", Busy)
    found = load._level(client, 6, running, LoadOptions(metrics=("40", "60", "")))  # type: ignore[arg-type]
    assert [(s.server[-6:], s.queue_ms, s.compute_ms, s.mean_batch, s.gpu_percent, s.failures) for s in found.servers] == [
        ("a:8001", 4.0, 4.0, 2.0, 40.0, 0),
        ("b:8001", 4.0, 4.0, 2.0, 60.0, 0),
        ("c:8001", 0.0, 0.0, 0.0, None, 7),
    ]
    assert (found.queue_ms, found.mean_batch, found.gpu_percent, found.failures) == (4.0, 2.0, 50.0, 7)
    lines = LoadReport("grpc://gpu-a:8001, ...", "made", 2, 1, "none", (found,)).to_markdown().splitlines()
    assert lines[2].startswith("| concurrency | server | infer/s |")
    assert lines[4] == "| 6 | all | 20.0 | 1.00 | 2.00 | 3.00 | 4.00 | 4.00 | 4.00 | 2.00 | 50 % | 7 |"
    assert lines[7] == "|  | grpc://gpu-c:8001 | 0.0 | - | - | - | - | 0.00 | 0.00 | 0.00 | - | 7 |"
    assert {line.count("|") for line in lines[2:]} == {13}


class Busy:
    """Stands for the utilization of a server's GPUs, which the URL of its metrics states."""

    def __init__(self, host: str, url: str) -> None:
        self._percent = float(url) if url else None

    def __enter__(self) -> Busy:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def percent(self) -> float | None:
        return self._percent


COMPUTE = ("compute_input", "compute_infer", "compute_output")


# The GPU


def test_how_busy_the_gpus_are_is_asked_here_or_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '37\\n80\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(load, "_SAMPLE_SECONDS", 0.01)
    with metrics_server('nv_gpu_utilization{gpu_uuid="a"} 0.25\nnv_gpu_utilization{gpu_uuid="b"} 0.5\n') as url:
        assert busy("localhost", url) == 80, "nvidia-smi sees the server's machine"
        assert busy("gpu-box", url) == 50
        smi.unlink()
        assert busy("127.0.0.1", url) == 50
    with metrics_server("# nothing of GPUs\n") as url:
        assert busy("localhost", url) is None
    assert busy("localhost", url) is None, "nobody answers"


@pytest.mark.parametrize(("printed", "percent"), [("[N/A]\\n37\\n", 37), ("[N/A]\\n", None), ("12.5\\n", 12.5), ("", None)])
def test_gpus_that_state_nothing_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, percent: float | None
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{printed}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert load._nvidia_smi() == percent


def busy(host: str, url: str) -> float | None:
    with load._Utilization(host, url) as utilization:
        time.sleep(0.3)
    return utilization.percent()


@contextmanager
def metrics_server(text: str) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()
