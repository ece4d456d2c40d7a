"""The bodies of the custom ops against scalar loops of darknet's formulas, and every library that must accept them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import session
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from darktrt.errors import DarktrtError
from darktrt.metadata import NmsKind, ResizePolicy
from darktrt.plugins.functions import drop_bodies, embed, inline_bodies
from darktrt.plugins.ops import (
    DOMAIN,
    MAX_ANCHORS,
    MAX_TOPK,
    MISH_OPS,
    Mish,
    MishAdd,
    MishConcat,
    PlaceBoxes,
    PluginOp,
    Preprocess,
    YoloDecode,
    YoloDetect,
    op_from_node,
)
from darktrt.vision import images as images_module
from darktrt.vision.images import preprocess

Floats = NDArray[np.float32]
Array = NDArray[Any]

KINDS: tuple[NmsKind, ...] = ("plain", "greedynms", "diounms")
ONNX_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int32": TensorProto.INT32}
Outputs = dict[str, tuple[str, int]]
"""Of a model: the type and the number of dimensions by name."""
MISH_OUTPUTS: Outputs = {"y": ("float32", 2)}
DECODE_OUTPUTS: Outputs = {"boxes": ("float32", 3), "scores": ("float32", 3)}
NMS_OUTPUTS: Outputs = {
    "num_detections": ("int32", 2),
    "detected_boxes": ("float32", 3),
    "detected_scores": ("float32", 2),
    "detected_classes": ("int32", 2),
}


# --- models ---


def node_of(op: PluginOp, inputs: Sequence[str], outputs: Sequence[str], name: str) -> onnx.NodeProto:
    attributes: dict[str, Any] = op.attributes()
    return helper.make_node(op.op_type, list(inputs), list(outputs), name=name, domain=DOMAIN, **attributes)


def checked_model(graph: onnx.GraphProto, opset: int = 17) -> onnx.ModelProto:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    embed(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def values_of(outputs: Outputs) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, ONNX_TYPES[t], [None] * rank) for name, (t, rank) in outputs.items()]


def model_of(op: PluginOp, inputs: dict[str, Array], outputs: Outputs) -> onnx.ModelProto:
    """One node of ``op``."""
    node = node_of(op, list(inputs), list(outputs), "it")
    return checked_model(helper.make_graph([node], "one_node", values_of_inputs(inputs), values_of(outputs)))


def values_of_inputs(inputs: dict[str, Array]) -> list[onnx.ValueInfoProto]:
    """Of any batch; inputs of one dimension are thresholds."""
    return [
        helper.make_tensor_value_info(name, ONNX_TYPES[str(a.dtype)], ["N", *a.shape[1:]] if a.ndim > 1 else a.shape)
        for name, a in inputs.items()
    ]


def run(model: onnx.ModelProto, inputs: dict[str, Array]) -> list[Array]:
    return list(session(model).run(None, inputs))


def run_reference(model: onnx.ModelProto, inputs: dict[str, Array]) -> list[Array]:
    outputs = ReferenceEvaluator(model).run(None, inputs)
    assert isinstance(outputs, list)
    return outputs


# --- Mish ---


PLAIN_MISH = """<ir_version: 8, opset_import: ["": 17]> mish (float[N] x) => (float[N] y) {
    a = Softplus (x)
    b = Tanh (a)
    y = Mul (x, b)
}"""
ACTIVATIONS = [-3e38, -1e4, -104, -88.8, -20, -2.5, -1.19, -1e-3, -0.0, 0, 1e-30, 0.5, 3, 19.9, 20.1, 88.8, 1e4, 3e38]


def mish_inputs() -> dict[str, Array]:
    random = np.random.default_rng(0).normal(0, 8, 5000)
    return {"x": np.concatenate([ACTIVATIONS, random]).astype(np.float32)[np.newaxis]}


def test_mish_is_mish() -> None:
    inputs = mish_inputs()
    (y,) = run(model_of(Mish(), inputs, MISH_OUTPUTS), inputs)
    x = inputs["x"].astype(np.float64)
    np.testing.assert_allclose(y, x * np.tanh(np.logaddexp(0, x)), rtol=1e-5, atol=1e-6)
    assert np.isfinite(y).all()


def test_mish_equals_the_plain_graph_to_the_bit() -> None:
    inputs = mish_inputs()
    (y,) = run(model_of(Mish(), inputs, MISH_OUTPUTS), inputs)
    (plain,) = run(parser.parse_model(PLAIN_MISH), {"x": inputs["x"][0]})
    assert y[0].tobytes() == plain.tobytes()


def test_mish_in_half_precision() -> None:
    x = np.linspace(-12, 12, 500, dtype=np.float16)[np.newaxis]
    (y,) = run(model_of(Mish(), {"x": x}, {"y": ("float16", 2)}), {"x": x})
    assert y.dtype == np.float16
    wide = x.astype(np.float64)
    np.testing.assert_allclose(y, wide * np.tanh(np.logaddexp(0, wide)), rtol=4e-3, atol=2e-3)


def pair_model(op: PluginOp, first: Array, second: Array) -> tuple[onnx.ModelProto, dict[str, Array]]:
    inputs = dict(zip(op.input_names, (first, second), strict=True))
    return model_of(op, inputs, {"y": (str(first.dtype), first.ndim)}), inputs


def wave(*shape: int, phase: float = 0) -> Array:
    return (6 * np.sin(np.arange(np.prod(shape)) + phase)).reshape(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_fused_mish_is_mish_and_what_follows_it(dtype: type) -> None:
    """Batch 2, not square; channels that differ in the concat. Float32 to the bit; in half the runtime rounds seldomer."""
    x, same, other = (array.astype(dtype) for array in (wave(2, 3, 4, 5), wave(2, 3, 4, 5, phase=2), wave(2, 4, 4, 5, phase=1)))
    mish, mish_other = (run(model_of(Mish(), {"x": a}, {"y": (str(a.dtype), 4)}), {"x": a})[0] for a in (x, other))
    tolerance = {"rtol": 1e-2, "atol": 5e-3} if dtype is np.float16 else {"rtol": 0, "atol": 0}
    (added,) = run(*pair_model(MishAdd(), x, same))
    (joined,) = run(*pair_model(MishConcat(), x, other))
    assert added.dtype == joined.dtype == dtype
    np.testing.assert_allclose(added, mish + same, **tolerance)
    np.testing.assert_allclose(joined, np.concatenate([mish, mish_other], 1), **tolerance)


# --- decode ---


class Head(NamedTuple):
    anchors: tuple[tuple[float, float], ...]
    rows: int
    columns: int
    scale: float = 1.0
    new_coords: int = 0
    kind: int = 0


def decode_of(heads: Sequence[Head], classes: int, size: tuple[int, int]) -> YoloDecode:
    return YoloDecode(
        anchors=tuple(side for head in heads for anchor in head.anchors for side in anchor),
        anchors_per_head=tuple(len(head.anchors) for head in heads),
        scale_x_y=tuple(head.scale for head in heads),
        new_coords=tuple(head.new_coords for head in heads),
        head_kinds=tuple(head.kind for head in heads),
        classes=classes,
        input_size=size,
    )


def logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def decode_place(raw: Floats, head: Head, place: tuple[int, ...], size: tuple[int, int]) -> tuple[list[float], list[float]]:
    """Box and class scores of one anchor at one cell; ``raw`` is its ``(5 + classes,)``. darknet's get_yolo_box, in double.

    The classes of a [region] are a softmax; in a [Gaussian_yolo] an uncertainty follows each number of the box.
    """
    anchor, row, column = place
    values = [float(v) for v in raw]
    certainty = 1.0
    if head.kind == 2:
        certainty -= sum(logistic(t) for t in values[1:8:2]) / 4
        values = values[0:8:2] + values[8:]
    v = values if head.new_coords else [logistic(t) for t in values]
    x = (column + v[0] * head.scale - (head.scale - 1) / 2) / head.columns * size[0]
    y = (row + v[1] * head.scale - (head.scale - 1) / 2) / head.rows * size[1]
    w, h = ((2 * v[k]) ** 2 if head.new_coords else math.exp(values[k]) for k in (2, 3))
    w, h = w * head.anchors[anchor][0], h * head.anchors[anchor][1]
    powers = [math.exp(t - max(values[5:])) for t in values[5:]]
    classes = [power / sum(powers) for power in powers] if head.kind == 1 else v[5:]
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2], [v[4] * c * certainty for c in classes]


def decode_reference(raws: Sequence[Floats], heads: Sequence[Head], size: tuple[int, int]) -> tuple[Array, Array]:
    images = []
    for n in range(len(raws[0])):
        rows = []
        for raw, head in zip(raws, heads, strict=True):
            split = raw[n].reshape(len(head.anchors), -1, head.rows, head.columns)
            for place in np.ndindex(len(head.anchors), head.rows, head.columns):
                rows.append(decode_place(split[place[0], :, place[1], place[2]], head, place, size))
        images.append(rows)
    return np.array([[r[0] for r in rows] for rows in images]), np.array([[r[1] for r in rows] for rows in images])


def raw_heads(heads: Sequence[Head], classes: int, batch: int) -> dict[str, Array]:
    rng = np.random.default_rng(len(heads) * 100 + classes)
    raws: dict[str, Array] = {}
    for i, head in enumerate(heads):
        shape = (batch, len(head.anchors) * ((9 if head.kind == 2 else 5) + classes), head.rows, head.columns)
        values = rng.uniform(0, 1, shape) if head.new_coords else rng.normal(0, 2, shape)
        raws[f"head{i}_raw"] = values.astype(np.float32)
    return raws


SMALL, WIDE, TALL = (10.0, 14.0), (81.0, 22.5), (37.0, 158.0)
DECODES: dict[str, tuple[list[Head], int, tuple[int, int]]] = {
    "v3": ([Head((SMALL, WIDE, TALL), 3, 3), Head((TALL, SMALL, WIDE), 6, 6)], 4, (96, 96)),
    "v4 scale_x_y, not square": ([Head((SMALL, WIDE, TALL), 2, 5, 1.05), Head((WIDE, SMALL, TALL), 4, 10, 1.2)], 3, (160, 64)),
    "new_coords": ([Head((SMALL, WIDE), 3, 2, 2.0, 1), Head((TALL, WIDE), 6, 4, 2.0, 1)], 2, (64, 96)),
    "both kinds of head": ([Head((SMALL, WIDE), 2, 3, 1.1, 0), Head((TALL, WIDE), 4, 6, 2.0, 1)], 2, (96, 64)),
    "one class": ([Head((SMALL, WIDE, TALL), 4, 2, 1.05)], 1, (64, 128)),
    "region": ([Head((SMALL, WIDE, TALL), 4, 3, kind=1)], 7, (96, 128)),
    "Gaussian": ([Head((SMALL, WIDE, TALL), 4, 3, 1.1, kind=2), Head((SMALL, TALL), 2, 2, kind=2)], 3, (96, 128)),
    "Gaussian of one class": ([Head((SMALL,), 4, 3, kind=2)], 1, (96, 128)),
    "region beside others": (
        [
            Head((SMALL, WIDE), 2, 3, kind=1),
            Head((TALL,), 4, 6, 2.0, 1),
            Head((WIDE, TALL), 2, 3, 1.1),
            Head((WIDE,), 3, 2, kind=2),
        ],
        3,
        (96, 64),
    ),
    "region of one class": ([Head((SMALL, TALL), 3, 2, kind=1)], 1, (64, 96)),
    "one anchor, one head": ([Head((TALL,), 5, 3)], 2, (96, 160)),
    "other anchors by head": (
        [Head((SMALL, WIDE, TALL), 2, 2), Head((WIDE,), 4, 4, 1.1), Head((TALL, SMALL), 1, 1)],
        2,
        (64, 64),
    ),
    "five heads": ([Head((SMALL, WIDE), n, n, 1 + n / 20) for n in (1, 2, 3, 4, 5)], 2, (480, 480)),
}


@pytest.mark.parametrize("case", DECODES)
@pytest.mark.parametrize("batch", [1, 2])
def test_decode_equals_the_formula(case: str, batch: int) -> None:
    heads, classes, size = DECODES[case]
    raws = raw_heads(heads, classes, batch)
    boxes, scores = run(model_of(decode_of(heads, classes, size), raws, DECODE_OUTPUTS), raws)
    expected_boxes, expected_scores = decode_reference(list(raws.values()), heads, size)
    assert boxes.dtype == scores.dtype == np.float32
    np.testing.assert_allclose(boxes, expected_boxes, rtol=2e-5, atol=2e-4)
    np.testing.assert_allclose(scores, expected_scores, rtol=2e-5, atol=1e-7)


def test_decode_saturates() -> None:
    heads = [Head((SMALL,), 1, 1)]
    raws: dict[str, Array] = {"head0_raw": np.array([1e4, -1e4, 5, -1e4, 1e4, 1e4, -1e4], np.float32).reshape(1, 7, 1, 1)}
    boxes, scores = run(model_of(decode_of(heads, 2, (32, 32)), raws, DECODE_OUTPUTS), raws)
    width = math.exp(5) * SMALL[0]
    np.testing.assert_allclose(boxes[0, 0], [32 - width / 2, 0, 32 + width / 2, 0], rtol=1e-5)
    np.testing.assert_array_equal(scores[0, 0], [1, 0])


# --- NMS ---


class Box(NamedTuple):
    x1: float
    y1: float
    x2: float
    y2: float


class Nms(NamedTuple):
    """The arguments of a suppression besides boxes and scores; no bound on the candidates means all of them."""

    kind: NmsKind = "plain"
    score_threshold: float = 0.05
    iou_threshold: float = 0.45
    beta: float = 0.8
    size: tuple[int, int] = (320, 192)
    max_candidates: int | None = None
    max_detections: int = 50
    image_sizes: tuple[tuple[int, int], ...] = ()
    """Of letterboxed images, one an image of the batch."""


def box_iou(a: Box, b: Box) -> float:
    w = min(a.x2, b.x2) - max(a.x1, b.x1)
    h = min(a.y2, b.y2) - max(a.y1, b.y1)
    intersection = 0.0 if w < 0 or h < 0 else w * h
    union = (a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - intersection
    return 0.0 if intersection == 0 or union == 0 else intersection / union


def box_diounms(a: Box, b: Box, exponent: float) -> float:
    w, h = max(a.x2, b.x2) - min(a.x1, b.x1), max(a.y2, b.y2) - min(a.y1, b.y1)
    c = w * w + h * h
    if c == 0:
        return box_iou(a, b)
    d = ((a.x1 + a.x2) / 2 - (b.x1 + b.x2) / 2) ** 2 + ((a.y1 + a.y2) / 2 - (b.y1 + b.y2) / 2) ** 2
    return float(box_iou(a, b) - (d / c) ** exponent)


def overlap(a: Box, b: Box, nms: Nms) -> float:
    if nms.kind == "plain":
        return box_iou(a, b)
    a, b = (Box(q.x1 / nms.size[0], q.y1 / nms.size[1], q.x2 / nms.size[0], q.y2 / nms.size[1]) for q in (a, b))
    return box_diounms(a, b, 0.6 if nms.kind == "greedynms" else nms.beta)


def nms_reference(boxes: Floats, scores: Floats, nms: Nms) -> list[tuple[float, int, Box]]:
    """Sequential greedy suppression of one image, a pair at a time: (score, class, box), best first."""
    threshold = np.float32(nms.score_threshold)
    pairs = [(s, a, c) for (a, c), s in np.ndenumerate(scores) if s > threshold and np.isfinite(boxes[a]).all()]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    kept: list[tuple[float, int, Box]] = []
    for score, anchor, class_id in pairs[: nms.max_candidates]:
        box = Box(*(float(v) for v in boxes[anchor]))
        if not any(c == class_id and overlap(k, box, nms) > nms.iou_threshold for _, c, k in kept):
            kept.append((float(score), class_id, box))
    return kept[: nms.max_detections]


def detect_of(heads: Sequence[Head], classes: int, nms: Nms) -> YoloDetect:
    return YoloDetect(
        **vars(decode_of(heads, classes, nms.size)),
        kind=nms.kind,
        beta=nms.beta,
        max_candidates=nms.max_candidates or 2000,
        max_detections=nms.max_detections,
        letterbox=int(bool(nms.image_sizes)),
    )


def nms_inputs(boxes: Array, scores: Array, nms: Nms) -> dict[str, Array]:
    return {"boxes": boxes.astype(np.float32), "scores": scores.astype(np.float32), **limits(nms)}


def limits(nms: Nms) -> dict[str, Array]:
    """The inputs besides boxes and scores, or besides heads."""
    thresholds = {"score_threshold": nms.score_threshold, "iou_threshold": nms.iou_threshold}
    given: dict[str, Array] = {name: np.array([value], np.float32) for name, value in thresholds.items()}
    return given | ({"image_size": np.array(nms.image_sizes, np.float32)} if nms.image_sizes else {})


def nms_model(inputs: dict[str, Array], nms: Nms) -> onnx.ModelProto:
    """The body of YoloDetect from its decoded boxes and scores on, for exact values that no heads decode to."""
    op = detect_of([Head((SMALL,), 1, 1)], inputs["scores"].shape[2], nms)
    function = op.body(17)
    rest = [node for node in function.node if not any(out.startswith("head") for out in node.output)]
    del function.node[:], function.input[:]
    function.node.extend(node for node in rest if node.output[0] not in ("boxes", "scores"))
    function.input.extend(inputs)
    node = node_of(op, list(inputs), list(NMS_OUTPUTS), "it")
    graph = helper.make_graph([node], "suppression", values_of_inputs(inputs), values_of(NMS_OUTPUTS))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def check_nms(boxes: Array, scores: Array, nms: Nms) -> list[int]:
    """Run a batch and compare every image with the reference; the number of detections of each."""
    inputs = nms_inputs(boxes, scores, nms)
    outputs = run(nms_model(inputs, nms), inputs)
    compare_nms(outputs, inputs, nms)
    return [int(n) for n in outputs[0][:, 0]]


def compare_nms(outputs: Sequence[Array], inputs: dict[str, Array], nms: Nms) -> None:
    counts, boxes, scores, classes = outputs
    batch, k = len(inputs["boxes"]), nms.max_detections
    assert [o.shape for o in outputs] == [(batch, 1), (batch, k, 4), (batch, k), (batch, k)]
    assert [str(o.dtype) for o in outputs] == [dtype for dtype, _ in NMS_OUTPUTS.values()]
    for i in range(batch):
        one = nms._replace(size=nms.image_sizes[i]) if nms.image_sizes else nms
        expected = nms_reference(inputs["boxes"][i], inputs["scores"][i], one)
        n = int(counts[i, 0])
        found = [(float(s), int(c), Box(*b)) for s, c, b in zip(scores[i], classes[i], boxes[i].tolist(), strict=True)]
        assert found[:n] == expected
        assert not boxes[i, n:].any() and not scores[i, n:].any() and not classes[i, n:].any()


def clustered(anchors: int, classes: int, seed: int, batch: int = 1) -> tuple[Array, Array]:
    """Boxes scattered around a few objects, so that many overlap; every image another."""
    rng = np.random.default_rng(seed)
    objects = rng.uniform([40, 30], [280, 160], (batch, 6, 2))
    centres = np.take_along_axis(objects, rng.integers(0, 6, (batch, anchors, 1)), 1) + rng.normal(0, 9, (batch, anchors, 2))
    reach = np.exp(rng.normal(3, 0.35, (batch, anchors, 2)))
    scores = rng.uniform(0, 1, (batch, anchors, 1)) * rng.uniform(0, 1, (batch, anchors, classes)) ** 3
    return np.concatenate([centres - reach, centres + reach], 2), scores


def chain(length: int, step: float = 6.0) -> Array:
    """A row of boxes, each overlapping the next by IoU 0.53 and no other above 0.3; ``(length, 4)``."""
    x = np.arange(length) * step
    return np.stack([x, np.full(length, 10.0), x + step * 3.3, np.full(length, 40.0)], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 4])
def test_nms_of_clusters_in_a_batch_of_different_images(kind: NmsKind, classes: int) -> None:
    boxes, scores = clustered(150, classes, seed=classes, batch=3)
    kept = check_nms(boxes, scores, Nms(kind, max_detections=200))
    assert all(5 < n < 0.8 * (scores[i] > 0.05).sum() for i, n in enumerate(kept))


def test_the_kinds_differ() -> None:
    boxes, scores = clustered(150, 1, seed=1)
    square = (320, 320)
    variants = [Nms("plain"), Nms("greedynms"), Nms("diounms", beta=0.3), Nms("diounms"), Nms("greedynms", size=square)]
    image = boxes[0].astype(np.float32), scores[0].astype(np.float32)
    kept = [nms_reference(*image, variant._replace(max_detections=200)) for variant in variants]
    assert all(a != b for i, a in enumerate(kept) for b in kept[:i])
    for variant in variants:
        check_nms(boxes, scores, variant)


@pytest.mark.parametrize("kind", ["greedynms", "diounms"])
def test_letterboxed_images_bring_their_own_shape(kind: NmsKind) -> None:
    boxes, scores = clustered(200, 2, seed=3)
    both = np.concatenate([boxes, boxes]), np.concatenate([scores, scores])
    wide, high = check_nms(*both, Nms(kind, iou_threshold=0.05, image_sizes=((320, 20), (12, 192))))
    assert wide != high


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("iou_threshold", [-0.05, 0.0, 0.2, 0.7, 1.0])
def test_nms_by_threshold(kind: NmsKind, iou_threshold: float) -> None:
    boxes, scores = clustered(100, 2, seed=11)
    check_nms(boxes, scores, Nms(kind, iou_threshold=iou_threshold, max_detections=150))


@pytest.mark.parametrize("kind", KINDS)
def test_nms_of_a_chain_needs_a_round_a_box(kind: NmsKind) -> None:
    """Each box would suppress the next, were it not suppressed itself: every second one stays."""
    boxes = np.stack([chain(201), chain(201)])
    falling = np.linspace(0.9, 0.1, 201)
    shuffled = np.random.default_rng(5).permutation(falling)
    nms = Nms(kind, iou_threshold=0.4, size=(1024, 64), max_detections=150)
    assert check_nms(boxes, np.stack([falling, shuffled])[..., np.newaxis], nms)[0] == 101


def test_nms_of_equal_scores_accepts_the_lower_index_first() -> None:
    boxes, scores = clustered(120, 3, seed=2, batch=2)
    levels = np.ceil(scores * 4) / 4
    for nms in (Nms(), Nms(max_candidates=100), Nms(max_candidates=37, max_detections=20), Nms("greedynms", max_candidates=90)):
        check_nms(boxes, levels, nms)


def test_the_best_pairs_are_found_where_few_anchors_have_many() -> None:
    rng = np.random.default_rng(3)
    boxes, _ = clustered(80, 20, seed=3)
    scores = np.where(rng.uniform(0, 1, (1, 80, 1)) < 0.1, rng.uniform(0.5, 1, (1, 80, 20)), rng.uniform(0, 0.6, (1, 80, 20)))
    check_nms(boxes, scores, Nms(max_candidates=60))


def test_no_candidate_outputs_zeros() -> None:
    boxes, scores = clustered(30, 2, seed=4, batch=2)
    scores[0] *= 0.01
    nms = Nms(score_threshold=0.3)
    kept = check_nms(boxes, scores, nms)
    assert kept[0] == 0 < kept[1]


def test_every_pair_a_candidate_and_fewer_than_asked_for() -> None:
    boxes, scores = clustered(7, 3, seed=5)
    nms = Nms(score_threshold=0.0, iou_threshold=1.0, max_detections=40)
    assert check_nms(boxes, scores + 0.01, nms) == [21]


def test_the_best_detections_fill_the_output() -> None:
    boxes, scores = clustered(100, 5, seed=6)
    assert check_nms(boxes, scores, Nms(max_detections=10)) == [10]
    assert check_nms(boxes, scores, Nms(max_detections=1)) == [1]


def test_one_anchor_one_class() -> None:
    box = np.array([[[1.0, 2, 30, 40]]])
    assert check_nms(box, np.array([[[0.9]]]), Nms()) == [1]
    assert check_nms(box, np.array([[[0.01]]]), Nms()) == [0]


def test_thresholds_are_strict() -> None:
    boxes = np.array([[[0.0, 0, 20, 10], [0, 0, 10, 10], [50, 50, 60, 60]]])
    scores = np.array([[[0.75], [0.5], [0.25]]])
    assert check_nms(boxes, scores, Nms(iou_threshold=0.5, score_threshold=0.25)) == [2]
    assert check_nms(boxes, scores, Nms(iou_threshold=0.499, score_threshold=0.249)) == [2]
    assert check_nms(boxes, scores, Nms(iou_threshold=0.499, score_threshold=0.25)) == [1]


def test_other_classes_do_not_suppress() -> None:
    boxes = np.array([[[0.0, 0, 20, 20]] * 3])
    assert check_nms(boxes, np.array([[[0.9, 0.8], [0.7, 0.1], [0.2, 0.95]]]), Nms()) == [2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("iou_threshold", [-0.1, 0.0, 0.45])
def test_boxes_without_area(kind: NmsKind, iou_threshold: float) -> None:
    point, line, real = [5.0, 5, 5, 5], [5.0, 5, 5, 25], [0.0, 0, 30, 30]
    boxes = np.array([[point, point, line, line, real, point, real]])
    scores = np.linspace(0.9, 0.3, 7).reshape(1, 7, 1)
    kept = check_nms(boxes, scores, Nms(kind, iou_threshold=iou_threshold))
    assert kept == [6] or iou_threshold < 0


ODD = (np.nan, np.inf, -np.inf)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score_threshold", [0.05, 0.0, -1.0])
def test_boxes_that_are_not_finite_are_no_candidates(kind: NmsKind, score_threshold: float) -> None:
    """Whichever coordinate it is, and however good the score."""
    boxes, scores = clustered(80, 2, seed=12, batch=2)
    for i, (value, corner) in enumerate(np.ndindex(3, 4)):
        boxes[0, i, corner] = ODD[value]
        scores[0, i] = 0.9 + i / 200
    nms = Nms(kind, score_threshold=score_threshold, iou_threshold=1.0, max_candidates=100, max_detections=100)
    if score_threshold < 0:
        nms = nms._replace(max_candidates=100, max_detections=50)
    check_nms(boxes, scores, nms)


@pytest.mark.parametrize("score_threshold", [0.05, 0.0, -0.5])
def test_nan_among_the_scores_disturbs_no_order(score_threshold: float) -> None:
    boxes, scores = clustered(90, 4, seed=13, batch=2)
    holes = np.random.default_rng(13).uniform(0, 1, scores.shape) < 0.3
    scores[holes] = np.nan
    scores[1] -= 0.3
    for limit in (360, 40, 7):
        check_nms(boxes, scores, Nms(score_threshold=score_threshold, max_candidates=limit, max_detections=min(limit, 50)))


def test_nothing_but_nan_outputs_zeros() -> None:
    boxes, scores = clustered(30, 2, seed=4)
    assert check_nms(boxes, scores * np.nan, Nms(score_threshold=-1.0)) == [0]
    assert check_nms(boxes * np.nan, scores, Nms(score_threshold=-1.0)) == [0]


def test_boxes_as_large_as_floats_get_are_finite() -> None:
    top = float(np.finfo(np.float32).max)
    boxes = np.array([[[-top, 0, top, 10], [0, 0, 10, 10], [-top, -top, top, top], [0, -np.inf, 10, 10]]])
    assert check_nms(boxes, np.array([[[0.9], [0.8], [0.7], [0.6]]]), Nms()) == [3]


# --- detect ---


def check_detect(raws: dict[str, Array], heads: Sequence[Head], classes: int, nms: Nms) -> list[int]:
    """Run a batch and compare with the reference on the outputs of YoloDecode; the number of detections of each image."""
    boxes, scores = run(model_of(decode_of(heads, classes, nms.size), raws, DECODE_OUTPUTS), raws)
    given = raws | limits(nms)
    outputs = run(model_of(detect_of(heads, classes, nms), given, NMS_OUTPUTS), given)
    compare_nms(outputs, {"boxes": boxes, "scores": scores}, nms)
    return [int(n) for n in outputs[0][:, 0]]


@pytest.mark.parametrize("case", DECODES)
@pytest.mark.parametrize("kind", KINDS)
def test_detect_is_decode_then_nms(case: str, kind: NmsKind) -> None:
    heads, classes, size = DECODES[case]
    assert all(check_detect(raw_heads(heads, classes, 2), heads, classes, Nms(kind, size=size)))


def test_detect_in_letterboxed_images() -> None:
    heads, classes, size = DECODES["both kinds of head"]
    nms = Nms("diounms", size=size, image_sizes=((96, 12), (40, 64)), iou_threshold=0.1)
    check_detect(raw_heads(heads, classes, 2), heads, classes, nms)


@pytest.mark.parametrize("case", ["v3", "new_coords", "one class", "region", "Gaussian"])
@pytest.mark.parametrize("score_threshold", [0.05, 0.0, -0.5])
def test_nothing_odd_in_a_head_is_detected(case: str, score_threshold: float) -> None:
    heads, classes, size = DECODES[case]
    rng = np.random.default_rng(1)
    raws = raw_heads(heads, classes, 3)
    for raw in raws.values():
        holes = rng.uniform(0, 1, raw.shape) < 0.02
        raw[holes] = rng.choice(ODD, holes.sum())
    nms = Nms("greedynms", score_threshold, size=size, max_candidates=100)
    assert all(check_detect(raws, heads, classes, nms))


def test_a_head_of_infinities_or_nan_outputs_nothing() -> None:
    heads, classes, size = DECODES["v3"]
    for value in (np.nan, np.inf):
        raws = {name: np.full_like(raw, value) for name, raw in raw_heads(heads, classes, 1).items()}
        assert check_detect(raws, heads, classes, Nms(size=size)) == [0]


def test_too_few_candidates_change_nothing_while_enough_are_left() -> None:
    boxes, scores = clustered(300, 3, seed=7)
    unlimited = Nms(score_threshold=0.001, max_detections=20)
    inputs = nms_inputs(boxes, scores, unlimited)
    outputs = run(nms_model(inputs, unlimited._replace(max_candidates=120)), inputs)
    assert outputs[0] == 20
    compare_nms(outputs, inputs, unlimited)


# --- images ---

IMAGE_OUTPUTS: Outputs = {"pixels": ("float32", 4), "image_size": ("float32", 2), "placement": ("float32", 2)}
FITS = [Preprocess((96, 64), channels, letterbox) for channels in (1, 3) for letterbox in (0, 1)]


@pytest.fixture(scope="module", autouse=True)
def numpy_resizes() -> Iterator[None]:
    """The reference is NumPy, also where the package has the compiled resize."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images_module, "compiled_fit", lambda: None)
        yield


