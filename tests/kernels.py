"""The C functions of plugins/csrc/kernels.h from Python, built where the tests run: the host library's and the GPU's alike.

Needs only numpy. :class:`Library` accepts and returns numpy arrays; a subclass chooses the memory of the functions.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CSRC = Path(__file__).resolve().parent.parent / "plugins" / "csrc"
UNSUPPORTED = -1
TYPES: tuple[Any, ...] = (np.float32, np.float16, np.int8, np.uint8)
"""By their numbers in kernels.h."""
MAX_HEADS, MAX_ANCHORS = 5, 32
GUARD = 256
"""Bytes after every output, which must stay as they are."""
UNWRITTEN = 0x5A


class Format(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("vector_width", ctypes.c_int32),
        ("channels_last", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class Shape(ctypes.Structure):
    _fields_ = (("batch", ctypes.c_int32), ("channels", ctypes.c_int32), ("pixels", ctypes.c_int64))


class CHead(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "anchors", "rows", "columns", "new_coords")),
        ("scale_x_y", ctypes.c_float),
        ("anchor_sizes", ctypes.c_float * (2 * MAX_ANCHORS)),
    )


class CYolo(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "heads", "classes", "width", "height")),
        ("head", CHead * MAX_HEADS),
    )


class CNms(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("exponent", ctypes.c_float),
        ("max_candidates", ctypes.c_int32),
        ("max_detections", ctypes.c_int32),
    )


class CFit(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in ("width", "height", "channels", "letterbox"))


class CImage(ctypes.Structure):
    _fields_ = (("pixels", ctypes.c_void_p), ("width", ctypes.c_int32), ("height", ctypes.c_int32))


@dataclass(frozen=True)
class Layout:
    """How the channels of a tensor lie in memory, as DarktrtFormat says it."""

    name: str
    vector_width: int = 1
    channels_last: bool = False

    def padded(self, channels: int) -> int:
        return -(-channels // self.vector_width) * self.vector_width

    def pack(self, x: Array, padding: float = 0) -> Array:
        """``(N, C, P)`` in its memory layout, with ``padding`` in the channels beyond C."""
        filled = np.full((x.shape[0], self.padded(x.shape[1]), x.shape[2]), padding, x.dtype)
        filled[:, : x.shape[1]] = x
        if self.channels_last:
            return np.ascontiguousarray(filled.transpose(0, 2, 1))
        grouped = filled.reshape(x.shape[0], filled.shape[1] // self.vector_width, self.vector_width, x.shape[2])
        return np.ascontiguousarray(grouped.transpose(0, 1, 3, 2))

    def unpack(self, memory: Array, batch: int, channels: int, pixels: int) -> tuple[Array, Array]:
        """The ``(N, C, P)`` channels, and the padding channels beyond."""
        padded = self.padded(channels)
        if self.channels_last:
            filled = memory.reshape(batch, pixels, padded).transpose(0, 2, 1)
        else:
            grouped = memory.reshape(batch, padded // self.vector_width, pixels, self.vector_width)
            filled = grouped.transpose(0, 1, 3, 2).reshape(batch, padded, pixels)
        return filled[:, :channels], filled[:, channels:]


LINEAR = Layout("linear")
LAYOUTS = (
    LINEAR,
    Layout("chw4", 4),
    Layout("chw16", 16),
    Layout("chw32", 32),
    Layout("hwc8", 8, True),
    Layout("hwc16", 16, True),
    Layout("hwc", 1, True),
)


@dataclass(frozen=True)
class Head:
    anchors: tuple[tuple[float, float], ...]
    rows: int
    columns: int
    new_coords: int = 0
    scale_x_y: float = 1.0
    kind: int = 0
    """0 [yolo], 1 [region], 2 [Gaussian_yolo]."""

    @property
    def box_channels(self) -> int:
        """Of each anchor, before objectness."""
        return 8 if self.kind == 2 else 4


@dataclass(frozen=True)
class Yolo:
    heads: tuple[Head, ...]
    classes: int
    width: int
    height: int

    @property
    def anchors(self) -> int:
        return sum(len(head.anchors) * head.rows * head.columns for head in self.heads)

    def shapes(self, batch: int) -> list[tuple[int, int, int, int]]:
        return [
            (batch, len(head.anchors) * (head.box_channels + 1 + self.classes), head.rows, head.columns) for head in self.heads
        ]

    def struct(self, batch: int) -> CYolo:
        made = CYolo(batch, len(self.heads), self.classes, self.width, self.height)
        for to, head in zip(made.head, self.heads, strict=False):
            to.anchors, to.rows, to.columns = len(head.anchors), head.rows, head.columns
            to.kind, to.new_coords, to.scale_x_y = head.kind, head.new_coords, head.scale_x_y
            sizes = [size for anchor in head.anchors for size in anchor]
            to.anchor_sizes[: len(sizes)] = sizes
        return made


@dataclass(frozen=True)
class Nms:
    kind: str = "plain"
    beta: float = 0.6
    max_candidates: int = 1000
    max_detections: int = 300

    @property
    def exponent(self) -> np.float32:
        """Of the distance term."""
        return np.float32(0.6 if self.kind == "greedynms" else self.beta)

    def struct(self) -> CNms:
        return CNms(int(self.kind != "plain"), self.exponent, self.max_candidates, self.max_detections)


@dataclass(frozen=True)
class Detections:
    """Of a batch, as the function wrote them."""

    count: Array
    boxes: Array
    scores: Array
    classes: Array

    def __iter__(self) -> Any:
        return iter((self.count, self.boxes, self.scores, self.classes))


@dataclass(frozen=True)
class Fit:
    """The input of a network that images are fitted into."""

    width: int
    height: int
    channels: int = 3
    letterbox: int = 0

    def struct(self) -> CFit:
        return CFit(self.width, self.height, self.channels, self.letterbox)


ANCHORS_608 = ((12, 16), (19, 36), (40, 28), (36, 75), (76, 55), (72, 146), (142, 110), (192, 243), (459, 401))
YOLOV4_608 = Yolo(
    tuple(Head(ANCHORS_608[3 * i : 3 * i + 3], 608 // s, 608 // s, 0, 1.05) for i, s in enumerate((8, 16, 32))), 80, 608, 608
)


def scene(yolo: Yolo, batch: int, seed: int, positives: float = 0.01, dtype: Any = np.float32) -> list[Array]:
    """Raw heads as of a trained network: few likely anchors, gathered around some places, each sure of a class or two.

    Under new_coords values are what the logistic of these would be, so they lie in 0..1. ``positives`` is the share of the
    anchors whose objectness lies around 0.5.
    """
    random = np.random.default_rng(seed)
    made = []
    for head, (_, channels, rows, columns) in zip(yolo.heads, yolo.shapes(batch), strict=True):
        anchors, first = len(head.anchors), head.box_channels
        raw = random.normal(0, 1, (batch, anchors, first + 1 + yolo.classes, rows, columns)).astype(np.float32)
        raw[:, :, first // 2 : first] *= 0.4
        field = random.normal(0, 1, (batch, 1, rows // 4 + 1, columns // 4 + 1)).repeat(4, 2).repeat(4, 3)[..., :rows, :columns]
        likely = field > np.quantile(field, 1 - positives) if field.size else field > 0
        raw[:, :, first] = np.where(likely, raw[:, :, first], raw[:, :, first] - 9)
        raw[:, :, first + 1 :] -= 5
        favourite = (random.integers(0, yolo.classes, likely.shape) + np.zeros((1, anchors, 1, 1), np.int64))[:, :, None]
        np.put_along_axis(raw[:, :, first + 1 :], favourite, random.normal(2, 1, favourite.shape).astype(np.float32), 2)
        if head.new_coords:
            raw = 1 / (1 + np.exp(-raw))
        made.append(raw.reshape(batch, channels, rows, columns).astype(dtype))
    return made


def build(target: str, folder: Path, **variables: str) -> Path:
    """Runs the Makefile of the CUDA code; the library of that target. Raises with the compiler's words if it fails."""
    words = [f"{name}={value}" for name, value in {"OUT": str(folder), "STRICT": "1", **variables}.items()]
    done = subprocess.run(["make", "-C", str(CSRC), "-j4", target, *words], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"make {target} failed:\n{done.stdout}\n{done.stderr}")
    return folder / f"libdarktrt_{target}.so"


