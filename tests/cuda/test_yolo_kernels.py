"""Decode and detection on a GPU, without TensorRT, against the host library: bit for bit, for both use the same arithmetic.

PYTHONPATH=tests:tests/cuda python3 -m pytest --confcutdir=tests/cuda tests/cuda
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device import CudaLibrary
from kernels import YOLOV4_608, Array, Detections, Head, Library, Nms, Yolo, scene
from oracles import decode64, expected_detections

KINDS = ("plain", "greedynms", "diounms")
TYPES = (np.float32, np.float16)
ANCHORS = ((10.0, 14.0), (23.0, 27.0), (37.0, 58.0))
SMALL = Yolo((Head(ANCHORS, 12, 20, 0, 1.05), Head(ANCHORS[1:], 6, 10)), 5, 320, 192)
NEW_COORDS = Yolo((Head(ANCHORS, 26, 26, 1, 2.0), Head(ANCHORS, 13, 13, 1, 2.0)), 20, 416, 416)
ONE_CLASS = Yolo((Head(ANCHORS[:1], 40, 40, 0, 1.2),), 1, 640, 640)
REGION = Yolo((Head(ANCHORS, 13, 13, kind=1),), 80, 416, 416)
GAUSSIAN = Yolo((Head(ANCHORS, 26, 20, 0, 1.1, 2), Head(ANCHORS[:2], 13, 10, kind=2)), 10, 320, 416)
ALL_KINDS = Yolo(
    (
        Head(ANCHORS, 26, 20, kind=1),
        Head(ANCHORS[:2], 13, 10, 1, 2.0),
        Head(ANCHORS, 5, 7, 0, 1.1),
        Head(ANCHORS, 8, 9, kind=2),
    ),
    5,
    320,
    416,
)


def assert_same(found: Detections, expected: Detections) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def compare(cuda: CudaLibrary, host: Library, *arguments: Any, **options: Any) -> Detections:
    found = cuda.detect(*arguments, **options)
    assert_same(found, host.detect(*arguments, **options))
    return found


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("yolo", [YOLOV4_608, SMALL, NEW_COORDS, ONE_CLASS, REGION, GAUSSIAN, ALL_KINDS])
def test_decode(cuda: CudaLibrary, host: Library, yolo: Yolo, dtype: Any) -> None:
    heads = scene(yolo, 3, 0, dtype=dtype)
    heads[0].flat[::1001] = np.nan
    for found, expected in zip(cuda.decode(yolo, heads), host.decode(yolo, heads), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_decode_is_the_formula(cuda: CudaLibrary) -> None:
    for yolo in (SMALL, NEW_COORDS, REGION, GAUSSIAN, ALL_KINDS):
        heads = scene(yolo, 2, 0)
        for found, expected in zip(cuda.decode(yolo, heads), decode64(yolo, heads), strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_those_of_the_sequential_definition(cuda: CudaLibrary, kind: str) -> None:
    for yolo in (SMALL, NEW_COORDS, REGION, GAUSSIAN, ALL_KINDS):
        heads = scene(yolo, 2, 0, 0.1)
        for nms in (Nms(kind, 0.8), Nms(kind, 0.8, 100, 30)):
            expected = expected_detections(yolo, nms, *cuda.decode(yolo, heads), 0.05, 0.4)
            assert_same(cuda.detect(yolo, nms, heads, 0.05, 0.4), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("yolo", [YOLOV4_608, SMALL, NEW_COORDS, ONE_CLASS, REGION, GAUSSIAN, ALL_KINDS])
def test_detections(cuda: CudaLibrary, host: Library, yolo: Yolo, dtype: Any, kind: str) -> None:
    """Scenes with few and thousands of candidates, a batch of 8; also relative to images in letterboxes."""
    heads = scene(yolo, 8, 0, 0.01 if yolo is YOLOV4_608 else 0.1, dtype)
    for score_threshold in (0.9999, 0.25, 0.001):
        for nms in (Nms(kind), Nms(kind, 0.9, 3840, 1000), Nms(kind, 0.6, 65, 64)):
            found = compare(cuda, host, yolo, nms, heads, score_threshold, 0.45)
    sizes = np.random.default_rng(1).uniform(100, 900, (8, 2))
    found = compare(cuda, host, yolo, Nms(kind), heads, 0.01, 0.3, image_size=sizes)
    assert found.count.sum() > 50


def test_batches(cuda: CudaLibrary, host: Library) -> None:
    for batch in (1, 2, 33):
        compare(cuda, host, SMALL, Nms("greedynms"), scene(SMALL, batch, batch), 0.1, 0.5)
    many = [np.zeros((70_000, *shape[1:]), np.float16) for shape in ONE_CELL.shapes(1)]
    many[0][65_534::3, 4] = 9
    found = compare(cuda, host, ONE_CELL, Nms(max_candidates=1, max_detections=1), many, 0.3)
    assert set(np.flatnonzero(found.count)) == set(range(65_534, 70_000, 3))


ONE_CELL = Yolo((Head(ANCHORS[:1], 1, 1),), 1, 32, 32)


def test_nothing(cuda: CudaLibrary, host: Library) -> None:
    """No candidate, no anchor, no image."""
    found = compare(cuda, host, SMALL, Nms(), scene(SMALL, 2, 0), 1.0)
    assert not found.count.any() and not found.boxes.any()
    empty = Yolo((Head(ANCHORS, 0, 7), Head(ANCHORS, 7, 0)), 5, 64, 64)
    heads = [np.zeros(shape, np.float32) for shape in empty.shapes(2)]
    assert not compare(cuda, host, empty, Nms(), heads, -1.0).count.any()
    assert cuda.decode(empty, heads)[0].size == 0
    none = [np.zeros(shape, np.float32) for shape in SMALL.shapes(0)]
    assert cuda.detect(SMALL, Nms(), none).count.size == 0
    partly = Yolo((Head(ANCHORS, 0, 7), Head(ANCHORS, 3, 5)), 5, 64, 64)
    compare(cuda, host, partly, Nms(), scene(partly, 2, 0, 0.3), 0.01)


def test_not_finite(cuda: CudaLibrary, host: Library) -> None:
    for yolo in (SMALL, NEW_COORDS, REGION, GAUSSIAN, ALL_KINDS):
        heads = scene(yolo, 4, 0, 0.2)
        random = np.random.default_rng(0)
        for head in heads:
            places = random.integers(0, head.size, head.size // 20)
            head.flat[places] = random.choice([np.nan, np.inf, -np.inf, 1e4, -1e4, 3e38], places.size)
        for threshold in (0.25, 1e-4, 0.0, -1.0):
            found = compare(cuda, host, yolo, Nms("greedynms"), heads, threshold)
            assert np.isfinite(found.boxes).all() and not np.isnan(found.scores).any()
    assert not cuda.detect(SMALL, Nms(), scene(SMALL, 1, 0), np.nan).count.any()
    compare(cuda, host, SMALL, Nms(), scene(SMALL, 1, 0), 0.1, np.nan)


@pytest.mark.parametrize("max_candidates", [1, 7, 64, 1000, 3840])
def test_more_candidates_than_the_buffer_holds(cuda: CudaLibrary, host: Library, max_candidates: int) -> None:
    """Then each of them is looked at again; the best come out exactly, also among equals."""
    nms = Nms("plain", 0.6, max_candidates, min(max_candidates, 500))
    random = np.random.default_rng(0)
    equal = [np.zeros(shape, np.float32) for shape in NEW_COORDS.shapes(2)]
    few_values = [random.integers(1, 4, shape).astype(np.float32) / 4 for shape in NEW_COORDS.shapes(2)]
    one_image = [np.concatenate([a[:1], b[:1]]) for a, b in zip(few_values, scene(NEW_COORDS, 1, 0), strict=True)]
    signed = [random.normal(0, 1, shape).astype(np.float32) for shape in NEW_COORDS.shapes(2)]
    for heads, threshold in ((equal, -1.0), (few_values, 0.001), (one_image, 0.001), (signed, -10.0)):
        for iou_threshold in (0.1, 2.0):
            compare(cuda, host, NEW_COORDS, nms, heads, threshold, iou_threshold)
    softmax = [random.normal(0, 1, shape).astype(np.float32) for shape in ALL_KINDS.shapes(2)]
    compare(cuda, host, ALL_KINDS, nms, softmax, -10.0, 0.5)


def test_100_000_anchors_of_1_000_classes(cuda: CudaLibrary, host: Library) -> None:
    anchors = tuple((float(10 + i), float(20 + i)) for i in range(10))
    yolo = Yolo((Head(anchors, 100, 100),), 1000, 800, 800)
    (shape,) = yolo.shapes(1)
    heads = [np.zeros(shape, np.float16)]
    found = cuda.detect(yolo, Nms("plain", 0.6, 1000, 300), heads, 0.2, 0.5)
    np.testing.assert_array_equal(found.classes[0], np.arange(300))
    assert found.count[0] == 300 and (found.scores == 0.25).all() and (found.boxes == found.boxes[0, 0]).all()
    raw = heads[0].reshape(10, 1005, 100, 100)
    raw[:, 5:] = -6
    raw[:, 4] = np.random.default_rng(0).normal(-7, 2, (10, 100, 100))
    raw[:, 5:, ::7, ::3] = np.random.default_rng(0).normal(-6, 3, raw[:, 5:, ::7, ::3].shape)
    for threshold in (0.25, 0.02):
        assert compare(cuda, host, yolo, Nms("greedynms"), heads, threshold).count[0] > 0


def test_a_long_chain(cuda: CudaLibrary, host: Library) -> None:
    """Each box suppresses the next alone, so every other one stays: 3840 decisions that hang on one another."""
    yolo = Yolo((Head(((40.0, 8.0),), 1, 3840, 1, 1.0),), 1, 3840 * 10, 8)
    raw = np.full(yolo.shapes(1)[0], 0.5, np.float32)
    raw[0, 4, 0] = np.linspace(1, 0.5, 3840)
    raw[0, 5] = 1
    found = compare(cuda, host, yolo, Nms("plain", 0.6, 3840, 3840), [raw], 0.1, 0.55)
    assert found.count[0] == 1920


def test_runs_are_alike(cuda: CudaLibrary) -> None:
    for yolo, threshold in ((YOLOV4_608, 0.001), (NEW_COORDS, 1e-4)):
        heads = scene(yolo, 8, 3, 0.3)
        first = cuda.detect(yolo, Nms("greedynms"), heads, threshold)
        for _ in range(20):
            assert_same(cuda.detect(yolo, Nms("greedynms"), heads, threshold), first)


class Call:
    """A call of detect whose memory stays."""

    def __init__(self, cuda: CudaLibrary, yolo: Yolo, nms: Nms, heads: list[Array]) -> None:
        batch, k = heads[0].shape[0], nms.max_detections
        self.cuda, self.yolo, self.nms = cuda, yolo.struct(batch), nms.struct()
        self.heads = [cuda.upload(head) for head in heads]
        self.thresholds = [cuda.upload(np.array([value], np.float32)) for value in (0.25, 0.45)]
        shapes = ((batch,), np.int32), ((batch, k, 4), np.float32), ((batch, k), np.float32), ((batch, k), np.int32)
        self.outputs = [cuda.output(shape, dtype) for shape, dtype in shapes]
        self.addresses = cuda.addresses(self.heads)
        self.work = cuda.workspace(self.yolo, self.nms)
        self.kept = cuda.kept

    def __call__(self) -> None:
        address, structs = self.cuda.address, (ctypes.byref(self.yolo), ctypes.byref(self.nms))
        numbers = [address(number) for number in (*self.thresholds, None)]
        outputs = [address(output[0]) for output in self.outputs]
        self.cuda.checked("detect", *structs, 0, self.addresses, *numbers, *outputs, *self.work)

    def results(self) -> Detections:
        return Detections(*(self.cuda.result(output) for output in self.outputs))


def test_cuda_graph(cuda: CudaLibrary, host: Library) -> None:
    """Captured once; the thresholds are read when it runs."""
    heads = scene(YOLOV4_608, 2, 5)
    call = Call(cuda, YOLOV4_608, Nms("greedynms"), heads)
    graph = torch.cuda.CUDAGraph()
    cuda.stream.synchronize()
    with torch.cuda.graph(graph, stream=cuda.stream):
        call()
    for score_threshold, iou_threshold in ((0.25, 0.45), (0.001, 0.6), (0.5, 0.1)):
        with torch.cuda.stream(cuda.stream):
            for memory, value in zip(call.thresholds, (score_threshold, iou_threshold), strict=True):
                memory.copy_(torch.from_numpy(np.array([value], np.float32).view(np.uint8)))
            graph.replay()
        assert_same(call.results(), host.detect(YOLOV4_608, Nms("greedynms"), heads, score_threshold, iou_threshold))


def test_streams_at_once(kernels_file: Path, host: Library) -> None:
    libraries = [CudaLibrary(kernels_file) for _ in range(4)]
    scenes = [scene(YOLOV4_608, 4, seed, 0.05) for seed in range(4)]
    calls = [Call(library, YOLOV4_608, Nms(), heads) for library, heads in zip(libraries, scenes, strict=True)]
    torch.cuda.synchronize()
    for _ in range(20):
        for call in calls:
            call()
    for call, heads in zip(calls, scenes, strict=True):
        assert_same(call.results(), host.detect(YOLOV4_608, Nms(), heads))


def test_nothing_waits_for_the_default_stream(cuda: CudaLibrary, host: Library) -> None:
    heads = scene(SMALL, 2, 0)
    call = Call(cuda, SMALL, Nms(), heads)
    call()  # loads the kernels, which waits for all streams
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    busy.record()
    call()
    cuda.stream.synchronize()
    assert not busy.query(), "the call waited for the default stream"
    busy.synchronize()
    assert_same(call.results(), host.detect(SMALL, Nms(), heads))
