"""Records cannot be changed on their way from stage to stage; only what counts or is under way can."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil

import pytest

import darktrt

CHANGING = {
    "darktrt.calib.collect._Run",
    "darktrt.calib.histogram.Histogram",
    "darktrt.calib.histogram.HistogramSet",
    "darktrt.cluster.dispatch._Hand",
    "darktrt.cluster.dispatch._Task",
    "darktrt.engine.runtime._Slot",
    "darktrt.selftest.run._Series",
    "darktrt.serve.load.worker.Counts",
    "darktrt.vision.decode.Ticket",
    "darktrt.vision.decode._Image",
    "darktrt.vision.detector._Batch",
}

BY_IDENTITY = {
    "darktrt.calib.histogram.Histogram",
    "darktrt.calib.histogram.HistogramSet",
    "darktrt.check.detections.VariantDetections",
    "darktrt.check.evaluation.EvaluatedVariant",
    "darktrt.check.evaluation.Evaluation",
    "darktrt.check.runs.InputImage",
    "darktrt.check.runs.VariantResults",
    "darktrt.check.simulate.OnnxNetwork",
    "darktrt.vision.boxes.Detections",
    "darktrt.vision.decode.Ticket",
    "darktrt.vision.decode._Image",
}


def records() -> dict[str, type]:
    """Every dataclass of the package, by the name of its module and its own."""
    found = {}
    for module in pkgutil.walk_packages(darktrt.__path__, "darktrt."):
        if module.name.endswith("__main__"):
            continue
        try:
            members = vars(importlib.import_module(module.name))
        except ImportError:  # of a package that this machine lacks
            continue
        kinds = [one for one in members.values() if inspect.isclass(one) and one.__module__ == module.name]
        found.update({f"{module.name}.{one.__qualname__}": one for one in kinds if dataclasses.is_dataclass(one)})
    return found


def test_records_cannot_be_changed() -> None:
    """A stage that did it would change what another one holds, or a key of a table."""
    kinds = records()
    assert len(kinds) > 100
    assert {name for name, one in kinds.items() if not one.__dataclass_params__.frozen} <= CHANGING  # type: ignore[attr-defined]
    with pytest.raises(dataclasses.FrozenInstanceError):
        darktrt.DetectorInfo.__setattr__(object.__new__(darktrt.DetectorInfo), "name", "other")


def test_records_with_large_contents_are_equal_only_to_themselves() -> None:
    """NumPy compares arrays by element, which is no answer; what waits for a turn is found in lists by its identity."""
    kinds = records()
    assert [name for name in BY_IDENTITY if name in kinds and kinds[name].__dataclass_params__.eq] == []  # type: ignore[attr-defined]
    assert sum(name in kinds for name in BY_IDENTITY) > 5
