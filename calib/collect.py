"""Histograms of a network's activations by ONNX Runtime: one pass over the images, in memory that does not grow."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from darktrt.calib.bias_correction import ChannelMeanMeter, ChannelMeans
from darktrt.calib.graph import (
    PIXELS,
    convolution_inputs,
    cut_behind_heads,
    head_inputs,
    mish_outputs,
    passing_groups,
    tensors_to_calibrate,
    value_sources,
)
from darktrt.calib.histogram import HistogramSet
from darktrt.calib.importance import Weights, weights_of
from darktrt.calib.options import CalibrationOptions
from darktrt.calib.summary import Outputs
from darktrt.errors import DarktrtError, quote
from darktrt.files import keep_inputs, sha256_of
from darktrt.metadata import DetectorInfo
from darktrt.onnx_cost import limit_batch
from darktrt.onnx_file import load_model
from darktrt.onnx_session import OnnxSession, available_providers
from darktrt.progress import LOGGER, Progress, progress
from darktrt.vision.detector import fit
from darktrt.vision.images import read_image
from darktrt.vision.sources import IMAGE_SUFFIXES, find_images

if TYPE_CHECKING:
    import onnx

Arrays = dict[str, NDArray[Any]]
Image = tuple[str, Path, NDArray[Any]]
"""SHA-256 of the file, its path, and the network's input made of it."""

_Item = TypeVar("_Item")

SAVE_EVERY = 32
FEW = 16
"""Fewer images than this cause a warning."""


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
) -> HistogramSet:
    """Histograms of a network's activations over images; an image counts once, by the SHA-256 of its file.

    Args:
        model_path: a plain or portable ONNX file of darktrt.
        images: image files; those that ``resume`` has are not counted again.
        tensors: the tensors to count; default: :func:`darktrt.calib.graph.tensors_to_calibrate`.
        batch: images at a time, brought into the model's range.
        resume: histograms of an earlier run on the same model, which are added to.
        skip_bad: continue after an image that cannot be read, and list it in ``skipped`` of the result.
        save_to: where to save every ``save_every`` images, at the end and on Ctrl-C: always a state between two batches.

    Raises:
        DarktrtError: there are no images, one cannot be read (without ``skip_bad``), the model is not one of darktrt or
            not that of ``resume``, an activation is NaN or infinite, or the file cannot be written.
        KeyboardInterrupt: Ctrl-C, after the current batch; a second Ctrl-C does not wait for it.
    """
    if not images:
        raise DarktrtError("there are no images; name a folder, list, COCO json or pattern", argument="images")
    network, sources, histograms = _prepared(model_path, tensors, batch, resume)
    _Collector(network, sources, histograms, _Saves(histograms, save_to, save_every), skip_bad).count(images)
    if not histograms.images:
        raise DarktrtError(f"none of the {len(images)} images can be read; first: {histograms.skipped[0]}")
    return histograms


def histograms_of(
    model_path: str | Path, data: Sequence[str | Path], outputs: Outputs, options: CalibrationOptions
) -> HistogramSet:
    """The first pass of a calibration: find the images, count, and keep the histograms beside the table.

    Raises:
        DarktrtError: as :func:`darktrt.vision.sources.find_images` and :func:`collect` do.
    """
    save_to = outputs.histograms
    keep_inputs(save_to, model_path)
    images = find_images(data, options.limit, options.seed)
    for path in outputs.files:
        if path.suffix.lower() in IMAGE_SUFFIXES:  # others cannot be one of many thousand images
            keep_inputs(path, *images)
    if len(images) < FEW:
        LOGGER.warning(f"{len(images)} images are few to calibrate on; a hundred or more are usual")
    earlier = HistogramSet.load(save_to) if options.resume and save_to.exists() else None
    return collect(model_path, images, batch=options.batch, resume=earlier, skip_bad=options.skip_bad, save_to=save_to)


