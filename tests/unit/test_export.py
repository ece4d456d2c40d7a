"""plain.onnx: its form, its metadata, its batches and sizes; numbers layer by layer are in test_model.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import (
    EXPORT_TOLERANCE,
    MADE_BODY,
    MADE_CFG,
    MADE_MISH,
    Made,
    as_float,
    batch_of_images,
    conv,
    files_in,
    head,
    make,
    net,
    region,
    relative_error,
    run,
    section,
    with_outputs,
    yolo,
)

from darktrt.convert.cfg import read_cfg
from darktrt.convert.export import convert_darknet
from darktrt.convert.model import load_darknet
from darktrt.convert.shapes import gflops
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.metadata import IMAGE_SIZES, METADATA_KEY, DetectorInfo, Thresholds

ALLOWED = {
    *("Conv", "LeakyRelu", "Softplus", "Tanh", "Mul", "Add", "Concat", "MaxPool", "Slice", "Split", "Resize", "Sigmoid"),
    *("Exp", "Reshape", "Transpose", "Sub", "Div", "Pow"),
}
"""What a network of convolutions, pools, routes, shortcuts and heads is made of: nothing that computes shapes."""


def test_the_file_is_a_checked_model_of_opset_17(made: Made) -> None:
    model = onnx.load(str(made.plain))
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    assert not model.functions
    assert model.graph.name == "made"


def test_nothing_computes_shapes(made: Made) -> None:
    model = onnx.load(str(made.plain))
    kinds = {node.op_type for node in model.graph.node}
    assert kinds <= ALLOWED, kinds - ALLOWED
    assert "BatchNormalization" not in kinds
    assert sum(node.op_type == "Softplus" for node in model.graph.node) == MADE_MISH


def test_inputs_and_outputs(made: Made) -> None:
    graph = onnx.load(str(made.plain)).graph
    found = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}
    anchors = 3 * (4 * 6 + 8 * 12)
    assert found == {"images": ["batch", 3, 64, 96], "boxes": ["batch", anchors, 4], "scores": ["batch", anchors, 3]}
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}


def test_heads_and_layers_have_names(made: Made) -> None:
    names = [layer.tensor for layer in made.info.layers]
    outputs = run(with_outputs(made.model(), dict.fromkeys(names)), {"images": as_float(batch_of_images(made.info, 2))})
    model = load_darknet(made.cfg, made.weights)
    with torch.inference_mode():
        images = torch.from_numpy(as_float(batch_of_images(made.info, 2)))
        layers = model.run(images, set(range(len(names))))
    for layer in made.info.layers:
        if layer.kind != "yolo":
            assert relative_error(outputs[layer.tensor], layers[layer.index].numpy()) <= EXPORT_TOLERANCE
    assert [h.tensor for h in made.info.heads] == ["head0_raw", "head1_raw"]
    assert [outputs[h.tensor].shape for h in made.info.heads] == [(2, 24, 4, 6), (2, 24, 8, 12)]


def test_the_file_equals_the_module(made: Made) -> None:
    images = as_float(batch_of_images(made.info, 3))
    found = run(made.plain, {"images": images})
    with torch.inference_mode():
        boxes, scores = load_darknet(made.cfg, made.weights)(torch.from_numpy(images))
    assert relative_error(found["boxes"], boxes.numpy()) <= EXPORT_TOLERANCE
    assert relative_error(found["scores"], scores.numpy()) <= EXPORT_TOLERANCE


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_dynamic_batch_equals_a_static_one(made: Made, tmp_path: Path, count: int) -> None:
    convert_darknet(made.cfg, made.weights, tmp_path / "static.onnx", batch=(count, count, count))
    dimensions = onnx.load(str(tmp_path / "static.onnx")).graph.input[0].type.tensor_type.shape.dim
    assert dimensions[0].dim_value == count
    images = as_float(batch_of_images(made.info, count))
    dynamic, static = (run(file, {"images": images}) for file in (made.plain, tmp_path / "static.onnx"))
    for name in ("boxes", "scores"):
        np.testing.assert_array_equal(dynamic[name], static[name])


def test_images_of_a_batch_do_not_meet(made: Made) -> None:
    images = as_float(batch_of_images(made.info, 3))
    together = run(made.plain, {"images": images})
    for i in range(3):
        alone = run(made.plain, {"images": images[i : i + 1]})
        for name in ("boxes", "scores"):
            assert relative_error(together[name][i], alone[name][0]) <= EXPORT_TOLERANCE


def test_another_size_than_the_cfgs(made: Made, tmp_path: Path) -> None:
    info = convert_darknet(made.cfg, made.weights, tmp_path / "a.onnx", size=(64, 128))
    assert (info.width, info.height) == (64, 128)
    assert [(h.columns, h.rows) for h in info.heads] == [(4, 8), (8, 16)]
    images = as_float(batch_of_images(info, 1))
    with torch.inference_mode():
        boxes, _ = load_darknet(made.cfg, made.weights, (64, 128))(torch.from_numpy(images))
    assert relative_error(run(tmp_path / "a.onnx", {"images": images})["boxes"], boxes.numpy()) <= EXPORT_TOLERANCE


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts(tmp_path: Path, channels: int) -> None:
    made = make(tmp_path, net(96, 64, channels) + MADE_BODY)
    assert made.info.channels == channels
    images = np.random.default_rng(0).uniform(0, 1, (1, channels, 64, 96)).astype(np.float32)
    assert run(made.plain, {"images": images})["boxes"].shape == (1, 360, 4)


# --- metadata ---


def test_metadata_goes_round(made: Made) -> None:
    properties = {p.key: p.value for p in onnx.load(str(made.plain)).metadata_props}
    assert list(properties) == [METADATA_KEY]
    assert DetectorInfo.from_json(properties[METADATA_KEY], "here") == made.info
    assert made.info.to_json() == properties[METADATA_KEY]


def test_a_region_in_the_metadata(tmp_path: Path) -> None:
    """Its anchors are in pixels there. A head of which nothing else is said is a [yolo]."""
    info = make(tmp_path, net(96, 64) + conv(16, stride=4) + region(4)).info
    (head,) = info.heads
    assert (head.kind, head.line, head.mask, head.channels) == ("region", 22, (0, 1), 18)
    assert head.anchors == pytest.approx(np.array([(4 * 0.57, 4 * 0.68), (4 * 1.87, 4 * 2.06)]))
    assert DetectorInfo.from_json(info.to_json(), "here") == info
    old = DetectorInfo.from_json(info.to_json().replace('"kind": "region", ', "", 1), "here")
    assert old.heads[0].kind == "yolo"


def test_metadata_says_what_the_cfg_says(made: Made) -> None:
    info = made.info
    assert (info.name, info.width, info.height, info.channels, info.batch) == ("made", 96, 64, 3, (1, 3, 3))
    assert (info.resize, info.mish_count, info.input, info.head) == ("stretch", MADE_MISH, "float", "decoded")
    assert info.heads[0].anchors == ((22.0, 16.0), (30.0, 35.0), (50.0, 44.0))
    assert [(h.mask, h.scale_x_y, h.new_coords, h.classes) for h in info.heads] == [
        ((3, 4, 5), 1.05, False, 3),
        ((0, 1, 2), 1.1, False, 3),
    ]
    lines = MADE_CFG.splitlines()
    assert {lines[h.line - 1] for h in info.heads} == {"[yolo]"}
    assert (info.nms.kind, info.nms.beta) == ("greedynms", 0.6)
    assert info.class_names == ("class 0", "class 1", "class 2")
    assert info.parameters == (made.weights.stat().st_size - 20) / 4
    assert info.gflops == round(gflops(read_cfg(made.cfg)), 3)
    assert info.sources == {"cfg": sha256_of(made.cfg), "weights": "random, seed 1"}
    assert [layer.kind for layer in info.layers][-2:] == ["convolutional", "yolo"]


def test_the_weights_file_is_named_by_its_hash(made: Made, tmp_path: Path) -> None:
    info = convert_darknet(made.cfg, made.weights, tmp_path / "a.onnx")
    assert info.sources["weights"] == sha256_of(made.weights)


def test_random_weights_equal_their_file(made: Made, tmp_path: Path) -> None:
    convert_darknet(made.cfg, None, tmp_path / "drawn.onnx", random_weights=1)
    convert_darknet(made.cfg, made.weights, tmp_path / "read.onnx")
    images = as_float(batch_of_images(made.info, 1))
    drawn, read = (run(tmp_path / f"{name}.onnx", {"images": images}) for name in ("drawn", "read"))
    np.testing.assert_array_equal(drawn["boxes"], read["boxes"])


def test_the_asked_size_is_that_from_the_start(tmp_path: Path) -> None:
    """The cfg's own size of 72 x 72 does not fit: the route joins 5 x 5 and 6 x 6."""
    text = conv(4, stride=8) + conv(4, stride=2) + section("upsample", stride=2) + section("route", layers="-1,0") + head()
    (tmp_path / "a.cfg").write_text(net(72, 72) + text)
    (tmp_path / "b.cfg").write_text(net(64, 64) + text)
    with pytest.raises(DarktrtError, match="joins layers of different sizes"):
        convert_darknet(tmp_path / "a.cfg", None, tmp_path / "a.onnx", random_weights=1)
    kept = tmp_path / "a.weights"
    drawn = convert_darknet(tmp_path / "a.cfg", None, tmp_path / "a.onnx", size=(64, 64), random_weights=1, save_weights=kept)
    read = convert_darknet(tmp_path / "a.cfg", kept, tmp_path / "b.onnx", size=(64, 64))
    assert (drawn.width, drawn.height) == (read.width, read.height) == (64, 64)
    convert_darknet(tmp_path / "b.cfg", None, tmp_path / "c.onnx", random_weights=1)
    images = {"images": as_float(batch_of_images(drawn, 1))}
    for other in ("b", "c"):
        np.testing.assert_array_equal(
            run(tmp_path / f"{other}.onnx", images)["boxes"], run(tmp_path / "a.onnx", images)["boxes"]
        )
    assert load_darknet(tmp_path / "a.cfg", kept, (64, 64)).network.width == 64