def images_of(width: int, height: int, count: int = 2) -> Array:
    return np.random.default_rng(width).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def image_model(op: Preprocess, opset: int = 17) -> onnx.ModelProto:
    """Images of any size, as bytes, and boxes placed in them."""
    nodes = [
        helper.make_node("Cast", ["images"], ["levels"], to=TensorProto.FLOAT),
        node_of(op, ["levels"], list(IMAGE_OUTPUTS), "fit"),
        node_of(PlaceBoxes(), ["boxes", "placement"], ["placed"], "place"),
    ]
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3]),
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N", 10, 4]),
    ]
    outputs = values_of({**IMAGE_OUTPUTS, "placed": ("float32", 3)})
    return checked_model(helper.make_graph(nodes, "images", inputs, outputs), opset)


@pytest.mark.parametrize("opset", [17, 18, 21])
@pytest.mark.parametrize("op", FITS, ids=str)
def test_one_session_fits_images_of_every_size(op: Preprocess, opset: int) -> None:
    """To the bits of NumPy; a wide image and a high one reach the two branches of letterbox."""
    ready = session(image_model(op, opset))
    policy: ResizePolicy = "letterbox" if op.letterbox else "stretch"
    boxes = np.random.default_rng(0).uniform(-5, 100, (2, 10, 4)).astype(np.float32)
    for size in ((1, 1), (1, 9), (9, 1), (2, 2), (53, 37), (96, 64), (200, 301), (8192, 5)):
        images = images_of(*size)
        pixels, image_size, placement, placed = ready.run(None, {"images": images, "boxes": boxes})
        fitted = [preprocess(image, *op.input_size, op.channels, policy, "float") for image in images]
        np.testing.assert_array_equal(pixels, np.stack([array for array, _ in fitted]))
        place = fitted[0][1]
        np.testing.assert_array_equal(image_size, [place.inner_size] * 2)
        rows = [place.offset_x, place.offset_y] * 2, [place.scale_x, place.scale_y] * 2, [*size] * 2
        np.testing.assert_array_equal(placement, np.array(rows, np.float32))
        expected = np.clip((boxes - placement[0]) * placement[1], 0, placement[2])
        np.testing.assert_array_equal(placed, expected)


