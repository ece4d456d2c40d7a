"""Both ends of a detector: heads decoded by a plugin node, and images as bytes, fitted before or in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo, HeadForm, HeadInfo, Thresholds
from darktrt.plugins.ops import DOMAIN, HEAD_KINDS, PlaceBoxes, PluginOp, Preprocess, YoloDecode, YoloDetect


def replace_head(graph: gs.Graph, info: DetectorInfo, head: HeadForm, max_candidates: int, max_detections: int) -> None:
    """End the graph at the raw heads, at decoded boxes and scores, or at the detections of NMS.

    Raises:
        DarktrtError: a head's tensor is missing or does not have the channels of the cfg.
    """
    if head == "raw":
        graph.outputs = _raw_heads(graph, info)
    elif head == "decode":
        decode_heads(graph, info)
    else:
        _detect(graph, info, max_candidates, max_detections)


def decode_heads(graph: gs.Graph, info: DetectorInfo) -> None:
    """End the graph at ``boxes (N, A, 4)`` and ``scores (N, A, C)``.

    Raises:
        DarktrtError: as :func:`replace_head`.
    """
    raw, batch = _raw_heads(graph, info), graph.inputs[0].shape[0]
    anchors = sum(len(h.anchors) * h.rows * h.columns for h in info.heads)
    boxes = gs.Variable("boxes", np.float32, [batch, anchors, 4])
    scores = gs.Variable("scores", np.float32, [batch, anchors, info.heads[0].classes])
    _end_at(graph, YoloDecode(**_head_attributes(info)), "yolo_decode", raw, [boxes, scores])


def _detect(graph: gs.Graph, info: DetectorInfo, max_candidates: int, max_detections: int) -> None:
    raw, batch, k = _raw_heads(graph, info), graph.inputs[0].shape[0], max_detections
    op = YoloDetect(
        **_head_attributes(info),
        kind=info.nms.kind,
        beta=info.nms.beta,
        max_candidates=max_candidates,
        max_detections=max_detections,
        letterbox=int(info.nms_letterbox),
    )
    inputs = [gs.Variable(name, np.float32, [1]) for name in ("score_threshold", "iou_threshold")]
    if op.letterbox:
        inputs.append(gs.Variable("image_size", np.float32, [batch, 2]))
    outputs = [
        gs.Variable("num_detections", np.int32, [batch, 1]),
        gs.Variable("boxes", np.float32, [batch, k, 4]),
        gs.Variable("scores", np.float32, [batch, k]),
        gs.Variable("classes", np.int32, [batch, k]),
    ]
    _end_at(graph, op, "yolo_detect", [*raw, *inputs], outputs)
    graph.inputs.extend(inputs)


def _head_attributes(info: DetectorInfo) -> dict[str, Any]:
    """The attributes that both plugin nodes share, from the metadata."""
    return {
        "anchors": tuple(chain.from_iterable(anchor for h in info.heads for anchor in h.anchors)),
        "anchors_per_head": tuple(len(h.anchors) for h in info.heads),
        "scale_x_y": tuple(h.scale_x_y for h in info.heads),
        "new_coords": tuple(int(h.new_coords) for h in info.heads),
        "head_kinds": tuple(HEAD_KINDS.index(h.kind) for h in info.heads),
        "classes": info.heads[0].classes,
        "input_size": (info.width, info.height),
    }


def _end_at(graph: gs.Graph, op: PluginOp, name: str, inputs: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor]) -> None:
    graph.nodes.append(gs.Node(op.op_type, name, op.attributes(), list(inputs), list(outputs), domain=DOMAIN))
    graph.outputs = list(outputs)


def _raw_heads(graph: gs.Graph, info: DetectorInfo) -> list[gs.Tensor]:
    """The heads' tensors; the graph's old outputs are renamed, so that their names become free."""
    raw = [_head_tensor(graph, head) for head in info.heads]
    for old in graph.outputs:
        old.name = f"plain_{old.name}"  # until cleanup drops its producers
    return raw


def _head_tensor(graph: gs.Graph, head: HeadInfo) -> gs.Tensor:
    tensor = graph.tensors().get(head.tensor)
    if tensor is None:
        raise DarktrtError(
            f"surgery: the graph has no tensor '{head.tensor}', the head of cfg line {head.line}; convert it again"
        )
    wanted = [head.channels, head.rows, head.columns]
    if tensor.shape is None or list(tensor.shape[1:]) != wanted:
        raise DarktrtError(
            f"surgery: '{head.tensor}' is {tensor.shape}, but {len(head.anchors)} anchors, {head.classes} classes "
            f"and {head.columns}x{head.rows} cells of cfg line {head.line} need {('N', *wanted)}; convert it again"
        )
    tensor.dtype = np.float32
    return tensor


def fix_thresholds(graph: gs.Graph, thresholds: Thresholds) -> None:
    """Replace the threshold inputs of NMS by constants."""
    for name, value in (("score_threshold", thresholds.score), ("iou_threshold", thresholds.iou)):
        graph.tensors()[name].to_constant(np.array([value], np.float32))
    graph.inputs = [tensor for tensor in graph.inputs if isinstance(tensor, gs.Variable)]


def accept_bytes(graph: gs.Graph, info: DetectorInfo) -> None:
    """Make the input ``images`` uint8 ``(N, H, W, C)``; the graph casts, transposes and divides it by 255."""
    plain = graph.inputs[0]
    plain.name = "images_float"
    batch = plain.shape[0]
    images = gs.Variable("images", np.uint8, [batch, info.height, info.width, info.channels])
    nhwc = gs.Variable("images_nhwc", np.float32, [batch, info.height, info.width, info.channels])
    nchw = gs.Variable("images_nchw", np.float32, plain.shape)
    graph.nodes += [
        gs.Node("Cast", "images_cast", {"to": onnx.TensorProto.FLOAT}, [images], [nhwc]),
        gs.Node("Transpose", "images_transpose", {"perm": [0, 3, 1, 2]}, [nhwc], [nchw]),
        gs.Node("Div", "images_scale", {}, [nchw, gs.Constant("images_255", np.array(255, np.float32))], [plain]),
    ]
    graph.inputs[0] = images


def accept_images(graph: gs.Graph, info: DetectorInfo) -> None:
    """Make the input ``images`` uint8 ``(N, height, width, 3)`` of any height and width, in place.

    The graph fits them into the input of the network. The output ``boxes`` becomes pixels of the images, and an input
    ``image_size`` of NMS becomes a result of fitting them.

    Raises:
        DarktrtError: the network has neither 1 nor 3 channels.
    """
    plain = graph.inputs[0]
    plain.name = "images_float"
    batch = plain.shape[0]
    images, levels = (
        gs.Variable(name, dtype, [batch, "height", "width", 3])
        for name, dtype in (("images", np.uint8), ("images_levels", np.float32))
    )
    size = graph.tensors().get("image_size") or gs.Variable("image_size", np.float32, [batch, 2])
    placement = gs.Variable("placement", np.float32, [3, 4])
    op = Preprocess(input_size=(info.width, info.height), channels=info.channels, letterbox=int(info.resize == "letterbox"))
    graph.nodes += [
        gs.Node("Cast", "images_cast", {"to": onnx.TensorProto.FLOAT}, [images], [levels]),
        gs.Node(op.op_type, "preprocess", op.attributes(), [levels], [plain, size, placement], domain=DOMAIN),
    ]
    graph.inputs = [images, *(tensor for tensor in graph.inputs[1:] if tensor is not size)]
    _place_boxes(graph, placement)


def _place_boxes(graph: gs.Graph, placement: gs.Tensor) -> None:
    """Map the output ``boxes`` to pixels of the images; the boxes in pixels of the network become ``network_boxes``."""
    boxes = graph.tensors()["boxes"]
    boxes.name = "network_boxes"
    placed = gs.Variable("boxes", np.float32, boxes.shape)
    op = PlaceBoxes()
    graph.nodes.append(gs.Node(op.op_type, "place_boxes", op.attributes(), [boxes, placement], [placed], domain=DOMAIN))
    graph.outputs = [placed if tensor is boxes else tensor for tensor in graph.outputs]
