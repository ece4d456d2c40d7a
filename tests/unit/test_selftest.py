"""darktrt selftest: which routes a machine has, how each is judged, and what the report says."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_gpu import FakeGpu
from fake_tensorrt import FakeTensorRT
from helpers import files_in, session, timing

import darktrt
from darktrt.calib.graph import tensors_to_calibrate
from darktrt.check.agreement import VariantAgreement, compare
from darktrt.check.runs import Variant, load_results
from darktrt.check.tolerance import Matches, TensorError, tolerance_of
from darktrt.cli import main
from darktrt.convert.export import convert_darknet
from darktrt.convert.reference import TorchReference
from darktrt.cuda import dotted_capability
from darktrt.engine import build as build_module
from darktrt.engine import target as target_module
from darktrt.engine import timing_cache
from darktrt.engine.bench import Timing
from darktrt.engine.manifest import read_plan_manifest
from darktrt.engine.runtime import OnnxRunner
from darktrt.engine.target import Target
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.onnx_file import load_model
from darktrt.pipeline import load_calibration
from darktrt.plugins.ops import DOMAIN, OPS
from darktrt.records import read_record, record
from darktrt.selftest import attempt, machine, network, outcome, run
from darktrt.selftest.outcome import Errors
from darktrt.selftest.report import Row, SelftestReport
from darktrt.selftest.routes import Routes, cpu_routes, engine_routes

PLUGINS = tuple(OPS)


# --- the network ---


def test_the_plain_model_is_what_pytorch_makes_of_cfg_and_weights(tmp_path: Path) -> None:
    convert_darknet(network.CFG, network.WEIGHTS, tmp_path / "again.onnx", batch=(1, 2, 4))
    (model, info), (again, same) = load_model(network.PLAIN), load_model(tmp_path / "again.onnx")
    assert info == same
    assert info.sources == {"cfg": sha256_of(network.CFG), "weights": sha256_of(network.WEIGHTS)}
    assert [node.op_type for node in model.graph.node] == [node.op_type for node in again.graph.node]
    inputs = {"images": info.images_of_bytes(network.images(info)[1].pixels[np.newaxis])}
    for one, other in zip(session(network.PLAIN).run(None, inputs), session(again).run(None, inputs), strict=True):
        assert np.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_recorded_outputs_are_pytorchs() -> None:
    """Otherwise every route would fail on every machine."""
    reference = TorchReference(network.CFG, network.WEIGHTS)
    (recorded,) = load_results(network.OUTPUTS)
    agreement = compare([Variant("PyTorch", reference.info, "fp32", reference.run)], network.images(reference.info), [recorded])
    assert agreement.passed and agreement.images == 2
    assert set(agreement.variants[0].tensors) == {"head0_raw", "head1_raw", "boxes", "scores"}
    found = agreement.variants[0].detections
    assert found and found.expected > 80


def test_the_images_are_the_same_bits_on_every_machine() -> None:
    """The recorded outputs are of these."""
    info = load_model(network.PLAIN)[1]
    assert [image.digest[:12] for image in network.images(info)] == DIGESTS
    assert network.images(info)[0].pixels.shape == (info.height, info.width, 3) and info.width != info.height


DIGESTS = ["0acb139bebdc", "8cf713be5153"]


def test_the_calibration_has_a_scale_for_every_tensor(tmp_path: Path) -> None:
    network.write_models(tmp_path)
    model, info = load_model(tmp_path / "portable.onnx")
    calibration = load_calibration(network.CALIBRATION)
    assert set(tensors_to_calibrate(model, info)) <= set(calibration.scales)
    assert calibration.channel_means and calibration.fp_layers is None


def test_the_network_has_what_tensorrt_treats_in_its_own_way(tmp_path: Path) -> None:
    """Both fused forms of Mish, two heads, NMS with a distance term in a letterbox, a dynamic batch."""
    model, info = load_model(network.PLAIN)
    assert info.takes_image_size is False and info.nms_letterbox and len(info.heads) == 2
    assert info.batch == (1, 2, 4)
    report = darktrt.insert_plugins(network.PLAIN, tmp_path / "fused.onnx", darktrt.SurgeryOptions(mish="fused"))
    assert report.fused.adds and report.fused.concats
    assert {node.op_type for node in model.graph.node} >= {"LeakyRelu", "MaxPool", "Resize", "Concat", "Softplus"}


# --- routes ---


def names(found: Routes) -> list[str]:
    return [route.name for route in found.possible]


def test_routes_of_tensorrt_8_6() -> None:
    found = engine_routes(Target("trt", (8, 6, 0)), library=True)
    assert names(found) == [
        "FP32, standard ops",
        "FP16, standard ops",
        "INT8, calibration cache, standard ops",
        "FP32, plugins",
        "FP16, plugins",
        "INT8, calibration cache, plugins",
        "FP16, images of any size, plugins",
        "INT8, TensorRT's own calibration, plugins",
        "INT8, Q/DQ nodes of the file, plugins",
    ]
    assert found.impossible.keys() == {"bodies in TensorRT 8.6.0", "strong typing in TensorRT 8.6.0"}
    assert "lacks some standard ops" in found.impossible["bodies in TensorRT 8.6.0"]


def test_tensorrt_without_a_plugin_library_does_what_is_left() -> None:
    found = engine_routes(Target("trt", (8, 6, 0)), library=False)
    assert names(found) == [
        "FP32, standard ops",
        "FP16, standard ops",
        "INT8, calibration cache, standard ops",
        "INT8, TensorRT's own calibration, standard ops",
    ]
    assert "darktrt plugins" in found.impossible["plugins in TensorRT 8.6.0"]


def test_routes_of_tensorrt_10() -> None:
    """Everything that there is, and strong typing beside weak typing."""
    found = engine_routes(Target("trt", (10, 14, 1)), library=True)
    forms = [f"{one}, {nodes}" for nodes in ("standard ops", "bodies", "plugins") for one in USUAL]
    assert names(found) == [
        *forms,
        "FP16, images of any size, plugins",
        "INT8, TensorRT's own calibration, plugins",
        "INT8, Q/DQ nodes of the file, plugins",
        "FP16, strongly typed, plugins",
        "INT8, Q/DQ nodes, strongly typed, plugins",
    ]
    assert [route.name for route in found.possible if route.strongly_typed] == names(found)[-2:]
    assert found.impossible == {}


USUAL = "FP32", "FP16", "INT8, calibration cache"


@pytest.mark.parametrize(("target", "forms"), [(Target("trt", (11, 0, 0)), 3), (Target("rtx", (1, 7, 1)), 2)])
def test_routes_where_types_come_from_the_file(target: Target, forms: int) -> None:
    found = engine_routes(target, library=True)
    nodes = ("standard ops", "bodies", "plugins")[:forms]
    expected = [f"{one}, {form}" for form in nodes for one in ("FP32", "FP16", "INT8, Q/DQ nodes")]
    assert names(found) == [*expected, f"FP16, images of any size, {nodes[-1]}"]
    assert f"INT8 by a calibration cache in {target}" in found.impossible
    assert (f"plugins in {target}" in found.impossible) == (target.flavour == "rtx")


def test_a_route_states_its_model_and_its_plugins() -> None:
    found = engine_routes(Target("trt", (10, 14, 1)), library=True).possible
    assert {route.model for route in found if route.nodes == "standard ops"} == {"plain.onnx"}
    assert {route.plugins for route in found if route.nodes == "bodies"} == {"none"}
    assert {route.plugins for route in found if route.nodes != "bodies"} == {None}
    by_name = {route.name: route.model for route in found}
    assert by_name["FP16, images of any size, plugins"] == "image.onnx"
    assert by_name["INT8, Q/DQ nodes of the file, plugins"] == "quantized.onnx"
    assert by_name["INT8, calibration cache, plugins"] == "portable.onnx"


def test_what_is_not_installed_is_no_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    found = cpu_routes()
    assert {route.runs_in for route in found.possible} == {"ONNX Runtime"} and len(found.possible) == 4
    assert found.impossible == {"PyTorch on the CPU": "is not installed"}


@pytest.mark.parametrize(
    ("flavour", "capability", "runs"),
    [("rtx", 75, True), ("rtx", 89, True), ("rtx", 90, False), ("rtx", 110, False), ("rtx", 120, True), ("trt", 90, True)],
)
def test_the_gpus_that_engines_run_on(flavour: Any, capability: int, runs: bool) -> None:
    assert Target(flavour, (1, 7, 1)).runs_on(capability) is runs


# --- attempts, with a stand-in for TensorRT ---


class Standing:
    """In place of an engine's runner: the ONNX file of the route, in ONNX Runtime."""

    factor = 1.0

    def __init__(self, path: Path, plugins: Any = None, cuda_graph: bool = False) -> None:
        assert cuda_graph
        self.path, self.manifest = str(path), read_plan_manifest(path)
        request = read_record(outcome.Request, path.parent / outcome.REQUEST, "")
        self._runner = OnnxRunner(Path(request.models) / request.route.model)
        self.info = self.manifest.info

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        outputs = self._runner.run(inputs)
        return {**outputs, "scores": outputs["scores"] * np.float32(self.factor)}

    def __enter__(self) -> Standing:
        return self

    def __exit__(self, *_: object) -> None:
        pass


