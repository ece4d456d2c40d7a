"""The custom ops of domain ``darktrt``: their attributes, checked, and their definition as ONNX function bodies.

Every op is a frozen record whose fields are the attributes of its node. :meth:`PluginOp.attributes` returns the attributes,
:meth:`PluginOp.body` the same computation in standard ops (opset 17), and :func:`op_from_node` reads a node back. The bodies
refer to the node's attributes, so that a file states each parameter once.

TensorRT's parser passes attributes to a plugin as fields of the same name: int and ints as 32-bit integers, float and floats
as 32-bit floats, a string as characters whose length counts a closing NUL. The ops have no other kinds of attributes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, ClassVar, get_args

from onnx import AttributeProto, FunctionProto, NodeProto, helper, parser

from darktrt.errors import DarktrtError
from darktrt.metadata import HeadKind, NmsKind
from darktrt.plugins import bodies

DOMAIN = "darktrt"
OPSET_VERSION = 1
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = ""
FIRST_BODY_OPSET = 17

HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)
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
    """A custom op. Its constructor checks the fields.

    Raises:
        DarktrtError: a field has an impossible value.
    """

    op_type: ClassVar[str]
    output_names: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def input_names(self) -> tuple[str, ...]:
        """The names of the formal inputs, in the order of the node's inputs."""

    @abstractmethod
    def statements(self, opset: int) -> str:
        """The body as ONNX text, from the formal inputs to the formal outputs."""

    def attributes(self) -> dict[str, AttributeValue]:
        """The attributes of the op's node; every node states the plugin's version and its namespace, which is empty."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        return {"plugin_version": PLUGIN_VERSION, "plugin_namespace": PLUGIN_NAMESPACE, **plain}

    @abstractmethod
    def working_numbers(self, inputs: Sequence[int]) -> int:
        """How many numbers the body holds at once besides its inputs, at most.

        Args:
            inputs: the count of numbers of each tensor that the node reads, for one image.
        """

    def body(self, opset: int) -> FunctionProto:
        """The ONNX function of the op, the same for all nodes of a model whatever their attributes.

        Args:
            opset: the model's, which its functions must share; :data:`FIRST_BODY_OPSET` or more.
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
        return bodies.mish()

    def working_numbers(self, inputs: Sequence[int]) -> int:
        return 2 * sum(inputs)


@dataclass(frozen=True)
class MishAdd(PluginOp):
    """y = mish(x) + residual, of one shape and floating type: an activation and the shortcut behind it."""

    op_type = "MishAddPlugin"
    output_names = ("y",)

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("x", "residual")

    def statements(self, opset: int) -> str:
        return bodies.mish_add()

    def working_numbers(self, inputs: Sequence[int]) -> int:
        return 2 * sum(inputs)


@dataclass(frozen=True)
class MishConcat(PluginOp):
    """y = mish(x), then mish(second), along axis 1: activations that a route joins. All other axes are equal."""

    op_type = "MishConcatPlugin"
    output_names = ("y",)

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("x", "second")

    def statements(self, opset: int) -> str:
        return bodies.mish_concat()

    def working_numbers(self, inputs: Sequence[int]) -> int:
        return 2 * sum(inputs)


MISH_OPS: tuple[type[PluginOp], ...] = (Mish, MishAdd, MishConcat)


@dataclass(frozen=True)
class YoloHeads(PluginOp):
    """Decoding of the raw tensors of a detector's heads.

    Inputs: per head ``(N, anchors_per_head[i] * (5 + classes), rows, columns)`` float32, 9 + classes for a [Gaussian_yolo], in
    cfg order. They decode to boxes ``(N, A, 4)`` float32, x1 y1 x2 y2 in pixels of the network input, and scores
    ``(N, A, classes)`` float32, objectness times class. A runs over the heads, in a head over anchor, then row, then column.

    With v = logistic(raw), or raw itself under new_coords: centre = (column + v * s - (s - 1) / 2) / columns * W, likewise
    with rows and H; size = exp(raw) * anchor, or (2 v)^2 * anchor under new_coords (darknet's ``get_yolo_box``).

    The classes of a [region] are the softmax of their raw numbers (``get_region_box`` and ``forward_region_layer``). In a
    [Gaussian_yolo] a raw uncertainty follows each of x, y, width and height, and the scores are multiplied by 1 minus the mean
    of the four's logistic (``get_gaussian_yolo_detections``).
    """

    anchors: tuple[float, ...]
    """Width, height in pixels of the network input, of the masked anchors of all heads in order."""
    anchors_per_head: tuple[int, ...]
    scale_x_y: tuple[float, ...]
    """One a head."""
    new_coords: tuple[int, ...]
    """One a head, 0 or 1."""
    head_kinds: tuple[int, ...]
    """One a head: 0 [yolo], 1 [region], 2 [Gaussian_yolo]."""
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
        for name in ("scale_x_y", "new_coords", "head_kinds"):
            values = getattr(self, name)
            self._require(len(values) == heads, f"{name} has {len(values)} values for {heads} heads")
        self._require(_positive(self.scale_x_y), f"scale_x_y must be positive, not {self.scale_x_y}")
        self._require(set(self.new_coords) <= {0, 1}, f"new_coords must be 0 or 1, not {self.new_coords}")
        self._require(set(self.head_kinds) <= {*range(len(HEAD_KINDS))}, f"head_kinds must be 0 to 2, not {self.head_kinds}")
        mixed = any(kind and new for kind, new in zip(self.head_kinds, self.new_coords, strict=True))
        self._require(not mixed, "new_coords must be 0 for a head that is no [yolo]")
        self._require(self.classes > 0, f"classes must be positive, not {self.classes}")
        self._require(_is_size(self.input_size), f"input_size must be width and height, not {self.input_size}")

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(f"head{i}_raw" for i in range(len(self.anchors_per_head)))

    def statements(self, opset: int) -> str:
        """From the heads to ``boxes`` and ``scores``."""
        return bodies.decode([HEAD_KINDS[kind] for kind in self.head_kinds])

    def working_numbers(self, inputs: Sequence[int]) -> int:
        return 4 * sum(inputs)


