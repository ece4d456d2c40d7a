"""The detector metadata: what the stages after conversion need of the cfg.

It travels as JSON in an ONNX file's ``metadata_props`` and in an engine's manifest. The module needs nothing but the standard
library, so that a deployment host can read the metadata of a model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from darktrt.errors import DarktrtError
from darktrt.records import decode_json, record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

METADATA_KEY = "darktrt"
"""Key of the JSON text in an ONNX file's ``metadata_props``."""
_MOST_CHARACTERS = 16 << 20
"""Of that text; yolov4's has some 14,000."""

SCORE_THRESHOLD, IOU_THRESHOLD = 0.25, 0.45
"""Of detections that are used or shown; darknet's own."""

ResizePolicy = Literal["stretch", "letterbox"]
NmsKind = Literal["plain", "greedynms", "diounms"]
HeadKind = Literal["yolo", "region", "Gaussian_yolo"]
"""The sections that end a detector. Their order is that of the numbers of ``head_kinds`` in :mod:`darktrt.plugins.ops`."""
HeadForm = Literal["decoded", "raw", "decode", "nms"]
InputForm = Literal["uint8", "float", "image"]
MishForm = Literal["plugin", "fused", "native", "auto"]
ImageSizes = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Smallest, usual and largest width and height of images, in pixels."""

IMAGE_SIZES: ImageSizes = ((32, 32), (1280, 720), (4096, 4096))
"""Of a model that takes images of any size, unless others are named."""


@dataclass(frozen=True)
class Thresholds:
    """What a detection must exceed, and the overlap above which NMS suppresses the lesser one; both 0..1.

    Raises:
        DarktrtError: one is not between 0 and 1.
    """

    score: float = SCORE_THRESHOLD
    iou: float = IOU_THRESHOLD

    def __post_init__(self) -> None:
        for name, value in (("score", self.score), ("IoU", self.iou)):
            if not 0 <= value <= 1:
                raise DarktrtError(f"the {name} threshold is {value:g}; it must be between 0 and 1")

    def __str__(self) -> str:
        return f"score threshold {self.score:g} and IoU threshold {self.iou:g}"


def check_image_sizes(sizes: ImageSizes) -> None:
    """See that smallest, usual and largest size are three sizes in this order.

    Raises:
        DarktrtError: they are not.
    """
    if not _in_order(sizes):
        text = " ".join(f"{width}x{height}" for width, height in sizes)
        raise DarktrtError(
            f"{text}: write smallest, usual and largest image size, neither side below that of the one before, such as 32x32 "
            "1280x720 4096x4096",
            "image_sizes",
        )


def _in_order(sizes: ImageSizes) -> bool:
    return len(sizes) == 3 and all(1 <= low <= usual <= high for low, usual, high in zip(*sizes, strict=True))


def box_channels(kind: HeadKind) -> int:
    """The channels of each anchor of a head before objectness and the classes.

    They are x, y, width, height; each with its uncertainty behind it in a [Gaussian_yolo].
    """
    return 8 if kind == "Gaussian_yolo" else 4


def head_traits(kind: HeadKind, new_coords: bool) -> str:
    """What is not usual of a head, as text for people that a comma ends; empty for a usual one."""
    return {"yolo": "new_coords, " * new_coords, "region": "softmax, ", "Gaussian_yolo": "uncertainties, "}[kind]


@dataclass(frozen=True)
class HeadInfo:
    """One head: what decoding its raw tensor ``(N, channels, rows, columns)`` needs."""

    tensor: str
    line: int
    anchors: tuple[tuple[float, float], ...]
    """The masked anchors (width, height) in pixels of the network input, in the order of the tensor's channels."""
    mask: tuple[int, ...]
    classes: int
    scale_x_y: float
    new_coords: bool
    rows: int
    columns: int
    kind: HeadKind = "yolo"

    def __post_init__(self) -> None:
        pairs = [anchor for anchor in self.anchors if isinstance(anchor, tuple) and len(anchor) == 2]
        if (
            not pairs
            or len(pairs) < len(self.anchors)
            or not all(isinstance(v, int | float) and v > 0 for a in pairs for v in a)
        ):
            raise ValueError(f"the anchors are {self.anchors!r:.40}")

    @property
    def channels(self) -> int:
        """Of the raw tensor."""
        return len(self.anchors) * (box_channels(self.kind) + 1 + self.classes)


