"""A portable model, made into what one target wants: its bodies kept or dropped, its precision in flags or in the types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from darktrt import DarktrtError, DetectorInfo
from engine.target import Target
from surgery.bodies import drop_bodies, embed, inline_bodies
from surgery.half import halve
from surgery.qdq import quantize
from surgery.rewrite import import_graph

Precision = Literal["fp32", "fp16", "int8"]

_HALF_QDQ_OPSET = 19
"""The opset from which Q/DQ nodes take and give FP16."""


@dataclass(frozen=True)
class Calibration:
    """What INT8 needs to know: scales (amax / 127) by tensor, and the convolutions to keep in FP16 (None: the default ones)."""

    scales: Mapping[str, np.float32]
    keep: tuple[str, ...] | None = None


def lower(
    model: onnx.ModelProto, info: DetectorInfo, target: Target, precision: Precision, calibration: Calibration | None = None
) -> onnx.ModelProto:
    """The model for ``target``; ``model`` itself may change.

    Raises:
        DarktrtError: the model cannot have this precision.
    """
    if precision == "int8":
        _check_int8(info, target, calibration)
    if precision != "fp32" and not target.weakly_typed:
        model = _typed(model, info, calibration if precision == "int8" else None)
    if target.bodies == "drop":
        drop_bodies(model)
    return inline_bodies(model) if target.bodies == "inline" else model


def _check_int8(info: DetectorInfo, target: Target, calibration: Calibration | None) -> None:
    if target.weakly_typed:
        raise DarktrtError(f"INT8 engines with {target} cannot be built yet; use TensorRT for RTX, or fp16")
    if not info.int8_convolutions and calibration is None:
        raise DarktrtError("INT8 needs a calibration table; make one with 'darktrt calib' and give it with --table")
    if info.int8_convolutions and calibration is not None:
        raise DarktrtError("the model has Q/DQ nodes already; build it without --table")


def _typed(model: onnx.ModelProto, info: DetectorInfo, calibration: Calibration | None) -> onnx.ModelProto:
    """Precision as the types of the graph state it: Q/DQ nodes with ``calibration``, FP16 for the rest of the backbone."""
    graph = import_graph(model)
    if calibration:
        quantize(graph, info, calibration.scales, calibration.keep)
    halve(graph, info)
    typed: onnx.ModelProto = gs.export_onnx(graph.toposort(), do_type_check=False)
    typed.metadata_props.extend(model.metadata_props)
    if calibration or info.int8_convolutions:
        for opset in typed.opset_import:
            if not opset.domain:
                opset.version = max(opset.version, _HALF_QDQ_OPSET)
    embed(typed)
    return typed
