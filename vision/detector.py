"""A network's detections in images: fitting images into its input, and reading its outputs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from darktrt.cuda import Frame, host_pixels
from darktrt.errors import DarktrtError
from darktrt.metadata import IOU_THRESHOLD, SCORE_THRESHOLD, DetectorInfo, Thresholds
from darktrt.progress import LOGGER
from darktrt.vision.boxes import Detections, nms, place_detections
from darktrt.vision.decode import Decoder, Device, read_ahead
from darktrt.vision.images import Placement, check_rgb, placement_of, preprocess, read_image

Arrays = dict[str, NDArray[Any]]
ImageLike = Frame | str | os.PathLike[str]
"""An RGB image ``(H, W, 3)`` uint8, an array or in the memory of the GPU, or an image file."""
Run = Callable[[Arrays], Arrays]
"""A session of ONNX Runtime or an engine: named input arrays to named output arrays."""

_Self = TypeVar("_Self", bound="NetworkDetector")


@runtime_checkable
class Network(Protocol):
    """A network that runs several batches at once, such as :class:`darktrt.engine.runtime.PlanRunner`."""

    @property
    def fits_frames(self) -> bool:
        """Whether it accepts frames of any size and fits them itself."""

    @property
    def depth(self) -> int:
        """The number of batches that may be under way."""

    def submit(self, images: NDArray[Any] | Sequence[Frame], inputs: Arrays) -> None:
        """Begin a batch: its frames, or the input ``images``, and the other inputs by name."""

    def collect(self) -> Arrays:
        """Wait for the oldest batch under way; its outputs by name are overwritten after the next :meth:`submit`."""


class _Synchronous:
    """A function as a network that runs a batch at a time."""

    fits_frames = False
    depth = 1

    def __init__(self, run: Run) -> None:
        self._run = run
        self._outputs: Arrays = {}

    def submit(self, images: NDArray[Any] | Sequence[Frame], inputs: Arrays) -> None:
        self._outputs = self._run({"images": np.asarray(images), **inputs})

    def collect(self) -> Arrays:
        return self._outputs


def fit(image: NDArray[np.uint8], info: DetectorInfo) -> tuple[NDArray[Any], Placement]:
    """An RGB image ``(H, W, 3)`` as the input of a network, without the batch, and its placement in that input.

    A model with the input form ``image`` accepts the image as it is.
    """
    if info.input == "image":
        return image, placement_in(image, info)
    return preprocess(image, info.width, info.height, info.channels, info.resize, info.input)


def placement_in(image: Frame, info: DetectorInfo) -> Placement:
    """Where an image lies in what the boxes of a network refer to: the network's input, or the image itself.

    Raises:
        DarktrtError: the model accepts no images of this size.
    """
    if isinstance(image, np.ndarray):
        check_rgb(image)
    height, width, _ = image.shape
    if info.input == "image":
        info.check_image(width, height)
        return Placement(width, height, 1.0, 1.0, 0.0, 0.0)
    return placement_of(width, height, info.width, info.height, info.resize)


@dataclass
class _Batch:
    """Images that were given together; they may run in several parts."""

    frames: list[Frame]
    detections: dict[int, Detections]
    """By the index of the frame, as far as they are known."""

    @property
    def done(self) -> bool:
        return len(self.detections) == len(self.frames)


@dataclass(frozen=True)
class _Part:
    """Images of a batch that run together."""

    batch: _Batch
    indices: list[int]
    placements: list[Placement]


def read_outputs(
    outputs: Arrays, info: DetectorInfo, thresholds: Thresholds, image_size: tuple[float, float], name: str
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
    """The detections of one image from a model's outputs for it.

    Args:
        outputs: without the batch: ``boxes (A, 4)`` and ``scores (A, classes)``; of a model that ends in NMS ``boxes (M, 4)``,
            ``scores (M,)``, ``classes (M,)`` and ``num_detections (1,)``.
        info: the model's metadata.
        thresholds: of the NMS, where the model does not end in one.
        image_size: width and height of the image inside the network input.
        name: of the model, in errors.

    Returns:
        Boxes ``(n, 4)`` in pixels of the network input, scores ``(n,)`` and class ids ``(n,)``, best first; copies.

    Raises:
        DarktrtError: a score is NaN.
    """
    boxes, scores = outputs["boxes"], outputs["scores"]
    if info.head == "nms":
        count = int(outputs["num_detections"].item())
        warn_at_limit(count, info, name)
        # Copies, for an engine may write its next results into the same memory.
        return boxes[:count].copy(), scores[:count].copy(), outputs["classes"][:count].copy()
    if np.isnan(scores).any():  # would pass for an empty image: no comparison with NaN is true
        raise DarktrtError(f"{name}: its scores are not numbers; are the weights damaged?")
    rule, limit = info.nms, info.max_detections or None
    return nms(boxes, scores, thresholds.score, thresholds.iou, rule.kind, rule.beta, image_size, max_detections=limit)


_warned_at_limit: dict[tuple[str, int], object] = {}
"""The models that have reached their limit in this process, by name and limit."""


def warn_at_limit(most: int, info: DetectorInfo, name: str) -> None:
    """Warn, once for each model in a process, that an image has as many detections as a model that ends in NMS outputs.

    Args:
        most: the number of detections of an image, or the largest of several images.
        name: of the model, in the warning.
    """
    key, this = (name, info.max_detections), object()
    if reaches_limit(most, info) and _warned_at_limit.setdefault(key, this) is this:  # one of several threads warns
        LOGGER.warning(
            f"{name}: an image has {most} detections, as many as the model outputs, so others may be missing; run surgery "
            "again with a larger max_detections"
        )


def reaches_limit(count: int, info: DetectorInfo) -> bool:
    """Whether the detections of an image are as many as a model that ends in NMS outputs; others have no limit."""
    return info.head == "nms" and 0 < info.max_detections <= count


class NetworkDetector:
    """A network that detects objects in images, described by its metadata; to be used as a context where it has ``close``.

    Args:
        run: computes the outputs of the inputs that :meth:`~darktrt.metadata.DetectorInfo.model_inputs` makes; or a network
            that runs several batches at once.
        info: the model's metadata.
        score_threshold: detections must exceed it.
        iou_threshold: IoU above which NMS suppresses.
        close: frees what ``run`` uses; called by :meth:`close`.
        decoder: where image files and videos are decoded, see :class:`darktrt.vision.decode.Decoder`; ``"gpu"`` only for a
            network that fits frames, and ``"auto"`` is ``"cpu"`` for any other.

    Raises:
        DarktrtError: the model ends at its raw heads, a threshold is outside 0..1 or differs from one fixed in the model, or
            ``decoder`` is ``"gpu"`` and the network needs images on the CPU.
    """

    def __init__(
        self,
        run: Run | Network,
        info: DetectorInfo,
        score_threshold: float = SCORE_THRESHOLD,
        iou_threshold: float = IOU_THRESHOLD,
        close: Callable[[], None] | None = None,
        decoder: Device = "cpu",
    ) -> None:
        if info.head == "raw":
            raise DarktrtError(f"{info.name}: ends at its raw heads; to detect, make it with head nms or decode")
        self.thresholds = Thresholds(score_threshold, iou_threshold)
        info.check_thresholds(self.thresholds)
        self.run = run
        self.info = info
        self._close = close
        self._decodes_on = _decoding_device(decoder, run)
        self._decoder: Decoder | None = None

    def close(self) -> None:
        """Free what the network uses; may be called twice."""
        decoder, self._decoder = self._decoder, None
        if decoder:
            decoder.close()
        close, self._close = self._close, None
        if close:
            close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def detect(self, images: Sequence[ImageLike]) -> list[Detections]:
        """Detect in images; boxes are in pixels of each image and clipped to it, best score first.

        Args:
            images: RGB arrays ``(H, W, 3)`` uint8, or image files.

        Raises:
            DarktrtError: an array has another shape or type, a file cannot be read, or the model lacks outputs of its
                metadata.
        """
        size = self.info.batch[2]
        batches = (images[first : first + size] for first in range(0, len(images), size))
        return [detections for batch in self.detect_batches(batches) for detections in batch]

    def detect_batches(self, batches: Iterable[Sequence[ImageLike]]) -> Generator[list[Detections], None, None]:
        """Detect in batches of images, and yield the detections of each batch, in order, as :meth:`detect` returns them.

        Files are read ahead in threads. A network on the GPU runs while the next images are read and uploaded, so the results
        of a batch can come after later batches were taken. Close the generator if you stop before its end.

        Args:
            batches: images as for :meth:`detect`; a batch larger than the model's largest runs in parts.
        """
        sizes: deque[int] = deque()
        found: list[Detections] = []
        with closing(self.detect_frames(_noted(batches, sizes))) as results:
            for _, detections in results:
                found += detections
                if len(found) == sizes[0]:
                    sizes.popleft()
                    yield found
                    found = []

    def detect_frames(
        self, batches: Iterable[Sequence[ImageLike]]
    ) -> Generator[tuple[list[Frame], list[Detections]], None, None]:
        """As :meth:`detect_batches`, with the decoded images.

        A batch of files comes in parts where its pixels are more than :data:`darktrt.vision.decode.MOST_BATCH_BYTES`.
        """
        network = _network_of(self.run)
        under_way: deque[_Part] = deque()
        waiting: deque[_Batch] = deque()
        try:
            with closing(self._decoded(batches)) as decoded:
                for frames in decoded:
                    waiting.append(_Batch(frames, {}))
                    for part in self._parts(waiting[-1]):
                        self._submit(network, part)
                        under_way.append(part)
                        if len(under_way) >= network.depth:
                            self._collect(network, under_way.popleft())
                    yield from _finished(waiting)
            while under_way:
                self._collect(network, under_way.popleft())
                yield from _finished(waiting)
        finally:
            while under_way:  # after an error: the network must be idle for the next one
                under_way.popleft()
                with suppress(DarktrtError):
                    network.collect()

    def _decoded(self, batches: Iterable[Sequence[ImageLike]]) -> Generator[list[Frame], None, None]:
        """The images of each batch; files are read ahead, while frames are passed on at once."""
        for are_files, group in groupby(batches, lambda batch: all(isinstance(image, str | os.PathLike) for image in batch)):
            if are_files:
                paths = ([Path(image) for image in batch if isinstance(image, str | os.PathLike)] for batch in group)
                with closing(read_ahead(paths, self._open_decoder())) as decoded:
                    yield from decoded
            else:
                yield from ([self._frame(image) for image in batch] for batch in group)

    def _frame(self, image: ImageLike) -> Frame:
        return self._open_decoder().read([Path(image)])[0] if isinstance(image, str | os.PathLike) else image

    def _open_decoder(self) -> Decoder:
        self._decoder = self._decoder or Decoder(device=self._decodes_on)
        return self._decoder

    def detect_images(
        self, paths: Sequence[Path], pixels: bool = True
    ) -> tuple[Sequence[NDArray[np.uint8] | None], list[Detections]]:
        """Read and detect in image files: the images, which may be None without ``pixels``, and their detections.

        Raises:
            DarktrtError: a file cannot be read, or as :meth:`detect`.
        """
        images = [read_image(path) for path in paths]
        return images, self.detect(images)

    def _parts(self, batch: _Batch) -> Iterator[_Part]:
        """The parts of a batch that can run together: of the model's largest batch at most, and images of one size for a model
        with the input form ``image``."""
        most = self.info.batch[2]
        indices = list(range(len(batch.frames)))
        shapes = [frame.shape if self.info.input == "image" else None for frame in batch.frames]
        for _, same in groupby(sorted(indices, key=lambda i: str(shapes[i])), key=lambda i: shapes[i]):
            equal = list(same)
            for part in (equal[first : first + most] for first in range(0, len(equal), most)):
                yield _Part(batch, part, [placement_in(batch.frames[i], self.info) for i in part])

    def _submit(self, network: Network, part: _Part) -> None:
        info, frames = self.info, [part.batch.frames[i] for i in part.indices]
        count = max(len(frames), info.batch[0])
        sizes = [placement.inner_size for placement in part.placements]
        images: NDArray[Any] | list[Frame] = [*frames, *frames[:1] * (count - len(frames))]
        if not network.fits_frames:
            fitted = [fit(host_pixels(frame), info)[0] for frame in frames]
            images = np.stack([*fitted, *fitted[:1] * (count - len(fitted))]) if count > 1 else fitted[0][np.newaxis]
        network.submit(images, info.other_inputs(count, sizes, self.thresholds))

    def _collect(self, network: Network, part: _Part) -> None:
        """Place the detections of the oldest part under way."""
        info = self.info
        outputs = checked_outputs(network.collect(), info, max(len(part.indices), info.batch[0]))
        for row, (index, placement) in enumerate(zip(part.indices, part.placements, strict=True)):
            outputs_of_image = {name: values[row] for name, values in outputs.items()}
            rows = read_outputs(outputs_of_image, info, self.thresholds, placement.inner_size, info.name)
            part.batch.detections[index] = place_detections(*rows, placement, info.class_names)


def checked_outputs(outputs: Arrays, info: DetectorInfo, count: int) -> Arrays:
    """The outputs for ``count`` images that detections are read from, of the shapes that :func:`read_outputs` states.

    Raises:
        DarktrtError: one is missing, has another shape, or is not of numbers; a count of detections or a class is impossible.
    """
    for name in _OUTPUTS[info.head == "nms"]:
        if name not in outputs:
            raise DarktrtError(f"{info.name}: has no output '{name}', only {', '.join(outputs) or 'none'}")
        if (rows := outputs[name].shape[0] if outputs[name].ndim else 0) != count:
            raise DarktrtError(f"{info.name}: '{name}' has {rows} rows for a batch of {count}")
    checked = {name: outputs[name] for name in _OUTPUTS[info.head == "nms"]}
    rows, classes = checked["scores"].shape[1] if checked["scores"].ndim > 1 else 0, len(info.class_names)
    wanted: dict[str, tuple[int, ...]] = {"boxes": (count, rows, 4), "scores": (count, rows, classes)}
    if info.head == "nms":
        wanted |= {"scores": (count, rows), "classes": (count, rows), "num_detections": (count, 1)}
    for name, shape in wanted.items():
        kinds = "iu" if name in ("classes", "num_detections") else "f"
        if checked[name].shape != shape or checked[name].dtype.kind not in kinds:
            found = f"{checked[name].shape} {checked[name].dtype}"
            raise DarktrtError(f"{info.name}: '{name}' is {found}, not {shape} of the network's detections")
    if info.head == "nms":
        _check_detections(checked, info, rows)
    return checked


_OUTPUTS = (("boxes", "scores"), ("boxes", "scores", "classes", "num_detections"))
"""What detections are read from, without and with NMS in the model."""


def _check_detections(outputs: Arrays, info: DetectorInfo, rows: int) -> None:
    counts, classes = outputs["num_detections"][:, 0], outputs["classes"]
    if ((counts < 0) | (counts > rows)).any():
        raise DarktrtError(f"{info.name}: 'num_detections' has {counts.tolist()}, but there are {rows} rows")
    given = classes[np.arange(rows) < counts[:, np.newaxis]]
    wrong = given[(given < 0) | (given >= len(info.class_names))]
    if wrong.size:
        raise DarktrtError(f"{info.name}: 'classes' has {wrong[0]}, but there are {len(info.class_names)} classes")


def _noted(batches: Iterable[Sequence[ImageLike]], sizes: deque[int]) -> Iterator[Sequence[ImageLike]]:
    """Pass batches on and note how many images they have."""
    for batch in batches:
        sizes.append(len(batch))
        yield batch


def _finished(batches: deque[_Batch]) -> Iterator[tuple[list[Frame], list[Detections]]]:
    """Take the first batches off as far as they are done."""
    while batches and batches[0].done:
        batch = batches.popleft()
        yield batch.frames, [batch.detections[i] for i in range(len(batch.frames))]


def _decoding_device(decoder: Device, run: Run | Network) -> Device:
    """Where files are decoded for a network: on the GPU only where it fits frames, for others are fitted on the CPU."""
    if isinstance(run, Network) and run.fits_frames:
        return decoder
    if decoder == "gpu" and not isinstance(run, Network):
        raise DarktrtError("ONNX Runtime runs on the CPU and needs images there; decode them on it", argument="decoder")
    if decoder == "gpu":
        raise DarktrtError("the engine's images are fitted on the CPU; decode them on it", argument="decoder")
    return "cpu"


def _network_of(run: Run | Network) -> Network:
    return run if isinstance(run, Network) else _Synchronous(run)
