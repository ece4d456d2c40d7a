"""The inputs of requests, as a model wants them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darktrt.metadata import DetectorInfo, Thresholds
from darktrt.serve.model_info import ENCODED_INPUT, ModelInfo
from darktrt.vision.detector import Arrays, fit
from darktrt.vision.images import Placement


def file_request(info: DetectorInfo, files: Sequence[bytes], thresholds: Thresholds) -> Arrays:
    """The inputs of a model of encoded images, for some image files."""
    return {ENCODED_INPUT: np.array(files, object)[:, np.newaxis], **info.threshold_inputs(thresholds)}


def pixel_request(info: DetectorInfo, fitted: Sequence[tuple[NDArray[Any], Placement]], thresholds: Thresholds) -> Arrays:
    """The inputs of a model of tensors, for images that :func:`darktrt.vision.detector.fit` fitted."""
    sizes = [placement.inner_size for _, placement in fitted]
    return info.model_inputs(np.stack([array for array, _ in fitted]), sizes, thresholds)


def noise_request(model: ModelInfo) -> Arrays:
    """A smallest request of noise, another one each time, which no cache of the server can answer."""
    info = replace(model.info, batch=(1, 1, 1)) if model.max_batch else model.info  # Triton makes the batches of the network
    width, height = info.usual_image
    image = np.random.default_rng().integers(0, 256, (height, width, 3), np.uint8)
    if model.encoded:
        return file_request(info, [as_png(image)], Thresholds())
    return pixel_request(info, [fit(image, info)], Thresholds())


def as_png(image: NDArray[np.uint8]) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()
