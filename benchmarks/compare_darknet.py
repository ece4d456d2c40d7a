"""How far darktrt's numbers are from those of darknet's own C code: a table in Markdown.

    python benchmarks/compare_darknet.py darknet/libdarknet.so darknet/cfg/yolov4-tiny.cfg
    python benchmarks/compare_darknet.py darknet/libdarknet.so darknet/cfg/yolov3.cfg darknet/cfg/yolov4.cfg --size 128x128 \\
        --size 160x96 --micro -o exactness.md

Each cfg gets random weights, the same file for both, unless a weights file lies beside it. Both read the same float32 input:
white noise, or the image of --image for networks with weights of their own. Compared are the raw heads, the decoded boxes and
scores (objectness times class) of darktrt's plain ONNX file in ONNX Runtime, and the detections after NMS of its portable file.
A difference is max |difference| / max |reference|, the worst of all heads. The score threshold of the detections lies in the
widest gap between the scores of the best 100 to 200, of those above .005.

darknet: AlexeyAB's, built for the CPU with AVX=0 and LIBSO=1. With AVX=1 its [maxpool] of stride 1 is wrong. Networks that meet
an activation which its CPU code lacks (it puts out 0 there) are left out, by name.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

import darktrt
from darktrt.convert.cfg import Convolutional, Shortcut, Yolo, read_cfg
from darktrt.convert.model import load_darknet
from darktrt.engine.runtime import OnnxRunner
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, read_text, scratch_folder
from darktrt.metadata import DetectorInfo
from darktrt.onnx_file import load_model
from darktrt.onnx_session import OnnxSession
from darktrt.progress import progress, set_progress
from darktrt.vision.images import preprocess, read_image

Floats = NDArray[np.float32]
Array = NDArray[Any]
Size = tuple[int, int]
SEED = 7
IOU = 0.45
BEST = 100, 200
"""The score threshold lets so many scores pass,"""
LEAST = 0.005
"""but none below that of ``detector map``."""
SAME = 1e-3
"""Detections of one class that differ by less, relative to the network's size, are one."""
NMS_KINDS = {"greedynms": 1, "diounms": 2}
"""darknet's numbers of them (NMS_KIND in darknet.h)."""

POINTWISE = frozenset(
    "linear logistic loggy relu elu selu gelu relie ramp revleaky leaky tanh plse stair hardtan lhtan".split()
)
"""Activations that every layer has on darknet's CPU (``activate`` in activations.c); others are 0 where it has no code."""
OF_CONVOLUTIONS = frozenset("swish mish hard_mish normalize_channels normalize_channels_softmax".split()) | {
    "normalize_channels_softmax_maxval"
}
OF_SHORTCUTS = frozenset({"swish", "mish"})


@dataclass(frozen=True)
class Case:
    """A network to compare."""

    name: str
    cfg: Path
    size: Size | None
    """Width and height; None: the cfg's own."""
    weights: Path | None
    """None: random ones."""
    image: Floats | Path | None = None
    """``(1, C, H, W)``, or a file; None: white noise."""


class Outputs(NamedTuple):
    heads: list[Floats]
    """Raw, flat, in cfg order."""
    boxes: Floats
    """``(A, 4)``, x1 y1 x2 y2 in pixels of the network input, in darktrt's order."""
    scores: Floats
    """``(A, classes)``."""
    detections: Floats
    """``(n, 6)``: box, score, class."""


@dataclass(frozen=True)
class Outcome:
    case: Case
    info: DetectorInfo
    heads: float
    boxes: float
    scores: float
    detections: float
    """Difference of those that both have."""
    both: int
    only: int
    """Detections that one of both has only."""

    double: tuple[float, float]
    """Raw heads of darktrt and of darknet, to those of the same network in float64."""

    @property
    def worst(self) -> float:
        return max(self.heads, self.boxes, self.scores)


