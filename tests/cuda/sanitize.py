"""Each kernel once or twice on small sizes, to run under compute-sanitizer with the kernels built before:

    make -C plugins/csrc kernels OUT=build/kernels
    PYTHONPATH=tests:tests/cuda compute-sanitizer --tool memcheck python3 tests/cuda/sanitize.py build/kernels

Outputs lie in buffers with guards; that the results are right is for the tests.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from device import CudaLibrary
from kernels import LAYOUTS, Fit, Head, Nms, Yolo, scene


def run(library: CudaLibrary) -> None:
    random = np.random.default_rng(0)
    for dtype, out in ((np.float32, np.float32), (np.float16, np.float16), (np.int8, np.int8), (np.float16, np.int8)):
        for layout in LAYOUTS:
            for channels in (64, 33):
                x = random.integers(-100, 100, (2, channels, 21)).astype(dtype)
                library.mish(x, layout=layout, dtype=out)
                library.mish(x, residual=x, layout=layout, dtype=out)
                library.mish(x[:, :32], second=x, layout=layout, dtype=out)
    anchors = ((10.0, 14.0), (23.0, 27.0), (37.0, 58.0))
    yolo = Yolo((Head(anchors, 12, 20), Head(anchors, 6, 10, 1, 2.0)), 40, 320, 192)
    for dtype in (np.float32, np.float16):
        heads = scene(yolo, 2, 0, 0.1, dtype)
        library.decode(yolo, heads)
        for nms in (Nms("plain"), Nms("greedynms", 0.6, 5, 5)):
            for threshold in (0.25, 1e-4, -1.0):
                library.detect(yolo, nms, heads, threshold)
    images = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in ((1, 1), (53, 37), (90, 200))]
    for fit in (Fit(33, 65), Fit(64, 32, 1, 1), Fit(96, 64, 3, 1)):
        for dtype in (np.float32, np.float16, np.uint8):
            library.fit(fit, images, dtype)
            library.preprocess(fit, np.stack(images[1:2] * 3).astype(np.float16), dtype)
    library.place_boxes(np.ones((3, 77, 4), np.float32), np.ones((3, 4), np.float32))


if __name__ == "__main__":
    for offset in (0, 4):
        run(CudaLibrary(Path(sys.argv[1]) / "libdarktrt_kernels.so", offset))