TIMINGS = tuple(record(Timing, timing("x", 0.5 * n, batch=n, tflops=0.0) | {"tflops": 1.0}) for n in (1, 4))


def here(folder: Path, seconds: float) -> str:
    """An attempt in this process."""
    (folder / run.LOG).write_text("")
    attempt.main(folder)
    return ""


def full(monkeypatch: pytest.MonkeyPatch, version: str, gpu: tuple[str, int] | None = ("NVIDIA L4", 89)) -> FakeTensorRT:
    """Pretend that only this TensorRT is installed, with its plugins, and a GPU."""
    trt, driver = FakeTensorRT(version, PLUGINS), FakeGpu()
    monkeypatch.setattr(target_module, "installed_version", {"trt": version}.get)
    monkeypatch.setattr(run, "installed_version", {"trt": version}.get)
    monkeypatch.setattr(target_module, "_load", lambda _: trt)
    for module in (build_module, attempt, machine):
        monkeypatch.setattr(module, "first_gpu", lambda: gpu)
    for module in (run, target_module, timing_cache):
        monkeypatch.setattr(module, "gpu_name", lambda: gpu and gpu[0])
    monkeypatch.setattr(build_module, "find_library", lambda *_: None)  # the plugins are registered without a file
    monkeypatch.setattr(run, "find_library", lambda *_: Path("library.so"))
    monkeypatch.setattr(run, "cpu_routes", lambda: Routes((), {}))
    monkeypatch.setattr(run, "run_process", here)
    monkeypatch.setattr(attempt, "PlanRunner", Standing)
    monkeypatch.setattr(attempt, "measure", lambda *_: TIMINGS)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    return trt


