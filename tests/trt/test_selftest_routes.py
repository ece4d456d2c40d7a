"""The whole selftest on a real TensorRT and a GPU: no route fails.

Needs onnx, onnx-graphsurgeon, polygraphy and numpy beside TensorRT, neither torch nor ONNX Runtime:

    PYTHONPATH=. python -m pytest --confcutdir=tests/trt tests/trt/test_selftest_routes.py

DARKTRT_TACTIC_SOURCES is given to every build, as ``--tactic-sources`` is.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from darktrt.engine.target import gpu_name, installed_version
from darktrt.selftest.run import run_selftest

pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(installed_version("trt") is None, reason="TensorRT is not installed"),
    pytest.mark.skipif(gpu_name() is None, reason="no NVIDIA GPU is usable here"),
]


def test_no_route_fails(tmp_path: Path) -> None:
    report = run_selftest(tmp_path / "s.json", tactic_sources=os.environ.get("DARKTRT_TACTIC_SOURCES"))
    assert [(row.name, row.stage, row.words) for row in report.rows if row.result not in ("passed", "built")] == []
    ran = [row for row in report.rows if row.runs_in.startswith("TensorRT ") and row.timings]
    assert len(ran) >= 4
