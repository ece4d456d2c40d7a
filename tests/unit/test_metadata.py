"""The metadata of a detector: what it may hold, what it says of inputs, and its way through JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import Made

from darktrt.errors import DarktrtError
from darktrt.metadata import (
    IMAGE_SIZES,
    DetectorInfo,
    HeadInfo,
    NmsInfo,
    Thresholds,
    check_image_sizes,
)

SIZES = ((8, 16), (20, 40), (100, 50))


@pytest.fixture(scope="module")
def info(made: Made) -> DetectorInfo:
    """Ends in NMS: uint8, 96 x 64, 3 classes, batch 1 to 3."""
    return replace(made.info, head="nms", input="uint8", max_detections=20)


# --- what it may hold ---


@pytest.mark.parametrize(("score", "iou"), [(0, 0), (1, 1), (0.25, 0.45)])
def test_thresholds_from_0_to_1(score: float, iou: float) -> None:
    assert str(Thresholds(score, iou)) == f"score threshold {score:g} and IoU threshold {iou:g}"


@pytest.mark.parametrize("value", [-0.01, 1.01, 2, float("nan")])
def test_thresholds_beyond_0_to_1(value: float) -> None:
    with pytest.raises(DarktrtError, match=f"the score threshold is {value:g}; it must be between 0 and 1"):
        Thresholds(value, 0.5)
    with pytest.raises(DarktrtError, match=f"the IoU threshold is {value:g}; it must be between 0 and 1"):
        Thresholds(0.5, value)


@pytest.mark.parametrize("sizes", [((1, 1),) * 3, ((1, 2), (1, 2), (3, 2)), IMAGE_SIZES, SIZES])
def test_image_sizes_in_order(info: DetectorInfo, sizes: Any) -> None:
    check_image_sizes(sizes)
    replace(info, input="image", image_sizes=sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        ((0, 1), (1, 1), (1, 1)),
        ((1, 0), (1, 1), (1, 1)),
        ((2, 1), (1, 1), (3, 3)),
        ((1, 2), (1, 1), (3, 3)),
        ((1, 1), (3, 1), (2, 2)),
        ((1, 1), (1, 3), (2, 2)),
        ((1, 1), (1, 1)),
        ((1, 1),) * 4,
    ],
)
def test_image_sizes_out_of_order(info: DetectorInfo, sizes: Any) -> None:
    with pytest.raises(DarktrtError, match="write smallest, usual and largest image size") as caught:
        check_image_sizes(sizes)
    assert caught.value.argument == "image_sizes"
    with pytest.raises(ValueError, match="the image sizes are"):
        replace(info, input="image", image_sizes=sizes)


def test_sizes_that_hold_where_none_are_named() -> None:
    assert IMAGE_SIZES == ((32, 32), (1280, 720), (4096, 4096)) and Thresholds() == Thresholds(0.25, 0.45)


def head(anchors: Any) -> HeadInfo:
    return HeadInfo("raw", 1, anchors, (0,), 3, 1.0, False, 2, 3)


def test_anchors_are_pairs_above_zero() -> None:
    assert head(((1, 0.5), (0.001, 900))).anchors[1] == (0.001, 900)
    for wrong in ((), ((0, 1),), ((1, 0),), ((1, -1),), ((1, 2), (1,)), ((1, 2), (1, 2, 3)), (("1", 2),), ((1, 2), 3)):
        with pytest.raises(ValueError, match="the anchors are"):
            head(wrong)


def test_kinds_of_nms() -> None:
    assert {NmsInfo(kind).kind for kind in ("plain", "greedynms", "diounms")} and NmsInfo() == NmsInfo("plain", 0.6)
    with pytest.raises(ValueError, match="the NMS kind is 'soft'"):
        NmsInfo("soft")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(({"batch": batch}, "batch is") for batch in ((1, 2), (1, 2, 3, 4), (0, 1, 1), (2, 1, 3), (1, 3, 2))),
        *(({name: 0}, "the input is") for name in ("width", "height", "channels")),
        ({"mish": "soft"}, "the form of Mish is 'soft'"),
        *(
            ({"fixed_thresholds": pair}, "the fixed thresholds are")
            for pair in ((0.5,), (0.5, 0.5, 0.5), (0.5, 1.1), (-0.1, 0.5), ("0", 1))
        ),
        ({"class_names": ("a", "b")}, "there are 2 class names"),
        ({"input": "image"}, "the input form is 'image' and image_sizes is None"),
        ({"image_sizes": SIZES}, "the input form is 'uint8' and image_sizes is"),
    ],
)
def test_metadata_that_no_network_has(info: DetectorInfo, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(info, **change)


def test_metadata_at_its_bounds(info: DetectorInfo) -> None:
    for change in ({"batch": (1, 1, 1)}, {"batch": (2, 3, 3)}, {"width": 1}, {"fixed_thresholds": (0, 1)}, {"channels": 1}):
        replace(info, **change)


# --- what it says of inputs ---


def test_the_input_of_each_form(info: DetectorInfo) -> None:
    forms = {form: replace(info, input=form, image_sizes=SIZES if form == "image" else None) for form in FORMS}
    assert {form: (one.input_shape, one.input_dtype, one.usual_image) for form, one in forms.items()} == {
        "uint8": ((64, 96, 3), "uint8", (96, 64)),
        "float": ((3, 64, 96), "float32", (96, 64)),
        "image": ((-1, -1, 3), "uint8", (20, 40)),
    }
    assert replace(info, channels=1).input_shape == (64, 96, 1)


FORMS: Any = ("uint8", "float", "image")


@pytest.mark.parametrize("head", ["nms", "decode"])
@pytest.mark.parametrize("fixed", [None, (0.25, 0.45)])
def test_thresholds_are_inputs_of_nms_unless_they_are_fixed(info: DetectorInfo, head: Any, fixed: Any) -> None:
    one = replace(info, head=head, fixed_thresholds=fixed)
    takes = head == "nms" and fixed is None
    assert one.takes_thresholds is takes
    inputs = one.threshold_inputs(Thresholds(0.1, 0.2))
    assert set(inputs) == ({"score_threshold", "iou_threshold"} if takes else set())
    if takes:
        expected = {"score_threshold": np.float32([0.1]), "iou_threshold": np.float32([0.2])}
        assert all(inputs[name].dtype == np.float32 and inputs[name] == value for name, value in expected.items())


@pytest.mark.parametrize("head", ["nms", "decode"])
@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
@pytest.mark.parametrize("kind", ["plain", "diounms"])
@pytest.mark.parametrize("form", ["uint8", "image"])
def test_the_size_in_a_letterbox_is_an_input_of_nms_with_a_distance(
    info: DetectorInfo, head: Any, resize: Any, kind: Any, form: Any
) -> None:
    """A model that fits images knows it."""
    sizes = SIZES if form == "image" else None
    one = replace(info, head=head, resize=resize, nms=NmsInfo(kind), input=form, image_sizes=sizes)
    assert one.nms_letterbox is (resize == "letterbox" and kind == "diounms")
    takes = one.nms_letterbox and head == "nms" and form == "uint8"
    assert one.takes_image_size is takes
    inputs = one.other_inputs(3, [(10, 20), (30, 40)], Thresholds())
    assert ("image_size" in inputs) is takes
    if takes:
        assert inputs["image_size"].tolist() == [[10, 20], [30, 40], [10, 20]] and inputs["image_size"].dtype == np.float32


def test_a_batch_is_filled_up_with_its_first_image(info: DetectorInfo) -> None:
    images = np.arange(2, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    static = replace(info, batch=(4, 4, 4), resize="letterbox", nms=NmsInfo("greedynms"))
    inputs = static.model_inputs(images, [(10, 20), (30, 40)], Thresholds(0.1, 0.2))
    assert inputs["images"][:, 0, 0, 0].tolist() == [0, 1, 0, 0]
    assert inputs["image_size"].tolist() == [[10, 20], [30, 40], [10, 20], [10, 20]] and inputs["score_threshold"].shape == (1,)
    for batch in ((2, 2, 2), (1, 2, 3)):
        assert replace(static, batch=batch).model_inputs(images, [(1, 1)] * 2, Thresholds())["images"] is images


def test_thresholds_that_are_fixed_are_those_to_ask_for(info: DetectorInfo) -> None:
    info.check_thresholds(Thresholds(0.7, 0.8))
    fixed = replace(info, fixed_thresholds=(0.25, 0.45))
    fixed.check_thresholds(Thresholds(0.25, 0.45))
    for asked, said in ((Thresholds(0.3, 0.45), "0.3 and 0.45"), (Thresholds(0.25, 0.5), "0.25 and 0.5")):
        with pytest.raises(DarktrtError, match=f"its thresholds are fixed at 0.25 and 0.45, not {said}; ask for those"):
            fixed.check_thresholds(asked)


def test_images_of_the_sizes_that_a_model_accepts(info: DetectorInfo) -> None:
    info.check_image(1, 100_000)
    sized = replace(info, input="image", image_sizes=SIZES)
    for width, height in ((8, 16), (100, 50), (8, 50), (100, 16)):
        sized.check_image(width, height)
    for width, height in ((7, 20), (101, 20), (20, 15), (20, 51)):
        said = f"an image is {width}x{height}, but the model accepts 8x16 to 100x50; scale the image"
        with pytest.raises(DarktrtError, match=said) as caught:
            sized.check_image(width, height)
        assert caught.value.argument == "image_sizes"


def test_bytes_as_the_input_of_each_form(info: DetectorInfo) -> None:
    """Of one network: the pixels behind the input are equal."""
    fitted = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    assert info.images_of_bytes(fitted) is fitted
    floats = replace(info, input="float").images_of_bytes(fitted)
    assert floats.shape == (2, 3, 4, 5) and floats.dtype == np.float32 and floats.flags.c_contiguous
    np.testing.assert_array_equal(floats.transpose(0, 2, 3, 1), fitted / np.float32(255))
    images = replace(info, input="image", image_sizes=SIZES)
    np.testing.assert_array_equal(images.images_of_bytes(fitted), fitted)
    gray = replace(images, channels=1).images_of_bytes(fitted[..., :1])
    np.testing.assert_array_equal(gray, fitted[..., :1].repeat(3, 3))


# --- JSON ---


def test_metadata_comes_back(info: DetectorInfo) -> None:
    whole = replace(info, input="image", image_sizes=SIZES, fixed_thresholds=(0.5, 0.25))
    assert DetectorInfo.from_json(whole.to_json(), "x") == whole
    assert list(json.loads(whole.to_json())) == sorted(json.loads(whole.to_json())), "the same metadata are the same bytes"


@pytest.mark.parametrize("change", [{"heads": []}, {"batch": [1, 2]}, {"width": "96"}, {"color": 1}, {"input": "bytes"}])
def test_damaged_metadata_is_a_sentence(info: DetectorInfo, change: dict[str, Any]) -> None:
    text = json.dumps({**json.loads(info.to_json()), **change})
    with pytest.raises(DarktrtError, match=r"^net\.onnx: the darktrt metadata is damaged \(.+\); convert the network again$"):
        DetectorInfo.from_json(text, "net.onnx")


@pytest.mark.parametrize("digits", ["1" + 400 * "0", "1e999", "NaN"])
def test_numbers_beyond_those_of_a_network_are_a_sentence(info: DetectorInfo, digits: str) -> None:
    text = info.to_json()
    for number in (info.heads[0].anchors[0][0], info.gflops):
        damaged = text.replace(json.dumps(number), digits, 1)
        assert damaged != text
        with pytest.raises(DarktrtError, match=r"^net\.onnx: the darktrt metadata is damaged \([^()]{1,200}\); convert"):
            DetectorInfo.from_json(damaged, "net.onnx")


@pytest.mark.parametrize("text", ["", "[", "[]", "[" * 100_000, pytest.param(" " * (16 << 20) + "{}", id="long")])
def test_what_is_no_metadata_is_a_sentence(text: str) -> None:
    with pytest.raises(DarktrtError, match=r"^net\.onnx: the darktrt metadata is damaged"):
        DetectorInfo.from_json(text, "net.onnx")
