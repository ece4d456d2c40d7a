"""The custom ops of domain ``darktrt``: their attributes, checked, and their meaning as ONNX function bodies.

Every op is a frozen record whose fields are the attributes of its node. :meth:`PluginOp.attributes` gives what the node
carries, :meth:`PluginOp.body` the same computation in standard ops (opset 17), and :func:`op_from_node` reads a node back.
The bodies take their parameters from the node's attributes, so that a file states each of them once.

TensorRT's parser hands attributes to a plugin as fields of the same name: int and ints as 32-bit integers, float and floats
as 32-bit floats, a string as characters whose length counts a closing NUL. No other kind of attribute is used here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import isfinite
from string import Template
from typing import Any, ClassVar, get_args

from onnx import AttributeProto, FunctionProto, NodeProto, helper, parser

from darktrt.errors import DarktrtError
from darktrt.metadata import NmsKind

DOMAIN = "darktrt"
OPSET_VERSION = 1
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = ""
FIRST_BODY_OPSET = 17

MAX_HEADS = 5
MAX_ANCHORS = 32
"""Of one head."""
MAX_TOPK = 3840
"""The largest K of TensorRT's TopK; it bounds the candidates of an image."""

AttributeValue = int | float | str | list[int] | list[float]

_KINDS = {
    "int": AttributeProto.INT,
    "float": AttributeProto.FLOAT,
    "NmsKind": AttributeProto.STRING,
    "tuple[int, ...]": AttributeProto.INTS,
    "tuple[float, ...]": AttributeProto.FLOATS,
}


