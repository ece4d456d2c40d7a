"""What a report shows of calibration: the tensors with the most noise, and who reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import Made

from darktrt.onnx_file import load_model


def test_tensors_are_those_that_int8_quantizes(report: Path, labelled: Path, made: Made) -> None:
    """At most six, those with the most noise first, each with the cfg line of the first convolution that reads it."""
    values = json.loads((report / "report.json").read_text())
    tensors, fp_layers = values["calibration"]["tensors"], values["fp_layers"]
    lines = {f"/layers.{layer.index}/Conv": layer.line for layer in made.info.layers}
    nodes = [node for node in load_model(labelled / "net.onnx")[0].graph.node if node.op_type == "Conv"]
    readers = {node.input[0]: lines[node.name] for node in reversed(nodes) if node.name not in fp_layers}
    assert len(fp_layers) >= 3 and len(tensors) == min(6, len(readers))
    assert {one["tensor"]: one["line"] for one in tensors} == {one["tensor"]: readers[one["tensor"]] for one in tensors}
    noise = [one["noise"] for one in tensors]
    assert noise == sorted(noise, reverse=True) and 0 < noise[-1] < noise[0] < 0.5
    for one in tensors:
        assert 0 < one["threshold"] <= one["amax"] * 1.05 and 0 <= one["clipped"] < 0.2
        assert len(one["bars"]) == 64 and max(one["bars"]) == pytest.approx(1)
