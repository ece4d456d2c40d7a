"""Load on a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_client import regions_of, url
from triton_models import Models

from darktrt.cli import main
from darktrt.errors import DarktrtError
from darktrt.serve.client.client import Client
from darktrt.serve.load.measure import Level, LoadOptions, measure_load
from darktrt.serve.load.worker import Latency
from darktrt.serve.server import Server


def in_flight(level: Level, batch: int, milliseconds: float) -> float:
    """Requests at once, if each took so long."""
    return level.infer_per_second / batch * milliseconds / 1e3


def most_ms(latency: Latency) -> float:
    """About the largest mean with these percentiles; where the machine halts at times it is far from p50."""
    return 0.5 * latency.p50 + 0.4 * latency.p90 + 0.05 * latency.p95 + 0.05 * latency.p99


@pytest.mark.parametrize(
    ("protocol", "model", "memory", "batch"),
    [("grpc", "made", "system", 2), ("grpc", "files", "none", 1), ("http", "letterbox", "none", 2)],
)
def test_levels_agree_with_what_the_server_counts(triton: Server, protocol: str, model: str, memory: Any, batch: int) -> None:
    options = LoadOptions((1, 4), batch, seconds=1, processes=2, shared_memory=memory)
    with Client(triton.grpc, model) as client:
        before = client.statistics()[0]
        report = measure_load(url(triton, protocol), model, options=options)
        counted = client.statistics()[0] - before
    assert [level.concurrency for level in report.levels] == [1, 4]
    measured = sum(level.infer_per_second for level in report.levels)
    assert 0.5 * counted.inferences < measured <= counted.inferences, "the rest is the warm-up"
    for level in report.levels:
        assert level.failures == 0
        assert 0 < level.latency.p50 <= level.latency.p90 <= level.latency.p95 <= level.latency.p99
        assert level.queue_ms + level.compute_ms < level.latency.p99
        assert 0.4 < in_flight(level, batch, most_ms(level.latency)) / level.concurrency, "as many at once as it says"
        assert in_flight(level, batch, level.latency.p50) / level.concurrency < 1.6
    assert regions_of(triton) == []


def test_the_command_and_its_files(triton: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "load",
        "--server",
        triton.grpc,
        "--model",
        "made",
        "--model",
        "files",
        "--concurrency",
        "1",
        "2",
        "--seconds",
        "0.5",
    ]
    assert main([*command, "--metrics", f"http://{triton.metrics}/metrics", "--json", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    assert "| concurrency | made | files |" in printed
    assert printed.count("| 2 | ") == 3
    reports = json.loads((tmp_path / "a.json").read_text())
    assert [one["model"] for one in reports] == ["made", "files"]
    assert f"| 1 | {reports[0]['levels'][0]['infer_per_second']:.1f} infer/sec, latency " in printed


def test_a_repository_is_served_and_measured(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "load",
        "--repository",
        str(models.repository),
        "--concurrency",
        "2",
        "--seconds",
        "0.5",
        "--shared-memory",
        "system",
    ]
    assert main([*command, "--model", "none"]) == 2
    assert "has no model 'none'; name one of files, letterbox, made [--model]" in capsys.readouterr().err
    assert main([*command, "--model", "made"]) == 0
    assert "| concurrency | made |" in capsys.readouterr().out


def test_nobody_answers(triton: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    options = LoadOptions((2,), seconds=1, timeout=1e-4)
    with pytest.raises(DarktrtError, match=r"0\.0001 s"):
        measure_load(triton.grpc, "made", options=options)
