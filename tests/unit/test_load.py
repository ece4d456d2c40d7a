"""Requests, measurements and reports of load, without a server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_detect import made_info

from darktrt.errors import DarktrtError
from darktrt.serve.client.statistics import ModelStatistics, to_table
from darktrt.serve.load import measure as load
from darktrt.serve.load.measure import Level, LoadOptions, LoadReport, make_requests, side_by_side
from darktrt.serve.load.worker import Latency
from darktrt.serve.model_info import ModelInfo, TensorInfo

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


def test_models_side_by_side() -> None:
    text = side_by_side([report(level(1, 44, 8)), report(level(1, 62.4, 4), model="other")])
    assert text.splitlines() == [
        "| concurrency | made | other |",
        "|---|---|---|",
        "| 1 | 44.0 infer/sec, latency 2000 usec | 62.4 infer/sec, latency 1000 usec |",
    ]


def test_numbers_that_are_refused() -> None:
    for wrong in ({"concurrency": (0,)}, {"batch": 0}, {"seconds": 0}, {"processes": -1}):
        with pytest.raises(DarktrtError, match="load needs"):
            LoadOptions(**wrong)


def test_images_are_not_reported_where_triton_counts_requests() -> None:
    record = {"version": "1", "inference_count": "6", "execution_count": "2", "inference_stats": {"success": {"count": "3"}}}
    one = ModelStatistics.of(record)
    assert to_table([one]).splitlines()[1].split()[:5] == ["1", "3", "0", "6", "3.00"]
    assert to_table([one], batches=False).splitlines()[1].split()[:5] == ["1", "3", "0", "-", "-"]


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


def test_images_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match=r"none\.jpg: cannot be read"):
        make_requests(remote_model(), LoadOptions(images=(tmp_path / "none.jpg",)))
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(DarktrtError, match="an image to send"):
        make_requests(remote_model(), LoadOptions(images=(tmp_path / "a.jpg",)))


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
