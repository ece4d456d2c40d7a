"""Histograms of a network's activations, by ONNX Runtime: one pass over the images, in memory that does not grow."""

from __future__ import annotations

import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from darktrt.calib.bias_correction import ChannelMeanMeter, ChannelMeans
from darktrt.calib.histogram import HistogramSet
from darktrt.calib.importance import Weights, weights_of
from darktrt.calib.summary import Outputs
from darktrt.errors import DarktrtError
from darktrt.files import keep_inputs, sha256_of
from darktrt.metadata import DetectorInfo
from darktrt.onnx_file import load_model
from darktrt.vision.detector import fit
from darktrt.vision.images import read_image
from darktrt.vision.sources import IMAGE_SUFFIXES, find_images

if TYPE_CHECKING:
    import onnx
    import onnxruntime

Arrays = dict[str, NDArray[Any]]
Image = tuple[str, Path, NDArray[Any]]
"""SHA-256 of the file, its path, and the network's input made of it."""

_Item = TypeVar("_Item")

SAVE_EVERY = 32
_GO_ON = "--skip-bad leaves such images out; --resume goes on from those counted before"
FEW = 16
"""Images below which a warning is due."""


def tensors_to_calibrate(model: onnx.ModelProto, info: DetectorInfo) -> list[str]:
    """The float activations from the image as float to the raw heads, both included, in the order of the graph.

    In a model that takes bytes, what comes before the image in 0..1 is left out; decoding and NMS always are.

    Raises:
        DarktrtError: the graph lacks the image or a head that its metadata names.
    """
    from onnx import TensorProto

    image = "images" if info.input == "float" else "images_float"
    not_float = {v.name for v in model.graph.value_info if v.type.tensor_type.elem_type not in (0, TensorProto.FLOAT)}
    from_image = {image}
    for node in model.graph.node:
        if from_image.intersection(node.input):
            from_image.update(node.output)
    needed = {output for node in _nodes_before_heads(model, info) for output in node.output if output}
    if image not in needed | {i.name for i in model.graph.input}:
        raise DarktrtError(f"{info.name}: the graph has no tensor '{image}' on the way to the heads; convert it again")
    produced = [output for node in model.graph.node for output in node.output if output in needed & from_image]
    return [name for name in dict.fromkeys([image, *produced]) if name not in not_float]


def _nodes_before_heads(model: onnx.ModelProto, info: DetectorInfo) -> list[onnx.NodeProto]:
    """The nodes that compute the raw heads, in order."""
    wanted = {head.tensor for head in info.heads}
    missing = wanted.difference(output for node in model.graph.node for output in node.output)
    if missing:
        raise DarktrtError(f"{info.name}: the graph has no tensor '{sorted(missing)[0]}', a head; convert it again")
    nodes = []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            nodes.append(node)
    return nodes[::-1]


_PASSING = {"Concat", "MaxPool", "Resize", "Slice", "Split"}
"""Operations whose output values are input values. (Resize here is the upsampling of darknet, to the nearest.)"""


def passing_groups(model: onnx.ModelProto, info: DetectorInfo, tensors: Sequence[str]) -> list[list[str]]:
    """Those of ``tensors`` that max pools, concats, slices and upsamples connect, in graph order; groups of two or more."""
    group_of = {name: [name] for name in tensors}
    for node in _nodes_before_heads(model, info):
        if node.op_type in _PASSING:
            known = [name for name in (*node.input, *node.output) if name in group_of]
            for other in known[1:]:
                group = group_of[known[0]]
                if group_of[other] is not group:
                    group.extend(group_of[other])
                    group_of.update(dict.fromkeys(group_of[other], group))
    order = {name: i for i, name in enumerate(tensors)}
    distinct = {id(group): sorted(group, key=order.__getitem__) for group in group_of.values() if len(group) > 1}
    return sorted(distinct.values(), key=lambda group: order[group[0]])


def head_inputs(model: onnx.ModelProto, info: DetectorInfo) -> list[str]:
    """What the last convolutions before the raw heads read, in the order of the heads."""
    producers = {output: node for node in model.graph.node for output in node.output}
    found = []
    for head in info.heads:
        node = producers.get(head.tensor)
        while node is not None and node.op_type != "Conv":  # on through an activation
            node = producers.get(node.input[0])
        if node is not None:
            found.append(node.input[0])
    return list(dict.fromkeys(found))


def mish_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> dict[str, str]:
    """Of those of ``tensors`` that one ``MishPlugin`` node alone reads the tensor that it gives, if that is one of them too."""
    readings = Counter(name for node in model.graph.node for name in node.input)
    pairs = [(node.input[0], node.output[0]) for node in model.graph.node if node.op_type == "MishPlugin"]
    return {x: y for x, y in pairs if readings[x] == 1 and {x, y} <= set(tensors)}