def has_compiler() -> bool:
    return bool(shutil.which("make") and shutil.which(os.environ.get("CXX", "c++")))


class Library:
    """libdarktrt_host.so: the functions on numpy arrays."""

    prefix = "darktrt_host"
    tail: tuple[ctypes.c_void_p, ...] = ()
    """Further arguments of every function."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))

    # what memory a library works on

    def upload(self, array: Array) -> Any:
        return np.ascontiguousarray(array)

    def empty(self, size: int) -> Any:
        return np.full(size, UNWRITTEN, np.uint8)

    def download(self, memory: Any) -> Array:
        return np.asarray(memory)

    def address(self, memory: Any) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if memory is None else memory.ctypes.data)

    # calling

    def output(self, shape: tuple[int, ...], dtype: Any) -> tuple[Any, tuple[int, ...], Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.empty(size + GUARD), shape, dtype

    def result(self, output: tuple[Any, tuple[int, ...], Any]) -> Array:
        memory, shape, dtype = output
        raw = self.download(memory)
        assert (raw[-GUARD:] == UNWRITTEN).all(), "written behind the end"
        return raw[:-GUARD].view(dtype).reshape(shape)

    def call(self, name: str, *arguments: Any) -> int:
        status: int = getattr(self.functions, f"{self.prefix}_{name}")(*arguments, *self.tail)
        return status

    def checked(self, name: str, *arguments: Any) -> None:
        status = self.call(name, *arguments)
        assert status == 0, f"{self.prefix}_{name} returned {status}"

    # the functions, on (N, C, P) arrays

    def mish(
        self,
        x: Array,
        residual: Array | None = None,
        second: Array | None = None,
        layout: Layout = LINEAR,
        dtype: Any = None,
        scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
        padding: float = 0,
    ) -> tuple[Array, Array]:
        """Mish of x, plus ``residual``, or with that of ``second`` behind it: the channels of y, and y's padding channels.

        ``scales`` are of x, of the other input and of y; ``padding`` lies in the padding channels of the inputs.
        """
        batch, channels, pixels = x.shape
        dtype = x.dtype if dtype is None else dtype
        other = residual if second is None else second
        out_channels = channels + (0 if second is None else second.shape[1])
        x_format, other_format, y_format = (
            Format(TYPES.index(kind), layout.vector_width, layout.channels_last, scale)
            for kind, scale in zip((x.dtype.type, x.dtype.type, np.dtype(dtype).type), scales, strict=True)
        )
        from_x = self.upload(layout.pack(x, padding))
        from_other = None if other is None else self.upload(layout.pack(other, padding))
        y = self.output((batch * layout.padded(out_channels) * pixels,), dtype)
        ins = [Shape(batch, channels, pixels), self.address(from_x), x_format]
        outs = [self.address(y[0]), y_format]
        if other is None:
            self.checked("mish", *ins, *outs)
        elif second is None:
            self.checked("mish_add", *ins, self.address(from_other), other_format, *outs)
        else:
            self.checked("mish_concat", *ins, self.address(from_other), other_format, second.shape[1], *outs)
        return layout.unpack(self.result(y), batch, out_channels, pixels)

    def decode(self, yolo: Yolo, heads: list[Array]) -> tuple[Array, Array]:
        """``(N, A, 4)`` boxes and ``(N, A, classes)`` scores."""
        batch = heads[0].shape[0]
        memories = [self.upload(head) for head in heads]
        boxes = self.output((batch, yolo.anchors, 4), np.float32)
        scores = self.output((batch, yolo.anchors, yolo.classes), np.float32)
        places = self.addresses(memories)
        outs = self.address(boxes[0]), self.address(scores[0])
        self.checked("decode", ctypes.byref(yolo.struct(batch)), TYPES.index(heads[0].dtype.type), places, *outs)
        return self.result(boxes), self.result(scores)

    def detect(
        self,
        yolo: Yolo,
        nms: Nms,
        heads: list[Array],
        score_threshold: float = 0.25,
        iou_threshold: float = 0.45,
        image_size: Array | None = None,
    ) -> Detections:
        batch, k = heads[0].shape[0], nms.max_detections
        memories = [self.upload(head) for head in heads]
        numbers = [self.upload(np.array([number], np.float32)) for number in (score_threshold, iou_threshold)]
        numbers.append(None if image_size is None else self.upload(image_size.astype(np.float32)))
        shapes = ((batch,), np.int32), ((batch, k, 4), np.float32), ((batch, k), np.float32), ((batch, k), np.int32)
        outputs = [self.output(shape, dtype) for shape, dtype in shapes]
        yolo_struct, nms_struct = yolo.struct(batch), nms.struct()
        self.checked(
            "detect",
            ctypes.byref(yolo_struct),
            ctypes.byref(nms_struct),
            TYPES.index(heads[0].dtype.type),
            self.addresses(memories),
            *(self.address(number) for number in numbers),
            *(self.address(output[0]) for output in outputs),
            *self.workspace(yolo_struct, nms_struct),
        )
        return Detections(*(self.result(output) for output in outputs))

    def fit(self, fit: Fit, images: list[Array], dtype: Any) -> Array:
        """RGB images ``(H, W, 3)`` in the input of a network, ``(N, H, W, C)`` for uint8, else ``(N, C, H, W)``."""
        memories = [self.upload(image) for image in images]
        rows = [(self.address(memory), image.shape[1], image.shape[0]) for memory, image in zip(memories, images, strict=True)]
        size = (fit.height, fit.width, fit.channels) if dtype is np.uint8 else (fit.channels, fit.height, fit.width)
        y = self.output((len(images), *size), dtype)
        kind = TYPES.index(images[0].dtype.type)
        self.checked(
            "fit", fit.struct(), len(images), (CImage * len(rows))(*rows), kind, self.address(y[0]), TYPES.index(dtype)
        )
        return self.result(y)

    def preprocess(self, fit: Fit, images: Array, dtype: Any) -> tuple[Array, Array, Array]:
        """Of images ``(N, h, w, 3)``: the pixels, ``(N, 2)`` image sizes and the ``(3, 4)`` placement."""
        count, height, width = images.shape[:3]
        memory = self.upload(images)
        size = (fit.height, fit.width, fit.channels) if dtype is np.uint8 else (fit.channels, fit.height, fit.width)
        shapes = ((count, *size), dtype), ((count, 2), np.float32), ((3, 4), np.float32)
        y, image_size, placement = (self.output(shape, kind) for shape, kind in shapes)
        self.checked(
            "preprocess",
            fit.struct(),
            count,
            CImage(self.address(memory), width, height),
            TYPES.index(images.dtype.type),
            self.address(y[0]),
            TYPES.index(dtype),
            self.address(image_size[0]),
            self.address(placement[0]),
        )
        return self.result(y), self.result(image_size), self.result(placement)

    def place_boxes(self, boxes: Array, placement: Array) -> Array:
        """Boxes ``(N, K, 4)`` in pixels of the image."""
        from_boxes, from_placement = self.upload(boxes), self.upload(placement)
        y = self.output(boxes.shape, np.float32)
        count = ctypes.c_int64(boxes.size // 4)
        self.checked("place_boxes", count, self.address(from_boxes), self.address(from_placement), self.address(y[0]))
        return self.result(y)

    def addresses(self, memories: list[Any]) -> Any:
        return (ctypes.c_void_p * MAX_HEADS)(*(self.address(memory) for memory in memories))

    def workspace(self, yolo: CYolo, nms: CNms) -> tuple[ctypes.c_void_p, ...]:
        """Further arguments of detect: none on the host."""
        return ()
