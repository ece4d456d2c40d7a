"""``plain.onnx`` to ``portable.onnx``: custom nodes in, with bodies that any consumer of ONNX can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError

from darktrt import METADATA_KEY, DarktrtError, DetectorInfo, HeadForm, InputForm, atomic_output, keep_inputs
from surgery.bodies import embed
from surgery.head import replace_head, take_bytes
from surgery.mish import replace_mish
from surgery.qdq import QuantizeReport, quantize


@dataclass(frozen=True)
class SurgeryOptions:
    """What to make of a plain model; the defaults are the command's."""

    head: HeadForm = "nms"
    input: InputForm = "uint8"
    mish: Literal["plugin", "native"] = "plugin"
    activation: str | None = None
    """Put this in the place of Mish: one of :data:`surgery.mish.SWAPS`."""
    max_candidates: int = 1000
    max_detections: int = 300
    scales: Mapping[str, np.float32] | None = None
    """amax / 127 by tensor: quantize with Q/DQ nodes."""
    keep: tuple[str, ...] | None = None
    """Convolutions not to quantize; None for those of :func:`surgery.qdq.default_keep`."""


@dataclass(frozen=True)
class SurgeryReport:
    """What surgery changed: Mish nodes replaced, heads decoded by the plugin, functions in the file."""

    mish: int
    heads: int
    functions: int
    info: DetectorInfo
    int8: QuantizeReport | None = None


def operate_file(source: str | Path, output: str | Path, options: SurgeryOptions) -> SurgeryReport:
    """File to file; the whole of ``darktrt surgery``.

    Raises:
        DarktrtError: ``source`` is no plain model of darktrt, or ``output`` cannot be written.
    """
    keep_inputs(output, source)
    model, info = load_model(source)
    if info.head != "decoded":
        raise DarktrtError(
            f"{source}: surgery was done on it already (--head {info.head}); start from the plain ONNX of 'convert'"
        )
    model, report = operate(model, info, options)
    save_model(model, report.info, output)
    return report


def load_model(path: str | Path) -> tuple[onnx.ModelProto, DetectorInfo]:
    """An ONNX file of darktrt and its metadata.

    Raises:
        DarktrtError: the file cannot be read, is no ONNX, or was not made by darktrt.
    """
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)  # all that darktrt writes
    except OSError as error:
        raise DarktrtError(f"{path}: cannot read: {error.strerror}") from error
    except DecodeError as error:
        raise DarktrtError(f"{path}: is no ONNX file, or a damaged one; make it with 'darktrt convert'") from error
    try:
        properties = {p.key: p.value for p in model.metadata_props}
        if METADATA_KEY in properties:
            onnx.checker.check_model(model, full_check=True)
            _check_names(model)
    except Exception as error:  # the checker's exceptions share no base class
        reason = str(error).strip().partition("\n")[0]
        raise DarktrtError(f"{path}: is a damaged ONNX file ({reason}); make it with 'darktrt convert'") from error
    if METADATA_KEY not in properties:
        raise DarktrtError(f"{path}: has no darktrt metadata; make it with 'darktrt convert'")
    info = DetectorInfo.from_json(properties[METADATA_KEY], str(path))
    _check_input(model, info, path)
    return model, info


def _check_names(model: onnx.ModelProto) -> None:
    """Names must be text: protobuf hands out damaged ones as bytes, or raises when they are read."""
    nodes = model.graph.node
    names = [
        name
        for node in nodes
        for name in (node.name, node.op_type, *node.input, *node.output, *(a.name for a in node.attribute))
    ]
    names += [constant.name for constant in model.graph.initializer]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        names += [value.name, value.doc_string, *(side.dim_param for side in value.type.tensor_type.shape.dim)]
    names += [model.graph.name, model.graph.doc_string, model.producer_name, model.producer_version]
    if any(not isinstance(name, str) for name in names):
        raise ValueError("a name is not UTF-8")


def _check_input(model: onnx.ModelProto, info: DetectorInfo, path: str | Path) -> None:
    """The first input must be the images that the metadata announces."""
    planes = [info.channels, info.height, info.width] if info.input == "float" else [info.height, info.width, info.channels]
    names = [value.name for value in model.graph.input]
    sides = [side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim] if names else []
    if names[:1] != ["images"] or sides[1:] != planes:
        raise DarktrtError(f"{path}: its input is not the {planes} images of its metadata; make it with 'darktrt convert'")


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """The model as a graph to operate on.

    Raises:
        DarktrtError: it is damaged in a way that the checker lets pass.
    """
    try:
        return gs.import_onnx(model)
    except Exception as error:  # of many kinds, by what is damaged
        raise DarktrtError(f"the ONNX file is damaged ({error}); make it with 'darktrt convert'") from error


def save_model(model: onnx.ModelProto, info: DetectorInfo, path: str | Path) -> None:
    """Check the model, all shapes included, and write it with its metadata.

    Raises:
        DarktrtError: the file cannot be written.
    """
    onnx.helper.set_model_props(model, {METADATA_KEY: info.to_json()})
    onnx.checker.check_model(model, full_check=True)
    with atomic_output(path) as temporary:
        onnx.save(model, str(temporary), format="protobuf")


def operate(model: onnx.ModelProto, info: DetectorInfo, options: SurgeryOptions) -> tuple[onnx.ModelProto, SurgeryReport]:
    """The operated model and what was done to it.

    Raises:
        DarktrtError: the graph is not what the metadata says; the message names the tensor or node.
    """
    graph = import_graph(model)
    mish = 0
    if options.mish == "plugin" or options.activation:
        mish = replace_mish(graph, info.mish_count, options.activation)
    replace_head(graph, info, options.head, options.max_candidates, options.max_detections)
    if options.input == "uint8":
        take_bytes(graph, info)
    int8 = None
    if options.scales is not None:
        int8 = quantize(graph, info, options.scales, options.keep)
    graph.cleanup().toposort()
    operated = gs.export_onnx(graph, do_type_check=False)
    functions = embed(operated)
    nms = options.head == "nms"
    done = replace(
        info,
        input=options.input,
        head=options.head,
        max_detections=options.max_detections if nms else 0,
        mish_count=0 if options.activation else info.mish_count,
        swapped_activations={options.activation: mish} if options.activation else {},
        int8_convolutions=len(int8.quantized) if int8 else 0,
    )
    heads = 0 if options.head == "raw" else len(info.heads)
    return operated, SurgeryReport(mish, heads, functions, done, int8)