@dataclass
class Report:
    cfgs: list[Outcome] = field(default_factory=list)
    micro: list[Outcome] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Sentences."""


def main(arguments: Sequence[str] | None = None) -> None:
    set_progress("bar")
    try:
        args = parse(arguments)
        with scratch_folder() as folder:
            report = compared(args, folder)
        text = markdown(report, command(arguments))
        print(text)
        if args.output:
            with atomic_output(args.output) as temporary:
                Path(temporary).write_text(text, encoding="utf-8")
    except DarktrtError as error:
        sys.exit(f"compare_darknet: {error}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, metavar="LIBRARY", help="darknet's libdarknet.so")
    parser.add_argument("cfgs", nargs="*", metavar="CFG", help="cfgs, or folders of them; CFG@WxH has a size of its own")
    parser.add_argument(
        "--size", type=size_of, action="append", metavar="WxH", help="for random weights, one or several (default: the cfg's)"
    )
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="what networks with weights of their own see (default: noise)"
    )
    parser.add_argument("--micro", action="store_true", help="the small networks of tests/micro.py, too")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="a Markdown file to write the tables to")
    return parser.parse_args(arguments)


def size_of(text: str) -> Size:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise DarktrtError(f"'{text}' is no size; write WIDTHxHEIGHT, such as 160x96")
    width, height = map(int, text.split("x"))
    return width, height


def command(arguments: Sequence[str] | None) -> str:
    """The command line with the names of files only: others have them elsewhere."""
    words = [Path(word).name if "/" in word else word for word in (sys.argv[1:] if arguments is None else arguments)]
    return " ".join(["python benchmarks/compare_darknet.py", *words]).partition(" -o ")[0]


def compared(args: argparse.Namespace, folder: Path) -> Report:
    check_library(args.library)
    report = Report()
    of_cfgs = list(cases(args.cfgs, args.size or [None], args.image))
    of_micro = list(micro_cases(folder)) if args.micro else []
    if not of_cfgs and not of_micro:
        raise DarktrtError("there is nothing to compare; name a cfg, or give --micro")
    with progress(len(of_cfgs) + len(of_micro), "network", "networks") as bar:
        for together in (*([case] for case in of_cfgs), of_micro):
            # darknet frees some networks twice, so nothing is freed, and large ones have a process each
            with Process() as process:
                for case in together:
                    add(report, case, args.library, folder, process)
                    bar.update(1)
    return report


def add(report: Report, case: Case, library: Path, folder: Path, process: Process) -> None:
    """Compare a network, or note why that cannot be."""
    try:
        if reason := fault_of_darknet(case.cfg):
            report.left_out.append(f"{case.name}: {reason}")
        else:
            (report.micro if isinstance(case.image, np.ndarray) else report.cfgs).append(
                outcome_of(case, library, folder, process)
            )
    except DarktrtError as error:
        report.left_out.append(f"{case.name}: {str(error).removeprefix(f'{case.cfg}:').strip()}")


# --- what to compare ---


def cases(names: Sequence[str], sizes: Sequence[Size | None], image: Path | None) -> Iterator[Case]:
    for name in names:
        text, _, own = name.partition("@")
        path = Path(text)
        found = sorted(path.rglob("*.cfg")) if path.is_dir() else [path]
        if not found:
            raise DarktrtError(f"{path}: has no cfg in it")
        for cfg in found:
            weights = cfg.with_suffix(".weights")
            if weights.exists():
                yield Case(cfg.stem, cfg, size_of(own) if own else None, weights, image)
            else:
                yield from (Case(cfg.stem, cfg, size, None) for size in ([size_of(own)] if own else sizes))


def micro_cases(folder: Path) -> Iterator[Case]:
    """The small networks of the tests, with their own weights and image."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import micro

    for number, (name, network) in enumerate(micro.MICRO.items()):
        place = folder / f"micro{number}"
        place.mkdir()
        made = micro.case_of(place, network)
        yield Case(name, made.cfg, None, made.weights, made.image)


