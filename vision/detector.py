"""A network's detections in images: fitting images into its input, and reading its outputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from darktrt.errors import DarktrtError
from darktrt.metadata import IOU_THRESHOLD, SCORE_THRESHOLD, DetectorInfo, Thresholds
from darktrt.vision.boxes import Detections, nms, place_detections
from darktrt.vision.images import Placement, preprocess, read_image

Arrays = dict[str, NDArray[Any]]
ImageLike = NDArray[np.uint8] | str | os.PathLike[str]
"""An RGB array ``(H, W, 3)``, or an image file."""
Run = Callable[[Arrays], Arrays]
"""A session of ONNX Runtime or an engine: named input arrays to named output arrays."""

_Self = TypeVar("_Self", bound="NetworkDetector")


def fit(image: NDArray[np.uint8], info: DetectorInfo) -> tuple[NDArray[Any], Placement]:
    """An RGB image ``(H, W, 3)`` as ``input_shape`` of a network, without the batch, and its placement in that input."""
    return preprocess(image, info.width, info.height, info.channels, info.resize, info.input)


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
        # Copies, for an engine may write its next results into the same memory.
        return boxes[:count].copy(), scores[:count].copy(), outputs["classes"][:count].copy()
    if np.isnan(scores).any():  # would pass for an empty image: no comparison with NaN is true
        raise DarktrtError(f"{name}: its scores are not numbers; are the weights damaged?")
    rule, limit = info.nms, info.max_detections or None
    return nms(boxes, scores, thresholds.score, thresholds.iou, rule.kind, rule.beta, image_size, max_detections=limit)


class NetworkDetector:
    """A network that detects objects in images, described by its metadata; to be used as a context where it has ``close``.

    Args:
        run: computes the outputs of the inputs that :meth:`~darktrt.metadata.DetectorInfo.model_inputs` makes.
        info: the model's metadata.
        score_threshold: detections must exceed it.
        iou_threshold: IoU above which NMS suppresses.
        close: frees what ``run`` uses; called by :meth:`close`.

    Raises:
        DarktrtError: the model ends at its raw heads, or a threshold is outside 0..1 or differs from one fixed in the model.
    """

    def __init__(
        self,
        run: Run,
        info: DetectorInfo,
        score_threshold: float = SCORE_THRESHOLD,
        iou_threshold: float = IOU_THRESHOLD,
        close: Callable[[], None] | None = None,
    ) -> None:
        if info.head == "raw":
            raise DarktrtError(f"{info.name}: ends at its raw heads; to detect, make it with head nms or decode")
        self.thresholds = Thresholds(score_threshold, iou_threshold)
        info.check_thresholds(self.thresholds)
        self.run = run
        self.info = info
        self._close = close

    def close(self) -> None:
        """Free what the network uses; may be called twice."""
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
        arrays = (image if isinstance(image, np.ndarray) else read_image(image) for image in images)
        batches = iter(lambda: list(islice(arrays, size)), [])
        return [detections for batch in batches for detections in self._detect_batch(batch)]

    def detect_images(
        self, paths: Sequence[Path], pixels: bool = True
    ) -> tuple[Sequence[NDArray[np.uint8] | None], list[Detections]]:
        """Read and detect in image files: the images, which may be None without ``pixels``, and their detections.

        Raises:
            DarktrtError: a file cannot be read, or as :meth:`detect`.
        """
        images = [read_image(path) for path in paths]
        return images, self.detect(images)

    def _detect_batch(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        info = self.info
        fitted = [fit(image, info) for image in images]
        sizes = [placement.inner_size for _, placement in fitted]
        outputs = self._run(info.model_inputs(np.stack([array for array, _ in fitted]), sizes, self.thresholds))
        detections = []
        for i, (_, placement) in enumerate(fitted):
            outputs_of_image = {name: values[i] for name, values in outputs.items()}
            rows = read_outputs(outputs_of_image, info, self.thresholds, placement.inner_size, info.name)
            detections.append(place_detections(*rows, placement, info.class_names))
        return detections

    def _run(self, inputs: Arrays) -> Arrays:
        """The outputs that detections are read from."""
        names = ["boxes", "scores"]
        if self.info.head == "nms":
            names += ["classes", "num_detections"]
        outputs = self.run(inputs)
        batch = len(next(iter(inputs.values())))
        for name in names:
            if name not in outputs:
                raise DarktrtError(f"{self.info.name}: has no output '{name}', only {', '.join(outputs) or 'none'}")
            if len(outputs[name]) != batch:
                raise DarktrtError(f"{self.info.name}: '{name}' has {len(outputs[name])} rows for a batch of {batch}")
        return {name: outputs[name] for name in names}