@pytest.mark.parametrize("op", FITS, ids=str)
def test_the_reference_evaluator_fits_images(op: Preprocess) -> None:
    model = image_model(op)
    inputs = {"images": images_of(53, 37), "boxes": np.zeros((2, 10, 4), np.float32)}
    assert_same(run(model, inputs), run_reference(model, inputs))


@pytest.mark.parametrize("op", FITS, ids=str)
def test_tensorrt_rtx_builds_for_images_of_every_size(op: Preprocess) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (pip install tensorrt-rtx)")
    smallest, usual, largest = (((n, side, 2 * side, 3), (n, 10, 4)) for n, side in ((1, 32), (4, 720), (8, 2048)))
    shapes = {"images": (smallest[0], usual[0], largest[0]), "boxes": (smallest[1], usual[1], largest[1])}
    width, height = op.input_size
    for model in (image_model(op), inline_bodies(image_model(op))):
        assert built_by_rtx(model, shapes) == [
            ("pixels", [-1, op.channels, height, width]),
            ("image_size", [-1, 2]),
            ("placement", [3, 4]),
            ("placed", [-1, 10, 4]),
        ]


def test_one_session_serves_every_batch() -> None:
    boxes, scores = clustered(60, 2, seed=8, batch=4)
    inputs = nms_inputs(boxes, scores, Nms("greedynms"))
    ready = session(nms_model(inputs, Nms("greedynms")))
    for images in (slice(0, 1), slice(0, 4), slice(2, 4)):
        part = inputs | {name: inputs[name][images] for name in ("boxes", "scores")}
        compare_nms(list(ready.run(None, part)), part, Nms("greedynms"))


