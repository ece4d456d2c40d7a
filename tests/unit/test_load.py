"""What load comes to on paper, and how perf_analyzer is asked, by a program that stands in for it."""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Made
from test_detect import made_info

from darktrt.errors import DarktrtError
from darktrt.serve.client.model_info import ModelInfo, TensorInfo
from darktrt.serve.client.statistics import ModelStatistics, to_table
from darktrt.serve.client.transport import Endpoint
from darktrt.serve.config import ConfigOptions
from darktrt.serve.load import measure as load
from darktrt.serve.load import perf_analyzer
from darktrt.serve.load.measure import Level, LoadOptions, LoadReport, make_requests, side_by_side
from darktrt.serve.load.sweep import Setting, SweepReport, delays_of, settings_of, sweep
from darktrt.serve.load.worker import Latency, Task
from darktrt.serve.repository import write_repository
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins

FLOATS, TEXT = np.dtype(np.float32), np.dtype(object)


def served(*, files: bool = False, max_batch: int = 8) -> ModelInfo:
    front = () if max_batch else (-1,)
    image = TensorInfo("image", TEXT, (1,)) if files else TensorInfo("images", np.dtype(np.uint8), (*front, 128, 160, 3))
    inputs = [image, TensorInfo("score_threshold", FLOATS, (1,)), TensorInfo("iou_threshold", FLOATS, (1,))]
    outputs = [TensorInfo("boxes", FLOATS, (*front, 300, 4)), TensorInfo("scores", FLOATS, (*front, 300))]
    info = made_info(input="uint8", head="nms", max_detections=300)
    return ModelInfo("made", "", "python", info, max_batch, *({one.name: one for one in ones} for ones in (inputs, outputs)))


def level(concurrency: int, rate: float, p99: float, failures: int = 0) -> Level:
    return Level(concurrency, rate, Latency(p99 / 4, p99 / 3, p99 / 2, p99), 0.5, 2.25, 1.5, None, failures)


def report(*levels: Level, model: str = "made") -> LoadReport:
    return LoadReport("grpc://a:1", model, "darktrt load, 2 processes", 1, "system", levels)


def test_latencies_are_percentiles() -> None:
    assert Latency.of([float(i) for i in range(1, 102)]) == Latency(51, 91, 96, 100)


def test_a_row_a_level() -> None:
    text = report(level(1, 100.04, 8), replace(level(16, 900, 40, failures=3), gpu_percent=93.4)).to_markdown()
    assert "made at grpc://a:1, 1 a request, in system shared memory; asked by darktrt load, 2 processes" in text
    assert "| 1 | 100.0 | 2.00 | 2.67 | 4.00 | 8.00 | 0.50 | 2.25 | 1.50 | - | 0 |" in text
    assert "| 16 | 900.0 | 10.00 | 13.33 | 20.00 | 40.00 | 0.50 | 2.25 | 1.50 | 93 % | 3 |" in text


def test_models_side_by_side() -> None:
    text = side_by_side([report(level(1, 44, 8)), report(level(1, 62.4, 4), model="other")])
    assert text.splitlines() == [
        "| concurrency | made | other |",
        "|---|---|---|",
        "| 1 | 44.0 infer/sec, latency 2000 usec | 62.4 infer/sec, latency 1000 usec |",
    ]


def test_the_best_keeps_to_the_budget_without_failures() -> None:
    slow, good, failing = level(16, 900, 80), level(8, 500, 40), level(4, 700, 20, failures=1)
    first, second = Setting(0, 1), Setting(500, 2)
    swept = SweepReport("made", 50, ((first, report(slow, failing)), (second, report(level(1, 90, 9), good))))
    assert swept.best == (second, good)
    assert "| 0 | 1 | - | - | - | - | - |" in swept.to_markdown()
    assert "| 500 | 2 | 500.0 | 8 | 10.00 | 40.00 | 1.50 |" in swept.to_markdown()
    assert "best: a delay of 500 us and 2 instances" in swept.to_markdown()
    assert json.loads(swept.to_json())["best"][0] == {"delay": 500, "instances": 2}
    assert replace(swept, latency_budget_ms=5).best is None


def test_settings() -> None:
    assert settings_of([0, 5], [1, 2]) == [Setting(0, 1), Setting(0, 2), Setting(5, 1), Setting(5, 2)]
    for wrong in ([[-1], [1]], [[0], [0]]):
        with pytest.raises(DarktrtError, match="a sweep needs"):
            settings_of(*wrong)
    with pytest.raises(DarktrtError, match="load needs"):
        LoadOptions(concurrency=(0,))


def test_a_model_that_triton_does_not_batch_gets_no_delays(made: Made, tmp_path: Path) -> None:
    for name, thresholds in (("open", None), ("fixed", (0.25, 0.45))):
        insert_plugins(made.plain, tmp_path / f"{name}.onnx", SurgeryOptions(thresholds=thresholds))
        write_repository(tmp_path / f"{name}.onnx", tmp_path / "models", ConfigOptions("onnxruntime"), name)
    assert delays_of(tmp_path / "models", "open") == (0,) and delays_of(tmp_path / "models", "fixed") == (0, 500, 2000)
    with pytest.raises(DarktrtError, match="has no batches to wait for"):  # before a server is started
        sweep(tmp_path / "models", "open", settings_of([0, 500], [1]), 50, LoadOptions())