def collect(
    model_path: str | Path,
    images: Sequence[Path],
    *,
    tensors: Sequence[str] | None = None,
    batch: int = 1,
    resume: HistogramSet | None = None,
    skip_bad: bool = False,
    save_to: Path | None = None,
    save_every: int = SAVE_EVERY,
    progress: bool = True,
) -> HistogramSet:
    """Run the network on every image and count its activations.

    An image counts once, by the SHA-256 of its file: neither a second copy nor one that ``resume`` has is counted again.

    Args:
        model_path: a plain or portable ONNX file of darktrt.
        images: image files.
        tensors: what to count; all of :func:`tensors_to_calibrate` by default.
        batch: images at a time, brought into what the model takes.
        resume: histograms of an earlier run on the same model, which are added to.
        skip_bad: go on after an image that cannot be read, and list it in ``skipped`` of the result.
        save_to: where to save as it goes, every ``save_every`` images, at the end, and on Ctrl-C. What lies there is
            always a state between two batches.
        progress: show a bar on stderr.

    Raises:
        DarktrtError: there are no images, one cannot be read (without ``skip_bad``), the model is not one of darktrt or
            not that of ``resume``, an activation is NaN or infinite, or the file cannot be written.
        KeyboardInterrupt: Ctrl-C, after the batch in work; a second Ctrl-C does not wait for it.
    """
    if not images:
        raise DarktrtError("no images to calibrate on; name a folder, list, COCO json or pattern")
    model, info = load_model(model_path)
    network = _Trunk(model_path, model, info, tensors, batch)
    del model  # as large as the weights
    found = _start(model_path, network, resume)
    saves = _Saves(found, save_to, save_every)
    with _bar(len(images), progress) as bar, _ctrl_c_as_event() as stop:
        groups = _groups(_images(images, info, found, skip_bad, bar), network.batch)
        try:
            for group in groups:
                activations, weights = network.run([array for _, _, array in group])
                found.add(activations, {digest: str(path) for digest, path, _ in group}, weights)
                bar.update(len(group))
                if stop.is_set():
                    break
                saves.after(len(group))
        except DarktrtError:
            saves.now()  # what was counted before the image that failed
            raise
    saves.now()
    if stop.is_set():
        raise KeyboardInterrupt
    if not found.images:
        raise DarktrtError(f"none of the {len(images)} images can be read; first: {found.skipped[0]}")
    return found


def histograms_of(
    model_path: str | Path,
    data: Sequence[str | Path],
    outputs: Outputs,
    limit: int | None,
    seed: int,
    batch: int,
    *,
    resume: bool,
    skip_bad: bool,
) -> HistogramSet:
    """A whole run: find the images, collect, and keep the histograms beside the table; few images are warned of.

    Raises:
        DarktrtError: as :func:`darktrt.vision.sources.find_images` and :func:`collect` do.
    """
    save_to = outputs.histograms
    keep_inputs(save_to, model_path)
    images = find_images(list(data), limit, seed)
    for path in outputs.files:
        if path.suffix.lower() in IMAGE_SUFFIXES:  # others cannot be one of many thousand images
            keep_inputs(path, *images)
    if len(images) < FEW:
        print(f"warning: {len(images)} images are few to calibrate on; a hundred or more are usual", file=sys.stderr)
    earlier = HistogramSet.load(save_to) if resume and save_to.exists() else None
    return collect(model_path, images, batch=batch, resume=earlier, skip_bad=skip_bad, save_to=save_to)


def measure_channel_means(
    model_path: str | Path, images: Sequence[Path], scales: Mapping[str, np.float32], batch: int = 1, *, progress: bool = True
) -> dict[str, ChannelMeans]:
    """The second pass: what INT8 with these scales does to the channels' means of every tensor that a convolution reads.

    Images that cannot be read are left out; the first pass has told of them.

    Raises:
        DarktrtError: the model is not one of darktrt, or none of the images can be read.
    """
    model, info = load_model(model_path)
    read = dict.fromkeys(node.input[0] for node in _nodes_before_heads(model, info) if node.op_type == "Conv")
    network = _Trunk(model_path, model, info, [name for name in read if name in scales], batch)
    del model
    meter = ChannelMeanMeter(scales)
    with _bar(len(images), progress) as bar:
        for group in _groups(_readable(images, info), network.batch):
            meter.add(network.run(group)[0])
            bar.update(len(group))
    if not meter.sums:
        raise DarktrtError(f"none of the {len(images)} images can be read")
    return meter.channel_means()


def _readable(images: Sequence[Path], info: DetectorInfo) -> Iterator[NDArray[Any]]:
    for path in images:
        with suppress(DarktrtError):
            yield _read(path, info)


def _start(model_path: str | Path, network: _Trunk, resume: HistogramSet | None) -> HistogramSet:
    """The histograms to add to."""
    digest = sha256_of(model_path)
    if resume is None:
        return HistogramSet(digest, groups=network.groups, head_inputs=network.head_inputs, mish=network.mish)
    if resume.model != digest:
        raise DarktrtError(f"{model_path}: is not the model of the histograms to resume; start afresh")
    if resume.images and set(resume.histograms) != set(network.tensors):
        raise DarktrtError(f"{model_path}: the histograms to resume are of other tensors; start afresh")
    resume.skipped = []
    return resume


