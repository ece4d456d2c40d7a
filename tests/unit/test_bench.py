"""``darktrt bench``: what a measured time is, the inputs, the table, and the state of the GPU."""

from __future__ import annotations

import itertools
import json
import subprocess
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import Made

from darktrt import __version__
from darktrt.engine import bench
from darktrt.engine.bench import BenchReport, Spread, Timing, bench_files, gpu_state, measure, random_inputs, to_markdown
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo
from darktrt.progress import set_progress

TIMING = Timing("a", 4, True, Spread(0.5, 0.625, 0.75), Spread(1.0, 1.25, 1.5), 4000.4, 12.34, "ab" * 32)


def test_a_spread_is_of_all_calls() -> None:
    """The median, and what 90 and 99 in a hundred do not exceed, to 0.1 microseconds."""
    assert Spread.of([float(i) for i in range(100, -1, -1)]) == Spread(50, 90, 99)
    assert Spread.of([0.123456, 0.123456]) == Spread(0.1235, 0.1235, 0.1235)


class Runner:
    """In place of an engine: its network takes a quarter of a millisecond, with a CUDA graph half of that."""

    def __init__(self, path: str, plugins: str | None, graph: bool) -> None:
        self.info, self.path, self.graph = Runner.made, path, graph
        Runner.opened.append(self)
        self.calls = 0

    made: DetectorInfo
    opened: list[Runner]
    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda self, *_: None  # noqa: E731

    def run(self, inputs: dict[str, Any]) -> None:
        self.calls += 1

    def time_network(self, calls: int, cuda_graph: bool) -> list[float]:
        assert cuda_graph == self.graph
        return [0.125 if cuda_graph else 0.25] * calls


def test_the_first_turn_is_the_warm_up(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1 + 2 turns of 20 calls, the 40 after the warm-up count; two engines take turns."""
    ticks, now = itertools.count(), [0.0]

    def clock() -> float:
        """Read before and after each call; a call takes 9 s in the first turn of both engines, and then 2 ms."""
        tick = next(ticks)
        now[0] += (9.0 if tick % (2 * 20 * 2 * 3) < 2 * 20 * 2 else 0.002) * (tick % 2)
        return now[0]

    Runner.made, Runner.opened = made.info, []
    monkeypatch.setattr(bench, "PlanRunner", Runner)
    monkeypatch.setattr(bench.time, "perf_counter", clock)
    steps: list[tuple[int, int | None]] = []
    set_progress(lambda _, done, total: steps.append((done, total)))
    timings = measure({"a": "a.plan", "b": "b.plan"}, [2], turns=2)
    set_progress(None)
    assert [(one.name, one.batch, one.cuda_graph) for one in timings] == [
        ("a", 2, False), ("b", 2, False), ("a", 2, True), ("b", 2, True),
    ]  # fmt: skip
    for one in timings:
        assert one.end_to_end.median == pytest.approx(2) and one.end_to_end.p99 == pytest.approx(2)
        assert one.network.median == (0.125 if one.cuda_graph else 0.25)
        assert one.images_per_second == 1000
        assert one.tflops == round(made.info.gflops * 2 / one.network.median, 1)
    assert steps == [(done, 16) for done in range(1, 17)]
    assert [(one.path, one.graph) for one in Runner.opened] == [(f"{n}.plan", g) for g in (False, True) for n in "ab"]
    assert {one.calls for one in Runner.opened} == {3 * 20 + 3}  # one before the network's times


def test_twenty_turns_are_usual(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    Runner.made, Runner.opened = made.info, []
    monkeypatch.setattr(bench, "PlanRunner", Runner)
    monkeypatch.setattr(bench, "gpu_state", dict)
    monkeypatch.setattr(bench, "read_plan_manifest", lambda _: SimpleNamespace(plan_sha256="ab", target="TensorRT 8.6.0"))
    steps: list[tuple[int, int | None]] = []
    set_progress(lambda _, done, total: steps.append((done, total)))
    measure({"a": "a.plan"}, [1])
    assert steps[-1] == (80, 80)  # of the network and end to end, with and without a CUDA graph
    report = bench_files(["x/a.plan", "b=x/a.plan"], [1])
    set_progress(None)
    assert steps[-1] == (160, 160)
    assert [(one.name, one.plan_sha256) for one in report.timings] == [("a", "ab"), ("b", "ab")] * 2
    assert (report.tensorrt, report.state) == (("TensorRT 8.6.0",), {})


def test_inputs_are_the_same_at_every_call(made: Made) -> None:
    """Images over all levels, in the form of the model's input, and the usual thresholds."""
    info = replace(made.info, head="nms", input="uint8")
    inputs, again = random_inputs(info, 2), random_inputs(info, 2)
    assert all(np.array_equal(values, again[name]) for name, values in inputs.items())
    assert inputs["images"].shape == (2, 64, 96, 3) and inputs["images"].dtype == np.uint8
    assert (inputs["images"].min(), inputs["images"].max()) == (0, 255)
    assert not np.array_equal(inputs["images"][0], inputs["images"][1])
    assert inputs["score_threshold"] == np.float32(0.25) and inputs["iou_threshold"] == np.float32(0.45)
    for batch in info.batch[0], info.batch[2]:
        assert len(random_inputs(info, batch)["images"]) == batch
    for batch in info.batch[0] - 1, info.batch[2] + 1:
        with pytest.raises(DarktrtError, match=rf"made: a batch of {batch} images; the model accepts 1 to 3") as caught:
            random_inputs(info, batch)
        assert caught.value.argument == "batch"


def test_images_of_any_size_are_of_the_usual_one(made: Made) -> None:
    info = replace(made.info, head="nms", input="image", image_sizes=((8, 9), (40, 30), (200, 100)))
    images = random_inputs(info, 3)["images"]
    assert images.shape == (3, 30, 40, 3) and images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)


