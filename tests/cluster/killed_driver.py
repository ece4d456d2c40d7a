"""A calibration on a cluster that is slow enough to be killed: python killed_driver.py ADDRESS ONNX IMAGES CALIB."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import darktrt
from darktrt.calib import collect
from darktrt.cluster.cluster import Cluster

collect.SAVE_EVERY = 4


class Slow:
    """A cluster whose results come one after the other."""

    group_size = 2

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def results(self, *arguments: Any, **more: Any) -> Iterator[Any]:
        with closing(self.cluster.results(*arguments, **more)) as results:
            for done in results:
                time.sleep(0.3)
                yield done


if __name__ == "__main__":
    address, model, images, output = sys.argv[1:]
    options = darktrt.CalibrationOptions(bias_images=8, fp_layer_images=4)
    darktrt.calibrate(model, [images], output, options, cluster=Slow(Cluster(address, workers=1)))
