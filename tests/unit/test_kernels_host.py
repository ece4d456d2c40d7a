"""The math of the CUDA kernels on any machine: the host library against the ops' ONNX bodies, torch, and oracles in numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import session
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import (
    LAYOUTS,
    LINEAR,
    UNSUPPORTED,
    Array,
    CImage,
    CNms,
    Detections,
    Fit,
    Format,
    Head,
    Layout,
    Library,
    Nms,
    Shape,
    Yolo,
    build,
    has_compiler,
    scene,
)
from onnx import helper
from oracles import decode64, expected_detections, mish64, overlap

from darktrt.plugins.functions import embed
from darktrt.plugins.ops import (
    DOMAIN,
    FIRST_BODY_OPSET,
    Mish,
    MishAdd,
    MishConcat,
    PlaceBoxes,
    PluginOp,
    Preprocess,
    YoloDecode,
    YoloDetect,
)
from darktrt.vision import images as images_module
from darktrt.vision.images import preprocess

pytestmark = pytest.mark.skipif(not has_compiler(), reason="building the host library needs make and a C++ compiler")

ULP = float(np.finfo(np.float32).eps)
KINDS = ("plain", "greedynms", "diounms")
ANCHORS = ((10.0, 14.0), (23.0, 27.0), (37.0, 58.0))
SMALL = Yolo((Head(ANCHORS, 6, 10, 0, 1.05), Head(ANCHORS[1:], 3, 5)), 4, 160, 96)
NEW_COORDS = Yolo((Head(ANCHORS[:2], 8, 5, 1, 2.0), Head(ANCHORS, 4, 3, 1, 1.1)), 3, 96, 128)
ONE_CLASS = Yolo((Head(ANCHORS[:1], 10, 10, 0, 1.2),), 1, 160, 160)
REGION = Yolo((Head(ANCHORS, 6, 10, kind=1),), 20, 160, 96)
GAUSSIAN = Yolo((Head(ANCHORS, 6, 10, 0, 1.1, 2), Head(ANCHORS[:2], 3, 5, kind=2)), 6, 160, 96)
ALL_KINDS = Yolo(
    (
        Head(ANCHORS, 4, 5, 0, 1.1),
        Head(ANCHORS[:2], 8, 10, kind=1),
        Head(ANCHORS, 3, 4, 0, 1.2, 2),
        Head(ANCHORS[1:], 2, 3, 1, 2.0),
    ),
    5,
    160,
    128,
)
ONE_SOFTMAX = Yolo((Head(ANCHORS, 5, 4, kind=1),), 1, 128, 160)
YOLOS = {
    "v4": SMALL,
    "new_coords": NEW_COORDS,
    "one class": ONE_CLASS,
    "region": REGION,
    "Gaussian": GAUSSIAN,
    "all kinds of heads": ALL_KINDS,
    "region of one class": ONE_SOFTMAX,
}
many = settings(max_examples=100, deadline=None, database=None)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(build("host", tmp_path_factory.mktemp("host")))


@pytest.fixture(scope="module", autouse=True)
def numpy_resizes() -> Iterator[None]:
    """The reference is NumPy, also where the package has the compiled resize."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images_module, "compiled_fit", lambda: None)
        yield


def run_body(op: PluginOp, inputs: list[Array]) -> list[Array]:
    """The op's ONNX body in ONNX Runtime."""
    opset = [helper.make_opsetid("", FIRST_BODY_OPSET), helper.make_opsetid(DOMAIN, 1)]
    node = helper.make_node(op.op_type, list(op.input_names), list(op.output_names), domain=DOMAIN, **op.attributes())
    types = [helper.np_dtype_to_tensor_dtype(array.dtype) for array in inputs]
    ins = [helper.make_tensor_value_info(*v) for v in zip(op.input_names, types, (a.shape for a in inputs), strict=True)]
    outs = [onnx.ValueInfoProto(name=name) for name in op.output_names]
    model = helper.make_model(helper.make_graph([node], "one_node", ins, outs), opset_imports=opset, ir_version=8)
    embed(model)
    made: list[Array] = session(model).run(None, dict(zip(op.input_names, inputs, strict=True)))
    return made


# --- Mish ---


def activations() -> Array:
    special = [
        -3e38,
        -1e4,
        -104.1,
        -103.9,
        -88.8,
        -87.3,
        -20,
        -1.19,
        -1e-3,
        -1e-40,
        -0.0,
        0,
        1e-45,
        1e-30,
        3,
        19.9,
        20.1,
        89,
        3e38,
    ]
    x = np.concatenate([special, np.random.default_rng(0).uniform(-110, 40, 20_000), np.linspace(-8, 8, 5001)])
    return x.astype(np.float32).reshape(1, 5, -1)


