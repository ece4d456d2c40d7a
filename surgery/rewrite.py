"""``plain.onnx`` to ``portable.onnx``: plugin nodes with function bodies that any consumer of ONNX can run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from darktrt.errors import DarktrtError, quote
from darktrt.files import atomic_output, keep_inputs
from darktrt.metadata import (
    IMAGE_SIZES,
    METADATA_KEY,
    DetectorInfo,
    HeadForm,
    ImageSizes,
    InputForm,
    MishForm,
    Thresholds,
    check_image_sizes,
)
from darktrt.onnx_file import load_model
from darktrt.plugins.functions import INLINED_KEY, embed, inline_restorably
from darktrt.surgery.head import accept_bytes, accept_images, fix_thresholds, replace_head
from darktrt.surgery.mish import Fused, fuse_mish, replace_mish
from darktrt.surgery.outputs import add_outputs
from darktrt.surgery.qdq import Calibration, QuantizeReport, quantize


@dataclass(frozen=True)
class SurgeryOptions:
    """The form of a portable model; the defaults are the command line's.

    Raises:
        DarktrtError: on creation, when thresholds or images of any size are asked of a model without NMS, or the sizes of
            images are out of order or not asked for.
    """

    head: HeadForm = "nms"
    """Where the model ends: at detections (``nms``), decoded boxes and scores (``decode``) or the raw heads (``raw``)."""
    input: InputForm = "uint8"
    """Images as ``uint8 (N, H, W, C)``, or as ``float`` 0..1 ``(N, C, H, W)``, fitted into the network's input; or ``image``,
    uint8 ``(N, height, width, 3)`` of any size, which the model fits itself. Its boxes are in pixels of the image."""
    mish: MishForm = "auto"
    """See :attr:`darktrt.metadata.DetectorInfo.mish`."""
    max_candidates: int = 1000
    """The number of best boxes that enter NMS."""
    max_detections: int = 300
    """The number of rows of the padded outputs."""
    calibration: Calibration | None = None
    """Quantize with Q/DQ nodes by these scales."""
    thresholds: Thresholds | None = None
    """Thresholds to fix in the model; None makes them inputs."""
    mark_layers: bool = False
    """Make the tensor of every cfg section an output of the model too, so that an engine can be compared layer by layer."""
    image_sizes: ImageSizes | None = None
    """Smallest, usual and largest width and height of images, for the input ``image``; default:
    :data:`darktrt.metadata.IMAGE_SIZES`. An engine may have others, see :class:`darktrt.engine.options.BuildOptions`."""
    inline: bool = False
    """Write standard ops in place of the plugin nodes, for runtimes that know no ONNX functions, such as OpenVINO. darktrt
    reads such a file as if it had the nodes."""

    def __post_init__(self) -> None:
        if self.thresholds and self.head != "nms":
            raise DarktrtError(f"a model with head {self.head!r} has no NMS and so no thresholds", argument="thresholds")
        if self.input == "image" and self.head != "nms":
            raise DarktrtError(f"a model with head {self.head!r} has no boxes to map to images of any size", argument="head")
        if self.image_sizes and self.input != "image":
            raise DarktrtError(f"a model with the input {self.input!r} takes images of one size", argument="image_sizes")
        if self.image_sizes:
            check_image_sizes(self.image_sizes)


@dataclass(frozen=True)
class SurgeryReport:
    """The changes of a model, as counts, and its metadata."""

    mish: int
    """Mish replaced by plugin nodes."""
    heads: int
    """Heads decoded by the plugin."""
    functions: int
    """Function bodies in the file; none where they are inlined."""
    info: DetectorInfo
    fused: Fused
    """Adds and concats that compute the Mish before them."""
    int8: QuantizeReport | None = None
    layer_outputs: int = 0
    """Outputs added for the tensors of cfg sections."""


def insert_plugins(source: str | Path, output: str | Path, options: SurgeryOptions | None = None) -> SurgeryReport:
    """Write the portable model of a plain one.

    Args:
        source: the plain ONNX file, from :func:`darktrt.convert_darknet`.
        output: the ONNX file to write.
        options: the form of the model; default: :class:`SurgeryOptions`.

    Raises:
        DarktrtError: ``source`` is no plain model of darktrt, or ``output`` cannot be written.
    """
    keep_inputs(output, source)
    model, info = load_model(source)
    if info.head != "decoded":
        raise DarktrtError(
            f"{source}: has plugin nodes already (head {info.head!r}); start from the plain ONNX file of 'darktrt convert'"
        )
    model, report = transform(model, info, options or SurgeryOptions())
    save_model(model, report.info, output)
    return report


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """The model as a mutable graph.

    Raises:
        DarktrtError: it is damaged in a way that the checker does not detect.
    """
    try:
        return gs.import_onnx(model)
    except Exception as error:  # of many kinds, by what is damaged
        raise DarktrtError(f"the ONNX file is damaged ({error}); make it with 'darktrt convert'") from error


def save_model(model: onnx.ModelProto, info: DetectorInfo, path: str | Path) -> None:
    """Check the model, all shapes included, and write it with its metadata.

    Raises:
        DarktrtError: the model contradicts its metadata, or the file cannot be written.
    """
    inlined = {p.key: p.value for p in model.metadata_props if p.key == INLINED_KEY}
    onnx.helper.set_model_props(model, {METADATA_KEY: info.to_json(), **inlined})
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = quote(str(error).strip().partition("\n")[0], 200)
        raise DarktrtError(
            f"{info.name}: its graph and its metadata contradict each other ({reason}); convert it again"
        ) from error
    with atomic_output(path) as temporary:
        onnx.save(model, str(temporary), format="protobuf")


def transform(model: onnx.ModelProto, info: DetectorInfo, options: SurgeryOptions) -> tuple[onnx.ModelProto, SurgeryReport]:
    """The portable model of a plain one, and the report of its changes.

    Raises:
        DarktrtError: the graph does not match the metadata; the message names the tensor or node.
    """
    graph = import_graph(model)
    mish = replace_mish(graph, info.mish_count) if options.mish != "native" else 0
    fused = fuse_mish(graph) if options.mish == "fused" else Fused(0, 0)
    replace_head(graph, info, options.head, options.max_candidates, options.max_detections)
    if options.thresholds:
        fix_thresholds(graph, options.thresholds)
    if options.input == "uint8":
        accept_bytes(graph, info)
    elif options.input == "image":
        accept_images(graph, info)
    int8 = quantize(graph, info, options.calibration) if options.calibration else None
    portable = gs.export_onnx(graph.cleanup().toposort(), do_type_check=False)
    functions = embed(portable)
    marked = add_outputs(portable, {layer.tensor for layer in info.layers}) if options.mark_layers else 0
    if options.inline:
        portable, functions = inline_restorably(portable), 0
    heads = 0 if options.head == "raw" else len(info.heads)
    return portable, SurgeryReport(mish, heads, functions, _info_after(info, options, int8), fused, int8, marked)


def _info_after(info: DetectorInfo, options: SurgeryOptions, int8: QuantizeReport | None) -> DetectorInfo:
    fixed = options.thresholds
    return replace(
        info,
        input=options.input,
        head=options.head,
        max_detections=options.max_detections if options.head == "nms" else 0,
        mish=options.mish,
        int8_convolutions=len(int8.quantized) if int8 else 0,
        fixed_thresholds=(fixed.score, fixed.iou) if fixed else None,
        image_sizes=(options.image_sizes or IMAGE_SIZES) if options.input == "image" else None,
    )