def test_random_weights_are_the_same_for_every_size(tmp_path: Path) -> None:
    (tmp_path / "a.cfg").write_text(net(160, 160) + conv(4, stride=8) + head())
    for name, size in (("a", None), ("b", (32, 32))):
        convert_darknet(
            tmp_path / "a.cfg",
            None,
            tmp_path / "a.onnx",
            size=size,
            random_weights=1,
            save_weights=tmp_path / f"{name}.weights",
        )
    assert (tmp_path / "a.weights").read_bytes() == (tmp_path / "b.weights").read_bytes()


def test_seeds_are_of_32_bits(tmp_path: Path) -> None:
    (tmp_path / "a.cfg").write_text(net(32, 32) + conv(4, stride=8) + head())
    for seed in (0, 2**32 - 1):
        info = convert_darknet(tmp_path / "a.cfg", None, tmp_path / "a.onnx", random_weights=seed)
        assert info.sources["weights"] == f"random, seed {seed}"
    for seed in (-1, 2**32):
        with pytest.raises(DarktrtError, match=f"the seed of random weights is {seed}; it must lie in 0..4294967295"):
            convert_darknet(tmp_path / "a.cfg", None, tmp_path / "b.onnx", random_weights=seed)
    assert files_in(tmp_path) == ["a.cfg", "a.onnx"]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("cat\ndog\nred fox\n", ("cat", "dog", "red fox")),
        ("\ufeffcat\r\n\r\n  dog \r\nLöwe", ("cat", "dog", "Löwe")),
    ],
)
def test_class_names_from_a_file(made: Made, tmp_path: Path, content: str, names: tuple[str, ...]) -> None:
    (tmp_path / "my.names").write_bytes(content.encode())
    info = convert_darknet(made.cfg, made.weights, tmp_path / "a.onnx", names=tmp_path / "my.names")
    assert info.class_names == names
    text = next(p.value for p in onnx.load(str(tmp_path / "a.onnx")).metadata_props)
    assert DetectorInfo.from_json(text, "").class_names == names


