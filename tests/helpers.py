"""What the tests share: tolerances, made networks as darknet files, made images, and running ONNX models."""

from __future__ import annotations

import ast
import gc
import json
import socket
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from darktrt.check.coco import Accuracy, coco_metrics
from darktrt.check.detections import VariantDetections, detect_variant, save_detections
from darktrt.check.ground_truth import GroundTruth, load_ground_truth
from darktrt.check.runs import Variant
from darktrt.cli import main
from darktrt.convert.cfg import read_cfg
from darktrt.convert.export import convert_darknet
from darktrt.convert.model import random_weights
from darktrt.convert.weights import write_weights
from darktrt.engine.runtime import OnnxRunner
from darktrt.metadata import DetectorInfo, Thresholds
from darktrt.onnx_file import load_model
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins, transform
from darktrt.vision.boxes import Detections
from darktrt.vision.detector import NetworkDetector, Run
from darktrt.vision.images import read_image

Array = NDArray[Any]

# Tolerances, the one place that has them. Relative ones are of the largest value of the reference.
LAYER_TOLERANCE = 1e-5
"""A layer against the scalar reference in double: float32 sums of some hundred terms."""
EXPORT_TOLERANCE = 1e-5
"""ONNX Runtime against the torch module, both float32."""
HALF_TOLERANCE = 1e-2
"""FP16 against float32: rounding to 11 bits errs by up to 2^-11 = 5e-4; twenty of these for a dozen layers, each rounded."""
DARKNET_SCORE, DARKNET_PIXELS = 0.01, 2.0
"""Detections of a real image against those of darknet's own binary."""
MAP_TOLERANCE = 0.001

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
"""Real cfgs, weights and images, where this checkout has them beside it."""


# --- cfg texts ---


def section(kind: str, **options: object) -> str:
    """``[kind]`` and its options."""
    return "\n".join([f"[{kind}]", *(f"{key}={value}" for key, value in options.items()), "", ""])


def net(width: int = 64, height: int = 64, channels: int = 3, **options: object) -> str:
    return section("net", width=width, height=height, channels=channels, **options)


def conv(filters: int, size: int = 3, stride: int = 1, activation: str = "mish", normalize: int = 1, **options: object) -> str:
    fixed = {"batch_normalize": normalize, "filters": filters, "size": size, "stride": stride, "pad": 1}
    return section("convolutional", **fixed, activation=activation, **options)


def head(classes: int = 3, mask: str = "0,1,2", activation: str = "linear", **options: object) -> str:
    """The convolution that makes a head's raw tensor, and its [yolo]; anchors are those of a 64-pixel network."""
    last = conv(len(mask.split(",")) * (5 + classes), 1, activation=activation, normalize=0)
    return last + yolo(classes, mask, **options)


def gaussian(classes: int = 3, mask: str = "0,1") -> str:
    """The convolution that makes the raw tensor of a [Gaussian_yolo], and the section."""
    last = conv(len(mask.split(",")) * (9 + classes), 1, activation="linear", normalize=0)
    return last + section("Gaussian_yolo", mask=mask, anchors="6,9, 11,8, 14,20", num=3, classes=classes, scale_x_y=1.1)


def region(classes: int = 3) -> str:
    """The convolution that makes the raw tensor of a [region], and the section."""
    last = conv(2 * (5 + classes), 1, activation="linear", normalize=0)
    return last + section("region", anchors="0.57,0.68, 1.87,2.06", num=2, classes=classes, softmax=1)


def yolo(classes: int = 3, mask: str = "0,1,2", **options: object) -> str:
    anchors = {"anchors": "6,9, 11,8, 14,20, 22,16, 30,35, 50,44", "num": 6}
    return section("yolo", mask=mask, classes=classes, **{**anchors, **options})


MADE_NET = {"width": 96, "height": 64}
MADE_BODY = (
    conv(8, stride=2)
    + conv(16, stride=2)
    + section("route", layers=-1, groups=2, group_id=1)
    + conv(8)
    + section("shortcut", **{"from": -2, "activation": "linear"})
    + section("route", layers="-1,-4")
    + section("maxpool", size=2, stride=2)
    + conv(24)
    + section("maxpool", size=5, stride=1)
    + section("route", layers="-1,-2")
    + conv(32, stride=2, activation="leaky")
    + head(mask="3,4,5", scale_x_y=1.05, nms_kind="greedynms", beta_nms=0.6)
    + section("route", layers=-3)
    + conv(16, 1)
    + section("upsample", stride=2)
    + section("route", layers="-1,7")
    + conv(16)
    + head(scale_x_y=1.1, nms_kind="greedynms", beta_nms=0.6)
)
MADE_CFG = net(**MADE_NET) + MADE_BODY
"""Two heads at strides 16 and 8, not square, six Mish of eight activations, greedynms."""
MADE_MISH = 6