@pytest.mark.parametrize(("version", "count"), [("8.6.0", 9), ("10.14.1", 14), ("11.0.0", 10)])
def test_every_route_is_built_run_compared_and_timed(
    monkeypatch: pytest.MonkeyPatch, folder: Path, version: str, count: int
) -> None:
    trt = full(monkeypatch, version)
    report = darktrt.run_selftest()
    assert [(row.name, row.result, row.words) for row in report.rows if row.result != "passed"] == []
    rows = [row for row in report.rows if row.name not in ("loads", "ONNX files")]
    assert len(rows) == count and {row.runs_in for row in rows} == {f"TensorRT {version}"}
    assert all(row.errors and row.errors.matched > 80 and row.timings == TIMINGS and row.mebibytes == 0 for row in rows)
    assert {row.int8 is not None for row in rows if "INT8" in row.name} == {True}
    assert {row.int8 for row in rows if "INT8" not in row.name} == {None}
    assert (len(trt.parsed) > count) is (version != "11.0.0")  # INT8 by a cache is built twice
    assert tuple(sum(map(has, trt.parsed)) for has in (custom_nodes, levels, halves)) == MODELS[version]
    assert len(trt.fed) == (0 if version == "11.0.0" else 16)  # images of TensorRT's own calibration
    assert report.passed and files_in(folder) == ["selftest.json", "selftest.md"]