@dataclass(frozen=True)
class YoloDecode(YoloHeads):
    """The heads decoded to ``boxes`` and ``scores``."""

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
    first). By falling score, a candidate is suppressed when an earlier, unsuppressed candidate of its class has overlap >
    iou_threshold with it. The max_detections best unsuppressed candidates are the detections. Overlap:

    - ``plain``: IoU
    - ``greedynms``: IoU - (d2 / c2)^0.6, d2 the squared distance of the centres, c2 the squared diagonal of the smallest
      box around both, of boxes relative to the image: divided by ``image_size``, else ``input_size`` (darknet's ``box_diou``)
    - ``diounms``: the same with exponent ``beta`` (``box_diounms``)

    IoU is 0 without intersection and the distance term 0 where c2 is 0, so boxes without area never suppress.

    The limit on candidates changes no decision on those within it: the output is that of unlimited candidates whenever
    max_detections of them are unsuppressed, or no candidate was left out.
    """

    op_type = "YoloDetectPlugin"
    output_names = ("num_detections", "detected_boxes", "detected_scores", "detected_classes")

    kind: NmsKind
    beta: float
    max_candidates: int = 1000
    """The cost is quadratic. On 80 of 80 COCO images, at score_threshold 0.001, 1000 candidates suffice for all detections."""
    max_detections: int = 300
    letterbox: int = 0
    """1: images do not fill the network input, and ``image_size`` is the last input. Plain NMS does not need it."""

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
        return super().statements(opset) + bodies.suppress(self.kind, self.letterbox, opset)

    def working_numbers(self, inputs: Sequence[int]) -> int:
        """The candidates are compared in pairs; a dozen of these squares are in use at once."""
        pairs = min(self.max_candidates, sum(inputs)) ** 2
        return super().working_numbers(inputs) + 12 * pairs


@dataclass(frozen=True)
class Preprocess(PluginOp):
    """Images of one size fitted into the network's input: darknet's resize, stretched or letterboxed.

    Input: ``images`` ``(N, h, w, 3)`` RGB, levels 0 to 255 as float32 or float16. Outputs, all float32:

    - ``pixels`` ``(N, channels, H, W)`` in 0..1, as ``preprocess`` in vision/images.py makes them for the form ``float``, bit
      for bit; one channel is stb_image's luma
    - ``image_size`` ``(N, 2)``: width and height of the image inside the network's input
    - ``placement`` ``(3, 4)``: rows offset (x y x y), scale (x y x y), edges (w h w h) of :class:`PlaceBoxes`
    """

    op_type = "PreprocessPlugin"
    output_names = ("pixels", "image_size", "placement")

    input_size: tuple[int, ...]
    """Width, height."""
    channels: int
    """3 (RGB) or 1 (gray)."""
    letterbox: int
    """1: the image preserves its proportions, and the rest is 0.5; 0: it is stretched."""

    def __post_init__(self) -> None:
        self._require(_is_size(self.input_size), f"input_size must be width and height, not {self.input_size}")
        self._require(self.channels in (1, 3), f"channels must be 1 or 3, not {self.channels}")
        self._require(self.letterbox in (0, 1), f"letterbox must be 0 or 1, not {self.letterbox}")

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("images",)

    def statements(self, opset: int) -> str:
        return bodies.preprocess(self.channels, self.letterbox)

    def working_numbers(self, inputs: Sequence[int]) -> int:
        """Four neighbours and three channels of every pixel."""
        return 16 * self.input_size[0] * self.input_size[1]


@dataclass(frozen=True)
class PlaceBoxes(PluginOp):
    """Boxes ``(N, K, 4)`` in pixels of the network's input to pixels of the image, clipped to it; all float32.

    With the rows of ``placement`` ``(3, 4)``: min(max((box - offset) * scale, 0), edges). Boxes of zeros stay so.
    """

    op_type = "PlaceBoxesPlugin"
    output_names = ("placed",)

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("boxes", "placement")

    def statements(self, opset: int) -> str:
        return bodies.place_boxes()

    def working_numbers(self, inputs: Sequence[int]) -> int:
        return 2 * sum(inputs)


IMAGE_OPS: tuple[type[PluginOp], ...] = (Preprocess, PlaceBoxes)
HEAD_OPS: tuple[type[PluginOp], ...] = (YoloDecode, YoloDetect)
OPS = {op.op_type: op for op in MISH_OPS + HEAD_OPS + IMAGE_OPS}


def op_from_node(node: NodeProto) -> PluginOp:
    """Read the op of a node of domain ``darktrt``.

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
        raise DarktrtError(f"{where}: {node.op_type} has {given} inputs, its attributes need {asked}")
    return op


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, int | float) else tuple(value)


def _positive(values: Iterable[float]) -> bool:
    return all(isfinite(value) and value > 0 for value in values)


def _is_size(size: tuple[int, ...]) -> bool:
    return len(size) == 2 and _positive(size)