RESIDUAL_CFG = (
    net(**MADE_NET)
    + conv(8, stride=2)
    + conv(8)
    + section("route", layers=-2)
    + conv(8)
    + 2 * (conv(4, 1) + conv(8) + section("shortcut", **{"from": -3, "activation": "linear"}))
    + conv(12, 1)
    + section("route", layers="-1,1")
    + conv(8, stride=8)
    + head()
)
"""A stage of YOLOv4's backbone: two ways from a convolution, on one of them two residual blocks, that a concat joins."""


def deep_cfg(blocks: int = 24, width: int = 64, height: int = 64) -> str:
    """A deep residual Mish network: two convolutions a block, as many as yolov4's backbone has."""
    block = conv(8, 1) + conv(16) + section("shortcut", **{"from": -3, "activation": "linear"})
    return net(width, height) + conv(16, stride=2) + conv(16, stride=2) + blocks * block + conv(32, stride=2) + head()


# --- files ---


@dataclass(frozen=True)
class Made:
    """A made network as files."""

    cfg: Path
    weights: Path
    plain: Path
    info: DetectorInfo

    def model(self) -> onnx.ModelProto:
        """The plain model, fresh from its file."""
        return load_model(self.plain)[0]

    def transformed(self, **options: Any) -> onnx.ModelProto:
        """The model after surgery, its metadata in place, checked in full."""
        model, report = transform(self.model(), self.info, SurgeryOptions(**options))
        onnx.helper.set_model_props(model, {"darktrt": report.info.to_json()})
        onnx.checker.check_model(model, full_check=True)
        return model


def make(folder: Path, text: str, batch: tuple[int, int, int] = (1, 1, 1), seed: int = 1, name: str = "made") -> Made:
    """Write ``text`` as a cfg, random weights for it, and the plain ONNX of both."""
    cfg, weights, plain = (folder / f"{name}.{suffix}" for suffix in ("cfg", "weights", "onnx"))
    cfg.write_text(text)
    info = convert_darknet(cfg, None, plain, random_weights=seed, save_weights=weights, batch=batch)
    return Made(cfg, weights, plain, info)


def write_random_weights(cfg: Path, weights: Path, seed: int = 1) -> None:
    network = read_cfg(cfg)
    write_weights(weights, network, random_weights(network, seed))


def weights_bytes(floats: Iterable[float] | Array, version: tuple[int, int, int] = (0, 2, 5), seen: int = 0) -> bytes:
    """A weights file, written by the description of its format and not by the code under test."""
    wide = version[0] * 10 + version[1] >= 2
    header = struct.pack("<iii", *version) + struct.pack("<Q" if wide else "<I", seen)
    return header + np.asarray(floats, "<f4").tobytes()


def declare(archive: Path, member: str, size: int) -> None:
    """Let an archive declare another unpacked size of a member."""
    content = bytearray(archive.read_bytes())
    entry = content.index(b"PK\x01\x02")
    while not content.startswith(member.encode(), entry + 46):
        entry = content.index(b"PK\x01\x02", entry + 4)
    content[entry + 24 : entry + 28] = struct.pack("<I", size)
    archive.write_bytes(content)


def files_in(folder: Path) -> list[str]:
    """Everything below a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in sockets]


# --- Python programs ---


@cache
def syntax_tree(program: str) -> ast.Module:
    """``ast.parse``, once for a program, without a garbage collection meanwhile: a finalizer that prints an exception, and so
    parses a line itself, spoils the tree in CPython before 3.11.8 (gh-106905)."""
    on = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(program)
    finally:
        if on:
            gc.enable()


# --- images ---


def made_image(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth shades with rectangles on them, ``(height, width, 3)``: more like a photograph than noise is."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([128 + 80 * np.sin(rows / (9 + 4 * i) + columns / (13 - 2 * i) + seed) for i in range(3)], 2)
    for _ in range(6):
        y, x = random.integers(0, height - 8), random.integers(0, width - 8)
        image[y : y + random.integers(8, 40), x : x + random.integers(8, 40)] = random.integers(0, 256, 3)
    return image.round().clip(0, 255).astype(np.uint8)


def batch_of_images(info: DetectorInfo, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Different images of the network's size, ``(count, H, W, 3)``."""
    return np.stack([made_image(info.height, info.width, seed + i) for i in range(count)])


