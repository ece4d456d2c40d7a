"""Every section and activation that darktrt converts, from images to an INT8 network: no tensor stops a calibration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import Array, made_image, run
from micro import MICRO, Micro, case_of
from PIL import Image

import darktrt
from darktrt.calib.collect import collect
from darktrt.calib.graph import passing_groups, tensors_to_calibrate
from darktrt.convert import cfg
from darktrt.convert.export import convert_darknet
from darktrt.onnx_file import load_model
from darktrt.surgery.qdq import Calibration
from darktrt.surgery.rewrite import SurgeryOptions, save_model, transform

OPTIONS = darktrt.CalibrationOptions(bias_images=1, fp_layer_images=1)
NOISE_TOLERANCE = 0.15
"""Of the raw heads: root mean square of what INT8 changes over that of their values; up to five convolutions, one to four per
cent each, and nine where normalize_channels divides by sums near zero."""


def test_the_networks_have_every_section_and_activation() -> None:
    sections = [one for micro in MICRO.values() for one in micro.sections]
    assert {kind for kind, _ in sections} == set(cfg._PARSERS)
    assert {options.get("activation", "logistic") for kind, options in sections} == {*cfg.ACTIVATIONS, *cfg._ACTIVATION_ALIASES}


def of_images(micro: Micro) -> Micro:
    """The network with channels that images have."""
    channels, height, width = micro.shape
    return micro._replace(shape=(channels if channels in (1, 3) else 3, height, width))


def made(folder: Path, micro: Micro) -> tuple[Path, list[Path]]:
    """A portable ONNX file of the network, and images."""
    case = case_of(folder, micro)
    convert_darknet(case.cfg, case.weights, folder / "plain.onnx")
    darktrt.insert_plugins(folder / "plain.onnx", folder / "portable.onnx")
    _, height, width = micro.shape
    images = [folder / f"{i}.png" for i in range(2)]
    for i, path in enumerate(images):
        Image.fromarray(made_image(height + 9, width + 9, i)).save(path)
    return folder / "portable.onnx", images


def raw_heads(folder: Path, calibration: Calibration | None, images: Array) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The network from floats to raw heads, with or without Q/DQ nodes at all convolutions, and its outputs."""
    model, info = load_model(folder / "plain.onnx")
    model, _ = transform(model, info, SurgeryOptions(head="raw", input="float", calibration=calibration))
    onnx.checker.check_model(model, full_check=True)
    return model, run(model, {"images": images})


def noise(found: dict[str, Array], expected: dict[str, Array]) -> float:
    return max(
        float(np.sqrt(np.square(found[name] - expected[name]).mean() / np.square(expected[name]).mean())) for name in expected
    )


@pytest.mark.parametrize("name", MICRO)
def test_a_network_is_calibrated_and_quantized(tmp_path: Path, name: str) -> None:
    micro = of_images(MICRO[name])
    portable, images = made(tmp_path, micro)
    calibration = darktrt.calibrate(portable, images, tmp_path / "my.calib", OPTIONS)
    model, info = load_model(portable)
    assert list(calibration.scales) == tensors_to_calibrate(model, info)
    assert calibration.channel_means
    assert calibration.fp_layers
    everywhere = replace(calibration, scales={**calibration.scales, "images": calibration.scales["images_float"]}, fp_layers=())
    given = np.random.default_rng(1).uniform(0, 1, (1, *micro.shape)).astype(np.float32)
    _, exact = raw_heads(tmp_path, None, given)
    quantized, found = raw_heads(tmp_path, everywhere, given)
    producers = {output: node.op_type for node in quantized.graph.node for output in node.output}
    convolutions = [node for node in quantized.graph.node if node.op_type == "Conv"]
    assert all(producers[node.input[0]] == "DequantizeLinear" for node in convolutions)
    assert 0 < noise(found, exact) < NOISE_TOLERANCE
    assert darktrt.insert_plugins(tmp_path / "plain.onnx", tmp_path / "q.onnx", SurgeryOptions(calibration=calibration)).int8