def fault_of_darknet(cfg: Path) -> str:
    """Why darknet's CPU code computes something else than was meant for this network; empty if it does not."""
    if re.search(r"^\s*activation\s*=\s*silu", read_text(cfg), re.MULTILINE):
        return "darknet does not know silu and computes relu"
    layers = read_cfg(cfg).layers
    heads = [layer.head_kind for layer in layers if isinstance(layer, Yolo)]
    if "Gaussian_yolo" in heads and heads[0] != "Gaussian_yolo":
        return "darknet keeps no uncertainties where the first head has none, and writes them all the same"
    for layer in layers:
        activation = getattr(layer, "activation", "linear")
        more = {Convolutional: OF_CONVOLUTIONS, Shortcut: OF_SHORTCUTS}.get(type(layer), frozenset())
        if activation not in POINTWISE | more:
            return f"{activation} of [{layer.kind}] is 0 on darknet's CPU"
        if isinstance(layer, Convolutional) and layer.binary_weights and not layer.binary_inputs:
            return "binary=1 has no effect on darknet's CPU"
        if layer.kind == "route_lhalf":
            return "[route_lhalf] is of a fork in PyTorch"
    return ""


# --- darktrt's side ---


def outcome_of(case: Case, library: Path, folder: Path, process: Process) -> Outcome:
    plain, portable, drawn = (folder / f"case.{suffix}" for suffix in ("plain.onnx", "portable.onnx", "weights"))
    seed = None if case.weights else SEED
    info = darktrt.convert_darknet(
        case.cfg, case.weights, plain, size=case.size, random_weights=seed, save_weights=None if case.weights else drawn
    )
    image = input_of(case, info)
    heads, boxes, scores = plain_outputs(plain, info, image)
    threshold = threshold_of(scores)
    mine = Outputs(heads, boxes, scores, detections_of(plain, portable, image, threshold))
    job = Job(str(library), read_text(case.cfg), str(case.weights or drawn), info, threshold)
    theirs = in_darknet(process, job, image, case, folder)
    return outcome(case, info, mine, theirs, double_heads(case, case.weights or drawn, image))


def input_of(case: Case, info: DetectorInfo) -> Floats:
    if isinstance(case.image, np.ndarray):
        return case.image
    if case.image is None or info.channels not in (1, 3):
        return np.random.default_rng(3).random((1, info.channels, info.height, info.width), dtype=np.float32)
    pixels, _ = preprocess(read_image(case.image), info.width, info.height, info.channels, info.resize, "float")
    return pixels[np.newaxis]


def plain_outputs(plain: Path, info: DetectorInfo, image: Floats) -> tuple[list[Floats], Floats, Floats]:
    model, _ = load_model(plain)
    names = [head.tensor for head in info.heads]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(names))
    outputs = OnnxSession(model.SerializeToString(), str(plain)).run({"images": image})
    return [outputs[name].ravel() for name in names], outputs["boxes"][0], outputs["scores"][0]


def double_heads(case: Case, weights: Path, image: Floats) -> list[NDArray[np.float64]]:
    """Of the same network and weights in float64."""
    model = load_darknet(case.cfg, weights, case.size).double()
    inputs = [model.network.layers[head].sources[0] for head in model.heads]
    with torch.inference_mode():
        outputs = model.run(torch.from_numpy(image).double(), keep=set(inputs))
    return [outputs[index].numpy().ravel() for index in inputs]