def custom_nodes(model: onnx.ModelProto) -> bool:
    return any(node.domain == DOMAIN for node in model.graph.node)


def levels(model: onnx.ModelProto) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def halves(model: onnx.ModelProto) -> bool:
    return any(constant.data_type == onnx.TensorProto.FLOAT16 for constant in model.graph.initializer)


MODELS = {"8.6.0": (7, 1, 0), "10.14.1": (9, 2, 2), "11.0.0": (4, 3, 7)}
"""Of the models that a TensorRT parsed: those with custom nodes, with Q/DQ nodes and with weights in FP16.

An INT8 engine from a cache is two of them. TensorRT 8.6 gets plugins in FP32, FP16 and twice INT8, with images of any size, its
own calibration and Q/DQ nodes; TensorRT 10 also with types from the file; and TensorRT 11 nothing else."""


def attempt_one(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> Row:
    """The row of the FP16 engine of TensorRT 8.6 with plugins."""
    wanted = [route for route in engine_routes(Target("trt", (8, 6, 0)), True).possible if route.name == "FP16, plugins"]
    monkeypatch.setattr(run, "engine_routes", lambda *_: Routes(tuple(replace(one, **changes) for one in wanted), {}))
    report = darktrt.run_selftest(folder / "s.json")
    assert json.loads((folder / "s.json").read_text())["rows"][-1]["name"] == report.rows[-1].name
    return report.rows[-1]


def test_the_errors_are_the_worst_of_all_tensors() -> None:
    tensors = {"boxes": TensorError(0.1, 0.01, 1.0), "scores": TensorError(0.3, 0.02, 0.9)}
    found = Matches(9, 0.25, 0.75, (0.1, 0.2), (0.1,))
    agreement = VariantAgreement("engine", "fp16", tolerance_of(("fp32", "fp16")), tensors, found)
    assert attempt._errors(agreement) == Errors(0.3, 9, 7, 1, 0.25, 0.75)
    nothing = attempt._errors(replace(agreement, tensors={}, detections=None))
    assert nothing == Errors(None, 0, 0, 0, None, 1.0)
    assert attempt._errors(replace(agreement, tensors={"boxes": TensorError(np.nan, 0, 0)})).worst is None


def test_the_build_is_as_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trt = full(monkeypatch, "8.6.0")
    wanted = [r for r in engine_routes(Target("trt", (8, 6, 0)), True).possible if r.name == "FP16, plugins"]
    monkeypatch.setattr(run, "engine_routes", lambda *_: Routes(tuple(wanted), {}))
    darktrt.run_selftest(tmp_path / "s.json", tactic_sources="-CUDNN")
    assert "FP16" in trt.config.asked and not trt.config.sources & 0b100
    assert trt.config.builder_optimization_level == 1
    assert trt.config.timing_cache is not None


def test_an_engine_that_computes_something_else_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full(monkeypatch, "8.6.0")
    monkeypatch.setattr(Standing, "factor", 0.9)
    row = attempt_one(monkeypatch, tmp_path)
    assert (row.result, row.stage) == ("failed", "compare")
    assert "detections beyond the tolerance" in row.words
    assert row.errors and row.errors.score and row.errors.score > 0.05
    assert row.timings == TIMINGS


def test_numbers_that_are_none_fail_and_leave_valid_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full(monkeypatch, "8.6.0")
    monkeypatch.setattr(Standing, "factor", np.nan)
    row = attempt_one(monkeypatch, tmp_path, nodes="standard ops")
    assert row.result == "failed"
    assert "NaN" not in (tmp_path / "s.json").read_text()


def test_tensorrts_own_words_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trt = full(monkeypatch, "8.6.0")
    trt.refuses = "No importer registered for op: MishPlugin"
    row = attempt_one(monkeypatch, tmp_path)
    assert (row.result, row.stage) == ("failed", "build")
    assert row.words == "TensorRT 8.6.0 cannot parse the network: node number 7: No importer registered for op: MishPlugin"
    assert row.words in (tmp_path / "s.md").read_text()


def test_an_engine_that_cannot_be_timed_fails_though_its_outputs_are_right(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: object) -> None:
        raise DarktrtError("CUDA says: out of memory")

    full(monkeypatch, "8.6.0")
    monkeypatch.setattr(attempt, "measure", fails)
    row = attempt_one(monkeypatch, tmp_path)
    assert (row.result, row.stage, row.words) == ("failed", "time", "CUDA says: out of memory")
    assert row.errors and row.errors.matched > 80


def test_without_a_gpu_full_tensorrt_has_no_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full(monkeypatch, "10.14.1", gpu=None)
    report = darktrt.run_selftest(tmp_path / "s.json")
    assert [(row.name, row.result) for row in report.rows] == [("ONNX files", "passed"), ("loads", "passed")]
    assert "beside an NVIDIA GPU" in report.impossible["engines of TensorRT 10.14.1"]
    assert report.passed


@pytest.mark.parametrize(
    ("gpu", "reason"), [(None, "no NVIDIA GPU is usable here"), (("NVIDIA H100", 90), "do not run on compute capability 9.0")]
)
def test_an_engine_that_cannot_run_here_is_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: tuple[str, int] | None, reason: str
) -> None:
    full(monkeypatch, "8.6.0")
    monkeypatch.setattr(attempt, "first_gpu", lambda: gpu)
    monkeypatch.setattr(Target, "runs_on", lambda *_: False)
    row = attempt_one(monkeypatch, tmp_path)
    assert row.result == "built" and reason in row.words
    assert row.build_seconds is not None and not row.timings and row.errors is None
    assert gpu is None or dotted_capability(gpu[1]) in row.words


