"""Write what ONNX Runtime makes of an ONNX file beside it, as .npz, for the test of a whole network in test_plugins.py.

    python tests/trt/expect.py portable.onnx image.jpg ...

Runs where darktrt is installed. The file holds inputs and outputs by name; the images are one batch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from darktrt.engine.runtime import OnnxRunner
from darktrt.metadata import Thresholds
from darktrt.vision.detector import fit
from darktrt.vision.images import read_image


def main(model: str, *images: str) -> None:
    with OnnxRunner(model) as runner:
        fitted = np.stack([fit(read_image(image), runner.info)[0] for image in images])
        inputs = runner.info.model_inputs(fitted, [(runner.info.width, runner.info.height)], Thresholds(0.05, 0.45))
        outputs = runner.run(inputs)
    np.savez_compressed(Path(model).with_suffix(".npz"), **inputs, **outputs)
    print(f"{Path(model).with_suffix('.npz')}: {outputs['num_detections'].ravel()} detections")


if __name__ == "__main__":
    main(*sys.argv[1:])
