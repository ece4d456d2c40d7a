"""The network of the selftest, its calibration, and the images that it runs on."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from darktrt.check.runs import InputImage
from darktrt.metadata import DetectorInfo, Thresholds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from darktrt.engine.weak_typing import GpuCalibration
    from darktrt.selftest.routes import Scales
    from darktrt.surgery.qdq import Calibration

FOLDER = Path(__file__).parent / "data"
CFG = FOLDER / "selftest.cfg"
WEIGHTS = FOLDER / "selftest.weights"
PLAIN = FOLDER / "selftest.onnx"
"""What PyTorch made of cfg and weights; machines without PyTorch start here."""
CALIBRATION = FOLDER / "selftest.calib"
OUTPUTS = FOLDER / "selftest.outputs.json"
"""PyTorch's outputs for :func:`images`, which all others are compared with, in Polygraphy's format."""


def images(info: DetectorInfo, count: int = 2) -> list[InputImage]:
    """Images for the network, the same bits on every machine."""
    size = info.width, info.height
    return [InputImage(f"image {i}", rectangles(info.width, info.height, i), size) for i in range(count)]


def rectangles(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """Coloured rectangles before a gradient, ``(height, width, 3)``."""
    drawn = random.Random(seed)

    def below(limit: int) -> int:
        return int(drawn.random() * limit)  # of all that draws numbers, Python promises only this for later versions

    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([(rows * (i + 1) + columns * (3 - i)) // 2 % 256 for i in range(3)], 2).astype(np.uint8)
    for _ in range(12):
        y, x = below(height - 12), below(width - 12)
        pixels[y : y + 12 + below(52), x : x + 12 + below(84)] = [below(256) for _ in range(3)]
    return pixels


def write_models(folder: Path) -> None:
    """Write the ONNX files of all routes into a folder."""
    from darktrt.pipeline import load_calibration
    from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins

    shutil.copyfile(PLAIN, folder / "plain.onnx")
    insert_plugins(PLAIN, folder / "portable.onnx")
    insert_plugins(PLAIN, folder / "image.onnx", SurgeryOptions(input="image"))
    insert_plugins(PLAIN, folder / "quantized.onnx", SurgeryOptions(calibration=load_calibration(CALIBRATION)))


@contextmanager
def calibration(scales: Scales, model: Path) -> Iterator[Calibration | GpuCalibration | None]:
    """The INT8 scales of a build of ``model``; None where it needs none."""
    from darktrt.calib.trt_calibrator import BatchSource
    from darktrt.engine.weak_typing import GpuCalibration
    from darktrt.onnx_file import load_model
    from darktrt.pipeline import load_calibration

    if scales == "own":
        info = load_model(model)[1]
        batches = (info.model_inputs(*_fitted(image, info), Thresholds()) for image in images(info, 16))
        with BatchSource(batches, 1) as source:
            yield GpuCalibration(source)
    else:
        yield load_calibration(CALIBRATION) if scales == "calibration" else None


def _fitted(image: InputImage, info: DetectorInfo) -> tuple[NDArray[Any], list[tuple[int, int]]]:
    return info.images_of_bytes(image.pixels[np.newaxis]), [image.inner_size]