def test_the_table_has_a_row_a_timing() -> None:
    rows = to_markdown([TIMING, replace(TIMING, cuda_graph=False)]).splitlines()
    assert rows[0].count("|") == rows[1].count("|") == rows[2].count("|") == 12
    assert rows[2:] == [
        "| a | 4 | yes | 0.500 | 0.625 | 0.750 | 12.3 | 1.000 | 1.250 | 1.500 | 4000 |",
        "| a | 4 | no | 0.500 | 0.625 | 0.750 | 12.3 | 1.000 | 1.250 | 1.500 | 4000 |",
    ]


def test_several_engines_are_compared_with_the_first() -> None:
    """By the medians of the networks, at the same batch and with or without CUDA graphs both."""
    spread = TIMING.network
    timings = [
        TIMING,
        replace(TIMING, name="b", network=replace(spread, median=0.4)),
        replace(TIMING, batch=8, network=replace(spread, median=0.8)),
        replace(TIMING, name="b", batch=8, network=replace(spread, median=1.0)),
        replace(TIMING, cuda_graph=False, network=replace(spread, median=0.6)),
        replace(TIMING, name="b", cuda_graph=False, network=replace(spread, median=0.6)),
    ]
    rows = [[cell.strip() for cell in row.split("|")] for row in to_markdown(timings).splitlines()]
    assert rows[0][4:9] == ["network, ms (median)", "p90", "p99", "times as fast as a", "TFLOP/s"]
    assert [row[7] for row in rows[2:]] == ["1.00", "1.25", "1.00", "0.80", "1.00", "1.00"]
    assert {len(row) for row in rows} == {14}
    assert rows[3][8:] == ["12.3", "1.000", "1.250", "1.500", "4000", ""]


def test_a_report_says_where_it_was_measured() -> None:
    state = {"before": {"driver_version": "580.1", "clocks.sm": "345 MHz"}, "after": {"driver_version": "580.1"}}
    report = BenchReport("NVIDIA L4", ("TensorRT 8.6.0", "TensorRT 10.3.0"), (TIMING,), state=state)
    assert report.to_markdown().splitlines()[0] == (
        f"NVIDIA L4; TensorRT 8.6.0; TensorRT 10.3.0; darktrt {__version__}; "
        "before: driver_version 580.1, clocks.sm 345 MHz; after: driver_version 580.1"
    )
    assert report.to_markdown().endswith("\n\n" + to_markdown([TIMING]))
    values = json.loads(report.to_json())
    assert values["state"] == state and values["timings"][0]["end_to_end"] == {"median": 1.0, "p90": 1.25, "p99": 1.5}
    assert report.to_json().startswith('{\n  "gpu": "NVIDIA L4",\n') and report.to_json().endswith("\n}\n")
    assert BenchReport(None, (), ()).state == {}


@pytest.mark.parametrize(("visible", "asked"), [(None, "0"), ("", "0"), ("2,1", "2"), ("GPU-ab", "GPU-ab")])
def test_the_state_is_of_the_gpu_that_is_used(monkeypatch: pytest.MonkeyPatch, visible: str | None, asked: str) -> None:
    def answer(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi" and command[-1] == f"--id={asked}" and command[2] == "--format=csv,noheader"
        assert options["check"] and options["text"] and options["capture_output"] and options["timeout"] > 0
        fields = command[1].removeprefix("--query-gpu=").split(",")
        return subprocess.CompletedProcess([], 0, ", ".join(f"<{field}>" for field in fields) + "\n", "")

    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(bench.subprocess, "run", answer)
    state = gpu_state()
    assert {"driver_version", "clocks.sm", "power.draw"} <= set(state)
    assert all(value == f"<{name}>" for name, value in state.items())


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no nvidia-smi"), subprocess.CalledProcessError(9, "nvidia-smi")])
def test_without_nvidia_smi_there_is_no_state(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(bench.subprocess, "run", fails)
    assert gpu_state() == {}