def test_the_tolerance_notices_wrong_scales(tmp_path: Path) -> None:
    portable, images = made(tmp_path, MICRO["mish"])
    calibration = darktrt.calibrate(portable, images, tmp_path / "my.calib", OPTIONS)
    scales = {**calibration.scales, "images": calibration.scales["images_float"]}
    given = np.random.default_rng(1).uniform(0, 1, (1, *MICRO["mish"].shape)).astype(np.float32)
    _, exact = raw_heads(tmp_path, None, given)
    for factor in (0.2, 20):
        wrong = replace(calibration, scales={name: np.float32(scale * factor) for name, scale in scales.items()}, fp_layers=())
        assert noise(raw_heads(tmp_path, wrong, given)[1], exact) > NOISE_TOLERANCE


@pytest.mark.parametrize("name", ["reorg", "reorg reverse", "reorg3d"])
def test_values_that_only_move_have_one_histogram_and_one_scale(tmp_path: Path, name: str) -> None:
    """Between the nodes of a reorg are tensors of six dimensions; their values are those of its input, at its positions."""
    portable, images = made(tmp_path, MICRO[name])
    model, info = load_model(portable)
    result = collect(portable, images).histograms
    moved = [
        node.output[0] for node in model.graph.node if node.op_type in ("Reshape", "Transpose") and node.output[0] in result
    ]
    assert len(moved) == 3
    (source,) = {node.input[0] for node in model.graph.node if node.output[0] == moved[0]}
    for one in moved:
        assert np.array_equal(result[one].counts, result[source].counts)
        assert np.array_equal(result[one].weighted, result[source].weighted)
    assert not np.array_equal(result[source].weighted, result[source].counts)
    (group,) = [group for group in passing_groups(model, info, list(result)) if source in group]
    assert set(group) == {source, *moved}


def test_a_tensor_that_no_network_of_darknet_has_is_named(tmp_path: Path) -> None:
    """A file that was changed: the positions of such a tensor are none of the image."""
    _, images = made(tmp_path, MICRO["mish"])
    model, info = load_model(tmp_path / "plain.onnx")
    reader = next(node for node in model.graph.node if "layer0" in node.input)
    shape = next(list(v.type.tensor_type.shape.dim) for v in model.graph.value_info if v.name == "layer0")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, *(d.dim_value for d in shape[1:])]), "shape"))
    flat = onnx.helper.make_node("Flatten", ["layer0"], ["flat"])
    back = onnx.helper.make_node("Reshape", ["flat", "shape"], ["back"])
    reader.input[0] = "back"
    nodes = [*model.graph.node]
    nodes[nodes.index(reader) : nodes.index(reader)] = [flat, back]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    save_model(model, info, tmp_path / "flat.onnx")
    with pytest.raises(darktrt.DarktrtError, match=r"flat\.onnx: tensor 'flat' is float32 \(1, 576\), and does not fit"):
        collect(tmp_path / "flat.onnx", images)
    (head,) = info.heads
    model, info = load_model(tmp_path / "plain.onnx")
    save_model(model, replace(info, heads=(replace(head, anchors=head.anchors[:2]),)), tmp_path / "other.onnx")
    with pytest.raises(darktrt.DarktrtError, match=r"other\.onnx: "):
        collect(tmp_path / "other.onnx", images)


def test_a_network_that_takes_no_images_is_refused_without_advice_about_images(tmp_path: Path) -> None:
    case = case_of(tmp_path, MICRO["4 channels"])
    convert_darknet(case.cfg, case.weights, tmp_path / "plain.onnx")
    Image.fromarray(made_image(20, 20, 0)).save(tmp_path / "0.png")
    with pytest.raises(darktrt.DarktrtError, match=r"the network has 4 input channels; images have 1 \(gray\) or 3 \(RGB\)$"):
        collect(tmp_path / "plain.onnx", [tmp_path / "0.png"])