def test_a_tensorrt_that_does_not_load_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(_: Any) -> None:
        raise DarktrtError("TensorRT is installed but does not load (libnvinfer.so.10: cannot open shared object file)")

    full(monkeypatch, "10.14.1")
    monkeypatch.setattr(target_module, "_load", fails)
    report = darktrt.run_selftest(tmp_path / "s.json")
    row = report.rows[-1]
    assert (row.runs_in, row.result, row.stage) == ("TensorRT", "failed", "load") and "libnvinfer.so.10" in row.words
    assert not report.passed


def test_without_tensorrt_the_report_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full(monkeypatch, "8.6.0")
    monkeypatch.setattr(run, "installed_version", lambda _: None)
    assert "pip install" in darktrt.run_selftest(tmp_path / "s.json").impossible["engines"]


def test_what_would_begin_behind_the_limit_is_not_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full(monkeypatch, "8.6.0")
    report = darktrt.run_selftest(tmp_path / "s.json", minutes=1e-9)
    assert [(row.result, row.words) for row in report.rows] == [("not tried", "the time was over")]
    assert not report.passed


def test_a_route_gets_a_third_of_the_time_and_two_minutes_at_least(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[float] = []
    full(monkeypatch, "8.6.0")
    monkeypatch.setattr(run, "run_process", lambda folder, seconds: given.append(seconds) or here(folder, seconds))
    for minutes, most in ((10, 200), (4, 120), (1, 60)):
        given.clear()
        attempt_one_with(monkeypatch, tmp_path, minutes)
        assert most - 5 < given[0] <= most


def attempt_one_with(monkeypatch: pytest.MonkeyPatch, folder: Path, minutes: float) -> None:
    monkeypatch.setattr(run, "engine_routes", lambda *_: Routes((), {}))
    darktrt.run_selftest(folder / "s.json", minutes=minutes)


# --- processes ---


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a module of a text, which runs in place of an attempt, and returns the folder of that."""

    def make(text: str) -> Path:
        (tmp_path / "stand_in.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(run, "_MODULE", "stand_in")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("text", "problem", "log"),
    [
        ("import os; print('TensorRT: Cask error', flush=True); os.kill(os.getpid(), 11)", "ended by SIGSEGV", "Cask error"),
        ("raise AttributeError('no attribute IInt8EntropyCalibrator2')", "ended with status 1", "IInt8EntropyCalibrator2"),
        ("import time; print('builds', flush=True); time.sleep(60)", "it was stopped after 2 s", "builds"),
        ("import sys; print(sys.stdin.read())", "", ""),
    ],
)
def test_a_process_may_end_in_any_way(module: Callable[[str], Path], text: str, problem: str, log: str) -> None:
    folder, started = module(text), time.monotonic()
    assert problem in run.run_process(folder, 2 if "sleep" in text else 60)
    assert log in run.log_of(folder)
    assert time.monotonic() - started < 30


def test_a_process_finds_darktrt_from_any_folder(module: Callable[[str], Path]) -> None:
    folder = module("import darktrt, os; print(darktrt.__file__, os.getcwd())")
    assert run.run_process(folder, 60) == ""
    assert run.log_of(folder) == f"{darktrt.__file__} {folder}"


def test_an_interrupt_ends_the_process(module: Callable[[str], Path]) -> None:
    folder = module("import os, time; print(os.getpid(), flush=True); time.sleep(60)")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.run_process(folder, 60)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert not alive(int(run.log_of(folder)))


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_process_stays_behind_one_that_was_killed(tmp_path: Path) -> None:
    """SIGKILL lets nobody clean up."""
    child = (
        "import os, time, darktrt.selftest.__main__ as main; main.end_with(os.getppid()); print(os.getpid(), flush=True); "
        "time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = {**os.environ, "PYTHONPATH": str(Path(darktrt.__file__).parent.parent)}
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        number = int(process.stdout.readline())
        process.kill()
    ended = time.monotonic() + 10
    while alive(number) and time.monotonic() < ended:
        time.sleep(0.05)
    assert not alive(number)


def test_a_process_whose_parent_is_gone_already_does_nothing(module: Callable[[str], Path]) -> None:
    """It may be killed while this one starts."""
    folder = module("import darktrt.selftest.__main__ as main; main.end_with(1); print('goes on')")
    assert (run.run_process(folder, 60), run.log_of(folder)) == ("", "")


def test_the_end_of_a_long_log_is_kept_in_whole_lines(tmp_path: Path) -> None:
    (tmp_path / run.LOG).write_bytes(b"".join(b"line %d of TensorRT \xff\n" % i for i in range(1000)))
    log = run.log_of(tmp_path).splitlines()
    assert 100 < len(log) < 300 and log[-1] == "line 999 of TensorRT \ufffd" and log[0].startswith("line ")


def test_a_crash_does_not_end_the_selftest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full(monkeypatch, "8.6.0")

    def crash(folder: Path, seconds: float) -> str:
        if read_record(outcome.Request, folder / outcome.REQUEST, "").route.name != "FP16, standard ops":
            return here(folder, seconds)
        (folder / run.LOG).write_text("what TensorRT wrote\n")
        return "its process was ended by SIGSEGV"

    monkeypatch.setattr(run, "run_process", crash)
    report = darktrt.run_selftest(tmp_path / "s.json")
    assert [row.name for row in report.rows if row.result == "failed"] == ["FP16, standard ops"]
    assert len(report.rows) == 11
    text = (tmp_path / "s.md").read_text()
    assert "its process was ended by SIGSEGV\nwhat TensorRT wrote" in text


# --- the command and the report ---


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
def test_the_command_on_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In real processes, with two routes of all."""
    wanted = ("FP32, bodies", "INT8, Q/DQ nodes, standard ops")
    found = {kind: getattr(run, kind) for kind in ("cpu_routes", "engine_routes")}
    for kind, make in found.items():
        some = lambda *a, make=make: Routes(tuple(r for r in make(*a).possible if r.name in wanted), {})  # noqa: E731
        monkeypatch.setattr(run, kind, some)
    assert main(["selftest"]) == 0
    text = (folder / "selftest.md").read_text()
    out, err = capfd.readouterr()
    assert text in out and "| ONNX Runtime | FP32, bodies | passed |" in out
    assert "- TensorRT for RTX 1." in text and "2 engines built and not run: no NVIDIA GPU is usable here" in text
    assert "TensorRT for RTX: loads: passed" in err and "Traceback" not in err
    values = json.loads((folder / "selftest.json").read_text())
    assert values["passed"] is True and values["facts"]["GPU"] == "none"
    int8 = next(row for row in values["rows"] if row["name"] == wanted[1])
    assert int8["result"] == "built" and int8["int8"][0] >= 8 and int8["build_seconds"] > 0


def test_the_command_ends_with_status_1_where_something_fails(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full(monkeypatch, "8.6.0").refuses = "no"
    assert main(["selftest", "-o", "mine.json", "--minutes", "5"]) == 1
    assert files_in(folder) == ["mine.json", "mine.md"]
    assert "**failed** (build)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-o", "report.md"], "report.md: .md is the Markdown's name"),
        (["-o", "nowhere/s.json"], "cannot write"),
        (["--plugins", "selftest.json"], "given twice"),
    ],
)
def test_what_cannot_be_written_is_said_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    started = time.monotonic()
    assert main(["selftest", *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert time.monotonic() - started < 2 and files_in(folder) == []


@pytest.mark.parametrize("minutes", [0, -1, np.inf, np.nan])
def test_a_limit_that_is_none_is_refused(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(DarktrtError, match="write a number above 0"):
        darktrt.run_selftest(tmp_path / "s.json", minutes=minutes)


def test_paths_of_the_plugin_library_reach_processes_that_work_elsewhere(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    given: list[str | None] = []
    full(monkeypatch, "8.6.0")
    monkeypatch.setattr(run, "engine_routes", lambda *_: Routes((), {}))

    def note(place: Path, seconds: float) -> str:
        given.append(read_record(outcome.Request, place / outcome.REQUEST, "").plugins)
        return here(place, seconds)

    monkeypatch.setattr(run, "run_process", note)
    monkeypatch.delenv("DARKTRT_PLUGINS", raising=False)
    darktrt.run_selftest()
    darktrt.run_selftest(plugins="mine.so")
    monkeypatch.setenv("DARKTRT_PLUGINS", "theirs.so")
    darktrt.run_selftest()
    assert list(dict.fromkeys(given)) == [None, str(folder / "mine.so"), str(folder / "theirs.so")]


ROW = Row("TensorRT 10.3.0", "FP16, plugins", "passed", 3.2, build_seconds=2.5, mebibytes=1.25, int8=(7, 9))


def report_of(*rows: Row, **impossible: str) -> SelftestReport:
    return SelftestReport({"darktrt": "0.1", "GPU": "NVIDIA L4"}, rows, impossible, 42.0)


def test_the_table_has_the_numbers_of_a_row() -> None:
    row = replace(ROW, errors=Errors(0.00123, 108, 101, 7, 0.0456, 0.9), timings=TIMINGS)
    text = report_of(row).to_markdown()
    assert (
        "| TensorRT 10.3.0 | FP16, plugins | passed | 2.5 | 1.25 | 7 of 9 | 1.2e-03 | 101 of 108, 7 extra | 4.6e-02 |" in text
    )
    assert "| 0.500 | 2000 |" in text
    assert text.startswith("### darktrt selftest: 1 passed\n\ndarktrt 0.1; GPU NVIDIA L4; 42 s in all\n")


def test_all_rows_of_the_table_have_its_columns() -> None:
    rows = [ROW, replace(ROW, errors=Errors(None, 3, 3, 0, None, 1.0)), replace(ROW, result="failed", stage="run")]
    table = [line for line in report_of(*rows).to_markdown().splitlines() if line.startswith("|")]
    assert len(table) == 5 and {line.count("|") for line in table} == {12}


def test_odd_names_and_words_keep_the_markdown_whole() -> None:
    row = replace(ROW, runs_in="a|b\n<script>", result="failed", stage="build", words="x" * 9000 + "```\nend")
    text = report_of(row).to_markdown()
    assert "<script>" not in text and r"a\|b" in text
    assert text.count("```") == 2 and len(text) < 4000


def test_control_characters_of_words_stay_out_of_the_markdown() -> None:
    row = replace(ROW, result="failed", stage="run", words="\x1b[31mred\nsecond \udc80 line", log="\x07bell")
    text = report_of(row).to_markdown()
    assert "\\x1b[31mred\nsecond \\udc80 line\n\\x07bell\n" in text
    text.encode()


def test_words_come_before_the_end_of_the_log() -> None:
    row = replace(ROW, result="failed", stage="build", words="the sentence", log="old\n" * 2000 + "the last line")
    text = report_of(row).to_markdown()
    assert "the sentence\n" in text and "the last line\n```" in text and len(text) < 3000


def test_reasons_are_said_once() -> None:
    rows = [replace(ROW, name=name, result="built", words="no GPU") for name in "ab"]
    late = [replace(ROW, name=name, result="not tried", words="the time was over") for name in "cd"]
    text = report_of(*rows, *late, bodies="lacks ops").to_markdown()
    assert "- TensorRT 10.3.0: 2 engines built and not run: no GPU" in text
    assert "- TensorRT 10.3.0: c; TensorRT 10.3.0: d: the time was over" in text
    assert "- bodies: lacks ops" in text
    assert "### darktrt selftest: 2 built, 2 not tried" in text


@pytest.mark.parametrize(("result", "passed"), [("passed", True), ("built", True), ("failed", False), ("not tried", False)])
def test_whether_it_passed(result: Any, passed: bool) -> None:
    assert report_of(ROW, replace(ROW, result=result)).passed is passed


# --- the machine ---


def test_the_facts_name_versions_and_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "first_gpu", lambda: ("NVIDIA L4", 89))
    monkeypatch.setattr(machine, "gpu_state", lambda: {"driver_version": "580.1"})
    monkeypatch.setattr(machine, "installed_version", {"trt": "10.3.0"}.get)
    monkeypatch.setattr(machine, "find_library", lambda _: None)
    facts = machine.facts()
    assert (facts["GPU"], facts["driver"], facts["TensorRT"]) == ("NVIDIA L4, compute capability 8.9", "580.1", "10.3.0")
    assert facts["numpy"] == np.__version__ and "TensorRT for RTX" not in facts and "plugin library" not in facts
    assert str(Path.home()) not in str(facts)


def test_the_board_of_a_jetson_is_a_fact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    monkeypatch.setattr(machine, "_BOARD", tmp_path / "model")
    assert machine.facts()["machine"].startswith("NVIDIA Jetson AGX Orin Developer Kit, Linux ")


def test_a_damaged_plugin_library_is_a_fact(tmp_path: Path) -> None:
    (tmp_path / "library.so").write_bytes(b"nothing")
    assert machine.facts(tmp_path / "library.so")["plugin library"] == "damaged"
