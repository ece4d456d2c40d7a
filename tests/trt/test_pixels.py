"""From images to detections on a real TensorRT: images fitted by the kernel of the plugin library, and by the engine itself.

Needs onnx, onnx-graphsurgeon, pillow and numpy beside TensorRT, and the plugin library, which DARKTRT_PLUGINS names or
``darktrt plugins`` has compiled:

    PYTHONPATH=. python -m pytest --confcutdir=tests/trt tests/trt/test_pixels.py

DARKTRT_TACTIC_SOURCES is given to every build, as ``--tactic-sources`` is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from test_int8 import model

from darktrt.cuda import Buffer, DeviceImage, Driver, Stream
from darktrt.engine.build import build_file
from darktrt.engine.options import BuildOptions
from darktrt.engine.runtime import PlanRunner
from darktrt.engine.target import gpu_name, installed_version
from darktrt.errors import DarktrtError
from darktrt.plugins.library import find_library
from darktrt.surgery.rewrite import SurgeryOptions, save_model, transform
from darktrt.vision.detector import NetworkDetector, fit

pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(installed_version("trt") is None, reason="TensorRT is not installed"),
    pytest.mark.skipif(find_library() is None, reason="there is no plugin library (darktrt plugins)"),
    pytest.mark.skipif(gpu_name() is None, reason="no NVIDIA GPU is usable here"),
]

SIZES = ((640, 480), (1, 1), (1, 77), (500, 1), (2, 2), (128, 128), (129, 127), (1921, 1081), (97, 603))
SCORE = 0.3
Build = Callable[..., Path]


def frame(width: int, height: int) -> Any:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds a plan of the input form, resize policy and precision, once each."""
    folder = tmp_path_factory.mktemp("pixels")

    def build(form: Any, policy: Any = "stretch", precision: Any = "fp32") -> Path:
        plan = folder / f"{form}-{policy}-{precision}.plan"
        if not plan.exists():
            plain, info = model("N")
            plain.graph.value_info.append(plain.graph.output[0])
            plain.graph.node.append(helper.make_node("Identity", [plain.graph.output[0].name], ["decoded"]))
            plain.graph.output[0].name = "decoded"  # as in an exported model, where heads are inner tensors
            sizes = ((1, 1), (640, 480), (2000, 1200)) if form == "image" else None
            surgery = SurgeryOptions(input=form, **({"image_sizes": sizes} if sizes else {}))
            made, report = transform(plain, replace(info, head="decoded", resize=policy), surgery)
            save_model(made, report.info, plan.with_suffix(".onnx"))
            sources = os.environ.get("DARKTRT_TACTIC_SOURCES")
            options = BuildOptions(precision, "trt", None, sources, 1, timing_cache=folder / "timing.cache", tf32=False)
            build_file(plan.with_suffix(".onnx"), plan, options)
        return plan

    return build


def rows(detections: Any) -> Any:
    return detections.to_rows()


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("policy", ["stretch", "letterbox"])
@pytest.mark.parametrize("form", ["float", "uint8"])
def test_the_gpu_fits_images_bit_for_bit(build: Build, form: str, policy: str, graph: bool) -> None:
    """The outputs for images of many sizes are those for what NumPy fits."""
    frames = [frame(*size) for size in SIZES[:8]]
    with PlanRunner(build(form, policy), cuda_graph=graph) as runner:
        assert runner.fits_frames
        inputs = runner.info.threshold_inputs(NetworkDetector(runner, runner.info, SCORE).thresholds)
        fitted = np.stack([fit(image, runner.info)[0] for image in frames])
        expected = {name: values.copy() for name, values in runner.run({"images": fitted, **inputs}).items()}
        assert expected["num_detections"].sum() > len(frames)
        for _ in range(3):
            runner.submit(frames, inputs)
            actual = runner.collect()
            for name, values in expected.items():
                assert np.array_equal(actual[name], values)


@pytest.mark.parametrize("form", ["float", "image"])
def test_overlapping_batches_change_no_detection(build: Build, form: str) -> None:
    """Images of all sizes, in batches of several sizes, as one after the other alone."""
    frames = [frame(*size) for size in SIZES] * 4
    batches = [frames[0:8], frames[8:9], frames[9:16], frames[16:19], frames[19:27], frames[27:]]
    batches[-1:] = [batches[-1][:8], batches[-1][8:]]
    with PlanRunner(build(form), cuda_graph=True) as runner:
        detector = NetworkDetector(runner, runner.info, SCORE)
        alone = [rows(detector.detect([image])[0]) for image in frames]
        together = [rows(one) for batch in detector.detect_batches(batches) for one in batch]
    assert sum(map(len, alone)) > len(frames)
    assert [len(one) for one in together] == [len(one) for one in alone]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)  # another batch size may run other kernels


@pytest.mark.parametrize("policy", ["stretch", "letterbox"])
def test_an_engine_that_takes_images_detects_what_one_that_takes_floats_does(build: Build, policy: str) -> None:
    frames = [frame(*size) for size in SIZES]
    with PlanRunner(build("float", policy)) as floats, PlanRunner(build("image", policy)) as whole:
        expected, actual = (NetworkDetector(runner, runner.info, SCORE).detect(frames) for runner in (floats, whole))
    assert sum(map(len, expected)) > len(frames)
    for one, other in zip(actual, expected, strict=True):
        assert len(one) == len(other)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("precision", ["fp16"])
def test_half_precision_keeps_the_boxes_of_large_images(build: Build, precision: str) -> None:
    """Boxes in pixels of an image of 1921x1081 have more digits than FP16 holds."""
    image = frame(1921, 1081)
    with PlanRunner(build("image", "stretch", precision)) as runner:
        (detections,) = NetworkDetector(runner, runner.info, SCORE).detect([image])
    values = detections.boxes[(detections.boxes > 1024) & (detections.boxes < 1920)]
    assert len(values) > 3 and not np.array_equal(values, values.astype(np.float16).astype(np.float32))


def test_images_in_the_memory_of_the_gpu(build: Build) -> None:
    pixels = frame(333, 222)
    driver = Driver()
    stream, buffer = Stream(driver), Buffer(driver, pixels.size)
    try:
        buffer.array(pixels.shape, pixels.dtype)[...] = pixels
        stream.upload(buffer.address, buffer.array(pixels.shape, pixels.dtype))
        stream.synchronize()
        image = DeviceImage(buffer.address, 333, 222, buffer)
        assert np.array_equal(image.to_host(), pixels)
        for form in ("float", "image"):
            with PlanRunner(build(form)) as runner:
                detector = NetworkDetector(runner, runner.info, SCORE)
                assert np.array_equal(rows(detector.detect([image])[0]), rows(detector.detect([pixels])[0]))
    finally:
        buffer.close()
        stream.close()
        driver.close()


def test_an_image_beyond_the_engines_sizes(build: Build) -> None:
    with PlanRunner(build("image")) as runner:
        detector = NetworkDetector(runner, runner.info, SCORE)
        with pytest.raises(DarktrtError, match="an image is 2001x10, but the model accepts 1x1 to 2000x1200"):
            detector.detect([frame(2001, 10)])
        assert len(detector.detect([frame(640, 480)])) == 1
