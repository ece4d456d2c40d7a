"""Engines of a real TensorRT on a GPU: its own calibration, its list of layers, plans for other GPUs, CUDA graphs.

Needs onnx, onnx-graphsurgeon and numpy beside TensorRT, neither torch nor ONNX Runtime:

    PYTHONPATH=. python -m pytest --confcutdir=tests/trt tests/trt/test_engines.py

DARKTRT_TACTIC_SOURCES is given to every build, as ``--tactic-sources`` is.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_int8 import BATCH, DEPTH, FP_LAYERS, images, model, names

from darktrt.calib.table import CalibrationTable
from darktrt.calib.trt_calibrator import BatchSource
from darktrt.engine.build import build_file, cache_path
from darktrt.engine.options import BuildOptions
from darktrt.engine.profile import profile
from darktrt.engine.runtime import PlanRunner, polygraphy_runner
from darktrt.engine.target import find_target, gpu_name, installed_version
from darktrt.engine.weak_typing import GpuCalibration
from darktrt.errors import DarktrtError

pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(installed_version("trt") is None, reason="TensorRT is not installed"),
    pytest.mark.skipif(gpu_name() is None, reason="no NVIDIA GPU is usable here"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With made.onnx, of a dynamic batch."""
    made = tmp_path_factory.mktemp("engines")
    onnx.save(model("N")[0], str(made / "made.onnx"))
    return made


def outputs(plan: Path, inputs: Any) -> dict[str, Any]:
    """Copies, for the runner's own memory ends with it."""
    with PlanRunner(plan) as runner:
        return {name: values.copy() for name, values in runner.run(inputs).items()}


def options(folder: Path, **more: Any) -> BuildOptions:
    sources = os.environ.get("DARKTRT_TACTIC_SOURCES")
    return BuildOptions(tactic_sources=sources, optimization_level=1, **{"timing_cache": folder / "timing.cache", **more})


@pytest.fixture(scope="module")
def plan(folder: Path) -> Path:
    build_file(folder / "made.onnx", folder / "fp16.plan", replace(options(folder), precision="fp16", target="trt"))
    return folder / "fp16.plan"


def test_layers_are_reported_and_timed(plan: Path) -> None:
    """Every convolution is in a layer that took time, in FP16."""
    report = profile(plan)
    assert report.batch == BATCH
    found = {node: row for row in report.rows for node in row.layer.nodes}
    for i in range(DEPTH + 1):
        row = found[f"conv_{i}"]
        assert row.layer.precision == "FP16"
        assert row.milliseconds and row.milliseconds > 0
    assert report.total > 0


def test_cuda_graphs_change_no_output_at_several_batch_sizes(plan: Path) -> None:
    """Batch sizes come in any order, each replayed after others have been recorded."""
    inputs = {batch: {"images": images(batch)["images"][:batch]} for batch in (1, 3, BATCH)}
    expected = {batch: outputs(plan, one) for batch, one in inputs.items()}
    with PlanRunner(plan, cuda_graph=True) as runner:
        for batch in (BATCH, 1, BATCH, 3, 1, 3, BATCH, 1):
            for name, values in runner.run(inputs[batch]).items():
                assert np.array_equal(values, expected[batch][name])


def test_tensorrts_own_calibration_is_written_as_a_cache(folder: Path) -> None:
    if not find_target("trt").weakly_typed:
        pytest.skip("this TensorRT has no INT8 calibrators")
    with BatchSource(({"images": images(seed)["images"][:1]} for seed in range(8)), 1) as source:
        calibration = GpuCalibration(source)
        manifest = build_file(
            folder / "made.onnx", folder / "int8.plan", replace(options(folder), precision="int8", target="trt"), calibration
        )
    assert source.count == 8
    table = CalibrationTable.load(cache_path(folder / "int8.plan"))
    assert not table.compare(names()).missing
    assert set(FP_LAYERS) <= set(manifest.other_convolutions)


def build_exact(folder: Path, **compatible: bool) -> Path:
    file = folder / f"{'_'.join(compatible)}.plan"
    more = options(folder, tf32=False, timing_cache="none", **compatible)
    build_file(folder / "made.onnx", file, replace(more, precision="fp32", target="trt"))
    return file


def check_exact(file: Path, plan: Path) -> None:
    (exact,), (half,) = (outputs(one, images(1)).values() for one in (file, plan))
    assert 0 < np.abs(exact - half).max() <= 0.02 * np.abs(exact).max()


def test_a_plan_for_other_gpus_runs_here_too(folder: Path, plan: Path) -> None:
    check_exact(build_exact(folder, hardware_compatible=True), plan)


def test_a_plan_for_other_versions_runs_here_too(folder: Path, plan: Path) -> None:
    """Into such a plan goes TensorRT's lean runtime, which the 8.6.0 of PyPI comes without."""
    try:
        file = build_exact(folder, version_compatible=True)
    except DarktrtError as error:
        if "libnvinfer_lean" not in str(error):
            raise
        pytest.skip(f"this TensorRT comes without its lean runtime: {error}")
    check_exact(file, plan)


def test_polygraphy_runs_an_engine(plan: Path) -> None:
    from polygraphy.comparator import Comparator

    found = Comparator.run([polygraphy_runner(plan, name="engine")], data_loader=[images(1)])
    assert np.array_equal(found["engine"][0][f"c{DEPTH}"], outputs(plan, images(1))[f"c{DEPTH}"])


def test_batches_beyond_the_range_are_refused(plan: Path) -> None:
    with PlanRunner(plan) as runner, pytest.raises(DarktrtError, match=f"batch 1 to {BATCH}"):
        runner.run({"images": np.zeros((BATCH + 1, 3, 128, 128), np.float32)})
