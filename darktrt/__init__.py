"""Darknet detectors to TensorRT engines: convert, insert plugins, calibrate, build, evaluate and serve.

The names below are loaded when they are first used, so that ``import darktrt`` takes some milliseconds and needs none of the
libraries that only some of them need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from darktrt.calib.options import CalibrationOptions
    from darktrt.check.agreement import Agreement
    from darktrt.check.evaluation import Evaluation
    from darktrt.cluster.cluster import Cluster
    from darktrt.convert.export import convert_darknet
    from darktrt.convert.zoo import fetch
    from darktrt.engine.manifest import Manifest
    from darktrt.engine.options import BuildOptions
    from darktrt.errors import DarktrtError
    from darktrt.metadata import DetectorInfo, Thresholds
    from darktrt.pipeline import Detector, DropBudget, build_engine, calibrate, compare, evaluate, merge_calibrations
    from darktrt.progress import set_progress
    from darktrt.selftest.report import SelftestReport
    from darktrt.selftest.run import run_selftest
    from darktrt.serve.client.client import Client
    from darktrt.serve.config import OnnxRuntimeBackend, PythonBackend, TensorRTBackend
    from darktrt.serve.repository import publish
    from darktrt.surgery.qdq import Calibration
    from darktrt.surgery.rewrite import SurgeryOptions, SurgeryReport, insert_plugins
    from darktrt.vision.boxes import Detections

__version__ = "0.1.0"

_HOMES = {
    "Agreement": "check.agreement",
    "BuildOptions": "engine.options",
    "Calibration": "surgery.qdq",
    "CalibrationOptions": "calib.options",
    "Client": "serve.client.client",
    "Cluster": "cluster.cluster",
    "DarktrtError": "errors",
    "Detections": "vision.boxes",
    "Detector": "pipeline",
    "DetectorInfo": "metadata",
    "DropBudget": "pipeline",
    "Evaluation": "check.evaluation",
    "Manifest": "engine.manifest",
    "OnnxRuntimeBackend": "serve.config",
    "PythonBackend": "serve.config",
    "SelftestReport": "selftest.report",
    "SurgeryOptions": "surgery.rewrite",
    "SurgeryReport": "surgery.rewrite",
    "TensorRTBackend": "serve.config",
    "Thresholds": "metadata",
    "build_engine": "pipeline",
    "calibrate": "pipeline",
    "compare": "pipeline",
    "convert_darknet": "convert.export",
    "evaluate": "pipeline",
    "fetch": "convert.zoo",
    "insert_plugins": "surgery.rewrite",
    "merge_calibrations": "pipeline",
    "publish": "serve.repository",
    "run_selftest": "selftest.run",
    "set_progress": "progress",
}
"""Every public name and the module that has it."""

__all__ = [
    "Agreement",
    "BuildOptions",
    "Calibration",
    "CalibrationOptions",
    "Client",
    "Cluster",
    "DarktrtError",
    "Detections",
    "Detector",
    "DetectorInfo",
    "DropBudget",
    "Evaluation",
    "Manifest",
    "OnnxRuntimeBackend",
    "PythonBackend",
    "SelftestReport",
    "SurgeryOptions",
    "SurgeryReport",
    "TensorRTBackend",
    "Thresholds",
    "__version__",
    "build_engine",
    "calibrate",
    "compare",
    "convert_darknet",
    "evaluate",
    "fetch",
    "insert_plugins",
    "merge_calibrations",
    "publish",
    "run_selftest",
    "set_progress",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'darktrt' has no attribute {name!r}")
    value: object = getattr(import_module(f"darktrt.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