def test_mish_is_within_4_ulp(host: Library) -> None:
    x = activations()
    expected = mish64(x)
    found = host.mish(x)[0]
    smallest = np.spacing(np.float32(0))  # exp(x) may err by half of it, which x then multiplies
    assert (np.abs(found - expected) <= 4 * np.spacing(np.abs(expected).astype(np.float32)) + 60.0 * smallest).all()
    np.testing.assert_array_equal(found[x > 20], x[x > 20])


def test_mish_of_what_is_not_finite(host: Library) -> None:
    found = host.mish(np.array([np.nan, np.inf, -np.inf], np.float32).reshape(1, 1, 3))[0]
    np.testing.assert_array_equal(found, np.array([[[np.nan, np.inf, np.nan]]], np.float32))


def test_mish_is_the_bodys_and_torchs(host: Library) -> None:
    x = activations()
    residual, second = np.roll(x, 7, 2), np.concatenate([x[:, 2:], -x[:, :1]], 1)
    options: tuple[tuple[PluginOp, dict[str, Array]], ...] = (
        (Mish(), {}),
        (MishAdd(), {"residual": residual}),
        (MishConcat(), {"second": second}),
    )
    for op, others in options:
        (body,) = run_body(op, [x, *others.values()])
        np.testing.assert_allclose(host.mish(x, **others)[0], body, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(host.mish(x)[0], torch.nn.functional.mish(torch.from_numpy(x)), rtol=1e-6, atol=1e-6)


def test_every_half_is_rounded_correctly(host: Library) -> None:
    """All but those that float32 cannot tell from a tie."""
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    x = x[np.isfinite(x)].reshape(1, 1, -1)
    expected, found = mish64(x), host.mish(x)[0]
    assert (found != expected.astype(np.float16)).mean() < 2e-4
    ulp = np.spacing(np.minimum(np.abs(expected), 65472).astype(np.float16)).astype(np.float64)
    assert (np.abs(found - expected) <= 0.501 * ulp).all()
    special = np.array([np.inf, np.nan, 65504], np.float16).reshape(1, 1, 3)
    np.testing.assert_array_equal(host.mish(special)[0], special)


INT8_SCALES = [(0.05, 0.07, 0.04), (1.0, 0.5, 1.0), (0.031, 1e-3, 0.02), (3.0, 2.0, 0.3), (0.1, 0.1, 0.1), (1e-3, 1e-3, 1e-6)]


def quantized(quotient: Array) -> Array:
    return np.clip(np.rint(quotient), -128, 127).astype(np.int8)


def float_mish(x: Array, scale: float) -> Array:
    return mish64(x.astype(np.float32) * np.float32(scale)).astype(np.float32)


def assert_levels(found: Array, exact: Array) -> None:
    """The nearest levels; where the quotient lies within float32 rounding of halfway, the one or the other."""
    clipped = np.clip(exact, -128, 127)
    assert (np.abs(found - clipped) <= 0.5 + 8 * ULP * np.abs(clipped)).all()


@pytest.mark.parametrize("scales", INT8_SCALES)
def test_int8_levels_are_the_nearest(host: Library, scales: tuple[float, float, float]) -> None:
    """All levels, and all pairs of them with a residual."""
    sx, sr, sy = (np.float64(np.float32(scale)) for scale in scales)
    x, residual = (part.astype(np.int8).reshape(1, 1, -1) for part in np.meshgrid(np.arange(-128, 128), np.arange(-128, 128)))
    found = host.mish(x, scales=scales)[0]
    assert_levels(found, mish64(x * sx) / sy)
    assert_levels(host.mish(x, residual=residual, scales=scales)[0], (mish64(x * sx) + residual * sr) / sy)
    joined = host.mish(x, second=residual, scales=scales)[0]
    assert_levels(joined[:, 1:], mish64(residual * sr) / sy)
    np.testing.assert_array_equal(joined[:, :1], found)


def test_int8_is_what_quantize_linear_does(host: Library) -> None:
    """DequantizeLinear, Mish, QuantizeLinear in float32: ties to even, -128..127. Mish of large x is x, so there are ties."""
    levels = np.arange(-128, 128).astype(np.int8).reshape(1, 1, -1)
    zero = np.zeros_like(levels)
    for scale in (0.5, 1.0):
        expected = quantized(float_mish(levels, 64 * scale) / np.float32(128 * scale))
        np.testing.assert_array_equal(host.mish(levels, scales=(64 * scale, 1, 128 * scale))[0], expected)
        assert {3: 2, 5: 2, 7: 4}.items() <= dict(zip(levels.flat, expected.flat, strict=True)).items()
    added = host.mish(zero, residual=levels, scales=(1, 0.5, 1))[0]
    np.testing.assert_array_equal(added, quantized(levels * np.float32(0.5)))
    np.testing.assert_array_equal(host.mish(zero, residual=levels, scales=(1, 2, 1))[0], quantized(levels * np.float32(2)))


def test_half_to_int8(host: Library) -> None:
    x = np.linspace(-9, 9, 4001).astype(np.float16).reshape(1, 1, -1)
    assert_levels(host.mish(x, dtype=np.int8, scales=(1, 1, 0.06))[0], mish64(x) / np.float64(np.float32(0.06)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_layouts(host: Library, layout: Layout, dtype: Any) -> None:
    """The same numbers wherever they lie; garbage in padding channels comes out as zeros."""
    random = np.random.default_rng(0)
    garbage = 77 if dtype is np.int8 else np.nan
    for channels in (64, 33):
        x, residual = (random.integers(-100, 100, (2, channels, 15)).astype(dtype) for _ in range(2))
        first = x[:, :32]
        for inputs in ({"x": x}, {"x": x, "residual": residual}, {"x": first, "second": x}):
            options: dict[str, Any] = {**inputs, "scales": INT8_SCALES[0]}
            expected, _ = host.mish(**options)
            found, padding = host.mish(**options, layout=layout, padding=garbage)
            np.testing.assert_array_equal(found, expected)
            assert not padding.any()


def test_what_no_kernel_supports(host: Library) -> None:
    shape = Shape(1, 3, 4)
    for x, y in (
        (Format(0, 1, 0, 1), Format(1, 1, 0, 1)),
        (Format(1, 8, 1, 1), Format(1, 16, 1, 1)),
        (Format(2, 1, 0, 1), Format(2, 1, 0, 0)),
        (Format(0, 0, 0, 1), Format(0, 0, 0, 1)),
    ):
        assert host.call("mish", shape, None, x, None, y) == UNSUPPORTED
    for empty in (Shape(0, 3, 4), Shape(1, 0, 4), Shape(1, 3, 0)):
        assert host.call("mish", empty, None, Format(0, 1, 0, 1), None, Format(0, 1, 0, 1)) == 0
    for bad in (Shape(-1, 3, 4), Shape(1, -1, 4), Shape(1, 3, -1)):
        assert host.call("mish", bad, None, Format(0, 1, 0, 1), None, Format(0, 1, 0, 1)) == UNSUPPORTED
    slots = Format(1, 16, 0, 1)
    assert host.call("mish_concat", shape, None, slots, None, slots, 16, None, slots) == UNSUPPORTED
    assert host.mish(np.zeros((0, 3, 4), np.float32), layout=LINEAR)[0].size == 0


EMPTY = Shape(0, 3, 4)
"""Of no image: a function says whether it supports the formats, and reads nothing."""


@pytest.mark.parametrize("kind", range(-1, 5))
def test_types_that_mish_supports(host: Library, kind: int) -> None:
    """float, half and INT8 to themselves, and half to INT8; never the uint8 of images."""
    for y_kind in range(-1, 5):
        supported = (kind == y_kind and kind in (0, 1, 2)) or (kind, y_kind) == (1, 2)
        x, y = Format(kind, 4, 0, 1), Format(y_kind, 4, 0, 1)
        assert host.call("mish", EMPTY, None, x, None, y) == (0 if supported else UNSUPPORTED)
        assert host.call("mish_add", EMPTY, None, x, None, x, None, y) == (0 if supported else UNSUPPORTED)
        if kind != y_kind:
            assert host.call("mish_add", EMPTY, None, x, None, y, None, x) == UNSUPPORTED, "of the residual"


def test_layouts_that_mish_supports(host: Library) -> None:
    """One for all tensors; any number but 0 says that channels are last."""
    last = Format(1, 8, 1, 1)
    for other, status in (
        (Format(1, 8, 1, 1), 0),
        (Format(1, 8, 2, 1), 0),
        (Format(1, 8, 0, 1), UNSUPPORTED),
        (Format(1, 4, 1, 1), UNSUPPORTED),
        (Format(1, -8, 1, 1), UNSUPPORTED),
    ):
        assert host.call("mish", EMPTY, None, last, None, other) == status
        assert host.call("mish", EMPTY, None, other, None, last) == status
        assert host.call("mish_add", EMPTY, None, last, None, other, None, last) == status
    assert host.call("mish", EMPTY, None, Format(1, -8, 1, 1), None, Format(1, -8, 1, 1)) == UNSUPPORTED


@pytest.mark.parametrize(
    ("scale", "supported"),
    [(2.0**-40, True), (2.0**40, True), (2.0**-41, False), (2.0**41, False), (0, False), (-1, False), (np.nan, False)],
)
def test_scales_from_2_to_the_minus_40_to_2_to_the_40(host: Library, scale: float, supported: bool) -> None:
    """Where quotients of them stay normal floats. Other types have no scale."""
    status, good = 0 if supported else UNSUPPORTED, Format(2, 1, 0, 1)
    odd = Format(2, 1, 0, scale)
    assert host.call("mish", EMPTY, None, odd, None, good) == host.call("mish", EMPTY, None, good, None, odd) == status
    assert host.call("mish_add", EMPTY, None, good, None, odd, None, good) == status
    assert host.call("mish", EMPTY, None, Format(1, 1, 0, scale), None, Format(1, 1, 0, scale)) == 0


# --- decode ---


def op_fields(yolo: Yolo) -> dict[str, Any]:
    return {
        "anchors": tuple(size for head in yolo.heads for anchor in head.anchors for size in anchor),
        "anchors_per_head": tuple(len(head.anchors) for head in yolo.heads),
        "scale_x_y": tuple(head.scale_x_y for head in yolo.heads),
        "new_coords": tuple(head.new_coords for head in yolo.heads),
        "head_kinds": tuple(head.kind for head in yolo.heads),
        "classes": yolo.classes,
        "input_size": (yolo.width, yolo.height),
    }


@pytest.mark.parametrize("name", YOLOS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_decode_is_the_bodys_and_the_formula(host: Library, name: str, dtype: Any) -> None:
    yolo = YOLOS[name]
    heads = scene(yolo, 2, 0, 0.2, dtype)
    found = host.decode(yolo, heads)
    for mine, theirs in zip(found, run_body(YoloDecode(**op_fields(yolo)), [h.astype(np.float32) for h in heads]), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6 * max(1, np.abs(theirs).max()))
    for mine, theirs in zip(found, decode64(yolo, heads), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-6, atol=1e-6 * max(1, np.abs(theirs).max()))


@st.composite
def yolos(draw: st.DrawFn) -> Yolo:
    """Any numbers of heads, anchors, cells and classes."""
    size = st.integers(1, 7)
    side = st.floats(1, 100, width=32)
    heads = []
    for _ in range(draw(st.integers(1, 3))):
        anchors = tuple(draw(st.lists(st.tuples(side, side), min_size=1, max_size=4)))
        scale = draw(st.sampled_from([1.0, 1.05, 1.2, 2.0]))
        new_coords, kind = draw(st.sampled_from([(0, 0), (1, 0), (0, 1), (0, 2)]))
        heads.append(Head(anchors, draw(size), draw(size), new_coords, scale, kind))
    return Yolo(tuple(heads), draw(st.integers(1, 6)), draw(st.integers(32, 640)), draw(st.integers(32, 640)))


@many
@given(yolo=yolos(), batch=st.integers(1, 3), seed=st.integers(0, 1 << 30))
def test_decode_of_any_heads(host: Library, yolo: Yolo, batch: int, seed: int) -> None:
    heads = scene(yolo, batch, seed, 0.5)
    for mine, theirs in zip(host.decode(yolo, heads), decode64(yolo, heads), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=5e-6, atol=1e-6 * max(1, np.abs(theirs).max()))


def test_a_softmax_of_huge_numbers(host: Library) -> None:
    """No exponential overflows; what is not finite makes no score."""
    yolo = Yolo((Head(ANCHORS[:1], 1, 4, kind=1),), 3, 32, 32)
    raw = np.zeros((1, 8, 1, 4), np.float32)
    raw[0, 4] = 20  # sure of an object
    raw[0, 5:, 0] = np.array([[3e38, 3e38, -3e38], [1000, 999, 0], [-1e4, -1e4, -1e4], [np.inf, 0, 0]], np.float32).T
    _, scores = host.decode(yolo, [raw])
    best = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(scores[0, :3], [[0.5, 0.5, 0], [best, 1 - best, 0], [1 / 3] * 3], rtol=1e-6)
    assert np.isnan(scores[0, 3, 0])
    assert host.detect(yolo, Nms(), [raw], 0.25, 1.0).count[0] == 7
    half = [raw.clip(-6e4, 6e4).astype(np.float16)]
    np.testing.assert_array_equal(host.decode(yolo, half)[1], host.decode(yolo, [half[0].astype(np.float32)])[1])


# --- detection ---


def assert_same(found: Detections, expected: Detections) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def check_detections(host: Library, yolo: Yolo, nms: Nms, heads: list[Array], *numbers: Any) -> Detections:
    """Against the oracle, whose input is the host library's decode: equal to the bit."""
    found = host.detect(yolo, nms, heads, *numbers)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same(found, expected_detections(yolo, nms, *host.decode(yolo, heads), *numbers))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", YOLOS)
@pytest.mark.parametrize("letterbox", [False, True])
def test_detections_are_the_bodys(host: Library, name: str, kind: Any, letterbox: bool) -> None:
    yolo, heads = YOLOS[name], scene(YOLOS[name], 2, 1, 0.3)
    sizes = np.array([[160.0, 70.0], [40.0, 96.0]], np.float32) if letterbox and kind != "plain" else None
    own = {"kind": kind, "beta": 0.8, "max_candidates": 150, "max_detections": 40}
    op = YoloDetect(**op_fields(yolo), **own, letterbox=int(sizes is not None))
    for thresholds in ((0.25, 0.45), (0.01, 0.2), (0.9999, 0.5)):
        numbers = [np.array([value], np.float32) for value in thresholds]
        body = run_body(op, [*heads, *numbers, *([] if sizes is None else [sizes])])
        found = check_detections(host, yolo, Nms(**own), heads, *thresholds, sizes)
        np.testing.assert_array_equal(found.count[:, None], body[0])
        np.testing.assert_allclose(found.boxes, body[1], rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(found.scores, body[2], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(found.classes, body[3])


@many
@given(
    yolo=yolos(),
    batch=st.integers(1, 2),
    seed=st.integers(0, 1 << 30),
    kind=st.sampled_from(KINDS),
    thresholds=st.tuples(st.sampled_from([-1.0, 0.0, 0.001, 0.05, 0.3, 0.9, 1.0]), st.floats(-0.5, 1)),
    room=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    coarse=st.booleans(),
    letterbox=st.booleans(),
    special=st.sampled_from([0.0, 0.1]),
)
def test_detections_of_any_heads(
    host: Library,
    yolo: Yolo,
    batch: int,
    seed: int,
    kind: str,
    thresholds: tuple[float, float],
    room: tuple[int, int],
    coarse: bool,
    letterbox: bool,
    special: float,
) -> None:
    """Also few different values, so that many scores are equal, and NaN and infinity, which make no box."""
    random, heads = np.random.default_rng(seed), scene(yolo, batch, seed, 0.3)
    for head in heads:
        if coarse:
            head[...] = np.round(head)
        odd = random.random(head.shape) < special
        head[odd] = random.choice(np.array([np.nan, np.inf, -np.inf, 90, -90, 3e38, -3e38], np.float32), int(odd.sum()))
    sizes = random.uniform(20, 500, (batch, 2)).astype(np.float32) if letterbox else None
    nms = Nms(kind, float(random.uniform(0.3, 2)), max(room), min(room))
    found = check_detections(host, yolo, nms, heads, *thresholds, sizes)
    assert np.isfinite(found.boxes).all() and not np.isnan(found.scores).any()


def test_equal_scores_come_by_index(host: Library) -> None:
    heads = [np.zeros(shape, np.float32) for shape in SMALL.shapes(2)]
    found = check_detections(host, SMALL, Nms("plain", 0.6, 10, 7), heads, 0.2, 0.99)
    np.testing.assert_array_equal(found.classes, [[0, 1, 2, 3, 0, 1, 2]] * 2)
    assert (found.scores == 0.25).all()


@pytest.mark.parametrize("kind", KINDS)
def test_overlap_just_over_and_just_under_the_threshold(host: Library, kind: str) -> None:
    """Two boxes of 16 x 8, 8 apart: an IoU of 1/3. An overlap equal to the threshold does not suppress."""
    yolo = Yolo((Head(((16.0, 8.0),), 1, 2, 1),), 1, 16, 8)
    raw = np.array([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.9, 0.8], [1, 1]], np.float32).reshape(1, 6, 1, 2)
    nms = Nms(kind, 0.8)
    boxes = host.decode(yolo, [raw])[0][0]
    (exact,) = overlap(boxes[:1], boxes[1], nms, np.array([16, 8], np.float32))
    if kind == "plain":
        assert exact == np.float32(1 / 3)
    for threshold, count in ((exact, 2), (np.nextafter(exact, np.float32(-1)), 1), (np.nextafter(exact, np.float32(1)), 2)):
        assert host.detect(yolo, nms, [raw], 0.1, float(threshold)).count[0] == count


def test_boxes_without_area_suppress_nothing(host: Library) -> None:
    """However small a box is, with an area it does."""
    yolo = Yolo((Head(((16.0, 8.0), (16.0, 8.0)), 1, 1, 1),), 1, 16, 8)
    for size, count in ((0, 2), (1e-3, 1)):
        raw = np.array([0, 0, size, size, 1, 1] * 2, np.float32).reshape(1, 12, 1, 1)
        for kind in KINDS:
            assert host.detect(yolo, Nms(kind), [raw], 0.1, 0.5 if size else 0.0).count[0] == count


def test_no_anchor_no_image_and_what_is_not_supported(host: Library) -> None:
    empty = Yolo((Head(ANCHORS, 0, 4),), 2, 32, 32)
    assert host.detect(empty, Nms(), [np.zeros(shape, np.float32) for shape in empty.shapes(2)], -1.0).count.tolist() == [0, 0]
    assert host.detect(SMALL, Nms(), [np.zeros(shape, np.float32) for shape in SMALL.shapes(0)]).count.size == 0
    heads = [np.zeros(shape, np.float32) for shape in SMALL.shapes(1)]
    for nms in (Nms(max_candidates=3841), Nms(max_candidates=5, max_detections=6), Nms("diounms", 0.0)):
        with pytest.raises(AssertionError, match="returned -1"):
            host.detect(SMALL, nms, heads)


@pytest.mark.parametrize(
    ("nms", "supported"),
    [
        (Nms(max_candidates=3840, max_detections=3840), True),
        (Nms(max_candidates=3841), False),
        (Nms(max_candidates=1, max_detections=1), True),
        (Nms(max_candidates=5, max_detections=6), False),
        (Nms(max_candidates=0, max_detections=0), False),
        (Nms(max_candidates=5, max_detections=0), False),
        (Nms("diounms", 1e-3), True),
        (Nms("diounms", -1.0), False),
        (Nms("plain", 0.0), True),
    ],
)
def test_limits_of_nms(host: Library, nms: Nms, supported: bool) -> None:
    """The numbers that the plugin documents: 1 to 3840 candidates, and no more detections than that."""
    heads = [np.zeros(shape, np.float32) for shape in SMALL.shapes(1)]
    if supported:
        check_detections(host, SMALL, nms, heads, 0.1, 0.45)
    else:
        with pytest.raises(AssertionError, match="returned -1"):
            host.detect(SMALL, nms, heads, 0.1)


def test_an_unknown_kind_of_nms(host: Library) -> None:
    yolo, number = SMALL.struct(0), host.address(np.zeros(1, np.float32))
    heads, unused = host.addresses([]), [None] * 5
    for kind, status in ((0, 0), (1, 0), (2, UNSUPPORTED), (-1, UNSUPPORTED)):
        nms = CNms(kind, 0.6, 10, 5)
        assert host.call("detect", ctypes.byref(yolo), ctypes.byref(nms), 0, heads, number, number, *unused) == status


GRID = 1 << 13
HALF_OF_ALL = Head(ANCHORS[:1] * 16, GRID, GRID)


@pytest.mark.parametrize(
    ("heads", "classes", "size", "supported"),
    [
        ((Head(ANCHORS, 2, 2),), 1, (1, 1), True),
        ((Head(ANCHORS, 2, 2), Head(ANCHORS, 2, 2, kind=1)), 1, (1, 1), True),
        ((Head(ANCHORS, 2, 2), Head(ANCHORS, 2, 2, kind=2)), 1, (1, 1), True),
        ((Head(ANCHORS, 2, 2), Head(ANCHORS, 2, 2, kind=3)), 1, (1, 1), False),
        ((Head(ANCHORS, 2, 2, kind=-1),), 1, (1, 1), False),
        ((Head(ANCHORS, 2, 2, new_coords=1, kind=1),), 1, (1, 1), False),
        ((Head(ANCHORS, 2, 2, new_coords=1, kind=2),), 1, (1, 1), False),
        ((Head(ANCHORS, 2, 2),), 0, (1, 1), False),
        ((Head(ANCHORS, 2, 2),), 1, (0, 1), False),
        ((Head(ANCHORS, 2, 2),), 1, (1, 0), False),
        ((), 1, (1, 1), False),
        ((Head((), 2, 2),), 1, (1, 1), False),
        ((Head(ANCHORS, 2, 2), Head(ANCHORS, -1, 2)), 1, (1, 1), False),
        ((Head(ANCHORS, 2, 2), Head(ANCHORS, 2, -1)), 1, (1, 1), False),
        ((Head(ANCHORS, 0, 0),), 1, (1, 1), True),
        ((Head(ANCHORS, 1, 1),), 1 << 20, (1, 1), True),
        ((Head(ANCHORS, 1, 1),), (1 << 20) + 1, (1, 1), False),
        ((Head(ANCHORS[:1] * 32, 1, 1),) * 5, 1, (1, 1), True),
        ((Head(ANCHORS, GRID, 1),), 1, (1, 1), True),
        ((Head(ANCHORS, 1, GRID),), 1, (1, 1), True),
        ((Head(ANCHORS, GRID + 1, 1),), 1, (1, 1), False),
        ((Head(ANCHORS, 1, GRID + 1),), 1, (1, 1), False),
        # anchors below 2^31: GRID x GRID cells have 2^26
        ((HALF_OF_ALL, Head(ANCHORS[:1] * 15, GRID, GRID), Head(ANCHORS[:1], GRID, GRID - 1)), 1, (1, 1), True),
        ((HALF_OF_ALL, HALF_OF_ALL), 1, (1, 1), False),
        # anchors times classes below 2^32 - 1 = 15 * (8 * 4369 * 8192 + 4369)
        ((Head(ANCHORS[:1] * 8, 4369, GRID), Head(ANCHORS[:1], 4368, 1)), 15, (1, 1), True),
        ((Head(ANCHORS[:1] * 8, 4369, GRID), Head(ANCHORS[:1], 4369, 1)), 15, (1, 1), False),
    ],
)
def test_limits_of_heads(host: Library, heads: tuple[Head, ...], classes: int, size: tuple[int, int], supported: bool) -> None:
    """Indices of candidates fit into 32 bits. A batch of none says so without reading a head."""
    yolo = Yolo(heads, classes, *size).struct(0)
    assert host.call("decode", ctypes.byref(yolo), 0, host.addresses([]), None, None) == (0 if supported else UNSUPPORTED)
    yolo.batch = -1
    assert host.call("decode", ctypes.byref(yolo), 0, host.addresses([]), None, None) == UNSUPPORTED


def test_more_heads_or_anchors_than_the_structure_holds(host: Library) -> None:
    yolo = Yolo((Head(ANCHORS, 1, 1),) * 5, 1, 1, 1).struct(0)
    yolo.heads = 6
    assert host.call("decode", ctypes.byref(yolo), 0, host.addresses([]), None, None) == UNSUPPORTED
    yolo.heads, yolo.head[4].anchors = 5, 33
    assert host.call("decode", ctypes.byref(yolo), 0, host.addresses([]), None, None) == UNSUPPORTED


# --- images ---

IMAGE_SIZES = ((1, 1), (1, 7), (9, 1), (2, 2), (53, 37), (64, 48), (197, 256), (20, 333), (8192, 3), (5, 4097))
"""Width, height. In float, 196 / 95 * 95 and 255 / 63 * 63 are less than 196 and 255: see taps_at."""
INPUT_SIZES = ((1, 1), (32, 32), (96, 64), (33, 65), (128, 7))


def image_of(width: int, height: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("letterbox", [0, 1])
@pytest.mark.parametrize("size", INPUT_SIZES)
def test_images_are_fitted_as_numpy_does(host: Library, size: tuple[int, int], channels: int, letterbox: int) -> None:
    fit = Fit(*size, channels, letterbox)
    for image in (image_of(*image_size) for image_size in IMAGE_SIZES):
        floats, levels = (
            preprocess(image, *size, channels, "letterbox" if letterbox else "stretch", form)[0] for form in ("float", "uint8")
        )
        for pixels in (image, image.astype(np.float16), image.astype(np.float32)):
            np.testing.assert_array_equal(host.fit(fit, [pixels], np.float32)[0], floats)
            np.testing.assert_array_equal(host.fit(fit, [pixels], np.float16)[0], floats.astype(np.float16))
            np.testing.assert_array_equal(host.fit(fit, [pixels], np.uint8)[0], levels)


SIDES = st.integers(1, 90)


@many
@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.sampled_from((1, 3)), st.integers(0, 1))
def test_images_of_any_size(
    host: Library, image_size: tuple[int, int], size: tuple[int, int], channels: int, letterbox: int
) -> None:
    image = image_of(*image_size)
    expected, _ = preprocess(image, *size, channels, "letterbox" if letterbox else "stretch", "float")
    np.testing.assert_array_equal(host.fit(Fit(*size, channels, letterbox), [image], np.float32)[0], expected)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_images_of_different_sizes_are_fitted_together(host: Library, dtype: Any) -> None:
    images = [image_of(*size, seed) for seed, size in enumerate(IMAGE_SIZES)]
    fit = Fit(96, 64, letterbox=1)
    together = host.fit(fit, images, dtype)
    for image, found in zip(images, together, strict=True):
        np.testing.assert_array_equal(host.fit(fit, [image], dtype)[0], found)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("letterbox", [0, 1])
@pytest.mark.parametrize("size", INPUT_SIZES)
def test_the_body_of_preprocess_computes_the_same(host: Library, size: tuple[int, int], channels: int, letterbox: int) -> None:
    """Two images of each size."""
    fit, op = Fit(*size, channels, letterbox), Preprocess(size, channels, letterbox)
    for image_size in IMAGE_SIZES:
        images = np.stack([image_of(*image_size, seed) for seed in range(2)])
        of_host = host.preprocess(fit, images, np.float32)
        np.testing.assert_array_equal(of_host[0], host.fit(fit, list(images), np.float32))
        for dtype in (np.float16, np.float32):
            for found, expected in zip(run_body(op, [images.astype(dtype)]), of_host, strict=True):
                assert found.dtype == np.float32
                np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("letterbox", [0, 1])
def test_boxes_are_placed_as_numpy_does(host: Library, letterbox: int) -> None:
    random = np.random.default_rng(0)
    for size, image_size in ((a, b) for a in INPUT_SIZES for b in IMAGE_SIZES):
        image = image_of(*image_size)
        _, inner, rows = host.preprocess(Fit(*size, 3, letterbox), image[np.newaxis], np.float32)
        placement = preprocess(image, *size, 3, "letterbox" if letterbox else "stretch", "float")[1]
        np.testing.assert_array_equal(inner, [placement.inner_size])
        boxes = random.uniform(-10, 140, (2, 50, 4)).astype(np.float32)
        boxes[:, -5:] = 0
        placed = host.place_boxes(boxes, rows)
        np.testing.assert_array_equal(placed, run_body(PlaceBoxes(), [boxes, rows])[0])
        expected = np.clip(placement.to_image(boxes.reshape(-1, 4)), 0, [*image_size] * 2).reshape(boxes.shape)
        np.testing.assert_allclose(placed, expected, rtol=1e-6, atol=1e-6 * max(placement.scale_x, placement.scale_y) * 140)
        assert (placed[:, -5:] == 0).all()


def test_what_is_no_image_or_input_is_not_fitted(host: Library) -> None:
    image, y, small = image_of(4, 4), np.zeros(100, np.float32), Fit(2, 2, 3, 1)

    def status(fit: Fit = small, width: int = 4, height: int = 4, kind: int = 3, y_kind: int = 0, pixels: Any = image) -> int:
        address = None if pixels is None else pixels.ctypes.data
        images = (CImage * 1)(CImage(address, width, height))
        return host.call("fit", fit.struct(), 1, images, kind, host.address(y), y_kind)

    assert status() == 0
    for fit in (Fit(0, 2), Fit(2, 0), Fit(2, -1), Fit(2, 2, 2), Fit(2, 2, 3, 2), Fit(2, 2, 3, -1), Fit(2, 2, 0)):
        assert status(fit) == UNSUPPORTED
    for fit, expected in (
        (Fit(1 << 24, 1 << 24), 0),
        (Fit((1 << 24) + 1, 1), UNSUPPORTED),
        (Fit(1, (1 << 24) + 1), UNSUPPORTED),
    ):
        assert host.call("fit", fit.struct(), 0, None, 3, host.address(y), 0) == expected
    assert status(width=0) == status(height=(1 << 24) + 1) == status(pixels=None) == UNSUPPORTED
    assert status(kind=2) == status(y_kind=2) == status(kind=4) == UNSUPPORTED
    batch = small.struct(), 1, CImage(image.ctypes.data, 0, 4), 3, host.address(y), 0, host.address(y), host.address(y)
    assert host.call("preprocess", *batch) == UNSUPPORTED
    assert host.call("fit", small.struct(), 0, None, 3, host.address(y), 0) == 0
    assert host.call("fit", small.struct(), -1, None, 3, host.address(y), 0) == UNSUPPORTED


def test_a_build_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="make host failed"):
        build("host", tmp_path, CXX="false")