@dataclass(frozen=True)
class NmsInfo:
    """Non-maximum suppression as the cfg's last head asks for it; ``beta`` is the exponent of the distance term."""

    kind: NmsKind = "plain"
    beta: float = 0.6

    def __post_init__(self) -> None:
        if self.kind not in get_args(NmsKind):
            raise ValueError(f"the NMS kind is {self.kind!r}")


@dataclass(frozen=True)
class LayerInfo:
    """One cfg section: ``tensor`` is its output's name in the ONNX graph (that of its source where it only passes it on)."""

    index: int
    kind: str
    line: int
    tensor: str


@dataclass(frozen=True)
class DetectorInfo:
    """What the stages after conversion need of the cfg; travels as JSON in ONNX ``metadata_props`` and manifests."""

    name: str
    width: int
    height: int
    channels: int
    batch: tuple[int, int, int]
    """Smallest, usual and largest batch; all equal for a static one."""
    resize: ResizePolicy
    mish_count: int
    heads: tuple[HeadInfo, ...]
    nms: NmsInfo
    class_names: tuple[str, ...]
    parameters: int
    """Floats of the weights file."""
    gflops: float
    """For one image, counted as darknet does: 2 per multiply-add of the convolutions."""
    sources: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the cfg and the weights (or the seed of random ones)."""
    layers: tuple[LayerInfo, ...] = ()
    input: InputForm = "float"
    head: HeadForm = "decoded"
    """``decoded``: heads in standard ops (plain.onnx); ``raw``, ``decode``, ``nms``: what surgery left at the end."""
    max_detections: int = 0
    int8_convolutions: int = 0
    """Convolutions that Q/DQ nodes in the graph put into INT8."""
    mish: MishForm = "plugin"
    """What surgery made of Mish: a plugin node each, nodes that take the adds and concats behind them in, or standard ops;
    ``auto`` is a node each that becomes the form that suits the engine."""
    fixed_thresholds: tuple[float, float] | None = None
    """Of score and IoU, where surgery has put them into the model; otherwise they are inputs of a model with NMS."""
    image_sizes: ImageSizes | None = None
    """Of images that a model with the input form ``image`` accepts; None for the other forms."""

    def __post_init__(self) -> None:
        if len(self.batch) != 3 or not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise ValueError(f"batch is {self.batch}")
        if min(self.width, self.height, self.channels) < 1:
            raise ValueError(f"the input is {self.width}x{self.height}x{self.channels}")
        if self.mish not in get_args(MishForm):
            raise ValueError(f"the form of Mish is {self.mish!r}")
        fixed = self.fixed_thresholds
        if fixed is not None and not (len(fixed) == 2 and all(isinstance(v, int | float) and 0 <= v <= 1 for v in fixed)):
            raise ValueError(f"the fixed thresholds are {fixed!r:.40}")
        if any(head.classes != len(self.class_names) for head in self.heads):
            raise ValueError(f"there are {len(self.class_names)} class names")
        if (self.input == "image") != (self.image_sizes is not None):
            raise ValueError(f"the input form is {self.input!r} and image_sizes is {self.image_sizes}")
        if self.image_sizes and not _in_order(self.image_sizes):
            raise ValueError(f"the image sizes are {self.image_sizes}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Of one image: height, width and channels, or channels first for ``float``.

        For ``image`` it is (-1, -1, 3): RGB images of any size, which a batch shares.
        """
        if self.input == "image":
            return -1, -1, 3
        size = self.height, self.width
        return (*size, self.channels) if self.input == "uint8" else (self.channels, *size)

    @property
    def usual_image(self) -> tuple[int, int]:
        """Width and height of an image to try the model with: the usual one, or one of the network's size."""
        return self.image_sizes[1] if self.image_sizes else (self.width, self.height)

    @property
    def input_dtype(self) -> str:
        """NumPy's name of its type."""
        return "float32" if self.input == "float" else "uint8"

    @property
    def takes_thresholds(self) -> bool:
        """Whether the model has the inputs ``score_threshold (1)`` and ``iou_threshold (1)``."""
        return self.head == "nms" and self.fixed_thresholds is None

    @property
    def takes_image_size(self) -> bool:
        """Whether the model has the input ``image_size (N, 2)``: NMS with a distance term on letterboxed images needs it.

        A model with the input form ``image`` computes it.
        """
        return self.head == "nms" and self.nms_letterbox and self.input != "image"

    @property
    def nms_letterbox(self) -> bool:
        """Whether NMS depends on the shape of the image inside the letterbox."""
        return self.resize == "letterbox" and self.nms.kind != "plain"

    def check_thresholds(self, thresholds: Thresholds) -> None:
        """See that the model can detect with these.

        Raises:
            DarktrtError: others are fixed in it.
        """
        if self.fixed_thresholds not in (None, (thresholds.score, thresholds.iou)):
            pairs = self.fixed_thresholds or (), (thresholds.score, thresholds.iou)
            fixed, asked = (" and ".join(f"{value:g}" for value in pair) for pair in pairs)
            raise DarktrtError(f"{self.name}: its thresholds are fixed at {fixed}, not {asked}; ask for those")

    def check_image(self, width: int, height: int) -> None:
        """See that the model accepts images of this size, in pixels; one with another input form accepts all.

        Raises:
            DarktrtError: it was made for smaller or larger images.
        """
        if self.image_sizes is None:
            return
        least, _, most = self.image_sizes
        if not (least[0] <= width <= most[0] and least[1] <= height <= most[1]):
            raise DarktrtError(
                f"{self.name}: an image is {width}x{height}, but the model accepts {least[0]}x{least[1]} to "
                f"{most[0]}x{most[1]}; scale the image, or make the model for other sizes",
                argument="image_sizes",
            )

    def model_inputs(
        self, images: NDArray[Any], image_sizes: Sequence[tuple[float, float]], thresholds: Thresholds
    ) -> dict[str, NDArray[Any]]:
        """All inputs of the model by name.

        Args:
            images: ``(N, *input_shape)`` of :attr:`input_dtype`, all of one size; the first is repeated up to the model's
                smallest batch.
            image_sizes: width and height in pixels that each image takes of the network input, as far as they are known: the
                first is repeated up to the batch.
            thresholds: for a model that takes them.
        """
        import numpy as np

        missing = self.batch[0] - len(images)
        if missing > 0:
            images = np.concatenate([images, images[:1].repeat(missing, 0)])
        return {"images": images, **self.other_inputs(len(images), image_sizes, thresholds)}

    def other_inputs(
        self, count: int, image_sizes: Sequence[tuple[float, float]], thresholds: Thresholds
    ) -> dict[str, NDArray[Any]]:
        """The inputs of the model besides ``images``, for ``count`` images; arguments as those of :meth:`model_inputs`."""
        import numpy as np

        inputs = {}
        if self.takes_image_size:
            sizes = [*image_sizes, *[image_sizes[0]] * (count - len(image_sizes))]
            inputs["image_size"] = np.array(sizes, np.float32)
        return {**inputs, **self.threshold_inputs(thresholds)}

    def images_of_bytes(self, fitted: NDArray[np.uint8]) -> NDArray[Any]:
        """Bytes ``(N, H, W, C)``, fitted into the network's input, as the input ``images`` of any form.

        For ``float`` they are what the graph of ``uint8`` computes first; for ``image`` they are images that fit already, gray
        ones in three channels. The pixels behind the input are equal for all forms.
        """
        import numpy as np

        if self.input == "float":
            pixels: NDArray[np.float32] = np.ascontiguousarray(fitted.transpose(0, 3, 1, 2)).astype(np.float32)
            pixels /= np.float32(255)
            return pixels
        return fitted.repeat(3 // self.channels, 3) if self.input == "image" else fitted

    def threshold_inputs(self, thresholds: Thresholds) -> dict[str, NDArray[Any]]:
        """The inputs ``score_threshold (1)`` and ``iou_threshold (1)``, for a model that has them; otherwise none."""
        import numpy as np

        if not self.takes_thresholds:
            return {}
        values = {"score_threshold": thresholds.score, "iou_threshold": thresholds.iou}
        return {name: np.array([value], np.float32) for name, value in values.items()}

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str, where: str) -> DetectorInfo:
        """Parse what :meth:`to_json` wrote; ``where`` names the file in errors.

        Raises:
            DarktrtError: the text is not such JSON, or misses a field.
        """
        try:
            if len(text) > _MOST_CHARACTERS:
                raise ValueError(f"it has {len(text):,} characters")
            info = record(DetectorInfo, decode_json(text))
            if not info.heads:
                raise ValueError("it has no heads")
            return info
        except (ValueError, TypeError) as error:
            raise DarktrtError(f"{where}: the darktrt metadata is damaged ({error}); convert the network again") from error
