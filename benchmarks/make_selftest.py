"""Makes the files of ``darktrt selftest`` from its cfg: weights, plain ONNX, calibration, and PyTorch's outputs.

    python benchmarks/make_selftest.py

Needs PyTorch and ONNX Runtime. Run it after a change of the cfg, of the images or of the metadata; tests compare the files with
what their stages make of them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

import darktrt
from darktrt.check.runs import Variant, run, save_results
from darktrt.convert.cfg import Yolo, read_cfg
from darktrt.convert.model import random_weights
from darktrt.convert.reference import TorchReference
from darktrt.convert.weights import write_weights
from darktrt.files import scratch_folder
from darktrt.selftest import network

SEED = 1
STRENGTH, OBJECTNESS = 1.5, -0.5
"""Of the heads, so that some seventy detections of an image pass, few of them close to the threshold."""


def main() -> None:
    os.chdir(network.FOLDER)  # so that no file holds a path
    draw_weights()
    info = darktrt.convert_darknet(network.CFG.name, network.WEIGHTS.name, network.PLAIN.name, batch=(1, 2, 4))
    with scratch_folder() as folder:
        calibrate(folder)
    reference = TorchReference(network.CFG, network.WEIGHTS)
    variant = Variant("PyTorch", reference.info, "fp32", reference.run)
    results = [run([variant], image, darktrt.Thresholds(), layers=False)[0] for image in network.images(info)]
    save_results({variant.name: results}, network.OUTPUTS)


def draw_weights() -> None:
    """Random weights of 11 bits, so that the files compress well."""
    drawn = read_cfg(network.CFG)
    weights = random_weights(drawn, SEED)
    for index in {layer.sources[0] for layer in drawn.layers if isinstance(layer, Yolo)}:
        weights[index]["weight"] *= STRENGTH  # type: ignore[misc]
        weights[index]["bias"][4::8] += OBJECTNESS
    rounded = [{role: values.astype(np.float16).astype(np.float32) for role, values in one.items()} for one in weights]
    write_weights(network.WEIGHTS, drawn, rounded)


def calibrate(folder: Path) -> None:
    darktrt.insert_plugins(network.PLAIN, folder / "portable.onnx")
    images = folder / "images"
    images.mkdir()
    for i in range(32):
        Image.fromarray(network.rectangles(192, 128, 100 + i)).save(images / f"{i:02}.png")
    options = darktrt.CalibrationOptions(bias_images=16, fp_layer_images=0)
    os.chdir(folder)  # the file names the images as they are given
    darktrt.calibrate("portable.onnx", ["images"], network.CALIBRATION, options)
    os.chdir(network.FOLDER)


if __name__ == "__main__":
    main()