def test_eighty_classes_are_cocos(tmp_path: Path) -> None:
    info = make(tmp_path, net() + conv(8, stride=2) + head(80)).info
    assert len(info.class_names) == 80
    assert (info.class_names[0], info.class_names[16], info.class_names[79]) == ("person", "dog", "toothbrush")


def test_nms_kind_and_beta_are_the_last_heads(tmp_path: Path) -> None:
    first = head(nms_kind="greedynms", beta_nms=0.3)
    text = net() + conv(8, stride=2) + first + section("route", layers=0) + head(nms_kind="diounms", beta_nms=0.7)
    info = make(tmp_path, text).info
    assert (info.nms.kind, info.nms.beta) == ("diounms", 0.7)
    info = make(tmp_path, net() + conv(8, stride=2) + first + section("route", layers=0) + head()).info
    assert info.nms.kind == "plain"


def test_two_heads_on_one_tensor_are_refused(tmp_path: Path) -> None:
    text = net() + conv(8, stride=2) + head() + section("route", layers=1) + yolo()
    with pytest.raises(DarktrtError, match=r"\[yolo\] needs a tensor of its own to read; put a \[convolutional\] before it"):
        make(tmp_path, text)
    assert files_in(tmp_path) == ["made.cfg"]


def test_a_head_that_reads_the_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match="needs a tensor of its own"):
        make(tmp_path, net(channels=24) + yolo())


