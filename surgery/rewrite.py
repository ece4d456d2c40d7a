"""``plain.onnx`` to ``portable.onnx``: custom nodes in, with bodies that any consumer of ONNX can run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, keep_inputs
from darktrt.metadata import METADATA_KEY, DetectorInfo, HeadForm, InputForm, MishForm
from darktrt.onnx_file import load_model
from darktrt.surgery.functions import embed
from darktrt.surgery.head import fix_thresholds, replace_head, take_bytes
from darktrt.surgery.mish import Fused, fuse_mish, replace_mish
from darktrt.surgery.outputs import add_outputs
from darktrt.surgery.qdq import Calibration, QuantizeReport, quantize


@dataclass(frozen=True)
class SurgeryOptions:
    """What to make of a plain model; the defaults are the command's."""

    head: HeadForm = "nms"
    input: InputForm = "uint8"
    mish: MishForm = "auto"
    max_candidates: int = 1000
    max_detections: int = 300
    calibration: Calibration | None = None
    """Quantize with Q/DQ nodes."""
    thresholds: tuple[float, float] | None = None
    """Of score and IoU, to fix in the model; inputs otherwise."""
    mark_layers: bool = False
    """Make the tensor of every cfg section an output of the model too, so that an engine can be compared layer by layer."""

    def __post_init__(self) -> None:
        if self.thresholds and self.head != "nms":
            raise DarktrtError(f"--thresholds are of NMS, and a model of --head {self.head} has none")
        if self.thresholds and not all(0 <= value <= 1 for value in self.thresholds):
            raise DarktrtError(
                f"--thresholds are {self.thresholds[0]:g} and {self.thresholds[1]:g}; both must be between 0 and 1"
            )


@dataclass(frozen=True)
class SurgeryReport:
    """What surgery changed: Mish nodes replaced, heads decoded by the plugin, functions in the file."""

    mish: int
    heads: int
    functions: int
    info: DetectorInfo
    fused: Fused
    """Adds and concats that took Mish in."""
    int8: QuantizeReport | None = None
    layer_outputs: int = 0
    """Outputs added for the tensors of cfg sections."""


def transform_file(source: str | Path, output: str | Path, options: SurgeryOptions) -> SurgeryReport:
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
    model, report = transform(model, info, options)
    save_model(model, report.info, output)
    return report


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


def transform(model: onnx.ModelProto, info: DetectorInfo, options: SurgeryOptions) -> tuple[onnx.ModelProto, SurgeryReport]:
    """The operated model and what was done to it.

    Raises:
        DarktrtError: the graph is not what the metadata says; the message names the tensor or node.
    """
    graph = import_graph(model)
    mish = replace_mish(graph, info.mish_count) if options.mish != "native" else 0
    fused = fuse_mish(graph) if options.mish == "fused" else Fused(0, 0)
    replace_head(graph, info, options.head, options.max_candidates, options.max_detections)
    if options.thresholds:
        fix_thresholds(graph, *options.thresholds)
    if options.input == "uint8":
        take_bytes(graph, info)
    int8 = None
    if options.calibration:
        int8 = quantize(graph, info, options.calibration)
    graph.cleanup().toposort()
    operated = gs.export_onnx(graph, do_type_check=False)
    functions = embed(operated)
    nms = options.head == "nms"
    done = replace(
        info,
        input=options.input,
        head=options.head,
        max_detections=options.max_detections if nms else 0,
        mish=options.mish,
        int8_convolutions=len(int8.quantized) if int8 else 0,
        fixed_thresholds=options.thresholds,
    )
    heads = 0 if options.head == "raw" else len(info.heads)
    marked = add_outputs(operated, {layer.tensor for layer in info.layers}) if options.mark_layers else 0
    return operated, SurgeryReport(mish, heads, functions, done, fused, int8, marked)