def threshold_of(scores: Floats) -> float:
    """In the widest gap between scores of the best, so that rounding does not move a score over it."""
    ranked = np.sort(scores, axis=None)[::-1]
    ranked = ranked[(ranked > LEAST) & (ranked < 1)][: BEST[1]].astype(np.float64)
    if len(ranked) < 2:
        return LEAST
    first = min(BEST[0], len(ranked) // 2)
    widest = first + int(np.argmax(ranked[first - 1 : -1] - ranked[first:]))
    return float(np.float32((ranked[widest - 1] + ranked[widest]) / 2))


def detections_of(plain: Path, portable: Path, image: Floats, threshold: float) -> Floats:
    options = darktrt.SurgeryOptions(input="float", max_candidates=3840, max_detections=1000)
    darktrt.insert_plugins(plain, portable, options)
    runner = OnnxRunner(portable)
    size = runner.info.width, runner.info.height
    others = runner.info.other_inputs(1, [size], darktrt.Thresholds(threshold, IOU))
    outputs = runner.run({"images": image, **others})
    count = int(outputs["num_detections"].item())
    columns = outputs["boxes"][0, :count], outputs["scores"][0, :count, None], outputs["classes"][0, :count, None]
    return np.concatenate(columns, 1).astype(np.float32)


# --- darknet's side: in a process of its own, for darknet ends its process where it meets an error ---


class Job(NamedTuple):
    library: str
    cfg: str
    """The text."""
    weights: str
    info: DetectorInfo
    threshold: float


class Box(ctypes.Structure):
    """``box`` of darknet.h: centre and size."""

    _fields_ = [(name, ctypes.c_float) for name in "xywh"]


class Detection(ctypes.Structure):
    """``detection`` of darknet.h."""

    _fields_ = [
        ("box", Box),
        ("classes", ctypes.c_int),
        ("best_class", ctypes.c_int),
        ("prob", ctypes.POINTER(ctypes.c_float)),
        ("mask", ctypes.POINTER(ctypes.c_float)),
        ("objectness", ctypes.c_float),
        ("sort_class", ctypes.c_int),
        ("uncertainty", ctypes.POINTER(ctypes.c_float)),
        ("points", ctypes.c_int),
        ("embeddings", ctypes.POINTER(ctypes.c_float)),
        ("embedding_size", ctypes.c_int),
        ("similarity", ctypes.c_float),
        ("track", ctypes.c_int),
    ]


class StartOfNetwork(ctypes.Structure):
    """``network`` of darknet.h, as far as ``calculate_binary_weights`` reads it: the count of layers, and at 104 the layers."""

    _fields_ = [("bytes", ctypes.c_char * 112)]


class Process:
    """One that runs darknet; a context."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self.pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()


def check_library(library: Path) -> None:
    try:
        found = open_darknet(str(library))
    except OSError as error:
        raise DarktrtError(f"{library}: cannot be loaded ({error}); build darknet with LIBSO=1") from error
    if not hasattr(found, "diounms_sort"):
        raise DarktrtError(f"{library}: is not the library of AlexeyAB's darknet, for it has no diounms_sort")


def open_darknet(library: str) -> Any:
    darknet = ctypes.CDLL(os.path.abspath(library))
    for name, result in (("load_network_custom", ctypes.c_void_p), ("get_network_boxes", ctypes.POINTER(Detection))):
        getattr(darknet, name).restype = result
    darknet.network_predict_ptr.restype = ctypes.POINTER(ctypes.c_float)
    ctypes.c_int.in_dll(darknet, "gpu_index").value = -1  # else XNOR weights are laid out for a GPU
    return darknet


def in_darknet(process: Process, job: Job, image: Floats, case: Case, folder: Path) -> Outputs:
    try:
        return process.pool.submit(run_darknet, job, image, str(folder)).result()
    except BrokenProcessPool as error:
        process.renew()
        words = (folder / "darknet.log").read_text(errors="replace").strip().splitlines()
        raise DarktrtError(f"{case.cfg}: darknet ends at it; its last words: {words[-1] if words else 'none'}") from error


def run_darknet(job: Job, image: Floats, folder: str) -> Outputs:
    darknet = open_darknet(job.library)
    with output_to(Path(folder) / "darknet.log"):
        heads = [raw_head(darknet, job, head.line, image, Path(folder)) for head in job.info.heads]
        network = loaded(darknet, job, job.cfg, Path(folder))
        predict(darknet, network, image)
        boxes, scores = decoded(darknet, network, job.info)
        return Outputs(heads, boxes, scores, suppressed(darknet, network, job))


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Let everything that darknet prints go to a file."""
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield


def loaded(darknet: Any, job: Job, text: str, folder: Path) -> ctypes.c_void_p:
    """Of a cfg's text for the size asked for: the first of two keys counts."""
    start = f"[net]\nwidth={job.info.width}\nheight={job.info.height}"
    text = re.sub(r"^\s*\[net(?:work)?\].*$", start, text, count=1, flags=re.MULTILINE)
    (folder / "case.cfg").write_text(text, encoding="utf-8")
    network = darknet.load_network_custom(os.fsencode(folder / "case.cfg"), os.fsencode(job.weights), 0, 1)
    darknet.calculate_binary_weights(StartOfNetwork.from_address(network))  # as `detector test` does
    return ctypes.c_void_p(network)


def predict(darknet: Any, network: ctypes.c_void_p, image: Floats) -> Any:
    pixels = np.ascontiguousarray(image, np.float32)
    return darknet.network_predict_ptr(network, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))


