"""Lowering a portable model for one target: function bodies, the form of Mish, and precision where the types state it."""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnx_graphsurgeon as gs

from darktrt.engine.options import Precision
from darktrt.engine.target import Target
from darktrt.engine.weak_typing import GpuCalibration
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo, MishForm
from darktrt.plugins.functions import drop_bodies, embed, inline_bodies
from darktrt.plugins.ops import MISH_OPS, PLUGIN_NAMESPACE, PLUGIN_VERSION, Preprocess
from darktrt.surgery.mish import fuse_mish
from darktrt.surgery.precision import halve
from darktrt.surgery.qdq import Calibration, choose_precisions, fp_layer_names, quantize
from darktrt.surgery.rewrite import import_graph

_HALF_QDQ_OPSET = 19
"""The opset from which Q/DQ nodes have FP16 inputs and outputs."""


def lower(
    model: onnx.ModelProto,
    info: DetectorInfo,
    target: Target,
    precision: Precision,
    calibration: Calibration | GpuCalibration | None = None,
) -> onnx.ModelProto:
    """Lower a model for ``target``; ``model`` itself may change.

    Where the model leaves the form of Mish open, it depends on the registered plugins: load their library before.

    Raises:
        DarktrtError: the model cannot have this precision.
    """
    if precision == "int8":
        _check_int8(info, target, calibration)
    if info.input == "image":
        _set_levels_type(model, _levels_type(precision))
    mish = _mish_form(info, target, precision)
    typed = precision != "fp32" and not target.weakly_typed
    if typed or mish == "fused":
        graph = import_graph(model)
        if mish == "fused":
            fuse_mish(graph)
        if typed:
            _state_types(graph, info, calibration if precision == "int8" and isinstance(calibration, Calibration) else None)
        model = _exported(graph, model)
    if target.bodies == "inline":
        return inline_bodies(model)
    if mish == "native":
        model = inline_bodies(model, MISH_OPS)
    if target.bodies == "drop":
        drop_bodies(model)
    return model


def _levels_type(precision: Precision) -> int:
    """The type, of ONNX, that the levels 0..255 of images are cast to, since only a cast can read uint8 in TensorRT.

    FP16 states them exactly, in half the memory.
    """
    return onnx.TensorProto.FLOAT if precision == "fp32" else onnx.TensorProto.FLOAT16


def _set_levels_type(model: onnx.ModelProto, kind: int) -> None:
    """Cast the images of a model that takes images of any size to this type, in place."""
    (levels,) = (node.input[0] for node in model.graph.node if node.op_type == Preprocess.op_type)
    for node in model.graph.node:
        if levels in node.output:
            node.attribute[0].i = kind
    for value in model.graph.value_info:
        if value.name == levels:
            value.type.tensor_type.elem_type = kind


def _mish_form(info: DetectorInfo, target: Target, precision: Precision) -> MishForm:
    """The form of Mish in the engine; a form that the model states is in its graph already."""
    if info.mish != "auto" or not info.mish_count or not target.has_plugins:
        return info.mish
    ready = all(target.has_plugin(op.op_type, PLUGIN_VERSION, PLUGIN_NAMESPACE) for op in MISH_OPS)
    return target.mish_form(precision) if ready else "native"


def fp_tensors(model: onnx.ModelProto, info: DetectorInfo, calibration: Calibration | GpuCalibration) -> tuple[str, ...]:
    """Outputs of the floating-point layers, for a weakly typed target; chosen and checked as for Q/DQ nodes.

    Raises:
        DarktrtError: the input of another convolution has no scale, or ``calibration.fp_layers`` names no convolution.
    """
    graph = import_graph(model)
    if isinstance(calibration, GpuCalibration):
        fp_layers: Collection[str] = fp_layer_names(graph, info, calibration.fp_layers)
    else:
        fp_layers = choose_precisions(graph, info, calibration).fp_layers
    return tuple(node.output[0] for node in model.graph.node if node.name in fp_layers)


def _check_int8(info: DetectorInfo, target: Target, calibration: Calibration | GpuCalibration | None) -> None:
    if not info.int8_convolutions and calibration is None:
        raise DarktrtError("INT8 needs a calibration; make one with 'darktrt calib run'", "calibration")
    if info.int8_convolutions and calibration is not None:
        raise DarktrtError("the model has Q/DQ nodes already; build it without a calibration", "calibration")
    if isinstance(calibration, GpuCalibration) and not target.weakly_typed:
        how = "cannot calibrate where types come from the file" if target.strongly_typed else "has no calibrator"
        raise DarktrtError(f"{target} {how}; calibrate with 'darktrt calib run', and build with its file", "calibration_images")


def _state_types(graph: gs.Graph, info: DetectorInfo, calibration: Calibration | None) -> None:
    """State the precision in the types of the graph: Q/DQ nodes with ``calibration``, FP16 for the rest of the backbone."""
    if calibration:
        quantize(graph, info, calibration)
    halve(graph, info)
    if calibration or info.int8_convolutions:
        for opset in graph.import_domains:
            if not opset.domain:
                opset.version = max(opset.version, _HALF_QDQ_OPSET)


def _exported(graph: gs.Graph, source: onnx.ModelProto) -> onnx.ModelProto:
    model: onnx.ModelProto = gs.export_onnx(graph.toposort(), do_type_check=False)
    model.metadata_props.extend(source.metadata_props)
    embed(model)
    return model
