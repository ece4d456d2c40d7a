"""A model lowered for a target: its opset, its types by precision, and what a calibration has to do with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from helpers import Made

from darktrt.calib.graph import tensors_to_calibrate
from darktrt.engine.lower import lower
from darktrt.engine.target import Target
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo
from darktrt.surgery.qdq import Calibration
from darktrt.surgery.rewrite import SurgeryOptions, transform

RTX, WEAK, STRONG = Target("rtx", (1, 7)), Target("trt", (10, 3, 0)), Target("trt", (11, 0, 0))


def model_of(made: Made, quantized: bool = False) -> tuple[onnx.ModelProto, DetectorInfo]:
    options = SurgeryOptions(head="raw", mish="native", calibration=scales(made) if quantized else None)
    model, report = transform(made.model(), made.info, options)
    return model, report.info


def scales(made: Made) -> Calibration:
    model, report = transform(made.model(), made.info, SurgeryOptions(head="raw", mish="native"))
    return Calibration({name: np.float32(0.05) for name in tensors_to_calibrate(model, report.info)})


def opset(model: onnx.ModelProto) -> int:
    return next(one.version for one in model.opset_import if not one.domain)


@pytest.mark.parametrize("target", [RTX, WEAK, STRONG], ids=str)
@pytest.mark.parametrize("quantized", [False, True])
def test_the_opset_rises_for_qdq_nodes_in_fp16_only(made: Made, target: Target, quantized: bool) -> None:
    """To 19, the first that has them; older parsers know no later one. A calibrator needs neither."""
    for precision in ("fp32", "fp16", "int8"):
        calibration = None if quantized or precision != "int8" else scales(made)
        lowered = lower(*model_of(made, quantized), target, precision, calibration)  # type: ignore[arg-type]
        halves = any(one.data_type == onnx.TensorProto.FLOAT16 for one in lowered.graph.initializer)
        typed = precision != "fp32" and target is not WEAK
        assert halves == typed
        nodes = sum(node.op_type == "QuantizeLinear" for node in lowered.graph.node)
        assert bool(nodes) == (quantized or (precision == "int8" and typed))
        assert opset(lowered) == (19 if nodes and typed else 17)


@pytest.mark.parametrize("target", [RTX, WEAK], ids=str)
def test_int8_needs_scales_from_one_place(made: Made, target: Target) -> None:
    """From a calibration, or from the Q/DQ nodes of the model."""
    cases: list[tuple[bool, Calibration | None, str]] = [
        (False, None, "INT8 needs a calibration"),
        (True, scales(made), "the model has Q/DQ nodes already; build it without a calibration"),
    ]
    for quantized, calibration, said in cases:
        model: Any = model_of(made, quantized)
        with pytest.raises(DarktrtError, match=said) as caught:
            lower(*model, target, "int8", calibration)
        assert caught.value.argument == "calibration"
        lower(*model_of(made, quantized), target, "fp16", calibration)
