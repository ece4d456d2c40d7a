"""Both ends after surgery: every form of head and input, detections against NumPy, letterboxed NMS, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import (
    EXPORT_TOLERANCE,
    MADE_BODY,
    Array,
    Made,
    as_float,
    batch_of_images,
    conv,
    files_in,
    gaussian,
    head,
    make,
    net,
    region,
    relative_error,
    run,
    section,
    thresholds,
    with_outputs,
)
from onnx import helper

from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY, DetectorInfo, HeadInfo, Thresholds
from darktrt.onnx_file import load_model
from darktrt.plugins.ops import YoloDecode, op_from_node
from darktrt.surgery.outputs import add_outputs
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins, save_model, transform
from darktrt.vision.boxes import nms
from darktrt.vision.detector import NetworkDetector

ANCHORS = 3 * (4 * 6 + 8 * 12)


def form(values: Any) -> dict[str, tuple[str, list[object]]]:
    """Type and shape by name."""
    types = {v.name: onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type).lower() for v in values}
    return {v.name: (types[v.name], [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values}


INPUTS = {"uint8": ("uint8", ["batch", 64, 96, 3]), "float": ("float", ["batch", 3, 64, 96])}
OUTPUTS = {
    "raw": {"head0_raw": ("float", ["batch", 24, 4, 6]), "head1_raw": ("float", ["batch", 24, 8, 12])},
    "decode": {"boxes": ("float", ["batch", ANCHORS, 4]), "scores": ("float", ["batch", ANCHORS, 3])},
    "nms": {
        "num_detections": ("int32", ["batch", 1]),
        "boxes": ("float", ["batch", 50, 4]),
        "scores": ("float", ["batch", 50]),
        "classes": ("int32", ["batch", 50]),
    },
}


@pytest.mark.parametrize("end", OUTPUTS)
@pytest.mark.parametrize("start", INPUTS)
def test_every_form_of_input_and_head(made: Made, start: str, end: str) -> None:
    model = made.transformed(input=start, head=end, max_detections=50)
    result = form(model.graph.input)
    assert result.pop("images") == INPUTS[start]
    limits = {"score_threshold": ("float", [1]), "iou_threshold": ("float", [1])}
    assert result == (limits if end == "nms" else {})
    assert form(model.graph.output) == OUTPUTS[end]
    info = info_of(model)
    assert (info.input, info.head, info.max_detections) == (start, end, 50 if end == "nms" else 0)
    assert [node.op_type for node in model.graph.node if node.domain][-1] == {
        "raw": "MishPlugin",
        "decode": "YoloDecodePlugin",
        "nms": "YoloDetectPlugin",
    }[end]


def info_of(model: onnx.ModelProto) -> DetectorInfo:
    return DetectorInfo.from_json({p.key: p.value for p in model.metadata_props}[METADATA_KEY], "model")


def test_a_static_batch_stays_static(made: Made, tmp_path: Path) -> None:
    static = make(tmp_path, made.cfg.read_text(), batch=(2, 2, 2))
    assert [shape[0] for _, shape in form(static.transformed().graph.output).values()] == [2, 2, 2, 2]


def test_a_file_becomes_a_file(made: Made, tmp_path: Path) -> None:
    report = insert_plugins(made.plain, tmp_path / "portable.onnx", SurgeryOptions())
    assert files_in(tmp_path) == ["portable.onnx"]
    assert (report.mish, report.heads, report.functions) == (6, 2, 2)
    model, info = load_model(tmp_path / "portable.onnx")
    assert info == report.info
    onnx.checker.check_model(model, full_check=True)
    result = run(tmp_path / "portable.onnx", {"images": batch_of_images(info, 1), **thresholds(0.01)})
    assert result["num_detections"].item() > 0


# --- numbers ---


def raw_names(info: DetectorInfo) -> list[str]:
    return [h.tensor for h in info.heads]


def test_bytes_and_floats_lead_to_the_same_bits(made: Made) -> None:
    """x / 255 in float32, by the graph or before it."""
    images = batch_of_images(made.info, 3)
    plain = run(with_outputs(made.model(), raw_names(made.info)), {"images": as_float(images)})
    model = made.transformed(head="raw")
    result = run(model, {"images": images})
    for name in raw_names(made.info):
        assert result[name].tobytes() == plain[name].tobytes()
    levels = np.arange(256, dtype=np.uint8)
    image = np.resize(levels, (1, 64, 96, 3))
    converted = run(with_outputs(model, ["images_float"]), {"images": image})["images_float"]
    assert converted.tobytes() == as_float(image).tobytes()


def logistic(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def decode(raw: Array, h: HeadInfo, size: tuple[int, int]) -> tuple[Array, Array]:
    """One head of one image in double: boxes ``(anchors * rows * columns, 4)`` and scores."""
    fields = raw.astype(np.float64).reshape(len(h.anchors), -1, h.rows, h.columns)
    certainty: Array = np.ones(1)
    if h.kind == "Gaussian_yolo":
        certainty = 1 - logistic(fields[:, 1:8:2]).mean(1, keepdims=True)
        fields = np.concatenate([fields[:, 0:8:2], fields[:, 8:]], 1)
    v = fields if h.new_coords else logistic(fields)
    shift = (h.scale_x_y - 1) / 2
    x = (np.arange(h.columns)[None, None, :] + v[:, 0] * h.scale_x_y - shift) / h.columns * size[0]
    y = (np.arange(h.rows)[None, :, None] + v[:, 1] * h.scale_x_y - shift) / h.rows * size[1]
    sides = (2 * v[:, 2:4]) ** 2 if h.new_coords else np.exp(fields[:, 2:4])
    powers = np.exp(fields[:, 5:] - fields[:, 5:].max(1, keepdims=True))
    classes = powers / powers.sum(1, keepdims=True) if h.kind == "region" else v[:, 5:]
    w, t = (sides[:, k] * np.array(h.anchors)[:, k, None, None] for k in (0, 1))
    boxes = np.stack([x - w / 2, y - t / 2, x + w / 2, y + t / 2], -1).reshape(-1, 4)
    return boxes, (v[:, 4:5] * classes * certainty).transpose(0, 2, 3, 1).reshape(-1, h.classes)


def decode_all(raws: dict[str, Array], info: DetectorInfo, image: int) -> tuple[Array, Array]:
    parts = [decode(raws[h.tensor][image], h, (info.width, info.height)) for h in info.heads]
    return np.concatenate([b for b, _ in parts]), np.concatenate([s for _, s in parts])


NETWORKS = {
    "v4": net(96, 64) + MADE_BODY,
    "plain NMS, one class, one head": net(64, 96) + conv(8, stride=2) + conv(8, stride=4) + head(1, "2,0"),
    "diounms": net() + conv(8, stride=4) + head(nms_kind="diounms", beta_nms=0.3) + section("route", layers=0)
    + conv(8, stride=2) + head(mask="5,4", nms_kind="diounms", beta_nms=0.3),
    "new_coords": net(96, 32) + conv(8, stride=4)
    + head(activation="logistic", new_coords=1, scale_x_y=2.0, nms_kind="greedynms"),
    "both kinds of head": net(64, 64) + conv(8, stride=4) + head(scale_x_y=1.2) + section("route", layers=0)
    + head(mask="3,4", activation="logistic", new_coords=1, scale_x_y=2.0, nms_kind="diounms", beta_nms=0.8),
    "region": net(96, 64) + conv(8, stride=2) + conv(8, stride=4) + region(),
    "Gaussian": net(96, 64) + conv(8, stride=4) + gaussian() + section("route", layers=0)
    + conv(8, stride=2) + gaussian(3, "2"),
    "region beside a yolo": net(96, 64) + conv(8, stride=4) + region() + section("route", layers=0)
    + conv(8, stride=2) + head(),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("network"), NETWORKS[request.param], batch=(1, 3, 3))


def test_decoding_equals_numpy_and_the_plain_file(network: Made) -> None:
    images = as_float(batch_of_images(network.info, 2))
    plain = run(with_outputs(network.model(), raw_names(network.info)), {"images": images})
    result = run(network.transformed(input="float", head="decode"), {"images": images})
    for i in range(2):
        boxes, scores = decode_all(plain, network.info, i)
        assert relative_error(result["boxes"][i], boxes) <= EXPORT_TOLERANCE
        assert relative_error(result["scores"][i], scores) <= EXPORT_TOLERANCE
    for name in ("boxes", "scores"):
        assert relative_error(result[name], plain[name]) <= EXPORT_TOLERANCE


@pytest.mark.parametrize(("score", "iou"), [(0.01, 0.45), (0.002, 0.2), (0.001, 0.7), (0.99, 0.5)])
def test_detections_equal_numpys_of_the_decoded_heads(network: Made, score: float, iou: float) -> None:
    """In a batch of different images."""
    images, info = batch_of_images(network.info, 3), network.info
    decoded = run(network.transformed(head="decode"), {"images": images})
    result = run(network.transformed(), {"images": images, **thresholds(score, iou)})
    rule = (info.nms.kind, info.nms.beta, (info.width, info.height))
    for i in range(3):
        boxes, scores = decoded["boxes"][i], decoded["scores"][i]
        expected = nms(boxes, scores, score, iou, *rule, max_candidates=1000, max_detections=300)
        check_image(result, i, expected)
        if iou == 0.2:
            assert len(expected[1]) < (scores > score).sum(), "something is suppressed"
    assert score < 0.5 or not result["num_detections"].any()


def check_image(result: dict[str, Array], i: int, expected: tuple[Array, Array, Array]) -> None:
    count = int(result["num_detections"][i, 0])
    assert count == len(expected[1])
    for name, array in zip(("boxes", "scores", "classes"), expected, strict=True):
        np.testing.assert_array_equal(result[name][i, :count], array)
        assert not result[name][i, count:].any()


def test_fixed_thresholds_are_no_inputs_and_change_no_detection(made: Made) -> None:
    fixed = made.transformed(thresholds=Thresholds(0.02, 0.3))
    assert [tensor.name for tensor in fixed.graph.input] == ["images"]
    info = load_info(fixed)
    assert info.fixed_thresholds == (0.02, 0.3) and not info.takes_thresholds
    images = {"images": batch_of_images(info, 3)}
    result, expected = run(fixed, images), run(made.transformed(), {**images, **thresholds(0.02, 0.3)})
    assert expected["num_detections"].min() > 0
    for name, array in expected.items():
        np.testing.assert_array_equal(result[name], array, err_msg=name)


def load_info(model: onnx.ModelProto) -> DetectorInfo:
    return DetectorInfo.from_json(next(p.value for p in model.metadata_props if p.key == METADATA_KEY), "model")


def test_detecting_with_other_thresholds_than_the_fixed_ones_is_refused(made: Made) -> None:
    info = load_info(made.transformed(thresholds=Thresholds(0.25, 0.3)))
    with pytest.raises(DarktrtError, match=r"its thresholds are fixed at 0\.25 and 0\.3, not 0\.25 and 0\.45"):
        NetworkDetector(lambda inputs: inputs, info)
    assert NetworkDetector(lambda inputs: inputs, info, 0.25, 0.3)


def test_thresholds_that_cannot_be_fixed() -> None:
    with pytest.raises(DarktrtError, match="a model with head 'decode' has no NMS and so no thresholds"):
        SurgeryOptions(head="decode", thresholds=Thresholds())
    with pytest.raises(DarktrtError, match=r"the IoU threshold is 1\.45; it must be between 0 and 1"):
        SurgeryOptions(thresholds=Thresholds(0.25, 1.45))


@pytest.mark.parametrize("value", [[0.1], [0.1, 2], ["a", 0.1], 0.3])
def test_damaged_fixed_thresholds_in_the_metadata(made: Made, value: Any) -> None:
    text = made.info.to_json().replace('"fixed_thresholds": null', f'"fixed_thresholds": {json.dumps(value)}')
    with pytest.raises(DarktrtError, match=r"metadata is damaged .*thresholds"):
        DetectorInfo.from_json(text, "made.onnx")


def test_limits_of_candidates_and_detections(made: Made) -> None:
    images = batch_of_images(made.info, 2)
    decoded = run(made.transformed(head="decode"), {"images": images})
    result = run(made.transformed(max_candidates=40, max_detections=7), {"images": images, **thresholds(0.001)})
    for i in range(2):
        rule = (made.info.nms.kind, made.info.nms.beta, (96, 64))
        check_image(result, i, nms(decoded["boxes"][i], decoded["scores"][i], 0.001, 0.45, *rule, 40, 7))


# --- letterboxed networks ---


@pytest.fixture(scope="module")
def letterboxed(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("letterboxed")
    return make(folder, net(96, 64, letter_box=1) + MADE_BODY, batch=(1, 3, 3))


def test_a_letterboxed_network_with_a_distance_term_takes_the_images_sizes(letterboxed: Made) -> None:
    model = letterboxed.transformed()
    assert info_of(model).resize == "letterbox"
    assert info_of(model).takes_image_size
    assert form(model.graph.input)["image_size"] == ("float", ["batch", 2])
    images, sizes = batch_of_images(letterboxed.info, 3), [(96, 64), (96, 8), (10, 64)]
    decoded = run(letterboxed.transformed(head="decode"), {"images": images})
    result = run(model, {"images": images, "image_size": np.array(sizes, np.float32), **thresholds(0.001, 0.01)})
    stretched = 0
    for i, size in enumerate(sizes):
        boxes, scores = decoded["boxes"][i], decoded["scores"][i]
        own, other = (nms(boxes, scores, 0.001, 0.01, "greedynms", 0.6, s, 1000, 300) for s in (size, (96, 64)))
        check_image(result, i, own)
        stretched += not np.array_equal(own[1], other[1])
    assert stretched, "the sizes matter"


@pytest.mark.parametrize("options", [{"head": "decode"}, {"head": "raw"}])
def test_without_nms_no_sizes_are_asked_for(letterboxed: Made, options: dict[str, str]) -> None:
    assert list(form(letterboxed.transformed(**options).graph.input)) == ["images"]


def test_plain_nms_needs_no_sizes(tmp_path: Path) -> None:
    made = make(tmp_path, net(letter_box=1) + conv(8, stride=4) + head())
    assert "image_size" not in form(made.transformed().graph.input)


# --- attributes ---


def test_attributes_say_what_the_cfg_says(made: Made) -> None:
    for end, inputs in (("decode", []), ("nms", ["score_threshold", "iou_threshold"])):
        model = made.transformed(head=end, max_candidates=500, max_detections=20)
        *mish, node = [node for node in model.graph.node if node.domain]
        assert {other.op_type for other in mish} == {"MishPlugin"}
        assert list(node.input) == ["head0_raw", "head1_raw", *inputs]
        own = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert own["anchors"] == [22, 16, 30, 35, 50, 44, 6, 9, 11, 8, 14, 20]
        assert own["anchors_per_head"] == [3, 3]
        assert own["scale_x_y"] == pytest.approx([1.05, 1.1])
        assert (own["new_coords"], own["classes"], own["input_size"]) == ([0, 0], 3, [96, 64])
        assert (own["plugin_version"], own["plugin_namespace"]) == (b"1", b"")
        if end == "nms":
            assert (node.name, own["kind"], own["letterbox"]) == ("yolo_detect", b"greedynms", 0)
            assert (own["max_candidates"], own["max_detections"]) == (500, 20)


# --- refusals ---


def test_surgery_is_done_once(made: Made, tmp_path: Path) -> None:
    for end in ("nms", "decode", "raw"):
        insert_plugins(made.plain, tmp_path / "once.onnx", SurgeryOptions(head=end))  # type: ignore[arg-type]
        message = rf"once\.onnx: has plugin nodes already \(head '{end}'\); start from the plain ONNX file of 'darktrt convert'"
        with pytest.raises(DarktrtError, match=message):
            insert_plugins(tmp_path / "once.onnx", tmp_path / "twice.onnx", SurgeryOptions())
    assert files_in(tmp_path) == ["once.onnx"]


def test_the_source_is_not_overwritten(made: Made, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(made.plain.read_bytes())
    with pytest.raises(DarktrtError, match=r"a\.onnx: is given twice"):
        insert_plugins(tmp_path / "a.onnx", tmp_path / "a.onnx", SurgeryOptions())


def other_head(made: Made, **changes: Any) -> DetectorInfo:
    return replace(made.info, heads=(made.info.heads[0], replace(made.info.heads[1], **changes)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensor": "head7_raw"}, "the graph has no tensor 'head7_raw', the head of cfg line 119; convert it again"),
        ({"columns": 9}, r"'head1_raw' is .*'batch', 24, 8, 12.*, but 3 anchors, 3 classes and 9x8 cells of cfg line 119"),
        ({"rows": 9}, r"'head1_raw' is .* need \('N', 24, 9, 12\); convert it again"),
    ],
)
def test_metadata_of_another_network_is_refused(made: Made, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DarktrtError, match=said):
        transform(made.model(), other_head(made, **changes), SurgeryOptions())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_detections": 0}, r"max_detections 0 is not in 1\.\.1000"),
        ({"max_detections": 1001}, r"max_detections 1001 is not in 1\.\.1000"),
        ({"max_candidates": 4000}, r"max_candidates 4000 is not in 1\.\.3840"),
    ],
)
def test_limits_out_of_range_are_refused(made: Made, options: dict[str, int], said: str) -> None:
    with pytest.raises(DarktrtError, match=said):
        made.transformed(**options)


def test_six_heads_are_refused(tmp_path: Path) -> None:
    text = net() + conv(8, stride=4) + section("route", layers=0).join(head() for _ in range(6))
    with pytest.raises(DarktrtError, match="6 heads; between 1 and 5 are supported"):
        make(tmp_path, text).transformed()


def test_a_model_of_somebody_else_is_refused(made: Made, tmp_path: Path) -> None:
    model = made.model()
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "foreign.onnx"))
    with pytest.raises(DarktrtError, match=r"foreign\.onnx: has no darktrt metadata; make it with 'darktrt convert'"):
        load_model(tmp_path / "foreign.onnx")


def test_a_model_whose_weights_lie_elsewhere_is_refused_without_them(made: Made, tmp_path: Path) -> None:
    model = made.model()
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "a.onnx"), save_as_external_data=True, location="a.data", size_threshold=0)
    (tmp_path / "a.data").unlink()
    with pytest.raises(DarktrtError, match=r"a\.onnx: has no darktrt metadata"):
        load_model(tmp_path / "a.onnx")


def test_a_model_that_does_not_pass_the_checker_is_not_written(made: Made, tmp_path: Path) -> None:
    model = made.model()
    model.graph.node[0].op_type = "Konv"
    with pytest.raises(
        DarktrtError, match=r"^made: its graph and its metadata contradict each other \(No Op registered for Konv"
    ):
        save_model(model, made.info, tmp_path / "a.onnx")
    assert files_in(tmp_path) == []


def test_the_decode_node_follows_the_metadata(made: Made) -> None:
    model, _ = transform(made.model(), other_head(made, new_coords=True, scale_x_y=2.0), SurgeryOptions(head="decode"))
    op = op_from_node(model.graph.node[-1])
    assert isinstance(op, YoloDecode)
    assert (op.new_coords, op.scale_x_y) == ((0, 1), pytest.approx((1.05, 2.0)))


# --- outputs of all layers ---


def test_every_layer_can_be_an_output(made: Made, tmp_path: Path) -> None:
    report = insert_plugins(made.plain, tmp_path / "layers.onnx", SurgeryOptions(mark_layers=True))
    assert report.layer_outputs == len({layer.tensor for layer in made.info.layers})
    model, info = load_model(tmp_path / "layers.onnx")
    assert [output.name for output in model.graph.output[:4]] == ["num_detections", "boxes", "scores", "classes"]
    assert {layer.tensor for layer in info.layers} <= {output.name for output in model.graph.output}
    assert all(output.type.tensor_type.shape.dim for output in model.graph.output)
    assert add_outputs(model, {layer.tensor for layer in info.layers}) == 0