class _Saves:
    """Writes the histograms as they grow, if there is a file to write them to."""

    def __init__(self, histograms: HistogramSet, path: Path | None, every: int) -> None:
        self.histograms = histograms
        self.path = path
        self.every = every
        self.unsaved = 0

    def after(self, images: int) -> None:
        """So many more images were counted; save if it is time."""
        self.unsaved += images
        if self.unsaved >= self.every:
            self.now()

    def now(self) -> None:
        if self.path and self.histograms.images:
            self.histograms.save(self.path)
        self.unsaved = 0


def _bar(total: int, progress: bool) -> tqdm[Any]:
    interval = 0.1 if sys.stderr.isatty() else 10  # a log file gets a line each time
    return tqdm(total=total, unit=" images", file=sys.stderr, disable=not progress, mininterval=interval, smoothing=0.05)


def _images(images: Sequence[Path], info: DetectorInfo, found: HistogramSet, skip_bad: bool, bar: tqdm[Any]) -> Iterator[Image]:
    """Every image not counted before, read and preprocessed; the bar's total shrinks by those left out."""
    seen = set(found.images)
    for path in images:
        try:
            digest = _digest(path)
            array = None if digest in seen else _read(path, info)
        except DarktrtError as error:
            if not skip_bad:
                raise DarktrtError(f"{error} ({_GO_ON})") from error
            found.skipped.append(str(error))
            array = None
        if array is None:
            bar.total = (bar.total or 1) - 1
            continue
        seen.add(digest)
        yield digest, path, array


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise DarktrtError(f"{path}: cannot be read: {error.strerror}") from error


def _read(path: Path, info: DetectorInfo) -> NDArray[Any]:
    return fit(read_image(path), info)[0]


def _groups(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    while group := list(islice(items, size)):
        yield group


@contextmanager
def _ctrl_c_as_event() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C sets the event and a second one interrupts.

    Nothing changes outside the main thread, nor where somebody else handles or ignores the signal.
    """
    stop = threading.Event()

    def note(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stop
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Trunk:
    """The network from its image to its raw heads, with every tensor to count as an output."""

    def __init__(
        self, path: str | Path, model: onnx.ModelProto, info: DetectorInfo, tensors: Sequence[str] | None, batch: int
    ) -> None:
        self.path, self.info = path, info
        self.least, _, most = info.batch
        self.batch = min(max(batch, self.least), most)
        self.tensors = tensors_to_calibrate(model, self.info) if tensors is None else list(tensors)
        self.groups = passing_groups(model, self.info, self.tensors)
        self.head_inputs = [name for name in head_inputs(model, self.info) if name in self.tensors]
        self.mish = mish_outputs(model, self.tensors)
        self.takes_image = self.info.input == "float" and "images" in self.tensors
        heads = [head.tensor for head in self.info.heads]
        self.outputs = [name for name in dict.fromkeys([*self.tensors, *heads]) if not (self.takes_image and name == "images")]
        self.session = _session(_cut(model, self.info, self.outputs), path)

    def run(self, images: list[NDArray[Any]]) -> tuple[Arrays, Weights]:
        """The tensors' values for these images and the weights of the images' places.

        A batch too short for the model is filled up and cut back.
        """
        filled = np.stack(images + images[:1] * (self.least - len(images)))
        values = {"images": filled, **dict(zip(self.outputs, self._run(filled), strict=True))}
        cut = {name: value[: len(images)] for name, value in values.items()}
        return {name: cut[name] for name in self.tensors}, weights_of(cut, self.info.heads)

    def _run(self, images: NDArray[Any]) -> list[NDArray[Any]]:
        try:
            found: list[NDArray[Any]] = self.session.run(self.outputs, {"images": images})
        except Exception as error:  # its exceptions share no base class
            raise DarktrtError(f"{self.path}: ONNX Runtime fails: {str(error).splitlines()[0]}") from error
        return found


def _cut(model: onnx.ModelProto, info: DetectorInfo, outputs: list[str]) -> bytes:
    """The model with these outputs and without anything behind the heads."""
    import onnx

    graph = model.graph
    nodes = _nodes_before_heads(model, info)
    if unknown := set(outputs).difference(output for node in nodes for output in node.output):
        raise DarktrtError(f"{info.name}: '{sorted(unknown)[0]}' is no tensor between the image and the heads")
    del graph.node[:], graph.output[:], graph.input[1:]  # the other inputs are those of NMS
    graph.node.extend(nodes)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    serialized: bytes = model.SerializeToString()
    return serialized


def _session(model: bytes, path: str | Path) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # its exceptions share no base class
        first = str(error).splitlines()[0]
        raise DarktrtError(f"{path}: ONNX Runtime cannot load it ({first}); make it with 'darktrt convert'") from error
