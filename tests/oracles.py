"""What the kernels must compute, in numpy: Mish and decode in double, suppression one by one in float32."""

from __future__ import annotations

import numpy as np
from kernels import Array, Detections, Nms, Yolo


def mish64(x: Array) -> Array:
    x = x.astype(np.float64)
    return x * np.tanh(np.logaddexp(0, x))


def decode64(yolo: Yolo, heads: list[Array]) -> tuple[Array, Array]:
    """From the formulas of darknet, in double."""
    boxes, scores = [], []
    for head, raw in zip(yolo.heads, heads, strict=True):
        split = raw.astype(np.float64).reshape(len(raw), len(head.anchors), -1, head.rows, head.columns)
        certainty = 1.0
        if head.kind == 2:
            certainty = 1 - (1 / (1 + np.exp(-split[:, :, 1:8:2]))).mean(2, keepdims=True)
            split = np.concatenate([split[:, :, 0:8:2], split[:, :, 8:]], 2)
        value = split if head.new_coords else 1 / (1 + np.exp(-split))
        anchors, sizes = np.array(head.anchors)[:, :, None, None], np.array([yolo.width, yolo.height])[:, None, None]
        cell = np.stack(np.meshgrid(np.arange(head.columns), np.arange(head.rows)))
        scale, grid = float(np.float32(head.scale_x_y)), np.array([head.columns, head.rows])[:, None, None]
        centre = (cell + value[:, :, :2] * scale - (scale - 1) / 2) / grid * sizes
        extent = ((2 * value[:, :, 2:4]) ** 2 if head.new_coords else np.exp(split[:, :, 2:4])) * anchors
        corners = np.concatenate([centre - extent / 2, centre + extent / 2], 2)
        boxes.append(corners.transpose(0, 1, 3, 4, 2).reshape(len(raw), -1, 4))
        classes = value[:, :, 5:]
        if head.kind == 1:
            powers = np.exp(split[:, :, 5:] - split[:, :, 5:].max(2, keepdims=True))
            classes = powers / powers.sum(2, keepdims=True)
        scores.append((value[:, :, 4:5] * classes * certainty).transpose(0, 1, 3, 4, 2).reshape(len(raw), -1, yolo.classes))
    return np.concatenate(boxes, 1), np.concatenate(scores, 1)


def overlap(a: Array, b: Array, nms: Nms, size: Array) -> Array:
    """Of the boxes ``a`` ``(n, 4)`` with box ``b``, in float32 as the op's body has it."""
    tiny = np.float32(1e-37)
    shared = np.maximum(np.minimum(a[:, 2:], b[2:]) - np.maximum(a[:, :2], b[:2]), np.float32(0)).prod(1)
    areas = [np.maximum((box[..., 2:] - box[..., :2]).prod(-1), tiny) for box in (a, b)]
    iou: Array = shared / (areas[0] + areas[1] - shared)
    if nms.kind == "plain":
        return iou
    p, q = (box / np.concatenate([size, size]) for box in (a, b))
    outer = np.maximum(p[:, 2:], q[2:]) - np.minimum(p[:, :2], q[:2])
    apart = (p[:, :2] + p[:, 2:]) * np.float32(0.5) - (q[:2] + q[2:]) * np.float32(0.5)
    ratio = (apart * apart).sum(1) / np.maximum((outer * outer).sum(1), tiny)
    return iou - (ratio.astype(np.float64) ** np.float64(nms.exponent)).astype(np.float32)


def expected_detections(
    yolo: Yolo, nms: Nms, boxes: Array, scores: Array, score_threshold: float, iou_threshold: float, sizes: Array | None = None
) -> Detections:
    """Candidates in order, then suppression one by one, from what decode gave."""
    batch, k = len(boxes), nms.max_detections
    made = Detections(
        np.zeros(batch, np.int32),
        np.zeros((batch, k, 4), np.float32),
        np.zeros((batch, k), np.float32),
        np.zeros((batch, k), np.int32),
    )
    for image in range(batch):
        flat = scores[image].reshape(-1)
        finite = np.isfinite(boxes[image]).all(1).repeat(yolo.classes)
        index = np.flatnonzero((flat > np.float32(score_threshold)) & finite)
        best = index[np.argsort(-flat[index], kind="stable")][: nms.max_candidates]
        size = np.array([yolo.width, yolo.height], np.float32) if sizes is None else sizes[image].astype(np.float32)
        for candidate in best:
            anchor, kind = divmod(int(candidate), yolo.classes)
            count = made.count[image]
            of_class = made.boxes[image, :count][made.classes[image, :count] == kind]
            if count == k or (overlap(of_class, boxes[image, anchor], nms, size) > np.float32(iou_threshold)).any():
                continue
            made.boxes[image, count], made.scores[image, count] = boxes[image, anchor], flat[candidate]
            made.classes[image, count] = kind
            made.count[image] += 1
    return made