def measure_channel_means(
    model_path: str | Path, images: Sequence[Path], scales: Mapping[str, np.float32], batch: int = 1
) -> dict[str, ChannelMeans]:
    """The second pass: the channel means of every input tensor of a convolution, before and after INT8 with these scales.

    Images that cannot be read are left out; the first pass has reported them.

    Raises:
        DarktrtError: the model is not one of darktrt, or none of the images can be read.
    """
    model, info = load_model(model_path)
    tensors = [name for name in convolution_inputs(model, info) if name in scales]
    network = _Trunk(model_path, model, info, tensors, batch)
    del model  # as large as the weights
    meter = ChannelMeanMeter(scales)
    with progress(len(images), "images") as bar:
        for group in _batches(_readable(images, network.info), network.batch):
            meter.add(network.run(group)[0])
            bar.update(len(group))
    if not meter.sums:
        raise DarktrtError(f"none of the {len(images)} images can be read")
    return meter.channel_means()


def _readable(images: Sequence[Path], info: DetectorInfo) -> Iterator[NDArray[Any]]:
    for path in images:
        with suppress(DarktrtError):
            yield _read(path, info)


def _prepared(
    model_path: str | Path, tensors: Sequence[str] | None, batch: int, resume: HistogramSet | None
) -> tuple[_Trunk, dict[str, str], HistogramSet]:
    """The network, ready to run; the tensors to count, each with the one that its values come from; what to add to."""
    model, info = load_model(model_path)
    names = tensors_to_calibrate(model, info) if tensors is None else list(tensors)
    origins = value_sources(model, info)
    sources = {name: origins.get(name, name) for name in names}
    histograms = HistogramSet(
        sha256_of(model_path),
        groups=passing_groups(model, info, names),
        head_inputs=[name for name in head_inputs(model, info) if name in names],
        mish=mish_outputs(model, names),
    )
    network = _Trunk(model_path, model, info, list(dict.fromkeys(sources.values())), batch)
    fit(np.zeros((1, 1, 3), np.uint8), network.info)  # a network that takes no images is refused at once
    if resume is None:
        return network, sources, histograms
    if resume.model != histograms.model:
        raise DarktrtError(f"{model_path}: is not the model of the histograms to resume; start afresh", argument="resume")
    if resume.images and set(resume.histograms) != set(names):
        raise DarktrtError(f"{model_path}: the histograms to resume are of other tensors; start afresh", argument="resume")
    resume.skipped = []
    return network, sources, resume


class _Collector:
    """Counts the activations of images, and saves the histograms as it goes.

    Args:
        sources: maps each tensor to count to the one of the network that its values come from.
    """

    def __init__(
        self, network: _Trunk, sources: Mapping[str, str], histograms: HistogramSet, saves: _Saves, skip_bad: bool
    ) -> None:
        self.network, self.sources, self.histograms, self.saves, self.skip_bad = network, sources, histograms, saves, skip_bad

    def count(self, images: Sequence[Path]) -> None:
        """Run the network on every new image."""
        with progress(len(images), "images") as bar, _ctrl_c_as_event() as stop:
            try:
                for group in _batches(self._new(images, bar), self.network.batch):
                    self._count(group)
                    bar.update(len(group))
                    if stop.is_set():
                        break
                    self.saves.after(len(group))
            except DarktrtError:
                self.saves.now()  # the images counted before the one that failed
                raise
        self.saves.now()
        if stop.is_set():
            raise KeyboardInterrupt

    def _count(self, group: list[Image]) -> None:
        values, weights = self.network.run([array for _, _, array in group])
        activations = {name: values[source] for name, source in self.sources.items()}
        self.histograms.add(activations, {digest: str(path) for digest, path, _ in group}, weights)

    def _new(self, images: Sequence[Path], bar: Progress) -> Iterator[Image]:
        """Every image not counted before, read and preprocessed; the others are taken off the bar's total."""
        seen = set(self.histograms.images)
        for path in images:
            digest, array = self._load(path, seen)
            if array is None:
                bar.total = (bar.total or 1) - 1
                continue
            seen.add(digest)
            yield digest, path, array

    def _load(self, path: Path, seen: set[str]) -> tuple[str, NDArray[Any] | None]:
        """SHA-256 of an image and the network's input; None for one that was seen before or cannot be read."""
        try:
            digest = sha256_of(path)
            return digest, None if digest in seen else _read(path, self.network.info)
        except DarktrtError as error:
            if not self.skip_bad:
                raise DarktrtError(f"{error} (skip such images, or mend this one and resume)", argument="skip_bad") from error
            self.histograms.skipped.append(str(error))
            return "", None