def as_float(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """``(N, H, W, C)`` bytes to ``(N, C, H, W)`` float32 in 0..1, as the graph of ``--input uint8`` does it."""
    return np.ascontiguousarray(images.astype(np.float32).transpose(0, 3, 1, 2)) / np.float32(255)


def labelled_images(made: Made, folder: Path) -> Path:
    """The files of the fixture ``labelled``."""
    insert_plugins(made.plain, folder / "net.onnx", SurgeryOptions())
    for name, start in (("photos", 0), ("others", 50)):
        (folder / name).mkdir()
        for i in range(start, start + 5):
            Image.fromarray(made_image(128, 192, seed=i)).save(folder / name / f"{i}.png")
    with OnnxRunner(folder / "net.onnx") as runner:
        detector = NetworkDetector(runner.run, runner.info, 0.001, 0.45)
        for path in (folder / "photos").iterdir():
            (found,) = detector.detect([read_image(path)])
            path.with_suffix(".txt").write_text(darknet_labels(found.select(slice(6)), 192, 128))
    arguments = ["calib", "run", str(folder / "net.onnx"), str(folder / "others"), "-o", str(folder / "my.calib")]
    assert main([*arguments, "--bias-images", "0"]) == 0
    return folder


def darknet_labels(found: Detections, width: int, height: int) -> str:
    """A label file: a line ``class x y width height`` an object, in parts of the image's sides."""
    corners = found.boxes / np.array([width, height] * 2, np.float32)
    rows = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    lines = [f"{i} {' '.join(f'{v:.9f}' for v in row)}" for i, row in zip(found.class_ids, rows, strict=True)]
    return "\n".join(lines)


def made_detections(labelled: Path, seed: int = 0, name: str = "A", precision: str = "tf32") -> VariantDetections:
    """Detections of four of the labelled objects of each image, near their boxes, with random scores."""
    with OnnxRunner(labelled / "net.onnx") as runner:
        info = runner.info
    ground_truth = load_ground_truth([str(labelled / "photos")], info.class_names)
    random, images = np.random.default_rng(seed), {}
    for digest, image in zip(ground_truth.digests, ground_truth.images, strict=True):
        x, y, width, height = np.array([one.box for one in image.objects[:4]]).T
        corners = np.stack([x, y, x + width, y + height], 1)
        corners += 0.08 * np.stack([width, height, width, height], 1) * random.standard_normal((4, 4))
        boxes = np.concatenate([np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], 1)
        scores = np.sort(random.random(4))[::-1].astype(np.float32)
        ids = np.array([one.class_id for one in image.objects[:4]], np.int32)
        images[digest] = Detections(boxes.astype(np.float32), scores, ids, info.class_names)
    return VariantDetections(name, info, precision, Thresholds(0.001, 0.45), images)


def measured_accuracy(run: Run, info: DetectorInfo, truth: GroundTruth) -> Accuracy:
    """That of a network which only this process can run."""
    detections = detect_variant(Variant("here", info, "fp32", run), truth).in_order(truth.digests)
    return coco_metrics(detections, truth).accuracy


def timing(name: str, milliseconds: float = 0.25, batch: int = 1, graph: bool = True, **more: str) -> dict[str, Any]:
    """A row of ``darktrt bench --json``."""
    spread = {"median": milliseconds, "p90": milliseconds, "p99": milliseconds}
    numbers = {"network": spread, "end_to_end": spread, "images_per_second": 1e3 * batch / milliseconds}
    return {"name": name, "batch": batch, "cuda_graph": graph, **numbers, **more}


def report_on_everything(made: Made, labelled: Path, folder: Path) -> Path:
    """The folder of the fixture ``report``."""
    detections = made_detections(labelled, name="INT8 engine", precision="int8")
    about = {"sha256": "ab" * 32, "runs in": "TensorRT 8.6.0", "on": "NVIDIA H200", "not in INT8": "/layers.0/Conv"}
    save_detections([replace(detections, about=about)], folder / "gpu.json")
    times = {"gpu": "NVIDIA H200", "timings": [timing("other", plan_sha256="ab" * 32)]}
    (folder / "times.json").write_text(json.dumps(times))
    variants = ["--model", f"ONNX={labelled}/net.onnx", "--cfg", str(made.cfg), "--weights", str(made.weights)]
    variants += ["--simulate", "fp16,int8", "--calibration", str(labelled / "my.calib")]
    variants += ["--load-detections", str(folder / "gpu.json"), "--bench", str(folder / "times.json")]
    images = ["--compare-images", "2", "--sensitivity-images", "2", "--show-images", "3"]
    assert main(["check", "report", str(labelled / "photos"), *variants, *images, "-o", str(folder / "report")]) == 0
    return folder / "report"


# --- running ---


def session(model: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto | Path, inputs: dict[str, Array]) -> dict[str, Array]:
    """All outputs by name."""
    ready = session(model)
    names = [output.name for output in ready.get_outputs()]
    return dict(zip(names, ready.run(names, inputs), strict=True))


def with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """The model with these inner tensors as further outputs."""
    have = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in have)
    return model


def thresholds(score: float = 0.25, iou: float = 0.45) -> dict[str, Array]:
    return {"score_threshold": np.array([score], np.float32), "iou_threshold": np.array([iou], np.float32)}


def relative_error(found: Array, expected: Array) -> float:
    """Largest difference over the largest value expected."""
    difference = np.abs(found.astype(np.float64) - expected)
    return float(difference.max() / max(np.abs(expected).max(), 1e-30))