def test_images_are_not_told_where_triton_counts_requests() -> None:
    record = {"version": "1", "inference_count": "6", "execution_count": "2", "inference_stats": {"success": {"count": "3"}}}
    one = ModelStatistics.of(record)
    assert to_table([one]).splitlines()[1].split()[:5] == ["1", "3", "0", "6", "3.00"]
    assert to_table([one], batches=False).splitlines()[1].split()[:5] == ["1", "3", "0", "-", "-"]


def test_requests_are_what_the_client_would_send(tmp_path: Path) -> None:
    requests = make_requests(served(), LoadOptions(batch=3))
    assert {name: array.shape for name, array in requests[0].items()} == {
        "images": (3, 128, 160, 3),
        "score_threshold": (1,),
        "iou_threshold": (1,),
    }
    assert not np.array_equal(requests[0]["images"], requests[1]["images"])
    (tmp_path / "a.jpg").write_bytes(b"no image, but sent as it is")
    (request,) = make_requests(served(files=True), LoadOptions(batch=2, images=(tmp_path / "a.jpg",)))
    assert request["image"].tolist() == [[b"no image, but sent as it is"]] * 2


def test_images_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match=r"none\.jpg: cannot be read"):
        make_requests(served(), LoadOptions(images=(tmp_path / "none.jpg",)))
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(DarktrtError, match="an image to ask about"):
        make_requests(served(), LoadOptions(images=(tmp_path / "a.jpg",)))


# perf_analyzer

STAND_IN = """#!/bin/sh
[ "$1" = --version ] && exit 0
printf '%s\\n' "$@" > "$0.arguments"
while [ $# -gt 0 ]; do
  [ "$1" = -f ] && table=$2
  [ "$1" = --input-data ] && cp "$2" "$0.data"
  shift
done
FINISH
"""
TABLE = """Concurrency,Inferences/Second,Client Send,p50 latency,p90 latency,p95 latency,p99 latency
4,320.5,10,12000,13000,14000,15500
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "perf_analyzer"
    path.write_text(STAND_IN.replace("FINISH", f"cat > $table <<'E'\n{TABLE}E"))
    path.chmod(0o755)
    return path


def task(model: ModelInfo, **changes: Any) -> Task:
    requests = make_requests(model, LoadOptions(batch=2))
    return replace(Task(Endpoint.parse("a:1"), model, requests, 2, "none", 60), **changes)


def asked(program: Path, one: Task) -> tuple[list[str], list[dict[str, Any]]]:
    with perf_analyzer.asking(str(program), one, 6) as ask:
        found = ask(4)
    assert (found.infer_per_second, found.latency) == (320.5 * (1 if one.model.max_batch else 2), Latency(12, 13, 14, 15.5))
    data = json.loads(Path(f"{program}.data").read_text())["data"]
    return Path(f"{program}.arguments").read_text().split("\n"), data


def test_perf_analyzer_gets_images_and_thresholds(program: Path) -> None:
    arguments, data = asked(program, task(served(), shared_memory="system"))
    text = " ".join(arguments)
    assert "-m made -u a:1 -i grpc" in text
    assert "-b 2 --shared-memory system --output-shared-memory-size 9600" in text
    assert "--concurrency-range 4" in text
    assert "--measurement-interval 2000" in text
    assert len(base64.b64decode(data[0]["images"]["b64"])) == 128 * 160 * 3, "one image; the program makes batches"
    assert struct.unpack("<f", base64.b64decode(data[0]["iou_threshold"]["b64"])) == pytest.approx((0.45,))


def test_perf_analyzer_for_files_and_for_models_without_batch(program: Path) -> None:
    _, data = asked(program, task(served(files=True)))
    content = base64.b64decode(data[0]["image"]["b64"])
    assert int.from_bytes(content[:4], "little") == len(content) - 4
    assert content[4:6] == b"\xff\xd8"
    arguments, data = asked(program, task(served(max_batch=0), endpoint=Endpoint.parse("http://a:1")))
    assert "--shape=images:2,128,160,3" in arguments
    assert "-b" not in arguments
    assert arguments[arguments.index("-i") + 1] == "http"
    assert len(base64.b64decode(data[0]["images"]["b64"])) == 2 * 128 * 160 * 3


def test_perf_analyzer_fails(program: Path) -> None:
    program.write_text(STAND_IN.replace("FINISH", "echo 'Thread [0] had error: no such model' >&2; exit 99"))
    with pytest.raises(DarktrtError, match=r"perf_analyzer fails: Thread \[0\] had error: no such model"):
        asked(program, task(served()))


def test_a_perf_analyzer_that_does_not_start_is_none(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    assert perf_analyzer.find() == str(program)
    program.write_text("#!/bin/sh\necho 'GLIBC_2.38 not found' >&2\nexit 1\n")
    assert perf_analyzer.find() is None


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
    with load._Utilisation(host, url) as utilisation:
        time.sleep(0.3)
    return utilisation.percent()


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