# --- every consumer of a model ---


def network(half: bool = False, batch: int | str = 1, classes: int = 80, side: int = 416) -> onnx.ModelProto:
    """Convolutions and Mish, in half precision or not, two heads of stride 16 and 32, detection in float32."""
    rng = np.random.default_rng(0)
    dtype = np.float16 if half else np.float32
    nodes, weights = [helper.make_node("Cast", ["images"], ["start"], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))], []

    def conv(x: str, name: str, inputs: int, outputs: int, stride: int, mish: bool) -> str:
        values = rng.normal(0, (2 / (9 * inputs)) ** 0.5, (outputs, inputs, 3, 3))
        weights.append(numpy_helper.from_array(values.astype(dtype), f"{name}_w"))
        nodes.append(helper.make_node("Conv", [x, f"{name}_w"], [name], strides=[stride] * 2, pads=[1] * 4))
        if mish:
            nodes.append(node_of(Mish(), [name], [f"{name}_mish"], f"{name}_plugin"))
        return f"{name}_mish" if mish else name

    channels, x = [3, 8, 16, 32, 32, 64], "start"
    for i in range(4):
        x = conv(x, f"conv{i}", channels[i], channels[i + 1], 2, True)
    deep = conv(x, "conv4", 32, 64, 2, True)
    for i, (source, inputs) in enumerate([(deep, 64), (x, 32)]):
        head = conv(source, f"head{i}_conv", inputs, 3 * (5 + classes), 1, False)
        nodes.append(helper.make_node("Cast", [head], [f"head{i}_raw"], to=TensorProto.FLOAT))
    heads = [Head((SMALL, WIDE, TALL), side // s, side // s, 1.05) for s in (32, 16)]
    op = detect_of(heads, classes, Nms("greedynms", size=(side, side), max_candidates=1000, max_detections=300))
    detect = node_of(op, op.input_names, list(NMS_OUTPUTS), "detect")
    shapes: dict[str, list[int | str]] = {"images": [batch, 3, side, side], "score_threshold": [1], "iou_threshold": [1]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    return checked_model(helper.make_graph([*nodes, detect], "network", values, values_of(NMS_OUTPUTS), weights))


def network_inputs(batch: int, side: int) -> dict[str, Array]:
    images = np.random.default_rng(9).uniform(0, 1, (batch, 3, side, side)).astype(np.float32)
    return {"images": images, "score_threshold": np.array([0.4], np.float32), "iou_threshold": np.array([0.5], np.float32)}


def functions(model: onnx.ModelProto) -> list[str]:
    return sorted(function.name for function in model.functions if function.domain == DOMAIN)


def assert_same(first: Sequence[Array], second: Sequence[Array]) -> None:
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_function_an_op_however_often_embedded() -> None:
    model = network()
    once = model.SerializeToString()
    assert functions(model) == ["MishPlugin", "YoloDetectPlugin"]
    assert [opset.version for opset in model.opset_import if opset.domain == DOMAIN] == [1]
    assert embed(model) == 2
    assert model.SerializeToString() == once


def test_dropping_leaves_the_nodes() -> None:
    model = network()
    model.functions.append(helper.make_function("others", "F", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], []))
    assert drop_bodies(model) == 2
    assert drop_bodies(model) == 0
    assert [function.name for function in model.functions] == ["F"]
    del model.functions[:]
    assert sum(node.domain == DOMAIN for node in model.graph.node) == 6
    embed(model)
    assert model.SerializeToString() == network().SerializeToString()


def test_inlining_changes_no_number_and_leaves_standard_ops() -> None:
    model = network(batch="N", classes=3, side=64)
    inputs = network_inputs(2, 64)
    inlined = inline_bodies(model)
    onnx.checker.check_model(inlined, full_check=True)
    assert not inlined.functions
    assert {node.domain for node in inlined.graph.node} == {""}
    assert [opset.domain for opset in inlined.opset_import] == [""]
    assert functions(model), "the given model stays as it is"
    outputs = run(model, inputs)
    assert outputs[0].min() > 0
    assert_same(outputs, run(inlined, inputs))


def test_a_model_without_custom_nodes_passes_through() -> None:
    model = parser.parse_model(PLAIN_MISH)
    assert embed(model) == 0
    assert [opset.domain for opset in model.opset_import] == [""]
    assert inline_bodies(model) == model


def test_inlining_some_ops_leaves_the_others() -> None:
    model = network(batch="N", classes=3, side=64)
    inputs = network_inputs(2, 64)
    inlined = inline_bodies(model, MISH_OPS)
    onnx.checker.check_model(inlined, full_check=True)
    assert [node.op_type for node in inlined.graph.node if node.domain] == ["YoloDetectPlugin"]
    assert functions(inlined) == ["YoloDetectPlugin"]
    assert sorted(opset.domain for opset in inlined.opset_import) == ["", DOMAIN]
    assert_same(run(model, inputs), run(inlined, inputs))
    names = [name for node in inlined.graph.node for name in node.output]
    assert len(names) == len(set(names))
    assert inline_bodies(inlined, MISH_OPS) == inlined


def test_inlining_without_a_body_is_an_error() -> None:
    model = network()
    drop_bodies(model)
    with pytest.raises(DarktrtError, match=r"'conv0_plugin': MishPlugin has no body"):
        inline_bodies(model)


def test_a_graphsurgeon_round_trip() -> None:
    model = network(batch="N", classes=3, side=64)
    inputs = network_inputs(2, 64)
    exported = gs.export_onnx(gs.import_onnx(model).cleanup().toposort())
    embed(exported)
    onnx.checker.check_model(exported, full_check=True)
    assert functions(exported) == functions(model)
    assert_same(run(model, inputs), run(exported, inputs))


def test_the_reference_evaluator_agrees() -> None:
    inputs = mish_inputs()
    model = model_of(Mish(), inputs, MISH_OUTPUTS)
    np.testing.assert_allclose(run_reference(model, inputs)[0], run(model, inputs)[0], rtol=1e-5, atol=1e-6)
    heads, classes, size = DECODES["both kinds of head"]
    raws = raw_heads(heads, classes, 2)
    model = model_of(decode_of(heads, classes, size), raws, DECODE_OUTPUTS)
    for ours, theirs in zip(run(model, raws), run_reference(model, raws), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    nms = Nms("diounms", max_candidates=80)
    inputs = nms_inputs(*clustered(90, 2, seed=10, batch=2), nms)
    assert_same(run(nms_model(inputs, nms), inputs), run_reference(nms_model(inputs, nms), inputs))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("batch", [1, "N"])
def test_tensorrt_rtx_parses_and_builds(half: bool, batch: int | str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (pip install tensorrt-rtx)")
    model = network(half, batch)
    assert build_with_rtx(model, dynamic=batch == "N") == build_with_rtx(inline_bodies(model), dynamic=batch == "N")


def build_with_rtx(model: onnx.ModelProto, dynamic: bool) -> list[tuple[str, list[int]]]:
    """Parse and build, for batches of 1 to 8 if dynamic; the names and shapes of the outputs."""
    return built_by_rtx(model, {"images": tuple((n, 3, 416, 416) for n in (1, 4, 8))} if dynamic else {})


def built_by_rtx(model: onnx.ModelProto, shapes: dict[str, tuple[tuple[int, ...], ...]]) -> list[tuple[str, list[int]]]:
    """The same, with the smallest, usual and largest shape of each dynamic input."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    built = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    onnx_parser = trt.OnnxParser(built, logger)
    parsed = onnx_parser.parse(model.SerializeToString())
    assert parsed, [onnx_parser.get_error(i).desc() for i in range(onnx_parser.num_errors)]
    config = builder.create_builder_config()
    if shapes:
        profile = builder.create_optimization_profile()
        for name, three in shapes.items():
            profile.set_shape(name, *three)
        config.add_optimization_profile(profile)
    assert builder.build_serialized_network(built, config) is not None
    return [(out.name, list(out.shape)) for out in (built.get_output(i) for i in range(built.num_outputs))]


# --- attributes ---


HEADS, CLASSES, SIZE = DECODES["v4 scale_x_y, not square"]
DETECT = detect_of(HEADS, CLASSES, Nms("diounms", beta=0.25, size=SIZE, max_candidates=500, max_detections=100))
NODES = [Mish(), MishAdd(), MishConcat(), decode_of(HEADS, CLASSES, SIZE), DETECT, FITS[1], PlaceBoxes()]


@pytest.mark.parametrize("op", NODES, ids=lambda op: str(op.op_type))
def test_a_node_shows_its_op(op: PluginOp) -> None:
    node = node_of(op, op.input_names, op.output_names, "it")
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert attributes["plugin_version"] == b"1"
    assert attributes["plugin_namespace"] == b""
    read = op_from_node(node)
    assert type(read) is type(op)
    assert node_of(read, op.input_names, op.output_names, "it") == node


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"anchors": (10.0,) * 10}, "anchors has 10 numbers, its heads need 12"),
        ({"anchors": (10.0,) * 11 + (0.0,)}, "anchors must be positive"),
        ({"anchors_per_head": ()}, "0 heads"),
        ({"anchors_per_head": (1,) * 6}, "6 heads; between 1 and 5"),
        ({"anchors_per_head": (6, 0)}, "a head with no anchor"),
        ({"anchors_per_head": (MAX_ANCHORS + 1, 1)}, "a head has 33 anchors; 32 are supported"),
        ({"scale_x_y": (1.0,)}, "scale_x_y has 1 values for 2 heads"),
        ({"scale_x_y": (1.0, math.nan)}, "scale_x_y must be positive"),
        ({"new_coords": (0, 2)}, "new_coords must be 0 or 1"),
        ({"head_kinds": (0,)}, "head_kinds has 1 values for 2 heads"),
        ({"head_kinds": (0, 3)}, "head_kinds must be 0 to 2"),
        ({"head_kinds": (-1, 0)}, "head_kinds must be 0 to 2"),
        ({"head_kinds": (0, 1), "new_coords": (0, 1)}, r"new_coords must be 0 for a head that is no \[yolo\]"),
        ({"classes": 0}, "classes must be positive"),
        ({"input_size": (416,)}, "input_size must be width and height"),
    ],
)
def test_decode_and_detect_refuse(values: dict[str, Any], message: str) -> None:
    for good in (decode_of(HEADS, CLASSES, SIZE), DETECT):
        with pytest.raises(DarktrtError, match=f"{good.op_type}: .*{message}"):
            replace(good, **values)


def test_as_many_anchors_as_a_head_may_have() -> None:
    heads, size = [Head((SMALL, WIDE) * (MAX_ANCHORS // 2), 2, 1)], (32, 64)
    assert check_detect(raw_heads(heads, 2, 1), heads, 2, Nms(size=size)) > [0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "cornersnms"}, "kind 'cornersnms' is not one of plain, greedynms, diounms"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"letterbox": 2}, r"letterbox must be one of \(0, 1\) for diounms NMS, not 2"),
        ({"kind": "plain", "letterbox": 1}, r"letterbox must be one of \(0,\) for plain NMS, not 1"),
        ({"max_candidates": MAX_TOPK + 1}, r"max_candidates 3841 is not in 1\.\.3840"),
        ({"max_detections": 0}, r"max_detections 0 is not in 1\.\.500"),
        ({"max_candidates": 90}, r"max_detections 100 is not in 1\.\.90"),
    ],
)
def test_nms_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DarktrtError, match=message):
        replace(DETECT, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input_size": (416,)}, "input_size must be width and height"),
        ({"input_size": (416, 0)}, "input_size must be width and height"),
        ({"channels": 4}, "channels must be 1 or 3, not 4"),
        ({"letterbox": 2}, "letterbox must be 0 or 1, not 2"),
    ],
)
def test_preprocess_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DarktrtError, match=f"PreprocessPlugin: {message}"):
        replace(FITS[0], **values)


def test_malformed_nodes_are_named() -> None:
    node = node_of(decode_of(HEADS, CLASSES, SIZE), ["head0_raw"], ["boxes", "scores"], "decode")
    with pytest.raises(DarktrtError, match=r"'decode': YoloDecodePlugin has 1 inputs, its attributes need 2"):
        op_from_node(node)
    anchors = next(attribute for attribute in node.attribute if attribute.name == "anchors")
    anchors.CopyFrom(helper.make_attribute("anchors", [1, 2]))
    with pytest.raises(DarktrtError, match=r"needs the attribute 'anchors' as tuple\[float"):
        op_from_node(node)
    node.attribute.remove(anchors)
    with pytest.raises(DarktrtError, match=r"needs the attribute 'anchors'"):
        op_from_node(node)
    node.op_type = "YoloMagicPlugin"
    with pytest.raises(DarktrtError, match="darktrt has no op YoloMagicPlugin"):
        op_from_node(node)


def test_two_forms_of_one_op_do_not_fit_in_a_model() -> None:
    model = network()
    op = op_from_node(model.graph.node[-1])
    assert isinstance(op, YoloDetect)
    other = node_of(replace(op, kind="plain"), model.graph.node[-1].input, ["a", "b", "c", "d"], "other")
    model.graph.node.append(other)
    with pytest.raises(DarktrtError, match="two YoloDetectPlugin nodes differ"):
        embed(model)