class _Saves:
    """Writes the histograms to a file as they grow; nowhere where ``path`` is None."""

    def __init__(self, histograms: HistogramSet, path: Path | None, every: int) -> None:
        self.histograms = histograms
        self.path = path
        self.every = every
        self.unsaved = 0

    def after(self, images: int) -> None:
        """Save if it is time, now that this number of images more is counted."""
        self.unsaved += images
        if self.unsaved >= self.every:
            self.now()

    def now(self) -> None:
        if self.path and self.histograms.images:
            self.histograms.save(self.path)
        self.unsaved = 0


def _read(path: Path, info: DetectorInfo) -> NDArray[Any]:
    return fit(read_image(path), info)[0]


def _batches(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    while batch := list(islice(items, size)):
        yield batch


@contextmanager
def _ctrl_c_as_event() -> Iterator[threading.Event]:
    """Inside the block, the first Ctrl-C sets the event and the second one interrupts.

    Nothing changes outside the main thread, or where the signal is handled or ignored by others.
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
    """The network from its image to its raw heads, with ``tensors`` and the raw heads as outputs.

    The model is cut in place. One that takes images of any size begins at its pixels, and ``info`` is that of the form
    ``float``.
    """

    def __init__(
        self, path: str | Path, model: onnx.ModelProto, info: DetectorInfo, tensors: Sequence[str], batch: int
    ) -> None:
        self.path, self.tensors = path, tensors
        self.info = replace(info, input="float", image_sizes=None) if info.input == "image" else info
        self.least, _, most = limit_batch(model, info, str(path)).batch
        self.batch = min(max(batch, self.least), most)
        names = dict.fromkeys([*tensors, *(head.tensor for head in info.heads)])
        self.input = {"float": "images", "uint8": "images", "image": PIXELS}[info.input]
        self.outputs = [name for name in names if not (info.input != "uint8" and name == self.input)]
        cut_behind_heads(model, info, self.outputs)
        self.session = _session(model.SerializeToString(), path)

    def run(self, images: list[NDArray[Any]]) -> tuple[Arrays, Weights]:
        """The values of the tensors for these images, and the weights of the images' positions.

        A batch below the model's smallest one is filled up with its first image; the results are cut back.
        """
        filled = np.stack(images + images[:1] * (self.least - len(images)))
        values = self.session.run({self.input: filled})
        self._check(values, len(filled))
        cut = {name: value[: len(images)] for name, value in {self.input: filled, **values}.items()}
        return {name: cut[name] for name in self.tensors}, weights_of(cut, self.info.heads)

    def _check(self, values: Arrays, images: int) -> None:
        channels = {head.tensor: len(head.anchors) * (5 + head.classes) for head in self.info.heads}
        for name, value in values.items():
            maps = value.dtype.kind == "f" and value.ndim == 4 and len(value) == images and value.size
            if not maps or value.shape[1] != channels.get(name, value.shape[1]):
                raise DarktrtError(
                    f"{self.path}: tensor '{quote(name)}' is {value.dtype} {value.shape}, and does not fit the metadata of a "
                    "network that darktrt converts; convert it again"
                )


def _session(model: bytes, path: str | Path) -> OnnxSession:
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    return OnnxSession(model, str(path), providers=[name for name in wanted if name in available_providers()])