def raw_head(darknet: Any, job: Job, line: int, image: Floats, folder: Path) -> Floats:
    """The output of the network that ends before the head's section."""
    text = "\n".join(job.cfg.splitlines()[: line - 1]) + "\n"
    head = next(head for head in job.info.heads if head.line == line)
    count = head.rows * head.columns * head.channels
    output: Floats = np.ctypeslib.as_array(predict(darknet, loaded(darknet, job, text, folder), image), (count,)).copy()
    return output


def boxes_of(darknet: Any, network: ctypes.c_void_p, info: DetectorInfo, threshold: float) -> tuple[Any, int]:
    count = ctypes.c_int()
    found = darknet.get_network_boxes(
        network, info.width, info.height, ctypes.c_float(threshold), ctypes.c_float(0.5), None, 1, ctypes.byref(count), 0
    )
    return found, count.value


def corners(found: Any, count: int, info: DetectorInfo) -> NDArray[np.float64]:
    """In pixels; in double, so that nothing is lost in the turn from centre and size."""
    x, y, w, h = np.array([[getattr(found[i].box, name) for name in "xywh"] for i in range(count)], np.float64).reshape(-1, 4).T
    pixels: NDArray[np.float64] = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
    return pixels * np.array([info.width, info.height] * 2, np.float64)


def probabilities(found: Any, count: int, classes: int) -> Floats:
    return np.array([found[i].prob[:classes] for i in range(count)], np.float32).reshape(-1, classes)


def decoded(darknet: Any, network: ctypes.c_void_p, info: DetectorInfo) -> tuple[Floats, Floats]:
    """Of all anchors, which a threshold below 0 lets pass. darknet goes through cells first, darktrt through anchors."""
    found, count = boxes_of(darknet, network, info, -1.0)
    order, before = [], 0
    for head in info.heads:
        cells, anchors = head.rows * head.columns, len(head.anchors)
        order.append(before + np.arange(cells * anchors).reshape(cells, anchors).T.ravel())
        before += cells * anchors
    if before != count:
        print(f"has {count} boxes, not {before}: some objectness is not a number", flush=True)
        os._exit(1)
    rows = np.concatenate(order)
    return corners(found, count, info)[rows].astype(np.float32), probabilities(found, count, info.heads[0].classes)[rows]


def suppressed(darknet: Any, network: ctypes.c_void_p, job: Job) -> Floats:
    """As ``detector test`` does it."""
    info, classes = job.info, job.info.heads[0].classes
    found, count = boxes_of(darknet, network, info, job.threshold)
    kind = NMS_KINDS.get(info.nms.kind)
    if kind is None:
        darknet.do_nms_sort(found, count, classes, ctypes.c_float(IOU))
    else:
        darknet.diounms_sort(found, count, classes, ctypes.c_float(IOU), kind, ctypes.c_float(info.nms.beta))
    scores = probabilities(found, count, classes)
    box, number = np.nonzero(scores)
    return np.column_stack([corners(found, count, info)[box], scores[box, number], number]).astype(np.float32)


# --- the comparison ---


def outcome(case: Case, info: DetectorInfo, mine: Outputs, theirs: Outputs, double: Sequence[Array]) -> Outcome:
    both, only, worst = matched(mine.detections, theirs.detections, max(info.width, info.height))
    return Outcome(
        case,
        info,
        worst_head(mine.heads, theirs.heads),
        difference(mine.boxes, theirs.boxes),
        difference(mine.scores, theirs.scores),
        worst,
        both,
        only,
        (worst_head(mine.heads, double), worst_head(theirs.heads, double)),
    )


def worst_head(mine: Sequence[Array], reference: Sequence[Array]) -> float:
    return max(difference(a, b) for a, b in zip(mine, reference, strict=True))