DAMAGES = [
    ("", "Expecting value"),
    ("{", "Expecting property name"),
    ("[]", "DetectorInfo is"),
    ("null", "DetectorInfo is"),
    ("3", "DetectorInfo is"),
    ('{"colour": 1}', "unknown field 'colour'"),
    ('{"name": "x"}', "missing"),
]


@pytest.mark.parametrize(("text", "said"), DAMAGES)
def test_damaged_metadata_names_the_file(text: str, said: str) -> None:
    with pytest.raises(
        DarktrtError, match=r"my\.onnx: the darktrt metadata is damaged \(.*; convert the network again"
    ) as caught:
        DetectorInfo.from_json(text, "my.onnx")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"width": 96', '"width": "96"', "'width' is '96'"),
        ('"heads": [', '"heads": [[], ', "HeadInfo is"),
        ('"nms": {', '"nms": 3, "x": {', "NmsInfo is 3|unknown field"),
        ('"kind": "greedynms"', '"kinds": "greedynms"', "unknown field 'kinds'"),
        ('"new_coords": false', '"new_coords": "no"', "'new_coords' is 'no'"),
        ('"kind": "yolo"', '"kind": "detection"', "'kind' is 'detection'"),
        ('"mish": "plugin"', '"mish": "both"', "'mish' is 'both'"),
        ('"gflops": ', '"gflops": [], "gflop": ', "'gflops' is|unknown field"),
    ],
)
def test_metadata_of_other_types_is_refused(made: Made, old: str, new: str, said: str) -> None:
    text = made.info.to_json()
    assert old in text
    with pytest.raises(DarktrtError, match=said):
        DetectorInfo.from_json(text.replace(old, new, 1), "my.onnx")


def test_older_metadata_has_a_plugin_node_a_mish(made: Made) -> None:
    text = made.info.to_json()
    assert ', "mish": "plugin"' in text
    assert DetectorInfo.from_json(text.replace(', "mish": "plugin"', ""), "old.onnx") == made.info


def test_older_metadata_has_no_image_sizes(made: Made) -> None:
    text = made.info.to_json()
    assert ', "image_sizes": null' in text
    assert DetectorInfo.from_json(text.replace(', "image_sizes": null', ""), "old.onnx") == made.info


def test_the_image_form_has_images_of_one_size_a_batch(made: Made) -> None:
    info = replace(made.info, input="image", image_sizes=IMAGE_SIZES, head="nms", resize="letterbox", batch=(4, 4, 4))
    assert DetectorInfo.from_json(info.to_json(), "my.onnx") == info
    assert (info.input_shape, info.input_dtype, info.takes_image_size) == ((-1, -1, 3), "uint8", False)
    assert info.nms_letterbox and replace(info, input="uint8", image_sizes=None).takes_image_size
    images = np.arange(2 * 5 * 7 * 3, dtype=np.uint8).reshape(2, 5, 7, 3)
    inputs = info.model_inputs(images, [], Thresholds())
    assert list(inputs) == ["images", "score_threshold", "iou_threshold"]
    assert np.array_equal(inputs["images"], images[[0, 1, 0, 0]])


def test_images_that_an_engine_does_not_accept_are_refused(made: Made) -> None:
    info = replace(made.info, input="image", image_sizes=((32, 24), (64, 64), (640, 480)))
    for width, height in ((32, 24), (640, 480)):
        info.check_image(width, height)
        made.info.check_image(1, 1)
    for width, height in ((31, 24), (32, 23), (641, 480), (640, 481)):
        with pytest.raises(DarktrtError, match=f"an image is {width}x{height}, but the model accepts 32x24 to 640x480"):
            info.check_image(width, height)


@pytest.mark.parametrize(
    ("form", "sizes"),
    [("image", "null"), ("uint8", "[[1, 1], [2, 2], [3, 3]]"), ("image", "[[1, 1], [2, 4], [3, 3]]"), ("image", "[[1, 1]]")],
)
def test_impossible_image_sizes_are_refused(made: Made, form: str, sizes: str) -> None:
    text = made.info.to_json().replace('"input": "float"', f'"input": "{form}"')
    with pytest.raises(DarktrtError, match=r"image_sizes|the image sizes are"):
        DetectorInfo.from_json(text.replace('"image_sizes": null', f'"image_sizes": {sizes}'), "my.onnx")


def test_metadata_without_heads_is_refused(made: Made) -> None:
    text = made.info.to_json()
    start, end = text.index('"heads": ['), text.index('"height"')
    with pytest.raises(DarktrtError, match="it has no heads"):
        DetectorInfo.from_json(text[:start] + '"heads": [], ' + text[end:], "my.onnx")