@dataclass(frozen=True)
class PluginOp(ABC):
    """What the ops share. Creating one checks its fields and raises DarktrtError for a value that makes no sense."""

    op_type: ClassVar[str]
    output_names: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def input_names(self) -> tuple[str, ...]:
        """The formal inputs, in the order of the node's."""

    @abstractmethod
    def statements(self, opset: int) -> str:
        """The body as ONNX text, from the formal inputs to the formal outputs."""

    def attributes(self) -> dict[str, AttributeValue]:
        """The attributes of the op's node; every node states the plugin's version and namespace, empty as that is."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        return {"plugin_version": PLUGIN_VERSION, "plugin_namespace": PLUGIN_NAMESPACE, **plain}

    def body(self, opset: int) -> FunctionProto:
        """The ONNX function of the op: the same for all nodes of a model, whatever the numbers in their attributes.

        ``opset`` is the model's, which a function of it must share; from :data:`FIRST_BODY_OPSET` on.
        """
        return parser.parse_function(
            f'<domain: "{DOMAIN}", opset_import: ["": {opset}]> {self.op_type} <{", ".join(self.attributes())}>'
            f" ({', '.join(self.input_names)}) => ({', '.join(self.output_names)}) {{{self.statements(opset)}}}"
        )

    def _require(self, holds: bool, problem: str) -> None:
        if not holds:
            raise DarktrtError(f"{self.op_type}: {problem}")


@dataclass(frozen=True)
class Mish(PluginOp):
    """y = x * tanh(softplus(x)), elementwise on any shape and floating type.

    darknet's softplus is x above 20 and exp(x) below -20, which differs by less than float32 rounding.
    """

    op_type = "MishPlugin"
    output_names = ("y",)

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("x",)

    def statements(self, opset: int) -> str:
        return _MISH.substitute(x="x", y="y")


@dataclass(frozen=True)
class MishAdd(PluginOp):
    """y = mish(x) + residual, the two of one shape and floating type: an activation and the shortcut behind it."""

    op_type = "MishAddPlugin"
    output_names = ("y",)

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("x", "residual")

    def statements(self, opset: int) -> str:
        return _MISH.substitute(x="x", y="activated") + _MISH_ADD


@dataclass(frozen=True)
class MishConcat(PluginOp):
    """y = mish(x), then mish(second), along axis 1; the two differ in that axis at most: activations that a route joins."""

    op_type = "MishConcatPlugin"
    output_names = ("y",)

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("x", "second")

    def statements(self, opset: int) -> str:
        first, second = (_MISH.substitute(x=x, y=f"activated_{x}") for x in self.input_names)
        return first + second + _MISH_CONCAT


MISH_OPS: tuple[type[PluginOp], ...] = (Mish, MishAdd, MishConcat)


@dataclass(frozen=True)
class YoloHeads(PluginOp):
    """The raw [yolo] tensors of a detector, as inputs, and what decoding them needs.

    Inputs: per head ``(N, anchors_per_head[i] * (5 + classes), rows, columns)`` float32, in cfg order. They decode to boxes
    ``(N, A, 4)`` float32, x1 y1 x2 y2 in pixels of the network input, and scores ``(N, A, classes)`` float32, objectness
    times class. A runs over the heads, in a head over anchor, then row, then column.

    With v = logistic(raw), or raw itself under new_coords: centre = (column + v * s - (s - 1) / 2) / columns * W, likewise
    with rows and H; size = exp(raw) * anchor, or (2 v)^2 * anchor under new_coords (darknet's ``get_yolo_box``).
    """

    anchors: tuple[float, ...]
    """Width, height in pixels of the network input, of the masked anchors of all heads in order."""
    anchors_per_head: tuple[int, ...]
    scale_x_y: tuple[float, ...]
    """One a head."""
    new_coords: tuple[int, ...]
    """One a head, 0 or 1."""
    classes: int
    input_size: tuple[int, ...]
    """Width, height."""

    def __post_init__(self) -> None:
        heads = len(self.anchors_per_head)
        self._require(1 <= heads <= MAX_HEADS, f"{heads} heads; between 1 and {MAX_HEADS} are supported")
        self._require(min(self.anchors_per_head) > 0, "anchors_per_head names a head with no anchor")
        most = max(self.anchors_per_head)
        self._require(most <= MAX_ANCHORS, f"a head has {most} anchors; {MAX_ANCHORS} are supported")
        numbers = 2 * sum(self.anchors_per_head)
        self._require(len(self.anchors) == numbers, f"anchors has {len(self.anchors)} numbers, its heads need {numbers}")
        self._require(_positive(self.anchors), f"anchors must be positive, not {self.anchors}")
        for name, values in (("scale_x_y", self.scale_x_y), ("new_coords", self.new_coords)):
            self._require(len(values) == heads, f"{name} has {len(values)} values for {heads} heads")
        self._require(_positive(self.scale_x_y), f"scale_x_y must be positive, not {self.scale_x_y}")
        self._require(set(self.new_coords) <= {0, 1}, f"new_coords must be 0 or 1, not {self.new_coords}")
        self._require(self.classes > 0, f"classes must be positive, not {self.classes}")
        self._require(_is_size(self.input_size), f"input_size must be width and height, not {self.input_size}")

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(f"head{i}_raw" for i in range(len(self.anchors_per_head)))

    def statements(self, opset: int) -> str:
        """From the heads to ``boxes`` and ``scores``."""
        heads = range(len(self.anchors_per_head))
        names = {part: ", ".join(f"head{i}_{part}" for i in heads) for part in ("anchors", "boxes", "scores")}
        head_texts = (_DECODE_HEAD.substitute(index=i, head=f"head{i}") for i in heads)
        return "".join([_DECODE_BEGIN.substitute(names), *head_texts, _DECODE_END.substitute(names)])


@dataclass(frozen=True)
class YoloDecode(YoloHeads):
    """The heads' ``boxes`` and ``scores``, as they are."""

    op_type = "YoloDecodePlugin"
    output_names = ("boxes", "scores")


@dataclass(frozen=True)
class YoloDetect(YoloHeads):
    """The heads decoded, then greedy non-maximum suppression per class, as darknet's ``do_nms_sort`` and ``diounms_sort``.

    Inputs besides the heads: ``score_threshold`` ``(1)`` and ``iou_threshold`` ``(1)`` float32; with ``letterbox`` also
    ``image_size`` ``(N, 2)`` float32, width and height of each image inside its letterbox, in any unit. Outputs, with
    K = max_detections: ``num_detections`` ``(N, 1)`` int32, boxes ``(N, K, 4)``, scores ``(N, K)``, classes ``(N, K)`` int32,
    by falling score, zeros after the last.

    Candidates are the (anchor, class) pairs with score > score_threshold whose box is finite in all four coordinates, so a NaN
    never becomes a detection; the max_candidates best of them (equal scores: the lower anchor * classes + class
    first). By falling score, a candidate is dropped when an earlier, kept one of its class has overlap > iou_threshold with
    it. The max_detections best of the kept come out. Overlap:

    - ``plain``: IoU
    - ``greedynms``: IoU - (d2 / c2)^0.6, d2 the squared distance of the centres, c2 the squared diagonal of the smallest
      box around both, of boxes relative to the image: divided by ``image_size``, else ``input_size`` (darknet's ``box_diou``)
    - ``diounms``: the same with exponent ``beta`` (``box_diounms``)

    IoU is 0 without intersection and the distance term 0 where c2 is 0, so boxes without area never suppress.

    Dropping the candidates after the max_candidates best changes no decision on those before them: the output is that of
    unlimited candidates whenever max_detections of them are kept, or no candidate was left out.
    """

    op_type = "YoloDetectPlugin"
    output_names = ("num_detections", "detected_boxes", "detected_scores", "detected_classes")

    kind: NmsKind
    beta: float
    max_candidates: int = 1000
    """1000 gave what unlimited ones give on 80 of 80 photographs of COCO at score_threshold 0.001; the cost is its square."""
    max_detections: int = 300
    letterbox: int = 0
    """1: images do not fill the network input, and ``image_size`` is the last input. Plain NMS needs none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = get_args(NmsKind)
        self._require(self.kind in kinds, f"kind {self.kind!r} is not one of {', '.join(kinds)}")
        self._require(_positive([self.beta]), f"beta must be positive, not {self.beta}")
        self._require(0 < self.max_candidates <= MAX_TOPK, f"max_candidates {self.max_candidates} is not in 1..{MAX_TOPK}")
        self._require(
            0 < self.max_detections <= self.max_candidates,
            f"max_detections {self.max_detections} is not in 1..{self.max_candidates}, the number of candidates",
        )
        possible = (0,) if self.kind == "plain" else (0, 1)
        self._require(
            self.letterbox in possible, f"letterbox must be one of {possible} for {self.kind} NMS, not {self.letterbox}"
        )

    @property
    def input_names(self) -> tuple[str, ...]:
        own = ("image_size",) if self.letterbox else ()
        return (*super().input_names, "score_threshold", "iou_threshold", *own)

    def statements(self, opset: int) -> str:
        overlap = _NMS_PLAIN
        if self.kind != "plain":
            overlap = "".join([_NMS_EXPONENT[self.kind], _NMS_IMAGE_SIZES[self.letterbox], _NMS_DISTANCE])
        best = _NMS_BEST_SCORE[opset >= _AXES_ARE_INPUTS]
        suppression = "".join([_NMS_MASK, best, _NMS_CANDIDATES, _NMS_IOU, overlap, _NMS_SUPPRESSION, _NMS_OUTPUT])
        return super().statements(opset) + suppression


HEAD_OPS: tuple[type[PluginOp], ...] = (YoloDecode, YoloDetect)
OPS = {op.op_type: op for op in MISH_OPS + HEAD_OPS}


def op_from_node(node: NodeProto) -> PluginOp:
    """The op that a node of domain ``darktrt`` stands for.

    Raises:
        DarktrtError: an op unknown here, an attribute missing or of the wrong type or value, a wrong number of inputs.
    """
    where = f"node '{node.name or node.output[0]}'"
    kind = OPS.get(node.op_type)
    if kind is None:
        raise DarktrtError(f"{where}: {DOMAIN} has no op {node.op_type}; it was made by another version of darktrt")
    attributes = {attribute.name: attribute for attribute in node.attribute}
    values: dict[str, Any] = {}
    for f in fields(kind):
        attribute = attributes.get(f.name)
        if attribute is None or attribute.type != _KINDS[str(f.type)]:
            raise DarktrtError(f"{where}: {node.op_type} needs the attribute '{f.name}' as {f.type}; run the surgery again")
        values[f.name] = _plain(helper.get_attribute_value(attribute))
    op = kind(**values)
    given, asked = len(node.input), len(op.input_names)
    if given != asked:
        raise DarktrtError(f"{where}: {node.op_type} has {given} inputs, its attributes ask for {asked}")
    return op


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, int | float) else tuple(value)


def _positive(values: Iterable[float]) -> bool:
    return all(isfinite(value) and value > 0 for value in values)


def _is_size(size: tuple[int, ...]) -> bool:
    return len(size) == 2 and _positive(size)


# The bodies. ONNX text has no nested expressions; `#` begins a comment.

_MISH = Template("""
    softplus_$x = Softplus ($x)
    gate_$x = Tanh (softplus_$x)
    $y = Mul ($x, gate_$x)
""")
_MISH_ADD = "    y = Add (activated, residual)\n"
_MISH_CONCAT = "    y = Concat <axis = 1> (activated_x, activated_second)\n"

_DECODE_BEGIN = Template("""
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    four = Constant <value_ints = [4]> ()
    rest = Constant <value_ints = [-1]> ()
    zero_scalar = Constant <value_int = 0> ()
    one_scalar = Constant <value_int = 1> ()
    one_float = Constant <value_float = 1.0> ()
    two_float = Constant <value_float = 2.0> ()
    half = Constant <value_float = 0.5> ()
    classes_scalar = Constant <value_int: int = @classes> ()
    classes = Reshape (classes_scalar, one)
    parts = Concat <axis = 0> (two, two, one, classes)  # of the channels of an anchor: x y, w h, objectness, classes
    channels = ReduceSum (parts)
    box_shape = Concat <axis = 0> (zero, rest, four)
    score_shape = Concat <axis = 0> (zero, rest, classes)
    input_size = Constant <value_ints: ints = @input_size> ()
    size = CastLike (input_size, half)
    numbers = Constant <value_floats: floats = @anchors> ()
    pair_shape = Concat <axis = 0> (rest, two, one)
    anchor_pairs = Reshape (numbers, pair_shape)
    anchors_per_head = Constant <value_ints: ints = @anchors_per_head> ()
    $anchors = Split <axis = 0> (anchor_pairs, anchors_per_head)  # (anchors, 2, 1)
    scales = Constant <value_floats: floats = @scale_x_y> ()
    new_coords_int = Constant <value_ints: ints = @new_coords> ()
    new_coords = Cast <to = 9> (new_coords_int)
""")

_DECODE_HEAD = Template("""
    ${head}_index = Constant <value_int = $index> ()
    ${head}_scale = Gather (scales, ${head}_index)
    ${head}_new = Gather (new_coords, ${head}_index)

    # (N, anchors * channels, rows, columns) to (N, anchors, channels, cells)
    ${head}_anchor_count = Shape <start = 0, end = 1> (${head}_anchors)
    ${head}_rows = Shape <start = 2, end = 3> (${head}_raw)
    ${head}_columns = Shape <start = 3, end = 4> (${head}_raw)
    ${head}_cells = Mul (${head}_rows, ${head}_columns)
    ${head}_shape = Concat <axis = 0> (zero, ${head}_anchor_count, channels, ${head}_cells)
    ${head}_channels = Reshape (${head}_raw, ${head}_shape)
    ${head}_logistic = Sigmoid (${head}_channels)
    ${head}_value = Where (${head}_new, ${head}_channels, ${head}_logistic)
    ${head}_xy, ${head}_wh, ${head}_objectness, ${head}_class = Split <axis = 2> (${head}_value, parts)

    # the cell of each place, as (2, cells): column, row
    ${head}_cell_count = Squeeze (${head}_cells)
    ${head}_cell = Range (zero_scalar, ${head}_cell_count, one_scalar)
    ${head}_cell_row = Unsqueeze (${head}_cell, zero)
    ${head}_column = Mod (${head}_cell_row, ${head}_columns)
    ${head}_row = Div (${head}_cell_row, ${head}_columns)
    ${head}_grid_int = Concat <axis = 0> (${head}_column, ${head}_row)
    ${head}_grid = CastLike (${head}_grid_int, half)
    ${head}_grid_size_int = Concat <axis = 0> (${head}_columns, ${head}_rows)
    ${head}_grid_size = CastLike (${head}_grid_size_int, half)
    ${head}_stride_row = Div (size, ${head}_grid_size)
    ${head}_stride = Unsqueeze (${head}_stride_row, one)

    # centre = (v * s + (cell - (s - 1) / 2)) * stride
    ${head}_excess = Sub (${head}_scale, one_float)
    ${head}_offset = Mul (${head}_excess, half)
    ${head}_shift = Sub (${head}_grid, ${head}_offset)
    ${head}_scaled = Mul (${head}_xy, ${head}_scale)
    ${head}_place = Add (${head}_scaled, ${head}_shift)
    ${head}_centre = Mul (${head}_place, ${head}_stride)

    # extent = exp(raw) * anchor, or (2 v)^2 * anchor
    ${head}_wh_raw = Slice (${head}_channels, two, four, two)
    ${head}_exp = Exp (${head}_wh_raw)
    ${head}_doubled = Mul (${head}_wh, two_float)
    ${head}_square = Mul (${head}_doubled, ${head}_doubled)
    ${head}_factor = Where (${head}_new, ${head}_square, ${head}_exp)
    ${head}_extent = Mul (${head}_factor, ${head}_anchors)
    ${head}_reach = Mul (${head}_extent, half)

    ${head}_low = Sub (${head}_centre, ${head}_reach)
    ${head}_high = Add (${head}_centre, ${head}_reach)
    ${head}_corners = Concat <axis = 2> (${head}_low, ${head}_high)
    ${head}_by_cell = Transpose <perm = [0, 1, 3, 2]> (${head}_corners)
    ${head}_boxes = Reshape (${head}_by_cell, box_shape)
    ${head}_score = Mul (${head}_class, ${head}_objectness)
    ${head}_score_by_cell = Transpose <perm = [0, 1, 3, 2]> (${head}_score)
    ${head}_scores = Reshape (${head}_score_by_cell, score_shape)
""")

_DECODE_END = Template("""
    boxes = Concat <axis = 1> ($boxes)
    scores = Concat <axis = 1> ($scores)
""")

_AXES_ARE_INPUTS = 18
"""The opset from which ReduceMax takes its axes so."""
_NMS_BEST_SCORE = (
    """
    best_score = ReduceMax <axes = [2], keepdims = 0> (ranked)
""",
    """
    best_score = ReduceMax <keepdims = 0> (ranked, two)
""",
)

# A pair that is no candidate gets the lowest float as its score, so that no NaN comes into an order and the candidates are
# those above it, whatever the threshold. A box counts its finite coordinates: NaN is not <= the largest float either.
_NMS_MASK = """
    zero_float = Constant <value_float = 0.0> ()
    four_float = Constant <value_float = 4.0> ()
    largest = Constant <value_float = 3.4028235e38> ()
    lowest = Constant <value_float = -3.4028235e38> ()
    extents = Abs (boxes)
    finite_bool = LessOrEqual (extents, largest)
    finite = CastLike (finite_bool, boxes)
    finite_count = ReduceSum (finite, two)  # (N, A, 1)
    box_is_finite = Equal (finite_count, four_float)
    above = Greater (scores, score_threshold)
    is_candidate = And (above, box_is_finite)
    ranked = Where (is_candidate, scores, lowest)
"""

# The best pairs lie in the anchors of the best class scores, so a first TopK over A anchors spares one over A * classes
# pairs. Those anchors go on in their old order, which keeps the order of equal scores. (ONNX takes the lower index first
# among equals; TensorRT's documentation promises nothing there.)
_NMS_CANDIDATES = """
    max_candidates_scalar = Constant <value_int: int = @max_candidates> ()
    max_candidates = Reshape (max_candidates_scalar, one)
    anchor_count = Shape <start = 1, end = 2> (scores)
    best_count = Min (anchor_count, max_candidates)
    unused_score, best_anchor = TopK (best_score, best_count)
    anchor, unused_order = TopK <largest = 0> (best_anchor, best_count)  # (N, best_count), rising
    anchor_index = Unsqueeze (anchor, two)
    anchor_scores = GatherND <batch_dims = 1> (ranked, anchor_index)
    flat_shape = Concat <axis = 0> (zero, rest)
    pair_scores = Reshape (anchor_scores, flat_shape)
    pairs = Mul (best_count, classes)
    candidates = Min (pairs, max_candidates)
    score, pair = TopK (pair_scores, candidates)  # (N, candidates), falling
    class = Mod (pair, classes)
    place = Div (pair, classes)
    place_index = Unsqueeze (place, two)
    candidate_anchor = GatherND <batch_dims = 1> (anchor, place_index)
    candidate_index = Unsqueeze (candidate_anchor, two)
    box = GatherND <batch_dims = 1> (boxes, candidate_index)
"""

# Where there is no area, `tiny` makes the union, and so the IoU's divisor, positive; it changes no other one.
_NMS_IOU = """
    edges = Concat <axis = 0> (one, one, one, one)
    x1, y1, x2, y2 = Split <axis = 2> (box, edges)  # (N, candidates, 1); with _row (N, 1, candidates)
    x1_row = Transpose <perm = [0, 2, 1]> (x1)
    y1_row = Transpose <perm = [0, 2, 1]> (y1)
    x2_row = Transpose <perm = [0, 2, 1]> (x2)
    y2_row = Transpose <perm = [0, 2, 1]> (y2)
    tiny = Constant <value_float = 1e-37> ()
    width = Sub (x2, x1)
    height = Sub (y2, y1)
    true_area = Mul (width, height)
    area = Max (true_area, tiny)
    area_row = Transpose <perm = [0, 2, 1]> (area)
    inner_x1 = Max (x1, x1_row)
    inner_x2 = Min (x2, x2_row)
    inner_width = Sub (inner_x2, inner_x1)
    shared_width = Relu (inner_width)
    inner_y1 = Max (y1, y1_row)
    inner_y2 = Min (y2, y2_row)
    inner_height = Sub (inner_y2, inner_y1)
    shared_height = Relu (inner_height)
    intersection = Mul (shared_width, shared_height)
    areas = Add (area, area_row)
    union = Sub (areas, intersection)
    iou = Div (intersection, union)
"""

# `sizes` is width, height, width, height: one row for all images, or one each as (N, 1, 4).
_NMS_IMAGE_SIZES = (
    """
    sizes = Concat <axis = 0> (size, size)
""",
    """
    sizes_row = Concat <axis = 1> (image_size, image_size)
    sizes = Unsqueeze (sizes_row, one)
""",
)

_NMS_DISTANCE = """
    relative = Div (box, sizes)
    left, top, right, bottom = Split <axis = 2> (relative, edges)
    left_row = Transpose <perm = [0, 2, 1]> (left)
    top_row = Transpose <perm = [0, 2, 1]> (top)
    right_row = Transpose <perm = [0, 2, 1]> (right)
    bottom_row = Transpose <perm = [0, 2, 1]> (bottom)
    outer_left = Min (left, left_row)
    outer_right = Max (right, right_row)
    outer_width = Sub (outer_right, outer_left)
    outer_width2 = Mul (outer_width, outer_width)
    outer_top = Min (top, top_row)
    outer_bottom = Max (bottom, bottom_row)
    outer_height = Sub (outer_bottom, outer_top)
    outer_height2 = Mul (outer_height, outer_height)
    true_diagonal2 = Add (outer_width2, outer_height2)
    diagonal2 = Max (true_diagonal2, tiny)
    x_sum = Add (left, right)
    x = Mul (x_sum, half)
    x_row = Transpose <perm = [0, 2, 1]> (x)
    dx = Sub (x, x_row)
    dx2 = Mul (dx, dx)
    y_sum = Add (top, bottom)
    y = Mul (y_sum, half)
    y_row = Transpose <perm = [0, 2, 1]> (y)
    dy = Sub (y, y_row)
    dy2 = Mul (dy, dy)
    distance2 = Add (dx2, dy2)
    ratio = Div (distance2, diagonal2)
    penalty = Pow (ratio, exponent)
    overlap = Sub (iou, penalty)
"""

_NMS_PLAIN = "    overlap = Identity (iou)\n"
_NMS_EXPONENT: dict[NmsKind, str] = {
    "greedynms": "    exponent = Constant <value_float = 0.6> ()",
    "diounms": "    exponent = Constant <value_float: float = @beta> ()",
}

# kept[i] = valid[i] and no kept[j] with suppresses[i, j]. suppresses is strictly lower triangular (only an earlier candidate
# suppresses), so this has one solution, the greedy one, and t rounds from any start settle at least the first t candidates.
# The loop ends when a round changes nothing in any image, or after as many rounds as there are candidates: exact for every
# chain of suppressions. Photographs take 4 to 7 rounds, at most 11, at a score threshold of 0.001.
# Sums of zeros and ones are exact in float32, so a sum above zero is at least one and relu(valid - hits) is 0 or 1.
_NMS_SUPPRESSION = """
    over = Greater (overlap, iou_threshold)
    class_column = Unsqueeze (class, two)
    class_row = Unsqueeze (class, one)
    same_class = Equal (class_column, class_row)
    candidate_count = Squeeze (candidates)
    position = Range (zero_scalar, candidate_count, one_scalar)
    position_column = Unsqueeze (position, one)
    later = Greater (position_column, position)
    later_same_class = And (same_class, later)
    suppresses_bool = And (over, later_same_class)
    suppresses = CastLike (suppresses_bool, boxes)
    valid_bool = Greater (score, lowest)
    valid_row = CastLike (valid_bool, boxes)
    valid = Unsqueeze (valid_row, two)
    begin = Constant <value = bool {1}> ()
    kept = Loop (candidate_count, begin, valid) <
        body = round (int64 number, bool go, float[?, ?, 1] old) => (bool moved, float[?, ?, 1] new) {
        hits = MatMul (suppresses, old)
        room = Sub (valid, hits)
        new = Relu (room)
        change = Sub (new, old)
        changes = ReduceL1 <keepdims = 0> (change)
        moved = Greater (changes, zero_float)
    } >
"""

# The kept ones come out in the candidates' own order: their keys count down and are all different.
_NMS_OUTPUT = """
    kept_row = Squeeze (kept, two)
    countdown_int = Sub (candidates, position)
    countdown = CastLike (countdown_int, boxes)
    short_key = Mul (kept_row, countdown)
    max_detections_scalar = Constant <value_int: int = @max_detections> ()
    max_detections = Reshape (max_detections_scalar, one)
    signed_missing = Sub (max_detections, candidates)
    missing = Max (signed_missing, zero)
    pads = Concat <axis = 0> (zero, zero, zero, missing)
    key = Pad (short_key, pads)
    top_key, top_place = TopK (key, max_detections)
    found = Greater (top_key, zero_float)
    found_int = CastLike (found, top_place)
    slot = Mul (top_place, found_int)
    slot_index = Unsqueeze (slot, two)
    score_column = Unsqueeze (score, two)
    class_float = CastLike (class_column, boxes)
    candidate = Concat <axis = 2> (box, score_column, class_float)
    picked = GatherND <batch_dims = 1> (candidate, slot_index)
    found_column = Unsqueeze (found, two)
    detection = Where (found_column, picked, zero_float)
    detection_parts = Concat <axis = 0> (four, one, one)
    detected_boxes, detected_score, detected_class = Split <axis = 2> (detection, detection_parts)
    detected_scores = Squeeze (detected_score, two)
    detected_class_float = Squeeze (detected_class, two)
    detected_classes = Cast <to = 6> (detected_class_float)
    count = ReduceSum (found_int, one)
    num_detections = Cast <to = 6> (count)
"""