def difference(mine: Array, reference: Array) -> float:
    """max |difference| / max |reference|."""
    a, b = mine.astype(np.float64), reference.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0, np.abs(a - b))
    return float(gap.max() / max(np.abs(b[np.isfinite(b)]).max(initial=0), np.finfo(np.float32).tiny))


def matched(mine: Floats, theirs: Floats, side: int) -> tuple[int, int, float]:
    """How many detections both have, how many one only, and the worst difference of the former.

    That of a box counts in widths of the network, or of the box where that is wider.
    """
    left, worst = list(range(len(mine))), 0.0
    theirs = theirs[np.isfinite(theirs).all(1)]  # darktrt's NMS leaves out boxes that are not finite
    for row in theirs:
        scale = np.array([max(side, np.abs(row[:4]).max())] * 4 + [1])
        gaps = {i: float(np.abs((mine[i, :5] - row[:5]) / scale).max()) for i in left if mine[i, 5] == row[5]}
        nearest = min(gaps, key=lambda i: gaps[i], default=None)
        if nearest is not None and gaps[nearest] < SAME:
            left.remove(nearest)
            worst = max(worst, gaps[nearest])
    both = len(mine) - len(left)
    return both, len(left) + len(theirs) - both, worst


# --- the tables ---


INTRODUCTION = """\
# Exactness

How far darktrt's numbers are from darknet's own: max |difference| / max |reference|, the worst of all heads. darktrt: the plain
ONNX file of `darktrt convert` in ONNX Runtime on the CPU, and for detections the portable file. darknet: the C code of
AlexeyAB's repository on the CPU, AVX=0, batch normalisation fused as `detector test` does. Both get the same weights and the
same float32 input. Scores are objectness times class. Detections are those after NMS of the cfg's kind: how many both have, how
far these are apart (boxes in widths of the network), and how many one of both has only.

The last two columns say how far the raw heads of either are from those of the same network in float64: what is left is the
rounding of float32.
"""
NOTES = """\
The small networks have the rarer layers and options: every activation, far beyond the range in which it bends; weighted
shortcuts, routes with groups, pools of all kinds, variants of heads. Where such numbers make two scores equal, or objectness
larger than 1 or negative, detections may differ.

Bugs of darknet: relu6, and in some sections swish, mish and hard_mish, are 0 on its CPU. Networks that meet that are left out
here; the tests compare them with what was meant. `resize_image` gives the last row of an image only its first part; both sides
get fitted images here.
"""


def markdown(report: Report, line: str) -> str:
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnx", "onnxruntime"))
    lines = [INTRODUCTION, f"{date.today().isoformat()}, {versions}, {python}:", "", f"    {line}", ""]
    if report.cfgs:
        lines += [*table(report.cfgs), ""]
    if report.micro:
        lines += [*of_micro(report.micro), ""]
    if report.left_out:
        lines += ["Left out:", "", *(f"- {sentence}" for sentence in report.left_out), ""]
    return "\n".join([*lines, NOTES])


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield (
        "| network | input | weights | raw heads | boxes | scores | detections | their difference "
        "| darktrt to float64 | darknet to float64 |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for one in outcomes:
        weights = "own" if one.case.weights else "random"
        numbers = f"{one.heads:.1e} | {one.boxes:.1e} | {one.scores:.1e} | {counted(one)} | {one.detections:.1e}"
        double = f"{one.double[0]:.1e} | {one.double[1]:.1e}"
        yield f"| {one.case.name} | {one.info.width}x{one.info.height} | {weights} | {numbers} | {double} |"


def counted(one: Outcome) -> str:
    return f"{one.both}, {one.only} of one only" if one.only else str(one.both)


def of_micro(outcomes: Sequence[Outcome]) -> Iterator[str]:
    worst = [one.worst for one in outcomes]
    yield f"{len(outcomes)} small networks of `tests/micro.py`: worst {max(worst):.1e}, median {median(worst):.1e}. The worst:"
    yield ""
    yield from table(sorted(outcomes, key=lambda one: -one.worst)[:5])
    if unlike := [f"{one.case.name} ({counted(one)})" for one in outcomes if one.only]:
        yield f"\nDetections of one side only: {', '.join(unlike)}."


if __name__ == "__main__":
    main()
